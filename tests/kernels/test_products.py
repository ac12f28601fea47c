"""Products by oneDNN against those of torch's own BLAS, both ways and back again."""

import copy
import importlib
import threading

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from mossrlhf.kernels.products import add_product, fast_products, product, products, use_products

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch comes without oneDNN"
)

source = importlib.import_module(
    "mossrlhf.kernels.products"
)  # the package has a function of this name
TORCHS = nn.functional.linear, torch.addmm
ROWS = [1, 15, 16, 17, 100, 128, 1023, 2048]
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def any_size(monkeypatch, request):
    """Let oneDNN have every product, however little it is worth."""
    if "test_small" not in request.node.name:
        monkeypatch.setattr(source, "WORTH_IT", 1)
    yield
    assert (nn.functional.linear, torch.addmm) == TORCHS


@pytest.fixture
def handed(monkeypatch):
    """The shapes that oneDNN is given."""
    seen, multiplied = [], source._multiplied

    def spy(x, weight, bias):
        if len(x) % 4 == 0 and x.shape[1] >= source.SIZES[-1]:  # others come again, filled up
            seen.append((*x.shape, len(weight)))
        return multiplied(x, weight, bias)

    monkeypatch.setattr(source, "_multiplied", spy)
    return seen


def gradients(run, inputs):
    """Result, first gradients, and the gradients of a function of those."""
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    wanted = [x for x in inputs if x.requires_grad]
    y = run(*inputs)
    torch.manual_seed(9)
    upstream = torch.randn(y.shape).requires_grad_()
    first = torch.autograd.grad(y, wanted, upstream, create_graph=True)
    score = sum((g * torch.randn(g.shape)).sum() for g in first)
    second = torch.autograd.grad(score, [*wanted, upstream], allow_unused=True)
    return [y, *first, *(g for g in second if g is not None)], [g is None for g in second]


def compare(run, *inputs):
    """By oneDNN as by BLAS, relative to how large each is."""
    found = []
    for name in ("onednn", "blas"):
        with use_products(name), fast_products():
            found.append(gradients(run, inputs))
    (ours, absent), (theirs, expected) = found
    assert absent == expected
    for got, wanted in zip(ours, theirs, strict=True):
        scale = wanted.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(got / scale, wanted / scale, **CLOSE)


