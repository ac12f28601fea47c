"""The tutorials run from the first cell to the last, in a folder and process of their own."""

import json
import re

import pytest
from launching import run

NAMES = (
    "1_ppo_max_in_five_minutes",
    "2_swap_a_component",
    "3_subclass_the_trainer",
    "4_a_reward_of_your_own",
    "5_reading_the_curves",
    "6_reward_models",
)


PICTURE = "<a picture>"
SHOWN = {
    "1_ppo_max_in_five_minutes": PICTURE,
    "2_swap_a_component": "set both to the same number",
    "4_a_reward_of_your_own": "reward 'forgetful' returned (63,) values for 64 completions",
    "5_reading_the_curves": PICTURE,
    "6_reward_models": PICTURE,
}
"""What the text around a cell says that it shows."""


def cells(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return notebook["cells"]


def code_of(path):
    """The code of a notebook, cell by cell."""
    return ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]


SMALLER = {
    r"sft_examples\(\d+\)": "sft_examples(64)",
    r"\bpairs\(2000\)": "pairs(200)",
    r"\bprompts\(128": "prompts(16",
    r"\bsteps=\d+|\btotal_steps=\d+": lambda found: found[0].split("=")[0] + "=2",
    r"\bcritic_pretrain_steps=\d+": "critic_pretrain_steps=1",
}
"""What is written in the place of numbers that make a tutorial take a minute."""


def small(source):
    """The code of a cell with `SMALLER` numbers."""
    for pattern, number in SMALLER.items():
        source = re.sub(pattern, number, source)
    return source


RUNNER = f"""
import ast, json, sys, warnings
import matplotlib
warnings.simplefilter("error", UserWarning)
matplotlib.use("agg")
names = {{"__name__": "__main__"}}
for number, source in enumerate(json.load(open(sys.argv[1]))):
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {{number}}", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), f"cell {{number}}", "eval"), names)
        if not source.endswith(";"):
            drawn = hasattr(value, "_repr_png_") and value._repr_png_()
            print("{PICTURE}" if drawn else value)
"""
"""Shows what a notebook shows: the last expression of a cell, if no semicolon follows."""


@pytest.mark.parametrize(
    "size", [small, pytest.param(str, id="as it stands", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", NAMES)
def test_runs_from_top_to_bottom(root, tmp_path, monkeypatch, name, size):
    code = [size(cell) for cell in code_of(root / "docs" / "tutorials" / f"{name}.ipynb")]
    (tmp_path / "cells.json").write_text(json.dumps(code))
    (tmp_path / "runner.py").write_text(RUNNER)
    monkeypatch.chdir(tmp_path)
    shown = run(tmp_path / "runner.py", "cells.json", output=tmp_path / "shown")
    assert SHOWN.get(name, "") in shown


def test_no_large_number_is_left(root):
    """Or a tutorial that takes a minute comes back into the suite unseen."""
    for name in NAMES:
        for cell in code_of(root / "docs" / "tutorials" / f"{name}.ipynb"):
            for number in re.findall(r"(?:steps|examples|pairs)[=(](\d+)", small(cell)):
                assert int(number) <= 200, (name, cell)


def test_all_are_run(root):
    found = {path.stem for path in (root / "docs" / "tutorials").glob("*.ipynb")}
    assert found == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_is_kept_without_outputs(root, name):
    """What a run prints depends on the machine; a diff shows what somebody wrote."""
    for cell in cells(root / "docs" / "tutorials" / f"{name}.ipynb"):
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
