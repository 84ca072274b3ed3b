"""What the checks keep of a text, found in the process that reads it or in others beside it."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Literal

import numpy as np

from armo.data.check_near import BAND_ROWS, BANDS, MIN_WORDS, minhash
from armo.data.check_overlap import BenchmarkGrams
from armo.data.check_texts import find_faults, language_of, script_of, word_hashes
from armo.data.surface import surface_features

LONG_CHARACTERS = 100_000
"""A text from here on is no answer that people write."""

Role = Literal["turn", "response", "group"]
"""A turn of a prompt, a response, or the text by which splits keep rows together."""

_UNSIGNED = np.zeros(BANDS * BAND_ROWS, dtype=np.uint16).tobytes()


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What is kept of a text; what its role does not need is empty.

    Attributes:
        language: Script, or language where it is known; empty without letters.
        faults: What is wrong with it.
        overlaps: Benchmark and text of each that stands in it.
        features: Surface features, float32.
        signature: For near-duplicates, uint16; zeros if the text is too short to be compared.
    """

    language: str = ""
    faults: tuple[str, ...] = ()
    overlaps: tuple[tuple[str, str], ...] = ()
    features: bytes = b""
    signature: bytes = b""


@dataclass(frozen=True, eq=False, slots=True)
class Examiner:
    """Examines texts.

    Attributes:
        near: Whether to sign them.
        benchmark: Texts to look for in them.
    """

    near: bool
    benchmark: BenchmarkGrams | None

    def __call__(self, texts: Sequence[tuple[Role, str]]) -> list[TextFacts]:
        """Examine texts, each in its role."""
        return [self._facts(role, text) for role, text in texts]

    def _facts(self, role: Role, text: str) -> TextFacts:
        signature = b""
        if self.near and role != "turn":
            words = word_hashes(text)
            signature = minhash(words).tobytes() if len(words) >= MIN_WORDS else _UNSIGNED
        if role == "group":
            return TextFacts(signature=signature)
        script = script_of(text)
        faults = list(find_faults(text))
        if len(text) >= LONG_CHARACTERS:
            faults.append(f"{LONG_CHARACTERS:,} characters or more")
        features = b""
        if role == "response":
            features = surface_features([text]).numpy().astype(np.float32).tobytes()
        return TextFacts(
            language=(language_of(text) if script == "Latin" else "") or script,
            faults=tuple(faults),
            overlaps=() if self.benchmark is None else tuple(self.benchmark.find(text)),
            features=features,
            signature=signature,
        )


def start_pool(examiner: Examiner, processes: int) -> ProcessPoolExecutor:
    """Start processes that run `examine_apart` with an examiner."""
    return ProcessPoolExecutor(
        processes,
        # A fork would copy the threads of torch in whatever state they are.
        mp_context=get_context("spawn"),
        initializer=_examine_with,
        initargs=(examiner,),
    )


def _examine_with(examiner: Examiner) -> None:
    _examiners.append(examiner)


def examine_apart(texts: Sequence[tuple[Role, str]]) -> list[TextFacts]:
    """Examine texts in a process of the pool."""
    return _examiners[-1](texts)


_examiners: list[Examiner] = []  # of this process, if it is one of a pool
