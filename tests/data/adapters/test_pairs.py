"""Pair sets, from hand-made rows in the published schema."""

import copy
import json
import logging
import math
from itertools import combinations
from statistics import fmean

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_ratings import places

from armo.data.adapters.base import Dropped
from armo.data.adapters.pairs import PAIR_SETS, stream_adapted_pairs
from armo.data.adapters.transcripts import transcript
from armo.data.conversation import Message, PreferencePair
from armo.data.objectives import ObjectiveSet
from armo.data.sources import DataError


def talk(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[k % 2], "content": content} for k, content in enumerate(contents)]


def blocks(*contents):
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in talk(*contents)
    ]


def human(*contents):
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[k % 2]}: {content}" for k, content in enumerate(contents))


STEER2 = {
    "split": "train",
    "prompt": "Why?",
    "response_1": "Better.",
    "response_2": "Worse.",
    "preference_strength": -2,
    "preference_statement": "Response 1 is better than Response 2.",
    "preference_elaboration": "It says more.",
    "three_most_similar_preferences": [
        {"statement": "1 is better", "elaboration": "", "strength": strength}
        for strength in (-3, -2, 1)
    ],
    "all_preferences_unprocessed": [{"strength": -100, "justification": "unusable"}],
}
STEER3 = {
    "domain": "code",
    "language": "python",
    "context": talk("Hi", "Hello.", "Why?"),
    "response1": "Worse.",
    "response2": "Better.",
    "overall_preference": 1,
    "individual_preference": [{"score": 2, "reasoning": ""}, {"score": 0, "reasoning": ""}],
}
EDIT = {
    "domain": "stem",
    "language": "english",
    "context": talk("Why?"),
    "original_response": "Worse.",
    "edited_response": "Better.",
    "feedback": ["The response is slightly helpful."],
    "change_summary": "Says why.",
}
QUALITY = {
    "domain": "general",
    "context": talk("Why?"),
    "original_response": "First.",
    "good_edited_response": "Better.",
    "bad_edited_response": "Worse.",
    "feedback": [],
}
TRANSCRIPT = {"chosen": human("Why?", "Better."), "rejected": human("Why?", "Worse.")}
STANDARD = {"chosen": talk("Why?", "Better."), "rejected": talk("Why?", "Worse.")}
SCORED = {**STANDARD, "chosen_score": 4.5, "rejected_score": 2.0}
H4 = {
    **STANDARD,
    "prompt": "Why?",
    "prompt_id": "a0",
    "messages": STANDARD["chosen"],
    "score_chosen": 8.5,
    "score_rejected": 6.0,
}
CAPYBARA = {
    "source": "Know_Logic",
    "chosen": talk("Hi", "Hello.", "Why?", "Better."),
    "chosen_rating": 5,
    "chosen_model": "m",
    "rejected": talk("Hi", "Hello.", "Why?", "Worse."),
    "rejected_rating": 3,
    "rejected_model": "n",
}
MAGPIE = {
    **STANDARD,
    "uuid": "0",
    "instruction": "Why?",
    "responses": ["Worse.", "Better.", "So so."],
    "rewards_armorm": [{"score": 0.1}, {"score": 0.175}, {"score": 0.15}],
}
PKU = {
    "prompt": "Why?",
    "response_0": "Worse.",
    "response_1": "Better.",
    "prompt_source": "BeaverTails",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "response_0_harm_category": {"Endangering National Security": True},
    "response_1_harm_category": {"Endangering National Security": False},
    "response_0_severity_level": 3,
    "response_1_severity_level": 1,
    "better_response_id": 1,
    "safer_response_id": 1,
}
SHP = {
    "post_id": "a",
    "domain": "askculinary_train",
    "upvote_ratio": 0.98,
    "history": "Why?",
    "human_ref_A": "Better.",
    "human_ref_B": "Worse.",
    "score_A": 8,
    "score_B": 2,
    "labels": 1,
    "score_ratio": 4.0,
}
POST = {"id": "t3", "post": "It is.", "title": "Why", "subreddit": "ask", "article": None}
SUMMARY = {
    "info": {**POST, "site": None},
    "summaries": [
        {"text": " Worse.", "policy": "sup1", "note": None},
        {"text": " Better.", "policy": "ref", "note": "fine"},
    ],
    "choice": 1,
    "worker": "w",
    "batch": "batch3",
    "split": "train",
    "extra": {"confidence": 8},
}
PROMETHEUS = {
    "instruction": "###Task Description: ...",
    "output": "Feedback: ... [RESULT] B",
    "orig_instruction": "Why?",
    "orig_response_A": "Worse.",
    "orig_response_B": "Better.",
    "orig_reference_answer": "Because.",
    "orig_criteria": "Does it say why?",
    "orig_preference": "B",
    "orig_score_A": "2",
    "orig_score_B": 5,
}
ORCA = {
    "system": "",
    "input": "Why?",
    "chosen": "Better.",
    "rejected": "Worse.",
    "generations": ["Worse.", "Better."],
    "order": ["rejected", "chosen"],
    "rating": [7.0, 9.0],
    "status": "swapped",
    "chosen_score": 9.0,
    "in_gsm8k_train": False,
}
MATH = {
    "instruction": "Why?",
    "chosen_response": "Better.",
    "rejected_response": "Worse.",
    "chosen_rating": 9.0,
    "rejected_rating": 6.5,
}


def annotations(following, honesty, truthfulness, helpfulness):
    more = {"Type": ["1"], "Rationale": "", "Rationale For Rating": ""}
    return {
        "instruction_following": {"Rating": following, "Rationale": ""},
        "honesty": {"Rating": honesty, "Rationale": ""},
        "truthfulness": {"Rating": truthfulness, **more},
        "helpfulness": {"Rating": helpfulness, **more},
    }


