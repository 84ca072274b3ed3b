"""A step that scores rows in pipelines of distilabel, written for its version 1.5."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distilabel.mixins.runtime_parameters import RuntimeParameter
from distilabel.steps import Step, StepInput
from pydantic import Field, PrivateAttr

from armo.data.conversation import Conversation, Message
from armo.model.conversations import parse_conversations, parse_prompt
from armo.model.pretrained import WEIGHTS, read_seal
from armo.model.reward_model import ArmoRewardModel
from armo.serve.engine import Answer, RowScore
from armo.serve.row_scorer import RowScorer
from armo.serve.rows import RowError, parse_row

INPUTS: dict[str, type | tuple[type, ...]] = {
    "instruction": (str, list),
    "system_prompt": str,
    "response": str,
    "generations": list,
    "conversation": list,
}
OUTPUTS = ("score", "rewards", "gating_weights", "contributions", "truncated", "reason")
NEEDED = "needs `conversation`, or `instruction` with `response` or `generations`"


class ArmoScore(Step):
    """Adds the score of each response, and what it is made of, in a pass for each batch.

    A response that cannot be scored stops nothing: `reason` says why, and the log how many there
    were. A step that is cached runs again once another model is in the folder.

    Input columns:
        - conversation (`ChatType`): messages, the last of them the answer; or these, without the
            answer where there are `generations`
        - instruction (`str`): otherwise, what the user said; messages are read too
        - system_prompt (`str`): what stands before the instruction, if anything
        - response (`str`): what answers the instruction
        - generations (`list[str]`): several answers; they get lists of scores, rewards,
            contributions and `truncated`, in their order

    Output columns:
        - score (`float`): ranks responses to a prompt; NaN where there is none, and None among
            those of `generations`: steps that choose by them refuse it, and distilabel then empties
            their whole batch
        - rewards (`dict[str, float]`): by objective, on [0, 1]
        - gating_weights (`dict[str, float]`): likewise, how much each counts for this prompt
        - contributions (`dict[str, float]`): likewise; they sum to the score
        - truncated (`bool`): whether the backbone read less than all
        - reason (`str`): why there is no score; empty where there is

    Categories:
        - scorer

    Attributes:
        model: The model folder, or its hub id.
        device: Of the backbone.
        weights: The caller's weights by objective, instead of the gate's.

    Example:
        ```python
        with Pipeline() as pipeline:
            load >> generate >> ArmoScore(
                model="checkpoints/demo/model", input_mappings={"response": "generation"}
            )
        ```
    """

    model: str
    device: RuntimeParameter[str] = Field(default="auto", description="Of the backbone.")
    weights: dict[str, float] | None = None

    _scorer: RowScorer | None = PrivateAttr(None)

    @property
    def inputs(self) -> dict[str, bool]:
        """Which columns are read; none alone is needed."""
        return dict.fromkeys(INPUTS, False)

    @property
    def outputs(self) -> list[str]:
        """Which columns are added."""
        return list(OUTPUTS)

    @property
    def signature(self) -> str:
        """What distilabel's cache knows the step by: its settings and the model's seal."""
        folder = Path(self.model).expanduser()
        seal = read_seal(folder) if (folder / WEIGHTS).is_file() else None
        return hashlib.sha1(f"{super().signature}-{seal}".encode()).hexdigest()

    def load(self) -> None:
        """Load the model, in the process that runs the step."""
        super().load()
        # That is a fork. Where the process before had computed with several threads, the first
        # thread of this one waits for them for ever; another one starts its own.
        with ThreadPoolExecutor(1) as thread:
            self._scorer = thread.submit(self._load_scorer).result()

    def _load_scorer(self) -> RowScorer:
        model = ArmoRewardModel.from_pretrained(self.model, device=self.device)
        if self.weights is not None:
            model.objectives.mix(self.weights)
        return RowScorer(model)

    def unload(self) -> None:
        """Let go of the model."""
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None
        super().unload()

    def process(self, inputs: StepInput) -> Iterator[list[dict[str, Any]]]:
        """Score a batch.

        Args:
            inputs: Rows, which get the output columns.
        """
        assert self._scorer is not None
        read = [_read(row) for row in inputs]
        answers = self._scorer.score([one for row in read for one in row], weights=self.weights)
        names, rest = self._scorer.model.objectives.names, iter(answers)
        for row, asked in zip(inputs, read, strict=True):
            own = [next(rest) for _ in asked]
            several = row.get("generations") is not None
            row.update(_list_columns(own, names) if several else _columns(own[0], names))
        if why := Counter(str(a) for a in answers if not isinstance(a, RowScore)):
            reason, times = why.most_common(1)[0]
            self._logger.warning(
                "%d of %d responses have no score; %d of them: %s",
                why.total(),
                len(answers),
                times,
                reason,
            )
        yield inputs


def _read(row: Mapping[str, Any]) -> list[Conversation | RowError]:
    """Find the responses of a row: one, or those of `generations`."""
    given = {name: row[name] for name in INPUTS if row.get(name) is not None}
    texts = given.get("generations")
    try:
        for name, value in given.items():
            if not isinstance(value, INPUTS[name]):
                raise ValueError(f"`{name}` cannot be of type {type(value).__name__}")
        if "conversation" in given and texts is None:
            return [*parse_conversations([given["conversation"]])]
        if "conversation" in given:
            prompt = parse_prompt(given["conversation"])
        elif "instruction" in given and (texts is not None or "response" in row):
            prompt = parse_prompt(given["instruction"])
            if system := given.get("system_prompt"):
                prompt = (Message("system", system), *prompt)
        else:
            raise ValueError(NEEDED)
    except ValueError as error:
        reason = RowError(str(error).removeprefix("conversation 0: "))
        return [reason] * (len(texts) if isinstance(texts, list) else 1)
    return [
        parse_row(prompt, text)
        if isinstance(text, str)
        else RowError("the response is no text", of_response=True)
        for text in (texts if texts is not None else [given.get("response")])
    ]


# distilabel finds the types of columns in the first rows that it writes, and stops at the end of a
# pipeline if they were all None and later ones are not. So there is NaN, and empty text.
def _columns(answer: Answer, names: tuple[str, ...]) -> dict[str, Any]:
    return _values(answer, names, missing=math.nan) | {
        "reason": "" if isinstance(answer, RowScore) else str(answer)
    }


def _list_columns(answers: list[Answer], names: tuple[str, ...]) -> dict[str, Any]:
    each = [_values(answer, names, missing=None) for answer in answers]
    weights = [values["gating_weights"] for values in each if values["score"] is not None]
    reasons = [
        f"generation {k}: {answer}"
        for k, answer in enumerate(answers)
        if not isinstance(answer, RowScore)
    ]
    return {name: [values[name] for values in each] for name in OUTPUTS[:-1]} | {
        "gating_weights": weights[0] if weights else dict.fromkeys(names, math.nan),
        "reason": "; ".join(reasons),
    }


def _values(answer: Answer, names: tuple[str, ...], *, missing: float | None) -> dict[str, Any]:
    if not isinstance(answer, RowScore):
        by_name = {name: dict.fromkeys(names, missing) for name in OUTPUTS[1:4]}
        return {"score": missing, **by_name, "truncated": False}
    out, row = answer.out, answer.row
    return {
        "score": float(out.score[row]),
        **{
            name: dict(zip(names, getattr(out, name)[row].tolist(), strict=True))
            for name in OUTPUTS[1:4]
        },
        "truncated": bool(out.truncated[row]),
    }
