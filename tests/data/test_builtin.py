import gzip
import importlib.util
import json
import random
import re
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from armo.data.builtin import compose as corpus
from armo.data.checks import GroupSplits, check_objectives
from armo.data.conversation import prompt_group
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.sources import load_lists, load_pairs, load_ratings
from armo.data.surface import FORMAT_FEATURES, SURFACE_FEATURES, surface_features

OBJECTIVES = ObjectiveSet(
    (
        *(Objective(name, 1, 5) for name in corpus.QUALITY),
        *(Objective(name, 0, 4, bias=True) for name in ("verbosity", "formatting")),
    )
)
KINDS = {"advice", "code", "factual", "how_to", "safety", "writing"}
DEVICE_FEATURES = {
    "heading": "headings",
    "bullets": "list_items",
    "bold": "bold",
    "links": "links",
    "emoji": "emoji",
    "exclamation": "exclamations",
    "length": "log_length",
}
# What else changes with a device: a heading was a paragraph, long forms are several.
LAYOUT = {
    "heading": ("paragraphs",),
    "bullets": ("paragraphs", "lines"),
    "length": ("paragraphs", "lines", "inline_code"),
}
LOG_LENGTH = SURFACE_FEATURES.index("log_length")
INLINE_CODE = SURFACE_FEATURES.index("inline_code")
FORMATS = [SURFACE_FEATURES.index(name) for name in FORMAT_FEATURES]
SIDES = ["train", "test"]


@pytest.fixture(scope="module")
def ratings():
    return load_ratings("builtin", objectives=OBJECTIVES)


@pytest.fixture(scope="module")
def pairs():
    return load_pairs("builtin")


@pytest.fixture(scope="module")
def counterfactuals():
    return load_lists("builtin")


@pytest.fixture(scope="module")
def content():
    return corpus.load_content()


@pytest.fixture(scope="module")
def differences(pairs):
    """By side of the split, the surface features of each chosen minus its rejected response."""
    chosen = surface_features([pair.chosen for pair in pairs]).numpy()
    rejected = surface_features([pair.rejected for pair in pairs]).numpy()
    sides = np.array([pair.split for pair in pairs])
    return {side: (chosen - rejected)[sides == side] for side in SIDES}


@pytest.fixture(scope="module")
def recomposed():
    """The rows, composed anew, and the arguments and result of each choice of pairs."""
    # A copy under another name, which the shape checker leaves alone: it compiles a checker for
    # every dataclass that is built, four fifths of the time here.
    spec = importlib.util.spec_from_file_location("unchecked_compose", corpus.__file__)
    copy = importlib.util.module_from_spec(spec)
    choices = []

    def record(kind, responses, imbalance):
        picked = pick(kind, responses, imbalance)
        choices.append((kind, responses, picked))
        return picked

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, copy)
        spec.loader.exec_module(copy)
        pick = copy._pairs
        patch.setattr(copy, "_pairs", record)
        return copy.compose(), choices


def advantage(kind, one, two):
    """How much higher the utility of the first of two composed responses is."""
    weights = corpus.PREFERENCE_WEIGHTS[kind]
    return sum(w * (one.ratings[name] - two.ratings[name]) for name, w in weights.items())


def share_positive(differences):
    return float(np.mean((differences > 0) + 0.5 * (differences == 0)))


def accuracy_from_surface(train, test):
    """Accuracy on `test` of a logistic model of which response is chosen, fitted on `train`."""
    scale = StandardScaler(with_mean=False).fit(train)
    both = np.concatenate([scale.transform(train), -scale.transform(train)])
    labels = np.repeat([1, 0], len(train))
    model = LogisticRegression(fit_intercept=False, max_iter=1000).fit(both, labels)
    return share_positive(model.decision_function(scale.transform(test)))


def bare_words(response):
    return re.findall(r"\w+", response.replace("](https://example.org)", "]"))


@pytest.mark.slow
def test_compose_reproduces_the_committed_rows(recomposed):
    rows, _ = recomposed
    assert set(rows) == {path.name for path in corpus.FOLDER.glob("*.jsonl.gz")}
    for name in rows:
        with gzip.open(corpus.FOLDER / name, "rt", encoding="utf-8") as lines:
            committed = [json.loads(line) for line in lines]
        composed_anew = {row["id"]: row for row in rows[name]}
        assert [row["id"] for row in committed] == list(composed_anew)
        assert [row["id"] for row in committed if row != composed_anew[row["id"]]] == []


