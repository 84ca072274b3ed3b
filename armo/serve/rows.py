"""What clients send, as token rows: tokenised once, measured, and refused one by one."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from armo.data.conversation import Conversation, Message, Prompt
from armo.embed.backbone import Backbone
from armo.embed.boundary import GroupTokens, PromptGroup, ResponseTokens
from armo.embed.plan import TextPlanner
from armo.embed.spec import BackboneError
from armo.model.token_rows import TokenReader, TokenRowError
from armo.serve.completions import ControlText, parse_completion, shared_length
from armo.serve.openrlhf import RenderedPrompts


class RowError(ValueError):
    """A row cannot be scored; the message says why, without its number.

    Attributes:
        of_response: Whether the response is why: there is none, or it is too long or no text. So a
            policy may come to write it, whatever the caller does.
    """

    def __init__(self, message: str, *, of_response: bool = False) -> None:
        """Keep the reason."""
        super().__init__(message)
        self.of_response = of_response


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """A conversation as tokens, ready to be run.

    Attributes:
        prompt: Tokens of the prompt alone; rows with the same ones have one prompt.
        response: Tokens of the response or of the whole conversation, as the backbone reads it.
        text: The response.
        cost: Tokens to run if it is run alone.
    """

    prompt: tuple[int, ...]
    response: ResponseTokens
    text: str
    cost: int


class RowReader:
    """Tokenises rows, with a tokenizer of its own: not even two fast ones may share theirs.

    Not for several threads at once.
    """

    def __init__(
        self, backbone: Backbone, *, policy: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Read rows for this backbone.

        Args:
            backbone: The one that runs them.
            policy: Tokenizer whose chat template rendered the texts, where that is not the
                backbone's.
        """
        self._policy = RenderedPrompts(policy) if policy is not None else None
        self._control = ControlText(backbone.tokenizer)
        self._planner = TextPlanner(backbone.spec, copy.deepcopy(backbone.tokenizer))
        self._causal = backbone.runner.causal
        self._tokens = TokenReader(self._planner)

    def conversations(self, rows: Sequence[Conversation | RowError]) -> list[Row | RowError]:
        """Tokenise conversations; each that cannot be is an error of its own."""
        sound = [row for row in rows if isinstance(row, Conversation)]
        try:
            tokenised = iter(self._tokenise(sound))
        except BackboneError:  # of one of them: each by itself
            return [row if isinstance(row, RowError) else self._alone(row) for row in rows]
        return [row if isinstance(row, RowError) else next(tokenised) for row in rows]

    def rendered(self, text: str, *, prompt: str | None = None) -> Row | RowError:
        """Read a conversation that is one text, as a chat template rendered it.

        Where the prompt is given, control text in what follows it is read as words: whatever a
        policy writes stays in its response.

        Args:
            text: Of prompt and response, with the control text of the template.
            prompt: What it begins with, up to the response, or that with its beginning cut off; if
                None, the response is what follows the last place where the template opens one. A
                prompt without control text is the plain text of a user turn.
        """
        try:
            if self._policy is not None:
                return self._of_policy(text, prompt, self._policy)
            if prompt is not None and not self._opens(prompt):
                return self._plain(text, prompt)
            if prompt is not None:
                shared = shared_length(prompt, text)
                if self._opens(prompt[len(prompt) - shared :]):
                    text = prompt + text[shared:]
            head, body = self._tokens.take_apart(text, prompt=prompt)
            if prompt is not None:
                body = self._control.disarm(self._control.without_end(body))
            if not body.strip():
                raise RowError("the response is empty", of_response=True)
            tokens, response = self._tokens.read(head, body)
            return self._measured(tokens, response)
        except RowError as error:
            return error
        except TokenRowError as error:
            return RowError(str(error))

    def _opens(self, prompt: str) -> bool:
        conversations = self._planner.conversations
        return conversations is not None and self._tokens.marks.opening in prompt

    def _plain(self, text: str, prompt: str) -> Row | RowError:
        shared = shared_length(prompt, text)
        if not shared:
            raise RowError("it does not begin with its prompt")
        if self._planner.conversations is not None:
            added = self._planner.tokenizer.added_tokens_decoder.values()
            if control := [t.content for t in added if t.special and t.content in prompt]:
                raise RowError(
                    f"its prompt has the control text {control[0]!r}, but the chat template of the "
                    f"reward model's backbone opens no response in it; was it rendered by another "
                    f"one? Give the server that `policy`"
                )
        turns = (Message("user", prompt),)
        response = self._control.disarm(self._control.without_end(text[shared:]))
        return self.conversations([parse_row(turns, response)])[0]

    def _of_policy(self, text: str, prompt: str | None, policy: RenderedPrompts) -> Row | RowError:
        try:
            prompt = prompt if prompt is not None else policy.prompt(text)
            turns, response = policy.turns(prompt), policy.response(text, prompt)
            row = parse_completion(turns, self._control.disarm(response))
        except ValueError as error:
            return RowError(str(error))
        empty = RowError("the response is empty", of_response=True)
        return self.conversations([row or empty])[0]

    def _alone(self, row: Conversation) -> Row | RowError:
        try:
            return self._tokenise([row])[0]
        except BackboneError as error:
            return RowError(str(error), of_response=error.response is not None)

    def _tokenise(self, rows: Sequence[Conversation]) -> list[Row | RowError]:
        groups = [PromptGroup(row.prompt, [row.response]) for row in rows]
        tokens = self._planner.tokenise(groups)
        return [self._measured(g, row.response) for g, row in zip(tokens, rows, strict=True)]

    def _measured(self, tokens: GroupTokens, text: str) -> Row | RowError:
        """Find what a row costs to run, and whether it may be run at all."""
        try:
            plan = self._planner.plan_tokens([tokens], causal=self._causal, share=False)
        except BackboneError as error:
            return RowError(str(error), of_response=error.response is not None)
        if plan.missing:
            part = "prompt" if 0 in plan.missing else "response"
            reason = f"the {part} is longer than the backbone reads, and is skipped"
            return RowError(reason, of_response=part == "response")
        return Row(tuple(tokens.prompt), tokens.responses[0], text, plan.tokens)


def parse_row(prompt: Prompt, response: str) -> Conversation | RowError:
    """Make a conversation, or say why it is none and whether that is due to the response."""
    try:
        Conversation(prompt, "any")
    except ValueError as error:
        return RowError(str(error))
    try:
        return Conversation(prompt, response)
    except ValueError as error:
        return RowError(str(error), of_response=True)
