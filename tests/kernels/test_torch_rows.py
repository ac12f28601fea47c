"""Blocks of rows and who computes them, which change no number."""

from threading import current_thread

import pytest
import torch
from scored import drawn

from mossrlhf.kernels import token_stats, torch_rows


@pytest.fixture
def threads():
    """Two threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def blocks(rows, width):
    """The blocks that are worked on, by the thread that does."""
    found = {}

    def work(rows, x, e, r):
        found.setdefault(current_thread().name, []).append((rows.start, rows.stop))
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
    assert blocks(rows, width) == ({current_thread().name: expected} if expected else {})


def test_blocks_of_a_language_model():
    """Eight rows of 32000 words, in float32."""
    assert blocks(20, 32000)[current_thread().name][0] == (0, 8)


def test_threads_take_turns_and_leave_the_number_of_threads_alone(monkeypatch, threads):
    monkeypatch.setattr(torch_rows, "BLOCK_BYTES", 4 * 10)
    found = blocks(5, 10)
    assert current_thread().name not in found
    assert sorted(block for share in found.values() for block in share) == [
        (row, row + 1) for row in range(5)
    ]
    assert torch.get_num_threads() == threads


def test_each_thread_computes_alone(monkeypatch, threads):
    monkeypatch.setattr(torch_rows, "BLOCK_BYTES", 1)
    seen = []

    def work(*_):
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))

    torch_rows._for_each_block(work, torch.empty(3, 4), torch.ones(1), 2)
    assert set(seen) == {(1, False)}


def test_threads_change_no_number(monkeypatch, threads):
    logits, ids, ref = drawn("cpu", 7)
    monkeypatch.setattr(torch_rows, "BLOCK_BYTES", 1)
    leaf = logits.clone().requires_grad_()  # as it comes from autograd
    tau, coefs = torch.full((7,), 0.7), torch.randn(4, 7)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        stats = torch_rows.stats(leaf.detach(), ids, tau, ref, True)
        out = torch.empty_like(logits)
        with torch.no_grad():
            torch_rows.gradient(out, leaf, ids, tau, ref, stats[-1], coefs, None)
        found.append([*stats, out])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_an_error_on_a_thread_is_raised(monkeypatch, threads):
    monkeypatch.setattr(torch_rows, "BLOCK_BYTES", 1)
    logits, ids, _ = drawn("cpu", 5)
    ids[3] = logits.shape[1]
    with pytest.raises(RuntimeError, match="out of bounds"):
        torch_rows.stats(logits, ids, torch.ones(5), None, True)
    assert torch.get_num_threads() == threads


def test_threads_follow_into_inference_mode(monkeypatch, threads):
    monkeypatch.setattr(torch_rows, "BLOCK_BYTES", 1)
    logits, ids, _ = drawn("cpu", 5)
    expected = token_stats(logits, ids)
    with torch.inference_mode():
        got = token_stats(logits, ids)
    assert torch.equal(got.entropy, expected.entropy)
    assert torch.get_num_threads() == threads
