import math
import time
import unicodedata

import emoji
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from armo.data.sources import load_pairs
from armo.data.surface import (
    FORMAT_FEATURES,
    MARKS,
    SURFACE_FEATURES,
    SURFACE_VERSION,
    surface_features,
)


def is_unspaced(character):
    """Whether it is a letter of a script that is written without spaces."""
    scripts = ("CJK UNIFIED", "CJK COMPATIBILITY IDEO", "HIRAGANA", "KATAKANA", "HALFWIDTH KATA")
    scripts += (
        "HENTAIGANA",
        "IDEOGRAPHIC ITER",
        "IDEOGRAPHIC CLOS",
        "VERTICAL IDEO",
        "THAI",
        "LAO",
        "KHMER",
        "MYANMAR",
    )
    name = unicodedata.name(character, "")
    return name.startswith(scripts)


letters = st.text(
    st.characters(categories=["L"]).filter(lambda c: not is_unspaced(c)), min_size=1, max_size=8
)
words = st.tuples(letters, st.sampled_from(["", ",", ".", "?", "!", ":"])).map("".join)
plain_texts = st.lists(words, max_size=30).flatmap(
    lambda parts: st.sampled_from([" ", "\n", "  ", "\n\n"]).map(lambda gap: gap.join(parts))
)


def measure(response):
    """All features that are not zero, with the number of words in place of its logarithm."""
    row = surface_features([response])[0].tolist()
    features = dict(zip(SURFACE_FEATURES, row, strict=True))
    features["words"] = round(math.expm1(features.pop("log_length")), 6)
    return {name: value for name, value in features.items() if value}


def formats(response):
    """All features of the format that are not zero, but for lines and paragraphs."""
    names = [name for name in FORMAT_FEATURES if name not in ("lines", "paragraphs")]
    return {name: value for name, value in measure(response).items() if name in names}


def layout(response):
    """The number of paragraphs and of lines."""
    measured = measure(response)
    return measured.get("paragraphs", 0), measured.get("lines", 0)


# The same, read off the tokens of one parse of everything, with the library on every text.


def slow_measure(response):
    parser = MarkdownIt("commonmark", {"linkify": True, "maxNesting": 100})
    parser.enable(["table", "linkify"])
    parser.linkify.tlds(["com", "org", "net", "edu", "gov", "info"])
    counts = dict.fromkeys(SURFACE_FEATURES, 0)
    text, prose, parents = "", "", []
    for token in parser.parse(response):
        if token.nesting == 1:
            parents.append(token.type)
        elif token.nesting == -1:
            parents.pop()
        counts["list_items"] += token.type == "list_item_open"
        counts["headings"] += token.type == "heading_open"
        counts["tables"] += token.type == "table_open"
        counts["code_blocks"] += token.type in ("fence", "code_block")
        if token.type in ("fence", "code_block"):
            text += token.content
        if token.type == "html_block":
            inside = MarkdownIt("zero", {"html": True}).enable(["html_inline", "entity"])
            shown = "".join(
                part.content
                for part in inside.parseInline(token.content)[0].children
                if part.type == "text"
            )
            text, prose = text + shown, prose + shown
        if token.type == "inline":
            counts["paragraphs"] += parents == ["paragraph_open"] and token.content.strip() != ""
            address = False
            for part in token.children:
                counts["bold"] += part.type == "strong_open"
                counts["italic"] += part.type == "em_open"
                counts["inline_code"] += part.type == "code_inline"
                counts["links"] += part.type == "link_open"
                if part.type in ("link_open", "link_close"):
                    address = part.type == "link_open" and part.markup in ("linkify", "autolink")
                shown = "\n" if part.type in ("softbreak", "hardbreak") else ""
                if part.type in ("text", "code_inline"):
                    shown = part.content
                text += shown
                prose += "" if address or part.type == "code_inline" else shown
        cell = any(parent in ("th_open", "td_open") for parent in parents)
        if not cell and token.type not in ("th_close", "td_close"):
            text, prose = text + "\n", prose + "\n"
        elif token.type == "inline":
            text, prose = text + "\t", prose + "\t"
    counts["lines"] = len([line for line in text.split("\n") if line.strip()])
    found = [entry["emoji"] for entry in emoji.emoji_list(prose)]
    counts["emoji"] = len([one for one in found if len(one) > 1 or one not in TEXT_BY_DEFAULT])
    counts["exclamations"] = sum(mark in "!\uff01‼" for mark in prose)
    counts["questions"] = sum(mark in "?\uff1f؟" for mark in prose)
    pieces = "".join(" " if is_unspaced(c) else c for c in text)
    letters = sum(map(is_unspaced, text))
    if letters:
        counts["words"] = letters + sum(
            any(unicodedata.category(c)[0] != "P" for c in piece) for piece in pieces.split()
        )
    else:
        counts["words"] = len(text.split())
    return {name: value for name, value in counts.items() if value}


