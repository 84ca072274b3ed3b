"""Surface features: the length and format of a response, measured from its text.

Structure comes from a CommonMark parser (with tables and bare links) and an emoji library, so
that a list inside a code block is code, and `2 * 3 * 4` is not emphasis.
"""

import math
import re
from collections.abc import Sequence
from functools import cache

import emoji
import torch
from jaxtyping import Float
from markdown_it import MarkdownIt
from torch import Tensor

SURFACE_FEATURES = (
    "log_length",
    "list_items",
    "bold",
    "headings",
    "links",
    "code_blocks",
    "tables",
    "emoji",
    "exclamations",
    "affirmative",
)
"""Names of the features, in column order:

- `log_length`: log of one plus the number of white-space separated words, markup apart
- `list_items`, `bold`, `headings`, `links`, `code_blocks`, `tables`, `emoji`: counts
- `exclamations`: exclamation marks outside code
- `affirmative`: 1 if the response opens with Sure, Certainly, Of course, Absolutely or Great
"""

FORMAT_FEATURES = tuple(name for name in SURFACE_FEATURES if name != "log_length")

_AFFIRMATIVE = ("sure", "certainly", "of course", "absolutely", "great")
_COUNTED = {
    "list_item_open": "list_items",
    "strong_open": "bold",
    "heading_open": "headings",
    "link_open": "links",
    "fence": "code_blocks",
    "code_block": "code_blocks",
    "table_open": "tables",
}
_TAG = re.compile(r"<!--.*?(?:-->|$)|<[^>]*>", re.DOTALL)
_CODE = ("fence", "code_block", "code_inline")


def surface_features(responses: Sequence[str]) -> Float[Tensor, "batch covariates"]:
    """Measure the length and format of each response.

    Returns:
        One row per response, one column per name in `SURFACE_FEATURES`, float64.

    Example:
        >>> row = surface_features(["Sure! Two **bold** words and **three more**."])[0]
        >>> dict(zip(SURFACE_FEATURES, row.tolist()))["bold"]
        2.0
    """
    rows = [_measure(response) for response in responses]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(SURFACE_FEATURES))


def _measure(response: str) -> list[float]:
    counts = dict.fromkeys(SURFACE_FEATURES, 0.0)
    texts: list[str] = []
    prose: list[str] = []
    for token in _parser().parse(response):
        # Markup between two letters must not make two words of one: an inline block is one text.
        spans: list[str] = []
        for part in (token, *(token.children or ())):
            if part.type in _COUNTED:
                counts[_COUNTED[part.type]] += 1
            if part.type == "text" or part.type in _CODE:
                spans.append(part.content)
            elif part.type in ("softbreak", "hardbreak"):
                spans.append(" ")
            elif part.type == "html_block":
                spans.append(_TAG.sub(" ", part.content))
                prose.append(spans[-1])
            if part.type == "text":
                prose.append(part.content)
        texts.append("".join(spans))
    counts["log_length"] = math.log1p(sum(len(text.split()) for text in texts))
    # ©, ® and ™ are text unless a variation selector asks for the picture.
    found = [entry["emoji"] for text in prose for entry in emoji.emoji_list(text)]
    counts["emoji"] = float(sum(each not in "©®™" for each in found))
    counts["exclamations"] = float(sum(text.count("!") for text in prose))
    opening = response.lstrip(" \n#*_>").casefold()
    counts["affirmative"] = float(
        any(
            opening.startswith(word) and not opening[len(word) : len(word) + 1].isalnum()
            for word in _AFFIRMATIVE
        )
    )
    return [counts[name] for name in SURFACE_FEATURES]


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"linkify": True}).enable(["table", "linkify"])
    assert parser.linkify is not None
    # Without the two-letter country domains, or main.py and run.sh would be links.
    parser.linkify.tlds(["com", "org", "net", "edu", "gov", "info"])
    return parser
