"""The findings of "Secrets of RLHF in Large Language Models Part I: PPO", run again in a toy world.

    python examples/secrets_study.py            # all of it: some two hours on two cores
    python examples/secrets_study.py --quick    # whether it runs; says nothing about PPO
    python examples/secrets_study.py --publish  # besides, into README and docs/ of this checkout

Every finding is a set of arms (`study/arms.py`) and of claims with the verdict expected beforehand
(`study/findings.py`). All arms have the same learning rate, rollouts and prompts; none is tuned.
Ctrl-C ends it; the same command goes on from what is finished. In `--output_dir` it leaves
`study.md`, its pictures, and in `results/` the curves and figures of every run.
"""

import argparse
import sys
from pathlib import Path

from study import plan, running
from study.page import write_page, write_readme

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "study"
COMMAND = "python examples/secrets_study.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="whether it runs, in a minute")
    parser.add_argument("--publish", action="store_true", help="write into docs/ as well")
    parser.add_argument("--output_dir", help="[outputs/study, or outputs/study_quick]")
    parser.add_argument("--workers", type=int, default=2, help="processes [%(default)s]")
    args = parser.parse_args()
    if args.quick and args.publish:
        parser.error("--quick says nothing about PPO: there is nothing to publish")
    scale = plan.QUICK if args.quick else plan.Scale()
    name = "study_quick" if args.quick else "study"
    folder = Path(args.output_dir or ROOT / "outputs" / name)
    try:
        running.everything(scale, folder / "runs", args.workers)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    command = f"{COMMAND} --quick" if args.quick else COMMAND
    running.gather(scale, folder / "runs", folder / "results", command)
    write_page(folder / "results", folder)
    print(f"{folder}/: study.md, images/, results/")
    if args.publish:
        running.gather(scale, folder / "runs", RESULTS, command)
        write_page(RESULTS, ROOT / "docs")
        write_readme(RESULTS, ROOT / "README.md")
        print(f"{ROOT}: docs/study.md, docs/images/study/, README.md, benchmarks/results/study/")


if __name__ == "__main__":
    main()
