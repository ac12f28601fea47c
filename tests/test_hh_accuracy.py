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


def test_the_page_has_the_two_runs(root):
    summaries = json.loads((root / "benchmarks" / "results" / "from_pairs.json").read_text())
    page = (root / "docs" / "real_data.md").read_text(encoding="utf-8")
    for name, summary in summaries.items():
        sft, ppo = summary["runs"]["SFT"], summary["runs"]["ppo_max"]
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} "))
        assert [cell.strip() for cell in row.split("|")[2:-1]] == [
            f"{summary['pairs']['train']} + {summary['pairs']['held_out']}",
            f"{summary['reward_model']['accuracy']:.3f}",
            f"{sft['reward_score']:.2f}",
            f"{ppo['reward_score']:.2f}",
            f"{ppo['kl_per_sequence']:.1f}",
            f"{ppo['win_rate']:.0%} / {ppo['lose_rate']:.0%}",
            f"{sft['response_length']:.0f} → {ppo['response_length']:.0f}",
            f"{sum(summary['seconds'].values()):.0f}",
        ]
