"""A linear probe on the response embedding: what pairs can teach without objectives to read."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from armo.artifacts import read_tensors, write_tensors
from armo.embed.extract import EmbeddedData
from armo.fit.decorrelation import PARTS, FittedTransforms, RewardTransform, fit_reward_transform
from armo.fit.heads import FittedHeads, ObjectiveHeads
from armo.fit.judged import Judgements
from armo.fit.logistic import fit_judgements

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)


def can_probe(judgements: Judgements, heads: FittedHeads) -> bool:
    """Whether pairs that are not ties are in two folds or more, to choose the penalty on."""
    decided = (judgements.probabilities != 0.5).any(1)
    return len(heads.fold_of_group[judgements.groups[decided]].unique()) > 1


def fit_probe(
    data: EmbeddedData,
    heads: FittedHeads,
    transforms: FittedTransforms,
    judgements: Judgements,
    *,
    alphas: Sequence[float] = PENALTIES,
) -> RewardTransform:
    """Fit a Bradley-Terry model that is linear in the response embedding, and decorrelate it.

    Its penalty is chosen by cross-validation over prompts, in the folds of the heads. What the
    methods of decorrelation do to objectives is done to it, as if it were one; `penalty`, which
    needs bias objectives, does nothing.

    Args:
        data: Where the embeddings and surface features are.
        heads: For their folds.
        transforms: For the methods and features of decorrelation.
        judgements: Of one column: the training pairs and how much each counts.
        alphas: Penalties to choose from.

    Returns:
        The probe as a transform to a single adjusted reward, its score.
    """
    labels = judgements.labels(data.responses, heads.fold_of_group).of(0)
    labels = replace(labels, weights=labels.weights / labels.weights.mean())
    fitted = fit_judgements(labels, folds=int(heads.fold_of_group.max()) + 1, alphas=alphas)
    reference = torch.cat([judgements.chosen, judgements.rejected]).unique()
    transform, _ = fit_reward_transform(
        ObjectiveHeads(("probe",), fitted.weights[None], torch.zeros(1, dtype=torch.float64)),
        data.responses.read(reference),
        data.tables.covariates[reference],
        data.tables.prompt_of_response[reference],
        covariate_names=data.covariates,
        bias_indices=(),
        methods=transforms.methods,
        features=transforms.features,
    )
    return transform


def save_probe(folder: Path, name: str, probe: RewardTransform) -> None:
    """Write a probe; its surface features are those of the transform it was fitted with."""
    parts = {part: getattr(probe, part) for part in PARTS}
    write_tensors(folder / f"{name}_probe.safetensors", parts)


def load_probe(folder: Path, name: str, *, covariates: tuple[str, ...]) -> RewardTransform | None:
    """Read what `save_probe` wrote, given the features of the transform; None if it did not."""
    path = folder / f"{name}_probe.safetensors"
    if not path.exists():
        return None
    parts = read_tensors(path)
    return RewardTransform(
        ("probe",), covariates=covariates, **{part: parts[part] for part in PARTS}
    )
