"""What is computed: inputs that are random and peaked, the same for all.

Upstream gradients are signed and random, never those of a mean.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod, sqrt

import torch
from torch import Tensor

from mossrlhf.functional import (
    clipped_policy_loss,
    entropy_from_logits,
    exact_kl,
    token_logprobs,
    upcast,
)
from mossrlhf.types import TokenStats

ENTROPY_COEF = 0.01
PEAK = 12.0
"""Logits a peaked row's first token lies above the others."""

UPSTREAM = -0.75
"""Gradient that reaches a loss; a sum over tokens, so it is divided by their number."""

CHUNK_NUMBERS = 2**24
"""Of one chunk of rows, which float64 answers at a time."""


@dataclass
class Problem:
    """Inputs, and what is asked of them.

    Args:
        kind: one of `KINDS`.
        shape: (N, V), or (N, V, D) where logits are to be made from hidden states.
        ids: ``[N]`` tokens.
        wrt: the inputs a gradient is wanted of: logits ``[N, V]``, or hidden states ``[N, D]``
            and weight ``[V, D]``.
        upstream: gradient of each output.
        ref_logits: ``[N, V]`` of the reference, or None.
        old_logprob: ``[N]`` for the ratio of PPO, or None.
        advantage: ``[N]``, or None.
    """

    kind: str
    shape: tuple[int, ...]
    ids: Tensor
    wrt: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...] = ()
    ref_logits: Tensor | None = None
    old_logprob: Tensor | None = None
    advantage: Tensor | None = None

    @property
    def linear(self) -> bool:
        """Whether it begins at hidden states."""
        return len(self.shape) == 3

    @property
    def entropy(self) -> bool:
        """Whether the entropy is asked for."""
        return KINDS[self.kind].entropy

    @property
    def dtype(self) -> torch.dtype:
        """That of logits, or of hidden states and weight."""
        return self.wrt[0].dtype

    def part(self, rows: slice) -> "Problem":
        """Return some of the rows, in float64, for which a gradient can be computed."""
        first, *weight = self.wrt
        wrt = (first[rows], *weight)
        cut = {
            name: None if value is None else value[rows].double()
            for name, value in (
                ("ref_logits", self.ref_logits),
                ("old_logprob", self.old_logprob),
                ("advantage", self.advantage),
            )
        }
        return replace(
            self,
            ids=self.ids[rows],
            wrt=tuple(x.detach().double().requires_grad_() for x in wrt),
            upstream=tuple(g.double() if g.ndim == 0 else g[rows].double() for g in self.upstream),
            **cut,
        )


@dataclass(frozen=True)
class Kind:
    """A sort of problem.

    Args:
        title: for the table.
        outputs: statistics of tokens → what is differentiated.
        entropy: whether the entropy is asked for.
        scalar: whether it is one number, and not one for each token.
        units: of 2·N·V·D floating-point operations that forward and backward need at least;
            None where logits are in hand.
    """

    title: str
    outputs: Callable[[TokenStats, Problem, slice], tuple[Tensor, ...]]
    entropy: bool = True
    scalar: bool = False
    units: int | None = None


@dataclass(frozen=True)
class Found:
    """What a provider returns.

    Args:
        outputs: to be differentiated, in the order of `Problem.upstream`.
        noted: numbers by name ("logprob", "entropy", "kl"), ``[N]``, whose error is of interest.
    """

    outputs: tuple[Tensor, ...]
    noted: dict[str, Tensor] = field(default_factory=dict)


def _ppo(stats: TokenStats, problem: Problem, rows: slice) -> tuple[Tensor, ...]:
    old, advantage = problem.old_logprob[rows], problem.advantage[rows]
    loss = clipped_policy_loss(stats.logprob, old, advantage)
    return ((loss - ENTROPY_COEF * stats.entropy).sum(),)


KINDS = {
    "rows": Kind(
        "Log-probability and entropy, logits in hand",
        lambda stats, problem, rows: (stats.logprob, stats.entropy),
    ),
    "rows_kl": Kind(
        "Log-probability, entropy and exact KL from a reference, logits in hand",
        lambda stats, problem, rows: (stats.logprob, stats.entropy, stats.kl),
    ),
    "linear_score": Kind(
        "Scoring from hidden states: log-probability and entropy, no gradient",
        lambda stats, problem, rows: (stats.logprob, stats.entropy),
        units=1,
    ),
    "linear_ppo": Kind(
        "Clipped PPO loss with entropy bonus from hidden states",
        _ppo,
        scalar=True,
        units=3,
    ),
    "linear_logprob": Kind(
        "Log-probability of each token from hidden states, no entropy",
        lambda stats, problem, rows: (stats.logprob,),
        entropy=False,
        units=3,
    ),
    "linear_ce": Kind(
        "Summed cross-entropy from hidden states",
        lambda stats, problem, rows: (-stats.logprob.sum(),),
        entropy=False,
        scalar=True,
        units=3,
    ),
}


