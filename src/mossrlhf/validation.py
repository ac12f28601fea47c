"""Checks of a trainer's parts, and of what the user's own components return."""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.config import TrainerConfig
from mossrlhf.data import require_records
from mossrlhf.functional.reduce import Reduce
from mossrlhf.loss import PPOMaxLoss
from mossrlhf.options import call_with
from mossrlhf.rewards import reward_pairs
from mossrlhf.sampling import Sampler
from mossrlhf.types import Advantages, Rollout, TokenStats

KINDS: dict[str, tuple[Any, str]] = {
    "args": (TrainerConfig, "TrainerConfig(...)"),
    "loss": (
        PPOMaxLoss,
        "a PPOMaxLoss; for another algorithm subclass it and override policy_loss",
    ),
    "generation_config": (GenerationConfig, "GenerationConfig(...)"),
    "processing_class": (PreTrainedTokenizerBase, "a tokenizer: AutoTokenizer.from_pretrained(…)"),
    "accelerator": (Accelerator, "an accelerate.Accelerator"),
    "sampler": (
        Sampler,
        "an HFSampler, or an object with temperature and max_new_tokens that is called with "
        "(model, prompts) and returns a Rollout",
    ),
    "shaper": (Callable, "a RewardShaper, or a function rollout -> rewards [B, T]"),
    "advantage": (Callable, "an estimator, or a function (rewards, values, mask) -> Advantages"),
}
"""Arguments of a trainer that must be of a kind, and what to pass."""


def require_parts(given: Mapping[str, Any]) -> None:
    """Refuse arguments that are of no use whatever the others are, before anything is loaded.

    Args:
        given: arguments of a trainer by name.

    Raises:
        TypeError: where one only looks like a part: a dict for a config, a class for an object.
        ValueError: where a dataset or the reward is not in order.

    Source: ours.
    """
    for name, (kind, remedy) in KINDS.items():
        value = given.get(name)
        if isinstance(value, type):
            raise TypeError(
                f"{name}: got the class {value.__name__}, expected {value.__name__}(...)"
            )
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name}: got {value!r:.60}, expected {remedy}")
    _require_callbacks(given.get("callbacks", ()))
    for name in ("train_dataset", "eval_dataset", "ptx_dataset"):
        if given[name] is not None or name == "train_dataset":
            require_records(given[name], name, prompts=name != "ptx_dataset")
    _require_rewards(given["reward"])


def _require_callbacks(callbacks: Any) -> None:
    if isinstance(callbacks, Iterable) and not isinstance(callbacks, Collection):
        return  # to look into a generator would be to use it up
    listed = list(callbacks) if isinstance(callbacks, Collection) else [callbacks]
    kinds = (c if isinstance(c, type) else type(c) for c in listed)
    wrong = [c for c, kind in zip(listed, kinds, strict=True) if not hasattr(kind, "on_step_end")]
    if wrong or not isinstance(callbacks, Collection):
        raise TypeError(
            f"callbacks: got {(wrong or [callbacks])[0]!r:.60}, expected a list of "
            "transformers.TrainerCallback objects; override the methods you want called"
        )


def _require_rewards(reward: Any) -> None:
    if not any(weight for _, weight in reward_pairs(reward)):
        raise ValueError(
            "reward: every weight is 0, so there is nothing to learn from; give one a weight"
        )


def require_fitting_parts(
    trainer: Any, critic: Any, ptx_dataset: Any, generation_config: Any, sampler: Any
) -> None:
    """Refuse parts that are each in order but not together.

    Args:
        trainer: with its ``args``, ``loss``, ``advantage`` and ``accelerator``.
        critic: as the trainer was given it.
        ptx_dataset: pre-training data, or None.
        generation_config: or None.
        sampler: or None.

    Raises:
        ValueError: which parts, and what to do.

    Source: ours.
    """
    args, loss = trainer.args, trainer.loss
    if loss.ptx_coef is not None and ptx_dataset is None:
        raise ValueError(
            f"PPOMaxLoss(ptx_coef={loss.ptx_coef}): there is no pre-training data; pass "
            "Trainer(ptx_dataset=), or set ptx_coef=None"
        )
    if ptx_dataset is not None and loss.ptx_coef is None:
        raise ValueError(
            "ptx_dataset: got one, but PPOMaxLoss(ptx_coef=None) does without; set "
            "Trainer(loss=PPOMaxLoss(ptx_coef=...)), or leave ptx_dataset out"
        )
    if args.bootstrap_truncated and critic is False:
        raise ValueError(
            "TrainerConfig(bootstrap_truncated=True): it takes the critic's values, and "
            "critic=False; leave one of them out"
        )
    size = getattr(trainer.advantage, "group_size", None)
    if size is not None and size != args.samples_per_prompt:
        raise ValueError(
            f"advantage: its groups are of {size}, but TrainerConfig(samples_per_prompt="
            f"{args.samples_per_prompt}): set both to the same number"
        )
    if generation_config is not None and sampler is not None:
        raise ValueError(
            "generation_config: got one beside a sampler, which draws by its own; give it to "
            "the sampler instead: HFSampler.for_tokenizer(tokenizer, generation_config)"
        )
    args.require_shareable(trainer.accelerator.num_processes)


def require_reachable_entropy(loss: PPOMaxLoss, vocabulary: int) -> None:
    """Refuse an entropy target above what the vocabulary allows, which would never bind.

    Args:
        loss: with its ``entropy_target``.
        vocabulary: V, tokens the policy chooses among.

    Raises:
        ValueError: with the bound, ln V.

    Source: ours; C clips entropy at 35 nats, where ln V = 10.4.
    """
    target, most = loss.entropy_target, math.log(vocabulary)
    if target is not None and target >= most:
        raise ValueError(
            f"PPOMaxLoss(entropy_target={target}): a distribution over {vocabulary} tokens has at "
            f"most ln {vocabulary} = {most:.1f} nats, so the target would never bind; set one "
            "below that, or leave it out for a plain bonus"
        )


