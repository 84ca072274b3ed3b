"""Training the gate, on synthetic pairs whose right objective is known."""

import functools
import importlib.util
import math

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import softmax
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression

from armo.artifacts import read_tensors, write_tensors
from armo.fit.decorrelation import style_weights
from armo.fit.gating import GatingNetwork
from armo.fit.training import (
    GatingTrainer,
    bradley_terry_loss,
    fit_constant_mix,
    fit_gating,
    load_gating,
    save_gating,
)

NAMES, MIXED = ("helpfulness", "verbosity", "safety"), (0, 2)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Task:
    """Pairs, two per prompt, ranked by weights that depend on the prompt, or by one mix."""

    def __init__(self, *, depends, prompts=600, seed=0):
        self.groups = torch.arange(2 * prompts) // 2
        self.prompts = draw(prompts, 4, seed=seed)[self.groups] + 3.0
        self.differences = draw(2 * prompts, 3, seed=seed + 1).double()
        first = (
            (self.prompts[:, 0] > 3.0).double()
            if depends
            else torch.full_like(self.groups, 0.7, dtype=torch.float64)
        )
        self.oracle = torch.stack([first, torch.zeros_like(first), 1.0 - first], dim=1)
        preferred = (self.oracle * self.differences).sum(1)
        preferred = preferred + 0.2 * draw(2 * prompts, seed=seed + 2)
        self.differences *= preferred.sign()[:, None]

    def accuracy(self, weights):
        return float(((weights * self.differences).sum(1) > 0).double().mean())

    def fit(self, folder, *, epochs=10, trainer=lightning.Trainer, **changes):
        arguments = {
            "groups": self.groups,
            "objectives": NAMES,
            "mixed": MIXED,
            "trainer": functools.partial(trainer, max_epochs=epochs, accelerator="cpu"),
            "progress": False,
            "hidden_dim": 16,
            "dropout": 0.1,
            "learning_rate": 0.02,
            "batch_size": 32,
        }
        return fit_gating(self.prompts, self.differences, folder=folder, **(arguments | changes))


class RecordingTrainer(lightning.Trainer):
    """Trains, and remembers the pairs of both sides."""

    def fit(self, model, *, datamodule):
        RecordingTrainer.sides = [datamodule.train.tensors, datamodule.held_out.tensors]
        super().fit(model, datamodule=datamodule)


@pytest.fixture(scope="module")
def dependent(tmp_path_factory):
    """A gate trained where the right objective depends on the prompt, and what it saw."""
    gate, summary = Task(depends=True).fit(
        tmp_path_factory.mktemp("dependent"), trainer=RecordingTrainer
    )
    return gate, summary, RecordingTrainer.sides


def slow_loss(scores, beta, style=None, weights=None):
    style = [0.0] * len(scores) if style is None else style
    weights = [1.0] * len(scores) if weights is None else weights
    total = sum(
        -float(w) * math.log(1.0 / (1.0 + math.exp(-beta * float(d) - float(z))))
        for d, z, w in zip(scores, style, weights, strict=True)
    )
    return total / sum(float(w) for w in weights)


@given(
    st.lists(st.floats(-20, 20), min_size=1, max_size=20),
    st.floats(0.01, 5.0),
)
def test_the_loss_is_the_mean_of_minus_log_sigmoid(differences, beta):
    loss = bradley_terry_loss(
        torch.tensor(differences, dtype=torch.float64),
        beta=torch.tensor(beta, dtype=torch.float64),
    )
    assert float(loss) == pytest.approx(slow_loss(differences, beta), rel=1e-9, abs=1e-12)


