"""The pages' Python runs: the ``python`` blocks of each, in order, as the cells of one notebook."""

import re
from pathlib import Path

import pytest

from mossrlhf import TrainerConfig

PAGES = ("index", "concepts", "from_trl", "from_moss")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SIZES = {"total_steps": 1, "rollout_size": 8, "minibatch_size": 4, "critic_pretrain_steps": 1}


def cells(text: str) -> list[str]:
    """Each block after as many empty lines as stand before it: errors name the page's line."""
    return ["\n" * text[: m.start(1)].count("\n") + m[1] for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, root, tmp_path, monkeypatch):
    """As it stands but for sizes: hours become seconds."""
    path: Path = root / "docs" / f"{page}.md"
    blocks = cells(path.read_text(encoding="utf-8"))
    assert blocks, f"{path} has no ```python block"
    made = TrainerConfig.__init__
    monkeypatch.setattr(
        TrainerConfig, "__init__", lambda config, **options: made(config, **{**options, **SIZES})
    )
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
