"""What the policy can read: its tokens, its tokenizer, its context."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.config import TrainerConfig
from mossrlhf.models import RewardModel, bare_module


@contextmanager
def loading(
    argument: str, name: Any, errors: tuple[type[Exception], ...] = (OSError, ValueError)
) -> Iterator[None]:
    """Say which argument it was, and what it named, where transformers cannot load it.

    Args:
        argument: of the trainer.
        name: the folder or hub name it was given.
        errors: of whoever loads it, that do not say so themselves.

    Raises:
        OSError: where there is nothing of that kind.
        ValueError: where its files are damaged, or of something else.

    Source: ours.
    """
    caught: tuple[type[Exception], ...] = (*errors, SafetensorError)
    try:
        yield
    except caught as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{argument}: {str(name)!r} cannot be loaded ({type(error).__name__}: {error!s:.300}); "
            "expected the folder or hub name of one that save_pretrained wrote, all files of it"
        ) from error


def require_finite(model: nn.Module, argument: str) -> None:
    """Refuse a model with a weight that is NaN or infinite, which would answer nonsense.

    Args:
        model: any.
        argument: what the error calls it.

    Raises:
        ValueError: with the parameter's name.

    Source: ours.
    """
    for name, parameter in model.named_parameters():
        numbers = parameter.is_floating_point() and not parameter.is_meta
        if numbers and not bool(torch.isfinite(parameter.detach()).all()):
            raise ValueError(
                f"{argument}: its parameter {name!r} is not finite; the training it comes from has "
                "diverged, or the file is damaged. Load an earlier one"
            )


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of tokens a model embeds.

    Args:
        model: a transformers model or `RewardModel`.

    Source: ours.
    """
    backbone = model.backbone if isinstance(model, RewardModel) else model
    table: Any = bare_module(backbone.get_input_embeddings())  # type: ignore[operator]
    return int(table.num_embeddings)


def require_vocabulary(
    policy: nn.Module, tokenizer: PreTrainedTokenizerBase, special: GenerationConfig | None = None
) -> None:
    """Refuse a tokenizer with tokens the policy does not embed, or ends and padding it never says.

    Args:
        policy: a transformers model, with or without adapters.
        tokenizer: what its prompts are encoded with.
        special: names the tokens that end and pad responses; None where they are not known.

    Raises:
        ValueError: with both sizes, in tokens.

    Source: ours.
    """
    size = vocabulary_size(policy)
    if size < len(tokenizer):
        raise ValueError(
            f"processing_class: the tokenizer has {len(tokenizer)} tokens, the model embeds {size} "
            "of them; call model.resize_token_embeddings(len(tokenizer)) where tokens were added "
            "(and train them), or pass the model's own tokenizer"
        )
    for name in ("eos_token_id", "pad_token_id"):
        value = getattr(special, name, None)
        ids = value if isinstance(value, list) else [value]
        if wrong := [token for token in ids if token is not None and not 0 <= token < size]:
            raise ValueError(
                f"generation_config: {name} = {wrong[0]}, but the model's {size} tokens end at "
                f"{size - 1}; name one of them, or leave it to the tokenizer"
            )


def load_tokenizer(model: nn.Module | str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model, by its name.

    Args:
        model: a folder or hub name, or a model that remembers where it came from.

    Raises:
        ValueError: where it does not.

    Source: ours.
    """
    name = str(model) if isinstance(model, (str, Path)) else ""
    if not name:
        name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not name:
        raise ValueError(
            "processing_class: got None, and the model does not say where it came from; pass its "
            "tokenizer"
        )
    if Path(name, "adapter_config.json").is_file() and not [*Path(name).glob("tokenizer*")]:
        from peft import PeftConfig

        name = str(PeftConfig.from_pretrained(name).base_model_name_or_path)
    with loading("processing_class", name):
        return AutoTokenizer.from_pretrained(name)


def policy_context(policy: nn.Module) -> int | None:
    """Return the most tokens the policy's positions reach, or None where it has no such bound.

    Args:
        policy: a transformers model.

    Source: ours.
    """
    config = policy.config.get_text_config()  # type: ignore[union-attr, operator]
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


def prompt_budget(policy: nn.Module, args: TrainerConfig, max_new_tokens: int) -> int | None:
    """Return the most tokens a prompt may have, so that a response fits behind it.

    Args:
        policy: a transformers model.
        args: `max_prompt_length`.
        max_new_tokens: longest response, in tokens.

    Returns:
        tokens; None where neither the config nor the model sets a bound.

    Raises:
        ValueError: where prompt and response cannot both fit into the model's context.

    Source: C: at most 2048 tokens with the response.
    """
    limit = policy_context(policy)
    if limit is None:
        return args.max_prompt_length
    left = limit - max_new_tokens
    wanted = args.max_prompt_length
    if left < 1 or (wanted is not None and wanted > left):
        raise ValueError(
            f"max_prompt_length: {wanted} prompt tokens and max_new_tokens={max_new_tokens} do "
            f"not fit into the model's context of {limit}; lower one of them"
        )
    return wanted or left
