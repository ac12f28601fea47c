"""The tutorials run from the first cell to the last, in a folder and process of their own."""

import json
import os
import subprocess
import sys

import pytest

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


RUNNER = f"""
import ast, json, sys
import matplotlib
matplotlib.use("agg")
names = {{"__name__": "__main__"}}
for number, source in enumerate(json.load(sys.stdin)):
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


@pytest.mark.parametrize("name", NAMES)
def test_runs_from_top_to_bottom(root, tmp_path, name):
    known = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", RUNNER],
        input=json.dumps(code_of(root / "docs" / "tutorials" / f"{name}.ipynb")),
        cwd=tmp_path,
        env=known,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert SHOWN.get(name, "") in done.stdout


def test_all_are_run(root):
    found = {path.stem for path in (root / "docs" / "tutorials").glob("*.ipynb")}
    assert found == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_is_kept_without_outputs(root, name):
    """What a run prints depends on the machine; a diff shows what somebody wrote."""
    for cell in cells(root / "docs" / "tutorials" / f"{name}.ipynb"):
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
