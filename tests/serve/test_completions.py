"""What trainers hand over becomes conversations, and control text becomes words."""

import copy
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armo.data.conversation import Conversation, Message
from armo.serve.completions import ControlText, parse_completion, shared_length

USER = Message("user", "Is honey safe?")


def blocks(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Is honey safe?", "Not for babies."),
        ([{"role": "user", "content": "Is honey safe?"}], "Not for babies."),
        (
            [{"role": "user", "content": blocks("Is honey", " safe?")}],
            [{"role": "assistant", "content": blocks("Not for ", "babies.")}],
        ),
        (
            [{"role": "user", "content": "Is honey safe?", "tool_calls": None}],
            [{"role": "assistant", "content": "Not for babies."}],
        ),
        (
            [
                {"role": "user", "content": "Is honey safe?"},
                {"role": "assistant", "content": "Not for "},
            ],
            [{"role": "assistant", "content": "babies."}],
        ),
    ],
    ids=["text", "mixed", "blocks", "messages", "begun by the data"],
)
def test_each_form_of_a_completion_is_the_same_conversation(prompt, completion):
    assert parse_completion(prompt, completion) == Conversation((USER,), "Not for babies.")


def test_the_response_is_all_that_the_assistant_wrote_and_the_prompt_is_that_of_the_data():
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": USER.content}]
    completion = [
        {"role": "assistant", "content": "Let me look.", "tool_calls": [{"name": "search"}]},
        {"role": "tool", "name": "search", "content": "You are a perfect assistant."},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]},
        {"role": "tool", "name": "search", "content": "Ignored."},
        {"role": "assistant", "content": "Not for babies."},
    ]
    assert parse_completion(prompt, completion) == Conversation(
        (Message("system", "Be kind."), USER), "Let me look.\n\nNot for babies."
    )


@pytest.mark.parametrize(
    "completion",
    [
        "",
        " \n\t",
        [],
        [{"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]}],
        [{"role": "assistant", "content": [{"type": "image"}]}],
        [{"role": "user", "content": "I am the user."}],
        "half of a pair: \ud83d",
    ],
)
def test_a_completion_without_words_of_the_assistant_is_none(completion):
    assert parse_completion("Is honey safe?", completion) is None


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "no user turn"),
        ([], "no user turn"),
        ([{"role": "assistant", "content": "Hello."}], "no user turn"),
        ([{"content": "no role"}], "needs `role`"),
        ([{"role": "developer", "content": "Be kind."}], "role 'developer'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "block of image"),
        ([{"role": "user", "content": ["text"]}], "list of blocks"),
        ("half of a pair: \ud83d", "Unicode"),
    ],
)
def test_a_prompt_of_the_data_that_cannot_be_answered_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        parse_completion(prompt, "Fine.")


def test_a_completion_of_another_form_is_refused(no_type_checks):
    with pytest.raises(ValueError, match="text or a list of messages"):
        parse_completion("Hello?", ["a list of texts"])


@pytest.fixture(params=["encoder", "causal"])
def tokenizer(request):
    return request.getfixturevalue(request.param).tokenizer


def special_ids(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [i for i in ids if i in tokenizer.all_special_ids and i != tokenizer.unk_token_id]


def test_disarmed_text_has_no_special_tokens_whatever_it_spells(tokenizer):
    control = ControlText(tokenizer)
    tokens = [t for t in tokenizer.all_special_tokens if t != tokenizer.unk_token]
    pieces = st.lists(
        st.sampled_from([*tokens, *(t[:3] for t in tokens), *(t[1:] for t in tokens), "a ", "<"])
    )

    @given(pieces)
    def holds(parts):
        text = "".join(parts)
        assert not special_ids(tokenizer, control.disarm(text))
        assert control.disarm(control.disarm(text)) == control.disarm(text)
        assert control.disarm(text).replace(" ", "") == text.replace(" ", "")

    holds()
    assert special_ids(tokenizer, tokens[0])  # they would be there otherwise


def test_other_text_stays_as_it_is(tokenizer):
    text = "if a < b and c[0] > 1:\n    print('<|hello|>', '[ SEP]')"
    assert ControlText(tokenizer).disarm(text) == text


def test_words_that_are_one_token_are_no_control_text(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<think>"])
    assert ControlText(tokenizer).disarm("<think>Hm.</think>") == "<think>Hm.</think>"


def test_special_tokens_at_the_end_are_taken_off(tokenizer):
    control = ControlText(tokenizer)
    first, *_, last = (t for t in tokenizer.all_special_tokens if t != tokenizer.unk_token)
    assert control.without_end(f"{first} a.{last}{first}") == f"{first} a."
    assert control.without_end(f"a. {last}\n{first}\n") == "a. "
    assert control.without_end(f"a.{last}b ") == f"a.{last}b "
    assert control.without_end("a.\n") == "a.\n"
    started = time.perf_counter()
    long = last * 50_000 + "x"  # a minute, if each token were tried as the first of the end
    assert control.without_end(long) == long
    assert time.perf_counter() - started < 2.0


@given(st.text("ab", max_size=9), st.text("ab", max_size=9))
def test_shared_length_is_that_of_the_longest_end_of_the_prompt(prompt, text):
    slow = next((k for k in range(len(prompt), 0, -1) if text.startswith(prompt[-k:])), 0)
    assert shared_length(prompt, text) == slow
