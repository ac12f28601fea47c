"""The page of the study: every number in it comes from the records of the runs."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from study import running
from study.arms import ARMS
from study.discussion import DISCUSSION, FRONTIER, LEAD, METHOD
from study.findings import FINDINGS
from study.pictures import draw_all, of, runs_of
from study.plan import BASE, GENTLE
from study.statistics import Claim, Finding, Interval, Seed, measured

BEGIN = "<!-- written by: examples/secrets_study.py --publish -->"
END = "<!-- end -->"

Records = Sequence[Mapping[str, Any]]


def write_page(results: Path, folder: Path) -> None:
    """Write ``study.md`` and its pictures.

    Args:
        results: folder of the records.
        folder: of the page and ``images/study``.
    """
    records = running.read(results)
    draw_all(records, folder / "images" / "study")
    (folder / "study.md").write_text(page(records), encoding="utf-8")


def write_readme(results: Path, path: Path) -> None:
    """Put the table of `readme` between its marks.

    Args:
        results: folder of the records.
        path: of ``README.md``.
    """
    text = path.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END, 1)
    table = readme(running.read(results))
    path.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}", encoding="utf-8")


def readme(records: Records) -> str:
    """Return the table of the README.

    Args:
        records: of all worlds.
    """
    english = of("en", records)
    columns = ("score", "true quality", "KL, nats", "length", "win", "lose", "collapsed")
    lines = [f"| mean over {len(english)} seeds | {' | '.join(columns)} |", "| --- " * 8 + "|"]
    sft = [record["facts"]["sft"] for record in english]
    names = ("reward_score", "true_quality", "response_length")
    score, quality, length = (number(mean(facts[name] for facts in sft)) for name in names)
    lines.append(f"| SFT | {score} | {quality} | 0 | {length} | | | |")
    for suffix, rate in (("", ""), ("@gentle", ", a third of the rate")):
        for arm in ("vanilla", "ppo_max"):
            runs = runs_of(arm + suffix, english)
            lines.append(f"| {ARMS[arm].title}{rate} | {figures(runs, ends=False)} |")
    return "\n".join(lines)


def page(records: Records) -> str:
    """Return the whole page.

    Args:
        records: of all worlds.
    """
    parts = [
        LEAD,
        "## Verdicts",
        "\n".join(verdicts(records)),
        "## Method",
        METHOD,
        provenance(records),
        "## The worlds",
        "\n".join(worlds(records)),
        conditions(records),
        "## True quality over √KL",
        "![True quality over the square root of the KL divergence](images/study/frontier.png)",
        FRONTIER,
        *(part for finding in FINDINGS for part in section(finding, records)),
        "## Every arm",
        "Means over the seeds, on held-out prompts after the last iteration; in brackets the "
        "smallest and the largest. A run counts as collapsed if `policy/collapsed` was logged in "
        "its last five points. KL, wins and losses are against the initial policy of a run: the "
        "SFT model, except for the policy without SFT. The curves of every run are in "
        "`benchmarks/results/study/`.",
        "\n".join(every_arm(records)),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def seeds(lang: str, records: Records, gentle: bool = False) -> list[Seed]:
    return [Seed(record, gentle) for record in of(lang, records)]


def judged(finding: Finding, records: Records) -> tuple[str, list[str]]:
    """Return the verdict on a finding, and on each of its claims."""
    each = []
    for claim in finding.claims:
        found = measured(claim, seeds("en", records))
        each.append(claim.verdict(found) if found else "open")
    return finding.verdict(each), each


def verdicts(records: Records) -> list[str]:
    """Return the table of all findings; each section has the expectation in full."""
    columns = ("", "finding", "verdict", "expected", "claims that hold", "seeds where all do")
    lines = [f"| {' | '.join(columns)} |", "| --- " * 6 + "|"]
    for finding in FINDINGS:
        verdict, each = judged(finding, records)
        held = f"{each.count('holds')} of {len(each)}"
        link = f"[{finding.id}](#{finding.id.lower()})"
        expected = re.split("[:,]", finding.expected)[0]
        cells = (link, finding.title, f"**{verdict}**", expected, held)
        lines.append(f"| {' | '.join(cells)} | {on_seeds(finding, records)} |")
    return lines


def on_seeds(finding: Finding, records: Records) -> str:
    """Return on how many seeds, of those with all runs, every claim of a finding is as claimed."""
    each = []
    for seed in seeds("en", records):
        found = [measured(claim, [seed]) for claim in finding.claims]
        if None not in found:
            pairs = zip(finding.claims, found, strict=True)
            each.append(all(claim.holds_for(one.mean) for claim, one in pairs))
    return f"{sum(each)} of {len(each)}"


def provenance(records: Records) -> str:
    """Return the date, versions and machine of the records."""
    first = records[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    runs = [run for record in records for run in record["runs"].values()]
    return (
        f"Made by `{first['command']}` in {first['wall_seconds'] / 60:.0f} minutes by the clock: "
        f"{len(runs)} runs, {sum(run['seconds'] for run in runs) / 3600:.1f} hours of one core, "
        f"with {versions}. Learning rates: {BASE:g}, and {GENTLE:.2g} for "
        '"a third of the rate".'
    )


def worlds(records: Records) -> list[str]:
    """Return the table of each world's SFT model and reward model."""
    lines = [
        "| world | SFT: true quality | ended | well-formed | entropy, nats/token | reward model "
        "right on fresh pairs | empty response | best fixed response | without SFT |",
        "| --- " * 9 + "|",
    ]
    for record in records:
        facts = record["facts"]
        sft, fixed = facts["sft"], facts["fixed_answers"]
        place = f"{record['world']['lang']} {record['world']['seed']}"
        lines.append(
            f"| {place} | {number(sft['true_quality'])} | {sft['ended']:.1%} "
            f"| {sft['well_formed']:.1%} | {number(sft['entropy'])} "
            f"| {facts['reward_model']['accuracy']:.1%} | {number(fixed['empty'])} "
            f"| {number(fixed['best_constant'])} "
            f"| {number(facts['language_model']['true_quality'])} |"
        )
    return lines


