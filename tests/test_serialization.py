"""Shards: tensors of any layout are read one at a time, and nothing else is read or followed."""

import json

import pytest
import released
import torch

from mossrlhf.serialization import ShardError, Shards

KEY = "model.norm.weight"


class Code:
    """Runs if it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


def read(folder):
    shards = Shards(folder)
    return {key: shards[key] for key in shards}


@pytest.fixture
def sharded(tmp_path):
    """A model in three shards with an index."""
    released.write(tmp_path / "model", released.llama(), shards=3)
    return tmp_path / "model"


def rewrite_index(folder, **weights):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "weight_map": {**content["weight_map"], **weights}}))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_shards_read_every_layout(tmp_path, pickled, shards):
    state = released.write(tmp_path / "model", released.llama(), pickled=pickled, shards=shards)
    found = Shards(tmp_path / "model")
    assert len(found) == len(state)
    assert set(found) == set(state)
    assert "lm_head" not in found
    for key, value in state.items():
        assert torch.equal(found[key], value)
        assert found.shape(key) == tuple(value.shape)
    sizes = [path.stat().st_size for path in (tmp_path / "model").glob("*model*[sn]")]
    assert found.largest == max(sizes)


def test_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ShardError, match="nowhere: there is no such folder"):
        Shards(tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"no weights, expected model\.safetensors or"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({KEY: Code()}, "cannot be read .*more than plain tensors"),
        ([torch.ones(1)], "holds a list, expected tensors by name"),
        ({3: torch.ones(1), "a": torch.ones(1)}, "holds a dict by int, str, expected tensors by"),
        ({KEY: [1.0]}, f"'{KEY}' is a list .*expected a plain tensor"),
        ({KEY: torch.ones(2).to_sparse()}, f"'{KEY}' is a"),
        ({KEY: torch.ones(2, device="meta")}, f"'{KEY}' is a Tensor .*plain"),
    ],
)
def test_pickle_of_anything_but_plain_tensors_is_refused(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ShardError, match=message):
        read(tmp_path)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:torch.quantize", "ignore:TypedStorage")
def test_quantized_tensor_is_refused(tmp_path):
    value = torch.quantize_per_tensor(torch.randn(16), 0.1, 0, torch.qint8)
    torch.save({KEY: value}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ShardError, match=f"'{KEY}' is a Tensor .*plain"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name", ["../raw/model.safetensors", "/etc/passwd", "x/y.bin", "config.json"]
)
def test_index_with_a_path_is_refused(sharded, name):
    rewrite_index(sharded, **{KEY: name})
    with pytest.raises(ShardError, match="expected a file of weights beside it"):
        Shards(sharded)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 3}', "[]"])
def test_file_that_is_not_an_index_is_refused(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ShardError, match=r"index\.json: "):
        Shards(sharded)


def test_key_that_its_shard_lacks_is_refused(sharded):
    files = Shards(sharded).files
    other = next(path.name for path in files.values() if path != files[KEY])
    rewrite_index(sharded, **{KEY: other})
    shards = Shards(sharded)
    with pytest.raises(ShardError, match=f"{other}: there is no '{KEY}', though the index"):
        shards[KEY]
    with pytest.raises(ShardError, match=f"{other}: there is no '{KEY}', though the index"):
        shards.shape(KEY)


def test_missing_shard_is_refused(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ShardError, match=f"{shard.name}: missing, though"):
        Shards(sharded)


@pytest.mark.parametrize("keep", [5, 0.5])
def test_truncated_shard_is_refused(sharded, keep):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(ShardError, match=f"{shard.name}: cannot be read"):
        read(sharded)


def test_others_are_the_files_without_weights(sharded):
    names = ("templates/chat.jinja", "original/consolidated.00.pth", ".cache/lock.json")
    for name in names:
        (sharded / name).parent.mkdir()
        (sharded / name).write_text(name)
    found = {path.relative_to(sharded).as_posix() for path in Shards(sharded).others()}
    assert {"config.json", "templates/chat.jinja"} <= found
    assert not {name for name in found if name.endswith(("pth", "safetensors", "lock.json"))}
