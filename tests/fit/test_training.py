"""Training the gate, on synthetic preferences whose right weights are known."""

import copy
import functools
import json
import math
import signal
import warnings
from dataclasses import asdict, replace

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from scipy.optimize import minimize_scalar
from scipy.stats import spearmanr

from armo.artifacts import read_json, read_tensors, write_tensors
from armo.fit.constant import fit_constant_mix
from armo.fit.decorrelation import style_weights
from armo.fit.gating import GatingNetwork
from armo.fit.heads import deal_folds
from armo.fit.preferences import Preferences, style_correlations
from armo.fit.training import (
    Gain,
    GatingSummary,
    GatingTrainer,
    PreferenceDataModule,
    fit_gating,
    load_gating,
    save_gating,
)
from armo.report.calibration import calibration_error

NAMES, MIXED = ("helpfulness", "verbosity", "safety"), (0, 2)
NAN = math.nan


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


class Task:
    """Pairs, two per prompt, ranked by weights that depend on the prompt, or by one mix."""

    def __init__(self, *, depends, prompts=600, noise=0.2, seed=0):
        self.groups = torch.arange(2 * prompts) // 2
        self.prompts = draw(prompts, 4, seed=seed)[self.groups] + 3.0
        self.differences = draw(2 * prompts, 3, seed=seed + 1).double()
        first = (
            torch.sigmoid(4.0 * (self.prompts[:, 0].double() - 3.0))
            if depends
            else torch.full_like(self.groups, 0.7, dtype=torch.float64)
        )
        self.oracle = torch.stack([first, torch.zeros_like(first), 1.0 - first], dim=1)
        preferred = (self.oracle * self.differences).sum(1)
        preferred = preferred + noise * draw(2 * prompts, seed=seed + 2)
        self.differences *= preferred.sign()[:, None]

    def accuracy(self, weights):
        return float(((weights * self.differences).sum(1) > 0).double().mean())

    def preferences(self, **values):
        return Preferences.of_pairs(self.prompts, self.differences, self.groups, **values)


class RecordingTrainer(lightning.Trainer):
    """Trains, and remembers what it was given and what came of it."""

    def fit(self, model, *, datamodule, ckpt_path=None):
        RecordingTrainer.module, RecordingTrainer.data = model, datamodule.preferences
        RecordingTrainer.resumed = ckpt_path is not None
        super().fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        RecordingTrainer.last = copy.deepcopy(model.gate)
        RecordingTrainer.epochs = self.current_epoch


def fit(preferences, folder, *, epochs=3, trainer=RecordingTrainer, names=NAMES, **changes):
    arguments = {
        "objectives": names,
        "mixed": MIXED,
        "trainer": functools.partial(trainer, max_epochs=epochs, accelerator="cpu"),
        "progress": False,
        "keep": "gate",
        "folds": 3,
        "hidden_dim": 8,
        "hidden_layers": 1,
        "dropout": 0.1,
        "temperature": 1.0,
        "learning_rate": 0.02,
        "weight_decay": 0.01,
        "batch_size": 64,
        "margins": "scale",
        "label_smoothing": 0.0,
        "entropy": 0.0,
        "style_penalty": 0.0,
        "patience": 50,
        "seed": 0,
    }
    return fit_gating(preferences, folder=folder, **(arguments | changes))


