"""The findings of "Secrets of RLHF in Large Language Models Part I: PPO", run again in a toy world.

    python examples/secrets_study.py            # all of it: some two hours on two cores
    python examples/secrets_study.py --quick    # a minute, to test that it runs
    python examples/secrets_study.py --publish  # also writes README and docs/ of this checkout

Every finding is a set of arms (`study/arms.py`) and of claims with the verdict expected beforehand
(`study/findings.py`). All arms have the same learning rate, rollouts and prompts; none is tuned.
Ctrl-C ends it; the same command resumes. It writes `study.md` and its figures to `--output_dir`,
and the curves and numbers of every run to `results/` there.
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
    parser.add_argument("--quick", action="store_true", help="test that it runs, in a minute")
    parser.add_argument("--publish", action="store_true", help="write into docs/ as well")
    parser.add_argument("--output_dir", help="[outputs/study, or outputs/study_quick]")
    parser.add_argument("--workers", type=int, default=2, help="processes [%(default)s]")
    args = parser.parse_args()
    if args.quick and args.publish:
        parser.error("--quick has no meaningful results; there is nothing to publish")
    scale = plan.QUICK if args.quick else plan.Scale()
    name = "study_quick" if args.quick else "study"
    folder = Path(args.output_dir or ROOT / "outputs" / name)
    try:
        running.everything(scale, folder / "runs", args.workers)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command resumes from here.", file=sys.stderr)
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
