"""The gating network: weights on the simplex over the mixed objectives, from the prompt alone."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armo.fit.gating import GatingNetwork, contributions, diagnose

DIM, OBJECTIVES, MIXED, MEMBERS = 6, 5, (3, 0, 1), 2
BIAS = [2, 4]
NAMES = ("a", "b", "c", "d", "e")


def make_gate(*, seed=0, **changes):
    """A gate in evaluation mode with random tensors, none of them at its starting point."""
    arguments = {
        "dim": DIM,
        "objectives": OBJECTIVES,
        "mixed": MIXED,
        "members": MEMBERS,
        "hidden_dim": 7,
    }
    gate = GatingNetwork(**(arguments | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        gate.mean.copy_(torch.randn(DIM, generator=generator))
        gate.scale.copy_(torch.rand(DIM, generator=generator) + 0.5)
    return gate.eval()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def slow_weights(gate, member, prompt):
    """The documented formula for one prompt and one member, written out."""
    hidden = (prompt - gate.mean) / gate.scale
    for layer in gate.hidden:
        hidden = (layer.weight[member] @ hidden + layer.bias[member]).clamp(min=0.0)
    output = gate.output
    logits = (output.bias[member] + output.weight[member] @ hidden) / gate.temperature
    exponents = [math.exp(float(logit)) for logit in logits]
    weights = [0.0] * gate.objectives
    for column, exponent in zip(gate.mixed.tolist(), exponents, strict=True):
        weights[column] = exponent / sum(exponents)
    return torch.tensor(weights)


@given(
    batch=st.lists(st.integers(1, 4), max_size=2),
    layers=st.integers(0, 2),
    members=st.integers(1, 3),
    temperature=st.sampled_from([0.5, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_weights_lie_on_the_simplex_of_the_mixed_objectives(
    batch, layers, members, temperature, seed
):
    gate = make_gate(seed=seed, hidden_layers=layers, members=members, temperature=temperature)
    prompts = draw(*batch, DIM, seed=seed)
    together, each = gate(prompts), gate.member_weights(prompts)
    assert together.shape == (*batch, OBJECTIVES)
    assert each.shape == (members, *batch, OBJECTIVES)
    for weights in (together, each):
        assert (weights >= 0).all()
        assert (weights[..., BIAS] == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    torch.testing.assert_close(together, each.mean(0))


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_every_prompt_gets_the_weights_of_the_formula_whatever_its_batch(layers):
    gate = make_gate(hidden_layers=layers, temperature=2.0, members=3)
    prompts = draw(2, 3, DIM)
    together, each = gate(prompts), gate.member_weights(prompts)
    for i, j in itertools.product(range(2), range(3)):
        expected = torch.stack([slow_weights(gate, m, prompts[i, j]) for m in range(3)])
        torch.testing.assert_close(each[:, i, j], expected)
        torch.testing.assert_close(together[i, j], expected.mean(0))
        torch.testing.assert_close(gate(prompts[i])[j], expected.mean(0))
        torch.testing.assert_close(gate(prompts[i, j]), expected.mean(0))


def test_no_prompts_get_no_weights():
    assert make_gate()(torch.zeros(0, DIM)).shape == (0, OBJECTIVES)


def test_weights_differ_between_prompts_and_between_members():
    gate = make_gate(temperature=10.0)
    weights = gate.member_weights(draw(2, DIM))
    assert (weights[:, 0] - weights[:, 1]).abs().amax(-1).min() > 0.01
    assert (weights[0] - weights[1]).abs().amax(-1).min() > 0.01


def test_new_members_start_from_different_hidden_layers_and_in_the_range_of_torchs_linear():
    torch.manual_seed(0)
    gate = GatingNetwork(dim=50, objectives=3, mixed=(0, 1), members=3, hidden_dim=40)
    weight = gate.hidden[0].weight.detach()
    assert not torch.equal(weight[0], weight[1])
    edge = 50**-0.5
    assert 0.95 * edge < float(weight.abs().max()) <= edge
    reference = torch.nn.Linear(50, 40).weight.detach()
    assert float(weight.std()) == pytest.approx(float(reference.std()), rel=0.05)
    assert float(gate.hidden[0].bias.detach().abs().max()) <= edge


def test_half_precision_prompts_get_single_precision_weights():
    prompts = draw(4, DIM).bfloat16()
    weights = make_gate()(prompts)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, make_gate()(prompts.float()))


def test_a_new_gate_gives_equal_weights():
    gate = GatingNetwork(dim=DIM, objectives=OBJECTIVES, mixed=MIXED, members=2).eval()
    expected = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]) / 3.0
    torch.testing.assert_close(gate(draw(4, DIM)), expected.expand(4, -1))


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_a_gate_starts_at_each_members_constant_mix_for_every_prompt(temperature):
    gate = make_gate(temperature=temperature)
    mixes = torch.tensor([[0.2, 0.7, 0.0, 0.1, 0.0], [0.5, 0.3, 0.0, 0.2, 0.0]]).double()
    gate.start_from(weights=mixes, prompts=draw(20, DIM))
    prompts = 100.0 * draw(8, DIM, seed=1)
    expected = mixes.float()[:, None].expand(-1, 8, -1)
    torch.testing.assert_close(gate.member_weights(prompts), expected)
    torch.testing.assert_close(gate(prompts), expected.mean(0))


def test_starting_standardises_the_prompts_it_is_given():
    gate = make_gate()
    prompts = 5.0 + 3.0 * draw(50, DIM)
    gate.start_from(weights=torch.full((MEMBERS, OBJECTIVES), 0.2), prompts=prompts)
    inputs = (prompts - gate.mean) / gate.scale
    torch.testing.assert_close(inputs.mean(0), torch.zeros(DIM), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std(0), torch.ones(DIM), atol=0.02, rtol=0)


@pytest.mark.parametrize("rows", [1, 3])
def test_starting_from_equal_prompts_keeps_the_weights_finite(rows):
    gate = make_gate()
    prompts = draw(1, DIM).expand(rows, -1)
    gate.start_from(weights=torch.full((MEMBERS, OBJECTIVES), 0.2), prompts=prompts)
    assert gate(draw(1, DIM)).isfinite().all()


def test_the_gradient_reaches_every_layer_of_every_member_once_the_output_layer_is_not_zero():
    torch.manual_seed(0)
    gate = GatingNetwork(
        dim=DIM,
        objectives=OBJECTIVES,
        mixed=MIXED,
        members=3,
        hidden_layers=2,
        hidden_dim=16,
        dropout=0.0,
    )

    def reached():
        gate.zero_grad()
        gate(draw(10, DIM))[:, 0].sum().backward()
        return {
            (name, member): bool(p.grad[member].abs().max() > 0)
            for name, p in gate.named_parameters()
            for member in range(3)
        }

    start = reached()
    for member in range(3):
        assert start.pop(("output.weight", member))
        assert start.pop(("output.bias", member))
    assert len(start) == 3 * 4
    assert not any(start.values())
    torch.nn.init.normal_(gate.output.weight)
    assert all(reached().values())


def test_members_do_not_look_at_each_other():
    gate, changed, prompts = make_gate(members=3), make_gate(members=3), draw(4, DIM)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter[1] += 1.0
    same = (gate.member_weights(prompts) == changed.member_weights(prompts)).flatten(1).all(1)
    assert same.tolist() == [True, False, True]
    gate.zero_grad()
    gate.member_weights(prompts)[1, :, 0].sum().backward()
    for parameter in gate.parameters():
        assert (parameter.grad[[0, 2]] == 0).all()
        assert (parameter.grad[1] != 0).any()


def test_the_order_of_mixed_only_says_which_column_a_logit_goes_to():
    gate = make_gate()
    order = [2, 0, 1]
    permuted = make_gate(mixed=[MIXED[i] for i in order])
    permuted.load_state_dict(gate.state_dict() | {"mixed": permuted.mixed})
    with torch.no_grad():
        permuted.output.bias.copy_(gate.output.bias[:, order])
        permuted.output.weight.copy_(gate.output.weight[:, order])
    prompts = draw(4, DIM)
    torch.testing.assert_close(permuted(prompts), gate(prompts))


def test_other_mixed_columns_receive_the_same_weights():
    gate, moved = make_gate(), make_gate(mixed=(4, 2, 0))
    prompts = draw(4, DIM)
    torch.testing.assert_close(moved(prompts)[:, [4, 2, 0]], gate(prompts)[:, list(MIXED)])


def test_bias_objectives_get_weight_only_if_they_are_listed():
    listed = make_gate(mixed=(0, 1, 2, 3))
    weights = listed(draw(4, DIM))
    assert (weights[:, 2] > 0).all()
    assert (weights[:, 4] == 0).all()


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("members", [1, 3])
def test_shape_and_tensors_rebuild_the_network(layers, members):
    gate = make_gate(hidden_layers=layers, members=members, dropout=0.25, temperature=3.0)
    assert gate.members == gate.shape["members"] == members
    again = GatingNetwork(**gate.shape).eval()
    again.load_state_dict(gate.state_dict(), strict=True)
    assert again.shape == gate.shape
    assert torch.equal(again(draw(4, DIM)), gate(draw(4, DIM)))


def test_dropout_acts_in_training_only_and_on_each_member_by_itself():
    gate, prompts = make_gate(dropout=0.5, hidden_dim=16), draw(4, DIM)
    assert torch.equal(gate(prompts), gate(prompts))
    gate.train()
    torch.manual_seed(0)
    assert not torch.equal(gate(prompts), gate(prompts))
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter[1] = parameter[0]
    weights = gate.member_weights(prompts)
    assert not torch.equal(weights[0], weights[1])
    gate.eval()
    weights = gate.member_weights(prompts)
    assert torch.equal(weights[0], weights[1])


def test_contributions_are_weight_times_adjusted_reward():
    weights, adjusted = draw(3, OBJECTIVES).softmax(1), draw(3, OBJECTIVES, seed=1)
    added = contributions(weights, adjusted)
    for i in range(3):
        for k in range(OBJECTIVES):
            assert float(added[i, k]) == float(weights[i, k] * adjusted[i, k])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixed": ()}, "`mixed` must name at least one objective"),
        ({"dim": -1}, "`dim`, `temperature`, `hidden_dim` and `members` must be positive"),
        ({"temperature": 0.0}, "`temperature`, `hidden_dim` and `members` must be positive"),
        ({"hidden_dim": 0}, "`temperature`, `hidden_dim` and `members` must be positive"),
        ({"members": 0}, "`temperature`, `hidden_dim` and `members` must be positive"),
        ({"hidden_layers": -1}, "`hidden_layers` not negative"),
    ],
)
def test_sizes_that_make_no_network_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_gate(**changes)


@pytest.mark.parametrize("mixed", [(0, OBJECTIVES), (1, 1)])
def test_columns_that_are_no_objectives_or_come_twice_are_refused(mixed):
    with pytest.raises(ValueError, match="`mixed`"):
        make_gate(mixed=mixed)


# ------------------------------------------------------------------------------- diagnostics


@given(st.integers(0, 99), st.integers(1, 3))
def test_diagnostics_equal_numpys_prompt_by_prompt(seed, members):
    gate, prompts = make_gate(seed=seed, members=members, temperature=3.0), draw(7, DIM, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    prompt_of = torch.randint(7, (15,), generator=generator)
    differences = draw(15, OBJECTIVES, seed=seed + 1).double()
    found = diagnose(gate, prompts, prompt_of=prompt_of, differences=differences, objectives=NAMES)
    each = np.array(
        [[slow_weights(gate, m, prompt).tolist() for prompt in prompts] for m in range(members)]
    )
    weights = each.mean(0)
    assert list(found.mean) == list(found.spread) == list(found.uncertainty)
    assert set(found.mean) == {NAMES[k] for k in MIXED}
    entropies = [-sum(w * math.log(w) for w in row if w > 0) for row in weights]
    for k in MIXED:
        assert found.mean[NAMES[k]] == pytest.approx(weights[:, k].mean(), abs=1e-5)
        assert found.spread[NAMES[k]] == pytest.approx(weights[:, k].std(), abs=1e-5)
        uncertainty = math.sqrt(np.mean([each[:, i, k].var() for i in range(7)]))
        assert found.uncertainty[NAMES[k]] == pytest.approx(uncertainty, abs=1e-5)
    assert found.entropy == pytest.approx(np.mean(entropies), abs=1e-5)
    assert found.effective == pytest.approx(np.mean(np.exp(entropies)), rel=1e-5)
    mean = weights.mean(0)
    effective = math.exp(-sum(w * math.log(w) for w in mean if w > 0))
    assert found.effective_mean == pytest.approx(effective, rel=1e-5)
    gated = [weights[int(p)] @ d.numpy() for p, d in zip(prompt_of, differences, strict=True)]
    fixed = [mean @ d.numpy() for d in differences]
    # The residual of the best multiple of the scores of fixed weights.
    multiple = np.linalg.lstsq(np.array(fixed)[:, None], np.array(gated), rcond=None)[0][0]
    left = sum((g - multiple * f) ** 2 for g, f in zip(gated, fixed, strict=True))
    expected = left / sum(g**2 for g in gated)
    assert found.prompt_share == pytest.approx(expected, abs=1e-5)


def diagnosed(gate):
    prompts = draw(20, DIM, seed=3)
    return diagnose(
        gate,
        prompts,
        prompt_of=torch.arange(20),
        differences=draw(20, OBJECTIVES, seed=4).double(),
        objectives=NAMES,
    )


def test_a_gate_that_looks_at_the_prompt_is_not_warned_of():
    assert diagnosed(make_gate(temperature=5.0)).warnings == []


def test_a_collapsed_gate_is_warned_of_with_its_objective():
    gate = make_gate(temperature=5.0)
    with torch.no_grad():
        gate.output.bias[:, 1] += 40.0
    found = diagnosed(gate)
    assert found.effective_mean < 1.5
    assert any("collapsed" in w and "on 'a'" in w for w in found.warnings)


def test_a_gate_that_is_sharp_but_on_another_objective_for_each_prompt_has_not_collapsed():
    found = diagnosed(make_gate(temperature=0.01, members=1))
    assert found.effective < 1.5 < found.effective_mean
    assert found.warnings == []


def test_a_gate_that_does_not_look_at_the_prompt_is_warned_of():
    gate = make_gate()
    gate.start_from(weights=torch.full((MEMBERS, OBJECTIVES), 0.2), prompts=draw(9, DIM))
    found = diagnosed(gate)
    assert found.prompt_share == pytest.approx(0.0, abs=1e-6)
    assert max(found.spread.values()) == pytest.approx(0.0, abs=1e-6)
    assert found.entropy == pytest.approx(math.log(3), rel=1e-5)
    (warning,) = found.warnings
    assert "hardly looks at the prompt" in warning


def test_a_single_objective_leaves_nothing_to_warn_of():
    assert diagnosed(make_gate(mixed=(1,))).warnings == []
