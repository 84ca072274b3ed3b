import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armo.data.surface import FORMAT_FEATURES, SURFACE_FEATURES, surface_features

letters = st.text(st.characters(categories=["L"]), min_size=1, max_size=8)
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
    return {name: value for name, value in measure(response).items() if name in FORMAT_FEATURES}


@given(plain_texts)
def test_log_length_counts_words_as_split_does_on_plain_text(text):
    expected = math.log1p(len(text.split()))
    assert surface_features([text])[0, SURFACE_FEATURES.index("log_length")].item() == expected


@given(plain_texts)
def test_plain_text_has_no_format_but_exclamations_and_an_opening(text):
    measured = formats(text)
    measured.pop("affirmative", None)
    assert measured.pop("exclamations", 0) == text.count("!")
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


def test_the_same_lines_outside_a_code_block_are_format():
    measured = formats(CODE)
    assert {"list_items", "headings", "bold", "links", "emoji", "exclamations"} <= measured.keys()
    assert "code_blocks" not in measured


@pytest.mark.parametrize(
    "text", ["`**a**`", "`[a](https://example.org)`", "`https://example.org`", "`a != b`", "`😀`"]
)
def test_what_looks_like_format_inside_inline_code_is_code(text):
    assert formats(f"Write {text} here") == {}


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
        ("🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", 1),
        ("1 # * → ½ ∀ 漢字", 0),
    ],
    ids=["one", "three", "family", "flags", "skin tone", "astronaut", "heart", "England", "none"],
)
def test_an_emoji_sequence_counts_once(text, expected):
    assert formats(f"a {text}").get("emoji", 0) == expected


def test_signs_that_are_text_unless_marked_as_emoji_do_not_count():
    assert formats("© 2024 Acme™ and Acme®") == {}
    assert formats("©\ufe0f") == {"emoji": 1}


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
    assert measure(text) == {"words": expected}


def test_format_is_found_among_other_scripts():
    measured = measure("## Заголовок\n\n- **важно** 😀\n- 重要")
    assert measured == {"words": 4, "headings": 1, "list_items": 2, "bold": 1, "emoji": 1}


@pytest.mark.parametrize("text", ["", " ", "\n\n\t"])
def test_a_response_without_text_measures_zero(text):
    assert measure(text) == {}


def test_no_responses_make_no_rows():
    assert surface_features([]).shape == (0, len(SURFACE_FEATURES))
