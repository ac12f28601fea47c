"""benchmarks/scaling.py measures all points in turn, and its page says what was measured."""

import json
from importlib import import_module
from types import SimpleNamespace

import pytest

from mossrlhf.plotting import COLORS

ORDER = ("response", "vocabulary", "rollouts", "hidden", "processes")


@pytest.fixture(autouse=True)
def _on_the_path(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))


@pytest.fixture
def scaling():
    return import_module("scaling")


@pytest.fixture
def growth():
    return import_module("growth")


@pytest.fixture
def picture():
    pytest.importorskip("matplotlib")
    return import_module("growth_picture")


@pytest.fixture
def asked(scaling, growth, monkeypatch):
    """Stands in for the processes: figures that grow by known exponents; what was asked."""
    asked = []

    def run(command, **settings):
        words = command[2:]
        options = dict(zip([w[2:] for w in words[::2]], map(int, words[1::2]), strict=True))
        asked.append(options)
        tokens = options["rollouts"] * options["response"]
        round_of = sum(one == options for one in asked)
        # Of three rounds the second is the median; of the first and the third any mean is off.
        seconds = 0.001 * tokens * options["vocab"] ** 0.5 * {1: 0.5, 2: 1.0}.get(round_of, 5.0)
        seconds *= 1.25 if options.get("processes", 1) == 2 else 1
        shares = dict(zip(growth.STAGES, (0.5, 0.1, 0.1, 0.05, 0.25), strict=True))
        found = {
            "who": "mossrlhf",
            "median": seconds,
            "iter_s": [seconds] * 2,
            "stages": {name: share * seconds for name, share in shares.items()},
            "response_tokens": tokens,
            "peak_rss_mb": (growth.states(options) + 600e6 + 1000 * options["vocab"]) / 2**20,
            "start_rss_mb": 500,
            "tokenizer_mb": 300 * options["vocab"] / 2**20,
        }
        return SimpleNamespace(returncode=0, stderr="", stdout=f"noise\n{json.dumps(found)}\n")

    monkeypatch.setattr(scaling.subprocess, "run", run)
    return asked


@pytest.fixture
def figures(scaling, asked, tmp_path, capsys):
    assert scaling.main(["run", "--rounds", "3", "--out", str(tmp_path / "all.json")]) == 0
    capsys.readouterr()
    return json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))


