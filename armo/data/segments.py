"""Where the sentences of a response end, so that it can be scored after each."""

import re

# Marks that end a sentence, with what closes after them; before white space, or not, in scripts
# without spaces. Or the end of a line.
_ENDS = re.compile(
    r"""(?<![.!?\u2026\u061f])[.!?\u2026\u061f]++[\"')\]*_\u201d\u2019\u00bb]*+(?=\s|$)"""
    r"""|[\u3002\uff01\uff1f]++[\"')\]*_\u201d\u2019\u00bb\u300d\u300f\uff09]*+"""
    r"""|(?<=\S)(?=[ \t]*+(?:\r?\n|$))"""
)
# What may stand before the first word of a line: a sentence does not end in it.
_BULLETS = " \t\r\n-*+>#|"
_NUMBER = re.compile(r"(?:\d{1,9}[.)])?")


def sentence_ends(text: str) -> tuple[int, ...]:
    r"""Find the character offsets at which the sentences of a text end.

    A sentence ends after `.`, `!`, `?` or the like and the quotes, brackets or asterisks that
    close there, if white space follows; and at the end of every line with text. The number or
    bullet of a list item ends none. Abbreviations are not known: `Dr.` ends a sentence.

    Returns:
        Ascending offsets, each after some text that is not after the one before; the last is the
        length of the text. None for a text without any.

    Example:
        >>> sentence_ends("Yes. It is:\n1. safe (mostly!)\n")
        (4, 11, 30)
    """
    ends: list[int] = []
    for found in _ENDS.finditer(text):
        start = ends[-1] if ends else 0
        lead = text.rfind("\n", 0, found.end()) + 1
        # Of a line that has been cut already, what is left does not begin with a bullet.
        piece = text[max(start, lead) : found.end()]
        if piece.strip() and not (lead >= start and _NUMBER.fullmatch(piece.strip(_BULLETS))):
            ends.append(found.end())
    if not text.strip():
        return ()
    if ends and not text[ends[-1] :].strip():
        ends.pop()
    return (*ends, len(text))