TEXT_BY_DEFAULT = "©®™❤↔‼⁉✔☀▶"
FRAGMENTS = (
    *("word", "two words", "caf\u00e9", "漢字", "かな", "main.py", "3.14", "x", "(", ")", "it's"),
    *("\n", "\n\n", "\n", "\r\n", "\r", "  \n", "\n    ", "\n\n    ", "\t", " ", "\u3000"),
    *("\n- ", "\n  - ", "\n1. ", "\n2) ", "\n* ", "\n+ ", "\n> ", "\n# ", "\n###### ", "\n#"),
    *("\n===\n", "\n---\n", "\n***\n", "\n___\n", "\n```\n", "\n```py\n", "\n~~~\n", "\x0c", "|"),
    *("\n|a|b|\n|-|-|\n|c|d|\n", "\n:-:|-\n", "\n[x]: https://a.org\n", "[x]", "[x][x]"),
    *("![a](b)", "[", "]", "](u)", "`", "``", "`c`", "*", "**", "_", "__", "***", "_i_", "~~"),
    *("\\", "\\*", "<b>", "</b>", "<div>", "\n<div>\n", "<!--", "-->", "&amp;", "&", "&excl;"),
    *("<", ">", "<https://a.org/?b!>", "https://a.org/?b!", "www.a.com", "a.com", "b@c.org"),
    *("//a.net", "mailto:b@c.org", ".info", "A.ORG", "http://x", "b@1.2.3.4", "a.xn--p1ai"),
    *("😀", "👨‍👩‍👧‍👦", "🇩🇪", "1️⃣", "👍🏽", "❤️", "❤", "©", "™", "↔", "‼", "✔"),
    *("!", "?", "\uff01", "\uff1f", "؟", "...", "Sure", "\0"),
)
marked_texts = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)


@settings(max_examples=1000)
@given(marked_texts)
def test_features_are_those_of_one_parse_of_everything(text):
    measured = measure(text)
    measured.pop("affirmative", None)
    assert measured == slow_measure(text)


def test_features_of_the_built_in_pairs_are_those_of_one_parse_of_everything():
    for pair in load_pairs("builtin")[::20]:
        measured = measure(pair.chosen)
        measured.pop("affirmative", None)
        assert measured == slow_measure(pair.chosen)


@given(st.text(), st.integers(0, 3))
def test_any_text_can_be_measured(text, surrogates):
    # Rows hold no half of a surrogate pair; should one come from elsewhere, it is a character.
    row = surface_features([text + "\ud800 **a**" * surrogates])[0]
    assert row.isfinite().all()
    assert (row >= 0).all()


@given(plain_texts)
def test_log_length_counts_words_as_split_does_on_plain_text_of_spaced_scripts(text):
    expected = math.log1p(len(text.split()))
    assert surface_features([text])[0, SURFACE_FEATURES.index("log_length")].item() == expected


@given(plain_texts)
def test_plain_text_has_no_format_but_marks_and_an_opening(text):
    measured = formats(text)
    measured.pop("affirmative", None)
    assert measured.pop("exclamations", 0) == text.count("!")
    assert measured.pop("questions", 0) == text.count("?")
    assert measured == {}


@given(st.lists(plain_texts, max_size=5))
def test_responses_are_measured_independently(texts):
    together = surface_features(texts)
    assert together.shape == (len(texts), len(SURFACE_FEATURES))
    assert together.dtype == torch.float64
    for row, text in zip(together, texts, strict=True):
        torch.testing.assert_close(row, surface_features([text])[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("Use **warm** water", "Use warm water"),
        ("Use **warm water**, not hot.", "Use warm water, not hot."),
        ("Is it [warm](https://example.org)?", "Is it warm?"),
        ("*Never* boil `an egg`!", "Never boil an egg!"),
        ("**warm**est", "warmest"),
        ("`f`(x)", "f(x)"),
        ("> quoted words\n\n# Title here", "quoted words\n\nTitle here"),
        ("- one thing\n- another", "one thing another"),
        (r"a\*b", "a*b"),
        ("fish &amp; chips", "fish & chips"),
    ],
)
def test_markup_does_not_change_the_length(marked, plain):
    assert measure(marked)["words"] == len(plain.split())