def tensors_equal(one, other):
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def lists(count=60, *, longest=4, features=1, seed=0, dim=4):
    """Lists of two and more responses with ties, two per prompt, with everything they can carry."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=generator)
    lengths[0] = longest
    there = torch.arange(longest) < lengths[:, None]
    responses = torch.arange(count * longest).reshape(count, longest)
    ranks = torch.randint(0, 3, there.shape, generator=generator).double()
    return Preferences(
        prompts=draw(count // 2, dim, seed=seed),
        adjusted=draw(count * longest, 3, seed=seed + 1).double(),
        style=draw(count * longest, features, seed=seed + 2).double(),
        prompt_of=torch.arange(count) // 2,
        responses=responses.masked_fill(~there, -1),
        ranks=ranks.masked_fill(~there, NAN),
        groups=torch.arange(count) // 2,
        weights=draw(count, seed=seed + 3).double().exp(),
        balance=draw(count, seed=seed + 6).double().exp(),
        strengths=draw(count, seed=seed + 4).double().exp(),
        margins=torch.zeros(count, dtype=torch.float64),
        flipped=0.3 * rand(count, seed=seed + 5).double(),
        folds=torch.randint(3, (count,), generator=generator),
    )


def random_module(*, features=1, dropout=0.0, seed=0, **changes):
    """A trainer of three members with random tensors everywhere."""
    torch.manual_seed(seed)
    gate = GatingNetwork(dim=4, objectives=3, mixed=MIXED, members=3, hidden_dim=5, dropout=dropout)
    torch.nn.init.normal_(gate.output.weight)
    return GatingTrainer(
        gate, beta=torch.tensor([0.5, 1.0, 2.0]), style=draw(3, features, seed=9), **changes
    )


def slow_loss(odds, ranks, flipped):
    """The loss of one comparison, draw by draw and response by response."""
    distinct = sorted(set(ranks))
    total = 0.0
    for rank in distinct[:-1] if len(distinct) > 1 else distinct:
        left = [k for k, r in enumerate(ranks) if r >= rank]
        tied = [k for k in left if ranks[k] == rank]
        norm = math.log(sum(math.exp(odds[k]) for k in left))
        for best in tied:
            for k in left:
                share = 1.0 - flipped if k == best else flipped / (len(left) - 1)
                total -= share / len(tied) * (odds[k] - norm)
    return total


@torch.no_grad()
def slow_losses(module, data):
    """Losses, and weights over objectives, of every member on every comparison, by hand."""
    losses = torch.zeros(module.gate.members, len(data))
    mixes = torch.zeros(module.gate.members, len(data), 3)
    for member in range(module.gate.members):
        beta, style = float(module.log_beta[member].exp()), module.style[member].tolist()
        for c in range(len(data)):
            prompt = data.prompts[data.prompt_of[c]].float()
            weights = module.gate.member_weights(prompt)[member]
            n = int((~data.ranks[c].isnan()).sum())
            odds = []
            for k in range(n):
                r = int(data.responses[c, k])
                score = sum(float(w * a) for w, a in zip(weights, data.adjusted[r], strict=True))
                paid = sum(s * float(z) for s, z in zip(style, data.style[r], strict=True))
                odds.append(beta * score + paid - (float(data.margins[c]) if k == 0 else 0.0))
            ranks = data.ranks[c, :n].tolist()
            losses[member, c] = slow_loss(odds, ranks, float(data.flipped[c]))
            mixes[member, c] = weights
    return losses, mixes


# ------------------------------------------------------------------------ the Lightning module


def with_margins(data):
    return replace(data, margins=draw(len(data), seed=77).double())


def test_the_losses_of_the_trainer_are_the_documented_ones_for_each_member():
    data, module = with_margins(lists(20)), random_module().eval()
    batch = data.single()[torch.arange(20)]
    expected, _ = slow_losses(module, data)
    found = module.losses(batch, module(batch.prompts, batch.adjusted))
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entropy", [0.0, 0.3])
@pytest.mark.parametrize("style_penalty", [0.0, 0.7])
def test_a_training_step_is_the_mean_over_comparisons_of_other_folds(entropy, style_penalty):
    data = with_margins(lists(20, features=2))
    module = random_module(features=2, entropy=entropy, style_penalty=style_penalty).eval()
    batch = data.single()[torch.arange(20)]
    losses, mixes = slow_losses(module, data)
    expected = 0.0
    for member in range(3):
        for c in range(20):
            if int(data.folds[c]) == member:
                continue
            nats = -sum(float(w) * math.log(float(w)) for w in mixes[member, c] if w > 0)
            weighted = float(data.weights[c]) * (float(losses[member, c]) - entropy * nats)
            expected += weighted / 20
        others = (data.folds != member).float() * batch.weights
        scores = torch.einsum("bk,bnk->bn", mixes[member], batch.adjusted)
        correlations = style_correlations(scores, batch.style, batch.ranks, weights=others)
        expected += style_penalty * float(correlations.square().sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Nothing is logged without a Lightning trainer.
        found = module.training_step(batch, 0)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def quiet_step(module, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module.training_step(batch, 0)


def test_the_gradient_of_a_member_comes_from_the_folds_of_others_only():
    data = lists(30).single()
    for fold in range(3):
        module = random_module(nuisance=True, entropy=0.1, style_penalty=0.1)
        quiet_step(module, data[(data.folds == fold).nonzero()[:, 0]]).backward()
        learned = {n: p for n, p in module.named_parameters() if p.requires_grad}
        assert {"log_beta", "style", "gate.output.bias", "gate.hidden.0.weight"} <= set(learned)
        for name, parameter in learned.items():
            reached = [bool(parameter.grad[member].abs().max() > 0) for member in range(3)]
            assert reached == [member != fold for member in range(3)], name


def test_steps_on_parts_of_the_comparisons_add_up_to_the_step_on_all():
    data, module = lists(30).single(), random_module()
    whole = quiet_step(module, data[torch.arange(30)])
    parts = [len(rows) * quiet_step(module, data[rows]) for rows in torch.arange(30).split(7)]
    torch.testing.assert_close(sum(parts) / 30, whole)
    counts = torch.arange(30) % 3
    weighted = replace(data, weights=counts.float())
    repeated = replace(data, weights=torch.ones(30))
    one = 30 * quiet_step(module, weighted[torch.arange(30)])
    rows = torch.arange(30).repeat_interleave(counts)
    torch.testing.assert_close(len(rows) * quiet_step(module, repeated[rows]), one)


def test_all_responses_to_a_prompt_share_its_weights():
    data, module = lists(10).single(), random_module().eval()
    batch = data[torch.arange(10)]
    scores = module(batch.prompts, batch.adjusted)
    for b in range(10):
        weights = module.gate.member_weights(batch.prompts[b])
        for n in range(batch.adjusted.shape[1]):
            torch.testing.assert_close(scores[:, b, n], weights @ batch.adjusted[b, n])


def test_the_scores_of_the_trainer_do_not_look_at_its_style():
    data = lists(10).single()
    module, other = random_module().eval(), random_module().eval()
    with torch.no_grad():
        other.style.copy_(5.0 + other.style)
    one, two = module.out_of_fold(data), other.out_of_fold(data)
    assert torch.equal(one.scores, two.scores)
    assert torch.equal(one.right.isnan(), two.right.isnan())
    assert torch.equal(one.right.nan_to_num(), two.right.nan_to_num())
    assert not torch.equal(one.losses, two.losses)


def test_out_of_fold_each_comparison_is_judged_by_the_member_of_its_fold():
    data, module = with_margins(lists(20)), random_module(dropout=0.5)
    found = module.train().out_of_fold(data.single())
    assert module.training, "the mode is left as it was"
    module.eval()
    losses, mixes = slow_losses(module, data)
    for c in range(20):
        member, n = int(data.folds[c]), int((~data.ranks[c].isnan()).sum())
        assert float(found.losses[c]) == pytest.approx(float(losses[member, c]), rel=1e-4)
        adjusted = data.adjusted[data.responses[c, :n]].float()
        torch.testing.assert_close(found.scores[c, :n], adjusted @ mixes[member, c])


def test_weight_decay_spares_the_constant_logits_beta_and_style():
    module = random_module(nuisance=True, learning_rate=0.1, weight_decay=0.5)
    torch.nn.init.normal_(module.gate.output.bias)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    module.configure_optimizers().step()
    for name, parameter in module.named_parameters():
        spared = name in ("gate.output.bias", "log_beta", "style") or name.startswith("best")
        kept = 1.0 if spared else 1.0 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), kept * before[name], msg=name)


def test_without_nuisance_style_is_not_learned():
    data, module = lists(30).single(), random_module(nuisance=False)
    quiet_step(module, data[torch.arange(30)]).backward()
    assert module.style.grad is None
    assert module.log_beta.grad is not None


def test_module_and_data_module_work_with_a_plain_lightning_trainer(tmp_path):
    task = Task(depends=True, prompts=150)
    folds = task.groups % 3
    data = replace(task.preferences(), folds=folds).single()
    gate = GatingNetwork(dim=4, objectives=3, mixed=MIXED, members=3, hidden_dim=8, dropout=0.0)
    gate.start_from(weights=torch.full((3, 3), 0.5), prompts=task.prompts)
    module = GatingTrainer(gate, beta=torch.ones(3), style=torch.zeros(3, 0), learning_rate=0.05)
    trainer = lightning.Trainer(
        max_epochs=6,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    before = module.out_of_fold(data)
    trainer.fit(module, datamodule=PreferenceDataModule(data, batch_size=32, seed=0))
    module.use_best()
    after = module.out_of_fold(data)
    assert after.losses.mean() < before.losses.mean() - 0.1
    assert after.right.mean() > before.right.mean() + 0.05
    assert "val_loss" in trainer.callback_metrics
    assert "train_loss" in trainer.callback_metrics


# ----------------------------------------------------------------------- what the gate learns


@pytest.fixture(scope="module")
def dependent(tmp_path_factory):
    """A gate trained where the right weights depend on the prompt, and the run that made it."""
    task = Task(depends=True, prompts=1000)
    gate, summary = fit(
        task.preferences(), tmp_path_factory.mktemp("dependent"), epochs=25, keep="auto"
    )
    return gate, summary, RecordingTrainer.data, RecordingTrainer.module


@pytest.fixture(scope="module")
def independent(tmp_path_factory):
    """The same where one mix is right for all prompts."""
    task = Task(depends=False)
    gate, summary = fit(task.preferences(), tmp_path_factory.mktemp("independent"), patience=4)
    return gate, summary


def test_the_gate_finds_the_weights_that_depend_on_the_prompt(dependent):
    gate, summary, _, _ = dependent
    fresh = Task(depends=True, seed=100, prompts=4000)
    weights = gate(fresh.prompts).detach()
    accuracy = fresh.accuracy(weights)
    constant = fresh.accuracy(torch.tensor([summary.constant_weights[name] for name in NAMES]))
    assert accuracy > constant + 0.05
    assert accuracy > fresh.accuracy(fresh.oracle) - 0.01
    assert (weights[:, 1] == 0).all(), "a bias objective stays out"
    assert float((weights - fresh.oracle).abs().mean()) < 0.1
    assert summary.kept == "gate"
    assert summary.better
    assert "beats the best constant mix" in summary.verdict
    assert min(summary.epochs) > 0
    assert summary.diagnostics.prompt_share > 0.1
    assert summary.diagnostics.warnings == []
    # What is said of held-out prompts holds on new ones.
    assert summary.accuracy == pytest.approx(accuracy, abs=0.03)
    assert summary.constant_accuracy == pytest.approx(constant, abs=0.03)


def test_where_nothing_depends_on_the_prompt_the_gate_stays_constant_within_noise(independent):
    gate, summary = independent
    assert not summary.better
    assert summary.kept == "gate"
    assert "NOT shown" in summary.verdict
    assert "it is kept all the same" in summary.verdict
    assert summary.diagnostics.prompt_share < 0.02
    assert max(summary.diagnostics.spread.values()) < 0.05
    fresh = Task(depends=False, seed=100, prompts=2000)
    constant = torch.tensor([summary.constant_weights[name] for name in NAMES])
    assert fresh.accuracy(gate(fresh.prompts).detach()) > fresh.accuracy(constant) - 0.01
    assert list(summary.constant_weights.values()) == pytest.approx([0.7, 0.0, 0.3], abs=0.05)


def test_lists_teach_the_gate_as_pairs_do(tmp_path):
    """One best of up to four, ranked by weights that depend on the prompt."""
    count, longest = 600, 4
    bare = lists(count, longest=longest, features=0)
    prompts = bare.prompts[bare.prompt_of]
    first = torch.sigmoid(4.0 * prompts[:, 0].double())
    oracle = torch.stack([first, torch.zeros_like(first), 1.0 - first], dim=1)
    scores = torch.einsum("bk,bnk->bn", oracle, bare.adjusted[bare.responses.clamp(min=0)])
    there = bare.responses >= 0
    best = scores.masked_fill(~there, -torch.inf).argmax(1)
    ranks = torch.ones(count, longest, dtype=torch.float64).masked_fill(~there, NAN)
    ranks[torch.arange(count), best] = 0.0
    data = replace(bare, ranks=ranks, flipped=torch.zeros_like(bare.flipped))
    gate, summary = fit(data, tmp_path, epochs=15, margins="ignore", keep="auto")
    assert summary.kept == "gate"
    assert summary.accuracy > summary.constant_accuracy + 0.05
    weights = gate(bare.prompts).detach().double()
    assert spearmanr(weights[:, 0], torch.sigmoid(bare.prompts[:, 0]))[0] > 0.9


def test_permuting_objectives_permutes_the_weights(tmp_path):
    task = Task(depends=True, prompts=100)
    order = [2, 0, 1]
    gate, _ = fit(task.preferences(), tmp_path / "one")
    task.differences = task.differences[:, order]
    permuted, _ = fit(
        task.preferences(),
        tmp_path / "two",
        mixed=(1, 0),
        names=tuple(NAMES[k] for k in order),
    )
    expected = gate(task.prompts).detach()[:, order]
    torch.testing.assert_close(permuted(task.prompts).detach(), expected, atol=1e-3, rtol=0)


def test_entropy_evens_out_the_weights_and_the_penalty_lowers_the_correlation(tmp_path):
    task = Judged(rows=600)
    found = {}
    for name, how in {
        "plain": {},
        "entropy": {"entropy": 1.0},
        "penalty": {"style_penalty": 3.0},
    }.items():
        fit(task.preferences(), tmp_path / name, epochs=6, mixed=(0, 1, 2), names=task.names, **how)
        # The best epoch is the one of the lowest loss: the last one tells more of the terms.
        weights = RecordingTrainer.last.eval()(task.prompts).detach().double()
        entropy = float(torch.special.entr(weights).sum(1).mean())
        found[name] = entropy, abs(task.follows(weights))
    assert found["entropy"][0] > found["plain"][0] + 0.05
    assert found["penalty"][1] < found["plain"][1] - 0.1


# --------------------------------------------------------------------------- folds and epochs


def test_no_group_is_split_and_folds_are_those_of_the_seed(tmp_path):
    task = Task(depends=True, prompts=200)
    task.groups = 7 * (torch.randperm(400, generator=torch.Generator().manual_seed(0)) % 90)
    fit(task.preferences(), tmp_path, epochs=1, seed=3)
    folds = RecordingTrainer.data.folds
    by_group = {}
    for group, fold in zip(task.groups.tolist(), folds.tolist(), strict=True):
        by_group.setdefault(group, set()).add(fold)
    assert {len(found) for found in by_group.values()} == {1}
    assert torch.bincount(folds).tolist() == pytest.approx([400 / 3] * 3, abs=5)
    expected = deal_folds(task.groups // 7, folds=3, group_count=90, seed=3)
    assert torch.equal(folds, expected[task.groups // 7])


def test_members_never_train_on_their_own_fold(tmp_path):
    task = Task(depends=True, prompts=100)
    how = {"entropy": 0.1, "style_penalty": 0.5, "nuisance": True, "style_names": ("length",)}
    style = draw(200, 1, seed=9).double()
    fit(task.preferences(style=style), tmp_path / "clean", **how)
    folds, clean = RecordingTrainer.data.folds, RecordingTrainer.last
    betas = RecordingTrainer.module.log_beta.detach().clone()
    for fold in range(3):
        poisoned = task.preferences(style=style)
        adjusted = poisoned.adjusted.clone()
        adjusted[:200][folds == fold] *= -3.0
        fit(replace(poisoned, adjusted=adjusted), tmp_path / str(fold), **how)
        dirty = RecordingTrainer.last
        for one, other in zip(clean.parameters(), dirty.parameters(), strict=True):
            same = [torch.equal(one[member], other[member]) for member in range(3)]
            assert same == [member == fold for member in range(3)]
    assert betas.isfinite().all()


class EpochByEpoch(Callback):
    """The state after each epoch, and the loss of each member on its own fold, by hand."""

    def on_train_start(self, trainer, pl_module):
        self.losses, self.states = [], []
        self.note(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.note(trainer, pl_module)

    def note(self, trainer, module):
        data = trainer.datamodule.preferences
        found = module.out_of_fold(data)
        weighted = found.losses * data.weights
        self.losses.append(
            [
                float(weighted[data.folds == k].sum() / data.weights[data.folds == k].sum())
                for k in range(3)
            ]
        )
        self.states.append(
            {n: t.detach().clone() for n, t in module.state_dict().items() if "best" not in n}
        )


def add_callback(callback, trainer=RecordingTrainer):
    """A trainer with one more callback."""

    def make(*, callbacks, **given):
        return trainer(callbacks=[callback, *callbacks], **given)

    return make


def test_each_member_is_stopped_at_its_own_best_epoch_and_all_when_none_improves(tmp_path):
    task = Task(depends=True, prompts=120, noise=1.0)
    weights, style = draw(240, seed=5).double().exp(), draw(240, 1, seed=9).double()
    seen = EpochByEpoch()
    gate, summary = fit(
        task.preferences(weights=weights, style=style),
        tmp_path,
        nuisance=True,
        style_names=("length",),
        epochs=60,
        patience=3,
        learning_rate=0.05,
        trainer=add_callback(seen),
    )
    losses = np.array(seen.losses)
    best = losses.argmin(0)
    assert summary.epochs == tuple(best)
    assert len(set(summary.epochs)) > 1, "members differ in this test"
    assert len(losses) - 1 == max(best) + 3 < 60, "stopped three epochs after the last improvement"
    module = RecordingTrainer.module
    final = {n: t for n, t in module.state_dict().items() if "best" not in n}
    for member, epoch in enumerate(best):
        for name, tensor in final.items():
            if name not in ("gate.mixed", "gate.mean", "gate.scale"):
                assert torch.equal(tensor[member], seen.states[epoch][name][member]), name
    assert torch.equal(gate.output.weight, final["gate.output.weight"])
    data = RecordingTrainer.data
    shares = [float(data.weights[data.folds == k].sum()) for k in range(3)]
    assert summary.loss == pytest.approx(float(np.average(losses.min(0), weights=shares)), rel=1e-5)
    assert summary.constant_loss == pytest.approx(
        float(np.average(losses[0], weights=shares)), rel=1e-5
    )


def test_a_training_that_never_beats_the_constant_mix_returns_it(tmp_path):
    task = Task(depends=False)
    gate, summary = fit(task.preferences(), tmp_path, learning_rate=10.0)
    assert summary.epochs == (0, 0, 0)
    assert summary.loss == summary.constant_loss
    assert summary.accuracy == summary.constant_accuracy
    assert summary.loss_gain == summary.accuracy_gain == Gain(0.0, 0.0)
    data = RecordingTrainer.data
    everything = data.comparisons(torch.arange(len(data)))
    for fold in range(3):
        rows = (data.folds != fold).nonzero()[:, 0]
        mix = fit_constant_mix(data.comparisons(rows), mixed=MIXED).weights.float()
        found = gate.member_weights(task.prompts)[fold].detach()
        torch.testing.assert_close(found, mix.expand(len(found), -1), atol=1e-4, rtol=0)
    whole = fit_constant_mix(everything, mixed=MIXED)
    shown = list(summary.constant_weights.values())
    assert shown == pytest.approx(whole.weights.tolist(), abs=1e-6)


def slow_gain(differences, weights, groups):
    """Weighted mean, and its standard error with the rows of one prompt taken together."""
    kept = [k for k, d in enumerate(differences) if not math.isnan(d)]
    total = sum(weights[k] for k in kept)
    mean = sum(weights[k] * differences[k] for k in kept) / total
    sums = {}
    for k in kept:
        sums[groups[k]] = sums.get(groups[k], 0.0) + weights[k] * (differences[k] - mean)
    return mean, math.sqrt(sum(s**2 for s in sums.values())) / total


def slow_beta(apart, *, weights=None, flipped=0.0):
    """The scale that explains pairs best by their score differences alone, by SciPy."""

    def loss(log_beta):
        odds = np.exp(log_beta) * apart
        losses = np.logaddexp(0.0, -odds) + flipped * odds
        return np.average(losses, weights=weights) + 1e-4 * log_beta**2

    return math.exp(minimize_scalar(loss, bounds=(-5, 8), method="bounded").x)


def test_the_summary_tells_what_was_measured_out_of_fold(dependent):
    gate, summary, data, module = dependent
    assert summary.comparisons == len(data) == 2000
    assert list(summary.constant_weights) == list(NAMES)
    losses, right, constant_losses, constant_right = [], [], [], []
    each = gate.member_weights(data.prompts).detach().double()
    mixes = [
        fit_constant_mix(data.comparisons((data.folds != k).nonzero()[:, 0]), mixed=MIXED)
        for k in range(3)
    ]
    for c in range(len(data)):
        k = int(data.folds[c])
        chosen, rejected = data.responses[c].tolist()
        apart = (data.adjusted[chosen] - data.adjusted[rejected]).double()
        score, fixed = float(each[k, c] @ apart), float(mixes[k].weights @ apart)
        losses.append(-math.log(sigmoid(float(module.log_beta[k].exp()) * score)))
        constant_losses.append(-math.log(sigmoid(mixes[k].beta * fixed)))
        right.append(float(score > 0))
        constant_right.append(float(fixed > 0))
    assert summary.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert summary.constant_loss == pytest.approx(np.mean(constant_losses), rel=1e-3)
    assert summary.accuracy == pytest.approx(np.mean(right), abs=1e-3)
    assert summary.constant_accuracy == pytest.approx(np.mean(constant_right), abs=2e-3)
    groups, ones = data.groups.tolist(), [1.0] * len(data)
    for gain, before, after in (
        (summary.loss_gain, losses, constant_losses),
        (summary.accuracy_gain, constant_right, right),
    ):
        differences = [a - b for a, b in zip(after, before, strict=True)]
        mean, error = slow_gain(differences, ones, groups)
        assert gain.mean == pytest.approx(mean, abs=2e-3)
        assert gain.error == pytest.approx(error, rel=0.05)
        assert gain.low == pytest.approx(gain.mean - 1.96 * gain.error)
        assert gain.high == pytest.approx(gain.mean + 1.96 * gain.error)
    found = module.out_of_fold(data)
    apart = (found.scores[:, 0] - found.scores[:, 1]).double().numpy()
    assert summary.beta == pytest.approx(slow_beta(apart), rel=1e-2)


@pytest.mark.parametrize("seed", range(2))
def test_weights_and_ties_are_in_the_figures_of_the_summary(tmp_path, seed):
    data = lists(90, features=0, seed=seed)
    _, summary = fit(data, tmp_path, epochs=2, margins="ignore", seed=seed)
    ready, module = RecordingTrainer.data, RecordingTrainer.module.eval()
    found = module.out_of_fold(ready)
    weights = data.weights * data.balance
    weights = (weights / weights.mean()).tolist()
    slow, _ = slow_losses(module, ready)
    losses = [float(slow[int(k), c]) for c, k in enumerate(ready.folds)]
    assert summary.loss == pytest.approx(np.average(losses, weights=weights), rel=1e-4)
    right = found.right.tolist()
    assert any(map(math.isnan, right)), "some lists tie altogether"
    expected, _ = slow_gain(right, weights, data.groups.tolist())
    assert summary.accuracy == pytest.approx(expected, rel=1e-5)


class AtTheStart(Callback):
    """What the constant mixes make of the comparisons, before any training."""

    def on_train_start(self, trainer, pl_module):
        self.found = pl_module.out_of_fold(trainer.datamodule.preferences)


def test_the_error_of_the_gain_takes_the_comparisons_of_one_prompt_together(tmp_path):
    task = Task(depends=True, prompts=100)
    # Every pair three times over, which says nothing new.
    for name in ("prompts", "differences", "groups"):
        setattr(task, name, getattr(task, name).repeat(3, *[1] * (getattr(task, name).ndim - 1)))
    weights, start = draw(600, seed=5).double().exp(), AtTheStart()
    _, summary = fit(task.preferences(weights=weights), tmp_path, trainer=add_callback(start))
    end = RecordingTrainer.module.out_of_fold(RecordingTrainer.data)
    groups = task.groups.tolist()
    for gain, differences in (
        (summary.loss_gain, start.found.losses - end.losses),
        (summary.accuracy_gain, end.right - start.found.right),
    ):
        mean, error = slow_gain(differences.tolist(), weights.tolist(), groups)
        assert gain.mean == pytest.approx(mean, rel=1e-4, abs=1e-6)
        assert gain.error == pytest.approx(error, rel=1e-4)
        _, alone = slow_gain(differences.tolist(), weights.tolist(), list(range(600)))
        assert gain.error > 1.2 * alone


def test_pairs_that_judges_call_a_tie_do_not_count_in_the_accuracy(tmp_path):
    task = Task(depends=False, prompts=100)
    ties = torch.arange(200) % 2 == 0
    votes = torch.where(ties, 0.5, 0.0).double()
    # Of a tie, nobody said which response is better: the order it comes in says nothing.
    task.differences[ties] = -task.differences[ties].abs()
    _, summary = fit(task.preferences(flipped=votes), tmp_path, keep="constant")
    task.differences, task.prompts = task.differences[~ties], task.prompts[~ties]
    assert summary.constant_accuracy == pytest.approx(
        task.accuracy(torch.tensor([0.7, 0.0, 0.3])), abs=0.03
    )


# ------------------------------------------------------------------------------ what is kept


def test_auto_keeps_the_constant_mix_where_the_gate_is_not_shown_to_be_better(tmp_path):
    task = Task(depends=False)
    gate, summary = fit(task.preferences(), tmp_path, keep="auto", patience=2)
    assert summary.kept == "constant"
    assert "the constant mix is kept" in summary.verdict
    expected = torch.tensor([summary.constant_weights[name] for name in NAMES])
    weights = gate(task.prompts).detach()
    torch.testing.assert_close(weights, expected.expand(len(weights), -1), atol=1e-5, rtol=0)
    assert max(summary.diagnostics.mean.values()) < 1.0


def test_the_constant_mix_is_kept_when_asked_for_and_nothing_is_trained(tmp_path):
    def refuse(**_):
        raise AssertionError("trained")

    task = Task(depends=True, prompts=200)
    gate, summary = fit(task.preferences(), tmp_path, keep="constant", trainer=refuse)
    assert (summary.kept, summary.epochs) == ("constant", (0, 0, 0))
    assert summary.loss == summary.constant_loss
    expected = torch.tensor([summary.constant_weights[name] for name in NAMES])
    weights = gate(task.prompts).detach()
    torch.testing.assert_close(weights, expected.expand(len(weights), -1), atol=1e-5, rtol=0)
    assert not gate.training
    assert any("hardly looks" in warning for warning in summary.diagnostics.warnings)


def test_warnings_and_the_verdict_are_logged(tmp_path, caplog):
    _, summary = fit(Task(depends=False, prompts=50).preferences(), tmp_path, learning_rate=1e-6)
    assert not summary.better
    assert summary.verdict in caplog.text
    for warning in summary.diagnostics.warnings:
        assert warning in caplog.text


# ---------------------------------------------------------------- settings of the loss, units


@pytest.mark.parametrize("margins", ["scale", "subtract", "ignore"])
def test_a_margin_scales_or_is_subtracted_and_a_pair_without_one_is_plain(tmp_path, margins):
    task = Task(depends=False, prompts=50)
    strengths = draw(100, seed=4).double().exp()
    strengths[::3] = NAN
    weights = draw(100, seed=5).double().exp()
    data = task.preferences(strengths=strengths, weights=weights)
    fit(data, tmp_path, epochs=1, margins=margins)
    ready = RecordingTrainer.data
    known = [1.0 if math.isnan(s) else s for s in strengths.tolist()]
    scaled = [w * s for w, s in zip(weights.tolist(), known, strict=True)]
    counted = scaled if margins == "scale" else weights.tolist()
    expected = [c * 100 / sum(counted) for c in counted]
    assert ready.weights.tolist() == pytest.approx(expected, rel=1e-5)
    subtracted = [0.0 if math.isnan(s) else s for s in strengths.tolist()]
    ahead = subtracted if margins == "subtract" else [0.0] * 100
    assert ready.margins.tolist() == pytest.approx(ahead, rel=1e-5)
    assert torch.equal(data.strengths.isnan(), strengths.isnan()), "the input is left alone"


def test_label_smoothing_mixes_with_the_votes(tmp_path):
    task = Task(depends=False, prompts=50)
    votes = 0.5 * rand(100, seed=4).double()
    fit(task.preferences(flipped=votes), tmp_path, epochs=1, label_smoothing=0.1)
    expected = [v * 0.9 + (1.0 - v) * 0.1 for v in votes.tolist()]
    assert RecordingTrainer.data.flipped.tolist() == pytest.approx(expected, rel=1e-5)


def test_smoothing_keeps_the_gates_own_beta_finite_where_pairs_can_be_separated(tmp_path):
    task = Task(depends=False, prompts=50, noise=0.0)
    task.differences = task.differences.abs()
    betas = []
    for smoothing in (0.0, 0.2):
        fit(task.preferences(), tmp_path / str(smoothing), epochs=1, label_smoothing=smoothing)
        betas.append(float(RecordingTrainer.module.log_beta.exp().mean()))
    assert betas[1] < 0.5 * betas[0]


def test_weights_only_count_beside_each_other(tmp_path):
    task = Task(depends=True, prompts=100)
    weights = draw(200, seed=5).double().exp()
    one, summary = fit(task.preferences(weights=weights), tmp_path / "one")
    other, same = fit(task.preferences(weights=4.0 * weights), tmp_path / "four")
    plain, _ = fit(task.preferences(), tmp_path / "plain")
    assert tensors_equal(one, other)
    assert not tensors_equal(one, plain)
    assert same == summary


def test_a_pair_of_weight_two_trains_as_two_pairs(tmp_path):
    task = Task(depends=True, prompts=100)
    how = {"dropout": 0.0, "batch_size": 1000}
    counts = torch.tensor([2, 1]).repeat(100)
    weighted, summary = fit(task.preferences(weights=counts.double()), tmp_path / "one", **how)
    for name in ("prompts", "differences", "groups"):
        setattr(task, name, getattr(task, name).repeat_interleave(counts, dim=0))
    repeated, same = fit(task.preferences(), tmp_path / "two", **how)
    prompts = task.prompts[:50]
    torch.testing.assert_close(
        weighted.member_weights(prompts), repeated.member_weights(prompts), atol=2e-3, rtol=0
    )
    assert same.loss == pytest.approx(summary.loss, rel=1e-3)
    assert same.beta == pytest.approx(summary.beta, rel=1e-3)


def test_style_is_in_units_of_the_usual_difference_within_a_comparison(tmp_path):
    task = Task(depends=False, prompts=50)
    style = 1000.0 * draw(100, 2, seed=4).double()
    fit(task.preferences(style=style), tmp_path / "pairs", epochs=1)
    batch = RecordingTrainer.data[torch.arange(100)]
    apart = batch.style[:, 0] - batch.style[:, 1]
    torch.testing.assert_close(apart.square().mean(0).sqrt(), torch.ones(2))
    data = lists(40)
    fit(data, tmp_path / "lists", epochs=1)
    away = []
    for c in range(40):
        n = int((~data.ranks[c].isnan()).sum())
        values = RecordingTrainer.data.style[data.responses[c, :n], 0]
        away.extend((values - values.mean()).tolist())
    # Half the usual difference of a pair is the usual distance from its mean.
    assert math.sqrt(np.mean(np.square(away))) == pytest.approx(0.5, rel=1e-4)


def test_a_list_may_be_padded_by_more_than_any_needs(tmp_path):
    data = lists(40)
    wide = replace(
        data,
        responses=torch.nn.functional.pad(data.responses, (0, 3), value=-1),
        ranks=torch.nn.functional.pad(data.ranks, (0, 3), value=NAN),
    )
    gate, summary = fit(data, tmp_path / "narrow", epochs=1)
    other, same = fit(wide, tmp_path / "wide", epochs=1)
    assert tensors_equal(gate, other)
    assert same == summary


# ------------------------------------------------------------------------ style as a nuisance


class Judged:
    """Pairs of judges who pay for two qualities and for length itself.

    The third objective follows length and has no quality of its own.
    """

    names, true = ("helpfulness", "honesty", "follower"), (0.7, 0.3, 0.0)

    def __init__(self, *, pay=1.5, rows=6000, seed=0):
        self.length = 2.0 * draw(rows, 1, seed=seed).double()
        qualities = draw(rows, 2, seed=seed + 1).double()
        follower = 0.8 * self.length / 2.0 + 0.6 * draw(rows, 1, seed=seed + 2).double()
        self.rewards = torch.cat([qualities, follower], dim=1)
        logits = 2.0 * self.rewards @ torch.tensor(self.true).double()
        logits = logits + pay * self.length[:, 0] / 2.0
        order = torch.where(rand(rows, seed=seed + 3) < torch.sigmoid(logits), 1.0, -1.0)
        order = order[:, None].double()
        self.differences, self.nuisance = order * self.rewards, order * self.length
        self.groups = torch.arange(rows) // 2
        self.prompts = draw(rows // 2, 4, seed=seed + 4)[self.groups]

    def follows(self, weights):
        """Rank correlation of the score with length, in whatever order."""
        return float(spearmanr((self.rewards * weights).sum(1), self.length[:, 0])[0])

    def preferences(self, *, unit=1.0, **values):
        return Preferences.of_pairs(
            self.prompts, self.differences, self.groups, style=unit * self.nuisance, **values
        )


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Gates trained plainly, with nuisance and reweighted, and the run that made them."""
    pairs = Judged()
    gates = {}
    for name, how, values in (
        ("plain", {}, {}),
        ("nuisance", {"nuisance": True, "style_names": ("log_length",)}, {}),
        ("reweight", {}, {"balance": style_weights(pairs.nuisance)}),
    ):
        gate, summary = fit(
            pairs.preferences(**values),
            tmp_path_factory.mktemp(name),
            epochs=2,
            mixed=(0, 1, 2),
            names=pairs.names,
            batch_size=256,
            **how,
        )
        gates[name] = gate, summary, RecordingTrainer.module, RecordingTrainer.data
    return pairs, gates


