"""Weight diffs: recovered bit for bit, and everything that must be refused."""

import json
import math
import shutil

import pytest
import released
import torch
from safetensors.torch import load_file, save_file

from mossrlhf.serialization import ShardError, Shards
from mossrlhf.weight_diff import CHECKSUMS, DiffError, diff, make_diff, recover
from mossrlhf.weight_diff.__main__ import main
from mossrlhf.weight_diff.diff import ShardWriter

KINDS = {"reward": torch.ones(1, 16), "sft": None, "policy": None}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(diff, "MOST_WAITING", 4000)
    monkeypatch.setattr(diff, "LEAST_WAITING", 4000)


def tensors(folder):
    shards = Shards(folder)
    return {key: shards[key].clone() for key in shards}


def alike(left, right):
    assert left.keys() == right.keys()
    return all(diff._same(left[key], right[key]) for key in left)


def folders(tmp_path, kind="sft", dtype=torch.float32, related=True, **layout):
    """Raw weights, and tuned ones: slightly different, or of another seed."""
    raw, tuned = released.llama(0, dtype), released.llama(0 if related else 1, dtype)
    if related:
        for p in tuned.parameters():
            p.data += (0.01 * torch.randn_like(p.float())).to(dtype)
    released.write(tmp_path / "raw", raw, **layout)
    head = KINDS[kind]
    head = None if head is None else head.to(dtype)
    # Keys are in other files than those of raw weights and diff: their order must not matter.
    state = released.write(tmp_path / "tuned", tuned, head, shards=2)
    (tmp_path / "tuned" / "tokenizer.json").write_text("{}")
    return tmp_path / "raw", tmp_path / "tuned", state


def there_and_back(tmp_path, kind, raw, tuned):
    notes = make_diff(raw, tuned, tmp_path / "diff", kind, progress=False)
    total = recover(raw, tmp_path / "diff", tmp_path / "back", kind, progress=False)
    return notes, total, tensors(tmp_path / "back")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("related", [True, False])
def test_recover_returns_the_tuned_weights_bit_for_bit(tmp_path, kind, dtype, related):
    raw, tuned, state = folders(tmp_path, kind, dtype, related, shards=3)
    notes, total, back = there_and_back(tmp_path, kind, raw, tuned)
    assert alike(back, state)
    for key, value in tensors(tmp_path / "diff").items():
        if "layers" not in key or key in notes["whole"]:
            assert diff._same(value, state[key])
        else:
            assert value.dtype == torch.float32
    assert set(notes["whole"]) <= {key for key in state if "layers" in key}
    assert len(notes["whole"]) < sum("layers" in key for key in state)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    rotary = config["num_hidden_layers"] * sum(10000 ** (-2 * i / 8) for i in range(4))
    numbers = sum(value.double().sum().item() for value in state.values())
    assert total == pytest.approx(numbers + rotary, rel=1e-9)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "back" / "weight_diff.json").exists()
    assert len({*Shards(tmp_path / "back").files.values()}) > 1


def test_inexact_tensors_are_stored_whole(tmp_path):
    raw, tuned, state = folders(tmp_path)
    key = "model.layers.0.self_attn.q_proj.weight"
    odd = state[key].flatten()
    odd[:4] = torch.tensor([-0.0, math.nan, math.inf, 1e-30])
    odd[4:5] = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)  # another NaN
    changed(tuned, lambda _: state)
    notes, _, back = there_and_back(tmp_path, "sft", raw, tuned)
    assert key in notes["whole"]
    assert alike(back, state)


