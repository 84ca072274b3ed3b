"""How pictures are drawn: looks of models, dots, bars, curves, and SVG that says what it shows.

A picture never tells by colour alone: models differ in marker, line and hatch as well, and come in
the same order everywhere. Its text says in numbers what it shows, for those who do not see it.
"""

import html
import io
import itertools
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Eight colours that stay apart for colour-blind readers, each with a contrast of 3 on white.
PALETTE = (
    "#0072b2",
    "#ee6677",
    "#222222",
    "#999933",
    "#882255",
    "#c0578f",
    "#332288",
    "#7a4b00",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (2, 1)))
HATCHES = ("", "///", "\\\\\\", "xxx", "--", "||", "++")
MINUS = "\N{MINUS SIGN}"
BEFORE, AFTER, GREY, INK = "#b0b7c3", "#0072b2", "#6b7280", "#222222"

BASELINES = ("random", "longer", "shorter", "more marks", "gold itself")
"""Null baselines and bounds that stand beside models in a table: drawn in grey."""

WIDTH, HEIGHT = 7.0, 9.0  # inches: a picture fits a printed page
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#4b5563",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "font.size": 10,
    "grid.color": "#e2e5ea",
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.5,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are no formulas
    "xtick.color": "#374151",
    "ytick.color": "#374151",
}

Spread = tuple[float | None, float | None, float | None]


@dataclass(frozen=True, eq=False, slots=True)
class Picture:
    """A drawing with its heading and what it shows in words and numbers."""

    title: str
    text: str
    figure: Figure


@dataclass(frozen=True, slots=True)
class Look:
    """How one model is drawn, the same in every picture of a page."""

    colour: str
    marker: str
    line: Any = "-"
    hatch: str = ""
    hollow: bool = False


class Looks:
    """The looks of models, in order of their first appearance; baselines are grey."""

    def __init__(self, models: Iterable[str]):
        self.models = tuple(name for name in dict.fromkeys(models) if name not in BASELINES)

    def __getitem__(self, name: str) -> Look:
        if name not in self.models:
            number = BASELINES.index(name) if name in BASELINES else 0
            line, marker = (0, (1, 1 + number)), MARKERS[number]
            return Look(GREY, marker, line, HATCHES[number], hollow=True)
        number = self.models.index(name)
        return Look(
            PALETTE[number % len(PALETTE)],
            MARKERS[number % len(MARKERS)],
            LINES[number % len(LINES)],
            HATCHES[number % len(HATCHES)],
        )


def to_svg(picture: Picture, *, name: str) -> str:
    """Render a picture for a page; the same picture gives the same bytes.

    Args:
        picture: To be rendered.
        name: Letters, digits and dashes; unique in the page, for its parts are referred to.
    """
    buffer = io.StringIO()
    settings = STYLE | {"svg.hashsalt": name}
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The reader's fonts draw the text, not those of this machine.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        picture.figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # Groups have names like `axes_1` in every picture; only what is referred to keeps its own.
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"\s*\n\s*", "\n", text[text.index("<svg") :])
    start = f'<svg role="img" aria-labelledby="{name}-title" aria-describedby="{name}-text"'
    inside = (
        f'<title id="{name}-title">{html.escape(picture.title)}</title>'
        f'<desc id="{name}-text">{html.escape(picture.text)}</desc>'
    )
    opened = text.index(">") + 1
    # The description says it whole; its labels, one by one, would say nothing.
    drawn = text[opened:].replace("<g", '<g aria-hidden="true"', 1)
    return start + text[len("<svg") : opened] + inside + drawn


def shorten(name: str, length: int = 34) -> str:
    """Cut the middle out of a long name: its ends tell it from others."""
    if len(name) <= length:
        return name
    return f"{name[: length // 2]}…{name[len(name) - length // 2 + 1 :]}"


def number_of(value: float | None) -> float:
    """NaN for a missing value: it is not drawn."""
    return math.nan if value is None else value


def minus(number: str) -> str:
    """A number with the sign that reads, and is read out, as minus."""
    return number.replace("-", MINUS, 1)


def say(values: Spread) -> str:
    """A number with its interval, in words."""
    mean, low, high = values
    if mean is None:
        return "none"
    text = minus(f"{mean:.3f}")
    return text if low is None else f"{text} ({minus(f'{low:.3f}')} to {minus(f'{high:.3f}')})"


