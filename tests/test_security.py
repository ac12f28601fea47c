"""No code that comes with data is run, and no path that comes with data is followed."""

import json
import os
import sys
from contextlib import contextmanager

import pytest
import torch
from bad_inputs.shop import Shop
from dangers import dangers
from safetensors.torch import save_file

from mossrlhf.checkpoint.folders import STATE
from mossrlhf.data import load_pairs, load_prompts, load_sft, stream_prompts
from mossrlhf.serialization import ShardError, Shards, with_checksum

FOLDERS = ("src", "examples", "benchmarks", "tools")

# ---- the source ---------------------------------------------------------------------------------


def found_below(root):
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    found = {
        str(path.relative_to(root)): said
        for path in files
        if (said := dangers(path.read_text(encoding="utf-8")))
    }
    return len(files), found


def test_no_source_runs_what_comes_with_data(root):
    count, found = found_below(root)
    assert count > 100
    assert found == {}


PLANTED = {
    "import pickle": "import pickle",
    "import os, dill": "import dill",
    "from cloudpickle import loads": "import of cloudpickle",
    "import torch\ntorch.load(path)": "torch.load(…) without weights_only=True",
    "import torch as t\nt.load(path, map_location='cpu')": "without weights_only=True",
    "from torch import load as read\nread(path)": "without weights_only=True",
    "import torch\ntorch.load(path, weights_only=flag)": "weights_only=flag",
    "import torch\ntorch.load(path, weights_only=False)": "weights_only=False",
    "import torch\ntorch.jit.load(path)": "code in a file",
    "import torch\ntorch.hub.load(name)": "code of a repository",
    "eval(text)": "eval(…)",
    "import builtins\nbuiltins.exec(text)": "exec(…)",
    "__import__(name)": "__import__(…)",
    "load(name, trust_remote_code=True)": "trust_remote_code=True",
    "load(name, trust_remote_code=args.trust)": "trust_remote_code=args.trust",
    "def load(name, trust_remote_code=True): pass": "trust_remote_code=True",
    "def load(name, *, trust_remote_code=True): pass": "trust_remote_code=True",
    "class Options:\n    trust_remote_code: bool = True": "trust_remote_code=True",
    "options = {'trust_remote_code': True}": "trust_remote_code=True",
    "options['trust_remote_code'] = True": "trust_remote_code set",
    "import yaml\nyaml.load(text, Loader=yaml.Loader)": "yaml.safe_load",
    "from yaml import unsafe_load\nunsafe_load(text)": "yaml.safe_load",
    "import numpy as np\nnp.load(path, allow_pickle=True)": "allow_pickle=True",
    "import numpy as np\nnp.load(path, None, True)": "allow_pickle by position",
    "import pandas as pd\npd.read_pickle(path)": "a pickle",
    "import subprocess\nsubprocess.run(line, shell=True)": "shell=True",
    "import os\nos.system(line)": "a shell",
    "from os import popen\npopen(line)": "a shell",
    "accelerator.load_state(folder)": "planted pickle",
    "accelerator.register_for_checkpointing(thing)": "accelerate pickles it",
}


@pytest.mark.parametrize("source", PLANTED)
def test_what_is_planted_is_found(tmp_path, source):
    """Alone, and in a file among others."""
    assert any(PLANTED[source] in said for said in dangers(source)), dangers(source)
    for folder in FOLDERS:
        (tmp_path / folder / "inner").mkdir(parents=True)
    (tmp_path / "tools" / "good.py").write_text("import json\n")
    (tmp_path / "src" / "inner" / "bad.py").write_text(f"import json\n{source}\n")
    count, found = found_below(tmp_path)
    assert (count, list(found)) == (2, [os.path.join("src", "inner", "bad.py")])


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import yaml\nyaml.safe_load(text)",
        "model.eval()\nre.compile(text)\ntorch.compile(model)",
        "import numpy as np\nnp.load(path)",
        "import subprocess\nsubprocess.run([name])",
        "kwargs.get('trust_remote_code')",
        "load(name, trust_remote_code=False)",
        "state = optimizer.load_state_dict(state)",
    ],
)
def test_what_is_harmless_is_let_be(source):
    assert dangers(source) == []


# ---- paths in data ------------------------------------------------------------------------------

MARK = "planted-outside"
_watched: list[list[str]] = []


def _notice(event, arguments):
    if not _watched or not event.startswith(("open", "os.", "shutil.", "glob.", "pathlib.")):
        return
    for argument in arguments:
        if isinstance(argument, (str, bytes, os.PathLike)) and MARK in os.fsdecode(argument):
            _watched[-1].append(f"{event}: {os.fsdecode(argument)}")


sys.addaudithook(_notice)  # there is no taking it away; it rests where nothing is watched


