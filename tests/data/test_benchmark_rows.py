import gzip
import json
import logging

import pytest

from armo.data.benchmarks import (
    JUDGE_BENCH,
    PRIOR_SETS,
    load_builtin_test,
    load_judge_bench,
    load_preferences,
    load_reward_bench,
    load_reward_bench_2,
    load_rm_bench,
    load_suite,
)
from armo.data.conversation import Message
from armo.data.sources import DataError, load_pairs

PAIR = {
    "prompt": "How?",
    "chosen": "So.",
    "chosen_model": "human",
    "rejected": "No.",
    "rejected_model": "gpt",
    "subset": "hep-go",
    "id": 7,
}
BEST = {
    "id": "7",
    "prompt": "How?",
    "chosen": ["So."],
    "rejected": ["No.", "Never.", "Why?"],
    "num_correct": 1,
    "num_rejected": 3,
    "total_completions": 4,
    "models": ["a", "b", "c", "d"],
    "subset": "Precise IF",
}
TIED = {**BEST, "subset": "Ties", "id": "tied:3", "chosen": ["1", "2"], "num_correct": 2}
TIED["total_completions"] = 5
STYLED = {
    "id": 12,
    "prompt": "How?",
    "chosen": ["a", "a, at length", "**a**"],
    "rejected": ["b", "b, at length", "**b**"],
    "domain": "safety-refuse",
}
JUDGED = {
    "pair_id": "e302",
    "original_id": 1420,
    "source": "mmlu-pro-law",
    "question": "Is it?",
    "response_model": "gpt-4o-2024-05-13",
    "response_A": "Yes.",
    "response_B": "No.",
    "label": "B>A",
}
TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "How?"},
]
NATIVE = {
    "id": "a",
    "source": "s",
    "prompt": TURNS,
    "chosen": "So.",
    "rejected": "No.",
    "category": "hhh/honest",
}
NATIVE_LIST = {"id": "b", "source": "s", "prompt": TURNS, "responses": ["x", "y"], "correct": [1]}

LOADERS = {
    "reward_bench": (load_reward_bench, PAIR),
    "reward_bench_2": (load_reward_bench_2, BEST),
    "rm_bench": (load_rm_bench, STYLED),
    "judge_bench": (lambda path: load_judge_bench(path)[0], JUDGED),
}
EACH = pytest.mark.parametrize("name", LOADERS)


