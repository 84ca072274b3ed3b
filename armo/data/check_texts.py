"""What can be seen in one text: words and their hashes, script, language, traces of broken data."""

import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import regex  # type: ignore[import-untyped]
from jaxtyping import UInt64

LANGUAGE_CHARACTERS = 1000
"""Script and language are told from the beginning of a text."""

SCRIPTS = {
    "Latin": "Latin",
    "Cyrillic": "Cyrillic",
    "Greek": "Greek",
    "Arabic": "Arabic",
    "Hebrew": "Hebrew",
    "Devanagari": "Devanagari",
    "Bengali": "Bengali",
    "Tamil": "Tamil",
    "Telugu": "Telugu",
    "Thai": "Thai",
    "Han": "Han",
    "Hiragana": "Japanese",
    "Katakana": "Japanese",
    "Hangul": "Hangul",
}
"""Scripts that are told apart, by Unicode's name for them."""

# The commonest words that few other languages here share.
STOP_WORDS = {
    "English": "the and of to is that it for you with this are was have be as on not can or",
    "German": "der die und das ist nicht ein eine zu den mit sich auf für von dem auch wie sie ich",
    "French": "le les des et est une dans que pour qui vous pas sur avec plus ce il nous du au",
    "Spanish": "el los las es una por con para que del se como más pero su al lo muy está",
    "Italian": "il che di è un una per non con sono del della gli più anche come si nel alla ed",
    "Portuguese": "os as é um uma para não com que do da em você mais por na no são",
    "Dutch": "de het een en van is dat niet op te voor met zijn er je aan ook als bij door",
    "Swedish": "och att det som en är på för med inte den av jag till har om ett kan du så",
    "Polish": "nie na się jest że do to jak co ale jego przez tylko czy tak po dla są oraz",
    "Turkish": "ve bir bu için da de ile çok ne daha gibi olarak var ama olan en değil kadar ya mi",
    "Indonesian": "yang dan di untuk dengan ini itu dari tidak pada adalah dalam akan saya anda ke",
    "Vietnamese": "là và của có không các được cho trong một với này người những để khi đã bạn thể",
}
_LANGUAGES_OF: dict[str, list[str]] = {}
for _name, _words in STOP_WORDS.items():
    for _word in _words.split():
        _LANGUAGES_OF.setdefault(_word, []).append(_name)
STOP_WORDS_NEEDED = 3

_SPACELESS = "".join(
    rf"\p{{Script={name}}}"
    for name in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
)
# A word, or one letter of a script that has no spaces between words.
_WORD = regex.compile(
    rf"(?V1)[[{_SPACELESS}]&&\p{{L}}]\p{{M}}*|[\p{{L}}\p{{N}}\p{{M}}--[{_SPACELESS}]]+"
)
_ASCII_WORD = regex.compile(r"[a-z0-9]+")
_LETTERS = {name: regex.compile(rf"\p{{Script={name}}}") for name in SCRIPTS}

FAULTS = {
    "control characters": regex.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\ufffe\uffff]"),
    "a replacement character, where a letter was lost": regex.compile("\ufffd"),
    "UTF-8 that was read as Latin-1": regex.compile(
        "[\u00c3\u00c2][\u0080-\u00bf\u2018-\u203a\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192]"
        "|\u00e2(?:\u20ac[\u2122\u0153\u009d\u02dc\u201c\u201d\u00a6\u00a2]|\u0080[\u0090-\u00bf])"
    ),
    "marks of a chat template": regex.compile(
        r"<\|(?:im_start|im_end|eot_id|start_header_id|end_header_id|begin_of_text|end_of_text"
        r"|endoftext|user|assistant|system)\|>|\[/?INST\]|<</?SYS>>|<extra_id_\d+>|</s>"
        r"|\n\n(?:Human|Assistant): "
    ),
}
"""What a text should not have, and the pattern that finds it."""


def find_faults(text: str) -> Iterator[str]:
    """Yield the name of each fault that a text has."""
    for name, pattern in FAULTS.items():
        if pattern.search(text) is not None:
            yield name


def words_of(text: str) -> list[str]:
    """Split a text into words, case and punctuation aside; letters, where no spaces part words."""
    folded = text.casefold()
    words: list[str] = (_ASCII_WORD if folded.isascii() else _WORD).findall(folded)
    return words


def word_hashes(text: str) -> UInt64[np.ndarray, " words"]:
    """Hash each word of a text, alike in every run."""
    hashes = np.fromiter((zlib.crc32(word.encode()) for word in words_of(text)), dtype=np.uint64)
    return mix(hashes)


def gram_hashes(words: UInt64[np.ndarray, " words"], size: int) -> UInt64[np.ndarray, " grams"]:
    """Hash each run of `size` words, distinct and ascending; a shorter text is one run.

    Returns:
        Distinct hashes; none of a text without words.
    """
    if len(words) == 0:
        return words
    size = min(size, len(words))
    runs = np.zeros(len(words) - size + 1, dtype=np.uint64)
    for k in range(size):
        runs = mix(runs + words[k : k + len(runs)])
    distinct: UInt64[np.ndarray, " grams"] = np.unique(runs)
    return distinct


def mix(values: UInt64[np.ndarray, " values"]) -> UInt64[np.ndarray, " values"]:
    """Spread 64-bit numbers evenly: the finaliser of SplitMix64.

    References:
        Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64[np.ndarray, " values"] = values ^ (values >> np.uint64(31))
    return mixed


def script_of(text: str) -> str:
    """Name the script of most letters at the beginning of a text; empty if it has no letters."""
    text = text[:LANGUAGE_CHARACTERS]
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else ""
    counts: Counter[str] = Counter()
    for name, letter in _LETTERS.items():
        counts[SCRIPTS[name]] += len(letter.findall(text))
    if counts["Japanese"]:  # which is written with Han letters too
        counts["Japanese"] += counts.pop("Han", 0)
    if not counts.total():
        return "other" if any(map(str.isalpha, text)) else ""
    return counts.most_common(1)[0][0]


def language_of(text: str) -> str:
    """Guess the language of a text in Latin script by its commonest words; empty if unsure.

    Crude: short texts, code and languages that are not in `STOP_WORDS` are unsure.
    """
    counts = Counter(
        name
        for word in text[:LANGUAGE_CHARACTERS].casefold().split()
        for name in _LANGUAGES_OF.get(word, ())
    )
    (best, most), (_, second) = [*counts.most_common(2), ("", 0), ("", 0)][:2]
    return best if most >= STOP_WORDS_NEEDED and most > 1.5 * second else ""
