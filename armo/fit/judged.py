"""Heads beyond plain ridge: from yes-or-no ratings, judged pairs, and both pairs and ratings."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armo.embed.store import EmbeddingTable
from armo.fit.logistic import THURSTONE, LabelledRows, LogisticChoice, fit_binary, fit_judgements
from armo.fit.ridge import check_weights

logger = logging.getLogger(__name__)

CHUNK_ROWS = 4096  # read at a time, in each pass
Link = Literal["identity", "logistic"]
"""How a head's linear part becomes its reward: as it is, or by the logistic function."""


def apply_links(
    values: Float[Tensor, "batch objectives"], links: Sequence[Link]
) -> Float[Tensor, "batch objectives"]:
    """Turn the linear parts of heads into rewards, each column by its link."""
    columns = [k for k, link in enumerate(links) if link == "logistic"]
    if not columns:
        return values
    rewards = values.clone()
    rewards[:, columns] = values[:, columns].sigmoid()
    return rewards


@dataclass(frozen=True, eq=False, slots=True)
class Judgements:
    """Which of two responses is better, by objective.

    Attributes:
        chosen: Row in the store of the first response of each pair.
        rejected: The same of the second.
        probabilities: That the first is better, in [0, 1], 0.5 being a tie; NaN where missing.
        groups: Prompt group of each pair.
        sample_weights: How much each pair counts, beside those of ratings; one if not given. A
            pair of weight zero is left out.

    Raises:
        ValueError: If a value is out of range.
    """

    chosen: Int[Tensor, " pairs"]
    rejected: Int[Tensor, " pairs"]
    probabilities: Float[Tensor, "pairs objectives"]
    groups: Int[Tensor, " pairs"]
    sample_weights: Float[Tensor, " pairs"] | None = None

    def __post_init__(self) -> None:
        wrong = ((self.probabilities < 0.0) | (self.probabilities > 1.0)).any(1)
        if bool(wrong.any()):
            pair = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"`probabilities` must be in [0, 1], or NaN where missing, got "
                f"{self.probabilities[pair].tolist()} for pair {pair}."
            )
        if self.sample_weights is not None:
            check_weights(self.sample_weights, name="sample_weights")

    @property
    def weights(self) -> Float[Tensor, " pairs"]:
        """How much each pair counts."""
        if self.sample_weights is None:
            return torch.ones(len(self.chosen), dtype=torch.float64)
        return self.sample_weights.double()

    def used(self) -> "Judgements":
        """Leave out pairs of weight zero, and those without a judgement."""
        kept = (self.weights > 0.0) & ~self.probabilities.isnan().all(1)
        return Judgements(
            self.chosen[kept],
            self.rejected[kept],
            self.probabilities[kept],
            self.groups[kept],
            self.weights[kept],
        )

    def labels(self, store: EmbeddingTable, fold_of_group: Int[Tensor, " groups"]) -> "Labels":
        """Return them with their place in the cross-validation."""
        return Labels(
            store,
            self.chosen,
            self.rejected,
            self.probabilities,
            self.weights,
            fold_of_group[self.groups],
        )