ULTRA = {
    "source": "flan",
    "instruction": "Why?",
    "models": ["m", "n"],
    "completions": [
        {
            "model": "m",
            "custom_system_prompt": "Be brief.",
            "response": "Worse.",
            "annotations": annotations("2", "N/A", "3", "1"),
            "overall_score": 10.0,
            "fine-grained_score": 2.0,
        },
        {
            "model": "n",
            "response": "Better.",
            "annotations": annotations("5", "4", "4", "5"),
            "overall_score": None,
            "fine-grained_score": 4.5,
        },
    ],
    "correct_answers": ["None"],
}
CODE = {
    "instruction": "Why?",
    "preference": "style",
    "models": ["m", "n"],
    "responses": [{"model": "m", "response": "Worse."}, {"model": "n", "response": "Better."}],
    "annotations": [
        {"model": "n", "rating": "4", "rationale": ""},
        {"model": "m", "rating": "1", "rationale": ""},
    ],
}
JUDGELM = {
    "question_body": "Why?",
    "answer1_body": "Worse.",
    "answer2_body": "Better.",
    "text": "5 8\nThe second says why.",
}
# As `oasst_siblings` puts it together; the messages that it is made of are in a test of its own.
SIBLINGS = {
    "messages": talk("Why?"),
    "lang": "en",
    "answers": [{"text": "Worse.", "rank": 2}, {"text": "Better.", "rank": 0}],
}
ARENA = {
    "question_id": "q",
    "model_a": "m",
    "model_b": "n",
    "winner": "model_b",
    "conversation_a": talk("Why?", "Worse."),
    "conversation_b": talk("Why?", "Better."),
    "turn": 1,
    "language": "English",
}
ARENA_55K = {
    "id": 1,
    "prompt": '["Why?"]',
    "response_a": '["Worse."]',
    "response_b": '["Better."]',
    "winner_model_a": 0,
    "winner_model_b": 1,
    "winner_tie": 0,
}
ARENA_140K = {
    **ARENA,
    "conversation_a": blocks("Why?", "Worse."),
    "conversation_b": blocks("Why?", "Better."),
    "evaluation_order": 1,
    "is_code": True,
}
MT_BENCH = {
    **ARENA,
    "question_id": 81,
    "judge": ["gpt4", "single"],
    "conversation_a": talk("Why?", "Worse.", "Again?", "No."),
    "conversation_b": talk("Why?", "Better.", "Again?", "Yes."),
}

# By name: a row, the margin, and what else the pair has that others do not have.
EXPECTED = {
    "helpsteer2_preference": (STEER2, 2.0, {"preference": 2 / 3}),
    "helpsteer2_preference_validation": (
        {**STEER2, "split": "val"},
        2.0,
        {"preference": 2 / 3},
    ),
    "helpsteer3_preference": (STEER3, 1.0, {"preference": 0.75, "category": "code", "turns": 3}),
    "helpsteer3_edit": (EDIT, None, {"category": "stem"}),
    "helpsteer3_edit_quality": (QUALITY, None, {"category": "general"}),
    "hh_rlhf": (TRANSCRIPT, None, {}),
    "hh_rlhf_harmless": (TRANSCRIPT, None, {}),
    "hh_rlhf_helpful": (TRANSCRIPT, None, {}),
    "hh_rlhf_helpful_online": (TRANSCRIPT, None, {}),
    "hh_rlhf_helpful_rejection_sampled": (TRANSCRIPT, None, {}),
    "rm_static": (
        {"prompt": human("Why?") + "\n\nAssistant:", "chosen": " Better.", "rejected": " Worse."},
        None,
        {},
    ),
    "rlhflow_ultrafeedback": (SCORED, 2.5, {}),
    "rlhflow_helpsteer": (SCORED, 2.5, {}),
    "rlhflow_helpsteer2": (SCORED, 2.5, {}),
    "rlhflow_hh_helpful": ({**STANDARD, "chosen_score": None, "rejected_score": None}, None, {}),
    "rlhflow_hh_harmless": (STANDARD, None, {}),
    "rlhflow_shp": (SCORED, None, {}),
    "rlhflow_orca": (SCORED, 2.5, {}),
    "rlhflow_capybara": (SCORED, 2.5, {}),
    "rlhflow_code_ultrafeedback": (
        {**STANDARD, "chosen_score": "4", "rejected_score": "1"},
        3.0,
        {},
    ),
    "rlhflow_ultrainteract": (STANDARD, None, {}),
    "rlhflow_pku_saferlhf": (STANDARD, None, {}),
    "rlhflow_prometheus2": (SCORED, 2.5, {}),
    "rlhflow_math": ({**STANDARD, "chosen_rating": 9.0, "rejected_rating": 3.6}, 5.4, {}),
    "pair_data_v2": (STANDARD, None, {}),
    "preference_700k": (SCORED, None, {}),
    "skywork_v0_1": ({**STANDARD, "source": "magpie_ultra"}, None, {"category": "magpie_ultra"}),
    "skywork_v0_2": ({**STANDARD, "source": "offsetbias"}, None, {"category": "offsetbias"}),
    "tulu_3_8b": (STANDARD, None, {}),
    "openrlhf_mixture2": (STANDARD, None, {}),
    "magpielm": ({**STANDARD, "uuid": "0", "instruction": "Why?"}, None, {}),
    "magpie_pro": (MAGPIE, 0.075, {}),
    "magpie_air": ({**MAGPIE, "rewards_armorm": [0.1, 0.2]}, 0.1, {}),
    "magpie_llama_3_1_pro": (MAGPIE, 0.075, {}),
    "ultrafeedback_argilla": (
        {
            **STANDARD,
            "source": "evol_instruct",
            "prompt": "Why?",
            "chosen-rating": 4.75,
            "chosen-model": "m",
            "rejected-rating": 4.0,
            "rejected-model": "n",
        },
        0.75,
        {"category": "evol_instruct"},
    ),
    "ultrafeedback_h4": (H4, 2.5, {}),
    "ultrafeedback_allenai": ({**H4, "source": "flan"}, 2.5, {"category": "flan"}),
    "ultrafeedback_trl": (H4, 2.5, {}),
    "capybara": (CAPYBARA, 2.0, {"category": "Know_Logic", "turns": 3}),
    "capybara_filtered": (CAPYBARA, 2.0, {"category": "Know_Logic", "turns": 3}),
    "capybara_7k": ({**STANDARD, "rating_chosen": 5, "rating_rejected": 1}, 4.0, {}),
    "unified_feedback": (
        {
            "conv_A": talk("Why?", "Worse."),
            "conv_B": talk("Why?", "Better."),
            "conv_A_rating": 0.0,
            "conv_B_rating": 1.0,
            "source": "argilla/ultrafeedback",
        },
        None,
        {"category": "argilla/ultrafeedback"},
    ),
    "pku_saferlhf_better": (PKU, None, {}),
    "pku_saferlhf_safer": (PKU, 2.0, {}),
    "shp": (SHP, math.log(4.0), {"category": "askculinary"}),
    "summarize_from_feedback": (
        SUMMARY,
        None,
        {"prompt": "SUBREDDIT: r/ask\n\nTITLE: Why\n\nPOST: It is.\n\nTL;DR:", "category": "post"},
    ),
    "offsetbias": (
        {"instruction": "Why?", "output_1": "Worse.", "output_2": "Better.", "label": 2},
        None,
        {},
    ),
    "preference_collection": (PROMETHEUS, 3.0, {}),
    "distilabel_intel_orca": (ORCA, 2.0, {}),
    "distilabel_math": (MATH, 2.5, {}),
    "ultrafeedback_pairs": (ULTRA, 2.5, {"category": "flan", "id": "/1-2"}),
    "code_ultrafeedback_pairs": (CODE, 3.0, {"category": "style", "id": "/1-2"}),
    "judgelm": (JUDGELM, 3.0, {"id": "/1-2"}),
    "oasst2_pairs": (SIBLINGS, 2.0, {"category": "en", "id": "/1-2"}),
    "arena_33k": (ARENA, None, {}),
    "arena_55k": (ARENA_55K, None, {}),
    "arena_100k": (ARENA, None, {}),
    "arena_140k": (ARENA_140K, None, {"category": "code"}),
    "mt_bench_human": (MT_BENCH, None, {}),
}


