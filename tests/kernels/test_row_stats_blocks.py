"""Blocks of rows."""

import pytest
import torch

from mossrlhf.kernels import row_stats as torch_rows


def blocks(rows, width):
    """The blocks that are worked on."""
    found = []

    def work(rows, x, e, r):
        found.append((rows.start, rows.stop))
        assert x.shape == e.shape == r.shape == (rows.stop - rows.start, width)

    torch_rows._for_each_block(work, torch.empty(rows, width), torch.ones(1), 2)
    return found


@pytest.mark.parametrize(
    ("size", "width", "rows", "expected"),
    [
        (120, 10, 7, [(0, 3), (3, 6), (6, 7)]),
        (160, 10, 7, [(0, 4), (4, 7)]),
        (1, 10, 2, [(0, 1), (1, 2)]),
        (8, 1, 3, [(0, 2), (2, 3)]),
        (1000, 10, 7, [(0, 7)]),
        (1000, 10, 0, []),
    ],
)
def test_blocks(monkeypatch, size, width, rows, expected):
    monkeypatch.setattr(torch_rows, "BLOCK_BYTES", size)
    assert blocks(rows, width) == expected


def test_blocks_of_a_language_model():
    """Eight rows of 32000 words, in float32."""
    assert blocks(20, 32000)[0] == (0, 8)
