"""Pictures of result tables: what is drawn for which table, and what each picture says."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from armo.report.drawing import (
    AFTER,
    BEFORE,
    GREY,
    HEIGHT,
    INK,
    PALETTE,
    STYLE,
    WIDTH,
    Look,
    Looks,
    Picture,
    Spread,
    add_legend,
    draw_contrasts,
    draw_curve,
    draw_dot,
    draw_dots,
    draw_groups,
    draw_heat,
    draw_stack,
    label_rows,
    legend_height,
    make_panels,
    make_sheet,
    minus,
    row_height,
    say,
    shorten,
    split,
)
from armo.report.tables import Table

PLOTTED = 20  # objectives in one picture
STACKED = 7  # objectives in one bar, the rest together


def draw(table: Table, looks: Looks) -> list[Picture]:
    """Draw a table; a table that is better read than seen gives no picture.

    Args:
        table: What it is is known by its name, a benchmark's tables by their columns.
        looks: Of all models of the page.
    """
    plot = PLOTS.get(table.name)
    if table.columns[:2] == ("subset", "cases"):
        plot = plot_subsets
    elif table.columns[:4] == ("model", "overall", "low", "high"):
        plot = plot_standings
    if plot is None or not table.rows:
        return []
    with matplotlib.rc_context(STYLE):
        return plot(table, looks)


def _spreads(table: Table, mean: str, low: str, high: str) -> list[Spread]:
    return list(zip(table.column(mean), table.column(low), table.column(high), strict=True))


def _by_model(table: Table) -> dict[str, list[tuple[Any, ...]]]:
    """Rows of each model, in order of appearance."""
    grouped: dict[str, list[tuple[Any, ...]]] = {}
    for row in table.rows:
        grouped.setdefault(row[0], []).append(row)
    return grouped


def _sentence(parts: Iterable[str]) -> str:
    return "; ".join(parts) + "."


def plot_standings(table: Table, looks: Looks) -> list[Picture]:
    """Models and null baselines with their intervals, the best first."""
    spreads = {row[0]: row[1:4] for row in table.rows}
    names = sorted(spreads, key=lambda name: -spreads[name][0])
    rows = [spreads[name] for name in names]
    chance = spreads["random"][0] if "random" in spreads else None
    figure = draw_dots(names, rows, [looks[n] for n in names], label="score", at=chance)
    text = _sentence(f"{name} {say(row)}" for name, row in zip(names, rows, strict=True))
    title = "Models in colour, null baselines in grey, with 95 % intervals"
    return [Picture(title, f"From best to worst: {text}", figure)]


def _plot_named(
    mean: str, low: str, high: str, *, label: str, at: float | None
) -> Callable[[Table, Looks], list[Picture]]:
    """A picture of tables that hold one mean with its interval per row, the name first."""

    def plot(table: Table, looks: Looks) -> list[Picture]:
        pictures = []
        for rows in split(table.rows, 24):
            part = Table(table.name, table.title, table.columns, tuple(rows))
            names, spreads = [row[0] for row in rows], _spreads(part, mean, low, high)
            seen = [
                looks[name] if table.columns[0] == "model" else Look(AFTER, "o") for name in names
            ]
            figure = draw_dots(names, spreads, seen, label=label, at=at)
            text = _sentence(f"{n} {say(s)}" for n, s in zip(names, spreads, strict=True))
            pictures.append(Picture(f"{table.title}, with 95 % intervals", text, figure))
        return pictures

    return plot


def plot_subsets(table: Table, looks: Looks) -> list[Picture]:
    """A benchmark by subset; easy, normal and hard beside each other as bars."""
    models = table.columns[2:]
    rows = {row[0].strip(): row for row in table.rows}
    pictures = []
    levels = [name for name in ("easy", "normal", "hard") if name in rows]
    if levels:
        values = {m: [rows[level][2 + k] for level in levels] for k, m in enumerate(models)}
        figure, axes = make_sheet(3.0 + legend_height(models))
        handles = []
        width = 0.84 / len(models)
        for number, (name, shares) in enumerate(values.items()):
            look = looks[name]
            offset = width * (number + 0.5) - 0.42
            bars = axes.bar(
                [place + offset for place in range(len(levels))],
                [0.0 if share is None else share for share in shares],
                width,
                color=look.colour if name in looks.models else BEFORE,
                hatch=look.hatch,
                edgecolor="white" if name in looks.models else GREY,
                linewidth=0.8,
            )
            handles.append(bars)
            if len(models) <= 5:
                labels = ["" if share is None else f"{share:.2f}" for share in shares]
                axes.bar_label(bars, labels, padding=2, fontsize=9)
        axes.set_xticks(range(len(levels)), levels)
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0.0, 1.08 if len(models) <= 5 else 1.0)
        axes.set_ylabel("accuracy")
        add_legend(figure, handles, models)
        text = _sentence(
            f"{name}: "
            + ", ".join(
                f"{at} {say((v, None, None))}" for at, v in zip(levels, shares, strict=True)
            )
            for name, shares in values.items()
        )
        pictures.append(Picture("Easy, normal and hard pairs", text, figure))
    inner = [row for row in table.rows if row[0].strip() not in levels]
    # What is inside a group is read in the table, unless that is all there is.
    depths = sorted({_depth(row[0]) for row in inner})[:2]
    shown = [row for row in inner if _depth(row[0]) in depths]
    for part in split(shown, 16):
        series = {m: [(row[2 + k], None, None) for row in part] for k, m in enumerate(models)}
        labels = [row[0].strip() for row in part]
        figure = draw_groups(labels, series, looks, label="score")
        text = _sentence(
            f"{row[0].strip()}: best is {_best(models, row[2:])}, worst {_worst(models, row[2:])}"
            for row in part
        )
        pictures.append(Picture("By subset", text, figure))
    return pictures


def _depth(label: str) -> int:
    return len(label) - len(label.lstrip())


def _best(names: Sequence[str], values: Sequence[float | None]) -> str:
    there = [(v, n) for n, v in zip(names, values, strict=True) if v is not None]
    return "none" if not there else "{1} with {0:.3f}".format(*max(there, key=lambda p: p[0]))


def _worst(names: Sequence[str], values: Sequence[float | None]) -> str:
    there = [(v, n) for n, v in zip(names, values, strict=True) if v is not None]
    return "none" if not there else "{1} with {0:.3f}".format(*min(there, key=lambda p: p[0]))


def plot_probes(table: Table, looks: Looks) -> list[Picture]:
    """How often each model prefers the version that has only the pattern more."""
    models = table.columns[2::3]
    pictures = []
    most = int(8.0 / row_height(len(models)))
    edges = [row[k] for row in table.rows for k in range(2, len(row)) if row[k] is not None]
    margin = 0.04 * (max([0.5, *edges]) - min([0.5, *edges])) + 0.005
    for part in split(table.rows, most):
        series: dict[str, list[Spread]] = {
            name: [row[2 + 3 * k : 5 + 3 * k] for row in part] for k, name in enumerate(models)
        }
        figure = draw_groups(
            [row[0] for row in part],
            series,
            looks,
            label="share of pairs in which the version with the pattern wins",
            at=0.5,
        )
        figure.axes[0].set_xlim(min([0.5, *edges]) - margin, max([0.5, *edges]) + margin)
        text = _sentence(
            f"{row[0]}: " + ", ".join(f"{name} {say(series[name][k])}" for name in models)
            for k, row in enumerate(part)
        )
        title = "Bias probes: at 0.5 the pattern makes no difference, with 95 % intervals"
        pictures.append(Picture(title, text, figure))
    return pictures


def plot_length_bias(table: Table, looks: Looks) -> list[Picture]:
    """Correlation with length, and accuracy where the longer or the shorter one is right."""
    names = table.column("model")
    figure = Figure(figsize=(WIDTH, min(0.34 * len(names) + 1.4, HEIGHT)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(table.rows):
        look = looks[row[0]]
        draw_dot(left, place, row[1:4], look)
        # Pairs of one of the two kinds may be missing.
        shown = [
            (number, shape) for number, shape in ((4, ">"), (5, "<")) if row[number] is not None
        ]
        if len(shown) == 2:
            right.plot(row[4:6], [place, place], color=look.colour, linewidth=1.8)
        for number, shape in shown:
            face = look.colour if number == 4 else "white"
            right.plot(row[number], place, shape, color=look.colour, markerfacecolor=face)
    label_rows(left, names, at=0.0)
    label_rows(right, names, at=0.5)
    left.set_xlabel("correlation with length,\nwithin prompts")
    right.set_xlabel("accuracy")
    handles = [
        right.plot([], [], shape, color=INK, markerfacecolor=face, linestyle="none")[0]
        for shape, face in ((">", INK), ("<", "white"))
    ]
    add_legend(figure, handles, ["longer is right", "shorter is right"])
    text = _sentence(
        f"{row[0]}: correlation {say(row[1:4])}, accuracy {say((row[4], None, None))} where the "
        f"longer and {say((row[5], None, None))} where the shorter one is right"
        for row in table.rows
    )
    return [Picture("How far scores follow length", text, figure)]


def plot_preference_bias(table: Table, looks: Looks) -> list[Picture]:
    """How much more often the right response has a pattern than the wrong one."""
    pictures = []
    for rows in split(table.rows, 24):
        names = [row[0] for row in rows]
        figure = draw_dots(
            names,
            [row[5:8] for row in rows],
            [Look(AFTER, "o")] * len(rows),
            label="share of right responses that have it, less that of wrong ones",
            at=0.0,
        )
        text = _sentence(
            f"{row[0]}: {row[2]:.0%} of the right, {row[4]:.0%} of the wrong ones, "
            f"gap {say(row[5:8])}"
            for row in rows
            if row[2] is not None and row[4] is not None
        )
        pictures.append(
            Picture("Right responses less wrong ones, with 95 % intervals", text, figure)
        )
    return pictures


def plot_best_of_n(table: Table, looks: Looks) -> list[Picture]:
    """Gold score and length of the response that each model picks among N."""
    grouped = _by_model(table)
    lengths = table.column("length")
    parts = 1 if all(length is None for length in lengths) else 2
    figure = Figure(figsize=(WIDTH, 3.4 + legend_height(list(grouped))), layout="constrained")
    panels = figure.subplots(1, parts, squeeze=False).ravel()
    handles = []
    for name, rows in grouped.items():
        sizes = [row[1] for row in rows]
        handles.append(draw_curve(panels[0], sizes, [row[3:6] for row in rows], looks[name]))
        if parts == 2:
            spreads = [(row[6], None, None) for row in rows]
            draw_curve(panels[1], sizes, spreads, looks[name], band=False)
    for axes, label in zip(panels, ("gold score of the pick", "length of the pick"), strict=False):
        axes.set_xscale("log", base=2)
        sizes = sorted(set(table.column("n")))
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("responses to choose from, N")
        axes.set_ylabel(label)
    add_legend(figure, handles, list(grouped))
    text = _sentence(
        f"{name}: from {say(rows[0][3:6])} at N = {rows[0][1]} to {say(rows[-1][3:6])} at "
        f"N = {rows[-1][1]}, highest {max(row[3] for row in rows):.3f}"
        for name, rows in grouped.items()
    )
    return [Picture("Best of N: the gold score of the response picked", text, figure)]


def plot_abstention(table: Table, looks: Looks) -> list[Picture]:
    """Accuracy among the pairs that a model is surest of."""
    grouped = _by_model(table)
    figure, axes = make_sheet(3.4 + legend_height(list(grouped)))
    handles = []
    share = 100.0 if max(table.column("coverage")) <= 1.0 else 1.0
    for name, rows in grouped.items():
        places = [share * row[1] for row in rows]
        handles.append(draw_curve(axes, places, [row[2:5] for row in rows], looks[name]))
    axes.invert_xaxis()
    axes.set_xlabel("pairs answered, in %, the clearest preferences kept")
    axes.set_ylabel("accuracy")
    add_legend(figure, handles, list(grouped))
    text = _sentence(
        f"{name}: " + ", ".join(f"{say(row[2:5])} at {share * row[1]:.0f} %" for row in _ends(rows))
        for name, rows in grouped.items()
    )
    return [Picture("Accuracy where only clear preferences are answered", text, figure)]


def _ends(rows: Sequence[Any]) -> list[Any]:
    """First, middle and last."""
    return [rows[k] for k in sorted({0, len(rows) // 2, len(rows) - 1})]


def plot_calibration(table: Table, looks: Looks) -> list[Picture]:
    """Calibration errors beside what a calibrated model would show by chance, at most."""
    pictures = []
    for rows in split(table.rows, 24):
        names = [row[0] for row in rows]
        figure = draw_dots(
            names,
            [row[2:5] for row in rows],
            [looks[name] for name in names],
            label="expected calibration error",
            at=0.0,
        )
        [most] = figure.axes[0].plot(
            [row[6] for row in rows],
            range(len(rows)),
            linestyle="none",
            marker="|",
            markersize=13,
            markeredgewidth=2,
            color=GREY,
        )
        add_legend(figure, [most], ["what a calibrated model would show by chance, at most"])
        text = _sentence(
            f"{row[0]}: {say(row[2:5])}; a calibrated model would show {row[6]:.3f} at most"
            for row in rows
        )
        pictures.append(Picture("Calibration error, with 95 % intervals", text, figure))
    return pictures


def plot_reliability(table: Table, looks: Looks) -> list[Picture]:
    """Observed against predicted preference, one panel per model, with the number of pairs."""
    pictures = []
    lowest = 0.5 if min(table.column("predicted")) >= 0.5 else 0.0
    bottom = min([lowest, *(math.floor(10.0 * share) / 10.0 for share in table.column("observed"))])
    for group in split(list(_by_model(table).items()), 9):
        columns = min(3, len(group))
        height = {1: 4.2, 2: 3.3}.get(columns, 2.35)
        figure, panels = make_panels(len(group), columns, height)
        texts = []
        for axes, (name, rows) in zip(panels, group, strict=True):
            look = looks[name]
            predicted = [row[1] for row in rows]
            most = max(row[3] for row in rows)
            span = 1.0 - lowest
            gaps = [b - a for a, b in itertools.pairwise(sorted(predicted))]
            width = 0.8 * min([gap for gap in gaps if gap > 0.0] + [0.1 * span])
            heights = [0.22 * (1.0 - bottom) * row[3] / most for row in rows]
            axes.bar(predicted, heights, max(width, 0.015), bottom=bottom, color="#d5d9e0")
            axes.plot([lowest, 1.0], [lowest, 1.0], color=INK, linestyle=":", linewidth=1.2)
            axes.plot(
                predicted,
                [row[2] for row in rows],
                color=look.colour,
                marker=look.marker,
                linestyle=look.line,
                markersize=5,
                linewidth=1.2,
            )
            total = sum(row[3] for row in rows)
            axes.set_title(f"{shorten(name, 26)}\n{total:,} pairs, most {most:,}", fontsize=9)
            axes.set_xlim(lowest, 1.0)
            axes.set_ylim(bottom, 1.0)
            axes.set_aspect("equal")
            worst = max(rows, key=lambda row: abs(row[2] - row[1]))
            texts.append(
                f"{name}: {total} pairs, furthest from the diagonal where {worst[1]:.2f} is "
                f"predicted and {worst[2]:.2f} observed ({worst[3]} pairs)"
            )
        figure.supxlabel("predicted probability of the preference", fontsize=10)
        figure.supylabel("observed share", fontsize=10)
        title = "Reliability: on the dotted line a probability is what it says; grey: pairs"
        pictures.append(Picture(title, _sentence(texts), figure))
    return pictures


def plot_weights_by_kind(table: Table, looks: Looks) -> list[Picture]:
    """Mean gating weights by kind of prompt as stacked bars, one panel per model."""
    totals: dict[str, float] = {}
    for row in table.rows:
        totals[row[3]] = totals.get(row[3], 0.0) + row[4]
    names = list(totals)
    shown = sorted(names, key=lambda name: -totals[name])[: STACKED if len(names) > 8 else 8]
    shown = [name for name in names if name in shown]
    grouped = list(_by_model(table).items())
    kinds = list(dict.fromkeys(table.column("kind")))
    columns = 1 if len(grouped) == 1 else 2
    height = 0.27 * len(kinds) + 0.5
    above = legend_height(shown) + 0.3
    most = columns * max(1, int((HEIGHT - 0.5 - above) / height))
    pictures = []
    for group in split(grouped, most):
        figure, panels = make_panels(len(group), columns, height, above=above)
        texts = []
        for axes, (model, rows) in zip(panels, group, strict=True):
            weights = {(row[1], row[3]): row[4] for row in rows}
            bars = [[weights.get((kind, name), 0.0) for kind in kinds] for name in shown]
            if len(shown) < len(names):
                bars.append(
                    [
                        sum(weights.get((kind, n), 0.0) for n in names if n not in shown)
                        for kind in kinds
                    ]
                )
            handles = draw_stack(axes, bars, rest=len(shown) < len(names))
            prompts = {row[1]: row[2] for row in rows}
            label_rows(axes, [f"{kind} ({prompts.get(kind, 0):,})" for kind in kinds])
            axes.grid(visible=False)
            axes.set_xlim(0.0, 1.0)
            axes.set_title(shorten(model, 25), fontsize=9)
            heaviest = {
                kind: max((weights.get((kind, n), 0.0), n) for n in names) for kind in kinds
            }
            texts.append(
                f"{model}: "
                + ", ".join(f"{kind} mostly {n} ({w:.2f})" for kind, (w, n) in heaviest.items())
            )
        figure.supxlabel("mean gating weight", fontsize=10)
        rest = [f"{len(names) - len(shown)} others"] if len(shown) < len(names) else []
        add_legend(figure, handles, [*shown, *rest])
        title = "What each model weighs by kind of prompt (number of prompts in brackets)"
        pictures.append(Picture(title, _sentence(texts), figure))
    return pictures


def plot_correlations(table: Table, looks: Looks) -> list[Picture]:
    """Correlation of objectives before and after the reward transform, one picture per model."""
    pictures = []
    for model, rows in _by_model(table).items():
        names = list(dict.fromkeys(name for row in rows for name in row[1:3]))[:PLOTTED]
        height = max(2.2, 0.17 * len(names) + 0.7, 0.3 * min(len(names), 8) + 0.7)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        texts = []
        for axes, title, column in zip(panels, ("before", "after"), (3, 4), strict=True):
            pairs = [
                (names.index(row[1]), names.index(row[2]), row[column])
                for row in rows
                if row[1] in names and row[2] in names and row[1] != row[2]
                if row[column] is not None
            ]
            image = draw_heat(axes, names, pairs)
            axes.set_title(title)
            sizes = [abs(value) for _, _, value in pairs]
            if pairs:
                i, j, largest = max(pairs, key=lambda pair: abs(pair[2]))
                texts.append(
                    f"{title}: mean size {sum(sizes) / len(sizes):.2f}, largest "
                    f"{minus(f'{largest:.2f}')}, {names[i]} with {names[j]}"
                )
        figure.colorbar(image, ax=panels, label="correlation")
        title = f"{model}: correlation of its objectives within prompts"
        pictures.append(Picture(title, _sentence(texts), figure))
    return pictures


def plot_rivals(table: Table, looks: Looks) -> list[Picture]:
    """Accuracy of the gated score and of its rivals."""
    names, spreads = table.column("score"), _spreads(table, "accuracy", "low", "high")
    seen = [
        Look(AFTER, "o") if name == "gated score" else Look(GREY, "s", hollow=True)
        for name in names
    ]
    figure = draw_dots(names, spreads, seen, label="accuracy on test pairs", at=0.5)
    text = _sentence(f"{n} {say(s)}" for n, s in zip(names, spreads, strict=True))
    return [Picture("Accuracy, with 95 % intervals", text, figure)]


def plot_weights(table: Table, looks: Looks) -> list[Picture]:
    """Mean gating weights with their spread over prompts, beside the constant mix."""
    rows = table.rows[:PLOTTED]  # in the order of their mean weight
    figure, axes = make_sheet(0.34 * len(rows) + 1.2)
    places = range(len(rows))
    bars = axes.barh(places, [row[1] for row in rows], 0.62, color=AFTER)
    spread = axes.errorbar(
        [row[1] for row in rows],
        places,
        xerr=[row[2] for row in rows],
        fmt="none",
        ecolor=INK,
        capsize=3,
    )
    [mix] = axes.plot(
        [row[4] for row in rows], places, "D", color=PALETTE[1], markeredgecolor="white"
    )
    label_rows(axes, [row[0] for row in rows])
    axes.set_xlim(left=0.0)
    axes.set_xlabel("weight")
    add_legend(
        figure, [bars, spread, mix], ["mean gating weight", "spread over prompts", "constant mix"]
    )
    text = _sentence(f"{row[0]} {row[1]:.3f}, constant mix {row[4]:.3f}" for row in rows)
    return [Picture("Mean gating weights", text, figure)]


def plot_kinds(table: Table, looks: Looks) -> list[Picture]:
    """Mean gating weights by kind of prompt, as stacked bars."""
    kinds, names = table.column("kind"), table.columns[6:]
    figure, axes = make_sheet(0.34 * len(kinds) + 1.0 + legend_height(names))
    handles = draw_stack(axes, [table.column(name) for name in names], rest=False)
    label_rows(axes, kinds)
    axes.grid(visible=False)
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("mean gating weight")
    add_legend(figure, handles, names)
    text = _sentence(
        f"{row[0]}: " + ", ".join(f"{n} {w:.2f}" for n, w in zip(names, row[6:], strict=True))
        for row in table.rows
    )
    return [Picture("Mean gating weights by kind of prompt", text, figure)]


def _contrast_text(labels: Sequence[str], before: Sequence[Spread], after: Sequence[Spread]) -> str:
    rows = zip(labels, before, after, strict=True)
    return _sentence(f"{label}: before {say(a)}, after {say(b)}" for label, a, b in rows)


def plot_quarters(table: Table, looks: Looks) -> list[Picture]:
    """Accuracy by the style of the chosen response."""
    rows = [row for row in table.rows if row[1] is not None]  # the others are no accuracies
    labels = [f"chosen is {row[0]}" for row in rows]
    before, after = [row[2:5] for row in rows], [row[5:8] for row in rows]
    figure = draw_contrasts(labels, before, after, label="accuracy on test pairs", at=0.5)
    figure.axes[0].set_xlim(0.0, 1.0)
    return [Picture("Accuracy by style", _contrast_text(labels, before, after), figure)]


def plot_style(table: Table, looks: Looks) -> list[Picture]:
    """Correlation of the score with surface features."""
    rows = [row for row in table.rows if row[0] == "score"]
    if not rows:
        return []
    labels = [row[1] for row in rows]
    before: list[Spread] = [(row[2], None, None) for row in rows]
    after: list[Spread] = [(row[3], None, None) for row in rows]
    label = "Spearman correlation of the score, within prompts"
    figure = draw_contrasts(labels, before, after, label=label, at=0.0)
    title = "Correlation of the score with measured style"
    return [Picture(title, _contrast_text(labels, before, after), figure)]


def plot_counterfactuals(table: Table, looks: Looks) -> list[Picture]:
    """How far style alone moves the score."""
    labels = table.column("pattern")
    before: list[Spread] = [(value, None, None) for value in table.column("moved, before")]
    after: list[Spread] = [(value, None, None) for value in table.column("moved, after")]
    label = "mean absolute change of the score, in standard deviations"
    figure = draw_contrasts(labels, before, after, label=label, at=None)
    title = "How far style alone moves the score"
    return [Picture(title, _contrast_text(labels, before, after), figure)]


PLOTS: Mapping[str, Callable[[Table, Looks], list[Picture]]] = {
    "abstention": plot_abstention,
    "best_of_n": plot_best_of_n,
    "bias_probes": plot_probes,
    "calibration": plot_calibration,
    "correlations": plot_correlations,
    "counterfactuals": plot_counterfactuals,
    "judgements": _plot_named("accuracy", "low", "high", label="accuracy", at=0.5),
    "kinds": plot_kinds,
    "length_bias": plot_length_bias,
    "lists": _plot_named("best is first", "from", "to", label="best is first", at=None),
    "preference_bias": plot_preference_bias,
    "quarters": plot_quarters,
    "reliability": plot_reliability,
    "rivals": plot_rivals,
    "style": plot_style,
    "weights": plot_weights,
    "weights_by_kind": plot_weights_by_kind,
}
