import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armo.data.conversation import (
    ROLES,
    Conversation,
    Message,
    PreferencePair,
    RatedResponse,
    ResponseList,
    prompt_group,
)

QUESTION = (Message("user", "How do I boil an egg?"),)


def test_each_known_role_makes_a_message():
    assert [Message(role, "text").role for role in ROLES] == list(ROLES)


def test_an_unknown_role_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="role 'human' is not one of system, user, assistant"):
        Message("human", "text")


@pytest.mark.parametrize(
    "prompt",
    [(), (Message("system", "Be brief."),), (Message("user", " \n"),)],
    ids=["empty", "no user turn", "blank user turn"],
)
def test_a_prompt_needs_a_user_turn_with_text(prompt):
    with pytest.raises(ValueError, match="no user turn with text"):
        Conversation(prompt, "Seven minutes.")


def test_a_prompt_does_not_end_with_an_assistant_turn():
    with pytest.raises(ValueError, match="ends with an assistant turn"):
        Conversation((*QUESTION, Message("assistant", "In water.")), "Seven minutes.")


def test_a_prompt_may_hold_earlier_assistant_turns_and_tool_results():
    prompt = (
        Message("system", "Be brief."),
        *QUESTION,
        Message("assistant", "Let me look it up."),
        Message("tool", "7 min"),
    )
    assert Conversation(prompt, "Seven minutes.").prompt == prompt


@pytest.mark.parametrize("blank", ["", " ", "\n\t\u00a0"])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda blank: Conversation(QUESTION, blank), "`response`"),
        (lambda blank: PreferencePair("a", "s", QUESTION, blank, "good"), "`chosen`"),
        (lambda blank: PreferencePair("a", "s", QUESTION, "good", blank), "`rejected`"),
        (lambda blank: ResponseList("a", "s", QUESTION, ("good", blank)), r"`responses\[1\]`"),
    ],
    ids=["conversation", "chosen", "rejected", "list"],
)
def test_an_empty_response_is_named(build, name, blank):
    assert build("better")
    with pytest.raises(ValueError, match=f"{name} is empty"):
        build(blank)


@pytest.mark.parametrize("rejected", ["In water.", " In water.\n"])
def test_a_pair_of_identical_responses_is_an_error(rejected):
    with pytest.raises(ValueError, match="`chosen` and `rejected` are the same text"):
        PreferencePair("a", "s", QUESTION, "In water.", rejected)


def test_a_pair_may_differ_in_one_character():
    pair = PreferencePair("a", "s", QUESTION, "In water.", "In water!")
    assert pair.responses == ("In water.", "In water!")


def test_a_list_needs_a_response():
    with pytest.raises(ValueError, match="`responses` is empty"):
        ResponseList("a", "s", QUESTION, ())


@pytest.mark.parametrize("correct", [(2,), (-1,), (0, 5)])
def test_a_correct_index_outside_the_list_is_an_error(correct):
    with pytest.raises(ValueError, match=r"`correct` .* is outside the list of responses"):
        ResponseList("a", "s", QUESTION, ("one", "two"), correct)


@pytest.mark.parametrize("preference", [0.5, 0.75, 1.0])
def test_a_preference_is_a_probability_from_a_tie_to_certainty(preference):
    pair = PreferencePair("a", "s", QUESTION, "one", "two", preference=preference)
    assert pair.preference == preference


@pytest.mark.parametrize("preference", [0.0, 0.4999, 1.0001, -0.5, math.nan, math.inf])
def test_a_preference_for_the_rejected_response_is_an_error_that_says_to_swap(preference):
    with pytest.raises(ValueError, match=r"`preference` is .* swap `chosen` and `rejected`"):
        PreferencePair("a", "s", QUESTION, "one", "two", preference=preference)


@pytest.mark.parametrize("margin", [None, 0.0, 3.5])
def test_a_margin_is_nought_or_more_where_it_is_known(margin):
    assert PreferencePair("a", "s", QUESTION, "one", "two", margin).margin == margin


