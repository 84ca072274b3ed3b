import math

import pytest
from scipy.stats import spearmanr

from armo.data.rated_pairs import Agreement
from armo.report.agreement import agreement_table


def line(table, objective, source="all"):
    [row] = [row for row in table.rows if row[:2] == (objective, source)]
    return dict(zip(table.columns, row, strict=True))


def test_agreement_counts_what_the_ratings_decide():
    rows = [Agreement("help", "s", k, ahead, math.nan) for k, ahead in enumerate([0.5, 0.1, 0, -1])]
    told = line(agreement_table(rows), "help")
    assert [told[name] for name in ("pairs", "agree", "tied", "disagree")] == [4, 2, 1, 1]
    assert told["agreement"] == pytest.approx(2 / 3)
    assert told["low"] < 2 / 3 < told["high"]
    assert told["margins follow"] is None


def test_margins_follow_by_the_rank_correlation_of_scipy():
    margins, ahead = [1.0, 3.0, 2.0, 5.0, math.nan], [0.1, 0.4, 0.3, 0.2, -1.0]
    rows = [Agreement("help", "s", 0, a, m) for a, m in zip(ahead, margins, strict=True)]
    told = line(agreement_table(rows), "help")
    expected = spearmanr(margins[:4], ahead[:4]).statistic
    assert told["margins follow"] == pytest.approx(expected)


def test_sources_have_lines_of_their_own_only_where_there_are_several():
    rows = [Agreement(name, "s", 0, 0.5, 1.0) for name in ("help", "harm")]
    assert [row[:2] for row in agreement_table(rows).rows] == [("help", "all"), ("harm", "all")]
    rows.append(Agreement("help", "r", 1, -0.5, 1.0))
    table = agreement_table(rows)
    lines = [("help", "all"), ("help", "r"), ("help", "s"), ("harm", "all"), ("harm", "s")]
    assert [row[:2] for row in table.rows] == lines
    assert line(table, "help", "r")["disagree"] == 1
    assert line(table, "help")["agreement"] == 0.5


def test_where_all_is_tied_there_is_no_agreement_to_speak_of():
    told = line(agreement_table([Agreement("help", "s", 0, 0.0, 1.0)]), "help")
    assert (told["tied"], told["agreement"], told["low"]) == (1, None, None)


def test_the_interval_is_over_prompts_not_over_pairs():
    def width(groups):
        rows = [Agreement("h", "s", g, 1.0 if k % 2 else -1.0, 1.0) for k, g in enumerate(groups)]
        told = line(agreement_table(rows), "h")
        return told["high"] - told["low"]

    one_each, ten_each = width(range(40)), width([k // 2 % 4 for k in range(40)])
    assert ten_each < 1e-9 < one_each  # each prompt has as many of both
