"""Statistics of rows of logits, by torch and by triton, against float64 and its autograd."""

import inspect
import math
from itertools import combinations, pairwise

import pytest
import torch
from scored import BLOCK, GRADED, V, check, drawn, gradient, off, oracle, score, upstream

from mossrlhf.kernels import IGNORED_ID, token_stats
from mossrlhf.kernels import row_stats as rows
from mossrlhf.types import TokenStats

ROUNDED = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error of the gradient, which has the type of the logits; the interpreter truncates."""


class TestAgainstFloat64:
    @pytest.mark.parametrize("width", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, V])
    def test_widths(self, backend, device, width):
        logits, ids, ref = drawn(device, 5, width=width)
        check(logits, ids, ref=ref)
        check(logits, ids)

    @pytest.mark.parametrize("temperature", [0.05, 2.0, 5.0, [0.05, 1.0, 5.0, 0.7, 1.0]])
    def test_temperatures(self, given, device, temperature):
        logits, ids, ref = given
        cold = 0.05 in (temperature if isinstance(temperature, list) else [temperature])
        if isinstance(temperature, list):
            temperature = torch.tensor(temperature, device=device)
        # Logits of ±100 and more leave five digits of a difference.
        check(logits, ids, temperature, ref, slope_within=1e-5 if cold else 1e-6)

    @pytest.mark.parametrize("dtype", ROUNDED)
    def test_dtypes(self, backend, device, dtype):
        logits, ids, ref = drawn(device, 5, dtype=dtype)
        check(logits, ids, 0.7, ref, slope_within=ROUNDED[dtype])
        assert token_stats(logits, ids).logprob.dtype == torch.float32

    def test_float64_is_scored_in_float64(self, device):
        logits, ids, ref = drawn(device, 5, dtype=torch.float64)
        check(logits, ids, 0.7, ref, within=1e-14, slope_within=1e-14)

    @pytest.mark.parametrize(("width", "count"), [(32001, 2), (151936, 1)])
    def test_real_blocks_and_vocabularies(self, real_blocks, device, width, count):
        logits, ids, ref = drawn(device, count, width=width)
        check(logits, ids, ref=ref)
        error = token_stats(logits, ids).logprob - oracle(logits, ids).logprob
        assert error.abs().max() <= 1e-5

    @pytest.mark.parametrize("shift", [-1e4, -200.0, 1e4])
    def test_shifts(self, given, shift):
        logits, ids, ref = given
        check(logits + shift, ids, ref=ref - shift)

    def test_hand_computed(self, backend, device):
        # softmax([0, ln 3]) = [1/4, 3/4]; at τ = 1/2 the logits are [0, ln 9]: [1/10, 9/10].
        logits, ids = torch.tensor([0.0, math.log(3)], device=device), torch.tensor(1).to(device)
        assert token_stats(logits, ids).logprob.item() == pytest.approx(math.log(3 / 4))
        cold = token_stats(logits, ids, 0.5)
        assert cold.logprob.item() == pytest.approx(math.log(9 / 10))
        assert cold.logsumexp.item() == pytest.approx(math.log(10))
        # H = ln 4 − ¾ ln 3; from the uniform distribution KL = ln 2 − H.
        found = token_stats(logits, ids, ref_logits=torch.zeros_like(logits))
        entropy = math.log(4) - 0.75 * math.log(3)
        assert found.entropy.item() == pytest.approx(entropy)
        assert found.kl.item() == pytest.approx(math.log(2) - entropy)
        assert found.ref_logprob.item() == pytest.approx(-math.log(2))


class TestGradient:
    @pytest.mark.parametrize("names", [*combinations(GRADED, 1), *combinations(GRADED, 2)])
    def test_every_mix(self, given, names):
        check(*given[:2], 0.7, given[2], names=names)

    @pytest.mark.parametrize("name", GRADED)
    def test_gradcheck(self, device, name):
        logits, ids, ref = drawn(device, 3, width=7, dtype=torch.float64, scale=1.0)
        ids[1] = IGNORED_ID

        def one(z):
            return getattr(token_stats(z, ids, 0.7, ref_logits=ref), name)

        assert torch.autograd.gradcheck(one, logits.requires_grad_())

    def test_of_the_references_logprob_is_zero(self, given):
        logits, ids, ref = given
        leaf = logits.requires_grad_()
        token_stats(leaf, ids, ref_logits=ref).ref_logprob.sum().backward()
        assert leaf.grad.count_nonzero() == 0

    def test_comes_again(self, given):
        logits, ids, ref = given
        leaf = logits.requires_grad_()
        total = upstream(token_stats(leaf, ids, ref_logits=ref))
        once, twice = (torch.autograd.grad(total, leaf, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(once, twice)

    def test_of_the_gradient_is_refused(self, given):
        leaf = given[0].requires_grad_()
        total = (token_stats(leaf, given[1]).entropy ** 2).sum() + (leaf**3).sum()
        (slope,) = torch.autograd.grad(total, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()

    def test_in_place_is_the_memory_of_the_logits(self, given):
        logits, ids, ref = given
        _, expected = gradient(logits, score(ids, 0.7, ref))
        leaf = logits.clone().requires_grad_()
        total = upstream(token_stats(leaf, ids, 0.7, ref_logits=ref, in_place=True))
        (slope,) = torch.autograd.grad(total, leaf, retain_graph=True)
        assert slope.data_ptr() == leaf.data_ptr()
        assert torch.equal(slope, expected)
        assert not slope.requires_grad
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(total, leaf)

    def test_elsewhere_leaves_the_logits_alone(self, given):
        logits, ids, _ = given
        before = logits.clone()
        _, slope = gradient(logits, score(ids))
        assert torch.equal(logits, before)
        assert slope.data_ptr() != logits.data_ptr()

    def test_logits_without_one(self, given):
        assert not token_stats(*given[:2]).logprob.requires_grad
        with torch.no_grad():
            assert not token_stats(given[0].requires_grad_(), given[1]).logprob.requires_grad


LAYOUTS = {
    "rows apart": lambda z: torch.cat([z, z], -1)[..., : z.shape[-1]],
    "columns apart": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda z: z.transpose(0, -1).contiguous().transpose(0, -1),
    "backward": lambda z: z.flip(0).contiguous().flip(0),
    "from the middle": lambda z: torch.cat([z[:1], z, z[:1]])[1:-1],
}


class TestLayouts:
    @pytest.mark.parametrize(("of_logits", "of_ref"), list(pairwise([*LAYOUTS, "rows apart"])))
    def test_strides(self, given, of_logits, of_ref):
        logits, ids, ref = given
        stats, slope = gradient(logits, score(ids, 0.7, ref))
        placed = LAYOUTS[of_logits](logits)
        found, placed_slope = gradient(placed, score(ids, 0.7, LAYOUTS[of_ref](ref)))
        for name in GRADED:
            torch.testing.assert_close(
                getattr(found, name), getattr(stats, name), rtol=1e-6, atol=1e-6
            )
        assert off(placed_slope, slope) <= 1e-6

    def test_shifted_by_one_token(self, backend, device):
        """What language models are scored by: logits[:, :-1] and ids[:, 1:]."""
        logits, ids, ref = drawn(device, 2, 4)
        check(logits[:, :-1], ids[:, 1:], ref=ref[:, :-1])
        whole = logits.requires_grad_()
        token_stats(whole[:, :-1], ids[:, 1:]).logprob.sum().backward()
        assert (whole.grad[:, -1] == 0).all()
        assert (whole.grad[:, :-1].abs().sum(-1) > 0).all()

    def test_temperature_of_each_token_of_each_sequence(self, backend, device):
        logits, ids, ref = drawn(device, 2, 3)
        check(logits, ids, torch.rand(2, 3, device=device) + 0.5, ref)

    def test_a_single_token_and_temperature(self, given, device):
        logits, ids, _ = given
        one = token_stats(logits[0], ids[0], torch.tensor(0.7, device=device))
        assert one.logprob.shape == ()
        torch.testing.assert_close(one.logprob, token_stats(logits, ids, 0.7).logprob[0])

    @pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
    def test_no_tokens(self, backend, device, shape):
        logits, ids, ref = drawn(device, *shape)
        stats, slope = gradient(logits, score(ids, 1.0, ref))
        assert all(getattr(stats, name).shape == shape for name in (*GRADED, "ref_logprob"))
        assert slope.shape == logits.shape


class TestRepeatability:
    def test_bitwise_from_run_to_run(self, given):
        logits, ids, ref = given
        (one, slope), (two, again) = (gradient(logits, score(ids, 0.7, ref)) for _ in range(2))
        assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in GRADED)
        assert torch.equal(slope, again)

    @pytest.mark.parametrize("width", [V, 32001])
    def test_a_row_is_bitwise_what_it_is_alone(self, backend, device, width):
        if backend == "torch" and device == "cuda":
            pytest.skip("how torch sums a row on CUDA depends on the number of rows")
        if backend == "triton" and width > V:
            pytest.skip("its programs know one row each")
        logits, ids, ref = drawn(device, 4, width=width)
        logits[1, ::2] = -torch.inf  # a neighbor that torch takes another way for
        together = token_stats(logits, ids, 0.7, ref_logits=ref)
        leaf = logits.clone().requires_grad_()
        token_stats(leaf, ids, 0.7, ref_logits=ref).entropy.sum().backward()
        for row in range(2):
            one = slice(row, row + 1)
            alone = token_stats(logits[one], ids[one], 0.7, ref_logits=ref[one])
            for name in (*GRADED, "ref_logprob"):
                assert torch.equal(getattr(alone, name), getattr(together, name)[one])
            single = logits[one].clone().requires_grad_()
            token_stats(single, ids[one], 0.7, ref_logits=ref[one]).entropy.sum().backward()
            assert torch.equal(single.grad, leaf.grad[one])


class TestWhatIsLeftOut:
    def test_entropy(self, given):
        logits, ids, ref = given
        _, slope = gradient(logits, score(ids, 1.0, ref), ("logprob", "kl"))
        stats, cut = gradient(logits, score(ids, 1.0, ref, entropy=False), ("logprob", "kl"))
        assert stats.entropy is None
        assert off(cut, slope) <= 1e-6

    def test_reference(self, given):
        stats = token_stats(*given[:2])
        assert stats.ref_logprob is None
        assert stats.kl is None

    def test_both(self, given):
        logits, ids, _ = given
        stats, slope = gradient(logits, score(ids, entropy=False), ("logprob",))
        expected, true_slope = gradient(logits, lambda z: oracle(z, ids), ("logprob",))
        assert isinstance(stats, TokenStats)
        assert off(stats.logprob, expected.logprob) <= 1e-6
        assert off(slope, true_slope) <= 1e-6


class TestAsOperators:
    """What torch asks of an operator: schema, fake, gradient, and aot_autograd over all."""

    @pytest.mark.parametrize(("entropy", "with_ref"), [(True, True), (False, False)])
    def test_stats(self, backend, device, entropy, with_ref):
        logits, ids, ref = drawn(device, 2, width=9)
        taus = rows.temperatures(0.7, logits, 2)
        arguments = (logits.requires_grad_(), ids, taus, ref if with_ref else None, entropy, False)
        torch.library.opcheck(rows.row_stats, arguments)

    def test_gradient(self, backend, device):
        logits, ids, ref = drawn(device, 2, width=9)
        taus = rows.temperatures(0.7, logits, 2)
        norms = rows.row_stats(logits, ids, taus, ref, True, False)[-1]
        coefs, out = torch.randn(4, 2, device=device), torch.empty_like(logits)
        torch.library.opcheck(rows.row_gradient, (out, logits, ids, taus, ref, norms, coefs, None))


class TestRefused:
    @pytest.mark.parametrize(
        ("ids", "ref", "expected"),
        [
            ((3,), (2, 5), "ids: got (3,), expected (2,), one for each row of logits"),
            ((2, 1), (2, 5), "ids: got (2, 1), expected (2,), one for each row of logits"),
            ((2,), (2, 6), "ref_logits: got (2, 6), expected (2, 5)"),
        ],
    )
    def test_shapes(self, ids, ref, expected):
        """Without the shape checker, which is before it."""
        with pytest.raises(ValueError, match="expected") as error:
            inspect.unwrap(token_stats)(
                torch.zeros(2, 5), torch.zeros(ids, dtype=torch.long), ref_logits=torch.zeros(ref)
            )
        assert str(error.value) == expected

    def test_number_of_temperatures(self):
        expected = r"temperature: got \(2,\), expected a number or one for each of 3 tokens"
        with pytest.raises(ValueError, match=expected):
            rows.temperatures(torch.ones(2), torch.zeros(3, 5), 3)

    @pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
    def test_temperature(self, temperature):
        with pytest.raises(ValueError, match=r"temperature: got .*, expected a number above 0"):
            token_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), temperature)

    def test_reference_that_wants_a_gradient(self):
        logits, ids = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
        ref = torch.zeros(2, 3, requires_grad=True)
        with pytest.raises(ValueError, match="ref_logits: they require a gradient"):
            token_stats(logits, ids, ref_logits=ref)
        with torch.no_grad():
            assert token_stats(logits, ids, ref_logits=ref).kl.eq(0).all()


def test_strided_ids(given, backend):
    """Neither its neighbors nor what stands past the end is taken for a token."""
    logits, ids, _ = given
    pairs = torch.stack([ids, ids.flip(0) + 1], dim=1)
    same = logits[:1].expand(len(ids), -1).contiguous(), ids[:1].expand(len(ids))
    for z, strided in ((logits, pairs[:, 0]), same):
        got = token_stats(z, strided)
        assert torch.equal(got.logprob, token_stats(z, strided.contiguous()).logprob)


def test_logits_at_the_lowest_number_there_is(given, backend):
    """What masks are filled with: x − m overflows to −∞, and 0 × ∞ must not be."""
    logits, ids, _ = given
    logits = logits.clone()
    logits[:, :-3] = torch.finfo(torch.float32).min
    leaf = logits.requires_grad_()
    stats = token_stats(leaf, torch.full_like(ids, logits.shape[1] - 1), 0.5)
    (stats.logprob + stats.entropy).sum().backward()
    for x in (stats.logprob, stats.entropy, leaf.grad):
        assert bool(x.isfinite().all())


@pytest.mark.parametrize("temperature", [torch.full((5,), -1.0), torch.tensor([1.0, 0, 1, 1, 1])])
def test_temperatures_of_tensors_are_looked_at(temperature):
    with pytest.raises(ValueError, match="expected numbers above 0"):
        token_stats(torch.randn(5, 7), torch.arange(5), temperature)
    wanted = torch.ones(5, requires_grad=True)
    with pytest.raises(ValueError, match="temperature: it requires a gradient"):
        token_stats(torch.randn(5, 7), torch.arange(5), wanted)
