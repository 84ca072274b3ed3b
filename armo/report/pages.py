"""An evaluation as terminal tables, Markdown, JSON and one self-contained HTML page."""

import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from armo.artifacts import write_json, write_text
from armo.report.tables import Evaluation, Table

# Colours that most colour-blind readers tell apart.
BEFORE, AFTER = "#b0b7c3", "#1f6f8b"
PLOTTED = 20  # objectives in one picture
PALETTE = ("#1f6f8b", "#e07a5f", "#3d405b", "#81b29a", "#f2cc8f", "#6d597a", "#b56576", "#457b9d")


def cell(value: Any) -> str:
    """Format one value of a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1e}" if 0.0 < abs(value) < 5e-4 else f"{value:.3f}"
    return str(value)


def print_tables(tables: Sequence[Table], console: Console) -> None:
    """Print tables with aligned columns."""
    for table in tables:
        # Text, not strings: names are the user's, and brackets in them are no markup.
        title, note = Text(table.title, style="table.title"), Text(table.note, "table.caption")
        shown = RichTable(title=title, caption=note if table.note else None, title_justify="left")
        for name, sample in zip(table.columns, table.rows[0], strict=True):
            shown.add_column(Text(name), justify="left" if isinstance(sample, str) else "right")
        for row in table.rows:
            shown.add_row(*(Text(cell(value)) for value in row))
        console.print(shown)


def save_pages(evaluation: Evaluation, folder: Path, *, title: str) -> None:
    """Write `report.json`, `report.md` and `report.html`."""
    write_json(
        folder / "report.json",
        {
            table.name: [dict(zip(table.columns, row, strict=True)) for row in table.rows]
            for table in evaluation.tables
        },
    )
    write_text(folder / "report.md", to_markdown(evaluation.tables, title=title))
    write_text(folder / "report.html", to_html(evaluation, title=title))


def to_markdown(tables: Sequence[Table], *, title: str) -> str:
    """Render tables as Markdown."""
    parts = [f"# {title}"]
    for table in tables:
        lines = [
            _markdown_row(table.columns),
            _markdown_row(["---"] * len(table.columns)),
            *(_markdown_row([cell(value) for value in row]) for row in table.rows),
        ]
        parts += [f"## {table.title}", "\n".join(lines)]
        if table.note:
            parts.append(table.note)
    return "\n\n".join(parts) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (" ".join(text.split()).replace("|", "\\|") for text in cells)
    return "| " + " | ".join(escaped) + " |"


def to_html(evaluation: Evaluation, *, title: str) -> str:
    """Render an evaluation as one page, plots inside, nothing loaded from elsewhere."""
    plots = {
        "rivals": _plot_rivals,
        "reliability": _plot_reliability,
        "weights": _plot_weights,
        "kinds": _plot_kinds,
        "quarters": _plot_quarters,
        "style": _plot_style,
        "counterfactuals": _plot_counterfactuals,
    }
    body = []
    for table in evaluation.tables:
        plot = to_svg(plots[table.name], table) if table.name in plots and table.rows else ""
        body.append(
            f"<section><h2>{html.escape(table.title)}</h2>{plot}"
            f"<p>{html.escape(table.note)}</p><details{'' if plot else ' open'}>"
            f"<summary>Table</summary>{html_table(table)}</details></section>"
        )
    return html_page(title, "".join(body))


def html_table(table: Table) -> str:
    """Render a table alone."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell(value))}</td>" for value in row) + "</tr>"
        for row in table.rows
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def html_page(title: str, body: str, *, style: str = "") -> str:
    """Put a page around its body, which is HTML already; `style` is added to its sheet."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;"
        "padding:0 1rem;color:#222}table{border-collapse:collapse;font-size:14px}"
        "td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"
        f"{style}</style><h1>{html.escape(title)}</h1>{body}</html>\n"
    )


def _plot_rivals(table: Table) -> Figure:
    figure = Figure(figsize=(8, 0.45 * len(table.rows) + 1), layout="constrained")
    axes = figure.subplots()
    names, means = table.column("score")[::-1], table.column("accuracy")[::-1]
    low, high = table.column("low")[::-1], table.column("high")[::-1]
    errors = [
        [mean - edge for mean, edge in zip(means, low, strict=True)],
        [edge - mean for mean, edge in zip(means, high, strict=True)],
    ]
    colours = [AFTER if name == "gated score" else BEFORE for name in names]
    axes.barh(names, means, xerr=errors, color=colours, capsize=3)
    axes.axvline(0.5, color="#555", linestyle=":", linewidth=1)
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("accuracy on test pairs")
    return figure


def _plot_reliability(table: Table) -> Figure:
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axes = figure.subplots()
    predicted, observed, pairs = map(table.column, ("predicted", "observed", "pairs"))
    axes.plot([0.5, 1.0], [0.5, 1.0], color="#555", linestyle=":", linewidth=1, label="calibrated")
    axes.plot(predicted, observed, "o-", color=AFTER, label="observed")
    for x, y, count in zip(predicted, observed, pairs, strict=True):
        axes.annotate(str(count), (x, y), (6, -10), textcoords="offset points", fontsize=8)
    axes.set_xlim(0.5, 1.0)
    axes.set_ylim(min(0.45, *observed) - 0.02, 1.02)
    axes.set_xlabel("predicted probability of the preferred response")
    axes.set_ylabel("how often it was preferred (number of pairs)")
    axes.legend(loc="upper left", frameon=False)
    return figure


def _plot_weights(table: Table) -> Figure:
    rows = table.rows[:PLOTTED][::-1]  # in the order of their mean weight
    figure = Figure(figsize=(8, 0.45 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    names = [row[0] for row in rows]
    axes.barh(names, [row[1] for row in rows], color=AFTER, label="mean gating weight")
    axes.errorbar(
        [row[1] for row in rows],
        range(len(rows)),
        xerr=[row[2] for row in rows],
        fmt="none",
        ecolor="#555",
        capsize=3,
        label="spread over prompts",
    )
    axes.plot([row[4] for row in rows], range(len(rows)), "D", color=BEFORE, label="constant mix")
    axes.set_xlim(left=0.0)
    axes.set_xlabel("weight")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _plot_kinds(table: Table) -> Figure:
    kinds, names = table.column("kind"), table.columns[6:]
    figure = Figure(figsize=(8, 0.45 * len(kinds) + 1.4), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(kinds)
    for name, colour in zip(names, PALETTE, strict=False):
        weights = table.column(name)
        axes.barh(kinds, weights, left=left, label=name, color=colour)
        left = [a + b for a, b in zip(left, weights, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("mean gating weight")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def _plot_quarters(table: Table) -> Figure:
    rows = [row for row in table.rows if row[1] is not None]  # the others are no accuracies
    figure = Figure(figsize=(8, 0.45 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    positions = range(len(rows))
    for first, offset, colour, label in ((2, -0.2, BEFORE, "before"), (5, 0.2, AFTER, "after")):
        means = [row[first] for row in rows]
        errors = [
            [row[first] - row[first + 1] for row in rows],
            [row[first + 2] - row[first] for row in rows],
        ]
        places = [p + offset for p in positions]
        axes.barh(places, means, 0.38, xerr=errors, color=colour, label=label, capsize=2)
    axes.set_yticks(list(positions), [f"chosen is {row[0]}" for row in rows])
    axes.invert_yaxis()
    axes.axvline(0.5, color="#555", linestyle=":", linewidth=1)
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("accuracy on test pairs")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _plot_style(table: Table) -> Figure:
    rows = [row for row in table.rows if row[0] == "score"]
    names = [row[1] for row in rows]
    figure = Figure(figsize=(8, 0.45 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    positions = range(len(names))
    axes.barh(
        [p - 0.2 for p in positions], [r[2] for r in rows], 0.38, color=BEFORE, label="before"
    )
    axes.barh([p + 0.2 for p in positions], [r[3] for r in rows], 0.38, color=AFTER, label="after")
    axes.set_yticks(list(positions), names)
    axes.invert_yaxis()
    axes.axvline(0.0, color="#555", linewidth=1)
    axes.set_xlabel("Spearman correlation of the score, within prompts")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _plot_counterfactuals(table: Table) -> Figure:
    names = table.column("pattern")
    figure = Figure(figsize=(8, 0.45 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    positions = range(len(names))
    for column, offset, colour in (("before", -0.2, BEFORE), ("after", 0.2, AFTER)):
        values = table.column(f"moved, {column}")
        axes.barh([p + offset for p in positions], values, 0.38, color=colour, label=column)
    axes.set_yticks(list(positions), names)
    axes.invert_yaxis()
    axes.set_xlabel("mean absolute change of the score, in standard deviations")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def to_svg(plot: Callable[[Table], Figure], table: Table) -> str:
    """Draw a table as an image that stands in a page; the same table gives the same bytes."""
    buffer = io.StringIO()
    # A fixed salt and no date: the same results give the same bytes. Names are no formulas.
    with matplotlib.rc_context(
        {"svg.hashsalt": "armo", "svg.fonttype": "none", "text.parse_math": False}
    ):
        plot(table).savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
