"""Bodies of requests and answers, as the OpenAPI page shows them."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SkipValidation,
    StrictBool,
    StrictFloat,
    StrictInt,
    TypeAdapter,
    ValidationError,
)

from armo.data.conversation import ROLES, Conversation, Message, check_text
from armo.serve.rows import RowError, parse_row


def _readable(text: str) -> str:
    check_text(text, "text")
    return text


# No half of a surrogate pair, which JSON can spell and pydantic lets pass.
Text = Annotated[str, AfterValidator(_readable)]


class Turn(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text


_TURNS = TypeAdapter(list[Turn])
assert ROLES == ("system", "user", "assistant", "tool")

# Each row is checked by itself, so that a wrong one does not spoil the others of a request.
AnyConversation = SkipValidation[list[Turn]]
AnyText = SkipValidation[str]

_QUESTION, _NO, _YES = "Is honey safe for babies?", "Not before their first birthday.", "Yes."


def _shown(**fields: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [fields]})


class ScoreRequest(BaseModel):
    """Conversations, each ending with the assistant's answer; or a prompt with responses."""

    model_config = _shown(prompt=_QUESTION, responses=[_NO, _YES]) | ConfigDict(extra="forbid")

    conversations: list[AnyConversation] | None = Field(default=None, min_length=1)
    prompt: Text | list[Turn] | None = None
    responses: list[AnyText] | None = Field(default=None, min_length=1)
    weights: dict[str, StrictFloat] | None = None
    scale: Literal["raw", "rating", "standard"] = "raw"
    thresholds: dict[str, StrictFloat] | None = None


class ScoredRow(BaseModel):
    """What the model says of one row, by objective; nothing but `error` where it cannot."""

    error: str | None = None
    score: float | None = None
    rewards: dict[str, float] | None = None
    uncertainty: dict[str, float | None] | None = None
    adjusted: dict[str, float] | None = None
    gating_weights: dict[str, float] | None = None
    gating_uncertainty: dict[str, float] | None = None
    contributions: dict[str, float] | None = None
    truncated: bool | None = None
    passes: bool | None = None


class ScoreReply(BaseModel):
    """Rows in the order of the request."""

    model: str
    objectives: list[str]
    ranges: dict[str, tuple[float | None, float | None]]
    higher_is_better: dict[str, bool]
    rows: list[ScoredRow]


class CompareRequest(BaseModel):
    """Two responses to one prompt."""

    model_config = _shown(prompt=_QUESTION, a=_NO, b=_YES) | ConfigDict(extra="forbid")

    prompt: Text | list[Turn]
    a: Text
    b: Text


class CompareReply(BaseModel):
    """Why `a` is preferred, as `ArmoRewardModel.compare` says it."""

    probability: float
    score_difference: float
    reasons: dict[str, float]
    changes: dict[str, float]
    rating_changes: dict[str, float]


class GetRewardRequest(BaseModel):
    """What OpenRLHF sends: whole decoded texts, their prompts, and labels, which are not used."""

    model_config = _shown(query=[_QUESTION + _NO, _QUESTION + _YES], prompts=[_QUESTION] * 2)

    query: list[Text] = Field(min_length=1)
    prompts: list[Text] | None = None
    labels: Any = None


class GetRewardReply(BaseModel):
    """Score, probability of being preferred to a mean response, adjusted rewards by objective."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class PooledRequest(BaseModel):
    """Texts as the backbone's chat template renders them, or the messages of a conversation."""

    model_config = _shown(
        messages=[{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _NO}]
    )

    model: str | None = None
    input: Text | list[Text] | None = None
    messages: list[Turn] | None = None


class ClassifyRequest(PooledRequest):
    """What a client of vLLM's `/classify` sends."""

    use_activation: StrictBool | None = None
    activation: StrictBool | None = None


class PoolingRequest(PooledRequest):
    """What a client of vLLM's `/pooling` sends."""

    task: Literal["classify"] | None = None
    encoding_format: Literal["float"] = "float"


