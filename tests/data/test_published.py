import gzip
import json

import pytest

from armo.data.published import local_files, open_rows, read_messages, split_files
from armo.data.sources import DataError


def write(path, *numbers):
    """A file of rows `{"n": NUMBER}` in the format of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"n": number} for number in numbers]
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    text = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": json.dumps(rows),
        "csv": "".join(f"{line}\n" for line in ("n", *numbers)),
    }[path.name.removesuffix(".gz").rpartition(".")[2]]
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def numbers(path, splits=("train",), **settings):
    return [int(row.fields["n"]) for row in open_rows(path, splits=splits, **settings)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


# Files and folders.


@pytest.mark.parametrize(
    "ending", ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet"]
)
def test_each_kind_of_file_is_read_alone_and_in_a_folder(ending, tmp_path):
    file = write(tmp_path / "set" / f"rows.{ending}", 1, 2)
    for path in (file, file.parent):
        rows = [*open_rows(str(path), splits=("train",))]
        assert [int(row.fields["n"]) for row in rows] == [1, 2]
        assert [row.key for row in rows] == ["rows/1", "rows/2"]
        assert all(row.place.startswith(str(file)) for row in rows)


@pytest.mark.parametrize(
    "name",
    [
        "train.jsonl",
        "train-00000-of-00001.parquet",
        "train_sft.csv",
        "set_train.json",
        "data/train.jsonl.gz",
        "train/part.parquet",
        "data/train/part.jsonl",
    ],
)
def test_of_a_folder_what_is_called_after_the_split_is_read(name, tmp_path):
    write(tmp_path / name, 1)
    for other in ("test.jsonl", "trainer.jsonl", "notes.json", "data/validation.jsonl"):
        write(tmp_path / other, 9)
    assert numbers(str(tmp_path)) == [1]


def test_rows_are_numbered_through_all_files_of_a_split(tmp_path):
    write(tmp_path / "train-00001.jsonl", 3)
    write(tmp_path / "train-00000.jsonl", 1, 2)
    write(tmp_path / "test.jsonl", 4)
    rows = [*open_rows(str(tmp_path), splits=("train", "test"))]
    assert [(row.key, row.fields["n"]) for row in rows] == [
        ("test/1", 4),
        ("train/1", 1),
        ("train/2", 2),
        ("train/3", 3),
    ]


def test_where_no_name_has_a_split_all_files_are_read(tmp_path):
    write(tmp_path / "evol_instruct.jsonl", 1)
    write(tmp_path / "truthful_qa.jsonl", 2)
    (tmp_path / "README.md").write_text("About.")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert numbers(str(tmp_path)) == [1, 2]


@pytest.mark.parametrize("name", ["test.jsonl", "data/validation-0.parquet", "wild_test.json"])
def test_another_split_does_not_stand_in_for_the_one_that_is_missing(name, tmp_path):
    write(tmp_path / name, 1)
    with pytest.raises(DataError, match="is of another split, and no file is named after train"):
        numbers(str(tmp_path))
    assert numbers(str(tmp_path / name)) == [1], "a file that is named is read"


def test_a_configuration_or_a_folder_of_the_set_is_looked_for_in_the_folder(tmp_path):
    write(tmp_path / "train.jsonl", 1)
    write(tmp_path / "preference" / "train.jsonl", 2)
    assert numbers(str(tmp_path)) == [1]
    assert numbers(str(tmp_path), config="preference") == [2]
    assert numbers(str(tmp_path), folder="preference") == [2]
    assert numbers(str(tmp_path / "preference"), config="preference") == [2]
    assert numbers(str(tmp_path), config="other") == [1]


def test_paths_may_be_patterns_and_lists(tmp_path):
    write(tmp_path / "a" / "x.jsonl", 1)
    write(tmp_path / "b" / "x.jsonl", 2)
    write(tmp_path / "b" / "y.csv", 3)
    assert numbers(str(tmp_path / "*" / "x.jsonl")) == [1, 2]
    assert numbers(str(tmp_path / "**" / "*.*")) == [1, 2, 3]
    rows = [*open_rows([str(tmp_path / "b"), str(tmp_path / "a")], splits=("train",))]
    assert [(row.key, int(row.fields["n"])) for row in rows] == [("x/1", 2), ("y/1", 3), ("x/2", 1)]
    with pytest.raises(DataError, match="No such file or folder"):
        numbers(str(tmp_path / "*" / "z.jsonl"))


@pytest.mark.parametrize("several", [True, False])
def test_what_datasets_saved_to_disk_is_read_by_split(several, tmp_path):
    import datasets

    one, two = (datasets.Dataset.from_list([{"n": n}]) for n in (1, 2))
    saved = datasets.DatasetDict({"test": two, "train": one}) if several else one
    saved.save_to_disk(tmp_path / "saved")
    (row,) = open_rows(str(tmp_path / "saved"), splits=("train",))
    assert row.fields == {"n": 1}
    assert row.key == ("train/1" if several else "saved/1")
    if several:
        with pytest.raises(DataError, match="has splits test, train, not dev"):
            numbers(str(tmp_path / "saved"), ("dev",))


def test_only_the_files_of_the_splits_are_found_in_a_folder(tmp_path):
    one = write(tmp_path / "shp-0.jsonl", 1)
    write(tmp_path / "shpx.jsonl", 2)
    assert split_files(tmp_path, ("shp", "other")) == [("shp", one)]
    assert split_files(tmp_path / "nowhere", ("shp",)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "row 1: not a JSON object"), ("[{]", "malformed JSON"), ("", "no rows")],
)
def test_a_broken_json_file_is_named(content, message, tmp_path):
    (tmp_path / "rows.json").write_text(content)
    if message == "no rows":
        assert numbers(str(tmp_path)) == []
        return
    with pytest.raises(DataError, match=rf"rows.json.*{message}"):
        numbers(str(tmp_path))


def test_files_to_watch_are_those_on_disk(tmp_path):
    files = [
        write(tmp_path / "set" / "preference" / "train.jsonl", 1),
        write(tmp_path / "set" / "train.parquet", 1),
    ]
    (tmp_path / "set" / "README.md").write_text("About.")
    assert local_files(str(tmp_path / "set")) == files
    assert local_files(str(files[0])) == files[:1]
    assert local_files("nvidia/HelpSteer2") == []
    assert local_files([]) == []
    with pytest.raises(DataError, match="No such file or folder"):
        local_files("nowhere.jsonl")


# The hub.


@pytest.fixture
def hub(monkeypatch):
    """Answers as the hub does; what it was asked, and rows by split or an error for each."""
    import datasets

    asked, answers = [], {}

    def load_dataset(path, **settings):
        asked.append((path, settings))
        answer = answers[settings["split"]]
        if isinstance(answer, Exception):
            raise answer
        return iter(answer()) if callable(answer) else datasets.Dataset.from_list(answer)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, answers


def test_the_hub_is_asked_for_each_split_with_all_settings(hub):
    asked, answers = hub
    answers |= {"train": [{"n": 1}, {"n": 2}], "val": [{"n": 3}]}
    rows = [
        *open_rows(
            "nvidia/HelpSteer2",
            splits=("train", "validation"),
            hub=("train", "val"),
            config="c",
            folder="f",
            revision="abc",
            streaming=False,
        )
    ]
    common = {"name": "c", "data_dir": "f", "revision": "abc", "streaming": False}
    assert asked == [
        ("nvidia/HelpSteer2", {"split": "train", **common}),
        ("nvidia/HelpSteer2", {"split": "val", **common}),
    ]
    assert [(row.key, row.fields["n"]) for row in rows] == [
        ("train/1", 1),
        ("train/2", 2),
        ("val/1", 3),
    ]
    assert rows[1].place == "nvidia/HelpSteer2, split train, row 2"


def test_rows_are_asked_for_one_by_one_and_streamed_by_default(hub):
    asked, answers = hub
    read = []

    def endless():
        for number in range(1000):
            read.append(number)
            yield {"n": number}

    answers["train"] = endless
    rows = open_rows("a/b", splits=("train",))
    assert not asked
    assert next(rows).fields == {"n": 0}
    assert read == [0]
    assert asked[0][1]["streaming"] is True


def test_a_folder_of_that_name_goes_before_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "nvidia" / "HelpSteer2" / "train.jsonl", 7)
    assert numbers("nvidia/HelpSteer2") == [7]
    assert not hub[0]


def test_a_hub_that_fails_is_one_line_that_says_what_to_do(hub):
    _, answers = hub
    answers["train"] = ConnectionError("Couldn't reach\nthe hub")
    with pytest.raises(DataError) as failed:
        numbers("a/b")
    assert str(failed.value) == (
        "a/b, split train: is neither a file or folder here, nor can it be read from the hub after "
        "row 0 (ConnectionError: Couldn't reach the hub); give a local folder with its files as "
        "its `path`"
    )
    answers["train"] = RuntimeError("Dataset scripts are no longer supported, but found b.py")
    with pytest.raises(DataError, match=r"give `revision=refs/convert/parquet`, or a local folder"):
        numbers("a/b")


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_itself_takes_these_settings(streaming, tmp_path, monkeypatch):
    # A folder stands for the hub: `datasets` reads both in the same way.
    write(tmp_path / "preference" / "train.jsonl", 1, 2)
    write(tmp_path / "preference" / "validation.jsonl", 3)
    write(tmp_path / "train.jsonl", 9)
    monkeypatch.setattr("armo.data.published._is_on_hub", lambda _: True)
    rows = [
        *open_rows(
            str(tmp_path),
            splits=("train", "validation"),
            folder="preference",
            streaming=streaming,
        )
    ]
    assert [row.fields for row in rows] == [{"n": 1}, {"n": 2}, {"n": 3}]
    with pytest.raises(DataError, match=r"split test: .* \(\w*Error: .*give a local folder"):
        numbers(str(tmp_path), ("test",), folder="preference", streaming=streaming)


def test_a_stream_that_breaks_says_after_which_row(hub):
    def breaking():
        yield {"n": 1}
        raise TimeoutError("read timed out")

    hub[1]["train"] = breaking
    rows = open_rows("a/b", splits=("train",))
    assert next(rows).fields == {"n": 1}
    with pytest.raises(DataError, match=r"after row 1 \(TimeoutError: read timed out\)"):
        next(rows)


# Messages.


def test_messages_are_read():
    turns = read_messages([{"role": "user", "content": "Hi", "rank": 3}], "context")
    assert [(turn.role, turn.content) for turn in turns] == [("user", "Hi")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Hi", "field `context` must be a list of messages, got 'Hi'"),
        (None, "must be a list of messages"),
        ([{"role": "user"}], r"field `context\[0\]` needs `role` and `content`"),
        (["Hi"], r"field `context\[0\]` needs"),
        ([{"role": "user", "content": None}], r"field `context\[0\]`: .* must be text"),
        ([{"role": "human", "content": "Hi"}], "role 'human' is not one of"),
    ],
)
def test_what_is_no_conversation_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        read_messages(value, "context")
