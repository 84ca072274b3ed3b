import json
import logging
import math
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armo.data.augment import (
    AUGMENTED,
    augment_pairs,
    beginning,
    change_pairs,
    read_strengths,
    treat_noise,
)
from armo.data.conversation import Conversation, Message, PreferencePair, RatedResponse
from armo.data.sources import DataError
from armo.data.surface import surface_features

KINDS = ("off_prompt", "truncated", "restyled")
EVERYTHING = dict.fromkeys(KINDS, 1.0)


def pair(number, **fields):
    """A pair long enough to be cut, its text all its own."""
    given = {
        "id": f"p{number}",
        "source": "s",
        "prompt": (Message("user", f"Question {number}?"),),
        "chosen": f"First, take bowl number {number}. Then wait for {number} hours. " * 3,
        "rejected": f"No idea about {number}. Ask someone else about it, or read a book. " * 2,
    }
    return PreferencePair(**{**given, **fields})


PAIRS = [pair(k, judgements={"help": 1.0, "safe": 0.75}, margin=1.0) for k in range(20)]


def yes(row):
    return True


def added_to(rows, **options):
    return [
        row
        for row in augment_pairs(rows, **{"training": yes, **options})
        if row.source.startswith(AUGMENTED)
    ]


def test_without_shares_nothing_is_changed():
    assert list(augment_pairs(PAIRS, training=yes)) == PAIRS


def test_the_own_rows_stay_as_they_are_and_in_order():
    rows = list(augment_pairs(PAIRS, training=yes, **EVERYTHING))
    assert [row for row in rows if not row.source.startswith(AUGMENTED)] == PAIRS
    for place, row in enumerate(rows):
        if row.source.startswith(AUGMENTED):
            mine = row.id.partition("/")[0]
            before = [each.id for each in rows[:place] if "/" not in each.id]
            assert before[-1] == mine


def test_an_off_prompt_pair_loses_against_the_chosen_one_to_a_response_of_another_prompt():
    rows = added_to(PAIRS, off_prompt=1.0, judged=["help"])
    chosen = {each.chosen: each.prompt for each in PAIRS}
    assert len(rows) == len(PAIRS) - 1  # the first has none to draw from
    for row in rows:
        assert chosen[row.chosen] == row.prompt
        assert chosen[row.rejected] != row.prompt
        assert (row.preference, row.margin, row.judgements) == (1.0, None, {"help": 1.0})


def test_an_off_prompt_response_is_never_of_the_same_prompt_or_the_same_text():
    one = [pair(0, id=f"p{k}") for k in range(3)]
    assert not added_to(one, off_prompt=1.0)
    shouted = pair(1, prompt=(Message("user", "QUESTION  0?"),))
    assert not added_to([one[0], shouted], off_prompt=1.0)
    alike = [pair(k, chosen="Yes, that is right.") for k in range(5)]
    assert not added_to(alike, off_prompt=1.0)
    rejects = [pair(0, chosen="No."), pair(1, rejected="No. ")]
    assert not added_to(rejects, off_prompt=1.0)


def test_a_truncated_response_is_a_beginning_that_ends_between_words():
    rows = added_to(PAIRS, truncated=1.0, judged=["help"])
    assert len(rows) == len(PAIRS)
    for row in rows:
        whole = row.chosen.strip()
        assert whole.startswith(row.rejected)
        assert whole[len(row.rejected)].isspace()
        assert 0.1 < len(row.rejected) / len(whole) < 0.81
        assert row.judgements == {"help": 1.0}


def test_a_restyled_copy_is_a_tie_of_which_some_surface_feature_differs():
    rows = added_to(PAIRS, restyled=1.0)
    assert len(rows) == len(PAIRS)
    own = {text for each in PAIRS for text in each.responses}
    for row in rows:
        assert row.chosen in own
        assert row.rejected not in own
        assert (row.preference, row.margin) == (0.5, None)
        assert row.judgements == {"help": 0.5, "safe": 0.5}
        first, second = surface_features(row.responses)
        assert (first != second).any()


def test_added_pairs_say_that_they_are_for_training_and_keep_what_the_row_counts():
    [first, *_] = added_to([pair(0, weight=0.25, category="c")], restyled=1.0)
    assert (first.split, first.weight, first.category) == ("train", 0.25, "c")
    assert (first.id, first.source) == ("p0/restyled", "augmented/restyled")


