"""Models sharded by FSDP2 or ZeRO-3, and frozen models beside them: sharded or offloaded."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mossrlhf.config import TrainerConfig


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a ``DTensor`` (collective), or any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a ``DTensor``, or any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def by_fsdp(model: nn.Module | None) -> bool:
    """Whether ``fully_shard`` has been called on a model or a submodule."""
    return model is not None and any(isinstance(module, FSDPModule) for module in model.modules())


def by_zero3(model: nn.Module | None) -> bool:
    """Whether ZeRO-3 has partitioned a model's parameters."""
    return model is not None and any(hasattr(p, "ds_id") for p in model.parameters())


def is_sharded(*models: nn.Module | None) -> bool:
    """Whether a forward of one of these models is collective."""
    return any(by_fsdp(model) or by_zero3(model) for model in models)


_gathered: WeakSet[nn.Module] = WeakSet()
_whole: WeakSet[nn.Module] = WeakSet()
_hook_owners: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def note_hooks(model: nn.Module, engine: Any) -> None:
    """Register the DeepSpeed engine of a model, so that `gathered` can remove ZeRO-3's hooks."""
    optimizer = engine.optimizer  # where nothing is trained, the hooks' owner itself
    _hook_owners[model] = getattr(optimizer, "parameter_offload", optimizer)


@contextmanager
def gathered(root: nn.Module, part: nn.Module | None = None) -> Iterator[None]:
    """Gather a model's weights on every process for the duration of the block; nestable.

    Processes enter and exit together; in between each may run as many forwards as it likes.
    """
    part = root if part is None else part
    if root in _gathered or not is_sharded(part):
        yield
        return
    with ExitStack() as stack:
        if by_fsdp(root):
            stack.enter_context(_unsharded(root, part))
        else:
            stack.enter_context(_without_hooks(root))
            stack.enter_context(_gathered_parameters(list(part.parameters())))
        _gathered.add(root)
        stack.callback(_gathered.discard, root)
        yield


@contextmanager
def _unsharded(root: nn.Module, part: nn.Module) -> Iterator[None]:
    modules = dict.fromkeys([root, *part.modules()])  # the root holds parameters of no block
    parts: list[Any] = [module for module in modules if isinstance(module, FSDPModule)]
    for module in parts:
        # Otherwise the first block to run would be initialized as the root, and the root refused.
        module._get_fsdp_state()._lazy_init()
    groups = [g for module in parts for g in module._get_fsdp_state()._fsdp_param_groups]
    meshes = [group.post_forward_mesh_info for group in groups]
    try:
        for group in groups:
            group.post_forward_mesh_info = None  # or the first forward would reshard
        for module in parts:
            module.unshard()
        yield
    finally:
        for group, mesh in zip(groups, meshes, strict=True):
            group.post_forward_mesh_info = mesh
        for module in parts:
            module.reshard()


def _gathered_parameters(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(parameters)
    return context


@contextmanager
def _without_hooks(root: nn.Module) -> Iterator[None]:
    """Remove ZeRO-3's hooks, which would release weights after the first forward."""
    offload = _hook_owners[root]
    for parameter in root.parameters():
        parameter.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        yield
    finally:
        offload._register_deepspeed_module(offload.module)


@contextmanager
def whole(here: bool, *models: nn.Module | None) -> Iterator[None]:
    """Replace sharded weights by whole ones on the CPU, to be saved, for the duration of the block.

    Collective and nestable; one tensor at a time is gathered.
    """
    spread = [m for m in models if m is not None and m not in _whole and _is_spread(m)]
    places = [
        (module._parameters, name, parameter)
        for model in spread
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    held: dict[int, nn.Parameter] = {}
    for _, _, parameter in places:
        if id(parameter) not in held:
            value = gathered_tensor(parameter)
            if here:
                held[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            else:
                held[id(parameter)] = parameter
    try:
        for holder, name, parameter in places:
            dict.__setitem__(holder, name, held[id(parameter)])
        _whole.update(spread)
        yield
    finally:
        for model in spread:
            _whole.discard(model)
        for holder, name, parameter in places:
            dict.__setitem__(holder, name, parameter)


def _is_spread(model: nn.Module) -> bool:
    # ZeRO-2 keeps weights whole, but possibly in bfloat16, and shards their float32 masters.
    return is_sharded(model) or any(hasattr(p, "_hp_mapping") for p in model.parameters())


@torch.no_grad()
def gathered_tensor(parameter: nn.Parameter) -> Tensor:
    """Return a whole parameter on the CPU, in its optimizer's precision; collective if sharded."""
    if hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        master: Tensor | None = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach().cpu().clone()
    return entire(parameter.detach()).cpu().clone()


@torch.no_grad()
def entire(tensor: Tensor) -> Tensor:
    """Return the whole of a weight; collective where it is sharded."""
    if not hasattr(tensor, "ds_id"):
        return full(tensor)
    with _gathered_parameters([tensor]):  # type: ignore[list-item]
        return tensor.detach().clone()


def shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the whole of a weight that may be sharded."""
    found: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return found


def share_of(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Return this process's part of a parameter's value, given whole on all processes.

    A value of another shape (Adam's step count) is returned as it is.
    """
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


@torch.no_grad()
def put(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter, sharded or not, from its value, given whole on all processes."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
    else:
        parameter.copy_(share_of(parameter, value.to(parameter.dtype)))
    if hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.float().to(parameter.device))


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Return the number of elements of parameters, over all processes."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters)


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
    """Shard frozen models like the trained one, or move them to the device or to the CPU."""
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
    modules: list[Any] = list(model.modules())
    names = {
        name for module in modules for name in getattr(module, "_no_split_modules", None) or ()
    }
    return [module for module in modules if type(module).__name__ in names]


def _mesh(part: Any) -> Any:
    groups = part._get_fsdp_state()._fsdp_param_groups
    return groups[0].mesh_info.mesh


_offloaded: WeakSet[nn.Module] = WeakSet()
"""Models kept on the CPU between uses."""


@contextmanager
def on_device(
    root: nn.Module, *models: nn.Module | None, device: torch.device, gather: bool
) -> Iterator[None]:
    """Move models kept on the CPU to the device, for the duration of the block; nestable."""
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
