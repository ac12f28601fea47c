"""What C does that no other backend does: its exponential, its rounding, its blocks and threads."""

import subprocess
import sys
from threading import current_thread

import pytest
import torch
from scored import BLOCK, GRADED, V, check, drawn, gradient, oracle, score

from mossrlhf.kernels import c_rows, token_stats, torch_rows

pytestmark = pytest.mark.usefixtures("c")


@pytest.fixture
def threads(monkeypatch):
    """Two threads, however little there is to do, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(c_rows, "THREAD_NUMBERS", 1)
    yield 2
    torch.set_num_threads(before)


@pytest.fixture
def alone(monkeypatch):
    """Torch is not asked."""
    monkeypatch.setattr(torch_rows, "stats", lambda *_: pytest.fail("handed to torch"))
    monkeypatch.setattr(torch_rows, "gradient", lambda *_: pytest.fail("handed to torch"))


def coefficients(count, g=0.0, alpha=0.0, beta=0.0, gamma=0.0):
    """The same for every row."""
    return torch.tensor([g, alpha, beta, gamma])[:, None].repeat(1, count)


def norms(count):
    """As if the highest logit of every row was 0, and all others impossible."""
    return torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None].repeat(1, count)


def exponentials(x):
    """exp(x) of C: p alone, where the highest is 0, the sum 1 and α is 1."""
    z, out = x[None], torch.full_like(x, torch.nan)[None]
    coefs = coefficients(1, alpha=1.0)
    ids = torch.zeros(1, dtype=torch.long)
    c_rows.gradient(out, z, ids, torch.ones(1), None, norms(1), coefs, None)
    return out[0]


class TestExponential:
    def test_to_the_last_digit(self):
        x = torch.cat([-torch.rand(200_000) * 87.33, -torch.logspace(-30, 0, 20_000)])
        expected = x.double().exp()
        last = torch.nextafter(expected.float(), torch.tensor(torch.inf)).double()
        ulp = last - expected.float().double()
        assert ((exponentials(x).double() - expected).abs() / ulp).max() <= 1.0

    def test_of_what_is_next_to_every_half(self):
        """Where it is rounded to the one or the other power of two."""
        n = torch.arange(1, 252, dtype=torch.float64)
        x = (-n / 2 * torch.tensor(2.0, dtype=torch.float64).log()).float()
        x = torch.cat([x, x.nextafter(torch.tensor(0.0)), x.nextafter(torch.tensor(-88.0))])
        assert (exponentials(x).double() / x.double().exp() - 1).abs().max() <= 1.5e-7

    @pytest.mark.parametrize(
        ("x", "expected"),
        [
            *[(0.0, 1.0), (-0.0, 1.0), (-1e-40, 1.0)],
            *[(-87.34, 0.0), (-200.0, 0.0), (-1e30, 0.0), (-torch.inf, 0.0)],
            (torch.finfo(torch.float32).min, 0.0),
        ],
    )
    @pytest.mark.parametrize("width", [1, 8, 37])
    def test_where_numbers_end(self, x, expected, width):
        """In vectors and in what is left over from them."""
        assert exponentials(torch.full((width,), x)).tolist() == [expected] * width

    @pytest.mark.parametrize("width", [1, 8, 37])
    def test_of_what_is_no_number(self, width):
        assert exponentials(torch.full((width,), torch.nan)).isnan().all()

    def test_is_never_too_small(self):
        """The least there is above zero is a normal number."""
        x = torch.linspace(-87.4, -87.2, 2001)
        found = exponentials(x)
        assert (found[x < -87.3366] == 0).all()
        assert (found[x > -87.3365] >= torch.finfo(torch.float32).tiny).all()


class TestSums:
    @pytest.mark.parametrize("level", [-0.1, -5.0])
    def test_over_blocks_are_double(self, alone, level):
        """150 000 equal numbers: of sums in float32 each addition is rounded the same way."""
        logits = torch.full((2, 151_936), level)
        logits[:, 0] = 0
        ids, ref = torch.tensor([0, 5]), logits / 2
        stats, expected = token_stats(logits, ids, ref_logits=ref), oracle(logits, ids, ref=ref)
        for name in (*GRADED, "ref_logprob"):
            assert (getattr(stats, name) - getattr(expected, name)).abs().max() <= 1.5e-6, name

    @pytest.mark.parametrize("width", [255, 256, 257, 2 * 256, 3 * 256 + 1])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_whole_blocks_and_one_more(self, alone, width, dtype):
        logits, ids, ref = drawn("cpu", 3, width=width, dtype=dtype)
        ids[1] = min(256, width - 1)
        check(logits, ids, 0.7, ref, slope_within=1e-6 if dtype == torch.float32 else 8e-3)

    @pytest.mark.parametrize("start", [1, 3, 4, 7])
    def test_wherever_a_row_begins(self, start):
        """To the last digit: which numbers share a lane is no matter of addresses."""
        logits, ids, ref = drawn("cpu", 2, width=3000)
        moved = torch.empty(6000 + start)[start:].view(2, 3000).copy_(logits)
        one, other = (token_stats(z, ids, ref_logits=ref) for z in (logits, moved))
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in GRADED)


class TestHalf:
    def test_is_read_as_what_it_is(self, alone):
        logits, ids, ref = drawn("cpu", 5, dtype=torch.bfloat16)
        logits[1, 3], logits[2, 4], logits[3, 5] = -torch.inf, torch.nan, -0.0
        half = token_stats(logits, ids, 0.7, ref_logits=ref)
        whole = token_stats(logits.float(), ids, 0.7, ref_logits=ref.float())
        for name in (*GRADED, "ref_logprob"):
            one, other = getattr(half, name), getattr(whole, name)
            assert torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7))

    @pytest.mark.parametrize(("of_logits", "of_ref"), [(0, 1), (1, 0)])
    def test_beside_whole(self, alone, of_logits, of_ref):
        kinds = list(c_rows.KINDS)
        logits, ids, ref = drawn("cpu", 5, dtype=torch.bfloat16)
        mixed = gradient(logits.to(kinds[of_logits]), score(ids, 0.7, ref.to(kinds[of_ref])))
        whole = gradient(logits.float(), score(ids, 0.7, ref.float()))
        assert torch.equal(mixed[0].kl, whole[0].kl)
        assert torch.equal(mixed[1], whole[1].to(kinds[of_logits]))

    def test_is_rounded_as_torch_rounds(self, alone):
        """Every upper half of a float, with lower halves below, at, and above the middle."""
        upper = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
        lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
        g = (upper + lower).view(-1).to(torch.int32).view(torch.float32)
        count = len(g)
        coefs = coefficients(count)
        coefs[0] = g
        z, out = torch.zeros(count, 1), torch.full((count, 1), 7.0, dtype=torch.bfloat16)
        ids = torch.zeros(count, dtype=torch.long)
        c_rows.gradient(out, z, ids, torch.ones(count), None, norms(count), coefs, None)
        expected = g.bfloat16()
        found = out[:, 0]
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found[~expected.isnan()], expected[~expected.isnan()])

    def test_in_place(self, alone):
        logits, ids, ref = drawn("cpu", 5, width=1500, dtype=torch.bfloat16)
        _, expected = gradient(logits, score(ids, 0.7, ref))
        own = logits.clone()
        _, slope = gradient(own, score(ids, 0.7, ref, in_place=True))
        assert slope.data_ptr() == own.data_ptr()
        assert torch.equal(slope, expected)

    @pytest.mark.parametrize("ids", [[0, 3, -100], [-100, -1, -100]])
    def test_is_written_where_it_belongs(self, alone, ids):
        """The last row ignored, and nothing behind it touched."""
        logits, _, _ = drawn("cpu", 3, dtype=torch.bfloat16)
        field = torch.full((5, V), 7.0, dtype=torch.bfloat16)
        coefs = coefficients(3, g=1.0, alpha=-1.0)
        given = (torch.tensor(ids), torch.ones(3), None, norms(3), coefs, None)
        c_rows.gradient(field[1:4], logits, *given)
        assert (field[[0, 4]] == 7).all()
        assert [bool((row == 0).all()) for row in field[1:4]] == [label < 0 for label in ids]


class TestWhatIsHandedToTorch:
    @pytest.fixture
    def asked(self, monkeypatch):
        """What torch is asked for."""
        found = []
        for name in ("stats", "gradient"):
            real = getattr(torch_rows, name)
            monkeypatch.setattr(
                torch_rows, name, lambda *a, name=name, real=real: found.append(name) or real(*a)
            )
        return found

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_other_types(self, asked, dtype):
        logits, ids, ref = drawn("cpu", 5, dtype=dtype)
        check(logits, ids, 0.7, ref, slope_within=1e-3)
        assert asked == ["stats", "gradient"]

    def test_other_types_of_the_reference(self, asked):
        logits, ids, ref = drawn("cpu", 5)
        gradient(logits, score(ids, 0.7, ref.half()))
        assert asked == ["stats", "gradient"]

    @pytest.mark.parametrize("whose", [0, 2])
    def test_columns_apart(self, asked, whose):
        given = list(drawn("cpu", 5))
        given[whose] = given[whose].repeat_interleave(2, 1)[:, ::2]
        check(*given[:2], 1.0, given[2])
        assert asked == ["stats", "gradient"]

    def test_nothing_else(self, alone):
        logits, ids, ref = drawn("cpu", 5)
        ids[2] = -100
        check(torch.cat([logits, ref], 1)[:, :V], ids.clamp(min=0), 0.7, ref[:1].expand(5, -1))
        check(logits[:, :1], 0 * ids, 0.7, ref[:, :1])
        check(logits, ids.clamp(min=0).int(), 0.7)


class TestThreads:
    def test_change_no_number(self, alone, threads):
        logits, ids, ref = drawn("cpu", 7, width=1500)
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            stats, slope = gradient(logits, score(ids, 0.7, ref))
            found.append([*(getattr(stats, name) for name in (*GRADED, "ref_logprob")), slope])
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))

    @pytest.mark.parametrize(("numbers", "expected"), [(1, 2), (5 * V, 1), (5 * V // 2, 2)])
    def test_are_woken_for_much(self, threads, monkeypatch, numbers, expected):
        monkeypatch.setattr(c_rows, "THREAD_NUMBERS", numbers)
        seen = []
        work = c_rows.Rows(rows=5, width=V)
        c_rows._run(lambda _, a, b: seen.append((current_thread().name, a.value, b.value)), work)
        assert sorted(turn[1:] for turn in seen) == [(n, expected) for n in range(expected)]
        assert all((name == current_thread().name) == (expected == 1) for name, *_ in seen)

    def test_are_no_more_than_rows(self, threads):
        seen = []
        c_rows._run(lambda _, a, b: seen.append(b.value), c_rows.Rows(rows=1, width=V))
        assert seen == [1]

    def test_follow_into_inference_mode(self, threads):
        logits, ids, _ = drawn("cpu", 5)
        expected = token_stats(logits, ids)
        with torch.inference_mode():
            assert torch.equal(token_stats(logits, ids).entropy, expected.entropy)
        assert torch.get_num_threads() == threads

    def test_of_a_fork_are_its_own(self, root):
        program = (
            "import os, torch\n"
            "from mossrlhf.kernels import c_rows, token_stats\n"
            "torch.set_num_threads(2)\n"
            "c_rows.THREAD_NUMBERS = 1\n"
            "z, ids = torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 2, 0])\n"
            "before = token_stats(z, ids).entropy\n"
            "child = os.fork()\n"
            "if child:\n"
            "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
            "else:\n"
            "    os._exit(not torch.equal(token_stats(z, ids).entropy, before))\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env={**c_rows.c_library.os.environ, "PYTHONPATH": str(root / "src")},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert (done.stdout, done.stderr) == ("0\n", "")


def test_rows_that_are_read_from_memory_shared_by_all():
    """An expanded row, whose rows are at the same place."""
    logits, _, _ = drawn("cpu", 1)
    same, labels = logits.expand(4, -1), torch.tensor([0, 1, 2, BLOCK])
    assert torch.equal(
        token_stats(same, labels).logprob, token_stats(same.contiguous(), labels).logprob
    )


def test_a_reference_is_not_read_where_its_gradient_is_zero():
    """KL without a weight: −∞ times zero must not be."""
    logits, ids, ref = drawn("cpu", 3)
    ref[:, ::2] = -torch.inf
    out = torch.empty_like(logits)
    given = (ids, torch.ones(3), ref, norms(3))
    c_rows.gradient(out, logits, *given, coefficients(3, g=1.0, alpha=-1.0), None)
    assert out.isfinite().all()


def test_rows_that_share_memory_are_not_overwritten():
    """Torch refuses to, and so does C: each row would read what the one before has written."""
    logits = torch.randn(50, requires_grad=True)
    rows = (logits * 1.0).expand(4, 50)
    loss = token_stats(rows, torch.tensor([3, 1, 7, 9]), in_place=True).logprob.sum()
    with pytest.raises(RuntimeError, match="single memory location"):
        loss.backward()
