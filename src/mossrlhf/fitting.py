"""Parts of a trainer that do not fit together, refused before any model is loaded."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from accelerate import Accelerator
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.config import TrainerConfig
from mossrlhf.data import require_records
from mossrlhf.loss import PPOMaxLoss
from mossrlhf.rewards import reward_pairs
from mossrlhf.sampling import Sampler

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
