"""Folders of weights, and weight diffs."""

import json

import released
import torch

from bad_inputs.room import Room
from mossrlhf.serialization import Shards
from mossrlhf.weight_diff import make_diff, recover

room = Room("Weights and weight diffs")
row = room.row


class Code:
    """Runs when it is unpickled by whoever does."""

    def __reduce__(self):
        return exit, (3,)


def made(shop):
    """Raw weights, tuned ones, and the diff."""
    raw, tuned = shop.folder / "raw", shop.folder / "tuned"
    model = released.llama(0)
    released.write(raw, model)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    released.write(tuned, model)
    make_diff(raw, tuned, shop.folder / "diff", "sft", progress=False)


def again(shop, kind="sft", raw="raw", **options):
    """Recover what `made` has left."""
    folder = shop.folder
    if not (folder / "diff").exists():
        made(shop)
    return recover(folder / raw, folder / "diff", folder / "out", kind, progress=False, **options)


def index(shop, name):
    """A folder of weights whose index names this file."""
    shop.file("outside.safetensors", b"")
    text = json.dumps({"weight_map": {"lm_head.weight": name}})
    return Shards(shop.file("model/model.safetensors.index.json", text).parent)


row(
    "a folder that is not there",
    "ShardError: …gone: there is no such folder",
    lambda shop: Shards(shop.folder / "gone"),
)
row(
    "a folder without weights",
    "ShardError: …no weights, expected model.safetensors or pytorch_model.bin, or shards",
    lambda shop: Shards(shop.folder),
)
row(
    "an index that leads out of the folder",
    "ShardError: …it names '../outside.safetensors', expected a file of weights beside it",
    lambda shop: index(shop, "../outside.safetensors"),
)
row(
    "an index with an absolute path",
    "ShardError: …it names '/etc/passwd', expected a file of weights beside it",
    lambda shop: index(shop, "/etc/passwd"),
)


row(
    "an index that is no JSON",
    "ShardError: …model.safetensors.index.json: not an index of weights: ",
    lambda shop: Shards(shop.file("model/model.safetensors.index.json", "{").parent),
)
row(
    "an index that names a shard that is missing",
    "ShardError: …gone.safetensors: missing, though model.safetensors.index.json names it",
    lambda shop: index(shop, "gone.safetensors"),
)


@row(
    "a pickle with code in it",
    "ShardError: …pytorch_model.bin: cannot be read (…); it is cut short, or holds more than plain "
    "tensors",
)
def code(shop):
    (shop.folder / "model").mkdir()
    torch.save({"a": Code()}, shop.folder / "model" / "pytorch_model.bin")
    return Shards(shop.folder / "model")


@row("a file of weights cut off", "ShardError: …model.safetensors: cannot be read (…); it is cut")
def cut_off(shop):
    released.write(shop.folder / "model", released.llama())
    path = shop.folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return Shards(shop.folder / "model")


row(
    "a kind of model that there is not",
    "DiffError: model_type: got 'chat', expected 'reward', 'sft' or 'policy'",
    lambda shop: again(shop, "chat"),
)
row(
    "a diff of another kind",
    "DiffError: …got ('mossrlhf.weight_diff/1', 'sft'), expected ('mossrlhf.weight_diff/1', 'poli",
    lambda shop: again(shop, "policy"),
)


@row(
    "raw weights of another model",
    "DiffError: …has the shape (40, 32) in …, and (40, 16) in …; the raw weights are of another mo",
)
def another(shop):
    made(shop)
    released.write(shop.folder / "other", released.llama(hidden_size=32))
    return again(shop, raw="other")


@row(
    "raw weights that are not those the diff was made of",
    "DiffError: …with these raw weights the diff in …gives other weights than those",
)
def not_those(shop):
    made(shop)
    released.write(shop.folder / "other", released.llama(7))
    return again(shop, raw="other")


row(
    "a wrong checksum",
    "DiffError: …the checksum is …, expected 1.000000; the raw weights in …or the diff in …are "
    "not "
    "the right ones",
    lambda shop: again(shop, checksum=1.0),
)
row(
    "an unknown checksum",
    "DiffError: checksum: got 'en-policy', expected a number or one of en-reward, en-sft, zh-rew",
    lambda shop: again(shop, checksum="en-policy"),
)


@row(
    "a folder to write to that is there already",
    "FileExistsError: …out: already exists; choose another folder",
)
def taken(shop):
    made(shop)
    (shop.folder / "out").mkdir()
    return again(shop)


@row("notes of a diff that are damaged", "DiffError: …weight_diff.json: damaged (")
def notes(shop):
    made(shop)
    (shop.folder / "diff" / "weight_diff.json").write_text("{")
    return again(shop)