def read(name, row, **changes):
    """All that an adapter makes of one row: pairs, and the reasons for those that it drops."""
    made = [*PAIR_SETS[name].rows({**row, **changes}, f"{name}/train/1")]
    reasons = [each.reason for each in made if isinstance(each, Dropped)]
    return [each for each in made if isinstance(each, PreferencePair)], reasons


def dropped(name, row, **changes):
    pairs, (reason,) = read(name, row, **changes)
    assert not pairs
    return reason


@pytest.mark.parametrize("name", PAIR_SETS)
def test_a_row_of_each_set_is_a_pair_with_its_margin(name):
    row, margin, more = EXPECTED[name]
    if row is not SIBLINGS:
        assert set(PAIR_SETS[name].columns) <= set(row), "it asks for columns that the set has"
    (pair,), reasons = read(name, row)
    assert not reasons
    assert (pair.chosen, pair.rejected) == ("Better.", "Worse.")
    assert pair.margin == (None if margin is None else pytest.approx(margin))
    assert pair.preference == pytest.approx(more.get("preference", 1.0))
    assert (pair.category, pair.split) == (more.get("category", ""), None)
    assert pair.prompt[-1] == Message("user", more.get("prompt", "Why?"))
    assert len(pair.prompt) == more.get("turns", 1)
    assert (pair.id, pair.source) == (f"{name}/train/1{more.get('id', '')}", name)


def test_each_set_has_an_option_that_names_it(request):
    folder = request.config.rootpath / "conf/data/pairs"
    options = {file.stem: yaml.safe_load(file.read_text()) for file in folder.glob("*.yaml")}
    named = {
        name: option
        for name, option in options.items()
        if "published" in option.get("defaults", ())
    }
    assert {name: option["path"] for name, option in named.items()} == {
        name: adapter.id for name, adapter in PAIR_SETS.items()
    }
    assert all(option["dataset"] == name for name, option in named.items())


# Values that a column of a published set has now and then, or that a broken file has.
ODD = (
    None,
    "",
    "N/A",
    "7",
    "x",
    7,
    -1,
    2.5,
    True,
    math.nan,
    math.inf,
    [],
    ["x"],
    [{}],
    {},
    {"a": 1},
)


@pytest.mark.parametrize("name", PAIR_SETS)
def test_an_odd_value_anywhere_is_one_error_that_names_a_field_or_a_valid_pair(name):
    row, _, _ = EXPECTED[name]
    refused = []
    for k, _ in enumerate(places(row)):
        for odd in ODD:
            broken = copy.deepcopy(row)
            container, key = [*places(broken)][k]
            container[key] = odd
            try:
                read(name, broken)
            except ValueError as error:
                refused.append(str(error))
    assert refused
    assert not [message for message in refused if "`" not in message or "\n" in message]


# What says which of two responses is better, and the same for the responses swapped.
MIRRORED = {
    "helpsteer2_preference": (("response_1", "response_2"), {}),
    "helpsteer3_preference": (("response1", "response2"), {}),
    "pku_saferlhf_better": (("response_0", "response_1"), {"better_response_id": 0}),
    "shp": (("human_ref_A", "human_ref_B"), {"labels": 0}),
    "offsetbias": (("output_1", "output_2"), {"label": 1}),
    "preference_collection": (
        ("orig_response_A", "orig_response_B"),
        {"orig_preference": "A", "orig_score_A": 5, "orig_score_B": 2},
    ),
    "unified_feedback": (("conv_A", "conv_B"), {"conv_A_rating": 1.0, "conv_B_rating": 0.0}),
    "arena_33k": (("conversation_a", "conversation_b"), {"winner": "model_a"}),
    "arena_140k": (("conversation_a", "conversation_b"), {"winner": "model_a"}),
    "arena_55k": (("response_a", "response_b"), {"winner_model_a": 1, "winner_model_b": 0}),
    "mt_bench_human": (("conversation_a", "conversation_b"), {"winner": "model_a"}),
    "judgelm": (("answer1_body", "answer2_body"), {"text": "8 5\nThe first."}),
}
STRENGTHS = {
    "helpsteer2_preference": {
        "preference_strength": 2,
        "three_most_similar_preferences": [{"strength": s} for s in (3, 2, -1)],
    },
    "helpsteer3_preference": {
        "overall_preference": -1,
        "individual_preference": [{"score": -2}, {"score": 0}],
    },
}


