"""Preference pairs of a few words, and models small enough to train on them in a test."""

import numpy as np
import torch
from torch.nn.functional import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from mossrlhf.models import RewardModel

WORDS = ["<pad>", "</s>", "<unk>", "good", "bad", *"abcdefgh"]


def language_model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def reward_model(seed=0, head=True, **changes):
    model = RewardModel.from_language_model(language_model(seed, **changes))
    if head:  # a zero head returns 0, whatever is wrong before it
        torch.nn.init.normal_(model.score.weight, std=0.3)
    return model.eval()


def pairs(count, seed=0, **columns):
    """Pairs of random words and random length; "good" is chosen, "bad" rejected."""
    rng = np.random.default_rng(seed)

    def words(*extra):
        some = [*rng.choice(list("abcdefgh"), size=rng.integers(1, 6)), *extra]
        return " ".join(rng.permutation(some))

    return [
        {"prompt": words(), "chosen": words("good"), "rejected": words("bad"), **columns}
        for _ in range(count)
    ]


def reward_of(model, tokenizer, record, side):
    """The reward of one response alone; `side` is "chosen" or "rejected"."""
    ids = tokenizer(f"{record['prompt']} {record[side]} </s>", return_tensors="pt")
    with torch.no_grad():
        return model(ids["input_ids"], ids["attention_mask"]).item()


def log_likelihood(model, tokenizer, record):
    """log p(chosen, eos | prompt), token by token, and the number of tokens."""
    prompt = tokenizer(record["prompt"])["input_ids"]
    response = [*tokenizer(record["chosen"])["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0]
    total = 0.0
    for offset, token in enumerate(response):
        total += log_softmax(logits[len(prompt) + offset - 1], -1)[token].item()
    return total, len(response)
