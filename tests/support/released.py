"""Checkpoints as MOSS-RLHF released them: a Llama with a reward head beside its output head."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    """A tiny Llama of random weights."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(dtype).eval()


def write(
    folder: Path,
    model: LlamaForCausalLM,
    head: torch.Tensor | None = None,
    *,
    pickled: bool = False,
    shards: int = 1,
    frequencies: bool = False,
) -> dict[str, torch.Tensor]:
    """Write a model, with a head where it is a reward model; return its tensors."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if head is not None:
        state["reward_head.weight"] = head
    if frequencies:
        size = model.config.hidden_size // model.config.num_attention_heads
        rotary = 1.0 / 10000 ** (torch.arange(0, size, 2).float() / size)
        for layer in range(model.config.num_hidden_layers):
            state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = rotary.clone()
    suffix, stem = ("bin", "pytorch_model") if pickled else ("safetensors", "model")
    save = torch.save if pickled else save_file
    if shards == 1:
        save(state, folder / f"{stem}.{suffix}")
        return state
    names, keys = [f"{stem}-{i}.{suffix}" for i in range(shards)], sorted(state)
    for i, name in enumerate(names):
        save({key: state[key] for key in keys[i::shards]}, folder / name)
    weight_map = {key: names[i % shards] for i, key in enumerate(keys)}
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return state