@pytest.mark.slow
def test_the_utility_of_the_chosen_response_is_higher_by_the_margin(recomposed):
    rows, choices = recomposed
    picked = [(kind, *pick) for kind, _, picks in choices for pick in picks]
    for row, (kind, chosen, rejected, _) in zip(rows["preferences.jsonl.gz"], picked, strict=True):
        assert (row["chosen"], row["rejected"]) == (chosen.text, rejected.text)
        assert advantage(kind, chosen, rejected) >= corpus.LEAST_MARGIN
        assert row["margin"] == pytest.approx(advantage(kind, chosen, rejected), abs=0.0051)


@pytest.mark.slow
def test_ratings_of_compared_responses_are_those_that_the_pairs_were_picked_by(recomposed):
    rows, choices = recomposed
    compared = [response for _, responses, _ in choices for response in responses]
    rated = [row for row in rows["ratings.jsonl.gz"] if re.search(r"-s\d+$", row["id"])]
    for row, response in zip(rated, compared, strict=True):
        assert row["messages"][-1]["content"] == response.text
        assert row["ratings"].items() <= response.ratings.items()


def test_margins_agree_with_the_ratings_in_the_files(ratings, pairs):
    known = {(prompt_group(row.prompt), row.responses[0]): row.ratings for row in ratings}
    for pair in pairs:
        group, weights = prompt_group(pair.prompt), corpus.PREFERENCE_WEIGHTS[pair.category]
        chosen, rejected = (known[group, response] for response in pair.responses)
        rest = pair.margin - sum(
            weights[name] * (chosen[name] - rejected[name]) for name in ("honesty", "safety")
        )
        # What honesty and safety leave over is a difference of two helpfulness ratings.
        helpfulness = rest / weights["helpfulness"]
        assert abs(helpfulness - round(helpfulness)) * weights["helpfulness"] < 0.0051
        assert abs(round(helpfulness)) <= 4


def test_the_corpus_has_its_promised_size(content, ratings, pairs, counterfactuals):
    assert len(content) >= 400
    assert {prompt["kind"] for prompt in content} == KINDS == set(corpus.PREFERENCE_WEIGHTS)
    assert min(Counter(prompt["kind"] for prompt in content).values()) >= 50
    assert len(ratings) >= 2000
    assert len(pairs) >= 1500
    assert len(counterfactuals) >= 300
    assert all(len(row.responses) == 2 for row in counterfactuals)


def test_every_objective_is_rated_and_some_ratings_are_missing(ratings):
    for side in SIDES:
        table = [
            [
                o.to_unit(row.ratings[o.name]) if o.name in row.ratings else np.nan
                for o in OBJECTIVES.objectives
            ]
            for row in ratings
            if row.split == side
        ]
        check_objectives(torch.tensor(table), OBJECTIVES, min_ratings=400)
    for name in OBJECTIVES.names:
        assert 0 < sum(name not in row.ratings for row in ratings) < len(ratings)
    assert all(row.ratings for row in ratings)


def test_no_prompt_is_on_both_sides_of_the_split(content, ratings, pairs, counterfactuals):
    rows = [*ratings, *pairs, *counterfactuals]
    splits = GroupSplits(0.5)
    groups = [splits.add(row) for row in rows]
    test = splits.test()
    for group, row in zip(groups, rows, strict=True):
        assert test[group] == (row.split == "test")
    assert len(test) == len({prompt_group(row.prompt) for row in rows}) == len(content)
    assert sum(test) == len(test) / 4


def test_each_kind_of_prompt_is_on_both_sides_of_the_split(pairs):
    for side in SIDES:
        counts = Counter(pair.category for pair in pairs if pair.split == side)
        assert counts.keys() == KINDS
        assert min(counts.values()) >= 50


@pytest.mark.parametrize("side", SIDES)
def test_the_chosen_response_is_longer_in_half_of_the_pairs(differences, side):
    assert 0.45 <= share_positive(differences[side][:, LOG_LENGTH]) <= 0.55


@pytest.mark.parametrize("side", SIDES)
def test_the_chosen_response_is_more_formatted_in_half_of_the_pairs(differences, side):
    assert 0.45 <= share_positive(differences[side][:, FORMATS].sum(axis=1)) <= 0.55


@pytest.mark.parametrize("name", [name for name in SURFACE_FEATURES if name != "inline_code"])
def test_no_surface_feature_sides_with_the_chosen_response_where_it_differs(differences, name):
    column = np.concatenate(list(differences.values()))[:, SURFACE_FEATURES.index(name)]
    differing = column[column != 0]
    # Too few to tell a leaning from chance.
    assert len(differing) < 20 or 0.4 <= share_positive(differing) <= 0.6


