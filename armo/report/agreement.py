"""Do preference pairs and ratings of the same responses agree: a table."""

from collections.abc import Iterable, Sequence

import torch

from armo.data.rated_pairs import Agreement
from armo.report.metrics import bootstrap_interval, rank_correlation
from armo.report.tables import Table

ALL = "all"


def agreement_table(rows: Iterable[Agreement]) -> Table:
    """Count by objective, and by source of the pairs if there are several, who agrees.

    Agreement is the share of pairs whose chosen response is rated better, among those that the
    ratings do not leave tied; with a 95 % bootstrap interval over prompts. The rank correlation is
    that of the pairs' margins with the differences of the ratings, where margins are known.
    """
    found: dict[tuple[str, str], list[Agreement]] = {}
    every = list(rows)
    several = len({row.source for row in every}) > 1
    for row in every:
        found.setdefault((row.name, ALL), []).append(row)
        if several:
            found.setdefault((row.name, row.source), []).append(row)
    order = list(dict.fromkeys(row.name for row in every))
    keys = sorted(found, key=lambda key: (order.index(key[0]), key[1] != ALL, key[1]))
    return Table(
        "agreement",
        "Are the chosen responses rated better?",
        (
            "objective",
            "source",
            "pairs",
            "agree",
            "tied",
            "disagree",
            "agreement",
            "low",
            "high",
            "margins follow",
        ),
        tuple((*key, *_line(found[key])) for key in keys),
        "agreement: among pairs that the ratings do not leave tied, with a 95 % bootstrap interval "
        "over prompts; one half is chance. margins follow: rank correlation of the pairs' margins "
        "with the differences of the ratings.",
    )


def _line(rows: Sequence[Agreement]) -> tuple[int | float | None, ...]:
    ahead = torch.tensor([row.ahead for row in rows], dtype=torch.float64)
    groups = torch.tensor([row.group for row in rows])
    margins = torch.tensor([row.margin for row in rows], dtype=torch.float64)
    counts = [len(rows), *(int((ahead.sign() == sign).sum()) for sign in (1, 0, -1))]
    decided, known = ahead != 0.0, ~margins.isnan()
    follow = None
    if len(margins[known].unique()) > 1:
        follow = rank_correlation(margins[known], ahead[known])
    if not bool(decided.any()):
        return *counts, None, None, None, follow
    interval = bootstrap_interval((ahead[decided] > 0.0).double(), groups[decided])
    return *counts, interval.mean, interval.low, interval.high, follow
