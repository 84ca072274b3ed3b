"""Texts become token sequences: what to run, what to pool of it, and what to run only once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from armo.data.conversation import Prompt
from armo.embed.boundary import BoundaryError, ConversationTokenizer, PromptGroup, ResponseTokens
from armo.embed.spec import BackboneError, BackboneSpec

# A prompt is run apart from its responses where that leaves out this share of the tokens: its
# keys and values have to be copied for each response, which costs about a tenth of running them.
WORTH_SHARING = 0.1


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens `start:end` of a sequence, whose hidden states go to the row `target`."""

    target: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One sequence to run, and what to pool of it."""

    ids: list[int]
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """A prompt that is run once, and what follows it in each response, read after it.

    Spans of a tail count from where the tail begins.
    """

    prefix: TokenSequence
    tails: list[TokenSequence]


@dataclass(slots=True)
class Plan:
    """All that has to be run for some groups; targets are their prompts, then their responses.

    Attributes:
        prompts: Number of prompts; the first response is target number `prompts`.
        responses: Number of responses.
        sequences: To be run on their own.
        shared: Prompts to be run once for several responses.
        truncated: Targets whose text was cut to fit.
        missing: Targets that are left out.
    """

    prompts: int
    responses: int
    sequences: list[TokenSequence] = field(default_factory=list)
    shared: list[SharedPrefix] = field(default_factory=list)
    truncated: set[int] = field(default_factory=set)
    missing: set[int] = field(default_factory=set)

    @property
    def targets(self) -> int:
        """Number of embeddings that come out."""
        return self.prompts + self.responses

    @property
    def tokens(self) -> int:
        """Tokens to be run, padding not counted."""
        tails = [tail for group in self.shared for tail in (group.prefix, *group.tails)]
        return sum(len(sequence.ids) for sequence in (*self.sequences, *tails))


class _SkippedError(Exception):
    """A text is too long and is to be left out."""


class TextPlanner:
    """Plans how texts are read by a backbone."""

    def __init__(self, spec: BackboneSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepare the tokenizer.

        Raises:
            BackboneError: If the tokenizer lacks what the spec asks for.
        """
        self.spec = spec
        self.tokenizer = tokenizer
        self.conversations: ConversationTokenizer | None = None
        if tokenizer.chat_template:
            if spec.on_overlong == "windows":
                raise BackboneError("`on_overlong: windows` needs an encoder; this has a template")
            try:
                self.conversations = ConversationTokenizer(tokenizer, position=spec.prompt_position)
            except BoundaryError as error:
                raise BackboneError(f"{spec.id}: {error}") from None
        elif spec.pooling == "last":
            raise BackboneError(f"{spec.id} has no chat template, which `pooling: last` needs")
        elif None in (tokenizer.cls_token_id, tokenizer.sep_token_id):
            raise BackboneError(
                f"{spec.id} has neither a chat template nor the CLS and SEP tokens of an encoder"
            )

    def plan(self, groups: Sequence[PromptGroup], *, causal: bool, share: bool) -> Plan:
        """Plan the run of some prompts and the responses to them.

        Args:
            groups: Prompts with their responses; each distinct prompt once.
            causal: Whether no token reads those after it, so that the prompt's embedding can be
                taken from a run over the whole conversation.
            share: Whether prompts may be run apart from their responses.

        Raises:
            BackboneError: Naming the group and the response that cannot be embedded.
        """
        plan = Plan(prompts=len(groups), responses=sum(len(group.responses) for group in groups))
        if self.conversations is None:
            self._plan_encoder(plan, groups)
        else:
            self._plan_conversations(plan, groups, causal=causal, share=share)
        return plan

    def _plan_conversations(
        self, plan: Plan, groups: Sequence[PromptGroup], *, causal: bool, share: bool
    ) -> None:
        assert self.conversations is not None
        try:
            tokens = self.conversations.tokenise(groups)
        except BoundaryError as error:
            raise _refusal(str(error), error.group, error.response) from None
        target = plan.prompts
        for number, group in enumerate(tokens):
            targets = range(target, target + len(group.responses))
            target = targets.stop
            try:
                prompt = self._fit_prompt(plan, number, group.prompt)
            except _SkippedError:
                plan.missing |= {number, *targets}
                continue
            except BackboneError as error:
                raise _refusal(str(error), number, None) from None
            start = 0 if self.spec.pooling == "mean" else len(prompt) - 1
            prompt_span = Span(number, start, len(prompt))
            rows: list[TokenSequence] = []
            for k, response in enumerate(group.responses):
                try:
                    rows.append(self._conversation_row(plan, targets[k], response))
                except _SkippedError:
                    plan.missing.add(targets[k])
                except BackboneError as error:
                    raise _refusal(str(error), number, k) from None
            _add_group(plan, prompt, prompt_span, rows, causal=causal, share=share)

    def _conversation_row(self, plan: Plan, target: int, tokens: ResponseTokens) -> TokenSequence:
        head = self._fit_prompt(plan, target, tokens.ids[: tokens.prompt_end])
        tail = tokens.ids[tokens.prompt_end :]
        limit = self.spec.max_tokens - len(head)
        if len(tail) > limit:
            self._refuse_overlong("response", len(tail), limit, setting="max_tokens")
            plan.truncated.add(target)
            # What closes a response stays: the last token is to be the same for all.
            closing = min(tokens.closing, limit - 1)
            tail = tail[: limit - closing] + tail[len(tail) - closing :]
        if self.spec.pooling == "mean" and not tail:
            raise BackboneError("the response has no tokens to take the mean of")
        ids = head + tail
        start = len(head) if self.spec.pooling == "mean" else len(ids) - 1
        return TokenSequence(ids, (Span(target, start, len(ids)),))

    def _plan_encoder(self, plan: Plan, groups: Sequence[PromptGroup]) -> None:
        ids = self._plain_ids(
            [_plain_text(group.prompt) for group in groups]
            + [response for group in groups for response in group.responses]
        )
        target = plan.prompts
        for number, group in enumerate(groups):
            targets = range(target, target + len(group.responses))
            target = targets.stop
            try:
                parts = self._prompt_parts(plan, number, ids[number])
                context = self._fit_prompt(plan, number, ids[number], quietly=True)
            except _SkippedError:
                plan.missing |= {number, *targets}
                continue
            except BackboneError as error:
                raise _refusal(str(error), number, None) from None
            for part in parts:
                row = [self._cls, *part, self._sep]
                plan.sequences.append(TokenSequence(row, (Span(number, 0, len(row)),)))
            for k, response in enumerate(targets):
                if len(context) < len(ids[number]):
                    plan.truncated.add(response)
                try:
                    parts = self._response_parts(plan, response, ids[response], len(context))
                except _SkippedError:
                    plan.missing.add(response)
                    continue
                except BackboneError as error:
                    raise _refusal(str(error), number, k) from None
                for part in parts:
                    row = [self._cls, *context, self._sep, *part, self._sep]
                    span = Span(response, len(context) + 2, len(row))
                    plan.sequences.append(TokenSequence(row, (span,)))

    def _prompt_parts(self, plan: Plan, target: int, ids: list[int]) -> list[list[int]]:
        if self.spec.on_overlong == "windows":
            return _windows(ids, self.spec.max_tokens - 2)
        return [self._fit_prompt(plan, target, ids)]

    def _response_parts(
        self, plan: Plan, target: int, ids: list[int], context: int
    ) -> list[list[int]]:
        limit = self.spec.max_tokens - context - 3
        if self.spec.on_overlong == "windows":
            return _windows(ids, limit)
        if len(ids) > limit:
            self._refuse_overlong("response", len(ids), limit, setting="max_tokens")
            plan.truncated.add(target)
        return [ids[:limit]]

    def _fit_prompt(
        self, plan: Plan, target: int, ids: list[int], *, quietly: bool = False
    ) -> list[int]:
        """Keep both ends: a long prompt names its task first or last, seldom in the middle."""
        limit = self.spec.max_prompt_tokens
        if len(ids) <= limit:
            return ids
        self._refuse_overlong("prompt", len(ids), limit, setting="max_prompt_tokens")
        if not quietly:
            plan.truncated.add(target)
        return [*ids[: limit // 2], *ids[len(ids) - (limit - limit // 2) :]]

    def _refuse_overlong(self, part: str, length: int, limit: int, *, setting: str) -> None:
        if self.spec.on_overlong == "skip":
            raise _SkippedError
        if self.spec.on_overlong == "error":
            raise BackboneError(
                f"the {part} has {length} tokens, {limit} fit; raise `{setting}` or set "
                f"`on_overlong` to truncate or skip"
            )

    def _plain_ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids

    @property
    def _cls(self) -> int:
        return int(self.tokenizer.cls_token_id)

    @property
    def _sep(self) -> int:
        return int(self.tokenizer.sep_token_id)


def _add_group(
    plan: Plan,
    prompt: list[int],
    prompt_span: Span,
    rows: list[TokenSequence],
    *,
    causal: bool,
    share: bool,
) -> None:
    """Add the rows of one prompt, sharing what they have in common where it saves work."""
    # A token across the boundary can end the common part early; such a row runs on its own.
    after = [row.ids[: len(prompt)] == prompt and len(row.ids) > len(prompt) for row in rows]
    together = [row for row, fits in zip(rows, after, strict=True) if fits]
    alone = [row for row, fits in zip(rows, after, strict=True) if not fits]
    saved = (len(together) - 1) * len(prompt)
    if share and causal and saved > WORTH_SHARING * sum(len(row.ids) for row in together):
        tails = [
            TokenSequence(
                row.ids[len(prompt) :],
                tuple(
                    Span(span.target, span.start - len(prompt), span.end - len(prompt))
                    for span in row.spans
                ),
            )
            for row in together
        ]
        plan.shared.append(SharedPrefix(TokenSequence(prompt, (prompt_span,)), tails))
        plan.sequences += alone
    elif causal and together:
        first = together[0]
        plan.sequences.append(TokenSequence(first.ids, (prompt_span, *first.spans)))
        plan.sequences += together[1:] + alone
    else:
        plan.sequences.append(TokenSequence(prompt, (prompt_span,)))
        plan.sequences += rows


def _windows(ids: list[int], limit: int) -> list[list[int]]:
    """Cut a text into as few parts as fit, of nearly equal length."""
    count = max(1, -(-len(ids) // limit))
    edges = [len(ids) * k // count for k in range(count + 1)]
    return [ids[start:end] for start, end in pairwise(edges)]


def _plain_text(prompt: Prompt) -> str:
    return "\n\n".join(message.content for message in prompt)


def _refusal(message: str, group: int | None, response: int | None) -> BackboneError:
    error = BackboneError(message)
    error.group, error.response = group, response
    return error
