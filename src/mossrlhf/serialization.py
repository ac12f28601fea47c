"""Files: tensors in safetensors, plain data in JSON, with checksums; nothing is pickled."""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

CHECKSUM = "crc32"
"""The key under which a state holds its own checksum."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors; an empty mapping writes an empty file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of safetensors; raise ValueError where it is damaged."""
    try:
        return dict(load_file(str(path)))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Write plain data, indented."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a file of JSON; raise ValueError where it is none."""
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
    """Raise ValueError where a file is missing, or differs from what `file_checksums` saw."""
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
