"""Console lines have at most 80 columns; completions are read back as they were written."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import run

from mossrlhf.logging import COLUMNS, Completions, ConsoleTable, completion_table

NAMES = [name for _, name, _, _ in COLUMNS]
NUMBERS = st.floats(-1e300, 1e300) | st.sampled_from([math.inf, -math.inf, math.nan])
ORDINARY = dict(zip(NAMES, [12, 2.861, 4.83, 18.2, 2.31, 3.07, 0.041, 0.083, 0.71], strict=True))


def cells(line):
    """The columns of a line, cut at their places."""
    found, start = [], 0
    for _, _, width, _ in COLUMNS:
        found.append(line[start : start + width].strip())
        start += width + 1
    assert start == len(line) + 1
    return found


def test_console_heading_is_aligned_with_the_columns():
    heading = ConsoleTable.heading()
    assert len(heading) <= 80
    assert cells(heading) == [name for name, _, _, _ in COLUMNS]


def test_console_prints_one_line_per_evaluated_reward(capsys):
    metrics = {"eval/kl/ref_per_sequence": 1.0}
    for name in ("reward_model", "brevity"):
        rates = {"policy": 1.196, "ref": 0.3824, "win_rate": 0.95, "tie_rate": 0, "lose_rate": 0.04}
        metrics |= {f"eval/{name}/{what}": value for what, value in rates.items()}
    ConsoleTable().evaluation(metrics)
    assert capsys.readouterr().out.splitlines() == [
        "  held-out reward_model: 1.2, reference 0.382; wins 95%, loses 4%",
        "  held-out brevity: 1.2, reference 0.382; wins 95%, loses 4%",
    ]


def test_console_line_of_ordinary_numbers():
    expected = ["12", "2.861", "4.83", "18.2", "2.31", "3.07", "0.041", "0.083", "0.71"]
    assert cells(ConsoleTable.line(ORDINARY)) == expected


@pytest.mark.parametrize(
    "value", [1e9, -1e9, 123456.789, -99999.5, 1e300, -1e300, math.inf, -math.inf, math.nan, 0]
)
def test_console_keeps_huge_numbers_in_their_columns(value):
    line = ConsoleTable.line(dict.fromkeys(NAMES, value) | {"step": 100_000})
    assert len(line) <= 80
    shown = cells(line)
    assert shown[0] == "100000"
    for text in shown[1:]:
        assert float(text) == pytest.approx(value, rel=0.1, nan_ok=True)


@given(st.lists(NUMBERS, min_size=8, max_size=8), st.integers(0, 999_999))
def test_console_line_of_any_numbers_is_aligned(values, step):
    line = ConsoleTable.line(dict(zip(NAMES, [step, *values], strict=True)))
    assert len(line) == len(ConsoleTable.heading())
    for text, value in zip(cells(line), [step, *values], strict=True):
        # Of the largest a single digit is left: -1.5e300 becomes -2e+300.
        assert float(text) == pytest.approx(value, rel=0.35, abs=0.06, nan_ok=True)


def test_console_leaves_missing_metrics_blank():
    line = ConsoleTable.line({"step": 3, "perplexity/ref": 2.5})
    assert cells(line) == ["3", "", "", "", "", "2.50", "", "", ""]


def test_console_repeats_the_heading(capsys):
    table = ConsoleTable(every=2)
    for step in range(3):
        table({**ORDINARY, "step": step})
    lines = capsys.readouterr().out.splitlines()
    starts = [cells(line)[0] for line in lines]
    assert starts == ["step", "0", "1", "step", "2"]


def test_completions_are_read_back_as_written(tmp_path):
    path = tmp_path / "new" / "completions.jsonl"
    write = Completions(path, limit=2)
    # What `str.splitlines` takes for ends of lines, and people write all the same.
    texts = ["你好\u2028 a\u0085b\nc\r", 'say "x"\x1c', "left out"]
    columns = {"reward/a": [0.123456, -1.0, 9.0], "length_tokens": [3, 4, 5]}
    write(1, ["p", "q", "r"], texts, columns)
    write(2, ["s"], ["t"], {"reward/a": [2.0]})
    assert completion_table(path, step=1) == [
        dict(step=1, prompt="p", completion=texts[0], **{"reward/a": 0.1235, "length_tokens": 3.0}),
        dict(step=1, prompt="q", completion=texts[1], **{"reward/a": -1.0, "length_tokens": 4.0}),
    ]
    assert [row["step"] for row in completion_table(str(path))] == [1, 1, 2]
    assert completion_table(path, step=3) == []
    assert "你好" in path.read_text(encoding="utf-8")  # readable without a parser


def test_completions_write_non_finite_rewards_as_null(tmp_path):
    path = tmp_path / "completions.jsonl"
    Completions(path)(1, ["p", "q"], ["a", "b"], {"reward/a": [math.nan, math.inf]})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["reward/a"] for row in rows] == [None, None]


def test_completion_table_skips_lines_that_are_not_records(tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text('[1]\n2\nnull\n"text"\n{"step": 1}\n{"st\n{"step": 2}', encoding="utf-8")
    assert completion_table(path) == [{"step": 1}]


def test_standard_logging_is_not_hidden(tmp_path):
    """Imports are absolute: `import logging` in the package is the standard library's."""
    script = tmp_path / "log.py"
    script.write_text("""
import logging, mossrlhf.logging
from mossrlhf import Trainer
assert logging is not mossrlhf.logging
logging.getLogger("any").warning("written by the standard library")
""")
    assert "written by the standard library" in run(script, output=tmp_path / "output")