@pytest.mark.parametrize("name", MIRRORED)
def test_a_pair_does_not_depend_on_the_order_of_its_sides(name):
    row, _, _ = EXPECTED[name]
    (a, b), label = MIRRORED[name]
    swapped = {a: row[b], b: row[a], **label, **STRENGTHS.get(name, {})}
    (pair,), _ = read(name, row)
    (mirrored,), _ = read(name, row, **swapped)
    assert mirrored == pair


@given(votes=st.lists(st.integers(-3, 3), min_size=1, max_size=3))
def test_votes_that_make_a_strength_make_its_preference(votes):
    # NVIDIA's strength is the mean of the votes, rounded.
    strength = round(fmean(votes))
    individual = [{"score": vote, "reasoning": ""} for vote in votes]
    (pair,), _ = read(
        "helpsteer3_preference",
        STEER3,
        overall_preference=strength,
        individual_preference=individual,
    )
    assert pair.margin == abs(strength)
    if strength == 0:
        assert (pair.preference, pair.chosen) == (0.5, "Worse."), "a tie keeps the order"
        return
    sign = math.copysign(1, strength)
    share = fmean(1.0 if vote * sign > 0 else 0.5 if vote == 0 else 0.0 for vote in votes)
    assert pair.preference == pytest.approx(share)
    if share > 0.5:
        assert pair.chosen == ("Better." if strength > 0 else "Worse.")


def test_strengths_without_usable_votes_are_taken_at_their_word():
    for votes in (None, [], [{"strength": -100}], [{"strength": None}, {"statement": "none"}]):
        (pair,), _ = read("helpsteer2_preference", STEER2, three_most_similar_preferences=votes)
        assert (pair.chosen, pair.preference) == ("Better.", 1.0)
    row = {key: value for key, value in STEER2.items() if not key.startswith("three")}
    (pair,), _ = read("helpsteer2_preference", row)
    assert pair.preference == 1.0
    votes = [{"strength": strength} for strength in (-100, -1, 1)]
    (pair,), _ = read("helpsteer2_preference", STEER2, three_most_similar_preferences=votes)
    assert pair.preference == 0.5, "-100 is no vote for the first"
    votes = [{"strength": 3}, {"strength": 1}]
    reason = dropped("helpsteer2_preference", STEER2, three_most_similar_preferences=votes)
    assert reason == "votes and strength disagree"
    for strength in (-4, "much", None, True, 1.5):
        with pytest.raises(ValueError, match="`preference_strength` must be one of -3, -2"):
            read("helpsteer2_preference", STEER2, preference_strength=strength)


@pytest.mark.parametrize("said", ["val", "validation"])
def test_the_one_split_of_helpsteer2s_preferences_is_parted_by_its_column(said):
    assert "validation" in dropped("helpsteer2_preference", STEER2, split=said)
    assert len(read("helpsteer2_preference_validation", STEER2, split=said)[0]) == 1
    assert "training" in dropped("helpsteer2_preference_validation", STEER2)


def test_turns_stand_in_the_prompts_of_helpsteer2_and_may_stand_in_a_text_in_helpsteer3():
    prompt = "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?"
    (pair,), _ = read("helpsteer2_preference", STEER2, prompt=prompt)
    assert [turn.content for turn in pair.prompt] == ["Hi", "Hello.", "Why?"]
    (pair,), _ = read("helpsteer3_preference", STEER3, context="Why?")
    assert pair.prompt == (Message("user", "Why?"),)


TURN = st.text(
    alphabet=st.characters(codec="utf-8", exclude_characters="\n"), min_size=1, max_size=20
).filter(lambda text: text == text.strip())


@given(turns=st.lists(TURN, min_size=1, max_size=5))
def test_a_transcript_is_split_into_the_turns_that_it_was_made_of(turns):
    read_back = transcript(human(*turns))
    assert [turn.content for turn in read_back] == turns
    assert [turn.role for turn in read_back] == ["user", "assistant", "user", "assistant", "user"][
        : len(turns)
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (human("Why?", "A"), human("Why not?", "B"), "two prompts"),
        (human("Why?", "A"), human("Why?", ""), "an empty response"),
        (human("Why?", "A"), human("Why?", "A "), "the same response twice"),
        (human("Why?", "A", "So?"), human("Why?", "B", "So?"), "does not end with an answer"),
        (human("Why?", "A\n\nHuman: What?"), human("Why?", "B"), "does not end with an answer"),
        (human("Why?", "A\n\nHum: What?"), human("Why?", "B"), "does not end with an answer"),
        (human("Why?", "A\n\nAssistant: C"), human("Why?", "B"), "do not alternate"),
        (human("Why?\n\nHuman: So?", "A"), human("Why?\n\nHuman: So?", "B"), "do not alternate"),
        (human("", "A"), human("", "B"), "an empty turn"),
        (human("Hi", "", "Why?", "A"), human("Hi", "", "Why?", "B"), "an empty turn"),
        ("\n\nAssistant: A", "\n\nAssistant: B", "begins with the human"),
        ("Why? A", "Why? B", "begins with the human"),
        ("", "", "begins with the human"),
    ],
)
def test_transcripts_that_are_no_pair_are_dropped_with_the_reason(chosen, rejected, reason):
    assert reason in dropped("hh_rlhf", {"chosen": chosen, "rejected": rejected})