def test_with_nuisance_the_gate_finds_the_quality_and_its_score_follows_length_less(judged):
    pairs, gates = judged
    follows = {}
    for name, (gate, *_) in gates.items():
        weights = gate(pairs.prompts).detach().double()
        follows[name] = pairs.follows(weights)
        if name == "nuisance":
            assert weights.mean(0).tolist() == pytest.approx(pairs.true, abs=0.06)
    assert follows["plain"] > 0.3
    assert abs(follows["nuisance"]) < 0.1
    assert follows["reweight"] < 0.5 * follows["plain"]


def test_style_is_in_the_loss_of_the_gate_but_not_in_its_scores(judged):
    _, gates = judged
    _, summary, module, data = gates["nuisance"]
    found = module.out_of_fold(data)
    apart = (found.scores[:, 0] - found.scores[:, 1]).double()
    assert summary.accuracy == pytest.approx(float((apart > 0).double().mean()), abs=1e-6)
    batch = data[torch.arange(len(data))]
    lengths = (batch.style[:, 0] - batch.style[:, 1])[:, 0].double()
    paid = module.style.detach()[data.folds, 0].double() * lengths
    odds = module.log_beta.detach().exp()[data.folds].double() * apart
    loss = np.logaddexp(0.0, -(odds + paid).numpy()).mean()
    assert summary.loss == pytest.approx(float(loss), rel=1e-4)
    assert summary.loss < float(np.logaddexp(0.0, -odds.numpy()).mean()) - 0.01
    assert summary.accuracy < float((odds + paid > 0).double().mean()) - 0.02
    # The judges pay 1.5 per standard deviation of length.
    assert list(summary.style) == ["log_length"]
    assert summary.style["log_length"] == pytest.approx(1.5, rel=0.1)
    assert gates["plain"][1].style == {}
    assert (gates["plain"][2].style == 0).all()


