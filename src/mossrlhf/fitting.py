"""Parts of a trainer that do not fit together, refused before any model is loaded."""

from typing import Any


def require_fitting_parts(
    trainer: Any, ptx_dataset: Any, generation_config: Any, sampler: Any
) -> None:
    """Refuse parts that are each in order but not together.

    Args:
        trainer: with its ``args``, ``loss``, ``advantage`` and ``accelerator``.
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
