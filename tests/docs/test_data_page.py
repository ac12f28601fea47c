"""The examples of docs/data.md run, in their order, as the cells of one notebook."""

import re

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_guide_runs(root):
    guide = root / "docs" / "data.md"
    blocks = BLOCK.findall(guide.read_text(encoding="utf-8"))
    assert len(blocks) > 5
    names = {}
    for block in blocks:
        exec(compile(block, str(guide), "exec"), names)
