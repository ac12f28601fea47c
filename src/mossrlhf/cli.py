"""The command ``mossrlhf``: ``demo`` trains in the toy world, ``report`` writes an HTML report."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mossrlhf.plotting import require_matplotlib

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as in shells."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="mossrlhf", description="PPO-max, the algorithm of arXiv 2307.04964."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    what = "vanilla PPO, vanilla PPO tuned and PPO-max side by side, in the toy world"
    run = commands.add_parser("demo", help=what, description=f"{what}: minutes on two cores.")
    run.add_argument("--lang", choices=["en", "zh"], default="en", help="of the dialogues [en]")
    run.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of world, models and runs [0]"
    )
    run.add_argument(
        "--output_dir",
        default="outputs/demo",
        metavar="FOLDER",
        help="folder for curves, samples and models [outputs/demo]",
    )
    what = "one HTML page from the files of a run"
    report = commands.add_parser("report", help=what, description=f"{what}; it needs no network.")
    report.add_argument("run", metavar="RUN", help="a run's output_dir, or a folder of several")
    report.add_argument("--output", metavar="FILE", help="the page [RUN/report.html]")
    options = parser.parse_args(argv)
    if options.command == "report":
        _report(parser, options)
        return
    try:
        require_matplotlib()
    except ImportError as error:
        parser.exit(1, f"mossrlhf demo: {error}\n")

    with exit_on_interrupt():
        from mossrlhf import demo

        config = demo.DemoConfig(options.lang, options.seed, options.output_dir)
        summary = demo.main(config)
    if summary["interrupted"]:
        sys.exit(INTERRUPTED)


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Let Ctrl-C in the block exit with `INTERRUPTED` and one line instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt as stop:
        where = f" in the stage {stop}" if str(stop) else ""
        print(f"\nInterrupted{where}: this run leaves no summary.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _report(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    from mossrlhf.run_report import write_report

    try:
        print(write_report(options.run, options.output))
    except OSError as error:
        parser.exit(1, f"mossrlhf report: {error}\n")


if __name__ == "__main__":
    main()
