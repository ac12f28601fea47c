"""What a recipe leaves to be looked at: curves, a table, and samples drawn at random."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mossrlhf.recipes.bookkeeping import REPORT, say
from mossrlhf.trainer import Trainer

ROWS = (
    ("reward-model score", "reward_score", "{:.2f}"),
    ("true quality", "true_quality", "{:.2f}"),
    ("KL to SFT, nats/seq", "kl_per_sequence", "{:.1f}"),
    ("length, tokens", "response_length", "{:.1f}"),
    ("perplexity, policy", "perplexity_policy", "{:.2f}"),
    ("perplexity, SFT", "perplexity_sft", "{:.2f}"),
    ("wins against SFT", "win_rate", "{:.0%}"),
    ("loses against SFT", "lose_rate", "{:.0%}"),
)


@dataclass
class Results:
    """What the runs of a recipe leave behind, by name of the run.

    Args:
        asked: PPO iterations of the runs there were to be.
        histories: `Trainer.history`.
        runs: figures; of a run that could not be measured, ``steps`` alone.
        answers: to the held-out prompts, a text each; those of ``SFT`` first.
        saved: folders of models that were written.
        interrupted: whether Ctrl-C cut it short.

    Source: ours.
    """

    asked: dict[str, int]
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)
    saved: list[str] = field(default_factory=lambda: ["reward_model/"])
    interrupted: bool = False


def write_report(
    results: Results,
    prompts: Sequence[Mapping[str, Any]],
    folder: Path,
    draw: Callable[[Mapping[str, Any], Path], Any],
    judge: str,
    title: str,
    seed: int,
) -> None:
    """Draw the curves, write the samples, print the table; of an interrupted run what there is.

    Args:
        results: of all runs.
        prompts: the held-out records.
        folder: where ``curves.png`` and ``samples.md`` go.
        draw: from the histories by name, and a path, to a picture.
        judge: who says which answer wins.
        title: of the samples.
        seed: of the draw of the samples.

    Source: ours.
    """
    started = {name: h for name, h in results.histories.items() if any("step" in e for e in h)}
    if started:
        draw(started, folder / "curves.png")
    if results.answers:
        samples = [
            {
                "prompt": dialogue(record["prompt"]),
                "answers": dict(zip(results.answers, texts, strict=True)),
            }
            for record, *texts in zip(prompts, *results.answers.values(), strict=True)
        ]
        samples_page(title, samples, folder / "samples.md", count=12, seed=seed)
    measured = {name: run for name, run in results.runs.items() if "reward_score" in run}
    if measured:
        print("\n" + summary_table(measured))
        say(f"Wins and losses: {len(prompts)} held-out prompts, judged by {judge}.")
    if results.interrupted:
        print("\nINTERRUPTED; PPO iterations done:")
        for name, steps in results.asked.items():
            print(f"  {name}: {results.runs.get(name, {}).get('steps', 0)} of {steps}")
    files = [name for name in REPORT if (folder / name).exists()]
    print(f"\n{folder}/: {', '.join([*files, *results.saved])}")


def summary_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out the figures of every run, a column each, for the console.

    Args:
        runs: figures by name, by run; what only some of them have stays blank for the others.

    Returns:
        lines of at most 80 columns for up to three runs.

    Source: ours.
    """
    lines = [_line("", runs)]
    for label, key, form in ROWS:
        if any(key in run for run in runs.values()):
            lines.append(_line(label, (_cell(run.get(key), form) for run in runs.values())))
    flags = {None: "", True: "yes", False: "no"}
    lines.append(_line("collapsed", (flags[run.get("collapsed")] for run in runs.values())))
    return "\n".join(lines)


def _line(label: str, cells: Iterable[str]) -> str:
    return label.ljust(21) + "".join(cell.rjust(18) for cell in cells)


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return ""
    text = form.format(value)
    # What rounds to nothing has no sign.
    return text.lstrip("-") if not text.strip("-0.%") else text


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

    Source: ours.
    """
    drawn = random.Random(seed).sample(list(samples), min(count, len(samples)))
    lead = [
        f"{len(drawn)} of the {len(samples)} held-out prompts, drawn at random, not chosen.",
        "Beneath each stands one answer of every model, as it was sampled.",
    ]
    write_page(title, lead, drawn, path)


def write_page(
    title: str, lead: Sequence[str], samples: Sequence[Mapping[str, Any]], path: Path
) -> None:
    """Write a page of prompts with answers, all of them.

    Args:
        title: heading of the page.
        lead: lines beneath it: where the samples come from.
        samples: each with ``prompt`` and, under ``answers``, a text by model's name.
        path: the Markdown file.

    Source: ours.
    """
    lines = [f"# {title}", "", *lead]
    for number, sample in enumerate(samples, 1):
        lines += ["", f"## Prompt {number}", "", *_quoted(sample["prompt"])]
        for name, answer in sample["answers"].items():
            lines += ["", f"**{name}**", "", *_quoted(answer)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def answer_texts(trainer: Trainer, reference: bool = False) -> list[str]:
    """Return the answers to a trainer's held-out prompts, as texts.

    Args:
        trainer: with an ``eval_dataset``.
        reference: whether the reference answers, or the policy.

    Source: ours.
    """
    assert trainer.eval_dataset is not None
    ids = trainer.answer(trainer.eval_dataset, reference).completions()
    return list(trainer.processing_class.batch_decode(ids, skip_special_tokens=True))


def answer_pairs(trainer: Trainer, records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the answers of policy and reference to some prompts, as texts.

    Args:
        trainer: any.
        records: with ``prompt``, at least one for each process.

    Returns:
        of this process's share of the records, by ``policy`` and ``reference``.

    Source: ours.
    """

    def texts(reference: bool) -> list[str]:
        ids = trainer.answer(records, reference).completions()
        return list(trainer.processing_class.batch_decode(ids, skip_special_tokens=True))

    both = zip(texts(reference=False), texts(reference=True), strict=True)
    return [{"policy": ours, "reference": theirs} for ours, theirs in both]


def dialogue(messages: str | Sequence[Mapping[str, str]]) -> str:
    """Return a prompt as people read it: a question, or a dialogue with its speakers.

    Args:
        messages: with ``role`` and ``content``; a text is returned as it is.

    Source: ours.
    """
    if isinstance(messages, str):
        return messages
    if len(messages) == 1:
        return messages[0]["content"]
    speakers = {"user": "Human", "assistant": "Assistant", "system": "System"}
    turns = ((speakers.get(turn["role"], turn["role"]), turn["content"]) for turn in messages)
    return "\n\n".join(f"{speaker}: {content}" for speaker, content in turns)


def _quoted(text: str) -> list[str]:
    lines = text.strip().splitlines() or ["(empty)"]
    return [f"> {line}".rstrip() for line in lines]
