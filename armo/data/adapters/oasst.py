"""OpenAssistant's second set: trees of messages, with people's labels on each."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from armo.data.adapters.base import Adapter, Dropped, listed, member, rated_response, rating, text
from armo.data.conversation import RatedResponse
from armo.data.published import PublishedRow, read_messages
from armo.data.sources import DataError

LABELS = ("quality", "helpfulness", "creativity", "humor", "toxicity", "violence")
ROLES = {"prompter": "user", "assistant": "assistant"}


def oasst_conversations(rows: Iterable[PublishedRow]) -> Iterator[PublishedRow]:
    """Put conversations together from messages that name the one before them, `parent_id`.

    Yields one row for each assistant's message that was not deleted: `messages`, from the root to
    it, beside the fields of its own. All messages are held in memory.

    Raises:
        DataError: If a message's parent is not there, or it is among its own.
    """
    messages = {str(row.fields["message_id"]): row for row in rows}
    for row in messages.values():
        if row.fields["role"] != "assistant" or row.fields.get("deleted") is True:
            continue
        yield row._replace(fields={**row.fields, "messages": _turns(row, messages)})


def _turns(row: PublishedRow, messages: Mapping[str, PublishedRow]) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = []
    at: PublishedRow | None = row
    while at is not None:
        try:
            role, parent = text(at.fields, "role"), text(at.fields, "parent_id")
            if role not in ROLES:
                raise ValueError(f"field `role` is {role!r}, not {' or '.join(ROLES)}")
            if parent and parent not in messages:
                raise ValueError(f"field `parent_id` names {parent!r}, which is no row")
            if len(turns) > len(messages):
                raise ValueError("field `parent_id` leads back to the message itself")
            turns.append({"role": ROLES[role], "content": text(at.fields, "text")})
        except ValueError as error:
            raise DataError(f"{at.place}: {error}") from None
        at = messages[parent] if parent else None
    return turns[::-1]


def oasst2_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a conversation of `oasst_conversations`: labels are means of votes, on [0, 1].

    `labels` has lists of `name` and `value`; a name that is not there is missing.
    """
    labels = member(row, "labels") or {"name": [], "value": []}
    names, values = listed(labels, "name"), listed(labels, "value")
    if len(names) != len(values):
        raise ValueError(f"field `labels` has {len(names)} names and {len(values)} values")
    given = {str(name): value for name, value in zip(names, values, strict=True)}
    *prompt, answer = read_messages(row["messages"], "messages")
    yield rated_response(
        "oasst2",
        id,
        tuple(prompt),
        answer.content,
        {f"oasst2-{label}": rating(given.get(label)) for label in LABELS},
        category=text(row, "lang"),
    )


OASST2 = Adapter(
    name="oasst2",
    id="OpenAssistant/oasst2",
    columns=("message_id", "parent_id", "text", "role", "lang", "labels"),
    rows=oasst2_rows,
    objectives=tuple(f"oasst2-{label}" for label in LABELS),
    gather=oasst_conversations,
)
