"""The page of a run: it loads nothing, texts stay texts, and missing files are named."""

import base64
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest

from mossrlhf import cli, run_report
from mossrlhf.checkpoint.folders import STATE
from mossrlhf.demo import write_samples
from mossrlhf.run_report import (
    RunFolder,
    plot_run,
    read_run,
    read_samples,
    run_warnings,
    write_report,
)

NASTY = (
    "<script>alert(1)</script></pre><img src=x onerror='alert(2)'>"
    '" onmouseover="alert(3)"><a href="https://example.org/">&lt;b&gt;</a> 你好 \u2028 <!--'
)
ALLOWED = (
    {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "h4", "nav", "a"}
    | {"section", "p", "div", "img", "pre", "table", "tr", "th", "td"}
)  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: tags, their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts, self.style = [], [], [], ""
        self.comments = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_comment(self, data):
        self.comments.append(data)

    def handle_data(self, data):
        if self.tags[-1:] == ["style"]:
            self.style += data
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def require_self_contained(page):
    """Fail if a browser would load anything for the page."""
    assert set(page.tags) <= ALLOWED
    assert not page.comments
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name == "src":
            assert value.startswith("data:image/png;base64,")
            assert base64.b64decode(value.split(",")[1], validate=True).startswith(b"\x89PNG")
        if name == "href":
            assert value.startswith("#")
            assert ("section", "id", value[1:]) in page.attributes
        assert name not in ("srcset", "action", "formaction", "background", "data", "poster")
    for word in ("url(", "@import", "expression", "image-set"):
        assert word not in page.style
    ((policy,),) = [
        [v for t, n, v in page.attributes if t == "meta" and n == "content" and "default-src" in v]
    ]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def entry(step, **more):
    numbers = {"reward/score_mean": step / 10, "kl/ref_per_sequence": 0.1 * step}
    return {"step": step, "response/distinct_2": 0.5, **numbers, **more}


def checkpoint(folder, step, history, settings=None):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    settings = settings or {"seed": 0, "kl_coef": 0.05}
    state = {"version": "0.1", "settings": settings, "history": history}
    (path / STATE).write_text(json.dumps(state))


