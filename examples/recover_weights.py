r"""Recover a released reward model from its diff, and compute the reward of a response.

    python examples/recover_weights.py llama-7b moss-rlhf-reward-model-7B-en/diff reward-en \
        --checksum en-reward

The first folder holds the published base weights, the second the diff, the third is created. For
policies and SFT models see `python -m mossrlhf.weight_diff recover --help`.
"""

import argparse
import sys

from transformers import AutoTokenizer

from mossrlhf import RewardModel, score_responses
from mossrlhf.data import set_dialogue_template
from mossrlhf.weight_diff import CHECKSUMS, recover


def main(argv: list[str] | None = None) -> float:
    """Recover a reward model, and return the reward of one response."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("raw", help="folder of the raw weights")
    parser.add_argument("diff", help="folder of the diff")
    parser.add_argument("tuned", help="folder to be created")
    parser.add_argument(
        "--checksum", "--check_sum", choices=[*CHECKSUMS], help="a published checksum"
    )
    parser.add_argument("--lang", choices=("en", "zh"), default="en")
    args = parser.parse_args(argv)
    try:
        total = recover(args.raw, args.diff, args.tuned, "reward", checksum=args.checksum)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"checksum {total:.6f}")
    reward_model = RewardModel.from_pretrained(args.tuned)
    tokenizer = AutoTokenizer.from_pretrained(args.tuned)
    set_dialogue_template(tokenizer, args.lang)
    prompt = [{"role": "user", "content": "What should I do with an injured bird?"}]
    response = "Keep it warm and dark, and call a wildlife rescue."
    reward = score_responses(reward_model, tokenizer, [prompt], [response]).item()
    print(f"{response!r} has a reward of {reward:.3f}")
    return reward


if __name__ == "__main__":
    main()
