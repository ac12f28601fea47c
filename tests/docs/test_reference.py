"""The site: every page has its place, every public name its page; and it builds."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections import Counter

import pytest
import yaml

import mossrlhf


@pytest.fixture
def api(script):
    return script("tools/api_pages.py")


@pytest.fixture
def tutorials(script):
    return script("tools/tutorial_pages.py")


@pytest.fixture
def config(root):
    return yaml.safe_load((root / "mkdocs.yml").read_text(encoding="utf-8"))


def files(entry) -> list[str]:
    """The pages that an entry of the navigation names, in order."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [file for part in parts for file in files(part)]


def test_every_public_name_has_a_page(api):
    pages = api.pages()
    for name in mossrlhf.__all__:
        if name == "__version__":
            assert name in pages[api.INDEX]
        elif inspect.ismodule(getattr(mossrlhf, name)):
            assert name in api.MODULES
        else:
            assert f"::: mossrlhf.{name}\n" in pages[f"api/{name}.md"]


def test_every_name_of_a_public_module_is_on_its_page(api):
    for short in api.MODULES:
        module = importlib.import_module(f"mossrlhf.{short}")
        page = api.pages()[f"api/mossrlhf.{short}.md"]
        for name in getattr(module, "__all__", ()):
            if not inspect.ismodule(getattr(module, name)):
                assert re.search(rf"^::: mossrlhf\.{short}(\.{name})?\.{name}$", page, re.MULTILINE)
        assert "::: " in page


def test_no_name_of_the_package_is_left_out_of_the_sections(api):
    homes = [home for part in api.SECTIONS.values() for home in part]
    assert Counter(homes) == Counter(list(mossrlhf._HOMES))


def test_names_differ_by_more_than_case(api):
    paths = [path.lower() for path in api.pages()]
    assert len(paths) == len(set(paths))


def test_the_navigation_has_every_page_once(api, tutorials, config, root):
    listed = Counter([*files(config["nav"]), *files(api.navigation())[1:]])
    docs = root / "docs"
    written = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert set(listed) == written | set(api.pages()) | set(tutorials.pages())
    assert set(listed.values()) == {1}


def test_nothing_is_fetched_from_elsewhere(config, root):
    assert config["theme"]["font"] is False
    assert not {"repo_url", "extra_javascript"} & set(config)  # the one asks GitHub for its stars
    for sheet in config["extra_css"]:
        assert "url(" not in (root / "docs" / sheet).read_text(encoding="utf-8")


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings"))),
    reason="the extra [docs] is not installed",
)
def test_it_builds_without_a_warning(root, tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loads = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"?(https?:[^\"\s>]+)")
    for page in tmp_path.rglob("*.html"):
        assert loads.findall(page.read_text(encoding="utf-8")) == [], page.name
