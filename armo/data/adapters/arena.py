"""Pairs of chatbot arenas and MT-Bench: votes for one of two models' answers, with ties.

A vote is on the whole conversation, and from the second turn on the two sides have histories of
their own, so that rows of several turns make no pair.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from armo.data.adapters.base import Adapter, Dropped, objects, text
from armo.data.adapters.paired import choice, messages, ordered_pair
from armo.data.conversation import Message, PreferencePair, Prompt

# Probability that model A's answer is the better one, by the vote.
WINNERS = {
    "model_a": 1.0,
    "model_b": 0.0,
    "tie": 0.5,
    "tie (bothbad)": 0.5,
    "both_bad": 0.5,
    "tie (inconsistent)": 0.5,
}
SEVERAL_TURNS = Dropped("several turns")


def arena_messages(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a vote in `chatbot_arena_conversations` or `arena-human-preference-100k`.

    Args:
        row: `conversation_a` and `conversation_b`, lists of messages; `winner`.
        id: Of the row.
    """
    sides = messages(row, "conversation_a"), messages(row, "conversation_b")
    yield _pair(row, id, sides)


def arena_blocks(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a vote in `arena-human-preference-140k`.

    Args:
        row: As of `arena_messages`, but a content is a list of blocks, of which those of type
            `text` are joined; with an image, the row is left out. `evaluation_order` above 1 says
            that there were turns before.
        id: Of the row.
    """
    if row.get("evaluation_order") not in (None, 1):
        yield SEVERAL_TURNS
        return
    sides = _side(row, "conversation_a"), _side(row, "conversation_b")
    if sides[0] is None or sides[1] is None:
        yield Dropped("a message with more than text")
    else:
        yield _pair(row, id, (sides[0], sides[1]))


def arena_texts(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a vote in `arena-human-preference-55k`.

    Args:
        row: `prompt`, `response_a` and `response_b`, each the JSON of a list of turns, in which a
            turn may be null; `winner_model_a`, `winner_model_b` and `winner_tie`, one of them 1.
        id: Of the row.
    """
    votes = [
        choice(row, name, (0, 1)) for name in ("winner_model_a", "winner_tie", "winner_model_b")
    ]
    if sum(votes) != 1:
        raise ValueError(f"one of the fields `winner_...` must be 1, got {votes}")
    turns = [_turns(row, name) for name in ("prompt", "response_a", "response_b")]
    if any(len(each) > 1 for each in turns):
        yield SEVERAL_TURNS
        return
    prompt, *responses = [(each[0] if each else None) or "" for each in turns]
    if any(not _is_unicode(each) for each in (prompt, *responses)):
        yield Dropped("no valid Unicode text")
        return
    first = (1.0, 0.5, 0.0)[votes.index(1)]
    yield ordered_pair(id, (Message("user", prompt),), responses, first=first)


def mt_bench_judgement(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a judgement in `mt_bench_human_judgments`.

    Args:
        row: As of `arena_messages`, with conversations of two exchanges; `turn`, the one that was
            judged. At the second, the first answers differ.
        id: Of the row.
    """
    if choice(row, "turn", (1, 2)) == 2:
        yield SEVERAL_TURNS
        return
    sides = messages(row, "conversation_a")[:2], messages(row, "conversation_b")[:2]
    yield _pair(row, id, sides)


def _pair(
    row: Mapping[str, Any], id: str, sides: tuple[Prompt, Prompt]
) -> PreferencePair | Dropped:
    first = WINNERS[choice(row, "winner", tuple(WINNERS))]
    roles = [[message.role for message in side if message.role != "system"] for side in sides]
    if any(len(each) > 2 for each in roles):
        return SEVERAL_TURNS
    if roles != [["user", "assistant"]] * 2:
        return Dropped("no question and answer")
    if sides[0][:-1] != sides[1][:-1]:
        return Dropped("two prompts")
    category = "code" if row.get("is_code") is True else ""
    responses = [side[-1].content for side in sides]
    return ordered_pair(id, sides[0][:-1], responses, first=first, category=category)


def _side(row: Mapping[str, Any], name: str) -> Prompt | None:
    """Messages of blocks; None where one is no text."""
    read = []
    for k, message in enumerate(objects(row, name, "role", "content")):
        blocks = objects(message, "content")
        if any(block.get("type", "text") != "text" or block.get("image") for block in blocks):
            return None
        try:
            content = "\n\n".join(text(block, "text") for block in blocks)
            read.append(Message(text(message, "role"), content))
        except ValueError as error:
            raise ValueError(f"field `{name}[{k}]`: {error}") from None
    return tuple(read)


def _turns(row: Mapping[str, Any], name: str) -> list[str | None]:
    written = text(row, name)
    try:
        turns = json.loads(written)
    except (ValueError, RecursionError):
        turns = None
    if not isinstance(turns, list) or not all(isinstance(turn, str | None) for turn in turns):
        raise ValueError(f"field `{name}` must be the JSON of a list of texts, got {written!r:.60}")
    return turns


def _is_unicode(written: str) -> bool:
    """Whether the text has no half of a surrogate pair, which JSON can spell."""
    return not any("\ud800" <= character <= "\udfff" for character in written)


_VOTED = ("winner", "conversation_a", "conversation_b")
_TEXTS = ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie")
ADAPTERS: tuple[Adapter[PreferencePair], ...] = (
    Adapter("arena_33k", "lmsys/chatbot_arena_conversations", _VOTED, arena_messages),
    Adapter("arena_55k", "lmarena-ai/arena-human-preference-55k", _TEXTS, arena_texts),
    Adapter("arena_100k", "lmarena-ai/arena-human-preference-100k", _VOTED, arena_messages),
    Adapter("arena_140k", "lmarena-ai/arena-human-preference-140k", _VOTED, arena_blocks),
    Adapter(
        "mt_bench_human",
        "lmsys/mt_bench_human_judgments",
        (*_VOTED, "turn"),
        mt_bench_judgement,
        splits=("human",),
    ),
)
