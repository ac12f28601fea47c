"""A verifiable reward: sums, whose correct answer is a column of the dataset.

`Trainer` passes the columns of each prompt's record to the reward function by name, here
``answer``; there is no reward model, and nothing is downloaded. The SFT model is trained on every
sum, two in five with the correct answer. GRPO then trains and evaluates on the same sums.
Run it: ``python examples/algorithms/arithmetic.py``.

Source: ours; rewards that are verified rather than learned: arXiv 2411.15124 (Tülu 3), §6.
"""

from collections.abc import Sequence
from random import Random

import toy
from grpo import GRPO, parts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "+", "=", *map(str, range(19))]


def correct(*, completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Return 1 for exactly the correct answer, else 0; ``answer`` is the dataset's column."""
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


def sums(seed: int = 0) -> toy.Stage:
    """Return the stage: sums of two digits, and a model that solves few of them."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    size = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    ids = dict(vocab_size=len(WORDS), pad_token_id=0, bos_token_id=2, eos_token_id=3)
    pairs, draw = [(a, b) for a in range(10) for b in range(10)], Random(seed)
    asked = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in pairs]
    shown = [
        {**record, "response": record["answer"] if draw.random() < 0.4 else draw.choice(WORDS[6:])}
        for record in asked * 40
    ]
    policy = toy.fine_tuned(LlamaConfig(**size, **ids), tokenizer, shown, seed, epochs=4)
    common = dict(policy=policy, tokenizer=tokenizer, reward=correct, max_new_tokens=3)
    return toy.Stage(prompts=asked, held_out=asked * 4, **common)


TOY = dict(parts=parts, kind=GRPO, stage=sums, rollout_size=256, minibatch_size=64)

if __name__ == "__main__":
    toy.main(**TOY)
