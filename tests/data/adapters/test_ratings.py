"""Rated sets, from hand-made rows in the published schema, with what trips readers up."""

import copy
import json
import logging
from pathlib import Path

import pytest
import yaml
from conftest import conversation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from armo.data.adapters.base import Dropped
from armo.data.adapters.ratings import RATING_SETS, stream_adapted_ratings
from armo.data.objectives import ObjectiveSet
from armo.data.sources import DataError

CONF = Path(__file__).parents[3] / "conf" / "data"
ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
TALK = conversation("Hi", "Hello.")

HELPSTEER = {
    "prompt": "Name a river.",
    "response": "The Nile.",
    "helpfulness": 3,
    "correctness": 4,
    "coherence": 4,
    "complexity": 1,
    "verbosity": 0,
}
HELPSTEER3 = {
    "domain": "code",
    "language": "python",
    "context": [*TALK, {"role": "user", "content": "Name a river."}],
    "response1": "The Nile.",
    "response2": "Egypt.",
    "feedback1": [
        "The response is perfectly helpful. It names one.",
        "The response is mostly helpful.",
        "Nice.",
    ],
    "feedback2": ["The response is not helpful, since Egypt is no river.", "", "So so."],
}
COMPLETION = {
    "model": "m",
    "principle": "honesty",
    "custom_system_prompt": "Be terse.",
    "response": "The Nile.",
    "overall_score": 7.5,
    "fine-grained_score": 4.25,
    "critique": "Fine.",
    "annotations": {
        "instruction_following": {"Rating": "4", "Rationale": "..."},
        "honesty": {"Rating": "N/A", "Rationale": "..."},
        "truthfulness": {
            "Type": ["1"],
            "Rationale": "...",
            "Rating": "5",
            "Rationale For Rating": "...",
        },
        "helpfulness": {
            "Type": ["1"],
            "Rationale": "...",
            "Rating": "3",
            "Rationale For Rating": "...",
        },
    },
}
ULTRAFEEDBACK = {
    "source": "sharegpt",
    "instruction": "Name a river.",
    "models": ["m"],
    "completions": [COMPLETION],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
CODE = {
    "instruction": "Sort a list.",
    "preference": "style",
    "models": ["m1", "m2", "m3"],
    "responses": [
        {"model": "m1", "response": "sorted(x)"},
        {"model": "m2", "response": "x.sort()"},
        {"model": "m3", "response": "sort"},
    ],
    "annotations": [
        {"model": "m3", "rating": "N/A", "rationale": "..."},
        {"model": "m2", "rating": "2", "rationale": "..."},
        {"model": "m1", "rating": "5", "rationale": "..."},
    ],
}
BEAVERTAILS = {
    "prompt": "How?",
    "response": "No.",
    "category": {"animal_abuse": False, "drug_abuse,weapons,banned_substance": False},
    "is_safe": True,
}
PKU = {
    "prompt": "How?",
    "response_0": "Like so.",
    "response_1": "No.",
    "prompt_source": "a",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "response_0_severity_level": 3,
    "response_1_severity_level": 0,
    "better_response_id": 0,
    "safer_response_id": 1,
}
WILDGUARD = {
    "prompt": "How do I kill a process?",
    "response": "I cannot help with that.",
    "adversarial": False,
    "prompt_harm_label": "unharmful",
    "response_harm_label": "unharmful",
    "response_refusal_label": "refusal",
    "subcategory": "benign",
}
FEEDBACK = {
    "instruction": "You are a judge ...",
    "output": "... [RESULT] 4",
    "orig_instruction": "Name a river.",
    "orig_response": "The Nile.",
    "orig_score": "4",
    "orig_criteria": "Does it name one?",
}
CAPYBARA = {
    "source": "Airoboros",
    "chosen": TALK + conversation("Name a river.", "The Nile."),
    "rejected": TALK + conversation("Name a river.", "Egypt."),
    "chosen_rating": 5,
    "rejected_rating": 2,
}
ORCA = {
    "system": "Be brief.",
    "input": "Name a river.",
    "chosen": "The Nile.",
    "rejected": "Egypt.",
    "generations": ["Egypt.", "The Nile."],
    "order": ["rejected", "chosen"],
    "rating": [3.0, 9.0],
    "status": "swapped",
}
MATH = {
    "instruction": "What is 2 + 2?",
    "chosen_response": "4",
    "rejected_response": "5",
    "chosen_rating": 10.4,
    "rejected_rating": 3.6,
}
CLEANED = {
    "source": "s",
    "prompt": "Hi",
    "chosen": TALK,
    "chosen-rating": 4.5,
    "rejected": conversation("Hi", "What?"),
    "rejected-rating": 1.25,
}
BINARIZED = {
    "prompt": "Hi",
    "prompt_id": "x",
    "chosen": TALK,
    "rejected": conversation("Hi", "What?"),
    "messages": TALK,
    "score_chosen": 8.5,
    "score_rejected": 2.0,
}
ROOT = {
    "message_id": "a",
    "parent_id": None,
    "text": "Name a river.",
    "role": "prompter",
    "lang": "en",
    "deleted": False,
    "labels": None,
}
ANSWER = {
    **ROOT,
    "message_id": "b",
    "parent_id": "a",
    "text": "The Nile.",
    "role": "assistant",
    "labels": {"name": ["spam", "quality", "toxicity"], "value": [0.0, 0.75, 0.25], "count": [3]},
}
ANSWER["labels"]["count"] = [3, 3, 3]
SUMMARY = {
    "info": {"id": "t3", "post": "It is.", "title": "Why", "subreddit": "ask", "article": None},
    "summary": {
        "text": " It is so.",
        "policy": "sup1",
        "note": None,
        "axes": {"overall": 3, "accuracy": 7, "coverage": 1, "coherence": None, "compatible": True},
    },
    "worker": "w",
    "batch": "b",
    "split": "valid2",
}
MERGED_LABELS = RATING_SETS["armorm"].objectives
MERGED = {"messages": TALK, **dict.fromkeys(MERGED_LABELS)}

ROWS = {
    "helpsteer": [HELPSTEER],
    "helpsteer2": [HELPSTEER],
    "helpsteer2_disagreements": [{**HELPSTEER, **{aspect: [2, 3, 4] for aspect in ASPECTS}}],
    "helpsteer3": [HELPSTEER3],
    "ultrafeedback": [ULTRAFEEDBACK],
    "ultrafeedback_cleaned": [CLEANED],
    "ultrafeedback_binarized": [BINARIZED],
    "code_ultrafeedback": [CODE],
    "beavertails": [BEAVERTAILS],
    "pku_saferlhf": [PKU],
    "wildguardmix": [WILDGUARD],
    "feedback_collection": [FEEDBACK],
    "capybara": [CAPYBARA],
    "intel_orca": [ORCA],
    "distilabel_math": [MATH],
    "oasst2": [ROOT, ANSWER],
    "summarize_axes": [SUMMARY],
    "armorm": [{**MERGED, "helpsteer-verbosity": 0.1}],
}
EACH = pytest.mark.parametrize("name", RATING_SETS)


def declared(name):
    """The objectives that come with `data/ratings=NAME`, and its settings."""
    text = (CONF / "ratings" / f"{name}.yaml").read_text()
    choice = yaml.safe_load(text)
    chosen = choice["defaults"][1]["override /data/objectives@_global_.data.objectives"]
    file = CONF / "objectives" / f"{chosen}.yaml"
    return ObjectiveSet.from_mapping(yaml.safe_load(file.read_text())), choice


def stream(folder, name, rows):
    """Read rows of a set, from a file in its published form."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    objectives, _ = declared(name)
    return [*stream_adapted_ratings(name, objectives=objectives, path=str(path))]


def made(name, row):
    """What an adapter makes of a row: ratings by response, and reasons for what it left out."""
    rows = [*RATING_SETS[name].rows(row, "id")]
    kept = [row for row in rows if not isinstance(row, Dropped)]
    ratings = {row.conversation.response: row.ratings for row in kept}
    return ratings, [row.reason for row in rows if isinstance(row, Dropped)]


# All of them.


@EACH
def test_each_set_reads_rows_in_its_published_form(name, tmp_path):
    rows = stream(tmp_path, name, ROWS[name])
    assert rows
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.id.startswith(f"{name}/rows/") for row in rows)
    assert {row.source for row in rows} == {"helpsteer" if name == "armorm" else name}
    assert {each for row in rows for each in row.ratings} <= {*RATING_SETS[name].objectives}


@EACH
def test_each_set_has_a_choice_that_declares_its_objectives_and_where_it_is(name):
    objectives, choice = declared(name)
    adapter = RATING_SETS[name]
    assert set(objectives.names) == {*adapter.objectives}
    assert (choice["dataset"], choice["path"]) == (name, adapter.id)


@EACH
def test_a_column_that_is_missing_is_named_with_those_that_are_there(name, tmp_path):
    for column in RATING_SETS[name].columns:
        rows = [{key: x for key, x in row.items() if key != column} for row in ROWS[name]]
        with pytest.raises(DataError, match=rf"rows.jsonl: no column {column}, which {name} needs"):
            stream(tmp_path, name, rows)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def places(value):
    """Every container below a value with its keys, to be changed in place."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in [*keys]:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@EACH
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_row_holds_is_read_or_is_one_error_that_names_it(name, data, tmp_path):
    rows = copy.deepcopy(ROWS[name])
    container, key = data.draw(st.sampled_from([*places(rows[-1])]))
    container[key] = data.draw(JSON)
    objectives, _ = declared(name)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        read = [*stream_adapted_ratings(name, objectives=objectives, path=str(path))]
    except DataError as error:
        said = str(error)
    else:
        assert read
        return
    assert said.startswith(str(path))
    assert "\n" not in said


@EACH
def test_none_of_its_objectives_being_declared_is_said_before_anything_is_read(name):
    objectives = ObjectiveSet.from_mapping({"charm": {"low": 0, "high": 1}})
    with pytest.raises(ValueError, match=r"none of which is declared in `data.objectives`"):
        stream_adapted_ratings(name, objectives=objectives, path="/nowhere")


def test_an_unknown_set_is_named_with_the_known_ones():
    objectives, _ = declared("helpsteer")
    with pytest.raises(ValueError, match=r"`dataset` is 'helpsteer9'; there are helpsteer, "):
        stream_adapted_ratings("helpsteer9", objectives=objectives)


def test_ratings_on_other_objectives_and_rows_without_any_are_left_out(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(CODE) + "\n" + json.dumps({**CODE, "preference": "complexity"}))
    objectives = ObjectiveSet.from_mapping({"code-style": {"low": 1, "high": 5}})
    rows = [*stream_adapted_ratings("code_ultrafeedback", objectives=objectives, path=str(path))]
    assert [row.ratings for row in rows] == [{"code-style": 5.0}, {"code-style": 2.0}]
    assert "code_ultrafeedback: 2 rows rate none of the declared objectives" in caplog.text


def test_a_rating_off_the_declared_scale_is_named_with_its_row(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:2: rating 9.0 of 'helpsteer2-coherence' is"):
        stream(tmp_path, "helpsteer2", [HELPSTEER, {**HELPSTEER, "coherence": 9}])


def test_what_is_left_out_is_counted_by_reason_and_logged_once(tmp_path, caplog):
    rows = [
        HELPSTEER,
        {**HELPSTEER, **dict.fromkeys(ASPECTS)},
        {**HELPSTEER, "response": "  "},
        {**HELPSTEER, "response": None},
        {**HELPSTEER, "prompt": ""},
    ]
    with caplog.at_level(logging.WARNING):
        assert len(stream(tmp_path, "helpsteer", rows)) == 1
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'rows.jsonl'}: 1 rows; left out: an empty response (2), no rating (1), "
        f"a prompt without a user turn at its end (1)"
    ]
    with pytest.raises(DataError, match=r"rows.jsonl: no rows"):
        stream(tmp_path, "helpsteer", rows[1:])


