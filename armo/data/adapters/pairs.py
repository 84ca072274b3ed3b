"""Published sets of preference pairs, by the names that `data/pairs=` knows."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b

from armo.data.adapters import (
    arena,
    comparisons,
    conversations,
    labels,
    strengths,
    summaries,
    transcripts,
)
from armo.data.adapters.base import Adapter, find_adapter
from armo.data.conversation import PreferencePair
from armo.data.objectives import ObjectiveSet
from armo.data.sources import DataError, OnBadRow, Paths, check_judges, judging

logger = logging.getLogger(__name__)

PAIR_SETS: dict[str, Adapter[PreferencePair]] = {
    adapter.name: adapter
    for module in (strengths, transcripts, conversations, labels, summaries, comparisons, arena)
    for adapter in module.ADAPTERS
}


def stream_adapted_pairs(
    dataset: str | Adapter[PreferencePair],
    *,
    objectives: ObjectiveSet | None = None,
    path: Paths | None = None,
    revision: str | None = None,
    splits: Sequence[str] | None = None,
    judges: Mapping[str, Sequence[str]] | None = None,
    min_margin: float = 0.0,
    pairs_per_prompt: int | None = None,
    streaming: bool = True,
    on_bad_row: OnBadRow = "error",
) -> Iterator[PreferencePair]:
    """Read preference pairs of a published set, as they are asked for.

    What the adapter drops, and what the two limits leave out, is counted and logged.

    Args:
        dataset: Its name here, one of `PAIR_SETS`, or an adapter of your own; the source of
            its pairs.
        objectives: The declared objectives, for `judges`. Without, any objective.
        path: Id on the hub, or a file, a folder, a pattern, or a list of them, in the published
            form; the set on the hub, if None.
        revision: Commit, tag or branch on the hub.
        splits: Those to read; the training split, if None.
        judges: As of `stream_pairs`.
        min_margin: Pairs with a smaller margin are left out; those without a margin are kept.
        pairs_per_prompt: The first so many pairs of a prompt are kept; all, if None.
        streaming: Read from the hub row by row; otherwise `datasets` downloads the set once and
            keeps it.
        on_bad_row: As of `Adapter.read`.

    Raises:
        DataError: Naming file, row and field, at the first row that cannot be used; or if
            `min_margin` leaves no pair.
        ValueError: If there is no such set, `judges` names an objective that is not declared, or
            `pairs_per_prompt` is not positive.
    """
    judges = check_judges(judges, objectives)
    adapter = find_adapter(dataset, PAIR_SETS)
    if pairs_per_prompt is not None and pairs_per_prompt < 1:
        raise ValueError(f"`pairs_per_prompt` must be from 1 on, or null, got {pairs_per_prompt}")
    rows = adapter.read(
        path, revision=revision, splits=splits, streaming=streaming, on_bad_row=on_bad_row
    )
    pairs = _thinned(
        (pair for _, pair in rows),
        adapter.name,
        min_margin=min_margin,
        pairs_per_prompt=pairs_per_prompt,
    )
    return map(partial(_judged, judges=judges), pairs)


def _judged(pair: PreferencePair, *, judges: Mapping[str, Sequence[str]]) -> PreferencePair:
    names = judging(judges, pair.source, pair.category)
    return replace(pair, judgements=dict.fromkeys(names, pair.preference)) if names else pair


def _thinned(
    pairs: Iterator[PreferencePair],
    name: str,
    *,
    min_margin: float,
    pairs_per_prompt: int | None,
) -> Iterator[PreferencePair]:
    small = many = kept = 0
    of_prompt: Counter[bytes] = Counter()
    try:
        for pair in pairs:
            if pair.margin is not None and pair.margin < min_margin:
                small += 1
                continue
            if pairs_per_prompt is not None:
                # A digest, since prompts are long and many.
                prompt = blake2b(repr(pair.prompt).encode(), digest_size=16).digest()
                of_prompt[prompt] += 1
                if of_prompt[prompt] > pairs_per_prompt:
                    many += 1
                    continue
            kept += 1
            yield pair
    finally:  # also where the reader has enough of it
        if small or many:
            logger.warning(
                "%s: left out: a margin below %g (%d), more than %s pairs of one prompt (%d)",
                name,
                min_margin,
                small,
                pairs_per_prompt,
                many,
            )
    if not kept:
        raise DataError(f"{name}: no pair has a margin from `min_margin={min_margin:g}` on")
