"""Evaluation of a critic: its values compared with the returns of Monte-Carlo continuations."""

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from mossrlhf.data import PromptBatch
from mossrlhf.distributed.processes import together
from mossrlhf.functional import Reduce, discounted_returns, gae, widest
from mossrlhf.options import check_range
from mossrlhf.randomness import temporary_seed
from mossrlhf.reward_shaping import RunningMoments
from mossrlhf.sampling import assemble
from mossrlhf.sampling.base import departures
from mossrlhf.sampling.hf import FROM_ROWS
from mossrlhf.types import Rollout
from mossrlhf.validation import shaped

Dataset = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Agreement:
    """Errors of values V against measured returns G.

    Args:
        start: share of the response before the earliest of the states.
        end: share of the response before the latest, exclusive.
        states: number of states.
        mean_absolute_error: of |V − G|, in units of reward; NaN without states.
        mean_error: of V − G, in units of reward: above 0 the values are too high.
        rank_correlation: Spearman's ρ of V and G, in [−1, 1]; NaN if either is constant.
        explained_variance: 1 − Var(G − V)/Var(G); NaN if G is constant.
        noise: mean standard error of G, in units of reward. A perfect critic has a
            `mean_absolute_error` of about 0.8 times the noise, not 0.
    """

    start: float
    end: float
    states: int
    mean_absolute_error: float
    mean_error: float
    rank_correlation: float
    explained_variance: float
    noise: float

    def numbers(self) -> dict[str, float]:
        """Return all but `start` and `end`, by name."""
        return {n: v for n, v in asdict(self).items() if n not in ("start", "end")}