def test_published_diff_is_recovered_in_the_given_dtype(tmp_path):
    """As the released script wrote them: no notes, float32, rotary frequencies in each layer."""
    raw, tuned = released.llama(0), released.llama(1)
    released.write(tmp_path / "raw", raw, pickled=True, shards=2)
    state = released.write(tmp_path / "tuned", tuned, KINDS["reward"], frequencies=True)
    base = tensors(tmp_path / "raw")
    published = {k: v - base.get(k, v) if "layers" in k else v for k, v in state.items()}
    shutil.copytree(tmp_path / "tuned", tmp_path / "diff")
    save_file(published, tmp_path / "diff" / "model.safetensors")
    total = recover(
        tmp_path / "raw", tmp_path / "diff", tmp_path / "back", "reward", progress=False
    )
    back = tensors(tmp_path / "back")
    for key, value in state.items():
        torch.testing.assert_close(back[key], value, atol=1e-6, rtol=1e-6)
    numbers = sum(v.double().sum().item() for v in state.values())  # frequencies included
    assert total == pytest.approx(numbers, abs=1e-3)
    recover(
        tmp_path / "raw", tmp_path / "diff", tmp_path / "half", "reward", progress=False,
        dtype=torch.bfloat16, checksum=total,
    )  # fmt: skip
    assert {v.dtype for v in tensors(tmp_path / "half").values()} == {torch.bfloat16}


def test_missing_frequencies_of_other_families_are_zero(tmp_path):
    for config in ({}, {"num_hidden_layers": 2}, {"num_hidden_layers": 2, "hidden_size": 8}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert diff.missing_frequencies([], tmp_path) == 0.0


@pytest.mark.parametrize("config", ["{}", '{"hidden_size": 16}', "{", '{"head_dim": null}'])
def test_frequencies_without_heads_are_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"config.json: (expected head_dim|not JSON)"):
        diff.frequencies(tmp_path)


def test_missing_frequencies_at_7b(tmp_path):
    config = dict(hidden_size=4096, num_attention_heads=32, num_hidden_layers=32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert diff.missing_frequencies([], tmp_path) == pytest.approx(238.7, abs=0.1)
    kept = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(32)]
    assert diff.missing_frequencies(kept, tmp_path) == 0.0


def test_added_tokens_cause_a_warning(tmp_path):
    released.write(tmp_path / "raw", released.llama())
    released.write(tmp_path / "tuned", released.llama(1, vocab_size=42))
    with pytest.warns(UserWarning, match="2 tokens more than in"):
        make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff", "sft", progress=False)


# ---------------------------------------------------------------------------- what is refused


def refused(tmp_path, error, message, work):
    with pytest.raises(error, match=message):
        work()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial"))


@pytest.fixture
def made(tmp_path):
    raw, tuned, _ = folders(tmp_path)
    make_diff(raw, tuned, tmp_path / "diff", "sft", progress=False)
    return tmp_path


def again(folder, kind="sft", **options):
    return lambda: recover(
        folder / "raw", folder / "diff", folder / "out", kind, progress=False, **options
    )


def changed(folder, change):
    """Rewrite all tensors of a folder in one file."""
    state = change(tensors(folder))
    for path in folder.glob("model*"):
        path.unlink()
    save_file(state, folder / "model.safetensors")


def test_raw_weights_of_another_shape_are_refused(made):
    shutil.rmtree(made / "raw")
    released.write(made / "raw", released.llama(intermediate_size=32))
    message = r"'model.layers.0.mlp.gate_proj.weight' has the shape \(32, 16\) in .*raw"
    refused(made, DiffError, message, again(made))


def test_raw_weights_with_more_tokens_are_refused(made):
    shutil.rmtree(made / "raw")
    released.write(made / "raw", released.llama(vocab_size=41))
    refused(
        made, DiffError, r"(lm_head|embed_tokens).*\(41, 16\) in .*raw.*not taken away", again(made)
    )


