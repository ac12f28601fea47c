"""Load the policy's tokenizer, and check that its tokens and prompts fit the policy."""

from pathlib import Path

from peft import PeftConfig
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.config import TrainerConfig
from mossrlhf.loading.policy import name_argument
from mossrlhf.models.lora import vocabulary_size


def load_tokenizer(model: nn.Module | str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model: a folder, a hub name, or a model loaded from one."""
    name = str(model) if isinstance(model, (str, Path)) else ""
    if not name:
        name = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    if not name:
        raise ValueError(
            "processing_class: got None, and the model has no name_or_path to load one from; pass "
            "its tokenizer"
        )
    if Path(name, "adapter_config.json").is_file() and not [*Path(name).glob("tokenizer*")]:
        name = str(PeftConfig.from_pretrained(name).base_model_name_or_path)
    with name_argument("processing_class", name):
        return AutoTokenizer.from_pretrained(name)


def require_vocabulary(
    policy: nn.Module, tokenizer: PreTrainedTokenizerBase, special: GenerationConfig | None = None
) -> None:
    """Refuse a tokenizer, or special tokens, with ids that the policy does not embed."""
    size = vocabulary_size(policy)
    if size < len(tokenizer):
        raise ValueError(
            f"processing_class: the tokenizer has {len(tokenizer)} tokens, the model embeds {size} "
            "of them; call model.resize_token_embeddings(len(tokenizer)) if tokens were added "
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


def policy_context(policy: nn.Module) -> int | None:
    """Return the policy's longest sequence, in tokens; None if its positions have no bound."""
    config = policy.config.get_text_config()  # type: ignore[union-attr, operator]
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


def prompt_budget(policy: nn.Module, args: TrainerConfig, max_new_tokens: int) -> int | None:
    """Return the longest prompt, in tokens, that leaves room for a response; None for no bound."""
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
