"""Traps that can be re-opened: each still fits the source, and has a test that exists."""

import ast
import json

import pytest


@pytest.fixture
def traps(root):
    return json.loads((root / "tools" / "traps.json").read_text(encoding="utf-8"))


def test_each_fits_the_source_once(root, traps):
    for trap in traps:
        source = (root / "src" / "mossrlhf" / trap["file"]).read_text(encoding="utf-8")
        assert source.count(trap["before"]) == 1, trap["trap"]
        compile(source.replace(trap["before"], trap["after"]), trap["file"], "exec")


def test_each_has_a_test(root, traps):
    for trap in traps:
        file, *path = trap["test"].split("::")
        names = {
            node.name
            for node in ast.walk(ast.parse((root / "tests" / file).read_text(encoding="utf-8")))
            if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }
        assert names >= set(path), trap["test"]
