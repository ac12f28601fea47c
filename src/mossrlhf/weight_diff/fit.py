"""Whether raw weights, tuned ones and a diff fit together."""

import warnings
from typing import Literal

from mossrlhf.shards import Shards
from mossrlhf.weight_diff.check_sums import FREQUENCIES

ModelType = Literal["reward", "sft", "policy"]
HEADS = ("reward_head.weight", "score.weight")
"""What reward models have: the released ones, and the classifiers of transformers."""

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""What grows where tokens are added."""


class DiffError(ValueError):
    """Weights that do not fit together: which file or key, and why."""


def is_difference(key: str) -> bool:
    """Whether a diff holds tuned − raw of a tensor, if that comes back exactly.

    Args:
        key: its name.

    Source: C's ``merge_weight_*.py``.
    """
    return "layers" in key


def require_known(model_type: str) -> None:
    """Refuse the name of no kind.

    Args:
        model_type: "reward", "sft" or "policy".

    Raises:
        DiffError: where it is none of them.

    Source: ours.
    """
    if model_type not in ("reward", "sft", "policy"):
        raise DiffError(f"model_type: got {model_type!r}, expected 'reward', 'sft' or 'policy'")


def require_kind(shards: Shards, model_type: str) -> None:
    """Refuse weights of another kind.

    Args:
        shards: tuned weights, or a diff.
        model_type: "reward", "sft" or "policy".

    Raises:
        DiffError: where they are not of that kind.

    Source: ours.
    """
    require_known(model_type)
    heads = [name for name in HEADS if name in shards]
    if model_type == "reward" and not heads:
        raise DiffError(
            f"{shards.folder}: it has no {HEADS[0]!r} and no {HEADS[1]!r}, so it is not the reward "
            "model that model_type='reward' says"
        )
    if model_type != "reward" and heads:
        raise DiffError(
            f"{shards.folder}: it has a {heads[0]!r}, so it is a reward model, and not what "
            f"model_type={model_type!r} says"
        )


def require_fit(raw: Shards, other: Shards, model_type: str) -> None:
    """Refuse raw weights of another model, before anything is written.

    Args:
        raw: what everyone has.
        other: tuned weights, or a diff.
        model_type: "reward", "sft" or "policy".

    Raises:
        DiffError: where one lacks what the other has, or has it in another shape.

    Source: ours.
    """
    for key in other:
        if key in raw:
            _require_shape(raw, other, key)
        elif is_difference(key) and not key.endswith(FREQUENCIES):
            raise DiffError(f"{raw.folder}: it has no {key!r}, which {other.folder} has")
    for key in raw:
        # A classifier has no output head.
        spare = key.endswith(FREQUENCIES) or (model_type == "reward" and key == VOCABULARY[1])
        if key not in other and not spare:
            raise DiffError(
                f"{other.folder}: it has no {key!r}, which {raw.folder} has; what is made of it "
                "would lack it"
            )


def _require_shape(raw: Shards, other: Shards, key: str) -> None:
    old, new = raw.shape(key), other.shape(key)
    if old == new:
        return
    grows = key in VOCABULARY and old[1:] == new[1:] and len(old) == len(new) == 2
    if not grows or new[0] < old[0]:
        why = "the raw weights are of another model"
        if grows:
            why = "tokens may be added to a vocabulary, not taken away"
        raise DiffError(
            f"{key!r} has the shape {old} in {raw.folder}, and {new} in {other.folder}; {why}"
        )
    if key == VOCABULARY[0]:
        warnings.warn(
            f"{other.folder}: {new[0] - old[0]} tokens more than in {raw.folder}; right where "
            "tokens were added to the tuned model",
            UserWarning,
            stacklevel=4,
        )
