"""The check of a data set: its findings, and tables of what is in it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from armo.data.check_labels import (
    SEVERITIES,
    Finding,
    find_boilerplate,
    find_cycles,
    find_faults,
    find_leaks,
    find_near,
    find_repeats,
    sort_findings,
)
from armo.data.check_probe import FOLDS, MIN_PAIRS, probe_pairs
from armo.data.check_rows import KINDS, PLACES, RowReader, RowTable
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.surface import MARKS, SURFACE_FEATURES
from armo.report.metrics import rank_correlation, within_prompt_correlation
from armo.report.tables import Evaluation, Table

BINS = 10
MIN_ROWS = 30
"""Fewer rows make no correlation."""

CORRELATED_ROWS = 200_000
"""Correlations are of that many rows at most, spread over the data."""

# From here on a share or a correlation is a finding. Each is far from what clean sets have.
ONE_RATING = 0.98
USED_SCALE = 0.5
REDUNDANT = 0.98
REVERSED = -0.3
FOLLOWS_STYLE = 0.6
PREFERS_STYLE = 0.75
MIN_FINDING = 100
"""Rows that a finding on a distribution or a correlation needs."""


@dataclass(frozen=True, slots=True)
class DataCheck:
    """What a check of a data set found.

    Attributes:
        findings: The worst first.
        evaluation: Tables, the findings first, if there are any.
    """

    findings: tuple[Finding, ...]
    evaluation: Evaluation

    def at_least(self, severity: str) -> int:
        """Count the findings of a severity or a worse one.

        Raises:
            ValueError: If there is no such severity.
        """
        if severity not in SEVERITIES:
            raise ValueError(f"`fail_on` must be {', '.join(SEVERITIES)} or null, got {severity!r}")
        worst = SEVERITIES[: SEVERITIES.index(severity) + 1]
        return sum(finding.severity in worst for finding in self.findings)


def check_rows(
    reader: RowReader,
    objectives: ObjectiveSet | None,
    *,
    near_duplicates: float | None,
    test_fraction: float,
    min_ratings: int | None,
    probe: bool,
    seed: int = 0,
) -> DataCheck:
    """Check the rows that a reader has read.

    Args:
        reader: What it kept of the rows.
        objectives: Those that it was given.
        near_duplicates: The similarity from which on two texts are nearly the same; None, if they
            are not looked for.
        test_fraction: Share of prompts that go to the test side where rows do not say.
        min_ratings: Ratings and judgements that each objective needs to be trained; any, if None.
        probe: Whether to look for pairs that contradict the others, by a simple model.
        seed: Of the probe.
    """
    table = reader.finish()
    declared = () if objectives is None else objectives.objectives
    findings = [*find_faults(reader)]
    tables: list[Table] = []
    if table.places:
        findings += [*find_leaks(table), *find_repeats(table), *find_cycles(table)]
        findings += find_boilerplate(table)
        if near_duplicates is not None:
            findings += find_near(table, threshold=near_duplicates, test_fraction=test_fraction)
        if probe:
            findings += _implausible(reader, table, seed=seed)
        findings += _objective_findings(reader, table, declared, min_ratings=min_ratings)
        findings += _pair_findings(table)
        tables = [_sources(table), *_objectives(table, declared), *_style(table, declared)]
        tables += [_lengths(table), _languages(table)]
    ordered = sort_findings(findings)
    listed = [_findings_table(ordered)] if ordered else []
    return DataCheck(ordered, Evaluation((*listed, *tables)))


def _findings_table(findings: Sequence[Finding]) -> Table:
    return Table(
        "findings",
        "Findings",
        ("severity", "check", "count", "finding", "places"),
        tuple((f.severity, f.check, f.count, f.statement, "; ".join(f.places)) for f in findings),
        note=f"The first {PLACES} places of each. An error stops training or misleads its figures, "
        "a warning is most likely a fault, a note is something to know.",
    )


# --- findings on labels -------------------------------------------------------------------------


def _objective_findings(
    reader: RowReader, table: RowTable, declared: Sequence[Objective], *, min_ratings: int | None
) -> Iterator[Finding]:
    for k, objective in enumerate(declared):
        name, given = objective.name, _given(table, k)
        judged = reader.judgements[name]
        if min_ratings is not None and len(given) + judged < min_ratings:
            said = (
                f"objective {name!r} has {len(given)} ratings and {judged} judgements, fewer than "
            )
            yield Finding("error", "objectives", f"{said}`data.min_ratings={min_ratings}`")
        if len(given) < MIN_FINDING:
            continue
        values, counts = np.unique(given, return_counts=True)
        most, share = float(values[counts.argmax()]), counts.max() / len(given)
        shown = f"{objective.from_unit(most):g}"
        if len(values) == 1 and not judged:
            yield Finding("error", "objectives", f"all ratings of {name!r} are {shown}")
        elif share >= ONE_RATING:
            said = f"{share:.1%} of the ratings of {name!r} are {shown}"
            yield Finding("warning", "objectives", said)
        elif given.max() - given.min() < USED_SCALE:
            ends = sorted(objective.from_unit(float(end)) for end in (given.min(), given.max()))
            said = (
                f"ratings of {name!r} lie between {ends[0]:g} and {ends[1]:g} on a scale declared "
                f"{objective.low:g} to {objective.high:g}"
            )
            yield Finding("warning", "objectives", said)
    yield from _agreement_findings(table, declared)
    prompts = _rated_prompts(table)
    for k, objective in enumerate(declared):
        for feature, values in _rated_style(table).items():
            n, _, within = _correlate(table.ratings[:, k], values, prompts)
            if not objective.bias and n >= MIN_FINDING and abs(within) >= FOLLOWS_STYLE:
                said = f"ratings of {objective.name!r} follow {feature} within prompts: Spearman "
                yield Finding("note", "style", f"{said}{within:+.2f}")


def _agreement_findings(table: RowTable, declared: Sequence[Objective]) -> Iterator[Finding]:
    rows = _agreement(table, declared)
    quality = {objective.name for objective in declared if not objective.bias}
    known = [row for row in rows if row[2] >= MIN_FINDING]
    for first, second, _, value in known:
        if value >= REDUNDANT:
            said = (
                f"ratings of {first!r} and {second!r} order responses alike: Spearman {value:.2f}"
            )
            yield Finding("note", "objectives", said)
    known = [row for row in known if {row[0], row[1]} <= quality]
    for name in sorted(quality):
        own = [row[3] for row in known if name in row[:2]]
        others = [row[3] for row in known if name not in row[:2]]
        if len(own) < 2 or not others:
            continue
        if np.mean(own) <= REVERSED and np.mean(others) >= -REVERSED:
            said = (
                f"ratings of {name!r} fall where the others rise (mean Spearman {np.mean(own):.2f})"
            )
            yield Finding("warning", "objectives", f"{said}: is `higher_is_better` right?")


def _pair_findings(table: RowTable) -> Iterator[Finding]:
    for feature, (n, share) in _preferred_style(table).items():
        if n >= MIN_FINDING and not 1.0 - PREFERS_STYLE < share < PREFERS_STYLE:
            said = f"the chosen response has more {feature} in {share:.0%} of {n:,} pairs"
            yield Finding("note", "style", said)


def _implausible(reader: RowReader, table: RowTable, *, seed: int) -> Iterator[Finding]:
    pairs = reader.pairs
    prompts = {pair.prompt for pair in pairs}
    if len(pairs) < MIN_PAIRS or len(prompts) < FOLDS:
        return
    probed = probe_pairs(pairs, seed=seed)
    worst = probed.suspects()
    if worst:
        shown = tuple(f"{table.place(pairs[k].row)} `chosen`" for k in worst[:PLACES])
        said = (
            f"pairs that contradict the others: a simple probe prefers `rejected`, and is right on "
            f"{probed.sure_accuracy:.0%} of the pairs that it is as sure of"
        )
        yield Finding("note", "label noise", said, len(worst), shown)


# --- tables -------------------------------------------------------------------------------------


def _sources(table: RowTable) -> Table:
    rows = []
    for k, kind in enumerate(KINDS):
        for s, source in enumerate(table.sources):
            here = np.flatnonzero((table.kind == k) & (table.source == s))
            if len(here) == 0:
                continue
            entries = table.start[here + 1] - table.start[here]
            split = np.bincount(table.split[here], minlength=3)
            rows.append(
                (
                    *(kind, source, len(here), len(np.unique(table.group[here]))),
                    *(int(entries.sum()), int(split[1]), int(split[2])),
                    int((table.preference[here] == 0.5).sum()),
                )
            )
    columns = ("kind", "source", "rows", "prompts", "responses", "train", "test", "ties")
    note = "Prompts are told apart by their first user turn, case and white space folded."
    return Table("sources", "Rows by source", columns, tuple(rows), note=note)


def _given(table: RowTable, objective: int) -> np.ndarray:
    ratings = table.ratings[:, objective]
    given: np.ndarray = ratings[~np.isnan(ratings)]
    return given


def _objectives(table: RowTable, declared: Sequence[Objective]) -> Iterator[Table]:
    summary: list[tuple[Any, ...]] = []
    histogram: list[tuple[Any, ...]] = []
    for k, objective in enumerate(declared):
        given = _given(table, k).astype(np.float64)
        missing = 1.0 - len(given) / max(1, len(table.ratings))
        scale = f"{objective.low:g} to {objective.high:g}"
        if len(given) == 0:
            summary.append((objective.name, scale, 0, missing, None, None, None, None))
            continue
        values = np.array([objective.from_unit(float(v)) for v in (given.min(), given.max())])
        slope = abs(objective.scale[1])
        summary.append(
            (
                *(objective.name, scale, len(given), missing),
                *(objective.from_unit(float(given.mean())), float(given.std() * slope)),
                *(float(values.min()), float(values.max())),
            )
        )
        counts, _ = np.histogram(given, bins=BINS, range=(0.0, 1.0))
        histogram.append((objective.name, *(int(count) for count in counts)))
    if not summary or not len(table.ratings):
        return
    shown = ("scale", "ratings", "missing", "mean", "sd", "lowest", "highest")
    yield Table("objectives", "Ratings by objective", ("objective", *shown), tuple(summary))
    bins = tuple(f"{k / BINS:.1f}-{(k + 1) / BINS:.1f}" for k in range(BINS))
    note = "Ratings on [0, 1], 1 the good end of the scale."
    title = "How often each rating is given"
    yield Table("histogram", title, ("objective", *bins), tuple(histogram), note=note)
    agreement = _agreement(table, declared)
    if agreement:
        title = "Agreement between objectives"
        note = (
            f"Of rows that rate both, where there are {MIN_ROWS} or more; 1 the good end of both."
        )
        columns = ("objective", "other", "rows", "Spearman")
        yield Table("agreement", title, columns, tuple(agreement), note=note)


def _agreement(table: RowTable, declared: Sequence[Objective]) -> list[tuple[str, str, int, float]]:
    rows = []
    for a, b in combinations(range(len(declared)), 2):
        n, across, _ = _correlate(table.ratings[:, a], table.ratings[:, b])
        if n >= MIN_ROWS:
            rows.append((declared[a].name, declared[b].name, n, across))
    return rows


def _correlate(
    first: np.ndarray, second: np.ndarray, prompts: np.ndarray | None = None
) -> tuple[int, float, float]:
    """Return the rows that have both, and Spearman's correlation across and within prompts."""
    both = np.flatnonzero(~np.isnan(first) & ~np.isnan(second))
    if len(both) < MIN_ROWS:
        return len(both), 0.0, 0.0
    # Whole runs of rows, since a prompt's rows mostly stand side by side.
    kept = both
    if len(both) > CORRELATED_ROWS:
        runs = np.array_split(both, len(both) // 100)
        kept = np.concatenate(runs[:: -(-len(both) // CORRELATED_ROWS)])
    x, y = (_tensor(values[kept]) for values in (first, second))
    within = 0.0
    if prompts is not None:
        _, groups = np.unique(prompts[kept], return_inverse=True)
        within = within_prompt_correlation(x, y, torch.from_numpy(groups))
    return len(both), rank_correlation(x, y), within


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float64))


def _style_features(table: RowTable, entries: np.ndarray) -> dict[str, np.ndarray]:
    marks = [SURFACE_FEATURES.index(name) for name in MARKS]
    return {
        "words": table.words[entries],
        "format marks": table.features[entries][:, marks].sum(axis=1),
    }


def _rated_style(table: RowTable) -> dict[str, np.ndarray]:
    return _style_features(table, table.start[table.rows_of("ratings")])


def _rated_prompts(table: RowTable) -> np.ndarray:
    prompts: np.ndarray = table.prompt[table.rows_of("ratings")]
    return prompts


def _preferred_style(table: RowTable) -> dict[str, tuple[int, float]]:
    """Return how many pairs differ in a feature, and in which share the chosen has more of it."""
    pairs = table.rows_of("pairs")
    start = table.start[pairs][table.preference[pairs] > 0.5]
    chosen, rejected = (_style_features(table, entries) for entries in (start, start + 1))
    shares = {}
    for feature in chosen:
        apart = chosen[feature] - rejected[feature]
        apart = apart[np.abs(apart) > 0.5]
        shares[feature] = (len(apart), float((apart > 0.0).mean()) if len(apart) else 0.5)
    return shares


def _style(table: RowTable, declared: Sequence[Objective]) -> Iterator[Table]:
    prompts, rows = _rated_prompts(table), []
    for k, objective in enumerate(declared):
        for feature, values in _rated_style(table).items():
            n, across, within = _correlate(table.ratings[:, k], values, prompts)
            if n >= MIN_ROWS:
                rows.append((objective.name, feature, n, across, within))
    if rows:
        yield Table(
            "rating_style",
            "Ratings and style",
            ("objective", "feature", "rows", "across", "within prompts"),
            tuple(rows),
            note="Spearman's correlation of the rating with a measured feature of the response.",
        )
    preferred = [(name, n, share) for name, (n, share) in _preferred_style(table).items() if n]
    if preferred:
        yield Table(
            "preferred_style",
            "Preferences and style",
            ("feature", "pairs that differ", "chosen has more"),
            tuple(preferred),
        )


def _lengths(table: RowTable) -> Table:
    rows = []
    for k, kind in enumerate(KINDS):
        words = table.words[table.kind[table.entry_row] == k]
        if len(words):
            quantiles = np.quantile(words, [0.0, 0.05, 0.5, 0.95, 1.0])
            numbers = [
                round(float(value)) for value in (*quantiles[:3], words.mean(), *quantiles[3:])
            ]
            rows.append((kind, len(words), *numbers))
    columns = ("kind", "responses", "shortest", "5 %", "median", "mean", "95 %", "longest")
    return Table("lengths", "Length of the responses in words", columns, tuple(rows))


def _languages(table: RowTable) -> Table:
    prompts = np.bincount(table.prompt_language, minlength=len(table.languages))
    responses = np.bincount(table.language, minlength=len(table.languages))
    rows = [
        (
            *(table.languages[k] or "no letters", int(prompts[k]), int(responses[k])),
            float(responses[k] / responses.sum()),
        )
        for k in (-responses).argsort(kind="stable")
        if prompts[k] or responses[k]
    ]
    note = (
        "Crude, from the beginning of a text. Latin script by its commonest words, `Latin` where "
        "they do not tell; other scripts by name."
    )
    columns = ("language", "rows by their prompt", "responses", "share")
    return Table("languages", "Scripts and languages", columns, tuple(rows), note=note)
