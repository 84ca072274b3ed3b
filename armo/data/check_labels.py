"""Findings on the rows of a data set: repeated, contradictory, leaking, faulty."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int64, UInt64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from armo.data.check_near import near_pairs
from armo.data.check_rows import KINDS, SPLITS, RowReader, RowTable, Tally
from armo.data.check_texts import mix

SEVERITIES = ("error", "warning", "note")
"""What training refuses or would be misled by; what is most likely a fault; what to know."""

SHOWN_PLACES = 3

CONFLICT = 0.25
"""Ratings of one text contradict each other from this difference on, on [0, 1]."""

BOILERPLATE_PROMPTS = 20
BOILERPLATE_SHARE = 0.01
BOILERPLATE_WORDS = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that should be looked at.

    Attributes:
        severity: One of `SEVERITIES`.
        check: The check that found it.
        statement: What it is, in one line.
        count: How often it is there.
        places: Where, by file, row and field; the first ones.
    """

    severity: str
    check: str
    statement: str
    count: int = 1
    places: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the finding as one line."""
        if not self.places:
            return self.statement
        more = self.count - min(len(self.places), SHOWN_PLACES)
        shown = "; ".join(self.places[:SHOWN_PLACES])
        return f"{self.statement} ({self.count:,}): {shown}{f'; and {more:,} more' * (more > 0)}"


def sort_findings(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Order findings: the worst first, among those the most frequent."""
    return tuple(sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), -f.count)))


def _found(severity: str, check: str, statement: str, tally: Tally) -> Iterator[Finding]:
    """Yield what was counted, if it was there at all."""
    if tally.count:
        yield Finding(severity, check, statement, tally.count, tuple(tally.places))


def find_faults(reader: RowReader) -> Iterator[Finding]:
    """Rows that cannot be used, faulty texts, and texts of benchmarks."""
    yield from _found("error", "rows", "rows that cannot be used", reader.bad_rows)
    for name, tally in reader.faults.items():
        severity = "note" if name.endswith("or more") else "warning"
        yield from _found(severity, "texts", f"texts with {name}", tally)
    for name, tally in reader.overlaps.items():
        yield from _found("warning", "benchmarks", f"texts that are in {name} too", tally)


def find_repeats(table: RowTable) -> Iterator[Finding]:
    """Rows that say what another has said, or give the same text other ratings."""
    repeats, conflicts = Tally(), Tally()
    rated = table.rows_of("ratings")
    rating_of = np.full(len(table.places), -1)
    rating_of[rated] = np.arange(len(rated))
    for kind in KINDS:
        rows = table.rows_of(kind)
        for earlier, row in _repeated(rows, _row_keys(table, rows, ordered=kind == "pairs")):
            places = f"{table.place(row)} and {table.place(earlier)}"
            if kind == "ratings":
                two = table.ratings[rating_of[[earlier, row]]]
                apart = np.abs(two[0] - two[1])
                if np.isnan(apart).all():
                    continue  # on other objectives: two parts of one rating
                if np.nanmax(apart) >= CONFLICT:
                    conflicts.add(f"{places} `ratings`")
                    continue
            repeats.add(places)
    yield from _found("warning", "repeated rows", "rows that repeat another", repeats)
    yield from _found(
        "warning", "label noise", "rows that rate the same text otherwise than another", conflicts
    )


def _row_keys(
    table: RowTable, rows: Int64[np.ndarray, " some"], *, ordered: bool
) -> UInt64[np.ndarray, " some"]:
    """Return one number per row, by its prompt and its responses; those of lists in any order."""
    if len(rows) == 0:
        return np.empty(0, dtype=np.uint64)
    texts = mix(table.entry_text)
    if ordered:
        place = np.arange(len(texts)) - table.start[:-1][table.entry_row]
        texts = mix(texts + place.astype(np.uint64))
    sums = np.add.reduceat(texts, table.start[:-1])[rows]
    return mix(table.prompt[rows] + sums)


def _repeated(
    rows: Int64[np.ndarray, " some"], keys: UInt64[np.ndarray, " some"]
) -> Iterator[tuple[int, int]]:
    """Yield the first row with a key and each later one, in reading order of the later ones."""
    _, first, of = np.unique(keys, return_index=True, return_inverse=True)
    for k in np.flatnonzero(first[of] != np.arange(len(keys))):
        yield int(rows[first[of[k]]]), int(rows[k])


def find_cycles(table: RowTable) -> Iterator[Finding]:
    """Preferences that contradict one another: of two responses both ways, or in a circle."""
    better, worse, rows = _edges(table)
    nodes, numbers = np.unique(
        mix(table.prompt[table.entry_row] + mix(table.entry_text)), return_inverse=True
    )
    tails, heads = numbers[better], numbers[worse]
    graph = coo_array(
        (np.ones(len(tails), dtype=np.int8), (tails, heads)), shape=(len(nodes), len(nodes))
    )
    _, component = connected_components(graph, directed=True, connection="strong")
    inside = np.flatnonzero((component[tails] == component[heads]) & (tails != heads))
    circles: dict[int, list[int]] = {}
    for edge in inside:
        those = circles.setdefault(int(component[tails[edge]]), [])
        if int(rows[edge]) not in those[-1:]:
            those.append(int(rows[edge]))
    tally = Tally()
    for those in circles.values():
        tally.add(" and ".join(table.place(row) for row in sorted(set(those))[:6]))
    statement = "circles of preferences that contradict one another"
    yield from _found("warning", "label noise", statement, tally)


