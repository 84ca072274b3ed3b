"""Preference pairs against shortcuts: made of the training pairs, or changed where they are noise.

All functions take rows and yield rows, and do the same for the same rows and seed. None touches a
row of the test side.
"""

import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Literal, get_args

from armo.data.checks import GroupSplits
from armo.data.conversation import PreferencePair, Row, prompt_group
from armo.data.rewrite import PATTERNS, add_pattern
from armo.data.sources import DataError, Paths, data_files, read_rows

logger = logging.getLogger(__name__)

AUGMENTED = "augmented"
"""What the sources of added pairs begin with: `augmented/off_prompt` and so on."""

# Responses of other prompts to draw from.
_DONORS = 1024
# Where a response may be cut, as shares of it, and how many characters it needs.
_CUT = (0.2, 0.8)
_CUT_CHARACTERS = 80

Training = Callable[[PreferencePair], bool]
"""Whether a pair is on the training side."""
Change = Callable[..., Iterator[PreferencePair]]
Noise = Literal["flip", "drop", "smooth", "margin"]


def change_pairs(
    read: Callable[[], Iterable[PreferencePair]],
    changes: Sequence[Change],
    *,
    others: Callable[[], Iterable[Row]],
    test_fraction: float,
) -> Iterator[PreferencePair]:
    """Change the pairs of the training side; those of the test side come as they are.

    With any change, all rows are read once before the first pair comes, since each of them may say
    on which side its prompt is.

    Args:
        read: Reads the pairs, each time from the first.
        changes: Each takes pairs, and `training`, and yields pairs; one after the other.
        others: Reads all other rows of the run.
        test_fraction: As for `GroupSplits`.
    """
    if not changes:
        yield from read()
        return
    splits = GroupSplits(test_fraction)
    for row in chain(others(), read()):
        splits.add(row)
    test = splits.test()
    rows: Iterable[PreferencePair] = read()
    for change in changes:
        rows = change(rows, training=lambda row: not test[splits.add(row)])
    yield from rows


def augment_pairs(
    rows: Iterable[PreferencePair],
    *,
    training: Training,
    off_prompt: float = 0.0,
    truncated: float = 0.0,
    restyled: float = 0.0,
    judged: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[PreferencePair]:
    """Add pairs in which what a shortcut goes by says nothing, or the wrong thing.

    They come right after the pair that they are made of, in sources of their own, and count as
    much as it does; how many there are goes to the log.

    Args:
        rows: Preference pairs.
        training: Whether a pair is on the training side; nothing is made of the others.
        off_prompt: Share of pairs to which one is added in which the chosen response wins over one
            chosen for another prompt, drawn from the training pairs before it: what is good
            whatever was asked cannot tell them apart.
        truncated: Share to which one is added in which the chosen response wins over its own
            beginning. The winner is always the longer one.
        restyled: Share to which a tie is added: one of its responses, and the same with one of
            `PATTERNS` put in.
        judged: Objectives by which the off-prompt and the truncated responses lose as well. The
            restyled tie by each objective that the pair is judged by.
        seed: Of all that is drawn; the same for a pair whatever comes after it.

    Raises:
        ValueError: If a share is not in [0, 1].

    References:
        Off-prompt: Liu et al., "RRM: Robust Reward Model Training Mitigates Reward Hacking", ICLR
        2025 (arXiv 2409.13156).
    """
    shares = {"off_prompt": off_prompt, "truncated": truncated, "restyled": restyled}
    for name, share in shares.items():
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"`{name}` must be a share from 0 to 1, got {share}.")
    if isinstance(judged, str):
        raise ValueError(f"`judged` must be a list of objectives, got {judged!r}.")
    donors = _Donors()
    counts: Counter[str] = Counter()
    for row in rows:
        yield row
        if not training(row):
            continue
        counts["pairs"] += 1
        for kind, share in shares.items():
            # Of its own, so that another kind's share changes nothing here.
            rng = random.Random(f"{seed}:{kind}:{row.id}")
            if rng.random() >= share:
                continue
            added = _added(row, kind, rng, donors=donors, judged=judged)
            counts[kind if added is not None else f"no {kind}"] += 1
            if added is not None:
                yield added
        donors.add(row, random.Random(f"{seed}:donor:{row.id}"))
    for kind in (kind for kind, share in shares.items() if share > 0.0):
        logger.info(
            "augmentation: %d %s pairs added to %d training pairs; %d could not be made",
            counts[kind],
            kind,
            counts["pairs"],
            counts[f"no {kind}"],
        )


