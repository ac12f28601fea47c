"""Plots for the figures of the paper: the mean over the seeds, and their range."""

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mossrlhf.plotting import COLORS, GRID, INK, new_figure, png_bytes, style_axes
from study.arms import ARMS
from study.findings import FINDINGS
from study.plan import LONG
from study.statistics import Finding, Seed

TITLES = {
    "score": "Reward-model score",
    "true_quality": "True quality",
    "kl": "KL to the reference (nats/response)",  # of `no_sft` that is not SFT's
    "length": "Response length (tokens)",
    "perplexity_policy": "Perplexity under the policy",
    "perplexity_sft": "Perplexity under the SFT model",
    "value_loss": "Value loss",
    "explained_variance": "Explained variance of the critic (from −1)",
    "policy_grad_norm": "Gradient norm, policy",
    "critic_grad_norm": "Gradient norm, critic",
    "advantages_std": "Standard deviation of advantages",
    "entropy": "Entropy (nats/token)",
}
FAR_APART = {
    "kl": 1.0,
    "perplexity_sft": 0.0,
    "value_loss": 0.0,
    "policy_grad_norm": 0.0,
    "critic_grad_norm": 0.0,
    "advantages_std": 0.0,
}
"""Metrics whose axis may be logarithmic, and the size below which it is linear; 0 for nowhere."""

FRONTIER = ("vanilla", "reward_clip_0.3", "importance", "kl_0.05", "kl_0.1", "kl_0.2", "ppo_max")
P1_PREFERENCE = {
    "helpful, en": (44, 26, 30),
    "harmful, en": (62, 33, 5),
    "helpful, zh": (46, 23, 31),
    "harmful, zh": (39, 29, 32),
}
"""Win, tie and lose of PPO-max against SFT by human judges, in percent (P1 Fig. 10)."""

FIXED = {"vanilla": COLORS[0], "kl_0.05": COLORS[3], "ppo_max": COLORS[6], LONG: COLORS[6]}
"""Arms that have their color in every picture; the others take what is left, in turn."""

DASHED = (0, (4, 1.5))
MIDDLES = (12.5, 37.5, 62.5, 87.5)
"""Of the four parts of a response, in percent of its length."""

SMOOTH = 5
"""Points of which a curve of the frontier shows the mean."""

Records = Sequence[Mapping[str, Any]]
Figure = Any