def write(path, rows):
    """Rows in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    array = ".json" in path.suffixes
    text = json.dumps(rows, indent=1) if array else "".join(json.dumps(r) + "\n" for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


# One row of each source.


def test_a_row_of_reward_bench(tmp_path):
    benchmark = load_reward_bench(write(tmp_path / "rows.jsonl", [PAIR]))
    (row,) = benchmark.rows
    assert (benchmark.name, benchmark.title, benchmark.rule) == (
        "reward_bench",
        "RewardBench",
        "reward_bench",
    )
    assert row.prompt == (Message("user", "How?"),)
    assert (row.responses, row.correct) == (("So.", "No."), (0,))
    assert (row.id, row.category) == ("hep-go/7", "hep-go")


def test_rows_of_reward_bench_2(tmp_path):
    best, tied = load_reward_bench_2(write(tmp_path / "rows.jsonl", [BEST, TIED])).rows
    assert best.responses == ("So.", "No.", "Never.", "Why?")
    assert (best.correct, best.id, best.category) == ((0,), "Precise IF/7", "Precise IF")
    assert (tied.correct, tied.id) == ((0, 1), "Ties/tied:3")
    assert len(tied.responses) == 5


def test_a_row_of_rm_bench_keeps_the_order_of_styles(tmp_path):
    (row,) = load_rm_bench(write(tmp_path / "rows.jsonl", [STYLED])).rows
    assert row.responses == ("a", "a, at length", "**a**", "b", "b, at length", "**b**")
    assert (row.correct, row.category) == ((0, 1, 2), "safety-refuse")


def test_rows_of_judge_bench_are_apart_by_the_model_that_wrote_them(tmp_path):
    rows = [JUDGED, {**JUDGED, "label": "A>B", "response_model": "claude-3-5-sonnet-20240620"}]
    path = write(tmp_path / "rows.jsonl", rows)
    gpt, claude = load_judge_bench(path)
    assert (gpt.name, claude.name) == ("judge_bench_gpt", "judge_bench_claude")
    assert (gpt.rows[0].responses, gpt.rows[0].correct) == (("Yes.", "No."), (1,))
    assert claude.rows[0].correct == (0,)
    assert gpt.rows[0].category == "knowledge/mmlu-pro-law"
    assert [b.name for b in load_judge_bench(path, splits=["claude"])] == ["judge_bench_claude"]


@pytest.mark.parametrize("source", JUDGE_BENCH)
def test_the_kinds_of_judge_bench(source, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**JUDGED, "source": source}])
    assert load_judge_bench(path)[0].rows[0].category == JUDGE_BENCH[source]


def test_a_prompt_may_have_several_turns(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**PAIR, "prompt": TURNS}])
    (row,) = load_reward_bench(path).rows
    assert [message.role for message in row.prompt] == ["user", "assistant", "user"]


# Files.


@EACH
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet"])
def test_each_benchmark_is_read_from_each_kind_of_file(name, suffix, tmp_path):
    load, row = LOADERS[name]
    (loaded,) = load(write(tmp_path / f"rows.{suffix}", [row])).rows
    (again,) = load(write(tmp_path / "folder" / f"x.{suffix}", [row]).rpartition("/")[0]).rows
    assert loaded == again
    assert len(loaded.responses) >= 2


def test_json_lines_in_a_json_file_are_read_as_such(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(f"{json.dumps(PAIR)}\n{json.dumps({**PAIR, 'id': 8})}\n")
    assert len(load_reward_bench(str(path)).rows) == 2


def test_of_a_folder_the_files_named_after_the_split_are_read(tmp_path):
    write(tmp_path / "data" / "raw-00000-of-00001.parquet", [{**PAIR, "subset": "hep-js"}])
    write(tmp_path / "data" / "filtered-00000-of-00002.parquet", [PAIR])
    write(tmp_path / "data" / "filtered-00001-of-00002.parquet", [{**PAIR, "id": 8}])
    (tmp_path / "README.md").write_text("About.")
    assert [row.id for row in load_reward_bench(str(tmp_path)).rows] == ["hep-go/7", "hep-go/8"]


def test_rm_bench_is_read_from_its_files_by_domain_or_from_the_whole(tmp_path):
    bare = {key: value for key, value in STYLED.items() if key != "domain"}
    write(tmp_path / "chat_filtered.json", [bare])
    write(tmp_path / "safety-refuse_filtered.json", [bare, {**bare, "id": 13}])
    rows = load_rm_bench(str(tmp_path)).rows
    assert [row.category for row in rows] == ["chat", "safety-refuse", "safety-refuse"]
    write(tmp_path / "total_dataset.json", [STYLED])
    assert [row.id for row in load_rm_bench(str(tmp_path)).rows] == ["safety-refuse/12"]


@pytest.mark.parametrize("several", [True, False])
def test_what_datasets_saved_to_disk_is_read(several, tmp_path):
    import datasets

    saved = datasets.Dataset.from_list([PAIR])
    if several:
        other = datasets.Dataset.from_list([{**PAIR, "id": 1}])
        saved = datasets.DatasetDict({"raw": other, "filtered": saved})
    saved.save_to_disk(tmp_path / "saved")
    assert [row.id for row in load_reward_bench(str(tmp_path / "saved")).rows] == ["hep-go/7"]
    if several:
        with pytest.raises(DataError, match="has splits raw, filtered, not test"):
            load_reward_bench_2(str(tmp_path / "saved"))


# The hub.


@pytest.fixture
def hub(monkeypatch):
    """Sets by id and split, and what was asked for."""
    import datasets

    sets, asked = {}, []

    def load_dataset(path, *, split, revision, streaming, name, data_dir):
        assert not streaming, "benchmarks are read again and again"
        assert name is data_dir is None
        asked.append((path, split, revision))
        if (path, split) not in sets:
            raise ConnectionError("Couldn't reach the hub\non several lines")
        return datasets.Dataset.from_list(sets[path, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return sets, asked


def test_the_hub_is_asked_for_the_split_at_the_revision(hub):
    sets, asked = hub
    sets["allenai/reward-bench", "filtered"] = [PAIR]
    sets["allenai/reward-bench-2", "test"] = [BEST]
    sets["THU-KEG/RM-Bench", "train"] = [STYLED]
    sets["ScalerLab/JudgeBench", "gpt"] = [JUDGED]
    load_reward_bench(revision="abc")
    load_reward_bench_2()
    load_rm_bench()
    load_judge_bench(splits=["gpt"])
    assert asked == [
        ("allenai/reward-bench", "filtered", "abc"),
        ("allenai/reward-bench-2", "test", None),
        ("THU-KEG/RM-Bench", "train", None),
        ("ScalerLab/JudgeBench", "gpt", None),
    ]


def test_the_prior_sets_are_read_from_the_hub(hub):
    sets, asked = hub
    sets["allenai/reward-bench", "filtered"] = [PAIR]
    prior = {"prompt": TURNS, "chosen": "So.", "rejected": "No.", "subset": "something else"}
    for name in PRIOR_SETS:
        sets["allenai/preference-test-sets", name] = [prior, prior]
    benchmark = load_reward_bench(
        prior_sets="allenai/preference-test-sets", prior_sets_revision="def"
    )
    assert [row.category for row in benchmark.rows[1::2]] == list(PRIOR_SETS)
    assert benchmark.rows[1].id == "anthropic_helpful/0"
    assert len({row.id for row in benchmark.rows}) == 9
    assert asked[1:] == [("allenai/preference-test-sets", name, "def") for name in PRIOR_SETS]


def test_the_prior_sets_of_a_folder_are_those_that_are_there(tmp_path):
    path = write(tmp_path / "rows.jsonl", [PAIR])
    write(tmp_path / "prior" / "data" / "shp-00000.jsonl", [{**PAIR, "id": 1}])
    write(tmp_path / "prior" / "data" / "shpx.jsonl", [{**PAIR, "id": 2}])
    write(tmp_path / "prior" / "data" / "anthropic_harmless.jsonl", [PAIR])
    rows = load_reward_bench(path, prior_sets=str(tmp_path / "prior")).rows
    assert [row.id for row in rows] == ["hep-go/7", "shp/1"]
    with pytest.raises(DataError, match="no file is named after anthropic_helpful"):
        load_reward_bench(path, prior_sets=str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_one_line_that_says_what_to_do(hub):
    with pytest.raises(DataError) as error:
        load_rm_bench()
    assert "ConnectionError: Couldn't reach the hub on several lines" in str(error.value)
    assert "give a local folder with its files as its `path`" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["nowhere", "a/b/c", "data/rows.jsonl", "/nowhere/at/all"])
def test_what_is_no_file_and_no_id_is_not_looked_for_on_the_hub(path, hub):
    with pytest.raises(DataError, match="No such file or folder"):
        load_reward_bench(path)
    assert not hub[1]


# Rows that cannot be used.


@EACH
def test_a_missing_field_is_named_with_file_and_row(name, tmp_path):
    load, row = LOADERS[name]
    for field in {
        "reward_bench": ("prompt", "chosen", "rejected", "subset", "id"),
        "reward_bench_2": ("prompt", "chosen", "rejected", "subset", "id"),
        "rm_bench": ("prompt", "chosen", "rejected", "domain", "id"),
        "judge_bench": (
            "question",
            "response_A",
            "response_B",
            "label",
            "source",
            "pair_id",
            "response_model",
        ),
    }[name]:
        broken = {key: value for key, value in row.items() if key != field}
        path = write(tmp_path / "rows.jsonl", [row, broken])
        with pytest.raises(DataError, match=f"rows.jsonl:2: field `{field}`"):
            load(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("reward_bench", {"subset": "chat"}, "'chat', which is no subset of RewardBench"),
        ("reward_bench", {"chosen": ["So."]}, "field `chosen` must be text"),
        ("reward_bench", {"id": None}, "field `id` must be text or a whole number"),
        ("reward_bench", {"prompt": [{"content": "?"}]}, r"field `prompt\[0\]` needs `role`"),
        ("reward_bench", {"prompt": TURNS[:2]}, "ends with an assistant turn"),
        ("reward_bench", {"prompt": []}, "no user turn"),
        ("reward_bench_2", {"subset": "Chat"}, "not one of Factuality, Precise IF"),
        ("reward_bench_2", {"chosen": "So."}, "field `chosen` must be a list of text"),
        ("reward_bench_2", {"rejected": [1]}, r"field `rejected\[0\]` must be text"),
        ("reward_bench_2", {"rejected": []}, "must have a response each"),
        ("reward_bench_2", {"num_correct": 2}, "field `num_correct` is 2, but there are 1"),
        ("reward_bench_2", {"total_completions": 5}, "is 5, but there are 4"),
        (
            "reward_bench_2",
            {"chosen": ["a", "b"], "num_correct": 2, "total_completions": 5},
            "has 2 responses, but Precise IF needs one",
        ),
        ("reward_bench_2", {"subset": "Ties", "id": "3"}, "needs `ref:N` or `tied:N`"),
        ("reward_bench_2", {"subset": "Ties", "id": "tied:3"}, "has one response, but 'tied:3'"),
        ("rm_bench", {"domain": "poems"}, "'poems', not one of chat, code, math, safety"),
        ("rm_bench", {"rejected": ["a", "b"]}, "`rejected` must have three responses, has 2"),
        ("judge_bench", {"label": "A=B"}, "'A=B'; it must be 'A>B' or 'B>A'"),
        ("judge_bench", {"source": "gsm8k"}, "'gsm8k', which is none of JudgeBench"),
        ("judge_bench", {"response_model": "llama"}, "'llama', of neither split"),
        ("judge_bench", {"response_model": None}, "field `response_model` must be text"),
    ],
)
def test_a_wrong_field_is_named(name, change, message, tmp_path):
    load, row = LOADERS[name]
    with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{message}"):
        load(write(tmp_path / "rows.jsonl", [{**row, **change}]))


def test_rows_with_an_empty_text_are_left_out_and_counted(tmp_path, caplog):
    rows = [PAIR, {**PAIR, "chosen": " \n"}, {**PAIR, "prompt": ""}]
    path = write(tmp_path / "rows.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        benchmark = load_reward_bench(path)
    assert len(benchmark.rows) == 1
    assert benchmark.notes == ("2 rows with an empty text are left out",)
    assert "rows.jsonl:2: left out: field `chosen` is empty" in caplog.text
    assert load_reward_bench(write(tmp_path / "whole.jsonl", [PAIR])).notes == ()


def test_an_id_that_is_there_twice_gets_a_number_but_not_in_ties(tmp_path):
    path = write(tmp_path / "rows.jsonl", [BEST, {**BEST, "subset": "Math"}, BEST, BEST])
    ids = [row.id for row in load_reward_bench_2(path).rows]
    assert ids == ["Precise IF/7", "Math/7", "Precise IF/7 (2)", "Precise IF/7 (3)"]
    with pytest.raises(DataError, match=r"rows.jsonl:2: id 'Ties/tied:3' is there already"):
        load_reward_bench_2(write(tmp_path / "rows.jsonl", [TIED, TIED]))


def test_responses_may_be_the_same(tmp_path):
    (row,) = load_reward_bench(write(tmp_path / "a.jsonl", [{**PAIR, "chosen": "No."}])).rows
    assert row.responses == ("No.", "No.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "rows.json row 1: not a JSON object"),
        ('[{"a": 1}', "rows.json: malformed JSON"),
        ("[]", "rows.json: no rows"),
    ],
)
def test_an_unreadable_json_file_is_named(text, message, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_reward_bench(str(tmp_path / "rows.json"))


def test_folders_and_files_without_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="in this folder"):
        load_reward_bench(str(tmp_path))
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(DataError, match="needs one of the endings"):
        load_reward_bench(str(tmp_path / "rows.txt"))
    with pytest.raises(ValueError, match="`splits` knows gpt, claude, not llama"):
        load_judge_bench(str(tmp_path), splits=["llama"])
    with pytest.raises(DataError, match="no rows of claude"):
        load_judge_bench(write(tmp_path / "a.jsonl", [JUDGED]), splits=["claude"])


# Armo's own format, the built-in corpus, whole folders.


def test_own_pairs_and_lists_make_a_benchmark(tmp_path):
    write(tmp_path / "mine" / "a.jsonl", [NATIVE, {**NATIVE, "id": "tie", "preference": 0.5}])
    write(tmp_path / "mine" / "b.jsonl.gz", [NATIVE_LIST])
    benchmark = load_preferences(str(tmp_path / "mine"))
    assert (benchmark.name, benchmark.title, benchmark.rule) == ("pairs", "mine", "pairs")
    pair, tie, several = benchmark.rows
    assert (pair.responses, pair.correct, pair.category) == (("So.", "No."), (0,), "hhh/honest")
    assert tie.ranking == (0.0, 0.0)
    assert several.correct == (1,)
    named = load_preferences([str(tmp_path / "mine" / "a.jsonl")], name="x", title="Mine")
    assert (named.name, named.title, len(named.rows)) == ("x", "Mine", 2)


def test_own_pairs_may_have_other_columns(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("question,good,bad\nHow?,So.,No.\n")
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    (row,) = load_preferences(str(path), columns=columns).rows
    assert (row.prompt[0].content, row.responses) == ("How?", ("So.", "No."))


def test_the_built_in_test_side_is_what_a_run_keeps():
    benchmark = load_builtin_test()
    assert [row.id for row in benchmark.rows] == [
        pair.id for pair in load_pairs("builtin") if pair.split == "test"
    ]
    assert {row.category for row in benchmark.rows} == {
        "safety",
        "code",
        "how_to",
        "advice",
        "factual",
        "writing",
    }
    assert all(row.correct == (0,) for row in benchmark.rows)


def test_a_suite_is_what_is_in_a_folder_by_any_spelling(tmp_path):
    write(tmp_path / "reward-bench" / "filtered.jsonl", [PAIR])
    write(tmp_path / "preference-test-sets" / "shp.jsonl", [{**PAIR, "id": 1}])
    write(tmp_path / "RM-Bench" / "total_dataset.json", [STYLED])
    write(tmp_path / "JudgeBench" / "gpt.jsonl", [JUDGED])
    write(tmp_path / "reward_bench_2" / "test.jsonl", [BEST])
    write(tmp_path / "pairs" / "own.jsonl", [NATIVE])
    (tmp_path / ".cache").mkdir(exist_ok=True)
    (tmp_path / "notes.txt").write_text("")
    suite = load_suite(str(tmp_path))
    assert [benchmark.name for benchmark in suite] == [
        "reward_bench",
        "reward_bench_2",
        "rm_bench",
        "judge_bench_gpt",
        "pairs",
    ]
    assert [row.category for row in suite[0].rows] == ["hep-go", "shp"]


def test_a_suite_names_what_it_does_not_know(tmp_path):
    with pytest.raises(DataError, match="No such folder"):
        load_suite(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no sub-folder with a benchmark"):
        load_suite(str(tmp_path))
    write(tmp_path / "rm_bench" / "a.jsonl", [STYLED])
    (tmp_path / "RM-Bench").mkdir()
    with pytest.raises(DataError, match="are the same benchmark"):
        load_suite(str(tmp_path))
    (tmp_path / "RM-Bench").rename(tmp_path / "arena")
    with pytest.raises(DataError, match="arena: no benchmark of that name; known are reward_bench"):
        load_suite(str(tmp_path))