@pytest.mark.parametrize("name", ["plain", "nuisance", "reweight"])
def test_beta_is_that_of_the_judgements_as_they_were_made(judged, name):
    pairs, gates = judged
    _, summary, module, data = gates[name]
    found = module.out_of_fold(data)
    apart = (found.scores[:, 0] - found.scores[:, 1]).double()
    assert summary.beta == pytest.approx(slow_beta(apart.numpy()), rel=1e-2)
    odds = summary.beta * apart
    calibrated = calibration_error(torch.sigmoid(odds), torch.ones(6000), pairs.groups)
    assert calibrated.error.mean < 0.015
    # Not the one that explains them together with style.
    own = module.log_beta.detach().exp()[data.folds].double()
    trained = calibration_error(torch.sigmoid(own * apart), torch.ones(6000), pairs.groups)
    assert (trained.error.mean > 0.03) == (name == "nuisance")


def test_votes_and_weights_are_in_beta_but_neither_margins_nor_smoothing(tmp_path):
    data = replace(
        Task(depends=True, noise=0.5).preferences(
            strengths=draw(1200, seed=4).double().exp(),
            weights=draw(1200, seed=5).double().exp(),
            flipped=0.5 * rand(1200, seed=6).double(),
        ),
        balance=draw(1200, seed=7).double().exp(),
    )
    for margins in ("scale", "subtract"):
        _, summary = fit(data, tmp_path / margins, margins=margins, label_smoothing=0.2)
        found = RecordingTrainer.module.out_of_fold(RecordingTrainer.data)
        apart = (found.scores[:, 0] - found.scores[:, 1]).double().numpy()
        expected = slow_beta(apart, weights=data.weights, flipped=data.flipped.numpy())
        assert summary.beta == pytest.approx(expected, rel=1e-2)