def _added(
    row: PreferencePair,
    kind: str,
    rng: random.Random,
    *,
    donors: "_Donors",
    judged: Sequence[str],
) -> PreferencePair | None:
    chosen, rejected, preference = row.chosen, None, 1.0
    judgements = dict.fromkeys(judged, 1.0)
    if kind == "off_prompt":
        rejected = donors.draw(row, rng)
    elif kind == "truncated":
        rejected = beginning(row.chosen, rng)
    else:
        chosen = rng.choice(row.responses)
        patterns = rng.sample(list(PATTERNS), len(PATTERNS))
        versions = (add_pattern(chosen, pattern, seed=rng.getrandbits(32)) for pattern in patterns)
        rejected = next((version for version in versions if version is not None), None)
        preference, judgements = 0.5, dict.fromkeys(row.judgements, 0.5)
    if rejected is None or rejected.strip() == chosen.strip():
        return None
    return replace(
        row,
        id=f"{row.id}/{kind}",
        source=f"{AUGMENTED}/{kind}",
        chosen=chosen,
        rejected=rejected,
        margin=None,
        split="train",
        judgements=judgements,
        preference=preference,
    )


def beginning(response: str, rng: random.Random) -> str | None:
    """Cut a response off, between words if it has any; None if it is too short.

    Args:
        response: Any text.
        rng: Of the place, between a fifth and four fifths of the text.
    """
    text = response.strip()
    if len(text) < _CUT_CHARACTERS:
        return None
    first, last = (round(share * len(text)) for share in _CUT)
    places = [found.start() for found in re.finditer(r"\s", text) if first <= found.start() <= last]
    return text[: rng.choice(places or range(first, last))].rstrip()


class _Donors:
    """A sample of the chosen responses so far, with the groups of their prompts."""

    def __init__(self) -> None:
        self._sample: list[tuple[str, str]] = []
        self._seen = 0

    def add(self, row: PreferencePair, rng: random.Random) -> None:
        """Take a response in, so that each one so far is in the sample equally likely."""
        self._seen += 1
        entry = prompt_group(row.prompt), row.chosen
        if len(self._sample) < _DONORS:
            self._sample.append(entry)
        elif (place := rng.randrange(self._seen)) < _DONORS:
            self._sample[place] = entry

    def draw(self, row: PreferencePair, rng: random.Random) -> str | None:
        """Draw a response to another prompt; None if there is none."""
        own = prompt_group(row.prompt)
        taken = {response.strip() for response in row.responses}
        others = [text for group, text in self._sample if group != own if text.strip() not in taken]
        return rng.choice(others) if others else None


