"""What a backbone is and how it is read: every setting that changes an embedding."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from armo.artifacts import digest_json
from armo.embed.boundary import PromptPosition

# Raised whenever the same settings would give other embeddings than before.
READING = 2


class BackboneError(ValueError):
    """A backbone cannot be found, is not the expected one, or cannot embed a text.

    Attributes:
        group: Number of the prompt that cannot be embedded, if it is that.
        response: Number of the response to it that cannot; None for the prompt itself.
    """

    group: int | None = None
    response: int | None = None


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """Which language model, and all settings that change an embedding.

    A tokenizer with a chat template reads whole conversations. One without reads as an encoder:
    the prompt on its own, and the response beside it, `[CLS] prompt [SEP] response [SEP]`.

    Attributes:
        id: Hub id or folder.
        revision: Hub revision; ignored for a folder.
        digest: SHA-256 of the weights; checked on loading, filled in where it was None.
        layers: Hidden states to concatenate, as `output_hidden_states` numbers them: 0 the
            input embedding, -1 the last layer, after the final norm.
        pooling: `last` attended token, which needs a chat template; or `mean` over the tokens of
            the prompt or of the response.
        prompt_position: With a chat template, where the prompt ends: with its last turn
            (`turn_end`, as ArmoRM) or right before the response (`generation_prompt`).
        max_tokens: Tokens of a conversation at most, special tokens included.
        max_prompt_tokens: Tokens of its prompt at most.
        on_overlong: What is too long is cut, the prompt in its middle and the response at its end
            (`truncate`); or stops the run (`error`); or is left out, its rows missing (`skip`);
            or, by an encoder, read in `windows` that together hold the whole response.
        dtype: Of weights and activations; `auto` is bfloat16 on a GPU that computes it
            natively, float32 elsewhere.
        tokenizer_digest: Digest of the tokenizer and its chat template; like `digest`.
        config_digest: Digest of the architecture around the weights; like `digest`.
    """

    id: str
    revision: str | None = None
    digest: str | None = None
    layers: Sequence[int] = (-1,)
    pooling: Literal["mean", "last"] = "last"
    prompt_position: PromptPosition = "generation_prompt"
    max_tokens: int = 4096
    max_prompt_tokens: int = 2048
    on_overlong: Literal["truncate", "error", "skip", "windows"] = "truncate"
    dtype: str = "auto"
    tokenizer_digest: str | None = None
    config_digest: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # lists come from YAML and JSON
        _one_of("pooling", self.pooling, ("mean", "last"))
        _one_of("prompt_position", self.prompt_position, ("turn_end", "generation_prompt"))
        _one_of("on_overlong", self.on_overlong, ("truncate", "error", "skip", "windows"))
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        for name in ("id", "revision", "digest", "tokenizer_digest", "config_digest"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "id"):
                raise ValueError(f"`{name}` must be a text, got {value!r}.")
        if not self.layers:
            raise ValueError("`layers` needs at least one layer.")
        if not 4 <= self.max_prompt_tokens <= self.max_tokens - 4:
            raise ValueError(
                "`max_prompt_tokens` must be at least 4 and leave at least 4 of `max_tokens` to "
                f"the response, got {self.max_prompt_tokens} of {self.max_tokens}."
            )

    @property
    def fingerprint(self) -> str:
        """Digest of all that changes an embedding; a store with another one is not used."""
        return digest_json([READING, {**asdict(self), "id": None, "revision": None}])


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(
            f"`{name}` must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}."
        )
