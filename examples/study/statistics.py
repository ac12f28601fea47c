"""Intervals over several seeds, and verdicts from intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantile of Student's t with n − 1 degrees of freedom, by n (any table of it)."""

COLLAPSE_KL = 15.0
"""Nats per response from which a policy counts as gone: `TrainerConfig.collapse_kl`'s default."""

HELD, AGAINST, OPEN = "holds", "against", "open"


@dataclass(frozen=True)
class Interval:
    """Mean of a number over seeds, with its 95 % confidence interval.

    Args:
        values: one for each seed.
        mean: of them.
        low: lower end.
        high: upper end; both are infinite for a single seed.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Return mean and Student's 95 % interval, x̄ ± t·s/√n.

    Args:
        values: one for each seed, at most five.
    """
    n, center = len(values), mean(values)
    reach = math.inf if n < 2 else T_975[n] * stdev(values) / math.sqrt(n)
    return Interval(tuple(values), center, center - reach, center + reach)


class Run:
    """One run's record, with the accessors that claims use.

    Args:
        record: what `measuring.run` returned.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record

    def curve(self, name: str) -> list[float]:
        """Return a metric at every point of the run where it is finite."""
        return [y for y in self.record["curves"][name] if y is not None]

    def last(self, name: str) -> float:
        """Return the mean of a metric over the last tenth of the run."""
        values = self.curve(name)
        return mean(values[-max(1, len(values) // 10) :])

    def held(self, name: str, of: str = "held_out") -> float:
        """Return a number of the evaluation on held-out prompts after the run."""
        return float(self.record[of][name])

    @property
    def log_kl(self) -> float:
        """Logarithm of the KL divergence to the SFT model at the end: differences are ratios."""
        return math.log(max(self.held("kl"), 0.05))

    @property
    def passage(self) -> float:
        """The first iteration at which the KL divergence is beyond `COLLAPSE_KL`, or the last."""
        points = zip(self.record["curves"]["step"], self.record["curves"]["kl"], strict=True)
        beyond = [step for step, kl in points if kl is None or kl > COLLAPSE_KL]
        return float(min([*beyond, self.record["steps"]]))

    def fluctuation(self, name: str) -> float:
        """Return the standard deviation of a metric's changes from one point to the next."""
        values = self.curve(name)
        return stdev([b - a for a, b in pairwise(values)])

    def early_drop(self, name: str, until: int = 20) -> float:
        """Return how far a metric falls below what it had reached, in the first iterations."""
        steps = self.record["curves"]["step"]
        values = [
            y
            for step, y in zip(steps, self.record["curves"][name], strict=True)
            if step <= until and y is not None
        ]
        return max(max(values[: i + 1]) - y for i, y in enumerate(values))


class NotRunError(LookupError):
    """An arm that this world does not have."""


class Seed:
    """All runs of one world.

    Args:
        record: the world's facts and runs.
        gentle: whether to use the second learning rate.
    """

    def __init__(self, record: Mapping[str, Any], gentle: bool = False) -> None:
        self.record = record
        self.gentle = gentle

    def __getitem__(self, arm: str) -> Run:
        """The run of an arm; `NotRunError` if there is none at this rate."""
        name = f"{arm}@gentle" if self.gentle else arm
        if name not in self.record["runs"]:
            raise NotRunError(name)
        return Run(self.record["runs"][name])

    @property
    def sft(self) -> Mapping[str, float]:
        """Figures of the SFT model on the same held-out prompts."""
        facts: Mapping[str, float] = self.record["facts"]["sft"]
        return facts


@dataclass(frozen=True)
class Claim:
    """One claim of a finding: a number whose sign or size decides.

    Args:
        text: the claim, as a clause.
        measure: the number, for one seed.
        unit: of the number.
        within: None if the number should be above 0; else it should be within ± this.
    """

    text: str
    measure: Callable[[Seed], float]
    unit: str
    within: float | None = None

    def holds_for(self, value: float) -> bool:
        """Whether one seed's number is as claimed."""
        return value > 0 if self.within is None else abs(value) <= self.within

    def verdict(self, found: Interval) -> str:
        """Decide by the interval over seeds: `HELD`, `AGAINST` or `OPEN`."""
        if self.within is None:
            return HELD if found.low > 0 else AGAINST if found.high < 0 else OPEN
        if -self.within <= found.low and found.high <= self.within:
            return HELD
        return AGAINST if found.low > self.within or found.high < -self.within else OPEN


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A finding of the paper, with the verdict expected before the run.

    Args:
        id: F1 to F13.
        title: what the paper found.
        source: figure or section.
        claims: all must hold for it to be reproduced.
        expected: the expectation, written before any of these runs.
        chinese: whether there are runs in a Chinese world as well.
        arms: the arms in the figure.
        panels: the metrics in the figure.
    """

    id: str
    title: str
    source: str
    claims: Sequence[Claim]
    expected: str
    arms: Sequence[str]
    panels: Sequence[str]
    chinese: bool = False

    def verdict(self, verdicts: Sequence[str]) -> str:
        """Sum up the claims' verdicts.

        Args:
            verdicts: of the claims.

        Returns:
            "reproduced" if all hold; "partly" if some do; "refuted" if none does and
            one or more are refuted; else "undecided".
        """
        if all(verdict == HELD for verdict in verdicts):
            return "reproduced"
        if HELD in verdicts:
            return "partly"
        return "refuted" if AGAINST in verdicts else "undecided"


def measured(claim: Claim, seeds: Sequence[Seed]) -> Interval | None:
    """Return a claim's number over all seeds that have its runs; None without any.

    Args:
        claim: the claim.
        seeds: of one language.
    """
    values = []
    for seed in seeds:
        try:
            values.append(claim.measure(seed))
        except NotRunError:
            continue
    return interval(values) if values else None
