import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from armo.data.conversation import Message, ResponseList
from armo.data.rewrite import PATTERNS, remove_pattern
from armo.data.sources import load_lists, load_pairs
from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.report.bias import (
    RIGHT,
    length_bias_table,
    preference_bias_table,
    probe_lists,
    probe_table,
)

PLAIN = "Put the eggs into boiling water. Wait for seven minutes. Then cool them."


def prompt(number):
    return (Message("user", f"Question {number}?"),)


def lists(*responses, **more):
    """One list per tuple of responses, each on a prompt of its own; the first one is right."""
    return [
        ResponseList(f"r{k}", "test", prompt(k), tuple(each), **({"correct": (0,)} | more))
        for k, each in enumerate(responses)
    ]


@pytest.fixture(scope="module")
def rows():
    pairs = load_pairs("builtin")[::30]
    return [
        ResponseList(pair.id, pair.source, pair.prompt, pair.responses, correct=(0,))
        for pair in pairs
    ]


@pytest.fixture(scope="module")
def probes(rows):
    return probe_lists(rows, most=30)


def measured(probes):
    """The feature of the pattern, of plain and of patterned version."""
    for probe in probes:
        column = SURFACE_FEATURES.index(PATTERNS[probe.category])
        yield probe, *surface_features(probe.responses)[:, column].tolist()


def test_probes_are_the_same_answer_plain_then_patterned(rows, probes):
    sources = {row.prompt: row for row in rows}
    assert {probe.category for probe in probes} == set(PATTERNS)
    for probe, plain, patterned in measured(probes):
        assert patterned > plain
        assert probe.category == "length" or plain == 0
        assert set(probe.responses) & {*sources[probe.prompt].responses}
        assert probe.correct == (0, 1)
    # Some have the pattern from the start, and lose it.
    natural = [p for p in probes if p.responses[1] in sources[p.prompt].responses]
    assert {p.category for p in natural} >= {"bold", "list", "link", "emoji", "exclamation"}
    assert all(p.responses[0] == remove_pattern(p.responses[1], p.category) for p in natural)
    assert len({probe.id for probe in probes}) == len(probes)


def test_the_number_of_texts_is_bounded_and_drawn_by_the_seed(rows):
    few = probe_lists(rows, most=5)
    assert len({r for p in few for r in p.responses}) <= 5 * (1 + len(PATTERNS))
    assert few == probe_lists(rows, most=5)
    assert few != probe_lists(rows, most=5, seed=1)
    assert {p.category for p in probe_lists(rows, most=5, patterns=["bold"])} == {"bold"}
    with pytest.raises(ValueError, match="`most` must be positive"):
        probe_lists(rows, most=0)
    assert probe_lists([]) == ()


def test_a_response_that_several_lists_have_is_drawn_once():
    twice = [*lists((PLAIN, "No.")), *lists((PLAIN, "Yes."))]
    ids = [p.id for p in probe_lists(twice, patterns=["bold"])]
    assert ids == ["r0/0/bold"]


def test_a_score_that_counts_a_pattern_always_likes_it_and_is_blind_to_others(probes):
    texts = [text for probe in probes for text in probe.responses]
    features = surface_features(texts)
    bold = features[:, SURFACE_FEATURES.index("bold")]
    table = probe_table(["likes", "dislikes"], torch.stack([bold, -bold]), probes)
    assert table.name == "bias_probes"
    assert table.columns == (
        *("pattern", "pairs", "likes", "likes low", "likes high"),
        *("dislikes", "dislikes low", "dislikes high"),
    )
    assert table.column("pattern") == list(PATTERNS)
    for pattern, _, *values in table.rows:
        assert values == ([1, 1, 1, 0, 0, 0] if pattern == "bold" else [0.5] * 6)


def test_the_share_is_that_of_pairs_and_its_interval_covers_prompts():
    probes = [
        ResponseList(f"p{k}", "test", prompt(k // 4), ("a", "b"), correct=(0, 1), category="x")
        for k in range(40)
    ]
    # Pairs of one prompt are alike: a tenth of the prompts, not of the pairs, is what varies.
    wins = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0, 0, 0]).repeat_interleave(4)
    scores = torch.stack([torch.zeros(40), wins - 0.5], dim=1).reshape(1, 80)
    [[pattern, pairs, share, low, high]] = probe_table(["m"], scores, probes).rows
    assert (pattern, pairs) == ("x", 40)
    assert share == pytest.approx(0.3)
    error = math.sqrt(0.3 * 0.7 / 10)
    assert low == pytest.approx(0.3 - 1.96 * error, abs=0.06)
    assert high == pytest.approx(0.3 + 1.96 * error, abs=0.06)