def made(*shape, grad=True):
    return torch.randn(*shape, requires_grad=grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_linear_is_torchs_and_so_are_its_derivatives(rows, bias, handed):
    torch.manual_seed(rows)
    given = [made(rows, 40), made(24, 40), *([made(24)] if bias else [])]
    compare(lambda *x: nn.functional.linear(*x), *given)
    assert handed


@pytest.mark.parametrize("shape", [(3, 50, 40), (2, 3, 9, 40), (1, 1, 40), (0, 40), (2, 0, 40)])
def test_any_number_of_dimensions(shape):
    torch.manual_seed(1)
    given = made(*shape), made(24, 40), made(24)
    with use_products("onednn"), fast_products():
        got = nn.functional.linear(*given)
        got.sum().backward()
    expected = nn.functional.linear(*given)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert given[0].grad.shape == shape
    if 0 not in shape:
        compare(lambda *x: nn.functional.linear(*x), *given)


@pytest.mark.parametrize(("wide", "narrow"), [(40, 24), (24, 40), (300, 17), (17, 300), (8, 40)])
def test_either_side_may_be_the_wider(wide, narrow):
    torch.manual_seed(2)
    compare(lambda *x: nn.functional.linear(*x), made(150, wide), made(narrow, wide), made(narrow))


def test_views_of_any_stride():
    torch.manual_seed(3)
    x, w = made(40, 150), made(40, 24)
    compare(lambda x, w: nn.functional.linear(x.t(), w.t()), x, w)
    compare(lambda x, w: nn.functional.linear(x.t()[::2], w.t()[::3]), x, w)
    compare(lambda x, w: nn.functional.linear(x[:1].t().expand(150, 40), w.t()), x, w)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_what_is_frozen_gets_no_gradient(frozen):
    torch.manual_seed(4)
    shapes = (100, 40), (24, 40), (24,)
    given = [made(*shape, grad=i not in frozen) for i, shape in enumerate(shapes)]
    compare(lambda *x: nn.functional.linear(*x), *given)


def test_nothing_is_kept_without_gradients():
    x, w = made(100, 40), made(24, 40)
    with use_products("onednn"), fast_products():
        with torch.no_grad():
            assert not nn.functional.linear(x, w).requires_grad
        assert not nn.functional.linear(x.detach(), w.detach()).requires_grad


@pytest.mark.parametrize("rows", ROWS)
def test_the_linear_layers_of_gpt2(rows, handed):
    torch.manual_seed(5)
    layer = Conv1D(24, 40)
    given = made(2, rows, 40), layer.weight, layer.bias
    nn.init.normal_(layer.bias)

    def run(x, weight, bias):
        return torch.addmm(bias, x.view(-1, 40), weight).view(2, rows, 24)

    compare(run, *given)
    with use_products("onednn"), fast_products():
        got = layer(given[0])
    torch.testing.assert_close(got, layer(given[0]), **CLOSE)
    assert handed


def test_addmm_of_other_kinds_is_torchs(handed):
    total, a, b = torch.randn(100, 24), torch.randn(100, 40), torch.randn(40, 24)
    out = torch.empty(100, 24)
    with use_products("onednn"), fast_products():
        torch.testing.assert_close(torch.addmm(total, a, b), total + a @ b)
        torch.testing.assert_close(torch.addmm(total[0], a, b, beta=2), 2 * total[0] + a @ b)
        torch.addmm(total[0], a, b, out=out)
    torch.testing.assert_close(out, total[0] + a @ b)
    assert handed == []


def test_a_whole_model_is_the_same_trained_by_either():
    torch.manual_seed(6)
    config = GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 90, (4, 30))
    found = []
    for name in ("onednn", "blas"):
        twin = copy.deepcopy(model)
        with use_products(name), fast_products():
            twin(ids, labels=ids).loss.backward()
        found.append([p.grad for p in twin.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


class Subclass(torch.Tensor):
    """Something more than a tensor."""


class TestLeftToTorch:
    """Whatever is no plain float32 matrix on the CPU."""

    def untouched(self, handed, *given):
        with use_products("onednn"), fast_products():
            got = nn.functional.linear(*given)
        assert handed == []
        torch.testing.assert_close(got, nn.functional.linear(*given))
        return got

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_types(self, handed, dtype):
        given = made(100, 40).to(dtype), made(24, 40).to(dtype)
        assert self.untouched(handed, *given).dtype == dtype

    def test_subclasses(self, handed):
        given = torch.randn(100, 40).as_subclass(Subclass), torch.randn(24, 40)
        assert type(self.untouched(handed, *given)) is Subclass
        self.untouched(handed, given[1][:, :40], given[0])

    def test_sharded_weights(self, handed):
        weight = torch.Tensor._make_wrapper_subclass(DTensor, (24, 40), dtype=torch.float32)
        assert not source._plain(weight)
        lent = nn.Parameter(torch.randn(24, 40))
        lent.ds_id = 3  # as ZeRO-3 marks its own
        self.untouched(handed, torch.randn(100, 40), lent)

    def test_vectors(self, handed):
        self.untouched(handed, torch.randn(40), torch.randn(24, 40))
        self.untouched(handed, torch.randn(100, 40), torch.randn(40))

    def test_under_autocast(self, handed):
        given = torch.randn(100, 40), torch.randn(24, 40)
        with torch.autocast("cpu", torch.bfloat16):
            assert self.untouched(handed, *given).dtype == torch.bfloat16

    def test_on_meta(self, handed):
        given = torch.randn(100, 40, device="meta"), torch.randn(24, 40, device="meta")
        with use_products("onednn"), fast_products():
            assert nn.functional.linear(*given).shape == (100, 24)
        assert handed == []

    def test_small_products(self, handed):
        with use_products("onednn"), fast_products():
            nn.functional.linear(torch.randn(100, 40), torch.randn(24, 40))
            nn.functional.linear(torch.randn(1024, 32), torch.randn(16, 32))  # half of it
            product(torch.randn(1024, 32), torch.randn(32, 16))
            assert handed == []
            nn.functional.linear(torch.randn(1024, 64), torch.randn(16, 64))
            assert handed == [(1024, 64, 16)]

    def test_where_blas_is_as_fast(self, handed):
        with use_products("blas"), fast_products():
            nn.functional.linear(torch.randn(100, 40), torch.randn(24, 40))
        assert handed == []


@pytest.mark.parametrize(("n", "k", "m"), [
    (1, 40, 24), (17, 40, 24), (100, 40, 5000), (129, 5000, 40), (1023, 64, 64), (50, 3, 40),
    (0, 40, 24), (4100, 20, 24), (300, 2049, 30),
])  # fmt: skip
@pytest.mark.parametrize("turned", [False, True])
def test_products_without_gradients(n, k, m, turned):
    torch.manual_seed(n)
    a, b = torch.randn(n, k), torch.randn(k, m)
    total = torch.randn(n, m)
    expected = a.double() @ b.double()
    if turned:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    close = dict(rtol=1e-4, atol=1e-5 * k**0.5 * 10, check_dtype=False)
    with use_products("onednn"):
        torch.testing.assert_close(product(a, b), expected, **close)
        out = torch.full((n, m), torch.nan)
        assert product(a, b, out) is out
        torch.testing.assert_close(out, expected, **close)
        wider = torch.full((n + 3, m), torch.nan)  # a part of a buffer
        product(a, b, wider[:n])
        torch.testing.assert_close(wider[:n], expected, **close)
        assert wider[n:].isnan().all()
        added = total.clone()
        add_product(added, a, b)
        torch.testing.assert_close(added, total.double() + expected, **close)
    with use_products("blas"):
        torch.testing.assert_close(product(a, b), expected, **close)


def test_few_sizes_over_many_numbers_of_rows(handed):
    """For each new size oneDNN keeps half a megabyte of instructions."""
    torch.manual_seed(7)
    x, weight = torch.randn(4000, 32), torch.randn(48, 32, requires_grad=True)
    counts = torch.randint(1, 4000, (200,)).tolist()
    counts = [n + (n % source.ROUND == 0) for n in counts]  # a multiple is a size of its own
    with use_products("onednn"), fast_products():
        for n in counts:
            nn.functional.linear(x[:n], weight).sum().backward()
            product(x[:n], weight.detach().t())
            add_product(torch.zeros(48, 32), torch.randn(n, 48).t(), x[:n])
    assert len(set(counts)) > 150
    assert len(handed) > 200
    assert {shape[0] for shape in handed} <= {*source.SIZES, 4, 8, 12, 32, 48}
    assert len(set(handed)) <= 6 * len(source.SIZES)


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 100, 127, 128, 129, 256, 1000, 2049])
def test_pieces_are_all_of_it_once(count, fill):
    pieces = list(source.pieces(count, fill))
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == [*range(count)]
    if count % source.ROUND == 0 and count:
        assert pieces == [slice(0, count)]
    else:
        assert all(p.stop - p.start in source.SIZES for p in pieces[:-1])


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (96, [96]),  # of 128: a call costs as much as 32 rows
        (95, [64, 31]),
        (39, [32, 7]),
        (1000, [1000]),
        (991, [256, 256, 256, 128, 64, 31]),
        (20, [20]),
        (19, [16, 3]),
    ],
)
def test_a_piece_is_filled_up_where_a_call_costs_more(count, sizes):
    assert [p.stop - p.start for p in source.pieces(count, fill=True)] == sizes


