"""`stream_*`: what `load_*` reads, of a file larger than memory."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import GenerationConfig, LlamaForCausalLM, TrainingArguments

import mossrlhf
from mossrlhf import PPOMaxLoss, RewardModel, RewardTrainer, ToyWorld, Trainer, TrainerConfig
from mossrlhf.data import (
    DataError,
    LazyRecords,
    formats,
    load_pairs,
    load_prompts,
    load_sft,
    require_fitting_prompts,
    require_records,
    stream_pairs,
    stream_prompts,
    stream_sft,
)
from mossrlhf.sft_trainer import SFTTrainer

WORLD = ToyWorld()


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def path(tmp_path):
    return lines(tmp_path / "a.jsonl", [{"prompt": f"{i} 你好", "number": i} for i in range(100)])


def test_it_is_a_sequence_of_what_load_reads(path):
    records, expected = stream_prompts(path), load_prompts(path)
    assert isinstance(records, LazyRecords)
    assert len(records) == 100
    assert list(records) == [records[i] for i in range(100)] == expected
    assert records[-1] == expected[-1]
    assert expected[7] in records
    assert repr(records) == f"LazyRecords({str(path)!r}, 100 records)"
    with pytest.raises(IndexError):
        records[100]


@pytest.mark.parametrize("part", [slice(90, None), slice(None, None, -7), slice(5, 5)])
def test_slices_are_views(path, part):
    view = stream_prompts(path)[part]
    assert isinstance(view, LazyRecords)
    assert list(view) == load_prompts(path)[part]
    assert list(view[1:]) == load_prompts(path)[part][1:]


def test_records_of_one_access_are_not_those_of_another(path):
    records = stream_prompts(path)
    records[0]["prompt"] = "changed"
    assert records[0]["prompt"] == "0 你好"


@pytest.mark.parametrize(
    ("load", "stream", "name"),
    [
        (load_prompts, stream_prompts, "hh-rlhf/harmless-base.jsonl"),
        (load_pairs, stream_pairs, "hh-rlhf/harmless-base.jsonl"),
        (load_sft, stream_sft, "llama-factory/c4_demo.jsonl"),
    ],
)
@pytest.mark.filterwarnings("ignore:skipped:UserWarning")
def test_real_files_are_what_load_reads(shared, tmp_path, load, stream, name):
    """The part of HH around a pair with an empty answer: checking annotations makes it slow."""
    raw = (shared / "data" / name).read_bytes().split(b"\n")[-900:]
    path = tmp_path / "part.jsonl"
    path.write_bytes(b"\n".join(raw[:200]))
    assert list(stream(path, skip_bad=True)) == load(path, skip_bad=True)


@pytest.mark.parametrize(
    ("load", "stream"),
    [(load_prompts, stream_prompts), (load_pairs, stream_pairs), (load_sft, stream_sft)],
)
@pytest.mark.parametrize("name", ["alpaca_zh_demo", "dpo_en_demo", "ppo_train"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_format_is_read_alike(shared, tmp_path, load, stream, name):
    (file,) = (shared / "data").glob(f"*/{name}.json")
    path = lines(tmp_path / "a.jsonl", json.loads(file.read_text(encoding="utf-8")))

    def outcome(read, path):
        try:
            return list(read(path, skip_bad=True))
        except DataError as error:
            return str(error)

    assert outcome(stream, path) == outcome(load, path)


def test_windows_lines_blank_lines_and_marks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n\r\n \n{"prompt": "c"}'.encode())
    assert list(stream_prompts(path)) == [{"prompt": "a\u2028b"}, {"prompt": "c"}]


def test_bad_records_stop_it_or_are_left_out(tmp_path):
    good, bad = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}
    path = lines(tmp_path / "a.jsonl", [bad, good, bad, good])
    reason = "rejected is missing, expected the answer: a text, or messages"
    with pytest.raises(DataError) as error:
        stream_pairs(path)
    assert str(error.value) == f"{path}:1: {reason}; skip_bad=True leaves such records out"
    with pytest.warns(UserWarning, match="skipped") as caught:
        records = stream_pairs(path, skip_bad=True)
    assert [str(w.message) for w in caught] == [
        f"skipped 2 of 4 records; the first: {path}:1: {reason}"
    ]
    assert list(records) == [good, good]
    with pytest.raises(DataError, match=r":1: rejected is missing[^;]*$"):
        stream_pairs(lines(path, [bad, bad]), skip_bad=True)


def test_lists_of_utterances_warn_as_in_load(tmp_path):
    path = lines(tmp_path / "a.jsonl", [["Hi"], ["Hi", "Yes?"], ["Hi", "Yes?", "Help", "Sure"]])
    with pytest.warns(UserWarning, match="2 of 3 dialogues .*format=moss_dialogues"):
        assert stream_prompts(path)[1]["prompt"][0]["role"] == "assistant"
    records = stream_prompts(path, format=formats.moss_dialogues)
    assert records[1]["prompt"] == [{"role": "user", "content": "Hi"}]
    with pytest.warns(UserWarning, match="skipped 1 of 3"):
        assert stream_sft(path, skip_bad=True)[0]["response"] == "Yes?"


def test_a_list_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(' \n [{"prompt": "a"}]')
    with pytest.raises(DataError) as error:
        stream_prompts(path)
    assert str(error.value) == (
        f"{path}: it is one JSON list, which can only be read whole, expected one record per line; "
        "read it by load_…, or write it anew: jq -c '.[]' a.json > a.jsonl"
    )
    path.write_text('{"prompt": "a"}\n')
    assert list(stream_prompts(str(path))) == [{"prompt": "a"}]


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl"):
        stream_prompts(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match=r"a\.jsonl: empty, expected at least one record"):
        stream_prompts(tmp_path / "a.jsonl")


# --- the file changes ----------------------------------------------------------------------


@pytest.mark.parametrize("opened", [False, True])
def test_a_changed_file_is_noticed(path, opened):
    records = stream_prompts(path)
    if opened:
        assert records[5]["number"] == 5
    size = path.stat().st_size
    with path.open("a") as file:
        file.write('{"prompt": "late"}\n')
    with pytest.raises(DataError) as error:
        records[5]
    assert str(error.value) == (
        f"{path}: it changed after it was indexed ({size} bytes then, {size + 19} now), expected "
        "it to stay as it is; index it again"
    )
    assert len(stream_prompts(path)) == 101


def test_a_change_within_the_size_is_noticed(path):
    records, time = stream_prompts(path), path.stat().st_mtime_ns
    os.utime(path, ns=(time, time + 1_000_000))
    with pytest.raises(DataError, match="it changed after it was indexed"):
        records[5]


def test_a_removed_file_is_noticed(path):
    records = stream_prompts(path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: it was removed after it was indexed"):
        records[0]


def test_a_file_that_grows_under_the_index_is_noticed(path):
    def growing(record):
        with path.open("a") as file:
            file.write("\n")
        return record

    with pytest.raises(DataError, match="it changed after it was indexed"):
        stream_prompts(path, format=growing)


# --- processes and threads -----------------------------------------------------------------


def test_pickles_are_small_and_open_the_file_anew(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    records = stream_prompts(path.name)
    assert records[3]["number"] == 3
    copy = pickle.loads(pickle.dumps(records))
    monkeypatch.chdir("/")  # a path relative to where it was named
    assert list(copy) == list(records)
    assert len(pickle.dumps(records)) < 8 * 100 + 1000
    path.write_text("")
    with pytest.raises(DataError, match="changed"):
        copy[0]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_leaves_the_place_in_the_file_alone(path):
    records = stream_prompts(path)
    assert records[0]["number"] == 0
    descriptor = records.file._handles[os.getpid()].file.fileno()
    os.lseek(descriptor, 1, os.SEEK_SET)
    process = multiprocessing.get_context("fork").Process(target=lambda: records[99])
    process.start()
    process.join()
    assert process.exitcode == 0
    assert os.lseek(descriptor, 0, os.SEEK_CUR) == 1
    assert len(records.file._handles) == 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_a_data_loader_read_it(path):
    records = stream_prompts(path)
    assert records[0]["number"] == 0
    loader = DataLoader(
        records, batch_size=7, shuffle=True, num_workers=2, collate_fn=list,
        multiprocessing_context="fork",
    )  # fmt: skip
    for _ in range(2):
        seen = [record for batch in loader for record in batch]
        assert sorted(seen, key=lambda record: record["number"]) == load_prompts(path)


def test_threads_read_it(path):
    records, expected = stream_prompts(path), load_prompts(path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(records.__getitem__, list(range(100)) * 20)) == expected * 20
    assert list(records.file._handles) == [os.getpid()]


# --- memory --------------------------------------------------------------------------------

MEASURE = """
    import pathlib, sys
    from mossrlhf.data import load_pairs, stream_pairs

    def status(name):
        text = pathlib.Path("/proc/self/status").read_text()
        return int(text.split(name + ":")[1].split()[0]) * 1024

    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    records = stream_pairs(sys.argv[1])
    assert sum(1 for _ in records) == 25_000
    print(status("VmHWM") - before)
    loaded = load_pairs(sys.argv[1])
    print(status("VmHWM") - before)
    assert len(loaded) == len(records)
    assert all(lazy == record for lazy, record in zip(records, loaded))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measured by /proc")