@dataclass(frozen=True, eq=False, slots=True)
class Labels:
    """What heads are fitted to: ratings of responses or judgements of pairs, by objective.

    Called, they are the rows of a single objective, read from the store again in each pass.

    Attributes:
        store: Response embeddings.
        rows: Row of the rated, or of the chosen, response.
        others: Row of the rejected response; None for ratings.
        targets: Ratings, or probabilities that the chosen response is better; NaN where missing.
        weights: How much each counts.
        folds: Part of the cross-validation.
    """

    store: EmbeddingTable
    rows: Int[Tensor, " labels"]
    others: Int[Tensor, " labels"] | None
    targets: Float[Tensor, "labels objectives"]
    weights: Float[Tensor, " labels"]
    folds: Int[Tensor, " labels"]

    def of(self, objective: int) -> "Labels":
        """Return those of one objective, without missing ones."""
        known = (~self.targets[:, objective].isnan()).nonzero()[:, 0]
        return Labels(
            self.store,
            self.rows[known],
            None if self.others is None else self.others[known],
            self.targets[known][:, [objective]],
            self.weights[known],
            self.folds[known],
        )

    def __call__(self) -> Iterator[LabelledRows]:
        """Yield all labels with their embeddings, or differences of them."""
        for part in self._parts():
            first, second = self._read(part)
            yield LabelledRows(
                first if second is None else first - second,
                self.targets[part, 0],
                self.weights[part],
                self.folds[part],
            )

    def means(self, folds: int) -> Float[Tensor, "fits dim"]:
        """Mean embedding of the responses without each fold, and of all of them."""
        sums = torch.zeros(folds, self.store.dim, dtype=torch.float64)
        counts = torch.zeros(folds, dtype=torch.float64).index_add_(0, self.folds, self.weights)
        for part in self._parts():
            first, second = self._read(part)
            middle = first if second is None else 0.5 * (first + second)
            sums.index_add_(0, self.folds[part], self.weights[part, None] * middle)
        rests = [((sums.sum(0) - sums[k]) / (counts.sum() - counts[k])) for k in range(folds)]
        return torch.stack([*rests, sums.sum(0) / counts.sum()])

    def _parts(self) -> Iterator[Int[Tensor, " part"]]:
        """Cut in the order of the store, where responses to one prompt are side by side."""
        yield from self.rows.argsort(stable=True).split(CHUNK_ROWS)

    def _read(self, part: Int[Tensor, " part"]) -> tuple[Tensor, Tensor | None]:
        if self.others is None:
            return self.store.read(self.rows[part]).double(), None
        # In float64 before the difference, which in the store's dtype would lose digits.
        both = self.store.read(torch.cat([self.rows[part], self.others[part]])).double()
        first, second = both.chunk(2)
        return first, second


@dataclass(frozen=True, eq=False, slots=True)
class JudgedHead:
    """One head fitted here, and how.

    Attributes:
        weights: Fitted without each fold, then on everything.
        intercepts: The same.
        link: From the linear part to the reward.
        alpha: Penalty chosen.
        error: See `HeadSummary`.
        explained: See `HeadSummary`.
        sigma: Standard deviation of a rating about the truth; None without ratings on a scale.
        ratings: How many it was fitted on.
        judgements: How many it was fitted on.
    """

    weights: Float[Tensor, "fits dim"]
    intercepts: Float[Tensor, " fits"]
    link: Link
    alpha: float
    error: float
    explained: float
    sigma: float | None
    ratings: int
    judgements: int


def fit_singles(
    ratings: Labels,
    judgements: Labels | None,
    *,
    objectives: Sequence[str],
    logistic: Sequence[str],
    folds: int,
    alphas: Sequence[float],
) -> dict[int, JudgedHead]:
    """Fit the objectives that are not plain ridge regressions, one by one.

    Args:
        ratings: Of all objectives.
        judgements: Of all objectives.
        objectives: Names of the columns.
        logistic: Objectives whose ratings are yes or no.
        folds: Parts of the cross-validation.
        alphas: Penalties to choose from.

    Returns:
        The heads of objectives in `logistic`, or with judgements, by column.

    Raises:
        ValueError: If `logistic` names an unknown objective, or one with judgements; if an
            objective cannot be fitted, naming it.
        RuntimeError: If a fit does not converge, naming the objective.
    """
    if unknown := sorted({*logistic} - {*objectives}):
        raise ValueError(
            f"`logistic` names {', '.join(unknown)}; the objectives are {', '.join(objectives)}."
        )
    heads: dict[int, JudgedHead] = {}
    for k, name in enumerate(objectives):
        pairs = None if judgements is None else judgements.of(k)
        judged = pairs is not None and len(pairs.rows) > 0
        if name in logistic and judged:
            raise ValueError(
                f"`logistic` names {name}, which has judgements: take it out, and its ratings and "
                f"judgements are fitted together."
            )
        try:
            if name in logistic:
                heads[k] = fit_binary_head(ratings.of(k), folds=folds, alphas=alphas)
            elif pairs is not None and judged:
                heads[k] = fit_judged_head(pairs, ratings.of(k), folds=folds, alphas=alphas)
            else:
                continue
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"{name}: {error}") from None
        note_the_end(name, heads[k].alpha, alphas)
    return heads


def note_the_end(name: str, alpha: float, alphas: Sequence[float]) -> None:
    """Say so if the penalty chosen is the largest or smallest there was."""
    if alpha in (min(alphas), max(alphas)) and len(alphas) > 1:
        logger.info("%s: the penalty chosen, %g, is at the end of `alphas`", name, alpha)