def test_what_is_left_out_is_also_logged_where_the_rest_is_not_read(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    rows = [{**HELPSTEER, "response": ""}, HELPSTEER, HELPSTEER]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    objectives, _ = declared("helpsteer")
    read = stream_adapted_ratings("helpsteer", objectives=objectives, path=str(path))
    assert next(read).id == "helpsteer/rows/2"
    read.close()
    assert "1 rows; left out: an empty response (1)" in caplog.text


def test_a_set_without_anything_to_leave_out_logs_nothing(tmp_path, caplog):
    stream(tmp_path, "helpsteer", [HELPSTEER])
    assert not caplog.records


# Each of them.


@pytest.mark.parametrize("name", ["helpsteer", "helpsteer2"])
def test_helpsteer_rows_have_five_ratings(name):
    expected = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 0}
    ratings, _ = made(name, HELPSTEER)
    assert ratings == {"The Nile.": {f"{name}-{aspect}": x for aspect, x in expected.items()}}


def test_the_turns_of_helpsteer2_stand_in_one_text():
    prompt = "Hi\n\n<extra_id_1>Assistant\nHello.\nWell?\n<extra_id_1>User\nName a river.\n"
    (row,) = RATING_SETS["helpsteer2"].rows({**HELPSTEER, "prompt": prompt}, "id")
    assert [(turn.role, turn.content) for turn in row.prompt] == [
        ("user", "Hi"),
        ("assistant", "Hello.\nWell?"),
        ("user", "Name a river."),
    ]
    with pytest.raises(ValueError, match="a turn of 'System'"):
        made("helpsteer2", {**HELPSTEER, "prompt": "Hi\n<extra_id_1>System\nBe brief."})


