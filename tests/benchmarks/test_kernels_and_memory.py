"""benchmarks/token_stats.py and ppo_memory.py measure what they say, and measure it right."""

import json
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

QUICK = ["--quick", "--rounds", "1", "--without", "torch.compile"]
CPU = torch.device("cpu")

OURS = {
    "rows": {"mossrlhf", "mossrlhf, in place"},
    "rows_kl": {"mossrlhf", "mossrlhf, in place"},
    "linear_score": {"mossrlhf linear_token_stats"},
    "linear_ppo": {"mossrlhf linear_token_stats", "mossrlhf linear_token_loss"},
    "linear_logprob": {"mossrlhf linear_token_stats"},
    "linear_ce": {"mossrlhf linear_token_stats", "mossrlhf linear_token_loss"},
}


@pytest.fixture(autouse=True)
def _on_the_path(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))


@pytest.fixture
def bench():
    return import_module("token_stats")


@pytest.fixture
def problems():
    return import_module("problems")


@pytest.fixture
def answers():
    return import_module("answers")


@pytest.fixture
def peers():
    return import_module("peers")


@pytest.fixture
def measuring():
    return import_module("measuring")


@pytest.fixture
def tables():
    return import_module("tables")


def test_everyone_is_measured_or_absent_for_a_reason(bench, tables, tmp_path, capsys):
    assert bench.main([*QUICK, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "cpu.json").read_text(encoding="utf-8")
    figures = json.loads(text)
    assert str(tmp_path) not in text
    assert {work["kind"]: None for work in figures["works"]} == dict.fromkeys(OURS)
    for work in figures["works"]:
        rows = {row["provider"]: row for row in work["providers"]}
        assert {name for name, row in rows.items() if row["ours"]} == OURS[work["kind"]]
        assert rows["torch.compile"]["absent"] == "left out by --without"
        for row in rows.values():
            if "absent" in row:
                assert row["absent"]
                assert not row["ours"]
                continue
            both = "forward_ms" if work["kind"] == "linear_score" else "both_ms"
            assert row[both] > 0
            assert row["peak_mb"] >= row["beyond_gradients_mb"] >= 0
            assert row["percent_of_floor"].keys() == work["floors_ms"].keys()
            assert row["speed_over_plain"] > 0
            assert row.get("logprob_error", 0) < 1e-5
            assert row.get("gradient_error", 0) < 1e-5
        assert work["measured"]["quick"]
        assert work["measured"]["versions"]["torch"] == torch.__version__
    names = {row["provider"] for work in figures["works"] for row in work["providers"]}
    assert names >= {"TRL's formula", "verl's formula", "cut-cross-entropy"}
    assert names >= {"Liger fused linear CE", "torch linear_cross_entropy, chunked"}
    printed = capsys.readouterr().out
    assert printed.strip() == tables.tables(figures)
    assert "its times mean nothing" in printed
    assert "| cut-cross-entropy | absent: " in printed


def test_some_problems_anew_leave_the_others(bench, tmp_path):
    for kind in ("linear_ce", "rows"):
        bench.main([*QUICK, "--only", kind, "--out", str(tmp_path)])
    works = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))["works"]
    assert [work["kind"] for work in works] == ["rows", "linear_ce"]
    assert [work["measured"]["command"].split()[-1] for work in works] == ["rows", "linear_ce"]


