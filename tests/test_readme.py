"""The README's Python runs: its ``python`` blocks in order, as the cells of one notebook."""

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_blocks(text: str) -> list[str]:
    """Each block after as many empty lines as stand before it: errors name the README's line."""
    return ["\n" * text[: m.start(1)].count("\n") + m[1] for m in BLOCK.finditer(text)]


def test_blocks_keep_their_line_numbers():
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n\n```python\ny = x\n```\n"
    assert code_blocks(text) == ["\n\nx = 1\n", "\n" * 9 + "y = x\n"]


def test_readme_runs(tmp_path, monkeypatch):
    blocks = code_blocks(README.read_text(encoding="utf-8"))
    assert blocks, "README.md has no ```python block"
    monkeypatch.chdir(tmp_path)  # what it writes does not land in the repository
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