def test_a_transcript_may_have_markers_and_line_ends_within_a_message():
    better = "Say so.\n\nThen: Human: go on.\nAssistant: is a word."
    row = {
        "chosen": human("Hi", "Hello.", "Why?", better),
        "rejected": human("Hi", "Hello.", "Why?", "B"),
    }
    (pair,), _ = read("hh_rlhf", row)
    assert (pair.chosen, pair.rejected) == (better, "B")
    assert [turn.content for turn in pair.prompt] == ["Hi", "Hello.", "Why?"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (talk("Why?", "A"), talk("Why not?", "B"), "two prompts"),
        (talk("Why?", "A"), talk("Why?", "So?", "What?", "B"), "two prompts"),
        (talk("Why?", "A"), talk("Why?", " A"), "the same response twice"),
        (talk("Why?", "A"), talk("Why?", " \n"), "an empty response"),
        (talk("Why?"), talk("Why?"), "does not end with an answer"),
        ([], talk("Why?", "A"), "does not end with an answer"),
        (talk("Why?", "A")[1:], talk("Why?", "B")[1:], "a prompt without a user turn"),
        (talk(" ", "A"), talk(" ", "B"), "a prompt without a user turn"),
        (talk("Hi", "A")[:1] + talk("", "B", "", "C")[1::2], talk("Hi", "B", "", "D"), "two"),
    ],
)
def test_conversations_that_are_no_pair_are_dropped_with_the_reason(chosen, rejected, reason):
    assert reason in dropped(
        "skywork_v0_2", {"chosen": chosen, "rejected": rejected, "source": "s"}
    )


def test_an_empty_system_message_is_left_away_and_one_that_speaks_is_kept():
    for said, turns in (("", 1), ("Be brief.", 2)):
        system = [{"role": "system", "content": said}]
        row = {side: system + STANDARD[side] for side in STANDARD}
        (pair,), _ = read("pair_data_v2", row)
        assert len(pair.prompt) == turns


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "text", "rejected": talk("Why?", "A")}, "`chosen` must be a list of messages"),
        ({"chosen": talk("Why?", "A"), "rejected": [{"role": "user"}]}, r"`rejected\[0\]`"),
        ({"chosen": [{"role": "gpt", "content": "A"}], "rejected": []}, "role 'gpt'"),
        ({"chosen": talk("Why?", None), "rejected": []}, r"`chosen\[1\]`"),
    ],
)
def test_what_is_no_conversation_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        read("pair_data_v2", row)


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("rlhflow_code_ultrafeedback", "chosen_score", "rejected_score"),
        ("ultrafeedback_argilla", "chosen-rating", "rejected-rating"),
        ("ultrafeedback_h4", "score_chosen", "score_rejected"),
        ("capybara", "chosen_rating", "rejected_rating"),
        ("capybara_7k", "rating_chosen", "rating_rejected"),
        ("distilabel_math", "chosen_rating", "rejected_rating"),
        ("preference_collection", "orig_score_B", "orig_score_A"),
    ],
)
def test_scores_are_no_margin_if_missing_and_no_pair_if_equal_or_against_the_label(
    name, better, worse
):
    row, _, _ = EXPECTED[name]
    for missing in ("N/A", None, "", "None"):
        (pair,), _ = read(name, row, **{better: missing})
        assert pair.margin is None
    assert dropped(name, row, **{better: 3, worse: "3"}) == "equal scores"
    assert dropped(name, row, **{better: 1, worse: 3.5}) == "label and scores disagree"


def test_the_two_labels_of_pku_are_read_apart_and_severities_only_where_they_agree():
    both = {"better_response_id": 0}
    (helpful,), _ = read("pku_saferlhf_better", PKU, **both)
    (safe,), _ = read("pku_saferlhf_safer", PKU, **both)
    assert (helpful.chosen, safe.chosen) == ("Worse.", "Better."), "they often disagree"
    levels = "response_0_severity_level", "response_1_severity_level"
    for severities in ((1, 1), (0, 2), (None, 1)):
        (pair,), _ = read("pku_saferlhf_safer", PKU, **dict(zip(levels, severities, strict=True)))
        assert (pair.chosen, pair.margin) == ("Better.", None)
    older = {key: value for key, value in PKU.items() if "severity" not in key}
    (pair,), _ = read("pku_saferlhf_safer", older)
    assert pair.margin is None
    for label in (2, -1, None, True):
        with pytest.raises(ValueError, match="`safer_response_id` must be one of 0, 1"):
            read("pku_saferlhf_safer", PKU, safer_response_id=label)


def test_shp_without_a_ratio_or_with_a_label_that_is_none_is_no_pair():
    assert "ratio" in dropped("shp", SHP, score_ratio=None)
    assert "ratio" in dropped("shp", SHP, score_ratio=0.5)
    assert dropped("shp", SHP, score_ratio=1.0) == "equal scores"
    with pytest.raises(ValueError, match="`labels` must be one of 0, 1"):
        read("shp", SHP, labels=2)
    (pair,), _ = read("shp", {**SHP, "domain": "legaladvice_validation"})
    assert pair.category == "legaladvice"


def test_summaries_of_news_have_an_article_in_place_of_a_post():
    info = {"id": "0", "post": None, "title": "T", "subreddit": None, "article": "All of it."}
    (pair,), _ = read("summarize_from_feedback", SUMMARY, info=info, extra={"confidence": None})
    assert pair.prompt == (Message("user", "ARTICLE: All of it.\n\nTL;DR:"),)
    assert pair.category == "news"
    reason = dropped("summarize_from_feedback", SUMMARY, info={**info, "article": None})
    assert reason == "a prompt without a user turn at its end"
    (pair,), _ = read("summarize_from_feedback", SUMMARY, choice=0)
    assert pair.chosen == "Worse.", "an index from 0, unlike the labels of other sets"
    with pytest.raises(ValueError, match="`summaries` must have two summaries, has 1"):
        read("summarize_from_feedback", SUMMARY, summaries=SUMMARY["summaries"][:1])


