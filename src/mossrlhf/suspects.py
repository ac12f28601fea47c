"""Which sample a non-finite loss or gradient comes from, once there is one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from mossrlhf.faults import Fault, NonFiniteError, Suspect
from mossrlhf.loss import PPOMaxLoss
from mossrlhf.types import LossOutput, Rollout

if TYPE_CHECKING:
    from mossrlhf.engine import Engine

COLUMNS = (
    "sampler_logprobs", "logprobs", "ref_logprobs", "values", "bootstrap", "rewards", "advantages",
    "returns",
)  # fmt: skip
"""Columns of a rollout in the order they are filled in: what is wrong in one spoils later ones."""

WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Where every process has all weights, and can run the models without the others."""


def in_columns(minibatch: Rollout) -> list[tuple[str, int]]:
    """Look for samples of which the rollout itself holds numbers that are not finite.

    Args:
        minibatch: as it came, before anything was normalized over all of it.

    Returns:
        column and sample, of the first such column.

    Source: ours.
    """
    for name in COLUMNS:
        value: Tensor | None = getattr(minibatch, name)
        if value is None:
            continue
        broken = ~torch.isfinite(value)
        if value.ndim == 2:
            counts = minibatch.mask if "logprobs" in name else minibatch.mask | minibatch.states
            broken = (broken & counts).any(dim=1)
        if rows := broken.nonzero().flatten().tolist():
            return [(name, row) for row in rows]
    return []


def in_models(
    engine: "Engine",
    minibatch: Rollout,
    loss: PPOMaxLoss,
    ptx: Mapping[str, Tensor] | None,
    denominators: Mapping[str, Tensor],
) -> list[tuple[str, int]]:
    """Run the models on each sample alone, forward and then backward, until one is not finite.

    Args:
        engine: whose models they are; its gradients are gone afterwards.
        minibatch: of this process, prepared by the loss.
        loss: what was to be minimized.
        ptx: the batch of pre-training data, or None.
        denominators: by role that was to learn, what its loss is divided by.

    Returns:
        "forward" or "backward" of a role, and the sample; of the first role that has any.

    Source: ours.
    """
    if engine.accelerator.distributed_type not in WHOLE:
        return []  # the weights are spread over processes, and each would need the others
    for backward in (False, True):
        for role, denominator in denominators.items():
            extra = {"entropy": loss.entropy_coef is not None} if role == "policy" else {}
            found = [
                row
                for row, (part, share) in enumerate(_alone(role, minibatch, loss, ptx, denominator))
                if not _is_finite(engine, role, part, share, backward, **extra)
            ]
            if found:
                return [(f"{role} {'backward' if backward else 'forward'}", row) for row in found]
    return []


def _alone(
    role: str,
    minibatch: Rollout,
    loss: PPOMaxLoss,
    ptx: Mapping[str, Tensor] | None,
    denominator: Tensor,
) -> Iterator[tuple[Any, Callable[..., LossOutput]]]:
    """Each sample of a role as a micro-batch of its own, with the loss of it."""
    if role == "ptx":
        for row in range(0 if ptx is None else len(next(iter(ptx.values())))):
            part = {name: value[row : row + 1] for name, value in (ptx or {}).items()}
            yield part, partial(loss.ptx, denominator=denominator)
        return
    whole = loss.policy if role == "policy" else loss.critic
    for row in range(len(minibatch)):
        sample = minibatch.select(torch.tensor([row]))
        yield sample, partial(whole, batch=sample, denominator=denominator)


def weights_not_finite(engine: "Engine") -> list[str]:
    """Return the names of parameters that hold numbers which are not finite.

    Args:
        engine: whose models they are.

    Source: ours.
    """
    named = engine.bare.named_parameters()
    return [name for name, p in named if not bool(torch.isfinite(p.detach()).all())]


def not_finite(engine: "Engine", stats: Mapping[str, Tensor]) -> list[str]:
    """Return the names of statistics that are not finite on some process.

    Args:
        engine: that reduces over processes.
        stats: losses and gradient norms, scalars.

    Source: ours.
    """
    values = torch.stack([value.float() for value in stats.values()])
    broken = engine.reduce((~torch.isfinite(values)).float()).tolist()
    return [name for name, b in zip(stats, broken, strict=True) if b]


def report(
    engine: "Engine",
    terms: list[str],
    given: Rollout,
    minibatch: Rollout,
    loss: PPOMaxLoss,
    roles: Sequence[str],
    ptx: Mapping[str, Tensor] | None,
    denominators: Mapping[str, Tensor],
) -> NonFiniteError:
    """Look for the samples at fault, keep the batch, and say both, on all processes alike.

    Args:
        engine: whose step it was; its gradients are gone afterwards.
        terms: names of what is not finite.
        given: this process's minibatch as it came.
        minibatch: the same, prepared by the loss.
        loss: what was to be minimized.
        roles: who was to learn.
        ptx: the batch of pre-training data, or None.
        denominators: by role that was to learn, what its loss is divided by.

    Source: ours.
    """
    engine.forget()
    accelerator = engine.accelerator
    weights = weights_not_finite(engine)
    found = in_columns(given)
    if not found and not weights:
        found = in_models(engine, minibatch, loss, ptx, denominators)
    fault = Fault(
        terms=terms,
        suspects=[Suspect(term, row, accelerator.process_index) for term, row in found],
        rollout=given,
        roles=list(roles),
        loss=repr(loss),
        denominators={role: float(value) for role, value in denominators.items()},
        ptx=ptx or {},
        process=accelerator.process_index,
    )
    kept, suspects = engine.keep_fault(fault)
    if accelerator.num_processes > 1:
        suspects = gather_object(list(suspects))
    return NonFiniteError(
        f"not finite: {', '.join(terms)}; the step was not taken. "
        f"{describe(suspects, weights, len(given) * accelerator.num_processes)} {kept}"
        "Look for a reward that explodes, a learning rate too high, or half-precision overflow"
    )


def describe(suspects: Sequence[Suspect], weights: Sequence[str], size: int) -> str:
    """Say in a sentence or two who is suspected.

    Args:
        suspects: of all processes.
        weights: parameters that are not finite.
        size: samples of a minibatch.

    Source: ours.
    """
    if weights:
        return f"The weights themselves are not finite: {', '.join(weights[:3])}."
    if not suspects:
        return (
            "The minibatch itself is finite, so it is the models' forward or backward; no sample "
            "alone shows it."
        )
    shown = "; ".join(str(suspect) for suspect in suspects[:4])
    more = f"; {len(suspects) - 4} more" if len(suspects) > 4 else ""
    spread = len(suspects) >= size > 1
    hint = " All samples at once: one may have spread by a normalization." if spread else ""
    return f"In the minibatch, {shown}{more}.{hint}"


def _is_finite(
    engine: "Engine", role: str, part: Any, share: Any, backward: bool, **extra: Any
) -> bool:
    # Not through what wraps the models: its hooks would wait for other processes.
    with engine.accelerator.no_sync(engine.model), torch.set_grad_enabled(backward):
        output = engine.bare(role, part, share, **extra)
        values = [output.loss, *output.stats.values()]
        if backward:
            engine.accelerator.backward(output.loss)
            trained = [p for p in engine.bare.parameters() if p.grad is not None]
            values = [p.grad for p in trained if p.grad is not None]
            for parameter in trained:
                parameter.grad = None
    return all(bool(torch.isfinite(value).all()) for value in values)