def stats_of(problem: Problem) -> TokenStats:
    """Compute a problem's statistics as a user of torch would, each by one function.

    Not `functional.token_stats`, which computes a log-sum-exp beside: nobody asks for it here.
    """
    logits = problem.wrt[0]
    if problem.linear:
        logits = logits @ problem.wrt[1].t()
    ref = problem.ref_logits
    return TokenStats(
        logprob=token_logprobs(logits, problem.ids),
        entropy=entropy_from_logits(logits) if problem.entropy else None,
        kl=None if ref is None else exact_kl(logits, ref),
    )


def found(stats: TokenStats, problem: Problem, rows: slice = slice(None)) -> Found:
    """Return what is asked for, from the statistics of all tokens, in float32 at least."""
    noted = {name: getattr(stats, name) for name in ("logprob", "entropy", "kl")}
    wide = {name: upcast(value) for name, value in noted.items() if value is not None}
    return Found(
        KINDS[problem.kind].outputs(TokenStats(**wide), problem, rows),
        {name: value.detach() for name, value in wide.items()},
    )


def make(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Problem:
    """Draw a problem: every second row is peaked, at the label or elsewhere in turn.

    Args:
        kind: one of `KINDS`.
        shape: (N, V), or (N, V, D).
        dtype: of logits, or of hidden states and weight.
        device: where to.
        seed: of everything.
    """
    torch.manual_seed(seed)
    n, v, *d = shape
    ids = torch.randint(v, (n,), device=device)
    rows = torch.arange(1, n, 2, device=device)
    peaks = torch.where(rows % 4 == 1, ids[rows], ids.flip(0)[rows])
    if d:
        weight = torch.randn(v, *d, dtype=dtype, device=device) / sqrt(d[0])
        hidden = torch.randn(n, *d, dtype=dtype, device=device)
        ahead = weight[peaks].float()
        ahead = PEAK * ahead / ahead.square().sum(-1, keepdim=True)
        hidden[rows] += ahead.to(dtype)
        problem = Problem(kind, shape, ids, (hidden, weight))
    else:
        logits = torch.randn(n, v, dtype=dtype, device=device) * 2
        logits[rows, peaks] += PEAK
        problem = Problem(kind, shape, ids, (logits,))
    if kind == "rows_kl":
        problem.ref_logits = problem.wrt[0] + torch.randn_like(problem.wrt[0]) / 2
    if kind == "linear_ppo":
        _with_ppo(problem)
    if kind != "linear_score":
        for x in problem.wrt:
            x.requires_grad_()
        problem.upstream = _upstream(problem)
    return problem


def _with_ppo(problem: Problem) -> None:
    """Add old log-probabilities and advantages; ratios keep away from where the loss is bent."""
    n = len(problem.ids)
    with torch.no_grad():
        now = torch.cat([stats_of(part).logprob for _, part in parts(problem)])
    steps = torch.tensor([-0.5, -0.1, 0.1, 0.5], device=now.device)
    moved = steps[torch.randint(4, (n,), device=now.device)]
    problem.old_logprob = (now - moved - 0.05 * torch.rand(n, device=now.device)).float()
    problem.advantage = torch.randn(n, device=now.device)


def _upstream(problem: Problem) -> tuple[Tensor, ...]:
    n, device = len(problem.ids), problem.ids.device
    if KINDS[problem.kind].scalar:
        return (torch.tensor(UPSTREAM / n, device=device),)
    count = {"rows": 2, "rows_kl": 3}.get(problem.kind, 1)
    return tuple(torch.randn(n, device=device) for _ in range(count))


def parts(problem: Problem) -> Iterator[tuple[slice, Problem]]:
    """Cut a problem into parts that float64 answers one at a time."""
    n, v, *_ = problem.shape
    size = max(1, CHUNK_NUMBERS // v)
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        yield rows, problem.part(rows)


def floors(problem: Problem, rates: dict[str, float]) -> dict[str, float]:
    """Return the milliseconds no program gets below, by step.

    Args:
        problem: whose.
        rates: of `measuring.rates`.

    Returns:
        with logits in hand, the time to read them (and the reference's) once, and to write the
        gradient once; from hidden states, the matrix products: one unit to score, three with both
        gradients.
    """
    units = KINDS[problem.kind].units
    if units is not None:
        unit = 2 * prod(problem.shape) / rates["matmul"]
        return {"forward": unit} if units == 1 else {"both": units * unit}
    logits = prod(problem.shape) * problem.wrt[0].element_size() / rates["copy"]
    reads = 1 if problem.ref_logits is None else 2
    return {
        "forward": reads * logits,
        "backward": (reads + 1) * logits,
        "both": (2 * reads + 1) * logits,
    }
