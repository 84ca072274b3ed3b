import gzip
import json
import re
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from armo.data.objectives import Objective, ObjectiveSet
from armo.data.sources import (
    DataError,
    load_lists,
    load_pairs,
    load_ratings,
    load_scorable,
    stream_lists,
    stream_pairs,
    stream_ranked_lists,
    stream_ratings,
)

OBJECTIVES = ObjectiveSet((Objective("honesty", 1, 5), Objective("safety", 1, 5)))
BUILTIN_OBJECTIVES = ObjectiveSet(
    (
        *(Objective(name, 1, 5) for name in ("helpfulness", "honesty", "safety")),
        *(Objective(name, 0, 4, bias=True) for name in ("verbosity", "formatting")),
    )
)
USER = {"role": "user", "content": "How do I boil an egg?"}
ANSWER = {"role": "assistant", "content": "In water."}
RATING = {"id": "a", "source": "s", "messages": [USER, ANSWER], "ratings": {"honesty": 4}}
PAIR = {"id": "a", "source": "s", "prompt": [USER], "chosen": "In water.", "rejected": "No."}
LIST = {"id": "a", "source": "s", "prompt": [USER], "responses": ["yes", "no"], "correct": [0]}
RANKED = {**{name: LIST[name] for name in LIST if name != "correct"}, "ranks": [2, 1]}


def encode(row):
    return row if isinstance(row, str) else json.dumps(row)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write rows to a file of the suffix's format; a string is a line as it is."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(encode(row) + "\n" for row in rows)
        if name.endswith(".parquet"):
            import datasets
            import pyarrow
            import pyarrow.parquet

            monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def ratings_of(path):
    return load_ratings(path, objectives=OBJECTIVES)


def judged_pairs(path):
    return load_pairs(path, objectives=OBJECTIVES)


def ranked_lists(path):
    return list(stream_ranked_lists(path))


def streamed_ratings(path):
    return stream_ratings(path, objectives=OBJECTIVES)


STREAMS = pytest.mark.parametrize(
    ("stream", "load", "row"),
    [
        (streamed_ratings, ratings_of, RATING),
        (stream_pairs, load_pairs, PAIR),
        (stream_lists, load_lists, LIST),
        (stream_ranked_lists, ranked_lists, RANKED),
    ],
    ids=["ratings", "pairs", "lists", "ranked lists"],
)


def ids(rows):
    return [row.id for row in rows]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize(
    ("load", "row"),
    [
        (ratings_of, RATING),
        (load_pairs, PAIR),
        (load_lists, LIST),
        (ranked_lists, RANKED),
        (load_scorable, PAIR),
    ],
    ids=["ratings", "pairs", "lists", "ranked lists", "scorable"],
)
def test_every_format_gives_the_same_rows(write, suffix, load, row):
    rows = [row, {**row, "id": "b"}]
    assert load(write(f"rows.{suffix}", rows)) == load(write("reference.jsonl", rows))
    assert ids(load(write(f"rows.{suffix}", rows))) == ["a", "b"]


@STREAMS
def test_a_stream_yields_what_is_loaded(write, stream, load, row):
    path = write("rows.jsonl", [{**row, "id": str(k)} for k in range(5)])
    rows = stream(path)
    assert isinstance(rows, Iterator)
    assert list(rows) == load(path)
    assert list(rows) == []


@STREAMS
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_stream_gives_the_rows_before_a_bad_one(write, suffix, stream, load, row):
    path = write(f"rows.{suffix}", [row, {**row, "id": "b"}, {**row, "id": "c", "source": 7}])
    rows = stream(path)
    assert [next(rows).id, next(rows).id] == ["a", "b"]
    with pytest.raises(DataError, match=re.escape(f"{path}:3: field `source`")):
        next(rows)
    with pytest.raises(DataError, match=re.escape(f"{path}:3: field `source`")):
        load(path)


@STREAMS
def test_a_stream_reads_no_file_before_its_rows_are_asked_for(write, stream, load, row):
    first, second = write("1.jsonl", [row]), write("2.jsonl", ["not JSON"])
    rows = stream([first, second])
    assert next(rows).id == "a"
    Path(second).write_text(json.dumps({**row, "id": "b"}) + "\n")
    assert [row.id for row in rows] == ["b"]


