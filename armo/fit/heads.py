"""Objective heads: one ridge regression from response embedding to rating per objective."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armo.artifacts import read_json, read_tensors, write_json, write_tensors
from armo.embed.store import EmbeddingTable
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


@dataclass(frozen=True, eq=False, slots=True)
class FittedHeads:
    """The heads, and those of the cross-validation.

    A head has seen the ratings of its training responses, so its rewards there are better than
    elsewhere. Whoever fits something else on the same prompts (the gate) needs rewards as they
    will be on new prompts: those of the heads fitted without the prompt's own fold.

    Attributes:
        heads: Fitted on all training rows.
        without_fold: For each fold, the heads fitted on the other folds.
        fold_of_group: Fold of each prompt group; -1 for groups that were not trained on.
        summaries: How each head was fitted.
    """

    heads: ObjectiveHeads
    without_fold: tuple[ObjectiveHeads, ...]
    fold_of_group: Int[Tensor, " groups"]
    summaries: tuple[HeadSummary, ...]

    def save(self, folder: Path) -> None:
        """Write `heads.safetensors` and `heads.json`."""
        write_tensors(
            folder / "heads.safetensors",
            {
                "weights": self.heads.weights,
                "intercepts": self.heads.intercepts,
                "fold_weights": torch.stack([fold.weights for fold in self.without_fold]),
                "fold_intercepts": torch.stack([fold.intercepts for fold in self.without_fold]),
                "fold_of_group": self.fold_of_group,
            },
        )
        write_json(folder / "heads.json", [asdict(summary) for summary in self.summaries])

    @classmethod
    def load(cls, folder: Path) -> "FittedHeads":
        """Read what `save` wrote."""
        summaries = tuple(HeadSummary(**entry) for entry in read_json(folder / "heads.json"))
        names = tuple(summary.objective for summary in summaries)
        tensors = read_tensors(folder / "heads.safetensors")
        return cls(
            ObjectiveHeads(names, tensors["weights"], tensors["intercepts"]),
            tuple(
                ObjectiveHeads(names, weights, intercepts)
                for weights, intercepts in zip(
                    tensors["fold_weights"], tensors["fold_intercepts"], strict=True
                )
            ),
            tensors["fold_of_group"],
            summaries,
        )


def fit_heads(
    store: EmbeddingTable,
    rows: Int[Tensor, " ratings"],
    ratings: Float[Tensor, "ratings objectives"],
    groups: Int[Tensor, " ratings"],
    *,
    objectives: Sequence[str],
    group_count: int,
    other_groups: Int[Tensor, " others"] | None = None,
    folds: int = 5,
    alphas: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
) -> FittedHeads:
    """Fit one ridge regression with intercept per objective, on the rows that rate it.

    The penalty of each objective is chosen by cross-validation over prompts; the final fit uses
    all rows. Objectives rated by the same rows share the statistics and the factorisation.

    Args:
        store: Response embeddings; read shard by shard.
        rows: Row in the store of each rated response.
        ratings: Ratings in [0, 1]; NaN where a row does not rate an objective.
        groups: Prompt group of each rated response.
        objectives: Names of the columns of `ratings`.
        group_count: Number of prompt groups in all.
        other_groups: Groups of further training rows, without ratings, that will need rewards
            from heads fitted without them: dealt out to folds as well.
        folds: Parts of the cross-validation.
        alphas: Penalties to choose from, in units of squared embedding length.

    Raises:
        ValueError: If an objective has no rating, or all its prompts are in one fold.
    """
    rated = ~ratings.isnan()
    count = len(objectives)
    every = groups if other_groups is None else torch.cat([groups, other_groups])
    fold_of_group = deal_folds(every, folds=folds, group_count=group_count)
    weights = torch.zeros(folds + 1, count, store.dim, dtype=torch.float64)
    intercepts = torch.zeros(folds + 1, count, dtype=torch.float64)
    summaries: dict[int, HeadSummary] = {}
    patterns, pattern_of = rated.T.unique(dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        columns = (pattern_of == number).nonzero()[:, 0]
        here = pattern.nonzero()[:, 0]
        names = ", ".join(objectives[column] for column in columns.tolist())
        parts = fold_of_group[groups[here]]
        if len(parts.unique()) < 2:
            raise ValueError(
                f"{names}: {len(here)} ratings, all on prompts of one fold; nothing to choose "
                f"the penalty on. Add data or drop the objective."
            )
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
            weights[folds, column] = solutions[choice.alpha].weights[position]
            intercepts[folds, column] = solutions[choice.alpha].intercepts[position]
            for fold, (fold_weights, fold_intercept) in enumerate(choice.without):
                weights[fold, column] = fold_weights
                intercepts[fold, column] = fold_intercept
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
    fitted = [
        ObjectiveHeads(tuple(objectives), w, b) for w, b in zip(weights, intercepts, strict=True)
    ]
    ordered = tuple(summaries[column] for column in range(count))
    return FittedHeads(fitted[folds], tuple(fitted[:folds]), fold_of_group, ordered)


def deal_folds(
    groups: Int[Tensor, " rows"], *, folds: int, group_count: int
) -> Int[Tensor, " groups"]:
    """Deal prompt groups out to folds of nearly equal row counts; a group stays whole.

    Large groups are dealt first, each to the fold that holds the fewest rows.

    Args:
        groups: Prompt group of each row.
        folds: Number of folds.
        group_count: Number of groups in all.

    Returns:
        Fold of each group; -1 for groups without a row.

    Raises:
        ValueError: If there are fewer groups than folds.
    """
    names, counts = groups.unique(return_counts=True)
    if len(names) < folds:
        raise ValueError(f"{len(names)} distinct prompts cannot fill {folds} folds.")
    fold_of_group = torch.full((group_count,), -1, dtype=torch.int64)
    sizes = [0] * folds
    for position in counts.argsort(descending=True, stable=True).tolist():
        fold = sizes.index(min(sizes))
        fold_of_group[names[position]] = fold
        sizes[fold] += int(counts[position])
    return fold_of_group
