"""Conversations as users give them: parsed, cut into beginnings, embedded."""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from armo.data.conversation import Conversation, Message, Prompt
from armo.data.segments import sentence_ends
from armo.embed.backbone import Backbone, GroupEmbeddings
from armo.embed.boundary import PromptGroup
from armo.embed.spec import BackboneError
from armo.model.output import SegmentKind

logger = logging.getLogger(__name__)

# Responses that are tokenised and ordered by length together.
CHUNK_ROWS = 1024

Messages = Sequence[Mapping[str, str] | Message]


def parse_messages(messages: Sequence[Mapping[str, str] | Message]) -> tuple[Message, ...]:
    """Turn chat messages, as dicts or `Message`, into messages.

    Raises:
        ValueError: If one lacks a role or content, or has an unknown role.
    """
    parsed = []
    for k, message in enumerate(messages):
        if isinstance(message, Message):
            parsed.append(message)
            continue
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"message {k} needs `role` and `content`, got {message!r:.80}")
        if not isinstance(message["content"], str):
            raise ValueError(f"message {k}: `content` must be text")
        parsed.append(Message(role=message["role"], content=message["content"]))
    return tuple(parsed)


def parse_prompt(prompt: Messages | str) -> Prompt:
    """Turn the turns before a response, or the text of a single user turn, into messages."""
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    return parse_messages(prompt)


def parse_conversations(conversations: Sequence[Messages]) -> list[Conversation]:
    """Turn lists of chat messages, each ending with the assistant's answer, into conversations.

    Raises:
        ValueError: Naming the one that is none.
    """
    parsed = []
    for number, conversation in enumerate(conversations):
        try:
            if isinstance(conversation, str | Mapping | Message):
                raise ValueError("must be a list of messages")
            messages = parse_messages(conversation)
            if not messages or messages[-1].role != "assistant":
                raise ValueError("the last message must be the assistant's answer")
            parsed.append(Conversation(messages[:-1], messages[-1].content))
        except ValueError as error:
            raise ValueError(f"conversation {number}: {error}") from None
    return parsed


def beginnings(
    prompt: Prompt, response: str, *, by: SegmentKind
) -> tuple[list[Conversation], tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Cut a response after every sentence, or a conversation after every assistant turn.

    Returns:
        Each beginning, the last segment of each, and where that is in the response or the turn.

    Raises:
        ValueError: If the prompt has no user turn, a response is empty, or `by` is not known.
    """
    if by not in get_args(SegmentKind):
        raise ValueError(f"`by` must be {' or '.join(get_args(SegmentKind))}, got {by!r}.")
    last = Conversation(prompt, response)
    if by == "sentence":
        ends = sentence_ends(response)
        spans = tuple(pairwise((0, *ends)))
        texts = tuple(response[start:end] for start, end in spans)
        parts = [Conversation(last.prompt, response[:end]) for end in ends]
    else:
        turns = [k for k, m in enumerate(last.prompt) if m.role == "assistant"]
        parts = [Conversation(last.prompt[:k], last.prompt[k].content) for k in turns]
        parts.append(last)
        texts = tuple(part.response for part in parts)
        spans = tuple((0, len(text)) for text in texts)
    return parts, texts, spans


def embed_conversations(
    backbone: Backbone,
    conversations: Sequence[Conversation],
    *,
    batch_size: int | None,
    along: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Embed each distinct text once; return prompts, responses, and what was cut.

    Those that go `along` are beginnings of one conversation, which is read once.
    """
    numbers: dict[Prompt, dict[str, int]] = {}
    for number, conversation in enumerate(conversations):
        numbers.setdefault(conversation.prompt, {}).setdefault(conversation.response, number)
    groups = [PromptGroup(prompt, tuple(texts)) for prompt, texts in numbers.items()]
    chunks = _chunks(groups) if not along else [groups]
    parts: list[GroupEmbeddings] = []
    try:
        if along:
            parts.append(backbone.embed_along(groups))
        else:
            parts.extend(backbone.embed_chunks(chunks, max_rows=batch_size))
    except BackboneError as error:
        if error.group is None:
            raise
        group = chunks[len(parts)][error.group]
        of_prompt = numbers[group.prompt]
        text = group.responses[error.response or 0]
        what = "segment" if along else "conversation"
        named = BackboneError(f"{what} {of_prompt[text]}: {error}")
        named.group, named.response = of_prompt[text], error.response
        raise named from None
    places = {
        prompt: (k, {text: n for n, text in enumerate(texts)})
        for k, (prompt, texts) in enumerate(numbers.items())
    }
    starts = torch.tensor([0, *(len(group.responses) for group in groups)]).cumsum(0).tolist()
    prompt_rows, response_rows = [], []
    for conversation in conversations:
        k, texts = places[conversation.prompt]
        prompt_rows.append(k)
        response_rows.append(starts[k] + texts[conversation.response])
    cut = torch.cat([part.responses.truncated for part in parts])[response_rows]
    cut |= torch.cat([part.prompts.truncated for part in parts])[prompt_rows]
    missing = torch.cat([part.responses.missing for part in parts])[response_rows]
    for what, rows in (("cut, and scored as cut", cut), ("skipped, without a score", missing)):
        if count := int(rows.sum()):
            logger.warning(
                "%d of %d conversations are longer than the backbone reads: %s",
                count,
                len(conversations),
                what,
            )
    return (
        torch.cat([part.prompts.values for part in parts])[prompt_rows],
        torch.cat([part.responses.values for part in parts])[response_rows],
        cut,
    )


def _chunks(groups: Sequence[PromptGroup]) -> list[list[PromptGroup]]:
    """Cut groups into chunks of about `CHUNK_ROWS` responses; at least one, if it is empty."""
    chunks: list[list[PromptGroup]] = [[]]
    rows = 0
    for group in groups:
        if rows >= CHUNK_ROWS:
            chunks.append([])
            rows = 0
        chunks[-1].append(group)
        rows += len(group.responses)
    return chunks
