"""Figures of benchmarks/scaling.py: what grows how fast, as tables."""

from collections.abc import Iterable, Mapping, Sequence
from math import log
from statistics import linear_regression, median
from typing import Any

from part_two import between

Figures = Mapping[str, Any]
Row = dict[str, Any]

MARKS = "<!-- scaling -->", "<!-- /scaling -->"
STAGES = ("collect", "score", "annotate", "estimate", "update")
AXES = {
    "response": ("response length", "tokens of a response"),
    "vocabulary": ("vocabulary", "tokens in the vocabulary"),
    "rollouts": ("rollouts", "rollouts of an iteration"),
    "hidden": ("hidden size", "numbers that stand for a token"),
    "processes": ("processes", "processes, one thread each"),
}
"""By name: what is said of an axis, and its unit."""

TIME_GOAL = {"response": 1.05, "vocabulary": 1.05}
"""Exponents of an iteration's time, at most."""
REST_GOAL, REST_BETWEEN = 0.10, (32000, 151936)
"""Growth of memory beyond weights, gradients and Adam's states, at most, between vocabularies."""
SPEED_GOAL = 1.6
"""Rollouts a second of two processes over those of one, at least."""

FLOAT = 4
ADAM = 2
"""Bytes of a number, and numbers that Adam keeps of each weight."""


