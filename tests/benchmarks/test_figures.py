"""What README and docs say was measured is what the figures of benchmarks/results/ say."""

import json
import re

import pytest
from claims import CLAIMS
from snippets import cells, run


@pytest.fixture
def kept(root):
    """Loads figures."""
    folder = root / "benchmarks" / "results"
    return lambda name: json.loads((folder / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("name", CLAIMS)
def test_the_page_says_it(name, root, kept):
    page, figures, words = CLAIMS[name]
    text = " ".join((root / page).read_text("utf-8").split())
    expected = words(kept(figures))
    assert expected
    assert [one for one in expected if one not in text] == []


WRITTEN = re.compile(r"<!-- (?:written by: [^>]*|(\S+)) -->\n.*?<!-- (?:end|/\1) -->", re.DOTALL)
CODE = re.compile(r"^( *)```.*?^\1```$|`[^`]*`", re.MULTILINE | re.DOTALL)
MEASURED = re.compile(
    r"(?<![\w.,/−-])\d[\d.,]*(?:–\d[\d.,]*)? ?"
    r"(?:µs|ms|s|seconds?|minutes?|[KMG]i?B|[GT]FLOP/s|times|%|nats?)(?!\w)"
)
ELSEWHERE = {"study.md", "bad_inputs.md"}
"""Pages that are written, or held to what happens, as a whole."""
CHOSEN = {
    "README.md": set(),
    "data.md": {"16 MiB", "256 MiB"},  # limits in the code
    "design.md": {"6 %"},  # of arithmetic: exp(1/16)
    "differences.md": {"35 nats"},  # MOSS-RLHF's setting
    "faults.md": {"30 seconds"},  # Slurm's and Kubernetes' default
    "memory.md": {"80 GB", "15 %", "2 %"},  # a card; tolerances of a test
    "metrics.md": {"5 %", "95 %"},  # quantiles
    "performance.md": {"5 %"},  # a threshold in the code
}
"""Quantities with a unit that nobody has measured, by page."""


def unheld(text, words):
    """Measured quantities in a page's prose, beside those in `words`, which it must have."""
    text = " ".join(CODE.sub("`", WRITTEN.sub("", text)).split())
    for one in words:
        text = text.replace(" ".join(CODE.sub("`", one).split()), "…")
    return MEASURED.findall(text)


def test_what_no_figure_holds_is_seen():
    text = "It is 2.5 times\nas fast: `3 ms`, 4 ms, 1e-5 nats."
    text = f"<!-- written by: x -->\n9 MB\n<!-- end -->\n{text}"
    assert unheld(text, ["2.5 times as"]) == ["4 ms"]
    assert unheld(text, ["2.4 times as"]) == ["2.5 times", "4 ms"]
    assert unheld("<!-- a -->\n8 %\n<!-- /a -->\n```text\n7 s\n```\n6 s", []) == ["6 s"]


def test_no_quantity_stands_without_figures(root, kept):
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if path.name in ELSEWHERE:
            continue
        name = path.relative_to(root).as_posix()
        words = [
            w
            for page, figures, make in CLAIMS.values()
            if page == name
            for w in make(kept(figures))
        ]
        text = path.read_text("utf-8")
        assert set(unheld(text, words)) == CHOSEN.get(path.name, set()), name


def named(node, name):
    """Whether a key is somewhere in figures."""
    below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return (isinstance(node, dict) and bool(node.get(name))) or any(
        named(one, name) for one in below
    )


OWN = {"mutants"}
"""Of the tools and recipes that read them again, in a layout of their own."""
OLD = {"hh_accuracy", "kill_runs"}
"""Kept before the versions were written along; what is measured anew has them."""


def test_figures_say_how_they_were_made(root, kept):
    names = {path.stem for path in (root / "benchmarks" / "results").glob("*.json")} - OWN
    assert {figures for _, figures, _ in CLAIMS.values()} < names
    commands = {name for name in names for key in ("command", "commands") if named(kept(name), key)}
    assert commands == names
    assert {name for name in names if not named(kept(name), "versions")} == OLD


def test_choices_are_measured(script):
    choices = script("benchmarks/choices.py")
    found = choices.measure(rows=2, words=300, rounds=1)
    assert found["drawing"]["ms"].keys() == {"by noise", "by sums"}
    for each in choices.drawn(2, 300).values():
        tokens = each.forward()
        assert tokens.shape == (2,)
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < 300


def test_the_plan_on_the_page_is_what_its_code_prints(root, capsys):
    path = root / "docs" / "memory.md"
    text = path.read_text("utf-8")
    run(cells(text), path)
    printed = capsys.readouterr().out.split()
    shown = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(shown) == 2
    assert printed == " ".join(shown).split()