def completions(folder, steps=(1, 2, 3, 4), text="fine"):
    rows = [
        {"step": s, "prompt": f"ask {i}", "completion": f"{text} {s}.{i}", "reward/model": s + i}
        for s in steps
        for i in range(3)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "completions.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def whole(tmp_path):
    """A run's folder with every file, and hostile texts in them."""
    folder = tmp_path / "run <b>"
    completions(folder, text=NASTY)
    checkpoint(folder, 2, [entry(1)])
    history = [entry(s) for s in range(1, 5)] + [{"step": 4, f"eval/{NASTY}/policy": 0.5}]
    checkpoint(folder, 4, history)
    (folder / "config.json").write_text(json.dumps({"lang": NASTY, "more": {"rate": 0.001}}))
    summary = {
        "interrupted": False,
        "versions": {"torch": "9.9", NASTY: "1"},
        "seconds": {"ppo": 3},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    answers = {"policy": f"ours {NASTY}", "reference": "**theirs**\n## Prompt 9\n\nmore"}
    write_samples(folder / "samples.md", "Samples", "two", [(NASTY, answers)] * 2)
    return folder


def test_page_loads_nothing_and_shows_texts_as_they_are(whole):
    pytest.importorskip("matplotlib")
    path = write_report(whole)
    assert path == whole / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    require_self_contained(page)
    assert page.tags.count("img") == 2  # curves and histograms
    assert page.text.count(f"{NASTY} 1.0") == 1
    assert page.text.count("ours " + NASTY.split(" \u2028")[0]) == 2
    for expected in (
        "more.rate",
        "0.001",
        "torch",
        "9.9",
        "kl_coef",
        "eval/",
        "Run report: run <b>",
    ):
        assert expected in page.text
    assert "Missing" not in page.text
    assert "No warnings." in page.text


HOSTILE = """"><script>alert(1)</script>
' onmouseover='alert(2)' <b>&amp; & {{ 7 * 7 }} {% raw %} <!-- ]]>
</pre></style></title>"""
PLACES = {
    "folder": "run",
    "run": "a",
    "reward": "model",
    "model": "policy",
    "metric": "policy/extra",
    "eval metric": "quality",
    "infinite metric": "loss",
    "prompt": "how ?",
    "completion": "so .",
    "option": "lang",
    "value": "en",
    "setting": "sampler",
    "version": "torch",
    "fault": "step-3",
}


def write_runs(parent, texts):
    """Two runs in a folder, with the texts of PLACES wherever a user's string may be."""
    folder = parent / texts["folder"]
    for run in (texts["run"], "b"):
        row = {"step": 1, "prompt": texts["prompt"], "completion": texts["completion"]}
        row[f"reward/{texts['reward']}"] = 1.5
        history = [
            entry(1, **{texts["metric"]: 0.5, texts["infinite metric"]: math.inf}),
            {"step": 1, f"eval/{texts['eval metric']}/win_rate": 0.5},
        ]
        checkpoint(folder / run, 1, history, settings={texts["setting"]: texts["setting"]})
        (folder / run / "completions.jsonl").write_text(json.dumps(row) + "\n")
        (folder / run / "faults" / texts["fault"]).mkdir(parents=True)
        checkpoint(folder / run, 2, None)  # damaged: a note names run and checkpoint
    (folder / "config.json").write_text(json.dumps({texts["option"]: {"x": texts["value"]}}))
    summary = {"interrupted": True, "versions": {texts["version"]: texts["version"]}}
    (folder / "summary.json").write_text(json.dumps(summary))
    prompt, completion = (
        "\n".join(f"> {line}" for line in texts[name].split("\n"))
        for name in ("prompt", "completion")
    )
    sample = f"## Prompt 1\n\n{prompt}\n\n**{texts['model']}**\n\n{completion}\n"
    (folder / "samples.md").write_text(sample)
    return folder


def elements(page):
    """Names of tags and attributes, and the attributes' values but for pictures and their texts."""
    values = {(t, n, v) for t, n, v in page.attributes if n not in ("src", "alt")}
    return set(page.tags), {(t, n) for t, n, _ in page.attributes}, values


@pytest.mark.parametrize("place", [*PLACES, "everywhere"])
def test_hostile_text_adds_no_element(tmp_path, monkeypatch, place):
    if place != "everywhere":  # drawing takes seconds, and a picture holds no HTML
        picture = {"png": base64.b64encode(b"\x89PNG").decode(), "notes": []}
        monkeypatch.setattr(run_report, "_picture", lambda *_: picture)
    hostile = dict.fromkeys(PLACES if place == "everywhere" else [place], HOSTILE)
    for name in hostile.keys() & {"folder", "run", "fault"}:
        hostile[name] = HOSTILE.replace("/", "\u2044")  # names of folders
    if "model" in hostile:
        hostile["model"] = HOSTILE.replace("\n", " ")  # a heading of samples.md
    harmless, page = (
        Page(write_report(write_runs(tmp_path / name, texts)).read_text(encoding="utf-8"))
        for name, texts in (("harmless", PLACES), ("hostile", {**PLACES, **hostile}))
    )
    require_self_contained(page)
    for found, expected in zip(elements(page), elements(harmless), strict=True):
        assert found <= expected
    for text in hostile.values():
        assert [line for line in text.split("\n") if line not in page.text] == []


def test_page_shows_responses_of_first_middle_and_last_iteration(whole):
    page = Page(write_report(whole).read_text(encoding="utf-8"))
    assert "responses of iterations 1, 3, 4" in page.text
    for step in (1, 3, 4):
        for i in range(3):
            assert f"iteration {step}: model {step + i}" in page.text
            assert f"{NASTY} {step}.{i}" in page.text
    assert f"{NASTY} 2.0" not in page.text


def test_read_samples_returns_what_the_recipes_wrote(whole):
    samples = read_samples(whole / "samples.md")
    assert len(samples) == 2
    prompt = "\n".join(NASTY.splitlines()).replace(" \n", "\n")
    assert samples[0].prompt == prompt
    assert samples[0].responses["reference"] == "**theirs**\n## Prompt 9\n\nmore"
    assert list(samples[0].responses) == ["policy", "reference"]


def test_page_names_missing_files(tmp_path):
    folder = tmp_path / "run"
    completions(folder)
    page = Page(write_report(folder, tmp_path / "elsewhere" / "page.html").read_text())
    require_self_contained(page)
    for name in ("config.json", "summary.json", "samples.md", "checkpoint-<step>/"):
        assert f"Missing: {name}:" in page.text
    assert "There is no history to plot" in page.text
    assert not (folder / "report.html").exists()


def test_damaged_file_leaves_the_rest_of_the_page(tmp_path):
    folder = tmp_path / "run"
    completions(folder)
    with (folder / "completions.jsonl").open("a") as file:
        file.write('{"step": 9}\n[1]\n{"step": 9, "completion": "lone \\ud800 half"}\n{"cut')
    checkpoint(folder, 1, [entry(1), entry(2)])
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / STATE).write_text('{"history')
    (folder / "config.json").write_text("{")
    (folder / "summary.json").write_text("[]")
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    require_self_contained(page)
    assert "lone ? half" in page.text
    for text in ("config.json: cannot be read", "summary.json: holds list", "checkpoint-7: cannot"):
        assert f"Missing: {text}" in page.text
    run = read_run(folder)
    assert [e["step"] for e in run.history] == [1, 2]
    assert len(run.completions) == 13


def test_metrics_that_are_not_numbers_are_left_out(tmp_path):
    """Null, texts, and numbers too large for an axis: a subclass may log them."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "run"
    odd = dict.fromkeys(["policy/moved_fraction", "response/truncated_fraction"])
    odd |= {"policy/learning_rate": 1e-3, "kl/ref_per_sequence": "far", "x": math.inf}
    checkpoint(folder, 2, [entry(1, **odd), entry(2, **odd), {"step": "three"}])
    rows = [
        {"step": 1, "completion": "a", "reward/model": x, "reward/fine": 0.5}
        for x in (1.0, 1e308, -1e308, "good")
    ]
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert page.tags.count("img") == 2
    assert "Numbers that are not finite were logged: x." in page.text


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run: .*is not a folder; pass a run's output_dir"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "model"):
        with pytest.raises(FileNotFoundError, match=r"run: .*completions\.jsonl.*output_dir"):
            write_report(folder)
    assert not [*tmp_path.glob("**/report.html")]


def test_several_runs_share_one_figure(tmp_path):
    pytest.importorskip("matplotlib")
    for name, more in (("a", {}), ("b", {"policy/collapsed": 1.0})):
        completions(tmp_path / name)
        history = [entry(s, **{"reward/true_quality/mean": 1.0 / s}, **more) for s in (1, 2)]
        checkpoint(tmp_path / name, 2, history)
    completions(tmp_path / "earlier-1")  # moved aside by the trainer: of another run
    figure = plot_run(tmp_path, tmp_path / "curves.png")
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["a", "b"]
    assert "True quality" in figure.axes[1].get_title(loc="left")
    assert (tmp_path / "curves.png").is_file()
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    require_self_contained(page)
    assert page.tags.count("img") == 3
    assert "2 runs: a, b" in page.text
    assert "b: Collapse was detected in 2 of the logged iterations, first in 1" in page.text
    assert "Missing: config.json" in page.text
    alone = plot_run(tmp_path / "a")
    assert not alone.legends


def test_page_of_a_trainer_run(tmp_path, root):
    pytest.importorskip("matplotlib")
    from transformers import GenerationConfig, LlamaForCausalLM

    from mossrlhf import ToyWorld, Trainer, TrainerConfig

    world = ToyWorld()
    trainer = Trainer(
        LlamaForCausalLM(world.model_config(hidden_size=16, num_layers=1)),
        reward=world.reward,
        train_dataset=world.prompts(8),
        processing_class=world.tokenizer(),
        generation_config=GenerationConfig(max_new_tokens=8),
        args=TrainerConfig(
            output_dir=str(tmp_path),
            total_steps=2,
            rollout_size=8,
            minibatch_size=4,
            disable_tqdm=True,
        ),
    )
    history = trainer.train()
    run = read_run(tmp_path)
    assert [e["step"] for e in run.history] == [e["step"] for e in history]
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    require_self_contained(page)
    assert page.tags.count("img") == 2
    assert run.completions[0]["completion"] in page.text
    assert "learning_rate" in page.text
    names = {}
    (block,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "report.md").read_text(), re.S)
    exec(block, names)
    names["look_at"](tmp_path, trainer)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (RunFolder(name="r", summary={"interrupted": True}), "was interrupted"),
        (RunFolder(name="r", faults=["step-3"]), "step-3 in faults/"),
        (
            RunFolder(
                name="r",
                history=[
                    entry(s, **{"policy/moved_fraction": 0.01, "policy/learning_rate": 1e-6})
                    for s in (1, 2, 3)
                ],
            ),
            "in 3 logged iterations in a row under 5%",
        ),
        (RunFolder(name="r", history=[entry(1, x=math.nan)]), "not finite were logged: x"),
        (
            RunFolder(name="r", history=[entry(7, **{"response/truncated_fraction": 0.75})]),
            "iteration 7 75% of the responses reached the length limit",
        ),
        (
            RunFolder(
                name="r",
                history=[
                    entry(
                        7,
                        **{"response/truncated_fraction": 0.1, "critic/explained_variance": -0.5},
                    )
                ],
            ),
            r"explains none of the variance of its targets \(-0.50\)",
        ),
    ],
)
def test_run_warnings_report_each_problem(run, expected):
    (found,) = run_warnings(run)
    assert re.search(expected, found)


def test_run_warnings_are_empty_for_a_healthy_run():
    well = {"policy/moved_fraction": 0.9, "policy/learning_rate": 1e-3, "policy/collapsed": 0.0}
    well |= {"response/truncated_fraction": 0.1, "critic/explained_variance": 0.5}
    paused = [entry(s, **{**well, "policy/moved_fraction": 0.0}) for s in (1, 2)]
    assert not run_warnings(RunFolder(name="r", history=[*paused, entry(3, **well), *paused]))


def test_command_line_prints_the_path_of_the_page(tmp_path, capsys):
    completions(tmp_path / "run")
    cli.main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").is_file()
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(tmp_path / "nowhere")])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("mossrlhf report: run: ")


def test_page_without_matplotlib_names_the_package_to_install(whole, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    page = Page(write_report(whole).read_text(encoding="utf-8"))
    require_self_contained(page)
    assert "img" not in page.tags
    assert page.text.count('pip install "mossrlhf[plot]"') == 2