def conditions(records: Records) -> str:
    """Name the worlds that do not meet the requirements for PPO to be informative."""
    missed = []
    for record in records:
        facts = record["facts"]
        sft, fixed = facts["sft"], facts["fixed_answers"]
        wanted = {
            "responses well-formed": sft["well_formed"] >= 0.98,
            "reward model": facts["reward_model"]["accuracy"] >= 0.75,
            "fixed responses": max(fixed.values()) < sft["true_quality"],
        }
        place = f"{record['world']['lang']} {record['world']['seed']}"
        missed += [f"{place} ({name})" for name, met in wanted.items() if not met]
    return (
        "PPO is only informative with good SFT and reward models. At least 98 % of SFT's responses "
        "should be well-formed, the reward model right on 75 % of fresh pairs, and empty and fixed "
        "responses worse than SFT's mean by true quality. Worlds that do not meet this are kept: "
        f"{', '.join(missed) or 'none'}."
    )


def section(finding: Finding, records: Records) -> list[str]:
    """Return the section of one finding."""
    verdict, each = judged(finding, records)
    name = finding.id.lower()
    parts = [
        f"## {finding.id}",
        f"**{finding.title}** ({finding.source}).",
        f"Expected: {finding.expected}. Found: **{verdict}**.",
        f"![{finding.id}: {finding.source}](images/study/{name}.png)",
    ]
    if finding.id == "F13":
        parts.append("![Critics against Monte-Carlo returns](images/study/critic.png)")
    rows = ["| claim | difference | seeds | at a third of the rate |", "| --- " * 4 + "|"]
    if finding.chinese:
        rows = ["| claim | difference | seeds | at a third of the rate | Chinese |"]
        rows.append("| --- " * 5 + "|")
    for claim, result in zip(finding.claims, each, strict=True):
        rows.append(row(claim, result, finding.chinese, records))
    parts.append("\n".join(rows))
    parts.append(DISCUSSION[finding.id])
    return parts


def row(claim: Claim, result: str, chinese: bool, records: Records) -> str:
    """Return the table row of a claim: interval, number of seeds that agree, and notes."""
    found = measured(claim, seeds("en", records))
    gentle = measured(claim, seeds("en", records, gentle=True))
    text = claim.text.replace("|", "\\|")  # as of |bias|: a bare one would begin another cell
    cells = [text, f"**{result}**: {spread(found, claim.unit)}", count(claim, found)]
    cells.append(f"{spread(gentle, '')} ({count(claim, gentle)})" if gentle else "")
    if chinese:
        other = measured(claim, seeds("zh", records))
        cells.append(number(other.mean) if other else "")
    return f"| {' | '.join(cells)} |"


def spread(found: Interval | None, unit: str) -> str:
    """Return a mean and its 95 % interval."""
    if found is None:
        return "not run"
    within = "" if math.isinf(found.low) else f" [{number(found.low)}, {number(found.high)}]"
    return f"{number(found.mean)}{within} {unit}".strip()


def count(claim: Claim, found: Interval | None) -> str:
    """Return on how many seeds a claim holds."""
    if found is None:
        return ""
    return f"{sum(map(claim.holds_for, found.values))} of {len(found.values)}"


def number(value: float) -> str:
    """Format a number with three digits and a true minus sign."""
    size = abs(value)
    text = f"{size:.0f}" if size >= 100 else f"{size:.1f}" if size >= 10 else f"{size:.2f}"
    negative = value < 0 and float(text) != 0
    return f"−{text}" if negative else text


def every_arm(records: Records) -> list[str]:
    """Return a table of all arms, at both rates and in both languages."""
    columns = ("score", "true quality", "KL", "length", "win", "lose", "collapsed")
    lines = [f"| arm | {' | '.join(columns)} |", "| --- " * 8 + "|"]
    for lang, note in (("en", ""), ("zh", " (Chinese)")):
        for suffix, rate in (("", ""), ("@gentle", ", a third of the rate")):
            for name, arm in ARMS.items():
                runs = [r["runs"].get(name + suffix) for r in of(lang, records)]
                if known := [run for run in runs if run]:
                    lines.append(f"| {arm.title}{rate}{note} | {figures(known)} |")
    return lines


def figures(runs: Sequence[Mapping[str, Any]], ends: bool = True) -> str:
    """Return the cells of an arm.

    Args:
        runs: one for each seed.
        ends: whether to show the smallest and the largest beside each mean.
    """
    cells = []
    for name in ("reward_score", "true_quality", "kl", "length"):
        values = [run["held_out"][name] for run in runs]
        spread = f" [{number(min(values))}, {number(max(values))}]"
        cells.append(number(mean(values)) + (spread if ends and len(values) > 1 else ""))
    cells += [f"{mean(run['held_out'][name] for run in runs):.0%}" for name in ("win", "lose")]
    flags = [any(run["curves"]["collapsed"][-5:]) for run in runs]
    return " | ".join([*cells, f"{sum(flags)} of {len(flags)}"])
