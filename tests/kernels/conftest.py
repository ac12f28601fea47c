"""Who computes, and where: triton's kernels run on CUDA, or in its interpreter where there is none;
those in C on a CPU with a compiler.

The interpreter computes with numpy, which warns of what floating-point numbers are for (−∞ times
zero in a lane that is masked afterwards): those warnings say nothing of the kernels.
"""

import sys
from collections.abc import Iterator
from ctypes import CDLL
from functools import cache
from importlib.util import find_spec

import heads
import numpy as np
import pytest
import torch
from scored import BLOCK, drawn
from torch import Tensor

from mossrlhf.kernels import c_library, c_rows, head, torch_rows, use_backend


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def triton_rows():
    """The module of triton's kernels, where they can run."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    from mossrlhf.kernels import triton_rows

    if not torch.cuda.is_available():
        interpreted = type(sys.modules["triton.language"].max).__name__ == "InterpretedFunction"
        assert interpreted, "TRITON_INTERPRET=1 came after the first import of triton"
    return triton_rows


@pytest.fixture
def c_is_there() -> None:
    """Skip where rows cannot be computed in C; where they come out wrong, or not at all, fail."""
    if torch.cuda.is_available():
        pytest.skip("C computes on a CPU, and the logits are on CUDA")
    why_not = c_rows.why_not()
    if why_not is not None and why_not.startswith((c_library.SWITCH, "there is no C compiler")):
        pytest.skip(why_not)
    assert why_not is None


@pytest.fixture
def c(c_is_there) -> Iterator[None]:
    """C computes, in blocks of its own size."""
    with use_backend("c"):
        yield


@cache
def in_small_blocks() -> CDLL:
    """What C computes with, in blocks as small as triton's."""
    flags = (*c_library.FLAGS, f"-DBLOCK={BLOCK}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(c_library, "FLAGS", flags)
        return c_library.load.__wrapped__()


# What numpy says in words of its own, whatever errstate() is.
SILENT = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")


@pytest.fixture(params=["torch", "c", pytest.param("triton", marks=SILENT)])
def real_blocks(request) -> Iterator[str]:
    """Each backend in turn, by name."""
    if request.param == "triton":
        triton_rows()
    if request.param == "c":
        request.getfixturevalue("c_is_there")
    with use_backend(request.param), np.errstate(all="ignore"):
        yield request.param


@pytest.fixture
def backend(real_blocks, monkeypatch) -> str:
    """Each backend in turn, by name, in blocks so small that there are several."""
    if real_blocks == "triton":
        monkeypatch.setattr(triton_rows(), "BLOCK", BLOCK)
    if real_blocks == "c":
        monkeypatch.setattr(c_rows, "_library", in_small_blocks)
    monkeypatch.setattr(torch_rows, "BLOCK_BYTES", 2 * 4 * (2 * BLOCK + 5))  # two rows
    return real_blocks


@pytest.fixture
def uneven(monkeypatch) -> None:
    """Chunks of 16, 16 and 5 rows; on CUDA of 13, 13 and 11."""
    monkeypatch.setattr(head, "CPU_CHUNK_BYTES", 4 * heads.V * 16)
    monkeypatch.setattr(head, "CPU_ROWS", 16)
    monkeypatch.setattr(head, "CUDA_CHUNK_ROWS", 16)


@pytest.fixture
def given(backend, device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids and a reference's logits of five rows: three blocks of either."""
    return drawn(device, 5)