@pytest.mark.parametrize("off", ["logprob", "gradient", "nan"])
def test_a_wrong_kernel_is_not_timed(bench, peers, off, tmp_path, monkeypatch, capsys):
    right = peers.kernels.token_stats

    def wrong(logits, ids, **settings):
        stats = right(logits, ids, **settings)
        logprob = {
            "logprob": stats.logprob + 3e-5,
            "gradient": stats.logprob + 1e-5 * (stats.logprob - stats.logprob.detach()),
            "nan": stats.logprob * torch.nan,
        }[off]
        return type(stats)(logprob, stats.entropy, stats.logsumexp, stats.ref_logprob, stats.kl)

    monkeypatch.setattr(peers.kernels, "token_stats", wrong)
    assert bench.main([*QUICK, "--only", "rows", "--out", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []
    said = "logprob" if off == "logprob" else "gradient"
    assert "mossrlhf, Log-probability and entropy, logits in hand, N = 24" in (
        text := capsys.readouterr().out
    )
    assert f"{said} off by" in text


def test_quick_figures_stay_off_the_page(bench):
    assert bench.parse(["--quick"]).out == bench.QUICK_RESULTS
    assert bench.parse([]).out == bench.RESULTS
    assert bench.parse([]).rounds >= 7


@pytest.mark.parametrize("kind", list(OURS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_answers_are_one(problems, answers, peers, kind, dtype, monkeypatch):
    monkeypatch.setattr(problems, "CHUNK_NUMBERS", 300 * 7)  # float64 answers in three parts
    shape = (20, 300) if kind.startswith("rows") else (20, 300, 16)
    problem = problems.make(kind, shape, dtype, CPU)
    answer = answers.Answer(problem)
    for provider in peers.providers(problem, ["torch.compile"]):
        if not provider.absent:
            errors = answer.errors(*provider.solve())
            exact = dtype == torch.float32
            assert errors.get("logprob", 0) < (1e-5 if exact else 0.2), provider.name
            assert errors.get("gradient", 0) < (1e-5 if exact else 0.1), provider.name


def test_errors_by_hand(problems, answers, peers):
    problem = problems.make("rows", (20, 300), torch.float32, CPU)
    answer = answers.Answer(problem)
    one, (gradient,) = peers.providers(problem)[0].solve()
    one.noted["logprob"][7] += 0.5
    assert answer.errors(one, (1.01 * gradient,)) == {
        "logprob": pytest.approx(0.5, abs=1e-5),
        "entropy": pytest.approx(0, abs=1e-5),
        "gradient": pytest.approx(0.01, abs=1e-5),
    }


def test_the_loss_by_hand(problems, answers):
    problem = problems.make("linear_ppo", (20, 300, 16), torch.float32, CPU)
    hidden, weight = (x.detach().double() for x in problem.wrt)
    logp = (hidden @ weight.t()).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    ratio = (logp[range(20), problem.ids] - problem.old_logprob.double()).exp()
    loss = 0.0
    for r, a, h in zip(ratio.tolist(), problem.advantage.tolist(), entropy.tolist(), strict=True):
        loss += -min(r * a, max(0.8, min(1.2, r)) * a) - 0.01 * h
    assert answers.Answer(problem).outputs[0].item() == pytest.approx(loss, rel=1e-9)


def test_in_place_is_made_ready_each_time(problems, peers):
    problem = problems.make("rows", (20, 300), torch.float32, CPU)
    given = problem.wrt[0].detach().clone()
    provider = next(p for p in peers.providers(problem) if p.name == "mossrlhf, in place")
    _, (first,) = provider.solve()
    first = first.clone()
    _, (second,) = provider.solve()
    assert second.data_ptr() == provider.problem.wrt[0].data_ptr()
    assert torch.equal(first, second)
    assert torch.equal(problem.wrt[0], given)  # the others' logits are theirs


def test_problems_are_peaked_and_signed(problems, answers):
    problem = problems.make("rows", (40, 300), torch.float32, CPU)
    highest = problem.wrt[0].softmax(-1).amax(-1)
    assert (highest[1::2] > 0.9).float().mean() > 0.8
    assert (highest[::2] < 0.9).all()
    assert all((g > 0).any() and (g < 0).any() for g in problem.upstream)
    ppo = problems.make("linear_ppo", (40, 300, 16), torch.float32, CPU)
    ratio = (answers.Answer(ppo).noted["logprob"] - ppo.old_logprob).exp()
    clipped = (ratio < 0.8) | (ratio > 1.2)
    assert 0 < clipped.sum() < 40
    assert min((ratio - 0.8).abs().min(), (ratio - 1.2).abs().min()) > 0.01


def test_floors_by_hand(problems):
    rates = {"copy": 4e3, "matmul": 2e3}  # so that a float32 logit takes 1 µs, and so a product
    make = {kind: problems.make(kind, (4, 5), torch.float32, CPU) for kind in ("rows", "rows_kl")}
    assert problems.floors(make["rows"], rates) == pytest.approx(
        {"forward": 0.02, "backward": 0.04, "both": 0.06}
    )
    assert problems.floors(make["rows_kl"], rates) == pytest.approx(
        {"forward": 0.04, "backward": 0.06, "both": 0.1}
    )
    score = problems.make("linear_score", (4, 5, 6), torch.float32, CPU)
    assert problems.floors(score, rates) == pytest.approx({"forward": 0.12})
    loss = problems.make("linear_ppo", (4, 5, 6), torch.float32, CPU)
    assert problems.floors(loss, rates) == pytest.approx({"both": 0.36})


def test_peak_memory_of_known_allocations(measuring):
    there = torch.ones(1000)

    def allocate():
        first = torch.empty(3_000_000)
        del first
        second = torch.empty(2_000_000)
        third = torch.empty(1_500_000, dtype=torch.float64)
        del third
        return second, there

    (second, _), most = measuring.peak_memory(allocate, CPU)
    assert most == 8_000_000 + 12_000_000
    assert measuring.nbytes((second,)) == 8_000_000


def test_peak_of_the_process(measuring):
    if not measuring.forget_peak():
        pytest.skip("the system does not let the peak begin anew")
    before = measuring.resident()
    torch.ones(20_000_000)  # 80 MB, gone at once
    measured = measuring.peak_resident() - before
    assert 70e6 < measured < 130e6
    assert measuring.forget_peak()
    assert measuring.peak_resident() - before < 70e6


def test_in_turn_and_by_the_median(measuring):
    order = []
    ticks = iter([1, 10, 4, 40, 2, 20, 3, 30, 6, 60, 2, 20])

    def clock(function):
        return function(), next(ticks)

    clock.cuda = False

    def one(name):
        return measuring.Pass(
            forward=lambda: order.append(name),
            backward=lambda state: order.append(f"{name} back"),
            ready=lambda: order.append(f"{name} ready"),
        )

    times = measuring.interleaved({"a": one("a"), "b": one("b")}, 3, clock)
    assert order == ["a ready", "a", "a back", "b ready", "b", "b back"] * 3
    assert times["a"] == {"forward": 2, "backward": 20, "both": 22}
    assert times["b"] == {"forward": 3, "backward": 30, "both": 33}


def test_a_peer_that_fails_is_absent_and_ours_may_not(bench, peers):
    def fail():
        raise RuntimeError("no such file: /home/someone/thing.so\nand more")

    peer = SimpleNamespace(name="peer", ours=False, absent=None)
    ours = SimpleNamespace(name="ours", ours=True, absent=None)
    assert bench.attempt(peer, fail)["absent"] == "RuntimeError: no such file: …"
    with pytest.raises(RuntimeError, match="no such file"):
        bench.attempt(ours, fail)
    assert peers.missing("no_such_module") == "no_such_module is not installed"


def test_tables_are_put_between_marks_again_and_again(tables):
    how = {
        "quick": False, "versions": {"torch": "1", "triton": None}, "copy_gb_per_s": 1234.0,
        "matmul_tflop_per_s": 0.5, "command": "python it.py", "rounds": 7, "threads": 2,
    }  # fmt: skip
    row = {
        "provider": "a", "ours": True, "forward_ms": 1.0, "backward_ms": 2.0, "both_ms": 1234.5,
        "speed_over_plain": 1.5, "percent_of_floor": {"forward": 50.0, "both": 80.4},
        "peak_mb": 1000.0, "beyond_gradients_mb": 1.0, "logprob_error": 1e-6,
    }  # fmt: skip
    rows = [row, {"provider": "b", "ours": False, "absent": "needs CUDA"}]
    work = {"title": "T", "shape": [1000, 2], "dtype": "float32", "measured": how}
    figures = {"device": {"slug": "cpu", "name": "X"}, "works": [{**work, "providers": rows}]}
    marks = tables.marks("cpu")
    assert marks == ("<!-- token_stats:cpu -->", "<!-- /token_stats:cpu -->")
    once = tables.page_of(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n", [figures])
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "old" not in once
    assert "X; torch 1. Copy 1,234 GB/s, matrix product 0.5 TFLOP/s" in once
    assert "**T, N = 1,000, V = 2, float32**" in once
    assert "| **a** | 1 | 2 | 1,234 | 1.50 | 50 / 80 | 1,000 | 1 | 1.0e-06 | – |" in once
    assert "| b | absent: needs CUDA | | | | | | | | |" in once
    assert tables.page_of(once, [figures]) == once
    other = {**figures, "device": {"slug": "gpu-1", "name": "GPU 1"}}
    both = tables.page_of(once, [figures, other])
    assert both.startswith(once)
    assert "## GPU 1\n\n<!-- token_stats:gpu-1 -->" in both
    assert tables.page_of(both, [figures, other]) == both


def test_the_page_has_the_kept_figures(bench, tables, root):
    page = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    assert tables.page_of(page, tables.kept(bench.RESULTS)) == page


@pytest.fixture
def ppo_memory():
    return import_module("ppo_memory")


def test_memory_of_an_update(ppo_memory):
    sizes = {"vocab": 500, "hidden": 16, "layers": 1, "responses": 2, "length": 3}
    args = ppo_memory.parse([f"--{name}={size}" for name, size in sizes.items()])
    figures = ppo_memory.update(args, "kernels")
    assert figures["response_tokens"] == 6
    # Embeddings of all three; the reward head of the critic is 16 numbers more.
    layer = 4 * 16 * 16 + 3 * 16 * 64 + 2 * 16
    size = 500 * 16 + layer + 16
    assert figures["parameters_mb"] == pytest.approx(4 * (3 * size + 16) / 1e6, rel=1e-3)
    assert figures["gradients_and_optimizer_mb"] == pytest.approx(
        3 * 4 * (2 * size + 16) / 1e6, rel=1e-3
    )
    assert figures["peak_above_mb"] >= 0
    assert figures["metrics"]["policy/grad_norm"] > 0


def test_both_paths_take_the_same_step(ppo_memory):
    sizes = {"vocab": 500, "hidden": 16, "layers": 1, "responses": 2, "length": 3}
    args = ppo_memory.parse([f"--{name}={size}" for name, size in sizes.items()])
    ours, theirs = (ppo_memory.update(args, path)["metrics"] for path in ("kernels", "plain"))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_each_path_alone(ppo_memory, monkeypatch):
    done = []

    def run(command, **settings):
        done.append(command[2:])
        return SimpleNamespace(**outcomes[len(done) - 1])

    outcomes = [
        {"returncode": 0, "stdout": 'noise\n{"peak_above_mb": 3}\n', "stderr": ""},
        {"returncode": -9, "stdout": "", "stderr": ""},
        {"returncode": 1, "stdout": "", "stderr": 'File "/home/x.py"\nError: not /home/x\n'},
    ]
    monkeypatch.setattr(ppo_memory.subprocess, "run", run)
    assert ppo_memory.alone(["--untied"], "plain") == {"peak_above_mb": 3}
    assert ppo_memory.alone([], "plain") == {"absent": "killed by signal 9"}
    assert ppo_memory.alone([], "plain") == {"absent": "Error: not …"}
    assert done[0] == ["--untied", "--path", "plain"]
