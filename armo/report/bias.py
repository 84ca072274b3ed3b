"""Bias probes: what a score gives for style alone, and how far what is right follows style."""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armo.data.conversation import ResponseList
from armo.data.rewrite import PATTERNS, add_pattern, remove_pattern
from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.fit.decorrelation import deviate
from armo.report.lists import list_of_response, prompt_of_list
from armo.report.metrics import (
    Interval,
    bootstrap_contrasts,
    bootstrap_correlation,
    pairwise_accuracy,
)
from armo.report.tables import Table

RIGHT = "what is right"
"""Row of the table of length bias that is no model: the ranks of the lists themselves."""

_LENGTH = SURFACE_FEATURES.index("log_length")


def probe_lists(
    rows: Sequence[ResponseList],
    *,
    most: int = 200,
    patterns: Sequence[str] = tuple(PATTERNS),
    seed: int = 0,
) -> tuple[ResponseList, ...]:
    """Make pairs of the same answer, without and with a pattern, from responses of the rows.

    A response that has the pattern is the patterned version and loses it in the other; one that
    has none is the plain version. Which is which never depends on what is right.

    Args:
        rows: Response lists.
        most: Responses drawn, each distinct one at most once. A response gives one pair for each
            pattern that can be put in or taken out, so at most `most * (1 + len(patterns))`
            distinct texts are to be embedded.
        patterns: Of `PATTERNS`.
        seed: Of the responses, and of the places of the patterns.

    Returns:
        Lists of two responses, plain and patterned, both right; the category is the pattern. They
        come in the order of the patterns, then of the rows.

    Raises:
        ValueError: If `most` is not positive, or for an unknown pattern.
    """
    if most < 1:
        raise ValueError(f"`most` must be positive, got {most}.")
    places: dict[tuple[object, str], tuple[ResponseList, int]] = {}
    for row in rows:
        for k, response in enumerate(row.responses):
            places.setdefault((row.prompt, response), (row, k))
    drawn = list(places.values())
    if most < len(drawn):
        numbers = random.Random(seed).sample(range(len(drawn)), most)
        drawn = [drawn[number] for number in sorted(numbers)]
    probes = []
    for pattern in patterns:
        for row, k in drawn:
            response = row.responses[k]
            plain: str | None = response
            patterned = add_pattern(response, pattern, seed=seed)
            if patterned is None:
                plain, patterned = remove_pattern(response, pattern), response
            if plain is not None:
                probes.append(
                    ResponseList(
                        id=f"{row.id}/{k}/{pattern}",
                        source=row.source,
                        prompt=row.prompt,
                        responses=(plain, patterned),
                        correct=(0, 1),
                        category=pattern,
                        split=row.split,
                    )
                )
    return tuple(probes)


def probe_table(
    names: Sequence[str],
    scores: Float[Tensor, "models responses"],
    probes: Sequence[ResponseList],
    *,
    seed: int = 0,
) -> Table:
    """How often the patterned version of an answer beats the plain one, by pattern.

    The direction is always that: 1 means that the score likes the pattern, 0 that it dislikes it,
    0.5 that it does not care on balance. A tie counts half.

    Args:
        names: Of the models.
        scores: Of both responses of each probe, one probe after the other; NaN where skipped.
        probes: As `probe_lists` makes them: plain, then patterned.
        seed: Of the bootstrap.

    Returns:
        The table `bias_probes`. A probe of which any model skipped a response is left out for all
        models, and counted in the note. A pattern of one prompt alone has no interval: None.

    Raises:
        ValueError: If the scores do not fit the probes.
    """
    _check(names, scores, probes)
    if any(len(probe.responses) != 2 for probe in probes):
        raise ValueError("`probes` must have two responses each: plain, then patterned.")
    versions = scores.double().reshape(len(names), len(probes), 2)
    known = ~versions.isnan().any(2).any(0)
    prompts = prompt_of_list(probes)[known]
    kinds = [probe.category for probe, there in zip(probes, known.tolist(), strict=True) if there]
    patterns = sorted(
        dict.fromkeys(kinds), key=lambda name: [*PATTERNS, name].index(name)
    )  # those of other probes after these, as they come
    inside = torch.tensor([[kind == name for name in patterns] for kind in kinds])
    columns = []
    several = [len(prompts[inside[:, k]].unique()) > 1 for k in range(len(patterns))]
    for model in versions[:, known] if patterns else ():
        credit = pairwise_accuracy(model[:, 1] - model[:, 0])
        parts = torch.where(inside, credit[:, None], torch.nan)
        each = torch.eye(len(patterns), dtype=torch.float64)
        found = bootstrap_contrasts(parts, each, prompts, seed=seed)
        columns.append(
            [
                _all(interval) if some else (interval.mean, None, None)
                for interval, some in zip(found, several, strict=True)
            ]
        )
    left_out = len(probes) - int(known.sum())
    return Table(
        "bias_probes",
        "The same answer with and without a pattern: how often does the patterned one win?",
        ("pattern", "pairs", *(f"{name}{of}" for name in names for of in ("", " low", " high"))),
        tuple(
            (name, int(inside[:, k].sum()), *(each for model in columns for each in model[k]))
            for k, name in enumerate(patterns)
        ),
        "1: the score likes the pattern, 0: it dislikes it, 0.5: neither; a tie counts half. 95 % "
        "bootstrap intervals over prompts."
        + (f" {left_out} of {len(probes)} pairs left out: too long for a model." * (left_out > 0)),
    )