@given(
    st.lists(
        st.tuples(st.floats(-20, 20), st.floats(-5, 5), st.floats(0.1, 9)), min_size=1, max_size=20
    ),
    st.floats(0.01, 5.0),
)
def test_the_loss_adds_style_to_the_log_odds_and_weighs_the_pairs(rows, beta):
    differences, style, weights = torch.tensor(rows, dtype=torch.float64).T
    scale = torch.tensor(beta, dtype=torch.float64)
    loss = bradley_terry_loss(differences, beta=scale, style=style, weights=weights)
    expected = slow_loss(differences, beta, style, weights)
    assert float(loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    larger = bradley_terry_loss(differences, beta=scale, style=style, weights=7.0 * weights)
    assert float(larger) == pytest.approx(float(loss))
    neutral = {"style": torch.zeros_like(style), "weights": torch.full_like(weights, 3.0)}
    assert float(bradley_terry_loss(differences, beta=scale, **neutral)) == pytest.approx(
        float(bradley_terry_loss(differences, beta=scale))
    )


def test_a_pair_of_weight_two_counts_as_two_pairs():
    differences, style = draw(6), draw(6, seed=1)
    counts = torch.tensor([1, 2, 0, 3, 1, 2])
    beta = torch.tensor(1.5)
    weighted = bradley_terry_loss(differences, beta=beta, style=style, weights=counts.float())
    repeated = bradley_terry_loss(
        differences.repeat_interleave(counts), beta=beta, style=style.repeat_interleave(counts)
    )
    torch.testing.assert_close(weighted, repeated)


def test_the_loss_falls_as_the_chosen_response_gains():
    differences = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    bradley_terry_loss(differences, beta=torch.tensor(2.0)).backward()
    expected = [-2.0 / 3.0 / (1.0 + math.exp(2.0 * d)) for d in (-2.0, 0.0, 3.0)]
    assert differences.grad.tolist() == pytest.approx(expected, rel=1e-5)
    assert (differences.grad < 0).all()


def test_the_loss_is_finite_for_scores_far_apart():
    loss = bradley_terry_loss(torch.tensor([-1e6, 1e6]), beta=torch.tensor(1.0))
    assert float(loss) == pytest.approx(5e5)


def ranked_pairs(weights, *, beta, rows=4000, seed=0):
    """Differences of pairs drawn from the Bradley-Terry model."""
    differences = draw(rows, len(weights), seed=seed).double()
    probability = torch.sigmoid(beta * differences @ torch.tensor(weights).double())
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(seed + 1))
    return differences * torch.where(uniform < probability, 1.0, -1.0)[:, None]


def scipy_mix(differences):
    """Weights and beta as direction and sum of the best non-negative logistic coefficients."""
    values = differences.numpy()

    def loss(coefficients):
        margins = values @ coefficients
        gradient = -(values / (1.0 + np.exp(margins))[:, None]).mean(0)
        return np.logaddexp(0.0, -margins).mean(), gradient

    start, bounds = np.full(values.shape[1], 0.3), [(0.0, None)] * values.shape[1]
    best = minimize(loss, start, jac=True, bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-10}).x
    return best / best.sum(), best.sum()


@pytest.mark.parametrize("seed", range(3))
def test_the_constant_mix_equals_scipys_and_recovers_the_true_weights(seed):
    differences = ranked_pairs([0.5, 0.0, 0.2, 0.3], beta=3.0, seed=seed)
    mixed = (3, 0, 2)
    mix = fit_constant_mix(differences, mixed=mixed, decay=0.0)
    weights, beta = mix.weights, mix.beta
    assert mix.style.shape == (0,)
    expected, expected_beta = scipy_mix(differences[:, list(mixed)])
    np.testing.assert_allclose(weights[list(mixed)].numpy(), expected, atol=1e-5)
    assert beta == pytest.approx(expected_beta, rel=1e-4)
    assert float(weights[1]) == 0.0
    assert weights.tolist() == pytest.approx([0.5, 0.0, 0.2, 0.3], abs=0.05)
    assert beta == pytest.approx(3.0, rel=0.1)


def test_the_constant_mix_gives_an_objective_that_misleads_next_to_nothing():
    differences = ranked_pairs([0.8, -0.4, 0.2], beta=2.0)
    mix = fit_constant_mix(differences, mixed=(0, 1, 2))
    expected, expected_beta = scipy_mix(differences)
    assert expected[1] == 0.0
    np.testing.assert_allclose(mix.weights.numpy(), expected, atol=0.02)
    assert mix.beta == pytest.approx(expected_beta, rel=0.05)
    assert (mix.weights > 0).all()