def test_the_trainer_starts_at_the_constant_mix_of_the_other_folds(judged):
    _, gates = judged
    for name in ("nuisance", "reweight"):
        _, summary, _, data = gates[name]
        losses = torch.empty(len(data), dtype=torch.float64)
        for fold in range(3):
            others, own = ((data.folds != fold), (data.folds == fold))
            mix = fit_constant_mix(
                data.comparisons(others.nonzero()[:, 0]),
                mixed=(0, 1, 2),
                nuisance=name == "nuisance",
            )
            batch = data.comparisons(own.nonzero()[:, 0])
            apart = (batch.adjusted[:, 0] - batch.adjusted[:, 1]).double() @ mix.weights
            paid = (batch.style[:, 0] - batch.style[:, 1]).double() @ mix.style
            losses[own] = -torch.nn.functional.logsigmoid(mix.beta * apart + paid)
        expected = float((losses * data.weights).sum() / data.weights.sum())
        assert summary.constant_loss == pytest.approx(expected, rel=1e-4)


def test_a_nuisance_that_is_always_zero_does_no_harm(tmp_path):
    task = Task(depends=False, prompts=100)
    style = torch.stack([torch.zeros(200), draw(200, seed=9)], dim=1).double()
    how = {"nuisance": True, "style_names": ("tables", "bold"), "style_penalty": 0.1}
    gate, summary = fit(task.preferences(style=style), tmp_path, epochs=1, **how)
    assert summary.style["tables"] == 0.0
    assert gate(task.prompts).isfinite().all()
    assert math.isfinite(summary.loss)


