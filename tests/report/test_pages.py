import io
import json
import re

import pytest
from rich.console import Console

from armo.report.pages import (
    PLOTTED,
    _plot_quarters,
    _plot_reliability,
    _plot_weights,
    cell,
    print_tables,
    save_pages,
    to_html,
    to_markdown,
)
from armo.report.tables import Evaluation, Table

RIVALS = Table(
    "rivals",
    "Which is preferred",
    ("score", "accuracy", "low", "high"),
    (("gated score", 0.75, 0.5, 0.875), ("length only", 0.5, 0.25, 0.625)),
    "4 pairs.",
)
KINDS = Table(
    "kinds",
    "By kind",
    ("kind", "pairs", "accuracy", "low", "high", "constant mix", "honesty", "safety"),
    (("advice", 4, 0.75, 0.5, 1.0, 0.5, 0.25, 0.75), ("code", 2, 0.5, 0.0, 1.0, 0.5, 1.0, 0.0)),
)
STYLE = Table(
    "style",
    "Style",
    ("of", "with", "within, before", "within, after", "across, before", "across, after"),
    (("score", "log_length", 0.5, 0.0001, 0.25, 0.125), ("honesty", "bold", 0.5, 0.0, 0.5, 0.0)),
)
COUNTERFACTUALS = Table(
    "counterfactuals",
    "Same content",
    ("pattern", "pairs", "moved, before", "moved, after"),
    (("length", 3, 0.5, 0.25), ("all", 3, 0.5, 0.25)),
)
WEIGHTS = Table(
    "weights",
    "Weights",
    ("objective", "mean", "spread", "uncertainty", "constant mix"),
    (("honesty", 0.75, 0.25, 0.0625, 0.5), ("safety", 0.25, 0.25, 0.0625, 0.5)),
)
APPLIED = Table("applied", "Applied", ("check", "value"), (("difference", None),))
EVALUATION = Evaluation((RIVALS, WEIGHTS, KINDS, STYLE, COUNTERFACTUALS, APPLIED))


@pytest.fixture(scope="module")
def page():
    return to_html(EVALUATION, title="Report")


def with_name(name):
    """An evaluation whose texts all hold `name`."""
    return Evaluation(
        (
            Table("rivals", name, RIVALS.columns, ((name, 0.5, 0.25, 0.75),), name),
            Table("weights", name, WEIGHTS.columns, ((name, 0.5, 0.25, 0.125, 1.0),), name),
            Table("kinds", name, (*KINDS.columns[:6], name), ((name, 4, 0.5, 0.0, 1.0, 0.5, 1.0),)),
            Table("style", name, STYLE.columns, (("score", name, 0.5, 0.5, 0.5, 0.5),)),
            Table("counterfactuals", name, COUNTERFACTUALS.columns, ((name, 1, 0.5, 0.5),)),
        )
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.0, "0.000"),
        (0.12345, "0.123"),
        (-1.5, "-1.500"),
        (0.0001, "1.0e-04"),
        (-0.0001, "-1.0e-04"),
        (7, "7"),
        ("code", "code"),
    ],
)
def test_a_cell_reads_as_people_write_it(value, text):
    assert cell(value) == text


def test_markdown_holds_every_row_under_its_columns():
    lines = to_markdown(EVALUATION.tables, title="Report").splitlines()
    assert lines[0] == "# Report"
    start = lines.index("## Which is preferred")
    assert lines[start + 2 : start + 8] == [
        "| score | accuracy | low | high |",
        "| --- | --- | --- | --- |",
        "| gated score | 0.750 | 0.500 | 0.875 |",
        "| length only | 0.500 | 0.250 | 0.625 |",
        "",
        "4 pairs.",
    ]
    assert "| difference |  |" in lines


def test_a_bar_in_a_name_does_not_add_a_markdown_column():
    table = Table("t", "T", ("kind", "pairs"), (("either | or", 3),))
    row = to_markdown([table], title="Report").splitlines()[-1]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3


def test_saved_json_gives_every_table_back_unrounded(tmp_path):
    save_pages(EVALUATION, tmp_path, title="Report")
    read = json.loads((tmp_path / "report.json").read_text())
    assert list(read) == [table.name for table in EVALUATION.tables]
    for table in EVALUATION.tables:
        assert [tuple(row.values()) for row in read[table.name]] == list(table.rows)
        assert all(tuple(row) == table.columns for row in read[table.name])


