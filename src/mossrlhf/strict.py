"""Options that are refused get an answer: what was meant, or where it lives here."""

import difflib
import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")

ELSEWHERE = {
    "batch_size": "TrainerConfig(rollout_size=, minibatch_size=)",
    "cliprange": "PPOMaxLoss(policy_clip=)",
    "cliprange_value": "PPOMaxLoss(value_clip=)",
    "clip_range": "PPOMaxLoss(policy_clip=)",
    "epsilon": "PPOMaxLoss(policy_clip=)",
    "gradient_accumulation_steps": "TrainerConfig(micro_batch_size=), which changes speed alone",
    "init_kl_coef": "RewardShaper(kl_coef=)",
    "kl_coef": "RewardShaper(kl_coef=), or PPOMaxLoss(kl_loss_coef=) for a term of the loss",
    "max_new_tokens": "Trainer(generation_config=GenerationConfig(max_new_tokens=))",
    "max_steps": "TrainerConfig(total_steps=)",
    "mini_batch_size": "TrainerConfig(minibatch_size=), sequences per optimizer step",
    "missing_eos_penalty": "RewardShaper(missing_eos_penalty=)",
    "num_generations": "TrainerConfig(samples_per_prompt=)",
    "num_mini_batches": "TrainerConfig(minibatch_size=), sequences per optimizer step",
    "num_train_epochs": "TrainerConfig(total_steps=), or num_ppo_epochs for epochs over a rollout",
    "per_device_train_batch_size": "TrainerConfig(micro_batch_size=), which changes speed alone",
    "ppo_epochs": "TrainerConfig(num_ppo_epochs=)",
    "ptx_coef": "PPOMaxLoss(ptx_coef=)",
    "reward_clip": "RewardShaper(clip=)",
    "response_length": "Trainer(generation_config=GenerationConfig(max_new_tokens=))",
    "temperature": "Trainer(generation_config=GenerationConfig(temperature=))",
    "top_p": "Trainer(generation_config=GenerationConfig(top_p=))",
    "total_episodes": "TrainerConfig(total_steps=), each of rollout_size episodes",
    "use_score_norm": "RewardShaper(normalize=True)",
    "use_score_scaling": "RewardShaper(scale=True)",
    "vf_coef": "PPOMaxLoss(value_coef=)",
    "whiten_rewards": "AdvantageEstimator(whiten=True) or RewardShaper(normalize=True)",
}
"""Options of other libraries, and where they live here."""


def suggest(name: str, known: list[str]) -> str:
    """Return "; did you mean …?" for a name that is not among the known ones, or "".

    Args:
        name: what came.
        known: what there is.

    Source: ours.
    """
    if name in ELSEWHERE:
        return f"; here that is {ELSEWHERE[name]}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def strict(cls: type[T]) -> type[T]:
    """Make a dataclass answer an unknown keyword with what was probably meant.

    Args:
        cls: the dataclass.

    Source: ours.
    """
    init: Callable[..., None] = cls.__init__
    known = [spec.name for spec in fields(cls) if spec.init]  # type: ignore[arg-type]

    @functools.wraps(init)
    def checked(self: T, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{cls.__name__} has no option {name!r}{suggest(name, known)} "
                    f"(its options: {', '.join(known)})"
                )
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[assignment, method-assign]
    return cls


def check_range(
    owner: str,
    name: str,
    value: float | None,
    low: float,
    high: float = float("inf"),
    above: bool = False,
) -> None:
    """Refuse a number outside [low, high], or (low, high] where `above`; None passes.

    Args:
        owner: whose option it is.
        name: the option.
        value: what came.
        low: smallest number allowed.
        high: largest number allowed.
        above: whether `low` itself is refused.

    Raises:
        ValueError: with owner, option, value and range.

    Source: ours.
    """
    if value is None or ((low < value if above else low <= value) and value <= high):
        return
    opening = "(" if above else "["
    raise ValueError(
        f"{owner}({name}=): got {value}, expected a number in {opening}{low}, {high}]"
        + ("" if low > 0 else " (None switches it off, where that is allowed)")
    )
