"""Objective heads: one ridge regression from response embedding to rating per objective."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armo.artifacts import read_json, read_tensors, write_json, write_tensors
from armo.embed.store import EmbeddingStore
from armo.fit.ridge import RidgeStatistics, select_alpha, solve_ridge

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeadSummary:
    """How one head was fitted.

    Attributes:
        objective: Name.
        ratings: Training ratings it was fitted on.
        alpha: Penalty chosen.
        error: Cross-validated mean squared error on the scale [0, 1], over prompts.
        explained: Share of the mean predictor's cross-validated error that it removes.
    """

    objective: str
    ratings: int
    alpha: float
    error: float
    explained: float


@dataclass(frozen=True, eq=False, slots=True)
class ObjectiveHeads:
    """One linear reward head per objective, rows in the order of `objectives`.

    The reward is `weights @ h + intercepts`, on the rating scale [0, 1]; it is not clipped.
    """

    objectives: tuple[str, ...]
    weights: Float[Tensor, "objectives dim"]
    intercepts: Float[Tensor, " objectives"]

    def rewards(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch objectives"]:
        """Predict ratings, in float64."""
        return embeddings.double() @ self.weights.T + self.intercepts

    def save(self, folder: Path, summaries: Sequence[HeadSummary]) -> None:
        """Write `heads.safetensors` and `heads.json`."""
        write_tensors(
            folder / "heads.safetensors", {"weights": self.weights, "intercepts": self.intercepts}
        )
        write_json(folder / "heads.json", [asdict(summary) for summary in summaries])

    @classmethod
    def load(cls, folder: Path) -> "tuple[ObjectiveHeads, list[HeadSummary]]":
        """Read what `save` wrote."""
        summaries = [HeadSummary(**entry) for entry in read_json(folder / "heads.json")]
        tensors = read_tensors(folder / "heads.safetensors")
        names = tuple(summary.objective for summary in summaries)
        return cls(names, tensors["weights"], tensors["intercepts"]), summaries


def fit_heads(
    store: EmbeddingStore,
    rows: Int[Tensor, " ratings"],
    ratings: Float[Tensor, "ratings objectives"],
    groups: Int[Tensor, " ratings"],
    *,
    objectives: Sequence[str],
    alphas: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0),
    folds: int = 5,
) -> tuple[ObjectiveHeads, list[HeadSummary]]:
    """Fit one ridge regression with intercept per objective, on the rows that rate it.

    The penalty of each objective is chosen by cross-validation over groups of rows that share a
    prompt; the final fit uses all rows. Objectives rated by the same rows share the statistics
    and the factorisation.

    Args:
        store: Response embeddings; read shard by shard.
        rows: Row in the store of each rated response.
        ratings: Ratings in [0, 1]; NaN where a row does not rate an objective.
        groups: Prompt group of each rated response.
        objectives: Names of the columns of `ratings`.
        alphas: Penalties to choose from, in units of squared embedding length.
        folds: Parts of the cross-validation.

    Returns:
        The heads and a summary per objective, in column order.

    Raises:
        ValueError: If an objective has no rating, or all its rows share one prompt.
    """
    rated = ~ratings.isnan()
    empty = [name for name, any_ in zip(objectives, rated.any(0).tolist(), strict=True) if not any_]
    if empty:
        raise ValueError(f"Objectives without any rating: {', '.join(empty)}. Drop them.")
    weights = torch.zeros(len(objectives), store.dim, dtype=torch.float64)
    intercepts = torch.zeros(len(objectives), dtype=torch.float64)
    summaries: dict[int, HeadSummary] = {}
    patterns, pattern_of = rated.T.unique(dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        columns = (pattern_of == number).nonzero()[:, 0]
        here = pattern.nonzero()[:, 0]
        parts = fold_numbers(groups[here], folds=folds)
        statistics = [RidgeStatistics.zero(store.dim, len(columns)) for _ in range(folds)]
        for positions, embeddings in store.batches(rows[here]):
            for fold in range(folds):
                chosen = parts[positions] == fold
                values = ratings[here[positions[chosen]]][:, columns]
                statistics[fold] += RidgeStatistics.of(embeddings[chosen], values)
        choices = select_alpha(statistics, alphas=alphas)
        total = sum(statistics[1:], start=statistics[0])
        tried = sorted({choice.alpha for choice in choices})
        solutions = dict(zip(tried, solve_ridge(total, alphas=tried), strict=True))
        for position, (column, choice) in enumerate(zip(columns.tolist(), choices, strict=True)):
            solution = solutions[choice.alpha]
            weights[column] = solution.weights[position]
            intercepts[column] = solution.intercepts[position]
            error = float(choice.error.min())
            summaries[column] = HeadSummary(
                objectives[column],
                total.count,
                choice.alpha,
                error,
                1.0 - error / choice.baseline if choice.baseline > 0.0 else 0.0,
            )
            if choice.alpha in (min(alphas), max(alphas)) and len(alphas) > 1:
                logger.info(
                    "%s: the penalty chosen, %g, is at the end of `alphas`",
                    objectives[column],
                    choice.alpha,
                )
    heads = ObjectiveHeads(tuple(objectives), weights, intercepts)
    return heads, [summaries[column] for column in range(len(objectives))]


def fold_numbers(groups: Int[Tensor, " rows"], *, folds: int) -> Int[Tensor, " rows"]:
    """Deal groups out to folds of nearly equal row counts; a group stays whole.

    Large groups are dealt first, each to the fold that holds the fewest rows.

    Raises:
        ValueError: If there are fewer groups than two.
    """
    names, inverse, counts = groups.unique(return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise ValueError("All rows share one prompt: nothing to hold out.")
    fold_of = torch.zeros(len(names), dtype=torch.int64)
    sizes = [0] * folds
    for group in counts.argsort(descending=True, stable=True).tolist():
        fold = sizes.index(min(sizes))
        fold_of[group] = fold
        sizes[fold] += int(counts[group])
    return fold_of[inverse]
