"""Null baselines: scores that read nothing of what a response says."""

import torch
from jaxtyping import Float
from torch import Tensor

from armo.data.surface import MARKS, SURFACE_FEATURES

RANDOM_DRAWS = 20
"""Seeded random scores, of which credits are averaged: the noise of one is not a result."""


def baseline_scores(
    surface: Float[Tensor, "responses covariates"], *, seed: int = 0
) -> dict[str, Float[Tensor, "_ responses"]]:
    """Scores of the null baselines, to be put through the same rule as those of models.

    - `random`: uniform, in several draws. The mean of their credits is what chance gives, under
      rules too (best of four, ties) where that is not one half.
    - `longer`: the longer response wins.
    - `shorter`: the shorter one does. Of pairs it is the mirror image of the former, of longer
      lists it is not; some test sets prefer short answers, and refusals are short.
    - `more marks`: the response with more marks (`MARKS`) wins.

    Args:
        surface: Surface features of the responses, columns as in `SURFACE_FEATURES`.
        seed: Of the random scores.

    Returns:
        By name, in the order above; one draw of all but `random`.
    """
    generator = torch.Generator().manual_seed(seed)
    length = surface[:, SURFACE_FEATURES.index("log_length")].double()
    marks = surface[:, [SURFACE_FEATURES.index(name) for name in MARKS]].double().sum(1)
    return {
        "random": torch.rand(RANDOM_DRAWS, len(surface), generator=generator, dtype=torch.float64),
        "longer": length[None],
        "shorter": -length[None],
        "more marks": marks[None],
    }
