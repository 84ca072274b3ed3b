import json

import pytest
from planted_rows import clean_rows, write_sets

from armo.data.check_files import files_by_kind, observed_objectives
from armo.data.sources import DataError


def test_files_are_sorted_by_what_their_rows_are(tmp_path):
    paths = write_sets(tmp_path, clean_rows())
    found = files_by_kind(str(tmp_path))
    assert found == {kind: [path] for kind, path in paths.items()}
    assert files_by_kind([paths["lists"], paths["pairs"]]) == {
        "lists": [paths["lists"]],
        "pairs": [paths["pairs"]],
    }


def test_a_map_of_columns_says_what_rows_are(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("q,a,b\nWhy?,yes,no\n")
    columns = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert files_by_kind(str(path), columns=columns) == {"pairs": [str(path)]}
    columns = {"prompt": "q", "responses": ["a", "b"], "ranks": ["a", "b"]}
    assert files_by_kind(str(path), columns=columns) == {"lists": [str(path)]}


def test_a_bad_first_line_is_passed_over(tmp_path):
    paths = write_sets(tmp_path, {"pairs": ["{", clean_rows()["pairs"][0]]})
    assert files_by_kind(paths["pairs"]) == {"pairs": [paths["pairs"]]}


@pytest.mark.parametrize("content", ["", "{\n", "\n\n"])
def test_a_file_without_a_row_is_an_error(tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"rows\.jsonl: no rows that can be read"):
        files_by_kind(str(tmp_path))


def test_scales_are_from_the_lowest_to_the_highest_rating(tmp_path):
    given = [
        {"honesty": 3, "wit": 2.5, "spare": None, "": 1},
        {"honesty": -1, "care": 7, "wit": True, "text": "high"},
        {"honesty": float("inf"), "wit": 10**400},
        "none",
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"ratings": ratings}) + "\n" for ratings in given) + "{\n")
    objectives = observed_objectives(str(path))
    assert [(o.name, o.low, o.high) for o in objectives.objectives] == [
        ("honesty", -1, 3),
        ("wit", 2.5, 3.5),
        ("care", 7, 8),
    ]


def test_scales_of_a_table_are_those_of_its_columns(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("q,a,n\nWhy?,yes,4\nWhy?,no,1\nWhy?,no,high\n")
    columns = {"prompt": "q", "response": "a", "ratings": {"clarity": "n"}}
    objectives = observed_objectives(str(path), columns=columns)
    assert [(o.name, o.low, o.high) for o in objectives.objectives] == [("clarity", 1, 4)]


def test_without_ratings_there_are_no_objectives(tmp_path):
    paths = write_sets(tmp_path, {"pairs": clean_rows()["pairs"][:2]})
    assert observed_objectives(paths["pairs"]) is None