def test_a_skipped_response_leaves_its_pair_out_for_all_models_and_is_counted(probes):
    probes = probes[:10]
    scores = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    without = probe_table(["a", "b"], scores[:, 2:], probes[1:])
    scores[1, 0] = torch.nan
    table = probe_table(["a", "b"], scores, probes)
    assert table.rows == without.rows
    assert "1 of 10 pairs left out" in table.note
    assert "left out" not in without.note


@pytest.mark.parametrize("shape", [(1, 20), (2, 19), (2, 21)])
def test_scores_that_do_not_fit_are_refused(probes, shape):
    with pytest.raises(ValueError, match=r"`scores` must have the shape \(2, 20\)"):
        probe_table(["a", "b"], torch.zeros(shape), probes[:10])
    rows = lists(*[("a", "b")] * 10)
    with pytest.raises(ValueError, match=r"`scores` must have the shape \(2, 20\)"):
        length_bias_table(["a", "b"], torch.zeros(shape), rows, torch.zeros(shape[1], 15))


def test_probes_have_two_versions():
    with pytest.raises(ValueError, match="two responses each"):
        probe_table(["a"], torch.zeros(1, 3), lists(("a", "b", "c")))


def test_preference_bias_is_the_share_of_right_and_of_wrong_responses_with_a_pattern():
    rows = lists(
        ("Use **warm** water now.", "No.", "Use `**warm**` water for this one."),
        ("Use **warm** water now.", "Use **cold** water."),
        ("Use water.", "Use water, and much of it."),
    )
    # Neither has anything to say: all are right, or all are tied.
    rows += lists(("**A**", "B"), correct=(0, 1)) + lists(
        ("**A**", "B"), correct=None, ranks=(1, 1)
    )
    table = preference_bias_table(rows)
    assert table.columns == (
        *("pattern", "right", "right with it", "wrong", "wrong with it", "gap"),
        *("low", "high"),
    )
    assert table.column("pattern") == list(PATTERNS)
    bold = table.rows[table.column("pattern").index("bold")]
    assert bold[:6] == ("bold", 3, pytest.approx(2 / 3), 4, 0.25, pytest.approx(2 / 3 - 1 / 4))
    assert bold[6] <= bold[5] <= bold[7]
    length = table.rows[0]  # longer than the mean: yes, yes, no; no, yes, no, yes
    assert length[:6] == ("length", 3, pytest.approx(2 / 3), 4, 0.5, pytest.approx(2 / 3 - 0.5))
    assert "3 of 5 lists have both" in table.note


def test_a_response_is_long_beside_those_to_its_own_prompt():
    rows = lists(("word " * 50, "word " * 40), ("word " * 4, "word " * 3))
    assert preference_bias_table(rows).rows[0][:6] == ("length", 2, 1.0, 2, 0.0, 1.0)


def test_of_ranks_the_best_are_right():
    rows = lists(("**A**", "B", "**C**"), correct=None, ranks=(1, 2, 1))
    bold = preference_bias_table(rows).rows[1]
    assert bold[:6] == ("bold", 2, 1.0, 1, 0.0, 1.0)


def test_preference_bias_of_lists_without_right_and_wrong_has_no_rows():
    table = preference_bias_table(load_lists("builtin")[:5])
    assert table.rows == ()
    assert "0 of 5 lists have both" in table.note


def test_the_preferences_of_the_corpus_follow_no_pattern_and_planted_ones_do(rows):
    gaps = preference_bias_table(rows).column("gap")
    assert max(map(abs, gaps)) < 0.2
    planted = lists(*[(f"**Yes** number {k}.", f"No, number {k}.") for k in range(20)])
    bold = preference_bias_table(planted).rows[1]
    assert bold[5:] == (1.0, 1.0, 1.0)


@st.composite
def scored_lists(draw):
    """For each list: number of words, whether it is right, and two scores, of each response."""
    response = st.tuples(
        st.integers(1, 9),
        st.booleans(),
        *[st.sampled_from([-1.0, 0.0, 0.5, 2.0])] * 2,
    )
    return draw(st.lists(st.lists(response, min_size=1, max_size=4), min_size=2, max_size=8))


