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
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from armo.artifacts import read_json, read_tensors, write_json, write_tensors
from armo.fit.heads import FittedHeads, ObjectiveHeads

logger = logging.getLogger(__name__)

Method = Literal["leace", "penalty", "residual", "nuisance", "reweight"]
Scope = Literal["pooled", "within_prompt"]
METHODS: tuple[Method, ...] = ("leace", "penalty", "residual", "nuisance", "reweight")
"""What decorrelation may be made of. The first three change the rewards, see
`fit_reward_transform`; the last two change how the gate learns from preferences, see `fit_gating`:

- `nuisance`: what judges give to style is explained by style itself, in terms of the preference
  model that are dropped at scoring.
- `reweight`: preferences that style alone would have predicted count less, see `style_weights`.
"""


STYLE_FEATURES = (
    "log_length",
    "list_items",
    "bold",
    "italic",
    "headings",
    "links",
    "code_blocks",
    "tables",
    "emoji",
    "exclamations",
    "affirmative",
)
"""Surface features that are style. Of the others, lines and paragraphs follow from length and
lists; inline code and questions are as much content: a good answer about code names code."""

RARE = 20
"""Prompts to which a covariate must differ between responses, at most, to be decorrelated from."""

# The tensors of a transform, in the order of its fields.
PARTS = ("matrix", "offset", "style", "covariate_range")


class DecorrelationWarning(UserWarning):
    """An objective could not be decorrelated to the tolerance, or hardly survived it."""


@dataclass(frozen=True, eq=False, slots=True)
class RewardTransform:
    """The map to adjusted rewards: `a = matrix @ h + style @ z + offset`.

    `h` is the response embedding, `z` are covariates measured on the response's text, of which
    there are none but for the method `residual`. Adjusted rewards have mean 0 and standard
    deviation 1 on the reference responses. Rows of bias objectives are standardised but not
    decorrelated: they report style.

    Beyond the range of a covariate on the reference responses, `style @ z` may fall, but it rises
    no more (`style_part`).
    """

    objectives: tuple[str, ...]
    matrix: Float[Tensor, "objectives dim"]
    offset: Float[Tensor, " objectives"]
    covariates: tuple[str, ...]
    style: Float[Tensor, "objectives covariates"]
    covariate_range: Float[Tensor, "2 covariates"]

    def adjusted(
        self,
        embeddings: Float[Tensor, "batch dim"],
        covariates: Float[Tensor, "batch covariates"],
    ) -> Float[Tensor, "batch objectives"]:
        """Compute adjusted rewards, in float64.

        Args:
            embeddings: Of the responses.
            covariates: Surface features of the same responses, in the order of
                `self.covariates`.
        """
        style = style_part(covariates.double(), self.style, self.covariate_range)
        return embeddings.double() @ self.matrix.T + style + self.offset


def style_part(
    covariates: Float[Tensor, "batch covariates"],
    style: Float[Tensor, "objectives covariates"],
    covariate_range: Float[Tensor, "2 covariates"],
) -> Float[Tensor, "batch objectives"]:
    """Compute what covariates add to adjusted rewards: a slope each, that is not paid for ever.

    What style does beyond what reference responses show was not measured. A slope that goes on
    would give a response of one word ten standard deviations for being short, which a policy finds
    at once; so the part of a covariate is at most what it is at the better end of its range.
    Beyond the worse end it goes on falling: nothing is gained there by more of it.

    Args:
        covariates: Of the responses.
        style: The slopes.
        covariate_range: Lowest and highest value of each covariate on the reference responses.
    """
    low, high = covariate_range
    falling, rising = style.clamp(max=0.0), style.clamp(min=0.0)
    return covariates.clamp(min=low) @ falling.T + covariates.clamp(max=high) @ rising.T


@dataclass(frozen=True, slots=True)
class DecorrelationSummary:
    """What decorrelation did to one objective, on the reference responses.

    Attributes:
        objective: Name.
        penalties: Penalty `lambda` on each bias objective, by name.
        before: Spearman correlation with each bias objective's reward, and with each covariate,
            before.
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
        methods: What was asked for.
        features: Names of the covariates that it is to be decorrelated from.
        transform: For the heads fitted on all training rows.
        without_fold: For each fold, the transform of the heads fitted without it.
        summaries: What decorrelation did, per objective that is not a bias objective.
    """

    methods: tuple[Method, ...]
    features: tuple[str, ...]
    transform: RewardTransform
    without_fold: tuple[RewardTransform, ...]
    summaries: tuple[DecorrelationSummary, ...]


