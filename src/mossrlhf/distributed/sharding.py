"""Parameters that are sharded over processes, by FSDP2 or ZeRO-3."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def full(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be spread over processes, which then must all ask for it.

    Args:
        tensor: a ``DTensor``, or any other, which is returned as it is.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor.

    Args:
        tensor: a ``DTensor``, or any other, which is returned as it is.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def by_fsdp(model: nn.Module | None) -> bool:
    """Whether ``fully_shard`` has been called on a model or on something inside.

    Args:
        model: any; None has nothing inside.
    """
    return model is not None and any(isinstance(module, FSDPModule) for module in model.modules())


def by_zero3(model: nn.Module | None) -> bool:
    """Whether ZeRO-3 has partitioned a model's parameters.

    Args:
        model: any; None has none.
    """
    return model is not None and any(hasattr(p, "ds_id") for p in model.parameters())


def is_sharded(*models: nn.Module | None) -> bool:
    """Whether a forward of one of these models takes all processes.

    Args:
        models: any.
    """
    return any(by_fsdp(model) or by_zero3(model) for model in models)


_lent: WeakSet[nn.Module] = WeakSet()
_shown: WeakSet[nn.Module] = WeakSet()
_hooked: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def note_hooks(model: nn.Module, engine: Any) -> None:
    """Remember who has put ZeRO-3's hooks on a model, so that `gathered` can take them off.

    Args:
        model: the module inside.
        engine: what ``deepspeed.initialize`` has made of it.
    """
    optimizer = engine.optimizer  # where nothing is trained, the hooks' owner itself
    _hooked[model] = getattr(optimizer, "parameter_offload", optimizer)


@contextmanager
def gathered(root: nn.Module, part: nn.Module | None = None) -> Iterator[None]:
    """Lend the weights of a model whole, on every process, so that each runs at its own pace.

    Processes enter and leave together, and in between need not run as many forwards as each other.
    Where nothing is sharded, nothing happens; nor within another such context.

    Args:
        root: the outermost module that is sharded, unwrapped.
        part: what is to be run; None for all of it.

    Source: torch's ``FSDPModule.unshard``; DeepSpeed's ``unwrap_model_for_generation``.
    """
    part = root if part is None else part
    if root in _lent or not is_sharded(part):
        yield
        return
    with ExitStack() as stack:
        if by_fsdp(root):
            stack.enter_context(_unsharded(root, part))
        else:
            stack.enter_context(_without_hooks(root))
            stack.enter_context(_gathered_parameters(list(part.parameters())))
        _lent.add(root)
        stack.callback(_lent.discard, root)
        yield


@contextmanager
def _unsharded(root: nn.Module, part: nn.Module) -> Iterator[None]:
    modules = dict.fromkeys([root, *part.modules()])  # the root holds what no block does
    parts: list[Any] = [module for module in modules if isinstance(module, FSDPModule)]
    for module in parts:
        # Without a root's, the first block would take itself for one, and the root be refused.
        module._get_fsdp_state()._lazy_init()
    groups = [g for module in parts for g in module._get_fsdp_state()._fsdp_param_groups]
    meshes = [group.post_forward_mesh_info for group in groups]
    try:
        for group in groups:
            group.post_forward_mesh_info = None  # the first forward keeps what it has used
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
    """Take ZeRO-3's hooks off: the first forward would drop the weights it has used."""
    offload = _hooked[root]
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
    """Put all weights of sharded models into them as plain tensors on the CPU, to be saved.

    Processes enter together; one tensor at a time is gathered, and kept where it is asked for.
    Within another such context nothing happens.

    Args:
        here: whether this process is the one that saves. Elsewhere the models stay as they are.
        models: sharded or not; with those that are not nothing happens, nor with None.
    """
    spread = [m for m in models if m is not None and m not in _shown and _is_spread(m)]
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
        _shown.update(spread)
        yield
    finally:
        for model in spread:
            _shown.discard(model)
        for holder, name, parameter in places:
            dict.__setitem__(holder, name, parameter)


def _is_spread(model: nn.Module) -> bool:
    # ZeRO-2 keeps weights whole, but in bfloat16 where it computes so, and spreads the true ones.
    return is_sharded(model) or any(hasattr(p, "_hp_mapping") for p in model.parameters())


@torch.no_grad()
def gathered_tensor(parameter: nn.Parameter) -> Tensor:
    """Return all of a parameter on the CPU, in the precision its optimizer has it in.

    Args:
        parameter: sharded or not; where it is, all processes ask for it together.
    """
    if hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        master: Tensor | None = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach().cpu().clone()
    return entire(parameter.detach()).cpu().clone()


@torch.no_grad()
def entire(tensor: Tensor) -> Tensor:
    """Return all of a weight that may be sharded; where it is, all processes ask together.

    Args:
        tensor: a parameter, or what is beneath it.
    """
    if not hasattr(tensor, "ds_id"):
        return full(tensor)
    with _gathered_parameters([tensor]):  # type: ignore[list-item]
        return tensor.detach().clone()


def shape(tensor: Tensor) -> torch.Size:
    """Return the shape of all of a weight that may be sharded.

    Args:
        tensor: a parameter.
    """
    found: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return found


def share_of(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Return this process's share of a tensor that belongs to a parameter.

    Args:
        parameter: sharded by FSDP2, or not.
        value: all of it, alike on all processes; a number that goes with it is returned as it is.
    """
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


@torch.no_grad()
def put(parameter: nn.Parameter, value: Tensor) -> None:
    """Put a tensor into a parameter, of which this process may hold a part.

    Args:
        parameter: sharded or not.
        value: all of it, alike on all processes.
    """
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
    """Return how many numbers there are in parameters, over all processes.

    Args:
        parameters: sharded or not.
    """
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters)