def draw_all(records: Records, folder: Path) -> None:
    """Plot every figure of the study.

    Args:
        records: of all worlds.
        folder: of the PNGs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = digest(records)
    pictures = {f.id.lower(): curves(f, records) for f in FINDINGS if f.panels}
    pictures |= {
        "f12": preference(records),
        "frontier": frontier(records),
        "critic": critic(records),
    }
    for name, figure in pictures.items():
        packed, info = io.BytesIO(), PngInfo()
        info.add_text("results", mark)  # a test compares it with the committed results
        Image.open(io.BytesIO(png_bytes(figure))).save(packed, "png", pnginfo=info)
        (folder / f"{name}.png").write_bytes(packed.getvalue())


def digest(records: Records) -> str:
    """Return a checksum of the data of all plots: runs and facts of all worlds."""
    text = repr([[record["world"], record["facts"], record["runs"]] for record in records])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def colors(arms: Sequence[str]) -> dict[str, str]:
    """Return a color for each arm of a figure."""
    left = iter(color for color in COLORS if color not in FIXED.values())
    return {arm: FIXED.get(arm) or next(left) for arm in arms}


def of(lang: str, records: Records) -> list[Mapping[str, Any]]:
    """Records of the worlds of one language."""
    return [record for record in records if record["world"]["lang"] == lang]


def runs_of(arm: str, records: Records) -> list[Mapping[str, Any]]:
    """The runs of an arm in all worlds that have it."""
    return [record["runs"][arm] for record in records if arm in record["runs"]]


def curves(finding: Finding, records: Records) -> Figure:
    """Plot an arm in each color, a metric in each panel.

    Args:
        finding: which arms, which metrics.
        records: of all worlds.
    """
    figure = new_figure()
    figure.set_size_inches(12, 6.6)
    for place, metric in enumerate(finding.panels, 1):
        axes = figure.add_subplot(2, 3, place)
        for arm, color in colors(finding.arms).items():
            _band(axes, runs_of(arm, of("en", records)), metric, color, ARMS[arm].title)
            if finding.chinese:
                for run in runs_of(arm, of("zh", records)):
                    x, y = _points(run, metric)
                    axes.plot(x, y, color=color, lw=1.1, ls=DASHED)
        style_axes(axes, TITLES[metric])
        _scale(axes, metric)
        if metric == "explained_variance":
            axes.set_ylim(max(axes.get_ylim()[0], -1), 1)
        if place > 3:
            axes.set_xlabel("iteration", color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if finding.chinese and of("zh", records):
        handles.append(_line(INK, DASHED))
        labels.append("Chinese, one seed")
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, labelcolor=INK)
    return figure


def _band(
    axes: Any, runs: Sequence[Mapping[str, Any]], metric: str, color: str, label: str
) -> None:
    """The mean over the seeds, their range, and each seed as a thin line."""
    columns: dict[int, list[float]] = {}
    for run in runs:
        x, y = _points(run, metric)
        axes.plot(x, y, color=color, lw=0.5, alpha=0.35)
        for step, value in zip(x, y, strict=True):
            columns.setdefault(step, []).append(value)
    steps = sorted(columns)
    low = [min(columns[step]) for step in steps]
    high = [max(columns[step]) for step in steps]
    axes.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
    center = median if metric in FAR_APART else mean  # of which one seed far out would be all
    axes.plot(steps, [center(columns[step]) for step in steps], color=color, lw=2, label=label)


def _points(run: Mapping[str, Any], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a curve, without those that were not finite."""
    both = zip(run["curves"]["step"], run["curves"][metric], strict=True)
    kept = [(x, y) for x, y in both if y is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def _line(color: str, style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, ls=style)


def _scale(axes: Any, metric: str) -> None:
    """Use a logarithmic axis if values are far apart, with plain numbers as ticks."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    drawn = [float(y) for line in axes.lines for y in line.get_ydata()]
    if not drawn or metric not in FAR_APART or max(drawn) < 20 * max(FAR_APART[metric], min(drawn)):
        return
    # KL, signed, may be 0 or less: near 0 its axis is linear.
    floor = FAR_APART[metric]
    axes.set_yscale("symlog", linthresh=floor) if floor else axes.set_yscale("log")
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1000 else f"{y:g}")
    )
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


def _mean(values: Sequence[float | None]) -> float:
    """The mean of the measured values; NaN, which is not plotted, without any."""
    known = [value for value in values if value is not None]
    return mean(known) if known else math.nan


def frontier(records: Records) -> Figure:
    """Plot true quality over √KL for each arm: which gains more at the same distance.

    Args:
        records: of all worlds.
    """
    figure = new_figure()
    figure.set_size_inches(12, 6)
    left = figure.add_subplot(1, 2, 1)
    right = figure.add_subplot(1, 2, 2, sharex=left, sharey=left)
    english = of("en", records)
    for axes, suffix in ((left, ""), (right, "@gentle")):
        for arm, color in colors(FRONTIER).items():
            runs = runs_of(arm + suffix, english)
            if runs:
                x, y = _path(runs)
                axes.plot(x, y, color=color, lw=1.8, label=ARMS[arm].title)
                axes.plot(x[-1:], y[-1:], "o", color=color, ms=7)
        level = mean(record["facts"]["sft"]["true_quality"] for record in english)
        axes.axhline(level, color=INK, lw=1, ls=DASHED)
        axes.text(1, level, "SFT", color=INK, ha="right", va="bottom", transform=_at_edge(axes))
        rate = "a third of the learning rate" if suffix else "the learning rate of the study"
        style_axes(axes, f"True quality over √KL, {rate}", whole=False)
        axes.set_xlabel("√(mean KL to the SFT model) (√nats per response)", color=INK)
        axes.set_ylabel("true quality", color=INK)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, labelcolor=INK)
    return figure


def _at_edge(axes: Any) -> Any:
    from matplotlib.transforms import blended_transform_factory

    return blended_transform_factory(axes.transAxes, axes.transData)


def _path(runs: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Mean over seeds and neighboring points: √KL and true quality."""
    length = min(len(run["curves"]["kl"]) for run in runs)
    xs, ys = [], []
    for i in range(length):
        near = range(max(0, i - SMOOTH // 2), min(length, i + SMOOTH // 2 + 1))
        kl = [run["curves"]["kl"][j] for run in runs for j in near]
        quality = [run["curves"]["true_quality"][j] for run in runs for j in near]
        finite = [value for value in kl if value is not None]
        if finite:
            xs.append(math.sqrt(max(0.0, mean(finite))))
            ys.append(mean(quality))
    return xs, ys


def preference(records: Records) -> Figure:
    """Plot win, tie and lose of PPO-max against SFT, beside those by humans in P1.

    Args:
        records: of all worlds.
    """
    rows: list[tuple[str, tuple[float, ...]]] = []
    for label, published in P1_PREFERENCE.items():
        kind, lang = label.split(", ")
        kind = {"harmful": "harmless"}.get(kind, kind)  # as P1 and the records have it
        runs = runs_of("ppo_max", of(lang, records))
        if runs:
            shares = [mean(run[kind][name] for run in runs) for name in ("win", "tie", "lose")]
            seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
            rows.append((f"{label}: here, {seeds}", tuple(100 * share for share in shares)))
        rows.append((f"{label}: P1, human", tuple(map(float, published))))
    figure = new_figure()
    figure.set_size_inches(12, 1.2 + 0.5 * len(rows))
    axes = figure.add_subplot(1, 1, 1)
    for name, color, index in (("win", COLORS[2], 0), ("tie", GRID, 1), ("lose", COLORS[1], 2)):
        for line, (_, shares) in enumerate(rows):
            start, width = sum(shares[:index]), shares[index]
            axes.barh(
                line, width, left=start, color=color, label=name if line == 0 else None, height=0.7
            )
            ink = INK if name == "tie" else "white"
            axes.text(start + width / 2, line, f"{width:.0f}", color=ink, ha="center", va="center")
    style_axes(axes, "PPO-max against its SFT model, % of requests", whole=False)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=3, frameon=False, labelcolor=INK)
    return figure


def critic(records: Records) -> Figure:
    """Plot the errors of critics against Monte-Carlo returns, before and after PPO.

    Args:
        records: of all worlds.
    """
    figure = new_figure()
    figure.set_size_inches(12, 5)
    arms = next(f for f in FINDINGS if f.id == "F13").arms
    english = [record for record in of("en", records) if arms[0] in record["runs"]]
    for place, when in enumerate(("critic_before", "critic_after"), 1):
        axes = figure.add_subplot(1, 3, place)
        for arm, color in colors(arms).items():
            parts = [run[when]["by_position"] for run in runs_of(arm, english)]
            errors = [_mean([p[i]["mean_absolute_error"] for p in parts]) for i in range(4)]
            # The two without pre-training begin as the same critic: one circle around the other.
            style = dict(mfc="none", ms=10) if arm == arms[0] else dict(ms=6)
            axes.plot(MIDDLES, errors, "o-", color=color, label=ARMS[arm].title, **style)
        moment = "before PPO" if place == 1 else "after PPO"
        style_axes(axes, f"Mean |V − return|, {moment}", whole=False)
        axes.set_ylim(0, None)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel("share of the response behind the state, %", color=INK)
    axes = figure.add_subplot(1, 3, 3)
    for record in english:
        after = Seed(record)["ppo_max"].record["critic_after"]
        axes.plot(after["returns"], after["values"], "o", ms=3, alpha=0.5, color="#777777")
    ends = axes.get_xlim()
    axes.plot(ends, ends, color=INK, lw=1, ls=DASHED)
    style_axes(axes, "PPO-max, after PPO: states of all seeds", whole=False)
    axes.set_xlabel("mean return of 16 continuations", color=INK)
    axes.set_ylabel("value of the critic", color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, labelcolor=INK)
    return figure
