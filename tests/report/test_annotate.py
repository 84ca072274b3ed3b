import csv
import dataclasses
import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import conversation, make_model

from armo.data.conversation import Message
from armo.data.sources import DataError, ScorableRow
from armo.embed.backbone import Backbone
from armo.model.pretrained import read_seal
from armo.model.reward_model import ArmoRewardModel
from armo.report import annotate as module
from armo.report.annotate import SKIPPED, annotate

PROMPT = [{"role": "user", "content": "Is it safe?"}]
TALKS = [
    {"id": str(k), "messages": conversation(f"Is {k} safe?", f"Yes, {k} times."), "ratings": {}}
    for k in range(7)
]
PAIRS = [
    {"id": f"p{k}", "prompt": PROMPT, "chosen": f"Yes, {k}.", "rejected": "No!", "note": {"k": [k]}}
    for k in range(3)
]


@pytest.fixture(scope="module")
def loaded(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(encoder).save_pretrained(folder)
    return ArmoRewardModel.from_pretrained(folder, device="cpu")


def write(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def read(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        return [json.loads(line) for line in file]


def test_conversations_keep_their_fields_and_get_what_the_model_says(loaded, tmp_path):
    rows = [{**row, "more": [1, {"x": None}]} for row in TALKS]
    output = tmp_path / "out.jsonl"
    result = annotate(loaded, write(tmp_path / "in.jsonl", rows), output)
    found = read(output)
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    out = loaded.score([row["messages"] for row in rows])
    for k, row in enumerate(found):
        assert row["armo_score"] == pytest.approx(float(out.score[k]))
        assert row["armo_truncated"] is False
        assert row["armo_reason"] is None
        for j, name in enumerate(out.objectives):
            assert row[f"armo_reward_{name}"] == pytest.approx(float(out.rewards[k, j]))
            assert row[f"armo_weight_{name}"] == pytest.approx(float(out.gating_weights[k, j]))
            parts = float(out.contributions[k, j])
            assert row[f"armo_contribution_{name}"] == pytest.approx(parts)
    assert [*found[0]] == [*rows[0], *result.columns]
    assert "armo_uncertainty_honesty" not in result.columns  # this model does not know it
    assert (result.rows, result.scored, result.reasons) == (7, 7, {})


def test_pairs_have_values_in_the_order_of_their_responses_and_a_preference(loaded, tmp_path):
    output = tmp_path / "out.jsonl"
    annotate(loaded, write(tmp_path / "in.jsonl", PAIRS), output)
    for row in read(output):
        out = loaded.score_responses(PROMPT, [row["chosen"], row["rejected"]])
        assert row["armo_score"] == pytest.approx(out.score.tolist())
        assert row["armo_reward_harm"] == pytest.approx(out.rewards[:, 2].tolist())
        assert row["armo_weight_harm"] == pytest.approx(float(out.gating_weights[0, 2]))
        told = loaded.compare(PROMPT, row["chosen"], row["rejected"])
        assert row["armo_preference"] == pytest.approx(told.probability)
        assert row["armo_truncated"] == [False, False]


def test_of_a_model_that_knows_its_uncertainty_it_is_there(loaded, tmp_path, monkeypatch):
    class Doubt:
        def deviations(self, responses):
            return torch.arange(len(responses) * 5.0).reshape(-1, 5).double()

    monkeypatch.setattr(loaded, "uncertainty", Doubt())
    output = tmp_path / "out.jsonl"
    annotate(loaded, write(tmp_path / "in.jsonl", TALKS[:2]), output)
    assert [row["armo_uncertainty_honesty"] for row in read(output)] == [1.0, 6.0]


def test_weights_and_scale_are_those_of_score(loaded, tmp_path):
    output = tmp_path / "out.jsonl"
    path = write(tmp_path / "in.jsonl", TALKS[:1])
    annotate(loaded, path, output, weights={"harm": 1.0}, scale="rating")
    [row] = read(output)
    out = loaded.score([TALKS[0]["messages"]], weights={"harm": 1.0}, scale="rating")
    assert row["armo_score"] == pytest.approx(float(out.score[0]))
    assert row["armo_reward_harm"] == pytest.approx(float(out.rewards[0, 2]))
    assert row["armo_weight_harm"] == 1.0


def test_rows_that_cannot_be_scored_stay_with_a_reason_and_are_counted(loaded, tmp_path):
    bad = [
        {"id": "empty", "messages": conversation("Why?", " ")},
        {"id": "open", "messages": PROMPT},
        {"id": "half", "messages": conversation("Why?", "\ud800")},
        {"id": "pair", "prompt": PROMPT, "chosen": "a", "rejected": "b"},
        {"nothing": 1},
        {"id": "open too", "messages": PROMPT},
    ]
    rows = [TALKS[0], *bad, TALKS[1]]
    output = tmp_path / "out.jsonl"
    result = annotate(loaded, write(tmp_path / "in.jsonl", rows), output)
    found = read(output)
    assert [
        {name: each[name] for name in row} for row, each in zip(rows, found, strict=True)
    ] == rows
    assert [row["armo_score"] is None for row in found] == [False, *[True] * 6, False]
    reasons = [row["armo_reason"] for row in found]
    assert reasons[0] is reasons[-1] is None
    for reason, words in zip(
        reasons[1:-1],
        [
            "is empty",
            "must be the assistant's",
            "no valid Unicode",
            "among conv",
            "needs `mess",
            "last",
        ],
        strict=True,
    ):
        assert words in reason
    assert (result.rows, result.scored) == (8, 2)
    assert result.reasons[reasons[2]] == 2
    assert sum(result.reasons.values()) == 6
    assert all(set(result.columns) <= set(row) for row in found)


def load_with(encoder, folder, policy):
    spec = dataclasses.replace(encoder.spec, on_overlong=policy)
    backbone = Backbone(spec, model=encoder.model, tokenizer=encoder.tokenizer)
    make_model(backbone).save_pretrained(folder)
    return ArmoRewardModel.from_pretrained(folder, device="cpu")


LONG = "safe " * 400


@pytest.mark.parametrize("policy", ["skip", "error"])
def test_a_response_that_is_too_long_has_no_score_and_the_others_have(policy, encoder, tmp_path):
    loaded = load_with(encoder, tmp_path / "model", policy)
    rows = [
        {"id": "a", "messages": conversation("Why?", "Because.")},
        {"id": "b", "messages": conversation("Why?", LONG)},
        {"id": "c", "messages": conversation("Why not?", LONG)},
        {"id": "d", "messages": conversation("Why not?", "Because.")},
    ]
    output = tmp_path / "out.jsonl"
    result = annotate(loaded, write(tmp_path / "in.jsonl", rows), output)
    found = read(output)
    assert [row["armo_score"] is None for row in found] == [False, True, True, False]
    assert [row["armo_weight_harm"] is None for row in found] == [False, True, True, False]
    assert (found[1]["armo_reason"] == SKIPPED) == (policy == "skip")
    assert "tokens" in found[1]["armo_reason"] or policy == "skip"
    assert result.scored == 2
    score = loaded.score([rows[3]["messages"]]).score
    assert found[3]["armo_score"] == pytest.approx(float(score))


def test_a_pair_of_which_one_is_skipped_keeps_the_score_of_the_other(encoder, tmp_path):
    loaded = load_with(encoder, tmp_path / "model", "skip")
    rows = [{"prompt": PROMPT, "chosen": LONG, "rejected": "No."}]
    output = tmp_path / "out.jsonl"
    result = annotate(loaded, write(tmp_path / "in.jsonl", rows), output)
    [row] = read(output)
    alone = float(loaded.score_responses(PROMPT, ["No."]).score)
    assert row["armo_score"] == [None, pytest.approx(alone)]
    assert row["armo_preference"] is None
    assert isinstance(row["armo_weight_harm"], float)
    assert (row["armo_reason"], result.scored) == (SKIPPED, 0)


class StopError(Exception):
    pass


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".csv", ".parquet"])
def test_a_call_that_was_cut_off_goes_on_and_gives_the_same_file(
    ending, loaded, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "CHUNK_RESPONSES", 2)
    columns = None
    if ending == ".parquet":
        path = str(tmp_path / "in.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TALKS_FLAT), path)
        columns = {"prompt": "q", "response": "a"}
    elif ending == ".csv":
        path = str(tmp_path / "in.csv")
        (tmp_path / "in.csv").write_text(
            "prompt,response\n" + "".join(f"Why {k}?,{k}\n" for k in range(7))
        )
    else:
        path = write(tmp_path / f"in{ending}", TALKS)
    whole, cut = tmp_path / f"whole{ending}", tmp_path / "other" / f"cut{ending}"
    annotate(loaded, path, whole, columns=columns)
    scored = []
    score = loaded.score
    monkeypatch.setattr(
        loaded, "score", lambda rows, **more: (scored.extend(rows), score(rows, **more))[1]
    )
    for chunks in (1, 2):
        left = iter(range(chunks))

        def stop(rows, left=left):
            if next(left, None) is None:
                raise StopError

        with pytest.raises(StopError):
            annotate(loaded, path, cut, columns=columns, on_rows=stop)
        assert not cut.exists()
    done = []
    result = annotate(loaded, path, cut, columns=columns, on_rows=done.append)
    assert cut.read_bytes() == whole.read_bytes()
    assert (result.rows, result.scored) == (7, 7)
    assert done == [2, 2, 2, 1]
    assert len(scored) == 7  # each once
    names = {file.name for file in cut.parent.iterdir()}
    assert names == {cut.name, f"{cut.name}.manifest.json"}


TALKS_FLAT = [{"q": f"Why {k}?", "a": f"Since {k}.", "n": k, "t": {"deep": [k]}} for k in range(7)]


def test_chunks_of_another_call_are_not_used(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_RESPONSES", 2)
    path, output = write(tmp_path / "in.jsonl", TALKS), tmp_path / "out.jsonl"

    def stop(rows):
        raise StopError

    with pytest.raises(StopError):
        annotate(loaded, path, output, on_rows=stop)
    write(tmp_path / "in.jsonl", TALKS[::-1])
    annotate(loaded, path, output)
    assert [row["id"] for row in read(output)] == [row["id"] for row in TALKS[::-1]]
    scores = loaded.score([row["messages"] for row in TALKS[::-1]]).score.tolist()
    assert [row["armo_score"] for row in read(output)] == pytest.approx(scores)


def test_what_is_there_already_is_not_made_again_unless_it_was_changed(
    loaded, tmp_path, monkeypatch
):
    path, output = write(tmp_path / "in.jsonl", TALKS), tmp_path / "out.jsonl"
    first = annotate(loaded, path, output)
    content = output.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(loaded, "score", None)
        assert annotate(loaded, path, output) == first
    output.write_text("changed")
    annotate(loaded, path, output)
    assert output.read_bytes() == content
    annotate(loaded, path, output, prefix="again_")
    assert "again_score" in read(output)[0]


def test_the_manifest_says_what_made_the_file(loaded, tmp_path):
    path, output = write(tmp_path / "in.jsonl", TALKS), tmp_path / "out.jsonl"
    annotate(loaded, path, output)
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest["seal"] == read_seal(loaded.folder)
    assert len(manifest["seal"]) == 64
    assert manifest["versions"]["armo"]
    assert manifest["model"] == str(loaded.folder)
    assert (manifest["rows"], manifest["scored"], manifest["beta"]) == (7, 7, 2.0)
    assert [*manifest["inputs"]] == [path]
    assert manifest["objectives"][0]["name"] == "helpfulness"


def test_parquet_keeps_the_types_of_its_columns(loaded, tmp_path):
    table = pyarrow.Table.from_pylist(TALKS_FLAT)
    table = table.set_column(2, "n", table["n"].cast(pyarrow.int16()))
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    output = tmp_path / "out.parquet"
    annotate(loaded, str(tmp_path / "in.parquet"), output, columns={"prompt": "q", "response": "a"})
    found = pyarrow.parquet.read_table(output)
    assert found.select(table.column_names).equals(table)
    talks = [conversation(row["q"], row["a"]) for row in TALKS_FLAT]
    scores = loaded.score(talks).score.tolist()
    assert found["armo_score"].to_pylist() == pytest.approx(scores)
    assert found.schema.field("armo_score").type == pyarrow.float64()
    assert found.schema.field("armo_truncated").type == pyarrow.bool_()


def test_parquet_pairs_have_lists(loaded, tmp_path):
    rows = [{"q": "Why?", "a": "Because.", "b": "No."}, {"q": "Why?", "a": " ", "b": "No."}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    output = tmp_path / "out.parquet"
    columns = {"prompt": "q", "chosen": "a", "rejected": "b"}
    annotate(loaded, str(tmp_path / "in.parquet"), output, columns=columns)
    first, second = pyarrow.parquet.read_table(output).to_pylist()
    assert len(first["armo_score"]) == 2
    assert second["armo_score"] is None
    assert second["armo_reason"] == "column 'a' is empty"


def test_csv_keeps_its_cells(loaded, tmp_path):
    cells = [
        ["prompt", "response", "note"],
        ["Why?", 'A "quote",\nand 02', "007"],
        ["Who?", "", "x"],
    ]
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows(cells)
    output = tmp_path / "out.csv"
    annotate(loaded, str(tmp_path / "in.csv"), output)
    with output.open(newline="") as file:
        found = list(csv.reader(file))
    assert [row[:3] for row in found] == cells
    first, second = (dict(zip(found[0], row, strict=True)) for row in found[1:])
    score = loaded.score([conversation("Why?", 'A "quote",\nand 02')]).score
    assert float(first["armo_score"]) == pytest.approx(float(score))
    assert (first["armo_truncated"], first["armo_reason"]) == ("false", "")
    assert (second["armo_score"], second["armo_reason"]) == ("", "column 'response' is empty")


def test_any_input_can_be_written_as_json_lines(loaded, tmp_path):
    (tmp_path / "in.csv").write_text("prompt,response\nWhy?,So.\n")
    annotate(loaded, str(tmp_path / "in.csv"), tmp_path / "out.jsonl.gz")
    [row] = read(tmp_path / "out.jsonl.gz")
    assert (row["prompt"], row["armo_reason"]) == ("Why?", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("in.jsonl", "`output` is a file of `input`"),
        ("out.parquet", "or as all files of `input` do, got out.parquet"),
        ("out.csv", "or as all files of `input` do, got out.csv"),
        ("out.txt", "must end with .jsonl or .jsonl.gz"),
    ],
)
def test_an_output_that_does_not_fit_is_refused_before_any_work(
    name, message, loaded, tmp_path, monkeypatch
):
    monkeypatch.setattr(loaded, "score", None)
    with pytest.raises(ValueError, match=re.escape(message)):
        annotate(loaded, write(tmp_path / "in.jsonl", TALKS), tmp_path / name)


def test_an_output_beside_the_files_of_a_folder_is_refused(loaded, tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, TALKS[:1])
    with pytest.raises(ValueError, match="would be read with the rest next time"):
        annotate(loaded, str(tmp_path), tmp_path / "out.jsonl")


def test_files_of_a_table_with_other_columns_are_named(loaded, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("prompt,response\nWhy?,So.\n")
    (tmp_path / "in" / "b.csv").write_text("prompt,response,more\nWhy?,So.,x\n")
    with pytest.raises(DataError, match=r"b.csv: has other columns than"):
        annotate(loaded, str(tmp_path / "in"), tmp_path / "out.csv")
    result = annotate(loaded, str(tmp_path / "in"), tmp_path / "out.jsonl")
    assert result.rows == 2


def test_two_models_annotate_the_same_rows_under_other_names_only(loaded, tmp_path):
    first = tmp_path / "first.jsonl"
    annotate(loaded, write(tmp_path / "in.jsonl", TALKS[:1]), first)
    with pytest.raises(
        DataError, match=r"first.jsonl:1: has a field 'armo_score' already; give an"
    ):
        annotate(loaded, str(first), tmp_path / "second.jsonl")
    annotate(loaded, str(first), tmp_path / "second.jsonl", prefix="b_")
    [row] = read(tmp_path / "second.jsonl")
    assert row["b_score"] == row["armo_score"]


def test_a_file_of_which_nothing_can_be_scored_is_an_error(loaded, tmp_path):
    path = write(tmp_path / "in.jsonl", [{"id": "a"}])
    with pytest.raises(
        DataError, match=re.escape("no row can be scored; the first one: ") + ".*:1:"
    ):
        annotate(loaded, path, tmp_path / "out.jsonl")


def test_a_broken_line_stops_it_and_what_was_done_stays_for_the_next_call(
    loaded, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "CHUNK_RESPONSES", 2)
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TALKS[:3]) + "{\n")
    with pytest.raises(DataError, match=r"in.jsonl:4: malformed JSON"):
        annotate(loaded, str(path), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_long_list_is_a_chunk_of_its_own(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_RESPONSES", 3)
    rows = [{"prompt": PROMPT, "responses": [f"{n} {k}" for k in range(n)]} for n in (1, 5, 2, 2)]
    done = []
    annotate(loaded, write(tmp_path / "in.jsonl", rows), tmp_path / "o.jsonl", on_rows=done.append)
    assert done == [2, 2]
    assert [len(row["armo_score"]) for row in read(tmp_path / "o.jsonl")] == [1, 5, 2, 2]


def test_a_row_to_score_says_its_conversations():
    row = ScorableRow("a", (Message("user", "Q"),), ("x", "y"), single=False)
    assert row.conversations == [
        [Message("user", "Q"), Message("assistant", "x")],
        [Message("user", "Q"), Message("assistant", "y")],
    ]
