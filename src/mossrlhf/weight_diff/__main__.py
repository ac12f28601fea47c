r"""Weights published as differences from raw ones: make a diff, or recover the weights.

python -m mossrlhf.weight_diff recover --path_raw llama-7b --path_diff diff \
        --path_tuned reward-en --model_type reward --checksum en-reward
python -m mossrlhf.weight_diff make_diff --path_raw llama-7b --path_tuned tuned \
        --path_diff diff --model_type sft
"""

import argparse
import sys

import torch

from mossrlhf.weight_diff import CHECKSUMS, make_diff, recover

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "make_diff":
            notes = make_diff(args.path_raw, args.path_tuned, args.path_diff, args.model_type)
            print(f"{len(notes['whole'])} of {len(notes['dtypes'])} tensors are stored in full")
            print(f"written to {args.path_diff}")
            return 0
        total = recover(
            args.path_raw,
            args.path_diff,
            args.path_tuned,
            args.model_type,
            checksum=_checksum(args.checksum),
            dtype=getattr(torch, args.dtype),
        )
    except (ValueError, OSError) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    print(f"checksum {total:.6f}; written to {args.path_tuned}")
    return 0


def _checksum(given: str | None) -> float | str | None:
    try:
        return None if given is None else float(given)
    except ValueError:
        return given


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mossrlhf.weight_diff",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, created in (("recover", "path_tuned"), ("make_diff", "path_diff")):
        command = commands.add_parser(name, help=f"write the folder --{created}")
        for path in ("path_raw", "path_diff", "path_tuned"):
            new = ", to be created" if path == created else ""
            command.add_argument(f"--{path}", required=True, help=f"folder{new}")
        command.add_argument("--model_type", required=True, choices=("reward", "sft", "policy"))
        if name == "recover":
            known = f"a number, or one of {', '.join(CHECKSUMS)}"
            command.add_argument("--checksum", "--check_sum", metavar="SUM", help=known)
            types = f"{', '.join(DTYPES)}: of the result, if the diff has no notes [float32]"
            command.add_argument(
                "--dtype", choices=DTYPES, default=DTYPES[0], metavar="TYPE", help=types
            )
    return parser


if __name__ == "__main__":
    sys.exit(main())
