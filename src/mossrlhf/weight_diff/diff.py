"""`make_diff` and `recover`, one tensor at a time.

A diff holds tuned − raw, in float32, of every tensor whose name contains ``layers``, and all other
tensors in full. A tensor that raw + diff would not recover bitwise is stored in full too.
"""

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from mossrlhf.serialization import INDICES, SINGLE, Shards
from mossrlhf.version import __version__

ModelType = Literal["reward", "sft", "policy"]

CHECKSUMS = {"en-reward": 50810.703125, "en-sft": 50874.84765625, "zh-reward": 49954.0859375}
"""By language and kind; that of the English policy was never published."""

TOLERANCE = 1e-4
"""Relative: the published sums of 6.7 billion numbers had another order and a narrower type."""

FREQUENCIES = "rotary_emb.inv_freq"
"""End of the names of rotary frequencies: not weights, but transformers 4.30 stored them."""

THETA = 10000.0
"""Base of the rotary frequencies, which configurations of that time did not contain."""

HEADS = ("reward_head.weight", "score.weight")
"""In reward models: the released ones, and the classifiers of transformers."""

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors that grow with the vocabulary."""

NOTES = "weight_diff.json"
"""The file that `make_diff` writes beside a diff; published diffs lack it."""

FORMAT = "mossrlhf.weight_diff/1"

LEAST_WAITING, MOST_WAITING = 2**24, 2**30
"""Bounds on the bytes of a shard, which is written at once."""

_SAME_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DiffError(ValueError):
    """Weights that do not match: which file or key, and why."""


def make_diff(
    path_raw: str | Path,
    path_tuned: str | Path,
    path_diff: str | Path,
    model_type: ModelType,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the difference between tuned weights and raw ones.

    Memory: a few tensors and one shard, never a model.

    Args:
        path_raw: folder of the published base weights.
        path_tuned: folder of the fine-tuned weights.
        path_diff: folder to be created.
        model_type: "reward" (with ``reward_head.weight``, or transformers' ``score.weight``),
            "sft" or "policy".
        progress: whether to show a progress bar.

    Returns:
        the content of ``weight_diff.json``: names of tensors stored in full, dtypes, a hash.

    Raises:
        DiffError: if the weights do not match, or are not of that type.
        ShardError: if a file is missing or damaged.
        OSError: if the folder exists, or the disk has no room for it.

    Source: MOSS-RLHF's ``merge_weight_*.py``; storing inexact tensors in full is ours.
    """
    require_known(model_type)
    raw, tuned, target = Shards(path_raw), Shards(path_tuned), Path(path_diff)
    require_kind(tuned, model_type)
    require_fit(raw, tuned, model_type)
    whole: list[str] = []
    dtypes: dict[str, str] = {}
    hashes: dict[str, bytes] = {}
    with _created(target, raw, tuned, size=2 * _bytes(tuned)) as (aside, writer):
        for key in tqdm(list(tuned), desc="make_diff", disable=not progress):
            value = tuned[key]
            dtypes[key] = _name(value.dtype)
            hashes[key] = _hash(value)
            stored = value
            if _is_difference(key):
                base = _raw(raw, key, value.shape)
                stored = value.float() - base.float()
                if not _same(_sum(base, stored, value.dtype), value):
                    whole.append(key)
                    stored = value
            writer.add(key, stored)
        notes = {
            "format": FORMAT,
            "library": __version__,
            "model_type": model_type,
            "whole": whole,
            "dtypes": dtypes,
            "digest": _hash_of_all(hashes),
        }
        (aside / NOTES).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
    return notes


