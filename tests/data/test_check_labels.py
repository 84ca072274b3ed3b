import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armo.data.check_labels import (
    Finding,
    _test_side,
    find_cycles,
    find_leaks,
    find_repeats,
    sort_findings,
)
from armo.data.check_rows import RowReader
from armo.data.checks import GroupSplits
from armo.data.conversation import (
    Conversation,
    Message,
    PreferencePair,
    RatedResponse,
    ResponseList,
)
from armo.data.objectives import Objective, ObjectiveSet

OBJECTIVES = ObjectiveSet((Objective("honesty", 0, 1), Objective("wit", 0, 1)))
TEXTS = "abcd"


def asked(prompt):
    return (Message("user", prompt),)


def pair(number, prompt, chosen, rejected, **more):
    return PreferencePair(f"p{number}", "s", asked(prompt), chosen, rejected, **more)


def table_of(*, ratings=(), pairs=(), lists=()):
    reader = RowReader(OBJECTIVES, near=False)
    for kind, rows in (("ratings", ratings), ("pairs", pairs), ("lists", lists)):
        reader.add(kind, rows)
    return reader.finish()


PREFERENCES = st.lists(
    st.tuples(st.sampled_from("xy"), st.permutations(TEXTS), st.sampled_from([0.5, 0.8, 1.0])).map(
        lambda drawn: (drawn[0], drawn[1][0], drawn[1][1], drawn[2])
    ),
    max_size=8,
)
RANKINGS = st.lists(
    st.tuples(st.sampled_from("xy"), st.lists(st.integers(1, 3), min_size=4, max_size=4)),
    max_size=2,
)


@given(PREFERENCES, RANKINGS)
def test_circles_are_those_of_the_transitive_closure(preferences, rankings):
    pairs = [pair(k, *each[:3], preference=each[3]) for k, each in enumerate(preferences)]
    lists = [
        ResponseList(f"l{k}", "s", asked(prompt), tuple(TEXTS), ranks=tuple(map(float, ranks)))
        for k, (prompt, ranks) in enumerate(rankings)
    ]
    better = {(x, a, b) for x, a, b, preference in preferences if preference > 0.5}
    for prompt, ranks in rankings:
        ranked = list(zip(TEXTS, ranks, strict=True))
        better |= {(prompt, a, b) for a, i in ranked for b, j in ranked if i < j}
    for via in TEXTS:
        better |= {
            (x, a, c) for x, a, b in better for y, d, c in better if (x, b) == (y, d) == (x, via)
        }
    circles = {
        (x, frozenset(b for b in TEXTS if (x, a, b) in better and (x, b, a) in better))
        for x in "xy"
        for a in TEXTS
    }
    expected = sum(len(circle) > 1 for _, circle in circles)
    assert (
        sum(finding.count for finding in find_cycles(table_of(pairs=pairs, lists=lists)))
        == expected
    )


def test_a_circle_names_the_rows_that_are_in_it_and_no_other():
    pairs = [
        *(pair(1, "x", "a", "b"), pair(2, "x", "b", "c"), pair(3, "x", "c", "a")),
        *(pair(4, "x", "c", "d"), pair(5, "y", "b", "a")),
    ]
    [finding] = find_cycles(table_of(pairs=pairs))
    assert finding.places == ("s row 'p1' and s row 'p2' and s row 'p3'",)


def test_ties_contradict_nothing():
    pairs = [pair(1, "x", "a", "b"), pair(2, "x", "b", "a", preference=0.5)]
    assert [*find_cycles(table_of(pairs=pairs))] == []


def rated(number, prompt, response, **ratings):
    return RatedResponse(f"r{number}", "s", Conversation(asked(prompt), response), ratings)


@pytest.mark.parametrize(
    ("first", "second", "statement"),
    [
        ({"honesty": 0.5}, {"honesty": 0.5}, "repeat"),
        ({"honesty": 0.5}, {"honesty": 0.7}, "repeat"),
        ({"honesty": 0.5, "wit": 0.0}, {"honesty": 0.5, "wit": 0.9}, "otherwise"),
        ({"honesty": 0.2}, {"honesty": 0.6}, "otherwise"),
        ({"honesty": 0.2}, {"wit": 0.9}, None),
    ],
)
def test_ratings_of_one_text_repeat_or_contradict_or_complete_each_other(first, second, statement):
    rows = [
        rated(1, "x", "a b", **first),
        rated(2, "x", "a  b ", **second),
        rated(3, "y", "a b", wit=1),
    ]
    found = [*find_repeats(table_of(ratings=rows))]
    assert len(found) == (statement is not None)
    for finding in found:
        assert statement in finding.statement
        assert finding.places[0].startswith("s row 'r2' and s row 'r1'")


def test_a_pair_turned_round_is_no_repeat_and_a_list_in_another_order_is():
    pairs = [pair(1, "x", "a", "b"), pair(2, "x", "b", "a"), pair(3, "x", "a", "c")]
    assert [*find_repeats(table_of(pairs=pairs))] == []
    lists = [
        ResponseList(f"l{k}", "s", asked("x"), texts, ranks=(1.0, 2.0))
        for k, texts in enumerate([("a", "b"), ("b", "a"), ("a", "c")])
    ]
    [finding] = find_repeats(table_of(lists=lists))
    assert finding.places == ("s row 'l1' and s row 'l0'",)


def test_prompts_on_both_sides_are_named_with_a_row_of_each():
    rows = [
        *(pair(1, "x", "a", "b"), pair(2, " X", "a", "c", split="test")),
        *(pair(3, "x", "a", "d", split="train"), pair(4, "x", "b", "c", split="train")),
        *(pair(5, "y", "a", "b", split="test"), pair(6, "z", "a", "b", split="train")),
    ]
    [finding] = find_leaks(table_of(pairs=rows))
    assert finding.places == ("s row 'p3' (train) and s row 'p2' (test)",)


@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=3), st.sampled_from([None, "train", "test"]))),
    st.floats(0.05, 0.95),
)
def test_the_side_of_a_row_is_that_of_training(rows, test_fraction):
    declared = {}
    rows = [
        (prompt, split)
        for prompt, split in rows
        if prompt.strip()
        and declared.setdefault(" ".join(prompt.casefold().split()), split) == split
    ]
    pairs = [pair(k, prompt, "a", "b", split=split) for k, (prompt, split) in enumerate(rows)]
    splits = GroupSplits(test_fraction)
    groups = [splits.add(row) for row in pairs]
    expected = np.array(splits.test())[groups] if pairs else np.array([])
    assert _test_side(table_of(pairs=pairs), test_fraction).tolist() == expected.tolist()


def test_a_finding_is_one_line_that_names_the_first_places():
    finding = Finding("note", "c", "things", 1200, ("a:1", "a:2", "a:3", "a:4"))
    assert str(finding) == "things (1,200): a:1; a:2; a:3; and 1,197 more"
    assert str(Finding("note", "c", "things", 2, ("a:1", "a:2"))) == "things (2): a:1; a:2"
    assert str(Finding("note", "c", "a thing")) == "a thing"


def test_findings_are_sorted_by_severity_then_by_how_often_they_are_there():
    drawn = [("note", 9), ("error", 1), ("warning", 2), ("warning", 5), ("error", 3)]
    found = sort_findings(Finding(severity, "c", "s", count) for severity, count in drawn)
    assert [(finding.severity, finding.count) for finding in found] == [
        *(("error", 3), ("error", 1), ("warning", 5), ("warning", 2), ("note", 9))
    ]