def test_intel_orca_is_filtered_as_its_card_says():
    assert "tie" in dropped("distilabel_intel_orca", ORCA, status="tie")
    assert "less than 8" in dropped("distilabel_intel_orca", ORCA, chosen_score=7.5)
    assert "less than 8" in dropped("distilabel_intel_orca", ORCA, chosen_score=None)
    assert "GSM8K" in dropped("distilabel_intel_orca", ORCA, in_gsm8k_train=True)
    (pair,), _ = read("distilabel_intel_orca", ORCA, rating=None, system="Be brief.")
    assert pair.margin is None
    assert pair.prompt == (Message("system", "Be brief."), Message("user", "Why?"))


RATING = st.sampled_from(["1", "2", "3", "4", "5", "N/A"])


@given(rated=st.lists(st.tuples(RATING, RATING, RATING, RATING), min_size=1, max_size=4))
def test_ultrafeedback_has_all_pairs_whose_mean_aspects_differ(rated):
    completions = [
        {"model": f"m{k}", "response": f"R{k}", "annotations": annotations(*ratings)}
        for k, ratings in enumerate(rated)
    ]
    pairs, reasons = read("ultrafeedback_pairs", ULTRA, completions=completions)
    means = {}
    for k, ratings in enumerate(rated):
        known = [int(rating) for rating in ratings if rating != "N/A"]
        if known:
            means[f"R{k}"] = fmean(known)
    expected = {
        tuple(sorted(two, key=means.get, reverse=True)): abs(means[two[0]] - means[two[1]])
        for two in combinations(means, 2)
    }
    found = {(pair.chosen, pair.rejected): pair.margin for pair in pairs}
    assert found == {two: pytest.approx(gap) for two, gap in expected.items() if gap > 0.0}
    assert len({pair.id for pair in pairs}) == len(pairs)
    assert reasons.count("equal scores") == sum(gap == 0.0 for gap in expected.values())
    assert reasons.count("a response without a score") == len(rated) - len(means)


@pytest.mark.parametrize(
    "annotations", [None, {}, {"honesty": None}, {"honesty": {"Rating": "N/A"}}]
)
def test_a_completion_of_ultrafeedback_without_a_rated_aspect_is_in_no_pair(annotations):
    unrated = {"model": "o", "response": "C", "annotations": annotations}
    pairs, reasons = read(
        "ultrafeedback_pairs", ULTRA, completions=[unrated, *ULTRA["completions"]]
    )
    assert [(pair.chosen, pair.id) for pair in pairs] == [
        ("Better.", "ultrafeedback_pairs/train/1/2-3")
    ]
    assert reasons == ["a response without a score"]


def test_code_ultrafeedback_joins_ratings_by_model():
    pairs, reasons = read(
        "code_ultrafeedback_pairs",
        CODE,
        responses=[
            *CODE["responses"],
            {"model": "o", "response": "C"},
            {"model": "p", "response": "D"},
        ],
        annotations=[*CODE["annotations"], {"model": "o", "rating": "N/A"}],
    )
    assert [(pair.chosen, pair.margin) for pair in pairs] == [("Better.", 3.0)]
    assert reasons == ["a response without a score"] * 2


def test_the_ranked_answers_to_one_message_of_openassistant_make_pairs(tmp_path, caplog):
    def message(id, parent, role, said, **more):
        fields = {"message_id": id, "parent_id": parent, "role": role, "text": said, "lang": "de"}
        return {**fields, "labels": None, "rank": None, "deleted": False, **more}

    rows = [
        message("a2", "q", "assistant", "Better.", rank=0),  # children may stand before parents
        message("q", None, "prompter", "Why?"),
        message("a1", "q", "assistant", "Worse.", rank=2),
        message("a3", "q", "assistant", "Unranked."),
        message("a4", "q", "assistant", "Gone.", rank=1, deleted=True),
        message("p1", "a2", "prompter", "And then?", rank=0),
        message("p2", "a2", "prompter", "So?", rank=1),
        message("b1", "p1", "assistant", "First.", rank=1),
        message("b2", "p1", "assistant", "Second.", rank=0),
        message("c1", "p2", "assistant", "Alone.", rank=0),
    ]
    with caplog.at_level(logging.WARNING):
        pairs = [*stream_adapted_pairs("oasst2_pairs", path=write(tmp_path / "set", rows))]
    assert [
        ([turn.content for turn in pair.prompt], pair.chosen, pair.rejected, pair.margin)
        for pair in pairs
    ] == [
        (["Why?"], "Better.", "Worse.", 2.0),
        (["Why?", "Better.", "And then?"], "Second.", "First.", 1.0),
    ]
    assert len({pair.id for pair in pairs}) == 2
    assert "a response without a score (1)" in caplog.text


def test_judgelms_scores_are_on_its_first_line():
    assert dropped("judgelm", JUDGELM, text="5 5\nBoth.") == "equal scores"
    assert "two scores" in dropped("judgelm", JUDGELM, text="The first.\n5 8")
    (pair,), _ = read("judgelm", JUDGELM, text="8.5 2\n")
    assert (pair.chosen, pair.margin) == ("Worse.", 6.5)


@pytest.mark.parametrize(
    ("name", "tie"),
    [
        ("arena_33k", {"winner": "tie"}),
        ("arena_33k", {"winner": "tie (bothbad)"}),
        ("arena_100k", {"winner": "tie (bothbad)"}),
        ("arena_140k", {"winner": "both_bad"}),
        ("arena_55k", {"winner_model_b": 0, "winner_tie": 1}),
        ("mt_bench_human", {"winner": "tie"}),
        ("mt_bench_human", {"winner": "tie (inconsistent)"}),
    ],
)
def test_ties_of_arenas_are_ties(name, tie):
    row, _, _ = EXPECTED[name]
    (pair,), _ = read(name, row, **tie)
    assert (pair.preference, pair.chosen, pair.rejected) == (0.5, "Worse.", "Better.")


