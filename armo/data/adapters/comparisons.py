"""Pairs out of scores: all pairs of the rated, judged or ranked answers to one prompt."""

from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean
from typing import Any

from armo.data.adapters.base import Adapter, Dropped, member, objects, rating, text
from armo.data.adapters.oasst import OASST2, oasst_conversations
from armo.data.adapters.paired import optional_text, ranked_pairs
from armo.data.adapters.ultrafeedback import ASPECTS, CODE_ULTRAFEEDBACK, ULTRAFEEDBACK
from armo.data.conversation import Message, PreferencePair
from armo.data.published import PublishedRow, read_messages


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
    for completion in objects(row, "completions", "response", "annotations"):
        annotations = member(completion, "annotations")
        given = [rating(member(annotations, aspect).get("Rating")) for aspect in ASPECTS]
        known = [score for score in given if score is not None]
        scored.append((text(completion, "response"), fmean(known) if known else None))
    prompt = (Message("user", text(row, "instruction")),)
    yield from ranked_pairs(id, prompt, scored, category=optional_text(row, "source"))


def code_ultrafeedback_pairs(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make all pairs of the answers in a row of CodeUltraFeedback, by the aspect that it judges.

    Args:
        row: `instruction`; `preference`, the aspect; `responses`, each with a `model` and a
            `response`; `annotations`, in another order, each with a `model` and a `rating` from 1
            to 5 or `N/A`.
        id: Of the row.
    """
    given = objects(row, "annotations", "model", "rating")
    ratings = {text(each, "model"): rating(each["rating"]) for each in given}
    scored = [
        (text(each, "response"), ratings.get(text(each, "model")))
        for each in objects(row, "responses", "model", "response")
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


def oasst_siblings(rows: Iterable[PublishedRow]) -> Iterator[PublishedRow]:
    """Put the answers to one message of OpenAssistant together.

    Yields one row for each message with several: `messages`, from the root to it, `lang`, and
    `answers`, each with a `text` and a `rank`. All messages are held in memory.
    """
    answers: dict[str, list[PublishedRow]] = {}
    for row in oasst_conversations(rows):
        answers.setdefault(text(row.fields, "parent_id"), []).append(row)
    for siblings in answers.values():
        if len(siblings) > 1:
            each = [{"text": row.fields["text"], "rank": row.fields["rank"]} for row in siblings]
            turns, lang = siblings[0].fields["messages"][:-1], siblings[0].fields["lang"]
            yield siblings[0]._replace(fields={"messages": turns, "lang": lang, "answers": each})


def oasst2_pairs(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make all pairs of the ranked answers in a row of `oasst_siblings`; rank 0 is the best.

    The margin is the difference in rank.
    """
    scored = []
    for answer in objects(row, "answers", "text", "rank"):
        rank = rating(answer["rank"])
        scored.append((text(answer, "text"), None if rank is None else -rank))
    prompt = read_messages(row["messages"], "messages")
    yield from ranked_pairs(id, prompt, scored, category=text(row, "lang"))


ADAPTERS: tuple[Adapter[PreferencePair], ...] = (
    Adapter("ultrafeedback_pairs", ULTRAFEEDBACK.id, ULTRAFEEDBACK.columns, ultrafeedback_pairs),
    Adapter(
        "code_ultrafeedback_pairs",
        CODE_ULTRAFEEDBACK.id,
        CODE_ULTRAFEEDBACK.columns,
        code_ultrafeedback_pairs,
    ),
    Adapter(
        "judgelm",
        "BAAI/JudgeLM-100K",
        ("question_body", "answer1_body", "answer2_body", "text"),
        judgelm_pair,
    ),
    Adapter(
        "oasst2_pairs",
        OASST2.id,
        (*OASST2.columns, "rank"),
        oasst2_pairs,
        gather=oasst_siblings,
    ),
)
