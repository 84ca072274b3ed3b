"""Where the prompt ends in a templated conversation, from the chat template itself.

The boundary is found in the *text* that the template renders, and carried over to tokens by
character offsets. Token-id patterns are never searched for: a user may write a template's control
text, and then a pattern finds the wrong place.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from armo.data.conversation import Conversation, Message, Prompt

PromptPosition = Literal["turn_end", "generation_prompt"]

# Some templates print today's date, which would change every embedding from day to day.
PINNED_DATE = datetime(2024, 7, 26)
_STRFTIME_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


class BoundaryError(ValueError):
    """The end of the prompt cannot be located in a templated conversation."""


@dataclass(frozen=True, slots=True)
class SplitTokens:
    """Token ids of a templated conversation, split where the prompt ends."""

    prompt: list[int]
    response: list[int]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool
) -> str:
    """Render messages with the tokenizer's chat template, dates pinned.

    Raises:
        BoundaryError: If the template refuses the messages.
    """
    template = _STRFTIME_NOW.sub(
        lambda found: repr(PINNED_DATE.strftime(found[2])), tokenizer.get_chat_template()
    )
    try:
        text = tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            date_string=PINNED_DATE.strftime("%d %b %Y"),
        )
    except TemplateError as error:
        raise BoundaryError(f"the chat template refuses the messages: {error}") from None
    assert isinstance(text, str)
    return text


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, position: PromptPosition
) -> list[int]:
    """Tokenise a prompt up to and including the token where its embedding is taken.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        prompt: The turns before the response.
        position: `turn_end`, the last token of the last user turn, as ArmoRM; or
            `generation_prompt`, the last token before the response.
    """
    ids: list[int] = _encode(tokenizer, _prompt_text(tokenizer, prompt, position))["input_ids"]
    return ids


def split_tokens(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    *,
    position: PromptPosition,
) -> SplitTokens:
    """Tokenise a conversation once, without extra special tokens, and split it.

    `SplitTokens.prompt` equals `prompt_tokens` of the prompt alone, so that all responses to one
    prompt share one prompt embedding.

    Raises:
        BoundaryError: If the template does not render the prompt as a prefix of the
            conversation, or if the tokens differ between the two.
    """
    answer = Message(role="assistant", content=conversation.response)
    full = render(tokenizer, (*conversation.prompt, answer), generation_prompt=False)
    head = _prompt_text(tokenizer, conversation.prompt, position)
    if not full.startswith(head):
        raise BoundaryError(
            "the chat template does not render the prompt as a prefix of the conversation; "
            f"they part after {_common(full, head)!r:.80}"
        )
    encoded = _encode(tokenizer, full)
    prompt_ids = _encode(tokenizer, head)["input_ids"]
    inside = sum(1 for _, end in encoded["offset_mapping"] if end <= len(head))
    if encoded["input_ids"][: len(prompt_ids)] != prompt_ids or inside < len(prompt_ids):
        raise BoundaryError(
            "a token straddles the end of the prompt, so it has no embedding of its own; use "
            "the other `prompt_position`"
        )
    return SplitTokens(
        prompt=prompt_ids,
        response=encoded["input_ids"][len(prompt_ids) :],
    )


def _prompt_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, position: PromptPosition
) -> str:
    opened = render(tokenizer, prompt, generation_prompt=True)
    if position == "generation_prompt":
        return opened
    # White space after the end-of-turn token belongs to the next turn.
    closed = render(tokenizer, prompt, generation_prompt=False).rstrip()
    if not opened.startswith(closed):
        raise BoundaryError("the chat template's generation prompt changes the turns before it")
    return closed


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, Any]:
    if not tokenizer.is_fast:
        raise BoundaryError("character offsets need a fast tokenizer")
    # The template has written the special tokens already: adding them would double the BOS.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return {"input_ids": encoded["input_ids"], "offset_mapping": encoded["offset_mapping"]}


def _common(first: str, second: str) -> str:
    length = next(
        (k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    return first[max(0, length - 40) : length]