def fit_transforms(
    heads: FittedHeads,
    embeddings: Float[Tensor, "batch dim"],
    *,
    covariates: Float[Tensor, "batch covariates"],
    covariate_names: Sequence[str],
    groups: Int[Tensor, " batch"],
    bias_indices: Sequence[int],
    methods: Sequence[Method] = ("residual", "reweight"),
    features: Sequence[str] = STYLE_FEATURES,
    scope: Scope = "within_prompt",
    tolerance: float = 0.005,
) -> FittedTransforms:
    """Fit the reward transform of the heads, and of the heads of each fold.

    The arguments are those of `fit_reward_transform`.
    """
    shown = _prompts_showing(covariates.double(), groups, scope=scope)
    odd = _too_few(shown, groups) & (shown > 0)
    named = zip(covariate_names, odd.tolist(), strict=True)
    if rare := [name for name, is_odd in named if is_odd and name in features]:
        logger.info("too few responses have %s to take it out of the rewards", ", ".join(rare))
    fitted = []
    for each in (heads.heads, *heads.without_fold):
        fitted.append(
            fit_reward_transform(
                each,
                embeddings,
                covariates,
                groups,
                covariate_names=covariate_names,
                bias_indices=bias_indices,
                methods=methods,
                features=features,
                scope=scope,
                tolerance=tolerance,
            )
        )
    (transform, summaries), *rest = fitted
    without_fold = tuple(other for other, _ in rest)
    return FittedTransforms(
        tuple(methods), tuple(features), transform, without_fold, tuple(summaries)
    )


