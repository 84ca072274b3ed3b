import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from armo.data.rewrite import PATTERNS, add_pattern, remove_pattern
from armo.data.sources import load_pairs
from armo.data.surface import SURFACE_FEATURES, surface_features

CODE = "```python\nif a != b:  # **not** a https://example.org!\n    - 1. Run. Now. 😀\n```"
SENTENCES = (
    "Put the eggs into boiling water.",
    "Wait for seven minutes, e.g. with a timer.",
    "Is that long enough?",
    "Ask Dr. Smith about version 1.5 of `main.py` instead.",
    "They cost 3 euros in 1990.",
    "Die Größe ändert nichts daran.",
    "Read [this page](https://example.org/a_b) carefully.",
    "It **really matters** here.",
    "What a result!",
    "See https://example.org/?q=x!y for more.",
    "The `x != y` test *never* fails. 👍",
    "5! is 120.",
    "(That is all.)",
)
BLOCKS = (
    "# Boiled eggs",
    "Title\n=====",
    "> ## Quoted title",
    "#",
    "- One thing.\n- Another thing! Really.\n  - nested item",
    "1. First do this.\n2. Then do that.\n\n   More of it.",
    "> Somebody said this. Then nothing.",
    CODE,
    "    indented = code('!')",
    "| a | b |\n|---|---|\n| **c** | d. |",
    "<div>\nsome **HTML!**\n</div>",
    "这是第一句。这是第二句。",
    "Sure! Here it comes.",
    "Of course, that depends.",
    "Great Britain is an island.",
    "* * *",
    "```\nnot closed. At all.",
)
paragraphs = st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=5).flatmap(
    lambda parts: st.sampled_from([" ", "\n"]).map(lambda gap: gap.join(parts))
)
responses = st.lists(paragraphs | st.sampled_from(BLOCKS), max_size=6).flatmap(
    lambda parts: st.sampled_from(["\n\n", "\n\n", "\n", "\r\n\r\n"]).map(
        lambda gap: gap.join(parts)
    )
)
patterns = st.sampled_from(sorted(PATTERNS))

# What may follow from a pattern, told apart from the module's own list on purpose.
FOLLOWS = {
    "length": {"lines", "paragraphs"},
    "list": {"lines", "paragraphs"},
    "affirmative": {"log_length", "lines", "paragraphs", "exclamations"},
    "emoji": {"log_length", "lines", "paragraphs"},
    "heading": {"log_length", "lines", "paragraphs"},
}


def measure(text):
    return dict(zip(SURFACE_FEATURES, surface_features([text])[0].tolist(), strict=True))


def words(text):
    """The words that a reader sees, in order, without case and the marks around them."""
    shown = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        shown.append(token.content if token.type in ("fence", "code_block", "html_block") else "")
        for child in token.children or ():
            breaks = child.type in ("softbreak", "hardbreak")
            shown.append("\n" if breaks else child.content)
        shown.append("\n")
    return [word.casefold() for word in re.findall(r"\w+", "".join(shown))]


def is_subsequence(few, many):
    rest = iter(many)
    return all(word in rest for word in few)


def code(text):
    return [t.content for t in MarkdownIt().parse(text) if t.type in ("fence", "code_block")]


def check(before, after, pattern, *, more):
    """Only the pattern moved, and as it should; no word is lost; no code is changed."""
    assert after.strip()
    old, new = measure(before), measure(after)
    own = PATTERNS[pattern]
    assert (new[own] > old[own]) if more else (new[own] < old[own])
    moved = {name for name in SURFACE_FEATURES if old[name] != new[name]} - {own}
    assert moved <= FOLLOWS.get(pattern, set())
    few, many = (before, after) if more else (after, before)
    assert is_subsequence(words(few), words(many))
    if pattern not in ("length", "affirmative", "heading"):
        assert words(before) == words(after)
    assert code(before.replace("\r\n", "\n")) == code(after)


@settings(max_examples=300)
@given(responses, patterns, st.integers(0, 3))
def test_only_the_pattern_is_put_in_and_taking_it_out_gives_the_text_back(text, pattern, seed):
    added = add_pattern(text, pattern, seed=seed)
    assert added == add_pattern(text, pattern, seed=seed)
    if added is None:
        return
    check(text, added, pattern, more=True)
    removed = remove_pattern(added, pattern)
    assert removed is not None
    assert "".join(removed.split()) == "".join(text.split())


@settings(max_examples=300)
@given(responses, patterns)
def test_only_the_pattern_is_taken_out_and_all_of_it(text, pattern):
    removed = remove_pattern(text, pattern)
    if removed is None:
        return
    check(text, removed, pattern, more=False)
    assert pattern == "length" or measure(removed)[PATTERNS[pattern]] == 0
    assert remove_pattern(removed, pattern) is None


@settings(max_examples=300)
@given(
    st.text() | st.lists(st.sampled_from("a.!?*_`[]()<>#-\n 1\\&|~\t。😀Sure")).map("".join),
    patterns,
)
def test_any_text_is_rewritten_well_or_not_at_all(text, pattern):
    for changed in (add_pattern(text, pattern), remove_pattern(text, pattern)):
        assert changed is None or (changed.strip() and changed != text)


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_responses_of_the_built_in_corpus_have_a_place_for_every_pattern(pattern):
    texts = [pair.chosen for pair in load_pairs("builtin")[::40]]
    changed = [add_pattern(text, pattern) or remove_pattern(text, pattern) for text in texts]
    for before, after in zip(texts, changed, strict=True):
        if after is not None:
            check(
                before,
                after,
                pattern,
                more=measure(after)[PATTERNS[pattern]] > measure(before)[PATTERNS[pattern]],
            )
    # A piece of writing may be one sentence per paragraph.
    assert sum(after is not None for after in changed) >= (0.9 if pattern == "list" else 1.0) * len(
        texts
    )


