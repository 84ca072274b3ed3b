import json
import logging

import pytest
import yaml
from conftest import conversation

from armo.data.objectives import ObjectiveSet
from armo.data.rlhflow import stream_merged_ratings, stream_standard_pairs
from armo.data.sources import DataError

OBJECTIVES = ObjectiveSet.from_mapping(
    {
        "helpsteer-verbosity": {"low": -0.5, "high": 4.5},
        "beavertails-is_safe": {"low": 0, "high": 1},
    }
)
TALK = conversation("Hi", "Hello.")


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def rated(**labels):
    columns = {"helpsteer-verbosity": None, "beavertails-is_safe": None}
    names = {"verbosity": "helpsteer-verbosity", "safe": "beavertails-is_safe"}
    return {"messages": TALK, **columns, **{names[name]: x for name, x in labels.items()}}


def test_labels_come_back_as_they_are_once_rescaled(tmp_path):
    rows = [rated(verbosity=0.1), rated(verbosity=0.9, safe=1), rated(safe=0.0), rated(safe=True)]
    read = [*stream_merged_ratings(write(tmp_path, rows), objectives=OBJECTIVES)]
    assert read[0].ratings == {"helpsteer-verbosity": pytest.approx(0.0)}, "0 to 4, by raters"
    scales = {objective.name: objective for objective in OBJECTIVES.objectives}
    labels = [{n: scales[n].to_unit(x) for n, x in row.ratings.items()} for row in read]
    assert labels == [
        {"helpsteer-verbosity": pytest.approx(0.1)},
        {"helpsteer-verbosity": pytest.approx(0.9), "beavertails-is_safe": 1.0},
        {"beavertails-is_safe": 0.0},
        {"beavertails-is_safe": 1.0},
    ]
    assert [row.source for row in read] == ["helpsteer", "helpsteer", "beavertails", "beavertails"]
    assert len({row.id for row in read}) == 4


def test_parquet_is_read_and_rows_without_a_label_or_an_answer_are_left_out(tmp_path, caplog):
    import datasets

    rows = [rated(safe=1.0), rated(), rated(safe=0.5) | {"messages": TALK[:1]}]
    rows = [row | {"helpsteer-verbosity": 0.5 if k == 0 else None} for k, row in enumerate(rows)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "train-0.parquet"))
    with caplog.at_level(logging.WARNING):
        read = [*stream_merged_ratings(str(tmp_path), objectives=OBJECTIVES)]
    assert [row.ratings["beavertails-is_safe"] for row in read] == [1.0]
    assert read[0].prompt[0].content == "Hi"
    assert "left out 2 rows" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TALK, "helpsteer-verbosity": 0.5}, "no column beavertails-is_safe"),
        (rated(safe=1.5), r"train.jsonl:1: label of 'beavertails-is_safe' must be in \[0, 1\]"),
        (rated(safe="N/A"), "must be in"),
        (rated(safe=float("nan")), "must be in"),
        (rated(safe=1) | {"messages": "Hi"}, "must be a list of messages"),
        (rated(safe=1) | {"messages": [{"role": "user"}]}, "needs `role` and `content`"),
    ],
)
def test_what_is_not_such_a_row_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        [*stream_merged_ratings(write(tmp_path, [row]), objectives=OBJECTIVES)]


def test_standard_pairs_have_one_prompt_and_two_answers(tmp_path, caplog):
    rows = [
        {"chosen": TALK, "rejected": conversation("Hi", "What?"), "chosen_score": "N/A"},
        {"chosen": TALK, "rejected": conversation("Hello", "What?")},
        {"chosen": TALK, "rejected": conversation("Hi", " Hello.")},
        {"chosen": TALK, "rejected": conversation("Hi", "")},
    ]
    folder = write(tmp_path / "SHP-standard" / "data", rows)
    other = write(tmp_path / "Other-standard" / "data", rows[:1])
    with caplog.at_level(logging.WARNING):
        pairs = [*stream_standard_pairs([folder, other])]
    assert [(p.source, p.chosen, p.rejected) for p in pairs] == [
        ("SHP-standard", "Hello.", "What?"),
        ("Other-standard", "Hello.", "What?"),
    ]
    assert "left out 3 pairs" in caplog.text
    assert len({pair.id for pair in pairs}) == 2
    with pytest.raises(DataError, match="no column rejected"):
        [*stream_standard_pairs(write(tmp_path / "bad", [{"chosen": TALK}]))]


def test_the_objectives_of_armorm_are_its_nineteen_in_order(request):
    file = request.config.rootpath / "conf/data/objectives/armorm.yaml"
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
