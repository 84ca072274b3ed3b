import csv
import dataclasses
import functools
import io
import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sample_tables import FEW, MANY, ONE

from armo.report.drawing import MINUS
from armo.report.pages import (
    SHEET,
    SHOWN,
    cell,
    html_table,
    print_tables,
    save_pages,
    to_csv,
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


PAGES = {"train": EVALUATION, "one": ONE, "few": FEW, "many": MANY}


@functools.cache
def page_of(which):
    return to_html(PAGES[which], title="Report")


class Outline(HTMLParser):
    """What a screen reader sees of a page; every tag must be closed where it should be."""

    VOID = ("meta", "br", "wbr", "link", "img", "input", "hr")

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.tags = [], [], []
        self.headings = {"h1": [], "h2": [], "h3": []}
        self.levels, self.tables, self.svgs, self.captions = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in self.headings:
            self.headings[tag].append("")
            self.levels.append(int(tag[1]))
        if tag == "table":
            self.tables.append([])
            self.captions.append("")
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "svg":
            self.svgs.append({"title": "", "desc": "", **dict(attributes)})

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag, texts in self.headings.items():
            if tag in self.open:
                texts[-1] += data
        if "caption" in self.open:
            self.captions[-1] += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if "svg" in self.open and self.open[-1] in ("title", "desc"):
            self.svgs[-1][self.open[-1]] += data

    def attributes(self, *tags):
        return [attributes for tag, attributes in self.tags if tag in tags]


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


@pytest.mark.parametrize("which", PAGES)
def test_the_page_loads_nothing_from_elsewhere(which):
    page = page_of(which)
    links = re.findall(r"""(?:src|href|data|action)\s*=\s*["']([^"']*)""", page)
    assert all(link.startswith("#") for link in links)
    assert len(links) > 10  # the contents, and the plots, which refer to their own parts
    assert not re.search(r"<(script|link|iframe|img|object|embed)\b|@import", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_the_page_shows_every_table_and_a_plot_for_those_that_have_one(page):
    assert page.count("<svg") == page.count("</svg>") == 5
    outline = Outline(page)
    assert outline.headings["h2"] == ["In short", "Contents", *(t.title for t in EVALUATION.tables)]
    assert len(outline.tables) == 6
    for table, (head, *rows) in zip(EVALUATION.tables, outline.tables, strict=True):
        shown = [" ".join(row) for row in (head, *rows)]
        for line, row in zip(shown, (table.columns, *table.rows), strict=True):
            for value in row:
                if value not in ("low", "high"):  # the ends of an interval stand under its value
                    assert cell(value) in line


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


@pytest.mark.parametrize("which", PAGES)
def test_a_screen_reader_finds_its_way(which):
    outline = Outline(page_of(which))
    assert dict(outline.attributes("html")[0]) == {"lang": "en"}
    assert len(outline.attributes("main")) == len(outline.attributes("nav")) == 1
    assert len(outline.headings["h1"]) == 1
    # No level is left out on the way down.
    assert outline.levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(outline.levels))
    assert len(set(outline.ids)) == len(outline.ids)
    for _, attributes in outline.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, "main") in outline.ids
        target = attributes.get("href", attributes.get("xlink:href", "#main"))
        assert target[1:] in outline.ids
    first = outline.attributes("a")[0]
    assert first["href"] == "#main"  # past the contents
    contents = [a["href"] for a in outline.attributes("a") if "href" in a]
    assert all(f"#{table.name}" in contents for table in PAGES[which].tables)


@pytest.mark.parametrize("which", PAGES)
def test_every_picture_is_an_image_whose_description_has_numbers(which):
    outline = Outline(page_of(which))
    assert len(outline.svgs) >= 5
    for svg in outline.svgs:
        assert svg["role"] == "img"
        assert len(svg["title"]) > 5
        assert len(re.findall(r"\d\.\d\d", svg["desc"])) >= 2


@pytest.mark.parametrize("which", ["train", "few"])
def test_every_table_has_a_caption_and_every_header_its_scope(which):
    outline = Outline(page_of(which))
    evaluation = PAGES[which]
    assert outline.captions == [table.title for table in evaluation.tables]
    scopes = [attributes.get("scope") for attributes in outline.attributes("th")]
    assert scopes.count("row") == sum(min(len(t.rows), SHOWN) for t in evaluation.tables)
    assert set(scopes) == {"row", "col"}
    regions = [a for a in outline.attributes("div") if a.get("tabindex") == "0"]
    assert len(regions) == len(outline.tables)  # a keyboard scrolls what is wider than the page
    assert all(a["role"] == "region" and a["aria-label"] for a in regions)


