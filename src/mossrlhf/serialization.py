"""Files of tensors and plain data: safetensors, JSON, checksums, shards of a checkpoint.

Only plain tensors are unpickled, and names in an index must be files of its folder.
"""

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

CHECKSUM = "crc32"
"""The key under which a state holds its own checksum."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors; an empty mapping writes an empty file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of safetensors; raise ValueError if it is damaged."""
    try:
        return dict(load_file(str(path)))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Write plain data, indented."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a file of JSON; raise ValueError if it is not JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def file_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and checksum of every safetensors file directly in a folder.

    Subfolders (the models as transformers loads them) are not read by a resume, and left out.
    """
    return {path.name: _measure(path) for path in sorted(folder.glob("*.safetensors"))}


def with_checksum(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON data with its checksum; a checksum already in it is replaced."""
    data = {name: value for name, value in state.items() if name != CHECKSUM}
    text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    return {**data, CHECKSUM: f"{zlib.crc32(text.encode()):08x}"}


def require_checksums(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if a file is missing, or differs from its entry by `file_checksums`."""
    for name, expected in files.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        found = _measure(path)
        for what in ("bytes", "crc32"):
            if found[what] != expected[what]:
                raise ValueError(
                    f"{name} is damaged (its {what}: {found[what]}, expected {expected[what]})"
                )


def _measure(path: Path) -> dict[str, Any]:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": path.stat().st_size, "crc32": f"{checksum:08x}"}


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bars that transformers shows for every model it writes."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
"""Suffixes of files with weights."""


class ShardError(ValueError):
    """A checkpoint that cannot be read: which file or key, and why."""


class Shards:
    """The tensors of a checkpoint in transformers' layout, in one file or shards, read on access.

    Raises `ShardError` if there is no checkpoint, or a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ShardError(f"{self.folder}: there is no such folder")
        self._open: tuple[Path, Any] | None = None
        self.files = self._find_files()

    @property
    def largest(self) -> int:
        """Bytes of the largest file."""
        return max(path.stat().st_size for path in set(self.files.values()))

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def __iter__(self) -> Iterator[str]:
        """Yield the keys, file by file."""
        return iter(sorted(self.files, key=lambda key: (self.files[key].name, key)))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: str) -> Tensor:
        """Read a tensor; a `ShardError` if the file has no plain tensor of that name."""
        path = self.files[key]
        content = self._content(path)
        try:
            value = content.get_tensor(key) if path.suffix == ".safetensors" else content[key]
        except (KeyError, SafetensorError) as error:
            raise ShardError(f"{path}: there is no {key!r}, though the index names it") from error
        if not _is_plain(value):
            kind = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else "none"
            raise ShardError(
                f"{path}: {key!r} is a {type(value).__name__} ({kind}), expected a plain tensor "
                "with its numbers"
            )
        return value

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape, without reading its numbers if the format allows it."""
        path = self.files[key]
        if path.suffix != ".safetensors":
            return tuple(self[key].shape)
        try:
            return tuple(self._content(path).get_slice(key).get_shape())
        except SafetensorError as error:
            raise ShardError(f"{path}: there is no {key!r}, though the index names it") from error

    def others(self) -> Iterator[Path]:
        """Yield the files without weights, in subfolders too: configuration, tokenizer."""
        for path in sorted(self.folder.rglob("*")):
            weights = path.name.endswith(WEIGHTS) or path.name in INDICES
            hidden = any(part.startswith(".") for part in path.relative_to(self.folder).parts)
            if path.is_file() and not weights and not hidden:
                yield path

    def _content(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            self._open = None  # closed before the next one is opened
            self._open = path, _opened(path)
        return self._open[1]

    def _find_files(self) -> dict[str, Path]:
        for name in INDICES:
            if (index := self.folder / name).is_file():
                found = {k: self._beside(index, f) for k, f in _weight_map(index).items()}
                for path in sorted(set(found.values())):
                    if not path.is_file():
                        raise ShardError(f"{path}: missing, though {name} names it")
                return found
        for name in SINGLE:
            if (path := self.folder / name).is_file():
                content = self._content(path)
                keys = content.keys() if name.endswith(".safetensors") else content
                return dict.fromkeys(keys, path)
        raise ShardError(
            f"{self.folder}: no weights, expected {' or '.join(SINGLE)}, or shards with their index"
        )

    def _beside(self, index: Path, name: str) -> Path:
        if Path(name).name != name or not name.endswith((".safetensors", ".bin")):
            raise ShardError(f"{index}: it names {name!r}, expected a file of weights beside it")
        return self.folder / name


def _is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor of the base class, neither quantized nor on meta."""
    known = type(value) is Tensor and value.layout is torch.strided
    return known and not value.is_quantized and not value.is_meta


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{index}: not an index of weights: {error!r}") from error
    if not isinstance(found, dict) or not all(isinstance(f, str) for f in found.values()):
        raise ShardError(f"{index}: weight_map: expected a mapping of keys to names of files")
    return found


def _opened(path: Path) -> Any:
    """Open a file: a safetensors reader, or a dictionary of tensors."""
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt")
        zipped = zipfile.is_zipfile(path)  # files of torch before 1.6 cannot be memory-mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a truncated zip, a header of nonsense, a pickle with code in it
        raise ShardError(
            f"{path}: cannot be read ({type(error).__name__}: {error!s:.150}); it is cut short, or "
            "holds more than plain tensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        kinds = {type(key).__name__ for key in content} if isinstance(content, dict) else set()
        described = type(content).__name__ + (f" by {', '.join(sorted(kinds))}" if kinds else "")
        raise ShardError(f"{path}: holds a {described}, expected tensors by name")
    return content