def recover(
    path_raw: str | Path,
    path_diff: str | Path,
    path_tuned: str | Path,
    model_type: ModelType,
    *,
    checksum: float | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    check_sum: float | str | None = None,
) -> float:
    """Add a diff to raw weights, and write the tuned weights.

    The result of a diff by `make_diff` is compared bitwise, with the hash in its notes.

    Args:
        path_raw: folder of the raw weights.
        path_diff: folder of the diff, by `make_diff` or as published.
        path_tuned: folder to be created.
        model_type: "reward", "sft" or "policy".
        checksum: expected sum of all numbers, or a name in `CHECKSUMS`; None checks no sum.
        dtype: of the result, if the diff has no notes; published sums are of float32.
        progress: whether to show a progress bar.
        check_sum: the old name of `checksum`.

    Returns:
        the sum of all tensors, and of the rotary frequencies of layers that store none.

    Raises:
        DiffError: if the weights do not match, are not of that type, or the result is wrong.
        ShardError: if a file is missing or damaged.
        OSError: if the folder exists, or the disk has no room for it.

    Source: MOSS-RLHF's ``merge_weight_*.py``.
    """
    if check_sum is not None:
        warnings.warn("check_sum: use checksum=", DeprecationWarning, stacklevel=2)
        checksum = check_sum
    expected = CHECKSUMS.get(checksum) if isinstance(checksum, str) else checksum
    if checksum is not None and (expected is None or not math.isfinite(expected)):
        known = ", ".join(CHECKSUMS)
        raise DiffError(f"checksum: got {checksum!r}, expected a number or one of {known}")
    raw, diff, target = Shards(path_raw), Shards(path_diff), Path(path_tuned)
    require_known(model_type)
    notes = _notes(diff, model_type)
    require_kind(diff, model_type)
    require_fit(raw, diff, model_type)
    whole, dtypes = set(notes.get("whole", ())), notes.get("dtypes", {})
    hashes: dict[str, bytes] = {}
    total = missing_frequencies(diff.files, diff.folder)
    named = None if dtypes else dtype  # with notes, the configuration names the right one already
    with _created(target, raw, diff, size=_bytes(diff), dtype=named) as (_, writer):
        for key in tqdm(list(diff), desc="recover", disable=not progress):
            value = diff[key]
            wanted = getattr(torch, dtypes[key]) if dtypes else dtype
            if _is_difference(key) and key not in whole:
                # Published sums are of float32: the tensor is rounded after it has been summed.
                exact = wanted if dtypes else torch.float32
                value = _sum(_raw(raw, key, value.shape), value, exact)
            total += _total(value)
            value = value.to(wanted)
            hashes[key] = _hash(value)
            writer.add(key, value)
        if dtypes and _hash_of_all(hashes) != notes["digest"]:
            raise DiffError(
                f"{raw.folder}: with these raw weights the diff in {diff.folder} gives other "
                "weights than those it was made from; the raw weights are not the right ones, or "
                "a file is damaged"
            )
        if expected is not None and not abs(total - expected) <= TOLERANCE * abs(expected):
            raise DiffError(
                f"{target}: the checksum is {total:.6f}, expected {expected:.6f}; the raw weights "
                f"in {raw.folder} or the diff in {diff.folder} are not the right ones"
            )
    return total


# ---- checks of raw, tuned and diff weights ------------------------------------------------------


def require_known(model_type: str) -> None:
    """Refuse an unknown model type."""
    if model_type not in ("reward", "sft", "policy"):
        raise DiffError(f"model_type: got {model_type!r}, expected 'reward', 'sft' or 'policy'")


def require_kind(shards: Shards, model_type: str) -> None:
    """Refuse tuned weights, or a diff, of another model type."""
    require_known(model_type)
    heads = [name for name in HEADS if name in shards]
    if model_type == "reward" and not heads:
        raise DiffError(
            f"{shards.folder}: got no {HEADS[0]!r} and no {HEADS[1]!r}, expected one of them in a "
            "reward model; pass another model_type than 'reward'"
        )
    if model_type != "reward" and heads:
        raise DiffError(
            f"{shards.folder}: got a {heads[0]!r}, so it is a reward model, expected none with "
            f"model_type={model_type!r}; pass model_type='reward'"
        )


