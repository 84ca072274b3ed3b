"""An evaluation as terminal tables, Markdown, JSON, CSV and one self-contained HTML page."""

import csv
import html
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from armo.artifacts import write_json, write_text
from armo.report.drawing import Looks, minus, to_svg
from armo.report.findings import summarize
from armo.report.plots import draw
from armo.report.tables import Evaluation, Table

SHOWN = 120  # rows of a table in the page; files beside it hold all

# Text and links have a contrast of at least 4.5 on white and on the shades used here.
SHEET = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif;margin:0;
color:#1c2430;background:#fff}
header,main{max-width:70rem;margin:0 auto;padding:0 1.25rem}
h1{font-size:1.9rem;line-height:1.2;margin:2rem 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.35rem;line-height:1.3;margin:0 0 .4rem;overflow-wrap:anywhere}
h3{font-size:1.05rem;margin:1.4rem 0 .4rem;overflow-wrap:anywhere}
p,li{max-width:46rem;overflow-wrap:anywhere}
a{color:#005a8d}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:3px solid #005a8d;
outline-offset:2px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem;background:#fff;padding:.3rem}
section{padding:1.6rem 0 .8rem;border-top:1px solid #d5d9e0}
#summary{border-top:0;padding-top:.5rem}
#summary ul{background:#f1f5f9;border-left:4px solid #005a8d;padding:.9rem 1.2rem .9rem 2.2rem;
margin:.4rem 0}
#summary li{margin:.25rem 0}
nav{font-size:.9rem}nav ol{padding-left:1.9rem;margin:.3rem 0}nav h2{font-size:1rem}
.note,figcaption{font-size:.9rem;color:#4b5563}
figure{margin:1rem 0}figcaption{margin-bottom:.3rem;font-weight:600}
svg{display:block;width:100%;max-width:50rem;height:auto}
svg text{font-family:inherit!important}
details{margin:.6rem 0}summary{cursor:pointer;color:#005a8d;width:fit-content}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.85rem;margin:.4rem 0;
font-variant-numeric:tabular-nums}
caption,.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
td,th{padding:.25rem .6rem;text-align:right;vertical-align:top;border-bottom:1px solid #e2e5ea;
font-weight:400;overflow-wrap:break-word;max-width:22rem}
thead th{font-weight:600;vertical-align:bottom;border-bottom:2px solid #4b5563;background:#f1f5f9}
.t{text-align:left;overflow-wrap:anywhere;min-width:7rem}
.range{display:block;font-size:.8em;color:#4b5563;white-space:nowrap}
tbody tr:hover{background:#f1f5f9}
@media (min-width:70rem){main.contents{display:grid;grid-template-columns:13rem minmax(0,1fr);
column-gap:2.5rem;align-items:start}main.contents>*{grid-column:2}
main.contents>nav{grid-column:1;grid-row:1/99;position:sticky;top:0;max-height:100vh;
overflow-y:auto;padding:1rem 0}}
@media print{
@page{size:A4;margin:14mm}@page wide{size:A4 landscape}
body{font-size:10pt;-webkit-print-color-adjust:exact;print-color-adjust:exact}
header,main{padding:0;max-width:none}
main.contents{display:block}nav,.skip{display:none}
main>section{break-before:page;border-top:0;padding-top:0}#summary{break-before:auto}
h2,h3,figcaption,summary{break-after:avoid}
figure,tr{break-inside:avoid}thead{display:table-header-group;break-after:avoid}
tbody tr:first-child{break-before:avoid}
svg{max-width:100%;max-height:225mm}
details::details-content{content-visibility:visible;display:block;height:auto}
summary{display:none}
.scroll{overflow:visible}table{font-size:8pt;max-width:100%}
td,th{padding:.12rem .3rem}.t{min-width:0}td.t,tbody .t{overflow-wrap:break-word}
.range{display:inline}.wide{page:wide}.wide table{font-size:7pt}.wide .range{display:block}
}
"""


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
            side: Literal["left", "right"] = "left" if isinstance(sample, str) else "right"
            shown.add_column(Text(name), justify=side, overflow="fold")  # nothing is cut off
        for row in table.rows:
            shown.add_row(*(Text(cell(value)) for value in row))
        console.print(shown)


def save_pages(evaluation: Evaluation, folder: Path, *, title: str) -> None:
    """Write `report.json`, `report.md`, `report.html` and `tables/NAME.csv` for each table.

    JSON and CSV hold numbers with all their digits; a missing value is null, or an empty field.

    Raises:
        ValueError: If two tables have one name, or two columns of a table.
    """
    for table in evaluation.tables:
        if twice := _twice(table.columns):
            raise ValueError(
                f"Table `{table.name}` has two columns `{twice}`; give models distinct names, "
                "other than those of the columns."
            )
    if twice := _twice([_slug(table.name) for table in evaluation.tables]):
        raise ValueError(f"Two tables are named `{twice}`; give benchmarks distinct names.")
    write_json(
        folder / "report.json",
        {
            table.name: [dict(zip(table.columns, row, strict=True)) for row in table.rows]
            for table in evaluation.tables
        },
    )
    for old in (folder / "tables").glob("*.csv"):  # of tables that there may be no more
        old.unlink()
    for table in evaluation.tables:
        write_text(folder / "tables" / f"{_slug(table.name)}.csv", to_csv(table))
    write_text(folder / "report.md", to_markdown(evaluation.tables, title=title))
    write_text(folder / "report.html", to_html(evaluation, title=title))


def _twice(names: Sequence[str]) -> str | None:
    return next((name for k, name in enumerate(names) if name in names[:k]), None)


def _slug(name: str) -> str:
    """A name as part of a file's name or of an address."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "table"


def to_csv(table: Table) -> str:
    """Render a table as CSV (RFC 4180), its columns first; numbers keep all their digits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return buffer.getvalue()


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
    # Markdown drops spaces in front: what is a part of the row above is set off by other means.
    indented = ("&emsp;" * ((len(text) - len(text.lstrip(" "))) // 2) for text in cells)
    escaped = (" ".join(text.split()).replace("|", "\\|") for text in cells)
    return "| " + " | ".join(map("".join, zip(indented, escaped, strict=True))) + " |"


def to_html(evaluation: Evaluation, *, title: str) -> str:
    """Render an evaluation as one page, plots inside, nothing loaded from elsewhere."""
    looks = Looks(_models(evaluation.tables))
    sections, contents = [], []
    for table in evaluation.tables:
        name = _slug(table.name)
        contents.append(f'<li><a href="#{name}">{html.escape(table.title)}</a></li>')
        sections.append(_section(table, name, looks))
    found = "".join(
        f'<li>{html.escape(text)} <a href="#{_slug(name)}">More<span class="hidden"> on '
        f"{html.escape(evaluation.table(name).title)}</span></a></li>"
        for name, text in summarize(evaluation)
    )
    summary = (
        '<section id="summary" aria-labelledby="summary-heading"><h2 id="summary-heading">In '
        f"short</h2><ul>{found}</ul></section>"
        if found
        else ""
    )
    nav = (
        '<nav aria-labelledby="contents-heading"><h2 id="contents-heading">Contents</h2>'
        f"<ol>{''.join(contents)}</ol></nav>"
    )
    return html_page(title, summary + nav + "".join(sections), contents=True)


def _models(tables: Sequence[Table]) -> Iterator[str]:
    """Names of models, in the order in which the page has them."""
    for table in tables:
        if table.columns[:2] == ("subset", "cases"):
            yield from table.columns[2:]
        elif table.name == "bias_probes":
            yield from table.columns[2::3]
        elif table.columns[0] == "model":
            yield from table.column("model")


def _section(table: Table, name: str, looks: Looks) -> str:
    figures = "".join(
        f"<figure><figcaption>{html.escape(picture.title)}</figcaption>"
        f"{to_svg(picture, name=f'{name}-{number}')}</figure>"
        for number, picture in enumerate(draw(table, looks), start=1)
    )
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    more = ""
    if len(table.rows) > SHOWN:
        more = (
            f'<p class="note">The first {SHOWN} of {len(table.rows):,} rows; '
            f"<code>tables/{name}.csv</code> beside this page has all.</p>"
        )
    shown = html_table(Table(table.name, table.title, table.columns, table.rows[:SHOWN])) + more
    if figures:
        shown = f"<details><summary>Show the numbers</summary>{shown}</details>"
    return (
        f'<section id="{name}" aria-labelledby="{name}-heading">'
        f'<h2 id="{name}-heading">{html.escape(table.title)}</h2>{note}{figures}{shown}</section>'
    )


def _fold(columns: Sequence[str]) -> list[tuple[int, ...]]:
    """Group a column with the two after it that are the ends of its interval."""
    folded: list[tuple[int, ...]] = []
    start = 0
    while start < len(columns):
        name, ends = columns[start], tuple(columns[start + 1 : start + 3])
        pairs = [
            (f"{before}{low}", f"{before}{high}")
            for before in ("", f"{name} ", f"{name}, ")
            for low, high in (("low", "high"), ("from", "to"))
        ]
        size = 3 if ends in pairs else 1
        folded.append(tuple(range(start, start + size)))
        start += size
    return folded


def html_table(table: Table) -> str:
    """Render a table alone; the ends of an interval stand under the value."""
    folded = _fold(table.columns)
    texts = [any(isinstance(row[each[0]], str) for row in table.rows) for each in folded]
    head = "".join(
        f'<th scope="col"{_class(text)}>{_breakable(table.columns[each[0]].strip())}'
        + ('<span class="range">95 % interval</span>' if len(each) == 3 else "")
        + "</th>"
        for each, text in zip(folded, texts, strict=True)
    )
    rows = []
    for row in table.rows:
        first, *others = (_html_cell([row[k] for k in each]) for each in folded)
        depth = len(str(row[0])) - len(str(row[0]).lstrip(" "))
        indent = f' style="padding-left:{0.6 + 0.6 * depth:.1f}rem"' if depth else ""
        cells = "".join(
            f"<td{_class(text)}>{shown}</td>" for shown, text in zip(others, texts[1:], strict=True)
        )
        rows.append(f'<tr><th scope="row"{_class(texts[0])}{indent}>{first}</th>{cells}</tr>')
    title = html.escape(table.title)
    wide = " wide" if len(folded) > 9 else ""  # paper is turned for it
    return (
        f'<div class="scroll{wide}" tabindex="0" role="region" aria-label="{title}, table"><table>'
        f"<caption>{title}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _breakable(name: str) -> str:
    """A heading that may be broken where names like those of folders have their joints."""
    if len(name) <= 20 or " " in name:
        return html.escape(name)
    return "<wbr>".join(html.escape(part) for part in re.findall(r"\w{1,12}\W*|\W{1,12}", name))


def _class(text: bool) -> str:
    return ' class="t"' if text else ""


def _html_cell(values: Sequence[Any]) -> str:
    """A value, and its interval where it has one."""
    shown = [_html_number(value) for value in values]
    if len(shown) == 3 and shown[1]:
        return f'{shown[0]} <span class="range">{shown[1]} to {shown[2]}</span>'
    return shown[0]


def _html_number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return minus(f"{value:,}")
    if isinstance(value, float):
        return minus(cell(value)) if value < 0.0 else cell(value)
    return html.escape(cell(value).strip())


def html_page(title: str, body: str, *, style: str = "", contents: bool = False) -> str:
    """Put a page around its body, which is HTML already.

    Args:
        title: Of the page.
        body: What stands in it.
        style: Added to the page's sheet.
        contents: Whether a list of contents in the body stands beside it where there is room.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{SHEET}{style}</style></head><body>"
        '<a class="skip" href="#main">Skip to the results</a>'
        f"<header><h1>{html.escape(title)}</h1></header>"
        f'<main id="main"{" class=contents" if contents else ""}>{body}</main></body></html>\n'
    )
