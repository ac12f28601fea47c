"""`make_diff` and `recover`, a tensor at a time.

A diff holds tuned − raw, in float32, of every tensor whose name contains ``layers``, and all other
tensors whole. Where raw + diff would not give the tuned tensor back bit for bit, it is whole too.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from mossrlhf.shards import Shards, ShardWriter
from mossrlhf.version import __version__
from mossrlhf.weight_diff.check_sums import (
    CHECK_SUMS,
    FREQUENCIES,
    TOLERANCE,
    frequencies,
    missing_frequencies,
    sum_of,
)
from mossrlhf.weight_diff.fit import (
    DiffError,
    ModelType,
    is_difference,
    require_fit,
    require_kind,
    require_known,
)

NOTES = "weight_diff.json"
"""What a diff of ours says of itself; those made by others lack it."""

FORMAT = "mossrlhf.weight_diff/1"
LEAST_WAITING, MOST_WAITING = 2**24, 2**30
"""Bounds on the bytes that wait to be written."""

_SAME_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def make_diff(
    path_raw: str | Path,
    path_tuned: str | Path,
    path_diff: str | Path,
    model_type: ModelType,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Write what has to be added to raw weights to get tuned ones.

    Memory: a few tensors, and what waits to be written; never a model.

    Args:
        path_raw: folder of the weights that everyone has.
        path_tuned: folder of the weights to be published.
        path_diff: folder to be made.
        model_type: "reward" (with ``reward_head.weight``, or ``score.weight`` as transformers
            names it), "sft" or "policy".
        progress: whether to show a bar.

    Returns:
        what is kept in ``weight_diff.json``: names of tensors stored whole, types, digest.

    Raises:
        DiffError: where the weights do not fit together, or are not of that kind.
        ShardError: where a file is missing or damaged.
        OSError: where the folder exists, or there is no room for it.

    Source: C's ``merge_weight_*.py``; storing whole what would not come back exactly is ours.
    """
    require_known(model_type)
    raw, tuned, target = Shards(path_raw), Shards(path_tuned), Path(path_diff)
    require_kind(tuned, model_type)
    require_fit(raw, tuned, model_type)
    whole: list[str] = []
    dtypes: dict[str, str] = {}
    digests: dict[str, bytes] = {}
    with _made(target, raw, tuned, size=2 * _bytes(tuned)) as (aside, writer):
        for key in tqdm(list(tuned), desc="make_diff", disable=not progress):
            value = tuned[key]
            dtypes[key] = str(value.dtype).removeprefix("torch.")
            digests[key] = _digest(value)
            stored = value
            if is_difference(key):
                base = _raw(raw, key, value.shape)
                stored = value.float() - base.float()
                if not _same(_added(base, stored, value.dtype), value):
                    whole.append(key)
                    stored = value
            writer.add(key, stored)
        notes = {
            "format": FORMAT,
            "library": __version__,
            "model_type": model_type,
            "whole": whole,
            "dtypes": dtypes,
            "digest": _digest_of_all(digests),
        }
        (aside / NOTES).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
    return notes


