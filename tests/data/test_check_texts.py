import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armo.data.check_texts import (
    FAULTS,
    STOP_WORDS,
    find_faults,
    gram_hashes,
    language_of,
    script_of,
    word_hashes,
    words_of,
)

SENTENCES = {
    "English": "The dog that you saw is on the way to the market, and it can not be stopped.",
    "German": "Das ist nicht der Hund, den wir auf dem Markt gesehen haben, und die Katze auch.",
    "French": "Le chien que vous avez vu dans la rue est une bête qui ne mord pas les enfants.",
    "Spanish": "El perro que vimos por la calle no es para los niños, pero es muy bueno.",
    "Italian": "Il cane che abbiamo visto non è del vicino, ma è più grande di una casa.",
    "Portuguese": "O cachorro que você viu não é meu, mas é um dos que mais gosto na rua da praia.",
    "Dutch": "De hond die je zag is niet van ons, maar het is een heel lief dier met een staart.",
    "Swedish": "Hunden som du såg är inte min, men det är en snäll hund och den kan inte bita.",
}


def test_words_are_what_stands_between_marks_and_spaces_and_letters_where_there_are_none():
    assert words_of("Don't STOP—the 2nd 'mouse_pad'!") == [
        *("don", "t", "stop", "the", "2nd", "mouse", "pad")
    ]
    assert words_of("Straße, 水を飲む. cafe\u0301") == [
        *("strasse", "水", "を", "飲", "む"),
        "cafe\u0301",
    ]
    assert words_of(" …!") == []


@given(st.text(max_size=30))
def test_a_word_is_the_same_in_ascii_and_among_other_letters(text):
    ascii_only = "".join(filter(str.isascii, text))
    assert words_of(ascii_only) == words_of(f"{ascii_only} é")[:-1]


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.integers(1, 5))
def test_grams_are_the_distinct_runs_of_words(words, size):
    runs = {tuple(words[k : k + size]) for k in range(max(1, len(words) - size + 1))} - {()}
    assert len(gram_hashes(word_hashes(" ".join(words)), size)) == len(runs)


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_grams_are_shared_where_runs_are(first, second):
    runs = [{tuple(each[k : k + 2]) for k in range(len(each) - 1)} for each in (first, second)]
    hashes = [gram_hashes(word_hashes(" ".join(each)), 2) for each in (first, second)]
    if min(len(first), len(second)) >= 2:
        assert len(np.intersect1d(*hashes)) == len(runs[0] & runs[1])


def test_hashes_are_alike_in_every_process():
    code = "from armo.data.check_texts import word_hashes; print(word_hashes('one two').tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(word_hashes("One, two").tolist())


@pytest.mark.parametrize(
    ("text", "script"),
    [
        *(("", ""), ("12 + 3", ""), ("…", ""), ("abc", "Latin"), ("Übung", "Latin")),
        *(("Привет, Bob", "Cyrillic"), ("日本語を話す", "Japanese"), ("汉语", "Han")),
        *(("한국어", "Hangul"), ("שלום", "Hebrew"), ("नमस्ते", "Devanagari"), ("ᚠᚢᚦ", "other")),
        ("Only a word of 汉 in it", "Latin"),
    ],
)
def test_the_script_is_that_of_most_letters(text, script):
    assert script_of(text) == script


@pytest.mark.parametrize("language", SENTENCES)
def test_a_language_is_told_by_its_commonest_words(language):
    assert language_of(SENTENCES[language]) == language


@pytest.mark.parametrize("text", ["", "No.", "x = y + 1", "lorem ipsum dolor sit amet"])
def test_a_text_that_does_not_tell_is_left_open(text):
    assert language_of(text) == ""


def test_every_language_has_words_of_its_own():
    for language, words in STOP_WORDS.items():
        others = {
            w for name, those in STOP_WORDS.items() if name != language for w in those.split()
        }
        assert len(set(words.split()) - others) >= 8


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        *(("a\x00b", "control"), ("\x1b[31mred", "control"), ("a\x7f", "control")),
        *(("caf\ufffd", "replacement"), ("it â€™s", "Latin-1"), ("caf\u00c3\u00a9", "Latin-1")),
        *(("\u00e2\u0080\u0099s", "Latin-1"), ("20\u00c2\u00b0", "Latin-1")),
        *(("done<|im_end|>", "template"), ("[INST] Hi [/INST]", "template"), ("a</s>", "template")),
        *(("Hi.\n\nHuman: and?", "template"), ("one<extra_id_1>two", "template")),
    ],
)
def test_traces_of_broken_data_are_found(text, fault):
    [found] = find_faults(text)
    assert fault in found


@pytest.mark.parametrize(
    "text",
    [
        *("A tab\tand\r\nlines\f.", "São Tomé, FAÇADE, ÃO, Âmbar, naïve, âge", "20 °C, “so”…"),
        *("x < y |> z", "Human: hello", "<s>struck</s >", "[INSTRUCTIONS]", "İstanbul 👩🏽‍🚀"),
    ],
)
def test_ordinary_texts_have_no_fault(text):
    assert [*find_faults(text)] == []


@given(st.text(st.characters(codec="latin-1", exclude_categories=["Cc"])))
def test_text_that_was_decoded_rightly_is_found_only_if_it_is_decoded_wrongly(text):
    broken = text.encode().decode("latin-1")
    name = next(name for name in FAULTS if "Latin-1" in name)
    if not text.isascii() and re.search("[\u00a0-\u00ff]", text):
        assert name in [*find_faults(broken)]
