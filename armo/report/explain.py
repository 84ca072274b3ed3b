"""Why one response of a pair is preferred: objectives, style and the nearest training prompts."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armo.artifacts import ArtifactError
from armo.data.conversation import PreferencePair, Prompt, RatedResponse, ResponseList
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.sources import ScorableRow
from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.embed.boundary import PromptGroup
from armo.embed.extract import EmbeddedData
from armo.embed.index import RowIndexer
from armo.embed.spec import BackboneError
from armo.fit.decorrelation import style_part
from armo.model.output import Comparison, RewardOutput, Scale
from armo.model.reward_model import ArmoRewardModel
from armo.report.tables import Table

# Pairs that are scored together, which bounds the memory.
CHUNK_PAIRS = 512


@dataclass(frozen=True, eq=False, slots=True)
class Explanation:
    """Why response A of a pair is preferred to B, or B to A.

    Attributes:
        id: Of the row.
        prompt: The turns before the responses.
        responses: A, then B.
        comparison: What `ArmoRewardModel.compare` says of them.
        objectives: Weight, rewards, contributions and changes per objective, the one with the
            largest difference of contributions first.
        style: What is measured on the texts, and what it moves the score by.
        nearest: The nearest training prompts; None if no run was given.
    """

    id: str
    prompt: Prompt
    responses: tuple[str, str]
    comparison: Comparison
    objectives: Table
    style: Table
    nearest: Table | None

    @property
    def scored(self) -> bool:
        """Whether both responses have a score; one that is skipped as too long has none."""
        return not math.isnan(self.comparison.score_difference)

    @property
    def verdict(self) -> str:
        """The preference in one line."""
        if not self.scored:
            return "no score: longer than the backbone reads, and skipped"
        comparison = self.comparison
        preferred, other = "BA" if comparison.score_difference < 0 else "AB"
        probability = max(comparison.probability, 1.0 - comparison.probability)
        if comparison.score_difference == 0:
            return "a tie"
        return (
            f"{preferred} is preferred with probability {probability:.3f}; it scores "
            f"{abs(comparison.score_difference):.3f} more than {other}"
        )


def explain_pairs(
    model: ArmoRewardModel,
    rows: Sequence[ScorableRow],
    *,
    weights: Mapping[str, float] | None = None,
    scale: Scale = "raw",
    training: "TrainingPrompts | None" = None,
    nearest: int = 5,
) -> Iterator[Explanation]:
    """Explain the preference of a model in each of some pairs.

    Args:
        model: Whose preference.
        rows: Prompts with two responses each, A and B.
        weights: As for `ArmoRewardModel.score`.
        scale: Of the rewards that are shown; as for `ArmoRewardModel.score`.
        training: Where to look for the nearest training prompts.
        nearest: How many of them.

    Raises:
        BackboneError: Naming the row that cannot be embedded.
        ValueError: If a row has not two responses.
    """
    for row in rows:
        if len(row.responses) != 2:
            raise ValueError(f"row {row.id!r} has {len(row.responses)} responses, not two")
    for start in range(0, len(rows), CHUNK_PAIRS):
        chunk = rows[start : start + CHUNK_PAIRS]
        try:
            out = model.score(
                [
                    [*({"role": m.role, "content": m.content} for m in row.prompt), answer]
                    for row in chunk
                    for answer in ({"role": "assistant", "content": r} for r in row.responses)
                ],
                weights=weights,
                scale=scale,
            )
        except BackboneError as error:
            if error.group is None:
                raise
            reason = str(error).removeprefix(f"conversation {error.group}: ")
            raise BackboneError(f"row {chunk[error.group // 2].id!r}: {reason}") from None
        tables: list[Table | None] = [None] * len(chunk)
        if training is not None:
            prompts = model.backbone.embed([PromptGroup(row.prompt, ()) for row in chunk]).prompts
            tables = [*training.tables(prompts.values, count=nearest)]
        for number, (row, table) in enumerate(zip(chunk, tables, strict=True)):
            comparison = model.compare_rows(out, 2 * number, 2 * number + 1)
            yield Explanation(
                id=row.id,
                prompt=row.prompt,
                responses=(row.responses[0], row.responses[1]),
                comparison=comparison,
                objectives=_objective_table(model, out, comparison, row=2 * number),
                style=_style_table(model, row.responses, out.gating_weights[2 * number]),
                nearest=table,
            )


def _within(change: float | None, objective: Objective) -> float | str | None:
    """Say of a change that is wider than the scale that it is."""
    if change is None or abs(change) <= objective.high - objective.low:
        return change
    return "beyond"


def _objective_table(
    model: ArmoRewardModel, out: RewardOutput, comparison: Comparison, *, row: int
) -> Table:
    """Show rows `row` and `row + 1` of an output side by side."""
    rows, total = [], 0.0
    for name, difference in comparison.reasons.items():
        k = out.objectives.index(name)
        total += difference
        rows.append(
            (
                name,
                float(out.gating_weights[row, k]),
                *out.rewards[row : row + 2, k].tolist(),
                *out.adjusted[row : row + 2, k].tolist(),
                difference,
                total,
                comparison.changes.get(name),
                _within(comparison.rating_changes.get(name), model.objectives.objectives[k]),
            )
        )
    return Table(
        "objectives",
        "Objectives",
        (
            "objective",
            "weight",
            "reward A",
            "reward B",
            "adjusted A",
            "adjusted B",
            "difference",
            "sum so far",
            "to tie",
            "to tie, rating",
        ),
        tuple(rows),
        "Difference: weight times adjusted reward, of A less that of B; they add up to the "
        "difference of the scores. To tie: by how much the adjusted reward of the response with "
        "the lower score would have to rise if nothing else changed, in standard deviations; and "
        "its rating, where one follows from the other, `beyond` if the scale is not as wide.",
    )


def _style_table(
    model: ArmoRewardModel, responses: Sequence[str], weights: Float[Tensor, " objectives"]
) -> Table:
    """Show what is measured on two responses, but for features that neither has."""
    measured = surface_features(responses)
    columns = [SURFACE_FEATURES.index(name) for name in model.covariates]
    # Of one covariate at a time, as if each were an objective of its own.
    slopes = weights[:, None] * model.adjusted_style.cpu()
    each = [
        style_part(
            measured[:, [column]].double(), slopes[:, [k]], model.covariate_range[:, [k]].cpu()
        )
        for k, column in enumerate(columns)
    ]
    moved = [float((part[0] - part[1]).sum()) for part in each]
    moves = dict(zip(model.covariates, moved, strict=True))
    rows: list[tuple[Any, ...]] = []
    for name, (a, b) in zip(SURFACE_FEATURES, measured.T.tolist(), strict=True):
        # The first is always shown: an empty table says nothing.
        if a or b or not rows:
            rows.append((name, a, b, *((moves.get(name),) if moves else ())))
    names = ("feature", "A", "B", *(("moves the score",) if moves else ()))
    note = "Measured on the texts; features that neither response has are left out."
    if moves:
        note += (
            " Moves the score: what taking style out of the rewards adds to the difference of the "
            "scores, a part of the differences by objective. Beyond what training responses show, "
            "a feature may lower the score, but raises it no more."
        )
    return Table("style", "Style", names, tuple(rows), note)


@dataclass(frozen=True, eq=False, slots=True)
class TrainingPrompts:
    """The training prompts of a run, to find those that are nearest to others.

    Attributes:
        data: The embedded rows of the run.
        numbers: Its prompts that are on the training side.
        text: Reads prompts by number; None where the run's rows cannot be read again.
    """

    data: EmbeddedData
    numbers: Int[Tensor, " prompts"]
    text: Callable[[Sequence[int]], list[Prompt]] | None = None

    @classmethod
    def load(cls, folder: Path, *, model: ArmoRewardModel) -> "TrainingPrompts":
        """Open what the `embed` stage wrote into a folder.

        Raises:
            ArtifactError: If it is missing, or other settings or another backbone made it.
        """
        data = EmbeddedData.load(folder)
        if data.prompts.store.fingerprint != model.backbone.spec.fingerprint:
            raise ArtifactError(
                f"`run`: {folder} was embedded by another backbone, or with other settings, than "
                f"those of the model; give the run that made it"
            )
        tables = data.tables
        trained = torch.zeros(data.responses.rows, dtype=torch.bool)
        trained[tables.ratings_response[tables.ratings_train]] = True
        trained[tables.pairs_chosen[tables.pairs_train]] = True
        trained[tables.lists_response[tables.lists_train[tables.lists_of]]] = True
        numbers = tables.prompt_of_response[trained].unique()
        return cls(data, numbers[~data.prompts.missing()[numbers]])

    def nearest(
        self, prompts: Float[Tensor, "batch dim"], *, count: int
    ) -> tuple[Float[Tensor, "batch nearest"], Int[Tensor, "batch nearest"]]:
        """Find the training prompts with the largest cosine similarity, the largest first.

        Returns:
            Similarities, and the numbers of the prompts; as many as there are, if fewer.
        """
        given = torch.nn.functional.normalize(prompts.double(), dim=1)
        best = given.new_empty(len(given), 0)
        numbers = torch.empty(len(given), 0, dtype=torch.int64)
        # In the order of the numbers, so that equal ones come in it, whatever the shards.
        for positions, values in self.data.prompts.batches(self.numbers):
            cosines = given @ torch.nn.functional.normalize(values.double(), dim=1).T
            found = self.numbers[positions].expand(len(given), -1)
            joined = torch.cat([best, cosines], dim=1)
            best, order = joined.sort(dim=1, descending=True, stable=True)
            best, order = best[:, :count], order[:, :count]
            numbers = torch.cat([numbers, found], dim=1).gather(1, order)
        return best, numbers

    def tables(self, prompts: Float[Tensor, "batch dim"], *, count: int) -> list[Table]:
        """Show the training prompts that are nearest to each of some prompts."""
        cosines, numbers = self.nearest(prompts, count=count)
        flat = numbers.flatten().tolist()
        texts = [""] * len(flat)
        if self.text is not None:
            texts = ["\n\n".join(m.content for m in prompt) for prompt in self.text(flat)]
        shown = iter(
            (*self._origin(number), text) if self.text is not None else self._origin(number)
            for number, text in zip(flat, texts, strict=True)
        )
        columns: tuple[str, ...] = ("similarity", "rows", "sources", "categories")
        note = "By the cosine of the prompts' embeddings, which is all that the gate reads."
        if self.text is None:
            note += " Their texts are not known: the run keeps none, and its rows are not as they "
            note += "were."
        else:
            columns = (*columns, "prompt")
        return [
            Table(
                "nearest",
                "Nearest training prompts",
                columns,
                tuple((cosine, *next(shown)) for cosine in row),
                note,
            )
            for row in cosines.tolist()
        ]

    def _origin(self, number: int) -> tuple[int, str, str]:
        """Count the training rows on a prompt, and name their sources and categories."""
        t, data = self.data.tables, self.data
        of = t.prompt_of_response
        rated = t.ratings_train & (of[t.ratings_response] == number)
        paired = t.pairs_train & (of[t.pairs_chosen] == number)
        lists = t.lists_of[of[t.lists_response] == number].unique()
        lists = lists[t.lists_train[lists]]
        sources = [*t.ratings_source[rated], *t.pairs_source[paired], *t.lists_source[lists]]
        kinds = [*t.pairs_category[paired], *t.lists_category[lists]]
        return (
            int(rated.sum()) + int(paired.sum()) + len(lists),
            ", ".join(sorted({data.sources[int(k)] for k in sources})),
            ", ".join(sorted({data.categories[int(k)] for k in kinds} - {""})),
        )


def read_texts_again(
    data: EmbeddedData,
    folder: Path,
    *,
    objectives: ObjectiveSet,
    ratings: Iterable[RatedResponse],
    pairs: Iterable[PreferencePair],
    lists: Iterable[ResponseList],
    benchmark: Iterable[ResponseList],
    test_fraction: float,
) -> Callable[[Sequence[int]], list[Prompt]] | None:
    """Number the texts of a run once more, from its rows, and check that they are the same.

    Args:
        data: What the run embedded.
        folder: Where the texts are kept, for as long as they are read.
        objectives: As for `embed_rows`.
        ratings: As for `embed_rows`.
        pairs: As for `embed_rows`.
        lists: As for `embed_rows`.
        benchmark: As for `embed_rows`.
        test_fraction: As for `embed_rows`.

    Returns:
        What reads prompts by their number; None if the rows are not those of the run, by the
        digests of their texts.
    """
    indexer = RowIndexer(folder, objectives, test_fraction=test_fraction)
    try:
        indexer.add_ratings(ratings)
        indexer.add_pairs(pairs)
        indexer.add_lists(lists)
        indexer.add_benchmark(benchmark)
    except BaseException:
        indexer.close()
        raise
    spool, _ = indexer.finish()
    shards = data.prompts.store.shards
    # A shard ends with the prompt that fills it, so that the emptiest one but the last cuts alike.
    full = min((shard.responses for shard in shards[:-1]), default=1 + data.responses.rows)
    if spool.shards(shard_rows=full) != shards:
        return None
    return lambda numbers: [spool.prompt(number) for number in numbers]
