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

from armo.artifacts import read_tensors, write_tensors
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


def slow_loss(scores, beta):
    return float(np.mean([-math.log(1.0 / (1.0 + math.exp(-beta * float(s)))) for s in scores]))


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
    weights, beta = fit_constant_mix(differences, mixed=mixed, decay=0.0)
    expected, expected_beta = scipy_mix(differences[:, list(mixed)])
    np.testing.assert_allclose(weights[list(mixed)].numpy(), expected, atol=1e-5)
    assert beta == pytest.approx(expected_beta, rel=1e-4)
    assert float(weights[1]) == 0.0
    assert weights.tolist() == pytest.approx([0.5, 0.0, 0.2, 0.3], abs=0.05)
    assert beta == pytest.approx(3.0, rel=0.1)


def test_the_constant_mix_gives_an_objective_that_misleads_next_to_nothing():
    differences = ranked_pairs([0.8, -0.4, 0.2], beta=2.0)
    weights, beta = fit_constant_mix(differences, mixed=(0, 1, 2))
    expected, expected_beta = scipy_mix(differences)
    assert expected[1] == 0.0
    np.testing.assert_allclose(weights.numpy(), expected, atol=0.02)
    assert beta == pytest.approx(expected_beta, rel=0.05)
    assert (weights > 0).all()


def test_the_constant_mix_stays_finite_where_the_pairs_can_be_separated():
    differences = draw(50, 3).double().abs()
    weights, beta = fit_constant_mix(differences, mixed=(0, 1))
    assert weights.isfinite().all()
    assert float(weights.sum()) == pytest.approx(1.0)
    assert math.isfinite(beta)


def test_both_responses_of_a_pair_share_the_weights_of_its_prompt():
    torch.manual_seed(0)
    gate = GatingNetwork(dim=4, objectives=3, mixed=MIXED, hidden_dim=8).eval()
    torch.nn.init.normal_(gate.output.weight)
    prompts, chosen, rejected = draw(6, 4), draw(6, 3, seed=1), draw(6, 3, seed=2)
    scores = GatingTrainer(gate, beta=1.0)(prompts, chosen - rejected)
    for i in range(6):
        weights = gate(prompts[i])
        torch.testing.assert_close(scores[i], weights @ chosen[i] - weights @ rejected[i])


def test_weight_decay_spares_the_constant_mix_and_beta():
    gate = GatingNetwork(dim=4, objectives=3, mixed=MIXED)
    torch.nn.init.normal_(gate.output.weight)
    torch.nn.init.normal_(gate.constant)
    module = GatingTrainer(gate, beta=3.0, learning_rate=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    module.configure_optimizers().step()
    for name, parameter in module.named_parameters():
        kept = 1.0 if name in ("gate.constant", "log_beta") else 1.0 - 0.1 * 0.5
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
    weights, beta = fit_constant_mix(RecordingTrainer.sides[0][1].double(), mixed=MIXED)
    assert summary.epochs == 0
    assert summary.loss == summary.constant_loss
    assert summary.beta == pytest.approx(beta, rel=1e-4)
    torch.testing.assert_close(
        gate(task.prompts).detach(),
        weights.float().expand(len(task.prompts), -1),
        atol=1e-4,
        rtol=0,
    )


def test_the_summary_tells_what_was_measured_on_the_held_out_prompts(dependent):
    gate, summary, (train, held_out) = dependent
    prompts, differences = held_out
    constant, beta = fit_constant_mix(train[1].double(), mixed=MIXED)
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
