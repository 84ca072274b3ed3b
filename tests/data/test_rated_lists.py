import json
import logging
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armo.data.builtin import compose as corpus
from armo.data.conversation import prompt_group
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.rated_lists import compose_rated_lists, load_rated_lists
from armo.data.sources import DataError, load_pairs, load_ratings, stream_ratings
from armo.data.surface import MARKS, SURFACE_FEATURES, surface_features
from armo.report.metrics import within_prompt_correlation

HELP = Objective("helpfulness", 0, 4)
HARM = Objective("harm", 0, 10, higher_is_better=False)


def rated(number, prompt, response, **more):
    ratings = more.pop("ratings", {"helpfulness": number % 5})
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return {"id": f"r{number}", "source": "s", "messages": turns, "ratings": ratings, **more}


@pytest.fixture
def write(tmp_path):
    def write(rows):
        path = tmp_path / "ratings.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_rated_responses_are_grouped_by_prompt_in_the_order_of_the_file(write):
    rows = [rated(k, f"prompt {k % 2}", f"response {k}", category="chat") for k in range(7)]
    lists = load_rated_lists(write(rows), gold=HELP, min_responses=3)
    assert [row.id for row in lists.rows] == ["r0", "r1"]
    assert [row.prompt[0].content for row in lists.rows] == ["prompt 0", "prompt 1"]
    assert lists.rows[1].responses == ("response 1", "response 3", "response 5")
    assert {(row.source, row.category, row.split) for row in lists.rows} == {("s", "chat", None)}
    assert lists.gold.tolist() == [0.0, 0.5, 1.0, 0.25, 0.25, 0.75, 0.0]


def test_gold_is_rescaled_and_turned_round_where_lower_is_better(write):
    rows = [rated(k, "p", f"{k}", ratings={"harm": harm}) for k, harm in enumerate((0, 10, 4))]
    lists = load_rated_lists(write(rows), gold=HARM, min_responses=2)
    torch.testing.assert_close(lists.gold, torch.tensor([1.0, 0.0, 0.6]).double())


def test_a_text_that_stands_there_twice_has_the_mean_of_its_ratings(write):
    rows = [
        rated(4, "p", "yes"),
        rated(1, "p", " yes\n"),
        rated(2, "p", "no"),
        rated(3, "q", "yes"),
    ]
    lists = load_rated_lists(write(rows), gold=HELP, min_responses=2)
    assert [row.responses for row in lists.rows] == [("yes", "no")]
    assert lists.gold.tolist() == [(1.0 + 0.25) / 2, 0.5]


def test_prompts_that_differ_in_an_earlier_turn_are_different_lists(write):
    rows = []
    for k, system in enumerate(("Be brief.", "Be brief.", "Be kind.", "Be kind.")):
        row = rated(k, "p", f"{k}")
        row["messages"].insert(0, {"role": "system", "content": system})
        rows.append(row)
    lists = load_rated_lists(write(rows), gold=HELP, min_responses=2)
    assert [row.responses for row in lists.rows] == [("0", "1"), ("2", "3")]


def test_what_is_left_out_is_counted(write, caplog):
    rows = [
        *(rated(k, "p", f"{k}") for k in range(3)),
        rated(3, "p", "not rated on it", ratings={"other": 900}),
        rated(4, "p", "missing", ratings={"helpfulness": None}),
        *(rated(k, "trained on", f"{k}") for k in range(5, 8)),
        rated(8, "Trained  on", "8", split="train"),  # one row decides for its prompt
        rated(9, "alone", "9"),
    ]
    with caplog.at_level(logging.INFO, logger="armo.data.rated_lists"):
        lists = load_rated_lists(write(rows), gold=HELP, min_responses=3)
    assert [len(row.responses) for row in lists.rows] == [3]
    assert caplog.messages == [
        "1 lists of 3 responses; left out: 2 of 10 rows have no rating of 'helpfulness', 2 prompts "
        "are on the training side, 1 have fewer than 3 responses"
    ]


def test_a_file_without_lists_says_what_it_has(write):
    rows = [rated(0, "p", "0"), rated(1, "q", "1"), rated(2, "q", "2", ratings={"other": 1})]
    with pytest.raises(DataError, match="no list is left: 1 of 3 rows have no rating") as error:
        load_rated_lists(write(rows), gold=HELP)
    assert "0 prompts are on the training side, 2 have fewer than 4 resp" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (rated(1, "p", "1", ratings={"helpfulness": 7}), "rating 7.* is outside its scale 0 to 4"),
        (rated(1, "p", "1", ratings={"helpfulness": "good"}), "rating of 'helpfulness' is not a n"),
        (rated(1, "p", ""), "`response` is empty"),
    ],
)
def test_a_bad_row_is_named_with_its_line(write, row, message):
    with pytest.raises(DataError, match=rf"ratings\.jsonl:2: {message}"):
        load_rated_lists(write([rated(0, "p", "0"), row]), gold=HELP, min_responses=2)


