"""Frozen models beside a trained one: sharded like it, or kept on the CPU."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from mossrlhf.config import TrainerConfig
from mossrlhf.distributed.sharding import by_fsdp, by_zero3, gathered, is_sharded, note_hooks
from mossrlhf.models.lora import unwrap_peft


def shard_alike(model: nn.Module, trained: nn.Module) -> nn.Module:
    """Shard a frozen model over the processes like the trained one, in place, and return it.

    Under FSDP2 block by block, with the rest left whole; under ZeRO-3 all of it. A model that
    shares weights with the trained one is left alone.
    """
    if is_sharded(model) or _shares(model, trained):
        return model
    if by_fsdp(trained):
        mesh = next(m for m in trained.modules() if isinstance(m, FSDPModule))
        for block in _blocks(model):
            # Not the model itself: its parts are called directly, past a root's hooks.
            fully_shard(block, mesh=_mesh(mesh), reshard_after_forward=True)
    elif by_zero3(trained):
        import deepspeed

        half = next(model.parameters()).dtype
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": half == torch.bfloat16},
            "fp16": {"enabled": half == torch.float16},
        }
        note_hooks(model, deepspeed.initialize(model=model, config=config)[0])
    return model


def place_frozen(
    trained: nn.Module, *models: nn.Module | None, device: torch.device, args: TrainerConfig
) -> None:
    """Shard frozen models like the trained one, or move them to the device or to the CPU.

    Args:
        trained: the `ActorCritic`, prepared.
        models: reference and reward models; None is skipped.
        device: where models run.
        args: ``offload_frozen`` keeps them on the CPU between uses.
    """
    for model in models:
        if model is None:
            continue
        if _shares(model, trained):
            getattr(model, "score", model).to(device)  # the rest is the policy's
            continue
        shard_alike(model, trained)
        if args.offload_frozen and not is_sharded(model):
            _offloaded.add(model.to("cpu"))
        else:
            model.to(device)


def _blocks(model: nn.Module) -> list[nn.Module]:
    parts: list[Any] = [unwrap_peft(model), *model.children()]
    names = {name for part in parts for name in getattr(part, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in names]


def _mesh(part: Any) -> Any:
    groups = part._get_fsdp_state()._fsdp_param_groups
    return groups[0].mesh_info.mesh


_offloaded: WeakSet[nn.Module] = WeakSet()
"""Models kept on the CPU between uses."""


@contextmanager
def on_device(
    root: nn.Module, *models: nn.Module | None, device: torch.device, gather: bool
) -> Iterator[None]:
    """Move models kept on the CPU to the device, for the duration of the block; nestable.

    Args:
        root: the `ActorCritic`, with which the models may share weights.
        models: any; None is skipped.
        device: where to.
        gather: whether to gather sharded models, so that each process may call them as often as
            it likes.
    """
    with ExitStack() as stack:
        for model in models:
            if model is None:
                continue
            if is_sharded(model):
                if gather:
                    own = root if _shares(model, root) else model
                    stack.enter_context(gathered(own, model))
            elif model in _offloaded:
                stack.callback(_offloaded.add, model)
                stack.callback(model.to, "cpu")
                _offloaded.discard(model.to(device))
        yield


def _shares(model: nn.Module, root: nn.Module) -> bool:
    taken = {*map(id, root.modules())}
    return any(id(module) in taken for module in model.modules())
