"""`examples/secrets_study.py`: its statistics, its plan, its runs, and the published page."""

import json
import math
import re
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

NAMES = ("arms", "claims", "findings", "page", "pictures", "plan", "running", "statistics")


@pytest.fixture(scope="module")
def study(root):
    """The modules of the study, found as they are when the script is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "examples")
        made = {name: import_module(f"study.{name}") for name in NAMES}
        yield SimpleNamespace(script=import_module("secrets_study"), **made)
        for name in [n for n in sys.modules if n.split(".")[0] in ("study", "secrets_study")]:
            sys.modules.pop(name)


# ---- statistics ---------------------------------------------------------------------------------


def student(t, freedom, steps=200_000):
    """P(|T| ≤ t) by the trapezoid rule over the density."""
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    norm /= math.sqrt(freedom * math.pi)
    density = [
        norm * (1 + (t * i / steps) ** 2 / freedom) ** (-(freedom + 1) / 2)
        for i in range(steps + 1)
    ]
    return 2 * t / steps * (sum(density) - (density[0] + density[-1]) / 2)


def test_quantiles_are_students(study):
    for n, t in study.statistics.T_975.items():
        assert student(t, n - 1) == pytest.approx(0.95, abs=1e-4)


def test_interval(study):
    found = study.statistics.interval([1.0, 2.0, 6.0])
    reach = 4.303 * math.sqrt((4 + 1 + 9) / 2) / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - reach, 3 + reach))
    alone = study.statistics.interval([7.0])
    assert (alone.mean, alone.low, alone.high) == (7.0, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("within", "values", "verdict", "held"),
    [
        (None, (1.0, 1.1, 0.9), "holds", 3),
        (None, (-1.0, -1.1, -0.9), "against", 0),
        (None, (1.0, -0.9, 0.2), "open", 2),
        (None, (1.0,), "open", 1),
        (0.3, (0.1, 0.12, 0.11), "holds", 3),
        (0.3, (-0.1, -0.12, -0.11), "holds", 3),
        (0.3, (0.9, 0.91, 0.92), "against", 0),
        (0.3, (-0.9, -0.91, -0.92), "against", 0),
        (0.3, (0.1, 0.5, -0.4), "open", 1),
    ],
)
def test_verdict_of_a_claim(study, within, values, verdict, held):
    claim = study.statistics.Claim("text", lambda seed: seed, "unit", within)
    found = study.statistics.measured(claim, values)
    assert (claim.verdict(found), sum(map(claim.holds_for, found.values))) == (verdict, held)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (("holds", "holds"), "reproduced"),
        (("holds", "against"), "partly"),
        (("holds", "open"), "partly"),
        (("against", "open"), "refuted"),
        (("open", "open"), "undecided"),
    ],
)
def test_verdict_of_a_finding(study, verdicts, expected):
    finding = study.findings.FINDINGS[0]
    assert finding.verdict(verdicts) == expected


def test_seeds_on_which_all_of_a_finding_holds(study):
    """Of three with all runs one has both claims; one more lacks a run, and is not counted."""
    claim, statistics = study.claims, study.statistics
    claims = (claim.stays("a"), claim.nearer("a", "b"))
    finding = statistics.Finding(
        id="F0", title="", source="", claims=claims, expected="", arms=(), panels=()
    )

    def world(**kl):
        runs = {name: {"held_out": {"kl": value}} for name, value in kl.items()}
        return {"world": {"lang": "en"}, "runs": runs, "facts": {"sft": {}}}

    records = [world(a=1.0, b=2.0), world(a=3.0, b=2.0), world(a=16.0, b=20.0), world(a=1.0)]
    assert study.page.on_seeds(finding, records) == "1 of 3"


def run_of(study, **columns):
    length = len(next(iter(columns.values())))
    steps = [10 * (i + 1) for i in range(length)]
    return study.statistics.Run({"curves": {"step": steps, **columns}, "steps": 10 * length})


def test_what_claims_ask_of_a_run(study):
    run = run_of(study, kl=[0.0, 14.0, 16.0, 3.0], score=[1.0, 0.2, 2.0, 1.5])
    assert run.passage == 30
    assert run.early_drop("score", until=20) == pytest.approx(0.8)
    assert run.early_drop("score", until=40) == pytest.approx(0.8)
    assert run_of(study, kl=[0.0, 1.0]).passage == 20  # never: the end
    assert run_of(study, kl=[0.0, None, 1.0]).passage == 20  # what overflowed was beyond
    changes = (-0.8, 1.8, -0.5)
    center = sum(changes) / 3
    spread = math.sqrt(sum((c - center) ** 2 for c in changes) / 2)
    assert run.fluctuation("score") == pytest.approx(spread)
    long = run_of(study, kl=[float(i) for i in range(30)])
    assert long.last("kl") == 28.0  # of 27, 28 and 29


def test_claims_by_hand(study):
    """Each kind of claim on two runs of which everything is known: what it is, and its sign."""

    def held(kl, score, quality, win, lose):
        return dict(
            kl=kl, reward_score=score, true_quality=quality, win=win, lose=lose, reward_win=0.9,
            reward_lose=0.2,
        )  # fmt: skip

    def critic(mean_error, before):
        return {
            "critic_after": {"mean_error": mean_error},
            "critic_before": {"mean_absolute_error": before},
        }

    long = {"curves": {"true_quality": [float(i) for i in range(20)]}}
    runs = {
        "a": {"held_out": held(20.0, 3.0, 1.0, 0.7, 0.1), "steps": 30, **critic(-0.4, 0.5)},
        "b": {"held_out": held(5.0, 1.0, 2.5, 0.3, 0.6), "steps": 30, **critic(0.1, 0.2)},
        study.plan.LONG: long,
    }
    for name, kl in (("a", [0.0, 16.0, 20.0]), ("b", [0.0, 1.0, 5.0])):
        runs[name]["curves"] = {"step": [10, 20, 30], "kl": kl, "score": kl}
    sft = {"true_quality": 1.5, "reward_score": 0.5}
    seed = study.statistics.Seed({"runs": runs, "facts": {"sft": sft}})
    c = study.claims
    by_hand = [
        (c.collapses("a"), 5.0),
        (c.collapses("b"), -10.0),
        (c.stays("a"), -5.0),
        (c.nearer("b", "a"), math.log(4)),
        (c.higher("reward_score", "a", "b", "score"), 2.0),
        (c.alike("true_quality", "a", "b", "quality"), -1.5),
        (c.later("b", "a"), 10.0),
        (c.above_sft("a"), -0.5),
        (c.above_sft("a", sign=-1), 0.5),
        (c.above_sft("b", "reward_score"), 0.5),
        (c.ratio("", "a", "b", lambda run: run.curve("score")[-1]), math.log(4)),
        (c.wins("a", "held_out"), 0.6),
        (c.wins("b", "held_out"), -0.3),
        (c.wins("b", "held_out", "reward_"), 0.7),
    ]
    for claim, expected in by_hand:
        assert claim.measure(seed) == pytest.approx(expected), claim.text
    assert (c.bias("a")(seed), c.error_before("a")(seed)) == (0.4, 0.5)
    # The last tenth is 18 and 19, the second one 2 and 3.
    assert c.long_change("true_quality")(seed) == 16.0


# ---- plan ---------------------------------------------------------------------------------------


def test_plan(study):
    """Five seeds, three of 10,000 steps, Chinese for four findings; a few arms at two rates."""
    scale = study.plan.Scale()
    jobs = study.plan.jobs(scale, list(study.arms.ARMS))
    counts = {}
    for job in jobs:
        counts.setdefault((job.world.lang, job.name), []).append(job.world.seed)
    for finding in study.findings.FINDINGS:
        for arm in finding.arms:
            expected = 3 if arm == study.plan.LONG else 5
            assert len(counts["en", arm]) == expected, (finding.id, arm)
            assert not finding.chinese or len(counts["zh", arm]) == 1, (finding.id, arm)
    assert {name for _, name in counts if "@" in name} == {
        f"{arm}@gentle" for arm in study.plan.TWO_RATES
    }
    assert len(jobs) == len({(job.world, job.name) for job in jobs})
    long = next(job for job in jobs if job.arm == study.plan.LONG)
    assert long.steps * scale.rollout // scale.minibatch == 10_000


def test_arms_differ_in_what_they_say(study):
    """Each is its preset but for one part; none has a learning rate of its own."""

    class World:
        entropy = 0.7

    for name, arm in study.arms.ARMS.items():
        parts = arm.parts(World(), 10, total_steps=5, learning_rate=1e-3, critic_learning_rate=1e-3)
        args = parts["args"]
        assert (args.learning_rate, args.critic_learning_rate) == (1e-3, 1e-3), name
        assert args.critic_pretrain_steps == (10 if arm.pretrained else 0), name
        plain = arm.preset(total_steps=5, learning_rate=1e-3)
        changed = [part for part in ("shaper", "advantage", "loss") if parts[part] != plain[part]]
        assert len(changed) == (2 if name == "kl_and_importance" else len(changed) and 1), name


def test_findings_are_measurable(study):
    """Every claim finds what it asks for in the records that the plan leaves."""
    names = {job.name for job in study.plan.jobs(study.plan.Scale(), list(study.arms.ARMS))}
    asked = set()

    class Asked(dict):
        def __contains__(self, name):
            asked.add(name)
            return False

    for finding in study.findings.FINDINGS:
        for claim in finding.claims:
            seed = study.statistics.Seed({"runs": Asked(), "facts": {"sft": {}}})
            assert study.statistics.measured(claim, [seed]) is None
    assert asked <= names


def test_a_claim_has_as_many_cells_as_its_table(study):
    for finding in study.findings.FINDINGS:
        for claim in finding.claims:
            line = study.page.row(claim, "open", finding.chinese, [])
            assert len(re.findall(r"(?<!\\)\|", line)) == (6 if finding.chinese else 5), line


# ---- runs ---------------------------------------------------------------------------------------


def invoke(study, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["secrets_study.py", *map(str, arguments)])
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of processes that pytest does not watch
    study.script.main()


def test_arms_are_assembled_and_one_comes_out_alike(study, tmp_path):
    """What breaks most easily of the whole study, which is marked slow."""
    scale = study.plan.QUICK
    jobs = study.plan.jobs(scale, list(study.arms.ARMS))
    home = tmp_path / str(jobs[0].world)
    study.running.preparing.prepare(jobs[0].world, scale, home)
    ready = study.running.measuring.load(jobs[0].world, home)
    for job in jobs:
        trainer = study.running.measuring.assemble(job, ready, scale, home / job.name)
        assert trainer.args.learning_rate == job.rate
    (job,) = (job for job in jobs if job.name == "critic_pretrained")
    once, again = (study.running.measuring.run(job, scale, home) for _ in range(2))
    assert len(once["curves"]["score"]) == scale.steps
    assert len(once["pretraining_value_loss"]) == scale.pretrain
    assert {**once, "seconds": 0} == {**again, "seconds": 0}


@pytest.mark.slow
def test_quick_study(study, monkeypatch, tmp_path, capsys):
    """All arms run; what is finished stays; what is missing is made again, and comes out alike."""
    call = ("--quick", "--output_dir", tmp_path, "--workers", 1)
    invoke(study, monkeypatch, *call)
    capsys.readouterr()
    page = (tmp_path / "study.md").read_text(encoding="utf-8")
    for finding in study.findings.FINDINGS:
        assert f"## {finding.id}\n" in page
        assert (tmp_path / f"images/study/{finding.id.lower()}.png").exists()
    before = json.loads((tmp_path / "results/en100.json").read_text())
    assert set(study.arms.ARMS) <= set(before["runs"])
    assert not [*tmp_path.glob("runs/*/*/checkpoint-*")]  # or what is made again would be read

    (tmp_path / "runs/en100/kl_0.05.json").unlink()
    invoke(study, monkeypatch, *call)
    assert "1/1 en100 kl_0.05" in capsys.readouterr().out
    after = json.loads((tmp_path / "results/en100.json").read_text())
    for record in (before, after):
        record.pop("wall_seconds")
        record["runs"]["kl_0.05"].pop("seconds")
    assert after == before

    with pytest.raises(SystemExit, match="another scale"):
        invoke(study, monkeypatch, "--output_dir", tmp_path)


def test_an_interrupted_run_is_not_kept(study, monkeypatch, tmp_path):
    """A trainer that Ctrl-C reached ends as others do, after fewer iterations."""
    job = study.plan.jobs(study.plan.QUICK, ["vanilla"])[0]
    trainer = SimpleNamespace(train=lambda **how: None, run=SimpleNamespace(interrupted=True))
    monkeypatch.setattr(study.running.measuring, "load", lambda *place: None)
    monkeypatch.setattr(study.running.measuring, "assemble", lambda *parts: trainer)
    with pytest.raises(RuntimeError, match="en100 vanilla was interrupted"):
        study.running._run((job, study.plan.QUICK, tmp_path))
    assert list(tmp_path.rglob("*.json")) == []


def test_quick_is_not_published(study, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        invoke(study, monkeypatch, "--quick", "--publish")
    assert "nothing to publish" in capsys.readouterr().err


# ---- what is published --------------------------------------------------------------------------


def test_page_is_of_the_records(study, root):
    records = study.running.read(study.script.RESULTS)
    assert (root / "docs/study.md").read_text(encoding="utf-8") == study.page.page(records)


def test_readme_is_of_the_records(study, root):
    text = (root / "README.md").read_text(encoding="utf-8")
    between = text.split(study.page.BEGIN)[1].split(study.page.END)[0]
    assert between.strip() == study.page.readme(study.running.read(study.script.RESULTS))


def test_pictures_are_of_the_records(study, root):
    from PIL import Image

    records = study.running.read(study.script.RESULTS)
    pictures = sorted((root / "docs/images/study").glob("*.png"))
    assert len(pictures) == 15
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.info["results"] == study.pictures.digest(records), path.name