@STREAMS
def test_a_stream_says_that_a_file_is_missing_or_empty_when_it_is_reached(write, stream, load, row):
    rows = stream("absent.jsonl")
    with pytest.raises(DataError, match=r"No such file or folder: absent\.jsonl"):
        next(rows)
    path = write("empty.jsonl", [])
    with pytest.raises(DataError, match=re.escape(f"{path}: no rows")):
        next(stream(path))


@STREAMS
def test_a_stream_names_both_places_of_a_duplicate_id(write, stream, load, row):
    first = write("1.jsonl.gz", ["", row])
    second = write("2.jsonl", [{**row, "id": "b"}, row])
    rows = stream([first, second])
    assert [next(rows).id, next(rows).id] == ["a", "b"]
    place = f"{second}:2: id 'a' stands at {first}:2 already"
    with pytest.raises(DataError, match=re.escape(place)):
        next(rows)


def test_a_stream_keeps_no_row(write):
    rows = [{**PAIR, "id": str(k), "chosen": f"{k} " + "long " * 2000} for k in range(200)]
    path = write("rows.jsonl", rows)
    stream = stream_pairs(path)
    next(stream)
    tracemalloc.start()
    for _ in stream:
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < Path(path).stat().st_size / 10


def test_a_folder_is_read_in_name_order_and_other_files_are_left_alone(write, tmp_path):
    write("folder/2.jsonl.gz", [{**PAIR, "id": "c"}])
    write("folder/1.jsonl", [PAIR, {**PAIR, "id": "b"}])
    (tmp_path / "folder" / "README.md").write_text("not rows")
    assert ids(load_pairs(str(tmp_path / "folder"))) == ["a", "b", "c"]


def test_a_list_of_paths_is_read_in_its_own_order(write):
    first, second = write("1.jsonl", [PAIR]), write("2.jsonl", [{**PAIR, "id": "b"}])
    assert ids(load_pairs([second, first])) == ["b", "a"]


def test_blank_lines_are_skipped_and_still_counted(write):
    assert ids(load_pairs(write("rows.jsonl", ["", PAIR, "  "]))) == ["a"]
    path = write("rows.jsonl", ["", PAIR, "", {**PAIR, "id": 7}])
    with pytest.raises(DataError, match=re.escape(f"{path}:4: field `id`")):
        load_pairs(path)


def test_ratings_stay_on_their_own_scale_and_null_is_missing(write):
    (row,) = ratings_of(
        write("rows.jsonl", [{**RATING, "ratings": {"honesty": 4, "safety": None}}])
    )
    assert row.ratings == {"honesty": 4.0}
    assert (row.source, row.category, row.split) == ("s", "", None)


def test_an_objective_that_only_some_parquet_rows_rate_is_missing_in_the_others(write):
    rows = [RATING, {**RATING, "id": "b", "ratings": {"safety": 2.0}}]
    loaded = ratings_of(write("rows.parquet", rows))
    assert [row.ratings for row in loaded] == [{"honesty": 4.0}, {"safety": 2.0}]


def test_turns_before_the_answer_are_the_prompt(write):
    messages = [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER]
    (row,) = ratings_of(write("rows.jsonl", [{**RATING, "messages": messages}]))
    assert [turn.role for turn in row.prompt] == ["system", "user", "assistant", "user"]
    assert row.responses == ("In water.",)


def test_optional_fields_are_kept(write):
    (row,) = load_pairs(
        write("rows.jsonl", [{**PAIR, "margin": 2, "category": "how_to", "split": "test"}])
    )
    assert (row.margin, row.category, row.split) == (2.0, "how_to", "test")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_weights_and_judgements_are_kept_and_may_be_null(write, suffix):
    rows = [
        {**PAIR, "weight": 2, "judgements": {"honesty": 0.75, "safety": None}},
        {**PAIR, "id": "b", "weight": None, "judgements": {"honesty": None, "safety": 1}},
        {**PAIR, "id": "c", "weight": 0.0, "judgements": None},
    ]
    loaded = load_pairs(write(f"rows.{suffix}", rows), objectives=OBJECTIVES)
    assert [row.weight for row in loaded] == [2.0, 1.0, 0.0]
    assert [row.judgements for row in loaded] == [{"honesty": 0.75}, {"safety": 1.0}, {}]
    rows = [{**RATING, "weight": 0.5}, {**RATING, "id": "b", "weight": None}]
    assert [row.weight for row in ratings_of(write(f"rated.{suffix}", rows))] == [0.5, 1.0]