@dataclass(frozen=True, kw_only=True)
class CriticEvaluation:
    """A critic's values and the Monte-Carlo returns of the same states.

    Args:
        overall: their agreement over all S states.
        by_position: their agreement in each part of the response, from beginning to end; a part
            without states has `Agreement.states` 0 and NaN for its other numbers.
        values: ``[S]`` the critic's, in units of reward.
        returns: ``[S]`` mean returns of the continuations, in units of reward.
        standard_errors: ``[S]`` of those means.
        positions: ``[S]`` tokens of the response before each state.
        lengths: ``[S]`` tokens of the response that each state was taken from.
        prompts: ``[S]`` index of each state's record in the dataset.
        continuations: sampled from each state.
        gamma: discount γ per token.
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
        """Return the numbers by name, for trackers and `Trainer.history`.

        Returns:
            ``critic_eval/<number>``, and ``critic_eval/<number>/<part>`` for each part of the
            response; undefined numbers are left out.
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
        """Format the numbers as a table of at most 80 columns."""
        rows = [("all", self.overall)]
        rows += [(f"{part.start:.0%}-{part.end:.0%}", part) for part in self.by_position]
        names = ("response", "states", "abs. error", "error", "rank corr.", "expl. var.", "noise")
        lines = [" ".join(name.rjust(10) for name in names)]
        for label, part in rows:
            states, *numbers = part.numbers().values()
            cells = [label, f"{states:.0f}", *(f"{number:.3f}" for number in numbers)]
            lines.append(" ".join(cell.rjust(10) for cell in cells))
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages of a trainer that continuations need.

    Args:
        accelerator: of the processes.
        encode: records → prompts as token ids, and their columns.
        sample: a sampler and token ids → the policy's responses.
        score, annotate: the trainer's stages.
        reduce: sums a tensor over all processes.
        sampler, shaper, advantage, seed: the trainer's.
        batch_size: responses that this process scores at a time.
        policy_on_device: the context in which the policy can be sampled from.
    """

    accelerator: Accelerator
    encode: Callable[[Dataset], PromptBatch]
    sample: Callable[[Any, Sequence[Sequence[int]]], Rollout]
    score: Callable[[Rollout], Rollout]
    annotate: Callable[[Rollout], Rollout]
    reduce: Reduce
    sampler: Any
    shaper: Any
    advantage: Any
    seed: int
    batch_size: int
    policy_on_device: Callable[[], AbstractContextManager[None]]


def evaluate_critic(
    stages: Stages,
    dataset: Dataset,
    *,
    prompts: int = 64,
    positions: int = 4,
    continuations: int = 16,
    gamma: float | None = None,
    seed: int | None = None,
) -> CriticEvaluation:
    """Compare a critic's values with the mean return of continuations from the same states.

    One response is sampled for each prompt, and one state is chosen from each part of it. From
    there the policy samples `continuations` continuations, with the trainer's sampler and the rest
    of its length limit. The trainer's rewards and shaper reward them, and
    G = Σ γ^(s−t) r_s over the remaining tokens is an estimate of the value V = E[G]. With
    `bootstrap_truncated`, a truncated continuation ends in the critic's own value, as in training.
    The shaper's running moments are used and not updated.

    The training run does not change, the random numbers of the next iteration included. Samples
    depend only on the seed, the record and the position, on any number of processes.

    Args:
        stages: of a trainer with a critic; `Trainer.evaluate_critic` passes its own.
        dataset: records with ``prompt``.
        prompts: sampled from the dataset by the seed; all of them if it has fewer.
        positions: parts of the response, of equal length; a shorter response has no state in some
            of them.
        continuations: from each state, at least 2, sampled together.
        gamma: discount γ per token; None for that of the trainer's ``advantage``.
        seed: None for `TrainerConfig.seed`.

    Raises:
        ValueError: if there is no γ, fewer prompts than processes, a number out of range, or a
            sampler whose distribution depends on more than the tokens so far.

    Source: the target is P1 §3.2's V(s) = E[Σ γ^l r_(t+l)], r by eq. 19.
    """
    for name, value, low in (
        ("prompts", prompts, 1),
        ("positions", positions, 1),
        ("continuations", continuations, 2),
    ):
        check_range("evaluate_critic", name, value, low)
    check_range("evaluate_critic", "gamma", gamma, 0, 1)
    gamma = _trained_gamma(stages.advantage) if gamma is None else gamma
    seed = stages.seed if seed is None else seed
    _require_memoryless(stages.sampler)
    mine = _choose_prompts(stages.accelerator, len(dataset), prompts, seed)
    with temporary_seed(seed):
        states = _sample_states(stages, dataset, mine, positions, seed)
        sampled = _sample_continuations(stages, states, continuations, seed)
        returns = _returns(stages, sampled, states, gamma).view(len(states), continuations)
    errors = returns.std(dim=1) / math.sqrt(continuations)
    rows = [
        (state.record, len(state.prefix), state.length, state.value, float(mean), float(error))
        for state, mean, error in zip(states, returns.mean(dim=1), errors, strict=True)
    ]
    return _evaluation(sorted(gather_object(rows)), positions, continuations, gamma)


def _trained_gamma(advantage: Any) -> float:
    gamma = getattr(advantage, "gamma", None)
    if gamma is None:
        raise ValueError(
            f"gamma: got None, and {type(advantage).__name__} has no gamma to discount returns; "
            "pass evaluate_critic(gamma=), 1 for no discount"
        )
    return float(gamma)


def _require_memoryless(sampler: Any) -> None:
    """Refuse a sampler whose distribution depends on the number of tokens since the prompt."""
    config = getattr(sampler, "effective", None)
    if not isinstance(config, GenerationConfig):
        return  # a custom sampler
    counted = {n: v for n, v in departures(config).items() if n not in FROM_ROWS}
    if counted:
        raise ValueError(
            f"sampler: {counted} make a token depend on how many have been sampled since the "
            "prompt, so a response cannot be continued from its middle; evaluate the critic in a "
            "trainer whose sampler leaves them out"
        )


def _choose_prompts(accelerator: Any, available: int, count: int, seed: int) -> list[int]:
    """Choose records by the seed; return those of this process."""
    chosen = sorted(random.Random(seed).sample(range(available), min(count, available)))
    processes = accelerator.num_processes
    if len(chosen) < processes:
        raise ValueError(
            f"prompts: {len(chosen)} of the dataset's {available} for {processes} processes, "
            "expected one for each at least; pass more, or a larger dataset"
        )
    return chosen[accelerator.process_index :: processes]


# ---- states, continuations, returns -------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """A prefix of a response, of `length` tokens in all, and the critic's value of it."""

    record: int
    columns: dict[str, Any]
    prompt: list[int]
    prefix: list[int]
    length: int
    value: float


