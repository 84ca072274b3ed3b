import random

import pytest

from armo.data.check_overlap import BenchmarkGrams
from armo.data.conversation import Message, ResponseList

RNG = random.Random(0)
WORDS = [f"{a}{b}{c}" for a in "bdgkm" for b in "aeiou" for c in "lnrst"]


def sentence(words):
    return " ".join(RNG.choice(WORDS) for _ in range(words))


def item(id, prompt, *responses, correct=(0,)):
    responses = responses or ("yes", "no")
    return ResponseList(id, "s", (Message("user", prompt),), tuple(responses), correct=correct)


def found(rows, text):
    return [*BenchmarkGrams([("B", rows)]).find(text)]


def test_a_prompt_is_found_inside_a_text_whatever_its_case_and_punctuation():
    prompt = sentence(20)
    text = f"{sentence(30)}. {prompt.upper().replace(' ', ', ')}! {sentence(30)}"
    assert found([item("a", prompt), item("b", sentence(20))], text) == [("B", "the prompt of 'a'")]


def test_half_of_a_prompt_is_enough_and_a_quarter_is_not():
    words = sentence(40).split()
    rows = [item("a", " ".join(words))]
    assert found(rows, " ".join(words[:26]))
    assert not found(rows, " ".join(words[:16]))


def test_right_responses_are_looked_for_and_wrong_ones_are_not():
    right, wrong = sentence(30), sentence(30)
    rows = [item("a", sentence(20), wrong, right, correct=(1,))]
    assert found(rows, right) == [("B", "`responses[1]` of 'a'")]
    assert not found(rows, wrong)


def test_wording_that_many_prompts_share_is_no_contamination():
    frame = sentence(12)
    rows = [item(str(k), f"{frame} {sentence(10)}") for k in range(5)]
    assert not found(rows, f"{frame} {sentence(10)}")
    assert found(rows, rows[3].prompt[0].content) == [("B", "the prompt of '3'")]


def test_a_short_prompt_is_found_as_the_whole_text_alone():
    rows = [item("a", "How are you today?")]
    assert found(rows, "HOW are you, today") == [("B", "the prompt of 'a'")]
    assert not found(rows, f"How are you today? {sentence(20)}")
    assert not found([item("a", "Thank you.")], "Thank you.")


def test_a_text_that_a_benchmark_has_twice_is_found_once():
    prompt = sentence(20)
    assert len(found([item("a", prompt), item("b", prompt)], prompt)) == 1


def test_benchmarks_are_told_apart():
    first, second = sentence(20), sentence(20)
    grams = BenchmarkGrams([("X", [item("a", first)]), ("Y", [item("a", second)])])
    assert [*grams.find(f"{second} {first}")] == [
        ("X", "the prompt of 'a'"),
        ("Y", "the prompt of 'a'"),
    ]


@pytest.mark.parametrize("text", ["", "...", "one"])
def test_no_benchmark_and_no_text_have_nothing_in_common(text):
    assert not found([], text)
    assert not found([item("a", sentence(20))], text)
