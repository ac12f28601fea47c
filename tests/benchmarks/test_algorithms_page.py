"""docs/algorithms.md says what benchmarks/algorithms.py has left."""

import json

import pytest


@pytest.fixture
def load(script):
    return lambda name: script(f"benchmarks/{name}.py")


def test_the_page_of_algorithms_says_what_the_figures_say(load):
    study = load("algorithms")
    page = study.PAGE.read_text(encoding="utf-8")
    kept = json.loads(study.FIGURES.read_text(encoding="utf-8"))["seeds"]
    assert sorted(kept) == ["0", "1", "2"]
    assert study.with_table(page, kept) == page
    gains = {
        name: [row[name]["after"] - row[name]["before"] for row in kept.values()]
        for name in study.TITLES
    }
    assert all(min(of_seeds) > 0 for of_seeds in gains.values())
    del gains["arithmetic"]  # another world, with a reward between 0 and 1
    assert min(gains, key=lambda name: sum(gains[name])) == "reference_ratio"


def test_the_table_of_algorithms_by_hand(load):
    study = load("algorithms")
    row = {name: {"before": -0.5, "after": 1.0, "kl_per_sequence": 0.25} for name in study.TITLES}
    seeds = {"0": row | {study.FASTER: {"before": 0.1, "after": -0.999}}}
    new = study.with_table("before\n" + "stale\n".join(study.MARKS) + "after\n", seeds)
    assert "| algorithm | seed 0 |\n| --- | --- |\n| GRPO | −0.50 → 1.00 |\n" in new
    assert "ends 0.25 nats per sequence" in new
    assert "of the others: 0.10 → −1.00. " in new
    assert "stale" not in new


def test_each_row_is_an_algorithm(load, root, monkeypatch):
    monkeypatch.syspath_prepend(root / "examples" / "algorithms")
    study = load("algorithms")
    kept = json.loads(study.FIGURES.read_text(encoding="utf-8"))
    assert study.settings() == kept["settings"]
    files = {path.stem for path in (root / "examples" / "algorithms").glob("*.py")}
    assert {*study.TITLES, "toy"} == files