@given(scored_lists())
def test_length_bias_is_what_the_slow_way_finds(problem):
    rows = [
        ResponseList(
            f"r{k}",
            "test",
            prompt(k // 2),
            tuple(" ".join(["word"] * words) for words, *_ in each),
            correct=tuple(j for j, (_, right, *_) in enumerate(each) if right),
        )
        for k, each in enumerate(problem)
    ]
    scores = torch.tensor([response[2:] for each in problem for response in each]).T
    surface = surface_features([text for row in rows for text in row.responses])
    table = length_bias_table(["a", "b"], scores, rows, surface)
    for name, score in zip("ab", scores.tolist(), strict=True):
        shown = dict(zip(table.columns, table.rows["ab".index(name)], strict=True))
        deviations, longer, shorter, ratios, k = [], [], [], [], 0
        for row in rows:
            own = score[k : k + len(row.responses)]
            log = [math.log1p(len(text.split())) for text in row.responses]
            k += len(own)
            if len(own) > 1:
                deviations += zip(own - np.mean(own), log - np.mean(log), strict=True)
                first = [x for x, s in zip(log, own, strict=True) if s == max(own)]
                ratios.append(np.mean(first) - np.mean(log))
            for i in row.correct:
                for j in set(range(len(own))) - set(row.correct):
                    credit = 0.5 + 0.5 * np.sign(own[i] - own[j])
                    if log[i] > log[j]:
                        longer.append(credit)
                    elif log[i] < log[j]:
                        shorter.append(credit)
        for found, expected in (("longer", longer), ("shorter", shorter)):
            value = shown[f"accuracy, {found} is right"]
            assert value == (pytest.approx(np.mean(expected)) if expected else None)
        if longer and shorter:
            assert shown["gap"] == pytest.approx(np.mean(longer) - np.mean(shorter))
            assert shown["gap low"] <= shown["gap high"]
        else:
            assert shown["gap"] is None
        correlation = shown["correlation with length, within prompts"]
        if not deviations:
            assert correlation is None
            continue
        x, y = np.round(np.array(deviations), 9).T
        assert shown["words of the first, over the mean"] == pytest.approx(np.exp(np.mean(ratios)))
        if np.ptp(x) > 0 and np.ptp(y) > 0:
            assert correlation == pytest.approx(spearmanr(x, y)[0], abs=1e-9)


def test_length_itself_and_its_opposite_are_found(rows):
    surface = surface_features([text for row in rows for text in row.responses])
    length = surface[:, 0]
    other = torch.randn(len(length), generator=torch.Generator().manual_seed(0)).double()
    scores = torch.stack([length, -length, other])
    table = length_bias_table(["longer", "shorter", "blind"], scores, rows, surface)
    longer, shorter, blind, right = (
        dict(zip(table.columns, row, strict=True)) for row in table.rows
    )
    correlation = "correlation with length, within prompts"
    assert longer[correlation] == pytest.approx(1.0)
    assert shorter[correlation] == pytest.approx(-1.0)
    assert blind["low"] < 0.0 < blind["high"]
    assert (longer["accuracy, longer is right"], longer["accuracy, shorter is right"]) == (1, 0)
    assert (longer["gap"], shorter["gap"]) == (1.0, -1.0)
    assert blind["gap low"] < 0.0 < blind["gap high"]
    assert right["model"] == RIGHT
    assert (right["accuracy, longer is right"], right["accuracy, shorter is right"]) == (1, 1)
    verbosity = "words of the first, over the mean"
    assert longer[verbosity] > 1.05
    assert longer[verbosity] * shorter[verbosity] == pytest.approx(1.0)


def test_a_skipped_response_is_left_out_for_all_models_and_counted(rows):
    rows = rows[:10]
    surface = surface_features([text for row in rows for text in row.responses])
    scores = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).double()
    without = length_bias_table(["a", "b"], scores[:, 2:], rows[1:], surface[2:])
    scores[1, :2] = torch.nan
    table = length_bias_table(["a", "b"], scores, rows, surface)
    assert [row[:5] for row in table.rows] == [row[:5] for row in without.rows]
    assert "2 responses left out" in table.note


def test_lists_of_one_response_tell_nothing_of_length():
    table = length_bias_table(["a"], torch.zeros(1, 2), lists("a", "b"), torch.zeros(2, 15))
    assert table.rows == (("a", *[None] * 9),)
