"""Texts become token sequences: what to run, what to pool of it, and what to run only once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from armo.data.conversation import Prompt
from armo.embed.boundary import (
    BoundaryError,
    ConversationTokenizer,
    GroupTokens,
    PromptGroup,
    ResponseTokens,
)
from armo.embed.spec import BackboneError, BackboneSpec

# A prompt is run apart from its responses where that leaves out this share of the tokens, to pay
# for copying its keys and values for each response.
WORTH_SHARING = 0.02


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
    """What responses have in common, run once, and what follows it in each, read after it.

    That is the prompt, or most of it where its last token goes on into the response: then the end
    of the prompt is one of the tails.

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
        return self.plan_tokens(self.tokenise(groups), causal=causal, share=share)

    def tokenise(self, groups: Sequence[PromptGroup]) -> list[GroupTokens]:
        """Tokenise prompts and the responses to them, not yet cut to what fits.

        For an encoder, a response has tokens of its own, which `ResponseTokens.ids` holds alone.

        Raises:
            BackboneError: Naming the group and the response that the chat template refuses.
        """
        if self.conversations is None:
            ids = self._plain_ids(
                [_plain_text(group.prompt) for group in groups]
                + [response for group in groups for response in group.responses]
            )
            responses = iter(ids[len(groups) :])
            return [
                GroupTokens(prompt, [ResponseTokens(next(responses), 0, 0) for _ in own.responses])
                for prompt, own in zip(ids, groups, strict=False)
            ]
        try:
            return self.conversations.tokenise(groups)
        except BoundaryError as error:
            raise _refusal(str(error), error.group, error.response) from None

    def plan_tokens(self, tokens: Sequence[GroupTokens], *, causal: bool, share: bool) -> Plan:
        """Plan the run of what `tokenise` gave; the same arguments and errors as for `plan`."""
        if self.conversations is not None:
            return self.plan_conversations(tokens, causal=causal, share=share)
        return self.plan_texts(
            [group.prompt for group in tokens],
            [[response.ids for response in group.responses] for group in tokens],
        )

    def plan_conversations(
        self, tokens: Sequence[GroupTokens], *, causal: bool, share: bool
    ) -> Plan:
        """Plan the run of conversations that are tokens already.

        Args:
            tokens: Prompts and the conversations that they begin.
            causal: As for `plan`.
            share: As for `plan`.

        Raises:
            BackboneError: Naming the group and the response that cannot be embedded.
        """
        plan = Plan(prompts=len(tokens), responses=sum(len(group.responses) for group in tokens))
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
        return plan

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

    def plan_texts(
        self, prompts: Sequence[list[int]], responses: Sequence[Sequence[list[int]]]
    ) -> Plan:
        """Plan the run of an encoder over texts that are tokens already.

        Args:
            prompts: Tokens of each prompt, without special ones.
            responses: Tokens of the responses to each.

        Raises:
            BackboneError: Naming the group and the response that cannot be embedded.
        """
        plan = Plan(prompts=len(prompts), responses=sum(len(texts) for texts in responses))
        target = plan.prompts
        for number, (prompt, texts) in enumerate(zip(prompts, responses, strict=True)):
            targets = range(target, target + len(texts))
            target = targets.stop
            try:
                parts = self._prompt_parts(plan, number, prompt)
                context = self._fit_prompt(plan, number, prompt, quietly=True)
            except _SkippedError:
                plan.missing |= {number, *targets}
                continue
            except BackboneError as error:
                raise _refusal(str(error), number, None) from None
            for part in parts:
                row = [self._cls, *part, self._sep]
                plan.sequences.append(TokenSequence(row, (Span(number, 0, len(row)),)))
            for k, response in enumerate(targets):
                if len(context) < len(prompt):
                    plan.truncated.add(response)
                try:
                    parts = self._response_parts(plan, response, texts[k], len(context))
                except _SkippedError:
                    plan.missing.add(response)
                    continue
                except BackboneError as error:
                    raise _refusal(str(error), number, k) from None
                for part in parts:
                    row = [self._cls, *context, self._sep, *part, self._sep]
                    span = Span(response, len(context) + 2, len(row))
                    plan.sequences.append(TokenSequence(row, (span,)))
        return plan

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
    whole = TokenSequence(prompt, (prompt_span,))
    common = [_common_length(row.ids, prompt) for row in rows]
    if share and causal:
        # Nearly always all of the prompt; less where its last token goes on into the response.
        length, saved = max(
            ((n, _saved(n, common, len(prompt))) for n in {0, *common}), key=lambda best: best[1]
        )
        together = [row for row, n in zip(rows, common, strict=True) if n >= length]
        if saved > WORTH_SHARING * sum(len(row.ids) for row in together):
            joined = [whole] if length < len(prompt) else []
            spans = [span for row in (whole, *together) for span in within(row, 0, length).spans]
            tails = [within(row, length, len(row.ids)) for row in (*joined, *together)]
            prefix = TokenSequence(prompt[:length], tuple(spans))
            plan.shared.append(SharedPrefix(prefix, tails))
            plan.sequences += [row for row, n in zip(rows, common, strict=True) if n < length]
            return
    if causal and len(prompt) in common:
        first = common.index(len(prompt))
        spans = [prompt_span, *rows[first].spans]
        plan.sequences.append(TokenSequence(rows[first].ids, tuple(spans)))
        plan.sequences += rows[:first] + rows[first + 1 :]
    else:
        plan.sequences += [whole, *rows]


def _common_length(ids: list[int], prompt: list[int]) -> int:
    """Return how many first tokens a row has in common with its prompt, before its last one."""
    limit = min(len(ids) - 1, len(prompt))
    if ids[:limit] == prompt[:limit]:
        return limit
    return next(k for k in range(limit) if ids[k] != prompt[k])


def shared_length(first: list[int], second: list[int]) -> int:
    """Return how many first tokens two sequences have in common."""
    limit = min(len(first), len(second))
    return next((k for k in range(limit) if first[k] != second[k]), limit)


def _saved(length: int, common: list[int], prompt: int) -> int:
    """Return the tokens that are not run when rows share the first `length` ones."""
    # On their own, the prompt would come with the first row that has all of it, if there is one.
    return length * sum(n >= length for n in common) - (prompt if prompt in common else 0)


def within(row: TokenSequence, start: int, end: int) -> TokenSequence:
    """Cut a part out of a row; its spans count from where the part begins."""
    clipped = [
        Span(span.target, max(span.start, start) - start, min(span.end, end) - start)
        for span in row.spans
        if max(span.start, start) < min(span.end, end)
    ]
    return TokenSequence(row.ids[start:end], tuple(clipped))


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
