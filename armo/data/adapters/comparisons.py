"""Pairs out of scores: all pairs of the rated, judged or ranked answers to one prompt."""

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from armo.data.adapters.base import Adapter, Dropped, rating, text
from armo.data.adapters.paired import objects, ranked_pairs
from armo.data.conversation import Message, PreferencePair

ASPECTS = ("instruction_following", "truthfulness", "honesty", "helpfulness")


def ultrafeedback_pairs(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make all pairs of the answers in a row of UltraFeedback, by the mean of their four aspects.

    Of an answer whose aspects are not all rated, the others' mean counts, as in the published
    `fine-grained_score`. `overall_score`, with its known errors, is not used.

    Args:
        row: `instruction`; `completions`, each with a `response` and `annotations`, by aspect a
            `Rating` from 1 to 5 or `N/A`; `source`, if there.
        id: Of the row.
    """
    scored = []
    for completion in objects(row, "completions"):
        annotations = completion.get("annotations")
        if not isinstance(annotations, Mapping):
            raise ValueError(f"field `annotations` must be an object, got {annotations!r:.60}")
        given = [rating((annotations.get(aspect) or {}).get("Rating")) for aspect in ASPECTS]
        known = [score for score in given if score is not None]
        scored.append((text(completion, "response"), fmean(known) if known else None))
    prompt = (Message("user", text(row, "instruction")),)
    category = text(row, "source") if "source" in row else ""
    yield from ranked_pairs(id, prompt, scored, category=category)


def code_ultrafeedback_pairs(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make all pairs of the answers in a row of CodeUltraFeedback, by the aspect that it judges.

    Args:
        row: `instruction`; `preference`, the aspect; `responses`, each with a `model` and a
            `response`; `annotations`, in another order, each with a `model` and a `rating` from 1
            to 5 or `N/A`.
        id: Of the row.
    """
    ratings = {
        text(each, "model"): rating(each.get("rating")) for each in objects(row, "annotations")
    }
    scored = [
        (text(each, "response"), ratings.get(text(each, "model")))
        for each in objects(row, "responses")
    ]
    prompt = (Message("user", text(row, "instruction")),)
    yield from ranked_pairs(id, prompt, scored, category=text(row, "preference"))


def judgelm_pair(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of JudgeLM-100K.

    Args:
        row: `question_body`, `answer1_body`, `answer2_body`; `text`, whose first line has the two
            scores from 1 to 10.
        id: Of the row.
    """
    first_line, _, _ = text(row, "text").strip().partition("\n")
    scores = [rating(score) for score in first_line.split()]
    if len(scores) != 2 or None in scores:
        yield Dropped("a judgement that does not begin with two scores")
        return
    answers = text(row, "answer1_body"), text(row, "answer2_body")
    prompt = (Message("user", text(row, "question_body")),)
    yield from ranked_pairs(id, prompt, zip(answers, scores, strict=True))


ADAPTERS: tuple[Adapter[PreferencePair], ...] = (
    Adapter(
        "ultrafeedback_pairs",
        "openbmb/UltraFeedback",
        ("instruction", "completions"),
        ultrafeedback_pairs,
    ),
    Adapter(
        "code_ultrafeedback_pairs",
        "coseal/CodeUltraFeedback",
        ("instruction", "preference", "responses", "annotations"),
        code_ultrafeedback_pairs,
    ),
    Adapter(
        "judgelm",
        "BAAI/JudgeLM-100K",
        ("question_body", "answer1_body", "answer2_body", "text"),
        judgelm_pair,
    ),
)
