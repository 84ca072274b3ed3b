import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armo.data.segments import sentence_ends


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", " Two!", " Three?"]),
        ("No end", ["No end"]),
        ('He said "Stop." (Really.) Then', ['He said "Stop."', " (Really.)", " Then"]),
        ("**Bold.** Not 3.5 or a.b!", ["**Bold.**", " Not 3.5 or a.b!"]),
        ("Wait... what?! Yes\u2026 no", ["Wait...", " what?!", " Yes\u2026", " no"]),
        ("1. One. A\n2) two\n- three", ["1. One.", " A", "\n2) two", "\n- three"]),
        ("Steps:\r\n\r\n# Go\n\n", ["Steps:", "\r\n\r\n# Go\n\n"]),
        ("\u65e5\u672c\u3002\u72ac\uff01", ["\u65e5\u672c\u3002", "\u72ac\uff01"]),
        ("\n\n  Hi. \n ", ["\n\n  Hi. \n "]),
        ("...", ["..."]),
        (" \n", []),
        ("", []),
    ],
)
def test_a_text_is_cut_where_its_sentences_end(text, sentences):
    ends = sentence_ends(text)
    starts = (0, *ends)
    assert [text[a:b] for a, b in zip(starts, ends, strict=False)] == sentences


@given(st.text(alphabet="ab.!? \n\t-*1)\u3002\r\"'", max_size=40))
def test_segments_join_to_the_text_and_each_has_some(text):
    ends = sentence_ends(text)
    assert [*ends] == sorted({*ends})
    if not text.strip():
        assert ends == ()
        return
    assert ends[-1] == len(text)
    for a, b in zip((0, *ends), ends, strict=False):
        assert text[a:b].strip()


@pytest.mark.parametrize("piece", ["-", " ", "!", ".*", "1. ", "\n", "\t-"])
def test_long_runs_of_marks_take_no_long_time(piece):
    started = time.process_time()
    sentence_ends(piece * 20_000 + "a.")
    assert time.process_time() - started < 2.0