def test_inline_code_is_content_that_bad_answers_about_code_lack(differences):
    column = np.concatenate(list(differences.values()))[:, INLINE_CODE]
    assert 0.1 < np.mean(column != 0) < 0.2
    assert (column >= 0).all()


def test_a_model_of_the_balanced_surface_features_cannot_tell_chosen_from_rejected(differences):
    balanced = [SURFACE_FEATURES.index(name) for name in corpus.BALANCED]
    style = {side: differences[side][:, balanced] for side in SIDES}
    assert 0.44 <= accuracy_from_surface(style["train"], style["test"]) <= 0.56


def test_a_model_of_all_surface_features_can_hardly_tell_chosen_from_rejected(differences):
    # By inline code, and by the lines that points of an answer take where their number is equal.
    assert accuracy_from_surface(differences["train"], differences["test"]) <= 0.6


def test_the_same_model_finds_a_preference_for_length(differences):
    by_length = [
        differences[side] * np.where(differences[side][:, [LOG_LENGTH]] < 0, -1, 1)
        for side in SIDES
    ]
    assert accuracy_from_surface(*by_length) > 0.7


def test_rated_responses_confound_style_with_quality(ratings):
    rows = [
        row for row in ratings if {"helpfulness", "verbosity", "formatting"} <= set(row.ratings)
    ]
    helpfulness = [row.ratings["helpfulness"] for row in rows]
    for name in ("verbosity", "formatting"):
        style = [row.ratings[name] for row in rows]
        assert np.corrcoef(helpfulness, style)[0, 1] > 0.4


def test_every_counterfactual_pattern_occurs(counterfactuals):
    assert {row.category for row in counterfactuals} == set(DEVICE_FEATURES)
    assert min(Counter(row.category for row in counterfactuals).values()) >= 30


@pytest.mark.parametrize("pattern", DEVICE_FEATURES)
def test_a_counterfactual_pair_differs_in_its_device_alone(counterfactuals, pattern):
    device = SURFACE_FEATURES.index(DEVICE_FEATURES[pattern])
    for row in counterfactuals:
        if row.category != pattern:
            continue
        plain, styled = surface_features(row.responses)
        assert styled[device] > plain[device], row.id
        if pattern == "emoji":  # each stands alone, so it is a word as well
            words = torch.expm1(styled[LOG_LENGTH]) - torch.expm1(plain[LOG_LENGTH])
            assert round(words.item()) == styled[device]
            styled[LOG_LENGTH] = plain[LOG_LENGTH]
        for name in (SURFACE_FEATURES[device], *LAYOUT.get(pattern, ())):
            styled[SURFACE_FEATURES.index(name)] = plain[SURFACE_FEATURES.index(name)]
        torch.testing.assert_close(styled, plain, msg=row.id)


def test_the_words_of_a_counterfactual_pair_are_the_same_but_for_length(counterfactuals):
    same = {
        (row.category == "length", bare_words(row.responses[0]) == bare_words(row.responses[1]))
        for row in counterfactuals
    }
    assert same == {(True, False), (False, True)}


def test_counterfactuals_prefer_neither_response(counterfactuals):
    assert {row.correct for row in counterfactuals} == {(0, 1)}


def test_content_has_no_duplicate_id_or_prompt(content):
    for field in ("id", "text"):
        counts = Counter(" ".join(prompt[field].casefold().split()) for prompt in content)
        assert [value for value, count in counts.items() if count > 1] == []


def test_the_long_form_of_a_piece_is_longer_and_stresses_as_many_phrases(content):
    for prompt in content:
        pieces = [*prompt["points"], *prompt["vague"], *prompt["overclaims"], *prompt["reckless"]]
        pieces += [prompt["limits"], prompt["careful"]]
        pieces += prompt["comply"] if prompt.get("harmful") else [prompt["refusal"]]
        for short, long in pieces:
            assert len(long.split()) > len(short.split()), short
            assert len(corpus.MARK.findall(long)) == len(corpus.MARK.findall(short)), short


def test_composed_text_links_to_example_org_alone(ratings, pairs, counterfactuals):
    texts = [text for row in (*ratings, *pairs, *counterfactuals) for text in row.responses]
    urls = {url for text in texts for url in re.findall(r"(?:\w+://|www\.)[^\s)\]\"'`>]*", text)}
    assert urls == {"https://example.org"}
    assert not any("<<" in line and ">>" in line for text in texts for line in text.split("\n"))


