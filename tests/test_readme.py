"""The README's Python runs: its ``python`` blocks in order, as the cells of one notebook."""

import re
from pathlib import Path

import pytest
import torch
from families import tiny

from mossrlhf import ToyWorld, TrainerConfig

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_blocks(text: str) -> list[str]:
    """Each block after as many empty lines as stand before it: errors name the README's line."""
    return ["\n" * text[: m.start(1)].count("\n") + m[1] for m in BLOCK.finditer(text)]


def test_blocks_keep_their_line_numbers():
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n\n```python\ny = x\n```\n"
    assert code_blocks(text) == ["\n\nx = 1\n", "\n" * 9 + "y = x\n"]


SIZES = {"total_steps": 2, "rollout_size": 8, "minibatch_size": 4, "critic_pretrain_steps": 1}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Tiny models under the names that the README loads, in the folder where it runs."""
    monkeypatch.chdir(tmp_path)  # what it writes does not land in the repository either
    tokenizer = ToyWorld(lang="en").tokenizer()
    model = tiny("llama", tokenizer, max_position_embeddings=1024)
    # It ends after a few tokens, where limits are as long as a real model needs.
    with torch.no_grad():
        hidden = model.model(torch.arange(5, 60)[None]).last_hidden_state[0].mean(0)
        model.lm_head.weight[tokenizer.eos_token_id] = 8 * hidden / hidden.norm() ** 2
    for name in ("HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-360M-Instruct"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)


@pytest.mark.usefixtures("hub")
def test_readme_runs(monkeypatch):
    """As it stands but for the models, and for sizes: hours become seconds."""
    blocks = code_blocks(README.read_text(encoding="utf-8"))
    assert blocks, "README.md has no ```python block"
    made = TrainerConfig.__init__

    def small(config, **options):
        made(config, **{**options, **SIZES})

    monkeypatch.setattr(TrainerConfig, "__init__", small)
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)


def test_the_first_hour_is_short():
    """Each cell that trains takes at most 15 lines, those it goes on from included."""
    cells = [block for block in code_blocks(README.read_text(encoding="utf-8")) if "plot(" in block]
    lengths = [sum(bool(line.strip()) for line in cell.splitlines()) for cell in cells]
    shared = ("from mossrlhf", "def correct", "    return [float", "model =", "sums =")
    lent = sum(line.startswith(shared) for line in cells[1].splitlines())
    assert (len(lengths), lent) == (6, 5)
    assert max(*lengths[:2], *(length + lent for length in lengths[2:])) <= 15
