"""The pages' Python runs: the ``python`` blocks of each, in order, as the cells of one notebook."""

from pathlib import Path

import pytest
from snippets import cells, run, shrink

PAGES = ("index", "concepts", "from_trl", "from_moss")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, root, monkeypatch):
    """As it stands but for the models, and for sizes: hours become seconds."""
    path: Path = root / "docs" / f"{page}.md"
    blocks = cells(path.read_text(encoding="utf-8"))
    assert blocks, f"{path} has no ```python block"
    shrink(monkeypatch, total_steps=1, rollout_size=8, minibatch_size=4, critic_pretrain_steps=1)
    run(blocks, path)
