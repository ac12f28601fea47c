"""From hidden states to statistics and losses, against logits of all tokens at once, in float64."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from heads import FORMS, D, N, cast, drawn, ppo, slopes, whole
from scored import off, upstream

from mossrlhf.kernels import linear_token_loss, linear_token_stats
from mossrlhf.types import LossOutput

EXACT = {torch.float64: 1e-12, torch.float32: 1e-6}
HALF = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""Gradients come out in half precision, from sums that are not."""


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


def loss(hidden, weight, ids):
    return linear_token_loss(hidden, weight, ids, ppo).loss


def stats(hidden, weight, ids):
    return upstream(linear_token_stats(hidden, weight, ids))


FUNCTIONS = pytest.mark.parametrize("function", [loss, stats])
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
        with pytest.raises(RuntimeError, match="was computed once and is freed"):
            loss.backward()

    def test_second_backward_of_statistics_comes_again(self):
        hidden, weight, ids = drawn()
        total = upstream(linear_token_stats(hidden, weight, ids))
        once, twice = (torch.autograd.grad(total, weight, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(once, twice)

    @FUNCTIONS
    def test_second_derivatives_are_refused(self, function):
        hidden, weight, ids = drawn()
        total = function(hidden, weight, ids)
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

    @FUNCTIONS
    @pytest.mark.parametrize("backward_inside", [True, False])
    @pytest.mark.parametrize("dtype", EXACT)
    def test_autocast_on_the_cpu_rounds_nothing(self, function, backward_inside, dtype):
        hidden, weight, ids = drawn(dtype=dtype)
        plain = function(hidden, weight, ids)
        expected = slopes(plain, hidden, weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = function(hidden, weight, ids)
            found = slopes(cast, hidden, weight) if backward_inside else None
        found = found or slopes(cast, hidden, weight)
        assert torch.equal(cast, plain)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class TestRefused:
    @pytest.mark.parametrize(
        ("hidden", "weight", "ids"),
        [
            ((2, 3, 4), (5, 3, 4), (2,)),
            ((2, 3, 4), (5, 4), (2, 3)),
            ((3, 4), (5, 4), (2,)),
            ((3, 4), (5, 3), (3,)),
        ],
    )
    def test_shapes(self, hidden, weight, ids):
        """Without the shape checker, which is before it."""
        given = torch.zeros(hidden), torch.zeros(weight), torch.zeros(ids, dtype=torch.long)
        expected = f"got {hidden}, {weight} and {ids}, expected [N, D], [V, D] and [N]"
        for function, more in ((linear_token_stats, ()), (linear_token_loss, (ppo,))):
            with pytest.raises(ValueError, match="gather the rows of tokens first") as error:
                inspect.unwrap(function)(*given, *more)
            assert expected in str(error.value)

    def test_temperatures(self):
        """As above."""
        hidden, weight, ids = drawn()
        expected = rf"temperature: got \(2,\), expected a number or one for each of {N} tokens"
        with pytest.raises(ValueError, match=expected):
            inspect.unwrap(linear_token_stats)(hidden, weight, ids, temperature=torch.ones(2))
