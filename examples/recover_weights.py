r"""Recover released weights from their diff, and score a response with them.

    python examples/recover_weights.py llama-7b moss-rlhf-reward-model-7B-en/diff reward-en \
        --check_sum en-reward

The first folder holds the weights everyone has, the second the diff, the third is made. For
policies and SFT models see `python -m mossrlhf.weight_diff recover --help`.
"""

import argparse
import sys

from transformers import AutoTokenizer

from mossrlhf import RewardModel, score_responses
from mossrlhf.data import set_dialogue_template
from mossrlhf.weight_diff import CHECK_SUMS, recover


def main(argv: list[str] | None = None) -> float:
    """Recover a reward model, and ask it about an answer; returns the score."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("raw", help="folder of the raw weights")
    parser.add_argument("diff", help="folder of the diff")
    parser.add_argument("tuned", help="folder to be made")
    parser.add_argument("--check_sum", choices=[*CHECK_SUMS], help="one that was published")
    parser.add_argument("--lang", choices=("en", "zh"), default="en")
    args = parser.parse_args(argv)
    try:
        total = recover(args.raw, args.diff, args.tuned, "reward", check_sum=args.check_sum)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"checksum {total:.6f}")
    reward_model = RewardModel.from_pretrained(args.tuned)
    tokenizer = AutoTokenizer.from_pretrained(args.tuned)
    set_dialogue_template(tokenizer, args.lang)
    prompt = [{"role": "user", "content": "What should I do with an injured bird?"}]
    answer = "Keep it warm and dark, and call a wildlife rescue."
    score = score_responses(reward_model, tokenizer, [prompt], [answer]).item()
    print(f"{answer!r} scores {score:.3f}")
    return score


if __name__ == "__main__":
    main()
