"""A critic one can trust: its values held against Monte-Carlo continuations."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from mossrlhf.agreement import Agreement, agreement
from mossrlhf.continuations import continued, draw_states, returns_of
from mossrlhf.options import check_range
from mossrlhf.randomness import random_state, set_random_state
from mossrlhf.sampling.distribution import departures
from mossrlhf.sampling.segments import FROM_ROWS

if TYPE_CHECKING:
    from mossrlhf.trainer import Trainer

Dataset = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class CriticEvaluation:
    """What came of holding a critic's values against Monte-Carlo returns, state by state.

    Args:
        overall: how well they agree over all S states.
        by_position: the same for each part of the response, from its beginning to its end; a part
            that no response has a state in has `Agreement.states` 0 and NaN beside it.
        values: ``[S]`` the critic's, in units of reward.
        returns: ``[S]`` means of the returns of the continuations, in units of reward.
        standard_errors: ``[S]`` of those means.
        positions: ``[S]`` tokens of the response that each state has behind it.
        lengths: ``[S]`` tokens of the response that each state was taken from.
        prompts: ``[S]`` which record of the dataset each state belongs to.
        continuations: drawn from each state.
        gamma: discount γ per token.

    Source: ours.
    """

    overall: Agreement
    by_position: tuple[Agreement, ...]
    values: Float[Tensor, " S"]
    returns: Float[Tensor, " S"]
    standard_errors: Float[Tensor, " S"]
    positions: Int[Tensor, " S"]
    lengths: Int[Tensor, " S"]
    prompts: Int[Tensor, " S"]
    continuations: int
    gamma: float

    def metrics(self) -> dict[str, float]:
        """Return the numbers by name, as trackers and `Trainer.history` take them.

        Returns:
            ``critic_eval/<number>``, and with ``/<part>`` behind it for each part of the response;
            what is undefined is left out.
        """
        parts = {"": self.overall}
        parts |= {f"/{number}": part for number, part in enumerate(self.by_position, 1)}
        found = {
            f"critic_eval/{name}{suffix}": value
            for suffix, part in parts.items()
            for name, value in part.numbers().items()
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def __str__(self) -> str:
        """Lay the numbers out as a table of at most 80 columns."""
        rows = [("all", self.overall)]
        rows += [(f"{part.start:.0%}-{part.end:.0%}", part) for part in self.by_position]
        names = ("response", "states", "abs. error", "error", "rank corr.", "expl. var.", "noise")
        lines = [" ".join(name.rjust(10) for name in names)]
        for label, part in rows:
            states, *numbers = part.numbers().values()
            cells = [label, f"{states:.0f}", *(f"{number:.3f}" for number in numbers)]
            lines.append(" ".join(cell.rjust(10) for cell in cells))
        return "\n".join(lines)


def evaluate_critic(
    trainer: "Trainer",
    dataset: Dataset | None = None,
    *,
    prompts: int = 64,
    positions: int = 4,
    continuations: int = 16,
    gamma: float | None = None,
    seed: int | None = None,
) -> CriticEvaluation:
    """Hold a critic's values against the mean return of continuations drawn from the same states.

    One response is drawn to each prompt, and one state from each part of it. From there the
    policy goes on `continuations` times, with the trainer's sampler and what is left of its length
    limit; rewards and shaper make their rewards, and G = Σ γ^(s−t) r_s over the tokens to come is
    what the critic should have said, V = E[G]. Where `bootstrap_truncated` is on, a truncated
    continuation ends in the critic's own value, as in training. The shaper's running moments are
    taken as they are.

    Nothing of a training run is changed, the random numbers of the next iteration included. What
    is drawn depends on the seed, the record and the position alone, on any number of processes.

    Args:
        trainer: with a critic.
        dataset: records with ``prompt``; None for the trainer's ``eval_dataset``, and where there
            is none for its ``train_dataset``.
        prompts: of the dataset, drawn by the seed; all where it has fewer.
        positions: parts of the response, of equal length; a response shorter than that has no
            state in some of them.
        continuations: from each state, at least 2, drawn together.
        gamma: discount γ per token; None for that of the trainer's ``advantage``.
        seed: None for `TrainerConfig.seed`.

    Raises:
        ValueError: where there is no critic, no γ, fewer prompts than processes, a number out of
            range, or a sampler whose draws depend on more than the tokens so far.

    Source: ours; the target is P1 §3.2's V(s) = E[Σ γ^l r_(t+l)], r by eq. 19.
    """
    _require_critic(trainer)
    for name, value, low in (
        ("prompts", prompts, 1),
        ("positions", positions, 1),
        ("continuations", continuations, 2),
    ):
        check_range("evaluate_critic", name, value, low)
    check_range("evaluate_critic", "gamma", gamma, 0, 1)
    gamma = _gamma(trainer) if gamma is None else gamma
    _require_memoryless(trainer.sampler)
    seed = trainer.args.seed if seed is None else seed
    data = _dataset(trainer, dataset)
    chosen = sorted(random.Random(seed).sample(range(len(data)), min(prompts, len(data))))
    accelerator = trainer.accelerator
    if len(chosen) < accelerator.num_processes:
        raise ValueError(
            f"prompts: {len(chosen)} of the dataset's {len(data)} for {accelerator.num_processes} "
            "processes, expected one for each at least; pass more, or a larger dataset"
        )
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    with _own_randomness(seed):
        states = draw_states(trainer, data, mine, positions, seed)
        drawn = continued(trainer, states, continuations, seed)
        returns = returns_of(trainer, drawn, states, gamma).view(len(states), continuations)
    spread = returns.std(dim=1) / math.sqrt(continuations)
    rows = [
        (state.record, len(state.prefix), state.length, state.value, float(mean), float(error))
        for state, mean, error in zip(states, returns.mean(dim=1), spread, strict=True)
    ]
    return _summed_up(sorted(gather_object(rows)), positions, continuations, gamma)


def _require_critic(trainer: "Trainer") -> None:
    if trainer.critic is None:
        raise ValueError(
            "critic: this trainer has none (critic=False), so there are no values to evaluate; "
            "build it without critic=False, and with an advantage that uses values "
            "(AdvantageEstimator), or leave evaluate_critic() out"
        )


def _gamma(trainer: "Trainer") -> float:
    gamma = getattr(trainer.advantage, "gamma", None)
    if gamma is None:
        raise ValueError(
            f"gamma: {type(trainer.advantage).__name__} has none, by which its returns could be "
            "discounted; pass evaluate_critic(gamma=), 1 for no discount"
        )
    return float(gamma)


def _require_memoryless(sampler: Any) -> None:
    """Refuse what would draw otherwise from the middle of a response than from its beginning."""
    config = getattr(sampler, "effective", None)
    if not isinstance(config, GenerationConfig):
        return  # nothing is known of it but that it is a sampler
    counted = {n: v for n, v in departures(config).items() if n not in FROM_ROWS}
    if counted:
        raise ValueError(
            f"sampler: {counted} make a token depend on how many have been drawn since the prompt "
            "ended, so the middle of a response cannot be continued as it was begun; evaluate the "
            "critic in a trainer whose sampler leaves them out"
        )


def _dataset(trainer: "Trainer", dataset: Dataset | None) -> Dataset:
    if dataset is not None:
        return dataset
    return trainer.prompts.dataset if trainer.eval_dataset is None else trainer.eval_dataset


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Leave every generator as it was: reward functions draw from Python's and NumPy's."""
    before = random_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        set_random_state(*before)


def _summed_up(
    rows: Sequence[tuple[Any, ...]], positions: int, continuations: int, gamma: float
) -> CriticEvaluation:
    values, returns, errors = torch.tensor([row[3:] for row in rows], dtype=torch.float64).unbind(1)
    record, at, length = torch.tensor([row[:3] for row in rows]).unbind(1)
    part = at * positions // length
    inside = [part == number for number in range(positions)]
    return CriticEvaluation(
        overall=agreement(values, returns, errors, 0.0, 1.0),
        by_position=tuple(
            agreement(values[i], returns[i], errors[i], n / positions, (n + 1) / positions)
            for n, i in enumerate(inside)
        ),
        values=values,
        returns=returns,
        standard_errors=errors,
        positions=at,
        lengths=length,
        prompts=record,
        continuations=continuations,
        gamma=gamma,
    )
