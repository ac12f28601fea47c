"""Datasets of the hub's package in: what their file gives."""

import json

import pytest

from mossrlhf.data import load_pairs, load_prompts, load_sft


def test_splits_are_to_be_picked():
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
def test_datasets_are_what_their_file_is(shared, tmp_path, load, name, kind):
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