def test_rows_weigh_one_and_judge_nothing_by_themselves(write):
    (row,) = load_pairs(write("rows.jsonl", [PAIR]))
    assert (row.weight, row.judgements) == (1.0, {})
    (rated,) = ratings_of(write("rated.jsonl", [RATING]))
    assert rated.weight == 1.0


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_preferences_and_margins_are_kept_and_may_be_null(write, suffix):
    rows = [
        {**PAIR, "preference": 0.5, "margin": 0.0},
        {**PAIR, "id": "b", "preference": None, "margin": None},
        {**PAIR, "id": "c", "preference": 1.0, "margin": 2.5},
    ]
    loaded = load_pairs(write(f"rows.{suffix}", rows))
    assert [row.preference for row in loaded] == [0.5, 1.0, 1.0]
    assert [row.margin for row in loaded] == [0.0, None, 2.5]


def test_chosen_is_the_better_one_for_certain_where_nothing_else_is_said(write):
    (row,) = load_pairs(write("rows.jsonl", [PAIR]))
    assert (row.preference, row.margin) == (1.0, None)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("load", [load_lists, ranked_lists])
def test_lists_have_ranks_or_right_responses_and_a_weight(write, load, suffix):
    rows = [
        {**RANKED, "correct": None, "weight": 0.5},
        {**LIST, "id": "b", "ranks": None, "weight": None},
        {**LIST, "id": "c", "responses": ["a", "b", "c"], "correct": [], "ranks": None},
        {**RANKED, "id": "d", "ranks": [3.0, 3.0]},
    ]
    loaded = load(write(f"rows.{suffix}", rows))
    assert [row.ranks for row in loaded] == [(2.0, 1.0), None, None, (3.0, 3.0)]
    assert [row.correct for row in loaded] == [None, (0,), (), None]
    assert [row.ranking for row in loaded] == [(2, 1), (0, 1), (1, 1, 1), (3, 3)]
    assert [row.weight for row in loaded] == [0.5, 1.0, 1.0, 1.0]


def test_a_benchmark_may_hold_lists_that_are_not_to_train_on(write):
    rows = [{**LIST, "responses": ["yes"]}, {**LIST, "id": "b", "responses": ["yes", "yes "]}]
    path = write("rows.jsonl", rows)
    assert ids(load_lists(path)) == ["a", "b"]
    with pytest.raises(DataError, match=re.escape(f"{path}:1: `responses` has one response alone")):
        ranked_lists(path)


def test_the_built_in_lists_to_train_on_are_the_counterfactual_pairs_which_tie():
    rows = ranked_lists("builtin")
    assert rows == load_lists("builtin")
    assert {row.ranking for row in rows} == {(0.0, 0.0)}


JUDGES = {"honesty": ["judges", "qa/web"], "safety": ["qa"]}


def judgements_of(write, rows, *, judges, name="rows.jsonl"):
    path = write(name, [{**PAIR, "id": str(k), **row} for k, row in enumerate(rows)])
    pairs = list(stream_pairs(path, objectives=OBJECTIVES, judges=judges))
    return [pair.judgements for pair in pairs]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_pairs_of_a_source_or_a_category_judge_its_objective(write, suffix):
    expected = [
        ({"source": "judges", "category": ""}, {"honesty": 1.0}),
        ({"source": "s", "category": "qa"}, {"safety": 1.0}),
        ({"source": "judges", "category": "qa"}, {"honesty": 1.0, "safety": 1.0}),
        ({"source": "s", "category": "qa/web/french"}, {"honesty": 1.0, "safety": 1.0}),
        ({"source": "s", "category": "qa/book"}, {"safety": 1.0}),
        ({"source": "s", "category": "qaweb"}, {}),
        ({"source": "s", "category": "more/qa"}, {}),
        ({"source": "judges/a", "category": "judge"}, {}),
    ]
    rows = [row for row, _ in expected]
    found = judgements_of(write, rows, judges=JUDGES, name=f"rows.{suffix}")
    assert found == [judgements for _, judgements in expected]


