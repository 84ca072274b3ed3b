"""Where the prompt ends in a templated conversation, from the chat template itself.

The end is found in the *text* that the template renders, and carried over to tokens. Token-id
patterns are never searched for: a user may write a template's control text, and then a pattern
finds the wrong place.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import dropwhile, takewhile
from typing import Literal

from jinja2 import TemplateError
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from armo.data.conversation import Message, Prompt

PromptPosition = Literal["turn_end", "generation_prompt"]

# Some templates print today's date, which would change every embedding from day to day.
PINNED_DATE = datetime(2024, 7, 26)
_STRFTIME_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

# A word that stands in for a turn's text, to see what a template does with it. It has no white
# space to trim and nothing to escape.
PROBE = "armoprobe"

# What a template begins with that is to refuse some turns, rather than leave them out.
_REFUSE = (
    "{{% for m in {turns} if m['role'] == '{role}' %}}"
    "{{{{ raise_exception('{reason}') }}}}{{% endfor %}}"
)
_LEFT_OUT = "the chat template leaves out a system or tool turn"


class BoundaryError(ValueError):
    """The end of the prompt cannot be located in a templated conversation.

    Attributes:
        group: Number of the prompt in the call.
        response: Number of the response to it; None if the prompt itself is refused.
    """

    group: int | None = None
    response: int | None = None


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """A prompt and the responses to it, of which there may be none."""

    prompt: Prompt
    responses: Sequence[str]

    def __post_init__(self) -> None:
        if isinstance(self.responses, str):
            raise TypeError("`responses` is a list of texts; for a single one, pass `[text]`")
        object.__setattr__(self, "responses", tuple(self.responses))


@dataclass(frozen=True, slots=True)
class ResponseTokens:
    """A conversation's tokens, and which of them are not the response's.

    Attributes:
        ids: The whole conversation, tokenised once.
        prompt_end: Leading tokens that are also the prompt's own, `GroupTokens.prompt`. It lacks
            the last ones where a token spans the end of the prompt and the start of the response.
        closing: Trailing tokens that the template writes after the response's text.
    """

    ids: list[int]
    prompt_end: int
    closing: int


@dataclass(frozen=True, slots=True)
class GroupTokens:
    """The tokens of a prompt and of the conversations that it begins.

    Attributes:
        prompt: The prompt alone, up to and including the token where its embedding is taken.
        responses: One conversation per response.
    """

    prompt: list[int]
    responses: list[ResponseTokens]


@dataclass(frozen=True, slots=True)
class Opening:
    """What the template makes of a prompt.

    Attributes:
        turns: The prompt's turns as the template takes them.
        text: The prompt alone, rendered.
        head: The leading part of `text` with which every conversation begins.
        closing: What the template writes after a response.
    """

    turns: list[Message]
    text: str
    head: str
    closing: str


class ConversationTokenizer:
    """Turns prompts and responses into tokens, and finds where each prompt ends.

    A prompt's tokens come from the prompt alone, so they cannot differ between the responses to
    it. System text goes into the first user turn where the template has no system turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, position: PromptPosition) -> None:
        """Look at what the chat template does with system turns.

        Args:
            tokenizer: A fast tokenizer with a chat template.
            position: Where a prompt ends: `turn_end`, with the last turn before the response, as
                ArmoRM; or `generation_prompt`, with the words that open a response, as far as all
                responses share them: some templates open a think block that not all have.

        Raises:
            BoundaryError: If the tokenizer is a slow one or has no chat template, or one whose date
                cannot be pinned.
        """
        if not tokenizer.is_fast:
            raise BoundaryError("character offsets need a fast tokenizer")
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            raise BoundaryError("the tokenizer has no chat template, or no default one") from None
        self._template = _STRFTIME_NOW.sub(
            lambda found: repr(PINNED_DATE.strftime(found[2])), template
        )
        if "strftime_now(" in self._template:
            raise BoundaryError("the chat template prints today's date in a way that is not known")
        self._tokenizer = tokenizer
        self._position = position
        self._takes_system = self._shows_system()

    @property
    def template(self) -> str:
        """The chat template with its dates pinned, for others to render the same text with.

        Where system text has to be folded into a user turn, which a template cannot do for all,
        it refuses that text instead; and tool or later system turns that it would leave out.
        """
        before = ""
        if "date_string" in self._template:
            before += f"{{% set date_string = '{PINNED_DATE:%d %b %Y}' %}}"
        if not self._takes_system:
            reason = "give system text to `score`"
            before += _REFUSE.format(turns="messages", role="system", reason=reason)
        elif self._leaves_out("system"):
            before += _REFUSE.format(turns="messages[1:]", role="system", reason=_LEFT_OUT)
        if self._leaves_out("tool"):
            before += _REFUSE.format(turns="messages", role="tool", reason=_LEFT_OUT)
        # A line of its own, which is not rendered: templates are trimmed by lines.
        return f"{before}\n{self._template}" if before else self._template

    def tokenise(self, groups: Sequence[PromptGroup]) -> list[GroupTokens]:
        """Tokenise prompts and the conversations that they begin, all in one batch.

        No special tokens are added: the template has written them already. A prompt that several
        groups share is rendered and tokenised once.

        Raises:
            BoundaryError: If the template refuses a prompt or a response, leaves one out, or does
                not begin the conversation with the prompt. It carries their numbers.
        """
        openings: dict[Prompt, Opening] = {}
        conversations: list[str] = []
        for number, group in enumerate(groups):
            if group.prompt not in openings:
                with _numbered(number):
                    openings[group.prompt] = self.open(group.prompt)
            for k, response in enumerate(group.responses):
                with _numbered(number, k):
                    conversations.append(self.join(openings[group.prompt], response))
        heads = [opening.text for opening in openings.values()]
        encodings = iter(self.encode([*heads, *conversations]))
        texts = iter(conversations)
        prompts = {
            prompt: cut(next(encodings), len(opening.head)) for prompt, opening in openings.items()
        }
        tokens = []
        for group in groups:
            opening, prompt = openings[group.prompt], prompts[group.prompt]
            responses = [
                split(
                    next(encodings),
                    next(texts),
                    prompt,
                    head=len(opening.head),
                    closing=opening.closing,
                )
                for _ in group.responses
            ]
            tokens.append(GroupTokens(list(prompt), responses))
        return tokens

    def open(self, prompt: Prompt) -> Opening:
        """Render a prompt, and see what the template writes around a response to it.

        Raises:
            BoundaryError: If the template refuses the prompt or leaves out a response.
        """
        turns = list(prompt) if self._takes_system else _fold_system(prompt)
        # White space after the end of a turn belongs to the next one.
        closed = self._render(turns).rstrip()
        start, found, closing = self._render([*turns, _answer(PROBE)]).rpartition(PROBE)
        if not found:
            raise BoundaryError("the chat template leaves out the response")
        self._check_shown(turns)
        if not start.startswith(closed):
            # Phi-3's template ends in an end of text wherever it opens no response.
            closed = closed.removesuffix(self._tokenizer.eos_token or "").rstrip()
        _check_prefix(closed, start)
        if self._position == "turn_end":
            return Opening(turns, closed, closed, closing)
        opened = self._render(turns, generation_prompt=True)
        # Templates differ in what they write before an answer with and without thinking.
        thinking = self._render([*turns, _answer(f"<think>\n{PROBE}\n</think>\n\n{PROBE}")])
        _check_prefix(closed, opened)
        _check_prefix(closed, thinking)
        rest = [text[len(closed) :] for text in (opened, start, thinking)]
        shared = len(closed) + min(_shared(rest[0], rest[1]), _shared(rest[0], rest[2]))
        return Opening(turns, opened, opened[:shared], closing)

    def join(self, opening: Opening, response: str) -> str:
        """Render the conversation of a prompt and a response.

        Raises:
            BoundaryError: If the template refuses it or does not begin it with the prompt.
        """
        conversation = self._render([*opening.turns, _answer(response)])
        _check_prefix(opening.head, conversation)
        return conversation

    def _render(self, turns: Sequence[Message], *, generation_prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.content} for turn in turns],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                date_string=PINNED_DATE.strftime("%d %b %Y"),
            )
        except (TemplateError, TypeError) as error:
            raise BoundaryError(f"the chat template refuses the messages: {error}") from None
        assert isinstance(text, str)
        return text

    def _shows_system(self) -> bool:
        """Whether system text stays, both in a prompt and before a response to it.

        Mistral's later templates write it only while the last turn is the user's.
        """
        turns = [Message("system", PROBE), Message("user", "Hello.")]
        try:
            return PROBE in self._render(turns, generation_prompt=True) and (
                PROBE in self._render([*turns, _answer("Hello.")])
            )
        except BoundaryError:
            return False

    def _leaves_out(self, role: Literal["system", "tool"]) -> bool:
        """Whether the template passes over a turn of this kind after an answer, without a word."""
        turns = [Message("user", "Hello."), _answer("Hello."), Message(role, PROBE)]
        if role == "system":
            turns.append(Message("user", "Hello."))
        try:
            return PROBE not in self._render([*turns, _answer("Hello.")])
        except BoundaryError:
            return False

    def _check_shown(self, turns: Sequence[Message]) -> None:
        """Refuse a prompt whose tool or later system turns the template passes over."""
        optional = ("system", "tool")
        count = sum(turn.role in optional for turn in turns)
        if not any(turn.role in optional for turn in turns[1:]):
            return
        marked = [replace(t, content=PROBE) if t.role in optional else t for t in turns]
        if self._render([*marked, _answer("Hello.")]).count(PROBE) < count:
            raise BoundaryError(_LEFT_OUT)

    def encode(self, texts: list[str]) -> list[Encoding]:
        """Tokenise rendered texts; no special tokens are added."""
        if not texts:
            return []
        # Not verbose: what is too long for the model is cut by the caller.
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)
        encodings: list[Encoding] | None = encoded.encodings
        assert encodings is not None
        return encodings


