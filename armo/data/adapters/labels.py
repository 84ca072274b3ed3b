"""Pairs of two answers in two columns, with a label that says which is the better one."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from hashlib import blake2b
from typing import Any, Literal

from armo.data.adapters.base import Adapter, Dropped, listed, rating, text, truth
from armo.data.adapters.paired import choice, difference, optional_text, ordered_pair, pair
from armo.data.conversation import Message, PreferencePair, Prompt
from armo.data.published import PublishedRow


def pku_pair(
    row: Mapping[str, Any], id: str, *, label: Literal["better", "safer"]
) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of PKU-SafeRLHF by one of its two labels, which often disagree.

    Args:
        row: `prompt`, `response_0`, `response_1`; `better_response_id` and `safer_response_id`, 0
            or 1; `response_0_severity_level` and `response_1_severity_level`, 0 to 3, if there. By
            `safer`, the margin is the difference in severity, where that agrees with the label.
        id: Of the row.
        label: Which label: the more helpful answer, or the safer one.
    """
    better = choice(row, f"{label}_response_id", (0, 1))
    worse = 1 - better
    margin = None
    if label == "safer":
        names = [f"response_{k}_severity_level" for k in (worse, better)]
        gap = difference(row, *names)
        # Most pairs are equally severe and one is still safer: that is no margin of zero.
        margin = gap if gap is not None and gap > 0.0 else None
    texts = text(row, f"response_{better}"), text(row, f"response_{worse}")
    yield pair(id, _user(text(row, "prompt")), *texts, margin=margin)


def shp_pair(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of SHP; the margin is the logarithm of the ratio of upvotes.

    Args:
        row: `history`, the post; `human_ref_A`, `human_ref_B`; `labels`, 1 if A is better and 0 if
            B; `score_ratio`, from 1 on; `domain`, such as `askculinary_train`.
        id: Of the row.
    """
    ratio = rating(row["score_ratio"])
    if ratio is None or ratio < 1.0:
        yield Dropped("no ratio of upvotes from 1 on")
        return
    texts = text(row, "human_ref_A"), text(row, "human_ref_B")
    yield ordered_pair(
        id,
        _user(text(row, "history")),
        texts,
        first=float(choice(row, "labels", (0, 1))),
        margin=math.log(ratio),
        category=re.sub("_(train|validation|test)$", "", optional_text(row, "domain")),
    )


def offsetbias_pair(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of OffsetBias.

    Args:
        row: `instruction`, `output_1`, `output_2`; `label`, 1 or 2, the better one.
        id: Of the row.
    """
    first = float(choice(row, "label", (1, 2)) == 1)
    texts = text(row, "output_1"), text(row, "output_2")
    yield ordered_pair(id, _user(text(row, "instruction")), texts, first=first)


def prometheus_pair(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of the Preference-Collection; the margin is the difference in scores.

    Args:
        row: `orig_instruction`, `orig_response_A`, `orig_response_B`; `orig_preference`, `A` or
            `B`; `orig_score_A`, `orig_score_B`, numbers or their texts; `was_there`, if the pair
            was there in the other order.
        id: Of the row.
    """
    if row.get("was_there"):
        yield Dropped("a pair that was there in the other order")
        return
    better = choice(row, "orig_preference", ("A", "B"))
    worse = "B" if better == "A" else "A"
    margin = difference(row, f"orig_score_{better}", f"orig_score_{worse}")
    texts = text(row, f"orig_response_{better}"), text(row, f"orig_response_{worse}")
    yield pair(id, _user(text(row, "orig_instruction")), *texts, margin=margin)


def mark_other_order(rows: Iterable[PublishedRow]) -> Iterator[PublishedRow]:
    """Give rows of the Preference-Collection that were there in the other order a mark.

    Of each pair the set has both orders, which are one judgement.
    """
    seen: set[bytes] = set()
    for row in rows:
        fields = row.fields
        sides = sorted(str(fields[f"orig_response_{side}"]) for side in ("A", "B"))
        parts = (str(fields["orig_instruction"]), str(fields.get("orig_criteria")), *sides)
        # A digest, since texts are long and rows many.
        key = blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=16).digest()
        yield row._replace(fields={**fields, "was_there": True}) if key in seen else row
        seen.add(key)


def orca_pair(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of `distilabel-intel-orca-dpo-pairs`, filtered as its card says.

    Left out are ties by the judge, answers that got less than 8 of 10, and questions that are in
    GSM8K's training set.

    Args:
        row: `system`, which may be empty; `input`, `chosen`, `rejected`, `status`, `chosen_score`,
            `in_gsm8k_train`; `rating`, of the two `generations`, if there.
        id: Of the row.
    """
    score = rating(row["chosen_score"])
    if text(row, "status") == "tie":
        yield Dropped("a tie by its judge")
    elif score is None or score < 8.0:
        yield Dropped("a chosen answer with less than 8 of 10")
    elif truth(row, "in_gsm8k_train"):
        yield Dropped("a question of GSM8K's training set")
    else:
        # They are in the order of `generations`, and the better one is chosen.
        scores = [rating(value) for value in (listed(row, "rating") if "rating" in row else [])]
        known = [value for value in scores if value is not None]
        margin = max(known) - min(known) if len(known) == 2 else None
        system = text(row, "system")
        prompt = _user(text(row, "input"))
        if system.strip():
            prompt = (Message("system", system), *prompt)
        yield pair(id, prompt, text(row, "chosen"), text(row, "rejected"), margin=margin)


def math_pair(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of `distilabel-math-preference-dpo`.

    Args:
        row: `instruction`, `chosen_response`, `rejected_response`; `chosen_rating`,
            `rejected_rating`, whose difference is the margin.
        id: Of the row.
    """
    margin = difference(row, "chosen_rating", "rejected_rating")
    texts = text(row, "chosen_response"), text(row, "rejected_response")
    yield pair(id, _user(text(row, "instruction")), *texts, margin=margin)


def _user(content: str) -> Prompt:
    return (Message("user", content),)


_PKU = ("prompt", "response_0", "response_1")
ADAPTERS: tuple[Adapter[PreferencePair], ...] = (
    Adapter(
        "pku_saferlhf_better",
        "PKU-Alignment/PKU-SafeRLHF",
        (*_PKU, "better_response_id"),
        partial(pku_pair, label="better"),
    ),
    Adapter(
        "pku_saferlhf_safer",
        "PKU-Alignment/PKU-SafeRLHF",
        (*_PKU, "safer_response_id"),
        partial(pku_pair, label="safer"),
    ),
    Adapter(
        "shp",
        "stanfordnlp/SHP",
        ("history", "human_ref_A", "human_ref_B", "labels", "score_ratio"),
        shp_pair,
    ),
    Adapter(
        "offsetbias",
        "NCSOFT/offsetbias",
        ("instruction", "output_1", "output_2", "label"),
        offsetbias_pair,
    ),
    Adapter(
        "preference_collection",
        "prometheus-eval/Preference-Collection",
        ("orig_instruction", "orig_response_A", "orig_response_B", "orig_preference"),
        prometheus_pair,
        gather=mark_other_order,
    ),
    Adapter(
        "distilabel_intel_orca",
        "argilla/distilabel-intel-orca-dpo-pairs",
        ("system", "input", "chosen", "rejected", "status", "chosen_score", "in_gsm8k_train"),
        orca_pair,
    ),
    Adapter(
        "distilabel_math",
        "argilla/distilabel-math-preference-dpo",
        (
            *("instruction", "chosen_response", "rejected_response"),
            *("chosen_rating", "rejected_rating"),
        ),
        math_pair,
    ),
)