def fit_reward_transform(
    heads: ObjectiveHeads,
    embeddings: Float[Tensor, "batch dim"],
    covariates: Float[Tensor, "batch covariates"],
    groups: Int[Tensor, " batch"],
    *,
    covariate_names: Sequence[str],
    bias_indices: Sequence[int],
    methods: Sequence[Method] = ("residual", "reweight"),
    features: Sequence[str] = STYLE_FEATURES,
    scope: Scope = "within_prompt",
    tolerance: float = 0.005,
) -> tuple[RewardTransform, list[DecorrelationSummary]]:
    """Fit the reward transform on reference responses.

    - `leace` erases the covariates from the embedding before the heads see it, `r = W P h`.
    - `penalty` subtracts the bias objectives, `a_k = r_k - sum_b lambda_kb r_b`, with `lambda`
      such that the Spearman correlation of `a_k` with the reward of `b` is zero from both sides.
      After `leace` what is subtracted is the erased bias reward, so that what was erased stays
      erased.
    - `residual` subtracts what least squares predicts of `a_k` from the measured covariates. It
      takes less out than `leace`, whose prediction of style from the embedding is imperfect, but
      scoring then needs the text.

    With none of them the rewards are only standardised. A covariate in which responses differ to
    fewer than `RARE` prompts, and to less than one in a hundred, is left alone: what one odd text
    says of it would be subtracted from every response that has it.

    Args:
        heads: The objective heads.
        embeddings: Embeddings of the reference responses.
        covariates: Measured surface features of the same responses, any units.
        groups: Prompt of each reference response.
        covariate_names: Columns of `covariates`.
        bias_indices: Columns of the bias objectives.
        methods: Any of `METHODS`.
        features: Names of the covariates to decorrelate from, of `covariate_names`.
        scope: Decorrelate over all reference responses, or over their deviations from the mean
            of their prompt: what best-of-N and RL compare.
        tolerance: Absolute Spearman correlation that counts as zero, for `penalty`.

    Returns:
        The transform, and a summary per objective that is not a bias objective.

    Raises:
        ValueError: For an unknown method, feature or scope, or reference responses that cannot
            serve.
    """
    for name, given, known in (
        ("methods", methods, METHODS),
        ("features", features, covariate_names),
    ):
        if unknown := [each for each in given if each not in known]:
            raise ValueError(f"`{name}` knows {', '.join(known)}, not {', '.join(unknown)}.")
    if scope not in ("pooled", "within_prompt"):
        raise ValueError(f"`scope` must be pooled or within_prompt, got {scope!r}.")
    columns = [list(covariate_names).index(name) for name in features]
    x, z = embeddings.double(), covariates[:, columns].double()
    deviations, measured = deviate(x, groups, scope=scope), deviate(z, groups, scope=scope)
    if not bool(deviations.any()):
        raise ValueError(
            "the reference responses do not differ within any prompt; use `scope: pooled` or "
            "add preference pairs"
        )
    # Of what is the same within every prompt only rounding is left, not to be blown up.
    measured = measured * (measured.abs().amax(0) > 1e-12 * z.abs().amax(0))
    measured = measured * ~_too_few(_prompts_showing(z, groups, scope=scope), groups)
    projection = torch.eye(x.shape[1], dtype=torch.float64)
    if "leace" in methods and columns:
        projection = leace_projection(deviations, measured)
    erased = heads.weights @ projection
    matrix, bias = erased.clone(), list(bias_indices)
    matrix[bias] = heads.weights[bias]
    mixed = [k for k in range(len(matrix)) if k not in bias]
    predicted = deviations @ heads.weights[bias].T
    penalties = torch.zeros(len(matrix), len(bias), dtype=torch.float64)
    if "penalty" in methods and bias:
        subtracted = deviations @ erased[bias].T
        # Of a bias reward that leace erased only rounding is left, not to be blown up.
        subtracted = subtracted * (subtracted.std(0) > 1e-6 * predicted.std(0))
        for k in mixed:
            penalties[k] = fit_penalties(
                deviations @ erased[k],
                subtracted,
                predicted,
                name=heads.objectives[k],
                tolerance=tolerance,
            )
        matrix[mixed] -= penalties[mixed] @ erased[bias]
    style = torch.zeros(len(matrix), z.shape[1], dtype=torch.float64)
    if "residual" in methods:
        style[mixed] = -least_squares(measured, deviations @ matrix[mixed].T).T
    before = deviations @ heads.weights.T
    after = deviations @ matrix.T + measured @ style.T
    biases = [heads.objectives[b] for b in bias]
    against = [*biases, *features]
    style_values = torch.cat([predicted, measured], dim=1)
    correlation_before = spearman(before, style_values).tolist()
    correlation_after = spearman(after, style_values).tolist()
    summaries = []
    for k in mixed:
        name = heads.objectives[k]
        kept = float(after[:, k].std() / before[:, k].std()) if before[:, k].std() > 0 else 0.0
        if kept < 0.05:
            warnings.warn(
                f"objective {name!r} keeps {kept:.1%} of its spread: it is little but style",
                DecorrelationWarning,
                stacklevel=2,
            )
        summaries.append(
            DecorrelationSummary(
                name,
                dict(zip(biases, penalties[k].tolist(), strict=True)),
                dict(zip(against, correlation_before[k], strict=True)),
                dict(zip(against, correlation_after[k], strict=True)),
                kept,
            )
        )
    # Erasure moves h towards the mean, which a constant makes up for; standardising the
    # reference responses then fixes offset and scale at once.
    adjusted = x @ matrix.T + z @ style.T
    spread = adjusted.std(0)
    if bool((spread < 1e-10).any()):
        dead = [heads.objectives[k] for k in (spread < 1e-10).nonzero()[:, 0].tolist()]
        raise ValueError(
            f"objective {', '.join(dead)} predicts one value for all reference responses; remove "
            f"it, or decorrelate it less"
        )
    transform = RewardTransform(
        heads.objectives,
        matrix / spread[:, None],
        -adjusted.mean(0) / spread,
        tuple(features) if "residual" in methods else (),
        style / spread[:, None] if "residual" in methods else style[:, :0],
        torch.stack([z.amin(0), z.amax(0)]) if "residual" in methods else z.new_empty(2, 0),
    )
    return transform, summaries


def _prompts_showing(
    covariates: Float[Tensor, "batch covariates"], groups: Int[Tensor, " batch"], *, scope: Scope
) -> Int[Tensor, " covariates"]:
    """Number of prompts that show what a covariate does: it differs within them, or from others."""
    distinct, prompt = groups.unique(return_inverse=True)
    low = torch.full((len(distinct), covariates.shape[1]), torch.inf, dtype=covariates.dtype)
    index = prompt[:, None].expand(covariates.shape)
    high = (-low).scatter_reduce(0, index, covariates, "amax")
    low = low.scatter_reduce(0, index, covariates, "amin")
    if scope == "pooled":
        usual = covariates.mode(0).values
        low, high = torch.minimum(low, usual), torch.maximum(high, usual)
    return (high > low).sum(0)


def _too_few(shown: Int[Tensor, " covariates"], groups: Int[Tensor, " batch"]) -> Tensor:
    return shown < min(RARE, len(groups.unique()) / 100)


def least_squares(
    covariates: Float[Tensor, "batch covariates"], values: Float[Tensor, "batch columns"]
) -> Float[Tensor, "covariates columns"]:
    """Fit `values` by the covariates, without an intercept.

    Of covariates that say the same, the coefficients are the smallest in units of the covariates'
    spread; those of constant ones are zero.
    """
    spread = covariates.square().mean(0).sqrt()
    scale = torch.where(spread > 0, spread, 1.0)
    solution: Tensor = torch.linalg.lstsq(covariates / scale, values, driver="gelsd").solution
    return solution / scale[:, None]


