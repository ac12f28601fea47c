"""Heads, a chunk at a time: how large, in how much memory, for how many multiplications."""

from unittest.mock import MagicMock

import pytest
import torch
from heads import D, N, V, cast, drawn, ppo, slopes
from scored import off, upstream
from torch.utils._python_dispatch import TorchDispatchMode

from mossrlhf.kernels import chunked_head as head
from mossrlhf.kernels import linear_token_loss, linear_token_stats
from mossrlhf.types import LossOutput

CHUNKS = [slice(0, 13), slice(13, 26), slice(26, 37)]


class TestChunks:
    @pytest.mark.parametrize(
        ("rows", "count", "expected"),
        [
            (16, N, CHUNKS),
            (0, N, CHUNKS),  # `MIN_CHUNK_ROWS` at least
            (35, N, [slice(0, 19), slice(19, N)]),
            (10**6, N, [slice(0, N)]),
            (16, 1, [slice(0, 1)]),
            (16, 0, [slice(0, 0)]),  # for a loss to name its statistics
        ],
    )
    def test_sizes(self, monkeypatch, rows, count, expected):
        monkeypatch.setattr(head, "CPU_CHUNK_BYTES", 4 * V * rows)
        monkeypatch.setattr(head, "MIN_CHUNK_ROWS", 16)
        hidden, weight = torch.zeros(count, D), torch.zeros(V, D)
        assert list(head.Head(hidden, weight, None, 1.0, None).chunks()) == expected

    @pytest.mark.parametrize(
        ("is_cuda", "count", "width", "rows"),
        [
            (True, 4096, 50, 4096),
            (True, 4097, 50, 2049),
            (True, 5000, 2**16, 2500),
            (True, 5000, 2**17, 1667),
            (True, 128, 2**28, 64),
            (True, 130, 2**28, 44),
            (False, 1000, 32000, 250),
            (False, 1000, 151936, 63),
            (False, 100, 50, 100),
            (False, 5000, 50, 2500),
        ],
    )
    def test_real_sizes(self, is_cuda, count, width, rows):
        """At most 2³⁰ bytes of float32 on CUDA, else 2²⁵; at most 4096 rows, and 64 in any case."""
        one = head.Head(torch.zeros(1, 1), torch.zeros(1, 1), None, 1.0, None)
        one.hidden, one.weight = MagicMock(is_cuda=is_cuda), range(width)
        one.hidden.__len__.return_value = count
        chunks = list(one.chunks())
        assert chunks[0] == slice(0, rows)
        assert chunks[-1].stop == count

    def test_change_nothing_but_rounding(self, monkeypatch):
        hidden, weight, ids = drawn(dtype=torch.float64)
        one = linear_token_loss(hidden, weight, ids, ppo)
        monkeypatch.setattr(head, "MIN_CHUNK_ROWS", 16)
        monkeypatch.setattr(head, "MAX_CHUNK_ROWS", 16)
        many = linear_token_loss(hidden, weight, ids, ppo)
        assert (one.stats["calls"], many.stats["calls"]) == (1, 3)
        assert off(many.loss, one.loss) <= 1e-14
        for a, b in zip(
            slopes(one.loss, hidden, weight), slopes(many.loss, hidden, weight), strict=True
        ):
            assert off(a, b) <= 1e-14

    def test_the_loss_is_told_which_rows(self, uneven):
        seen = []

        def loss_fn(stats, rows):
            seen.append((len(stats.logprob), rows))
            return LossOutput(stats.logprob.sum())

        linear_token_loss(*drawn(), loss_fn)
        assert seen == [(rows.stop - rows.start, rows) for rows in CHUNKS]

    @pytest.mark.parametrize("grad", [True, False])
    def test_logits_of_all_tokens_never_live(self, uneven, grad):
        class Largest(TorchDispatchMode):
            numel = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                for x in out if isinstance(out, tuple | list) else [out]:
                    if isinstance(x, torch.Tensor):
                        self.numel = max(self.numel, x.numel())
                return out

        hidden, weight, ids = drawn()
        with Largest() as largest, torch.set_grad_enabled(grad):
            loss = linear_token_loss(hidden, weight, ids, ppo).loss
            total = upstream(linear_token_stats(hidden, weight, ids))
            if grad:
                (loss + total).backward()
        assert largest.numel == max(13 * V, D * V)
        assert largest.numel < N * V

    def test_no_tokens(self):
        hidden, weight, ids = drawn()
        stats = linear_token_stats(hidden[:0], weight, ids[:0])
        assert stats.logprob.shape == stats.entropy.shape == stats.logsumexp.shape == (0,)
        out = linear_token_loss(
            hidden[:0],
            weight,
            ids[:0],
            lambda s, r: LossOutput(s.logprob.sum(), {"n": torch.tensor(len(s.logprob))}),
        )
        (stats.logprob.sum() + out.loss).backward()
        assert (out.loss, out.stats) == (0, {"n": 0})
        assert weight.grad.count_nonzero() == 0


class Products(TorchDispatchMode):
    """Adds up the multiplications of matrices."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.total += a.numel() * b.shape[1]
        return func(*args, **(kwargs or {}))


def units(function):
    """Matrix units that a call spends: multiples of N·V·D multiplications."""
    with Products() as products:
        function()
    return products.total / (N * V * D)


@pytest.mark.usefixtures("uneven")
class TestUnits:
    def loss(self, hidden, weight, ids):
        return lambda: linear_token_loss(hidden, weight, ids, ppo).loss

    def stats(self, hidden, weight, ids):
        return lambda: upstream(linear_token_stats(hidden, weight, ids))

    @pytest.mark.parametrize(("function", "spent"), [("loss", 3), ("stats", 4)])
    def test_of_both_gradients(self, function, spent):
        score = getattr(self, function)(*drawn())
        assert units(lambda: score().backward()) == spent

    @pytest.mark.parametrize("frozen", [0, 1])
    @pytest.mark.parametrize(("function", "spent"), [("loss", 2), ("stats", 3)])
    def test_of_one(self, function, spent, frozen):
        inputs = drawn()
        inputs[frozen].requires_grad_(False)
        expected = drawn()
        score = getattr(self, function)(*inputs)
        assert units(lambda: score().backward()) == spent
        assert inputs[frozen].grad is None
        assert inputs[1 - frozen].grad.shape == expected[1 - frozen].shape

    @pytest.mark.parametrize("function", ["loss", "stats"])
    def test_of_none(self, function):
        hidden, weight, ids = drawn()
        for inputs, grad in [((hidden, weight), False), ((hidden.detach(), weight.detach()), True)]:
            score = getattr(self, function)(*inputs, ids)
            with torch.set_grad_enabled(grad):
                assert units(score) == 1
                assert not score().requires_grad

    @pytest.mark.parametrize("form", ["plain", "all"])
    def test_no_grad_finds_the_same(self, form):
        hidden, weight, ids = drawn()
        settings = cast(form, hidden)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
            patched.setattr(head.Head, "add_gradient", lambda *_: pytest.fail("not asked for"))
            out = linear_token_loss(hidden, weight, ids, ppo, **settings)
        again = linear_token_loss(hidden, weight, ids, ppo, **settings)
        assert torch.equal(out.loss, again.loss)
        assert out.stats == again.stats