def luminance(colour):
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one, other):
    """The contrast of WCAG 2.2: (lighter + 0.05) / (darker + 0.05), of relative luminances."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_a_contrast_of_at_least_four_and_a_half_on_every_shade():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    texts = set(re.findall(r"(?<![-\w])color:(#[0-9a-f]{6})", SHEET))
    shades = {"#ffffff", *re.findall(r"background:(#[0-9a-f]{6})", SHEET)}
    assert len(texts) >= 3
    assert len(shades) >= 2
    for text, shade in itertools.product(texts, shades):
        assert contrast(text, shade) >= 4.5, (text, shade)


def test_the_ends_of_an_interval_stand_under_their_value():
    columns = ("model", "gap", "low", "high", "a", "a low", "a high", "b", "b, from", "b, to", "to")
    row = ("x", 0.5, 0.25, 0.75, -1.0, -2.0, 0.0, 1.0, None, None, 7.0)
    head, shown = Outline(html_table(Table("t", "T", columns, (row,)))).tables[0]
    interval = "95 % interval"
    assert head == ["model", f"gap{interval}", f"a{interval}", f"b{interval}", "to"]
    assert shown == [
        "x",
        "0.500 0.250 to 0.750",
        f"{MINUS}1.000 {MINUS}2.000 to 0.000",
        "1.000",
        "7.000",
    ]


def test_numbers_in_the_page_read_well():
    table = Table("t", "T", ("of", "n", "x"), (("  part - one", 1234567, -0.5),))
    shown = html_table(table)
    assert Outline(shown).tables[0][1] == ["part - one", "1,234,567", f"{MINUS}0.500"]
    assert "padding-left" in shown  # it is a part of the row above


def test_a_long_table_is_cut_in_the_page_and_says_where_the_rest_is():
    rows = tuple((f"row {k}", 0.5) for k in range(SHOWN + 5))
    table = Table("long", "Long", ("of", "x"), rows)
    page = to_html(Evaluation((table,)), title="Report")
    assert len(Outline(page).tables[0]) == 1 + SHOWN
    assert f"The first {SHOWN} of {SHOWN + 5} rows" in page
    assert "tables/long.csv" in page
    short = Table("long", "Long", ("of", "x"), rows[:SHOWN])
    assert "The first" not in to_html(Evaluation((short,)), title="Report")


VALUES = st.one_of(
    st.none(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(min_size=1)
)


@given(
    st.lists(st.text(min_size=1), min_size=2, max_size=4, unique=True).flatmap(
        lambda columns: st.tuples(
            st.just(tuple(columns)),
            st.lists(st.tuples(*[VALUES] * len(columns)), max_size=5).map(tuple),
        )
    )
)
def test_a_table_read_back_from_csv_has_every_value_with_all_its_digits(drawn):
    columns, rows = drawn
    text = to_csv(Table("t", "T", columns, rows))
    head, *read = csv.reader(io.StringIO(text, newline=""))
    assert tuple(head) == columns
    assert len(read) == len(rows)
    for line, row in zip(read, rows, strict=True):
        for shown, value in zip(line, row, strict=True):
            if value is None:
                assert shown == ""
            elif isinstance(value, str):
                assert shown == value
            else:
                assert type(value)(shown) == value


def test_every_table_is_saved_as_csv_under_its_name(tmp_path):
    save_pages(FEW, tmp_path, title="Report")
    assert {path.stem for path in (tmp_path / "tables").iterdir()} == {t.name for t in FEW.tables}
    path = tmp_path / "tables" / "calibration.csv"
    with path.open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    table = FEW.table("calibration")
    assert [float(row["error"]) for row in read] == table.column("error")
    assert [int(row["pairs"]) for row in read] == table.column("pairs")


def test_tables_of_an_earlier_page_go(tmp_path):
    for table in (RIVALS, KINDS):
        save_pages(Evaluation((table,)), tmp_path, title="Report")
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["kinds.csv"]


def test_a_name_with_a_slash_makes_no_folder(tmp_path):
    save_pages(Evaluation((Table("a/../b c", "T", ("x",), ((1,),)),)), tmp_path, title="Report")
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["a-b-c.csv"]
    assert 'id="a-b-c"' in (tmp_path / "report.html").read_text()


def test_columns_and_tables_of_one_name_are_refused(tmp_path):
    twice = Table("t", "T", ("prompts", "demo", "demo"), ((1, 0.5, 0.5),))
    with pytest.raises(ValueError, match="Table `t` has two columns `demo`"):
        save_pages(Evaluation((twice,)), tmp_path, title="Report")
    table = Table("t", "T", ("x",), ((1,),))
    with pytest.raises(ValueError, match="Two tables are named `t`"):
        save_pages(Evaluation((table, table)), tmp_path, title="Report")
    assert not list(tmp_path.iterdir())


def test_markdown_keeps_the_parts_of_a_total_set_off():
    table = Table("t", "T", ("subset", "x"), (("overall", 1), ("  Chat", 2)))
    assert "| &emsp;Chat | 2 |" in to_markdown([table], title="Report")


@pytest.mark.parametrize("columns", [[4], [5], [4, 5], [4, 5, 6, 7, 8]])
def test_lists_whose_right_response_is_never_the_longer_one_have_a_picture(columns):
    table = FEW.table("length_bias")
    rows = tuple(
        tuple(None if k in columns else value for k, value in enumerate(row)) for row in table.rows
    )
    assert "<svg" in to_html(Evaluation((dataclasses.replace(table, rows=rows),)), title="holes")


def test_a_narrow_terminal_cuts_nothing_off():
    names = ("pattern", "affirmative-model", "another-long-name")
    table = Table("t", "T", names, (("exclamation", 0.123, 0.456),))
    buffer = io.StringIO()
    print_tables([table], Console(file=buffer, width=24))
    shown = buffer.getvalue()
    assert "…" not in shown
    cells = [line.split("│") for line in shown.splitlines() if "│" in line]
    texts = ["".join(row[k].strip() for row in cells) for k in (1, 2, 3)]
    assert texts == ["exclamation", "0.123", "0.456"]
