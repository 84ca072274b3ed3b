"""Pairs of two whole conversations, `chosen` and `rejected`, that differ in the last answer."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from armo.data.adapters.base import Adapter, Dropped, listed, rating
from armo.data.adapters.paired import difference, messages, optional_text, pair
from armo.data.conversation import PreferencePair, Prompt


def conversation_pair(
    row: Mapping[str, Any],
    id: str,
    *,
    scores: tuple[str, str] | None = None,
    category: str | None = None,
) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of two conversations.

    Args:
        row: `chosen` and `rejected`, lists of messages.
        id: Of the row.
        scores: Fields with the scores of the two, if their difference is a margin; one that is
            missing, or no number, makes none.
        category: Field with the kind of the row, if there is one.
    """
    kind = optional_text(row, category) if category is not None else ""
    yield conversations(
        id,
        messages(row, "chosen"),
        messages(row, "rejected"),
        margin=None if scores is None else difference(row, *scores),
        category=kind,
    )


def conversations(
    id: str, chosen: Prompt, rejected: Prompt, *, margin: float | None = None, category: str = ""
) -> PreferencePair | Dropped:
    """Make a pair of two conversations that share all turns but the last; as `pair`."""
    if any(not side or side[-1].role != "assistant" for side in (chosen, rejected)):
        return Dropped("a conversation that does not end with an answer")
    if chosen[:-1] != rejected[:-1]:
        return Dropped("two prompts")
    answers = chosen[-1].content, rejected[-1].content
    return pair(id, chosen[:-1], *answers, margin=margin, category=category)


def magpie_pair(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of a Magpie set; the margin is the spread of ArmoRM's scores.

    Args:
        row: `chosen` and `rejected`, lists of messages; `rewards_armorm`, a list of scores, or of
            objects with a `score`.
        id: Of the row.
    """
    given = listed(row, "rewards_armorm")
    scores = [rating(each.get("score") if isinstance(each, Mapping) else each) for each in given]
    known = [score for score in scores if score is not None]
    margin = max(known) - min(known) if known else None
    yield conversations(id, messages(row, "chosen"), messages(row, "rejected"), margin=margin)


def unified_pair(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of Unified-Feedback; its sources' ratings have scales of their own.

    Args:
        row: `conv_A` and `conv_B`, lists of messages; `conv_A_rating`, `conv_B_rating`; `source`.
        id: Of the row.
    """
    margin = difference(row, "conv_A_rating", "conv_B_rating")
    if not margin:
        yield Dropped("equal scores" if margin == 0.0 else "a response without a score")
        return
    chosen, rejected = ("conv_A", "conv_B") if margin > 0.0 else ("conv_B", "conv_A")
    kind = optional_text(row, "source")
    yield conversations(id, messages(row, chosen), messages(row, rejected), category=kind)


def _standard(
    name: str,
    id: str,
    *,
    scores: tuple[str, str] | None = None,
    category: str | None = None,
    split: str = "train",
) -> Adapter[PreferencePair]:
    rows = partial(conversation_pair, scores=scores, category=category)
    return Adapter(name, id, ("chosen", "rejected", *(scores or ())), rows, splits=(split,))


_SCORES = ("chosen_score", "rejected_score")
_RATINGS = ("chosen_rating", "rejected_rating")
_MAGPIE = {
    "magpie_pro": "Magpie-Align/Magpie-Pro-DPO-100K-v0.1",
    "magpie_air": "Magpie-Align/Magpie-Air-DPO-100K-v0.1",
    "magpie_llama_3_1_pro": "Magpie-Align/Magpie-Llama-3.1-Pro-DPO-100K-v0.1",
}
# Of SHP the scores are upvotes, of which the ratio counts; of preference_700K they are on the
# scales of sources that are not named.
ADAPTERS: tuple[Adapter[PreferencePair], ...] = (
    _standard("rlhflow_ultrafeedback", "RLHFlow/UltraFeedback-preference-standard", scores=_SCORES),
    _standard("rlhflow_helpsteer", "RLHFlow/Helpsteer-preference-standard", scores=_SCORES),
    _standard("rlhflow_helpsteer2", "RLHFlow/Helpsteer2-standard", scores=_SCORES),
    _standard("rlhflow_hh_helpful", "RLHFlow/HH-RLHF-Helpful-standard"),
    _standard("rlhflow_hh_harmless", "RLHFlow/HH-RLHF-Harmless-and-RedTeam-standard"),
    _standard("rlhflow_shp", "RLHFlow/SHP-standard"),
    _standard("rlhflow_orca", "RLHFlow/Orca-distibalel-standard", scores=_SCORES),
    _standard("rlhflow_capybara", "RLHFlow/Capybara-distibalel-Filter-standard", scores=_SCORES),
    _standard("rlhflow_code_ultrafeedback", "RLHFlow/CodeUltraFeedback-standard", scores=_SCORES),
    _standard("rlhflow_ultrainteract", "RLHFlow/UltraInteract-filtered-standard"),
    _standard("rlhflow_pku_saferlhf", "RLHFlow/PKU-SafeRLHF-30K-standard"),
    _standard("rlhflow_prometheus2", "RLHFlow/Prometheus2-preference-standard", scores=_SCORES),
    _standard("rlhflow_math", "RLHFlow/Argilla-Math-DPO-standard", scores=_RATINGS),
    _standard("pair_data_v2", "RLHFlow/pair_data_v2_80K_wsafety"),
    _standard("preference_700k", "hendrydong/preference_700K"),
    _standard("skywork_v0_1", "Skywork/Skywork-Reward-Preference-80K-v0.1", category="source"),
    _standard("skywork_v0_2", "Skywork/Skywork-Reward-Preference-80K-v0.2", category="source"),
    _standard("tulu_3_8b", "allenai/llama-3.1-tulu-3-8b-preference-mixture"),
    _standard("openrlhf_mixture2", "OpenRLHF/preference_dataset_mixture2_and_safe_pku"),
    _standard("magpielm", "Magpie-Align/MagpieLM-DPO-Data-v0.1"),
    *(
        Adapter(name, id, ("chosen", "rejected", "rewards_armorm"), magpie_pair)
        for name, id in _MAGPIE.items()
    ),
    _standard(
        "ultrafeedback_argilla",
        "argilla/ultrafeedback-binarized-preferences-cleaned",
        scores=("chosen-rating", "rejected-rating"),
        category="source",
    ),
    _standard(
        "ultrafeedback_h4",
        "HuggingFaceH4/ultrafeedback_binarized",
        scores=("score_chosen", "score_rejected"),
        split="train_prefs",
    ),
    _standard(
        "ultrafeedback_allenai",
        "allenai/ultrafeedback_binarized_cleaned",
        scores=("score_chosen", "score_rejected"),
        category="source",
        split="train_prefs",
    ),
    _standard(
        "ultrafeedback_trl",
        "trl-lib/ultrafeedback_binarized",
        scores=("score_chosen", "score_rejected"),
    ),
    _standard("capybara", "argilla/Capybara-Preferences", scores=_RATINGS, category="source"),
    _standard(
        "capybara_filtered",
        "argilla/Capybara-Preferences-Filtered",
        scores=_RATINGS,
        category="source",
    ),
    _standard(
        "capybara_7k",
        "argilla/distilabel-capybara-dpo-7k-binarized",
        scores=("rating_chosen", "rating_rejected"),
        category="source",
    ),
    Adapter(
        "unified_feedback",
        "llm-blender/Unified-Feedback",
        ("conv_A", "conv_B", "conv_A_rating", "conv_B_rating"),
        unified_pair,
        config="all",
    ),
)
