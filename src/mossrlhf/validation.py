"""Checks of a trainer's arguments, and of what custom components return."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.config import TrainerConfig
from mossrlhf.data import require_records
from mossrlhf.functional import Reduce
from mossrlhf.loss import PPOMaxLoss
from mossrlhf.options import call_with
from mossrlhf.rewards import reward_pairs
from mossrlhf.sampling import Sampler
from mossrlhf.types import Advantages, Rollout

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
"""Arguments of a trainer with their type, and what to pass."""


def require_parts(given: Mapping[str, Any]) -> None:
    """Check each of a trainer's arguments, by name, before anything is loaded."""
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
        return  # a generator can be read only once
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
    args: TrainerConfig,
    loss: PPOMaxLoss,
    advantage: Any,
    processes: int,
    *,
    critic: Any,
    ptx_dataset: Any,
    generation_config: Any,
    sampler: Any,
) -> None:
    """Raise ValueError if parts that are each valid do not fit together."""
    if loss.ptx_coef is not None and ptx_dataset is None:
        raise ValueError(
            f"PPOMaxLoss(ptx_coef={loss.ptx_coef}): there is no pre-training data; pass "
            "Trainer(ptx_dataset=), or set ptx_coef=None"
        )
    if ptx_dataset is not None and loss.ptx_coef is None:
        raise ValueError(
            "ptx_dataset: got one, but PPOMaxLoss(ptx_coef=None) ignores it; set "
            "Trainer(loss=PPOMaxLoss(ptx_coef=...)), or leave ptx_dataset out"
        )
    if args.bootstrap_truncated and critic is False:
        raise ValueError(
            "TrainerConfig(bootstrap_truncated=True): it needs the critic's values, and "
            "critic=False; leave one of them out"
        )
    size = getattr(advantage, "group_size", None)
    if size is not None and size != args.samples_per_prompt:
        raise ValueError(
            f"advantage: its groups are of {size}, but TrainerConfig(samples_per_prompt="
            f"{args.samples_per_prompt}): set both to the same number"
        )
    if generation_config is not None and sampler is not None:
        raise ValueError(
            "generation_config: got one beside a sampler, which has its own; give it to "
            "the sampler instead: HFSampler.for_tokenizer(tokenizer, generation_config)"
        )
    args.require_shareable(processes)


def require_reachable_entropy(loss: PPOMaxLoss, vocabulary: int) -> None:
    """Raise ValueError if the entropy target is above ln V, and so would never bind.

    MOSS-RLHF's code clips entropy at 35 nats, with ln V = 10.4.
    """
    target, most = loss.entropy_target, math.log(vocabulary)
    if target is not None and target >= most:
        raise ValueError(
            f"PPOMaxLoss(entropy_target={target}): a distribution over {vocabulary} tokens has at "
            f"most ln {vocabulary} = {most:.1f} nats, so the target would never bind; set one "
            "below that, or leave it out for a plain bonus"
        )


def responses(sampler: Any, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
    """Call a sampler; raise TypeError or ValueError unless it returns a `Rollout` of B prompts."""
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


def shaped(shaper: Callable[..., Any], rollout: Rollout, reduce: Reduce) -> Tensor:
    """Call a shaper; raise TypeError or ValueError if it returns no rewards ``[B, T]``."""
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
    """Call an advantage estimator, with values of 0 without a critic."""
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
    """Return the user's scores as a tensor; raise ValueError unless they are B finite numbers."""
    try:
        given = torch.as_tensor(scores, dtype=torch.float32, device=rollout.mask.device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"scores: got {scores!r:.60}, expected {len(rollout)} numbers ({error})"
        ) from error
    if given.shape != (len(rollout),):
        raise ValueError(
            f"scores: got {tuple(given.shape)}, expected one for each of the {len(rollout)} "
            "responses"
        )
    if not bool(torch.isfinite(given).all()):
        raise ValueError(f"scores: got {given.tolist()}, expected finite numbers")
    return given