def test_nothing_comes_of_the_test_side():
    test = {f"p{k}" for k in range(0, 20, 2)}
    rows = list(augment_pairs(PAIRS, training=lambda row: row.id not in test, **EVERYTHING))
    added = [row for row in rows if row.source.startswith(AUGMENTED)]
    assert added
    assert test.isdisjoint(row.id.partition("/")[0] for row in added)
    theirs = {text for row in PAIRS if row.id in test for text in row.responses}
    assert theirs.isdisjoint(text for row in added for text in row.responses)
    assert [row for row in rows if row.id in test] == [row for row in PAIRS if row.id in test]


@given(
    st.fixed_dictionaries({kind: st.floats(0.0, 1.0) for kind in KINDS}),
    st.integers(0, 5),
    st.integers(1, 20),
)
@settings(max_examples=25)
def test_the_same_seed_gives_the_same_pairs_whatever_comes_after(shares, seed, count):
    whole = list(augment_pairs(PAIRS, training=yes, seed=seed, **shares))
    assert whole == list(augment_pairs(PAIRS, training=yes, seed=seed, **shares))
    some = list(augment_pairs(PAIRS[:count], training=yes, seed=seed, **shares))
    assert whole[: len(some)] == some
    assert len({row.id for row in whole}) == len(whole)


def test_another_seed_gives_other_pairs_and_another_kind_changes_none():
    first = added_to(PAIRS, truncated=0.5)
    assert first != added_to(PAIRS, truncated=0.5, seed=1)
    both = added_to(PAIRS, truncated=0.5, restyled=1.0, off_prompt=0.3)
    assert [row for row in both if row.source.endswith("truncated")] == first


def test_about_the_share_asked_for_is_added():
    many = [pair(k) for k in range(400)]
    for kind in ("off_prompt", "truncated"):
        assert 60 < len(added_to(many, **{kind: 0.2})) < 100


def test_what_is_added_is_counted_in_the_log(caplog):
    with caplog.at_level(logging.INFO):
        added_to([*PAIRS, pair(99, chosen="Short.")], truncated=1.0)
    assert "20 truncated pairs added to 21 training pairs; 1 could not be made" in caplog.text
    assert "restyled" not in caplog.text


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="`truncated` must be a share"):
        list(augment_pairs(PAIRS, training=yes, truncated=share))


def test_judged_by_one_text_is_refused(no_type_checks):
    with pytest.raises(ValueError, match="`judged` must be a list"):
        list(augment_pairs(PAIRS, training=yes, judged="help"))


@given(st.text(max_size=300), st.integers(0, 3))
def test_a_beginning_is_a_shorter_beginning_or_none(text, seed):
    cut = beginning(text, random.Random(seed))
    if cut is not None:
        assert text.strip().startswith(cut)
        assert 0 < len(cut) < len(text.strip())
    elif len(text.strip()) >= 80:
        pytest.fail("it is long enough")


def test_a_text_without_spaces_is_cut_too():
    assert beginning("蜂蜜" * 60, random.Random(0)) is not None


def odds(probability):
    return math.log(probability / (1.0 - probability))


def treated(rows, strengths, **options):
    return list(treat_noise(rows, training=yes, strengths=strengths, **options))


def test_flip_swaps_what_the_ensemble_finds_wrong_and_drop_leaves_it_out():
    doubted = pair(0, judgements={"help": 1.0, "safe": 0.25}, margin=2.0)
    rows = [doubted, pair(1), pair(2, preference=0.5), pair(3)]
    strengths = {"p0": -2.0, "p1": -1.0, "p2": -9.0, "p9": 1.0}
    first, *others = treated(rows, strengths, how="flip", share=0.5)
    assert (first.chosen, first.rejected) == (doubted.rejected, doubted.chosen)
    # The judgement that says what the preference said goes with it; the other one is of itself.
    assert first.judgements == {"help": 1.0, "safe": 0.75}
    assert (first.preference, first.margin, first.id) == (1.0, None, "p0")
    assert others == rows[1:]
    assert treated(rows, strengths, how="drop", share=0.5) == rows[1:]
    assert treated(rows, strengths, how="flip", share=0.25) == rows
    assert treated(rows, strengths, how="drop", share=0.0) == rows


