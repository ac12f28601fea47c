"""Diffs of sharded Llamas of over 200 M parameters, there and back: exactness, memory, time.

    python benchmarks/weight_diff.py          # some ten minutes
    python benchmarks/weight_diff.py --table  # into docs/weights.md

Each way runs in a process of its own; its peak memory is held to twice the largest shard plus
500 MB, above what Python takes with everything imported.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from mossrlhf.serialization import Shards
from mossrlhf.version import versions
from mossrlhf.weight_diff import make_diff, recover
from mossrlhf.weight_diff.diff import ShardWriter

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "weight_diff.json"
PAGE = ROOT / "docs" / "weights.md"
MARKS = ("<!-- written by: benchmarks/weight_diff.py --table -->\n", "<!-- end -->\n")
KINDS, DTYPES = ("reward", "sft", "policy"), ("float32", "bfloat16")
SIZES: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12,
    num_attention_heads=16, max_position_embeddings=64,
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure every combination, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default=str(FIGURES))
    parser.add_argument("--way", nargs=5, help="measure one way, in this process")
    parser.add_argument("--table", action="store_true", help="write the page, measure nothing")
    args = parser.parse_args(argv)
    if args.table:
        figures = json.loads(Path(args.json).read_text(encoding="utf-8"))
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")
        return
    if args.way:
        print(json.dumps(measured(*args.way)))
        return
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for dtype in DTYPES:
        for related in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                rows += pair(Path(folder), dtype, related)
    command = "python benchmarks/weight_diff.py"
    kept = {"command": command, "sizes": SIZES, "rows": rows, "versions": versions()}
    Path(args.json).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def with_table(page: str, figures: Mapping[str, Any]) -> str:
    """Put the figures into a page, between the marks.

    Args:
        page: Markdown with both `MARKS`.
        figures: as they are kept.

    Returns:
        the page.
    """
    lines = ["", "| kind | type | tuned weights | exact | stored whole | peak, MB | allowed, MB |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for row in figures["rows"]:
        there, back = row["make_diff"], row["recover"]
        lines.append(
            f"| {row['kind']} | {row['dtype']} | {'related' if row['related'] else 'unrelated'} | "
            f"{'yes' if row['exact'] else 'no'} | {there['whole']} of {there['of']} | "
            f"{there['peak_mb']} / {back['peak_mb']} | {there['bound_mb']} / {back['bound_mb']} |"
        )
    largest = max(row["make_diff"]["largest_shard_mb"] for row in figures["rows"])
    count = max(row["parameters"] for row in figures["rows"])
    lines += [
        "",
        f"A Llama of {count / 1e6:.0f} M parameters in shards of up to {largest} MB. Peaks are",
        "those of `make_diff` and `recover`, above Python's with everything imported; allowed are",
        "two of the largest shard and 500 MB.",
        "",
    ]
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return "".join([before, MARKS[0], "\n".join(lines), "\n", MARKS[1], after])


def pair(folder: Path, dtype: str, related: bool) -> list[dict[str, Any]]:
    """Make raw and tuned weights, then go there and back with every kind."""
    raw = llama(0, dtype)
    tuned = llama(0 if related else 1, dtype)
    if related:
        for weight in tuned.parameters():
            weight.data += (1e-3 * torch.randn_like(weight.float())).to(weight.dtype)
    save(raw, folder / "raw")
    rows = []
    for kind in KINDS:
        head = torch.nn.Linear(SIZES["hidden_size"], 1, bias=False, dtype=getattr(torch, dtype))
        tuned.reward_head = head
        if kind != "reward":
            del tuned.reward_head
        save(tuned, folder / f"{kind}-tuned")
        there = run(
            "make_diff", folder / "raw", folder / f"{kind}-diff", folder / f"{kind}-tuned", kind
        )
        back = run(
            "recover", folder / "raw", folder / f"{kind}-diff", folder / f"{kind}-back", kind
        )
        row = {
            "kind": kind, "dtype": dtype, "related": related,
            "parameters": sum(p.numel() for p in tuned.parameters()),
            "exact": alike(folder / f"{kind}-tuned", folder / f"{kind}-back"),
            "make_diff": there, "recover": back,
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        rows.append(row)
        for path in folder.glob(f"{kind}-*"):
            for file in path.iterdir():
                file.unlink()
    return rows


def llama(seed: int, dtype: str) -> LlamaForCausalLM:
    """Return a Llama of random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(getattr(torch, dtype))


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write it in shards."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    writer = ShardWriter(folder, 2**28)
    for key, value in model.state_dict().items():
        writer.add(key, value)
    writer.close()


def run(way: str, *given: Any) -> dict[str, Any]:
    """Measure one way in a process of its own."""
    command = [sys.executable, __file__, "--way", way, *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(way: str, raw: str, diff: str, tuned: str, kind: str) -> dict[str, Any]:
    """Go one way, and say what it took."""
    before, begun = peak(), time.perf_counter()
    notes: dict[str, Any] = {}
    if way == "make_diff":
        notes = make_diff(raw, tuned, diff, kind, progress=False)  # type: ignore[arg-type]
    else:
        recover(raw, diff, tuned, kind, progress=False)  # type: ignore[arg-type]
    largest = max(Shards(folder).largest for folder in (raw, diff, tuned))
    found = {
        "seconds": round(time.perf_counter() - begun, 1),
        "peak_mb": round((peak() - before) / 1e6),
        "bound_mb": round(2 * largest / 1e6 + 500),
        "largest_shard_mb": round(largest / 1e6),
    }
    return {**found, "whole": len(notes["whole"]), "of": len(notes["dtypes"])} if notes else found


def peak() -> int:
    """Return the most memory this process has had in use, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def alike(left: Path, right: Path) -> bool:
    """Whether two checkpoints have the same tensors, bit for bit."""
    one, other = Shards(left), Shards(right)
    kinds = {2: torch.int16, 4: torch.int32}

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        kind = kinds[a.element_size()]
        return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))

    return set(one) == set(other) and all(same(one[key], other[key]) for key in one)


if __name__ == "__main__":
    main()
