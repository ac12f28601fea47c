"""``mossrlhf demo``: the main job from an installed package; ``mossrlhf report``: a run's page."""

import argparse
from collections.abc import Sequence

from mossrlhf.plotting import require_matplotlib
from mossrlhf.recipes.bookkeeping import ended_by_interrupt, exit_if_interrupted


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: arguments; None for those of the process.

    Raises:
        SystemExit: with 2 where an argument is wrong, 1 where there is no matplotlib for the demo
            or no run to report of, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="mossrlhf", description="PPO-max, the algorithm of arXiv 2307.04964, at work."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    what = "vanilla PPO, vanilla PPO tuned and PPO-max side by side, in the toy world"
    demo = commands.add_parser("demo", help=what, description=f"{what}: minutes on two cores.")
    demo.add_argument("--lang", choices=["en", "zh"], default="en", help="of the dialogues [en]")
    demo.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of world, models and runs [0]"
    )
    demo.add_argument(
        "--output_dir",
        default="outputs/demo",
        metavar="FOLDER",
        help="where curves, samples and models go [outputs/demo]",
    )
    what = "one HTML page of what a run has left in its folder"
    report = commands.add_parser("report", help=what, description=f"{what}: it needs no network.")
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

    with ended_by_interrupt():
        from mossrlhf.recipes import toy

        config = toy.ToyConfig(lang=options.lang, seed=options.seed, output_dir=options.output_dir)
        exit_if_interrupted(toy.main(config))


def _report(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    from mossrlhf.run_report import write_report

    try:
        print(write_report(options.run, options.output))
    except OSError as error:
        parser.exit(1, f"mossrlhf report: {error}\n")


if __name__ == "__main__":
    main()
