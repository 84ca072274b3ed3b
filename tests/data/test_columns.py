"""Tables that are not native: CSV files, and column maps for files of every format."""

import csv
import gzip
import json
import re
import tracemalloc
from pathlib import Path

import hydra
import pyarrow
import pyarrow.parquet
import pytest
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st

from armo.data.columns import LIST_FIELDS, PAIR_FIELDS, RATING_FIELDS, ColumnMap
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.sources import (
    DataError,
    load_lists,
    load_pairs,
    load_ratings,
    load_scorable,
    read_rows,
    stream_pairs,
    stream_ranked_lists,
)

OBJECTIVES = ObjectiveSet((Objective("clarity", 1, 5), Objective("honesty", 0, 1)))
COLUMNS = {
    "prompt": "question",
    "response": "answer",
    "ratings": {"clarity": "clear", "honesty": "honest (0-1)"},
}
TABLE = [
    {"question": "Why?", "answer": "Because.", "clear": "4", "honest (0-1)": " 0.5 "},
    {"question": "How,\r\nthen?", "answer": 'By "luck".', "clear": "", "honest (0-1)": "1e-1"},
]
PAIRS = [
    {"q": "Why?", "good": "Because.", "bad": "No.", "by": "2", "kind": "a/b"},
    {"q": "How?", "good": "So.", "bad": "No.", "by": "", "kind": ""},
]
PAIR_COLUMNS = {
    "prompt": "q",
    "chosen": "good",
    "rejected": "bad",
    "margin": "by",
    "category": "kind",
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a table to a file of the suffix's format; a string as it is."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name, rows, *, encoding="utf-8"):
        path = tmp_path / name
        if isinstance(rows, str):
            path.write_bytes(rows.encode(encoding))
        elif name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            opener = gzip.open if name.endswith(".gz") else open
            with opener(path, "wt", encoding=encoding, newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
        return str(path)

    return write


def rated(path, **options):
    return load_ratings(path, objectives=OBJECTIVES, **{"columns": COLUMNS, **options})


@pytest.mark.parametrize("name", ["mine.csv", "mine.csv.gz", "mine.jsonl", "mine.parquet"])
def test_a_map_reads_tables_of_every_format_alike(write, name):
    first, second = rated(write(name, TABLE))
    assert [turn.content for turn in first.prompt] == ["Why?"]
    assert [turn.role for turn in first.prompt] == ["user"]
    assert first.responses == ("Because.",)
    assert first.ratings == {"clarity": 4.0, "honesty": 0.5}
    assert (first.source, first.category, first.split, first.weight) == ("mine", "", None, 1.0)
    assert second.prompt[0].content == "How,\r\nthen?"
    assert second.responses == ('By "luck".',)
    assert second.ratings == {"honesty": 0.1}


def test_a_row_without_an_id_is_called_by_its_file_and_row(write):
    path = write("mine.csv", TABLE)
    assert [row.id for row in rated(path)] == [f"{path} row 2", f"{path} row 3"]
    path = write("mine.jsonl", TABLE)
    assert [row.id for row in rated(path)] == [f"{path}:1", f"{path}:2"]


def test_ids_sources_and_the_rest_are_read_from_the_columns_that_are_named(write):
    more = {"id": "number", "source": "by", "category": "kind", "split": "side", "weight": "n"}
    cells = {"number": "7", "by": "Ann", "kind": "x/y", "side": "test", "n": "2.5"}
    path = write("mine.csv", [TABLE[0] | cells, TABLE[1] | dict.fromkeys(cells, "")])
    first, second = rated(path, columns=COLUMNS | more)
    assert (first.id, first.source, first.category) == ("7", "Ann", "x/y")
    assert (first.split, first.weight) == ("test", 2.5)
    assert (second.id, second.source, second.category) == (f"{path} row 3", "mine", "")
    assert (second.split, second.weight) == (None, 1.0)


def test_columns_that_are_not_named_are_not_read(write):
    path = write("mine.csv", [row | {"split": "validation", "weight": "-"} for row in TABLE])
    assert [row.split for row in rated(path)] == [None, None]
    with pytest.raises(DataError, match=r"row 2: `split` must be train or test, got 'validation'"):
        rated(path, columns=COLUMNS | {"split": "split"})


def test_whole_numbers_of_a_table_do_as_ids_and_values_of_other_types_stay(write):
    rows = [{"q": "Why?", "a": "So.", "n": 7, "c": 2}, {"q": "How?", "a": "So.", "n": 8, "c": None}]
    columns = {"prompt": "q", "response": "a", "id": "n", "ratings": {"clarity": "c"}}
    for name in ("rows.jsonl", "rows.parquet"):
        loaded = rated(write(name, rows), columns=columns)
        assert [row.id for row in loaded] == ["7", "8"]
        assert [row.ratings for row in loaded] == [{"clarity": 2.0}, {}]
    with pytest.raises(DataError, match=r":1: rating of 'clarity' is not a number: True"):
        rated(write("rows.jsonl", [rows[0] | {"c": True}]), columns=columns)


def test_messages_ratings_and_prompts_of_several_turns_are_renamed_too(write):
    turns = [{"role": role, "content": "Hm?"} for role in ("system", "user", "assistant", "user")]
    answer = {"role": "assistant", "content": "So."}
    row = {"chat": [*turns, answer], "marks": {"clarity": 2}, "asked": turns, "said": "So."}
    path = write("rows.jsonl", [row])
    (whole,) = rated(path, columns={"messages": "chat", "ratings": "marks"})
    (parts,) = rated(path, columns={"prompt": "asked", "response": "said", "ratings": "marks"})
    assert whole == parts
    assert [turn.role for turn in whole.prompt] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_pairs_are_read_by_a_map(write, name):
    first, second = load_pairs(write(name, PAIRS), columns=PAIR_COLUMNS)
    assert (first.chosen, first.rejected, first.margin) == ("Because.", "No.", 2.0)
    assert (first.category, second.category, second.margin) == ("a/b", "", None)
    judged = PAIR_COLUMNS | {"judgements": {"clarity": "by"}, "preference": "by"}
    del judged["margin"]
    path = write(name, [PAIRS[0] | {"by": "0.75"}, PAIRS[1]])
    first, second = load_pairs(path, columns=judged, objectives=OBJECTIVES)
    assert (first.judgements, first.preference) == ({"clarity": 0.75}, 0.75)
    assert (second.judgements, second.preference) == ({}, 1.0)


def test_judges_see_the_mapped_source_and_category(write):
    pairs = stream_pairs(
        write("rows.csv", PAIRS),
        columns=PAIR_COLUMNS,
        objectives=OBJECTIVES,
        judges={"clarity": ["a"], "honesty": ["rows"]},
    )
    assert [row.judgements for row in pairs] == [{"clarity": 1.0, "honesty": 1.0}, {"honesty": 1.0}]


def test_a_csv_file_with_native_names_needs_no_map(write):
    native = {"q": "prompt", "good": "chosen", "bad": "rejected", "by": "margin"}
    rows = [{native[k]: v for k, v in row.items() if k in native} for row in PAIRS]
    path = write("rows.csv", rows)
    assert [(row.chosen, row.margin) for row in load_pairs(path)] == [
        ("Because.", 2),
        ("So.", None),
    ]


LIST_COLUMNS = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": ["ra", "rb", "rc"]}
LISTS = [
    {"q": "Why?", "a": "1", "b": "2", "c": "3", "ra": "2", "rb": "1", "rc": "1"},
    {"q": "How?", "a": "", "b": "2", "c": "3", "ra": "", "rb": "1", "rc": "2"},
]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_lists_have_a_column_per_response_and_per_rank(write, name):
    path = write(name, LISTS)
    rows = [*stream_ranked_lists(path, columns=LIST_COLUMNS)]
    assert rows == load_lists(path, columns=LIST_COLUMNS)
    assert [row.responses for row in rows] == [("1", "2", "3"), ("2", "3")]
    assert [row.ranks for row in rows] == [(2.0, 1.0, 1.0), (1.0, 2.0)]


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"ra": ""}, "column 'ra' is empty, and 'a' is not"),
        ({"b": " "}, "column 'b' is empty, and"),
    ],
)
def test_a_response_without_a_rank_is_an_error(write, cells, words):
    with pytest.raises(DataError, match=re.escape(f"rows.csv row 2: {words}")):
        load_lists(write("rows.csv", [LISTS[0] | cells]), columns=LIST_COLUMNS)