def test_memory_is_bounded(tmp_path):
    """50 MB of pairs: an index of 8 bytes a record, and a line at a time."""
    path = tmp_path / "a.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(25_000):
            record = {
                "prompt": f"{i} " + "Hi there " * 80,
                "chosen": "a" * 700,
                "rejected": "b" * 600,
            }
            file.write(json.dumps(record) + "\n")
    assert path.stat().st_size > 50e6
    # In a process of its own, where annotations are not checked either, which takes its time.
    source = str(Path(mossrlhf.__file__).parent.parent)
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(path)], capture_output=True,
        text=True, check=True, env={**os.environ, "PYTHONPATH": source},
    )  # fmt: skip
    streamed, loaded = map(int, run.stdout.split())
    assert streamed < 8e6
    assert loaded > 50e6


# --- trainers ------------------------------------------------------------------------------


def policy():
    torch.manual_seed(0)
    return LlamaForCausalLM(WORLD.model_config(hidden_size=16, num_layers=1)).eval()


def arguments(tmp_path):
    return TrainingArguments(
        output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, save_strategy="no", logging_strategy="no", max_steps=2,
        per_device_train_batch_size=4,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _silence(monkeypatch):
    """transformers' trainer prints its logs where there is no progress bar."""
    monkeypatch.setattr("builtins.print", lambda *_, **__: None)


def test_trainers_take_it(tmp_path):
    tokenizer = WORLD.tokenizer()
    losses = []
    for read in (stream_sft, load_sft):
        records = read(lines(tmp_path / "sft.jsonl", WORLD.sft_examples(12)))
        trainer = SFTTrainer(policy(), arguments(tmp_path), records, tokenizer, max_length=64)
        losses.append(trainer.train().training_loss)
    for read in (stream_pairs, load_pairs):
        records = read(lines(tmp_path / "pairs.jsonl", WORLD.pairs(12)))
        model = RewardModel.from_language_model(policy())
        trainer = RewardTrainer(
            model, arguments(tmp_path), processing_class=tokenizer, train_dataset=records,
            eval_dataset=records[:4],
        )  # fmt: skip
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]


