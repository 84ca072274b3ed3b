import copy
import gc
import itertools
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import apart, build
from torch import nn
from torch.nn import functional as F

from armo.embed import linear
from armo.embed.forward import Runner
from armo.embed.linear import PackedProducts
from armo.embed.plan import Plan, Span, TokenSequence

SAME = 1e-5
needs_onednn = pytest.mark.skipif(
    not PackedProducts().usable, reason="torch multiplies without oneDNN here, or not on x86-64"
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frozen(*shape, seed=1):
    return nn.Parameter(draw(*shape, seed=seed), requires_grad=False)


def layer_of(inputs=24, outputs=16, *, seed=1):
    layer = nn.Linear(inputs, outputs).requires_grad_(False)
    layer.weight.copy_(draw(outputs, inputs, seed=seed))
    layer.bias.copy_(draw(outputs, seed=seed + 1))
    return layer


def close(values, expected, within=SAME):
    assert values.shape == expected.shape
    assert values.dtype == expected.dtype
    difference = (values.double() - expected.double()).norm()
    return float(difference) <= within * float(expected.double().norm())


@pytest.fixture
def multiplied(monkeypatch):
    """The weights' sizes of all products that oneDNN made, in order."""
    if not PackedProducts().usable:
        pytest.skip("torch multiplies without oneDNN here, or not on x86-64")
    sizes, plain = [], torch.ops.mkldnn._linear_pointwise

    def multiply(input, layout, *rest):
        sizes.append(tuple(layout.shape))
        return plain(input, layout, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", multiply)
    return sizes


def products_by(products, multiply, *args, **kwargs):
    with products:
        return multiply(*args, **kwargs)


# The same product.


@st.composite
def shapes(draw):
    """A weight's shape, and that of an input: rows in up to three dimensions, maybe none."""
    outputs, inputs = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    rows = draw(st.lists(st.integers(0, 9), max_size=3))
    return outputs, inputs, tuple(rows)


def laid_out(tensor, layout):
    """The same numbers, in another order of memory."""
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "stepped":
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "offset":
        return torch.cat([tensor.new_ones(3), tensor.flatten()])[3:].view(tensor.shape)
    return tensor


LAYOUTS = st.sampled_from(["plain", "transposed", "stepped", "offset"])


@needs_onednn
@given(
    shape=shapes(),
    bias=st.booleans(),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    calls=st.integers(1, 3),
)
def test_the_product_is_torchs_whatever_the_shapes_and_strides(shape, bias, layouts, calls):
    outputs, inputs, rows = shape
    input = laid_out(draw(*rows, inputs, seed=0), layouts[0])
    weight = nn.Parameter(laid_out(draw(outputs, inputs, seed=1), layouts[1]), requires_grad=False)
    added = laid_out(draw(outputs, seed=2), layouts[2]) if bias else None
    products = PackedProducts()
    for _ in range(calls):
        values = products_by(products, F.linear, input, weight, added)
        assert close(values, F.linear(input, weight, added))
    if layouts[2] != "stepped":
        assert len(products._packed) == 1


@pytest.mark.parametrize("rows", [(), (1,), (7,), (0,), (3, 5), (1, 1), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_of_any_dimensions_are_multiplied_by_onednn(multiplied, rows, bias):
    layer, input = layer_of(), draw(*rows, 24)
    added = layer.bias if bias else None
    values = products_by(PackedProducts(), F.linear, input, layer.weight, added)
    assert multiplied == [(16, 24)]
    assert close(values, F.linear(input, layer.weight, added))
    # Measured so, another bias or another weight would be seen.
    if 0 not in rows:
        assert not close(values, F.linear(input, layer.weight, layer.bias + 0.01), 1e-4)
        assert not close(values, F.linear(input, layer.weight * 1.01, added), 1e-4)


def test_a_module_is_laid_out_once_and_multiplied_each_time(multiplied, monkeypatch):
    laid, plain = [], torch.ops.mkldnn._reorder_linear_weight

    def lay_out(weight, rows):
        laid.append(tuple(weight.shape))
        return plain(weight, rows)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lay_out)
    layers, products = nn.Sequential(layer_of(), layer_of(16, 8)), PackedProducts()
    for seed in range(3):
        input = draw(5, 24, seed=seed)
        assert close(products_by(products, layers, input), layers(input))
    assert laid == [(16, 24), (8, 16)]
    assert multiplied == 3 * laid


def test_the_result_is_an_ordinary_tensor():
    layer, input = layer_of(), draw(5, 24)
    values = products_by(PackedProducts(), layer, input)
    assert values.is_contiguous()
    assert values.layout == torch.strided
    assert not values.requires_grad
    assert values.add_(1).numpy().shape == (5, 16)


def test_weights_laid_out_in_inference_mode_serve_outside_of_it_and_the_other_way(multiplied):
    layer, input = layer_of(), draw(5, 24)
    expected = layer(input)
    for first in (True, False):
        products = PackedProducts()
        for mode in (first, not first):
            with torch.inference_mode(mode):
                assert close(products_by(products, layer, input), expected)
    assert len(multiplied) == 4


def test_a_processor_that_is_not_served_is_left_to_torch(multiplied):
    layer, input, products = layer_of(), draw(5, 24), PackedProducts()
    products.usable = False
    assert torch.equal(products_by(products, layer, input), layer(input))
    assert (multiplied, len(products._packed)) == ([], 0)


@pytest.mark.parametrize(
    ("machine", "available", "usable"),
    [
        ("AMD64", True, True),
        ("arm64", True, False),
        ("aarch64", True, False),
        ("x86_64", False, False),
    ],
)
@needs_onednn
def test_only_the_processors_that_were_measured_are_served(monkeypatch, machine, available, usable):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)
    assert PackedProducts().usable is usable


# What is torch's own.


@pytest.mark.parametrize("part", ["input", "weight", "bias"])
def test_where_a_gradient_is_asked_for_torch_multiplies(multiplied, part):
    gradients = []
    for products in (PackedProducts(), None):
        layer, input = layer_of(), draw(5, 24)
        operand = {"input": input, "weight": layer.weight, "bias": layer.bias}[part]
        operand.requires_grad_(True)
        values = products_by(products, layer, input) if products else layer(input)
        (values**2).sum().backward()
        gradients.append(operand.grad)
    assert multiplied == []
    assert gradients[0].norm() > 1
    assert torch.equal(*gradients)


def test_without_gradients_a_trainable_layer_is_served_too_and_trained_right(multiplied):
    layer, input, products = layer_of().requires_grad_(True), draw(5, 24), PackedProducts()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(3):
        with torch.no_grad():
            assert close(products_by(products, layer, input), layer(input))
        assert len(multiplied) == step + 1
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        (products_by(products, layer, input) ** 2).mean().backward()
        optimizer.step()
        assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_left_to_torch(multiplied, dtype):
    layer, input = layer_of().to(dtype), draw(5, 24).to(dtype)
    assert torch.equal(products_by(PackedProducts(), layer, input), layer(input))
    assert multiplied == []


@pytest.mark.parametrize("part", ["input", "weight", "bias"])
def test_operands_of_several_dtypes_are_refused_as_by_torch(multiplied, part):
    operands = {"input": draw(5, 24), "weight": frozen(16, 24), "bias": frozen(16)}
    operands[part].data = operands[part].double()
    with pytest.raises(RuntimeError) as plain:
        F.linear(*operands.values())
    with pytest.raises(RuntimeError) as packed:
        products_by(PackedProducts(), F.linear, *operands.values())
    assert str(packed.value) == str(plain.value)
    assert multiplied == []


def test_calls_by_name_are_left_to_torch(multiplied):
    layer, input = layer_of(), draw(5, 24)
    named = {"weight": layer.weight, "bias": layer.bias}
    values = products_by(PackedProducts(), F.linear, input, **named)
    assert torch.equal(values, layer(input))
    values = products_by(PackedProducts(), F.linear, input, layer.weight, bias=layer.bias)
    assert torch.equal(values, layer(input))
    assert multiplied == []


def test_weights_that_are_no_parameters_or_made_for_inference_are_left_to_torch(multiplied):
    input = draw(5, 24)
    with torch.inference_mode():
        layer = layer_of()
        assert layer.weight.is_inference()
    for weight in (draw(16, 24), layer.weight):
        with torch.inference_mode():
            values = products_by(PackedProducts(), F.linear, input, weight)
            assert torch.equal(values, F.linear(input, weight))
    assert multiplied == []


class Scaled(torch.Tensor):
    """A weight that stands for another one, as a quantised weight does."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [each.as_subclass(torch.Tensor) if isinstance(each, cls) else each for each in args]
        if func is F.linear:
            plain[1] = 3 * plain[1]
        return func(*plain, **(kwargs or {}))


def test_a_weight_that_multiplies_in_its_own_way_does_so(multiplied):
    weight = draw(16, 24).as_subclass(Scaled)
    weight._is_param = True
    assert isinstance(weight, nn.Parameter)
    input = draw(5, 24)
    expected = 3 * F.linear(input, draw(16, 24))
    assert close(products_by(PackedProducts(), F.linear, input, weight), expected)
    assert multiplied == []


def test_lower_precision_that_is_asked_for_is_given(multiplied):
    layer, input = layer_of(), draw(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        values = products_by(PackedProducts(), layer, input)
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, layer(input))
    assert multiplied == []


UNUSUAL = {
    "a bias of one number": ((5, 24), (16, 24), (1,)),
    "a bias for each row": ((5, 24), (16, 24), (5, 16)),
    "a weight of one dimension": ((5, 24), (24,), None),
    "no outputs": ((5, 24), (0, 24), (0,)),
    "no inputs": ((5, 0), (16, 0), (16,)),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_only_torch_can_multiply_it_does(case):
    input, weight, bias = UNUSUAL[case]
    operands = draw(*input), frozen(*weight), None if bias is None else frozen(*bias)
    values = products_by(PackedProducts(), F.linear, *operands)
    assert torch.equal(values, F.linear(*operands))


@pytest.mark.parametrize(
    ("operands", "match"),
    [
        ((draw(5, 23), frozen(16, 24)), "shapes cannot be multiplied"),
        ((draw(5, 24), frozen(16, 24), frozen(15)), "size"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_torchs_words(operands, match):
    with pytest.raises(RuntimeError, match=match) as plain:
        F.linear(*operands)
    with pytest.raises(RuntimeError, match=match) as packed:
        products_by(PackedProducts(), F.linear, *operands)
    assert str(packed.value) == str(plain.value)


def test_other_functions_are_as_without(multiplied):
    input, weight = draw(6, 6), frozen(6, 6)

    def compute():
        return [
            input @ weight.T,
            torch.addmm(weight, input, weight),
            F.bilinear(input, input, weight[None]),
            F.layer_norm(input, (6,), weight[0], weight[1]),
            F.embedding(torch.tensor([1, 4]), weight),
            F.scaled_dot_product_attention(input, input, weight),
            torch.cat([input, weight]).softmax(dim=-1),
            F.conv1d(input[None], weight[:, :, None]),
        ]

    for inside, outside in zip(products_by(PackedProducts(), compute), compute(), strict=True):
        assert torch.equal(inside, outside)
    assert multiplied == []


# A weight that has changed.

SEEDS = itertools.count(100)


def scale(weight):
    weight.mul_(2)


def scale_one(weight):
    weight[3, 4] += 50


def replace_by_copy(weight):
    weight.copy_(draw(*weight.shape, seed=next(SEEDS)))


def replace_data(weight):
    weight.data = draw(*weight.shape, seed=next(SEEDS))


def replace_data_twice(weight):
    """Let the old memory go, so that new memory can come to its address."""
    shape = weight.shape
    weight.data = torch.zeros(1)
    weight.data = draw(*shape, seed=next(SEEDS))


def transpose_data(weight):
    weight.data = weight.data.t()


def narrow_data(weight):
    weight.data = weight.data[:16]


def widen_data(weight):
    weight.data = draw(2 * weight.shape[0], weight.shape[1], seed=next(SEEDS))


def scale_through_detached(weight):
    weight.detach().mul_(2)


def scale_in_inference_mode(weight):
    with torch.inference_mode():
        weight.mul_(2)


CHANGES = [
    scale,
    scale_one,
    replace_by_copy,
    replace_data,
    replace_data_twice,
    transpose_data,
    narrow_data,
    widen_data,
    scale_through_detached,
    scale_in_inference_mode,
]


@needs_onednn
@pytest.mark.parametrize("size", [8, 32, 64, 256])
@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_was_changed_is_laid_out_anew(change, size):
    # Many at once: where memory comes back is chance.
    weights = [frozen(size, size, seed=seed) for seed in range(10)]
    input, products = draw(3, size), PackedProducts()
    for _ in range(2):
        before = [products_by(products, F.linear, input, weight) for weight in weights]
        assert len(products._packed) == len(weights)
        for weight, old in zip(weights, before, strict=True):
            change(weight)
            expected = F.linear(input, weight)
            values = products_by(products, F.linear, input, weight)
            assert close(values, expected)
            if change is not narrow_data:
                assert old.shape != values.shape or not close(old, expected, 1e-3)


@needs_onednn
def test_a_state_that_is_loaded_counts_from_then_on():
    for assign in (False, True):
        layer, products = layer_of(), PackedProducts()
        input = draw(5, 24)
        products_by(products, layer, input)
        state = layer_of(seed=7).state_dict()
        layer.load_state_dict(state, assign=assign)
        layer.requires_grad_(False)
        assert close(products_by(products, layer, input), layer_of(seed=7)(input))
        assert len(products._packed) == 1


@needs_onednn
@pytest.mark.parametrize("size", [8, 64, 192, 400])
def test_a_module_that_was_half_for_a_while_has_its_rounded_weights(size):
    module = nn.Sequential(*(layer_of(size, size, seed=seed) for seed in range(6)))
    for layer in module:
        layer.weight.mul_(size**-0.5)
        layer.weight[:, : size // 2] *= 1e-7  # which is next to nothing, or nothing, in half
    input, products = draw(5, size), PackedProducts()
    before = products_by(products, module, input)
    for cast in (lambda: module.half().float(), lambda: module.bfloat16().float()):
        cast()
        for layer in module:
            layer.weight.data.mul_(2)  # makes it far from what it was; no version counts this
        assert close(products_by(products, module, input), module(input))
        assert not close(before, module(input), 1e-2)


@needs_onednn
def test_a_parameter_that_is_replaced_is_not_taken_for_the_old_one():
    layer, input, products = layer_of(64, 64), draw(5, 64), PackedProducts()
    for seed in range(20):
        layer.weight = frozen(64, 64, seed=seed)
        values = products_by(products, layer, input)
        assert close(values, F.linear(input, frozen(64, 64, seed=seed), layer.bias))


# Copies.


@needs_onednn
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))]
)
def test_a_copy_lays_out_weights_of_its_own(copied):
    layer, input, products = layer_of(), draw(5, 24), PackedProducts()
    products_by(products, layer, input)
    other = copied(products)
    assert type(other) is PackedProducts
    assert len(other._packed) == 0
    assert len(products._packed) == 1
    assert close(products_by(other, layer, input), layer(input))
    assert len(other._packed) == 1


@needs_onednn
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_module_that_was_run_and_its_copy_go_their_own_ways(copied):
    layer, input, products = layer_of(), draw(5, 24), PackedProducts()
    first = products_by(products, layer, input)
    other = copied(layer)
    other.weight.mul_(2)
    assert close(products_by(products, other, input), other(input))
    assert close(products_by(products, layer, input), first)
    layer, products = copied((layer, products))
    assert close(products_by(products, layer, input), first)


def test_a_module_is_saved_as_if_it_had_not_been_run(tmp_path):
    layer, other = layer_of(), layer_of()
    products_by(PackedProducts(), layer, draw(5, 24))
    saved = []
    for each in (layer, other):
        torch.save(each.state_dict(), tmp_path / "state.pt")
        saved.append((tmp_path / "state.pt").read_bytes())
    assert saved[0] == saved[1]


# How much is laid out.


def test_weights_are_laid_out_up_to_the_limit_and_the_others_are_torchs(multiplied, monkeypatch):
    layers = [layer_of(10, 10, seed=seed) for seed in range(4)]
    monkeypatch.setattr(linear, "PACKED_BYTES", 3 * 400 - 1)
    input, products = draw(5, 10), PackedProducts()
    for times in (1, 2):
        for layer in layers:
            assert close(products_by(products, layer, input), layer(input))
        assert len(products._packed) == 2
        assert len(multiplied) == 2 * times
    monkeypatch.setattr(linear, "PACKED_BYTES", 3 * 400)
    for layer in layers:
        products_by(products, layer, input)
    assert len(products._packed) == 3


def test_a_weight_that_just_fits_is_laid_out_and_a_larger_one_is_not(multiplied, monkeypatch):
    monkeypatch.setattr(linear, "PACKED_BYTES", 400)
    products = PackedProducts()
    for outputs, served in ((11, False), (10, True), (1, False)):
        multiplied.clear()
        products_by(products, F.linear, draw(5, 10), kept := frozen(outputs, 10))
        assert bool(multiplied) == served
        if served:
            fits = kept
    assert products._packed
    assert close(products_by(products, F.linear, draw(5, 10), fits), F.linear(draw(5, 10), fits))


@pytest.mark.parametrize("change", [scale, replace_data, replace_data_twice])
def test_a_weight_that_was_changed_counts_once(multiplied, monkeypatch, change):
    monkeypatch.setattr(linear, "PACKED_BYTES", 2 * 400)
    weights, input, products = [frozen(10, 10), frozen(10, 10)], draw(5, 10), PackedProducts()
    for times in range(1, 5):
        for weight in weights:
            products_by(products, F.linear, input, weight)
            change(weight)
        assert len(multiplied) == 2 * times


def test_a_weight_of_another_size_counts_with_that_one(multiplied, monkeypatch):
    monkeypatch.setattr(linear, "PACKED_BYTES", 2 * 400)
    grown, other, late = frozen(10, 10), frozen(5, 10), frozen(5, 10)
    input, products = draw(5, 10), PackedProducts()
    for weight in (grown, other):
        products_by(products, F.linear, input, weight)
    grown.data = draw(15, 10)
    products_by(products, F.linear, input, grown)
    assert multiplied == [(10, 10), (5, 10), (15, 10)]
    products_by(products, F.linear, input, late)
    assert len(multiplied) == 3
    grown.data = draw(10, 10)
    products_by(products, F.linear, input, grown)
    products_by(products, F.linear, input, late)
    assert multiplied[3:] == [(10, 10), (5, 10)]


def test_a_weight_that_is_gone_takes_no_room(multiplied, monkeypatch):
    monkeypatch.setattr(linear, "PACKED_BYTES", 400)
    layer, input, products = layer_of(10, 10), draw(5, 10), PackedProducts()
    for times in range(1, 4):
        products_by(products, layer, input)
        assert len(multiplied) == times
        gone = weakref.ref(layer.weight)
        layer.weight = frozen(10, 10, seed=times)
        gc.collect()
        assert gone() is None


def test_a_weight_that_was_too_large_is_multiplied_right_after_a_change(multiplied, monkeypatch):
    weight, input, products = frozen(10, 10), draw(5, 10), PackedProducts()
    products_by(products, F.linear, input, weight)
    monkeypatch.setattr(linear, "PACKED_BYTES", 399)
    weight.mul_(2)
    assert close(products_by(products, F.linear, input, weight), F.linear(input, weight))
    assert len(multiplied) == 1
    assert len(products._packed) == 0


def test_a_weight_of_two_modules_is_laid_out_once(multiplied, monkeypatch):
    monkeypatch.setattr(linear, "PACKED_BYTES", 400)
    first, second = layer_of(10, 10), layer_of(10, 10, seed=5)
    second.weight = first.weight
    input, products = draw(5, 10), PackedProducts()
    for _ in range(2):
        assert close(products_by(products, first, input), first(input))
        assert close(products_by(products, second, input), second(input))
        first.weight.mul_(2)
    assert len(multiplied) == 4
    assert len(products._packed) == 1


# While it is active, and only then.


def test_it_is_active_only_inside_even_after_an_error(multiplied):
    layer, input, products = layer_of(), draw(5, 24), PackedProducts()
    products_by(products, layer, input)
    with pytest.raises(ZeroDivisionError), products:
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="shapes"), products:
        layer(draw(5, 23))
    assert len(multiplied) == 1
    layer(input)
    assert len(multiplied) == 1
    products_by(products, layer, input)
    assert len(multiplied) == 2


def test_modes_in_one_another_give_the_same_and_end_one_by_one(multiplied):
    layer, input = layer_of(), draw(5, 24)
    expected, outer, inner = layer(input), PackedProducts(), PackedProducts()
    with outer:
        with inner:
            assert close(layer(input), expected)
        assert (len(outer._packed), len(inner._packed)) == (0, 1)
        with inner, outer:
            assert close(layer(input), expected)
        assert (len(outer._packed), len(inner._packed)) == (1, 1)
        multiplied.clear()
        assert close(layer(input), expected)
        assert len(multiplied) == 1
    assert torch.equal(layer(input), expected)
    assert len(multiplied) == 1


def test_what_a_mode_leaves_alone_comes_to_the_one_around_it(multiplied):
    layer, input, outer, inner = layer_of(), draw(5, 24), PackedProducts(), PackedProducts()
    inner.usable = False
    expected = layer(input)
    with outer, inner:
        assert close(layer(input), expected)
    assert multiplied
    assert (len(outer._packed), len(inner._packed)) == (1, 0)


def test_another_thread_is_as_it_was(multiplied):
    layer, input = layer_of(), draw(5, 24)
    with PackedProducts():
        thread = threading.Thread(target=layer, args=(input,))
        thread.start()
        thread.join()
    assert multiplied == []


def test_threads_can_share_it():
    layer, products = layer_of(64, 64), PackedProducts()
    wrong = []

    def work(seed):
        input = draw(5, 64, seed=seed)
        expected = layer(input)
        for _ in range(50):
            if not close(products_by(products, layer, input), expected):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# A whole model.


def plan_of(rows):
    sequences = [
        TokenSequence(ids, (Span(target, 0, len(ids)),)) for target, ids in enumerate(rows)
    ]
    return Plan(len(rows), 0, sequences=sequences)


def run(runner, plan, *, usable):
    runner.products.usable = usable
    return runner.run(plan)


@needs_onednn
@pytest.mark.parametrize("kind", ["llama", "gemma2", "bert"])
@pytest.mark.parametrize("layers", [(-1,), (0, 1, 2)])
def test_a_whole_model_gives_the_same_with_and_without(kind, layers):
    model = build(kind)
    runner = Runner(model, layers=layers, batch_tokens=64, decoder=kind != "bert")
    plan = plan_of([list(range(5, 5 + length)) for length in (40, 9, 23, 1, 30)])
    packed, plain = (run(runner, plan, usable=usable) for usable in (True, False))
    assert apart(packed, plain) < SAME
    served = [m for m in model.modules() if isinstance(m, nn.Linear)]
    # BERT's pooler is run, too, though its result is not asked for.
    assert len(runner.products._packed) == len(served) > 10
    # The weights are the model's own: another one is seen at once.
    next(iter(served)).weight.mul_(1.5)
    packed, changed = (run(runner, plan, usable=usable) for usable in (True, False))
    assert apart(packed, changed) < SAME
    assert apart(changed, plain) > 1e-3


@needs_onednn
def test_a_runner_is_copied_with_its_model():
    runner = Runner(build("llama"), layers=(-1,), batch_tokens=64, decoder=True)
    plan = plan_of([list(range(5, 25))])
    expected = runner.run(plan)
    for other in (copy.deepcopy(runner), pickle.loads(pickle.dumps(runner))):
        assert other.model is not runner.model
        for layer in other.model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(2)
        assert apart(other.run(plan), expected) > 1e-3
        assert apart(runner.run(plan), expected) < SAME


@needs_onednn
def test_an_error_in_the_model_leaves_nothing_active(multiplied):
    runner = Runner(build("llama"), layers=(-1,), batch_tokens=64, decoder=True)
    with pytest.raises(IndexError):
        runner.run(plan_of([[5, 6, 10_000]]))
    multiplied.clear()
    layer_of()(draw(5, 24))
    assert multiplied == []


# In a process of its own: how much is kept is read on first use.
OF_MANY_SIZES = """
import ctypes
from armo.embed.linear import PackedProducts
import torch

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

allocated = ctypes.CDLL(None).mallinfo2
allocated.restype = Info
products, weight = PackedProducts(), torch.nn.Parameter(torch.zeros(64, 64), requires_grad=False)

def multiply(sizes):
    with torch.inference_mode(), products:
        for size in sizes:
            torch.nn.functional.linear(torch.zeros(size, 64), weight)
    return allocated().h

before = multiply(range(1, 65))
print(multiply(range(65, 300)) - before)
"""


@needs_onednn
@pytest.mark.skipif(sys.platform != "linux", reason="it asks glibc what is allocated")
def test_batches_of_many_sizes_leave_no_memory_behind():
    done = subprocess.run(
        [sys.executable, "-c", OF_MANY_SIZES], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2**24  # torch alone keeps four times as much