def test_the_page_loads_nothing_from_elsewhere(page):
    links = re.findall(r"""(?:src|href|data|action)\s*=\s*["']([^"']*)""", page)
    assert all(link.startswith("#") for link in links)
    assert len(links) > 0  # the plots refer to their own parts
    assert not re.search(r"<(script|link|iframe|img|object|embed)\b|@import", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_the_page_shows_every_table_and_a_plot_for_those_that_have_one(page):
    assert page.count("<svg") == page.count("</svg>") == 5
    assert page.count("<table>") == 6
    for table in EVALUATION.tables:
        assert f"<h2>{table.title}</h2>" in page
        for row in table.rows:
            assert "".join(f"<td>{cell(value)}</td>" for value in row) in page


def test_text_is_escaped_wherever_it_stands():
    name = "<script>alert('&')</script>-->"
    page = to_html(with_name(name), title=name)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 12


@pytest.mark.parametrize("name", ["from $5 to $10", r"$\no$", "100 % _x_ ^2"])
def test_names_are_drawn_as_plain_text(name):
    page = to_html(with_name(name), title=name)
    assert page.count("<svg") == 5


def test_the_same_evaluation_gives_the_same_bytes(page, tmp_path):
    for folder in ("first", "second"):
        save_pages(EVALUATION, tmp_path / folder, title="Report")
    for name in ("report.json", "report.md", "report.html"):
        first, second = tmp_path / "first" / name, tmp_path / "second" / name
        assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "first" / "report.html").read_text() == page


def test_printed_tables_hold_every_cell():
    buffer = io.StringIO()
    print_tables(EVALUATION.tables, Console(file=buffer, width=120))
    for table in EVALUATION.tables:
        for row in table.rows:
            assert all(cell(value) in buffer.getvalue() for value in row)


def test_brackets_in_names_are_printed_as_they_are():
    console = Console(record=True, width=80, file=io.StringIO())
    print_tables([Table("t", "Title", ("name", "x"), (("[red]a[/b]", 1.0),))], console)
    assert "[red]a[/b]" in console.export_text()


def test_the_quarters_are_drawn_with_their_intervals_and_without_the_differences():
    columns = ("chosen", "pairs", "before", "from", "to", "after", "after, from", "after, to")
    rows = (
        ("longer", 9, 0.8, 0.7, 0.9, 0.6, 0.5, 0.7),
        ("shorter", 7, 0.4, 0.3, 0.5, 0.6, 0.5, 0.7),
        ("longer less shorter", None, 0.4, 0.2, 0.6, 0.0, -0.1, 0.1),
    )
    table = Table("quarters", "Quarters", columns, rows)
    [axes] = _plot_quarters(table).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "chosen is longer",
        "chosen is shorter",
    ]
    bars = [bar.get_width() for container in axes.containers[1::2] for bar in container]
    assert bars == [0.8, 0.4, 0.6, 0.6]
    assert "<svg" in to_html(Evaluation((table,)), title="x")
    # Where no pair differs in style there is nothing to draw.
    empty = Table("quarters", "Quarters", columns, ())
    assert "<svg" not in to_html(Evaluation((empty,)), title="x")


def test_the_reliability_curve_is_drawn_beside_that_of_a_calibrated_model():
    table = Table(
        "reliability", "R", ("predicted", "observed", "pairs"), ((0.55, 0.4, 7), (0.9, 0.95, 8))
    )
    [axes] = _plot_reliability(table).axes
    calibrated, curve = axes.lines
    assert list(calibrated.get_xdata()) == list(calibrated.get_ydata()) == [0.5, 1.0]
    assert list(curve.get_xdata()) == [0.55, 0.9]
    assert list(curve.get_ydata()) == [0.4, 0.95]
    assert [text.get_text() for text in axes.texts] == ["7", "8"]
    assert axes.get_ylim()[0] < 0.4
    assert "<svg" in to_html(Evaluation((table,)), title="x")


def test_the_weights_are_drawn_heaviest_first_with_their_spread_beside_the_constant_mix():
    columns = ("objective", "mean", "spread", "uncertainty", "constant mix")
    rows = (("safety", 0.6, 0.2, 0.1, 0.3), ("honesty", 0.4, 0.1, 0.0, 0.7))
    [axes] = _plot_weights(Table("weights", "Weights", columns, rows)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["honesty", "safety"]
    assert [bar.get_width() for bar in axes.patches] == [0.4, 0.6]
    [constant] = [line for line in axes.lines if line.get_marker() == "D"]
    assert [*constant.get_xdata()] == [0.7, 0.3]
    [spread] = axes.containers[1].lines[2]  # the caps apart
    ends = [(segment[0, 0], segment[1, 0]) for segment in spread.get_segments()]
    assert ends == [pytest.approx((0.3, 0.5)), pytest.approx((0.4, 0.8))]


def test_of_many_objectives_only_the_heaviest_are_drawn():
    columns = ("objective", "mean", "spread", "uncertainty", "constant mix")
    rows = tuple((f"objective {k}", 1 / (k + 1), 0.0, 0.0, 0.1) for k in range(PLOTTED + 5))
    table = Table("weights", "Weights", columns, rows)
    [axes] = _plot_weights(table).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[::-1] == [row[0] for row in rows[:PLOTTED]]
    page = to_html(Evaluation((table,)), title="x")
    assert page.count("<svg") == 1
    assert f"<td>objective {PLOTTED + 4}</td>" in page
