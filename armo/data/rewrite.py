"""The same answer in another style: one surface pattern put in or taken out, the content kept.

What a reward model says of both versions tells what it gives for the pattern alone. Nothing is
returned that was not measured: the pattern's own feature moved as asked, what does not follow from
it stayed, and every piece of code is as it was.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise

import regex  # type: ignore[import-untyped]
from markdown_it import MarkdownIt
from markdown_it.token import Token

from armo.data.surface import (
    AFFIRMATIVE,
    SURFACE_FEATURES,
    commonmark,
    find_emoji,
    surface_features,
)

PATTERNS = {
    "length": "log_length",
    "bold": "bold",
    "list": "list_items",
    "exclamation": "exclamations",
    "link": "links",
    "affirmative": "affirmative",
    "emoji": "emoji",
    "heading": "headings",
}
"""The patterns of Zhang et al., "From Lists to Emojis" (arXiv 2409.11704), and headings; with the
surface feature that counts each.

- `length`: sentences that say nothing, about half as many words as the response has.
- `bold`: a word or two, in half of the sentences.
- `list`: half of the paragraphs, a bullet for each sentence.
- `exclamation`: instead of the full stop, at the end of half of the sentences.
- `link`: a word or two, in a quarter of the sentences, lead to example.org.
- `affirmative`: an opening of a word or two.
- `emoji`: at the end of half of the sentences.
- `heading`: one of one word above the response.
"""

# What else moves with a pattern: a word is put in or an emoji stands like one, a line is broken,
# or an opening goes with its mark.
_FOLLOWS = {
    "length": {"lines", "paragraphs"},
    "bold": set(),
    "list": {"lines", "paragraphs"},
    "exclamation": set(),
    "link": set(),
    "affirmative": {"log_length", "lines", "paragraphs", "exclamations"},
    "emoji": {"log_length", "lines", "paragraphs"},
    "heading": {"log_length", "lines", "paragraphs"},
}

_SHARES = {"bold": 0.5, "list": 0.5, "exclamation": 0.5, "link": 0.25, "emoji": 0.5}
_PADDING_SHARE = 0.5

_PADDING = (
    "There is of course always more than one way in which something like this could be put.",
    "As so often, these words are only one attempt to say what there is to be said.",
    "All of this is meant in just the way in which it has been written down here.",
    "It may help to go over these sentences once more, slowly and from the beginning.",
    "In other words, what has been said up to this point is what was to be said.",
    "Whatever else comes to mind while reading this can be set beside what stands here.",
    "With this being said, it seems only fitting to carry on to whatever follows it.",
    "It goes without saying that what goes without saying has not been said here again.",
    "To put it the way it is usually put, this is how the matter has been put.",
    "Before going any further, it is worth noting that this has now been noted as well.",
    "Each of these points stands where it stands because some place had to be found for it.",
    "Taken together, these remarks are as long as they are and no longer than that.",
)
_OPENINGS = ("Sure.", "Certainly.", "Of course.", "Absolutely.")
_TITLES = ("Answer", "Reply", "Response")
_EMOJI = ("😊", "👍", "✨", "🎉", "🌟", "💡")
_ADDRESS = "https://example.org"

_ATTEMPTS = 4

# Of a text's markup: what no change may look into, formulas and code. A blank line ends it.
_INNER = r"(?:(?!\n\s*\n).)+?"
_FORMULA = (
    rf"(?P<kept>\$\${_INNER}\$\$|\\\({_INNER}\\\)|\\\[{_INNER}\\\]"
    r"|(?<![\w$\\])\$(?=\S)[^$\n]+?(?<=[^\s\\])\$(?![\w$]))"
)
_VERBATIM = (
    _FORMULA + r"|(?P<kept>\\.|(?<!`)(?P<ticks>`+)(?!`)" + _INNER + r"(?<!`)(?P=ticks)(?!`))"
)
_CLOSERS = r"[\"'”\u2019)\]*_]*"
_MARKUP = "|".join(
    (
        _VERBATIM,
        r"(?P<kept>!?\[[^\]\n]*\](?:\([^)\n]*\)|\[[^\]\n]*\]|:)?)",
        r"(?P<kept><[^>\n]*>)",
        r"(?P<kept>(?<!\S)\S*(?://|www\.|@|\.\w)\S*)",
        r"(?P<kept>&\w+;)",
        rf"(?P<kept>(?P<marks>\*{{1,3}}|_{{1,3}})(?=\S){_INNER}(?<=\S)(?P=marks))",
    )
)
_SHORTENED = r"(?<!\b(?:Mrs?|Ms|Dr|Prof|St|Jr|Sr|vs|etc|No|Nr|Fig|Vol|approx))"
_NUMBERED = r"(?<!^[\s>*+-]*\d{1,9})"
_SENTENCE_END = (
    rf"(?P<here>{_SHORTENED}{_NUMBERED}(?<=[\p{{L}}\p{{M}}]{{2}}|\p{{N}}|[\"'”\u2019)\]*_`%])"
    rf"[.!?]+{_CLOSERS}(?:[ ]?\p{{Emoji_Presentation}})*"
    rf"(?=\s+[\p{{Lu}}\p{{Lo}}\p{{N}}\"'“\u2018(\[*_`]|\s*\Z)|[。\uff01\uff1f]+)"
)
_PHRASE = (
    r"(?P<here>(?<![\w*_'\u2019-])[\p{L}\p{M}]{4,}(?:[ ][\p{L}\p{M}]{4,})?"
    r"(?![\w*_'\u2019-]|[.][\p{L}\p{N}]))"
)


def _compiled(*parts: str) -> "regex.Pattern[str]":
    return regex.compile("|".join(parts), regex.DOTALL | regex.MULTILINE)


_ENDS = _compiled(_MARKUP, _SENTENCE_END)
_PHRASES = _compiled(_MARKUP, _PHRASE)
_STOP = regex.compile(r"[.。](?![.!?。\uff01\uff1f])")
_STRONG = _compiled(
    _VERBATIM,
    rf"\*\*(?=\S)(?P<inner>{_INNER})(?<=\S)\*\*",
    rf"(?<!\w)__(?=\S)(?P<inner>{_INNER})(?<=\S)__(?!\w)",
)
_LINK = _compiled(
    _VERBATIM,
    r"(?<!!)\[(?P<inner>[^\[\]]*)\]\((?:<[^<>\n]*>|[^()\s]*(?:\([^()\s]*\)[^()\s]*)*)"
    r"(?:\s+(?:\"[^\"\n]*\"|'[^'\n]*'))?\s*\)",
)
_CALL = _compiled(
    _VERBATIM,
    r"(?P<none>(?<=[?\uff1f])[!\uff01]+|[!\uff01]+(?=[?\uff1f]))",
    r"(?P<wide>\uff01+)",
    r"(?P<call>(?<!<)!+(?=[\s\"'”\u2019)\]*_,;:…—\u2013]|\Z|\p{Emoji_Presentation}))",
)
_PADDED = _compiled(_VERBATIM, rf"(?P<said>[ \t]*(?:{'|'.join(map(regex.escape, _PADDING))}))")
_VERBATIM_SPAN = _compiled(_VERBATIM)
# White space up to the next text, but for what indents a line.
_GAP = r"(?:(?:[ \t]*\n)+|[ \t]+|\Z)"
_OPENING = regex.compile(
    rf"\A\s*(?:(?:{'|'.join(AFFIRMATIVE)})"
    rf"(?:[.!:]+{_GAP}|(?P<joined>,\s*|\s*[\u2014\u2013]\s*|\s+-\s+)|[ \t]*\n{_GAP}?))+",
    regex.IGNORECASE,
)
_HARD_BREAK = regex.compile(r"(?: {2}|\\)$", regex.MULTILINE)
_ITEM = regex.compile(r"^\s*(?:(?:[-*+]|\d{1,9}[.)])(?:\s+|$))+")
_ATX = regex.compile(r"^ {0,3}#{1,6}(?:[ \t]+|$)(?P<title>.*?)(?:[ \t]+#+)?[ \t]*$")

_Edit = tuple[int, int, str]


def add_pattern(response: str, pattern: str, *, seed: int = 0) -> str | None:
    r"""Put a pattern into a response that has none of it; `length` can always be put in.

    Where it goes is drawn by the seed and the text. Line ends become `\n`.

    Args:
        response: Any text, as Markdown.
        pattern: One of `PATTERNS`.
        seed: Of the places.

    Returns:
        The response with the pattern; None if it has it already, offers no place for it, or is
        written in a script that the English words of `length`, `affirmative` and `heading` do not
        go with.

    Raises:
        ValueError: For an unknown pattern.

    Example:
        >>> add_pattern("Wait for seven minutes. Then cool it.", "list")
        '- Wait for seven minutes.\n- Then cool it.'
    """
    source, feature = _Source(response), _feature(pattern)
    has = pattern != "length" and _measured(source.text, feature) != 0.0
    if has or not source.text.strip():
        return None
    for attempt in range(_ATTEMPTS):
        rng = random.Random(f"{seed}:{attempt}:{pattern}:{source.text}")
        edits = _ADD[pattern](source, rng)
        if not edits:
            return None
        changed = _edited(source.text, edits)
        if _is_rewrite(source, changed, pattern, present=True):
            return changed
    return None


def remove_pattern(response: str, pattern: str) -> str | None:
    """Take every trace of a pattern out of a response; of `length`, what `add_pattern` put in.

    Items of a list become lines, headings become paragraphs, links leave their words, exclamation
    marks become full stops.

    Args:
        response: Any text, as Markdown.
        pattern: One of `PATTERNS`.

    Returns:
        The response without the pattern; None if there is none, or not all of it can go: a bare
        address, an opening that is part of its sentence.

    Raises:
        ValueError: For an unknown pattern.

    Example:
        >>> remove_pattern("Use **warm** water!", "bold")
        'Use warm water!'
    """
    source = _Source(response)
    if _measured(source.text, _feature(pattern)) == 0.0:
        return None
    changed = _REMOVE[pattern](source)
    return changed if _is_rewrite(source, changed, pattern, present=False) else None


def _feature(pattern: str) -> str:
    if pattern not in PATTERNS:
        raise ValueError(f"`pattern` must be one of {', '.join(PATTERNS)}, got {pattern!r}.")
    return PATTERNS[pattern]


def _measured(text: str, feature: str) -> float:
    return float(surface_features([text])[0, SURFACE_FEATURES.index(feature)])


def _is_rewrite(source: "_Source", changed: str, pattern: str, *, present: bool) -> bool:
    """Whether the pattern's feature moved as it should, and nothing that does not follow it."""
    if not changed.strip() or changed == source.text:
        return False
    for name, before, after in zip(
        SURFACE_FEATURES, *surface_features([source.text, changed]).tolist(), strict=True
    ):
        if name == PATTERNS[pattern]:
            moved = (after > before) == present and after != before
            if not moved or (pattern != "length" and (after > 0.0) != present):
                return False
        elif name not in _FOLLOWS[pattern] and before != after:
            return False
    return _Source(changed).code == source.code