def test_ppo_takes_it(tmp_path):
    records = stream_prompts(lines(tmp_path / "prompts.jsonl", WORLD.prompts(12)))
    require_records(records, "train_dataset")
    args = TrainerConfig(
        output_dir=str(tmp_path / "run"), total_steps=1, rollout_size=4, minibatch_size=4,
        disable_tqdm=True, warmup_steps=0,
    )  # fmt: skip
    examples = stream_sft(lines(tmp_path / "sft.jsonl", WORLD.sft_examples(12)))
    trainer = Trainer(
        policy(), reward=WORLD.reward, train_dataset=records, args=args,
        processing_class=WORLD.tokenizer(), eval_dataset=records[:4], ptx_dataset=examples,
        loss=PPOMaxLoss(ptx_coef=1.0), generation_config=GenerationConfig(max_new_tokens=8),
    )  # fmt: skip
    (entry,) = trainer.train()
    assert entry["ptx/loss"] > 0
    assert trainer.run.state.global_step == 1


def test_prompts_that_do_not_fit_are_found(tmp_path, tokenizer):
    path = lines(tmp_path / "a.jsonl", [{"prompt": "Hi"}, {"prompt": "how are you? " * 9}])
    records = stream_prompts(path)
    require_fitting_prompts(records, tokenizer, 99)
    with pytest.raises(ValueError, match="1 of its longest prompts do not fit; that of record 1"):
        require_fitting_prompts(records, tokenizer, 9)
