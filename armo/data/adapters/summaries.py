"""OpenAI's human feedback on summaries: comparisons of two, and ratings on four axes."""

from collections.abc import Iterator, Mapping
from typing import Any

from armo.data.adapters.base import (
    Adapter,
    Dropped,
    member,
    objects,
    rated_response,
    rating,
    text,
)
from armo.data.adapters.paired import choice, optional_text, ordered_pair
from armo.data.conversation import Message, PreferencePair, RatedResponse

AXES = ("overall", "accuracy", "coverage", "coherence")


def summary_pair(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of `comparisons`.

    The annotators' confidence is no margin here: which end of its scale means what is not
    documented.

    Args:
        row: `info`, as of `_task`; `summaries`, two with a `text`; `choice`, the index of the
            better one.
        id: Of the row.
    """
    prompt, category = _task(row)
    summaries = [text(summary, "text").strip() for summary in objects(row, "summaries", "text")]
    if len(summaries) != 2:
        raise ValueError(f"field `summaries` must have two summaries, has {len(summaries)}")
    first = float(choice(row, "choice", (0, 1)) == 0)
    yield ordered_pair(id, (Message("user", prompt),), summaries, first=first, category=category)


def summary_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of `axis`: a summary, rated by people from 1 to 7 on four axes.

    Args:
        row: `info`, as of `_task`; `summary` with a `text` and, in `axes`, the ratings, of which
            some are null. `compatible`, which some rows have, is no rating of this scale.
        id: Of the row.
    """
    prompt, category = _task(row)
    summary = member(row, "summary")
    axes = member(summary, "axes")
    yield rated_response(
        "summarize_axes",
        id,
        prompt,
        optional_text(summary, "text").strip(),
        {f"summarize-{axis}": rating(axes.get(axis)) for axis in AXES},
        category=category,
    )


def _task(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return what was to be summed up, as TRL words it, and its kind.

    `info` has `subreddit`, `title` and `post`, or for news an `article`, the others being null.
    """
    info = member(row, "info")
    parts = {name: optional_text(info, name) for name in ("subreddit", "title", "post", "article")}
    if parts["post"].strip():
        head = f"SUBREDDIT: r/{parts['subreddit']}\n\nTITLE: {parts['title']}"
        return f"{head}\n\nPOST: {parts['post']}\n\nTL;DR:", "post"
    if parts["article"].strip():
        return f"ARTICLE: {parts['article']}\n\nTL;DR:", "news"
    return "", ""


# `folder`, since the hub's conversion of a set with a script has no configurations by name.
ADAPTERS: tuple[Adapter[PreferencePair], ...] = (
    Adapter(
        "summarize_from_feedback",
        "openai/summarize_from_feedback",
        ("info", "summaries", "choice"),
        summary_pair,
        folder="comparisons",
    ),
)
SUMMARIZE_AXES: Adapter[RatedResponse] = Adapter(
    name="summarize_axes",
    id="openai/summarize_from_feedback",
    columns=("info", "summary"),
    rows=summary_rows,
    splits=("validation",),
    folder="axis",
    objectives=tuple(f"summarize-{axis}" for axis in AXES),
)