def test_a_pair_judges_as_its_preference_says_and_a_tie_is_one(write):
    rows = [{"category": "qa", "preference": vote} for vote in (0.5, 0.8, None)]
    assert [row["safety"] for row in judgements_of(write, rows, judges=JUDGES)] == [0.5, 0.8, 1.0]


def test_a_judgement_of_the_row_itself_wins(write):
    rows = [
        {"category": "qa/web", "preference": 0.8, "judgements": {"honesty": 0.1}},
        {"category": "qa/web", "preference": 0.8, "judgements": {"honesty": None}},
        {"category": "other", "judgements": {"safety": 0.3}},
    ]
    assert judgements_of(write, rows, judges=JUDGES) == [
        {"honesty": 0.1, "safety": 0.8},
        {"honesty": 0.8, "safety": 0.8},  # null is missing
        {"safety": 0.3},
    ]


def test_judges_change_nothing_else_of_a_pair(write):
    path = write("rows.jsonl", [{**PAIR, "weight": 2.0, "margin": 1.0, "preference": 0.7}])
    (plain,) = stream_pairs(path, objectives=OBJECTIVES)
    (judging,) = stream_pairs(path, objectives=OBJECTIVES, judges={"honesty": ["s"]})
    assert judging == replace(plain, judgements={"honesty": 0.7})
    assert [*stream_pairs(path, objectives=OBJECTIVES, judges={"honesty": ["t"]})] == [plain]
    assert [*stream_pairs(path, objectives=OBJECTIVES, judges={})] == [plain]


def test_an_undeclared_objective_is_named_before_a_row_is_read():
    with pytest.raises(
        ValueError, match=r"objective 'humour' is not declared; add it to `data\.ob"
    ):
        stream_pairs("/no/such.jsonl", objectives=OBJECTIVES, judges={"humour": ["s"]})


def test_without_declared_objectives_any_may_be_judged(write):
    path = write("rows.jsonl", [{**PAIR, "judgements": {"humour": 0.5}}])
    assert load_pairs(path)[0].judgements == {"humour": 0.5}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: objective 'humour' is not declared"):
        load_pairs(path, objectives=OBJECTIVES)


def test_line_separators_inside_a_text_do_not_split_the_row(write):
    text = "one\u2028two\u0085three\r\nfour"
    line = json.dumps({**PAIR, "chosen": text}, ensure_ascii=False)
    assert load_pairs(write("rows.jsonl", [line]))[0].chosen == text