def test_a_gold_that_is_a_name_alone_is_refused(no_type_checks):
    with pytest.raises(ValueError, match=r"`gold` must be {name: .*}, got 'quality'"):
        load_rated_lists("ratings.jsonl", gold="quality")


def test_a_list_of_one_is_refused(write):
    with pytest.raises(ValueError, match="`min_responses` must be 2 or more, got 1"):
        load_rated_lists(write([rated(0, "p", "0")]), gold=HELP, min_responses=1)


def test_a_bias_objective_may_be_gold(write):
    path = write([rated(k, "p", f"{k}") for k in range(2)])
    style = Objective("helpfulness", 0, 4, bias=True)
    assert len(load_rated_lists(path, gold=style, min_responses=2).gold) == 2


def test_undeclared_ratings_are_refused_unless_told_otherwise(write):
    path, declared = write([rated(0, "p", "0", ratings={"other": 900})]), ObjectiveSet((HELP,))
    with pytest.raises(DataError, match="'other' is not declared"):
        load_ratings(path, objectives=declared)
    [row] = stream_ratings(path, objectives=declared, undeclared="leave_out")
    assert row.ratings == {}


KINDS = corpus.PREFERENCE_WEIGHTS
PROMPTS = 4 * len(KINDS)


@pytest.fixture(scope="module")
def composed():
    return compose_rated_lists(prompts_per_kind=4)


def test_composed_lists_are_64_different_responses_to_each_prompt(composed):
    assert len(composed.rows) == PROMPTS
    assert len(composed.gold) == PROMPTS * 64
    for row in composed.rows:
        assert len({" ".join(response.split()) for response in row.responses}) == 64


def test_composed_lists_are_of_all_test_prompts_and_of_no_other():
    rows = compose_rated_lists(2).rows
    assert Counter(row.category for row in rows) == dict.fromkeys(KINDS, 20)
    sides = {prompt_group(pair.prompt): pair.split for pair in load_pairs("builtin")}
    assert {sides[prompt_group(row.prompt)] for row in rows} == {"test"}
    assert {row.split for row in rows} == {"test"}


def test_composed_responses_are_the_same_every_time_and_fewer_prompts_are_the_first(composed):
    few = compose_rated_lists(5, prompts_per_kind=2)
    assert len(few.rows) == 12
    assert Counter(row.category for row in few.rows) == dict.fromkeys(KINDS, 2)
    all_of = {row.id: (k, row) for k, row in enumerate(composed.rows)}
    for k, row in enumerate(few.rows):
        number, whole = all_of[row.id]
        assert row.responses == whole.responses[:5]
        torch.testing.assert_close(
            few.gold[5 * k : 5 * k + 5], composed.gold[64 * number : 64 * number + 5]
        )


def test_gold_is_the_utility_that_preferences_are_made_by(composed):
    drawn = list(corpus.compose_candidates(64, prompts_per_kind=1))
    found = {row.id: k for k, row in enumerate(composed.rows)}
    for prompt, responses in drawn:
        start = 64 * found[f"{prompt['id']}-n"]
        weights = corpus.PREFERENCE_WEIGHTS[prompt["kind"]]
        for k, response in enumerate(responses):
            units = {name: (response.ratings[name] - 1) / 4 for name in corpus.QUALITY}
            expected = sum(weights[name] * unit for name, unit in units.items())
            assert float(composed.gold[start + k]) == pytest.approx(expected)


def test_gold_and_style_vary_widely_and_apart(composed):
    gold = composed.gold.reshape(PROMPTS, 64)
    assert float(gold.amin(1).mean()) < 0.1
    assert float(gold.amax(1).mean()) > 0.95
    surface = surface_features([text for row in composed.rows for text in row.responses])
    words = surface[:, SURFACE_FEATURES.index("log_length")].exp().reshape(PROMPTS, 64)
    assert float((words.amax(1) / words.amin(1)).median()) > 1.8
    marks = surface[:, [SURFACE_FEATURES.index(name) for name in MARKS]].sum(1)
    assert float(marks.reshape(PROMPTS, 64).amax(1).min()) >= 5
    prompts = torch.arange(PROMPTS).repeat_interleave(64)
    # What is left of format is content: points to mark and to list, and code that is quoted.
    assert abs(within_prompt_correlation(composed.gold, words.flatten(), prompts)) < 0.05
    assert abs(within_prompt_correlation(composed.gold, marks, prompts)) < 0.2


ratings = st.fixed_dictionaries({name: st.integers(1, 5).map(float) for name in corpus.QUALITY})


@given(st.sampled_from(sorted(corpus.PREFERENCE_WEIGHTS)), ratings, ratings)
def test_utility_lies_on_the_unit_scale_and_differs_by_the_margin(kind, one, other):
    first, second = corpus.utility(kind, one), corpus.utility(kind, other)
    assert -1e-12 <= first <= 1 + 1e-12
    margin = sum(w * (one[k] - other[k]) for k, w in corpus.PREFERENCE_WEIGHTS[kind].items())
    assert 4 * (first - second) == pytest.approx(margin)