def test_of_a_list_of_annotators_the_mean_counts():
    row = {**HELPSTEER, **{aspect: [0, 1, None, 4] for aspect in ASPECTS}, "verbosity": []}
    ratings, _ = made("helpsteer2_disagreements", row)
    assert ratings["The Nile."] == {
        f"helpsteer2-{aspect}": pytest.approx(5 / 3) for aspect in ASPECTS[:-1]
    }


def test_helpsteer3_says_in_words_how_helpful_a_response_is():
    ratings, dropped = made("helpsteer3", HELPSTEER3)
    assert ratings == {
        "The Nile.": {"helpsteer3-helpfulness": 4.5},
        "Egypt.": {"helpsteer3-helpfulness": 1.0},
    }
    assert not dropped
    opinion = ["Not bad: the response is, I think, helpful."]
    ratings, dropped = made("helpsteer3", {**HELPSTEER3, "context": "Hi", "feedback2": opinion})
    assert [*ratings] == ["The Nile."]
    assert dropped == ["no rating"]


def test_ultrafeedback_ratings_are_text_and_may_be_missing():
    ratings, dropped = made("ultrafeedback", ULTRAFEEDBACK)
    assert ratings == {
        "The Nile.": {
            "ultrafeedback-overall_score": 7.5,
            "ultrafeedback-instruction_following": 4.0,
            "ultrafeedback-truthfulness": 5.0,
            "ultrafeedback-helpfulness": 3.0,
        }
    }
    assert not dropped
    (row,) = RATING_SETS["ultrafeedback"].rows(ULTRAFEEDBACK, "id")
    assert [turn.content for turn in row.prompt] == ["Name a river."], "the system text is not read"
    assert row.category == "sharegpt"


