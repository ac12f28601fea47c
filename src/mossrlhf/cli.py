"""``mossrlhf demo``: the main job from an installed package."""

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: arguments; None for those of the process.
    """
    parser = argparse.ArgumentParser(prog="mossrlhf", description="PPO-max, to be looked at")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="vanilla PPO, vanilla PPO tuned and PPO-max side by side, in the toy world"
    )
    demo.add_argument("--lang", choices=["en", "zh"], default="en")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--output_dir", default="outputs/demo")
    options = parser.parse_args(argv)

    from mossrlhf.recipes import toy

    toy.main(toy.ToyConfig(lang=options.lang, seed=options.seed, output_dir=options.output_dir))


if __name__ == "__main__":
    main()