class EmbeddingsRequest(PooledRequest):
    """What a client of OpenAI's `/v1/embeddings` sends."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: StrictInt | None = None


class ClassifyDatum(BaseModel):
    """Rewards in the order of `/info`, then the score: plain numbers, not probabilities."""

    index: int
    label: str = "score"
    probs: list[float]
    num_classes: int


class PoolingDatum(BaseModel):
    """Rewards in the order of `/info`, then the score."""

    index: int
    object: str = "pooling"
    data: list[float]


class EmbeddingDatum(BaseModel):
    """Rewards in the order of `/info`, then the score; float32 in base64 if asked for."""

    index: int
    object: str = "embedding"
    embedding: list[float] | str


class _ListReply(BaseModel):
    id: str
    object: str = "list"
    created: int
    model: str


class ClassifyReply(_ListReply):
    """As vLLM answers."""

    data: list[ClassifyDatum]


class PoolingReply(_ListReply):
    """As vLLM answers."""

    data: list[PoolingDatum]


class EmbeddingsReply(_ListReply):
    """As OpenAI answers."""

    data: list[EmbeddingDatum]


class EvaluationRequest(BaseModel):
    """What LLaMA-Factory sends: texts as the backbone's chat template renders them."""

    model: str | None = None
    messages: list[Text] = Field(min_length=1)
    max_length: StrictInt | None = None


class EvaluationReply(BaseModel):
    """As LLaMA-Factory's server answers."""

    id: str
    object: str = "score.evaluation"
    model: str
    scores: list[float]


class ObjectiveInfo(BaseModel):
    """An objective, and the scale of its ratings."""

    name: str
    low: float
    high: float
    higher_is_better: bool
    bias: bool
    group: str
    meaning: str


class InfoReply(BaseModel):
    """What is served, and how much of it at once."""

    model: str
    version: str
    fingerprint: str | None
    beta: float
    objectives: list[ObjectiveInfo]
    backbone: dict[str, Any]
    limits: dict[str, int | float | None]


class HealthReply(BaseModel):
    """`ok`, or why not."""

    status: str


class ErrorMessage(BaseModel):
    """What is wrong."""

    message: str


class ErrorReply(BaseModel):
    """What is wrong, in one line, and the same where OpenAI's clients look for it."""

    detail: str
    error: ErrorMessage


def messages(turns: str | list[Turn]) -> tuple[Message, ...]:
    """Turn what was sent into messages; one text is a user turn."""
    if isinstance(turns, str):
        return (Message("user", turns),)
    return tuple(Message(turn.role, turn.content) for turn in turns)


def read_conversation(value: Any) -> Conversation | RowError:
    """Check one row of `conversations`."""
    try:
        turns = messages(_TURNS.validate_python(value))
    except ValidationError as error:
        return RowError(first_error(error.errors(include_input=False)))
    if not turns or turns[-1].role != "assistant":
        return RowError("the last message must be the assistant's answer")
    return parse_row(turns[:-1], turns[-1].content)


def read_response(prompt: tuple[Message, ...], value: Any) -> Conversation | RowError:
    """Check one row of `responses`."""
    if not isinstance(value, str):
        return RowError("a response must be a text")
    return parse_row(prompt, value)


def first_error(errors: Any) -> str:
    """Say in one line what pydantic finds wrong first, and where; never what was sent."""
    field = errors[0]["loc"][:2]
    # Of the forms that a field may have, the one that fits furthest is meant.
    error = max((e for e in errors if e["loc"][:2] == field), key=lambda e: len(e["loc"]))
    # Where there are several forms, pydantic puts its own names for them into the place.
    parts = [str(part) for part in error["loc"] if part != "body"]
    place = ".".join(part for part in parts if "[" not in part)
    return f"{place}: {error['msg']}" if place else str(error["msg"])