def _edges(
    table: RowTable,
) -> tuple[Int64[np.ndarray, " e"], Int64[np.ndarray, " e"], Int64[np.ndarray, " e"]]:
    """Return entries of which one is preferred to the other, and the row that says so."""
    pairs = table.rows_of("pairs")
    start = table.start[:-1][pairs]
    clear = table.entry_rank[start] < table.entry_rank[start + 1]
    better, worse, rows = [start[clear]], [start[clear] + 1], [pairs[clear]]
    for row in table.rows_of("lists"):
        entries = np.arange(table.start[row], table.start[row + 1])
        ranks = table.entry_rank[entries]
        levels = [entries[ranks == rank] for rank in np.unique(ranks)]
        # Next to each other is enough: what is in a circle is in one of these too.
        for upper, lower in pairwise(levels):
            better.append(np.repeat(upper, len(lower)))
            worse.append(np.tile(lower, len(upper)))
            rows.append(np.full(len(upper) * len(lower), row))
    return np.concatenate(better), np.concatenate(worse), np.concatenate(rows)


def find_leaks(table: RowTable) -> Iterator[Finding]:
    """Prompts that rows put on both sides of the split."""
    tally = Tally()
    for train, test in _sides(table):
        tally.add(f"{table.place(train)} (train) and {table.place(test)} (test)")
    yield from _found("error", "split", "prompts on both sides of the split", tally)


def _sides(table: RowTable) -> Iterator[tuple[int, int]]:
    """Yield the first training row and the first test row of each prompt that has both."""
    _, of = np.unique(table.group, return_inverse=True)
    first = []
    for side in ("train", "test"):
        rows = np.flatnonzero(table.split == SPLITS.index(side))
        row = np.full(len(table.group), -1)
        row[of[rows][::-1]] = rows[::-1]
        first.append(row)
    for group in np.flatnonzero((first[0] >= 0) & (first[1] >= 0)):
        yield int(first[0][group]), int(first[1][group])


def find_near(table: RowTable, *, threshold: float, test_fraction: float) -> Iterator[Finding]:
    """Prompts, and responses to one prompt, that are nearly the same as others.

    Args:
        table: The rows, with signatures.
        threshold: The estimated similarity from which on two texts are nearly the same.
        test_fraction: Share of prompts that go to the test side where rows do not say.
    """
    assert table.prompt_signatures is not None
    _, first, of = np.unique(table.group, return_index=True, return_inverse=True)
    some = np.flatnonzero(table.prompt_signatures[first].any(axis=1))
    near = near_pairs(table.prompt_signatures[first[some]], threshold=threshold)
    side = _test_side(table, test_fraction)
    leaks, alike = Tally(), Tally()
    for a, b, share in zip(near.first, near.second, near.similarity, strict=True):
        rows = sorted((int(first[some[a]]), int(first[some[b]])))
        said = f"{table.place(rows[1])} and {table.place(rows[0])} (similarity {share:.2f})"
        (leaks if side[rows[0]] != side[rows[1]] else alike).add(said)
    yield from _found(
        "warning",
        "split",
        "prompts nearly the same as one on the other side of the split",
        leaks,
    )
    yield from _found("note", "near-duplicates", "prompts nearly the same as another", alike)
    cluster = np.arange(len(first))
    cluster[some] = len(first) + near.clusters(len(some))
    yield from _found(
        "note",
        "near-duplicates",
        "responses nearly the same as another response to the prompt",
        _near_responses(table, cluster[of], threshold=threshold),
    )


def _near_responses(
    table: RowTable, prompt: Int64[np.ndarray, " rows"], *, threshold: float
) -> Tally:
    """Count nearly the same responses of different rows whose prompts have the same number."""
    assert table.signatures is not None
    within = prompt[table.entry_row]
    _, entries = np.unique(mix(within.astype(np.uint64)) + table.entry_text, return_index=True)
    entries = np.sort(entries[table.signatures[entries].any(axis=1)])
    near = near_pairs(table.signatures[entries], threshold=threshold, within=within[entries])
    tally = Tally()
    for a, b, share in zip(near.first, near.second, near.similarity, strict=True):
        one, other = entries[b], entries[a]
        if table.entry_row[one] != table.entry_row[other]:
            places = [table.place(table.entry_row[e], table.field_of(e)) for e in (one, other)]
            tally.add(f"{places[0]} and {places[1]} (similarity {share:.2f})")
    return tally


def _test_side(table: RowTable, test_fraction: float) -> Bool[np.ndarray, " rows"]:
    """Say of each row whether it is on the test side, as `GroupSplits` does."""
    hashed: Bool[np.ndarray, " rows"] = table.group / 2.0**64 < test_fraction
    _, of = np.unique(table.group, return_inverse=True)
    declared = np.full(len(table.group), -1)
    rows = np.flatnonzero(table.split > 0)
    declared[of[rows]] = table.split[rows]
    said = declared[of]
    return np.where(said > 0, said == SPLITS.index("test"), hashed)


def find_boilerplate(table: RowTable) -> Iterator[Finding]:
    """Responses that stand under many prompts, word for word."""
    texts, first, of = np.unique(table.entry_text, return_index=True, return_inverse=True)
    both = np.unique(np.stack([of.astype(np.uint64), table.prompt[table.entry_row]]), axis=1)
    prompts = np.bincount(both[0].astype(np.int64), minlength=len(texts))
    least = max(BOILERPLATE_PROMPTS, BOILERPLATE_SHARE * len(np.unique(table.prompt)))
    tally = Tally()
    for text in np.flatnonzero((prompts >= least) & (table.words[first] >= BOILERPLATE_WORDS)):
        entry = int(first[text])
        place = table.place(table.entry_row[entry], table.field_of(entry))
        tally.add(f"{place} ({prompts[text]:,} prompts)")
    yield from _found("note", "boilerplate", "responses given to many prompts alike", tally)