def test_arena_rows_that_are_no_clean_pair_are_dropped_with_the_reason():
    longer = talk("Why?", "A", "So?", "B")
    assert dropped("arena_33k", ARENA, conversation_a=longer) == "several turns"
    assert dropped("arena_100k", ARENA, conversation_a=talk("What?", "A")) == "two prompts"
    assert dropped("arena_100k", ARENA, conversation_a=talk("Why?")) == "no question and answer"
    assert dropped("arena_100k", ARENA, conversation_b=talk("Why?", "")) == "an empty response"
    assert dropped("arena_140k", ARENA_140K, evaluation_order=2) == "several turns"
    image = [{"type": "image", "image": "..."}, {"type": "text", "text": "Why?"}]
    asked = [{"role": "user", "content": image}, ARENA_140K["conversation_a"][1]]
    reason = dropped("arena_140k", ARENA_140K, conversation_a=asked)
    assert reason == "a message with more than text"
    assert dropped("mt_bench_human", MT_BENCH, turn=2) == "several turns"
    with pytest.raises(ValueError, match="`winner` must be one of 'model_a'"):
        read("arena_33k", ARENA, winner="Model A")


def test_blocks_of_text_are_joined():
    answer = {
        "role": "assistant",
        "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}],
    }
    conversation = [ARENA_140K["conversation_b"][0], answer]
    (pair,), _ = read("arena_140k", ARENA_140K, conversation_b=conversation)
    assert pair.chosen == "One.\n\nTwo."


def test_the_turns_of_the_55k_arena_are_json_in_which_some_are_null():
    assert dropped("arena_55k", ARENA_55K, prompt='["a", "b"]') == "several turns"
    assert dropped("arena_55k", ARENA_55K, response_a="[null]") == "an empty response"
    assert dropped("arena_55k", ARENA_55K, response_a="[]") == "an empty response"
    assert dropped("arena_55k", ARENA_55K, response_a='["\\ud83d"]') == "no valid Unicode text"
    (pair,), _ = read("arena_55k", ARENA_55K, response_b='["\\ud83d\\ude00 \\"so\\""]')
    assert pair.chosen == '\U0001f600 "so"'
    with pytest.raises(ValueError, match="`prompt` must be the JSON of a list of texts"):
        read("arena_55k", ARENA_55K, prompt="Why?")
    with pytest.raises(ValueError, match="must be 1, got"):
        read("arena_55k", ARENA_55K, winner_model_a=1)


def write(folder, rows, name="train.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def saved_in(format, folder, rows):
    """A folder of rows, as people download or keep a set."""
    import datasets

    if format == "jsonl":
        write(folder, rows, "train-00000-of-00001.jsonl")
    elif format == "json":
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "train.json").write_text(json.dumps(rows))
    elif format == "parquet":
        (folder / "data").mkdir(parents=True)
        table = datasets.Dataset.from_list(rows)
        table.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    elif format == "csv":
        folder.mkdir()
        datasets.Dataset.from_list(rows).to_csv(str(folder / "train.csv"))
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(folder)
    return str(folder)


FLAT = ["hh_rlhf", "shp", "offsetbias", "pku_saferlhf_better", "arena_55k", "distilabel_math"]
FORMATS = [
    *((name, "csv") for name in FLAT),
    *(
        (name, format)
        for name in (*FLAT, "helpsteer3_preference", "skywork_v0_2", "magpie_pro", "arena_140k")
        for format in ("jsonl", "json", "parquet", "saved")
    ),
]


@pytest.mark.parametrize(("name", "format"), FORMATS)
def test_a_local_folder_gives_the_same_pair_in_every_format(tmp_path, name, format):
    row, _, _ = EXPECTED[name]
    row = {key: value for key, value in row.items() if not isinstance(value, dict)}
    path = saved_in(format, tmp_path / "set", [row])
    (pair,) = stream_adapted_pairs(name, path=path)
    (expected,), _ = read(name, row)
    assert pair.id.startswith(f"{name}/train")
    assert pair.place.startswith(str(tmp_path))
    assert {**fields(pair), "id": "", "place": ""} == {**fields(expected), "id": ""}


def fields(pair):
    return {name: getattr(pair, name) for name in PreferencePair.__dataclass_fields__}


@pytest.fixture
def hub(monkeypatch):
    """What stands on the hub, by id, and what was asked of it."""
    import datasets

    sets, asked = {}, []

    def load_dataset(path, **asked_for):
        asked.append({"path": path, **asked_for})
        if path not in sets:
            raise ConnectionError("Couldn't reach the hub")
        return iter(sets[path])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return sets, asked


def test_the_hub_is_asked_for_the_part_of_a_set_that_the_adapter_reads(hub):
    sets, asked = hub
    sets["nvidia/HelpSteer2"] = [STEER2, {**STEER2, "preference_strength": 0}]
    sets["nvidia/HelpSteer3"] = [STEER3]
    sets["lmsys/mt_bench_human_judgments"] = [MT_BENCH]
    pairs = [*stream_adapted_pairs("helpsteer2_preference", revision="abc")]
    assert [(p.id, p.preference, p.margin) for p in pairs] == [
        ("helpsteer2_preference/train/1", pytest.approx(2 / 3), 2.0),
        ("helpsteer2_preference/train/2", 0.5, 0.0),
    ]
    [*stream_adapted_pairs("helpsteer3_preference")]
    [*stream_adapted_pairs("mt_bench_human")]
    wanted = [
        {key: call[key] for key in ("split", "data_dir", "name", "revision")} for call in asked
    ]
    assert wanted == [
        {"split": "train", "data_dir": "preference", "name": None, "revision": "abc"},
        {"split": "train", "data_dir": None, "name": "preference", "revision": None},
        {"split": "human", "data_dir": None, "name": None, "revision": None},
    ]
    with pytest.raises(DataError, match=r"Skywork-Reward.*ConnectionError"):
        [*stream_adapted_pairs("skywork_v0_2")]