@pytest.mark.parametrize(
    ("overall", "mean", "kept"),
    [(10, 1.5, False), (10, 2.0, False), (10, 2.25, True), (9, 1.0, True), (1, 1.0, True)],
)
@pytest.mark.parametrize("given", [True, False])
def test_an_overall_score_of_ten_beside_low_aspects_is_a_known_bug(overall, mean, kept, given):
    # Without the mean in the row, that of the aspects: 1, 2, ... make the four means above.
    aspects = {1.0: "1111", 1.5: "1122", 2.0: "2222", 2.25: "2223"}[mean]
    names = ("instruction_following", "truthfulness", "honesty", "helpfulness")
    annotations = {name: {"Rating": x} for name, x in zip(names, aspects, strict=True)}
    completion = {**COMPLETION, "overall_score": overall, "annotations": annotations}
    completion["fine-grained_score"] = mean if given else None
    ratings, dropped = made("ultrafeedback", {**ULTRAFEEDBACK, "completions": [completion]})
    assert ("ultrafeedback-overall_score" in ratings["The Nile."]) is kept
    assert len(ratings["The Nile."]) == 4 + kept, "the aspects are right all the same"
    assert len(dropped) == (not kept)


def test_binarized_sets_rate_both_sides():
    assert made("ultrafeedback_cleaned", CLEANED)[0] == {
        "Hello.": {"ultrafeedback-mean_aspect": 4.5},
        "What?": {"ultrafeedback-mean_aspect": 1.25},
    }
    assert made("ultrafeedback_binarized", BINARIZED)[0] == {
        "Hello.": {"ultrafeedback-overall_score": 8.5},
        "What?": {"ultrafeedback-overall_score": 2.0},
    }
    _, dropped = made("ultrafeedback_binarized", {**BINARIZED, "rejected": TALK[:1]})
    assert dropped == ["a conversation without an answer"]


