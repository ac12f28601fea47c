"""The README's Python runs: its ``python`` blocks in order, as the cells of one notebook."""

from pathlib import Path

import pytest
from snippets import cells, run, shrink

README = Path(__file__).resolve().parents[2] / "README.md"


def test_blocks_keep_their_line_numbers():
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n\n```python\ny = x\n```\n"
    assert cells(text) == ["\n\nx = 1\n", "\n" * 9 + "y = x\n"]


@pytest.mark.usefixtures("hub")
def test_readme_runs(monkeypatch):
    """As it stands but for the models, and for sizes: hours become seconds."""
    blocks = cells(README.read_text(encoding="utf-8"))
    assert blocks, "README.md has no ```python block"
    shrink(monkeypatch, total_steps=2, rollout_size=8, minibatch_size=4, critic_pretrain_steps=1)
    run(blocks, README)


def test_the_first_hour_is_short():
    """Each cell that trains takes at most 15 lines, those it goes on from included."""
    trains = [block for block in cells(README.read_text(encoding="utf-8")) if "plot(" in block]
    lengths = [sum(bool(line.strip()) for line in cell.splitlines()) for cell in trains]
    shared = ("from mossrlhf", "def correct", "    return [float", "model =", "sums =")
    lent = sum(line.startswith(shared) for line in trains[1].splitlines())
    assert (len(lengths), lent) == (5, 5)
    assert max(*lengths[:2], *(length + lent for length in lengths[2:])) <= 15
