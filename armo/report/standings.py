"""The tables of a benchmark: models and null baselines side by side, by subset and over all."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from armo.data.benchmarks import Benchmark
from armo.report.baselines import baseline_scores
from armo.report.benchmarks import Credits, benchmark_credits
from armo.report.metrics import bootstrap_estimates
from armo.report.tables import Table


def standings(
    benchmark: Benchmark,
    names: Sequence[str],
    scores: Float[Tensor, "models responses"],
    surface: Float[Tensor, "responses covariates"],
    *,
    seed: int = 0,
) -> list[Table]:
    """Score models, and null baselines beside them, by the rule of a benchmark.

    Args:
        benchmark: The benchmark.
        names: Of the models. Gains and p-values are over the first of them.
        scores: One row per model, of all responses of the benchmark's rows, one after the other;
            NaN where the response was skipped as too long, which the rule of the benchmark counts.
        surface: Surface features of the responses.
        seed: Of the resampling and of the random baseline.

    Returns:
        A table named after the benchmark with every line of its rule, subsets indented below
        what they are a part of; and one whose name ends in `_models` with its first line,
        intervals, and differences from the first model. Intervals and p-values that no resample
        gives, see `bootstrap_estimates`, are None, and so are the intervals of a single prompt.

    Raises:
        ValueError: If a model has the name of a baseline, or see `benchmark_credits`.
    """
    baselines = baseline_scores(surface, seed=seed)
    if taken := sorted(set(names) & set(baselines)):
        raise ValueError(f"`names` has {', '.join(taken)}, as a null baseline; rename the model")
    credits = _with_baselines(benchmark, scores, list(baselines.values()))
    coefficients = torch.tensor([line.coefficients for line in credits.lines], dtype=torch.float64)
    found = bootstrap_estimates(credits.values, coefficients, credits.prompts, seed=seed)
    everyone = (*names, *baselines)
    units = ~credits.values[0].isnan()
    lines = tuple(
        ("  " * line.depth + line.label, int(units[:, uses].any(1).sum()), *means)
        for line, uses, means in zip(
            credits.lines, coefficients != 0.0, found.mean.T.tolist(), strict=True
        )
    )
    headline = torch.stack(
        [
            *(found.mean, found.low, found.high),
            *(found.gain, found.gain_low, found.gain_high, found.p_value),
        ]
    )[:, :, 0]
    models = [
        (name, *(None if math.isnan(value) else value for value in values))
        for name, values in zip(everyone, headline.T.tolist(), strict=True)
    ]
    models[0] = (*models[0][:4], None, None, None, None)
    prompts = len(credits.prompts.unique())
    if prompts == 1:  # drawn again and again, it is always the same
        models = [(*row[:2], None, None, row[4], None, None, row[7]) for row in models]
    return [
        Table(
            benchmark.name,
            benchmark.title,
            ("subset", "cases", *everyone),
            lines,
            " ".join(
                [
                    "Random: the mean of several random scores. Longer: the longer response "
                    "wins; shorter: the shorter one; more marks: the one with more of them; ties "
                    "count as the benchmark has it. Cases: what its rule counts, mostly the "
                    f"responses to a prompt; there are {prompts} prompts.",
                    *(f"{note[0].upper()}{note[1:]}." for note in credits.notes),
                ]
            ),
        ),
        Table(
            f"{benchmark.name}_models",
            f"{benchmark.title}: {credits.lines[0].label}",
            ("model", "overall", "low", "high", f"ahead of {names[0]} by", "from", "to", "p"),
            tuple(models),
            f"95 % bootstrap intervals over {prompts} prompts, paired for the difference; p: of no "
            f"difference from {names[0]}, two-sided, not corrected for the number of models.",
        ),
    ]


def _with_baselines(
    benchmark: Benchmark,
    scores: Float[Tensor, "models responses"],
    baselines: Sequence[Float[Tensor, "_ responses"]],
) -> Credits:
    """Credits of models, then of baselines, each the mean of its draws."""
    credits = benchmark_credits(benchmark, scores)
    drawn = benchmark_credits(benchmark, torch.cat(list(baselines))).values
    null = [each.mean(0, keepdim=True) for each in drawn.split([*map(len, baselines)])]
    return replace(credits, values=torch.cat([credits.values, *null]))
