"""Checks of arguments, with suggestions for misspelled names; calls with optional arguments."""

import difflib
import functools
import inspect
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from inspect import signature
from types import MappingProxyType, NoneType
from typing import Any, TypeVar, get_args

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., None])

ELSEWHERE = {
    "batch_size": "TrainerConfig(rollout_size=, minibatch_size=)",
    "cliprange": "PPOMaxLoss(policy_clip=)",
    "cliprange_value": "PPOMaxLoss(value_clip=)",
    "clip_range": "PPOMaxLoss(policy_clip=)",
    "epsilon": "PPOMaxLoss(policy_clip=)",
    "gradient_accumulation_steps": "TrainerConfig(micro_batch_size=), which only changes speed",
    "fp16": "TrainerConfig(bf16=True)",
    "gae_lambda": "AdvantageEstimator(lam=)",
    "init_kl_coef": "RewardShaper(kl_coef=)",
    "config": "Trainer(args=TrainerConfig(...))",
    "kl_coef": "RewardShaper(kl_coef=), or PPOMaxLoss(kl_loss_coef=) for a term of the loss",
    "max_new_tokens": "Trainer(generation_config=GenerationConfig(max_new_tokens=))",
    "max_steps": "TrainerConfig(total_steps=)",
    "mini_batch_size": "TrainerConfig(minibatch_size=), sequences per optimizer step",
    "missing_eos_penalty": "RewardShaper(missing_eos_penalty=)",
    "num_generations": "TrainerConfig(samples_per_prompt=)",
    "num_mini_batches": "TrainerConfig(minibatch_size=), sequences per optimizer step",
    "num_train_epochs": "TrainerConfig(total_steps=), or num_ppo_epochs for epochs over a rollout",
    "per_device_train_batch_size": "TrainerConfig(micro_batch_size=), which only changes speed",
    "ppo_epochs": "TrainerConfig(num_ppo_epochs=)",
    "ptx_coef": "PPOMaxLoss(ptx_coef=)",
    "reward_clip": "RewardShaper(clip=)",
    "response_length": "Trainer(generation_config=GenerationConfig(max_new_tokens=))",
    "reward_funcs": "Trainer(reward=)",
    "reward_model": "Trainer(reward=)",
    "temperature": "Trainer(generation_config=GenerationConfig(temperature=))",
    "tokenizer": "Trainer(processing_class=)",
    "top_p": "Trainer(generation_config=GenerationConfig(top_p=))",
    "total_episodes": "TrainerConfig(total_steps=), each of rollout_size episodes",
    "use_score_norm": "RewardShaper(normalize=True)",
    "use_score_scaling": "RewardShaper(scale=True)",
    "value_model": "Trainer(critic=)",
    "vf_coef": "PPOMaxLoss(value_coef=)",
    "whiten_rewards": "AdvantageEstimator(whiten=True) or RewardShaper(normalize=True)",
}
"""Options of other libraries, and their names here."""


def suggest(name: str, known: list[str]) -> str:
    """Return "; did you mean …?" for a name that is not among the known ones, or ""."""
    if name in ELSEWHERE:
        return f"; here that is {ELSEWHERE[name]}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def strict(cls: type[T]) -> type[T]:
    """Make a dataclass reject unknown keywords with a suggestion."""
    init: Callable[..., None] = cls.__init__
    options = [spec for spec in fields(cls) if spec.init]  # type: ignore[arg-type]
    needed = {spec.name: spec.type for spec in options if not _may_be_none(spec.type)}
    known = [spec.name for spec in options]
    cls.__init__ = _checked(init, known, cls.__name__, needed)  # type: ignore[method-assign]
    return cls


def strict_init(init: F) -> F:
    """Make an ``__init__`` reject unknown keywords with a suggestion; its signature is kept."""
    return _checked(init, [name for name in signature(init).parameters if name != "self"])


def _may_be_none(kind: Any) -> bool:
    return kind is Any or NoneType in get_args(kind)


def _checked(
    init: Any, known: list[str], owner: str = "", needed: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if value is None and name in needed:
                raise TypeError(f"{owner}({name}=None): it cannot be None; leave it out")
            if name not in known:
                hint = suggest(name, known) or f"; its options: {', '.join(known)}"
                raise TypeError(f"{owner or type(self).__name__} has no option {name!r}{hint}")
            _require_kind(owner, name, value, needed.get(name))
        init(self, *args, **kwargs)

    return checked


def _require_kind(owner: str, name: str, value: Any, kind: Any) -> None:
    """Raise TypeError for switches and strings of another type: ``bool("false")`` is True."""
    expected = ""
    if kind is bool and not (isinstance(value, bool) or value in (0, 1)):
        expected = "True or False"
    if kind is str and not isinstance(value, str | os.PathLike):
        expected = "a text"
    if expected:
        raise TypeError(f"{owner}({name}=): got {value!r}, expected {expected}")


def check_pair(owner: str, name: str, value: Any) -> None:
    """Check a clip: None, a number, or a pair (low, high); low in (0, 1], high above 0."""
    pair = value if isinstance(value, tuple) else (value, value)
    single = value is None or isinstance(value, tuple | numbers.Real)
    if not single or len(pair) != 2:
        raise (ValueError if single else TypeError)(
            f"{owner}({name}=): got {value!r}, expected a number, or a pair (low, high)"
        )
    check_range(owner, name, pair[0], 0, 1, above=True)
    check_range(owner, name, pair[1], 0, above=True)


def check_range(
    owner: str,
    name: str,
    value: Any,
    low: float,
    high: float = float("inf"),
    above: bool = False,
) -> None:
    """Check that a number is in [low, high], or in (low, high] if `above`; None passes."""
    is_number = isinstance(value, numbers.Real)
    if value is not None and not is_number:
        raise TypeError(f"{owner}({name}=): got {value!r}, expected a number")
    if value is None or ((low < value if above else low <= value) and value <= high):
        return
    opening = "(" if above else "["
    raise ValueError(
        f"{owner}({name}=): got {value}, expected a number in {opening}{low}, {high}]"
        + (" (None disables it, if that is allowed)" if above else "")
    )


def call_with(function: Callable[..., Any], *args: Any, **optional: Any) -> Any:
    """Call a function with `args` and those of the optional keywords that it accepts."""
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        names = {p.name for p in parameters}
        optional = {name: value for name, value in optional.items() if name in names}
    return function(*args, **optional)
