"""docs/real_data.md shows the figures that benchmarks/hh_accuracy.py has left."""

import json

import pytest


@pytest.fixture
def benchmark(script):
    return script("benchmarks/hh_accuracy.py")


def test_the_page_has_the_kept_figures(benchmark):
    figures = json.loads(benchmark.FIGURES.read_text())
    page = benchmark.PAGE.read_text(encoding="utf-8")
    assert benchmark.with_table(page, figures) == page


def test_the_table_by_hand(benchmark):
    page = benchmark.MARKS[0].join(["before\n", "old\n" + benchmark.MARKS[1] + "after\n"])
    # 300 pairs: √(0.6·0.4/300) = 0.0283; seeds of 0.6 and 0.62: standard deviation 0.01414 / √2.
    new = benchmark.with_table(page, {"bag of words": 0.5, "seed 0": 0.6, "seed 1": 0.62})
    assert new.startswith("before\n")
    assert new.endswith("after\n")
    assert "old" not in new
    assert "| reward model, seed 0 | 0.600 ± 0.028 |" in new
    assert "| reward model, mean of the seeds | 0.610 ± 0.028 |" in new
    assert "| bag of words, logistic regression | 0.500 ± 0.029 |" in new
    assert "standard error of the mean is 0.010." in new


@pytest.mark.parametrize("words", [[], ["pairs.jsonl", "--table"]])
def test_a_file_or_the_table(benchmark, words, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(words)
    assert "give either a file of preference pairs" in capsys.readouterr().err