PLAIN = "Put the eggs into boiling water. Wait for seven minutes. Then cool them. Peel them last."


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_places_are_drawn_by_the_seed(pattern):
    assert len({add_pattern(f"{PLAIN}\n\n{PLAIN}", pattern, seed=seed) for seed in range(20)}) > 1


@pytest.mark.parametrize(
    ("pattern", "count"), [("bold", 2), ("link", 1), ("exclamation", 2), ("emoji", 2)]
)
def test_a_share_of_the_sentences_gets_the_pattern(pattern, count):
    for seed in range(5):
        assert measure(add_pattern(PLAIN, pattern, seed=seed))[PATTERNS[pattern]] == count


def test_padding_adds_about_half_of_the_words():
    long = "\n\n".join([PLAIN] * 8)
    count = len(long.split())
    assert 0.5 * count <= len(add_pattern(long, "length").split()) - count <= 0.5 * count + 20


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("bold", "A ***b*** and __c__, `**d**`.", "A *b* and c, `**d**`."),
        (
            "list",
            "Steps:\n1. Mix.\n2. Bake\n   it.\n\n- Eat.",
            "Steps:\nMix.\nBake\nit.\n\nEat.",
        ),
        ("list", "- Run:\n  ```\n  a\n    b\n  ```\n- Stop.", "Run:\n```\na\n  b\n```\nStop."),
        ("exclamation", "Wow!!! Why?! **Go!** See `a != b`.", "Wow. Why? **Go.** See `a != b`."),
        ("exclamation", "真的\uff01好。", "真的。好。"),
        ("link", 'Read [**this**](https://a.org/b_(c) "title") now.', "Read **this** now."),
        ("affirmative", "Sure, here it is.", "Here it is."),
        ("affirmative", "Certainly! Of course. Here.", "Here."),
        ("affirmative", "Sure.\n\n    indented code", "    indented code"),
        ("emoji", "👍 Good 🎉 work! 🇩🇪\n😀\nDone `😀`.", "Good work!\nDone `😀`."),
        ("heading", "# A\ntext\n\nB\n===\n## C ##\nmore", "A\n\ntext\n\nB\n\nC\n\nmore"),
    ],
)
def test_what_is_left_when_a_pattern_is_taken_out(pattern, text, expected):
    assert remove_pattern(text, pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("affirmative", "Great Britain is an island."),
        ("affirmative", "Sure!"),
        ("exclamation", "5! is 120."),
        ("link", "See https://example.org for more."),
        ("emoji", "👍"),
        ("heading", "# 1. First"),
        ("heading", "> # Quoted title"),
        ("list", "- Run this:\n\n      x = 1"),  # its code would be indented by two more
        ("length", PLAIN),
    ],
)
def test_what_cannot_go_without_loss_stays(pattern, text):
    assert remove_pattern(text, pattern) is None


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_code_alone_offers_no_place_but_around_it(pattern):
    added = add_pattern(CODE, pattern)
    assert (added is not None) == (pattern in ("length", "affirmative", "heading"))
    assert added is None or CODE in added


FORMULAS = (
    "\\[\n\\text{Number of students. Then} = 2x\n\\]",
    "\\( \\text{Number of students} = n! \\cdot 2 \\)",
    "$\\text{Number of students. Then} = n! \\cdot 2$",
    "$$\n\\text{Number. Of students} + n! \\ldots\n$$",
)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_formulas_are_kept(pattern, formula):
    text = f"They cost $5 and $10 now. So {formula} holds. It is shown here."
    for seed in range(8):
        added = add_pattern(text, pattern, seed=seed)
        lines = None if added is None else added.replace("\n  ", "\n")  # of items
        assert lines is None or formula in lines
    removed = remove_pattern(f"**Now!** {text}", pattern)
    assert removed is None or formula in removed


@pytest.mark.parametrize("pattern", ["length", "affirmative", "heading"])
def test_english_is_not_put_into_text_of_another_script(pattern):
    assert add_pattern("Это первое предложение. Потом второе.", pattern) is None
    assert add_pattern("Это первое предложение. Потом второе.", "bold") is not None


def test_an_unknown_pattern_is_refused():
    for function in (add_pattern, remove_pattern):
        with pytest.raises(ValueError, match=r"must be one of length, bold, list.*got 'colour'"):
            function("text", "colour")


@pytest.mark.parametrize(
    "text", ["`" * 5_000, "*a **b " * 1_500, "[" * 1_500, "a" * 50_000, "\n" * 20_000, "! " * 5_000]
)
@pytest.mark.usefixtures("no_type_checks")
def test_text_made_to_be_slow_is_not(text):
    begun = time.process_time()
    for pattern in PATTERNS:
        add_pattern(text, pattern)
        remove_pattern(text, pattern)
    assert time.process_time() - begun < 8.0  # most take a tenth of that