def fit_binary_head(ratings: Labels, *, folds: int, alphas: Sequence[float]) -> JudgedHead:
    """Fit the probability of a yes, `sigmoid(w . h + b)`, to ratings that are yes, no or between.

    Sample weights are divided by their mean, so that a penalty means the same with and without.

    Raises:
        ValueError: As `fit_binary`.
    """
    (scaled,) = _scaled(ratings)
    choice = fit_binary(scaled, folds=folds, alphas=alphas)
    weights, intercepts = _stacked(choice)
    error, explained = _in_nats(choice)
    count = len(ratings.rows)
    return JudgedHead(
        weights, intercepts, "logistic", choice.alpha, error, explained, None, count, 0
    )


def fit_judged_head(
    judgements: Labels, ratings: Labels, *, folds: int, alphas: Sequence[float]
) -> JudgedHead:
    """Fit a head to judgements of pairs, and to ratings where there are any.

    Without ratings the reward is `sigmoid(w . (h - m))`, with `m` the mean embedding of the judged
    responses: the probability that the response is judged better than one of reward a half. With
    ratings it is a rating, `w . h + b`. Sample weights are divided by their mean over judgements
    and ratings together, so that what one kind counts beside the other stays as given.

    Raises:
        ValueError: As `fit_judgements`.
    """
    pairs = len(judgements.rows)
    if len(judgements.folds.unique()) < 2:
        raise ValueError(
            f"{pairs} judgements, all on prompts of one fold; nothing to choose the penalty on. "
            f"Add data or take these judgements out."
        )
    if not len(ratings.rows):
        (scaled,) = _scaled(judgements)
        choice = fit_judgements(scaled, folds=folds, alphas=alphas)
        weights, _ = _stacked(choice)
        intercepts = -(weights * judgements.means(folds)).sum(1)
        error, explained = _in_nats(choice)
        return JudgedHead(
            weights, intercepts, "logistic", choice.alpha, error, explained, None, 0, pairs
        )
    scaled, rated = _scaled(judgements, ratings)
    choice = fit_judgements(scaled, rated(), folds=folds, alphas=alphas)
    weights, intercepts = _stacked(choice)
    error, baseline = _squared_errors(rated, weights, intercepts, folds=folds)
    explained = 1.0 - error / baseline if baseline > 0.0 else 0.0
    sigma = THURSTONE / choice.scale
    count = len(ratings.rows)
    return JudgedHead(
        weights, intercepts, "identity", choice.alpha, error, explained, sigma, count, pairs
    )


def _scaled(*kinds: Labels) -> list[Labels]:
    """Divide the weights by their mean over all kinds of labels."""
    every = torch.cat([labels.weights for labels in kinds])
    return [replace(labels, weights=labels.weights / every.mean()) for labels in kinds]


def _stacked(choice: LogisticChoice) -> tuple[Tensor, Tensor]:
    fits = [*choice.without, (choice.weights, choice.intercept)]
    intercepts = torch.tensor([intercept for _, intercept in fits], dtype=torch.float64)
    return torch.stack([weights for weights, _ in fits]), intercepts


def _in_nats(choice: LogisticChoice) -> tuple[float, float]:
    """Cross-validated cross-entropy, and the share of the best constant's that is removed."""
    error = float(choice.loss.min())
    return error, 1.0 - error / choice.baseline if choice.baseline > 0.0 else 0.0


def _squared_errors(
    ratings: Labels,
    weights: Float[Tensor, "fits dim"],
    intercepts: Float[Tensor, " fits"],
    *,
    folds: int,
) -> tuple[float, float]:
    """Weighted mean squared error of ratings out of their fold, and that of the mean rating."""
    s, y = ratings.weights, ratings.targets[:, 0].double()
    sums, counts = (
        torch.zeros(folds, dtype=torch.float64).index_add_(0, ratings.folds, values)
        for values in (s * y, s)
    )
    means = (sums.sum() - sums) / (counts.sum() - counts)
    baseline = float(s @ (y - means[ratings.folds]).square())
    error = 0.0
    for rows in ratings():
        own = weights[rows.folds]
        rewards = (rows.inputs.double() * own).sum(1) + intercepts[rows.folds]
        error += float(rows.sample_weights @ (rewards - rows.targets).square())
    return error / float(s.sum()), baseline / float(s.sum())