def test_rows_to_score_are_read_by_a_map_and_numbered_from_zero(write):
    path = write("mine.csv", TABLE)
    rows = load_scorable(path, columns={"prompt": "question", "response": "answer"})
    assert [row.responses for row in rows] == [("Because.",), ('By "luck".',)]
    assert [row.id for row in rows] == ["0", "1"]
    assert all(row.single for row in rows)
    path = write("mine2.csv", [{"prompt": "Why?", "response": "So.", "id": "x"}])
    assert [(row.id, row.responses) for row in load_scorable(path)] == [("x", ("So.",))]
    with pytest.raises(DataError, match=r"row 2: no prompt, response, .*; say in `columns`"):
        load_scorable(write("mine.csv", TABLE))


def test_the_built_in_corpus_stays_native_beside_a_table(write):
    objectives = ObjectiveSet(
        (
            Objective("clarity", 1, 5),
            *(Objective(name, 1, 5) for name in ("helpfulness", "honesty", "safety")),
            *(Objective(name, 0, 4, bias=True) for name in ("verbosity", "formatting")),
        )
    )
    paths = ["builtin", write("mine.csv", TABLE)]
    columns = COLUMNS | {"ratings": {"clarity": "clear"}}
    rows = load_ratings(paths, objectives=objectives, columns=columns)
    assert rows[:-2] == load_ratings("builtin", objectives=objectives)
    assert [row.ratings for row in rows[-2:]] == [{"clarity": 4.0}, {}]