@cache
def _parser() -> MarkdownIt:
    return commonmark()


class _Source:
    """A response, and where its parts are."""

    def __init__(self, response: str) -> None:
        self.text = response.replace("\r\n", "\n").replace("\r", "\n")
        self.tokens: list[Token] = _parser().parse(self.text)
        self._starts = [0]
        for line in self.text.split("\n"):
            self._starts.append(self._starts[-1] + len(line) + 1)

    @property
    def code(self) -> list[str]:
        """The contents of code blocks and code spans, in order."""
        found = []
        for token in self.tokens:
            if token.type in ("fence", "code_block"):
                found.append(token.content)
            found += [each.content for each in token.children or () if each.type == "code_inline"]
        return found

    def span(self, token: Token) -> tuple[int, int]:
        """Where a block begins and ends, without the white space after it."""
        assert token.map is not None
        first, last = (self._starts[min(line, len(self._starts) - 1)] for line in token.map)
        return first, first + len(self.text[first:last].rstrip())

    def paragraphs(self, *, top: bool = False) -> list[tuple[int, int]]:
        """Where each paragraph is; those inside lists and quotes only if not `top`."""
        return [
            self.span(token)
            for token in self.tokens
            if token.type == "paragraph_open" and not (top and token.level)
        ]

    def ends(self, start: int, end: int) -> list[tuple[int, int]]:
        """The mark at the end of each sentence of a paragraph, with what closes it."""
        found = _ENDS.finditer(self.text[start:end])
        return [(start + m.start(), start + m.end()) for m in found if m["here"] is not None]

    def sentences(self, start: int, end: int) -> list[tuple[int, int]]:
        """Each sentence of a paragraph."""
        cuts = [start, *(stop for _, stop in self.ends(start, end) if stop < end), end]
        return list(pairwise(cuts))

    def outside_code(self, change: Callable[[str], str]) -> str:
        """Change all that is not a block of code or HTML."""
        parts, done = [], 0
        for token in self.tokens:
            if token.type in ("fence", "code_block", "html_block"):
                start, end = self.span(token)
                parts += [change(self.text[done:start]), self.text[start:end]]
                done = end
        return "".join([*parts, change(self.text[done:])])

    def in_english(self) -> bool:
        """Whether most letters of its paragraphs, or of all of it, are Latin."""
        text = "".join(self.text[start:end] for start, end in self.paragraphs()) or self.text
        letters = len(regex.findall(r"\p{L}", text))
        return 2 * len(regex.findall(r"\p{Latin}", text)) >= letters


