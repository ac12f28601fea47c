"""Readers: files, hub datasets and sequences, into memory and lazily."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
import types
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


def test_json_and_json_lines_read_alike(tmp_path):
    records = [{"prompt": "a"}, {"prompt": "b"}]
    array = tmp_path / "a.json"
    array.write_text(json.dumps(records, indent=1), encoding="utf-8")
    assert load_prompts(array) == load_prompts(str(array)) == records
    assert load_prompts(lines(tmp_path / "b.jsonl", records)) == records
    assert load_prompts(lines(tmp_path / "c.json", records)) == records
    assert len(load_prompts(lines(tmp_path / "d.jsonl", [["a"], ["b", "c", "d"]]))) == 2


def test_byte_order_mark_windows_lines_and_unicode_line_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n\r\n{"prompt": "c\x85d"}\r\n'.encode())
    assert load_prompts(path) == [{"prompt": "a\u2028b"}, {"prompt": "c\x85d"}]


def test_skip_bad_raises_where_all_are_bad():
    with pytest.raises(DataError, match=r"records\[0\]"):
        load_pairs([{"prompt": "a"}], skip_bad=True)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.json", b"", "a.json: empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: empty"),
        ("a.json", b"[]", "a.json: empty"),
        ("a.json", b'[{"prompt": "a"},]', "a.json: record 1: malformed JSON"),
        ("a.json", b'{\n"prompt": "a"\n}', "a.json:1: malformed JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', "a.jsonl:3: malformed JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "a.jsonl:2: not UTF-8 .byte 0xe9"),
        ("a.json", b'[{"prompt": "\xe9"}]', "a.json: record 0: not UTF-8 .byte 0xe9 at offset 12"),
        ("a.json", '{"prompt": "a"}'.encode("utf-16"), "a.json:1: not UTF-8"),
    ],
)
def test_broken_files_name_place_and_reason(tmp_path, name, data, reason):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=reason):
        load_prompts(path)


def test_broken_lines_can_be_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": \n{"prompt": "\xe9"}\n{"prompt": "a"}\n')
    with pytest.warns(UserWarning, match="skipped 2 of 3"):
        assert load_prompts(path, skip_bad=True) == [{"prompt": "a"}]


def test_missing_files_and_wrong_sources():
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.json"):
        load_prompts("nowhere.json")
    with pytest.raises(TypeError, match="splits"):
        load_prompts({"train": [{"prompt": "a"}]})


def test_hub_dataset_errors_name_split_and_row(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [{"prompt": "a"}, {"prompt": ""}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"some/prompts\[test\]\[1\]"):
        load_prompts("some/prompts", split="test")
    assert asked == [("some/prompts", "test")]


def test_missing_datasets_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"there is no file 'some/prompts'.*pip install"):
        load_prompts("some/prompts")


@pytest.mark.parametrize(
    ("load", "name", "count"),
    [
        (load_prompts, "hh-rlhf/harmless-base.jsonl", 1900),
        (load_prompts, "llama-factory/dpo_en_demo.json", 250),
        (load_prompts, "llama-factory/alpaca_zh_demo.json", 1000),
        (load_pairs, "llama-factory/dpo_en_demo.json", 250),
        (load_pairs, "llama-factory/dpo_zh_demo.json", 250),
        (load_sft, "llama-factory/dpo_zh_demo.json", 250),
        (load_sft, "llama-factory/alpaca_en_demo.json", 999),
        (load_sft, "llama-factory/alpaca_zh_demo.json", 1000),
        (load_sft, "llama-factory/c4_demo.jsonl", 300),
    ],
)
def test_real_files_are_read_whole(shared, load, name, count):
    assert len(load(shared / "data" / name)) == count


def test_real_hh_pairs_keep_every_word(shared):
    path = shared / "data" / "hh-rlhf" / "harmless-base.jsonl"
    with pytest.warns(UserWarning, match=r"skipped 4 of 1900 .*jsonl:1069: chosen is ''"):
        pairs = load_pairs(path, skip_bad=True)
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    empty = {1069, 1094, 1379, 1720}
    raw = [record for number, record in enumerate(raw, start=1) if number not in empty]
    for pair, record in zip(pairs, raw, strict=True):
        roles = [turn["role"] for turn in pair["prompt"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        for side in ("chosen", "rejected"):
            said = " ".join([turn["content"] for turn in pair["prompt"]] + [pair[side]])
            whole = record[side].replace("\n\nHuman:", " ").replace("\n\nAssistant:", " ")
            assert said.split() == whole.split()


@pytest.mark.parametrize("name", ["ppo_train.json", "ppo_valid.json"])
def test_real_moss_dialogues_start_with_the_user(shared, name):
    path = shared / "data" / "moss-rlhf" / name
    with pytest.warns(UserWarning, match="20 of 31 dialogues start with the assistant"):
        assert len(load_prompts(path)) == 31
    records = load_prompts(path, format=formats.moss_dialogues)
    assert len(records) == 31
    assert all(record["prompt"][0]["role"] == "user" for record in records)
    with pytest.warns(UserWarning, match="skipped 11 of 31"):
        assert len(load_sft(path, skip_bad=True)) == 20


def test_dataset_dicts_are_refused():
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list([{"prompt": "a"}])
    for splits in (
        datasets.DatasetDict(test=part, train=part),
        datasets.IterableDatasetDict(test=part.to_iterable_dataset()),
    ):
        with pytest.raises(TypeError) as error:
            load_prompts(splits)
        assert str(error.value) == (
            f"source: got a {type(splits).__name__} with keys {list(splits)}, expected a path, a "
            "hub name or records; pick one of its splits: source['test']"
        )
    with pytest.raises(TypeError, match="pick one of its splits, or wrap a record in a list"):
        load_prompts({"prompt": "a"})


@pytest.mark.parametrize("kind", ["map", "iterable"])
@pytest.mark.parametrize(
    ("load", "name"),
    [
        (load_pairs, "hh-rlhf/harmless-base.jsonl"),
        (load_prompts, "llama-factory/dpo_zh_demo.json"),
        (load_pairs, "llama-factory/dpo_en_demo.json"),
        (load_sft, "llama-factory/alpaca_en_demo.json"),
        (load_sft, "llama-factory/c4_demo.jsonl"),
    ],
)
@pytest.mark.filterwarnings("ignore:skipped 4 of 1900:UserWarning")
def test_hub_datasets_equal_their_files(shared, tmp_path, load, name, kind):
    datasets = pytest.importorskip("datasets")
    path = shared / "data" / name
    # Only the first part of it: the checks of types in tests make reading slow.
    raw = path.read_text(encoding="utf-8")
    raws = [json.loads(x) for x in raw.splitlines()] if path.suffix == ".jsonl" else json.loads(raw)
    part = tmp_path / "part.jsonl"
    part.write_text("".join(json.dumps(record) + "\n" for record in raws[:200]))
    dataset = datasets.Dataset.from_list(raws[:200])
    if kind == "iterable":
        dataset = dataset.to_iterable_dataset()
    assert load(dataset) == load(part)


def test_stream_is_a_sequence_equal_to_load(path):
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
def test_stream_slices_are_views(path, part):
    view = stream_prompts(path)[part]
    assert isinstance(view, LazyRecords)
    assert list(view) == load_prompts(path)[part]
    assert list(view[1:]) == load_prompts(path)[part][1:]


def test_stream_parses_a_new_record_on_each_access(path):
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
def test_stream_equals_load_on_real_files(shared, tmp_path, load, stream, name):
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
def test_stream_equals_load_in_every_format(shared, tmp_path, load, stream, name):
    (file,) = (shared / "data").glob(f"*/{name}.json")
    path = lines(tmp_path / "a.jsonl", json.loads(file.read_text(encoding="utf-8")))

    def outcome(read, path):
        try:
            return list(read(path, skip_bad=True))
        except DataError as error:
            return str(error)

    assert outcome(stream, path) == outcome(load, path)


def test_stream_accepts_windows_lines_blank_lines_and_marks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n\r\n \n{"prompt": "c"}'.encode())
    assert list(stream_prompts(path)) == [{"prompt": "a\u2028b"}, {"prompt": "c"}]


def test_stream_raises_at_bad_records_or_skips_them(tmp_path):
    good, bad = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}
    path = lines(tmp_path / "a.jsonl", [bad, good, bad, good])
    reason = "rejected is missing, expected a response: a string, or messages"
    with pytest.raises(DataError) as error:
        stream_pairs(path)
    assert str(error.value) == f"{path}:1: {reason}; skip_bad=True skips such records"
    with pytest.warns(UserWarning, match="skipped") as caught:
        records = stream_pairs(path, skip_bad=True)
    assert [str(w.message) for w in caught] == [
        f"skipped 2 of 4 records; the first: {path}:1: {reason}"
    ]
    assert list(records) == [good, good]
    with pytest.raises(DataError, match=r":1: rejected is missing[^;]*$"):
        stream_pairs(lines(path, [bad, bad]), skip_bad=True)


def test_stream_warns_of_moss_prompts_like_load(tmp_path):
    path = lines(tmp_path / "a.jsonl", [["Hi"], ["Hi", "Yes?"], ["Hi", "Yes?", "Help", "Sure"]])
    with pytest.warns(UserWarning, match="2 of 3 dialogues .*format=moss_dialogues"):
        assert stream_prompts(path)[1]["prompt"][0]["role"] == "assistant"
    records = stream_prompts(path, format=formats.moss_dialogues)
    assert records[1]["prompt"] == [{"role": "user", "content": "Hi"}]
    with pytest.warns(UserWarning, match="skipped 1 of 3"):
        assert stream_sft(path, skip_bad=True)[0]["response"] == "Yes?"


def test_stream_indexes_lines_and_lists_alike(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n{"prompt": "b"}')
    records = stream_prompts(path)
    assert (records.offsets.tolist(), records.sizes.tolist()) == ([0, 21], [20, 15])
    path = tmp_path / "a.json"
    path.write_text(' \n [{"prompt": "a", "b": "],[\\""},\n {"prompt": "b", "c": [{}, []]}] \n')
    records = stream_prompts(path)
    assert (records.offsets.tolist(), records.sizes.tolist()) == ([4, 34], [29, 32])
    assert list(records) == list(records[::-1])[::-1] == load_prompts(path)
    assert records[1] == {"prompt": "b", "c": [{}, []]}
    assert list(pickle.loads(pickle.dumps(records[1:]))) == [records[1]]


@pytest.mark.parametrize(
    "text", ['["a"]["b"]', '["a"]}', '{"a"]', '["a"}', '["a", "b', '["a"', "[", '["a\\"]', "[[]"]
)
def test_stream_refuses_lists_that_do_not_end(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    for read in (load_prompts, stream_prompts):
        with pytest.raises(DataError, match=r"a\.json:( record \d:|1:)? ?malformed JSON"):
            read(path)


def test_bad_elements_of_a_list_are_skipped(tmp_path):
    path = tmp_path / "a.json"
    bad = b'{"prompt": NaN}, {"a": }, , {"prompt": "\xe9"}'
    path.write_bytes(b'[{"prompt": "a"}, ' + bad + b', {"prompt": "b"}]')
    for read in (load_prompts, stream_prompts):
        with pytest.warns(UserWarning, match="skipped 4 of 6 records; the first: .*record 1: NaN"):
            assert list(read(path, skip_bad=True)) == [{"prompt": "a"}, {"prompt": "b"}]


def test_stream_refuses_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl"):
        stream_prompts(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match=r"a\.jsonl: empty, expected at least one record"):
        stream_prompts(tmp_path / "a.jsonl")


@pytest.mark.parametrize("opened", [False, True])
def test_stream_notices_a_changed_file(path, opened):
    records = stream_prompts(path)
    if opened:
        assert records[5]["number"] == 5
    size = path.stat().st_size
    with path.open("a") as file:
        file.write('{"prompt": "late"}\n')
    with pytest.raises(DataError) as error:
        records[5]
    assert str(error.value) == (
        f"{path}: it changed after it was indexed ({size} bytes then, {size + 19} now); index "
        "it again"
    )
    assert len(stream_prompts(path)) == 101


def test_stream_notices_a_change_of_equal_size(path):
    records, time = stream_prompts(path), path.stat().st_mtime_ns
    os.utime(path, ns=(time, time + 1_000_000))
    with pytest.raises(DataError, match="it changed after it was indexed"):
        records[5]


def test_stream_notices_a_removed_file(path):
    records = stream_prompts(path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: it was removed after it was indexed"):
        records[0]


def test_stream_notices_a_file_that_grows_while_indexed(path):
    def growing(record):
        with path.open("a") as file:
            file.write("\n")
        return record

    with pytest.raises(DataError, match="it changed after it was indexed"):
        stream_prompts(path, format=growing)


def test_stream_pickles_are_small_and_reopen_the_file(path, monkeypatch):
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
def test_stream_works_in_data_loader_workers(path):
    records = stream_prompts(path)
    assert records[0]["number"] == 0
    loader = DataLoader(
        records, batch_size=7, shuffle=True, num_workers=2, collate_fn=list,
        multiprocessing_context="fork",
    )  # fmt: skip
    for _ in range(2):
        seen = [record for batch in loader for record in batch]
        assert sorted(seen, key=lambda record: record["number"]) == load_prompts(path)


def test_stream_works_in_threads(path):
    records, expected = stream_prompts(path), load_prompts(path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(records.__getitem__, list(range(100)) * 20)) == expected * 20


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
def test_stream_memory_is_bounded(tmp_path):
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


def test_sft_and_reward_trainers_accept_streams(tmp_path):
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


def test_ppo_trainer_accepts_streams(tmp_path):
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


def test_fit_check_reads_streams(tmp_path, tokenizer):
    path = lines(tmp_path / "a.jsonl", [{"prompt": "Hi"}, {"prompt": "how are you? " * 9}])
    records = stream_prompts(path)
    require_fitting_prompts(records, tokenizer, 99)
    with pytest.raises(ValueError, match="1 of its longest prompts do not fit; that of record 1"):
        require_fitting_prompts(records, tokenizer, 9)