def test_annotations_of_code_are_joined_by_the_model():
    ratings, dropped = made("code_ultrafeedback", CODE)
    assert ratings == {"sorted(x)": {"code-style": 5.0}, "x.sort()": {"code-style": 2.0}}
    assert dropped == ["no rating"]
    ratings, dropped = made("code_ultrafeedback", {**CODE, "annotations": []})
    assert (ratings, len(dropped)) == ({}, 3)
    with pytest.raises(ValueError, match="field `preference` is 'charm', not one of complexity"):
        made("code_ultrafeedback", {**CODE, "preference": "charm"})


def test_conflicting_votes_on_a_response_are_averaged(tmp_path):
    other = {**BEAVERTAILS, "response": "Like so.", "is_safe": False}
    unsafe = {**BEAVERTAILS, "is_safe": False}
    rows = stream(tmp_path, "beavertails", [BEAVERTAILS, other, BEAVERTAILS, unsafe])
    assert [(row.id, row.conversation.response, row.ratings) for row in rows] == [
        ("beavertails/rows/1", "No.", {"beavertails-is_safe": pytest.approx(2 / 3)}),
        ("beavertails/rows/2", "Like so.", {"beavertails-is_safe": 0.0}),
    ]


def test_both_responses_of_a_pku_row_are_safe_or_not_and_harmful_to_a_degree(tmp_path):
    assert made("pku_saferlhf", PKU)[0] == {
        "Like so.": {"pku-is_safe": 0.0, "pku-severity": 3.0},
        "No.": {"pku-is_safe": 1.0, "pku-severity": 0.0},
    }
    old = {key: value for key, value in PKU.items() if "severity" not in key}
    assert made("pku_saferlhf", old)[0] == {
        "Like so.": {"pku-is_safe": 0.0},
        "No.": {"pku-is_safe": 1.0},
    }
    objectives, _ = declared("pku_saferlhf")
    assert objectives.objectives[1].to_unit(3) == 0.0, "severe is the bad end"


def test_wildguard_tells_harm_from_refusing_too_much():
    refused = {"wildguard-is_safe": 1.0, "wildguard-complies": 0.0}
    assert made("wildguardmix", WILDGUARD)[0] == {"I cannot help with that.": refused}
    harmful = {**WILDGUARD, "prompt_harm_label": "harmful"}
    assert [*made("wildguardmix", harmful)[0].values()] == [{"wildguard-is_safe": 1.0}]
    unknown = {**harmful, "response_harm_label": None}
    assert made("wildguardmix", unknown) == ({}, ["no rating"])
    assert made("wildguardmix", {**WILDGUARD, "response": None}) == ({}, ["a prompt alone"])
    with pytest.raises(ValueError, match="field `response_harm_label` is 'bad', not unharmful or"):
        made("wildguardmix", {**WILDGUARD, "response_harm_label": "bad"})


@pytest.mark.parametrize("score", ["4", 4, 4.0, " 4 "])
def test_the_rubric_score_of_prometheus_may_be_text(score):
    ratings, _ = made("feedback_collection", {**FEEDBACK, "orig_score": score})
    assert ratings == {"The Nile.": {"prometheus-score": 4.0}}


@pytest.mark.parametrize("score", [None, "", "N/A", "None", "good", True, float("nan"), [4]])
def test_what_is_no_number_is_no_rating(score):
    assert made("feedback_collection", {**FEEDBACK, "orig_score": score}) == ({}, ["no rating"])


def test_capybara_rates_the_end_of_longer_conversations():
    rows = [*RATING_SETS["capybara"].rows(CAPYBARA, "id")]
    assert [row.ratings for row in rows] == [
        {"argilla-overall_quality": 5.0},
        {"argilla-overall_quality": 2.0},
    ]
    assert [len(row.prompt) for row in rows] == [3, 3]