@contextmanager
def _numbered(group: int, response: int | None = None) -> Iterator[None]:
    try:
        yield
    except BoundaryError as error:
        error.group, error.response = group, response
        raise


def _answer(text: str) -> Message:
    return Message("assistant", text)


def _fold_system(prompt: Prompt) -> list[Message]:
    """Put the leading system text at the start of the first user turn."""
    turns = list(dropwhile(lambda turn: turn.role == "system", prompt))
    system = [turn.content for turn in prompt[: len(prompt) - len(turns)] if turn.content.strip()]
    first = next((k for k, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise BoundaryError("the prompt has no user turn")
    turns[first] = replace(turns[first], content="\n\n".join([*system, turns[first].content]))
    return turns


def _check_prefix(prompt: str, conversation: str) -> None:
    if not conversation.startswith(prompt):
        length = _shared(prompt, conversation)
        raise BoundaryError(
            "the chat template does not render the prompt as a prefix of the conversation; they "
            f"part after {prompt[max(0, length - 40) : length]!r}"
        )


def _shared(first: Sequence[object], second: Sequence[object]) -> int:
    """Count the leading items that are equal."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(first), len(second)))


def cut(encoding: Encoding, end: int) -> list[int]:
    """Keep the tokens that end at a character or before."""
    return encoding.ids[: len(encoding) - _trailing(encoding, lambda _, stop: stop > end)]


def split(
    encoding: Encoding, text: str, prompt: list[int], *, head: int, closing: str
) -> ResponseTokens:
    """Tell a conversation's tokens apart, given the length of its head and its closing words."""
    closed = text.endswith(closing, head)
    start = len(text) - len(closing) if closed else len(text)
    ids = encoding.ids
    # Equal ids, not equal text: a token across the boundary may change the ones before it.
    shared = len(prompt) if ids[: len(prompt)] == prompt else _shared(ids, prompt)
    return ResponseTokens(ids, shared, _trailing(encoding, lambda first, _: first >= start))


def _trailing(encoding: Encoding, holds: Callable[[int, int], bool]) -> int:
    """Count the last tokens whose character offsets, start and end, all hold."""
    offsets = (encoding.token_to_chars(k) for k in reversed(range(len(encoding))))
    return sum(1 for _ in takewhile(lambda span: span is not None and holds(*span), offsets))
