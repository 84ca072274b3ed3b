import itertools
import json
import logging
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armo.data.conversation import Conversation, Message, RatedResponse
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.rated_pairs import BY, agreements, pair_row, pairs_from_ratings
from armo.data.sources import DataError, load_pairs

OBJECTIVES = ObjectiveSet(
    (Objective("quality", 1, 5), Objective("harm", 0, 10, higher_is_better=False))
)


def rated(id, prompt, response, **fields):
    ratings = {name: fields.pop(name) for name in ("quality", "harm") if name in fields}
    turns = (Message("user", prompt),)
    return RatedResponse(id, "s", Conversation(turns, response), ratings, **fields)


def pairs(rows, **options):
    return list(
        pairs_from_ratings(
            lambda: iter(rows), **{"objectives": OBJECTIVES, "by": "quality", **options}
        )
    )


def told(found):
    return [(pair.chosen, pair.rejected, pair.margin) for pair in found]


def test_the_better_response_is_chosen_with_the_difference_on_the_unit_scale_as_margin():
    rows = [rated("a", "Q", "good", quality=4), rated("b", "Q", "bad", quality=1)]
    [found] = pairs(rows)
    assert (found.chosen, found.rejected, found.margin) == ("good", "bad", 0.75)
    assert (found.id, found.source, found.preference) == ("a over b", "s", 1.0)


def test_of_an_objective_whose_low_end_is_good_the_low_rating_wins():
    rows = [rated("a", "Q", "harmful", harm=9), rated("b", "Q", "harmless", harm=1)]
    assert told(pairs(rows, by="harm")) == [("harmless", "harmful", pytest.approx(0.8))]


def test_responses_to_other_prompts_are_not_compared():
    rows = [
        rated("a", "Q", "a", quality=4),
        rated("b", "R", "b", quality=1),
        rated("c", "Q", "c", quality=2),
    ]
    assert told(pairs(rows)) == [("a", "c", 0.5)]


worths = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 5), st.integers(0, 10)),
    min_size=2,
    max_size=14,
)


@given(worths, st.sampled_from([0.0, 0.25, 0.5]), st.booleans(), st.floats(0.1, 3.0))
@settings(max_examples=60)
def test_pairs_are_those_of_the_slow_way(drawn, min_margin, keep, weight):
    rows = [
        rated(str(k), f"Q{prompt}", f"text {text}", quality=quality, harm=harm)
        for k, (prompt, text, quality, harm) in enumerate(drawn)
    ]
    by = {"quality": 1.0, "harm": weight}
    values = {}
    for prompt, text, quality, harm in drawn:
        value = ((quality - 1) / 4 + weight * (1 - harm / 10)) / (1 + weight)
        values.setdefault((f"Q{prompt}", f"text {text}"), []).append(value)
    means = {key: sum(each) / len(each) for key, each in values.items()}
    expected = set()
    for (p, a), (q, b) in itertools.combinations(means, 2):
        margin = abs(means[p, a] - means[q, b])
        if p != q or (margin < 1e-9 and not keep) or 1e-9 < margin < min_margin - 1e-9:
            continue
        if margin < 1e-9:
            expected.add((p, frozenset({a, b}), "tie"))
        else:
            better, worse = (a, b) if means[p, a] > means[q, b] else (b, a)
            expected.add((p, better, worse))
    options = {"by": by, "min_margin": min_margin, "ties": "keep" if keep else "drop"}
    if not expected:
        with pytest.raises(DataError, match="no pairs come of"):
            pairs(rows, **options)
        return
    found = pairs(rows, **options)
    assert len(found) == len(expected)
    assert {
        (pair.prompt[0].content, frozenset(pair.responses), "tie")
        if pair.preference == 0.5
        else (pair.prompt[0].content, pair.chosen, pair.rejected)
        for pair in found
    } == expected
    for pair in found:
        key = pair.prompt[0].content
        assert pair.margin == pytest.approx(
            abs(means[key, pair.chosen] - means[key, pair.rejected]), abs=1e-9
        )


def test_at_most_so_many_pairs_per_prompt_the_same_in_every_run():
    rows = [rated(f"{p}{k}", p, f"t{k}", quality=k) for p in "QR" for k in range(1, 6)]
    whole = pairs(rows)
    some = pairs(rows, max_per_prompt=3)
    assert len(whole) == 20
    assert [sum(pair.prompt[0].content == p for pair in some) for p in "QR"] == [3, 3]
    assert [pair for pair in whole if pair in some] == some
    assert some == pairs(rows, max_per_prompt=3)
    assert some != pairs(rows, max_per_prompt=3, seed=1)
    # Of a prompt, the same ones are drawn whatever the other prompts are.
    alone = pairs([row for row in rows if row.id.startswith("R")], max_per_prompt=3)
    assert alone == [pair for pair in some if pair.prompt[0].content == "R"]