def weights(options: Mapping[str, int]) -> dict[str, int]:
    """Count the weights of the four models of `ppo_iteration.make_trainer`, by its options."""
    d, v = options["hidden"], options["vocab"]
    # Four square matrices of attention, three of the feed-forward part, two norms; a last norm.
    layer = 4 * d**2 + 3 * d * (d * 8 // 3) + 2 * d
    backbone = v * d + options["layers"] * layer + d
    judge = backbone + d  # one number of each hidden state
    writer = backbone + v * d  # the head is not tied to the embeddings
    return {"policy": writer, "ref_model": writer, "critic": judge, "reward": judge}


def states(options: Mapping[str, int]) -> int:
    """Count the bytes of all weights, and of gradients and Adam's states of what is trained."""
    count = weights(options)
    trained = count["policy"] + count["critic"]
    return FLOAT * (sum(count.values()) + (1 + ADAM) * trained)


def rows(figures: Figures) -> dict[str, list[Row]]:
    """Return by axis what each point comes to: medians over its runs.

    Args:
        figures: of `scaling.run`.

    Returns:
        by axis rows of "value"; "x", the value, or the mean response where that is the axis;
        "seconds" of an iteration, those of its "stages", "rollouts" and "tokens" a second; "peak",
        "states", "rest", "start" and "tokenizer" in MB of 10⁶ bytes. A point without any run has
        "failed" in place of all that.
    """
    return {
        axis: [_row(axis, point["value"], figures["points"][point["point"]]) for point in points]
        for axis, points in figures["axes"].items()
        if all(point["point"] in figures["points"] for point in points)
    }


def _row(axis: str, value: int, point: Mapping[str, Any]) -> Row:
    options, runs = point["options"], point["runs"]
    if not runs:
        return {"value": value, "failed": point["failed"]}
    seconds = median(run["median"] for run in runs)
    tokens = median(run["response_tokens"] for run in runs)  # of one process
    processes = options.get("processes", 1)
    mb = {
        name: median(run[f"{key}_mb"] for run in runs) * 2**20 / 1e6
        for name, key in (("peak", "peak_rss"), ("start", "start_rss"), ("tokenizer", "tokenizer"))
    }
    size = states(options) / 1e6
    return {
        "value": value,
        "x": tokens / options["rollouts"] if axis == "response" else value,
        "seconds": seconds,
        "stages": {name: median(run["stages"][name] for run in runs) for name in STAGES},
        "rollouts": options["rollouts"] * processes / seconds,
        "tokens": tokens * processes / seconds,
        **mb,
        "states": size,
        "rest": mb["peak"] - size,
    }


def exponents(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Fit y ∝ xᵏ by least squares of the logarithms.

    Args:
        xs: two or more, growing.
        ys: as many; above 0.

    Returns:
        k over all points, and k over the last two alone: fixed costs flatten what is before.
    """
    a, b = [log(x) for x in xs], [log(y) for y in ys]
    return linear_regression(a, b).slope, linear_regression(a[-2:], b[-2:]).slope


def fitted(points: Iterable[Row], *names: str) -> tuple[float, float] | None:
    """Return the exponents of a column, of a stage where two names are given; None of no fit."""
    done = [row for row in points if "failed" not in row]
    ys = [row[names[0]] if len(names) == 1 else row[names[0]][names[1]] for row in done]
    if len(done) < 2 or min(ys) <= 0:
        return None
    return exponents([row["x"] for row in done], ys)


def page_of(page: str, figures: Figures) -> str:
    """Put picture and tables between their marks."""
    picture = "![Time and memory of a PPO iteration by what is asked of it](images/scaling.png)"
    return between(page, MARKS, ["", *lines_of(figures)[:2], picture, "", *lines_of(figures)[2:]])


def lines_of(figures: Figures) -> list[str]:
    """Lay out all figures."""
    found = rows(figures)
    return [
        _provenance(figures),
        "",
        *_exponents_table(found),
        "",
        *_verdicts(found),
        *_points_table(found),
    ]


def _provenance(figures: Figures) -> str:
    device, known = figures["device"], figures["versions"]
    cores = f", {device['cores']} cores" if "cores" in device else ""
    packages = ", ".join(f"{name} {known[name]}" for name in ("mossrlhf", "torch") if name in known)
    counts = sorted({len(point["runs"]) for point in figures["points"].values()})
    rounds = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    quick = "**A quick run at tiny sizes: its figures mean nothing.** " if figures["quick"] else ""
    return (
        f"{quick}{device['name']}{cores}, threads of torch: "
        f"{figures['threads']} (1 in each of some processes); {packages}. Medians of {rounds} "
        f"rounds; {', '.join(_code(figures['commands']))}."
    )


def _code(commands: Iterable[str]) -> list[str]:
    return [f"`{command}`" for command in commands]


def _exponents_table(found: Mapping[str, list[Row]]) -> list[str]:
    head = ("axis", "from, to", "iteration", "drawing", "learning", "peak memory", "goal for time")
    lines = [_line(head), "| --- " * len(head) + "|"]
    for axis, points in found.items():
        if axis == "processes":
            continue
        time = fitted(points, "seconds")
        cells = [
            time,
            *(fitted(points, "stages", stage) for stage in ("collect", "update")),
            fitted(points, "peak"),
        ]
        ends = f"{points[0]['value']:,}–{points[-1]['value']:,}"
        lines.append(_line([AXES[axis][0], ends, *map(both, cells), _goal(axis, time)]))
    return lines


def _goal(axis: str, time: tuple[float, float] | None) -> str:
    if axis not in TIME_GOAL:
        return "–"
    goal = TIME_GOAL[axis]
    said = "not measured" if time is None else " / ".join(_met(k <= goal) for k in time)
    return f"≤ {goal}: {said}"


def _met(is_so: bool) -> str:
    return "met" if is_so else "**missed**"


def both(pair: tuple[float, float] | None) -> str:
    """Lay out the exponents of a fit."""
    return "–" if pair is None else f"{pair[0]:.2f} / {pair[1]:.2f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _verdicts(found: Mapping[str, list[Row]]) -> list[str]:
    """Say how memory's rest grows with the vocabulary, and what a second process is worth."""
    lines = []
    by_size = {row["value"]: row for row in found.get("vocabulary", []) if "failed" not in row}
    if all(size in by_size for size in REST_BETWEEN):
        low, high = (by_size[size] for size in REST_BETWEEN)
        own_low, own_high = (row["rest"] - row["tokenizer"] for row in (low, high))
        growth = high["rest"] / low["rest"] - 1
        lines += [
            f"From a vocabulary of {low['value']:,} to one of {high['value']:,}, peak memory "
            f"beyond weights, gradients and Adam's states goes from {low['rest']:,.0f} to "
            f"{high['rest']:,.0f} MB: {growth:+.1%} (goal: at most {REST_GOAL:.0%}, "
            f"{_met(growth <= REST_GOAL)}). Before any model is there, the process has "
            f"{low['start']:,.0f} and {high['start']:,.0f} MB. The benchmark's tokenizer takes "
            f"{low['tokenizer']:,.0f} and {high['tokenizer']:,.0f} MB; without it the rest goes "
            f"from {own_low:,.0f} to {own_high:,.0f} MB ({own_high / own_low - 1:+.1%}).",
            "",
        ]
    by_count = {row["value"]: row for row in found.get("processes", []) if "failed" not in row}
    if 1 in by_count and 2 in by_count:
        one, two = (by_count[count]["rollouts"] for count in (1, 2))
        lines += [
            f"One process draws and learns from {one:,.2f} rollouts a second, two from {two:,.2f}: "
            f"{two / one:.2f} times as many (goal: at least {SPEED_GOAL}, "
            f"{_met(two / one >= SPEED_GOAL)}).",
            "",
        ]
    return lines


def _points_table(found: Mapping[str, list[Row]]) -> list[str]:
    times = ("iteration, s", *STAGES, "response tokens / s")
    head = ("point", *times, "peak, MB", "weights, gradients, Adam, MB", "rest, MB")
    lines = [_line(head), "| --- " * len(head) + "|"]
    for axis, points in found.items():
        for row in points:
            name = f"{AXES[axis][0]} {row['value']:,}"
            if "failed" in row:
                lines.append(_line([name, f"absent: {row['failed']}", *[""] * (len(head) - 2)]))
                continue
            seconds = [f"{x:.3f}" for x in (row["seconds"], *row["stages"].values())]
            memory = [f"{row[key]:,.0f}" for key in ("peak", "states", "rest")]
            lines.append(_line([name, *seconds, f"{row['tokens']:,.0f}", *memory]))
    return lines