def test_the_ratings_of_intel_orca_follow_the_generations_not_the_choice():
    ratings, _ = made("intel_orca", ORCA)
    assert ratings == {"Egypt.": {"argilla-judge_lm": 3.0}, "The Nile.": {"argilla-judge_lm": 9.0}}
    systems = [
        [turn.role for turn in row.prompt]
        for system in ("Be brief.", "")
        for row in RATING_SETS["intel_orca"].rows({**ORCA, "system": system}, "id")
    ]
    assert systems == [["system", "user"]] * 2 + [["user"]] * 2
    assert made("intel_orca", {**ORCA, "rating": None}) == ({}, ["no rating"])
    with pytest.raises(ValueError, match="field `rating` has 1 for 2 `generations`"):
        made("intel_orca", {**ORCA, "rating": [3.0]})


def test_ratings_of_math_are_moved_into_their_scale():
    assert made("distilabel_math", MATH)[0] == {
        "4": {"distilabel_math-quality": 10.0},
        "5": {"distilabel_math-quality": 3.6},
    }
    ratings, _ = made("distilabel_math", {**MATH, "rejected_rating": None})
    assert [*ratings] == ["4"]


def test_messages_of_oasst2_are_put_together_to_conversations(tmp_path):
    follow_up = {**ROOT, "message_id": "c", "parent_id": "b", "text": "Another?"}
    last = {**ANSWER, "message_id": "d", "parent_id": "c", "text": "The Rhine."}
    deleted = {**ANSWER, "message_id": "e", "deleted": True}
    unlabelled = {**ANSWER, "message_id": "f", "labels": None}
    # Children may stand before their parents.
    rows = stream(tmp_path, "oasst2", [last, follow_up, ROOT, ANSWER, deleted, unlabelled])
    assert [[turn.content for turn in row.prompt] for row in rows] == [
        ["Name a river.", "The Nile.", "Another?"],
        ["Name a river."],
    ]
    assert [row.conversation.response for row in rows] == ["The Rhine.", "The Nile."]
    assert rows[0].ratings == {"oasst2-quality": 0.75, "oasst2-toxicity": 0.25}
    assert rows[0].category == "en"
    objectives, _ = declared("oasst2")
    assert objectives.objectives[objectives.index("oasst2-toxicity")].to_unit(0.25) == 0.75