@pytest.mark.parametrize(
    "key", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_tensors_outside_of_layers_of_another_shape_are_refused(made, key):
    changed(made / "raw", lambda state: {**state, key: torch.zeros(7)})
    refused(made, DiffError, rf"'{key}' has the shape \(7,\) in .*raw", again(made))


@pytest.mark.parametrize("lost", ["model.layers.1.", "lm_head.weight", "model.norm.weight"])
def test_diff_without_a_raw_tensor_is_refused(made, lost):
    (made / "diff" / "weight_diff.json").unlink()
    changed(made / "diff", lambda s: {k: v for k, v in s.items() if not k.startswith(lost)})
    refused(made, DiffError, f"diff: there is no '{lost}", again(made))


def test_reward_model_of_transformers_is_recovered(tmp_path):
    """Its head is `score.weight`, and it has no output head."""
    raw, tuned, _ = folders(tmp_path)

    def own(state):
        rest = {key: value for key, value in state.items() if key != "lm_head.weight"}
        return {**rest, "score.weight": torch.ones(1, 16)}

    changed(tuned, own)
    make_diff(raw, tuned, tmp_path / "diff", "reward", progress=False)
    again(tmp_path, "reward")()
    found, expected = tensors(tmp_path / "out"), tensors(tuned)
    assert alike(found, expected)
    with pytest.raises(DiffError, match=r"got a 'score.weight', so it is a reward model"):
        make_diff(raw, tuned, tmp_path / "other", "sft", progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recovered_configuration_names_the_dtype(made, dtype):
    (made / "diff" / "weight_diff.json").unlink()
    path = made / "diff" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "dtype": "float16", "torch_dtype": "float16"}))
    again(made, dtype=dtype)()
    said = json.loads((made / "out" / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    assert (said["dtype"], said["torch_dtype"]) == (name, name)
    assert {value.dtype for value in tensors(made / "out").values()} == {dtype}


def test_other_raw_weights_are_refused(made):
    shutil.rmtree(made / "raw")
    released.write(made / "raw", released.llama(7))
    refused(made, DiffError, "than those it was made from", again(made))


def test_raw_weights_with_fewer_layers_are_refused(made):
    shutil.rmtree(made / "raw")
    released.write(made / "raw", released.llama(num_hidden_layers=1))
    refused(made, DiffError, r"raw: there is no 'model.layers.1.", again(made))


def test_other_model_type_is_refused(made):
    refused(made, DiffError, "got .*'sft'.*expected .*'reward'", again(made, "reward"))
    (made / "diff" / "weight_diff.json").unlink()
    refused(made, DiffError, "no 'reward_head.weight'", again(made, "reward"))
    changed(made / "diff", lambda state: {**state, "reward_head.weight": torch.ones(1, 16)})
    refused(made, DiffError, "a 'reward_head.weight'", again(made, "sft"))
    with pytest.raises(DiffError, match="model_type: got 'critic'"):
        diff.require_kind(Shards(made / "diff"), "critic")


def test_damaged_notes_and_notes_of_other_weights_are_refused(made):
    changed(made / "diff", lambda state: {k: v for k, v in state.items() if k != "lm_head.weight"})
    refused(made, DiffError, r"weight_diff.json: its tensors differ .* in \['lm_head", again(made))
    (made / "diff" / "weight_diff.json").write_text("{")
    refused(made, DiffError, "weight_diff.json: damaged", again(made))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dtypes", None, "not iterable"),
        ("dtypes", "float32", ""),
        ("whole", 3, "not iterable"),
        ("whole", ["model.other"], "its list of whole tensors is wrong"),
        ("digest", None, "its digest is not a string"),
        ("one dtype", "tensor", "the type of 'lm_head.weight' is 'tensor'"),
        ("one dtype", None, "attribute name"),
    ],
)
def test_invalid_notes_are_refused(made, name, value, message):
    path = made / "diff" / "weight_diff.json"
    notes = json.loads(path.read_text())
    if name == "one dtype":
        notes["dtypes"]["lm_head.weight"] = value
    else:
        notes[name] = value
    path.write_text(json.dumps(notes))
    refused(made, DiffError, f"weight_diff.json: damaged .*{message}", again(made))


def test_other_files_are_copied_from_subfolders_too(tmp_path):
    raw, tuned, _ = folders(tmp_path)
    for name in ("templates/chat.jinja", "original/params.json", "original/consolidated.00.pth"):
        (tuned / name).parent.mkdir(exist_ok=True)
        (tuned / name).write_text(name)
    (tuned / ".cache").mkdir()
    (tuned / ".cache" / "lock.json").write_text("")
    make_diff(raw, tuned, tmp_path / "diff", "sft", progress=False)
    found = {str(path.relative_to(tmp_path / "diff")) for path in (tmp_path / "diff").rglob("*/*")}
    assert found == {"templates/chat.jinja", "original/params.json"}
    assert (tmp_path / "diff" / "templates" / "chat.jinja").read_text() == "templates/chat.jinja"