def cells(lines, first):
    line = next(line for line in lines if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_exponents_by_hand(growth):
    assert growth.exponents([1, 2, 4], [3, 12, 48]) == pytest.approx((2, 2))
    # log₂ y = 0, 0, 1 over log₂ x = 0, 1, 2: slope ((-1)(0) + (0)(0) + (1)(1)) / 2 = 0.5.
    assert growth.exponents([1, 2, 4], [1, 1, 2]) == pytest.approx((0.5, 1))
    assert growth.fitted([{"x": 1, "a": 2}], "a") is None
    assert growth.fitted([{"x": 1, "a": 2}, {"x": 2, "a": -1}], "a") is None
    assert growth.fitted(
        [{"x": 1, "a": {"b": 8}}, {"failed": ""}, {"x": 2, "a": {"b": 4}}], "a", "b"
    )
    nested = [{"x": x, "a": {"b": 8 / x}} for x in (1, 2, 8)]
    assert growth.fitted(nested, "a", "b") == pytest.approx((-1, -1))


@pytest.mark.parametrize("layers", [1, 2])
def test_weights_are_those_of_the_models(growth, scaling, layers, tmp_path):
    options = {**scaling.SMALLEST, "vocab": 70, "hidden": 40, "layers": layers}
    work, iteration = import_module("iteration_work"), import_module("ppo_iteration")
    args = work.parse(scaling.words_of(options))
    trainer = iteration.make_trainer(args, str(tmp_path), work.Stopwatch())
    models = {
        "policy": trainer.policy,
        "ref_model": trainer.ref_model,
        "critic": trainer.critic,
        "reward": trainer.rewards.models()[0],
    }
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert growth.weights(options) == counts
    optimizers = trainer.engine.optimizers.values()
    trained = sum(p.numel() for o in optimizers for g in o.param_groups for p in g["params"])
    assert trained == counts["policy"] + counts["critic"]
    assert growth.states(options) == 4 * (sum(counts.values()) + 3 * trained)


def test_points_take_turns_and_shared_ones_are_measured_once(scaling, asked, figures):
    assert len(asked) == 3 * 16
    assert asked[:16] == asked[16:32] == asked[32:]
    assert all(one not in asked[:i] for i, one in enumerate(asked[:16]))
    middle = scaling.command_of(scaling.MIDDLE)
    sharing = [name for name, p in figures["axes"].items() if middle in [q["point"] for q in p]]
    assert sharing == ["vocabulary", "rollouts", "hidden"]
    assert {len(point["runs"]) for point in figures["points"].values()} == {3}
    assert {o["prompt"] for o in scaling.AXES["response"].values()} == {8}
    processes = list(scaling.AXES["processes"].values())
    assert [(o["processes"], o["threads"], o["rollouts"]) for o in processes] == [
        (1, 1, 16),
        (2, 1, 16),
    ]


def test_figures_are_kept_after_every_round_and_name_no_path(scaling, asked, tmp_path, monkeypatch):
    out = tmp_path / "kept.json"
    inner, count = scaling.alone, len(scaling.QUICK_AXES["response"])

    def stopped(options):
        if len(asked) == 2 * count + 1:
            raise KeyboardInterrupt
        return inner(options)

    monkeypatch.setattr(scaling, "alone", stopped)
    words = ["run", "--quick", "--only", "response", "--rounds", "3", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        scaling.main(words)
    text = out.read_text(encoding="utf-8")
    kept = json.loads(text)
    assert [len(point["runs"]) for point in kept["points"].values()] == [2] * count
    assert str(tmp_path) not in text
    assert str(scaling.ROOT) not in text
    assert kept["commands"] == [
        "python benchmarks/scaling.py run --rounds 3 --only response --quick"
    ]
    assert kept["device"]["type"] == "cpu"
    assert kept["versions"]["torch"]


def test_an_axis_anew_leaves_the_others(scaling, asked, figures, tmp_path):
    out = tmp_path / "all.json"
    middle = scaling.command_of(scaling.MIDDLE)
    scaling.main(["run", "--rounds", "1", "--only", "vocabulary", "--out", str(out)])
    anew = json.loads(out.read_text(encoding="utf-8"))
    counts = {name: len(point["runs"]) for name, point in anew["points"].items()}
    vocabulary = {point["point"] for point in anew["axes"]["vocabulary"]}
    assert counts == {name: 1 if name in vocabulary else 3 for name in figures["points"]}
    assert middle in vocabulary
    scaling.main(["run", "--rounds", "2", "--more", "--out", str(out)])
    more = json.loads(out.read_text(encoding="utf-8"))
    assert {name: len(p["runs"]) for name, p in more["points"].items()} == {
        name: count + 2 for name, count in counts.items()
    }
    assert len(more["commands"]) == 3
    assert list(more["axes"]) == list(ORDER)


def test_figures_of_another_machine_are_not_added_to(scaling, asked, figures, tmp_path):
    out = tmp_path / "all.json"
    before = json.dumps({**figures, "threads": figures["threads"] + 1})
    out.write_text(before, encoding="utf-8")
    with pytest.raises(SystemExit, match="another threads"):
        scaling.main(["run", "--only", "hidden", "--out", str(out)])
    assert out.read_text(encoding="utf-8") == before
    assert len(asked) == 3 * 16


def test_the_table_by_hand(growth, figures):
    lines = growth.lines_of(figures)
    # Seconds grow with the tokens, and with √V; stages and iteration alike.
    assert cells(lines, "response length")[:4] == ["32–256", *["1.00 / 1.00"] * 3]
    assert cells(lines, "response length")[5] == "≤ 1.05: met / met"
    assert cells(lines, "vocabulary")[1:4] == ["0.50 / 0.50"] * 3
    assert cells(lines, "hidden size")[1] == "0.00 / 0.00"
    assert cells(lines, "hidden size")[5] == "–"
    # 16 · 64 tokens: 1.024 · √8192 = 92.682 s; halves, tenths … of it. Tokens a second: 11.05.
    # Weights: 2·(2·8192·256 + m) + 2·(8192·256 + m + 256), where m, the rest of a backbone, is
    # 2·(4·256² + 3·256·682 + 512) + 256: 18.876 million, of which half are trained and have three
    # numbers more each: 188.76 MB. The rest: 600 MB and 1,000 bytes a word.
    assert cells(lines, "vocabulary 8,192") == [
        "92.682", "46.341", "9.268", "9.268", "4.634", "23.170", "11", "797", "189", "608",
    ]  # fmt: skip
    text = "\n".join(lines)
    # 600 + 32 and 600 + 151.936 MB; without 9.6 and 45.58 MB of words 622.4 and 706.36.
    assert "goes from 632 to 752 MB: +19.0% (goal: at most 10%, **missed**)" in text
    assert (
        "tokenizer takes 10 and 46 MB; without it the rest goes from 622 to 706 MB (+13.5%)" in text
    )
    # 16 · 128 tokens: 2.048 · √32000 = 366.36 s; 32 rollouts in 1.25 times as long.
    assert "from 0.04 rollouts a second, two from 0.07: 1.60 times as many" in text
    assert "Medians of 3 rounds; `python benchmarks/scaling.py run --rounds 3`." in text


def test_goals_are_missed_by_what_is_beyond_them(growth, figures):
    last = figures["axes"]["response"][-1]["point"]
    for run in figures["points"][last]["runs"]:
        run["median"] *= 1.05  # over the last two: 1 + log₂ 1.05 = 1.07; over all: 1.02
    assert cells(growth.lines_of(figures), "response length")[1] == "1.02 / 1.07"
    assert cells(growth.lines_of(figures), "response length")[5] == "≤ 1.05: met / **missed**"
    two = figures["axes"]["processes"][1]["point"]
    for run in figures["points"][two]["runs"]:
        run["median"] *= 1.01
    assert "1.58 times as many (goal: at least 1.6, **missed**)" in "\n".join(
        growth.lines_of(figures)
    )


def test_a_response_is_as_long_as_it_was(growth, figures):
    for point in figures["axes"]["response"]:
        for run in figures["points"][point["point"]]["runs"]:
            run["response_tokens"] /= 2
    assert [row["x"] for row in growth.rows(figures)["response"]] == [16, 32, 64, 128]
    assert [row["x"] for row in growth.rows(figures)["rollouts"]] == [4, 8, 16, 32, 64]


def test_a_point_that_fails_is_said_to(
    scaling, growth, picture, tmp_path, asked, monkeypatch, capsys
):
    inner = scaling.subprocess.run

    def run(command, **settings):
        done = inner(command, **settings)
        return SimpleNamespace(**outcomes.pop(0)) if asked[-1]["vocab"] == 128 else done

    outcomes = [
        {"returncode": -9, "stdout": "", "stderr": ""},
        {"returncode": 1, "stdout": "", "stderr": "Traceback\nError: no /home/someone/file"},
    ]
    monkeypatch.setattr(scaling.subprocess, "run", run)
    words = [
        "run",
        "--quick",
        "--only",
        "vocabulary",
        "rollouts",
        "--out",
        str(tmp_path / "a.json"),
    ]
    assert scaling.main([*words, "--rounds", "2"]) == 1
    said = capsys.readouterr().out
    assert "killed by signal 9" in said
    assert "| vocabulary 128 | absent: Error: no … | " in said
    assert cells(said.splitlines(), "vocabulary")[1] == "–"
    assert cells(said.splitlines(), "vocabulary")[5] == "≤ 1.05: not measured"


def test_a_quick_run_of_one_axis(scaling, picture, asked, tmp_path, capsys):
    out = tmp_path / "quick" / "figures.json"
    assert scaling.main(["run", "--quick", "--only", "hidden", "--out", str(out)]) == 0
    assert [one["hidden"] for one in asked] == [32, 64]
    assert {one["iters"] for one in asked} == {2}
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "its figures mean nothing" in capsys.readouterr().out
    assert scaling.parse(["run", "--quick"]).out == scaling.QUICK_RESULTS
    assert scaling.parse(["run"]).out == scaling.RESULTS
    assert {len(points) for points in scaling.QUICK_AXES.values()} == {2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["table", "--quick"], "it measures nothing"),
        (["run", "--rounds", "0"], "expected 1 or more"),
    ],
)
def test_options_that_do_not_fit(scaling, words, said, capsys):
    with pytest.raises(SystemExit):
        scaling.main(words)
    assert said in capsys.readouterr().err