def recover(
    path_raw: str | Path,
    path_diff: str | Path,
    path_tuned: str | Path,
    model_type: ModelType,
    *,
    check_sum: float | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> float:
    """Add a diff to raw weights, and write the tuned ones.

    A diff of ours is held to its own digest: what comes out is what went in, bit for bit.

    Args:
        path_raw: folder of the raw weights.
        path_diff: folder of the diff, by `make_diff` or as published.
        path_tuned: folder to be made.
        model_type: "reward", "sft" or "policy".
        check_sum: what all numbers should sum up to, or a name of `CHECK_SUMS`; None does not ask.
        dtype: of what comes out, where the diff does not say; published check sums are of float32.
        progress: whether to show a bar.

    Returns:
        the check sum: of all tensors, and of the rotary frequencies of layers that keep none.

    Raises:
        DiffError: where the weights do not fit together, are not of that kind, or come out wrong.
        ShardError: where a file is missing or damaged.
        OSError: where the folder exists, or there is no room for it.

    Source: C's ``merge_weight_*.py``.
    """
    expected = CHECK_SUMS.get(check_sum) if isinstance(check_sum, str) else check_sum
    if check_sum is not None and (expected is None or not math.isfinite(expected)):
        known = ", ".join(CHECK_SUMS)
        raise DiffError(f"check_sum: got {check_sum!r}, expected a number or one of {known}")
    raw, diff, target = Shards(path_raw), Shards(path_diff), Path(path_tuned)
    require_known(model_type)
    notes = _notes(diff, model_type)
    require_kind(diff, model_type)
    require_fit(raw, diff, model_type)
    whole, dtypes = set(notes.get("whole", ())), notes.get("dtypes", {})
    digests: dict[str, bytes] = {}
    total = missing_frequencies(diff.files, diff.folder)
    kept = None if dtypes else dtype  # ours say what they are of in their configuration
    with _made(target, raw, diff, size=_bytes(diff), dtype=kept) as (_, writer):
        for key in tqdm(list(diff), desc="recover", disable=not progress):
            value = diff[key]
            wanted = getattr(torch, dtypes[key]) if dtypes else dtype
            if is_difference(key) and key not in whole:
                # Published check sums are of float32: rounded only once it is summed.
                exact = wanted if dtypes else torch.float32
                value = _added(_raw(raw, key, value.shape), value, exact)
            total += sum_of(value)
            value = value.to(wanted)
            digests[key] = _digest(value)
            writer.add(key, value)
        if dtypes and _digest_of_all(digests) != notes["digest"]:
            raise DiffError(
                f"{raw.folder}: with these raw weights the diff in {diff.folder} gives other "
                "weights than it was made of; they are not those it was made from, or a file is "
                "damaged"
            )
        if expected is not None and not abs(total - expected) <= TOLERANCE * abs(expected):
            raise DiffError(
                f"{target}: the check sum is {total:.6f}, expected {expected:.6f}; the raw weights "
                f"in {raw.folder} or the diff in {diff.folder} are not the right ones"
            )
    return total


def _added(raw: Tensor, difference: Tensor, dtype: torch.dtype) -> Tensor:
    return (raw.float() + difference.float()).to(dtype)


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are alike bit for bit, signs of zero and kinds of NaN included."""
    kind = _SAME_BITS[left.element_size()]
    return left.dtype == right.dtype and torch.equal(left.view(kind), right.view(kind))


def _raw(raw: Shards, key: str, shape: torch.Size) -> Tensor:
    """The raw tensor of a key, of the same shape; frequencies are known where none are kept."""
    if key not in raw and key.endswith(FREQUENCIES):
        found = frequencies(raw.folder)
    elif key not in raw:
        raise DiffError(f"{raw.folder}: it has no {key!r}, so there is nothing to add to")
    else:
        found = raw[key]
    if found.shape != shape:
        raise DiffError(
            f"{key!r} has the shape {tuple(shape)}, and {tuple(found.shape)} in {raw.folder}; the "
            "raw weights are of another model"
        )
    return found


def _digest(value: Tensor) -> bytes:
    """Hash a tensor, in parts: its bytes are a copy."""
    digest = hashlib.blake2b(f"{value.dtype} {tuple(value.shape)}".encode(), digest_size=32)
    flat = value.flatten().view(_SAME_BITS[value.element_size()])
    for part in flat.split(2**22):
        digest.update(part.contiguous().numpy().tobytes())
    return digest.digest()


def _digest_of_all(digests: Mapping[str, bytes]) -> str:
    """Hash all tensors by name: files may hold them in any order."""
    digest = hashlib.blake2b(digest_size=32)
    for key in sorted(digests):
        digest.update(key.encode() + digests[key])
    return digest.hexdigest()


def _notes(diff: Shards, model_type: str) -> dict[str, Any]:
    path = diff.folder / NOTES
    if not path.is_file():
        return {}
    try:
        notes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = notes["format"], notes["model_type"]
        complete = set(diff) == set(notes["dtypes"])
        for name, value in notes["dtypes"].items():
            if not isinstance(getattr(torch, value, None), torch.dtype):
                raise ValueError(f"the type of {name!r} is {value!r}")
        if not isinstance(notes["digest"], str) or not set(notes["whole"]) <= set(diff):
            raise ValueError("its digest is no text, or its list of whole tensors has others")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DiffError(f"{path}: damaged ({error!r})") from error
    if known != (FORMAT, model_type):
        raise DiffError(f"{path}: says {known}, expected {(FORMAT, model_type)}")
    if not complete:
        odd = sorted(set(diff) ^ set(notes["dtypes"]))[:3]
        raise DiffError(f"{path}: it and the weights beside it differ in {odd}")
    return notes


def _say_dtype(path: Path, dtype: torch.dtype) -> None:
    """Have a configuration say of which type the weights are: transformers loads them by it."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in {"dtype", "torch_dtype"} & config.keys():
        config[name] = str(dtype).removeprefix("torch.")
    if config:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _bytes(shards: Shards) -> int:
    return sum(path.stat().st_size for path in set(shards.files.values()))


@contextmanager
def _made(
    target: Path, *sources: Shards, size: int, dtype: torch.dtype | None = None
) -> Iterator[tuple[Path, ShardWriter]]:
    """Lend a writer to a folder that takes its name once everything is in it."""
    if target.exists():
        raise FileExistsError(f"{target}: there is something there already; choose another folder")
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    free = shutil.disk_usage(aside).free
    try:
        if free < size:
            raise OSError(
                f"{target}: up to {size / 2**30:.1f} GiB are needed there, and {free / 2**30:.1f} "
                "are free"
            )
        # What is read is mapped: two files' pages count as well.
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
            _say_dtype(aside / "config.json", dtype)
        aside.rename(target)
    except SafetensorError as error:
        raise OSError(f"{target}: could not be written ({error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