def test_a_spreadsheets_mark_blank_rows_and_unnamed_columns_do_no_harm(write):
    header = "\ufeffquestion , clear,,answer,honest (0-1)"
    lines = [header, "", "Why?,4,,So.,", ",,,,", "How?,2,x,So.,0", "", ""]
    path = write("mine.csv", "\r\n".join(lines))
    rows = rated(path)
    assert [row.ratings for row in rows] == [{"clarity": 4.0}, {"clarity": 2.0, "honesty": 0.0}]
    assert [row.id for row in rows] == [f"{path} row 3", f"{path} row 5"]


def test_cells_are_read_whole_however_long(write):
    answer = "long, " * 100_000
    (row,) = rated(write("mine.csv", [TABLE[0] | {"answer": answer}]))
    assert row.responses == (answer,)


def test_a_table_is_read_row_by_row(write):
    rows = [PAIRS[0] | {"good": f"{k} " + "long " * 2000} for k in range(300)]
    path = write("rows.csv", rows)
    stream = stream_pairs(path, columns=PAIR_COLUMNS)
    next(stream)
    tracemalloc.start()
    assert sum(1 for _ in stream) == 299
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < Path(path).stat().st_size / 10


TEXT = st.text(st.characters(codec="utf-8")).filter(str.strip)


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "question": TEXT,
                "answer": TEXT,
                "clear": st.none() | st.floats(1, 5) | st.integers(1, 5),
            }
        ),
        min_size=1,
        max_size=8,
    )
)
def test_rows_written_as_csv_are_read_back_equal(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / "mine.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer", "clear"])
        writer.writeheader()
        writer.writerows(rows)
    assert [row["question"] for _, row in read_rows(path)] == [row["question"] for row in rows]
    columns = COLUMNS | {"ratings": {"clarity": "clear"}}
    loaded = rated(str(path), columns=columns)
    assert [(row.prompt[0].content, *row.responses) for row in loaded] == [
        (row["question"], row["answer"]) for row in rows
    ]
    assert [row.ratings.get("clarity") for row in loaded] == [row["clear"] for row in rows]


@pytest.mark.parametrize(
    "cell", ["N/A", "n/a ", "4,5", "four", "nan", "inf", "1_000", "80%", "--1"]
)
@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl"])
def test_a_cell_that_is_no_number_is_named_by_row_and_column(write, name, cell):
    path = write(name, [TABLE[0], TABLE[1] | {"clear": cell}])
    place = f"{path} row 3" if name == "mine.csv" else f"{path}:2"
    words = f"{place}: column 'clear': {cell!r} is not a number; add it to `missing`"
    with pytest.raises(DataError, match=re.escape(words)):
        rated(path)
    assert rated(path, missing=["", cell.strip()])[1].ratings == {"honesty": 0.1}


def test_an_empty_cell_is_missing_only_if_it_is_listed(write):
    path = write("mine.csv", TABLE)
    with pytest.raises(DataError, match=re.escape("row 3: column 'clear': '' is not a number")):
        rated(path, missing=["N/A"])


@pytest.mark.parametrize("cell", ["1", "+1.0", "1.", "10e-1", ".1e1", "1E0", " 1\n"])
def test_numbers_may_be_written_in_any_usual_way(write, cell):
    assert rated(write("mine.csv", [TABLE[0] | {"clear": cell}]))[0].ratings["clarity"] == 1.0


@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl", "mine.parquet"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(write, name):
    columns = COLUMNS | {"ratings": {"clarity": "clarity"}}
    words = "no column 'clarity'; there are 'question', 'answer', 'clear', 'honest (0-1)'"
    with pytest.raises(DataError, match=re.escape(words)):
        rated(write(name, TABLE), columns=columns)