def preference_bias_table(rows: Sequence[ResponseList], *, seed: int = 0) -> Table:
    """How often right and wrong responses have each pattern: what the data themselves reward.

    Right are the responses of the best rank in their list, wrong the others; lists in which all
    are alike say nothing and are left out. A response has a pattern if the surface feature of it
    is not zero; it has `length` if it is longer than the mean of its list (mean of log words).

    The published measurement (arXiv 2409.11704) finds patterns by regular expressions on the raw
    text. Ours differ on purpose: code does not count, so `!=` is no exclamation, `# note` no
    heading and a comment's `- item` no list; indented items, `1)` and `__bold__` do count, and
    `****` does not; a link needs no `http`; emoji are those that are shown as pictures, without
    the signs ✓ and ★; an affirmative opening may be in bold, and Absolutely and Great are
    among them. Length there is the number of words, which has no share.

    Args:
        rows: Response lists with right ones, or ranks.
        seed: Of the bootstrap.

    Returns:
        The table `preference_bias`; without rows if no list has right and wrong responses.
    """
    useful = [row for row in rows if len(set(row.ranking)) > 1]
    texts = [response for row in useful for response in row.responses]
    features = surface_features(texts)
    right = torch.tensor(
        [rank == min(row.ranking) for row in useful for rank in row.ranking], dtype=torch.bool
    )
    of = list_of_response(useful)
    prompts = prompt_of_list(useful)[of]
    rows_shown = []
    for pattern, feature in PATTERNS.items() if useful else ():
        measured = features[:, SURFACE_FEATURES.index(feature)]
        has = (measured > 0.0).double()
        if pattern == "length":
            has = (measured > _mean(measured, of)[of]).double()
        sides = torch.stack([right, ~right], dim=1)
        parts = torch.where(sides, has[:, None], torch.nan)
        contrasts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        good, bad, gap = bootstrap_contrasts(parts, contrasts, prompts, seed=seed)
        counts = sides.sum(0).tolist()
        rows_shown.append((pattern, counts[0], good.mean, counts[1], bad.mean, *_all(gap)))
    return Table(
        "preference_bias",
        "How often do right and wrong responses have a pattern?",
        (
            "pattern",
            "right",
            "right with it",
            "wrong",
            "wrong with it",
            "gap",
            "low",
            "high",
        ),
        tuple(rows_shown),
        f"Right and wrong: numbers of responses, and the share of them with the pattern. "
        f"{len(useful)} of {len(rows)} lists have both. Length: longer than the mean of the list. "
        "A gap is what a score can learn from these data, or be flattered by; 95 % bootstrap "
        "intervals over prompts.",
    )


