"""benchmarks/ppo_iteration.py does the work it says, and the page says what was measured."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

from mossrlhf.models import policy_stats
from mossrlhf.sampling import assemble

SMALL = ["--vocab", "64", "--hidden", "16", "--layers", "1", "--prompt", "5", "--response", "6"]
SMALL += ["--rollouts", "4", "--iters", "2"]


@pytest.fixture(autouse=True)
def _on_the_path(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))


@pytest.fixture
def bench():
    return import_module("ppo_iteration")


@pytest.fixture
def comparing():
    return import_module("comparing")


def test_an_iteration_is_measured(bench, capsys):
    assert bench.main(SMALL) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["iter_s"]) == 2
    assert found["stages"].keys() == set(bench.STAGES)
    assert sum(found["stages"].values()) <= 2 * max(found["iter_s"])
    assert found["response_tokens"] <= 4 * 6
    assert found["peak_rss_mb"] > 50
    assert 0 < found["tera_operations"] < 1
    assert 0 <= found["share_of_floor"] < 1


def test_the_work_is_what_the_words_say(bench, tmp_path):
    work = import_module("iteration_work")
    args = work.parse(SMALL)
    trainer = bench.make_trainer(args, str(tmp_path), work.Stopwatch())
    rollout = trainer.collect()
    assert rollout.prompt_lengths.tolist() == [5] * 4
    assert trainer.args.optimizer_steps() == 2 * args.minibatches * args.epochs
    models = (trainer.policy, trainer.critic, trainer.ref_model, *trainer.rewards.models())
    assert len({id(p) for model in models for p in model.parameters()}) == sum(
        len(list(model.parameters())) for model in models
    )


def test_lengths_are_those_of_the_prompts(bench, tmp_path):
    work = import_module("iteration_work")
    longer = ["--response", "64", "--vocab", "128", "--rollouts", "16"]
    args = work.parse([*SMALL, *longer, "--lengths", "log-normal"])
    trainer = bench.make_trainer(args, str(tmp_path), work.Stopwatch())
    rollout = trainer.collect()
    wanted = rollout.input_ids[:, 4] - 3
    assert rollout.response_lengths.tolist() == wanted.tolist()
    assert rollout.truncated.sum() == 0
    assert len(set(wanted.tolist())) > 2


def test_the_arithmetic_is_that_of_the_models(bench, tmp_path):
    """Against torch's own count of a forward pass of a backbone, and of a head."""
    from torch.utils.flop_counter import FlopCounterMode

    work = import_module("iteration_work")
    args = work.parse(["--shape", "tiny"])
    trainer = bench.make_trainer(args, str(tmp_path), work.Stopwatch())
    both = args.prompt + args.response
    ids = torch.full((args.rollouts, both), 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trainer.critic.backbone(ids, use_cache=False)
    head = args.rollouts * args.response * 2 * args.hidden * args.vocab
    # The counter does not know attention on the CPU, whose causal half is to be computed.
    attention = args.rollouts * args.layers * 4 * args.hidden * both * both / 2
    backbone = counter.get_total_flops() + attention
    epochs = 3 * args.epochs
    expected = 3 * (backbone + head) + 2 * backbone + epochs * (2 * backbone + head)
    assert bench.arithmetic(args, args.response) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("option", ["packing", "segments"])
def test_an_option_is_left_out_and_comes_back(bench, option, tmp_path):
    work = import_module("iteration_work")
    args = work.parse(SMALL)
    trainer = bench.make_trainer(args, str(tmp_path), work.Stopwatch())
    can_pack = bench.backbone.can_pack
    with bench.without(option, trainer):
        assert (bench.backbone.can_pack is can_pack) == (option != "packing")
        assert (trainer.sampler.segment is None) == (option == "segments")
    assert bench.backbone.can_pack is can_pack


class TestMinimalLoop:
    """It computes what `Trainer` does, to 1e-5, so that their seconds can be compared."""

    @pytest.fixture
    def minimal(self):
        return import_module("minimal_loop")

    @pytest.fixture
    def pair(self, bench, minimal, tmp_path, monkeypatch):
        """A trainer and a loop of the same weights, and the same responses as each holds them."""
        work = import_module("iteration_work")
        args = work.parse(SMALL)
        trainer = bench.make_trainer(args, str(tmp_path), work.Stopwatch())
        loop = minimal.Loop(args)
        with torch.no_grad():  # further from uniform, and from the reference
            for model in (trainer.policy, loop.policy):
                generator = torch.Generator().manual_seed(3)
                for weight in model.parameters():
                    weight += 0.3 * torch.randn(weight.shape, generator=generator)
        sampled = torch.randint(3, args.vocab, (args.rollouts, args.response))
        sampled[0, 2] = sampled[1, 0] = sampled[2, -1] = minimal.END  # and one runs to the limit
        with monkeypatch.context() as patch:
            patch.setattr(
                loop.policy, "generate", lambda given, **_: torch.cat([given, sampled], dim=1)
            )
            batch = loop.collect(0)
        lengths = batch["mask"].sum(1).tolist()
        completions = [row[:n] for row, n in zip(sampled.tolist(), lengths, strict=True)]
        rollout = assemble(
            loop.prompts[: args.rollouts].tolist(),
            completions,
            [response[-1] == minimal.END for response in completions],
            pad_token_id=minimal.PAD,
        ).with_end_states(args.response)
        return trainer, loop, rollout, batch

    def test_advantages(self, pair):
        trainer, loop, rollout, batch = pair
        rollout = trainer.estimate(trainer.annotate(trainer.score(rollout)))
        for stage in ("score", "annotate", "estimate"):
            with torch.no_grad():
                batch = getattr(loop, stage)(batch)
        width = batch["mask"].shape[1]
        assert rollout.response_lengths.tolist() == [3, 1, 6, 6]
        assert torch.equal(rollout.mask[:, :width], batch["mask"])
        assert torch.equal(rollout.states[:, :width], batch["states"])
        assert not rollout.states[:, width:].any()
        torch.testing.assert_close(batch["scores"], rollout.scores, atol=1e-5, rtol=0)
        for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
            where = batch["mask" if "logprobs" in name else "states"]
            ours, theirs = getattr(rollout, name)[:, :width], batch[name]
            torch.testing.assert_close(theirs[where], ours[where], atol=1e-5, rtol=0)
        assert (batch["logprobs"] - batch["ref_logprobs"])[batch["mask"]].abs().max() > 0.1

    def test_losses_and_their_gradients(self, pair):
        trainer, loop, rollout, batch = pair
        rollout = trainer.estimate(trainer.annotate(trainer.score(rollout)))
        with torch.no_grad():
            batch = loop.estimate(loop.annotate(loop.score(batch)))
            for model in (trainer.policy, trainer.critic, loop.policy, loop.critic):
                generator = torch.Generator().manual_seed(4)
                for weight in model.parameters():
                    weight += 0.2 * torch.randn(weight.shape, generator=generator)
        policy = trainer.loss.policy(policy_stats(trainer.policy, rollout), rollout)
        assert policy.stats["policy/clip_fraction"] > 0
        critic = trainer.loss.critic(trainer.model.values(rollout)[0][rollout.states], rollout)
        for ours, theirs in (
            (policy.loss, loop.policy_loss(batch)),
            (critic.loss, loop.value_loss(batch)),
        ):
            assert abs(ours) > 1e-3
            torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
            ours.backward()
            theirs.backward()
        found = [[p.grad for p in m.parameters()] for m in (trainer.policy, loop.policy)]
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
        ours, theirs = trainer.critic.backbone.norm.weight, loop.critic.model.norm.weight
        torch.testing.assert_close(theirs.grad, ours.grad, atol=1e-5, rtol=1e-4)

    def test_optimizer_steps(self, minimal):
        loop = minimal.Loop(import_module("iteration_work").parse(SMALL))
        before = [weight.clone() for weight in loop.policy.parameters()]
        loop.iteration(0)
        steps = {int(state["step"]) for state in loop.optimizer.state.values()}
        assert steps == {loop.args.epochs * loop.args.minibatches}
        assert loop.scheduler.get_last_lr() == [pytest.approx(minimal.RATE / 2)]
        pairs = zip(before, loop.policy.parameters(), strict=True)
        moved = max((a - b).detach().abs().max().item() for a, b in pairs)
        assert 2 * minimal.RATE < moved < 4.1 * minimal.RATE

    def test_its_line_of_figures(self, bench, minimal, capsys):
        assert minimal.main(SMALL) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["who"] == "minimal loop"
        assert len(found["iter_s"]) == 2
        assert found["stages"].keys() == set(bench.STAGES)
        assert found["response_tokens"] <= 4 * 6
        assert found["peak_rss_mb"] > 50

    def test_it_uses_nothing_of_the_package(self, minimal):
        assert "mossrlhf" not in Path(minimal.__file__).read_text(encoding="utf-8")


def made(comparing):
    """Figures with plain ratios."""

    def runs(seconds, memory, **more):
        one = {"median": seconds, "peak_rss_mb": memory, "response_tokens": 128 * 36, **more}
        return [one] * 3

    stages = {"collect": 1.0, "score": 0.1, "annotate": 0.2, "estimate": 0.1, "update": 2.0}
    ours = {"stages": stages, "share_of_floor": 0.4}
    found = {name: runs(2.0, 500.0, **ours) for name in comparing.RUNS}
    found |= {f"without {name}": runs(3.0, 500.0, **ours) for name in comparing.WORTH}
    stages = {"collect": 2.0, "score": 0.1, "annotate": 0.1, "estimate": 0.2, "update": 2.0}
    found |= {name: runs(4.0, 250.0, stages=stages) for name in found if name.endswith("loop")}
    found |= {name: runs(6.0, 1000.0) for name in found if name.endswith("TRL")}
    overhead = {work: comparing.overhead(found, work, "peak_rss_mb") for work in comparing.WORKS}
    device = {"name": "a machine", "type": "cpu"}
    known = {"device": device, "threads": 2, "versions": {"torch": "9"}}
    return {"x": {**known, "overhead": overhead, "runs": found}}


def test_the_tables_by_hand(comparing):
    page = "before\n" + "stale\n".join(comparing.MARKS) + "after\n"
    new = comparing.with_tables(page, made(comparing))
    assert "| wide | TRL 1.12 | 6 | 1.00 | 1,000 | 1.00 |" in new
    assert "| wide | mossrlhf | 2 | 3.00 | 500 | 0.50 | 1 | 0.1 | 0.2 | 2 | 40% |" in new
    assert "| wide | minimal loop | 4 | 1.50 | 250 | 0.25 | 2 | 0.1 | 0.1 | 2 |  |" in new
    assert "| wide | × 0.50 | × 1.00 | × 2.00 | × 0.50 | × 1.00 | × 0.50 | × 2.00 |" in new
    assert "| tiny | mossrlhf, 896 tokens at a time | 2 | 3.00 |" in new
    assert "| no padding | log-normal lengths | × 1.50 | × 1.00 | × 1.00 | × 1.00 |" in new
    assert "0.156 ms a token of prompt or response against 0.156, that is +0%" in new
    assert "stale" not in new
    assert comparing.with_tables(new, made(comparing)) == new


def test_the_page_says_what_the_figures_say(comparing):
    page = comparing.PAGE.read_text(encoding="utf-8")
    if not comparing.FIGURES.is_file():
        assert "".join(comparing.MARKS) in page
        pytest.skip("nothing measured is kept yet")
    kept = json.loads(comparing.FIGURES.read_text(encoding="utf-8"))
    assert comparing.with_tables(page, kept) == page