def require_fit(raw: Shards, other: Shards, model_type: str) -> None:
    """Refuse raw weights of another model than the tuned ones, or the diff, before writing."""
    for key in other:
        if key in raw:
            _require_shape(raw, other, key)
        elif _is_difference(key) and not key.endswith(FREQUENCIES):
            raise DiffError(f"{raw.folder}: there is no {key!r}, which {other.folder} has")
    for key in raw:
        # A classifier has no output head.
        spare = key.endswith(FREQUENCIES) or (model_type == "reward" and key == VOCABULARY[1])
        if key not in other and not spare:
            raise DiffError(
                f"{other.folder}: there is no {key!r}, which {raw.folder} has; the result would "
                "lack it"
            )


def _require_shape(raw: Shards, other: Shards, key: str) -> None:
    old, new = raw.shape(key), other.shape(key)
    if old == new:
        return
    grows = key in VOCABULARY and old[1:] == new[1:] and len(old) == len(new) == 2
    if not grows or new[0] < old[0]:
        why = "the raw weights are of another model"
        if grows:
            why = "tokens may be added to a vocabulary, not taken away"
        raise DiffError(
            f"{key!r} has the shape {old} in {raw.folder}, and {new} in {other.folder}; {why}"
        )
    if key == VOCABULARY[0]:
        warnings.warn(
            f"{other.folder}: {new[0] - old[0]} tokens more than in {raw.folder}; correct if "
            "tokens were added to the tuned model",
            UserWarning,
            stacklevel=4,
        )


def _notes(diff: Shards, model_type: str) -> dict[str, Any]:
    path = diff.folder / NOTES
    if not path.is_file():
        return {}
    try:
        notes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = notes["format"], notes["model_type"]
        odd = sorted(set(diff) ^ set(notes["dtypes"]))[:3]
        for name, value in notes["dtypes"].items():
            if not isinstance(getattr(torch, value, None), torch.dtype):
                raise ValueError(f"the type of {name!r} is {value!r}")
        if not isinstance(notes["digest"], str) or not set(notes["whole"]) <= set(diff):
            raise ValueError("its digest is not a string, or its list of whole tensors is wrong")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DiffError(f"{path}: damaged ({error!r})") from error
    if known != (FORMAT, model_type):
        raise DiffError(f"{path}: got {known}, expected {(FORMAT, model_type)}")
    if odd:
        raise DiffError(f"{path}: its tensors differ from those in the folder, in {odd}")
    return notes


# ---- tensors ------------------------------------------------------------------------------------


def _is_difference(key: str) -> bool:
    return "layers" in key


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sum(raw: Tensor, difference: Tensor, dtype: torch.dtype) -> Tensor:
    return (raw.float() + difference.float()).to(dtype)


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, signs of zero and kinds of NaN included."""
    kind = _SAME_BITS[left.element_size()]
    return left.dtype == right.dtype and torch.equal(left.view(kind), right.view(kind))


def _raw(raw: Shards, key: str, shape: torch.Size) -> Tensor:
    """The raw tensor of a key; rotary frequencies are computed if they are not stored."""
    if key not in raw and key.endswith(FREQUENCIES):
        found = frequencies(raw.folder)
    elif key not in raw:
        raise DiffError(f"{raw.folder}: there is no {key!r} to add to")
    else:
        found = raw[key]
    if found.shape != shape:
        raise DiffError(
            f"{key!r} has the shape {tuple(shape)}, and {tuple(found.shape)} in {raw.folder}; the "
            "raw weights are of another model"
        )
    return found


def _parts(tensor: Tensor) -> Iterable[Tensor]:
    return tensor.flatten().split(2**22)  # a copy of all of it could be too much


def _total(tensor: Tensor) -> float:
    return float(sum(part.double().sum() for part in _parts(tensor)))


def _hash(value: Tensor) -> bytes:
    found = hashlib.blake2b(f"{value.dtype} {tuple(value.shape)}".encode(), digest_size=32)
    for part in _parts(value):
        found.update(part.view(_SAME_BITS[value.element_size()]).contiguous().numpy().tobytes())
    return found.digest()


def _hash_of_all(hashes: Mapping[str, bytes]) -> str:
    """Hash all tensors in the order of their names: files may hold them in any order."""
    found = hashlib.blake2b(digest_size=32)
    for key in sorted(hashes):
        found.update(key.encode() + hashes[key])
    return found.hexdigest()


def frequencies(folder: Path) -> Tensor:
    """Return θ^(−2i/d), a layer's rotary frequencies (RoFormer, arXiv 2104.09864, eq. 15)."""
    config = _config(folder)
    if not _has_heads(config):
        raise ValueError(
            f"{folder / 'config.json'}: expected head_dim, or hidden_size and num_attention_heads, "
            "since the layers store no rotary frequencies"
        )
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 1.0 / THETA ** (torch.arange(0, size, 2, dtype=torch.float32) / size)