def test_words_in_code_tables_and_html_count_towards_the_length():
    assert measure("```python\nx = 1\n```")["words"] == 3
    assert measure("run `ls -l` now")["words"] == 4
    assert measure("| a | b |\n|---|---|\n| c | d e |")["words"] == 5
    assert measure("<div>\nas long as it gets\n</div>")["words"] == 5


CODE = "- item\n1. item\n# heading\n**bold**\nhttps://example.org [a](b)\n| a |\n|---|\nx != y 😀"


@pytest.mark.parametrize(
    "block",
    [
        f"```\n{CODE}\n```",
        f"```python\n{CODE}\n```",
        f"~~~\n{CODE}\n~~~",
        f"````\n```\n{CODE}\n```\n````",
        f"```\n{CODE}",
        "    " + CODE.replace("\n", "\n    "),
    ],
    ids=["fence", "language", "tildes", "fence in fence", "not closed", "indented"],
)
def test_what_looks_like_format_inside_a_code_block_is_code(block):
    assert formats(block) == {"code_blocks": 1}
    assert measure(block).get("paragraphs", 0) == 0
    assert measure(block)["lines"] >= len(CODE.split("\n"))


def test_the_same_lines_outside_a_code_block_are_format():
    measured = formats(CODE)
    assert {"list_items", "headings", "bold", "links", "emoji", "exclamations"} <= measured.keys()
    assert "code_blocks" not in measured


@pytest.mark.parametrize(
    "text", ["`**a**`", "`[a](https://example.org)`", "`https://example.org`", "`a != b`", "`😀`"]
)
def test_what_looks_like_format_inside_inline_code_is_code(text):
    assert formats(f"Write {text} here") == {"inline_code": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b", 2),
        ("- a\n  - b\n    - c\n- d", 4),
        ("1. a\n2. b\n   - c", 3),
        ("* a\n+ b", 2),
        ("> - quoted", 1),
        ("well-known\nup - down\n-5 degrees\n1.5 cups", 0),
    ],
)
def test_list_items_count_at_every_depth(text, expected):
    assert formats(text).get("list_items", 0) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**a** and __b__", 2),
        ("**a b c**", 1),
        ("***a***", 1),
        ("*a* and _b_", 0),
        ("2 * 3 * 4", 0),
        ("2 ** 3 ** 4", 0),
        ("f(**a, b)", 0),
        (r"\*\*a\*\*", 0),
    ],
)
def test_bold_spans_count_and_asterisks_that_multiply_do_not(text, expected):
    assert formats(text).get("bold", 0) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# a\n\n## b\n### c", 3),
        ("Title\n=====\n\ntext", 1),
        ("#hashtag and C# too", 0),
        ("a\n\n---\n\nb", 0),
    ],
)
def test_headings_count_at_every_level(text, expected):
    assert formats(text).get("headings", 0) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](https://example.org)", 1),
        ("See https://example.org/a_b_c.", 1),
        ("<https://example.org>", 1),
        ("www.example.org", 1),
        ("[https://example.org](https://example.org)", 1),
        ("[a](https://example.org) and https://example.org", 2),
        ("[a][1]\n\n[1]: https://example.org", 1),
        ("[not a link] (https:)", 0),
        ("e.g. this, i.e. that, 3.14, v1.0.0, etc.", 0),
    ],
)
def test_links_count_whether_marked_or_bare(text, expected):
    assert formats(text).get("links", 0) == expected


def test_file_names_in_prose_are_not_links():
    assert formats("Edit main.py and README.md, then start run.sh or lib.rs again") == {}


def test_tables_count_and_single_pipes_do_not():
    table = "| a | b |\n|---|---|\n| 1 | 2 |"
    assert formats(f"{table}\n\ntext\n\n{table}") == {"tables": 2}
    assert formats("either a | b\nor c | d") == {}


