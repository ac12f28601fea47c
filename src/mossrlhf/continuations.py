"""Responses continued from their middle, and what each continuation earns from there on."""

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig

from mossrlhf.distributed.processes import together
from mossrlhf.functional import discounted_returns, gae, widest
from mossrlhf.reward_shaping import RunningMoments
from mossrlhf.sampling import assemble
from mossrlhf.types import Rollout
from mossrlhf.validation import responses, shaped

if TYPE_CHECKING:
    from mossrlhf.trainer import Trainer

Dataset = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class State:
    """A beginning of a response, and what the critic says of it.

    Args:
        record: the prompt's place in the dataset.
        columns: the dataset's, for the reward.
        prompt: token ids.
        prefix: token ids of the response so far.
        length: tokens of the response it was taken from.
        value: V(s), in units of reward.

    Source: ours.
    """

    record: int
    columns: dict[str, Any]
    prompt: list[int]
    prefix: list[int]
    length: int
    value: float


def _sow(seed: int, record: int, position: int) -> None:
    torch.manual_seed(random.Random(f"{seed} {record} {position}").getrandbits(62))


def draw_states(
    trainer: "Trainer", data: Dataset, mine: Sequence[int], positions: int, seed: int
) -> list[State]:
    """Draw a response to each prompt, and one state from each part of it.

    Args:
        trainer: with a critic.
        data: records with ``prompt``.
        mine: which of them.
        positions: parts of a response, of equal length.
        seed: what is drawn depends on it and the record alone.

    Raises:
        ValueError: where the sampler's responses have holes in their mask.

    Source: ours.
    """
    asked = trainer._encode([dict(data[record]) for record in mine])
    drawn = []
    with together(trainer.accelerator), trainer._on_device(trainer.policy):
        for record, prompt in zip(mine, asked.ids, strict=True):
            _sow(seed, record, -1)
            drawn.append(_drawn(trainer, trainer.sampler, [prompt]))
    rollout = replace(Rollout.concat(drawn), columns=asked.columns)
    with together(trainer.accelerator):
        rollout = trainer.annotate(_widened(trainer, rollout))
    assert rollout.values is not None
    found = []
    for row, (record, response) in enumerate(zip(mine, rollout.completions(), strict=True)):
        choice, length = random.Random(f"{seed} {record}"), len(response)
        for part in range(positions):
            inside = [t for t in range(length) if t * positions // length == part]
            for t in [choice.choice(inside)] if inside else []:
                columns = {name: column[row] for name, column in asked.columns.items()}
                value = float(rollout.values[row, t])
                found.append(State(record, columns, asked.ids[row], response[:t], length, value))
    return found


def _drawn(trainer: "Trainer", sampler: Any, prompts: Sequence[Sequence[int]]) -> Rollout:
    trainer.model.eval()
    with trainer.accelerator.autocast():
        rollout = responses(sampler, trainer.policy, prompts)
    places = torch.arange(rollout.mask.shape[1], device=rollout.mask.device)
    if not bool((rollout.mask == (places < rollout.response_lengths[:, None])).all()):
        raise ValueError(
            f"sampler: {type(sampler).__name__} returned responses with holes in their mask (turns "
            "of a user or a tool), expected all tokens to count: such responses cannot be "
            "continued from any of their tokens"
        )
    return rollout


def _widened(trainer: "Trainer", rollout: Rollout) -> Rollout:
    if getattr(trainer.shaper, "score_after_end", False):
        return rollout.with_end_states(trainer.sampler.max_new_tokens)
    return rollout


def continued(
    trainer: "Trainer", states: Sequence[State], continuations: int, seed: int
) -> Rollout:
    """Draw continuations of every state: whole responses that share their beginnings.

    Args:
        trainer: whose policy and sampler.
        states: S.
        continuations: K of each.
        seed: what is drawn depends on it, the record and the position alone.

    Returns:
        S·K responses, those of a state side by side; nothing scored yet.

    Source: ours.
    """
    whole = []
    with together(trainer.accelerator), trainer._on_device(trainer.policy):
        for state in states:
            left = trainer.sampler.max_new_tokens - len(state.prefix)
            begun = [*state.prompt, *state.prefix]
            _sow(seed, state.record, len(state.prefix))
            drawn = _drawn(trainer, _shortened(trainer.sampler, left), [begun] * continuations)
            # A sampler of the user's may not know of the shorter limit.
            ended = (~drawn.truncated & (drawn.response_lengths <= left)).tolist()
            rollout = assemble(
                [state.prompt] * continuations,
                [[*state.prefix, *response[:left]] for response in drawn.completions()],
                ended,
                pad_token_id=0,
                device=drawn.input_ids.device,
            )
            columns = {name: [value] * continuations for name, value in state.columns.items()}
            whole.append(replace(rollout, columns=columns))
    return _widened(trainer, Rollout.concat(whole))


def _shortened(sampler: Any, limit: int) -> Any:
    """Return a sampler that draws at most `limit` tokens, or the sampler, where it cannot be told.

    Not `replace`: an engine's sampler knows by what it holds which weights the engine has.
    """
    if not isinstance(getattr(sampler, "effective", None), GenerationConfig):
        return sampler
    shorter = copy.copy(sampler)
    config = copy.deepcopy(sampler.effective)
    config.max_new_tokens = limit
    object.__setattr__(shorter, "effective", config)
    return shorter


def returns_of(
    trainer: "Trainer", drawn: Rollout, states: Sequence[State], gamma: float
) -> Float[Tensor, " N"]:
    """Return what each continuation earns from its state on, discounted to there.

    Args:
        trainer: whose rewards and shaper; the moments of this one stay what they are.
        drawn: S·K responses, by `continued`.
        states: S.
        gamma: discount γ per token.

    Returns:
        ``[N]`` of the S·K responses, in units of reward.

    Source: P1 §3.2 (the return) of eq. 19's rewards.
    """
    accelerator = trainer.accelerator
    size = max(1, trainer.args.rollout_size // accelerator.num_processes)
    parts = list(torch.arange(len(drawn)).split(size))
    count = torch.tensor([len(parts)], device=accelerator.device)
    judged = []
    # Sharded models are asked by all processes together: equally often, therefore.
    for number in range(int(accelerator.gather(count).max())):
        part = drawn.select(parts[min(number, len(parts) - 1)])
        with together(accelerator):
            part = trainer.score(part)
        with together(accelerator):
            part = trainer.annotate(part)
        judged += [part] if number < len(parts) else []
    rollout = Rollout.concat(judged)
    rewards = widest(shaped(_resting(trainer.shaper), rollout, trainer.engine.reduce))
    ends = None if rollout.bootstrap is None else widest(rollout.bootstrap)
    if ends is None:
        returns = discounted_returns(rewards, rollout.states, gamma)
    else:
        returns = gae(rewards, torch.zeros_like(rewards), rollout.states, gamma, 1.0, ends)
    per_state = len(drawn) // len(states)
    at = torch.tensor([len(state.prefix) for state in states], device=returns.device)
    return returns.gather(1, at.repeat_interleave(per_state)[:, None]).squeeze(1)


class _Resting(RunningMoments):
    """Moments that take nothing in."""

    def update(self, x: Tensor, reduce: Any = None) -> None:
        """Pass over what is shown.

        Args:
            x: ``[B]`` anything.
            reduce: not asked.
        """


def _resting(shaper: Any) -> Any:
    """Return a copy of a shaper whose running moments stay what they are."""
    copied = copy.deepcopy(shaper)
    moments = getattr(copied, "moments", None)
    if isinstance(moments, RunningMoments):
        copied.moments = _Resting(moments.count, moments.mean, moments.m2)
    return copied
