"""Scores of single rows, for programs that call from many threads and stop at no bad row."""

import sys
import threading
from collections.abc import Mapping, Sequence

from armo.data.conversation import Conversation
from armo.model.reward_model import ArmoRewardModel
from armo.serve.engine import Answer, ScoringEngine
from armo.serve.rows import Row, RowError, RowReader


class RowScorer:
    """Scores rows of any thread, each for itself: one that has no score says why.

    Rows that wait while a pass runs go into the next one together, each prompt once.

    Attributes:
        model: The scoring model; do not use it elsewhere.
    """

    def __init__(self, model: ArmoRewardModel) -> None:
        """Start the engine of a model."""
        self.model = model
        # Those who ask wait for their answers, so what is taken is bounded by them.
        self._engine = ScoringEngine(model, queue_tokens=sys.maxsize)
        self._reader = RowReader(model.backbone)
        self._reading = threading.Lock()

    def score(
        self,
        rows: Sequence[Conversation | RowError],
        *,
        weights: Mapping[str, float] | None = None,
    ) -> list[Answer]:
        """Score rows, in their order; what is an error already stays one.

        Args:
            rows: Any number.
            weights: As for `ArmoRewardModel.score`.

        Raises:
            ValueError: If the weights are none that can be mixed.
        """
        with self._reading:
            read = self._reader.conversations(rows)
        sound = [row for row in read if isinstance(row, Row)]
        scores = iter(self._engine.submit(sound, weights=weights).result() if sound else ())
        return [row if isinstance(row, RowError) else next(scores) for row in read]

    def close(self) -> None:
        """Finish what was taken, and end the thread of the engine."""
        self._engine.stop()


_LOADING = threading.Lock()
_LOADED: dict[tuple[str, str], RowScorer] = {}


def shared_scorer(model: str, device: str) -> RowScorer:
    """Load a model folder once per process, at the first call."""
    with _LOADING:
        if (model, device) not in _LOADED:
            loaded = ArmoRewardModel.from_pretrained(model, device=device)
            _LOADED[model, device] = RowScorer(loaded)
        return _LOADED[model, device]
