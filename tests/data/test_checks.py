import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armo.data.checks import GroupSplits, check_objectives
from armo.data.conversation import (
    Conversation,
    Message,
    PreferencePair,
    RatedResponse,
    prompt_group,
)
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.sources import DataError

OBJECTIVES = ObjectiveSet((Objective("honesty", 1, 5), Objective("safety", 1, 5)))
prompts = st.lists(st.integers(0, 40).map(str), min_size=1, max_size=60)


def make_pair(prompt, *, id="a", split=None):
    return PreferencePair(id, "s", (Message("user", prompt),), "yes", "no", split=split)


def split(rows, *, test_fraction):
    """The side of each group, by the text that makes it one."""
    splits = GroupSplits(test_fraction)
    group_of = {prompt_group(row.prompt): splits.add(row) for row in rows}
    test = splits.test()
    assert sorted(group_of.values()) == list(range(len(test)))
    return {text: "test" if test[group] else "train" for text, group in group_of.items()}


def table(*rows):
    """Ratings on [0, 1], a column per objective; NaN where a row has none."""
    return torch.tensor(
        [
            [
                objective.to_unit(row[objective.name]) if objective.name in row else math.nan
                for objective in OBJECTIVES.objectives
            ]
            for row in rows
        ],
        dtype=torch.float64,
    )


@given(prompts, st.randoms())
def test_the_split_does_not_depend_on_the_order_of_rows(texts, random):
    rows = [make_pair(text) for text in texts]
    shuffled = random.sample(rows, len(rows))
    assert split(rows, test_fraction=0.3) == split(shuffled, test_fraction=0.3)


@given(prompts, prompts)
def test_the_split_is_unchanged_when_rows_are_added(texts, added):
    before = split(map(make_pair, texts), test_fraction=0.3)
    after = split(map(make_pair, [*texts, *added]), test_fraction=0.3)
    assert before.items() <= after.items()


def test_the_split_is_the_same_in_every_version():
    splits = split([make_pair(f"prompt {k}") for k in range(8)], test_fraction=0.4)
    assert [k for k in range(8) if splits[f"prompt {k}"] == "test"] == [0, 2, 6, 7]


@pytest.mark.parametrize("test_fraction", [0.05, 0.2, 0.5, 0.9])
def test_the_share_of_test_groups_is_near_the_test_fraction(test_fraction):
    count = 4000
    splits = split([make_pair(f"prompt {k}") for k in range(count)], test_fraction=test_fraction)
    share = sum(side == "test" for side in splits.values()) / count
    assert abs(share - test_fraction) < 4 * math.sqrt(test_fraction * (1 - test_fraction) / count)


@given(prompts, st.floats(0.01, 0.98), st.floats(0.001, 0.01))
def test_a_larger_test_fraction_only_moves_groups_to_the_test_side(texts, fraction, more):
    rows = [make_pair(text) for text in texts]
    small = split(rows, test_fraction=fraction)
    large = split(rows, test_fraction=fraction + more)
    assert all(large[group] == "test" for group, side in small.items() if side == "test")


def test_rows_that_share_a_prompt_are_one_group():
    rows = [
        make_pair("How do I boil an egg?"),
        make_pair("how do i  boil an EGG?\n"),
        RatedResponse(
            "b", "s", Conversation((Message("user", "How do I boil an egg?"),), "yes"), {}
        ),
    ]
    assert len(split(rows, test_fraction=0.5)) == 1


@pytest.mark.parametrize("declared", ["train", "test"])
@pytest.mark.parametrize("declared_first", [True, False])
def test_a_declared_split_wins_over_the_hash(declared, declared_first):
    for k in range(20):
        rows = [make_pair(f"{k}", split=declared), make_pair(f"{k}")]
        splits = split(rows if declared_first else rows[::-1], test_fraction=0.5)
        assert splits == {prompt_group(rows[0].prompt): declared}


def test_rows_of_one_prompt_on_both_sides_are_an_error():
    rows = [make_pair("Hello", id="left", split="train"), make_pair("hello ", id="right")]
    assert split(rows, test_fraction=0.5) == {"hello": "train"}
    rows[1] = make_pair("hello ", id="right", split="test")
    with pytest.raises(DataError, match=r"'left' \(train\) and 'right' \(test\) share a prompt"):
        split(rows, test_fraction=0.5)