def test_what_the_ensemble_finds_right_is_not_flipped_however_many_may_be():
    strengths = {"p0": 0.1, "p1": 0.0, "p2": -0.1}
    rows = [pair(k) for k in range(3)]
    assert treated(rows, strengths, how="drop", share=1.0) == rows[:2]


@given(st.floats(0.5, 1.0), st.floats(-30.0, 30.0))
def test_smooth_gives_the_mean_of_the_vote_and_the_probability(preference, strength):
    row = pair(0, preference=preference)
    [after] = treated([row], {"p0": strength}, how="smooth")
    of_chosen = after.preference if after.chosen == row.chosen else 1.0 - after.preference
    assert of_chosen == pytest.approx((preference + 1.0 / (1.0 + math.exp(-strength))) / 2.0)


def test_margin_is_the_strength_and_never_below_zero():
    rows = treated([pair(0, margin=9.0), pair(1)], {"p0": 1.5, "p1": -2.0}, how="margin")
    assert [row.margin for row in rows] == [1.5, 0.0]


@pytest.mark.parametrize("how", ["flip", "drop", "smooth", "margin"])
def test_the_test_side_and_pairs_without_a_strength_stay(how, caplog):
    rows = [pair(0), pair(1), pair(2)]
    strengths = {"p0": -9.0, "p2": -9.0}
    with caplog.at_level(logging.INFO):
        after = list(
            treat_noise(
                rows, training=lambda r: r.id != "p0", strengths=strengths, how=how, share=1.0
            )
        )
    assert after[:2] == rows[:2]
    assert after[2:] != rows[2:]
    assert f"{how}: 1 of 2 training pairs changed, 1 without a strength stay" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "turn"}, "`how` must be flip, drop"),
        ({"share": 1.6}, "`share` must be from 0 to 1"),
    ],
)
def test_a_treatment_that_is_none_is_refused(options, message, no_type_checks):
    with pytest.raises(ValueError, match=message):
        treated([pair(0)], {}, **options)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_strengths_are_the_mean_log_odds_of_the_files(tmp_path):
    first = write(
        tmp_path / "a.jsonl",
        [{"id": "x", "armo_preference": 0.8}, {"id": "y", "armo_preference": None}],
    )
    second = write(tmp_path / "b.jsonl", [{"id": "x", "armo_preference": 0.4}])
    assert read_strengths([first, second]) == pytest.approx({"x": (odds(0.8) + odds(0.4)) / 2})
    sure = write(tmp_path / "c.jsonl", [{"id": "x", "b": 1.0}])
    assert read_strengths(sure, column="b")["x"] > 20.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"armo_preference": 0.5}, "a.jsonl:1: field `id` is missing"),
        ({"id": "x"}, "field `armo_preference` must be a probability, got ''"),
        ({"id": "x", "armo_preference": 2.0}, "must be a probability, got 2.0"),
        ({"id": "x", "armo_preference": "much"}, "must be a probability, got 'much'"),
    ],
)
def test_a_row_without_a_strength_is_named(row, message, tmp_path):
    with pytest.raises(DataError, match=re.escape(message)):
        read_strengths(write(tmp_path / "a.jsonl", [row]))


def test_a_pair_that_one_model_did_not_annotate_is_named(tmp_path):
    both = [{"id": "x", "armo_preference": 0.8}, {"id": "y", "armo_preference": 0.8}]
    files = [write(tmp_path / "a.jsonl", both), write(tmp_path / "b.jsonl", both[:1])]
    with pytest.raises(DataError, match='row "y" has 1 strengths in 2 files'):
        read_strengths(files)


def test_changes_know_the_side_that_any_row_declares():
    rows = [pair(k) for k in range(60)]
    # The pairs say nothing; a rated response to the same question does.
    rated = [
        RatedResponse(f"r{k}", "s", Conversation(row.prompt, "Fine."), {}, split=side)
        for side, k in (("test", 0), ("train", 1))
        for row in [rows[k]]
    ]
    seen = []

    def note(given, *, training):
        for row in given:
            seen.append((row.id, training(row)))
            yield row

    changes = [note, lambda given, *, training: (row for row in given if training(row))]
    kept = list(change_pairs(lambda: rows, changes, others=lambda: rated, test_fraction=0.5))
    sides = dict(seen)
    assert (sides["p0"], sides["p1"]) == (False, True)
    assert 10 < sum(sides.values()) < 50
    assert [row.id for row in kept] == [id for id, side in seen if side]