def _edited(text: str, edits: list[_Edit]) -> str:
    parts, done = [], 0
    for start, end, instead in sorted(edits):
        parts += [text[done:start], instead]
        done = end
    return "".join([*parts, text[done:]])


def _some(places: list[_Edit], pattern: str, rng: random.Random) -> list[_Edit]:
    """Draw the pattern's share of the places, one at least if there is any."""
    count = max(1, round(_SHARES[pattern] * len(places)))
    return rng.sample(places, min(count, len(places)))


def _add_length(source: _Source, rng: random.Random) -> list[_Edit]:
    if not source.in_english():
        return []
    wanted = _PADDING_SHARE * len(source.text.split())
    said: list[str] = []
    for sentence in rng.sample(_PADDING, len(_PADDING)):
        if said and sum(len(each.split()) for each in said) >= wanted:
            break
        if sentence not in source.text:
            said.append(sentence)
    ends = [
        end
        for start, end in source.paragraphs(top=True)
        if any(stop == end for _, stop in source.ends(start, end))
    ]
    if not ends:
        end = len(source.text.rstrip())
        return [(end, end, "\n\n" + " ".join(said))] if said else []
    at: dict[int, str] = {}
    for sentence in said:
        end = rng.choice(ends)
        at[end] = f"{at.get(end, '')} {sentence}"
    return [(end, end, added) for end, added in at.items()]