def test_format_inside_table_cells_counts():
    assert formats("| **a** |\n|---|\n| ! |") == {"tables": 1, "bold": 1, "exclamations": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("😀", 1),
        ("😀😀 😀", 3),
        ("👨‍👩‍👧‍👦", 1),
        ("🇩🇪🇫🇷", 2),
        ("👍🏽", 1),
        ("👩🏽‍🚀", 1),
        ("❤️", 1),
        ("1️⃣ #️⃣ *️⃣", 3),
        ("❤️‍🔥", 1),
        ("🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", 1),
        ("1 # * → ½ ∀ 漢字", 0),
    ],
    ids=[
        *("one", "three", "family", "flags", "skin tone", "astronaut", "heart", "keycaps"),
        *("heart on fire", "England", "none"),
    ],
)
def test_an_emoji_sequence_counts_once(text, expected):
    assert formats(f"a {text}").get("emoji", 0) == expected


def test_signs_that_are_text_unless_marked_as_emoji_do_not_count():
    assert formats("© 2024 Acme™ and Acme®") == {}
    assert formats("a ↔ b ❤ c ✔") == {}
    assert formats("©\ufe0f ❤\ufe0f") == {"emoji": 2}


def test_exclamation_marks_count_outside_code_alone():
    assert formats("Wait!!! Is `a != b`? **Yes!**")["exclamations"] == 4
    assert formats("```\nif a != b: stop!\n```\n\nDone!")["exclamations"] == 1


@pytest.mark.parametrize(
    "opening",
    [
        "Sure",
        "sure, here",
        "Certainly! Here",
        "Of course.",
        "Absolutely - yes",
        "Great: yes",
        "**Sure!** Here",
        "# Of course",
        "> Certainly",
        "  \nSure\nthing",
    ],
)
def test_an_affirmative_opening_is_found(opening):
    assert formats(opening)["affirmative"] == 1


@pytest.mark.parametrize(
    "opening",
    [
        "Surely not",
        "Greatest of all",
        "Greatly so",
        "Of courses",
        "Certainly1",
        "I am sure",
        "Not sure, certainly great",
        "",
        "Surer",
    ],
)
def test_other_openings_are_not_affirmative(opening):
    assert "affirmative" not in formats(opening)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Привет, как дела?", 3),
        ("مرحبا بالعالم", 2),
        ("नमस्ते दुनिया", 2),
        ("გამარჯობა მსოფლიო", 2),
        ("שלום עולם", 2),
        ("안녕 세상아", 2),
    ],
)
def test_words_of_every_spaced_script_count(text, expected):
    measured = measure(text)
    assert measured.pop("questions", 0) == text.count("?")
    assert measured == {"words": expected, "paragraphs": 1, "lines": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("你好\uff0c世界\uff01", 4),
        ("我用Python 3写代码。", 7),
        ("これはテストです", 8),
        ("สวัสดี", 4),
        ("ກຂ", 2),
        ("ខ្មែរ", 3),
        ("他说“好”。", 3),
    ],
)
def test_each_letter_of_a_script_without_spaces_is_a_word(text, expected):
    assert measure(text)["words"] == expected


@given(st.integers(1, 40))
def test_longer_text_is_longer_in_every_script(count):
    for word in ("word ", "слово ", "字", "かな", "ไทย"):
        short, long = surface_features([word * count, word * 2 * count])[:, 0].exp() - 1
        assert long.item() == pytest.approx(2 * short.item())


def test_format_is_found_among_other_scripts():
    measured = measure("## Заголовок\n\n- **важно** 😀\n- 重要")
    expected = {"words": 5, "headings": 1, "list_items": 2, "bold": 1, "emoji": 1, "lines": 3}
    assert measured == expected


@pytest.mark.parametrize(
    ("text", "exclamations", "questions"),
    [
        ("真的吗\uff1f太好了\uff01", 1, 1),
        ("هل أنت متأكد؟ نعم!", 1, 1),
        ("¿Qué? ¡Ya!", 1, 1),
        ("Really⁉", 1, 1),
        ("Ի՞նչ", 0, 1),
        ("Why `a ? b : !c`?", 0, 1),
        ("```\na ? !b : c\n```", 0, 0),
        ("See https://example.org/?q=wow!x now", 0, 0),
        ("[Why?!](https://example.org/?q)", 1, 1),
    ],
)
def test_marks_of_every_script_count_outside_code_and_addresses(text, exclamations, questions):
    measured = formats(text)
    assert measured.get("exclamations", 0) == exclamations
    assert measured.get("questions", 0) == questions


