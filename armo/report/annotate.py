"""A data set with what a model says of each row beside the row's own fields."""

import importlib.metadata
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from armo.artifacts import (
    MANIFEST,
    ArtifactError,
    digest_file,
    digest_json,
    exclusive,
    read_json,
    replacing,
    write_json,
)
from armo.data.row_files import Kind, RowFile, row_file
from armo.data.sources import (
    BUILTIN_FILES,
    DataError,
    Paths,
    ScorableRow,
    data_files,
    stream_scorable,
)
from armo.embed.spec import BackboneError
from armo.model.output import RewardOutput, Scale
from armo.model.pretrained import read_seal
from armo.model.reward_model import ArmoRewardModel

CHUNK_RESPONSES = 1024
"""Responses that are scored and saved together: what a cut-off run loses at most."""

SKIPPED = "longer than the backbone reads"
SHOWN_REASONS = 20

ReadRow = tuple[str, dict[str, Any], ScorableRow | ValueError]


@dataclass(frozen=True, slots=True)
class Annotation:
    """What was annotated.

    Attributes:
        rows: Of the input, and so of the output.
        scored: Those with a score; each response of a list has its own.
        reasons: Why the others, or some of their responses, have none, and how often; the most
            frequent ones.
        columns: Those that were added.
    """

    rows: int
    scored: int
    reasons: dict[str, int]
    columns: tuple[str, ...]


def annotate(
    model: ArmoRewardModel,
    path: Paths,
    output: Path,
    *,
    columns: Mapping[str, Any] | None = None,
    weights: Mapping[str, float] | None = None,
    scale: Scale = "raw",
    prefix: str = "armo_",
    on_rows: Callable[[int], None] | None = None,
) -> Annotation:
    """Write the rows of a data set again, each with scores and their reasons in columns of its own.

    Rows keep their order and fields. Added are `score`, `truncated` and `reason`, and for each
    objective `reward_NAME`, `uncertainty_NAME` (of a model that has it), `weight_NAME` (its gating
    weight, from the prompt alone) and `contribution_NAME`. Pairs and lists have a list of values
    in them, in the order of their responses, but for the weights and the reason; and `preference`:
    of two responses, the probability that the first is preferred. A row that cannot be scored has
    nulls and a `reason`; a file that cannot be read on stops everything.

    Memory holds a chunk of rows. Chunks are kept in a folder beside the output until it is whole,
    so that the same call goes on where it was cut off, and gives the same file. Beside it is
    `OUTPUT.manifest.json`: the model and its seal, versions, settings, digests and counts.

    Args:
        model: As loaded from a folder.
        path: Rows to score, of any kind, as for `load_scorable`.
        output: A `.jsonl` or `.jsonl.gz` file; or a `.parquet` or `.csv` file, if those of `path`
            are, whose columns then keep their types.
        columns: Where the fields stand in rows that are not native; see `ColumnMap`.
        weights: As for `ArmoRewardModel.score`.
        scale: As for `ArmoRewardModel.score`.
        prefix: Of the added columns; another one for each model that annotates the same rows.
        on_rows: Told how many rows were done, after each chunk.

    Raises:
        ArtifactError: If another process is annotating to the same file.
        DataError: Naming the place, if a file cannot be read, a row has a column of an added name
            already, or none can be scored.
        ValueError: If `output` is among the input, or its ending does not fit.
    """
    files = data_files(path, builtin_file=BUILTIN_FILES["ratings"])
    _check_output(output, files)
    if model.folder is None:
        raise ArtifactError("This model was not loaded from a folder; save and load it first.")
    settings = {
        "columns": None if columns is None else dict(columns),
        "weights": None if weights is None else dict(weights),
        "scale": scale,
        "prefix": prefix,
        "chunk_responses": CHUNK_RESPONSES,
    }
    about = {
        "model": str(model.folder),
        "seal": read_seal(model.folder),
        "versions": {
            name: importlib.metadata.version(name) for name in ("armo", "torch", "transformers")
        },
        "settings": settings,
        "inputs": {str(file): digest_file(file) for file in files},
    }
    key = digest_json({name: value for name, value in about.items() if name != "model"})
    manifest = output.with_name(f"{output.name}.{MANIFEST}")
    if (done := _finished(manifest, output, key)) is not None:
        return done
    added = _Columns(model, prefix=prefix, single=_is_single(path, columns))
    file = row_file(output.name, files, added.kinds)
    parts = output.with_name(f".{output.name}.parts")
    with exclusive(parts):
        _forget_others(parts, key)
        counts = _annotate_chunks(
            stream_scorable(path, columns=columns),
            parts,
            added=added,
            file=file,
            score=lambda rows: _score(model, rows, weights=weights, scale=scale),
            on_rows=on_rows,
        )
        with replacing(output) as temporary:
            file.join([parts / f"{number}.part" for number in range(len(counts))], temporary)
        result = Annotation(
            rows=sum(count["rows"] for count in counts),
            scored=sum(count["scored"] for count in counts),
            reasons=_most_common(counts),
            columns=tuple(added.kinds),
        )
        write_json(
            manifest,
            {
                "key": key,
                **about,
                "objectives": model.objectives.to_dicts(),
                "beta": float(model.beta),
                "rows": result.rows,
                "scored": result.scored,
                "reasons": result.reasons,
                "columns": list(result.columns),
                "sha256": digest_file(output),
            },
        )
    shutil.rmtree(parts)
    return result


