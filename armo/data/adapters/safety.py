"""Sets that say whether a response is safe: BeaverTails, PKU-SafeRLHF, WildGuardMix."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from armo.data.adapters.base import Adapter, Dropped, rated_response, rating, text, truth
from armo.data.conversation import RatedResponse
from armo.data.published import PublishedRow
from armo.data.sources import DataError


def beavertails_votes(rows: Iterable[PublishedRow]) -> list[PublishedRow]:
    """Put the votes on one response together: several people may have labelled it, and disagree.

    `is_safe` becomes the share of votes for it. The texts of the set are held in memory.
    """
    first: dict[bytes, PublishedRow] = {}
    votes: dict[bytes, list[bool]] = {}
    for row in rows:
        try:
            texts = [text(row.fields, name) for name in ("prompt", "response")]
            safe = truth(row.fields, "is_safe")
        except ValueError as error:
            raise DataError(f"{row.place}: {error}") from None
        digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest()
        fields = {"prompt": texts[0], "response": texts[1]}
        first.setdefault(digest, row._replace(fields=fields))
        votes.setdefault(digest, []).append(safe)
    return [
        row._replace(fields={**row.fields, "is_safe": sum(votes[digest]) / len(votes[digest])})
        for digest, row in first.items()
    ]


def beavertails_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of BeaverTails after `beavertails_votes`; a bare refusal is safe too."""
    ratings = {"beavertails-is_safe": rating(row["is_safe"])}
    yield rated_response("beavertails", id, text(row, "prompt"), text(row, "response"), ratings)


def pku_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of PKU-SafeRLHF: two responses, each safe or not, and how harmful from 0 to 3.

    Older sets of this kind (`PKU-SafeRLHF-30K`) lack the severity.
    """
    for number in (0, 1):
        ratings = {
            "pku-is_safe": float(truth(row, f"is_response_{number}_safe")),
            "pku-severity": rating(row.get(f"response_{number}_severity_level")),
        }
        response = text(row, f"response_{number}")
        yield rated_response(
            "pku_saferlhf", f"{id}/{number}", text(row, "prompt"), response, ratings
        )


def wildguard_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of WildGuardMix: is the response harmful, and does it refuse a harmless prompt?

    Rows without a response are prompts alone, and labels that are null are missing.
    """
    safe = _label(row, "response_harm_label", ("unharmful", "harmful"))
    complies = _label(row, "response_refusal_label", ("compliance", "refusal"))
    if _label(row, "prompt_harm_label", ("unharmful", "harmful")) != 1.0:
        complies = None
    if not text(row, "response"):
        yield Dropped("a prompt alone")
        return
    ratings = {"wildguard-is_safe": safe, "wildguard-complies": complies}
    yield rated_response("wildguardmix", id, text(row, "prompt"), text(row, "response"), ratings)


def _label(row: Mapping[str, Any], name: str, known: tuple[str, str]) -> float | None:
    """1 for the first label, which is the good one, 0 for the other."""
    label = text(row, name)
    if label and label not in known:
        raise ValueError(f"field `{name}` is {label!r}, not {' or '.join(known)}")
    return float(label == known[0]) if label else None


BEAVERTAILS = Adapter(
    name="beavertails",
    id="PKU-Alignment/BeaverTails",
    columns=("prompt", "response", "is_safe"),
    rows=beavertails_rows,
    splits=("330k_train",),
    files=("train",),
    objectives=("beavertails-is_safe",),
    gather=beavertails_votes,
)
PKU_SAFERLHF = Adapter(
    name="pku_saferlhf",
    id="PKU-Alignment/PKU-SafeRLHF",
    columns=(
        "prompt",
        "response_0",
        "response_1",
        "is_response_0_safe",
        "is_response_1_safe",
    ),
    rows=pku_rows,
    objectives=("pku-is_safe", "pku-severity"),
)
WILDGUARDMIX = Adapter(
    name="wildguardmix",
    id="allenai/wildguardmix",
    columns=(
        "prompt",
        "response",
        "prompt_harm_label",
        "response_harm_label",
        "response_refusal_label",
    ),
    rows=wildguard_rows,
    config="wildguardtrain",
    objectives=("wildguard-is_safe", "wildguard-complies"),
)