@pytest.mark.parametrize(("column", "cell"), [("question", " "), ("answer", ""), ("answer", None)])
def test_an_empty_text_is_named_by_its_column(write, column, cell):
    path = write("mine.jsonl", [TABLE[0] | {column: cell}])
    with pytest.raises(DataError, match=re.escape(f"{path}:1: column '{column}' is empty")):
        rated(path)


def test_a_text_is_never_missing_for_what_it_says(write):
    (row,) = rated(write("mine.csv", [TABLE[0] | {"answer": "N/A"}]), missing=["", "N/A"])
    assert row.responses == ("N/A",)


def test_a_rating_off_the_scale_and_an_undeclared_objective_are_named(write):
    path = write("mine.csv", [TABLE[0] | {"clear": "6"}])
    with pytest.raises(DataError, match=r"row 2: rating 6\.0 of 'clarity' is outside its scale"):
        rated(path)
    with pytest.raises(DataError, match=r"row 2: objective 'wit' is not declared"):
        rated(path, columns=COLUMNS | {"ratings": {"wit": "clear"}})


def test_ids_may_not_repeat(write):
    path = write("mine.csv", [row | {"id": "7"} for row in TABLE])
    with pytest.raises(DataError, match=re.escape(f"id '7' stands at {path} row 2 already")):
        rated(path, columns=COLUMNS | {"id": "id"})


MALFORMED = {
    "a row too short": ("a,b\n1,2\n3\n", "row 3: 1 cells under 2 columns"),
    "a row too long": ("a,b\n1,2\n3,4,5\n", "row 3: 3 cells under 2 columns"),
    "a quote left open": ('a,b\n1,2\n3,"4\n5,6\n', "row 3: malformed CSV: unexpected end of data"),
    "text after a quote": ('a,b\n1,"2"x\n', "row 2: malformed CSV: ',' expected after '\"'"),
    "a name twice": ("a,b,a\n1,2,3\n", "row 1: column 'a' stands there twice"),
    "semicolons": ("a;b\n1;2\n", "row 1: columns are separated by ';'; save the file with commas"),
    "tabs": ("a\tb\n1\t2\n", "row 1: columns are separated by '\\t'"),
}