def _check_output(output: Path, files: Sequence[Path]) -> None:
    place = output.resolve()
    if place in [file.resolve() for file in files]:
        raise ValueError(f"`output` is a file of `input`, {output}; name another")
    if place.parent in [file.resolve().parent for file in files] and len(files) > 1:
        raise ValueError(
            f"`output` is in a folder of `input`, which would be read with the rest next time: "
            f"{output}; name another folder"
        )


def _finished(manifest: Path, output: Path, key: str) -> Annotation | None:
    """What was annotated, if the output is there as the same call left it."""
    if not manifest.is_file() or not output.is_file():
        return None
    found = read_json(manifest)
    if found.get("key") != key or found.get("sha256") != digest_file(output):
        return None
    return Annotation(found["rows"], found["scored"], found["reasons"], tuple(found["columns"]))


def _forget_others(parts: Path, key: str) -> None:
    """Delete chunks that were made of other rows, by another model or with other settings."""
    made_for = parts / "key.json"
    if made_for.is_file() and read_json(made_for) == key:
        return
    for file in [*parts.glob("*.part"), *parts.glob("*.json")]:
        file.unlink()
    write_json(made_for, key)


def _annotate_chunks(
    rows: Iterator[ReadRow],
    parts: Path,
    *,
    added: "_Columns",
    file: RowFile,
    score: Callable[[list[ScorableRow | str]], RewardOutput | None],
    on_rows: Callable[[int], None] | None,
) -> list[dict[str, Any]]:
    """Score and save the chunks that are not there yet; return the counts of all."""
    counts: list[dict[str, Any]] = []
    while (done := parts / f"{len(counts)}.json").is_file():
        counts.append(read_json(done))
        for _ in islice(rows, counts[-1]["rows"]):
            pass
        if on_rows is not None:
            on_rows(counts[-1]["rows"])
    for chunk in _chunks(rows):
        for place, raw, _ in chunk:
            added.check(place, raw)
        kept = [added.fitting(row) for _, _, row in chunk]
        more = added.of(kept, score(kept))
        number = len(counts)
        with replacing(parts / f"{number}.part") as temporary:
            file.write(
                [raw | each for (_, raw, _), each in zip(chunk, more, strict=True)], temporary
            )
        reasons = [each[added.reason] for each in more if each[added.reason] is not None]
        counts.append(
            {
                "rows": len(chunk),
                "scored": len(chunk) - len(reasons),
                "reasons": dict(Counter(reasons)),
            }
        )
        # Last: it says that the chunk is there.
        write_json(parts / f"{number}.json", counts[-1])
        if on_rows is not None:
            on_rows(len(chunk))
    return counts


def _chunks(rows: Iterable[ReadRow]) -> Iterator[list[ReadRow]]:
    chunk: list[ReadRow] = []
    responses = 0
    for row in rows:
        chunk.append(row)
        responses += len(row[2].responses) if isinstance(row[2], ScorableRow) else 1
        if responses >= CHUNK_RESPONSES:
            yield chunk
            chunk, responses = [], 0
    if chunk:
        yield chunk