def _phrases(source: _Source, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Draw a word or two of each sentence."""
    for paragraph in source.paragraphs():
        for start, end in source.sentences(*paragraph):
            found = [m for m in _PHRASES.finditer(source.text, start, end) if m["here"] is not None]
            if found:
                yield rng.choice(found).span("here")


def _add_bold(source: _Source, rng: random.Random) -> list[_Edit]:
    places = [(a, b, f"**{source.text[a:b]}**") for a, b in _phrases(source, rng)]
    return _some(places, "bold", rng)


def _add_link(source: _Source, rng: random.Random) -> list[_Edit]:
    places = [(a, b, f"[{source.text[a:b]}]({_ADDRESS})") for a, b in _phrases(source, rng)]
    return _some(places, "link", rng)


def _add_list(source: _Source, rng: random.Random) -> list[_Edit]:
    places = []
    for start, end in source.paragraphs(top=True):
        sentences = source.sentences(start, end)
        if len(sentences) > 1 and not _HARD_BREAK.search(source.text[start:end]):
            items = (
                "- " + regex.sub(r"\n[ \t]*", "\n  ", source.text[a:b].strip())
                for a, b in sentences
            )
            places.append((start, end, "\n".join(items)))
    return _some(places, "list", rng)


def _add_exclamation(source: _Source, rng: random.Random) -> list[_Edit]:
    places = [
        (start, start + 1, "!" if source.text[start] == "." else "\uff01")
        for paragraph in source.paragraphs()
        for start, _ in source.ends(*paragraph)
        if _STOP.match(source.text, start)
    ]
    return _some(places, "exclamation", rng)


def _add_emoji(source: _Source, rng: random.Random) -> list[_Edit]:
    places = [
        (end, end, ("" if source.text[end - 1] in "。\uff01\uff1f" else " ") + rng.choice(_EMOJI))
        for paragraph in source.paragraphs()
        for _, end in source.ends(*paragraph)
    ]
    return _some(places, "emoji", rng)


def _add_affirmative(source: _Source, rng: random.Random) -> list[_Edit]:
    if not source.in_english():
        return []
    opening = rng.choice(_OPENINGS)
    start = len(source.text) - len(source.text.lstrip())
    if source.tokens and source.tokens[0].type == "paragraph_open":
        return [(start, start, f"{opening} ")]
    return [(0, start if "\n" in source.text[:start] else 0, f"{opening}\n\n")]


def _add_heading(source: _Source, rng: random.Random) -> list[_Edit]:
    if not source.in_english():
        return []
    return [(0, 0, f"## {rng.choice(_TITLES)}\n\n")]


def _without_length(source: _Source) -> str:
    return source.outside_code(
        lambda text: _PADDED.sub(lambda m: "" if m["said"] is not None else m[0], text)
    ).rstrip()


def _without_bold(source: _Source) -> str:
    return source.outside_code(lambda text: _STRONG.sub(_inner, text))


def _without_link(source: _Source) -> str:
    return source.outside_code(lambda text: _LINK.sub(_inner, text))


def _inner(found: "regex.Match[str]") -> str:
    return str(found[0] if found["kept"] is not None else found["inner"])


def _without_exclamation(source: _Source) -> str:
    def calmer(found: "regex.Match[str]") -> str:
        instead = {"kept": found[0], "none": "", "wide": "。", "call": "."}
        return str(next(instead[name] for name in instead if found[name] is not None))

    return source.outside_code(lambda text: _CALL.sub(calmer, text))


def _without_emoji(source: _Source) -> str:
    def plainer(text: str) -> str:
        code = [m.span() for m in _VERBATIM_SPAN.finditer(text)]
        opened = [start for start, _ in code]
        lines, offset = [], 0
        for line in text.split("\n"):
            left = line
            for start, end in reversed(list(find_emoji(line))):
                k = bisect_right(opened, offset + start) - 1
                if k >= 0 and offset + start < code[k][1]:
                    continue
                before, after = left[:start], left[end:]
                if not after or after[0].isspace():
                    before = before.rstrip(" ") if before.strip() else before
                if not before.strip():
                    after = after.lstrip(" ")
                left = before + after
            if left.strip() or not line.strip():
                lines.append(left)
            offset += len(line) + 1
        return "\n".join(lines)

    return source.outside_code(plainer)


def _without_list(source: _Source) -> str:
    lines = source.text.split("\n")
    items, code = set(), {}
    for token in source.tokens:
        if token.type == "list_item_open" and token.map is not None:
            items.add(token.map[0])
        elif token.type in ("fence", "code_block") and token.map is not None:
            first = lines[token.map[0]]
            indent = len(first) - len(first.lstrip(" ")) if token.type == "fence" else 0
            code.update(dict.fromkeys(range(*token.map), indent))
    for token in source.tokens:
        if token.type not in ("bullet_list_open", "ordered_list_open") or token.level:
            continue
        assert token.map is not None
        for k in range(*token.map):
            if k in code:
                indent = len(lines[k]) - len(lines[k].lstrip(" "))
                lines[k] = lines[k][min(indent, code[k]) :]
            else:
                lines[k] = (_ITEM.sub("", lines[k]) if k in items else lines[k]).lstrip(" \t")
    return "\n".join(lines)


def _without_affirmative(source: _Source) -> str:
    opening = _OPENING.match(source.text)
    if opening is None:
        return source.text
    rest = source.text[opening.end() :]
    return rest[:1].upper() + rest[1:] if opening["joined"] is not None else rest


def _without_heading(source: _Source) -> str:
    lines = source.text.split("\n")
    for token in reversed(source.tokens):
        if token.type != "heading_open" or token.map is None:
            continue
        first, end = token.map
        atx = _ATX.match(lines[first])
        if token.markup.startswith("#") and atx is None:
            return source.text  # inside a list or a quote
        title = lines[first : end - 1] if atx is None else [atx["title"]]
        if title[0] in _TITLES and not "".join(lines[:first]).strip():
            title = []
        above = [""] if first and lines[first - 1].strip() else []
        below = [""] if end < len(lines) and lines[end].strip() else []
        lines[first:end] = [*above, *title, *below]
    return "\n".join(lines)


_ADD: dict[str, Callable[[_Source, random.Random], list[_Edit]]] = {
    "length": _add_length,
    "bold": _add_bold,
    "list": _add_list,
    "exclamation": _add_exclamation,
    "link": _add_link,
    "affirmative": _add_affirmative,
    "emoji": _add_emoji,
    "heading": _add_heading,
}
_REMOVE: dict[str, Callable[[_Source], str]] = {
    "length": _without_length,
    "bold": _without_bold,
    "list": _without_list,
    "exclamation": _without_exclamation,
    "link": _without_link,
    "affirmative": _without_affirmative,
    "emoji": _without_emoji,
    "heading": _without_heading,
}