class TestContext:
    def test_nested(self):
        with fast_products():
            with fast_products():
                assert nn.functional.linear is source.linear
            assert nn.functional.linear is source.linear
            assert torch.addmm is source._addmm
        assert (nn.functional.linear, torch.addmm) == TORCHS

    def test_an_exception_leaves_torch_as_it_was(self):
        with pytest.raises(KeyError), fast_products(), fast_products():
            raise KeyError
        assert (nn.functional.linear, torch.addmm) == TORCHS

    def test_whoever_replaces_it_meanwhile_keeps_it(self):
        def theirs(*args):
            return TORCHS[0](*args)

        with fast_products():
            nn.functional.linear = theirs
        assert nn.functional.linear is theirs
        nn.functional.linear = TORCHS[0]
        with fast_products():
            torch.addmm = theirs
        assert torch.addmm is theirs
        torch.addmm = TORCHS[1]

    def test_threads_may_overlap(self):
        inside, leave, seen = threading.Event(), threading.Event(), []

        def other():
            with fast_products():
                inside.set()
                leave.wait(20)
                seen.append(nn.functional.linear)

        thread = threading.Thread(target=other)
        with fast_products():
            thread.start()
            inside.wait(20)
        assert nn.functional.linear is source.linear  # of the other still
        leave.set()
        thread.join()
        assert seen == [source.linear]
        assert (nn.functional.linear, torch.addmm) == TORCHS


class TestChoice:
    def test_is_forced_within_the_context_alone(self):
        before = products()
        with use_products("onednn"):
            assert products().name == "onednn"
            with use_products("blas"):
                assert products().name == "blas"
            assert products().name == "onednn"
            assert products().reason == "use_products() says so"
        assert products() == before

    def test_is_let_go_after_an_exception(self):
        before = products()
        with pytest.raises(KeyError), use_products("onednn"):
            raise KeyError
        assert products() == before

    def test_of_unknown_names(self):
        with (
            pytest.raises(ValueError, match="name: got 'mkl', expected one of onednn, blas"),
            use_products("mkl"),
        ):
            pass

    @pytest.mark.parametrize(("maker", "widest", "name", "reason"), [
        ("AuthenticAMD", "AVX512", "onednn", "would keep to AVX2 on this processor of Authentic"),
        ("AuthenticAMD", "AVX2", "blas", "widest instructions of the processor are AVX2"),
        ("GenuineIntel", "AVX512", "blas", "maker is GenuineIntel"),
        ("", "AVX512", "blas", "maker is unknown"),
    ])  # fmt: skip
    def test_by_processor(self, monkeypatch, maker, widest, name, reason):
        if not torch.backends.mkl.is_available():
            pytest.skip("torch's BLAS is not MKL")
        monkeypatch.setattr(source, "_maker", lambda: maker)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: widest)
        chosen = source._chosen.__wrapped__()
        assert chosen.name == name
        assert reason in chosen.reason

    def test_without_onednn(self, monkeypatch):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert source._chosen.__wrapped__().reason == "this torch comes without oneDNN"
