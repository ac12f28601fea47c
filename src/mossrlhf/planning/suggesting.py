"""What to change so that a run fits, found by planning it again."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import GenerationConfig

from mossrlhf.config import TrainerConfig
from mossrlhf.planning.report import GIB, MIB, MemoryPlan
from mossrlhf.sampling import HFSampler

Change = tuple[str, dict[str, Any]]
"""What to say of a change, and the arguments of `plan` it is made of."""


def suggestion(plan: MemoryPlan, memory: float) -> str:
    """Say what to change so that a run fits; the less it changes of the run, the earlier tried.

    Args:
        plan: of the run.
        memory: bytes of one device.

    Source: ours.
    """
    if plan.fits(memory):
        return f"It fits: the peak ({plan.peak_phase}) is {_gib(plan.peak)} of {_gib(memory)}."
    made: list[Change] = []
    current = plan
    for step, phases in STEPS:
        if current.fits(memory):
            break
        if all(current.phases[phase] <= memory for phase in phases):
            continue
        if step in FOR_ACTIVATIONS and held(current) > memory:
            continue  # it would do no good yet, or no longer
        found = _best(step, current, memory, phases)
        if found is not None:
            change, current = found
            made.append(change)
    if not current.fits(memory):
        tried = f"with {_listed(made)} the peak ({current.peak_phase}) is still" if made else ""
        return (
            f"Nothing tried here makes it fit {_gib(memory)}: {tried or 'the peak is'} "
            f"{_gib(current.peak)}; take a smaller model, shorter responses or larger devices."
        )
    for change in made[:-1]:  # a later change may have made an earlier one needless
        fewer = [other for other in made if other is not change]
        again = _applied(plan, fewer)
        if again.fits(memory):
            made, current = fewer, again
    return (
        f"To fit {_gib(memory)}, {_listed(made)}: the peak ({current.peak_phase}) is then "
        f"{_gib(current.peak)}."
    )


def held(plan: MemoryPlan) -> int:
    """Return the bytes of weights and optimizer states, which no smaller batch lowers.

    Args:
        plan: any.

    Source: ours.
    """
    return plan.weights + sum(role.optimizer for role in plan.roles.values())


def _best(
    step: Callable[[MemoryPlan], Iterator[Change]],
    current: MemoryPlan,
    memory: float,
    phases: tuple[str, ...],
) -> tuple[Change, MemoryPlan] | None:
    """The first change of a step that lets its phases fit, else the last that helps."""
    found = None
    highest = max(current.phases[phase] for phase in phases)
    for change in step(current):
        again = current.again(**change[1])
        reached = max(again.phases[phase] for phase in phases)
        if reached < 0.99 * highest:
            found, highest = (change, again), reached
        if highest <= memory:
            break
    return found


def _applied(plan: MemoryPlan, changes: list[Change]) -> MemoryPlan:
    changed: dict[str, Any] = {}
    for _, arguments in changes:
        arguments = dict(arguments)
        if "args" in arguments and "args" in changed:  # each changes an option of its own
            arguments["args"] = _merged(plan.given["args"], changed["args"], arguments["args"])
        changed.update(arguments)
    return plan.again(**changed)


def _merged(first: TrainerConfig | None, *later: TrainerConfig) -> TrainerConfig:
    start = first or TrainerConfig()
    changed = {}
    for one in later:
        new = {name: value for name, value in vars(one).items() if value != getattr(start, name)}
        changed.update(new)
    return replace(start, **changed)


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def _fewer_drawn(plan: MemoryPlan) -> Iterator[Change]:
    drawn, length = plan.work.drawn, plan.work.response
    known = plan.given["sampler"]
    asked = plan.given["generation_config"] or GenerationConfig(max_new_tokens=length)
    for size in _halves(drawn):
        sampler = HFSampler(
            generation_config=known.generation_config if isinstance(known, HFSampler) else asked,
            eos_token_id=0,
            pad_token_id=0,
            batch_size=size,
        )
        yield (
            f"draw {size} responses at a time (HFSampler(batch_size={size}))",
            {"sampler": sampler},
        )


def _fewer_at_a_time(plan: MemoryPlan) -> Iterator[Change]:
    args = plan.given["args"] or TrainerConfig()
    for size in _halves(max(plan.work.updated, plan.work.scored)):
        words = f"set TrainerConfig(micro_batch_size={size})"
        yield words, {"args": replace(args, micro_batch_size=size)}


def _recomputed(plan: MemoryPlan) -> Iterator[Change]:
    args = plan.given["args"] or TrainerConfig()
    if not args.gradient_checkpointing:
        words = "set TrainerConfig(gradient_checkpointing=True)"
        yield words, {"args": replace(args, gradient_checkpointing=True)}


def _waiting(plan: MemoryPlan) -> Iterator[Change]:
    args = plan.given["args"] or TrainerConfig()
    if not args.offload_frozen and plan.given["sharding"] not in ("fsdp", "zero3"):
        words = "set TrainerConfig(offload_frozen=True)"
        yield words, {"args": replace(args, offload_frozen=True), "frozen": None}


def _adapters(plan: MemoryPlan) -> Iterator[Change]:
    if plan.given["peft_config"] is None and not isinstance(plan.given["critic"], nn.Module):

        def lora() -> LoraConfig:
            return LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.0)

        words = "train adapters on one base (peft_config and critic: LoraConfig(r=16, "
        words += 'target_modules="all-linear"))'
        yield words, {"peft_config": lora(), "critic": lora()}


def _half_base(plan: MemoryPlan) -> Iterator[Change]:
    adapted = plan.given["peft_config"] is not None
    if adapted and plan.given["dtype"] is None:
        yield "load the base in bfloat16 (dtype=torch.bfloat16)", {"dtype": torch.bfloat16}


def _shared_out(plan: MemoryPlan) -> Iterator[Change]:
    args = plan.given["args"] or TrainerConfig()
    for processes in (2, 4, 8, 16, 32, 64):
        try:
            args.require_shareable(processes)
        except ValueError:
            continue
        if processes > plan.given["processes"]:
            changed = dict(processes=processes, sharding="fsdp", frozen=None)
            yield f"share it among {processes} devices (FSDP2)", changed


FOR_ACTIVATIONS = (_fewer_drawn, _fewer_at_a_time, _recomputed)
"""Changes that leave weights and optimizer states as they are."""

STEPS = (
    (_fewer_drawn, ("sampling",)),
    (_fewer_at_a_time, ("scoring", "update")),
    (_recomputed, ("update",)),
    (_waiting, ("sampling", "scoring", "update")),
    (_adapters, ("sampling", "scoring", "update")),
    (_half_base, ("sampling", "scoring", "update")),
    (_shared_out, ("sampling", "scoring", "update")),
    (_fewer_drawn, ("sampling",)),
    (_fewer_at_a_time, ("scoring", "update")),
    (_recomputed, ("update",)),
)
"""Changes in the order they are tried, and the phases they are for."""


def _listed(changes: list[Change]) -> str:
    words = [words for words, _ in changes]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB" if size >= GIB else f"{size / MIB:.3g} MiB"
