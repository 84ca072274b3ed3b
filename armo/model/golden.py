"""The golden scores of a model folder: what it gave when it was made, to compare with."""

import importlib.metadata
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from armo.artifacts import ArtifactError, read_json, write_json
from armo.model.conversations import parse_conversations
from armo.model.output import RewardOutput

COLUMNS = ("rewards", "adjusted", "gating_weights")
"""What is stored per objective."""


def write_golden(
    path: Path, conversations: Sequence[Any], out: RewardOutput, *, beta: float
) -> None:
    """Write conversations and their outputs."""
    made_with = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    write_json(
        path,
        {
            "made_with": made_with,
            "conversations": list(conversations),
            "score": out.score.tolist(),
            **{name: getattr(out, name).tolist() for name in COLUMNS},
            "beta": beta,
        },
    )


def read_golden(path: Path, objectives: Sequence[str]) -> dict[str, Any]:
    """Read what `write_golden` wrote.

    Raises:
        ArtifactError: If there are no conversations, one is none, or a field is missing or of
            another size.
    """
    golden = read_json(path)
    if not isinstance(golden, dict):
        raise ArtifactError(f"{path}: must be a JSON object")
    for name in ("conversations", "score", *COLUMNS, "beta"):
        if name not in golden:
            raise ArtifactError(f"{path}: field '{name}' is missing")
    if not isinstance(golden["conversations"], list) or not golden["conversations"]:
        raise ArtifactError(f"{path}: no golden conversations to verify with")
    try:
        parse_conversations(golden["conversations"])
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from None
    count = len(golden["conversations"])
    if not isinstance(golden["beta"], int | float):
        raise ArtifactError(f"{path}: `beta` must be a number")
    for name in ("score", *COLUMNS):
        rows = golden[name]
        if not isinstance(rows, list) or len(rows) != count:
            raise ArtifactError(f"{path}: `{name}` must have {count} rows")
        flat = rows
        if name != "score":
            if any(not isinstance(row, list) or len(row) != len(objectives) for row in rows):
                raise ArtifactError(f"{path}: each row of `{name}` must have {len(objectives)}")
            flat = list(chain.from_iterable(rows))
        if any(not isinstance(value, int | float) for value in flat):
            raise ArtifactError(f"{path}: `{name}` must be numbers")
    return golden


def compare_golden(
    folder: Path, golden: dict[str, Any], out: RewardOutput, *, beta: float, tolerance: float
) -> float:
    """Return the largest deviation of an output from the golden one.

    Raises:
        ArtifactError: If one is above the tolerance, naming the first row and field that is.
    """
    found: list[tuple[str, float, float]] = [("`beta`", beta, golden["beta"])]
    for row in range(len(golden["conversations"])):
        found.append((f"row {row}, `score`", float(out.score[row]), golden["score"][row]))
        for name in COLUMNS:
            now = getattr(out, name)[row].tolist()
            found += [
                (f"row {row}, `{name}` of {objective}", value, then)
                for objective, value, then in zip(
                    out.objectives, now, golden[name][row], strict=True
                )
            ]
    apart = [abs(now - then) for _, now, then in found]
    for (place, now, then), by in zip(found, apart, strict=True):
        if not by <= tolerance:  # nor NaN
            worst = max(apart) if not any(map(math.isnan, apart)) else math.nan
            raise ArtifactError(
                f"{folder}: golden outputs deviate by {worst:.2g}, more than {tolerance:g}; first "
                f"{place}: {now:.6g} now, {then:.6g} when made. The backbone, a library or a file "
                f"is not what the model was made with"
            )
    return max(apart)
