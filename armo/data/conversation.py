"""The rows that armo reads: conversations with ratings, preferences, or lists of responses."""

import math
from dataclasses import dataclass, field

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r:.60} is not one of {', '.join(ROLES)}")
        check_text(self.content, "content")


Prompt = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt, all turns up to the answer, and the response that answers it."""

    prompt: Prompt
    response: str

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        _check_response(self.response, "response")


@dataclass(frozen=True, slots=True)
class RatedResponse:
    """A response with ratings on some objectives, on their sources' own scales.

    Attributes:
        id: Unique among the rows of its kind.
        source: The data set that it comes from.
        conversation: The prompt and the response.
        ratings: By objective; a missing one is left out.
        category: Kind of prompt, for reports.
        split: `train`, `test`, or None where the prompt decides.
        weight: How much the row counts beside the others, from 0 on.
        place: Where it was read, for messages; no part of what it says.
    """

    id: str
    source: str
    conversation: Conversation
    ratings: dict[str, float]
    category: str = ""
    split: str | None = None
    weight: float = 1.0
    place: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    @property
    def prompt(self) -> Prompt:
        """The turns before the response."""
        return self.conversation.prompt

    @property
    def responses(self) -> tuple[str, ...]:
        """The one response, in the form that every row type shares."""
        return (self.conversation.response,)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two responses to one prompt, of which `chosen` is preferred.

    Attributes:
        id: Unique among the rows of its kind.
        source: The data set that it comes from.
        prompt: All turns up to the answer.
        chosen: The preferred response.
        rejected: The other one.
        margin: By how much, from 0 on, where that is known.
        category: Kind of prompt, for reports.
        split: `train`, `test`, or None where the prompt decides.
        judgements: By objective, the probability in [0, 1] that `chosen` is better than `rejected`
            on it; 0.5 is a tie. A missing one is left out.
        weight: How much the row counts beside the others, from 0 on.
        preference: The probability in [0.5, 1] that `chosen` is the better one; 0.5 is a tie.
        place: Where it was read, for messages; no part of what it says.
    """

    id: str
    source: str
    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    category: str = ""
    split: str | None = None
    judgements: dict[str, float] = field(default_factory=dict)
    weight: float = 1.0
    preference: float = 1.0
    place: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        _check_response(self.chosen, "chosen")
        _check_response(self.rejected, "rejected")
        _check_weight(self.weight)
        if self.margin is not None and not 0.0 <= self.margin < math.inf:
            raise ValueError(
                f"`margin` must be a finite number from 0 on, got {self.margin}; where `rejected` "
                f"is the better one, swap `chosen` and `rejected`"
            )
        if not 0.5 <= self.preference <= 1.0:
            raise ValueError(
                f"`preference` is {self.preference}; it is the probability in [0.5, 1] that "
                f"`chosen` is the better one, so below 0.5 swap `chosen` and `rejected`"
            )
        for name, judgement in self.judgements.items():
            if not 0.0 <= judgement <= 1.0:
                raise ValueError(
                    f"judgement of {name!r:.60} is {judgement}; it is the probability in [0, 1] "
                    f"that `chosen` is better"
                )
        if self.chosen.strip() == self.rejected.strip():
            raise ValueError("`chosen` and `rejected` are the same text")

    @property
    def responses(self) -> tuple[str, ...]:
        """Chosen, then rejected."""
        return self.chosen, self.rejected


@dataclass(frozen=True, slots=True)
class ResponseList:
    """Several responses to one prompt, ranked, or some of them right and the others not.

    Attributes:
        id: Unique among the rows of its kind.
        source: The data set that it comes from.
        prompt: All turns up to the answer.
        responses: The responses, in any order.
        correct: Indices of the right ones, instead of `ranks`.
        category: Kind of prompt, for reports.
        split: `train`, `test`, or None where the prompt decides.
        ranks: A number per response, the lower the better; equal ones tie.
        weight: How much the row counts beside the others, from 0 on.
        place: Where it was read, for messages; no part of what it says.
    """

    id: str
    source: str
    prompt: Prompt
    responses: tuple[str, ...]
    correct: tuple[int, ...] | None = None
    category: str = ""
    split: str | None = None
    ranks: tuple[float, ...] | None = None
    weight: float = 1.0
    place: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        for k, response in enumerate(self.responses):
            _check_response(response, f"responses[{k}]")
        _check_weight(self.weight)
        if not self.responses:
            raise ValueError("`responses` is empty")
        if self.correct is not None and self.ranks is not None:
            raise ValueError("`correct` and `ranks` are both given; keep one of them")
        if any(not 0 <= k < len(self.responses) for k in self.correct or ()):
            raise ValueError(
                f"`correct` {list(self.correct or ())!s:.60} is outside the list of responses"
            )
        if self.ranks is not None and len(self.ranks) != len(self.responses):
            raise ValueError(
                f"`ranks` has {len(self.ranks)} numbers for {len(self.responses)} responses; "
                f"give one for each"
            )
        if not all(math.isfinite(rank) for rank in self.ranks or ()):
            raise ValueError(f"`ranks` must be finite numbers, got {list(self.ranks or ())!s:.60}")

    @property
    def ranking(self) -> tuple[float, ...]:
        """Rank of each response, lower is better; right ones tie at 0, the others at 1."""
        if self.ranks is not None:
            return self.ranks
        return tuple(float(k not in (self.correct or ())) for k in range(len(self.responses)))


Row = RatedResponse | PreferencePair | ResponseList


def prompt_group(prompt: Prompt) -> str:
    """Return the text by which rows are kept on one side of a split.

    The first user turn, case and white space folded: rows whose system text or later turns
    differ still count as one prompt, since they share most of what there is to remember.
    """
    first = next(message.content for message in prompt if message.role == "user")
    return " ".join(first.casefold().split())


def _check_prompt(prompt: Prompt) -> None:
    if not any(message.role == "user" and message.content.strip() for message in prompt):
        raise ValueError("the prompt has no user turn with text")
    if prompt[-1].role == "assistant":
        raise ValueError("the prompt ends with an assistant turn")


def _check_response(response: str, name: str) -> None:
    if not response.strip():
        raise ValueError(f"`{name}` is empty")
    check_text(response, name)


def _check_weight(weight: float) -> None:
    if not 0.0 <= weight < math.inf:
        raise ValueError(f"`weight` must be a finite number from 0 on, got {weight}")


def check_text(text: str, name: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell but no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` is no valid Unicode text: {error.reason}") from None
