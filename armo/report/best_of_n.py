"""Best of N: what the response with the highest score is worth as the choice grows.

A score that is chosen by is over-optimised where it goes on rising with N while the gold rating of
the winner no longer does, and length or format take its place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from armo.data.conversation import ResponseList
from armo.data.surface import MARKS, SURFACE_FEATURES
from armo.fit.decorrelation import deviate
from armo.report.lists import prompt_of_list
from armo.report.metrics import bootstrap_estimates
from armo.report.tables import Table

MOST = 64
"""Largest N that is shown, where the lists are long enough."""

RIVALS = ("random", "gold itself", "longer")


@dataclass(frozen=True, eq=False, slots=True)
class Winners:
    """What the best of N responses is expected to be, for some ways to score them.

    Attributes:
        sizes: The N, rising from 1.
        prompts: Number of the prompt group of each list that counts, to resample by.
        score: Deviation of the winner's score from the mean of its list, in standard deviations of
            that over all responses; zero where all scores are equal.
        gold: Its gold rating.
        words: Its number of words.
        marks: Its number of format marks, all of `armo.data.surface.MARKS` together.
        too_short: Number of lists that are left out, as they have fewer responses than the largest
            N.
        unscored: Number of responses that are left out for all, as one of the scores is missing.
    """

    sizes: tuple[int, ...]
    prompts: Int[Tensor, " lists"]
    score: Float[Tensor, "scores lists sizes"]
    gold: Float[Tensor, "scores lists sizes"]
    words: Float[Tensor, "scores lists sizes"]
    marks: Float[Tensor, "scores lists sizes"]
    too_short: int
    unscored: int


def kl_of_best(size: int) -> float:
    """Upper bound of the KL divergence, in nats, of best-of-N from the policy that it draws from.

    `log N - (N - 1) / N`, which is its value where the policy never says the same twice.

    References:
        Stiennon et al., "Learning to Summarize from Human Feedback", 2020, appendix G.3. That it
        is a bound: Beirami et al., "Theoretical Guarantees on the Best-of-n Alignment Policy",
        2024.

    Example:
        >>> [round(kl_of_best(size), 3) for size in (1, 2, 64)]
        [0.0, 0.193, 3.175]
    """
    return math.log(size) - (size - 1) / size


def winner_weights(
    scores: Float[Tensor, " responses"], sizes: Sequence[int]
) -> Float[Tensor, "sizes responses"]:
    """Probability of each response to have the highest score of N drawn without replacement.

    Exact. Of M responses let U score at most as high as one does, and L lower. The highest of N is
    among those U - L with probability `(C(U, N) - C(L, N)) / C(M, N)`, which they share evenly.

    Args:
        scores: Of the responses to one prompt.
        sizes: The N, from 1 to the number of responses.

    References:
        For distinct scores: Nakano et al., "WebGPT", 2021, appendix I.

    Example:
        >>> winner_weights(torch.tensor([0.1, 0.7, 0.4]), [1, 2, 3])
        tensor([[0.3333, 0.3333, 0.3333],
                [0.0000, 0.6667, 0.3333],
                [0.0000, 1.0000, 0.0000]], dtype=torch.float64)
    """
    _, place = scores.unique(return_inverse=True)
    equals = place.bincount()
    upto = equals.cumsum(0)
    below = _share_of_draws(len(scores), tuple(sizes))
    shares: Tensor = (below[:, upto] - below[:, upto - equals]) / equals
    return shares[:, place]


@cache
def _share_of_draws(count: int, sizes: tuple[int, ...]) -> Float[Tensor, "sizes counts"]:
    """Share of all draws of N that lie within the first 0, 1, ..., `count` responses."""
    return torch.tensor(
        [[math.comb(k, n) / math.comb(count, n) for k in range(count + 1)] for n in sizes],
        dtype=torch.float64,
    )


def best_of_n(
    scores: Float[Tensor, "scores responses"],
    rows: Sequence[ResponseList],
    gold: Float[Tensor, " responses"],
    surface: Float[Tensor, "responses covariates"],
) -> Winners:
    """Expect what the best of N responses is, for N = 1, 2, 4, ... up to the largest.

    The largest N is the number of responses, up to 64, that at least half of the lists have; lists
    with fewer are left out at every N, so that all N are of the same prompts. A list of one
    response leaves nothing to choose and counts nowhere. Every response of a list that counts has
    its part, and nothing is sampled: see `winner_weights`.

    Args:
        scores: Of all responses, one list after the other, by some ways to score. A response that
            one of them leaves out (NaN: too long for a backbone) is left out for all.
        rows: The lists.
        gold: What each response is worth.
        surface: Length and format of each response, as `surface_features` measures them.

    Raises:
        ValueError: If a gold rating is missing, there is not one for each response, or no list has
            two responses that are scored.
    """
    if not bool(gold.isfinite().all()):
        first = int((~gold.isfinite()).nonzero()[0])
        raise ValueError(
            f"`gold` of response {first} is {float(gold[first])}; leave responses without a gold "
            f"rating out of the lists"
        )
    if len(gold) != sum(len(row.responses) for row in rows):
        raise ValueError(
            f"`gold` has {len(gold)} ratings for {sum(len(row.responses) for row in rows)} "
            f"responses in `rows`; give one for each"
        )
    scored = ~scores.isnan().any(0)
    used, sizes, too_short = _lists_that_count(rows, scored)
    members = torch.cat([part for _, part in used])
    owner = torch.arange(len(used)).repeat_interleave(torch.tensor([len(p) for _, p in used]))
    deviations = torch.zeros(scores.shape, dtype=torch.float64)
    deviations[:, members] = _standardised(scores[:, members], owner)
    named = dict(zip(SURFACE_FEATURES, surface.double().T, strict=True))
    marks = torch.stack([named[name] for name in MARKS]).sum(0)
    worth = torch.stack([gold.double(), named["log_length"].expm1(), marks], dim=1)
    expected = torch.empty(len(scores), len(used), len(sizes), 4, dtype=torch.float64)
    for k, (_, part) in enumerate(used):
        for j, own in enumerate(deviations[:, part]):
            values = torch.cat([own[:, None], worth[part]], dim=1)
            expected[j, k] = winner_weights(scores[j, part], sizes) @ values
    own_score, winner_gold, words, winner_marks = expected.unbind(3)
    own_score[:, :, 0] = 0.0  # the mean of deviations, but for rounding
    return Winners(
        sizes,
        torch.tensor([group for group, _ in used]),
        score=own_score,
        gold=winner_gold,
        words=words,
        marks=winner_marks,
        too_short=too_short,
        unscored=int((~scored).sum()),
    )


def best_of_n_table(
    names: Sequence[str],
    scores: Float[Tensor, "models responses"],
    rows: Sequence[ResponseList],
    gold: Float[Tensor, " responses"],
    surface: Float[Tensor, "responses covariates"],
    *,
    seed: int = 0,
) -> Table:
    """Show score, gold rating, length and format of the best of N, for models and rivals.

    Rivals are a random choice, the gold rating itself (no score can do better) and the longest
    response. See `best_of_n` for which lists and which N count.

    Args:
        names: Of the models.
        scores: Their scores of all responses, one list after the other; NaN where skipped.
        rows: The lists.
        gold: What each response is worth.
        surface: Length and format of each response.
        seed: Of the bootstrap.

    Raises:
        ValueError: See `best_of_n`.
    """
    length = surface[:, SURFACE_FEATURES.index("log_length")]
    rivals = torch.stack([torch.zeros_like(length), gold, length])
    winners = best_of_n(torch.cat([scores, rivals]).double(), rows, gold, surface)
    alone = torch.eye(len(winners.sizes), dtype=torch.float64)
    gold_of = bootstrap_estimates(winners.gold, alone, winners.prompts, seed=seed)
    shown = (
        winners.score.mean(1),
        *(gold_of.mean, gold_of.low, gold_of.high),
        winners.words.mean(1),
        winners.marks.mean(1),
    )
    lines = []
    for k, name in enumerate((*names, *RIVALS)):
        for j, size in enumerate(winners.sizes):
            score, *others = (float(values[k, j]) for values in shown)
            own = None if name == "random" else score
            lines.append((name, size, own, *others, kl_of_best(size)))
    left_out = [
        f"{count} {what}"
        for count, what in (
            (winners.too_short, f"lists of fewer than {winners.sizes[-1]} responses"),
            (winners.unscored, "responses that a model skipped as too long"),
        )
        if count
    ]
    return Table(
        "best_of_n",
        "Best of N: what is the response with the highest score worth?",
        ("model", "n", "score", "gold", "low", "high", "length", "format", "KL"),
        tuple(lines),
        f"Expected values over all choices of N from the responses to each of "
        f"{len(winners.prompts)} prompts, exact; gold, from the worst rating at 0 to the "
        "best at 1, with 95 % bootstrap intervals over prompts. "
        "Score: deviations from the prompt's mean, in their standard deviation. Length in words, "
        "format in marks. KL: at most so many nats from the policy that the responses are drawn "
        "from." + (f" Left out: {', '.join(left_out)}." if left_out else ""),
    )


def _lists_that_count(
    rows: Sequence[ResponseList], scored: Bool[Tensor, " responses"]
) -> tuple[list[tuple[int, Int[Tensor, " members"]]], tuple[int, ...], int]:
    """Return prompt group and responses of the lists that are long enough, the N, the others."""
    kept, start = [], 0
    for group, row in zip(prompt_of_list(rows).tolist(), rows, strict=True):
        members = start + scored[start : start + len(row.responses)].nonzero()[:, 0]
        start += len(row.responses)
        if len(members) > 1:
            kept.append((group, members))
    if not kept:
        raise ValueError("`rows` has no list of two responses that are scored; best of N needs one")
    lengths = sorted((len(members) for _, members in kept), reverse=True)
    largest = min(MOST, lengths[(len(lengths) - 1) // 2])
    sizes = (*(2**k for k in range(MOST.bit_length()) if 2**k < largest), largest)
    used = [(group, members) for group, members in kept if len(members) >= largest]
    return used, sizes, len(kept) - len(used)


def _standardised(
    scores: Float[Tensor, "scores responses"], lists: Int[Tensor, " responses"]
) -> Float[Tensor, "scores responses"]:
    """Deviate from each list's mean, since only that is chosen by, in units of its spread."""
    deviations = deviate(scores.double().T, lists, scope="within_prompt").T
    spread = deviations.square().mean(1, keepdim=True).sqrt()
    return torch.where(
        spread > 1e-12 * scores.abs().amax(1, keepdim=True), deviations / spread, 0.0
    )
