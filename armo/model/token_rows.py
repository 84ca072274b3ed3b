"""Token ids become prompts and responses again, for callers who have nothing else.

A conversation's ids are decoded, and the prompt's end is found in the text, where the template
opens the last response. The text is tokenised again, as it is for `score`, so that both give the
same embeddings; ids that are not how the tokenizer writes their text are refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from armo.data.conversation import Message, Prompt
from armo.embed.boundary import (
    PROBE,
    BoundaryError,
    ConversationTokenizer,
    GroupTokens,
    Opening,
    PromptGroup,
    cut,
    split,
)
from armo.embed.plan import Plan, TextPlanner

# Prompts that end in different words, to see what a template writes around any of them.
ENDS = ("one", "and two?", "3")


class TokenRowError(ValueError):
    """Token ids do not say where their prompt ends; the message names the row."""


@dataclass(frozen=True, slots=True)
class Marks:
    """What a chat template writes where a response begins and ends, whatever the prompt.

    Attributes:
        opening: The words that open a response, shared by all responses.
        back: From their end back to the prompt's end, in characters.
        ending: What the prompt alone has after that.
        lead: What comes before the text of a response that has no think block.
        closing: What comes after it.
    """

    opening: str
    back: int
    ending: str
    lead: str
    closing: str


class TokenReader:
    """Reads rows of token ids as the backbone's planner reads text."""

    def __init__(self, planner: TextPlanner) -> None:
        """Read rows for this planner."""
        self._planner = planner
        self._tokenizer: PreTrainedTokenizerBase = planner.tokenizer

    def plan(self, rows: Sequence[list[int]], *, causal: bool) -> tuple[Plan, list[str] | None]:
        """Plan the run of rows without padding; each has a prompt and a response of its own.

        Returns:
            The plan, and the texts of the responses where the ids say what those are.

        Raises:
            TokenRowError: Naming the row whose ids do not say where its prompt ends.
            BackboneError: If a row is too long and `on_overlong` is `error`.
        """
        if self._planner.conversations is None:
            pairs = [self._pair(number, row) for number, row in enumerate(rows)]
            prompts, responses = [p for p, _ in pairs], [[r] for _, r in pairs]
            return self._planner.plan_texts(prompts, responses), None
        tokens, texts = self._conversations(rows, self._planner.conversations)
        return self._planner.plan_conversations(tokens, causal=causal, share=False), texts

    def _pair(self, number: int, row: list[int]) -> tuple[list[int], list[int]]:
        """Take `[CLS] prompt [SEP] response [SEP]` apart; either end may be there twice."""
        cls, sep = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        if row[:2] == [cls, cls]:  # the tokenizer's own beside the chat template's
            row = row[1:]
        if row[-2:] == [sep, sep] and row.count(sep) > 2:  # not around an empty response
            row = row[:-1]
        ends = [k for k, token in enumerate(row) if token == sep]
        if len(ends) != 2 or row[0] != cls or ends[1] != len(row) - 1 or not 1 < ends[0] < ends[1]:
            raise TokenRowError(
                f"row {number} is not `[CLS] prompt [SEP] response [SEP]`: it has {len(ends)} "
                f"separators. Make it from a pair, `tokenizer(prompt, response)`, or from the "
                f"chat template of the tokenizer in the model folder; `score` takes any text"
            )
        prompt, response = row[1 : ends[0]], row[ends[0] + 1 : -1]
        if not response:
            raise TokenRowError(f"row {number} has no response between its separators")
        return prompt, response

    def _conversations(
        self, rows: Sequence[list[int]], conversations: ConversationTokenizer
    ) -> tuple[list[GroupTokens], list[str]]:
        marks = self.marks
        rows = [self._without_doubles(row) for row in rows]
        texts = [
            str(
                self._tokenizer.decode(
                    row, skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
            )
            for row in rows
        ]
        groups, responses = [], []
        starts = []
        for number, text in enumerate(texts):
            try:
                starts.append(self._start(text, marks))
            except TokenRowError as error:
                raise TokenRowError(f"row {number}: {error}") from None
        for number, (group, response) in enumerate(self._split(texts, starts, conversations)):
            if group.responses[0].ids != rows[number]:
                raise TokenRowError(
                    f"row {number}: its ids are not how the tokenizer writes their text; tokenise "
                    f"the text that the chat template renders, whole and without special tokens"
                )
            groups.append(group)
            responses.append(response)
        return groups, responses

    def _split(
        self, texts: list[str], starts: list[int], conversations: ConversationTokenizer
    ) -> Iterator[tuple[GroupTokens, str]]:
        """Yield tokens, and the text of the response, of texts whose responses start there."""
        marks = self.marks
        heads = [start - marks.back for start in starts]
        if self._planner.spec.prompt_position == "turn_end":
            # White space after the end of a turn belongs to the next one.
            heads = [len(t[:head].rstrip()) for t, head in zip(texts, heads, strict=True)]
        again = conversations.encode(
            texts + [t[:head] + marks.ending for t, head in zip(texts, heads, strict=True)]
        )
        for number, (text, start, head) in enumerate(zip(texts, starts, heads, strict=True)):
            prompt = cut(again[len(texts) + number], head)
            tokens = split(again[number], text, prompt, head=head, closing=marks.closing)
            body = text[start - _begun(marks.opening) : len(text) - len(marks.closing)]
            yield GroupTokens(prompt, [tokens]), body.removeprefix(marks.lead)

    def _without_doubles(self, row: list[int]) -> list[int]:
        """Drop what the tokenizer adds to a text in which the template has written it already."""
        before, first, after, last = self._added
        n = len(before)
        if n and row[:n] == before and row[n : n + len(first)] == first:
            row = row[n:]
        n = len(after)
        if n and row[-n:] == after and row[: len(row) - n][-len(last) :] == last:
            row = row[: len(row) - n]
        return row

    def take_apart(self, text: str, *, prompt: str | None = None) -> tuple[str, str]:
        """Part the text of a conversation, as the chat template renders it, before its response.

        A response that was cut, as by a limit on new tokens, need not be closed. For an encoder the
        text is `[CLS] prompt [SEP] response [SEP]`, as the tokenizer in the model folder writes it.

        Args:
            text: Rendered text; the tokenizer's own beginning may be there twice or not at all.
            prompt: What it begins with, up to the response; if None, the response is what follows
                the last place where the template opens one. Then a response that writes the
                template's own control text begins there.

        Returns:
            Up to the response, and the response without what closes it.

        Raises:
            TokenRowError: If the text does not say where its response begins.
        """
        if self._planner.conversations is None:
            cls, sep = str(self._tokenizer.cls_token), str(self._tokenizer.sep_token)
            parts = text.strip().removeprefix(cls).removesuffix(sep).split(sep)
            if len(parts) != 2:
                raise TokenRowError(
                    f"it is not `{cls} prompt {sep} response {sep}`, as the chat template of the "
                    f"tokenizer in the model folder writes it: it has {len(parts) - 1} separators"
                )
            return parts[0].strip(), parts[1].strip()
        marks = self.marks
        text = self._begun_once(text)
        end = len(text) if prompt is None else len(self._begun_once(prompt))
        if prompt is not None and text[:end] != self._begun_once(prompt):
            raise TokenRowError("it does not begin with its prompt")
        start = self._opened(text[:end], marks)
        if (
            prompt is not None
            and marks.closing.strip()
            and marks.closing.strip() in text[start:end]
        ):
            raise TokenRowError("its prompt does not end where a response begins")
        whole = max(k for k in range(len(marks.closing) + 1) if text.endswith(marks.closing[:k]))
        return text[:start], text[start : max(start, len(text) - whole)]

    def read(self, head: str, body: str) -> tuple[GroupTokens, str]:
        """Tokenise the two parts of a conversation, and say what the text of the response is.

        Args:
            head: As from `take_apart`.
            body: The response, without what closes it.
        """
        conversations = self._planner.conversations
        if conversations is None:
            group = PromptGroup((Message("user", head),), [body])
            return self._planner.tokenise([group])[0], body
        return next(self._split([head + body + self.marks.closing], [len(head)], conversations))

    def _begun_once(self, text: str) -> str:
        """Let a text begin as the template begins one, though a tokenizer added to it or took."""
        bos = self._tokenizer.bos_token
        if not bos:
            return text
        conversations = self._planner.conversations
        assert conversations is not None
        while text.startswith(bos):
            text = text.removeprefix(bos)
        return bos + text if conversations.open(_probes()[0]).text.startswith(bos) else text

    def _start(self, text: str, marks: Marks) -> int:
        start = self._opened(text, marks)
        if not text.endswith(marks.closing, start):
            raise TokenRowError(
                f"it does not end as the chat template ends a response, in {marks.closing!r}: was "
                f"it cut, or is the generation prompt its end? Give it whole; what is too long is "
                f"cut by the model's own rule"
            )
        return start

    @staticmethod
    def _opened(text: str, marks: Marks) -> int:
        """Find where the last response begins."""
        place = text.rfind(marks.opening)
        start = place + len(marks.opening)
        if place < 0 or start - marks.back < 0:
            raise TokenRowError(
                f"no response begins in it, as the chat template would by {marks.opening!r}; "
                f"render the whole conversation by the chat template"
            )
        return start

    @cached_property
    def marks(self) -> Marks:
        """What the chat template writes around a response.

        Raises:
            TokenRowError: If that differs between prompts, or is plain words that any text may
                have. `score` reads such templates all the same.
        """
        conversations = self._planner.conversations
        assert conversations is not None
        opened = ConversationTokenizer(self._tokenizer, position="generation_prompt")
        found: list[tuple[Opening, Opening, str]] = []
        for prompt in _probes():
            try:
                own, last = conversations.open(prompt), opened.open(prompt)
                text = conversations.join(own, PROBE)
            except BoundaryError:
                continue  # a template without system or tool turns
            found.append((own, last, text))
        heads = [last.head for _, last, _ in found]
        shared = _common_end(heads)
        marks = {
            Marks(
                opening=shared,
                back=len(last.head) - len(own.head),
                ending=own.text[len(own.head) :],
                lead=text[len(last.head) - _begun(shared) : len(text) - len(PROBE + own.closing)],
                closing=own.closing,
            )
            for own, last, text in found
        }
        if len(marks) != 1 or any(not last.head.startswith(own.head) for own, last, _ in found):
            raise TokenRowError(
                "this chat template opens responses in several ways, so that token ids do not say "
                "where a prompt ends; use `score`"
            )
        added = [token.content for token in self._tokenizer.added_tokens_decoder.values()]
        if not any(token in shared for token in added):
            raise TokenRowError(
                f"this chat template opens a response in plain words, {shared!r}, which any text "
                f"may have, so that token ids do not say where a prompt ends; use `score`"
            )
        return marks.pop()

    @cached_property
    def _added(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Special tokens that the tokenizer adds around a text, and the template's own there."""
        bare, full = [
            self._tokenizer(PROBE, add_special_tokens=added)["input_ids"] for added in (False, True)
        ]
        starts = [k for k in range(len(full)) if full[k : k + len(bare)] == bare]
        conversations = self._planner.conversations
        assert conversations is not None
        if not starts or len(full) == len(bare):
            return [], [], [], []
        opening = conversations.open(_probes()[0])
        whole = conversations.encode([conversations.join(opening, PROBE)])[0].ids
        return full[: starts[0]], whole[:1], full[starts[0] + len(bare) :], whole[-1:]


def _probes() -> list[Prompt]:
    """Prompts of each shape that a template may treat in its own way."""
    user = [Message("user", end) for end in ENDS]
    answer = Message("assistant", "Yes.")
    return [
        *((turn,) for turn in user),
        (user[0], answer, user[1]),
        (Message("system", "Be kind."), user[2]),
        (user[0], answer, Message("tool", "Done,")),
    ]


def _begun(opening: str) -> int:
    """Characters of a think tag that all responses share, as other tags begin alike."""
    tail = opening[opening.rfind("<") :] if "<" in opening else ""
    whole = tail.startswith("<think>") and not tail.removeprefix("<think>").strip()
    return len(tail) if whole or "<think>".startswith(tail) else 0


def _common_end(texts: Sequence[str]) -> str:
    first = texts[0]
    length = 0
    while length < len(first) and all(
        len(text) > length and text[-1 - length] == first[-1 - length] for text in texts
    ):
        length += 1
    return first[len(first) - length :]
