"""`MemoryPlan`: what a run will need, in figures and in a table."""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mossrlhf.planning.passes import Work

GIB, MIB = 2**30, 2**20

ROLES = ("policy", "critic", "reference", "reward")
"""The rows of the table."""


@dataclass(frozen=True)
class RoleMemory:
    """What one role holds on a device for as long as the run lasts.

    Args:
        parameters: that are its own; those of a base it shares are its owner's.
        trained: of those, how many are trained.
        weights: bytes, buffers included.
        gradients: bytes, while there are any.
        optimizer: bytes of its optimizer's states.
        note: where it is not a model of its own: what it is instead.

    Source: ours.
    """

    parameters: int = 0
    trained: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    note: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will need of one device's memory, in bytes; ``print`` it for a table.

    Not in it: what the device's driver and libraries hold themselves (0.5 to 1 GiB on CUDA), and
    what an allocator loses between its blocks.

    Args:
        roles: by name, what each of `ROLES` holds throughout.
        kept: by role, what the forward of one micro-batch of an update keeps for its backward.
        scoring: by role, what scoring one micro-batch takes at most.
        kv_cache: of the responses drawn at once, at their full length.
        logits: of one chunk in the token path, in float32.
        rollout: the rollout with all its annotations, and a minibatch of it.
        extra: what several processes add: buckets of gradients, weights gathered for a moment.
        lent: by role, what comes to the device beside `roles` while frozen models are asked.
        phases: "sampling", "scoring" and "update" → the peak of each, everything included.
        settings: what was assumed, in words.
        work: how much there is at a time.
        given: the arguments of `plan`, its model aside.
        planned: plans the same model by all of these arguments.

    Source: ours.
    """

    roles: Mapping[str, RoleMemory]
    kept: Mapping[str, int]
    scoring: Mapping[str, int]
    kv_cache: int
    logits: int
    rollout: int
    extra: int
    lent: Mapping[str, int]
    phases: Mapping[str, int]
    settings: Mapping[str, str]
    work: Work
    given: Mapping[str, Any] = field(repr=False, compare=False)
    planned: Callable[..., "MemoryPlan"] = field(repr=False, compare=False)

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(role.weights for role in self.roles.values())

    @property
    def steady(self) -> int:
        """Bytes of weights, gradients and optimizer states of all roles: all but activations."""
        held = self.roles.values()
        return sum(role.weights + role.gradients + role.optimizer for role in held)

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The phase in which the most is needed."""
        return max(self.phases, key=lambda name: self.phases[name])

    def again(self, **changed: Any) -> "MemoryPlan":
        """Plan the same run with some arguments changed.

        Args:
            changed: arguments of `plan`, ``model`` aside.
        """
        return self.planned(**{**self.given, **changed})

    def fits(self, memory: float) -> bool:
        """Whether the peak is within some bytes; leave room for what is not in it.

        Args:
            memory: bytes of one device.
        """
        return self.peak <= memory

    def suggest(self, memory: float) -> str:
        """Say what to change so that the run fits, in one sentence; each change is planned.

        Lines of at most 80 columns.

        Args:
            memory: bytes of one device.
        """
        from mossrlhf.planning.suggesting import suggestion

        return textwrap.fill(
            suggestion(self, memory), WIDTH, break_long_words=False, break_on_hyphens=False
        )

    def __str__(self) -> str:
        unit, size = ("GiB", GIB) if self.peak >= 10 * GIB else ("MiB", MIB)

        def shown(number: int) -> str:
            return f"{number / size:,.2f}" if unit == "GiB" else f"{number / size:,.1f}"

        lines = [f"Memory of one device, {unit}", self.settings["where"], ""]
        lines += [f"{'':12}{'weights':>11}{'gradients':>11}{'optimizer':>11}  parameters"]
        for name, role in self.roles.items():
            figures = (role.weights, role.gradients, role.optimizer)
            cells = "".join(f"{shown(n) if n else '-':>11}" for n in figures)
            lines.append(f"{name:12}{cells}  {_counted(role)}".rstrip())
        held = self.roles.values()
        sums = [sum(getattr(r, n) for r in held) for n in ("weights", "gradients", "optimizer")]
        lines += [f"{'together':12}" + "".join(f"{shown(n):>11}" for n in sums), ""]
        for words, number, remark in self._lines():
            lines += _row(words, shown(number), remark)
        lines.append("")
        for name, number in self.phases.items():
            mark = "<- the peak" if name == self.peak_phase else ""
            lines.append(f"{f'peak of {name}':36}{shown(number):>9}  {mark}".rstrip())
        return "\n".join(lines)

    def _lines(self) -> list[tuple[str, int, str]]:
        said = self.settings
        lines = [
            (f"activations, update of the {role}", number, said["update"])
            for role, number in self.kept.items()
        ]
        scoring = max(self.scoring, key=lambda role: self.scoring[role])
        lines += [
            ("activations, scoring", self.scoring[scoring], f"{said[scoring]}, by the {scoring}"),
            ("KV cache while sampling", self.kv_cache, said["sampling"]),
            ("one chunk of logits", self.logits, "within the above"),
            ("rollout", self.rollout, said["rollout"]),
        ]
        for role, number in self.lent.items():
            lines.append((f"{role}, while asked", number, said["lent"]))
        if self.extra:
            lines.append(("buckets, gathered weights", self.extra, said["extra"]))
        return lines


WIDTH = 80
"""Columns of the table, and of what `MemoryPlan.suggest` says."""


def _row(words: str, number: str, remark: str) -> list[str]:
    """One line of the table, or two where the remark is too long to stand beside its figure."""
    line = f"{words:36}{number:>9}  {remark}".rstrip()
    if len(line) <= WIDTH:
        return [line]
    first, _, rest = remark.rpartition(", ")
    return [f"{words:36}{number:>9}  {first}{',' if first else ''}".rstrip(), f"{'':47}{rest}"]


def _counted(role: RoleMemory) -> str:
    if not role.parameters:
        return role.note
    trained = "all" if role.trained == role.parameters else _short(role.trained)
    counted = f"{_short(role.parameters)}, {trained if role.trained else 'none'} trained"
    return counted if not role.note else f"{_short(role.parameters)}, {role.note}"


def _short(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
