"""Every link of README, docs/ and the other pages of the repository leads somewhere."""

import json
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), *sorted(DOCS.rglob("*.ipynb"))]
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]*)\)")
FOLDERS = ("benchmarks", "docs", "examples", "src", "tests", "tools")
FILE = re.compile(
    rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w/.-]+\.(?:css|ipynb|json|md|png|py|ya?ml)"
)
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


def prose(path: Path) -> str:
    """A page or notebook without its blocks of code, where brackets are no links."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        text = "\n\n".join(texts)
    return FENCE.sub("", text)


def links(text: str) -> list[str]:
    """What is linked to; code between backticks is no link, but may be a link's text."""
    return [m[1] for m in LINK.finditer(re.sub(r"`[^`\n]*`", "code", text))]


@cache
def anchors(path: Path) -> set[str]:
    """A page's headings as GitHub and mkdocs alike write their addresses."""
    titles = [re.sub(r"[*`]", "", title) for title in HEADING.findall(prose(path))]
    return {re.sub(r"[ ]", "-", re.sub(r"[^\w\- ]", "", title.lower())) for title in titles}


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for link in links(prose(page)):
        address, _, anchor = unquote(link).partition("#")
        if re.match(r"https?://|mailto:", address):
            continue
        target = (page.parent / address).resolve() if address else page
        on_site = page.is_relative_to(DOCS)
        if target == DOCS / "api" / "index.md" and on_site:
            continue  # made when the site is: tools/api_pages.py
        outside = on_site and not target.is_relative_to(DOCS)
        if outside or not target.is_file() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def absent(text: str) -> list[str]:
    """The files of the repository that a text names, in prose or code, and that are not there."""
    return sorted({name for name in FILE.findall(text) if not (ROOT / name).is_file()})


def test_files_that_are_named_exist():
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    files = {*PAGES, *sources} - {ROOT / "CHANGELOG.md"}  # which tells of what was
    found = {path: absent(path.read_text(encoding="utf-8")) for path in files}
    assert {
        path.relative_to(ROOT).as_posix(): names for path, names in found.items() if names
    } == {}
    gone = "/".join(("docs", "gone.md"))
    assert absent(f"as `{gone}` says, and docs/index.md, and site/docs/none.md") == [gone]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken(page) == []


def test_broken_ones_are_seen(tmp_path):
    (tmp_path / "there.md").write_text("# A `b()` and C 1.2\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [`x`](there.md#a-b-and-c-12) [b](gone.md) [c](there.md#no-heading) `[d](e)`"
        "\n```\n[f](gone.md)\n```\n![g](gone.png) [h](#nowhere)\n"
    )
    assert broken(page) == ["gone.md", "there.md#no-heading", "gone.png", "#nowhere"]


def test_broken_ones_of_a_notebook_are_seen(tmp_path):
    (tmp_path / "there.ipynb").write_text(notebook(markdown="# A title"))
    page = tmp_path / "page.ipynb"
    page.write_text(notebook(markdown="[a](there.ipynb) [b](there.ipynb#a-title) [c](gone.ipynb)"))
    assert broken(page) == ["gone.ipynb"]
    page.write_text(notebook(code="[f](gone.md)"))
    assert broken(page) == []


def notebook(**texts):
    """The text of a notebook with a cell of each kind."""
    cells = [{"cell_type": kind, "source": [text]} for kind, text in texts.items()]
    return json.dumps({"cells": cells})


@pytest.mark.parametrize("page", ["README.md", "docs/tutorials/1_ppo_max_in_five_minutes.ipynb"])
def test_there_are_links_to_follow(page):
    assert len(links(prose(ROOT / page))) > 5
