"""What a recipe leaves to be looked at: a table, and samples drawn at random."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS = (
    ("reward-model score", "reward_score", "{:.2f}"),
    ("true quality", "true_quality", "{:.2f}"),
    ("KL to SFT, nats/seq", "kl_per_sequence", "{:.1f}"),
    ("length, tokens", "response_length", "{:.1f}"),
    ("perplexity, policy", "perplexity_policy", "{:.2f}"),
    ("perplexity, SFT", "perplexity_sft", "{:.2f}"),
    ("wins against SFT", "win_rate", "{:.0%}"),
    ("loses", "lose_rate", "{:.0%}"),
)


def summary_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out the figures of every run, a column each, for the console.

    Args:
        runs: figures by name, by run.

    Returns:
        lines of at most 80 columns for up to three runs.
    """
    width = 18
    lines = [" " * 21 + "".join(name.rjust(width) for name in runs)]
    for label, key, form in ROWS:
        if all(key in run for run in runs.values()):
            cells = (form.format(run[key]).rjust(width) for run in runs.values())
            lines.append(label.ljust(21) + "".join(cells))
    cells = (("yes" if run.get("collapsed") else "no").rjust(width) for run in runs.values())
    lines.append("collapsed".ljust(21) + "".join(cells))
    return "\n".join(lines)


def samples_page(
    title: str, samples: Sequence[Mapping[str, Any]], path: Path, count: int, seed: int = 0
) -> None:
    """Write some prompts with the answers of every model, drawn at random and not chosen.

    Args:
        title: heading of the page.
        samples: each with ``prompt`` and, under ``answers``, a text by model's name.
        path: the Markdown file.
        count: how many to draw.
        seed: of the draw.
    """
    drawn = random.Random(seed).sample(list(samples), min(count, len(samples)))
    lines = [f"# {title}", "", f"{len(drawn)} of {len(samples)}, drawn at random."]
    for number, sample in enumerate(drawn, 1):
        lines += ["", f"## {number}", "", *_quoted(sample["prompt"]), ""]
        for name, answer in sample["answers"].items():
            lines += [f"**{name}**", "", *_quoted(answer), ""]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _quoted(text: str) -> list[str]:
    return [f"> {line}" if line else ">" for line in (text or "(empty)").splitlines()]