def length_bias_table(
    names: Sequence[str],
    scores: Float[Tensor, "models responses"],
    rows: Sequence[ResponseList],
    surface: Float[Tensor, "responses covariates"],
    *,
    seed: int = 0,
) -> Table:
    """How far each score follows length within a prompt, and where that helps or hurts it.

    Columns are Spearman's correlation of the deviations of score and log length from the means of
    their list; accuracy over pairs of a right and a wrong response, by which of them is longer;
    their gap, which is positive if the score is right where length is; and verbosity, the words of
    the response that the score puts first, over the geometric mean of its list (tied ones count
    alike). The row `RIGHT` says the same of the ranks of the lists, where they have any: a score
    that follows length no more than that is not biased.

    Args:
        names: Of the models.
        scores: Of all responses, one list after the other; NaN where skipped.
        rows: The lists.
        surface: Features of the same responses, columns as `SURFACE_FEATURES`.
        seed: Of the bootstrap.

    Returns:
        The table `length_bias`. A response that any model skipped is left out for all models, and
        counted in the note. What no list can tell is None.

    Raises:
        ValueError: If the scores do not fit the rows.
    """
    _check(names, scores, rows)
    known = ~scores.isnan().any(0)  # the same responses for every model
    of = list_of_response(rows)[known]
    prompts = prompt_of_list(rows)
    ranks = torch.tensor([rank for row in rows for rank in row.ranking], dtype=torch.float64)[known]
    length = surface[known, _LENGTH].double()
    better, worse = _ordered(ranks, of)
    rivals = {name: each[known].double() for name, each in zip(names, scores, strict=True)}
    if len(better):
        rivals[RIGHT] = -ranks
    longer = length[better] - length[worse]
    sides = torch.stack([longer > 0.0, longer < 0.0], dim=1)
    shown = []
    for name, score in rivals.items():
        both = deviate(torch.stack([score, length], dim=1), of, scope="within_prompt")
        # Deviations that are equal but for rounding are ties.
        both = (1e9 * both / both.abs().amax(0).clamp(min=1e-30)).round() if len(both) else both
        several = of.bincount(minlength=1)[of] > 1
        correlation = (
            _all(bootstrap_correlation(both[:, 0], both[:, 1], prompts[of[several]], seed=seed))
            if len(both)
            else (None, None, None)
        )
        credit = pairwise_accuracy(score[better] - score[worse])
        shown.append(
            (
                name,
                *correlation,
                *_gap(credit, sides, prompts[of[better]], seed=seed),
                _verbosity(score, length, of),
            )
        )
    left_out = int((~known).sum())
    return Table(
        "length_bias",
        "Does the score follow length?",
        (
            "model",
            "correlation with length, within prompts",
            "low",
            "high",
            "accuracy, longer is right",
            "accuracy, shorter is right",
            "gap",
            "gap low",
            "gap high",
            "words of the first, over the mean",
        ),
        tuple(shown),
        f"{int(sides[:, 0].sum())} pairs in which the right response is the longer one, "
        f"{int(sides[:, 1].sum())} in which it is the shorter one. A score blind to length has "
        f"a gap of zero. {RIGHT.capitalize()}: the same of the lists' own ranks. 95 % bootstrap "
        "intervals over prompts."
        + (f" {left_out} responses left out: too long for a model." * (left_out > 0)),
    )


def _check(
    names: Sequence[str], scores: Float[Tensor, "models responses"], rows: Sequence[ResponseList]
) -> None:
    expected = len(names), sum(len(row.responses) for row in rows)
    if tuple(scores.shape) != expected:
        raise ValueError(
            f"`scores` must have the shape {expected}, a row per name and a column per response, "
            f"got {tuple(scores.shape)}."
        )


def _mean(
    values: Float[Tensor, " responses"], of: Int[Tensor, " responses"]
) -> Float[Tensor, " lists"]:
    """Mean over each list; zero where there is none."""
    counts = of.bincount()
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, of, values)
    return sums / counts.clamp(min=1)


def _ordered(
    ranks: Float[Tensor, " responses"], of: Int[Tensor, " responses"]
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """All pairs of two responses of one list, the better one and the worse one."""
    found = [torch.empty(0, 2, dtype=torch.long)]
    start = 0
    for count in of.unique_consecutive(return_counts=True)[1].tolist():
        own = ranks[start : start + count]
        found.append((own[:, None] < own[None, :]).nonzero() + start)
        start += count
    better, worse = torch.cat(found).T
    return better, worse


def _gap(
    credit: Float[Tensor, " pairs"],
    sides: Tensor,
    prompts: Int[Tensor, " pairs"],
    *,
    seed: int,
) -> tuple[float | None, ...]:
    """Accuracy where the longer one is right, where the shorter one is, and the difference."""
    there = sides.any(0).tolist()
    parts = torch.where(sides, credit[:, None], torch.nan)
    if all(there):
        contrasts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        longer, shorter, gap = bootstrap_contrasts(parts, contrasts, prompts, seed=seed)
        return longer.mean, shorter.mean, *_all(gap)
    means = [float(parts[:, k].nanmean()) if there[k] else None for k in range(2)]
    return *means, None, None, None


def _verbosity(
    score: Float[Tensor, " responses"],
    length: Float[Tensor, " responses"],
    of: Int[Tensor, " responses"],
) -> float | None:
    """Words of the first of each list over the mean of the list, as geometric means."""
    if not len(of):
        return None
    counts = of.bincount()
    best = torch.full((len(counts),), -torch.inf, dtype=torch.float64)
    best.scatter_reduce_(0, of, score, "amax")
    first = score == best[of]
    ratios = _mean(length[first], of[first]) - _mean(length, of)
    return float(ratios[counts > 1].mean().exp()) if bool((counts > 1).any()) else None


def _all(interval: Interval) -> tuple[float, float, float]:
    return interval.mean, interval.low, interval.high
