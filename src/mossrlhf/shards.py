"""Checkpoints on disk, tensor by tensor: safetensors, or older files of torch without code in them.

Nothing is unpickled but plain tensors, and no name in an index is followed out of its folder.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
"""How files of weights end."""


class ShardError(ValueError):
    """A checkpoint that cannot be read: which file, which key, what is wrong with it."""


class Shards:
    """The tensors of a checkpoint's folder, read one at a time.

    Args:
        folder: with ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards.

    Raises:
        ShardError: where there is no checkpoint, or a shard of it is missing or damaged.

    Source: the layouts of transformers.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ShardError(f"{self.folder}: there is no such folder")
        self._open: tuple[Path, Any] | None = None
        self.files = self._weight_map()

    @property
    def largest(self) -> int:
        """Bytes of the largest file."""
        return max(path.stat().st_size for path in set(self.files.values()))

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def __iter__(self) -> Iterator[str]:
        """Yield the keys, those of one file after each other."""
        return iter(sorted(self.files, key=lambda key: (self.files[key].name, key)))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: str) -> Tensor:
        """Read a tensor.

        Raises:
            ShardError: where the file does not hold it, or holds something else.
        """
        path = self.files[key]
        content = self._content(path)
        try:
            value = content.get_tensor(key) if path.suffix == ".safetensors" else content[key]
        except (KeyError, SafetensorError) as error:
            raise ShardError(f"{path}: it holds no {key!r}, which its index says") from error
        if not _is_plain(value):
            kind = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else "none"
            raise ShardError(
                f"{path}: {key!r} is a {type(value).__name__} ({kind}), expected a plain tensor "
                "with its numbers"
            )
        return value

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape, without reading the numbers where the file allows it.

        Raises:
            ShardError: where the file does not hold it.
        """
        path = self.files[key]
        if path.suffix != ".safetensors":
            return tuple(self[key].shape)
        try:
            return tuple(self._content(path).get_slice(key).get_shape())
        except SafetensorError as error:
            raise ShardError(f"{path}: it holds no {key!r}, which its index says") from error

    def others(self) -> Iterator[Path]:
        """Yield the files that are no weights, folders below included: configuration, tokenizer."""
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

    def _weight_map(self) -> dict[str, Path]:
        for name in INDICES:
            if (index := self.folder / name).is_file():
                found = {k: self._inside(index, f) for k, f in _weight_map(index).items()}
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
            f"{self.folder}: no weights in it, expected {' or '.join(SINGLE)}, or shards with "
            "their index"
        )

    def _inside(self, index: Path, name: str) -> Path:
        if Path(name).name != name or not name.endswith((".safetensors", ".bin")):
            raise ShardError(f"{index}: it names {name!r}, expected a file of weights beside it")
        return self.folder / name


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor whose memory holds its numbers."""
    known = type(value) is Tensor and value.layout is torch.strided
    return known and not value.is_quantized and not value.is_meta


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{index}: no index of weights: {error!r}") from error
    if not isinstance(found, dict) or not all(isinstance(f, str) for f in found.values()):
        raise ShardError(f"{index}: its weight_map is not one of keys to files")
    return found


def _opened(path: Path) -> Any:
    """What gives the tensors of a file: a reader of safetensors, or a dict."""
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt")
        zipped = zipfile.is_zipfile(path)  # before torch 1.6 they were not, and can't be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a truncated zip, a header of nonsense, a pickle with code in it
        raise ShardError(
            f"{path}: cannot be read ({type(error).__name__}: {error!s:.150}); it is cut short, or "
            "holds more than plain tensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ShardError(f"{path}: holds a {_described(content)}, expected tensors by name")
    return content


def _described(content: Any) -> str:
    kinds = {type(key).__name__ for key in content} if isinstance(content, dict) else set()
    return type(content).__name__ + (f" by {', '.join(sorted(kinds))}" if kinds else "")


class ShardWriter:
    """Writes tensors to shards of safetensors as they come, with an index at the end.

    Args:
        folder: that they go to.
        budget: bytes after which a shard is written; a larger tensor has one of its own.

    Source: the layout of transformers.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self.shards: list[list[str]] = []
        self.total = 0
        self._waiting: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, key: str, tensor: Tensor) -> None:
        """Take a tensor; what has waited is written where it would become too much.

        Args:
            key: its name.
            tensor: kept until it is written.
        """
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._bytes + size > self.budget:
            self._flush()
        taken = {_memory(waiting) for waiting in self._waiting.values()}
        # Tied weights of older files share their memory, which safetensors does not write.
        tensor = tensor.clone() if _memory(tensor) in taken else tensor
        self._waiting[key] = tensor.contiguous()
        self._bytes += size
        self.total += size

    def close(self) -> None:
        """Write what is left, and the index where there are several shards."""
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