def style_weights(
    differences: Float[Tensor, "batch covariates"],
    pair_weights: Float[Tensor, " batch"] | None = None,
    *,
    most: float = 10.0,
) -> Float[Tensor, " batch"]:
    """Weigh preference pairs such that style does not tell which response was chosen.

    A logistic model of the covariates alone gives the probability that the chosen response would
    be chosen; the weight is one over twice that, inverse propensity weighting.

    Args:
        differences: Covariates of the chosen minus those of the rejected responses.
        pair_weights: What the pairs count already, to be multiplied by the result.
        most: Largest weight, as a multiple of that of a pair that style says nothing about.

    Returns:
        Weights with mean one.

    References:
        Rosenbaum and Rubin, "The Central Role of the Propensity Score", Biometrika 70(1), 1983.
    """
    probability = torch.sigmoid(style_logits(differences, differences, pair_weights))
    weights = (0.5 / probability).clamp(max=most)
    return weights / weights.mean()


def style_logits(
    train: Float[Tensor, "train covariates"],
    test: Float[Tensor, "test covariates"],
    train_weights: Float[Tensor, " train"] | None = None,
) -> Float[Tensor, " test"]:
    """Log-odds of being chosen, of a logistic model that sees surface features alone.

    Args:
        train: Covariates of the chosen minus those of the rejected responses, to fit on.
        test: The same of the pairs to predict.
        train_weights: Of the pairs to fit on; equal by default.
    """
    spread = train.square().mean(0).sqrt()
    if not bool((spread > 0).any()):
        return torch.zeros(len(test), dtype=torch.float64)  # nothing to tell them apart by
    x = (train[:, spread > 0] / spread[spread > 0]).numpy()
    # Both orders of each pair: the model has no intercept, so order must not matter.
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    once = torch.ones(len(x)) if train_weights is None else train_weights / train_weights.mean()
    model.fit([*x, *-x], [1] * len(x) + [0] * len(x), sample_weight=once.repeat(2).numpy())
    scaled = (test[:, spread > 0] / spread[spread > 0]).numpy()
    return torch.from_numpy(scaled @ model.coef_[0])


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


def spearman(
    first: Float[Tensor, "batch columns"], second: Float[Tensor, "batch others"]
) -> Float[Tensor, "columns others"]:
    """Spearman's rank correlations, ties sharing their mean rank; 0 where one is constant."""
    return standard_ranks(first).T @ standard_ranks(second)


def standard_ranks(values: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Ranks, centred and scaled to length 1, so that Spearman's correlation is a dot product.

    Ties share their mean rank; constant values give zeros.
    """
    ranks = torch.from_numpy(rankdata(values.numpy(), axis=0))
    ranks = ranks - ranks.mean(0)
    norm = ranks.norm(dim=0)
    return ranks / torch.where(norm > 0.0, norm, 1.0)


def save_transforms(
    folder: Path, *, decorrelated: FittedTransforms, undecorrelated: FittedTransforms
) -> None:
    """Write both transforms, the second being what the first is compared with."""
    for name, fitted in (("decorrelated", decorrelated), ("undecorrelated", undecorrelated)):
        every = (fitted.transform, *fitted.without_fold)
        write_tensors(
            folder / f"{name}.safetensors",
            {part: torch.stack([getattr(t, part) for t in every]) for part in PARTS},
        )
        write_json(
            folder / f"{name}.json",
            {
                "methods": list(fitted.methods),
                "features": list(fitted.features),
                "objectives": list(fitted.transform.objectives),
                "covariates": list(fitted.transform.covariates),
                "summaries": [asdict(summary) for summary in fitted.summaries],
            },
        )


def load_transforms(folder: Path, *, decorrelated: bool = True) -> FittedTransforms:
    """Read one of the transforms that `save_transforms` wrote."""
    name = "decorrelated" if decorrelated else "undecorrelated"
    tensors = read_tensors(folder / f"{name}.safetensors")
    described = read_json(folder / f"{name}.json")
    names, covariates = tuple(described["objectives"]), tuple(described["covariates"])
    transform, *without_fold = (
        RewardTransform(names, matrix, offset, covariates, style, covariate_range)
        for matrix, offset, style, covariate_range in zip(
            *(tensors[part] for part in PARTS), strict=True
        )
    )
    return FittedTransforms(
        tuple(described["methods"]),
        tuple(described["features"]),
        transform,
        tuple(without_fold),
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