def _sample_states(
    stages: Stages, dataset: Dataset, mine: Sequence[int], positions: int, seed: int
) -> list[_State]:
    """Sample a response for each prompt, and choose one state from each part of it."""
    batch = stages.encode([dict(dataset[record]) for record in mine])
    sampled = []
    with together(stages.accelerator), stages.policy_on_device():
        for record, prompt in zip(mine, batch.ids, strict=True):
            _seed_torch(seed, record, -1)
            sampled.append(_sample(stages, stages.sampler, [prompt]))
    rollout = replace(Rollout.concat(sampled), columns=batch.columns)
    with together(stages.accelerator):
        rollout = stages.annotate(_with_end_states(stages, rollout))
    assert rollout.values is not None
    states = []
    for row, (record, response) in enumerate(zip(mine, rollout.completions(), strict=True)):
        choice, length = random.Random(f"{seed} {record}"), len(response)
        columns = {name: column[row] for name, column in batch.columns.items()}
        for part in range(positions):
            inside = [t for t in range(length) if t * positions // length == part]
            if inside:
                t = choice.choice(inside)
                value = float(rollout.values[row, t])
                prompt = batch.ids[row]
                states.append(_State(record, columns, prompt, response[:t], length, value))
    return states


def _sample_continuations(
    stages: Stages, states: Sequence[_State], continuations: int, seed: int
) -> Rollout:
    """Sample K continuations of each of S states: S·K whole responses, unscored, state by state."""
    whole = []
    with together(stages.accelerator), stages.policy_on_device():
        for state in states:
            left = stages.sampler.max_new_tokens - len(state.prefix)
            prompts = [[*state.prompt, *state.prefix]] * continuations
            _seed_torch(seed, state.record, len(state.prefix))
            sampled = _sample(stages, _with_limit(stages.sampler, left), prompts)
            # A custom sampler may not know the shorter limit.
            ended = (~sampled.truncated & (sampled.response_lengths <= left)).tolist()
            rollout = assemble(
                [state.prompt] * continuations,
                [[*state.prefix, *response[:left]] for response in sampled.completions()],
                ended,
                pad_token_id=0,
                device=sampled.input_ids.device,
            )
            columns = {name: [value] * continuations for name, value in state.columns.items()}
            whole.append(replace(rollout, columns=columns))
    return _with_end_states(stages, Rollout.concat(whole))


def _seed_torch(seed: int, record: int, position: int) -> None:
    torch.manual_seed(random.Random(f"{seed} {record} {position}").getrandbits(62))


def _sample(stages: Stages, sampler: Any, prompts: Sequence[Sequence[int]]) -> Rollout:
    rollout = stages.sample(sampler, prompts)
    places = torch.arange(rollout.mask.shape[1], device=rollout.mask.device)
    if not bool((rollout.mask == (places < rollout.response_lengths[:, None])).all()):
        raise ValueError(
            f"sampler: {type(sampler).__name__} returned responses with holes in their mask (turns "
            "of a user or a tool), expected a mask of all their tokens: such responses cannot be "
            "continued from any of their tokens"
        )
    return rollout


def _with_limit(sampler: Any, limit: int) -> Any:
    """Return a copy of a sampler with a limit on new tokens; a custom sampler unchanged."""
    if not isinstance(getattr(sampler, "effective", None), GenerationConfig):
        return sampler
    # Not `dataclasses.replace`: vLLM's sampler remembers which weights its engine has.
    shorter = copy.copy(sampler)
    config = copy.deepcopy(sampler.effective)
    config.max_new_tokens = limit
    object.__setattr__(shorter, "effective", config)
    return shorter


def _with_end_states(stages: Stages, rollout: Rollout) -> Rollout:
    if getattr(stages.shaper, "score_after_end", False):
        return rollout.with_end_states(stages.sampler.max_new_tokens)
    return rollout


def _returns(
    stages: Stages, sampled: Rollout, states: Sequence[_State], gamma: float
) -> Float[Tensor, " N"]:
    """The discounted return of each of the S·K responses, from its state on."""
    accelerator = stages.accelerator
    parts = list(torch.arange(len(sampled)).split(stages.batch_size))
    count = torch.tensor([len(parts)], device=accelerator.device)
    scored = []
    # Sharded models need all processes in every forward pass, so all run the same number.
    for number in range(int(accelerator.gather(count).max())):
        part = sampled.select(parts[min(number, len(parts) - 1)])
        with together(accelerator):
            part = stages.score(part)
        with together(accelerator):
            part = stages.annotate(part)
        scored += [part] if number < len(parts) else []
    rollout = Rollout.concat(scored)
    rewards = widest(shaped(_with_fixed_moments(stages.shaper), rollout, stages.reduce))
    if rollout.bootstrap is None:
        returns = discounted_returns(rewards, rollout.states, gamma)
    else:
        ends = widest(rollout.bootstrap)
        returns = gae(rewards, torch.zeros_like(rewards), rollout.states, gamma, 1.0, ends)
    at = torch.tensor([len(state.prefix) for state in states], device=returns.device)
    per_state = len(sampled) // len(states)
    return returns.gather(1, at.repeat_interleave(per_state)[:, None]).squeeze(1)


def _with_fixed_moments(shaper: Any) -> Any:
    """Return a copy of a shaper whose running moments are used but not updated."""
    copied = copy.deepcopy(shaper)
    moments = getattr(copied, "moments", None)
    if isinstance(moments, RunningMoments):
        copied.moments = _FixedMoments(moments.count, moments.mean, moments.m2)
    return copied


class _FixedMoments(RunningMoments):
    def update(self, x: Tensor, reduce: Any = None) -> None:
        """Change nothing."""


# ---- agreement ----------------------------------------------------------------------------------


def _evaluation(
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


def agreement(
    values: Float[Tensor, " S"],
    returns: Float[Tensor, " S"],
    standard_errors: Float[Tensor, " S"],
    start: float,
    end: float,
) -> Agreement:
    """Compare values with returns, in units of reward; `Agreement` explains the arguments."""
    if not len(values):
        return Agreement(start, end, 0, *[math.nan] * 5)
    off = values - returns
    total = returns.var(correction=0)
    # The mean of equal numbers has a rounding error, which looks like variance.
    varies = bool(total > 1e-12 * returns.mean() ** 2)
    return Agreement(
        start,
        end,
        len(values),
        float(off.abs().mean()),
        float(off.mean()),
        rank_correlation(values, returns),
        float(1 - off.var(correction=0) / total) if varies else math.nan,
        float(standard_errors.mean()),
    )


def rank_correlation(x: Float[Tensor, " S"], y: Float[Tensor, " S"]) -> float:
    """Spearman's ρ (1904): the correlation of ranks, equal numbers sharing their mean rank.

    Returns a number in [−1, 1]; NaN if x or y is constant.
    """
    a, b = (ranks - ranks.mean() for ranks in (_ranks(x), _ranks(y)))
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / scale if scale else math.nan


def _ranks(x: Tensor) -> Tensor:
    _, group, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]