def test_a_set_is_read_as_it_is_asked_for(hub):
    sets, _ = hub
    taken = []

    def rows():
        for k in range(1_000_000):
            taken.append(k)
            yield STANDARD

    sets["RLHFlow/pair_data_v2_80K_wsafety"] = rows()
    stream = stream_adapted_pairs("pair_data_v2")
    assert [next(stream).id for _ in range(2)] == ["pair_data_v2/train/1", "pair_data_v2/train/2"]
    assert len(taken) <= 3


def test_what_is_dropped_is_counted_by_reason(tmp_path, caplog):
    rows = [
        ORCA,
        {**ORCA, "status": "tie"},
        {**ORCA, "status": "tie"},
        {**ORCA, "in_gsm8k_train": True},
    ]
    with caplog.at_level(logging.WARNING):
        pairs = [*stream_adapted_pairs("distilabel_intel_orca", path=write(tmp_path / "s", rows))]
    assert len(pairs) == 1
    assert "a tie by its judge (2), a question of GSM8K's training set (1)" in caplog.text
    with pytest.raises(DataError, match="no rows"):
        [*stream_adapted_pairs("distilabel_intel_orca", path=write(tmp_path / "s", rows[1:]))]


def test_a_pair_in_both_orders_is_one_judgement(tmp_path, caplog):
    swapped = {
        **PROMETHEUS,
        "orig_response_A": "Better.",
        "orig_response_B": "Worse.",
        "orig_preference": "A",
        "orig_score_A": "5",
        "orig_score_B": "2",
    }
    other = {**PROMETHEUS, "orig_instruction": "Why not?"}
    path = write(tmp_path / "set", [PROMETHEUS, other, swapped])
    with caplog.at_level(logging.WARNING):
        pairs = [*stream_adapted_pairs("preference_collection", path=path)]
    assert [pair.prompt[0].content for pair in pairs] == ["Why?", "Why not?"]
    assert "left out: a pair that was there in the other order (1)" in caplog.text


def test_small_margins_and_many_pairs_of_a_prompt_are_left_out_and_counted(tmp_path, caplog):
    rows = [{**SHP, "score_ratio": ratio} for ratio in (4, 1.5, 3, 2.5, 8)]
    rows += [{**SHP, "history": "Why not?", "score_ratio": 2}]
    path = write(tmp_path / "set", rows)
    with caplog.at_level(logging.WARNING):
        pairs = [*stream_adapted_pairs("shp", path=path, min_margin=0.6931, pairs_per_prompt=2)]
    assert [round(math.exp(pair.margin), 6) for pair in pairs] == [4, 3, 2]
    assert "left out: a margin below 0.6931 (1), more than 2 pairs of one prompt (2)" in caplog.text
    caplog.clear()
    assert len([*stream_adapted_pairs("shp", path=path)]) == 6
    assert not caplog.records
    with pytest.raises(DataError, match="shp: no pair has a margin from `min_margin=3` on"):
        [*stream_adapted_pairs("shp", path=path, min_margin=3)]
    with pytest.raises(ValueError, match="`pairs_per_prompt` must be from 1 on, or null, got 0"):
        stream_adapted_pairs("shp", path=path, pairs_per_prompt=0)
    path = write(tmp_path / "arena", [ARENA])
    assert len([*stream_adapted_pairs("arena_33k", path=path, min_margin=1.0)]) == 1


def test_pairs_may_judge_an_objective_by_source_or_category(tmp_path):
    objectives = ObjectiveSet.from_mapping({"safe": {"low": 0, "high": 1}})
    path = write(tmp_path / "set", [{**STANDARD, "source": "wildguard"}])
    for judges, judgements in (
        ({"safe": ["wildguard"]}, {"safe": 1.0}),
        ({"safe": ["skywork_v0_2"]}, {"safe": 1.0}),
        ({"safe": ["magpie"]}, {}),
        (None, {}),
    ):
        (pair,) = stream_adapted_pairs(
            "skywork_v0_2", path=path, objectives=objectives, judges=judges
        )
        assert pair.judgements == judgements
    path = write(tmp_path / "arena", [{**ARENA, "winner": "tie"}])
    (pair,) = stream_adapted_pairs("arena_33k", path=path, judges={"charm": ["arena_33k"]})
    assert pair.judgements == {"charm": 0.5}
    with pytest.raises(ValueError, match="'kind' is not declared"):
        stream_adapted_pairs("shp", objectives=objectives, judges={"kind": ["shp"]})


def test_what_cannot_be_read_is_one_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="`dataset` is 'shpp'; there are helpsteer2_preference"):
        stream_adapted_pairs("shpp")
    path = write(tmp_path / "set", [STANDARD])
    with pytest.raises(DataError, match=r"no column history.*which shp needs; there are chosen"):
        [*stream_adapted_pairs("shp", path=path)]
    path = write(tmp_path / "lines", [{**STANDARD, "a\nb": 1}])
    with pytest.raises(DataError, match=r"there are chosen, rejected, 'a\\nb'$"):
        [*stream_adapted_pairs("shp", path=path)]
    path = write(tmp_path / "bad", [SHP, {**SHP, "labels": 3}])
    with pytest.raises(DataError, match=r"train.jsonl:2: field `labels` must be one of 0, 1"):
        [*stream_adapted_pairs("shp", path=path)]


def test_bad_pairs_are_skipped_and_counted_where_asked_for(tmp_path, caplog):
    good = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: No.",
    }
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, {**good, "chosen": 5}, good)))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: "):
        [*stream_adapted_pairs("hh_rlhf", path=str(path))]
    pairs = [*stream_adapted_pairs("hh_rlhf", path=str(path), on_bad_row="skip")]
    assert [pair.chosen for pair in pairs] == ["Hello.", "Hello."]
    assert "left out 1 of 3 rows that cannot be used" in caplog.text
