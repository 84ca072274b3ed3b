"""Surface features: the length and format of a response, measured from its text.

Structure comes from a CommonMark parser (with tables and bare links) and an emoji library, so
that a list inside a code block is code, and `2 * 3 * 4` is not emphasis. The regular expressions
here only tell which texts need the parser or the library at all: most lines do not.
"""

import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import emoji
import regex  # type: ignore[import-untyped]
import torch
from jaxtyping import Float
from markdown_it import MarkdownIt
from markdown_it.token import Token
from torch import Tensor

SURFACE_FEATURES = (
    "log_length",
    "paragraphs",
    "lines",
    "list_items",
    "bold",
    "italic",
    "headings",
    "links",
    "code_blocks",
    "inline_code",
    "tables",
    "emoji",
    "exclamations",
    "questions",
    "affirmative",
)
"""Names of the features, in column order. All but the first and the last are counts.

- `log_length`: log of one plus the number of words. A word is what stands between white space,
  markup apart: `**warm**est` is one, `x = 1` in code is three. Scripts written without spaces
  (Chinese, Japanese, Thai, Lao, Khmer, Burmese) have no such words, so each of their letters
  counts as one: a constant factor, which a logarithm makes a constant.
- `paragraphs`: paragraphs of the text itself; not those inside lists and quotes, nor headings.
- `lines`: lines with text on them as the source has them, code included; a table row is one line.
- `list_items`: bulleted and numbered items, at every depth.
- `bold`, `italic`: emphasised spans; `***both***` is one of each.
- `headings`: of every level, underlined ones included.
- `links`: marked ones, and bare web and mail addresses; images are not links.
- `code_blocks`: fenced, closed or not, and indented blocks.
- `inline_code`: code spans inside text.
- `tables`: pipe tables.
- `emoji`: emoji outside code, a sequence (family, flag, keycap, skin tone) once. A character that
  Unicode shows as text unless asked (©, ↔, ❤ without its selector) is text.
- `exclamations`, `questions`: marks outside code and bare addresses, of every script that has its
  own; the Spanish ones that open a sentence do not count, since they come in pairs.
- `affirmative`: 1 if the response opens with Sure, Certainly, Of course, Absolutely or Great.

Text in HTML counts as text, its tags and comments do not.
"""

FORMAT_FEATURES = tuple(name for name in SURFACE_FEATURES if name != "log_length")

MARKS = (
    "list_items",
    "bold",
    "italic",
    "headings",
    "links",
    "code_blocks",
    "inline_code",
    "tables",
    "emoji",
)
"""Surface features whose sum says which of two responses is more formatted."""

SURFACE_VERSION = 2
"""To be raised whenever some text measures differently: stored covariates are then made again."""

AFFIRMATIVE = ("sure", "certainly", "of course", "absolutely", "great")
_EXCLAMATIONS = "!\uff01\ufe57\u203c\u2049\u2048\u055c"
_QUESTIONS = "?\uff1f\ufe56\u2047\u2049\u2048\u061f\u055e\u037e\u1367"
_COUNTED = {
    "list_item_open": "list_items",
    "strong_open": "bold",
    "em_open": "italic",
    "heading_open": "headings",
    "link_open": "links",
    "fence": "code_blocks",
    "code_block": "code_blocks",
    "code_inline": "inline_code",
    "table_open": "tables",
}
_ADDRESSES = ("linkify", "autolink")

# Top-level domains of bare addresses. Without the two-letter country domains, or main.py and
# run.sh would be links.
_DOMAINS = ("com", "org", "net", "edu", "gov", "info")

# A line that may begin something else than a paragraph, or underline a heading.
_BLOCK = re.compile(r"^[ \t]*(?:[#>*+\-_`~<\[=|:]|\d{1,9}[.)])|^ {0,3}\t|^ {4}", re.MULTILINE)
_SPAN = re.compile(r"[\\`*_\[<&]")
_ADDRESS = re.compile(rf"//|@|\.(?:{'|'.join(_DOMAINS)}|xn--)", re.IGNORECASE)

_UNSPACED = "".join(
    rf"\p{{Script={name}}}"
    for name in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
)
_LETTER = regex.compile(rf"(?V1)[[{_UNSPACED}]&&\p{{L}}]\p{{M}}*")
_PUNCTUATION = regex.compile(r"\p{P}+")

# Every emoji that is not text unless asked holds one of these; most texts need no library to tell.
_PICTURE = regex.compile(r"[\p{Emoji_Presentation}\ufe0f\u20e3\u200d]")


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
    measured: dict[str, float] = dict.fromkeys(SURFACE_FEATURES, 0)
    blocks = list(_blocks(response, measured))
    text = "".join(block.text for block in blocks)
    prose = "".join(block.prose for block in blocks)
    measured["log_length"] = math.log1p(_words(text))
    measured["lines"] = sum(not line.isspace() for line in text.split("\n") if line)
    measured["emoji"] = _emoji(prose)
    measured["exclamations"] = _marks(prose, _EXCLAMATIONS)
    measured["questions"] = _marks(prose, _QUESTIONS)
    opening = response.lstrip(" \t\r\n#*_>")[:32].casefold()
    measured["affirmative"] = any(
        opening.startswith(word) and not opening[len(word) : len(word) + 1].isalnum()
        for word in AFFIRMATIVE
    )
    return list(measured.values())


