"""The Python of pages, run as it stands but for models and sizes: hours become seconds."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny

from mossrlhf import ToyWorld, TrainerConfig

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODELS = ("HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-360M-Instruct")


def cells(text: str) -> list[str]:
    """Each block after as many empty lines as stand before it: errors name the page's line."""
    return ["\n" * text[: m.start(1)].count("\n") + m[1] for m in BLOCK.finditer(text)]


def run(blocks: Iterable[str], path: Path) -> dict[str, Any]:
    """Run blocks as the cells of one notebook; returns the names they leave.

    Args:
        blocks: of a page, in order.
        path: the page's, for errors.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
    return names


def shrink(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Put sizes in place of those of any `TrainerConfig` that is made.

    Args:
        monkeypatch: of the test.
        sizes: by field.
    """
    made = TrainerConfig.__init__
    monkeypatch.setattr(
        TrainerConfig, "__init__", lambda config, **options: made(config, **{**options, **sizes})
    )


def save_stand_ins(folder: Path) -> None:
    """Save tiny models under the names that pages load.

    Args:
        folder: where the page's code runs.
    """
    tokenizer = ToyWorld(lang="en").tokenizer()
    model = tiny("llama", tokenizer, max_position_embeddings=1024)
    # It ends after a few tokens, where limits are as long as a real model needs.
    with torch.no_grad():
        hidden = model.model(torch.arange(5, 60)[None]).last_hidden_state[0].mean(0)
        model.lm_head.weight[tokenizer.eos_token_id] = 8 * hidden / hidden.norm() ** 2
    for name in MODELS:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