def test_nuisance_may_be_in_any_units(tmp_path):
    pairs = Judged(rows=600)
    how = {"nuisance": True, "style_names": ("log_length",), "style_penalty": 0.1}
    found = [
        fit(pairs.preferences(unit=unit), tmp_path / str(unit), names=pairs.names, **how)
        for unit in (1.0, 1024.0)
    ]
    assert found[0][1] == found[1][1]
    assert tensors_equal(found[0][0], found[1][0])


# --------------------------------------------------------------------------- seeds and resuming


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    data = Task(depends=True, prompts=100).preferences()
    gates = []
    for run, seed in enumerate([1, 1, 2]):
        torch.manual_seed(run)
        torch.rand(run)
        gates.append(fit(data, tmp_path / str(run), seed=seed))
    assert tensors_equal(gates[0][0], gates[1][0])
    assert gates[0][1] == gates[1][1]
    assert not tensors_equal(gates[0][0], gates[2][0])


def test_training_leaves_its_inputs_alone_and_no_checkpoint_behind(tmp_path):
    data = lists(60)
    before = copy.deepcopy(data)
    gate, _ = fit(data, tmp_path, nuisance=True, style_names=("length",))
    for field in data.__dataclass_fields__:
        one, other = getattr(data, field), getattr(before, field)
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert not list(tmp_path.rglob("*.ckpt"))
    assert list(tmp_path.rglob("metrics.csv")), "the log stays"
    assert not gate.training