def test_no_table_without_figures(scaling, tmp_path):
    with pytest.raises(SystemExit, match="no figures in"):
        scaling.main(["table", "--out", str(tmp_path / "none.json")])


def test_table_writes_page_and_picture(scaling, growth, picture, figures, tmp_path):
    page, drawn = tmp_path / "page.md", tmp_path / "scaling.png"
    page.write_text(f"before\n{growth.MARKS[0]}\nold\n{growth.MARKS[1]}\nafter\n", encoding="utf-8")
    words = ["table", "--out", str(tmp_path / "all.json"), "--page", str(page)]
    assert scaling.main([*words, "--picture", str(drawn)]) == 0
    once = page.read_text(encoding="utf-8")
    assert once.startswith(f"before\n{growth.MARKS[0]}\n")
    assert once.endswith(f"\n{growth.MARKS[1]}\nafter\n")
    assert "old" not in once
    assert "](images/scaling.png)" in once
    assert growth.page_of(once, figures) == once
    assert 1000 < drawn.stat().st_size < 300_000


def test_the_picture_has_the_figures(picture, growth, figures):
    drawn = picture.draw(figures, None)
    panels = {axes.get_title(loc="left"): axes for axes in drawn.axes}
    assert len(panels) == 10
    found = growth.rows(figures)
    for axis, (name, unit) in growth.AXES.items():
        speeds = axis == "processes"
        upper = panels[f"{'Speed' if speeds else 'Time'} by {name}"]
        lower = panels[f"Memory by {name}"]
        wanted = "rollouts" if speeds else "seconds"
        xs = [row["x"] for row in found[axis]]
        assert list(upper.lines[0].get_xdata()) == xs
        assert list(upper.lines[0].get_ydata()) == [row[wanted] for row in found[axis]]
        assert list(lower.lines[2].get_ydata()) == [row["rest"] for row in found[axis]]
        for axes in (upper, lower):
            assert axes.get_xscale() == axes.get_yscale() == "log"
            assert axes.get_xlabel() == unit
            assert axes.get_ylabel()
            looks = [(line.get_color(), line.get_ls(), line.get_marker()) for line in axes.lines]
            assert len(set(looks)) == len(looks)
            assert all(color in (*COLORS, "#999999") for color, *_ in looks)
    texts = [text.get_text() for text in panels["Time by vocabulary"].get_legend().get_texts()]
    assert texts == [
        "iteration: 0.50 / 0.50",
        "drawing: 0.50 / 0.50",
        "learning: 0.50 / 0.50",
        "exponent 1",
    ]


def test_the_page_has_the_kept_figures(scaling, growth):
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert page.index("\n## Scaling\n") < page.index(growth.MARKS[0])
    assert page.index(growth.MARKS[0]) < page.index(growth.MARKS[1])
    if not scaling.RESULTS.is_file():
        assert "\n".join(growth.MARKS) in page
        pytest.skip("nothing measured is kept yet")
    figures = json.loads(scaling.RESULTS.read_text(encoding="utf-8"))
    assert not figures["quick"]
    assert growth.page_of(page, figures) == page
    assert scaling.PICTURE.stat().st_size < 300_000