def test_rows_without_a_rating_are_left_out_and_all_that_is_left_out_is_counted(caplog):
    rows = [
        rated("a", "Q", "a", quality=4, harm=0),
        rated("b", "Q", "b", quality=4),
        rated("c", "Q", "c", quality=1, harm=0),
        rated("d", "Q", "d", quality=4, harm=0),
        rated("e", "Q", "e", quality=2, harm=0),
    ]
    with caplog.at_level(logging.INFO):
        found = pairs(rows, by={"quality": 1, "harm": 1}, min_margin=0.2)
    # Half of the difference of quality counts: 0.375, 0.25 and 0.125.
    assert {(p.chosen, p.rejected) for p in found} == {
        ("a", "c"),
        ("d", "c"),
        ("a", "e"),
        ("d", "e"),
    }
    assert "4 pairs of 5 rated responses" in caplog.text
    assert "1 rows without a rating" in caplog.text
    assert "1 ties" in caplog.text
    assert "1 below `min_margin`" in caplog.text


def test_what_a_row_says_beside_its_ratings_is_kept():
    rows = [
        rated("a", "Q", "a", quality=4, weight=0.5, category="c", split="train"),
        rated("b", "Q", "b", quality=1, weight=0.5),
    ]
    [found] = pairs(rows)
    assert (found.weight, found.category, found.split) == (0.25, "c", "train")


def test_rows_on_two_sides_of_the_split_are_named():
    rows = [
        rated("a", "Q", "a", quality=4, split="train"),
        rated("b", "Q", "b", quality=1, split="test"),
    ]
    with pytest.raises(DataError, match=r"rows 'a' \(train\) and 'b' \(test\) share a prompt"):
        pairs(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "beauty"}, "`by`: Unknown objective 'beauty'"),
        ({"by": {"quality": -1}}, "`by`: `weights` must not be negative"),
        ({"ties": "both"}, "`ties` must be drop or keep"),
        ({"min_margin": 1.5}, "`min_margin` must be from 0 to 1"),
        ({"max_per_prompt": 0}, "`max_per_prompt` must be 1 or more"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(options, message, no_type_checks):
    with pytest.raises(ValueError, match=message):
        pairs([rated("a", "Q", "a", quality=4)], **options)


@pytest.mark.parametrize("ties", ["drop", "keep"])
def test_pairs_are_read_back_as_they_were_made(ties, tmp_path):
    rows = [rated(f"r{k}", "Qé", f"t{k}", quality=1 + k % 2, weight=0.5) for k in range(4)]
    made = pairs(rows, ties=ties)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair_row(pair)) + "\n" for pair in made))
    assert load_pairs(str(path)) == made


def found(given, rows, **options):
    return list(agreements(given, rows, **{"objectives": OBJECTIVES, **options}))


def test_given_pairs_are_compared_by_every_objective_that_both_responses_are_rated_on():
    rows = [
        rated("a", "Q", "a", quality=5, harm=10),
        rated("b", "Q", "b", quality=1, harm=0),
        rated("c", "Q", " c ", quality=1),
    ]
    made = pairs(rows)
    told = {(row.name, round(row.ahead, 6)) for row in found(made, rows)}
    assert [(p.chosen, p.rejected.strip()) for p in made] == [("a", "b"), ("a", "c")]
    assert told == {("quality", 1.0), ("harm", -1.0)}
    weighted = found(made, rows, by={"quality": 3, "harm": 1})
    assert [row.ahead for row in weighted if row.name == BY] == [pytest.approx(0.5)]


def test_several_ratings_of_a_response_have_their_mean_and_prompts_are_told_apart():
    rows = [
        rated("a", "Q", "a", quality=5),
        rated("b", "Q", "a", quality=1),
        rated("c", "Q", "b", quality=2),
        rated("d", "R", "b", quality=5),
        rated("e", "R", "a", quality=4),
    ]
    given = pairs(rows)
    values = {(row.group, row.ahead) for row in found(given, rows)}
    assert values == {(0, 0.25), (1, 0.25)}


def test_pairs_without_two_ratings_and_ties_are_counted(caplog):
    rows = [rated("a", "Q", "a", quality=5), rated("b", "Q", "b", quality=1)]
    tied = [rated("c", "R", "c", quality=5), rated("d", "R", "d", quality=5)]
    other = [rated("e", "S", "e", quality=5), rated("f", "S", "f", quality=1)]
    given = pairs([*rows, *tied, *other], ties="keep")
    with caplog.at_level(logging.INFO):
        assert len(found(given, [*rows, *tied])) == 1
    assert "1 of 3 pairs compared; 1 are ties, 1 have no two ratings" in caplog.text
    with pytest.raises(DataError, match="of 3 pairs, none has two responses that are rated"):
        found(given, [rated("z", "Z", "z", quality=1)])


def test_the_margin_of_a_pair_is_not_a_number_where_it_has_none():
    rows = [rated("a", "Q", "a", quality=5), rated("b", "Q", "b", quality=1)]
    [row] = found(pairs(rows), rows)
    assert row.margin == 1.0
    [pair] = pairs(rows)
    import dataclasses

    [row] = found([dataclasses.replace(pair, margin=None)], rows)
    assert math.isnan(row.margin)