def make_sheet(height: float) -> tuple[Figure, Axes]:
    """Make a figure of one pair of axes, of a height in inches."""
    figure = Figure(figsize=(WIDTH, min(height, HEIGHT)), layout="constrained")
    return figure, figure.subplots()


def make_panels(
    count: int, columns: int, height: float, *, above: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """Make a grid of axes that share their scales, of a height in inches per row, and room above.

    The places of the grid for which there is no panel stay empty.
    """
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, min(height * rows + 0.5 + above, HEIGHT)), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    # Where the panel below is left out, the last one above it shows the scale.
    for axes in grid[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)
    return figure, grid[:count]


def add_legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Names above the drawing, in as many columns as there is room for."""
    labels = [shorten(name) for name in names]
    columns = max(1, min(len(labels), 92 // (max(map(len, labels)) + 8)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def draw_dot(axes: Axes, place: float, values: Spread, look: Look) -> Any:
    """A mean with its interval, lying; returned for the legend."""
    mean, low, high = values
    if low is not None and high is not None:
        axes.plot([low, high], [place, place], color=look.colour, linewidth=1.8)
    [dot] = axes.plot(
        [] if mean is None else [mean],
        [] if mean is None else [place],
        linestyle="none",
        marker=look.marker,
        color=look.colour,
        markerfacecolor="white" if look.hollow else look.colour,
        markersize=6.5,
    )
    return dot


def label_rows(axes: Axes, labels: Sequence[str], *, at: float | None = None) -> None:
    """Label the rows from top to bottom, with a line where nothing happens."""
    axes.set_yticks(range(len(labels)), [shorten(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    if at is not None:
        axes.axvline(at, color=INK, linestyle=":", linewidth=1.2)


def label_values(axes: Axes, values: Sequence[float | None], *, digits: int = 3) -> None:
    """Write the numbers at the right edge, one per row."""
    for place, value in enumerate(values):
        if value is not None:
            text = minus(f"{value:.{digits}f}")
            axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center")


def split(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Cut rows into pieces for one picture each, none much smaller than the others."""
    pieces = -(-len(rows) // size)
    edges = [len(rows) * piece // pieces for piece in range(pieces + 1)]
    return [rows[start:end] for start, end in itertools.pairwise(edges)]


def draw_dots(
    names: Sequence[str],
    spreads: Sequence[Spread],
    looks: Sequence[Look],
    *,
    label: str,
    at: float | None = None,
) -> Figure:
    """Draw one mean with its interval per row, and the number beside it."""
    figure, axes = make_sheet(0.34 * len(names) + 0.8)
    for place, (spread, look) in enumerate(zip(spreads, looks, strict=True)):
        draw_dot(axes, place, spread, look)
    label_rows(axes, names, at=at)
    label_values(axes, [spread[0] for spread in spreads])
    axes.set_xlabel(label)
    return figure


def row_height(models: int) -> float:
    """Inches that a row of dots takes, one per model."""
    return max(0.36, 0.1 * models + 0.12)


def draw_groups(
    labels: Sequence[str],
    series: Mapping[str, Sequence[Spread]],
    looks: Looks,
    *,
    label: str,
    at: float | None = None,
) -> Figure:
    """Dots with intervals, one row per label and in it one line per model."""
    names = list(series)
    figure, axes = make_sheet(
        max(0.36, 0.1 * len(names) + 0.12) * len(labels) + 0.9 + legend_height(names)
    )
    handles = []
    for number, (name, spreads) in enumerate(series.items()):
        offset = 0.8 * ((number + 0.5) / len(names) - 0.5)
        for place, spread in enumerate(spreads):
            dot = draw_dot(axes, place + offset, spread, looks[name])
        handles.append(dot)
    for place in range(1, len(labels)):
        axes.axhline(place - 0.5, color="#c9ced6", linewidth=0.8)
    label_rows(axes, labels, at=at)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(label)
    add_legend(figure, handles, names)
    return figure


def legend_height(names: Sequence[str]) -> float:
    """Inches that a legend of these names takes."""
    longest = max(len(shorten(name)) for name in names)
    return 0.2 * -(-len(names) // max(1, 92 // (longest + 8)))


def draw_curve(
    axes: Axes,
    places: Sequence[float],
    spreads: Sequence[Spread],
    look: Look,
    *,
    band: bool = True,
) -> Any:
    """A line through means, its interval as a band; returned for the legend."""
    means = [number_of(mean) for mean, _, _ in spreads]
    if band:
        low = [number_of(edge) for _, edge, _ in spreads]
        high = [number_of(edge) for _, _, edge in spreads]
        axes.fill_between(places, low, high, color=look.colour, alpha=0.13, linewidth=0)
    [line] = axes.plot(
        places,
        means,
        color=look.colour,
        linestyle=look.line,
        marker=look.marker,
        markerfacecolor="white" if look.hollow else look.colour,
        markersize=5,
        linewidth=1.6,
    )
    return line


def draw_stack(axes: Axes, bars: Sequence[Sequence[float]], *, rest: bool) -> list[Any]:
    """Stacked lying bars with their percentages; returned for the legend."""
    handles = []
    left = [0.0] * len(bars[0])
    for number, widths in enumerate(bars):
        last = rest and number == len(bars) - 1
        colour = "#d5d9e0" if last else PALETTE[number % len(PALETTE)]
        handles.append(
            axes.barh(
                range(len(widths)),
                widths,
                0.78,
                left=left,
                color=colour,
                edgecolor="white",
                linewidth=0.8,
                hatch="" if last else HATCHES[number % len(HATCHES)],
            )
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    return handles


def ink_on(shade: Sequence[float]) -> str:
    """Black or white, whichever contrasts more with a shade: 4.58 at least.

    Args:
        shade: Red, green and blue from 0 to 1, and whatever follows.

    References:
        WCAG 2.2, definitions of relative luminance and of contrast ratio.
    """
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in shade[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if (luminance + 0.05) ** 2 < 1.05 * 0.05 else "black"


def draw_heat(axes: Axes, names: Sequence[str], pairs: Sequence[tuple[int, int, float]]) -> Any:
    """The lower triangle of a correlation matrix."""
    count = len(names)
    values = [[math.nan] * count for _ in names]
    for i, j, value in pairs:
        values[max(i, j)][min(i, j)] = value
    # So few that the scale beside them is drawn as shapes, not as an image.
    shades = matplotlib.colormaps["RdBu_r"].resampled(41)
    image = axes.pcolormesh(
        values, cmap=shades, vmin=-1.0, vmax=1.0, edgecolors="white", linewidth=0.6
    )
    for i, j, value in pairs:
        if count <= 8:
            text = minus(f"{value:.2f}")
        elif value <= -0.1:  # in black and white, the sign alone cannot be seen
            text = MINUS
        else:
            continue
        axes.text(
            min(i, j) + 0.5,
            max(i, j) + 0.5,
            text,
            ha="center",
            va="center",
            fontsize=8,
            color=ink_on(shades((value + 1.0) / 2.0)),
        )
    columns = range(0, count - 1, 1 if count <= 12 else 2)  # room for two digits
    axes.set_xticks([k + 0.5 for k in columns], [str(k + 1) for k in columns], fontsize=8)
    labels = [f"{shorten(name, 24)}  {k + 1}" for k, name in enumerate(names)]
    axes.set_yticks([k + 0.5 for k in range(count)], labels, fontsize=8 if count > 8 else 9)
    # The last column of a triangle without its diagonal is empty; so is the first row, which says
    # whose column the first one is.
    axes.set_xlim(0, count - 1)
    axes.set_ylim(count, 0)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def draw_contrasts(
    labels: Sequence[str],
    before: Sequence[Spread],
    after: Sequence[Spread],
    *,
    label: str,
    at: float | None,
) -> Figure:
    """Two bars per row."""
    figure, axes = make_sheet(0.5 * len(labels) + 1.0)
    handles = []
    for spreads, offset, colour in ((before, -0.2, BEFORE), (after, 0.2, AFTER)):
        places = [place + offset for place in range(len(labels))]
        means = [number_of(mean) for mean, _, _ in spreads]
        handles.append(axes.barh(places, means, 0.36, color=colour, edgecolor="#4b5563"))
        for place, (_, low, high) in zip(places, spreads, strict=True):
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=INK, linewidth=1.2, marker="|")
    label_rows(axes, labels, at=at)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(label)
    add_legend(figure, handles, ["before", "after"])
    return figure
