import itertools
import re

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_tables import FEW, MANY, NULLS, evaluation_tables, model_names
from test_pages import contrast, luminance

from armo.report.drawing import (
    BASELINES,
    BEFORE,
    MINUS,
    PALETTE,
    Looks,
    ink_on,
    shorten,
    split,
    to_svg,
)
from armo.report.plots import PLOTTED, draw
from armo.report.tables import Table

NAMES = model_names(8)
# What readers without one kind of cone see of linear RGB: Machado, Oliveira and Fernandes, "A
# Physiologically-based Model for Simulation of Color Vision Deficiency", IEEE TVCG 15(6), 2009.
SIGHTS = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
    ),
    "deuteranopia": np.array(
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    ),
    "tritanopia": np.array(
        [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]
    ),
}


def one(table, looks=None):
    [picture] = draw(table, looks or Looks(table.column("model")))
    return picture


def points(axes, marker):
    """Places of all drawn markers of a kind, of the legend's no."""
    return [
        (float(x), float(y))
        for line in axes.lines
        if line.get_marker() == marker
        for x, y in zip(*line.get_data(), strict=True)
    ]


def perceived(colour, sight):
    """CIE L*a*b* of a colour, as it is seen."""
    parts = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ np.clip(sight @ linear, 0.0, 1.0) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_colours_of_models_stay_apart_for_every_reader(sight):
    seen = [perceived(colour, SIGHTS[sight]) for colour in PALETTE]
    distances = [float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 15.0  # 2.3 is what can just be told apart


def test_the_colours_stand_out_from_paper_and_from_baselines():
    assert all(contrast(colour, "#ffffff") >= 3.0 for colour in PALETTE)
    assert contrast(BEFORE, PALETTE[0]) >= 2.5  # before and after, also without colour


def test_numbers_in_a_heat_map_can_be_read_on_their_shade():
    for place in np.linspace(0.0, 1.0, 101):
        shade = matplotlib.colormaps["RdBu_r"](place)
        text = {"black": "#000000", "white": "#ffffff"}[ink_on(shade)]
        assert contrast(text, matplotlib.colors.to_hex(shade)) >= 4.5


def test_without_colour_models_differ_in_marker_and_neighbours_in_line_and_hatch():
    looks = [Looks(NAMES)[name] for name in NAMES]
    assert len({look.marker for look in looks}) == len({look.colour for look in looks}) == 8
    for one_look, other in itertools.pairwise(looks):
        assert one_look.line != other.line
        assert one_look.hatch != other.hatch
    many = Looks(f"model {k}" for k in range(40))
    drawn = {(look.colour, look.marker) for look in map(many.__getitem__, many.models)}
    assert len(drawn) == 40


def test_a_model_looks_the_same_whatever_stands_beside_it_and_baselines_are_grey_and_hollow():
    looks = Looks(["random", *NAMES[:3], "longer", *NAMES])
    assert looks.models == tuple(NAMES)
    for name in NAMES:
        assert looks[name] == Looks(NAMES)[name]
        assert not looks[name].hollow
    greys = [looks[name] for name in BASELINES]
    assert all(look.hollow and look.colour not in PALETTE for look in greys)
    assert len({look.marker for look in greys}) == len(BASELINES)


def test_standings_are_drawn_from_best_to_worst_with_their_intervals():
    columns = ("model", "overall", "low", "high", "ahead of a by", "from", "to", "p")
    more = (None,) * 4
    rows = (("a", 0.7, 0.6, 0.75, *more), ("b", 0.9, 0.8, 0.95, *more))
    rows = (*rows, ("random", 0.5, 0.45, 0.55, *more))
    picture = one(Table("x_models", "X", columns, rows))
    axes = picture.figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a", "random"]
    assert points(axes, Looks(["a"])["a"].marker)[0] == (0.7, 1.0)
    segments = [[*line.get_xdata()] for line in axes.lines if len(line.get_xdata()) == 2]
    assert segments[:3] == [[0.8, 0.95], [0.6, 0.75], [0.45, 0.55]]
    assert [text.get_text() for text in axes.texts] == ["0.900", "0.700", "0.500"]
    assert [*axes.lines[-1].get_xdata()] == [0.5, 0.5]  # chance
    assert picture.text.startswith("From best to worst: b 0.900 (0.800 to 0.950); a 0.700")


def test_easy_normal_and_hard_stand_beside_each_other_by_model():
    columns = ("subset", "cases", "a", "b", "random")
    rows = (("overall", 9, 0.7, 0.6, 0.5), ("  Chat", 9, 0.9, 0.6, 0.5))
    rows += (("hard", 9, 0.4, 0.3, 0.5), ("easy", 9, 0.9, 0.8, 0.5), ("normal", 9, 0.7, 0.6, 0.5))
    levels, subsets = draw(Table("rm_bench", "RM-Bench", columns, rows), Looks(["a", "b"]))
    axes = levels.figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["easy", "normal", "hard"]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [[0.9, 0.7, 0.4], [0.8, 0.6, 0.3], [0.5, 0.5, 0.5]]
    left = [bar.get_x() for bars in axes.containers for bar in [bars[0]]]
    assert left == sorted(left)
    assert "a: easy 0.900, normal 0.700, hard 0.400" in levels.text
    labels = [label.get_text() for label in subsets.figure.axes[0].get_yticklabels()]
    assert labels == ["overall", "Chat"]
    assert "Chat: best is a with 0.900, worst random with 0.500" in subsets.text


def test_subsets_deeper_than_the_second_level_are_left_to_the_table():
    rows = (("overall", 9, 0.5), ("  Chat", 9, 0.5), ("    long", 4, 0.5))
    [picture] = draw(Table("x", "X", ("subset", "cases", "a"), rows), Looks(["a"]))
    labels = [label.get_text() for label in picture.figure.axes[0].get_yticklabels()]
    assert labels == ["overall", "Chat"]


def test_reliability_is_drawn_against_the_diagonal_with_the_pairs_as_bars():
    columns = ("model", "predicted", "observed", "pairs")
    rows = (("a", 0.55, 0.45, 300), ("a", 0.95, 0.8, 100))
    picture = one(Table("reliability", "R", columns, rows))
    axes = picture.figure.axes[0]
    small, large = sorted(bar.get_height() for bar in axes.patches)
    assert large == pytest.approx(3 * small)
    assert points(axes, "o") == [(0.55, 0.45), (0.95, 0.8)]
    assert [*axes.lines[0].get_xdata()] == [*axes.lines[0].get_ydata()] == [0.5, 1.0]
    assert axes.get_ylim() == (pytest.approx(0.4), 1.0)  # nothing is cut off
    assert "400 pairs, furthest from the diagonal where 0.95 is predicted and 0.80" in picture.text


def test_calibration_errors_stand_beside_what_chance_gives_at_most():
    table = FEW.table("calibration")
    picture = one(table)
    axes = picture.figure.axes[0]
    assert points(axes, "o") == [(table.rows[0][2], 0.0)]
    assert points(axes, "|") == [(0.024, 0.0), (0.024, 1.0), (0.024, 2.0)]
    assert "demo: 0.020 (0.012 to 0.027); a calibrated model would show 0.024" in picture.text


def test_best_of_n_is_drawn_against_n_with_bands():
    table = FEW.table("best_of_n")
    picture = one(table)
    gold, length = picture.figure.axes[:2]
    assert gold.get_xscale() == "log"
    names = list(dict.fromkeys(table.column("model")))
    for name, line in zip(names, gold.lines, strict=True):
        rows = [row for row in table.rows if row[0] == name]
        assert [*line.get_xdata()] == [row[1] for row in rows]
        assert [*line.get_ydata()] == [row[3] for row in rows]
    assert len(gold.collections) == len(names)
    edges = gold.collections[0].get_paths()[0].vertices[:, 1]
    own = [row for row in table.rows if row[0] == names[0]]
    assert edges.min() == min(row[4] for row in own)
    assert edges.max() == max(row[5] for row in own)
    assert [*length.lines[0].get_ydata()] == [row[6] for row in own]
    assert f"{names[0]}: from {own[0][3]:.3f}" in picture.text
    # Without lengths there is one panel.
    bare = Table("best_of_n", "B", table.columns, tuple((*r[:6], None, None) for r in table.rows))
    assert len(one(bare).figure.axes) == 1


def test_bias_probes_lie_around_one_half_each_model_at_its_own_height():
    columns = ("pattern", "pairs", "a", "a low", "a high", "b", "b low", "b high")
    rows = (
        ("bold", 9, 0.7, 0.6, 0.8, 0.4, 0.3, 0.5),
        ("lists", 9, 0.5, 0.4, 0.6, None, None, None),
    )
    [picture] = draw(Table("bias_probes", "B", columns, rows), Looks(["a", "b"]))
    axes = picture.figure.axes[0]
    (bold, high), (lists, low) = points(axes, "o")
    assert (bold, lists) == (0.7, 0.5)
    [(other, below)] = points(axes, "s")
    assert other == 0.4
    assert high < below < low  # the axis runs downwards
    assert "bold: a 0.700 (0.600 to 0.800), b 0.400" in picture.text
    assert "b none" in picture.text


def test_many_probes_are_drawn_on_several_pictures_of_one_scale():
    [table] = [table for table in evaluation_tables(NAMES) if table.name == "bias_probes"]
    pictures = draw(table, Looks(NAMES))
    assert len(pictures) > 1
    assert len({picture.figure.axes[0].get_xlim() for picture in pictures}) == 1
    labels = [label.get_text() for p in pictures for label in p.figure.axes[0].get_yticklabels()]
    assert labels == table.column("pattern")


def test_answering_less_is_drawn_to_the_right():
    columns = ("model", "coverage", "accuracy", "low", "high")
    rows = (("a", 100, 0.7, 0.6, 0.8), ("a", 50, 0.8, 0.7, 0.9), ("a", 10, 0.9, 0.8, 1.0))
    picture = one(Table("abstention", "A", columns, rows))
    axes = picture.figure.axes[0]
    assert points(axes, "o") == [(100.0, 0.7), (50.0, 0.8), (10.0, 0.9)]
    assert axes.get_xlim()[0] > axes.get_xlim()[1]
    shares = Table("abstention", "A", columns, tuple((r[0], r[1] / 100, *r[2:]) for r in rows))
    assert points(one(shares).figure.axes[0], "o") == points(axes, "o")
    assert "0.800 (0.700 to 0.900) at 50 %" in picture.text


def test_the_bars_of_the_weights_add_up_to_one_and_small_objectives_are_put_together():
    [picture] = draw(FEW.table("weights_by_kind"), Looks(NAMES))
    for axes in picture.figure.axes[:3]:
        ends = [bar.get_x() + bar.get_width() for bar in axes.containers[-1]]
        assert ends == pytest.approx([1.0] * 6)
    table = MANY.table("weights_by_kind")
    pictures = draw(table, Looks(NAMES))
    legend = pictures[0].figure.legends[0].get_texts()
    assert legend[-1].get_text() == "13 others"
    panels = [axes for p in pictures for axes in p.figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [shorten(name, 25) for name in NAMES]
    name = legend[0].get_text()
    weights = [row[4] for row in table.rows if row[0] == "demo" and row[3] == name]
    assert [bar.get_width() for bar in panels[0].containers[0]] == weights


def test_correlations_before_and_after_are_the_lower_triangle_in_either_order_of_names():
    columns = ("model", "objective", "other", "rewards", "adjusted")
    rows = (("m", "a", "b", 0.9, 0.1), ("m", "c", "a", -0.5, 0.0), ("m", "b", "c", 0.3, None))
    rows = (*rows, ("m", "a", "a", 1.0, 1.0))
    picture = one(Table("correlations", "C", columns, rows))
    before, after = picture.figure.axes[:2]
    grid = before.collections[0].get_array()  # of the names a, b, c
    assert (grid[1, 0], grid[2, 0], grid[2, 1]) == (0.9, -0.5, 0.3)
    assert np.ma.count(grid) == 3
    assert {text.get_text() for text in before.texts} == {"0.90", f"{MINUS}0.50", "0.30"}
    assert {text.get_text() for text in after.texts} == {"0.10", "0.00"}
    assert "before: mean size 0.57, largest 0.90, a with b" in picture.text


def test_the_worst_miss_of_the_text_is_that_of_the_largest_size():
    columns = ("model", "objective", "other", "rewards", "adjusted")
    rows = (("m", "a", "b", 0.2, 0.1), ("m", "c", "a", -0.5, 0.0))
    assert "largest -0.50, c with a" in one(Table("correlations", "C", columns, rows)).text.replace(
        MINUS, "-"
    )


def test_each_model_has_a_picture_of_its_correlations():
    pictures = draw(MANY.table("correlations"), Looks(NAMES))
    assert [picture.title.split(":")[0] for picture in pictures] == NAMES


def test_length_bias_shows_the_correlation_and_both_accuracies():
    picture = one(FEW.table("length_bias"))
    left, right = picture.figure.axes[:2]
    rows = FEW.table("length_bias").rows
    assert points(left, "o")[0] == (rows[0][1], 0.0)
    assert [x for x, _ in points(right, ">")] == [row[4] for row in rows]
    assert [x for x, _ in points(right, "<")] == [row[5] for row in rows]


def test_what_the_benchmark_prefers_is_drawn_around_zero():
    table = FEW.table("preference_bias")
    [picture] = draw(table, Looks([]))
    assert points(picture.figure.axes[0], "o") == [
        (r[5], float(k)) for k, r in enumerate(table.rows)
    ]
    assert f"longer: {table.rows[0][2]:.0%} of the right" in picture.text


def test_the_quarters_are_drawn_with_their_intervals_and_without_the_differences():
    columns = ("chosen", "pairs", "before", "from", "to", "after", "after, from", "after, to")
    rows = (
        ("longer", 9, 0.8, 0.7, 0.9, 0.6, 0.5, 0.7),
        ("shorter", 7, 0.4, 0.3, 0.5, 0.6, 0.5, 0.7),
        ("longer less shorter", None, 0.4, 0.2, 0.6, 0.0, -0.1, 0.1),
    )
    [picture] = draw(Table("quarters", "Quarters", columns, rows), Looks([]))
    axes = picture.figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "chosen is longer",
        "chosen is shorter",
    ]
    assert [bar.get_width() for bars in axes.containers for bar in bars] == [0.8, 0.4, 0.6, 0.6]
    assert [*axes.lines[0].get_xdata()] == [0.7, 0.9]
    # Where no pair differs in style there is nothing to draw.
    assert draw(Table("quarters", "Quarters", columns, ()), Looks([])) == []


def test_the_weights_are_drawn_heaviest_first_with_their_spread_beside_the_constant_mix():
    columns = ("objective", "mean", "spread", "uncertainty", "constant mix")
    rows = (("safety", 0.6, 0.2, 0.1, 0.3), ("honesty", 0.4, 0.1, 0.0, 0.7))
    [picture] = draw(Table("weights", "Weights", columns, rows), Looks([]))
    axes = picture.figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["safety", "honesty"]
    assert [bar.get_width() for bar in axes.patches] == [0.6, 0.4]
    assert points(axes, "D") == [(0.3, 0.0), (0.7, 1.0)]
    [spread] = axes.containers[1].lines[2]  # the caps apart
    ends = [(segment[0, 0], segment[1, 0]) for segment in spread.get_segments()]
    assert ends == [pytest.approx((0.4, 0.8)), pytest.approx((0.3, 0.5))]


def test_of_many_objectives_only_the_heaviest_are_drawn():
    columns = ("objective", "mean", "spread", "uncertainty", "constant mix")
    rows = tuple((f"objective {k}", 1 / (k + 1), 0.0, 0.0, 0.1) for k in range(PLOTTED + 5))
    [picture] = draw(Table("weights", "Weights", columns, rows), Looks([]))
    labels = [label.get_text() for label in picture.figure.axes[0].get_yticklabels()]
    assert labels == [row[0] for row in rows[:PLOTTED]]


def test_a_table_without_a_picture_gives_none():
    assert draw(FEW.table("abstention_summary"), Looks(NAMES)) == []


def test_the_parts_of_two_pictures_in_one_page_have_different_names():
    table = FEW.table("best_of_n")
    texts = [to_svg(one(table), name=name) for name in ("first", "second")]
    ids = [set(re.findall(r' id="([^"]*)"', text)) for text in texts]
    assert ids[0]
    assert not ids[0] & ids[1]
    for text, own in zip(texts, ids, strict=True):
        used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
        assert used <= own
        assert "<metadata" not in text
    assert to_svg(one(table), name="first") == texts[0]


@given(st.text(min_size=1, max_size=80), st.integers(8, 40))
def test_a_shortened_name_is_no_longer_than_asked_and_keeps_its_ends(name, length):
    short = shorten(name, length)
    assert len(short) <= length
    assert short[:3] == name[:3]
    assert short[-3:] == name[-3:]
    assert (short == name) == (len(name) <= length)


@given(st.lists(st.integers(), min_size=1, max_size=60), st.integers(1, 20))
def test_pieces_are_even_and_leave_nothing_out(rows, size):
    pieces = split(rows, size)
    assert list(itertools.chain(*pieces)) == rows
    sizes = [len(piece) for piece in pieces]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1


def test_the_luminance_is_that_of_the_standard():
    # WCAG 2.2, relative luminance of the primaries.
    assert luminance("#00ff00") == pytest.approx(0.7152)


def test_the_sample_holds_every_baseline_of_the_page():
    assert set(NULLS) <= set(BASELINES)
