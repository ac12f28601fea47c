"""Figures of benchmarks/token_stats.py as Markdown, and a page that shows them between marks."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]

HEAD = (
    "provider", "forward, ms", "backward, ms", "both, ms", "× plain", "% of floor",
    "peak, MB", "beyond gradients, MB", "max \\|Δ log-prob\\|", "gradient, rel. L2",
)  # fmt: skip


def kept(folder: Path) -> list[Figures]:
    """Read the figures of every device in a folder that has others' figures too."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    return [one for one in found if one.get("benchmark") == "token_stats"]


def page_of(page: str, devices: Sequence[Figures]) -> str:
    """Put tables into a page, each between the marks of its device.

    Args:
        page: Markdown; marks that it lacks are added at its end, under a heading.
        devices: their figures.

    Returns:
        the page.
    """
    for figures in devices:
        first, last = marks(figures["device"]["slug"])
        if first not in page:
            page = f"{page.rstrip()}\n\n## {figures['device']['name']}\n\n{first}\n{last}\n"
        before, rest = page.split(first)
        _, after = rest.split(last)
        page = f"{before}{first}\n{tables(figures)}\n{last}{after}"
    return page


def marks(slug: str) -> tuple[str, str]:
    """Return what stands before and after the tables of a device."""
    return f"<!-- token_stats:{slug} -->", f"<!-- /token_stats:{slug} -->"


def tables(figures: Figures) -> str:
    """Lay out all figures of a device."""
    parts = []
    said = None
    for work in figures["works"]:
        if said != (said := provenance(work["measured"], figures["device"])):
            parts.append(said)
        parts.append(table(work))
    return "\n\n".join(parts)


def provenance(how: Figures, device: Figures) -> str:
    """Say what was measured on what, and how fast that is at most."""
    quick = "**A quick run at tiny sizes: its times mean nothing.** " if how["quick"] else ""
    cores = f", {device['cores']} cores, {how['threads']} threads" if "cores" in device else ""
    known = ", ".join(f"{name} {v}" for name, v in how["versions"].items() if v)
    return (
        f"{quick}{device['name']}{cores}; {known}. Copy {digits(how['copy_gb_per_s'])} GB/s, "
        f"matrix product {digits(how['matmul_tflop_per_s'])} TFLOP/s, both measured in the same "
        f"run. `{how['command']}`, {how['rounds']} rounds."
    )


def headline(work: Figures) -> str:
    """Say what was computed: title, shape and type."""
    sizes = ", ".join(f"{n} = {size:,}" for n, size in zip("NVD", work["shape"], strict=False))
    return f"{work['title']}, {sizes}, {work['dtype']}"


def table(work: Figures) -> str:
    """Lay out the figures of one problem."""
    lines = [f"**{headline(work)}**", "", f"| {' | '.join(HEAD)} |", "| --- " * len(HEAD) + "|"]
    lines += [row(one) for one in work["providers"]]
    return "\n".join(lines)


def row(one: Figures) -> str:
    """Lay out the figures of one provider, or why it is absent."""
    name = f"**{one['provider']}**" if one["ours"] else one["provider"]
    if "absent" in one:
        return f"| {name} | absent: {one['absent']} |" + " |" * (len(HEAD) - 2)
    steps = one["percent_of_floor"]
    cells = [
        *(digits(one.get(f"{step}_ms")) for step in ("forward", "backward", "both")),
        number(one["speed_over_plain"], "{:.2f}"),
        " / ".join(f"{value:.0f}" for value in steps.values()),
        number(one["peak_mb"], "{:,.0f}"),
        number(one["beyond_gradients_mb"], "{:,.0f}"),
        number(one.get("logprob_error"), "{:.1e}"),
        number(one.get("gradient_error"), "{:.1e}"),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def digits(value: float | None) -> str:
    """Lay out a number in three digits or more."""
    return number(value, "{:,.0f}" if value is not None and value >= 100 else "{:.3g}")


def number(value: float | None, layout: str) -> str:
    """Lay out a number; a dash where there is none."""
    return "–" if value is None else layout.format(value)