def _score(
    model: ArmoRewardModel,
    rows: list[ScorableRow | str],
    *,
    weights: Mapping[str, float] | None,
    scale: Scale,
) -> RewardOutput | None:
    """Score the rows that can be; put the reason in the place of those that cannot."""
    while True:
        owners = [
            k for k, row in enumerate(rows) if isinstance(row, ScorableRow) for _ in row.responses
        ]
        if not owners:
            return None
        conversations = [
            each for row in rows if isinstance(row, ScorableRow) for each in row.conversations
        ]
        try:
            return model.score(conversations, weights=weights, scale=scale)
        except BackboneError as error:
            if error.group is None:
                raise
            reason = str(error).removeprefix(f"conversation {error.group}: ")
            rows[owners[error.group]] = reason


def _most_common(counts: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count["reasons"])
    return dict(total.most_common(SHOWN_REASONS))


def _is_single(path: Paths, columns: Mapping[str, Any] | None) -> bool:
    """Whether the first row that can be scored is a conversation; the columns are made for it."""
    error = ""
    for place, _, row in stream_scorable(path, columns=columns):
        if isinstance(row, ScorableRow):
            return row.single
        error = error or f"{place}: {row}"
    raise DataError(f"no row can be scored; the first one: {error}")


class _Columns:
    """The added columns: their names, what they hold, and their values."""

    def __init__(self, model: ArmoRewardModel, *, prefix: str, single: bool) -> None:
        self._single, self._beta = single, float(model.beta)
        self._objectives = model.objectives.names
        self._names = {"rewards": "reward", "uncertainty": "uncertainty"}
        if model.uncertainty is None:
            del self._names["uncertainty"]
        self._names |= {"gating_weights": "weight", "contributions": "contribution"}
        self.prefix, self.reason = prefix, f"{prefix}reason"
        number: Kind = "number" if single else "numbers"
        self.kinds: dict[str, Kind] = {f"{prefix}score": number}
        if not single:
            self.kinds[f"{prefix}preference"] = "number"
        for field in self._names:
            for name in self._objectives:
                self.kinds[self._column(field, name)] = (
                    "number" if field == "gating_weights" else number
                )
        self.kinds |= {f"{prefix}truncated": "flag" if single else "flags", self.reason: "text"}

    def _column(self, field: str, objective: str) -> str:
        return f"{self.prefix}{self._names[field]}_{objective}"

    def check(self, place: str, raw: Mapping[str, Any]) -> None:
        """Refuse a row that has one of the names already."""
        if taken := [name for name in self.kinds if name in raw]:
            raise DataError(f"{place}: has a field {taken[0]!r} already; give another `prefix`")

    def fitting(self, row: ScorableRow | ValueError) -> ScorableRow | str:
        """Return a row that can be scored and is of the kind of the first one, or the reason."""
        if isinstance(row, ScorableRow) and row.single != self._single:
            kinds = ("a conversation among pairs or lists", "a pair or list among conversations")
            return f"{kinds[self._single]}; keep them in files of their own"
        return row if isinstance(row, ScorableRow) else str(row)

    def of(
        self, rows: Sequence[ScorableRow | str], out: RewardOutput | None
    ) -> list[dict[str, Any]]:
        """Return the added values of each row."""
        found, position = [], 0
        for row in rows:
            if isinstance(row, str) or out is None:
                found.append({**dict.fromkeys(self.kinds), self.reason: row})
                continue
            part = slice(position, position + len(row.responses))
            position = part.stop
            found.append(self._values(out, part))
        return found

    def _values(self, out: RewardOutput, part: slice) -> dict[str, Any]:
        scores = out.score[part]
        columns = {f"{self.prefix}score": scores}
        for field in self._names:
            for k, name in enumerate(self._objectives):
                columns[self._column(field, name)] = getattr(out, field)[part, k]
        values: dict[str, Any] = dict.fromkeys(self.kinds)
        for name, column in columns.items():
            listed = [None if value != value else value for value in column.tolist()]
            if self.kinds[name] == "number":
                # One response, or the weights: the same for all that were not skipped.
                values[name] = next((value for value in listed if value is not None), None)
            else:
                values[name] = listed
        truncated = out.truncated[part].tolist()
        values[f"{self.prefix}truncated"] = truncated[0] if self._single else truncated
        if bool(scores.isnan().any()):
            values[self.reason] = SKIPPED
        elif not self._single and len(scores) == 2:
            odds = self._beta * (scores[0] - scores[1])
            values[f"{self.prefix}preference"] = float(torch.sigmoid(odds))
        return values