@pytest.mark.parametrize("margin", [-0.001, -math.inf, math.inf, math.nan])
def test_a_margin_below_nought_or_without_end_is_an_error(margin):
    with pytest.raises(ValueError, match=r"`margin` must be a finite number from 0 on, got .*swap"):
        PreferencePair("a", "s", QUESTION, "one", "two", margin)


RANKS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5)


@given(RANKS)
def test_ranks_are_the_ranking_as_they_are(ranks):
    texts = tuple(f"answer {k}" for k in range(len(ranks)))
    assert ResponseList("a", "s", QUESTION, texts, ranks=tuple(ranks)).ranking == tuple(ranks)


@given(st.integers(1, 5).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_right_responses_tie_before_the_others_which_tie(case):
    size, correct = case
    texts = tuple(f"answer {k}" for k in range(size))
    ranking = ResponseList("a", "s", QUESTION, texts, tuple(correct)).ranking
    assert {k for k, rank in enumerate(ranking) if rank == 0.0} == correct
    assert {k for k, rank in enumerate(ranking) if rank == 1.0} == set(range(size)) - correct


@pytest.mark.parametrize("correct", [(), (0,)])
def test_a_list_has_right_responses_or_ranks_and_not_both(correct):
    with pytest.raises(ValueError, match="`correct` and `ranks` are both given"):
        ResponseList("a", "s", QUESTION, ("one", "two"), correct, ranks=(1, 2))


@pytest.mark.parametrize("ranks", [(), (1.0,), (1.0, 2.0, 3.0)])
def test_ranks_of_another_number_than_the_responses_are_an_error(ranks):
    with pytest.raises(ValueError, match=rf"`ranks` has {len(ranks)} numbers for 2 responses"):
        ResponseList("a", "s", QUESTION, ("one", "two"), ranks=ranks)


@pytest.mark.parametrize("rank", [math.nan, math.inf, -math.inf])
def test_ranks_that_are_not_finite_are_an_error(rank):
    with pytest.raises(ValueError, match="`ranks` must be finite numbers"):
        ResponseList("a", "s", QUESTION, ("one", "two"), ranks=(1.0, rank))


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_the_weight_of_a_list_is_finite_and_not_below_nought(weight):
    assert ResponseList("a", "s", QUESTION, ("one", "two"), weight=0.0).weight == 0.0
    with pytest.raises(ValueError, match="`weight` must be a finite number from 0 on"):
        ResponseList("a", "s", QUESTION, ("one", "two"), weight=weight)


def test_every_row_type_gives_its_prompt_and_responses():
    rated = RatedResponse("a", "s", Conversation(QUESTION, "one"), {"honesty": 4.0})
    pair = PreferencePair("a", "s", QUESTION, "one", "two")
    listed = ResponseList("a", "s", QUESTION, ("one", "two", "three"), (0, 2))
    assert [row.prompt for row in (rated, pair, listed)] == [QUESTION] * 3
    assert [len(row.responses) for row in (rated, pair, listed)] == [1, 2, 3]


def test_rows_cannot_be_changed():
    pair = PreferencePair("a", "s", QUESTION, "one", "two")
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair.chosen = "three"


@pytest.mark.parametrize(
    "prompt",
    [
        (Message("user", "  how do I\n boil an EGG?"),),
        (Message("system", "Be brief."), *QUESTION),
        (*QUESTION, Message("assistant", "Soft?"), Message("user", "Hard.")),
    ],
    ids=["case and white space", "system text", "later turns"],
)
def test_prompts_that_share_their_first_user_turn_are_one_group(prompt):
    assert prompt_group(prompt) == prompt_group(QUESTION)


def test_prompts_with_other_words_are_other_groups():
    assert prompt_group((Message("user", "How do I boil two eggs?"),)) != prompt_group(QUESTION)