def responses(sampler: Any, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
    """Draw a response to each prompt.

    Args:
        sampler: ours or the user's.
        model: whose responses.
        prompts: token ids of each.

    Raises:
        TypeError: where it returns no `Rollout`.
        ValueError: where there is not one response to each prompt.

    Source: ours.
    """
    rollout: Any = sampler(model, prompts)
    name = type(sampler).__name__
    if not isinstance(rollout, Rollout):
        raise TypeError(
            f"sampler: {name} returned {type(rollout).__name__}, expected a Rollout: input_ids, "
            "prompt_lengths, response_lengths, truncated, mask"
        )
    if len(rollout) != len(prompts):
        raise ValueError(
            f"sampler: {name} returned {len(rollout)} responses to {len(prompts)} prompts, "
            "expected one to each, in their order"
        )
    return rollout


AGREEMENT = 1e-3
"""Nats by which log-probabilities by a cache and by a whole sequence may differ, in float32."""


def confirmed(
    rollout: Rollout, score: Callable[[Rollout], TokenStats], *, lenient: bool = False
) -> Rollout:
    """Let two responses be scored anew, to confirm what a sampler has noted of all of them.

    Args:
        rollout: B responses.
        score: what the policy says of the N tokens of some.
        lenient: whether to go on with what is not confirmed, as processes must that score together.

    Returns:
        the rollout, without `logprobs` and `entropies` where these are not both there and right.

    Warns:
        UserWarning: where they are wrong.

    Source: ours.
    """
    if rollout.logprobs is None or rollout.entropies is None:
        return replace(rollout, logprobs=None, entropies=None)
    lengths = rollout.prompt_lengths  # with most and with least padding while they were drawn
    part = rollout.select(torch.stack([lengths.argmin(), lengths.argmax()]))
    assert part.logprobs is not None
    gap = (score(part).logprob - part.logprobs[part.mask]).abs()
    if not gap.numel() or float(gap.max()) <= AGREEMENT:
        return rollout
    warnings.warn(
        f"rollout: its logprobs are off by up to {float(gap.max()):.2g} nats from what the policy "
        "says of its tokens; was it drawn by another policy, or changed since? "
        + ("They are kept" if lenient else "They are replaced")
        + "; replace(rollout, logprobs=None) has them computed, and spares this warning",
        UserWarning,
        stacklevel=3,
    )
    return rollout if lenient else replace(rollout, logprobs=None, entropies=None)


def shaped(shaper: Callable[..., Any], rollout: Rollout, reduce: Reduce) -> Tensor:
    """Shape the scores of a rollout into rewards.

    Args:
        shaper: ours or the user's.
        rollout: scored and annotated.
        reduce: sums a tensor over all processes; passed where it is asked for.

    Returns:
        ``[B, T]`` rewards.

    Raises:
        TypeError: where it returns no tensor.
        ValueError: where these are not rewards per token.

    Source: ours.
    """
    rewards = call_with(shaper, rollout, reduce=reduce)
    expected = tuple(rollout.mask.shape)
    if not isinstance(rewards, Tensor):
        raise TypeError(
            f"shaper: returned {type(rewards).__name__}, expected rewards per token, a tensor of "
            f"{expected}"
        )
    if tuple(rewards.shape) != expected:
        raise ValueError(
            f"shaper: returned {tuple(rewards.shape)}, expected rewards per token, {expected}; a "
            "number per response goes to its last token: mossrlhf.reward_shaping.add_at_last"
        )
    return rewards


def estimated(
    estimator: Callable[..., Any], rewards: Tensor, rollout: Rollout, reduce: Reduce
) -> Advantages:
    """Estimate the advantages of a rollout; without a critic the values are 0.

    Args:
        estimator: ours or the user's.
        rewards: ``[B, T]``.
        rollout: annotated.
        reduce: sums a tensor over all processes; passed where it is asked for.

    Raises:
        TypeError: where it returns no `Advantages`.
        ValueError: where these are not per token.

    Source: ours.
    """
    values = rollout.values if rollout.values is not None else torch.zeros_like(rewards)
    found = call_with(
        estimator,
        rewards,
        values,
        rollout.states,
        bootstrap=rollout.bootstrap,
        counted=rollout.mask,
        reduce=reduce,
    )
    parts = [getattr(found, name, None) for name in ("advantages", "returns")]
    if not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            f"advantage: returned {type(found).__name__}, expected Advantages(advantages, returns)"
        )
    shapes = [tuple(part.shape) for part in parts if part is not None]
    if any(shape != tuple(rewards.shape) for shape in shapes):
        raise ValueError(
            f"advantage: returned advantages {shapes[0]} and returns {shapes[1]}, expected "
            f"{tuple(rewards.shape)} each, one number per token"
        )
    result: Advantages = found
    return result


def as_scores(scores: Any, rollout: Rollout) -> Tensor:
    """Return scores of the user's own as a tensor.

    Args:
        scores: numbers, one per response.
        rollout: B responses.

    Raises:
        ValueError: where they are no numbers.

    Source: ours.
    """
    try:
        return torch.as_tensor(scores, dtype=torch.float32, device=rollout.mask.device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"scores: got {scores!r:.60}, expected {len(rollout)} numbers ({error})"
        ) from error
