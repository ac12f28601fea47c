"""Reference and reward models beside a sharded policy: sharded as it is, or waiting on the CPU."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from mossrlhf.config import TrainerConfig
from mossrlhf.models.lora import unwrap_peft
from mossrlhf.sharding import by_fsdp, by_zero3, gathered, is_sharded, note_hooks


def shard_alike(model: nn.Module, trained: nn.Module) -> nn.Module:
    """Shard a frozen model over the processes in the way of a trained one, in place.

    Under FSDP2 block by block, what is outside of blocks staying whole; under ZeRO-3 all of it.
    A model that shares weights with the trained one is left alone, and so is any where that one
    is not sharded.

    Args:
        model: reference or reward model.
        trained: the `ActorCritic`, prepared.

    Returns:
        the model.

    Source: torch's ``fully_shard``, ``deepspeed.initialize``.
    """
    if is_sharded(model) or _shares(model, trained):
        return model
    if by_fsdp(trained):
        mesh = next(m for m in trained.modules() if isinstance(m, FSDPModule))
        for block in _blocks(model):
            # Not the model itself: it is asked by its parts, which a root would not hear of.
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


def settle(
    trained: nn.Module, *models: nn.Module | None, device: torch.device, args: TrainerConfig
) -> None:
    """Put frozen models where they stay: sharded like the trained one, on a device, or aside.

    Args:
        trained: the `ActorCritic`, prepared.
        models: reference and reward models; None is passed over.
        device: where models are asked.
        args: say whether they wait on the CPU.

    Source: ours.
    """
    for model in models:
        if model is None:
            continue
        if _shares(model, trained):
            getattr(model, "score", model).to(device)  # the rest is where the policy is
            continue
        shard_alike(model, trained)
        if args.offload_frozen and not is_sharded(model):
            _resting.add(model.to("cpu"))
        else:
            model.to(device)


def _blocks(model: nn.Module) -> list[nn.Module]:
    parts: list[Any] = [unwrap_peft(model), *model.children()]
    names = {name for part in parts for name in getattr(part, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in names]


def _mesh(part: Any) -> Any:
    groups = part._get_fsdp_state()._fsdp_param_groups
    return groups[0].mesh_info.mesh


_resting: WeakSet[nn.Module] = WeakSet()
"""Models that wait on the CPU."""


@contextmanager
def at_work(
    root: nn.Module, *models: nn.Module | None, device: torch.device, lend: bool
) -> Iterator[None]:
    """Have models where and as they can be asked, for as long as they are.

    Within another such context nothing happens to the models that are its.

    Args:
        root: the `ActorCritic`, whose weights some of the models may share.
        models: any; None is passed over.
        device: where those that wait on the CPU are moved, and back.
        lend: whether sharded ones are lent whole, since processes may ask them unequally often.

    Source: ours.
    """
    with ExitStack() as stack:
        for model in models:
            if model is None:
                continue
            if is_sharded(model):
                if lend:
                    own = root if _shares(model, root) else model
                    stack.enter_context(gathered(own, model))
            elif model in _resting:
                stack.callback(_resting.add, model)
                stack.callback(model.to, "cpu")
                _resting.discard(model.to(device))
        yield


def _shares(model: nn.Module, root: nn.Module) -> bool:
    taken = {*map(id, root.modules())}
    return any(id(module) in taken for module in model.modules())
