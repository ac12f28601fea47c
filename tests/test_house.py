"""Rules of the source: no patches of another library, no private operators."""

import ast
from pathlib import Path

import pytest

import mossrlhf

SOURCE = Path(mossrlhf.__file__).parent
FILES = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}

SETTINGS: dict[str, set[str]] = {}
"""Attributes of other libraries that a module of ours may set, by module: none does."""

PRIVATE_TORCH: set[str] = set()
"""Modules that may reach into `torch._C`: none does."""


def imported(tree):
    """The names in a file that stand for a module of another library, or for something in one."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.split(".")[0]
                names[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {name: whole for name, whole in names.items() if whole.split(".")[0] != "mossrlhf"}


def dotted(node, names):
    """`torch.nn.functional.linear` of `nn.functional.linear`; None of anything not imported."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([names[node.id], *reversed(parts)])


def targets(node):
    """What a statement sets or deletes; what `setattr` and `delattr` are called for."""
    if isinstance(node, ast.Assign | ast.Delete):
        return node.targets
    if isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For):
        return [node.target]
    if isinstance(node, ast.withitem):
        return [node.optional_vars]
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name.strip("_") in ("setattr", "delattr") and node.args:
            return [ast.Attribute(node.args[0], "*")]
    return []


def unpacked(target):
    """The parts of `a, (b, *c)`, and `a` of `a[0]`."""
    if isinstance(target, ast.Tuple | ast.List):
        for part in target.elts:
            yield from unpacked(part)
    elif isinstance(target, ast.Subscript | ast.Starred):
        yield from unpacked(target.value)
    else:
        yield target


def patches(text):
    """Attributes of other libraries that a file sets, by their whole names."""
    tree = ast.parse(text)
    names = imported(tree)
    parts = [
        part for node in ast.walk(tree) for target in targets(node) for part in unpacked(target)
    ]
    return {dotted(part, names) for part in parts if isinstance(part, ast.Attribute)} - {None}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch\ntorch.nn.functional.linear = f", {"torch.nn.functional.linear"}),
        ("from torch import nn\nnn.Linear.forward: object = f", {"torch.nn.Linear.forward"}),
        ("import torch as t\nsetattr(t.nn, 'x', 1)", {"torch.nn.*"}),
        ("from torch.nn import Linear\ndel Linear.forward", {"torch.nn.Linear.forward"}),
        ("import sys\nsys.modules['x'] = 1", {"sys.modules"}),
        ("import torch\n(a, torch.addmm) = f, g", {"torch.addmm"}),
        ("import torch\nx = torch.zeros(1)\nx.grad = None\nsetattr(x, 'a', 1)", set()),
        ("from mossrlhf import trainer\ntrainer.x = 1", set()),
    ],
)
def test_a_patch_is_seen(text, expected):
    assert patches(text) == expected


def test_nothing_of_another_library_is_patched():
    found = {name: patches(path.read_text("utf-8")) for name, path in FILES.items()}
    assert {name: which for name, which in found.items() if which} == SETTINGS


def test_no_private_operator_is_called():
    texts = {name: path.read_text("utf-8") for name, path in FILES.items()}
    assert [name for name, text in texts.items() if "torch.ops.mkldnn" in text] == []
    assert {name for name, text in texts.items() if "torch._C" in text} == PRIVATE_TORCH


def test_an_iteration_runs_through_at_most_30_files(script, tmp_path):
    """What a reader must open to follow one; the figure is printed (`-rP`)."""
    tool = script("tools/iteration_files.py")
    files = tool.files_of_an_iteration(tool.make_trainer(str(tmp_path)))
    print(f"{len(files)} files, {sum(files.values())} functions")
    assert {"trainer.py", "optimization.py", "loss.py"} <= set(files)
    assert len(files) <= 30