@contextmanager
def nothing_outside(folder):
    """Refuse that Python touches any path with the mark, or that what is there changes."""
    outside = folder / MARK
    outside.mkdir()
    (outside / "secret.jsonl").write_text('{"prompt": "secret"}\n')
    before = {path: path.read_bytes() for path in outside.iterdir()}
    _watched.append([])
    try:
        yield
    finally:
        touched = _watched.pop()
    assert touched == []
    assert {path: path.read_bytes() for path in outside.iterdir()} == before
    others = {path.name for path in folder.iterdir()}
    assert not {name for name in others if MARK in name and name != MARK}


def test_a_path_that_is_used_is_noticed(tmp_path):
    def read(folder):
        (folder / MARK / "secret.jsonl").read_text()

    def write(folder):
        (folder / MARK / "new").write_text("")

    def beside(folder):
        os.mkdir(folder / f"{MARK}-2")

    for number, work in enumerate((read, write, beside)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(AssertionError), nothing_outside(folder):
            work(folder)


def leading(folder):
    """Names that lead out of a folder below this one, relative and absolute."""
    return [f"../../{MARK}/secret.jsonl", str(folder / MARK / "secret.jsonl"), f"../{MARK}/new"]


def odd_records(folder):
    """Records whose every text is such a name."""
    return [
        {
            "prompt": name, "id": name, "path": name, "file_name": name, "image": name,
            "run_name": name, "output_dir": name, name: name,
        }
        for name in leading(folder)
    ]  # fmt: skip


def test_records_name_no_files(tmp_path):
    """What looks like the path of a file in a record stays a text, whoever reads it."""
    shop = Shop(tmp_path / "work")
    records = [{**record, "chosen": "a", "rejected": "b"} for record in odd_records(tmp_path)]
    with nothing_outside(tmp_path):
        path = shop.file("a.jsonl", records)
        for load in (load_prompts, load_pairs, load_sft):
            assert load(path)[0]["prompt"] == leading(tmp_path)[0]
            assert load(records)[1]["id"] == leading(tmp_path)[1]
        assert stream_prompts(path)[2]["prompt"] == leading(tmp_path)[2]


def test_columns_of_a_run_name_no_files(tmp_path):
    """Through rollouts, rewards, completions, evaluation, checkpoints and a resumed run."""
    shop = Shop(tmp_path / "work")
    seen = []

    def judge(*, completions, path):
        seen.extend(path)
        return [float(len(text)) for text in completions]

    judge.__name__ = f"../{MARK}/judge"
    parts = dict(reward=judge, train_dataset=odd_records(tmp_path))
    args = dict(output_dir=str(tmp_path / "work" / "run"), save_steps=1)
    with nothing_outside(tmp_path):
        shop.trainer(args=args, eval_dataset=odd_records(tmp_path), **parts).train()
        again = shop.trainer(args={**args, "total_steps": 2}, **parts)
        again.train(resume_from_checkpoint=True)
        again.evaluate(odd_records(tmp_path))
    assert set(seen) == set(leading(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"global_step": f"1/../../../{MARK}/checkpoint-1"},
        {"pretrained": f"../{MARK}", "global_step": 0},
        {"best_model_checkpoint": f"../../{MARK}", "best_metric": 1.0, "best_global_step": 1},
        {"best_global_step": f"../../{MARK}"},
    ],
)
def test_a_checkpoint_names_no_folders(tmp_path, changes):
    """What it says of steps and of the best leads nowhere: nothing is written or deleted there."""
    shop = Shop(tmp_path / "work")
    args = dict(output_dir=str(tmp_path / "work" / "run"), save_steps=1, save_total_limit=1)
    shop.trainer(args=args).train()
    path = tmp_path / "work" / "run" / "checkpoint-1"
    state = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps(with_checksum({**state, **changes})))
    with nothing_outside(tmp_path):
        again = shop.trainer(args={**args, "total_steps": 3})
        if "best_model_checkpoint" in changes:
            again.train(resume_from_checkpoint=True)
        else:
            with pytest.raises(ValueError, match="is damaged"):
                again.train(resume_from_checkpoint=True)
    assert sorted(p.name for p in (tmp_path / "work" / "run").glob("checkpoint-*")) == (
        ["checkpoint-3"] if "best_model_checkpoint" in changes else ["checkpoint-1"]
    )


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("where", ["..", ".", "./..", "deep/../..", "absolute"])
def test_an_index_names_no_file_outside(tmp_path, suffix, where):
    """Though there are weights where it leads to."""
    model, outside = tmp_path / "model", tmp_path / f"weights-{MARK}"
    for folder in (model / "deep", model / outside.name, outside):
        folder.mkdir(parents=True)
    for folder in (model / outside.name, outside):
        weights = {"lm_head.weight": torch.zeros(1)}
        save_file(weights, folder / "a.safetensors")
        torch.save(weights, folder / "a.bin")
    way = str(tmp_path) if where == "absolute" else where
    text = json.dumps({"weight_map": {"lm_head.weight": f"{way}/{outside.name}/a.{suffix}"}})
    name = "model" if suffix == "safetensors" else "pytorch_model"
    (model / f"{name}.{suffix}.index.json").write_text(text)
    with pytest.raises(ShardError, match=r"it names '.*', expected a file of weights beside it"):
        Shards(model)