@pytest.mark.parametrize(("text", "words"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_table_is_named_by_file_and_row(write, text, words):
    path = write("mine.csv", text)
    with pytest.raises(DataError, match=re.escape(f"{path} {words}")):
        list(read_rows(Path(path)))


def rows_or_error(read):
    try:
        return [*read()], None
    except DataError as error:
        return [], str(error)


@given(st.binary() | st.text('a",\r\n\0;é', max_size=40).map(str.encode))
def test_whatever_a_file_holds_is_rows_or_one_error_that_names_it(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("table") / "mine.csv"
    path.write_bytes(content)
    rows, error = rows_or_error(lambda: read_rows(path))
    assert all(isinstance(cell, str) for _, row in rows for cell in row.values())
    assert error is None or str(path) in error


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(st.fixed_dictionaries({"question": VALUES, "answer": VALUES, "clear": VALUES, "n": VALUES}))
def test_whatever_a_cell_holds_is_a_row_or_one_error_that_names_it(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("table") / "mine.jsonl"
    path.write_text(json.dumps(row) + "\n")
    columns = {"prompt": "question", "response": "answer", "ratings": {"clarity": "clear"}}
    columns |= {"id": "n", "weight": "clear"}
    rows, error = rows_or_error(lambda: rated(str(path), columns=columns))
    assert [loaded.responses for loaded in rows] == [(row["answer"],)][: len(rows)]
    assert rows if error is None else f"{path}:1: " in error


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_another_encoding_is_an_error_that_says_what_to_do(write, encoding):
    path = write("mine.csv", "question,answer\nCafé?,Olé.\n", encoding=encoding)
    with pytest.raises(DataError, match=re.escape(path) + ": unreadable .*; save it as UTF-8"):
        rated(path)


def test_the_options_for_tables_read_them(write):
    marked = [TABLE[0], TABLE[1] | {"clear": "N/A"}]
    lists = f"{{prompt: q, responses: {LIST_COLUMNS['responses']}, ranks: [ra, rb, rc]}}"
    overrides = [
        *("data/ratings=csv", f"data.ratings.path={write('mine.csv', marked)}"),
        "data.ratings.columns={prompt: question, response: answer, ratings: {clarity: clear}}",
        'data.ratings.missing=["", "N/A"]',
        *("data/pairs=csv", f"data.pairs.path={write('pairs.csv', PAIRS)}"),
        "data.pairs.columns={prompt: q, chosen: good, rejected: bad}",
        *("data/lists=csv", f"data.lists.path={write('lists.csv', LISTS)}"),
        f"data.lists.columns={lists}",
    ]
    with hydra.initialize_config_module("armo.conf", version_base="1.3"):
        data = hydra.compose("train", overrides).data
    ratings, pairs, lists = (
        instantiate(section, _convert_="all") for section in (data.ratings, data.pairs, data.lists)
    )
    assert [row.ratings for row in ratings(objectives=OBJECTIVES)] == [{"clarity": 4.0}, {}]
    assert [row.chosen for row in pairs(objectives=OBJECTIVES)] == ["Because.", "So."]
    assert [len(row.responses) for row in lists()] == [3, 2]


def test_a_table_of_a_header_alone_has_no_rows(write):
    for text in ("", "question,answer\n"):
        path = write("mine.csv", text)
        with pytest.raises(DataError, match=re.escape(f"{path}: no rows")):
            rated(path)


def test_a_truncated_compressed_table_is_an_error(write):
    path = write("mine.csv.gz", TABLE * 500)
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=re.escape(path) + r": unreadable after row \d+"):
        rated(path)


BAD_MAPS = {
    "unknown field": (RATING_FIELDS, {"answer": "a"}, "`columns` names answer; the fields are id,"),
    "field of another kind": (RATING_FIELDS, {"chosen": "a"}, "`columns` names chosen"),
    "empty": (PAIR_FIELDS, {}, "`columns` must be {FIELD: COLUMN, ...}, got {}"),
    "no text": (PAIR_FIELDS, {"prompt": 3}, "`columns.prompt` must be the name of a column, got 3"),
    "several columns": (PAIR_FIELDS, {"prompt": ["a", "b"]}, "`columns.prompt` must be the name"),
    "list of ratings": (RATING_FIELDS, {"ratings": ["a"]}, "`columns.ratings` must be the name of"),
    "number in ratings": (RATING_FIELDS, {"ratings": {"a": 1}}, "{OBJECTIVE: COLUMN, ...}, got"),
    "number in lists": (LIST_FIELDS, {"responses": ["a", 1]}, "or a list of them, got ['a', 1]"),
    "messages and response": (
        RATING_FIELDS,
        {"messages": "a", "response": "b"},
        "`columns` has both `messages` and `prompt` or `response`; keep one",
    ),
    "fewer ranks": (
        LIST_FIELDS,
        {"responses": ["a", "b"], "ranks": ["c"]},
        "as many columns for `ranks` as for `responses`",
    ),
    "ranks in one column": (LIST_FIELDS, {"responses": ["a", "b"], "ranks": "c"}, "as many colum"),
    "responses in one column": (LIST_FIELDS, {"responses": "a", "ranks": ["c"]}, "as many column"),
    "ranks alone": (LIST_FIELDS, {"ranks": ["c"]}, "as many columns"),
    "correct": (LIST_FIELDS, {"responses": ["a", "b"], "correct": "c"}, "give `ranks`, not `corr"),
}


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(("fields", "columns", "words"), BAD_MAPS.values(), ids=BAD_MAPS)
def test_a_map_that_cannot_be_meant_is_an_error(fields, columns, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        ColumnMap(fields, columns)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("missing", ["N/A", ["", 0]])
def test_missing_is_a_list_of_texts(missing):
    with pytest.raises(ValueError, match="`missing` must be a list of texts, got"):
        ColumnMap(RATING_FIELDS, COLUMNS, missing)


def test_a_map_is_checked_before_a_file_is_read():
    with pytest.raises(ValueError, match="`columns` names answer"):
        stream_pairs("/no/such.csv", columns={"answer": "a"})


def test_a_map_without_a_response_says_which_columns_there_are():
    words = "no prompt, response; say in `columns` where they stand, there are 'q', 'a'"
    with pytest.raises(ValueError, match=words):
        ColumnMap(RATING_FIELDS, {"prompt": "q"}).native({"q": "Why?", "a": "So."})


def test_a_prompt_is_text_or_messages():
    with pytest.raises(ValueError, match="column 'q' must be text or a list of messages, got 3"):
        ColumnMap(PAIR_FIELDS, {"prompt": "q", "chosen": "a"}).native({"q": 3, "a": "So."})