def missing_frequencies(keys: Iterable[str], folder: Path) -> float:
    """Return the sum of the rotary frequencies of layers that store none: 238.7 in all at 7B."""
    config = _config(folder)
    if not _has_heads(config) or not isinstance(config.get("num_hidden_layers"), int):
        return 0.0  # not a Llama: no sum of it was published
    kept = sum(key.endswith(FREQUENCIES) for key in keys)
    return float(config["num_hidden_layers"] - kept) * _total(frequencies(folder))


def _has_heads(config: Mapping[str, Any]) -> bool:
    sizes = [config.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads")]
    known = [isinstance(size, int) and size > 0 for size in sizes]
    return known[0] or all(known[1:])


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got a {type(found).__name__}, expected a JSON object")
    return found


# ---- files --------------------------------------------------------------------------------------


def _bytes(shards: Shards) -> int:
    return sum(path.stat().st_size for path in set(shards.files.values()))


@contextmanager
def _created(
    target: Path, *sources: Shards, size: int, dtype: torch.dtype | None = None
) -> Iterator[tuple[Path, "ShardWriter"]]:
    """Yield a folder and its writer; the folder gets its final name when everything is in it."""
    if target.exists():
        raise FileExistsError(f"{target}: already exists; choose another folder")
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    free = shutil.disk_usage(aside).free
    try:
        if free < size:
            raise OSError(
                f"{target}: up to {size / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are "
                "free; choose another disk"
            )
        # Files are memory-mapped while they are read: pages of two of them count as well.
        largest = max(source.largest for source in sources)
        writer = ShardWriter(aside, min(MOST_WAITING, max(LEAST_WAITING, largest // 4)))
        yield aside, writer
        writer.close()
        for path in sources[-1].others():
            if path.name != NOTES:
                copy = aside / path.relative_to(sources[-1].folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        if dtype is not None:
            _set_dtype(aside / "config.json", dtype)
        aside.rename(target)
    except SafetensorError as error:
        raise OSError(f"{target}: could not be written ({error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Write the dtype of the weights into their configuration: transformers loads them by it."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in {"dtype", "torch_dtype"} & config.keys():
        config[name] = _name(dtype)
    if config:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class ShardWriter:
    """Writes tensors to shards of about `budget` bytes as they come, and an index at the end."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self.shards: list[list[str]] = []
        self.total = 0
        self._waiting: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, key: str, tensor: Tensor) -> None:
        """Take a tensor, which is kept until its shard is written."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._bytes + size > self.budget:
            self._flush()
        taken = {_memory(waiting) for waiting in self._waiting.values()}
        # Tied weights of older files share memory, which safetensors refuses to write.
        tensor = tensor.clone() if _memory(tensor) in taken else tensor
        self._waiting[key] = tensor.contiguous()
        self._bytes += size
        self.total += size

    def close(self) -> None:
        """Write the last shard, and the index if there are several."""
        self._flush()
        count = len(self.shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        names = names if count > 1 else [SINGLE[0]]
        for number, name in enumerate(names):
            self._aside(number).rename(self.folder / name)
        if count > 1:
            where = zip(self.shards, names, strict=True)
            weight_map = {key: name for keys, name in where for key in keys}
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            (self.folder / INDICES[0]).write_text(json.dumps(index, indent=1) + "\n")

    def _aside(self, number: int) -> Path:
        return self.folder / f"shard-{number}.partial"

    def _flush(self) -> None:
        save_file(self._waiting, self._aside(len(self.shards)), metadata={"format": "pt"})
        self.shards.append(list(self._waiting))
        self._waiting, self._bytes = {}, 0


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
