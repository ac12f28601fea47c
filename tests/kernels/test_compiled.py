"""Under torch.compile, and triton's kernels for CUDA, compiled where no GPU is.

Both in processes of their own: torch.compile does not see through the shape checker, and triton
compiles nothing once it interprets.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.fixture(scope="module")
def tried(root, tmp_path_factory):
    def run(*arguments, **environment):
        cache = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
        script = root / "tests" / "support" / "compiled_kernels.py"
        done = subprocess.run(
            [sys.executable, script, *arguments],
            env={**os.environ, "PYTHONPATH": str(root / "src"), **cache, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_one_graph_for_all_lengths(tried):
    """Forward and backward bitwise what they are without, whoever computes."""
    backends = ["torch"]
    if find_spec("triton"):
        backends.append("triton")
    found = tried("graph", *backends)
    assert found["graphs"] == 1
    assert found["equal"] == [True] * (6 * len(backends))


@pytest.fixture(scope="module")
def kernels(tried):
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return tried("cuda", TRITON_INTERPRET="0")


class TestKernelsForCuda:
    def test_compile_to_machine_code(self, kernels):
        assert len(kernels) == 2
        assert all(kernel["stages"][-2:] == ["ptx", "cubin"] for kernel in kernels.values())

    def test_are_the_same_for_every_number_of_rows(self, kernels):
        assert [kernel["keys"] for kernel in kernels.values()] == [1, 1]

    def test_count_in_64_bits(self, kernels):
        for kernel in kernels.values():
            assert len(kernel["wide"]) >= 5
            assert all(kernel["wide"])
