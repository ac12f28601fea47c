"""The tutorials' pages: every cell of the notebooks, in order, and links that hold on the site."""

import json
import re

import pytest

CODE = re.compile(r"^```python\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def tutorials(script):
    return script("tools/tutorial_pages.py")


def notebooks(root):
    return sorted((root / "docs" / "tutorials").glob("*.ipynb"))


def sources(path, kind):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def test_every_cell_is_on_its_page(tutorials, root):
    pages = tutorials.pages()
    assert list(pages) == [f"tutorials/{path.stem}.md" for path in notebooks(root)]
    for path, page in zip(notebooks(root), pages.values(), strict=True):
        assert CODE.findall(page) == sources(path, "code")
        places = [page.index(text.splitlines()[-1]) for text in sources(path, "markdown")]
        assert places == sorted(places)


def test_a_page_begins_with_its_title_and_says_how_to_run_it(tutorials, root):
    for path, page in zip(notebooks(root), tutorials.pages().values(), strict=True):
        title, _, rest = page.partition("\n")
        assert re.fullmatch(r"# \w.+", title)
        assert rest.lstrip().startswith("!!! tip")
        assert f"jupyter notebook docs/tutorials/{path.name}\n" in rest
        assert f"[{path.name}]({path.name})" in rest  # the file itself, for whoever wants it
        assert rest.count(".ipynb)") == 1  # all other links lead to pages


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("[a](2_b.ipynb)", "[a](2_b.md)"),
        ("[a](tutorials/2_b.ipynb#part), [b](c.md)", "[a](tutorials/2_b.md#part), [b](c.md)"),
        ("`2_b.ipynb` (2_b.ipynb)", "`2_b.ipynb` (2_b.ipynb)"),
        ("[a](https://example.org/b.ipynb)", "[a](https://example.org/b.ipynb)"),
        ("[a](b.ipynb_checkpoints)", "[a](b.ipynb_checkpoints)"),
    ],
)
def test_links_to_notebooks_lead_to_pages(tutorials, there, here):
    assert tutorials.to_site(there) == here
