import json
import math

import pytest
import torch
from test_benchmark_credits import TIES_ROWS, judge_bench, reward_bench, reward_bench_2

from armo.report.benchmarks import benchmark_credits
from armo.report.reward_bench_files import reward_bench_files

PAIRS = reward_bench(["hep-go", "hep-go", "alpacaeval-easy", "shp"])
SCORES = torch.tensor([2.0, 1.0, 1.0, 1.0, math.nan, 5.0, 0.25, 0.125]).double()


def read(path):
    text = path.read_text()
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines()]


def test_reward_bench_is_saved_as_its_command_and_its_leaderboard_save_it(tmp_path):
    files = reward_bench_files(tmp_path, PAIRS, "org/model-1.5", SCORES)
    names = [
        "org/model-1.5.json",
        "org/model-1.5_outputs.jsonl",
        "org/model-1.5_all.jsonl",
        "eval-set/org/model-1.5.json",
        "eval-set-scores/org/model-1.5.json",
        "pref-sets/org/model-1.5.json",
        "pref-sets-scores/org/model-1.5.json",
    ]
    assert files == [tmp_path / name for name in names]
    whole, outputs, both, subsets, columns, prior, _ = map(read, files)
    assert whole == {
        "accuracy": 1 / 3,
        "num_prompts": 3,
        "model": "org/model-1.5",
        "ref_model": None,
        "tokenizer": "org/model-1.5",
        "chat_template": None,
        "extra_results": {"alpacaeval-easy": 0.0, "hep-go": 0.5},
    }
    assert outputs[0] == {
        "prompt": [{"role": "user", "content": "p0"}],
        "results": 1,
        "scores_chosen": 2.0,
        "scores_rejected": 1.0,
        "text_chosen": [
            {"role": "user", "content": "p0"},
            {"role": "assistant", "content": "yes"},
        ],
        "text_rejected": [
            {"role": "user", "content": "p0"},
            {"role": "assistant", "content": "no"},
        ],
        "subset": "hep-go",
        "id": 0,
    }
    assert both == [
        {"chosen": 2.0, "rejected": 1.0},
        {"chosen": 1.0, "rejected": 1.0},
        {"chosen": None, "rejected": 5.0},
    ]
    about = {
        "model": "org/model-1.5",
        "model_type": "Seq. Classifier",
        "chat_template": "tokenizer",
    }
    assert subsets == {**about, "alpacaeval-easy": 0.0, "hep-go": 0.5}
    assert prior == {**about, "shp": 1.0}
    assert columns["results"] == [1, 0, 0]
    assert columns["subset"] == ["hep-go", "hep-go", "alpacaeval-easy"]
    assert columns["scores_rejected"] == [1.0, 1.0, 5.0]


def test_reward_bench_2_is_saved_with_the_scores_of_each_row(tmp_path):
    rows = [TIES_ROWS[0], ("Math", "7", 1, 3), *TIES_ROWS[1:], ("Focus", "8", 1, 3)]
    bench = reward_bench_2(rows)
    count = sum(len(row.responses) for row in bench.rows)
    scores = torch.arange(count, 0, -1).double()
    scores[5:9] = torch.tensor([3.0, 3.0, 2.0, 1.0])
    files = reward_bench_files(tmp_path, bench, "mine", scores)
    assert files == [
        tmp_path / "eval-set" / "local" / "mine.json",
        tmp_path / "eval-set-scores" / "local" / "mine.json",
    ]
    subsets, columns = map(read, files)
    credits = benchmark_credits(bench, scores[None])
    ties = [line.label for line in credits.lines].index("Ties")
    assert subsets["Ties"] == credits.results()[0, ties].item()
    assert (subsets["Math"], subsets["Focus"]) == (0.5, 1.0)
    assert columns["results"] == [None, 0.5, None, None, None, None, 1.0]
    assert columns["scores"][1] == [3.0, 3.0, 2.0, 1.0]
    assert columns["id"][:2] == ["tied:0", "7"]
    assert columns["num_correct"] == [3, 1, 1, 1, 2, 2, 1]
    assert columns["text"][1][0][-1] == {"role": "assistant", "content": "right 0"}


def test_the_published_code_s_steps_on_the_saved_files_give_the_same_numbers(tmp_path):
    """As its analysis does: accuracy by subset again from the scores, then sections."""
    _, _, _, subsets, columns, *_ = map(read, reward_bench_files(tmp_path, PAIRS, "a/b", SCORES))
    for subset in ("hep-go", "alpacaeval-easy"):
        right = [
            chosen is not None and chosen > rejected
            for chosen, rejected, name in zip(
                columns["scores_chosen"], columns["scores_rejected"], columns["subset"], strict=True
            )
            if name == subset
        ]
        assert subsets[subset] == sum(right) / len(right)


def test_other_benchmarks_and_odd_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no files of RewardBench's form"):
        reward_bench_files(
            tmp_path, judge_bench([("livecodebench", "A>B")]), "a/b", torch.zeros(2).double()
        )
    for name in ("../a", "a/b/c", "", "a/..", "/a"):
        with pytest.raises(ValueError, match="`model_name` must be"):
            reward_bench_files(tmp_path, PAIRS, name, SCORES)
    assert not list(tmp_path.iterdir())