def slow_mix(differences, nuisance, weights, *, decay):
    """Weights, beta and style coefficients of the penalised loss, minimised by SciPy."""
    values, measured, each = differences.numpy(), nuisance.numpy(), weights.numpy()
    count = values.shape[1]

    def loss(parameters):
        logits, log_beta, style = np.split(parameters, [count, count + 1])
        margins = np.exp(log_beta[0]) * values @ softmax(logits) + measured @ style
        penalty = ((logits - logits.mean()) ** 2).sum() + log_beta[0] ** 2 + (style**2).sum()
        return (np.logaddexp(0.0, -margins) * each).sum() / each.sum() + decay * penalty

    start = np.zeros(count + 1 + measured.shape[1])
    best = minimize(loss, start, method="BFGS", options={"gtol": 1e-9}).x
    return softmax(best[:count]), np.exp(best[count]), best[count + 1 :]


@pytest.mark.parametrize("decay", [1e-4, 0.02])
@pytest.mark.parametrize("seed", range(2))
def test_the_constant_mix_with_nuisance_and_weights_equals_scipys(seed, decay):
    differences = ranked_pairs([0.5, 0.1, 0.4, 0.6, -0.3], beta=2.0, rows=500, seed=seed)
    nuisance, differences = differences[:, 3:], differences[:, :3]
    weights = draw(500, seed=seed + 5).double().exp()
    mix = fit_constant_mix(
        differences, mixed=(0, 1, 2), nuisance=nuisance, weights=weights, decay=decay
    )
    expected, beta, style = slow_mix(differences, nuisance, weights, decay=decay)
    np.testing.assert_allclose(mix.weights.numpy(), expected, atol=1e-4)
    assert mix.beta == pytest.approx(beta, rel=1e-4)
    np.testing.assert_allclose(mix.style.numpy(), style, atol=1e-4)
    unweighted = fit_constant_mix(differences, mixed=(0, 1, 2), nuisance=nuisance, decay=decay)
    assert (unweighted.weights - mix.weights).abs().max() > 0.01


@given(st.integers(0, 99), st.integers(0, 3))
def test_one_objective_with_nuisance_is_scikit_learns_weighted_logistic_regression(seed, columns):
    differences = ranked_pairs([1.0, 0.6, -0.3, 0.1][: columns + 1], beta=1.5, rows=300, seed=seed)
    weights = draw(300, seed=seed + 5).double().exp()
    mix = fit_constant_mix(
        differences[:, :1],
        mixed=(0,),
        nuisance=differences[:, 1:],
        weights=weights,
        decay=0.0,
    )
    x = torch.cat([differences, -differences]).numpy()
    model = LogisticRegression(fit_intercept=False, C=1e10, tol=1e-10, max_iter=1000)
    model.fit(x, [1] * 300 + [0] * 300, sample_weight=[*weights.tolist(), *weights.tolist()])
    assert mix.weights.tolist() == [1.0]
    found = [mix.beta, *mix.style.tolist()]
    assert found == pytest.approx(model.coef_[0].tolist(), rel=1e-3, abs=1e-3)


def test_pairs_of_no_weight_do_not_count():
    differences, other = ranked_pairs([0.8, 0.2], beta=2.0), ranked_pairs([0.1, 0.9], beta=2.0)
    both = torch.cat([differences, other])
    weights = torch.cat([torch.ones(4000), torch.zeros(4000)])
    mix, alone = (
        fit_constant_mix(both, mixed=(0, 1), weights=weights),
        fit_constant_mix(differences, mixed=(0, 1)),
    )
    torch.testing.assert_close(mix.weights, alone.weights, atol=1e-5, rtol=0)
    assert mix.beta == pytest.approx(alone.beta, rel=1e-4)
    ignored = fit_constant_mix(both, mixed=(0, 1))
    assert (ignored.weights - alone.weights).abs().max() > 0.1


