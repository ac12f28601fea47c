"""From hidden states to statistics and losses, against logits of all tokens at once, in float64."""

import inspect
import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from scored import off, oracle, upstream
from torch.utils._python_dispatch import TorchDispatchMode

from mossrlhf.kernels import IGNORED_ID, head, linear_token_loss, linear_token_stats
from mossrlhf.types import LossOutput

N, V, D = 37, 83, 16
CHUNKS = [slice(0, 13), slice(13, 26), slice(26, 37)]

BIAS = torch.linspace(-1, 1, V, dtype=torch.float64)
FORMS = {
    "plain": {},
    "bias": dict(bias=BIAS),
    "scale": dict(scale=1.5),
    "softcap": dict(softcap=2.0),
    "all": dict(bias=BIAS, scale=1.3, softcap=2.0, temperature=0.6),
}
EXACT = {torch.float64: 1e-12, torch.float32: 1e-6}
HALF = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""Gradients come out in half precision, from sums that are not."""


@pytest.fixture
def uneven(monkeypatch):
    """Chunks of 13, 13 and 11 rows."""
    monkeypatch.setattr(head, "CPU_CHUNK_BYTES", 4 * V * 16)
    monkeypatch.setattr(head, "CUDA_CHUNK_ROWS", 16)


def drawn(device="cpu", dtype=torch.float32):
    hidden = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    weight = torch.randn(V, D, device=device).to(dtype).requires_grad_()
    ids = torch.randint(V, (N,), device=device)
    ids[5] = IGNORED_ID
    return hidden, weight, ids


def cast(form, like):
    """The settings of a form, with a bias of the type and device of a tensor."""
    settings = dict(FORMS[form])
    if "bias" in settings:
        settings["bias"] = settings["bias"].to(like).detach().requires_grad_()
    return settings


def whole(hidden, weight, ids, *, bias=None, scale=1.0, softcap=None, temperature=1.0):
    """The statistics, from all logits, in float64."""
    z = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    z = z * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    stats = oracle(z, ids.clamp(min=0), temperature)
    keep = (ids >= 0).double()
    fields = ("logprob", "entropy", "logsumexp")
    return SimpleNamespace(**{name: getattr(stats, name) * keep for name in fields}, kl=None)


def ppo(stats, rows):
    """Clipped ratios, an entropy bonus and a penalty on log-sum-exp: all statistics take part."""
    like, noise = stats.logprob, torch.Generator().manual_seed(3)
    old, advantage = torch.randn(2, N, generator=noise, dtype=torch.float64).to(like)
    ratio = (0.3 * (stats.logprob + 4 + old[rows])).exp()
    gain = torch.minimum(ratio * advantage[rows], ratio.clamp(0.8, 1.2) * advantage[rows])
    rest = 0.01 * stats.entropy + 1e-3 * stats.logsumexp**2
    share = -(gain + rest).sum() / N
    return LossOutput(share, {"entropy": stats.entropy.sum().detach(), "calls": torch.tensor(1)})


def slopes(loss, *inputs):
    return torch.autograd.grad(loss, [x for x in inputs if x is not None])


def check_slopes(got, expected, within, given, true):
    for x, found, slope in zip(given, slopes(got, *given), slopes(expected, *true), strict=True):
        assert found.dtype == x.dtype
        assert off(found, slope) <= within


def leaves(hidden, weight, settings):
    """What gets a gradient, and the same in float64, with the settings for that."""
    given = [x for x in (hidden, weight, settings.get("bias")) if x is not None]
    true = [x.detach().double().requires_grad_() for x in given]
    return given, true, {**settings, "bias": true[2] if len(true) > 2 else None}


def check_loss(hidden, weight, ids, settings, within, slope_within=None):
    given, true, wide = leaves(hidden, weight, settings)
    got = linear_token_loss(hidden, weight, ids, ppo, **settings)
    expected = ppo(whole(*true[:2], ids, **wide), slice(0, N))
    assert off(got.loss, expected.loss, 1.0) <= within
    assert off(got.stats["entropy"], expected.stats["entropy"]) <= within
    check_slopes(2.5 * got.loss, 2.5 * expected.loss, slope_within or within, given, true)


def check_stats(hidden, weight, ids, settings, within, slope_within=None):
    given, true, wide = leaves(hidden, weight, settings)
    got = linear_token_stats(hidden, weight, ids, **settings)
    expected = whole(*true[:2], ids, **wide)
    for name in ("logprob", "entropy", "logsumexp"):
        assert off(getattr(got, name), getattr(expected, name)) <= within
    check_slopes(upstream(got), upstream(expected), slope_within or within, given, true)


CHECKS = pytest.mark.parametrize("check", [check_stats, check_loss])


@pytest.mark.usefixtures("uneven")
class TestAgainstAllLogitsInFloat64:
    @CHECKS
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", EXACT)
    def test_forms(self, check, form, dtype, device):
        hidden, weight, ids = drawn(device, dtype)
        check(hidden, weight, ids, cast(form, hidden), EXACT[dtype])

    @CHECKS
    def test_backends(self, backend, check, device):
        hidden, weight, ids = drawn(device)
        check(hidden, weight, ids, cast("all", hidden), 1e-6)

    @CHECKS
    @pytest.mark.parametrize("dtype", HALF)
    def test_half_precision(self, check, dtype, device):
        hidden, weight, ids = drawn(device, dtype)
        within = 1e-6 if device == "cpu" else HALF[dtype]
        check(hidden, weight, ids, cast("all", hidden), within, HALF[dtype])

    @CHECKS
    @pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32,) * 2])
    def test_mixed_precision(self, check, dtypes, device):
        hidden, weight = drawn(device, dtypes[0])[0], drawn(device, dtypes[1])[1]
        check(hidden, weight, drawn(device)[2], cast("bias", weight), 1e-6, 3e-3)

    @CHECKS
    def test_temperature_of_each_token(self, check, device):
        hidden, weight, ids = drawn(device)
        check(hidden, weight, ids, {"temperature": torch.rand(N, device=device) + 0.5}, 1e-6)

    @CHECKS
    def test_slices(self, check, device):
        hidden, weight, ids = drawn(device)
        wide, tall = torch.cat([hidden, hidden], 1)[:, :D], weight.t().contiguous().t()
        twice = torch.stack([ids, ids], 1)[:, 0]
        check(*(x.detach().requires_grad_() for x in (wide, tall)), twice, {}, 1e-6)


class TestChunks:
    @pytest.mark.parametrize(
        ("rows", "count", "expected"),
        [
            (16, N, CHUNKS),
            (0, N, CHUNKS),  # sixteen at least
            (10**6, N, [slice(0, N)]),
            (N, N, [slice(0, N)]),
            (N - 1, N, [slice(0, 19), slice(19, N)]),
            (16, 1, [slice(0, 1)]),
            (16, 0, []),
        ],
    )
    def test_sizes(self, monkeypatch, rows, count, expected):
        monkeypatch.setattr(head, "CPU_CHUNK_BYTES", 4 * V * rows)
        hidden, weight = torch.zeros(count, D), torch.zeros(V, D)
        assert list(head.Head(hidden, weight, None, 1.0, None).chunks()) == expected

    @pytest.mark.parametrize(
        ("is_cuda", "count", "width", "rows"),
        [
            (True, 4096, 50, 4096),
            (True, 4097, 50, 2049),
            (True, 5000, 2**16, 2500),
            (True, 5000, 2**17, 1667),
            (True, 96, 2**28, 16),
            (True, 100, 2**28, 15),
            (False, 1000, 32000, 250),
            (False, 100, 50, 100),
        ],
    )
    def test_real_sizes(self, is_cuda, count, width, rows):
        """2²⁵ bytes of float32, on CUDA 2³⁰ or 4096 rows, but sixteen rows; then of like size."""
        one = head.Head(torch.zeros(1, 1), torch.zeros(1, 1), None, 1.0, None)
        one.hidden, one.weight = MagicMock(is_cuda=is_cuda), range(width)
        one.hidden.__len__.return_value = count
        chunks = list(one.chunks())
        assert chunks[0] == slice(0, rows)
        assert chunks[-1].stop == count

    def test_change_nothing_but_rounding(self, monkeypatch):
        hidden, weight, ids = drawn(dtype=torch.float64)
        one = linear_token_loss(hidden, weight, ids, ppo)
        monkeypatch.setattr(head, "CPU_CHUNK_BYTES", 4 * V * 16)
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
        out = linear_token_loss(hidden[:0], weight, ids[:0], lambda s, r: 1 / 0)
        (stats.logprob.sum() + out.loss).backward()
        assert (out.loss, out.stats) == (0, {})
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

    def test_no_grad_finds_the_same(self):
        hidden, weight, ids = drawn()
        settings = cast("all", hidden)
        with torch.no_grad():
            out = linear_token_loss(hidden, weight, ids, ppo, **settings)
        again = linear_token_loss(hidden, weight, ids, ppo, **settings)
        assert torch.equal(out.loss, again.loss)
        assert out.stats == again.stats


@pytest.mark.usefixtures("uneven")
class TestLossFunctions:
    def test_without_entropy(self):
        hidden, weight, ids = drawn()

        def loss_fn(stats, rows):
            assert stats.entropy is None
            return LossOutput(-stats.logprob.sum())

        got = linear_token_loss(hidden, weight, ids, loss_fn, entropy=False).loss
        alone = linear_token_stats(hidden, weight, ids, entropy=False)
        assert alone.entropy is None
        expected = slopes(-whole(hidden, weight, ids).logprob.sum(), hidden, weight)
        for loss in (got, -alone.logprob.sum()):
            for a, b in zip(slopes(loss, hidden, weight), expected, strict=True):
                assert off(a, b) <= 1e-6

    @pytest.mark.parametrize("name", ["logprob", "entropy", "logsumexp"])
    def test_of_one_statistic(self, name):
        hidden, weight, ids = drawn()
        got = linear_token_loss(
            hidden, weight, ids, lambda s, r: LossOutput((getattr(s, name) ** 2).sum())
        )
        expected = (getattr(whole(hidden, weight, ids), name) ** 2).sum()
        for a, b in zip(
            slopes(got.loss, hidden, weight), slopes(expected, hidden, weight), strict=True
        ):
            assert off(a, b) <= 1e-6

    def test_of_no_statistic(self):
        """Its gradient is zero, whatever it is multiplied by."""
        hidden, weight, ids = drawn()
        loss = linear_token_loss(hidden, weight, ids, lambda s, r: LossOutput(torch.ones(()))).loss
        (7 * loss).backward()
        assert loss == 3
        assert hidden.grad.count_nonzero() == weight.grad.count_nonzero() == 0

    def test_parameters_of_its_own_are_constants(self):
        hidden, weight, ids = drawn()
        own = torch.tensor(2.0, requires_grad=True)
        out = linear_token_loss(
            hidden, weight, ids, lambda s, r: LossOutput((own * s.logprob).sum())
        )
        out.loss.backward()
        assert own.grad is None
        assert (
            off(hidden.grad, slopes(2 * whole(hidden, weight, ids).logprob.sum(), hidden)[0]) < 1e-6
        )

    def test_statistics_are_added_up(self):
        out = linear_token_loss(
            *drawn(),
            lambda s, r: LossOutput(s.logprob.sum(), {"first": torch.tensor(float(r.start))}),
        )
        assert out.stats == {"first": 0 + 13 + 26}

    @pytest.mark.parametrize("grad", [True, False])
    def test_a_loss_for_each_token_is_refused(self, grad):
        expected = r"loss_fn: returned \(13,\), expected the sum over the tokens it was given"
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=expected):
            linear_token_loss(*drawn(), lambda s, r: SimpleNamespace(loss=s.logprob, stats={}))


@pytest.mark.usefixtures("uneven")
class TestAutograd:
    def test_second_backward_of_a_loss_raises(self):
        loss = linear_token_loss(*drawn(), ppo).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="was computed once and has been handed on"):
            loss.backward()

    def test_second_backward_of_statistics_comes_again(self):
        hidden, weight, ids = drawn()
        total = upstream(linear_token_stats(hidden, weight, ids))
        once, twice = (torch.autograd.grad(total, weight, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(once, twice)

    @pytest.mark.parametrize("function", ["loss", "stats"])
    def test_second_derivatives_are_refused(self, function):
        hidden, weight, ids = drawn()
        total = getattr(TestUnits(), function)(hidden, weight, ids)()
        (slope,) = torch.autograd.grad(total**2, weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()

    def test_micro_batches_add_up(self):
        hidden, weight, ids = drawn(dtype=torch.float64)
        (expected,) = slopes(linear_token_loss(hidden, weight, ids, ppo).loss, weight)
        for part in (slice(0, 20), slice(20, N)):
            shifted = range(N)[part].start

            def loss_fn(stats, rows, shifted=shifted):
                return ppo(stats, slice(rows.start + shifted, rows.stop + shifted))

            linear_token_loss(hidden[part], weight, ids[part], loss_fn).loss.backward()
        assert off(weight.grad, expected) <= 1e-14

    def test_tied_embedding(self):
        _, embedding, ids = drawn()
        mixed = torch.randn(N, N) / math.sqrt(N)

        def hidden():
            return mixed @ F.embedding(ids.clamp(min=0), embedding)

        got = linear_token_loss(hidden(), embedding, ids, ppo).loss
        expected = ppo(whole(hidden(), embedding, ids), slice(0, N)).loss
        assert off(*slopes(got, embedding), *slopes(expected, embedding)) <= 1e-6

    @pytest.mark.parametrize("function", ["loss", "stats"])
    @pytest.mark.parametrize("backward_inside", [True, False])
    @pytest.mark.parametrize("dtype", EXACT)
    def test_autocast_on_the_cpu_rounds_nothing(self, function, backward_inside, dtype):
        hidden, weight, ids = drawn(dtype=dtype)
        plain = getattr(TestUnits(), function)(hidden, weight, ids)()
        expected = slopes(plain, hidden, weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = getattr(TestUnits(), function)(hidden, weight, ids)()
            found = slopes(cast, hidden, weight) if backward_inside else None
        found = found or slopes(cast, hidden, weight)
        assert torch.equal(cast, plain)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class TestRefused:
    @pytest.mark.parametrize(
        ("hidden", "weight", "ids"),
        [((2, 3, 4), (5, 4), (2, 3)), ((3, 4), (5, 4), (2,)), ((3, 4), (5, 3), (3,))],
    )
    def test_shapes(self, hidden, weight, ids):
        """Without the shape checker, which is before it."""
        given = torch.zeros(hidden), torch.zeros(weight), torch.zeros(ids, dtype=torch.long)
        expected = f"got {hidden}, {weight} and {ids}, expected [N, D], [V, D] and [N]"
        for function, more in ((linear_token_stats, ()), (linear_token_loss, (ppo,))):
            with pytest.raises(ValueError, match="gather the rows that count first") as error:
                inspect.unwrap(function)(*given, *more)
            assert expected in str(error.value)

    def test_temperatures(self):
        """As above."""
        hidden, weight, ids = drawn()
        expected = rf"temperature: got \(2,\), expected a number or one for each of {N} tokens"
        with pytest.raises(ValueError, match=expected):
            inspect.unwrap(linear_token_stats)(hidden, weight, ids, temperature=torch.ones(2))