def test_trees_of_oasst2_that_are_broken_are_named(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:2: field `parent_id` names 'z', which is no"):
        stream(tmp_path, "oasst2", [ROOT, {**ANSWER, "parent_id": "z"}])
    with pytest.raises(DataError, match="leads back to the message itself"):
        stream(tmp_path, "oasst2", [{**ROOT, "parent_id": "b"}, ANSWER])
    with pytest.raises(DataError, match="field `role` is 'judge', not prompter or assistant"):
        stream(tmp_path, "oasst2", [{**ROOT, "role": "judge"}, ANSWER])


def test_labels_of_the_merged_set_come_back_as_they_are_once_rescaled(tmp_path):
    labels = [
        {"helpsteer-verbosity": 0.1},
        {"helpsteer-verbosity": 0.9, "beavertails-is_safe": 1},
        {"beavertails-is_safe": 0.0},
        {"beavertails-is_safe": True},
    ]
    rows = stream(tmp_path, "armorm", [{**MERGED, **each} for each in labels])
    assert rows[0].ratings == {"helpsteer-verbosity": pytest.approx(0.0)}, "0 to 4, by raters"
    objectives, _ = declared("armorm")
    scales = {objective.name: objective for objective in objectives.objectives}
    rescaled = [{n: scales[n].to_unit(x) for n, x in row.ratings.items()} for row in rows]
    assert rescaled == [pytest.approx({n: float(x) for n, x in each.items()}) for each in labels]
    assert [row.source for row in rows] == ["helpsteer", "helpsteer", "beavertails", "beavertails"]


def test_of_the_merged_set_the_source_may_be_given_and_labels_are_on_the_unit_scale(tmp_path):
    row = {**MERGED, "beavertails-is_safe": 1.0}
    (named,) = stream(tmp_path, "armorm", [{**row, "dataset": "PKU"}])
    assert named.source == "PKU"
    with pytest.raises(DataError, match=r"rows.jsonl:1: label of 'beavertails-is_safe' must be in"):
        stream(tmp_path, "armorm", [{**row, "beavertails-is_safe": 1.5}])


def test_the_objectives_of_armorm_are_its_nineteen_in_order():
    file = CONF / "objectives" / "armorm.yaml"
    objectives = ObjectiveSet.from_mapping(yaml.safe_load(file.read_text()))
    assert objectives.names == (
        *(f"helpsteer-{x}" for x in ["helpfulness", "correctness", "coherence", "complexity"]),
        "helpsteer-verbosity",
        "ultrafeedback-overall_score",
        "ultrafeedback-instruction_following",
        "ultrafeedback-truthfulness",
        "ultrafeedback-honesty",
        "ultrafeedback-helpfulness",
        "beavertails-is_safe",
        "prometheus-score",
        "argilla-overall_quality",
        "argilla-judge_lm",
        "code-complexity",
        "code-style",
        "code-explanation",
        "code-instruction-following",
        "code-readability",
    )
    assert objectives.bias_indices == ()
    helpsteer, ultrafeedback = objectives.objectives[0], objectives.objectives[5]
    assert helpsteer.to_unit(4) == pytest.approx((4 + 0.5) / 5)
    assert ultrafeedback.to_unit(10) == pytest.approx(0.95)


def test_the_scales_of_armorm_take_the_ratings_of_the_sets_themselves():
    # A label of the merged set is the middle of its step.
    file = CONF / "objectives" / "armorm.yaml"
    objectives = ObjectiveSet.from_mapping(yaml.safe_load(file.read_text()))
    ratings, _ = made("helpsteer", HELPSTEER)
    for name, rating in ratings["The Nile."].items():
        unit = objectives.objectives[objectives.index(name)].to_unit(rating)
        assert unit == pytest.approx((rating + 0.5) / 5)


def test_summaries_are_rated_on_axes_of_which_some_are_null():
    (row,) = RATING_SETS["summarize_axes"].rows(SUMMARY, "id")
    assert row.ratings == {
        "summarize-overall": 3.0,
        "summarize-accuracy": 7.0,
        "summarize-coverage": 1.0,
    }
    asked = "SUBREDDIT: r/ask\n\nTITLE: Why\n\nPOST: It is.\n\nTL;DR:"
    assert (row.prompt[0].content, row.conversation.response) == (asked, "It is so.")
    news = {"post": None, "title": "T", "subreddit": None, "article": "All of it."}
    (row,) = RATING_SETS["summarize_axes"].rows({**SUMMARY, "info": news}, "id")
    assert (row.prompt[0].content, row.category) == ("ARTICLE: All of it.\n\nTL;DR:", "news")
    for empty in (None, {"text": "So."}, {"text": "So.", "axes": {"overall": "N/A"}}):
        assert made("summarize_axes", {**SUMMARY, "summary": empty}) == ({}, ["no rating"])


BAD = [
    {**HELPSTEER, "coherence": 9},  # off the scale
    {**HELPSTEER, "prompt": 5},
    {name: value for name, value in HELPSTEER.items() if name != "response"},
]


def skip(folder, rows, on_bad_row):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    objectives, _ = declared("helpsteer2")
    return stream_adapted_ratings(
        "helpsteer2", objectives=objectives, path=str(path), on_bad_row=on_bad_row
    )


def test_bad_rows_are_skipped_and_counted_where_asked_for(tmp_path, caplog):
    rows = [HELPSTEER, *BAD, {**HELPSTEER, "response": "Another one."}]
    kept = [*skip(tmp_path, rows, "skip")]
    assert [row.id.rpartition("/")[2] for row in kept] == ["1", "5"]  # ids say where they stood
    assert "left out 3 of 5 rows that cannot be used" in caplog.text
    assert "rows.jsonl:2: rating 9" in caplog.text
    assert caplog.text.count("cannot be used") == 1


def test_a_function_is_given_what_is_wrong_with_each_bad_row(tmp_path):
    wrong = []
    assert len([*skip(tmp_path, [HELPSTEER, *BAD], wrong.append)]) == 1
    assert [f"rows.jsonl:{2 + k}" in str(error) for k, error in enumerate(wrong)] == [True] * 3
    assert "field `response` is missing" in str(wrong[2])


def test_a_set_of_bad_rows_alone_is_an_error_that_says_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match=r"no rows that can be used; .*rows\.jsonl:1: rating 9"):
        [*skip(tmp_path, [{**HELPSTEER, "coherence": 9}], "skip")]


def test_what_becomes_of_bad_rows_is_error_or_skip(tmp_path, no_type_checks):
    with pytest.raises(ValueError, match="`on_bad_row` must be error or skip, got 'drop'"):
        skip(tmp_path, [HELPSTEER], "drop")
