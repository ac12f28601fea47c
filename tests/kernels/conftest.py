"""The backends, and where they run: triton's kernels on CUDA, or in its interpreter without it.

The interpreter computes with numpy, which warns of what floating-point numbers are for (−∞ times
zero in a lane that is masked afterwards): those warnings say nothing of the kernels.
"""

import sys
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scored import BLOCK, drawn
from torch import Tensor

from mossrlhf.kernels import chunked_head as head
from mossrlhf.kernels import row_stats as torch_rows
from mossrlhf.kernels import use_backend


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


# What numpy says in words of its own, whatever errstate() is.
SILENT = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")


@pytest.fixture(params=["torch", pytest.param("triton", marks=SILENT)])
def real_blocks(request) -> Iterator[str]:
    """Each backend in turn, by name."""
    if request.param == "triton":
        triton_rows()
    with use_backend(request.param), np.errstate(all="ignore"):
        yield request.param


@pytest.fixture
def backend(real_blocks, monkeypatch) -> str:
    """Each backend in turn, by name, in blocks so small that there are several."""
    if real_blocks == "triton":
        monkeypatch.setattr(triton_rows(), "BLOCK", BLOCK)
    monkeypatch.setattr(torch_rows, "BLOCK_BYTES", 2 * 4 * (2 * BLOCK + 5))  # two rows
    return real_blocks


@pytest.fixture
def uneven(monkeypatch) -> None:
    """Chunks of 13, 13 and 11 rows."""
    monkeypatch.setattr(head, "MIN_CHUNK_ROWS", 16)
    monkeypatch.setattr(head, "MAX_CHUNK_ROWS", 16)


@pytest.fixture
def given(backend, device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids and a reference's logits of five rows: three blocks of either."""
    return drawn(device, 5)
