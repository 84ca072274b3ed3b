"""What trainers hand to reward functions: prompts and completions, as conversations."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from armo.data.conversation import Conversation, Message

Turns = str | Sequence[Mapping[str, Any]]
"""The text of one user turn or one response, or chat messages."""


def parse_completion(prompt: Turns, completion: Turns) -> Conversation | None:
    """Join a prompt of the data and a completion of the policy to a conversation.

    The response is all that the assistant wrote: the texts of its messages, joined by blank lines,
    after the words that a last assistant turn of the prompt begins it with. What tools answered in
    between is not the policy's and is left out, so that gating weights depend on the data alone.

    Args:
        prompt: Text of one user turn, or messages. Contents are text, None, or blocks of text.
        completion: Text, or messages.

    Returns:
        None if the policy wrote nothing that has a score: no text, or half of a surrogate pair.

    Raises:
        ValueError: If the prompt is none that can be answered, or either has another form.
    """
    turns = _parse_prompt(prompt)
    begun = turns.pop().content if turns and turns[-1].role == "assistant" else ""
    Conversation(tuple(turns), "any")  # refuses the prompt, if that is wrong
    response = _parse_response(completion)
    try:
        return Conversation(tuple(turns), begun + response)
    except ValueError:
        return None


def shared_length(prompt: str, text: str) -> int:
    """Count the last characters of a prompt that a text begins with: all, if it was not cut.

    Trainers cut prompts that are too long from the left. Takes time in proportion to the lengths,
    whatever they hold.

    References:
        Knuth, Morris and Pratt, "Fast Pattern Matching in Strings", SIAM J. Comput. 6(2), 1977.

    Example:
        >>> shared_length("Is honey safe?", "safe? Yes.")
        5
    """
    if text.startswith(prompt):
        return len(prompt)
    text = text[: len(prompt)]
    # By how much of the text was found: how much of it still is where the next character differs.
    shorter = [0]

    def go_on(found: int, character: str) -> int:
        while found and (found == len(text) or text[found] != character):
            found = shorter[found - 1]
        return found + (text[found] == character)

    for character in text[1:]:
        shorter.append(go_on(shorter[-1], character))
    found = 0
    for character in prompt if text else "":
        found = go_on(found, character)
    return found


def load_tokenizer(place: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer, running no code of its own.

    Args:
        place: Folder or hub id.
        revision: On the hub.

    Raises:
        ValueError: If there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer at {place}, and the hub could not give one of that name "
            f"({type(error).__name__})"
        ) from error
    return tokenizer


class ControlText:
    """Finds the control text of a tokenizer in responses, and takes its effect."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Look for the special tokens of this tokenizer."""
        added = tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special} | {
            *tokenizer.all_special_tokens
        }
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        spelled = "|".join(re.escape(token) for token in longest_first)
        # One character, where a token begins: tokens may overlap.
        self._begins = re.compile(f"(?={spelled})(.)", re.DOTALL) if spelled else None
        # Of a text written backwards: from its end on, however many tokens it has elsewhere.
        backwards = "|".join(re.escape(token[::-1]) for token in longest_first)
        self._end = re.compile(rf"(?:\s*+(?:{backwards}))+") if backwards else None

    def disarm(self, text: str) -> str:
        """Put a space behind the first character of each special token that a text spells.

        The tokenizer reads what is left as plain words, so a response cannot end its own turn.
        """
        return self._begins.sub(r"\1 ", text) if self._begins else text

    def without_end(self, text: str) -> str:
        """Take off the special tokens that a text ends with, as a generation does.

        White space behind them goes too, as a template writes it between turns.
        """
        ended = self._end.match(text[::-1]) if self._end else None
        return text[: len(text) - ended.end()] if ended else text


def _parse_prompt(prompt: Turns) -> list[Message]:
    if isinstance(prompt, str):
        return [Message("user", prompt)]
    turns = []
    for k, message in enumerate(prompt):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"message {k} needs `role` and `content`, got {message!r:.80}")
        if other := [kind for kind, _ in _blocks(message) if kind != "text"]:
            raise ValueError(f"message {k} has a block of {other[0]}; this model reads text alone")
        turns.append(Message(message["role"], _text(message)))
    return turns


def _parse_response(completion: Turns) -> str:
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping) or not all(isinstance(m, Mapping) for m in completion):
        raise ValueError(f"a completion must be text or a list of messages, got {completion!r:.80}")
    texts = [_text(message) for message in completion if message.get("role") == "assistant"]
    return "\n\n".join(text for text in texts if text.strip())


def _text(message: Mapping[str, Any]) -> str:
    return "".join(text for kind, text in _blocks(message) if kind == "text")


def _blocks(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Kind and text of each block; a message that only calls tools has none."""
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [("text", content)]
    if not all(isinstance(block, Mapping) for block in content):
        raise ValueError(f"`content` must be text or a list of blocks, got {content!r:.80}")
    return [(str(block.get("type")), str(block.get("text") or "")) for block in content]