def test_wrong_checksum_is_refused(made):
    refused(made, DiffError, "checksum is .*expected 1.000000", again(made, checksum=1.0))
    refused(made, DiffError, "expected 50810.703125", again(made, checksum="en-reward"))
    message = "got 'en-policy', expected a number or one of en-reward"
    refused(made, DiffError, message, again(made, checksum="en-policy"))
    assert CHECKSUMS["zh-reward"] == 49954.0859375


def test_old_name_of_the_checksum_warns(made):
    with pytest.warns(DeprecationWarning, match="use checksum="):
        refused(made, DiffError, "expected 1.000000", again(made, check_sum=1.0))


def test_shard_that_lacks_a_key_leaves_nothing(made):
    index = made / "diff" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for key in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        where = next(f for f in content["weight_map"].values() if f != content["weight_map"][key])
        wrong = {**content, "weight_map": {**content["weight_map"], key: where}}
        index.write_text(json.dumps(wrong))
        refused(made, ShardError, f"{where}: there is no '{key}'", again(made))


def test_missing_and_existing_folders_are_refused(made):
    refused(made, ShardError, "nowhere: there is no such folder", lambda: recover(
        made / "nowhere", made / "diff", made / "out", "sft"
    ))  # fmt: skip
    (made / "empty").mkdir()
    refused(made, ShardError, "empty: no weights, expected", lambda: recover(
        made / "raw", made / "empty", made / "out", "sft"
    ))  # fmt: skip
    for taken in ("raw", "diff", "empty"):
        with pytest.raises(FileExistsError, match=f"{taken}: already exists"):
            recover(made / "raw", made / "diff", made / taken, "sft")


def test_disk_without_room_is_refused(made, monkeypatch):
    usage = shutil.disk_usage(made)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    refused(made, OSError, "are needed, 0.0 GiB are free", again(made))


def test_disk_that_fills_up_leaves_nothing(made, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "_flush", full)
    refused(made, OSError, "No space left", again(made))


# ------------------------------------------------------------------------------ the command line


def test_command_line_takes_the_options_of_the_released_scripts(tmp_path, capsys):
    raw, tuned, state = folders(tmp_path, "reward")
    paths = [f"--path_raw={raw}", f"--path_diff={tmp_path / 'diff'}"]
    kind = "--model_type=reward"
    assert main(["make_diff", *paths, f"--path_tuned={tuned}", kind]) == 0
    assert "are stored in full" in capsys.readouterr().out
    assert main(["recover", *paths, f"--path_tuned={tmp_path / 'back'}", kind]) == 0
    total = float(capsys.readouterr().out.split("checksum ")[1].split(";")[0])
    assert alike(tensors(tmp_path / "back"), state)
    last = f"--path_tuned={tmp_path / 'last'}"
    assert main(["recover", *paths, last, kind, f"--checksum={total}"]) == 0
    again = f"--path_tuned={tmp_path / 'again'}"
    assert main(["recover", *paths, again, kind, "--check_sum=en-reward"]) == 1  # the old name
    assert "the checksum is" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["recover", "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_tied_tensors_are_written_twice(tmp_path):
    raw = released.llama()
    released.write(tmp_path / "raw", raw)
    state = released.write(tmp_path / "diff", raw, pickled=True)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # as torch.save keeps ties
    torch.save(state, tmp_path / "diff" / "pytorch_model.bin")
    again(tmp_path)()
    out = tensors(tmp_path / "out")
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])


@pytest.mark.parametrize("zipped", [True, False])
def test_overlapping_tensors_are_written_twice(tmp_path, zipped):
    numbers = torch.arange(20.0)
    torch.save(
        {"a": numbers[:10], "b": numbers[5:15]}, tmp_path / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )  # fmt: skip
    read, writer = Shards(tmp_path), ShardWriter(tmp_path, 1000)
    for key in read:
        writer.add(key, read[key])
    writer.close()
    out = load_file(tmp_path / "model.safetensors")
    assert torch.equal(out["a"], numbers[:10])
    assert torch.equal(out["b"], numbers[5:15])


def test_shard_writer_writes_a_single_file_without_index(tmp_path):
    writer = ShardWriter(tmp_path, 1000)
    writer.add("a", torch.ones(3, 2).t())
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors")["a"].shape == (2, 3)