BAD_ROWS = {
    "rating above the scale": (
        ratings_of,
        {**RATING, "ratings": {"honesty": 6}},
        "rating 6 of 'honesty' is outside its scale 1 to 5",
    ),
    "rating below the scale": (
        ratings_of,
        {**RATING, "ratings": {"safety": 0.5}},
        "rating 0.5 of 'safety' is outside",
    ),
    "NaN rating": (
        ratings_of,
        {**RATING, "ratings": {"honesty": float("nan")}},
        "rating of 'honesty' is nan; leave a missing rating out",
    ),
    "infinite rating": (
        ratings_of,
        {**RATING, "ratings": {"honesty": float("inf")}},
        "rating of 'honesty' is inf",
    ),
    "rating beyond every float": (
        ratings_of,
        {**RATING, "ratings": {"honesty": 10**400}},
        "of 'honesty'",
    ),
    "boolean rating": (
        ratings_of,
        {**RATING, "ratings": {"honesty": True}},
        "rating of 'honesty' is not a number: True",
    ),
    "rating in words": (
        ratings_of,
        {**RATING, "ratings": {"honesty": "4"}},
        "rating of 'honesty' is not a number: '4'",
    ),
    "undeclared objective": (
        ratings_of,
        {**RATING, "ratings": {"humour": 4}},
        "objective 'humour' is not declared; add it to `data.objectives`",
    ),
    "last message not the assistant's": (
        ratings_of,
        {**RATING, "messages": [USER, ANSWER, USER]},
        "the last of `messages` must be the assistant's answer",
    ),
    "no messages": (ratings_of, {**RATING, "messages": []}, "the last of `messages`"),
    "only an answer": (ratings_of, {**RATING, "messages": [ANSWER]}, "no user turn with text"),
    "unknown role": (
        ratings_of,
        {**RATING, "messages": [{**USER, "role": "human"}, ANSWER]},
        "role 'human' is not one of",
    ),
    "message without content": (
        ratings_of,
        {**RATING, "messages": [{"role": "user"}, ANSWER]},
        "field `content` is missing",
    ),
    "message not an object": (
        ratings_of,
        {**RATING, "messages": ["hello", ANSWER]},
        "`messages[0]` must be an object",
    ),
    "empty answer": (
        ratings_of,
        {**RATING, "messages": [USER, {**ANSWER, "content": " "}]},
        "`response` is empty",
    ),
    "ratings not an object": (
        ratings_of,
        {**RATING, "ratings": [4]},
        "field `ratings` must be a dict",
    ),
    "empty chosen": (load_pairs, {**PAIR, "chosen": "\n"}, "`chosen` is empty"),
    "empty rejected": (load_pairs, {**PAIR, "rejected": ""}, "`rejected` is empty"),
    "identical responses": (
        load_pairs,
        {**PAIR, "rejected": "In water. "},
        "`chosen` and `rejected` are the same text",
    ),
    "margin in words": (load_pairs, {**PAIR, "margin": "big"}, "`margin` is not a number: 'big'"),
    "NaN margin": (load_pairs, {**PAIR, "margin": float("nan")}, "`margin` must be a finite"),
    "negative margin": (
        load_pairs,
        {**PAIR, "margin": -0.5},
        "`margin` must be a finite number from 0 on, got -0.5; where `rejected` is the better one, "
        "swap `chosen` and `rejected`",
    ),
    "preference for the rejected": (
        load_pairs,
        {**PAIR, "preference": 0.3},
        "`preference` is 0.3; it is the probability in [0.5, 1] that `chosen` is the better one, "
        "so below 0.5 swap `chosen` and `rejected`",
    ),
    "preference above one": (load_pairs, {**PAIR, "preference": 1.01}, "`preference` is 1.01; it"),
    "NaN preference": (load_pairs, {**PAIR, "preference": float("nan")}, "`preference` is nan; it"),
    "preference in words": (
        load_pairs,
        {**PAIR, "preference": "tie"},
        "`preference` is not a number: 'tie'",
    ),
    "boolean preference": (
        load_pairs,
        {**PAIR, "preference": True},
        "`preference` is not a number: True",
    ),
    "margin beyond every float": (load_pairs, {**PAIR, "margin": 10**400}, "`margin` is too large"),
    "negative weight": (load_pairs, {**PAIR, "weight": -1}, "`weight` must be a finite number"),
    "NaN weight": (ratings_of, {**RATING, "weight": float("nan")}, "`weight` must be a finite"),
    "infinite weight": (ratings_of, {**RATING, "weight": float("inf")}, "`weight` must be a fin"),
    "weight beyond every float": (ratings_of, {**RATING, "weight": 10**400}, "`weight` is too lar"),
    "weight in words": (ratings_of, {**RATING, "weight": "2"}, "`weight` is not a number: '2'"),
    "boolean weight": (load_pairs, {**PAIR, "weight": True}, "`weight` is not a number: True"),
    "judgement above one": (
        load_pairs,
        {**PAIR, "judgements": {"honesty": 1.01}},
        "judgement of 'honesty' is 1.01; it is the probability in [0, 1] that `chosen` is better",
    ),
    "judgement below zero": (
        load_pairs,
        {**PAIR, "judgements": {"honesty": -1}},
        "judgement of 'honesty' is -1.0",
    ),
    "NaN judgement": (
        load_pairs,
        {**PAIR, "judgements": {"honesty": float("nan")}},
        "judgement of 'honesty' is nan",
    ),
    "boolean judgement": (
        load_pairs,
        {**PAIR, "judgements": {"honesty": True}},
        "judgement of 'honesty' is not a number: True",
    ),
    "judgements not an object": (
        load_pairs,
        {**PAIR, "judgements": [0.5]},
        "field `judgements` must be a dict",
    ),
    "undeclared objective in a judgement": (
        judged_pairs,
        {**PAIR, "judgements": {"humour": 0.5}},
        "objective 'humour' is not declared; add it to `data.objectives`",
    ),
    "unknown split": (
        load_pairs,
        {**PAIR, "split": "dev"},
        "`split` must be train or test, got 'dev'",
    ),
    "prompt ends with the assistant": (
        load_pairs,
        {**PAIR, "prompt": [USER, ANSWER]},
        "the prompt ends with an assistant turn",
    ),
    "list without responses": (load_lists, {**LIST, "responses": []}, "`responses` is empty"),
    "list with an empty response": (
        load_lists,
        {**LIST, "responses": ["yes", ""]},
        "`responses[1]` is empty",
    ),
    "response not a text": (
        load_lists,
        {**LIST, "responses": ["yes", 2]},
        "`responses` must be a list of strings",
    ),
    "correct outside the list": (load_lists, {**LIST, "correct": [2]}, "`correct` [2] is outside"),
    "correct in words": (load_lists, {**LIST, "correct": ["0"]}, "`correct`"),
    "correct not a whole number": (load_lists, {**LIST, "correct": [0.5]}, "`correct`"),
    "correct not a list": (load_lists, {**LIST, "correct": 0}, "field `correct` must be a list"),
    "ranks and correct": (
        load_lists,
        {**RANKED, "correct": []},
        "`correct` and `ranks` are both given; keep one of them",
    ),
    "too few ranks": (
        load_lists,
        {**RANKED, "ranks": [1]},
        "`ranks` has 1 numbers for 2 responses",
    ),
    "NaN rank": (load_lists, {**RANKED, "ranks": [1, float("nan")]}, "`ranks` must be finite num"),
    "rank in words": (load_lists, {**RANKED, "ranks": [1, "2"]}, "`ranks[1]` is not a number: '2'"),
    "boolean rank": (
        load_lists,
        {**RANKED, "ranks": [True, 2]},
        "`ranks[0]` is not a number: True",
    ),
    "ranks not a list": (load_lists, {**RANKED, "ranks": 1}, "field `ranks` must be a list"),
    "list with a negative weight": (load_lists, {**RANKED, "weight": -1}, "`weight` must be a fin"),
    "list to train on of one response": (
        ranked_lists,
        {**RANKED, "responses": ["yes"], "ranks": [1]},
        "`responses` has one response alone; a list to train on needs two",
    ),
    "list to train on with a text twice": (
        ranked_lists,
        {**RANKED, "responses": ["no", "yes", "\nyes "], "ranks": [1, 2, 3]},
        "`responses[1]` and `responses[2]` are the same text; drop one of them",
    ),
    "scorable of no known form": (
        load_scorable,
        {"prompt": [USER], "response": "yes"},
        "needs `messages`, `chosen` and `rejected`, or `responses`",
    ),
    "scorable without an answer": (
        load_scorable,
        {"messages": [USER]},
        "the last of `messages` must be the assistant's answer",
    ),
    "scorable with an empty response": (
        load_scorable,
        {"prompt": [USER], "responses": ["yes", " "]},
        "is empty",
    ),
    "scorable without a rejected response": (
        load_scorable,
        {"prompt": [USER], "chosen": "yes"},
        "field `rejected` is missing",
    ),
    "scorable without responses": (
        load_scorable,
        {"prompt": [USER], "responses": []},
        "`responses`",
    ),
    "scorable response not a text": (
        load_scorable,
        {"prompt": [USER], "responses": ["yes", 2]},
        "`responses",
    ),
}