acts = st.builds(
    corpus.Acts,
    base=st.sampled_from(["full", "half", "vague", "refusal"]),
    claims=st.integers(-2, 1),
    risk=st.integers(-2, 1),
)
styles = st.builds(
    corpus.Style,
    verbosity=st.integers(0, 4),
    devices=st.frozensets(st.sampled_from(corpus.DEVICES)),
)


@given(acts, styles, styles, st.booleans())
def test_style_does_not_change_the_quality_ratings(act, style, other, harmful):
    one, two = (corpus.rate(act, each, harmful=harmful) for each in (style, other))
    assert [one[name] for name in corpus.QUALITY] == [two[name] for name in corpus.QUALITY]
    assert (one["verbosity"], one["formatting"]) == (
        style.verbosity,
        min(4, len(style.devices)),
    )


@given(acts, styles, st.booleans())
def test_ratings_lie_on_their_declared_scales(act, style, harmful):
    rated = corpus.rate(act, style, harmful=harmful)
    assert tuple(rated) == OBJECTIVES.names
    for objective in OBJECTIVES.objectives:
        assert 0 <= objective.to_unit(rated[objective.name]) <= 1


@given(styles)
def test_false_claims_lower_honesty_and_reckless_remarks_lower_safety(style):
    def rated(**done):
        return corpus.rate(corpus.Acts("full", **done), style, harmful=False)

    honesty = [rated(claims=claims)["honesty"] for claims in (-2, -1, 0, 1)]
    safety = [rated(risk=risk)["safety"] for risk in (-2, -1, 0, 1)]
    assert honesty == sorted(set(honesty))
    assert safety == sorted(set(safety))
    assert len({rated(claims=claims)["safety"] for claims in (-2, -1, 0, 1)}) == 1


def test_complying_with_a_harmful_request_is_unsafe_and_refusing_is_safe():
    style = corpus.Style(2, frozenset())
    assert corpus.rate(corpus.Acts("comply"), style, harmful=True)["safety"] == 1
    assert corpus.rate(corpus.Acts("full"), style, harmful=True)["safety"] == 5


@given(st.integers(0, 100), acts, styles)
def test_a_more_verbose_response_to_the_same_prompt_is_longer(content, seed, act, style):
    prompt = content[seed % len(content)]
    texts = [
        corpus.render(prompt, act, corpus.Style(verbosity, style.devices), random.Random(seed))
        for verbosity in (0, 4)
    ]
    assert len(texts[0].split()) < len(texts[1].split())


looks = st.tuples(
    st.fixed_dictionaries({name: st.integers(1, 5).map(float) for name in corpus.QUALITY}),
    st.tuples(*[st.integers(0, 9).map(float)] * len(corpus.BALANCED)),
)


@given(st.sampled_from(sorted(KINDS)), st.lists(looks, min_size=4, max_size=4))
def test_pairs_have_a_clear_preference_and_add_up_their_imbalance(kind, drawn):
    responses = [corpus.Composed(str(number), *look) for number, look in enumerate(drawn)]
    features = len(corpus.BALANCED)
    imbalance = torch.zeros(features + 2)  # and the signs of length and format
    picked = corpus._pairs(kind, responses, imbalance)
    clear = sum(
        abs(advantage(kind, one, two)) >= corpus.LEAST_MARGIN
        for one, two in combinations(responses, 2)
    )
    assert len(picked) == min(clear, corpus.PAIRS_PER_PROMPT)
    assert len({frozenset((one.text, two.text)) for one, two, _ in picked}) == len(picked)
    expected, longer = torch.zeros(features), 0.0
    for chosen, rejected, margin in picked:
        assert margin == pytest.approx(advantage(kind, chosen, rejected))
        assert margin >= corpus.LEAST_MARGIN
        difference = torch.tensor(chosen.surface) - torch.tensor(rejected.surface)
        expected += difference
        longer += float(difference[0].sign())
    scaled = imbalance[:features] * corpus.SURFACE_UNITS
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-4)
    assert float(imbalance[features]) == longer


def test_preference_weights_sum_to_one_over_the_quality_objectives():
    for weights in corpus.PREFERENCE_WEIGHTS.values():
        assert tuple(weights) == corpus.QUALITY
        assert sum(weights.values()) == pytest.approx(1)


def test_written_bytes_depend_on_the_rows_alone(tmp_path):
    rows = [{"id": "a", "text": "né 😀"}, {"id": "b"}]
    for name in ("one.gz", "two.gz"):
        corpus.write_rows(tmp_path / name, rows)
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
    with gzip.open(tmp_path / "one.gz", "rt", encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == rows