@pytest.mark.parametrize(
    ("text", "paragraphs", "lines"),
    [
        ("one", 1, 1),
        ("one\ntwo", 1, 2),
        ("one\n\n\n  \ntwo\n", 2, 2),
        ("one\r\n\r\ntwo\rthree", 2, 3),
        ("one  \ntwo\\\nthree", 1, 3),
        ("# head\n\none", 1, 2),
        ("Title\n=====\n\none", 1, 2),
        ("- a\n- b\n  - c\n\n  more", 0, 4),
        ("> quoted\n> more\n\none", 1, 3),
        ("```\na\n\nb\n```", 0, 2),
        ("| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |", 0, 3),
        ("one\n\n---\n\ntwo", 2, 2),
        ("<div>\none\n</div>", 0, 1),
        ("[a]: https://example.org\n\none", 1, 1),
        ("one\n\n\u00a0\n\n\u3000", 1, 1),
        ("word " * 100_000, 1, 1),
    ],
)
def test_paragraphs_are_of_the_text_itself_and_lines_those_with_text(text, paragraphs, lines):
    assert layout(text) == (paragraphs, lines)


@pytest.mark.parametrize(
    ("text", "italic", "bold"),
    [
        ("*a* and _b_", 2, 0),
        ("***a***", 1, 1),
        ("snake_case_name and 2 * 3 * 4", 0, 0),
        (r"\*a\* \_b\_", 0, 0),
        ("**a *b* c**", 1, 1),
    ],
)
def test_italic_spans_count_apart_from_bold_ones(text, italic, bold):
    measured = formats(text)
    assert (measured.get("italic", 0), measured.get("bold", 0)) == (italic, bold)


@pytest.mark.parametrize(
    ("text", "expected"), [("`a` and ``b ` c``", 2), ("`open", 0), (r"\`a\`", 0), ("`a\nb`", 1)]
)
def test_inline_code_counts_spans_that_are_closed(text, expected):
    assert formats(text).get("inline_code", 0) == expected


def test_text_in_html_counts_and_tags_and_comments_do_not():
    text = '<div class="a b">\nas **long** as <b>it</b> gets &amp; is\n<!-- no, not! -->\n</div>'
    assert measure(text) == {"words": 7, "lines": 1}
    assert measure("a <b>bold</b> <!-- no --> word") == measure("a bold word")


@pytest.mark.parametrize(
    "text",
    [
        "> " * 500 + "deep",
        "- " * 500 + "deep",
        "\n".join("  " * depth + "- item" for depth in range(300)),
        "[" * 5_000,
        "![" * 2_000,
        "*a **b " * 3_000,
        "`" * 5_000,
        "<!--" * 5_000,
        "<div>\n" + "<" * 20_000,
        "http://" * 3_000,
        "a@" * 10_000,
        "mailto:" * 3_000,
        "|" * 5_000 + "\n" + "|-" * 5_000,
        "&" * 20_000,
        "\u200d" * 20_000,
        "\n" * 50_000,
        "a\n" * 10_000 + "=",
    ],
    ids=lambda text: repr(text[:8]),
)
@pytest.mark.usefixtures("no_type_checks")
def test_text_made_to_be_slow_is_not(text):
    begun = time.process_time()
    surface_features([text])
    assert time.process_time() - begun < 2.0  # most take a hundredth of that


def test_nesting_is_followed_as_deep_as_people_go():
    measured = measure("\n".join("  " * depth + "- item" for depth in range(40)))
    assert measured == {"words": 40, "lines": 40, "list_items": 40}


def test_a_change_of_what_is_measured_raises_the_version():
    """If this fails, raise `SURFACE_VERSION`, lest stored covariates be of the old kind."""
    texts = [
        "Sure! **Two** *words* `x = 1`:\n\n- a\n- b 😀\n\n# Why?\n\n```\ncode\n```\n",
        "| a |\n|---|\n| https://example.org |\n\n漢字\uff01",
    ]
    assert SURFACE_VERSION == 2
    assert surface_features(texts).expm1().round(decimals=6)[:, 0].tolist() == [11, 4]
    assert surface_features(texts)[:, 1:].tolist() == [
        [1, 5, 2, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1],
        [1, 3, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0],
    ]


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n\t", "\u00a0\n\n\u3000", "\r\n", "<!-- nothing -->"]
)
def test_a_response_without_text_measures_zero(text):
    assert measure(text) == {}


def test_no_responses_make_no_rows():
    assert surface_features([]).shape == (0, len(SURFACE_FEATURES))


def test_marks_are_all_marks_of_format_that_are_no_words():
    others = ("log_length", "paragraphs", "lines", "exclamations", "questions", "affirmative")
    assert set(MARKS) == set(SURFACE_FEATURES) - set(others)