def treat_noise(
    rows: Iterable[PreferencePair],
    *,
    training: Training,
    strengths: Mapping[str, float],
    how: Noise = "flip",
    share: float = 0.1,
) -> Iterator[PreferencePair]:
    """Change pairs by what an ensemble of models says of them.

    The strength of a pair is the mean over the models of the log-odds that its chosen response is
    the better one; the models should not have been trained on it. What the pair's preference
    becomes, its judgements become that say the same as it did. How many pairs were changed goes to
    the log, as does how many have no strength and stay.

    Args:
        rows: Preference pairs.
        training: Whether a pair is on the training side; the others stay.
        strengths: Log-odds by the id of the pair.
        how: `flip` swaps the pairs that the ensemble finds wrong most clearly, `drop` leaves them
            out, both only pairs that are no ties; `smooth` makes every preference the mean of what
            it was and the probability; `margin` makes the log-odds, where positive, the margin,
            else 0.
        share: Of the strengths, from the lowest on, those to flip or drop, as far as they are below
            zero. A share, since how far an ensemble dares to go from zero says little.

    Raises:
        ValueError: If `how` is not known, or `share` not in [0, 1].

    References:
        Wang et al., "Secrets of RLHF in Large Language Models Part II: Reward Modeling"
        (arXiv 2401.06080), section 2.
    """
    if how not in get_args(Noise):
        raise ValueError(f"`how` must be {', '.join(get_args(Noise))}, got {how!r}.")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`share` must be from 0 to 1, got {share}.")
    lowest = sorted(strengths.values())[: round(share * len(strengths))]
    limit = lowest[-1] if lowest else -math.inf
    changed = unknown = count = 0
    for row in rows:
        if not training(row):
            yield row
            continue
        count += 1
        if row.id not in strengths:
            unknown += 1
            yield row
            continue
        strength = strengths[row.id]
        probability = _sigmoid(strength)
        if how == "margin":
            changed += 1
            yield replace(row, margin=max(0.0, strength))
        elif how == "smooth":
            changed += 1
            yield _with_preference(row, (row.preference + probability) / 2.0)
        elif strength <= limit and strength < 0.0 and row.preference > 0.5:
            changed += 1
            if how == "flip":
                yield _with_preference(row, 1.0 - row.preference)
        else:
            yield row
    logger.info(
        "noise, %s: %d of %d training pairs changed, %d without a strength stay",
        how,
        changed,
        count,
        unknown,
    )


def _with_preference(row: PreferencePair, preference: float) -> PreferencePair:
    """Give a pair another preference, and swap its responses where that is below one half."""
    judgements = {
        name: preference if judgement == row.preference else judgement
        for name, judgement in row.judgements.items()
    }
    if preference >= 0.5:
        return replace(row, preference=preference, judgements=judgements)
    return replace(
        row,
        chosen=row.rejected,
        rejected=row.chosen,
        preference=1.0 - preference,
        judgements={name: 1.0 - judgement for name, judgement in judgements.items()},
        # How clear it was the other way round says nothing.
        margin=None,
    )


def read_strengths(paths: Paths, *, column: str = "armo_preference") -> dict[str, float]:
    """Read what models say of pairs: the mean of the log-odds of each pair, by its id.

    Args:
        paths: Files of `armo data annotate`, one for each model of the ensemble.
        column: With the probability that `chosen` is preferred; null where there is none.

    Raises:
        DataError: Naming the file and row without an id, or whose probability is none; or if a
            pair is in one file and not in another.
    """
    odds: dict[str, list[float]] = {}
    files = data_files(paths, builtin_file="")
    for file in files:
        for place, row in read_rows(file):
            id, value = row.get("id"), row.get(column, "")
            if not isinstance(id, str):
                raise DataError(f"{place}: field `id` is missing; strengths go by it")
            if value in ("", None) and column in row:
                continue
            try:
                probability = float(value)
            except (TypeError, ValueError):
                probability = math.nan
            if not 0.0 <= probability <= 1.0:
                raise DataError(
                    f"{place}: field `{column}` must be a probability, got {value!r:.60}; make it "
                    f"by `armo data annotate`"
                )
            # A probability that was rounded to 0 or 1 has no odds.
            clamped = min(max(probability, 1e-12), 1.0 - 1e-12)
            odds.setdefault(id, []).append(math.log(clamped / (1.0 - clamped)))
    for id, values in odds.items():
        if len(values) != len(files):
            raise DataError(
                f"row {json.dumps(id)} has {len(values)} strengths in {len(files)} files; annotate "
                f"the same pairs with each model"
            )
    return {id: sum(values) / len(values) for id, values in odds.items()}


def _sigmoid(value: float) -> float:
    # Not `1 / (1 + exp(-x))`, which overflows.
    return 0.5 * (1.0 + math.tanh(0.5 * value))
