"""Decorrelation: rewards that do not follow length and format, compiled to one affine map."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from scipy.optimize import brentq
from scipy.stats import rankdata
from torch import Tensor

from armo.artifacts import read_json, read_tensors, write_json, write_tensors
from armo.fit.heads import FittedHeads, ObjectiveHeads

logger = logging.getLogger(__name__)

Method = Literal["leace", "penalty"]
Scope = Literal["pooled", "within_prompt"]
METHODS: tuple[Method, ...] = ("leace", "penalty")


class DecorrelationWarning(UserWarning):
    """An objective could not be decorrelated to the tolerance, or hardly survived it."""


@dataclass(frozen=True, eq=False, slots=True)
class RewardTransform:
    """The affine map from response embedding to adjusted rewards: `a = matrix @ h + offset`.

    Adjusted rewards have mean 0 and standard deviation 1 on the reference responses. Rows of
    bias objectives are standardised but not decorrelated: they report style.
    """

    objectives: tuple[str, ...]
    matrix: Float[Tensor, "objectives dim"]
    offset: Float[Tensor, " objectives"]

    def adjusted(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch objectives"]:
        """Compute adjusted rewards, in float64."""
        return embeddings.double() @ self.matrix.T + self.offset


@dataclass(frozen=True, slots=True)
class DecorrelationSummary:
    """What decorrelation did to one objective, on the reference responses.

    Attributes:
        objective: Name.
        penalties: Penalty `lambda` on each bias objective, by name.
        before: Spearman correlation with each bias objective's reward, before.
        after: The same, after.
        kept: Standard deviation after, as a share of that before.
    """

    objective: str
    penalties: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    kept: float


@dataclass(frozen=True, eq=False, slots=True)
class FittedTransforms:
    """The reward transform, and one for the heads of each fold of the cross-validation.

    Attributes:
        transform: For the heads fitted on all training rows.
        without_fold: For each fold, the transform of the heads fitted without it.
        summaries: What decorrelation did, per objective that is not a bias objective.
    """

    transform: RewardTransform
    without_fold: tuple[RewardTransform, ...]
    summaries: tuple[DecorrelationSummary, ...]


def fit_transforms(
    heads: FittedHeads,
    embeddings: Float[Tensor, "batch dim"],
    *,
    covariates: Float[Tensor, "batch covariates"],
    groups: Int[Tensor, " batch"],
    bias_indices: Sequence[int],
    methods: Sequence[Method] = METHODS,
    scope: Scope = "within_prompt",
    tolerance: float = 0.005,
) -> FittedTransforms:
    """Fit the reward transform of the heads, and of the heads of each fold.

    The arguments are those of `fit_reward_transform`.
    """
    fitted = []
    for each in (heads.heads, *heads.without_fold):
        fitted.append(
            fit_reward_transform(
                each,
                embeddings,
                covariates,
                groups,
                bias_indices=bias_indices,
                methods=methods,
                scope=scope,
                tolerance=tolerance,
            )
        )
    (transform, summaries), *rest = fitted
    return FittedTransforms(transform, tuple(t for t, _ in rest), tuple(summaries))


def fit_reward_transform(
    heads: ObjectiveHeads,
    embeddings: Float[Tensor, "batch dim"],
    covariates: Float[Tensor, "batch covariates"],
    groups: Int[Tensor, " batch"],
    *,
    bias_indices: Sequence[int],
    methods: Sequence[Method] = METHODS,
    scope: Scope = "within_prompt",
    tolerance: float = 0.005,
) -> tuple[RewardTransform, list[DecorrelationSummary]]:
    """Fit the reward transform on reference responses.

    - `leace` erases the covariates from the embedding before the heads see it, `r = W P h`.
    - `penalty` subtracts the bias objectives, `a_k = r_k - sum_b lambda_kb r_b`, with `lambda`
      such that the Spearman correlation of `a_k` with the reward of `b` is zero from both sides.
      After `leace` what is subtracted is the erased bias reward, so that what was erased stays
      erased.

    With neither the rewards are only standardised.

    Args:
        heads: The objective heads.
        embeddings: Embeddings of the reference responses.
        covariates: Measured surface features of the same responses, any units.
        groups: Prompt of each reference response.
        bias_indices: Columns of the bias objectives.
        methods: Any of `leace` and `penalty`.
        scope: Decorrelate over all reference responses, or over their deviations from the mean
            of their prompt: what best-of-N and RL compare.
        tolerance: Absolute Spearman correlation that counts as zero, for `penalty`.

    Returns:
        The transform, and a summary per objective that is not a bias objective.

    Raises:
        ValueError: For an unknown method or scope, or reference responses that cannot serve.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"`methods` knows {', '.join(METHODS)}, not {', '.join(unknown)}.")
    if scope not in ("pooled", "within_prompt"):
        raise ValueError(f"`scope` must be pooled or within_prompt, got {scope!r}.")
    x = embeddings.double()
    deviations = deviate(x, groups, scope=scope)
    if not bool(deviations.any()):
        raise ValueError(
            "the reference responses do not differ within any prompt; use `scope: pooled` or "
            "add preference pairs"
        )
    mean = x.mean(0)
    projection = torch.eye(x.shape[1], dtype=torch.float64)
    if "leace" in methods:
        projection = leace_projection(deviations, deviate(covariates.double(), groups, scope=scope))
    erased = heads.weights @ projection
    matrix, bias = erased.clone(), list(bias_indices)
    matrix[bias] = heads.weights[bias]
    summaries = []
    style = deviations @ heads.weights[bias].T
    for k, name in enumerate(heads.objectives):
        if k in bias_indices:
            continue
        values = deviations @ erased[k]
        penalties = torch.zeros(len(bias), dtype=torch.float64)
        if "penalty" in methods and bias:
            subtracted = deviations @ erased[bias].T
            # Of a bias reward that leace erased only rounding is left, not to be blown up.
            subtracted = subtracted * (subtracted.std(0) > 1e-6 * style.std(0))
            penalties = fit_penalties(values, subtracted, style, name=name, tolerance=tolerance)
            matrix[k] = erased[k] - penalties @ erased[bias]
        before, after = deviations @ heads.weights[k], deviations @ matrix[k]
        kept = float(after.std() / before.std()) if before.std() > 0 else 0.0
        if kept < 0.05:
            warnings.warn(
                f"objective {name!r} keeps {kept:.1%} of its spread: it is little but style",
                DecorrelationWarning,
                stacklevel=2,
            )
        names = [heads.objectives[b] for b in bias]
        summaries.append(
            DecorrelationSummary(
                name,
                dict(zip(names, penalties.tolist(), strict=True)),
                {n: spearman(before, style[:, j]) for j, n in enumerate(names)},
                {n: spearman(after, style[:, j]) for j, n in enumerate(names)},
                kept,
            )
        )
    # Erasure moves h towards the mean, which a constant makes up for; standardising the
    # reference responses then fixes offset and scale at once.
    adjusted = x @ matrix.T
    spread = adjusted.std(0)
    if bool((spread < 1e-10).any()):
        dead = [heads.objectives[k] for k in (spread < 1e-10).nonzero()[:, 0].tolist()]
        raise ValueError(
            f"objective {', '.join(dead)} predicts one value for all reference responses; remove "
            f"it, or decorrelate it less"
        )
    matrix = matrix / spread[:, None]
    return RewardTransform(heads.objectives, matrix, -(matrix @ mean)), summaries


