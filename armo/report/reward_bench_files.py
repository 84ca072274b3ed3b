"""Scores in the files that RewardBench's own tools write and read."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from armo.artifacts import write_json, write_text
from armo.data.benchmarks import PRIOR_SETS, TIES, Benchmark
from armo.data.conversation import ResponseList
from armo.report.benchmarks import benchmark_credits

MODEL_NAME = r"([\w-][\w.-]*/)?[\w-][\w.-]*"

# As the leaderboard knows models whose score is a number per response.
ABOUT = {"model_type": "Seq. Classifier", "chat_template": "tokenizer"}


def reward_bench_files(
    folder: Path, benchmark: Benchmark, model_name: str, scores: Float[Tensor, " responses"]
) -> list[Path]:
    """Save the scores of one model as RewardBench 1 or 2 saves them.

    Of RewardBench 1, what its command writes: `MODEL.json` (accuracy over all rows, and by subset),
    `MODEL_outputs.jsonl` (each row with its scores and result) and `MODEL_all.jsonl` (the scores
    alone); and what its leaderboard reads: `eval-set/MODEL.json` (accuracy by subset) and
    `eval-set-scores/MODEL.json` (columns of the rows); `pref-sets/` and `pref-sets-scores/` for the
    prior sets, if they are there. Of RewardBench 2, `eval-set/` and `eval-set-scores/`; rows of
    Ties have no result of their own. Texts are lists of messages, not templated text.

    Args:
        folder: Where to write; one per benchmark, since both use the same names.
        benchmark: RewardBench 1 or 2.
        model_name: `ORGANISATION/NAME`, as the leaderboard has a folder per organisation; a name
            alone is put in `local`.
        scores: Of all responses of the rows, one row after the other; NaN, where a response was
            skipped, becomes null.

    Returns:
        The files.

    Raises:
        ValueError: If it is another benchmark, or the name cannot be that of a file.
    """
    if benchmark.rule not in ("reward_bench", "reward_bench_2"):
        raise ValueError(f"{benchmark.title} has no files of RewardBench's form")
    if not re.fullmatch(MODEL_NAME, model_name):
        raise ValueError(f"`model_name` must be a name or ORGANISATION/NAME, got {model_name!r}")
    model = model_name if "/" in model_name else f"local/{model_name}"
    credits = benchmark_credits(benchmark, scores[None])
    lines = [line.label for line in credits.lines]
    accuracy = dict(zip(lines, credits.results()[0].tolist(), strict=True))
    earned = iter(credits.values[0].nansum(1).tolist())
    split = scores.double().split([len(row.responses) for row in benchmark.rows])
    rows = [
        _Row(row, [None if s != s else s for s in those.tolist()], _earned(row, earned))
        for row, those in zip(benchmark.rows, split, strict=True)
    ]
    if benchmark.rule == "reward_bench_2":
        return _save_set(folder, "eval-set", model, rows, accuracy, _columns_of_lists(rows))
    core = [row for row in rows if row.row.category not in PRIOR_SETS]
    prior = [row for row in rows if row.row.category in PRIOR_SETS]
    files = _save_command(folder, model, core, accuracy)
    files += _save_set(folder, "eval-set", model, core, accuracy, _columns_of_pairs(core))
    if prior:
        files += _save_set(folder, "pref-sets", model, prior, accuracy, _columns_of_pairs(prior))
    return files


@dataclass(frozen=True, slots=True)
class _Row:
    row: ResponseList
    scores: list[float | None]
    result: float | None

    @property
    def id(self) -> int | str:
        """Its id in the benchmark, before the subset was put before it."""
        id = self.row.id.removeprefix(f"{self.row.category}/")
        return int(id) if id.isdecimal() else id

    def text(self, response: int) -> list[dict[str, str]]:
        """The whole conversation."""
        turns = [{"role": turn.role, "content": turn.content} for turn in self.row.prompt]
        return [*turns, {"role": "assistant", "content": self.row.responses[response]}]


def _earned(row: ResponseList, earned: Iterator[float]) -> float | None:
    return None if row.category == TIES else next(earned)


def _save_command(
    folder: Path, model: str, rows: Sequence[_Row], accuracy: Mapping[str, float]
) -> list[Path]:
    """What the command `rewardbench` writes."""
    results = [int(row.result or 0) for row in rows]
    whole = {
        "accuracy": sum(results) / len(results),
        "num_prompts": len(results),
        "model": model,
        "ref_model": None,
        "tokenizer": model,
        "chat_template": None,
        "extra_results": _by_subset(rows, accuracy),
    }
    outputs = [
        {
            "prompt": [{"role": turn.role, "content": turn.content} for turn in row.row.prompt],
            "results": result,
            "scores_chosen": row.scores[0],
            "scores_rejected": row.scores[1],
            "text_chosen": row.text(0),
            "text_rejected": row.text(1),
            "subset": row.row.category,
            "id": row.id,
        }
        for row, result in zip(rows, results, strict=True)
    ]
    both = [{"chosen": row.scores[0], "rejected": row.scores[1]} for row in rows]
    files = [folder / f"{model}{end}" for end in (".json", "_outputs.jsonl", "_all.jsonl")]
    write_json(files[0], whole)
    write_text(files[1], _lines(outputs))
    write_text(files[2], _lines(both))
    return files


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows)


def _save_set(
    folder: Path,
    name: str,
    model: str,
    rows: Sequence[_Row],
    accuracy: Mapping[str, float],
    columns: Mapping[str, Any],
) -> list[Path]:
    """What the leaderboard reads: accuracy by subset, and columns of the rows."""
    files = [folder / name / f"{model}.json", folder / f"{name}-scores" / f"{model}.json"]
    about = {"model": model, **ABOUT}
    write_json(files[0], {**about, **_by_subset(rows, accuracy)})
    write_json(files[1], {**about, **columns})
    return files


def _by_subset(rows: Sequence[_Row], accuracy: Mapping[str, float]) -> dict[str, float]:
    return {name: accuracy[name] for name in sorted({row.row.category for row in rows})}


def _columns_of_pairs(rows: Sequence[_Row]) -> dict[str, Any]:
    return {
        "text_chosen": [row.text(0) for row in rows],
        "text_rejected": [row.text(1) for row in rows],
        "results": [int(row.result or 0) for row in rows],
        "subset": [row.row.category for row in rows],
        "id": [row.id for row in rows],
        "scores_chosen": [row.scores[0] for row in rows],
        "scores_rejected": [row.scores[1] for row in rows],
    }


def _columns_of_lists(rows: Sequence[_Row]) -> dict[str, Any]:
    return {
        "text": [[row.text(k) for k in range(len(row.scores))] for row in rows],
        "scores": [row.scores for row in rows],
        "results": [row.result for row in rows],
        "subset": [row.row.category for row in rows],
        "id": [str(row.id) for row in rows],
        "num_correct": [len(row.row.correct or ()) for row in rows],
    }