@pytest.mark.parametrize("test_fraction", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_test_fraction_that_leaves_a_side_empty_is_an_error(test_fraction):
    with pytest.raises(ValueError, match="`test_fraction` must be between 0 and 1"):
        split([make_pair("q")], test_fraction=test_fraction)


@given(prompts)
def test_groups_are_numbered_in_the_order_of_their_first_row(texts):
    splits = GroupSplits(0.5)
    numbers = [splits.add(make_pair(text)) for text in texts]
    order = list(dict.fromkeys(texts))
    assert numbers == [order.index(text) for text in texts]
    assert len(splits.test()) == len(order)


def test_objectives_with_enough_different_ratings_pass():
    ratings = table({"honesty": 1, "safety": 2}, {"honesty": 2}, {"safety": 5})
    check_objectives(ratings, OBJECTIVES, min_ratings=2)
    with pytest.raises(DataError, match="'honesty' has 2 ratings"):
        check_objectives(ratings, OBJECTIVES, min_ratings=3)


def test_an_objective_with_too_few_ratings_is_named():
    ratings = table({"honesty": 1, "safety": 2}, {"honesty": 2})
    with pytest.raises(DataError, match=r"'safety' has 1 ratings .* `data\.min_ratings=2`"):
        check_objectives(ratings, OBJECTIVES, min_ratings=2)


@pytest.mark.parametrize("min_ratings", [0, 1])
@pytest.mark.parametrize("rows", [[{"honesty": 1}, {"honesty": 2}], []])
def test_an_objective_without_ratings_is_an_error_whatever_the_minimum(rows, min_ratings):
    name = "safety" if rows else "honesty"
    with pytest.raises(DataError, match=f"'{name}' has 0 ratings"):
        check_objectives(table(*rows).reshape(-1, 2), OBJECTIVES, min_ratings=min_ratings)


def test_judgements_count_beside_ratings():
    ratings = table({"honesty": 1, "safety": 2}, {"honesty": 2})
    nan = math.nan
    judgements = torch.tensor([[nan, 0.9], [nan, nan], [nan, 0.5]])
    check_objectives(ratings, OBJECTIVES, min_ratings=2, judgements=judgements[:2])
    ratings = table({"honesty": 1, "safety": 2}, *[{"honesty": k} for k in range(1, 5)])
    message = r"'safety' has 1 ratings and 2 judgements .*, fewer than `data\.min_ratings=4`"
    with pytest.raises(DataError, match=message):
        check_objectives(ratings, OBJECTIVES, min_ratings=4, judgements=judgements)


def test_an_objective_may_have_judgements_alone():
    ratings = table({"honesty": 1}, {"honesty": 2})
    judgements = torch.tensor([[math.nan, 1.0], [math.nan, 1.0]])
    check_objectives(ratings, OBJECTIVES, min_ratings=2, judgements=judgements)
    with pytest.raises(DataError, match="'safety' has 0 ratings on"):
        check_objectives(ratings, OBJECTIVES, min_ratings=2)
    with pytest.raises(DataError, match="'safety' has nothing but ties"):
        check_objectives(
            ratings, OBJECTIVES, min_ratings=2, judgements=torch.full_like(judgements, 0.5)
        )


def test_a_constant_rating_can_be_learned_from_beside_judgements():
    ratings = table({"honesty": 1, "safety": 4}, {"honesty": 2, "safety": 4})
    judgements = torch.tensor([[math.nan, 0.5], [math.nan, 0.3]])
    check_objectives(ratings, OBJECTIVES, min_ratings=2, judgements=judgements)
    with pytest.raises(DataError, match="'safety' has the one rating 4 on all"):
        check_objectives(ratings, OBJECTIVES, min_ratings=2, judgements=judgements[:1])


def test_a_constant_objective_is_named_with_the_rating_as_the_file_has_it():
    ratings = table({"honesty": 1, "safety": 4}, {"honesty": 2, "safety": 4})
    with pytest.raises(DataError, match="'safety' has the one rating 4 on all"):
        check_objectives(ratings, OBJECTIVES, min_ratings=2)
    harm = ObjectiveSet((Objective("harm", 0, 10, higher_is_better=False),))
    with pytest.raises(DataError, match="'harm' has the one rating 3 on all"):
        check_objectives(torch.full((2, 1), 0.7), harm, min_ratings=2)
