"""Scores of lists are those of `score`, and the tables made of them those of a slow loop."""

import numpy as np
import pytest
import torch
from conftest import make_model
from scipy.stats import spearmanr

from armo.data.conversation import Message, ResponseList
from armo.embed.lists import embed_lists
from armo.report.reasons import correlation_table, weights_table
from armo.report.scoring import ScoredLists, score_lists


def row(id, prompt, *responses, category=""):
    return ResponseList(id, "s", (Message("user", prompt),), responses, (0,), category=category)


ROWS = [
    row("a", "How do I boil an egg?", "Seven **minutes**.", "No idea!", category="how/eggs"),
    row("b", "Is the fox quick?", "Yes.", "No.", "- It\n- is", category="facts"),
    row("c", "How do I fry an egg?", "No idea!", "Ask a cook.", category="how/else"),
]


@pytest.mark.parametrize(
    ("name", "covariates"), [("encoder", ("log_length", "bold", "list_items")), ("causal", ())]
)
def test_scores_of_lists_are_those_of_the_text(name, covariates, request, tmp_path):
    backbone = request.getfixturevalue(name)
    model = make_model(backbone, covariates=covariates)
    scored = score_lists(model, embed_lists(tmp_path, ROWS, backbone=backbone))
    texts = [
        [{"role": "user", "content": each.prompt[0].content}, {"role": "assistant", "content": r}]
        for each in ROWS
        for r in each.responses
    ]
    out = model.score(texts)
    assert scored.objectives == out.objectives
    for field in ("score", "rewards", "adjusted", "gating_weights"):
        torch.testing.assert_close(
            getattr(scored, field), getattr(out, field), atol=1e-5, rtol=1e-5
        )


def random_scores(rows, objectives=("a", "b", "c"), *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = sum(len(each.responses) for each in rows)
    rewards, adjusted, weights = torch.randn(
        3, count, len(objectives), generator=generator, dtype=torch.float64
    )
    # A prompt has the same weights for all of its responses.
    first = torch.tensor([0, 0, 2, 2, 2, 5, 5])[:count]
    weights = weights.softmax(1)[first]
    return ScoredLists(
        objectives,
        (weights * adjusted).sum(1),
        rewards,
        adjusted,
        weights,
        torch.zeros(count, dtype=torch.bool),
    )


def test_a_part_is_those_responses_alone():
    whole = random_scores(ROWS)
    part = whole.part(slice(2, 5))
    assert part.objectives == whole.objectives
    assert torch.equal(part.score, whole.score[2:5])
    assert torch.equal(part.rewards, whole.rewards[2:5])
    assert torch.equal(part.truncated, whole.truncated[2:5])


def test_weights_are_means_over_the_prompts_of_a_kind():
    scored = random_scores(ROWS)
    table = weights_table(ROWS, {"ours": scored})
    found = {(kind, name): weight for _, kind, _, name, weight in table.rows}
    for k, name in enumerate(scored.objectives):
        both = (scored.gating_weights[0, k] + scored.gating_weights[5, k]) / 2
        assert found["how", name] == pytest.approx(float(both))
        assert found["facts", name] == pytest.approx(float(scored.gating_weights[2, k]))
    assert {row[1]: row[2] for row in table.rows} == {"how": 2, "facts": 1}
    for kind in ("how", "facts"):
        assert sum(w for (of, _), w in found.items() if of == kind) == pytest.approx(1.0)


def test_an_objective_that_is_never_mixed_is_left_out():
    scored = random_scores(ROWS)
    scored.gating_weights[:, 1] = 0.0
    table = weights_table(ROWS, {"ours": scored})
    assert {row[3] for row in table.rows} == {"a", "c"}


def test_skipped_responses_have_no_weights_to_average():
    scored = random_scores(ROWS)
    scored.gating_weights[:2] = torch.nan
    scored.score[:2] = torch.nan
    table = weights_table(ROWS, {"ours": scored})
    how = {row[3]: row[4] for row in table.rows if row[1] == "how"}
    assert how["a"] == pytest.approx(float(scored.gating_weights[5, 0]))


def test_correlations_are_spearmans_of_deviations_within_prompts():
    scored = random_scores(ROWS)
    table = correlation_table(ROWS, {"ours": scored})
    assert len(table.rows) == 3
    lists = np.array([0, 0, 1, 1, 1, 2, 2])
    for _, first, other, rewards, adjusted in table.rows:
        i, j = scored.objectives.index(first), scored.objectives.index(other)
        for values, found in ((scored.rewards, rewards), (scored.adjusted, adjusted)):
            deviations = values.numpy().copy()
            for number in range(3):
                deviations[lists == number] -= deviations[lists == number].mean(0)
            expected = spearmanr(deviations[:, i], deviations[:, j]).statistic
            assert found == pytest.approx(expected)


def test_correlations_leave_out_what_was_skipped():
    scored = random_scores(ROWS)
    whole = correlation_table(ROWS[1:], {"ours": scored.part(slice(2, 7))})
    for field in ("score", "rewards", "adjusted"):
        getattr(scored, field)[:2] = torch.nan
    assert correlation_table(ROWS, {"ours": scored}).rows == whole.rows