def leace_projection(
    embeddings: Float[Tensor, "batch dim"],
    covariates: Float[Tensor, "batch covariates"],
    *,
    tolerance: float = 1e-12,
) -> Float[Tensor, "dim dim"]:
    """Compute the LEACE projection `P`: no linear function of `P h` follows a covariate.

    With `W = Cov(h)^(-1/2)` and `U` an orthonormal basis of the columns of `W Cov(h, z)`,
    `P = I - W^+ U U^T W`. Of all linear maps with `Cov(P h, z) = 0` it moves `h` least.

    Args:
        embeddings: `h`, any offset.
        covariates: `z`, standardised here, so that their units do not matter; constant
            columns are ignored.
        tolerance: Smallest eigenvalue of the covariance kept, relative to the largest.

    Returns:
        The projection, float64; apply as `P @ h` on column vectors.

    References:
        Belrose et al., "LEACE: Perfect linear concept erasure in closed form",
        arXiv 2306.03819, theorem 4.3.
    """
    x = embeddings.double() - embeddings.double().mean(0)
    z = covariates.double() - covariates.double().mean(0)
    spread = z.std(0)
    varies = spread > 1e-12 * covariates.double().abs().amax(0)
    z = z[:, varies] / spread[varies]
    identity = torch.eye(x.shape[1], dtype=torch.float64)
    if z.shape[1] == 0:
        return identity
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    kept = values > tolerance * values.max()
    values, vectors = values[kept], vectors[:, kept]
    whitened = (vectors / values.sqrt()).T @ (x.T @ z / len(x))
    left, singular, _ = torch.linalg.svd(whitened, full_matrices=False)
    basis = left[:, singular > 1e-9]
    unwhiten = vectors * values.sqrt()
    whiten = (vectors / values.sqrt()).T
    projection: Tensor = identity - unwhiten @ basis @ basis.T @ whiten
    return projection