class _Shown(NamedTuple):
    """What is shown of a piece of the source."""

    text: str
    """All of it."""
    prose: str
    """All but code and bare addresses."""


def _blocks(response: str, counts: dict[str, float]) -> Iterator[_Shown]:
    """Yield what is shown of each block, and count what the response is made of."""
    source = response.replace("\r\n", "\n").replace("\r", "\n")
    if _BLOCK.search(source) is None:
        yield from _paragraphs(source, counts)
        return
    references: dict[str, object] = {}
    opened = ""
    for token in _block_parser().parse(source, references):
        if token.type in _COUNTED:
            counts[_COUNTED[token.type]] += 1
        if token.type == "inline":
            # White space of other kinds than the specification knows is no text either.
            counts["paragraphs"] += opened == "paragraph_open" and bool(token.content.strip())
            in_table = opened in ("th_open", "td_open")
            yield _span(token.content, counts, references, end="\t" if in_table else "\n")
        elif token.type == "tr_close":
            yield _Shown("\n", "\n")
        elif token.type in ("fence", "code_block"):
            yield _Shown(token.content + "\n", "\n")
        elif token.type == "html_block":
            (inline,) = _tag_parser().parseInline(token.content)
            yield _show(inline, {}, end="\n")
        # Paragraphs of lists and quotes are on a deeper level than those of the response.
        opened = token.type if token.level == 0 or token.type in ("th_open", "td_open") else ""


def _paragraphs(source: str, counts: dict[str, float]) -> Iterator[_Shown]:
    """Show what the parser would of a text of paragraphs alone, which most are, much faster."""
    plain = _is_plain(source)
    lines: list[str] = []
    for line in [*source.split("\n"), ""]:
        if line.strip(" \t"):
            lines.append(line)
        elif lines:
            content = "\n".join(lines)
            lines.clear()
            counts["paragraphs"] += bool(content.strip())
            if not plain:
                yield _span(content, counts, {}, end="\n")
    if plain:
        yield _Shown(source, source)


def _is_plain(text: str) -> bool:
    """Whether a paragraph holds nothing that a parser could read as anything but text."""
    return _SPAN.search(text) is None and _ADDRESS.search(text) is None


def _span(
    content: str, counts: dict[str, float], references: dict[str, object], *, end: str
) -> _Shown:
    """Show a paragraph, a heading or a cell of a table."""
    if _is_plain(content):
        return _Shown(content + end, content + end)
    parser = _span_parser(addresses=_ADDRESS.search(content) is not None)
    (inline,) = parser.parseInline(content, references)
    return _show(inline, counts, end=end)


def _show(inline: Token, counts: dict[str, float], *, end: str) -> _Shown:
    text: list[str] = []
    prose: list[str] = []
    in_address = False
    for token in inline.children or ():
        if token.type in _COUNTED and _COUNTED[token.type] in counts:
            counts[_COUNTED[token.type]] += 1
        if token.type == "text":
            text.append(token.content)
            if not in_address:
                prose.append(token.content)
        elif token.type in ("softbreak", "hardbreak"):
            text.append("\n")
            prose.append("\n")
        elif token.type == "code_inline":
            text.append(token.content)
        elif token.type == "link_open":
            in_address = token.markup in _ADDRESSES
        elif token.type == "link_close":
            in_address = False
    return _Shown("".join(text) + end, "".join(prose) + end)


def _words(text: str) -> int:
    if text.isascii() or _LETTER.search(text) is None:
        return len(text.split())
    rest, letters = _LETTER.subn(" ", text)
    # What is left between such letters is mostly their punctuation.
    return int(letters) + sum(_PUNCTUATION.fullmatch(piece) is None for piece in rest.split())


def find_emoji(line: str) -> Iterator[tuple[int, int]]:
    """Yield where each emoji that counts begins and ends in a line."""
    if line.isascii() or _PICTURE.search(line) is None:
        return
    for entry in emoji.emoji_list(line):
        if _PICTURE.search(entry["emoji"]):
            yield entry["match_start"], entry["match_end"]


def _emoji(text: str) -> int:
    if text.isascii() or _PICTURE.search(text) is None:
        return 0
    return sum(1 for line in text.split("\n") for _ in find_emoji(line))


def _marks(text: str, marks: str) -> int:
    return sum(map(text.count, marks[:1] if text.isascii() else marks))


def commonmark() -> MarkdownIt:
    """Return a parser of the Markdown that is measured: CommonMark, with tables."""
    # Deeper than people nest, where the parser would leave out the rest of the text.
    return MarkdownIt("commonmark", {"maxNesting": 100}).enable("table")


@cache
def _block_parser() -> MarkdownIt:
    """Parse blocks alone: what stands in them seldom needs a parser."""
    return commonmark().disable(["inline", "text_join"])


@cache
def _span_parser(*, addresses: bool) -> MarkdownIt:
    parser = commonmark()
    if addresses:
        parser = MarkdownIt("commonmark", {"maxNesting": 100, "linkify": True}).enable("linkify")
        assert parser.linkify is not None
        parser.linkify.tlds(list(_DOMAINS))
    return parser


@cache
def _tag_parser() -> MarkdownIt:
    """Parse nothing but the tags and entities of HTML."""
    return MarkdownIt("zero", {"html": True}).enable(["html_inline", "entity"])
