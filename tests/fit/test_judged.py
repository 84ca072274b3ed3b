"""Heads from yes-or-no ratings and from judgements, against the solver and scikit-learn."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from test_heads import write_store

from armo.fit.heads import FittedHeads, ObjectiveHeads, fit_heads
from armo.fit.judged import Judgements, apply_links
from armo.fit.logistic import THURSTONE, LabelledRows, fit_binary, fit_judgements

NAMES = ("rated", "yes", "judged", "mixed")
LINKS = ("identity", "logistic", "logistic", "identity")
ALPHAS = (0.1, 1.0, 10.0)
FOLDS = 3
PROMPTS = 30
DIM = 5


class Problem:
    """Ratings and judged pairs of some rows of a store; all but `rated` are not plain ridge."""

    def __init__(self, folder, *, seed=0, rows=120, pairs=70):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).double()

        self.embeddings = (draw(rows, DIM) + 0.5).float()
        self.store = write_store(folder, self.embeddings)
        self.rows = torch.randperm(rows, generator=generator)[: rows - 30]
        self.groups = self.rows % PROMPTS
        self.truth = draw(DIM, len(NAMES))
        linear = self.embeddings.double() @ self.truth
        self.ratings = 0.5 + 0.1 * (linear + 0.5 * draw(rows, len(NAMES)))[self.rows]
        self.ratings[:, 1] = (linear[self.rows, 1] + draw(len(self.rows)) > 0.5).double()
        self.ratings[:, 2] = torch.nan
        self.ratings[torch.rand(self.ratings.shape, generator=generator) < 0.2] = torch.nan
        # Some prompts have pairs and no rating.
        self.pair_groups = torch.randint(PROMPTS + 5, (pairs,), generator=generator)
        chosen, rejected = torch.randint(rows, (2, pairs), generator=generator)
        probabilities = torch.full((pairs, len(NAMES)), torch.nan).double()
        difference = (linear[chosen] - linear[rejected])[:, 2:]
        probabilities[:, 2:] = torch.sigmoid(difference + draw(pairs, 2)).round(decimals=1)
        probabilities[torch.rand(probabilities.shape, generator=generator) < 0.2] = torch.nan
        self.judgements = Judgements(chosen, rejected, probabilities, self.pair_groups)

    def fit(self, **changes):
        arguments = {
            "ratings": self.ratings,
            "judgements": self.judgements,
            "logistic": ["yes"],
            "objectives": NAMES,
            "group_count": PROMPTS + 5,
            "folds": FOLDS,
            "alphas": ALPHAS,
        }
        return fit_heads(self.store, self.rows, groups=self.groups, **(arguments | changes))

    def rated(self, k, fitted, weights=None):
        known = ~self.ratings[:, k].isnan()
        weights = torch.ones(len(known)).double() if weights is None else weights
        return LabelledRows(
            self.embeddings[self.rows[known]],
            self.ratings[known, k],
            weights[known],
            fitted.fold_of_group[self.groups[known]],
        )

    def paired(self, k, fitted, weights=None):
        known = ~self.judgements.probabilities[:, k].isnan()
        weights = torch.ones(len(known)).double() if weights is None else weights
        first, second = (
            self.embeddings[rows[known]].double()
            for rows in (self.judgements.chosen, self.judgements.rejected)
        )
        folds = fitted.fold_of_group[self.pair_groups[known]]
        return (first + second) / 2, LabelledRows(
            first - second, self.judgements.probabilities[known, k], weights[known], folds
        )


@pytest.fixture
def problem(tmp_path):
    return Problem(tmp_path / "store")


def divide(rows, mean):
    return replace(rows, sample_weights=rows.sample_weights / mean)


def fits_of(fitted, k):
    return [(h.weights[k], float(h.intercepts[k])) for h in (*fitted.without_fold, fitted.heads)]


def assert_same_fits(fitted, k, expected):
    for (weights, intercept), (w, b) in zip(fits_of(fitted, k), expected, strict=True):
        torch.testing.assert_close(weights, w, rtol=1e-5, atol=1e-7)
        assert intercept == pytest.approx(b, rel=1e-5, abs=1e-7)


@settings(max_examples=8)
@given(seed=st.integers(0, 9999), weighted=st.booleans())
def test_heads_are_those_of_the_solver_called_directly(tmp_path_factory, seed, weighted):
    problem = Problem(tmp_path_factory.mktemp("store"), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    of_rows, of_pairs = (
        torch.rand(count, generator=generator).double() + 0.1 if weighted else None
        for count in (len(problem.rows), len(problem.pair_groups))
    )
    judgements = replace(problem.judgements, sample_weights=of_pairs)
    fitted = problem.fit(sample_weights=of_rows, judgements=judgements)
    assert fitted.heads.links == LINKS
    assert all(heads.links == LINKS for heads in fitted.without_fold)
    how = {"folds": FOLDS, "alphas": ALPHAS}

    yes = problem.rated(1, fitted, of_rows)
    choice = fit_binary(lambda: [divide(yes, yes.sample_weights.mean())], **how)
    assert_same_fits(fitted, 1, [*choice.without, (choice.weights, choice.intercept)])
    assert fitted.summaries[1].alpha == choice.alpha
    assert fitted.summaries[1].error == pytest.approx(float(choice.loss.min()))
    assert fitted.summaries[1].sigma is None

    middle, pairs = problem.paired(2, fitted, of_pairs)
    choice = fit_judgements(lambda: [divide(pairs, pairs.sample_weights.mean())], **how)
    expected = []
    for fold, (w, _) in enumerate([*choice.without, (choice.weights, 0.0)]):
        s = pairs.sample_weights * (pairs.folds != fold)
        expected.append((w, -float(w @ (s @ middle / s.sum()))))
    assert_same_fits(fitted, 2, expected)
    summary = fitted.summaries[2]
    known = int((~judgements.probabilities[:, 2].isnan()).sum())
    assert (summary.ratings, summary.judgements, summary.sigma) == (0, known, None)
    assert summary.explained == pytest.approx(1.0 - float(choice.loss.min()) / math.log(2.0))

    _, pairs = problem.paired(3, fitted, of_pairs)
    rated = problem.rated(3, fitted, of_rows)
    mean = torch.cat([pairs.sample_weights, rated.sample_weights]).mean()
    choice = fit_judgements(lambda: [divide(pairs, mean)], [divide(rated, mean)], **how)
    assert_same_fits(fitted, 3, [*choice.without, (choice.weights, choice.intercept)])
    assert fitted.summaries[3].sigma == pytest.approx(THURSTONE / choice.scale, rel=1e-5)
    assert fitted.summaries[3].ratings == len(rated.targets)
    assert fitted.summaries[3].judgements == len(pairs.targets)


def test_a_logistic_head_is_scikit_learns(problem):
    fitted = problem.fit(alphas=[2.0])
    rows = problem.rated(1, fitted)
    model = LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000)
    model.fit(rows.inputs.double().numpy(), rows.targets.numpy())
    np.testing.assert_allclose(fitted.heads.weights[1].numpy(), model.coef_[0], rtol=1e-5)
    assert float(fitted.heads.intercepts[1]) == pytest.approx(model.intercept_[0], rel=1e-5)
    rewards = fitted.heads.rewards(problem.embeddings)[:, 1]
    expected = model.predict_proba(problem.embeddings.double().numpy())[:, 1]
    np.testing.assert_allclose(rewards.numpy(), expected, rtol=1e-5)


def test_a_judged_head_is_scikit_learns_on_both_orders_of_each_pair(problem):
    probabilities = problem.judgements.probabilities
    sharp = torch.where(probabilities == 0.5, 0.6, probabilities).round()
    judgements = replace(problem.judgements, probabilities=sharp)
    fitted = problem.fit(judgements=judgements, alphas=[2.0])
    problem.judgements = judgements
    _, pairs = problem.paired(2, fitted)
    x, t = pairs.inputs.numpy(), pairs.targets.numpy()
    model = LogisticRegression(C=0.25, fit_intercept=False, tol=1e-10, max_iter=10_000)
    model.fit(np.concatenate([x, -x]), np.concatenate([t, 1 - t]))  # twice the loss, so half C
    np.testing.assert_allclose(fitted.heads.weights[2].numpy(), model.coef_[0], rtol=1e-5)


def test_errors_are_those_of_a_loop_over_the_folds(problem):
    fitted = problem.fit(alphas=[1.0])
    for k in (1, 2, 3):
        rows = problem.rated(k, fitted) if k != 2 else problem.paired(2, fitted)[1]
        error = baseline = 0.0
        for fold, heads in enumerate(fitted.without_fold):
            inside = rows.folds == fold
            x, t = rows.inputs[inside].double(), rows.targets[inside]
            linear = x @ heads.weights[k] + (heads.intercepts[k] if k != 2 else 0.0)
            constant = float(rows.targets[~inside].mean()) if k != 2 else 0.5
            if k == 3:
                error += float((linear - t).square().sum())
                baseline += float((constant - t).square().sum())
                continue
            p = linear.sigmoid()
            error -= float((t * p.log() + (1 - t) * (1 - p).log()).sum())
            c = torch.tensor(constant).double()
            baseline -= float((t * c.log() + (1 - t) * (1 - c).log()).sum())
        summary = fitted.summaries[k]
        assert summary.error == pytest.approx(error / len(rows.targets), rel=1e-6)
        assert summary.explained == pytest.approx(1.0 - error / baseline, rel=1e-6)


def test_the_mean_judged_response_is_as_often_better_as_worse(problem):
    fitted = problem.fit()
    middle, _ = problem.paired(2, fitted)
    assert float(fitted.heads.rewards(middle.mean(0)[None])[0, 2]) == pytest.approx(0.5)


def test_plain_heads_are_the_same_with_and_without_the_others_beside_them(problem):
    together = problem.fit(alphas=[1.0])
    alone = problem.fit(
        ratings=problem.ratings[:, :1],
        objectives=NAMES[:1],
        judgements=None,
        logistic=[],
        alphas=[1.0],
    )
    torch.testing.assert_close(together.heads.weights[0], alone.heads.weights[0])
    assert together.heads.links[0] == alone.heads.links[0] == "identity"
    assert together.summaries[0].sigma == pytest.approx(alone.summaries[0].sigma)
    torch.testing.assert_close(
        together.uncertainty.deviations(problem.embeddings)[:, 0],
        alone.uncertainty.deviations(problem.embeddings)[:, 0],
    )


def test_judgements_of_nothing_change_nothing(problem):
    with_nothing = replace(
        problem.judgements, probabilities=torch.full((70, 4), torch.nan, dtype=torch.float64)
    )
    columns = [0, 3]
    arguments = {
        "ratings": problem.ratings[:, columns],
        "objectives": [NAMES[k] for k in columns],
        "logistic": [],
    }
    none = problem.fit(**arguments, judgements=None)
    nothing = replace(with_nothing, probabilities=with_nothing.probabilities[:, columns])
    empty = problem.fit(**arguments, judgements=nothing)
    assert torch.equal(none.heads.weights, empty.heads.weights)
    assert torch.equal(none.fold_of_group, empty.fold_of_group)
    assert none.summaries == empty.summaries


@pytest.mark.parametrize("what", ["ratings", "judgements", "responses"])
def test_heads_without_a_fold_never_saw_anything_of_its_prompts(problem, what):
    before = problem.fit(alphas=[1.0])
    both = set(problem.groups.tolist()) & set(problem.pair_groups.tolist())
    prompt = min(both)
    ratings, judgements = problem.ratings, problem.judgements
    inside = (problem.pair_groups == prompt)[:, None]
    if what == "ratings":
        ratings = torch.where((problem.groups == prompt)[:, None], 1.0 - ratings, ratings)
    elif what == "judgements":
        turned = torch.where(inside, 1.0 - judgements.probabilities, judgements.probabilities)
        judgements = replace(judgements, probabilities=turned)
    else:
        other = torch.where(inside[:, 0], (judgements.chosen + 17) % 120, judgements.chosen)
        judgements = replace(judgements, chosen=other)
    after = problem.fit(ratings=ratings, judgements=judgements, alphas=[1.0])
    assert torch.equal(before.fold_of_group, after.fold_of_group)
    own = int(before.fold_of_group[prompt])
    changed = {"ratings": [0, 1, 3], "judgements": [2, 3], "responses": [2, 3]}[what]
    for fold, (old, new) in enumerate(zip(before.without_fold, after.without_fold, strict=True)):
        for k in range(len(NAMES)):
            same = torch.allclose(old.weights[k], new.weights[k], atol=1e-7)
            same &= math.isclose(old.intercepts[k], new.intercepts[k], abs_tol=1e-7)
            assert same == (fold == own or k not in changed), (fold, k)


def test_the_prompts_of_judged_pairs_are_dealt_out_to_folds(problem):
    fitted = problem.fit()
    judged = problem.judgements.used()
    assert (fitted.fold_of_group[judged.groups] >= 0).all()
    assert bool((judged.groups >= PROMPTS).any()), "some have no rating"


def test_either_order_of_a_pair_says_the_same(problem):
    one = problem.fit()
    old = problem.judgements
    turned = Judgements(old.rejected, old.chosen, 1.0 - old.probabilities, old.groups)
    other = problem.fit(judgements=turned)
    torch.testing.assert_close(one.heads.weights, other.heads.weights, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(one.heads.intercepts, other.heads.intercepts, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 9])
def test_how_many_rows_are_read_at_a_time_changes_nothing(problem, monkeypatch, chunk):
    expected = problem.fit()
    monkeypatch.setattr("armo.fit.judged.CHUNK_ROWS", chunk)
    fitted = problem.fit()
    for one, other in zip(
        (expected.heads, *expected.without_fold), (fitted.heads, *fitted.without_fold), strict=True
    ):
        torch.testing.assert_close(one.weights, other.weights, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(one.intercepts, other.intercepts, rtol=1e-5, atol=1e-7)


def test_only_the_ratios_of_all_weights_together_matter(problem):
    rows = torch.ones(len(problem.rows)).double()

    def fit(rows_weight, pairs_weight):
        pairs = torch.full((70,), pairs_weight).double()
        judgements = replace(problem.judgements, sample_weights=pairs)
        return problem.fit(sample_weights=rows_weight * rows, judgements=judgements).heads.weights

    torch.testing.assert_close(fit(1.0, 3.0), fit(10.0, 30.0), rtol=1e-5, atol=1e-7)
    heavier = fit(1.0, 1.0), fit(1.0, 30.0)
    torch.testing.assert_close(heavier[0][:3], heavier[1][:3], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(heavier[0][3], heavier[1][3], rtol=1e-2)


def test_pairs_of_weight_zero_are_as_if_they_were_not_there(problem):
    old, kept = problem.judgements, problem.pair_groups % 4 > 0
    zero = problem.fit(judgements=replace(old, sample_weights=kept.double()))
    parts = (old.chosen, old.rejected, old.probabilities, old.groups)
    gone = problem.fit(judgements=Judgements(*(part[kept] for part in parts)))
    assert torch.equal(zero.heads.weights, gone.heads.weights)
    assert torch.equal(zero.fold_of_group, gone.fold_of_group)
    assert zero.summaries == gone.summaries


def test_ranks_and_clipping_are_for_ratings_on_a_scale_and_not_for_yes_or_no(problem):
    plain, ranks = problem.fit(), problem.fit(targets="ranks", clip=0.05)
    torch.testing.assert_close(plain.heads.weights[1:3], ranks.heads.weights[1:3])
    assert not torch.allclose(plain.heads.weights[3], ranks.heads.weights[3], rtol=1e-2)


def test_heads_that_are_not_plain_ridge_have_no_interval(problem):
    fitted = problem.fit()
    deviations = fitted.uncertainty.deviations(problem.embeddings)
    assert deviations[:, 1:].isnan().all()
    assert deviations[:, 0].isfinite().all()
    low, high = fitted.uncertainty.interval(problem.embeddings)
    assert low[:, 1:].isneginf().all()
    assert high[:, 1:].isposinf().all()
    assert low[:, 0].isfinite().all()


@pytest.mark.parametrize("columns", [[0, 1, 2, 3], [1, 2, 3]])
def test_save_then_load_is_the_identity(problem, tmp_path, columns):
    probabilities = problem.judgements.probabilities[:, columns]
    fitted = problem.fit(
        ratings=problem.ratings[:, columns],
        judgements=replace(problem.judgements, probabilities=probabilities),
        objectives=[NAMES[k] for k in columns],
    )
    assert (fitted.uncertainty is None) == (0 not in columns), "without ridge nothing to say"
    fitted.save(tmp_path / "heads")
    loaded = FittedHeads.load(tmp_path / "heads")
    assert loaded.summaries == fitted.summaries
    saved, read = (fitted.heads, *fitted.without_fold), (loaded.heads, *loaded.without_fold)
    for one, other in zip(saved, read, strict=True):
        assert one.links == other.links == tuple(LINKS[k] for k in columns)
        assert torch.equal(one.rewards(problem.embeddings), other.rewards(problem.embeddings))
    if 0 in columns:
        for one, other in zip(
            fitted.uncertainty.interval(problem.embeddings),
            loaded.uncertainty.interval(problem.embeddings),
            strict=True,
        ):
            assert torch.equal(one, other)


# --- links --------------------------------------------------------------------------------------


def test_rewards_are_probabilities_where_the_link_says_so_and_linear_elsewhere():
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    heads = ObjectiveHeads(("a", "b"), weights, torch.ones(2).double(), ("logistic", "identity"))
    rewards = heads.rewards(torch.tensor([[2.0, 9.0], [-900.0, 9.0]]))
    assert rewards[0].tolist() == pytest.approx([1.0 / (1.0 + math.exp(-3.0)), 3.0])
    assert rewards[1].tolist() == [0.0, -899.0]


def test_heads_without_links_are_linear_and_their_values_untouched():
    heads = ObjectiveHeads(("a", "b"), torch.ones(2, 2).double(), torch.zeros(2).double())
    assert heads.links == ("identity", "identity")
    values = torch.tensor([[7.0, -7.0]])
    assert apply_links(values, heads.links) is values


@pytest.mark.parametrize("links", [("identity",), ("identity", "probit")])
def test_links_that_do_not_fit_the_objectives_are_refused(no_type_checks, links):
    with pytest.raises(ValueError, match=r"`links` must be one of .* per objective"):
        ObjectiveHeads(("a", "b"), torch.ones(2, 2).double(), torch.zeros(2).double(), links)


# --- what is refused ----------------------------------------------------------------------------


def test_an_unknown_logistic_objective_is_named(problem):
    with pytest.raises(ValueError, match="`logistic` names charm; the objectives are rated, yes"):
        problem.fit(logistic=["yes", "charm"])


def test_a_logistic_objective_with_judgements_is_named(problem):
    with pytest.raises(ValueError, match="`logistic` names mixed, which has judgements"):
        problem.fit(logistic=["mixed"])


def test_yes_or_no_ratings_beyond_zero_and_one_name_the_objective(problem):
    with pytest.raises(ValueError, match="rated: `targets` must be probabilities"):
        problem.fit(logistic=["rated"], ratings=problem.ratings * 5.0)


def test_an_objective_that_is_always_yes_is_named(problem):
    problem.ratings[:, 1] = 1.0
    with pytest.raises(ValueError, match=r"yes: .* all 0 or all 1"):
        problem.fit()


def test_judgements_on_prompts_of_one_fold_only_name_the_objective(problem):
    problem.judgements.probabilities[problem.pair_groups != problem.pair_groups[0], 2] = torch.nan
    problem.judgements.probabilities[0, 2] = 0.9
    with pytest.raises(ValueError, match="judged: 1 judgements, all on prompts of one fold"):
        problem.fit()


@pytest.mark.parametrize("logistic", [[], ["rated"]])
def test_an_objective_without_ratings_and_judgements_is_named(problem, logistic):
    problem.ratings[:, 0] = torch.nan
    with pytest.raises(ValueError, match="rated: "):
        problem.fit(logistic=logistic)


@pytest.mark.parametrize("wrong", [-0.1, 1.5])
def test_a_judgement_that_is_no_probability_is_refused(problem, wrong):
    probabilities = problem.judgements.probabilities.clone()
    probabilities[3, 2] = wrong
    with pytest.raises(ValueError, match=r"`probabilities` must be in \[0, 1\].* for pair 3"):
        replace(problem.judgements, probabilities=probabilities)


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_weights_of_pairs_that_are_negative_or_not_finite_are_refused(problem, wrong):
    weights = torch.ones(70).double()
    weights[5] = wrong
    with pytest.raises(ValueError, match=r"`sample_weights` must be finite .* in row 5"):
        replace(problem.judgements, sample_weights=weights)