@pytest.mark.parametrize(("load", "bad", "words"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(write, load, bad, words):
    good = {ratings_of: RATING, load_lists: LIST, ranked_lists: RANKED}.get(load, PAIR)
    path = write("rows.jsonl", [good, {"id": "b", **bad} if load is load_scorable else bad])
    with pytest.raises(DataError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(words)):
        load(path)


@pytest.mark.parametrize(
    ("load", "row", "field"),
    [
        (load, row, field)
        for load, row, fields in (
            (ratings_of, RATING, ("id", "source", "messages", "ratings")),
            (load_pairs, PAIR, ("id", "source", "prompt", "chosen", "rejected")),
            (load_lists, LIST, ("id", "source", "prompt", "responses", "correct")),
            (ranked_lists, LIST, ("id", "source", "prompt", "responses", "correct")),
        )
        for field in fields
    ],
)
def test_a_missing_field_is_named_by_file_and_line(write, load, row, field):
    path = write("rows.jsonl", [{name: row[name] for name in row if name != field}])
    with pytest.raises(DataError, match=re.escape(f"{path}:1: field `{field}` is missing")):
        load(path)


def test_a_bad_parquet_row_is_named_by_its_number(write):
    path = write("rows.parquet", [PAIR, {**PAIR, "id": "b", "chosen": " "}])
    with pytest.raises(DataError, match=re.escape(f"{path} row 2: `chosen` is empty")):
        load_pairs(path)


def test_a_duplicate_id_is_named_with_both_places(write):
    first = write("1.jsonl", [{**PAIR, "id": "b"}, PAIR])
    second = write("2.jsonl.gz", [PAIR])
    with pytest.raises(
        DataError, match=re.escape(f"{second}:1: id 'a' stands at {first}:2 already")
    ):
        load_pairs([first, second])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": "a",}', "malformed JSON at column 12"),
        ("plain text", "malformed JSON at column 1"),
        ('["a"]', "not a JSON object"),
        ("3", "not a JSON object"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("load", [ratings_of, load_scorable])
def test_a_malformed_line_is_named_by_its_number(write, load, name, line, words):
    path = write(name, [RATING, {**RATING, "id": "b"}, line])
    with pytest.raises(DataError, match=re.escape(f"{path}:3: {words}")):
        load(path)


@pytest.mark.parametrize("load", [ratings_of, load_pairs, load_lists, load_scorable])
def test_a_file_that_does_not_exist_is_named(tmp_path, load):
    path = str(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=re.escape(f"No such file or folder: {path}")):
        load(path)


def test_a_file_of_another_ending_is_an_error(tmp_path):
    path = tmp_path / "rows.xlsx"
    path.write_text("id,source\n")
    with pytest.raises(DataError, match=r"rows\.xlsx: needs one of the endings \.jsonl.* \.csv"):
        load_pairs(str(path))


def test_a_folder_without_data_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no \.jsonl, \.jsonl\.gz, \.parquet, .* file in this"):
        load_pairs(str(tmp_path))


@pytest.mark.parametrize("load", [load_pairs, load_scorable])
def test_a_file_without_rows_is_an_error(write, load):
    path = write("rows.jsonl", ["", " "])
    with pytest.raises(DataError, match=re.escape(f"{path}: no rows")):
        load(path)


def test_a_truncated_gzip_file_is_an_error(write):
    path = write("rows.jsonl.gz", [{**PAIR, "id": str(k)} for k in range(500)])
    assert len(load_pairs(path)) == 500
    whole = Path(path).read_bytes()
    for kept in (len(whole) // 2, len(whole) - 1):
        Path(path).write_bytes(whole[:kept])
        with pytest.raises(DataError, match=re.escape(path) + r": unreadable after line \d+"):
            load_pairs(path)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.parquet"])
def test_a_file_that_is_not_what_its_ending_says_is_an_error(write, name):
    path = write(name, [PAIR])
    Path(path).write_bytes(b"plain text, not compressed")
    with pytest.raises(DataError, match=re.escape(path)):
        load_pairs(path)


def test_a_corrupted_gzip_file_is_an_error(write):
    path = write("rows.jsonl.gz", [{**PAIR, "id": str(k)} for k in range(500)])
    with open(path, "r+b") as file:
        file.seek(20)
        file.write(b"\xff" * 10)
    with pytest.raises(DataError, match=re.escape(path)):
        load_pairs(path)


def test_text_in_another_encoding_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({**PAIR, "chosen": "Café"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: unreadable: .*; save it as UTF-8"):
        load_pairs(str(path))


def test_scorable_rows_are_conversations_pairs_or_lists(write):
    path = write(
        "rows.jsonl",
        [
            {"messages": [USER, ANSWER], "id": "single"},
            {"prompt": [USER], "chosen": "yes", "rejected": "no"},
            {"prompt": [USER], "responses": ["one"], "id": "list"},
        ],
    )
    rows = load_scorable(path)
    assert [row.responses for row in rows] == [("In water.",), ("yes", "no"), ("one",)]
    assert [row.single for row in rows] == [True, False, False]
    assert [row.id for row in rows] == ["single", "1", "list"]
    assert all(row.prompt == rows[0].prompt for row in rows)


def test_scorable_rows_need_neither_ratings_nor_declared_objectives(write):
    path = write("rows.jsonl", [{**RATING, "ratings": {"humour": 99}}])
    assert ids(load_scorable(path)) == ["a"]


def test_scorable_rows_are_numbered_on_across_files(write):
    row = {"messages": [USER, ANSWER]}
    paths = [write("1.jsonl", [row, row]), write("2.jsonl", [row])]
    assert ids(load_scorable(paths)) == ["0", "1", "2"]


def test_the_built_in_corpus_is_loaded_by_name():
    assert len(load_pairs("builtin")) > 1000
    assert len(load_lists("builtin")) > 300
    assert len(load_ratings("builtin", objectives=BUILTIN_OBJECTIVES)) > 1000


def test_the_built_in_corpus_combines_with_files(write):
    rows = load_pairs(["builtin", write("rows.jsonl", [PAIR])])
    assert rows[:-1] == load_pairs("builtin")
    assert rows[-1].id == "a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": 5}, "`category` must be text"),
        ({"chosen": "half \ud800 of a pair"}, "`chosen` is no valid Unicode text"),
        ({"rejected": "\udc00"}, "`rejected` is no valid Unicode text"),
        ({"prompt": [{"role": "user", "content": "Hi \ud83d"}]}, "`content` is no valid Unicode"),
        ({"id": "half \ud800 of a pair"}, "`id` is no valid Unicode text"),
        ({"category": "half \ud800 of a pair"}, "`category` is no valid Unicode text"),
    ],
)
def test_fields_that_would_fail_later_are_refused_where_they_stand(tmp_path, change, message):
    row = {
        "id": "a",
        "source": "s",
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": "Yes.",
        "rejected": "No.",
    }
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({**row, **change}) + "\n")
    with pytest.raises(DataError, match=f"pairs.jsonl:1: {message}"):
        load_pairs(str(file))


def test_an_id_that_no_output_file_could_hold_is_refused_before_scoring(write):
    path = write("rows.jsonl", [PAIR, {**PAIR, "id": "half \ud800 of a pair"}])
    with pytest.raises(DataError, match=re.escape(f"{path}:2: `id` is no valid Unicode text")):
        load_scorable(path)


def test_a_folder_that_datasets_saved_is_read_in_its_order(tmp_path):
    import datasets

    rows = [{**RATING, "id": f"r{k}"} for k in range(7)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=3)
    loaded = ratings_of(str(tmp_path / "saved"))
    assert [row.id for row in loaded] == [f"r{k}" for k in range(7)]
    assert loaded[0].ratings == ratings_of(str(tmp_path / "saved"))[6].ratings
    (tmp_path / "saved" / "data-00000-of-00003.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"data-00000-of-00003\.arrow: unreadable: "):
        ratings_of(str(tmp_path / "saved"))
    mapped = [{"question": "Hi?", "reply": "Hello.", "stars": 4}]
    datasets.Dataset.from_list(mapped).save_to_disk(tmp_path / "mapped")
    columns = {"prompt": "question", "response": "reply", "ratings": {"honesty": "stars"}}
    (row,) = load_ratings(str(tmp_path / "mapped"), objectives=OBJECTIVES, columns=columns)
    assert (row.conversation.response, row.ratings) == ("Hello.", {"honesty": 4.0})
