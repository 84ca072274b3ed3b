import gzip
import json

import pytest
from conftest import conversation, make_model
from test_cli import error_of, run, write_rows

from armo.data.sources import load_pairs

RATED = [
    {
        "id": f"{p}{k}",
        "source": "s",
        "messages": conversation(f"Is {p} safe?", f"Yes, {k} times."),
        "ratings": {"helpfulness": k, "honesty": 6 - k},
    }
    for p in ("honey", "milk")
    for k in (1, 3, 5)
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_model(encoder).save_pretrained(folder)
    return folder


def test_annotate_writes_the_rows_again_and_says_what_was_not_scored(saved, tmp_path):
    rows = [*RATED, {"id": "none"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    command = ["data", "annotate", f"model={saved}", "input=rows.jsonl", "output=out.jsonl.gz"]
    status, out, err = run(*command, "prefix=m_", "device=cpu")
    assert status == 0, err
    assert "saved out.jsonl.gz: 7 rows, 1 not scored" in out
    assert "not scored: 1 x needs `messages`" in out
    with gzip.open("out.jsonl.gz", "rt") as file:
        found = [json.loads(line) for line in file]
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert found[0]["messages"] == rows[0]["messages"]
    assert isinstance(found[0]["m_reward_honesty"], float)
    content = (tmp_path / "out.jsonl.gz").read_bytes()
    assert run(*command, "prefix=m_", "device=cpu")[0] == 0
    assert (tmp_path / "out.jsonl.gz").read_bytes() == content


def test_annotate_reads_several_files_with_a_map_of_columns(saved, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text(f"q,a,n\nWhy {name}?,So.,{name}\n")
    status, _, err = run(
        "data",
        "annotate",
        f"model={saved}",
        "input=[a.csv,b.csv]",
        "columns={prompt: q, response: a}",
        "output=out/c.csv",
        "device=cpu",
    )
    assert status == 0, err
    lines = (tmp_path / "out" / "c.csv").read_text().splitlines()
    assert lines[0].startswith("q,a,n,armo_score,armo_reward_helpfulness")
    assert [line.split(",")[2] for line in lines[1:]] == ["a", "b"]


def test_pairs_makes_pairs_that_train_reads(tmp_path):
    write_rows(tmp_path / "rows.jsonl", RATED)
    status, out, err = run(
        "data", "pairs", "data.ratings.path=rows.jsonl", "by=helpfulness", "output=pairs.jsonl"
    )
    assert status == 0, err
    assert "saved pairs.jsonl: 6 pairs" in out
    found = load_pairs("pairs.jsonl")
    assert {pair.margin for pair in found} == {0.5, 1.0}
    assert all("5" in pair.chosen or "1" in pair.rejected for pair in found)


def test_pairs_against_given_ones_shows_by_objective_who_agrees(tmp_path):
    write_rows(tmp_path / "rows.jsonl", RATED)
    ratings = "data.ratings.path=rows.jsonl"
    weights = "by={helpfulness: 3, honesty: 1}"
    assert run("data", "pairs", ratings, weights, "output=pairs.jsonl")[0] == 0
    status, out, err = run("data", "pairs", ratings, weights, "against=pairs.jsonl")
    assert status == 0, err
    shown = {
        cells[1].strip(): [cell.strip() for cell in cells[3:8]]
        for cells in (line.split("│") for line in out.splitlines())
        if len(cells) > 8
    }
    assert shown["helpfulness"] == ["6", "6", "0", "0", "1.000"]
    assert shown["honesty"] == ["6", "0", "0", "6", "0.000"]
    assert shown["all, weighted"] == ["6", "6", "0", "0", "1.000"]


def test_pairs_wants_either_something_to_make_or_something_to_compare(tmp_path):
    write_rows(tmp_path / "rows.jsonl", RATED)
    ratings = "data.ratings.path=rows.jsonl"
    assert "give `output`" in error_of("data", "pairs", ratings, "by=helpfulness")
    both = error_of("data", "pairs", ratings, "output=a.jsonl", "against=a.jsonl")
    assert "or `against`" in both
    assert "`by` is needed" in error_of("data", "pairs", ratings, "output=a.jsonl")


@pytest.mark.parametrize("arguments", [["data"], ["data", "nothing"]])
def test_data_names_what_may_follow(arguments):
    status, _, err = run(*arguments)
    assert status == 2
    assert "armo data needs one of " in err
    assert "annotate, pairs" in err


@pytest.mark.parametrize("setting", ["input", "output"])
def test_a_setting_that_annotate_needs_is_wrong_usage_without(setting):
    given = {"model": "none", "input": "i.jsonl", "output": "o.jsonl"}
    del given[setting]
    status, _, err = run("data", "annotate", *(f"{k}={v}" for k, v in given.items()))
    assert status == 2
    assert f"{setting} is needed" in err
