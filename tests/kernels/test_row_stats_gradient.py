"""Where the gradient of rows is written, and from what: the operator below `token_stats`."""

import pytest
import torch
from scored import BLOCK, V, off

from mossrlhf.kernels import IGNORED_ID
from mossrlhf.kernels import row_stats as rows

CANARY = 123.0


@pytest.fixture
def given(backend, device):
    """Logits, ids, temperatures, the reference's logits, norms and coefficients of five rows."""
    logits, ref = torch.randn(2, 5, V, device=device)
    ids = torch.tensor([0, V - 1, 7, IGNORED_ID, BLOCK], device=device)
    taus = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7], device=device)
    norms = rows.row_stats(logits, ids, taus, ref, True, False)[-1]
    return logits, ids, taus, ref, norms, torch.randn(4, 5, device=device)


def slope(logits, ids, taus, ref, norms, coefs, softcap=None, out=None):
    out = torch.full_like(logits, torch.nan) if out is None else out
    rows.row_gradient(out, logits, ids, taus, ref, norms, coefs, softcap)
    return out


def formula(logits, ids, taus, ref, norms, coefs, softcap=None):
    """The formula of the module's first lines, in float64."""
    z, x, r = logits.double(), logits.double() / taus[:, None], ref.double() / taus[:, None]
    g, alpha, beta, gamma = coefs.double()[:, :, None]
    x, r = (y - y.amax(-1, keepdim=True) for y in (x, r))
    label = torch.nn.functional.one_hot(ids.clamp(min=0), V)
    dz = (g * label + x.softmax(-1) * (alpha + beta * x + gamma * r)) / taus[:, None]
    if softcap is not None:
        dz = dz * (1 - (z / softcap) ** 2)
    return torch.where(ids[:, None] >= 0, dz, 0.0)


@pytest.mark.parametrize("softcap", [None, 6.0])
def test_formula(given, softcap):
    assert off(slope(*given, softcap), formula(*given, softcap)) <= 1e-6


@pytest.mark.parametrize("coefficient", range(4))
def test_each_coefficient(given, coefficient):
    *rest, coefs = given
    coefs[torch.arange(4) != coefficient] = 0
    assert off(slope(*rest, coefs), formula(*rest, coefs)) <= 1e-6


def test_without_a_reference(given):
    logits, ids, taus, ref, norms, coefs = given
    coefs[3] = 0
    got = slope(logits, ids, taus, None, norms, coefs)
    assert off(got, formula(logits, ids, taus, ref, norms, coefs)) <= 1e-6


PLACES = {
    "rows": (slice(1, 6), slice(None)),
    "columns": (slice(None, 5), slice(3, V + 3)),
    "every other column": (slice(2, 7), slice(1, 2 * V, 2)),
    "every other row": (slice(None, 10, 2), slice(None, V)),
}


@pytest.mark.parametrize("place", PLACES)
def test_writes_what_it_owes_and_nothing_else(given, backend, device, place):
    """All of a slice poisoned with NaN, and not a number beside it: past V, above or below."""
    field = torch.full((12, V if place == "rows" else 2 * V + 7), CANARY, device=device)
    out = field[PLACES[place]]
    out.fill_(torch.nan)
    slope(*given, out=out)
    assert torch.equal(out, slope(*given))
    out.fill_(CANARY)
    assert (field == CANARY).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounds_to_the_type_it_is_written_in(given, device, dtype):
    out = torch.full((5, V), torch.nan, device=device, dtype=dtype)
    assert off(slope(*given, out=out), formula(*given)) <= {torch.float64: 1e-6}.get(dtype, 8e-3)


def test_may_be_the_logits(given):
    expected = slope(*given, 6.0)
    assert torch.equal(slope(*given, 6.0, out=given[0]), expected)


@pytest.mark.parametrize("content", [torch.nan, torch.inf])
def test_rows_with_nothing_to_say_become_zeros(given, content):
    """The ignored one, and the one whose coefficients are zero, whatever is in them."""
    *rest, coefs = given
    coefs[:, 1] = 0
    expected = slope(*rest, coefs)
    for x in (rest[0], rest[3], rest[4].t()):
        x[torch.tensor([1, 3])] = content
    coefs[:, 3] = content
    got = slope(*rest, coefs)
    assert (got[[1, 3]] == 0).all()
    assert torch.equal(got, expected)


def test_norms_and_coefficients_of_some_of_the_rows(given):
    """Slices of those of all rows, as chunks have them."""
    logits, ids, taus, ref, norms, coefs = given
    some = slice(1, 3)
    got = slope(logits[some], ids[some], taus[some], ref[some], norms[:, some], coefs[:, some])
    assert torch.equal(got, slope(*given)[some])


def test_coefficients_of_log_probability_alone(device):
    g = torch.tensor([2.0, -3.0], device=device)
    coefs = rows.coefficients(torch.ones(4, 2, device=device), g)
    assert coefs.tolist() == [[2, -3], [-2, 3], [0, 0], [0, 0]]


def test_coefficients_of_a_zero_gradient_are_zero(device):
    """Whatever it is multiplied by; those of another are not numbers where that is none."""
    norms = torch.full((4, 2), torch.nan, device=device)
    zero, number = torch.zeros(2, device=device), torch.full((2,), torch.inf, device=device)
    coefs = rows.coefficients(norms, zero, entropy=(number, zero), kl=(number, zero))
    assert (coefs == 0).all()
    coefs = rows.coefficients(norms, zero, entropy=(number, zero + 1))
    assert coefs[1].isnan().all()
