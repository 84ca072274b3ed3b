r"""Pairs of Anthropic's HH-RLHF: transcripts of `\n\nHuman:` and `\n\nAssistant:` turns."""

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from armo.data.adapters.base import Adapter, Dropped, text
from armo.data.adapters.paired import pair
from armo.data.conversation import Message, PreferencePair, Prompt

# Some answers go on with a turn of the human's that the model made up, also under a cut name.
_MARKER = re.compile(r"(?:^|\n\n)(Human|Hum|Assistant):")
_ROLES = {"Human": "user", "Hum": "user", "Assistant": "assistant"}


def transcript(written: str) -> Prompt | None:
    r"""Split a transcript into its turns; None if it begins with no turn of the human's.

    Example:
        >>> [(t.role, t.content) for t in transcript("\n\nHuman: Hi\n\nAssistant: Hello.")]
        [('user', 'Hi'), ('assistant', 'Hello.')]
    """
    before, *rest = _MARKER.split(written)
    turns = [
        Message(_ROLES[name], content.strip())
        for name, content in zip(rest[::2], rest[1::2], strict=True)
    ]
    if before.strip() or not turns or turns[0].role != "user":
        return None
    return tuple(turns)


def hh_pair(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of HH-RLHF.

    Rows whose turns do not alternate are left out: there a message holds a marker, or a turn is
    missing, and where the prompt ends is not known.

    Args:
        row: `chosen` and `rejected`, each a whole transcript; or, with `prompt`, a transcript that
            ends with the assistant's marker, what the assistant says to it.
        id: Of the row.
    """
    start = text(row, "prompt").rstrip() if row.get("prompt") is not None else ""
    sides = [transcript(f"{start}{text(row, name)}") for name in ("chosen", "rejected")]
    chosen, rejected = sides
    if chosen is None or rejected is None:
        yield Dropped("no transcript that begins with the human")
    elif any(a.role == b.role for side in (chosen, rejected) for a, b in pairwise(side)):
        yield Dropped("turns that do not alternate")
    elif chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        yield Dropped("a conversation that does not end with an answer")
    elif chosen[:-1] != rejected[:-1]:
        yield Dropped("two prompts")
    elif not all(turn.content for turn in chosen[:-1]):
        yield Dropped("an empty turn")
    else:
        yield pair(id, chosen[:-1], chosen[-1].content, rejected[-1].content)


_PARTS = {
    "hh_rlhf": None,
    "hh_rlhf_harmless": "harmless-base",
    "hh_rlhf_helpful": "helpful-base",
    "hh_rlhf_helpful_online": "helpful-online",
    "hh_rlhf_helpful_rejection_sampled": "helpful-rejection-sampled",
}
ADAPTERS: tuple[Adapter[PreferencePair], ...] = (
    *(
        Adapter(name, "Anthropic/hh-rlhf", ("chosen", "rejected"), hh_pair, folder=folder)
        for name, folder in _PARTS.items()
    ),
    Adapter("rm_static", "Dahoas/rm-static", ("prompt", "chosen", "rejected"), hh_pair),
)