class Judged:
    """Pairs of judges who pay for two qualities and for length itself.

    The third objective follows length and has no quality of its own.
    """

    names, true = ("helpfulness", "honesty", "follower"), (0.7, 0.3, 0.0)

    def __init__(self, *, pay=1.5, rows=12000, seed=0):
        self.length = 2.0 * draw(rows, 1, seed=seed).double()
        qualities = draw(rows, 2, seed=seed + 1).double()
        follower = 0.8 * self.length / 2.0 + 0.6 * draw(rows, 1, seed=seed + 2).double()
        self.rewards = torch.cat([qualities, follower], dim=1)
        logits = 2.0 * self.rewards @ torch.tensor(self.true).double()
        logits = logits + pay * self.length[:, 0] / 2.0
        uniform = torch.rand(rows, generator=torch.Generator().manual_seed(seed + 3))
        order = torch.where(uniform < torch.sigmoid(logits), 1.0, -1.0)[:, None].double()
        self.differences, self.nuisance = order * self.rewards, order * self.length
        self.groups = torch.arange(rows) // 2
        self.prompts = draw(rows // 2, 4, seed=seed + 4)[self.groups]

    def follows(self, weights):
        """Rank correlation of the score with length, in whatever order."""
        score = (self.rewards * weights).sum(1)
        return float(spearmanr(score, self.length[:, 0])[0])

    def fit(self, folder, **changes):
        arguments = {
            "groups": self.groups,
            "objectives": self.names,
            "mixed": (0, 1, 2),
            "trainer": functools.partial(RecordingTrainer, max_epochs=2, accelerator="cpu"),
            "progress": False,
            "hidden_dim": 8,
            "batch_size": 256,
        }
        return fit_gating(self.prompts, self.differences, folder=folder, **(arguments | changes))


def test_with_nuisance_the_constant_mix_finds_the_quality_that_judges_pay_for_and_without_not():
    judged = Judged()
    without = fit_constant_mix(judged.differences, mixed=(0, 1, 2))
    mix = fit_constant_mix(judged.differences, mixed=(0, 1, 2), nuisance=judged.nuisance)
    assert mix.weights.tolist() == pytest.approx(judged.true, abs=0.05)
    assert mix.beta == pytest.approx(2.0, rel=0.1)
    assert mix.style.tolist() == pytest.approx([0.75], rel=0.1)
    assert float(without.weights[2]) > 0.2
    assert abs(judged.follows(mix.weights)) < 0.1
    assert judged.follows(without.weights) > 0.3


def test_where_judges_pay_nothing_for_length_nuisance_changes_nothing():
    judged = Judged(pay=0.0)
    without = fit_constant_mix(judged.differences, mixed=(0, 1, 2))
    mix = fit_constant_mix(judged.differences, mixed=(0, 1, 2), nuisance=judged.nuisance)
    torch.testing.assert_close(mix.weights, without.weights, atol=0.03, rtol=0)
    assert mix.style.tolist() == pytest.approx([0.0], abs=0.05)


def test_reweighted_pairs_give_less_to_what_follows_length():
    judged = Judged()
    weights = style_weights(judged.nuisance)
    without = fit_constant_mix(judged.differences, mixed=(0, 1, 2))
    mix = fit_constant_mix(judged.differences, mixed=(0, 1, 2), weights=weights)
    assert float(mix.weights[2]) < 0.5 * float(without.weights[2])
    assert judged.follows(mix.weights) < 0.5 * judged.follows(without.weights)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Gates trained plainly, with nuisance and reweighted, and the pairs the trainer saw."""
    pairs = Judged()
    weights = style_weights(pairs.nuisance)
    gates = {}
    for name, how in {
        "plain": {},
        "nuisance": {"nuisance": pairs.nuisance, "nuisance_names": ("log_length",)},
        "reweight": {"weights": weights},
    }.items():
        gate, summary = pairs.fit(tmp_path_factory.mktemp(name), **how)
        gates[name] = gate, summary, RecordingTrainer.sides
    return pairs, weights, gates


def test_with_nuisance_the_gate_finds_the_quality_and_its_score_follows_length_less(judged):
    pairs, _, gates = judged
    follows = {}
    for name, (gate, _, _) in gates.items():
        weights = gate(pairs.prompts).detach().double()
        follows[name] = pairs.follows(weights)
        if name == "nuisance":
            assert weights.mean(0).tolist() == pytest.approx(pairs.true, abs=0.05)
    assert follows["plain"] > 0.3
    assert abs(follows["nuisance"]) < 0.1
    assert follows["reweight"] < 0.5 * follows["plain"]


def test_style_is_in_the_loss_of_the_gate_but_not_in_its_scores(judged):
    _, _, gates = judged
    gate, summary, (_, held_out) = gates["nuisance"]
    prompts, differences, nuisance, weights = held_out
    with torch.no_grad():
        scores = (gate(prompts) * differences).sum(1)
    assert list(summary.style) == ["log_length"]
    style = summary.style["log_length"] * nuisance[:, 0]
    assert summary.loss == pytest.approx(slow_loss(scores, summary.beta, style, weights), rel=1e-4)
    assert summary.loss < slow_loss(scores, summary.beta) - 0.01
    assert summary.accuracy == pytest.approx(float((scores > 0).double().mean()))
    with_style = float((summary.beta * scores + style > 0).double().mean())
    assert summary.accuracy < with_style - 0.02


def test_the_scores_of_the_trainer_do_not_look_at_its_style():
    gate = GatingNetwork(dim=4, objectives=3, mixed=MIXED).eval()
    prompts, differences = draw(6, 4), draw(6, 3, seed=1)
    trainers = [
        GatingTrainer(gate, beta=1.0, style=torch.full((2,), coefficient))
        for coefficient in (0.0, 5.0)
    ]
    assert torch.equal(*(trainer(prompts, differences) for trainer in trainers))
    nuisance, weights = draw(6, 2, seed=2), draw(6, seed=3).exp()
    for trainer, coefficient in zip(trainers, (0.0, 5.0), strict=True):
        with torch.no_grad():
            loss, scores = trainer.loss(prompts, differences, nuisance, weights)
        assert torch.equal(scores, trainers[0](prompts, differences).detach())
        style = coefficient * nuisance.sum(1)
        expected = slow_loss(scores, 1.0, style, weights)
        assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_the_trainer_starts_at_the_constant_mix_of_the_weighted_training_pairs(judged):
    _, _, gates = judged
    for name in ("nuisance", "reweight"):
        _, summary, (train, held_out) = gates[name]
        _, differences, nuisance, weights = (part.double() for part in train)
        mix = fit_constant_mix(differences, mixed=(0, 1, 2), nuisance=nuisance, weights=weights)
        shown = list(summary.constant_weights.values())
        assert shown == pytest.approx(mix.weights.tolist(), abs=1e-3)
        _, differences, nuisance, weights = (part.double() for part in held_out)
        expected = slow_loss(differences @ mix.weights, mix.beta, nuisance @ mix.style, weights)
        assert summary.constant_loss == pytest.approx(expected, rel=1e-3)


def test_nuisance_is_in_units_of_its_spread_on_the_training_side(judged):
    pairs, _, gates = judged
    train, held_out = (side[2] for side in gates["nuisance"][2])
    assert float(train.square().mean().sqrt()) == pytest.approx(1.0, rel=1e-5)
    both = torch.cat([train, held_out])[:, 0].sort().values.double()
    ratio = both / pairs.nuisance[:, 0].sort().values
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=1e-4)
    assert gates["plain"][2][0][2].shape[1] == 0
    assert gates["plain"][1].style == {}


def test_every_pair_keeps_its_weight_on_its_side(judged):
    pairs, weights, gates = judged
    expected = dict(zip(pairs.differences[:, 0].float().tolist(), weights.tolist(), strict=True))
    for side in gates["reweight"][2]:
        found = dict(zip(side[1][:, 0].tolist(), side[3].tolist(), strict=True))
        assert found == pytest.approx({key: expected[key] for key in found})
    assert {float(w) for side in gates["plain"][2] for w in side[3]} == {1.0}


def test_a_nuisance_that_is_always_zero_does_no_harm(tmp_path):
    task = Task(depends=False, prompts=100)
    nuisance = torch.stack([torch.zeros(200), draw(200, seed=9)], dim=1).double()
    how = {"nuisance": nuisance, "nuisance_names": ("tables", "bold"), "epochs": 1}
    gate, summary = task.fit(tmp_path, **how)
    assert summary.style["tables"] == 0.0
    assert gate(task.prompts).isfinite().all()


def test_nuisance_may_be_in_any_units(tmp_path):
    judged = Judged(rows=2000)
    states = []
    for k, unit in enumerate((1.0, 1024.0)):
        how = {"nuisance": unit * judged.nuisance, "nuisance_names": ("log_length",)}
        gate, summary = judged.fit(tmp_path / str(k), **how)
        states.append((gate.state_dict(), summary))
    assert states[0][1] == states[1][1]
    for name, tensor in states[0][0].items():
        assert torch.equal(states[1][0][name], tensor)


def test_the_constant_mix_stays_finite_where_the_pairs_can_be_separated():
    differences = draw(50, 3).double().abs()
    mix = fit_constant_mix(differences, mixed=(0, 1), nuisance=differences[:, 2:])
    assert mix.weights.isfinite().all()
    assert float(mix.weights.sum()) == pytest.approx(1.0)
    assert math.isfinite(mix.beta)
    assert mix.style.isfinite().all()


def test_both_responses_of_a_pair_share_the_weights_of_its_prompt():
    torch.manual_seed(0)
    gate = GatingNetwork(dim=4, objectives=3, mixed=MIXED, hidden_dim=8).eval()
    torch.nn.init.normal_(gate.output.weight)
    prompts, chosen, rejected = draw(6, 4), draw(6, 3, seed=1), draw(6, 3, seed=2)
    scores = GatingTrainer(gate, beta=1.0, style=torch.zeros(0))(prompts, chosen - rejected)
    for i in range(6):
        weights = gate(prompts[i])
        torch.testing.assert_close(scores[i], weights @ chosen[i] - weights @ rejected[i])


def test_weight_decay_spares_the_constant_mix_beta_and_style():
    gate = GatingNetwork(dim=4, objectives=3, mixed=MIXED)
    torch.nn.init.normal_(gate.output.weight)
    torch.nn.init.normal_(gate.constant)
    module = GatingTrainer(gate, beta=3.0, style=torch.ones(2), learning_rate=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    module.configure_optimizers().step()
    for name, parameter in module.named_parameters():
        kept = 1.0 if name in ("gate.constant", "log_beta", "style") else 1.0 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), kept * before[name])


def test_the_gate_finds_the_objective_that_depends_on_the_prompt(dependent):
    gate, summary, _ = dependent
    fresh = Task(depends=True, seed=100, prompts=2000)
    accuracy = fresh.accuracy(gate(fresh.prompts).detach())
    constant = fresh.accuracy(torch.tensor([summary.constant_weights[name] for name in NAMES]))
    assert accuracy > constant + 0.10
    assert accuracy > fresh.accuracy(fresh.oracle) - 0.03
    assert summary.accuracy > summary.constant_accuracy + 0.10
    assert summary.epochs > 0


def test_where_nothing_depends_on_the_prompt_the_gate_is_not_worse_than_the_constant_mix(tmp_path):
    gate, summary = Task(depends=False).fit(tmp_path)
    assert summary.loss <= summary.constant_loss
    fresh = Task(depends=False, seed=100, prompts=2000)
    constant = torch.tensor([summary.constant_weights[name] for name in NAMES])
    assert fresh.accuracy(gate(fresh.prompts).detach()) > fresh.accuracy(constant) - 0.02


def test_a_training_that_never_beats_the_constant_mix_returns_it(tmp_path):
    task = Task(depends=False)
    gate, summary = task.fit(tmp_path, epochs=3, learning_rate=10.0, trainer=RecordingTrainer)
    mix = fit_constant_mix(RecordingTrainer.sides[0][1].double(), mixed=MIXED)
    assert summary.epochs == 0
    assert summary.loss == summary.constant_loss
    assert summary.beta == pytest.approx(mix.beta, rel=1e-4)
    torch.testing.assert_close(
        gate(task.prompts).detach(),
        mix.weights.float().expand(len(task.prompts), -1),
        atol=1e-4,
        rtol=0,
    )


def test_the_summary_tells_what_was_measured_on_the_held_out_prompts(dependent):
    gate, summary, (train, held_out) = dependent
    prompts, differences, _, _ = held_out
    mix = fit_constant_mix(train[1].double(), mixed=MIXED)
    constant, beta = mix.weights, mix.beta
    assert (summary.pairs, summary.held_out_pairs) == (len(train[0]), len(prompts))
    assert list(summary.constant_weights) == list(NAMES)
    assert list(summary.constant_weights.values()) == pytest.approx(constant.tolist(), abs=1e-4)
    with torch.no_grad():
        learned, fixed = (gate(prompts) * differences).sum(1), differences.double() @ constant
    assert summary.loss == pytest.approx(slow_loss(learned, summary.beta), rel=1e-4)
    assert summary.constant_loss == pytest.approx(slow_loss(fixed, beta), rel=1e-4)
    assert summary.accuracy == pytest.approx(float((learned > 0).double().mean()))
    assert summary.constant_accuracy == pytest.approx(float((fixed > 0).double().mean()), abs=0.01)


def test_held_out_prompts_are_never_trained_on_and_no_group_is_split(tmp_path):
    task = Task(depends=True, prompts=200)
    task.groups = 7 * (torch.randperm(400, generator=torch.Generator().manual_seed(0)) % 90)
    task.prompts = torch.stack([task.groups, -task.groups, task.groups, task.groups], 1).float()
    _, summary = task.fit(tmp_path, epochs=1, trainer=RecordingTrainer)
    train, held_out = ({int(p[0]) for p in side[0]} for side in RecordingTrainer.sides)
    assert not train & held_out
    assert train | held_out == set(task.groups.tolist())
    assert summary.pairs + summary.held_out_pairs == 400
    assert summary.held_out_pairs == pytest.approx(80, abs=5)


def test_even_the_prompt_with_most_pairs_is_trained_on_under_some_seed(tmp_path):
    task = Task(depends=False, prompts=50)
    task.groups[:10] = 0
    task.prompts[:10] = 99.0
    trained = []
    for seed in range(6):
        task.fit(tmp_path / str(seed), epochs=1, seed=seed, trainer=RecordingTrainer)
        trained.append(bool((RecordingTrainer.sides[0][0] == 99.0).any()))
    assert any(trained)


def test_the_same_seed_gives_the_same_weights_bit_for_bit(tmp_path):
    task = Task(depends=True, prompts=100)
    states = [
        task.fit(tmp_path / str(run), epochs=3, seed=seed)[0].state_dict()
        for run, seed in enumerate([1, 1, 2])
    ]
    equal = [
        all(torch.equal(tensor, other[name]) for name, tensor in states[0].items())
        for other in states[1:]
    ]
    assert equal == [True, False]


def test_training_leaves_its_inputs_alone_and_no_checkpoint_behind(tmp_path):
    task = Task(depends=True, prompts=100)
    before = task.prompts.clone(), task.differences.clone()
    gate, _ = task.fit(tmp_path, epochs=3)
    assert torch.equal(task.prompts, before[0])
    assert torch.equal(task.differences, before[1])
    assert not list(tmp_path.rglob("*.ckpt"))
    assert list(tmp_path.rglob("metrics.csv")), "the log stays"
    assert not gate.training


def test_save_then_load_is_the_identity(dependent, tmp_path):
    gate, summary, _ = dependent
    save_gating(tmp_path, "decorrelated", gate, summary)
    loaded, loaded_summary = load_gating(tmp_path, "decorrelated")
    assert loaded_summary == summary
    assert loaded.shape == gate.shape
    assert not loaded.training
    for name, tensor in gate.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_missing_tensor_stops_the_loading(dependent, tmp_path):
    save_gating(tmp_path, "gate", *dependent[:2])
    tensors = read_tensors(tmp_path / "gate.safetensors")
    del tensors["constant"]
    write_tensors(tmp_path / "gate.safetensors", tensors)
    with pytest.raises(RuntimeError, match=r"Missing key.*constant"):
        load_gating(tmp_path, "gate")


def test_too_few_prompts_to_hold_some_out_are_counted(tmp_path):
    task = Task(depends=False, prompts=1)
    with pytest.raises(ValueError, match="at least two distinct prompts, got 1"):
        task.fit(tmp_path)


@pytest.mark.usefixtures("no_type_checks")
def test_an_unknown_log_is_named(tmp_path):
    with pytest.raises(ValueError, match="`log` must be csv or tensorboard, got 'wandb'"):
        Task(depends=False, prompts=20).fit(tmp_path, log="wandb")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")),
    reason="tensorboard is installed",
)
def test_tensorboard_without_its_package_says_what_to_install(tmp_path):
    with pytest.raises(ModuleNotFoundError, match="tensorboard"):
        Task(depends=False, prompts=20).fit(tmp_path, log="tensorboard")
