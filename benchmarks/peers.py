"""Who is measured: this package's kernels, and what else there is that returns the same.

Formulas of other libraries are written anew from their description, in plain torch. What cannot
take part is a provider too, with the reason why.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from measuring import pathless
from problems import KINDS, Found, Problem, found, stats_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mossrlhf import kernels
from mossrlhf.functional import upcast
from mossrlhf.types import LossOutput, TokenStats

PLAIN = "plain torch"
SEQUENCES = 16
"""Responses that the N tokens are taken to be of, by formulas that go through them in turn."""

TRL_ROWS = 128
VERL_ROWS = 512


@dataclass(frozen=True)
class Provider:
    """One way to solve a problem.

    Args:
        name: for the table.
        forward: takes the problem, and returns what can be differentiated.
        problem: what it is given: the same as everyone, or a copy that it may overwrite.
        ours: whether it is of this package, and so must be right.
        ready: run before each pass, not timed.
        absent: why it cannot take part; None where it can.
    """

    name: str
    forward: Callable[[Problem], Found]
    problem: Problem
    ours: bool = False
    ready: Callable[[], None] = lambda: None
    absent: str | None = None

    def run(self) -> Found:
        """Go forward, up to what can be differentiated."""
        with torch.set_grad_enabled(bool(self.problem.upstream)):
            return self.forward(self.problem)

    def differentiate(self, one: Found) -> tuple[Tensor, ...]:
        """Go backward; nothing where no gradient is asked for."""
        if not self.problem.upstream:
            return ()
        return torch.autograd.grad(one.outputs, self.problem.wrt, self.problem.upstream)

    def both(self) -> tuple[Found, tuple[Tensor, ...]]:
        """Go both ways."""
        one = self.run()
        return one, self.differentiate(one)

    def solve(self) -> tuple[Found, tuple[Tensor, ...]]:
        """Make ready, and go both ways."""
        self.ready()
        return self.both()


def providers(problem: Problem, left_out: Sequence[str] = ()) -> list[Provider]:
    """Return everyone who may solve a problem, absent ones with their reason.

    Args:
        problem: what is to be solved.
        left_out: names that are not to take part.
    """
    everyone = [
        Provider(PLAIN, plain, problem),
        Provider("torch.compile", compiled(), problem),
        *OTHERS[problem.kind](problem),
    ]
    why = "left out by --without"
    return [replace(p, absent=p.absent or why) if p.name in left_out else p for p in everyone]


def plain(problem: Problem) -> Found:
    """Solve a problem as a user of torch would; logits as large as they come."""
    return found(stats_of(problem), problem)


def compiled() -> Callable[[Problem], Found]:
    """Return `plain` under ``torch.compile``; a graph break raises.

    What was compiled before is forgotten: past eight shapes torch would compile no more.
    """
    torch.compiler.reset()
    return torch.compile(plain, fullgraph=True, dynamic=False)


# ---- logits in hand ------------------------------------------------------------------------------


def _ours(problem: Problem, in_place: bool = False) -> Found:
    stats = kernels.token_stats(
        problem.wrt[0], problem.ids, ref_logits=problem.ref_logits, in_place=in_place
    )
    return found(stats, problem)


def _ours_twice(problem: Problem) -> list[Provider]:
    """This package, beside the logits and in place of them."""
    own = problem.wrt[0].detach().clone().requires_grad_()

    def restore() -> None:
        with torch.no_grad():
            own.copy_(problem.wrt[0])

    mine = replace(problem, wrt=(own,))
    return [
        Provider("mossrlhf", _ours, problem, ours=True),
        Provider("mossrlhf, in place", partial(_ours, in_place=True), mine, True, restore),
    ]


def _by_sequence(problem: Problem) -> Tensor:
    """TRL's and verl's log-probabilities: one response at a time.

    float32: z_a − log Σ exp z. bfloat16: log-softmax in bfloat16, and the entry of a.
    """
    found = []
    count = min(SEQUENCES, len(problem.ids))
    for z, ids in zip(problem.wrt[0].chunk(count), problem.ids.chunk(count), strict=True):
        if z.dtype == torch.float32:
            found.append(z.gather(-1, ids[:, None]).squeeze(-1) - z.logsumexp(-1))
        else:
            found.append(z.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1))
    return torch.cat(found)


def _trl(problem: Problem) -> Found:
    """TRL: `_by_sequence`, and −Σ p log p by log-softmax of 128 rows at a time."""
    entropies = []
    for z in problem.wrt[0].split(TRL_ROWS):
        logp = z.log_softmax(-1)
        entropies.append(-(logp.exp() * logp).sum(-1))
    return found(TokenStats(_by_sequence(problem), torch.cat(entropies)), problem)


def _verl(problem: Problem) -> Found:
    """verl: `_by_sequence`, and log Σ exp z − Σ softmax(z)·z."""
    z = problem.wrt[0]
    entropy = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)
    return found(TokenStats(_by_sequence(problem), entropy), problem)


def _rows(problem: Problem) -> list[Provider]:
    return [
        *_ours_twice(problem),
        Provider("TRL's formula", _trl, problem),
        Provider("verl's formula", _verl, problem),
    ]


# ---- from hidden states --------------------------------------------------------------------------


def _linear_stats(problem: Problem) -> Found:
    stats = kernels.linear_token_stats(*problem.wrt, problem.ids, entropy=problem.entropy)
    return found(stats, problem)


def _linear_loss(problem: Problem) -> Found:
    logprob = torch.empty(len(problem.ids), device=problem.ids.device)

    def loss_fn(stats: TokenStats, rows: slice) -> LossOutput:
        logprob[rows] = stats.logprob.detach()
        return LossOutput(*KINDS[problem.kind].outputs(stats, problem, rows))

    output = kernels.linear_token_loss(*problem.wrt, problem.ids, loss_fn, entropy=problem.entropy)
    return Found((output.loss,), {"logprob": logprob})


def _checkpointed(problem: Problem) -> Found:
    """Verl's fused linear formula: 512 rows at a time, made again in the backward pass."""
    hidden, weight = problem.wrt
    rows = min(VERL_ROWS, -(-len(hidden) // 4))

    def part(x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        stats = stats_of(replace(problem, wrt=(x, weight), ids=ids))
        return (stats.logprob,) if stats.entropy is None else (stats.logprob, stats.entropy)

    pairs = zip(hidden.split(rows), problem.ids.split(rows), strict=True)
    parts = [checkpoint(part, x, ids, use_reentrant=False) for x, ids in pairs]
    return found(TokenStats(*map(torch.cat, zip(*parts, strict=True))), problem)


def _torch_ce(chunked: bool) -> Callable[[Problem], Found]:
    def forward(problem: Problem) -> Found:
        options = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}
        reduction = _reduction(problem)
        hidden, weight = problem.wrt
        loss = F.linear_cross_entropy(hidden, weight, problem.ids, reduction=reduction, **options)
        return _from_loss(loss, problem)

    return forward


def _liger_ce(wide: bool) -> Callable[[Problem], Found]:
    def forward(problem: Problem) -> Found:
        module: Any = import_module("liger_kernel.transformers.functional")
        loss = module.liger_fused_linear_cross_entropy(
            *problem.wrt,
            problem.ids,
            reduction=_reduction(problem),
            accum_dtype=torch.float32 if wide else None,
        )
        return _from_loss(loss, problem)

    return forward


def _liger_scaled(problem: Problem) -> Found:
    function: Any = import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    asked = {"return_entropy": True} if problem.entropy else {}
    got = function.apply(*problem.wrt, problem.ids, **asked)
    nll, entropy = got if problem.entropy else (got, None)
    return found(TokenStats(-nll, entropy), problem)


def _cce(problem: Problem) -> Found:
    module: Any = import_module("cut_cross_entropy")
    loss = module.linear_cross_entropy(*problem.wrt, problem.ids, reduction=_reduction(problem))
    return _from_loss(loss, problem)


def _reduction(problem: Problem) -> str:
    return "sum" if KINDS[problem.kind].scalar else "none"


def _from_loss(loss: Tensor, problem: Problem) -> Found:
    if KINDS[problem.kind].scalar:
        return Found((upcast(loss),))
    return found(TokenStats(-loss), problem)


def _linear(problem: Problem) -> list[Provider]:
    ours = [Provider("mossrlhf linear_token_stats", _linear_stats, problem, True)]
    if KINDS[problem.kind].scalar:
        ours.insert(0, Provider("mossrlhf linear_token_loss", _linear_loss, problem, True))
    peers = [Provider("checkpointed chunks (verl's formula)", _checkpointed, problem)]
    if not problem.entropy:
        peers += _cross_entropies(problem)
    absent = missing("liger_kernel")
    scaled = Provider("Liger fused scaled CE", _liger_scaled, problem, absent=absent)
    return [*ours, *peers, scaled]


def _cross_entropies(problem: Problem) -> Iterator[Provider]:
    new = None if hasattr(F, "linear_cross_entropy") else "torch before 2.13 does not have it"
    yield Provider("torch linear_cross_entropy", _torch_ce(False), problem, absent=new)
    yield Provider("torch linear_cross_entropy, chunked", _torch_ce(True), problem, absent=new)
    liger = _on_cuda(problem, "liger_kernel")
    yield Provider("Liger fused linear CE", _liger_ce(False), problem, absent=liger)
    yield Provider("Liger fused linear CE, float32 sums", _liger_ce(True), problem, absent=liger)
    cut = _on_cuda(problem, "cut_cross_entropy")
    yield Provider("cut-cross-entropy", _cce, problem, absent=cut)


OTHERS: dict[str, Callable[[Problem], list[Provider]]] = {
    "rows": _rows,
    "rows_kl": _ours_twice,
    "linear_score": _linear,
    "linear_ppo": _linear,
    "linear_logprob": _linear,
    "linear_ce": _linear,
}


# ---- who is absent -------------------------------------------------------------------------------


def _on_cuda(problem: Problem, module: str) -> str | None:
    if not problem.ids.is_cuda:
        return "needs CUDA"
    return missing(module)


@cache
def missing(module: str) -> str | None:
    """Return why a module cannot be imported; None where it can."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # whatever another library raises at its import
        return reason(error)
    return None


def reason(error: BaseException) -> str:
    """Return an error in one line, without paths of this machine."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first = str(error).strip().partition("\n")[0]
    return pathless(f"{type(error).__name__}: {first}")
