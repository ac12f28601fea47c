"""Parts of a trainer that do not fit together, refused before any model is loaded."""

import math
from typing import Any

from transformers import GenerationConfig

from mossrlhf.config import TrainerConfig
from mossrlhf.loss import PPOMaxLoss


def require_types(args: Any, loss: Any, generation_config: Any) -> None:
    """Refuse what only looks like a part: a dict for a config, a function for the loss.

    Args:
        args: a `TrainerConfig`, or None.
        loss: a `PPOMaxLoss`, or None.
        generation_config: of transformers, or None.

    Raises:
        TypeError: which, and what to do.

    Source: ours.
    """
    wanted = {
        "args": (args, TrainerConfig, "TrainerConfig(...)"),
        "loss": (
            loss,
            PPOMaxLoss,
            "a PPOMaxLoss; for another algorithm subclass it and override policy_loss",
        ),
        "generation_config": (generation_config, GenerationConfig, "GenerationConfig(...)"),
    }
    for name, (value, kind, remedy) in wanted.items():
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name}: got a {type(value).__name__}, expected {remedy}")


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
