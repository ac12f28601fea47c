"""Float64's answers, and how far others are from them.

The error of a number is the largest distance of any token's; that of gradients is
‖got − want‖ / ‖want‖.
"""

from collections.abc import Iterable, Iterator
from math import sqrt

import torch
from problems import KINDS, Found, Problem, found, parts, stats_of
from torch import Tensor


class Answer:
    """Float64's answer to a problem, to measure others by; rows are worked out anew each time.

    Args:
        problem: whose.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.noted: dict[str, Tensor] = {}
        self.outputs: tuple[Tensor, ...] = ()
        self.gradients: list[Tensor] = []
        solved = [self._solve(rows, part) for rows, part in parts(problem)]
        for name in solved[0].noted:
            self.noted[name] = torch.cat([one.noted[name] for one in solved])
        if KINDS[problem.kind].scalar:
            self.outputs = (torch.stack([one.outputs[0].detach() for one in solved]).sum(),)

    def _solve(self, rows: slice, part: Problem) -> Found:
        """Answer some rows; gradients of hidden states and weight are kept."""
        wanted = part.linear and bool(part.upstream)
        with torch.set_grad_enabled(wanted):
            one = found(stats_of(part), part)
        if wanted:
            hidden, weight = torch.autograd.grad(one.outputs, part.wrt, part.upstream)
            if not self.gradients:
                whole = self.problem.wrt[0]
                self.gradients = [torch.zeros_like(whole, dtype=torch.float64), weight]
            else:
                self.gradients[1] += weight
            self.gradients[0][rows] = hidden
        return one

    def errors(self, one: Found, gradients: tuple[Tensor, ...]) -> dict[str, float]:
        """Compare an answer.

        Args:
            one: what a provider has found.
            gradients: of `Problem.wrt`; none where none are asked for.

        Returns:
            the largest distance of each number noted, a loss's relative distance, and the
            relative L2 distance of gradients, the largest of them.
        """
        distances = {
            name: (value.double() - self.noted[name]).abs().max().item()
            for name, value in one.noted.items()
        }
        if self.outputs:
            got, want = one.outputs[0].double(), self.outputs[0]
            distances["loss"] = ((got - want).abs() / want.abs()).item()
        if gradients:
            distances["gradient"] = max(self._distances(gradients))
        return distances

    def _distances(self, gradients: tuple[Tensor, ...]) -> list[float]:
        if self.gradients:
            pairs = zip(gradients, self.gradients, strict=True)
            return [_relative([pair]) for pair in pairs]
        return [_relative((gradients[0][rows], want) for rows, want in self._row_gradients())]

    def _row_gradients(self) -> Iterator[tuple[slice, Tensor]]:
        for rows, part in parts(self.problem):
            one = found(stats_of(part), part)
            yield rows, torch.autograd.grad(one.outputs, part.wrt, part.upstream)[0]


def _relative(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """‖got − want‖ / ‖want‖ over tensors that come in pairs; NaN where anything is NaN."""
    off = total = 0.0
    for got, want in pairs:
        for a, b in zip(got.split(4096), want.split(4096), strict=True):
            off += (a.double() - b).square().sum().item()
            total += b.square().sum().item()
    return sqrt(off / total)
