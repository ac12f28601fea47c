"""The tutorials' pages: the notebooks of docs/tutorials as Markdown, cell by cell.

`tools/site_hooks.py` hands them to mkdocs, each under the name of its notebook.
"""

import json
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
FOLDER = "tutorials"
LINK = re.compile(r"(\]\([^()\s:]+)\.ipynb(?=[)#])")

HEAD = """\
!!! tip "A notebook"

    This page is [{name}]({name}){{ download="{name}" }}, which is kept without outputs.
    To run it, in a checkout:

    ```bash
    pip install '.[plot]' notebook
    jupyter notebook docs/{folder}/{name}
    ```
"""


def to_site(text: str) -> str:
    """Let links to notebooks, which GitHub shows, lead to their pages.

    Args:
        text: Markdown of a page, or of a cell.
    """
    return LINK.sub(r"\1.md", text)


def page(notebook: Path) -> str:
    """Return a notebook as Markdown: its title, how to run it, and its cells in order.

    Args:
        notebook: an ``.ipynb`` file whose first cell begins with its title.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    parts = [to_site(text) if kind == "markdown" else _code(text) for kind, text in texts]
    title, _, rest = parts[0].partition("\n")
    parts[:1] = [title, HEAD.format(name=notebook.name, folder=FOLDER), rest.strip()]
    return "\n\n".join(parts) + "\n"


def _code(source: str) -> str:
    return f"```python\n{source}\n```"


def pages() -> dict[str, str]:
    """Return the tutorials: path below docs/ → Markdown."""
    notebooks = sorted((DOCS / FOLDER).glob("*.ipynb"))
    return {f"{FOLDER}/{path.stem}.md": page(path) for path in notebooks}
