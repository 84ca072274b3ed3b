"""The gating network: weights on the simplex over the mixed objectives, from the prompt alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armo.fit.gating import GatingNetwork, contributions

DIM, OBJECTIVES, MIXED = 6, 5, (3, 0, 1)
BIAS = [2, 4]


def make_gate(*, seed=0, **changes):
    """A gate in evaluation mode with random tensors, none of them at its starting point."""
    arguments = {"dim": DIM, "objectives": OBJECTIVES, "mixed": MIXED, "hidden_dim": 7}
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
def slow_weights(gate, prompt):
    """The documented formula for one prompt, written out."""
    hidden = (prompt - gate.mean) / gate.scale
    for layer in gate.hidden:
        hidden = (layer.weight @ hidden + layer.bias).clamp(min=0.0)
    logits = (gate.constant + gate.output.weight @ hidden) / gate.temperature
    exponents = [float(torch.exp(logit)) for logit in logits]
    weights = [0.0] * gate.objectives
    for column, exponent in zip(gate.mixed.tolist(), exponents, strict=True):
        weights[column] = exponent / sum(exponents)
    return torch.tensor(weights)


@given(
    batch=st.lists(st.integers(1, 4), max_size=2),
    layers=st.integers(0, 2),
    temperature=st.sampled_from([0.5, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_weights_lie_on_the_simplex_of_the_mixed_objectives(batch, layers, temperature, seed):
    gate = make_gate(seed=seed, hidden_layers=layers, temperature=temperature)
    weights = gate(draw(*batch, DIM, seed=seed))
    assert weights.shape == (*batch, OBJECTIVES)
    assert (weights >= 0).all()
    assert (weights[..., BIAS] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(batch))


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_every_prompt_gets_the_weights_of_the_formula_whatever_its_batch(layers):
    gate = make_gate(hidden_layers=layers, temperature=2.0)
    prompts = draw(2, 3, DIM)
    together = gate(prompts)
    for i in range(2):
        for j in range(3):
            expected = slow_weights(gate, prompts[i, j])
            torch.testing.assert_close(together[i, j], expected)
            torch.testing.assert_close(gate(prompts[i])[j], expected)
            torch.testing.assert_close(gate(prompts[i, j]), expected)


def test_weights_differ_between_prompts():
    weights = make_gate(temperature=10.0)(draw(2, DIM))
    assert (weights[0] - weights[1]).abs().max() > 0.01


def test_half_precision_prompts_get_single_precision_weights():
    prompts = draw(4, DIM).bfloat16()
    weights = make_gate()(prompts)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, make_gate()(prompts.float()))


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_a_gate_starts_at_the_constant_mix_for_every_prompt(temperature):
    gate = GatingNetwork(
        dim=DIM, objectives=OBJECTIVES, mixed=MIXED, temperature=temperature
    ).eval()
    mix = torch.tensor([0.2, 0.7, 0.0, 0.1, 0.0], dtype=torch.float64)
    gate.start_from(weights=mix, prompts=draw(20, DIM))
    torch.testing.assert_close(gate(100.0 * draw(8, DIM, seed=1)), mix.float().expand(8, -1))


def test_starting_standardises_the_prompts_it_is_given():
    gate = make_gate()
    prompts = 5.0 + 3.0 * draw(50, DIM)
    gate.start_from(weights=torch.full((OBJECTIVES,), 0.2), prompts=prompts)
    inputs = (prompts - gate.mean) / gate.scale
    torch.testing.assert_close(inputs.mean(0), torch.zeros(DIM), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std(0), torch.ones(DIM), atol=0.02, rtol=0)


@pytest.mark.parametrize("rows", [1, 3])
def test_starting_from_equal_prompts_keeps_the_weights_finite(rows):
    gate = make_gate()
    gate.start_from(weights=torch.full((OBJECTIVES,), 0.2), prompts=draw(1, DIM).expand(rows, -1))
    assert gate(draw(1, DIM)).isfinite().all()


def test_the_gradient_reaches_every_layer_once_the_output_layer_is_not_zero():
    torch.manual_seed(0)
    gate = GatingNetwork(
        dim=DIM, objectives=OBJECTIVES, mixed=MIXED, hidden_layers=2, hidden_dim=16, dropout=0.0
    )

    def reached():
        gate.zero_grad()
        gate(draw(10, DIM))[:, 0].sum().backward()
        return {name: bool(p.grad.abs().max() > 0) for name, p in gate.named_parameters()}

    start = reached()
    assert start.pop("output.weight")
    assert start.pop("constant")
    assert not any(start.values())
    torch.nn.init.normal_(gate.output.weight)
    assert all(reached().values())


def test_the_order_of_mixed_only_says_which_column_a_logit_goes_to():
    gate = make_gate()
    order = [2, 0, 1]
    permuted = make_gate(mixed=[MIXED[i] for i in order])
    permuted.load_state_dict(gate.state_dict() | {"mixed": permuted.mixed})
    with torch.no_grad():
        permuted.constant.copy_(gate.constant[order])
        permuted.output.weight.copy_(gate.output.weight[order])
    prompts = draw(4, DIM)
    torch.testing.assert_close(permuted(prompts), gate(prompts))


def test_other_mixed_columns_receive_the_same_weights():
    gate, moved = make_gate(), make_gate(mixed=(4, 2, 0))
    prompts = draw(4, DIM)
    torch.testing.assert_close(moved(prompts)[:, [4, 2, 0]], gate(prompts)[:, list(MIXED)])


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_shape_and_tensors_rebuild_the_network(layers):
    gate = make_gate(hidden_layers=layers, dropout=0.25, temperature=3.0)
    again = GatingNetwork(**gate.shape).eval()
    again.load_state_dict(gate.state_dict(), strict=True)
    assert again.shape == gate.shape
    assert torch.equal(again(draw(4, DIM)), gate(draw(4, DIM)))


def test_dropout_acts_in_training_only():
    gate, prompts = make_gate(dropout=0.5), draw(4, DIM)
    assert torch.equal(gate(prompts), gate(prompts))
    gate.train()
    torch.manual_seed(0)
    assert not torch.equal(gate(prompts), gate(prompts))


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
        ({"temperature": 0.0}, "`temperature` and `hidden_dim` must be positive"),
        ({"hidden_dim": 0}, "`temperature` and `hidden_dim` must be positive"),
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