def fit_penalties(
    values: Float[Tensor, " batch"],
    subtracted: Float[Tensor, "batch biases"],
    style: Float[Tensor, "batch biases"],
    *,
    name: str,
    tolerance: float,
    rounds: int = 20,
) -> Float[Tensor, " biases"]:
    """Find penalties that make `values - subtracted @ penalties` uncorrelated with `style`.

    Raising a penalty lowers the Spearman correlation with its own column, so one penalty is a
    root to be found; several are found in turn until all correlations are within `tolerance`,
    starting from the least-squares penalties, which make the Pearson correlations zero.

    Args:
        values: Rewards of one objective on the reference responses.
        subtracted: What each penalty multiplies.
        style: Rewards of the bias objectives, to be uncorrelated with.
        name: The objective, for the warning.
        tolerance: Absolute correlation that counts as zero.
        rounds: Turns over all bias objectives at most.

    Warns:
        DecorrelationWarning: If the tolerance is not reached; the least-squares penalties
            are returned then.
    """
    centred = style - style.mean(0)
    least_squares: Tensor = torch.linalg.lstsq(
        centred.T @ subtracted, (centred.T @ values)[:, None], driver="gelsd"
    ).solution[:, 0]
    penalties: Tensor = least_squares.clone()
    ranks = [standard_ranks(column) for column in style.T]
    for _ in range(rounds):
        remaining = standard_ranks(values - subtracted @ penalties)
        if all(abs(float(remaining @ column)) <= tolerance for column in ranks):
            return penalties
        for b, column in enumerate(ranks):
            without = values - subtracted @ penalties + penalties[b] * subtracted[:, b]
            root = _root(without, subtracted[:, b], column, start=float(penalties[b]))
            if root is None:
                break
            penalties[b] = root
    warnings.warn(
        f"objective {name!r} keeps a Spearman correlation with a bias objective above "
        f"`tolerance={tolerance:g}`; its least-squares penalties are used",
        DecorrelationWarning,
        stacklevel=2,
    )
    return least_squares


def deviate(
    values: Float[Tensor, "batch columns"], groups: Int[Tensor, " batch"], *, scope: Scope
) -> Float[Tensor, "kept columns"]:
    """Subtract the overall mean, or each prompt's mean, dropping prompts with one response."""
    if scope == "pooled":
        return values - values.mean(0)
    _, inverse, counts = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), values.shape[1], dtype=values.dtype)
    sums.index_add_(0, inverse, values)
    deviations: Tensor = (values - (sums / counts[:, None])[inverse])[counts[inverse] > 1]
    return deviations


def spearman(first: Float[Tensor, " batch"], second: Float[Tensor, " batch"]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; 0 if either is constant."""
    return float(standard_ranks(first) @ standard_ranks(second))


def standard_ranks(values: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Ranks, centred and scaled to length 1, so that Spearman's correlation is a dot product.

    Ties share their mean rank; constant values give zeros.
    """
    ranks = torch.from_numpy(rankdata(values.numpy()))
    ranks = ranks - ranks.mean()
    norm = ranks.norm()
    return ranks / norm if float(norm) > 0.0 else ranks


def save_transforms(
    folder: Path, *, decorrelated: FittedTransforms, undecorrelated: FittedTransforms
) -> None:
    """Write both transforms, the second being what the first is compared with."""
    for name, fitted in (("decorrelated", decorrelated), ("undecorrelated", undecorrelated)):
        write_tensors(
            folder / f"{name}.safetensors",
            {
                "matrix": fitted.transform.matrix,
                "offset": fitted.transform.offset,
                "fold_matrix": torch.stack([t.matrix for t in fitted.without_fold]),
                "fold_offset": torch.stack([t.offset for t in fitted.without_fold]),
            },
        )
        write_json(
            folder / f"{name}.json",
            {
                "objectives": list(fitted.transform.objectives),
                "summaries": [asdict(summary) for summary in fitted.summaries],
            },
        )


def load_transforms(folder: Path, *, decorrelated: bool = True) -> FittedTransforms:
    """Read one of the transforms that `save_transforms` wrote."""
    name = "decorrelated" if decorrelated else "undecorrelated"
    tensors = read_tensors(folder / f"{name}.safetensors")
    described = read_json(folder / f"{name}.json")
    names = tuple(described["objectives"])
    return FittedTransforms(
        RewardTransform(names, tensors["matrix"], tensors["offset"]),
        tuple(
            RewardTransform(names, matrix, offset)
            for matrix, offset in zip(tensors["fold_matrix"], tensors["fold_offset"], strict=True)
        ),
        tuple(DecorrelationSummary(**entry) for entry in described["summaries"]),
    )


def _root(
    values: Float[Tensor, " batch"],
    subtracted: Float[Tensor, " batch"],
    ranks: Float[Tensor, " batch"],
    *,
    start: float,
) -> float | None:
    """Find the penalty at which the correlation with `ranks` changes sign, or None."""

    def correlation(penalty: float) -> float:
        return float(standard_ranks(values - penalty * subtracted) @ ranks)

    spread = float(subtracted.std())
    if spread == 0.0:
        return None
    step = 0.1 * float(values.std()) / spread + 1e-12
    for _ in range(30):
        low, high = start - step, start + step
        if correlation(low) * correlation(high) <= 0.0:
            # Far finer than the tolerance of a correlation asks for.
            root: float = brentq(correlation, low, high, xtol=1e-5 * step + 1e-15)
            return root
        step *= 2.0
    return None