class StoppedError(Exception):
    """A training that was cut off."""


class StopAt(Callback):
    """Cuts a training off at a hook of an epoch, once; remembers where it started."""

    def __init__(self, hook=None, *, epoch=2, batch=1, error=StoppedError):
        self.hook, self.epoch, self.batch, self.error = hook, epoch, batch, error
        self.started = None

    def _stop(self, hook, trainer):
        if self.hook == hook and trainer.current_epoch == self.epoch:
            raise self.error

    def on_train_epoch_start(self, trainer, pl_module):
        self._stop("epoch start", trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        # The hook above is not called in the first epoch after a checkpoint.
        self.started = trainer.current_epoch if self.started is None else self.started
        if batch_idx == self.batch:
            self._stop("batch", trainer)

    def on_validation_epoch_end(self, trainer, pl_module):
        self._stop("validation", trainer)

    def on_fit_end(self, trainer, pl_module):
        if self.hook == "end":
            raise self.error


# Everything that a training could forget: dropout, order, momentum, style, best epochs, patience.
RESUMED = {
    "nuisance": True,
    "style_names": ("length",),
    "entropy": 0.05,
    "style_penalty": 0.05,
    "dropout": 0.3,
    "patience": 4,
    "epochs": 60,
    "learning_rate": 0.05,
}


def noisy():
    task = Task(depends=True, prompts=60, noise=1.0)
    return task.preferences(
        style=draw(120, 1, seed=9).double(),
        weights=draw(120, seed=5).double().exp(),
        strengths=draw(120, seed=6).double().exp(),
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    gate, summary = fit(noisy(), tmp_path_factory.mktemp("undisturbed"), **RESUMED)
    assert 4 < RecordingTrainer.epochs < 60
    return gate, summary, copy.deepcopy(RecordingTrainer.module), RecordingTrainer.epochs


def cut_off(folder, stop, **changes):
    with pytest.raises(stop.error):
        fit(noisy(), folder, trainer=add_callback(stop), **(RESUMED | changes))


def assert_same(undisturbed, result):
    gate, summary, module, epochs = undisturbed
    assert tensors_equal(gate, result[0])
    assert tensors_equal(module, RecordingTrainer.module)
    assert summary == result[1]
    assert epochs == RecordingTrainer.epochs


# Lightning does not call `on_train_epoch_start` in the first epoch after a checkpoint, where the
# dropout is seeded.
@pytest.mark.parametrize("hook", ["epoch start", "batch", "validation"])
@pytest.mark.parametrize("epoch", [1, 4])
def test_a_training_that_was_cut_off_goes_on_and_ends_with_the_same_bits(
    undisturbed, tmp_path, hook, epoch
):
    cut_off(tmp_path, StopAt(hook, epoch=epoch))
    assert list(tmp_path.rglob("*.ckpt"))
    again = StopAt()
    result = fit(noisy(), tmp_path, trainer=add_callback(again), **RESUMED)
    assert RecordingTrainer.resumed
    assert again.started == epoch
    assert_same(undisturbed, result)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_training_may_be_cut_off_more_than_once(undisturbed, tmp_path):
    for epoch in (1, 2, 5):
        cut_off(tmp_path, StopAt("batch", epoch=epoch))
    result = fit(noisy(), tmp_path, **RESUMED)
    assert_same(undisturbed, result)


def test_a_training_that_was_cut_off_in_its_first_epoch_starts_again(undisturbed, tmp_path):
    cut_off(tmp_path, StopAt("batch", epoch=0))
    result = fit(noisy(), tmp_path, **RESUMED)
    assert not RecordingTrainer.resumed
    assert_same(undisturbed, result)


def test_a_training_that_was_cut_off_after_its_last_epoch_ends_with_the_same_bits(
    undisturbed, tmp_path
):
    cut_off(tmp_path, StopAt("end"))
    result = fit(noisy(), tmp_path, **RESUMED)
    assert RecordingTrainer.resumed
    assert_same(undisturbed, result)


def test_a_shorter_training_that_was_cut_off_at_its_end_goes_on_to_more_epochs(
    undisturbed, tmp_path
):
    cut_off(tmp_path, StopAt("end"), epochs=2)
    again = StopAt()
    result = fit(noisy(), tmp_path, trainer=add_callback(again), **RESUMED)
    assert again.started == 2
    assert_same(undisturbed, result)


def test_ctrl_c_stops_the_run_and_not_only_the_training(undisturbed, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(
                noisy(),
                tmp_path,
                trainer=add_callback(StopAt("batch", error=KeyboardInterrupt)),
                **RESUMED,
            )
    finally:
        signal.signal(signal.SIGINT, handler)
    result = fit(noisy(), tmp_path, **RESUMED)
    assert RecordingTrainer.resumed
    assert_same(undisturbed, result)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"learning_rate": 0.03},
        {"weight_decay": 0.5},
        {"dropout": 0.0},
        {"hidden_dim": 6},
        {"temperature": 2.0},
        {"batch_size": 32},
        {"entropy": 0.0},
        {"style_penalty": 0.0},
        {"margins": "subtract"},
        {"label_smoothing": 0.1},
        {"folds": 4},
        {"patience": 1},
        {"nuisance": False, "style_names": ()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_checkpoint_of_other_settings_is_not_used(tmp_path, changes):
    few = {"epochs": 5}
    cut_off(tmp_path, StopAt("batch"), **few)
    gate, summary = fit(noisy(), tmp_path, **(RESUMED | few | changes))
    assert not RecordingTrainer.resumed
    other, expected = fit(noisy(), tmp_path / "fresh", **(RESUMED | few | changes))
    assert tensors_equal(gate, other)
    assert summary == expected


def change(name, rows=slice(0, 1)):
    def changed(data):
        values = getattr(data, name).clone()
        values[rows] = 0.5 * values[rows]
        return replace(data, **{name: values})

    return changed


@pytest.mark.parametrize(
    "changed",
    [
        *(change(name) for name in ("prompts", "adjusted", "style", "weights", "strengths")),
        lambda data: data.__class__.of_pairs(
            data.prompts[2:], data.adjusted[2:120], data.groups[2:], style=data.style[2:120]
        ),
        lambda data: replace(data, responses=data.responses.flip(1)),
        lambda data: replace(data, prompts=data.prompts.flip(0)),
    ],
    ids=["prompts", "rewards", "style", "weights", "margins", "fewer", "reversed", "shuffled"],
)
def test_a_checkpoint_of_other_data_is_not_used(tmp_path, changed):
    few = RESUMED | {"epochs": 3}
    cut_off(tmp_path, StopAt("batch", epoch=1), **few)
    gate, summary = fit(changed(noisy()), tmp_path, **few)
    assert not RecordingTrainer.resumed
    other, expected = fit(changed(noisy()), tmp_path / "fresh", **few)
    assert tensors_equal(gate, other)
    assert summary == expected


# ------------------------------------------------------------------------- saved, and refused


def test_save_then_load_is_the_identity(dependent, tmp_path):
    gate, summary, *_ = dependent
    save_gating(tmp_path, "decorrelated", gate, summary)
    loaded, loaded_summary = load_gating(tmp_path, "decorrelated")
    assert loaded_summary == summary
    assert loaded.shape == gate.shape
    assert not loaded.training
    assert tensors_equal(gate, loaded)
    prompts = draw(5, 4)
    assert torch.equal(loaded(prompts), gate(prompts))


def test_the_summary_goes_through_json_and_back(judged):
    for _, summary, *_ in judged[1].values():
        values = json.loads(json.dumps(asdict(summary), allow_nan=False))
        again = GatingSummary.from_json(values)
        assert again == summary
        assert isinstance(again.epochs, tuple)
        assert again.verdict == summary.verdict


@pytest.mark.parametrize("name", ["output.bias", "hidden.0.weight", "mean"])
def test_a_missing_tensor_stops_the_loading(dependent, tmp_path, name):
    save_gating(tmp_path, "gate", *dependent[:2])
    tensors = read_tensors(tmp_path / "gate.safetensors")
    del tensors[name]
    write_tensors(tmp_path / "gate.safetensors", tensors)
    with pytest.raises(RuntimeError, match=rf"Missing key.*{name}"):
        load_gating(tmp_path, "gate")


def test_the_saved_shape_says_how_many_members_there_are(dependent, tmp_path):
    save_gating(tmp_path, "gate", *dependent[:2])
    assert read_json(tmp_path / "gate.json")["gate"]["members"] == 3


def test_too_few_prompts_to_fill_the_folds_are_counted(tmp_path):
    with pytest.raises(ValueError, match="2 distinct prompts cannot fill 3 folds"):
        fit(Task(depends=False, prompts=2).preferences(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 0.5}, "`label_smoothing` must be from 0 to below 0.5, got 0.5"),
        ({"folds": 1}, "`folds` must be at least 2"),
        ({"folds": 2.5}, "`folds` must be at least 2"),
        ({"batch_size": 0}, "`batch_size` and `patience` at least 1"),
        ({"patience": 0}, "`batch_size` and `patience` at least 1"),
        ({"entropy": -1.0}, "must not be negative"),
        ({"style_penalty": -1.0}, "must not be negative"),
        ({"style_penalty": 1.0}, "needs style features"),
        ({"keep": "gated"}, "`keep` knows auto, gate, constant, not 'gated'"),
        ({"margins": "subtracted"}, "`margins` knows .*, not 'subtracted'"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, no_type_checks, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(Task(depends=False, prompts=20).preferences(), tmp_path, **changes)


def test_what_else_is_in_the_folder_is_left_alone(tmp_path):
    kept = tmp_path / "checkpoints" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    fit(Task(depends=False, prompts=20).preferences(), tmp_path, epochs=1)
    assert kept.read_text() == "mine"


def test_the_callers_random_numbers_are_left_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fit(Task(depends=False, prompts=20).preferences(), tmp_path, epochs=1)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("margins", ["scale", "subtract"])
def test_a_tie_has_no_side_and_no_margin(tmp_path, margins):
    """A tie with its sides swapped is the same tie, whatever margin it says."""
    fitted = []
    for sign in (1.0, -1.0):
        task = Task(depends=False, prompts=60)
        ties = torch.arange(120) % 3 == 0
        task.differences[ties] *= sign
        strengths = torch.where(ties, 0.0 if margins == "scale" else 3.0, 1.0).double()
        data = task.preferences(strengths=strengths, flipped=torch.where(ties, 0.5, 0.0).double())
        fitted.append(fit(data, tmp_path / f"{sign}", epochs=1, margins=margins)[1])
        assert bool((RecordingTrainer.data.weights[ties] > 0.5).all())
    first, second = (list(summary.constant_weights.values()) for summary in fitted)
    assert first == pytest.approx(second, abs=1e-5)
    assert fitted[0].constant_loss == pytest.approx(fitted[1].constant_loss, rel=1e-4)


def test_of_one_objective_no_gate_is_trained(tmp_path):
    gate, summary = fit(
        Task(depends=True, prompts=40).preferences(), tmp_path, mixed=(2,), keep="auto"
    )
    assert (summary.trained, summary.kept, summary.epochs) == (False, "constant", (0, 0, 0))
    assert summary.verdict == "No gate was trained: the constant mix is used."
    assert gate(draw(5, 4)).tolist() == [[0.0, 0.0, 1.0]] * 5


def test_nothing_but_ties_is_refused_before_training(tmp_path):
    task = Task(depends=False, prompts=20)
    data = task.preferences(flipped=torch.full((40,), 0.5, dtype=torch.float64))
    with pytest.raises(ValueError, match="all of them are ties"):
        fit(data, tmp_path)


def test_a_checkpoint_of_another_kind_of_training_is_not_used(undisturbed, tmp_path):
    cut_off(tmp_path, StopAt("batch", epoch=2))
    clipped = functools.partial(RecordingTrainer, gradient_clip_val=1e-3)
    fresh = fit(noisy(), tmp_path / "fresh", trainer=clipped, **RESUMED)
    found = fit(noisy(), tmp_path, trainer=clipped, **RESUMED)
    assert tensors_equal(fresh[0], found[0])
    assert not tensors_equal(undisturbed[0], found[0])


def test_the_logger_is_the_callers(tmp_path):
    made = []

    def logger(*, save_dir):
        made.append(save_dir)
        return CSVLogger(save_dir, name="mine")

    fit(Task(depends=False, prompts=20).preferences(), tmp_path, epochs=1, logger=logger)
    assert made == [tmp_path]
    (metrics,) = tmp_path.glob("mine/**/metrics.csv")
    header = metrics.read_text().splitlines()[0].split(",")
    assert {"train_loss", "val_loss", "val_accuracy"} <= set(header)


def test_a_fold_whose_pairs_do_not_count_leaves_the_figures_finite(tmp_path):
    task = Task(depends=False, prompts=30)
    fit(task.preferences(), tmp_path / "folds", epochs=1)
    weights = (RecordingTrainer.data.folds != 0).double()
    gate, summary = fit(task.preferences(weights=weights), tmp_path / "weights", epochs=2)
    assert math.isfinite(summary.loss)
    assert gate(task.prompts).isfinite().all()
    assert RecordingTrainer.epochs == 2


@pytest.mark.slow
def test_two_processes_train_to_a_sane_result_that_is_saved_whole(tmp_path):
    task = Task(depends=True, prompts=301)

    def trainer(**given):
        return lightning.Trainer(
            max_epochs=8, accelerator="cpu", devices=2, strategy="ddp_spawn", **given
        )

    gate, summary = fit_gating(
        task.preferences(),
        objectives=NAMES,
        mixed=MIXED,
        folder=tmp_path,
        trainer=trainer,
        progress=False,
        folds=3,
        hidden_dim=8,
        learning_rate=0.03,
        batch_size=32,
        keep="gate",
    )
    assert min(summary.epochs) > 0
    assert summary.better
    assert summary.accuracy > summary.constant_accuracy + 0.03
    fresh = Task(depends=True, seed=100, prompts=1000)
    assert fresh.accuracy(gate(fresh.prompts).detach()) > fresh.accuracy(fresh.oracle) - 0.04
    save_gating(tmp_path, "gate", gate, summary)
    loaded, same = load_gating(tmp_path, "gate")
    assert tensors_equal(gate, loaded)
    assert same == summary
    assert not list(tmp_path.rglob("*.ckpt"))
