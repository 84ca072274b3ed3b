import json
import logging

import pytest
import yaml
from conftest import conversation

from armo.data.objectives import ObjectiveSet
from armo.data.rlhflow import stream_standard_pairs
from armo.data.sources import DataError

TALK = conversation("Hi", "Hello.")


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


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
