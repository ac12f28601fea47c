"""Tiny random models of the families a policy may come from."""

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WINDOW = 8
"""Of attention, where a family has one: shorter than prompt and response together."""

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt2": (GPT2Config, GPT2LMHeadModel, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=8)),
    # Both cap their logits or attention and alternate between local and global attention.
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, dict(head_dim=8, sliding_window=WINDOW)),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, dict(head_dim=8, sliding_window=WINDOW)),
    "mistral": (MistralConfig, MistralForCausalLM, dict(sliding_window=WINDOW)),
    "phi3": (Phi3Config, Phi3ForCausalLM, dict(sliding_window=WINDOW)),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    # Transformers has no sequence classifier for it, and so no layout for its critic.
    "granite": (GraniteConfig, GraniteForCausalLM, dict(logits_scaling=2.0)),
}


def tiny(
    family: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0, **options: Any
) -> PreTrainedModel:
    """Return a model of two layers with random weights that knows a tokenizer's tokens.

    Args:
        family: one of `FAMILIES`.
        tokenizer: its vocabulary and special tokens are the model's.
        seed: of the weights.
        options: of the model's configuration.
    """
    torch.manual_seed(seed)
    make_config, make_model, own = FAMILIES[family]
    shape = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    if family == "gpt2":
        shape = dict(n_embd=32, n_layer=2, n_head=4, n_positions=256)
    special = dict(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    settings = dict(vocab_size=len(tokenizer), **shape, **special) | own | options
    model = make_model(make_config(**settings))
    # Larger than at a model's birth, for differences to be seen.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
    return model.eval()
