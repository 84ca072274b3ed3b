"""A scorer for evaluations with Inspect, written for its version 0.3.

Inspect finds it in the installed package, as `armo/armo_score`:

```
inspect score LOG.eval --scorer armo/armo_score -S model=checkpoints/demo/model
```
"""

from collections.abc import Mapping
from typing import Any

import anyio
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState

# Inspect imports this module whenever it starts, so what takes seconds to import, as torch does,
# is imported with the first sample.

ROWS_AT_ONCE = 64
"""Samples that are in the model's hands together, of one scorer; each holds a waiting thread."""


@scorer(metrics={"*": [mean(), stderr()]})
def armo_score(
    model: str, device: str = "auto", weights: Mapping[str, float] | None = None
) -> Scorer:
    """Score what a model answers by an interpretable reward model, with metrics by objective.

    The value of a sample is a mapping: `score`, which ranks responses to a prompt, and by objective
    the reward, on [0, 1]. In words, the explanation says what the score is made of. The response is
    the completion, and the prompt all turns up to the last one of the user before it. Samples that
    wait while a pass runs go into the next one together.

    A sample that cannot be scored, as one with an empty completion or an image, is unscored, with a
    reason: metrics leave it out and count it.

    Args:
        model: The model folder, or its hub id; loaded once per process, at the first sample.
        device: Of the backbone.
        weights: The caller's weights by objective, instead of the gate's.
    """
    limiter = anyio.CapacityLimiter(ROWS_AT_ONCE)

    async def score(state: TaskState, target: Target) -> Score:
        return await anyio.to_thread.run_sync(
            _score, state, model, device, weights, limiter=limiter, abandon_on_cancel=True
        )

    return score


def _score(state: TaskState, model: str, device: str, weights: Mapping[str, float] | None) -> Score:
    from armo.serve.completions import parse_completion
    from armo.serve.engine import RowScore
    from armo.serve.row_scorer import shared_scorer

    loaded = shared_scorer(model, device)
    answer = state.output.completion if state.output.choices else ""
    if not answer.strip():
        filtered = bool(state.output.choices) and state.output.stop_reason == "content_filter"
        reason = "refusal" if filtered else "no_response"
        return Score.unscored(reason=reason, answer=answer, explanation="The response is empty.")
    try:
        row = parse_completion(_prompt(state), answer)
    except ValueError as error:
        return _failed(answer, str(error))
    if row is None:
        return _failed(answer, "the response is no valid Unicode text")
    (scored,) = loaded.score([row], weights=weights)
    return _told(answer, scored) if isinstance(scored, RowScore) else _failed(answer, str(scored))


def _prompt(state: TaskState) -> list[dict[str, Any]]:
    """Take the turns up to the user's last one before the answer; of models, what they said."""
    answer = state.output.message.id
    said = [message.id for message in state.messages]
    before = state.messages[: said.index(answer) if answer and answer in said else None]
    asked = [k for k, message in enumerate(before) if message.role == "user"]
    return [
        {
            "role": message.role,
            "content": message.text
            if isinstance(message.content, str) or message.role == "assistant"
            else [part.model_dump() for part in message.content],
        }
        for message in before[: asked[-1] + 1 if asked else None]
    ]


def _failed(answer: str, why: str) -> Score:
    return Score.unscored(reason="scoring_failed", answer=answer, explanation=f"No score: {why}.")


def _told(answer: str, scored: Any) -> Score:
    """Make the score of a sample out of a `RowScore`."""
    out, row = scored.out, scored.row
    total, cut = float(out.score[row]), bool(out.truncated[row])
    by_name = {
        name: dict(zip(out.objectives, getattr(out, name)[row].tolist(), strict=True))
        for name in ("rewards", "adjusted", "gating_weights", "contributions")
    }
    parts = sorted(by_name["contributions"].items(), key=lambda part: -abs(part[1]))
    lines = [
        f"- {name} {part:+.3f}: weight {by_name['gating_weights'][name]:.3f} times "
        f"{by_name['adjusted'][name]:+.3f} standard deviations"
        for name, part in parts
        if by_name["gating_weights"][name] > 0.0
    ]
    cause = " The conversation is longer than the backbone reads, and was cut." if cut else ""
    return Score(
        value={**by_name["rewards"], "score": total},
        answer=answer,
        explanation="\n".join([f"Score {total:+.3f}, the sum of:{cause}", *lines]),
        metadata={
            "adjusted": by_name["adjusted"],
            "gating_weights": by_name["gating_weights"],
            "contributions": by_name["contributions"],
            "truncated": cut,
        },
    )
