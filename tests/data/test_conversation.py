import dataclasses

import pytest

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
