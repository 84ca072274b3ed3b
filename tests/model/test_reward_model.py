import dataclasses
import math

import pytest
import torch
from conftest import conversation, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from armo.data.conversation import Message
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.embed.backbone import Backbone
from armo.embed.boundary import PromptGroup
from armo.embed.spec import BackboneError
from armo.fit.decorrelation import RewardTransform
from armo.fit.gating import GatingNetwork
from armo.fit.heads import ObjectiveHeads
from armo.model.reward_model import ArmoRewardModel

FIELDS = ("score", "rewards", "adjusted", "gating_weights", "contributions")
MEASURED = ("bold", "log_length", "questions")
"""Covariates of a model that needs the text, in an order of their own."""

CONVERSATIONS = [
    conversation("How do I boil an egg?", "Put it in hot water for seven minutes."),
    conversation("How do I boil an egg?", "No."),
    conversation("Name three dogs.", "- one\n- two\n- **three**"),
    conversation("Is this safe? " * 30, "It warns of risks, and says what it cannot know. " * 20),
    [
        {"role": "system", "content": "Be honest."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        *conversation("The quick brown fox?", "It jumps over the lazy dog."),
    ],
]


@pytest.fixture(
    scope="module",
    params=[("encoder", ()), ("causal", ()), ("encoder", MEASURED)],
    ids=["encoder", "causal", "measuring"],
)
def model(request):
    backbone, covariates = request.param
    return make_model(request.getfixturevalue(backbone), covariates=covariates)


@pytest.fixture(scope="module")
def out(model):
    return model.score(CONVERSATIONS)


def assert_same(first, second, **tolerance):
    for name in FIELDS:
        torch.testing.assert_close(getattr(first, name), getattr(second, name), **tolerance)


def embed_alone(backbone, messages):
    """Prompt and response embedding of one conversation, in a batch of its own."""
    turns = tuple(Message(**message) for message in messages)
    embedded = backbone.embed([PromptGroup(turns[:-1], (turns[-1].content,))])
    return embedded.prompts.values[0].double(), embedded.responses.values[0].double()


def gate_slowly(gate, prompt):
    total = torch.zeros(gate.objectives, dtype=torch.float64)
    for member in range(gate.members):
        hidden = (prompt - gate.mean) / gate.scale
        for layer in gate.hidden:
            hidden = (layer.weight[member] @ hidden + layer.bias[member]).clamp(min=0)
        logits = gate.output.weight[member] @ hidden + gate.output.bias[member]
        powers = [math.exp(float(logit) / gate.temperature) for logit in logits]
        for column, power in zip(gate.mixed.tolist(), powers, strict=True):
            total[column] += power / sum(powers) / gate.members
    return total


def measure(text, name):
    return float(surface_features([text])[0, SURFACE_FEATURES.index(name)])


def adjust_slowly(model, messages):
    """Adjusted rewards, one product at a time."""
    _, response = embed_alone(model.backbone, messages)
    adjusted = []
    for k in range(len(model.objectives.names)):
        value = model.adjusted_offset[k] + sum(
            a * h for a, h in zip(model.adjusted_weights[k], response, strict=True)
        )
        for name, coefficient in zip(model.covariates, model.adjusted_style[k], strict=True):
            value = value + coefficient * measure(messages[-1]["content"], name)
        adjusted.append(value)
    return torch.stack(adjusted)


def test_scores_are_those_of_the_formula_written_the_slow_way(model, out):
    for row, messages in enumerate(CONVERSATIONS):
        prompt, _ = embed_alone(model.backbone, messages)
        weights = gate_slowly(model.gate, prompt)
        adjusted = adjust_slowly(model, messages)
        score = sum(float(g * a) for g, a in zip(weights, adjusted, strict=True))
        torch.testing.assert_close(out.gating_weights[row], weights, atol=1e-5, rtol=0)
        torch.testing.assert_close(out.adjusted[row], adjusted, atol=1e-5, rtol=0)
        assert float(out.score[row]) == pytest.approx(score, abs=1e-5)


def test_a_skipped_transform_would_give_other_scores(out):
    skipped = (out.gating_weights * out.rewards).sum(1)
    assert bool(((out.score - skipped).abs() > 0.01).all())


def test_rewards_stay_raw(model, out):
    for row, messages in enumerate(CONVERSATIONS):
        _, response = embed_alone(model.backbone, messages)
        raw = model.head_weights @ response + model.head_intercepts
        torch.testing.assert_close(out.rewards[row], raw, atol=1e-5, rtol=0)


def test_the_transform_is_applied_from_the_left_where_it_is_square(causal):
    count = causal.dim
    generator = torch.Generator().manual_seed(1)
    names = tuple(f"objective {k}" for k in range(count))
    matrix = torch.randn(count, count, generator=generator, dtype=torch.float64)
    nothing = torch.zeros(count, dtype=torch.float64)
    square = ArmoRewardModel(
        objectives=ObjectiveSet(tuple(Objective(name, 0, 1) for name in names)),
        backbone=causal,
        heads=ObjectiveHeads(names, 2 * matrix, nothing),
        transform=RewardTransform(names, matrix, nothing, (), matrix[:, :0], matrix[:2, :0]),
        gate=GatingNetwork(dim=count, objectives=count, mixed=range(count)),
        beta=1.0,
    )
    h = torch.randn(3, count, generator=generator, dtype=torch.float64)
    out = square.score_embeddings(h, h)
    for row in range(3):
        torch.testing.assert_close(out.adjusted[row], matrix @ h[row])
        torch.testing.assert_close(out.rewards[row], 2 * matrix @ h[row])
        assert not torch.allclose(out.adjusted[row], matrix.T @ h[row])


def test_contributions_sum_to_the_score(out):
    torch.testing.assert_close(out.contributions.sum(1), out.score, atol=1e-9, rtol=0)
    torch.testing.assert_close(out.gating_weights * out.adjusted, out.contributions)


def test_gating_weights_lie_on_the_simplex_of_the_mixed_objectives(model, out):
    assert bool((out.gating_weights >= 0).all())
    torch.testing.assert_close(out.gating_weights.sum(1), torch.ones(len(out.score)).double())
    assert not bool(out.gating_weights[:, model.objectives.bias_indices].any())


def test_responses_to_one_prompt_share_their_gating_weights_and_prompts_do_not(out):
    assert torch.equal(out.gating_weights[0], out.gating_weights[1])
    assert not torch.allclose(out.gating_weights[0], out.gating_weights[2], atol=1e-3)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_no_conversations_is_refused(model, batch_size):
    with pytest.raises(ValueError, match=f"`batch_size` must be at least 1, got {batch_size}"):
        model.score(CONVERSATIONS, batch_size=batch_size)


def test_scores_do_not_depend_on_the_batch_size(model, out):
    alone = model.score(CONVERSATIONS, batch_size=1)
    assert_same(alone, model.score(CONVERSATIONS, batch_size=64), atol=1e-5, rtol=0)
    assert_same(alone, out, atol=1e-5, rtol=0)


def test_scores_follow_their_conversations_in_any_order(model, out):
    order = [3, 1, 4, 0, 2]
    shuffled = model.score([CONVERSATIONS[k] for k in order])
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(shuffled, name), getattr(out, name)[order], atol=1e-5, rtol=0
        )


def test_no_conversations_give_no_scores(model):
    assert model.score([]).contributions.shape == (0, 5)


def test_messages_may_be_objects_as_well_as_dicts(model, out):
    turns = [[Message(**message) for message in messages] for messages in CONVERSATIONS]
    assert_same(model.score(turns), out, atol=0, rtol=0)


def test_rewards_on_the_rating_scale_follow_each_declared_scale(model, out):
    rated = model.score(CONVERSATIONS, scale="rating")
    for k, objective in enumerate(model.objectives.objectives):
        for unit, rating in zip(out.rewards[:, k], rated.rewards[:, k], strict=True):
            share = float(unit) if objective.higher_is_better else 1 - float(unit)
            expected = objective.low + share * (objective.high - objective.low)
            assert float(rating) == pytest.approx(expected)
    for name in ("score", "adjusted", "gating_weights", "contributions"):
        assert torch.equal(getattr(rated, name), getattr(out, name))


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=2))
def test_given_weights_replace_those_of_the_gate_and_are_normalised(encoder, given):
    model = make_model(encoder)
    h = torch.randn(4, encoder.dim, generator=torch.Generator().manual_seed(0))
    mixed = model.score_embeddings(h, h, weights=dict(zip(("honesty", "harm"), given, strict=True)))
    expected = torch.tensor([0, *given, 0, 0], dtype=torch.float64) / sum(given)
    torch.testing.assert_close(mixed.gating_weights, expected.expand(4, -1))
    torch.testing.assert_close(mixed.score, mixed.adjusted @ expected)


def test_given_weights_reach_the_score_of_text(model, out):
    mixed = model.score(CONVERSATIONS, weights={"honesty": 2, "verbosity": 2})
    torch.testing.assert_close(mixed.score, (out.adjusted[:, 1] + out.adjusted[:, 3]) / 2)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"charm": 1.0}, "Unknown objective 'charm'; there are helpfulness"),
        ({"honesty": 2.0, "harm": -1.0}, "must not be negative"),
        ({"honesty": 0.0}, "not all zero"),
        ({}, "not all zero"),
        ({"honesty": math.nan}, "`weights`"),
        ({"honesty": math.inf}, "`weights`"),
        ({"honesty": "2"}, "`weights` must be numbers by objective"),
        ({"honesty": None}, "`weights` must be numbers by objective"),
        ([2.0], "`weights` must be numbers by objective"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_weights_that_make_no_mix_are_refused(model, weights, message):
    with pytest.raises(ValueError, match=message):
        model.score(CONVERSATIONS, weights=weights)


def test_score_responses_is_score_with_the_prompt_repeated(model):
    responses = ["Yes.", "No, and here is why.", "- one\n- two"]
    together = model.score_responses("Is it safe?", responses)
    apart = model.score([conversation("Is it safe?", response) for response in responses])
    assert_same(together, apart, atol=0, rtol=0)


def test_a_text_prompt_is_one_user_turn(model):
    text = model.score_responses("Hello", ["Hi!"])
    turn = model.score_responses([{"role": "user", "content": "Hello"}], ["Hi!"])
    assert_same(text, turn, atol=0, rtol=0)


def test_the_reasons_of_a_comparison_sum_to_its_score_difference(model):
    out = model.score_responses("Is it safe?", ["Yes.", "No, it warns of risks!"])
    comparison = model.compare("Is it safe?", "Yes.", "No, it warns of risks!")
    difference = float(out.score[0] - out.score[1])
    assert comparison.score_difference == pytest.approx(difference, abs=1e-9)
    assert sum(comparison.reasons.values()) == pytest.approx(difference, abs=1e-9)
    for k, name in enumerate(model.objectives.names):
        expected = float(out.contributions[0, k] - out.contributions[1, k])
        assert comparison.reasons[name] == pytest.approx(expected, abs=1e-9)
    sizes = [abs(reason) for reason in comparison.reasons.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[1] > 0


def test_the_probability_of_a_comparison_is_the_sigmoid_of_the_scaled_difference(model):
    comparison = model.compare("Is it safe?", "Yes.", "No, it warns of risks!")
    scaled = float(model.beta) * comparison.score_difference
    assert float(model.beta) == 2.0
    assert comparison.probability == pytest.approx(1 / (1 + math.exp(-scaled)))


def test_swapping_the_responses_of_a_comparison_negates_it(model):
    forth = model.compare("Is it safe?", "Yes.", "No, it warns of risks!")
    back = model.compare("Is it safe?", "No, it warns of risks!", "Yes.")
    assert back.score_difference == pytest.approx(-forth.score_difference, abs=1e-9)
    assert back.probability == pytest.approx(1 - forth.probability)
    for name, reason in forth.reasons.items():
        assert back.reasons[name] == pytest.approx(-reason, abs=1e-9)


def test_a_reason_of_zero_has_no_sign(model):
    out = model.score_responses("Is it safe?", ["Yes.", "No, it warns of risks!"])
    out.contributions[0, 3:], out.contributions[1, 3:] = -0.0, 0.0
    reasons = model.compare_rows(out, 0, 1).reasons
    assert [f"{reasons[name]:+}" for name in ("verbosity", "formatting")] == ["+0.0"] * 2


def standardised(backbone, *, leaking=(), links=()):
    """A model whose adjusted rewards are its own rewards on another scale, but where they leak."""
    made = make_model(backbone, links=links)
    made.adjusted_weights.copy_(torch.tensor([0.5, 2.0, 4.0, 1.0, 1.0])[:, None])
    made.adjusted_weights.mul_(made.head_weights)
    for k in leaking:
        made.adjusted_weights[k] += 0.01 * made.head_weights[3]
    return made


PAIR = ("Is it safe?", "Yes.", "No, it warns of risks!")


def test_each_change_alone_makes_a_comparison_a_tie(model):
    comparison = model.compare(*PAIR)
    out = model.score_responses(PAIR[0], PAIR[1:])
    loser = int(out.score.argmin())
    assert {*comparison.changes} == {"helpfulness", "honesty", "harm"}
    assert [*comparison.changes.values()] == sorted(comparison.changes.values())
    assert min(comparison.changes.values()) > 0
    for name, change in comparison.changes.items():
        adjusted = out.adjusted[loser].clone()
        adjusted[model.objectives.index(name)] += change
        tie = float(out.gating_weights[loser] @ adjusted)
        assert tie == pytest.approx(float(out.score.max()), abs=1e-9)


@pytest.mark.parametrize("swapped", [False, True])
def test_each_rating_change_alone_makes_a_comparison_a_tie(causal, swapped):
    model = standardised(causal)
    prompt, *responses = PAIR
    if swapped:
        responses = responses[::-1]
    comparison = model.compare(prompt, *responses)
    out = model.score_responses(prompt, responses, scale="rating")
    loser = int(out.score.argmin())
    assert {*comparison.rating_changes} == {"helpfulness", "honesty", "harm"}
    for name, change in comparison.rating_changes.items():
        k = model.objectives.index(name)
        objective = model.objectives.objectives[k]
        unit = lambda rating, o=objective: (  # noqa: E731  (`to_unit` refuses what is off the scale)
            (rating - o.low) / (o.high - o.low)
            if o.higher_is_better
            else (o.high - rating) / (o.high - o.low)
        )
        rating = float(out.rewards[loser, k])
        ratio = float(model.adjusted_weights[k, 0] / model.head_weights[k, 0])
        adjusted = out.adjusted[loser].clone()
        adjusted[k] += ratio * (unit(rating + change) - unit(rating))
        tie = float(out.gating_weights[loser] @ adjusted)
        assert tie == pytest.approx(float(out.score.max()), abs=1e-6)
        assert (change > 0) == objective.higher_is_better


def test_there_is_no_rating_change_where_others_leak_in_or_the_reward_is_a_probability(causal):
    links = ("identity", "logistic", "identity", "identity", "identity")
    comparison = standardised(causal, leaking=(0,), links=links).compare(*PAIR)
    assert {*comparison.changes} == {"helpfulness", "honesty", "harm"}
    assert {*comparison.rating_changes} == {"harm"}
    backwards = standardised(causal)
    backwards.adjusted_weights.neg_()
    assert backwards.compare(*PAIR).rating_changes == {}


def test_equal_responses_need_no_change_and_a_skipped_one_has_none(model):
    assert {*model.compare("Hi", "Yes.", "Yes.").changes.values()} == {0.0}
    skipping = with_spec(model, on_overlong="skip")
    assert skipping.compare("Hi", "Yes.", LONG).changes == {}
    assert skipping.compare("Hi", LONG, "Yes.").changes == {}


def test_rows_that_are_scored_already_compare_alike(model, out):
    expected = model.compare(
        "How do I boil an egg?", *(CONVERSATIONS[k][-1]["content"] for k in (1, 0))
    )
    found = model.compare_rows(out, 1, 0)
    for name, change in expected.changes.items():
        assert found.changes[name] == pytest.approx(change, rel=1e-3)
    assert found.score_difference == pytest.approx(expected.score_difference, abs=1e-4)
    with pytest.raises(ValueError, match="rows 0 and 2 have other gating weights"):
        model.compare_rows(out, 0, 2)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (conversation("Hi", "  "), "conversation 1: `response` is empty"),
        (conversation("", "Hello"), "conversation 1: the prompt has no user turn"),
        (conversation("Hi", "Hello")[:1], "conversation 1: the last message must be"),
        ([], "conversation 1: the last message must be"),
        ([{"role": "robot", "content": "Hi"}], "conversation 1: role 'robot'"),
        ([{"role": "user"}], "conversation 1: message 0 needs `role` and `content`"),
        ([{"role": "user", "content": 7}], "conversation 1: message 0: `content` must be text"),
        (conversation("Hi", "Hello")[1:], "conversation 1: .*no user turn"),
    ],
)
def test_a_conversation_that_cannot_be_scored_is_named(model, messages, message):
    with pytest.raises(ValueError, match=message):
        model.score([CONVERSATIONS[0], messages])


def test_an_empty_response_among_several_is_refused(model):
    with pytest.raises(ValueError, match="`response` is empty"):
        model.score_responses("Hi", ["Hello", ""])


def transform_of(model, names):
    return RewardTransform(
        names,
        model.adjusted_weights,
        model.adjusted_offset,
        model.covariates,
        model.adjusted_style,
        model.covariate_range,
    )


def test_parts_with_other_objectives_do_not_join(model, encoder):
    parts = make_model(encoder)
    names = parts.objectives.names[::-1]
    with pytest.raises(ValueError, match="The parts have other objectives"):
        ArmoRewardModel(
            objectives=parts.objectives,
            backbone=encoder,
            heads=ObjectiveHeads(names, parts.head_weights, parts.head_intercepts),
            transform=transform_of(parts, names),
            gate=parts.gate,
            beta=1.0,
        )


def test_heads_of_another_width_do_not_join(encoder, causal):
    parts = make_model(encoder)
    names = parts.objectives.names
    with pytest.raises(ValueError, match="embeddings of width 32, the backbone gives 16"):
        ArmoRewardModel(
            objectives=parts.objectives,
            backbone=causal,
            heads=ObjectiveHeads(names, parts.head_weights, parts.head_intercepts),
            transform=transform_of(parts, names),
            gate=parts.gate,
            beta=1.0,
        )


def test_one_text_in_place_of_a_list_of_responses_is_refused(model):
    with pytest.raises(ValueError, match="`responses` must be a list of texts"):
        model.score_responses("Hi", "Yes.")


@pytest.mark.usefixtures("no_type_checks")
def test_a_flat_list_of_messages_is_no_list_of_conversations(model):
    with pytest.raises(ValueError, match="conversation 0: must be a list of messages"):
        model.score(conversation("Hi", "Yes."))


LONG = "word " * 500


def test_a_conversation_that_was_cut_is_said_to_be_and_marked(model, caplog):
    conversations = [
        conversation("Hi", LONG),
        conversation("Hi", "Yes."),
        conversation("Hi " * 200, "Yes."),
        conversation("Hi", "No."),
    ]
    out = model.score(conversations)
    assert out.truncated.tolist() == [True, False, True, False]
    assert bool(out.score.isfinite().all())
    assert "2 of 4 conversations are longer than the backbone reads: cut" in caplog.text
    assert "skipped" not in caplog.text


def test_nothing_is_marked_where_nothing_was_cut(model, caplog):
    out = model.score_responses("Is it safe?", ["Yes.", "No."])
    assert out.truncated.dtype == torch.bool
    assert out.truncated.tolist() == [False, False]
    assert not caplog.text


def with_spec(model, **changes):
    """The same model on a backbone that reads in another way."""
    spec = dataclasses.replace(model.backbone.spec, **changes)
    return make_model(
        Backbone(spec, model=model.backbone.model, tokenizer=model.backbone.tokenizer),
        covariates=model.covariates,
    )


SKIPPED = [
    conversation("Is it safe?", "Yes."),
    conversation("Is it safe?", LONG),
    conversation(LONG, "Yes."),
    conversation("Is it safe?", "No."),
]


def test_a_skipped_conversation_has_nan_everywhere_and_the_others_their_scores(model, caplog):
    out = with_spec(model, on_overlong="skip").score(SKIPPED)
    for name in FIELDS:
        values = getattr(out, name)
        assert bool(values[[1, 2]].isnan().all()), name
        assert bool(values[[0, 3]].isfinite().all()), name
    assert out.truncated.tolist() == [False] * 4
    assert "2 of 4 conversations are longer than the backbone reads: skipped" in caplog.text
    plain = model.score([SKIPPED[0], SKIPPED[3]])
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(out, name)[[0, 3]], getattr(plain, name), atol=1e-5, rtol=0
        )


def test_a_skipped_conversation_has_no_score_under_given_weights_either(model):
    out = with_spec(model, on_overlong="skip").score(SKIPPED, weights={"honesty": 1.0})
    assert out.score.isnan().tolist() == [False, True, True, False]


def test_a_comparison_with_a_skipped_response_has_no_probability(model):
    comparison = with_spec(model, on_overlong="skip").compare("Is it safe?", "Yes.", LONG)
    assert math.isnan(comparison.probability)


def test_a_conversation_that_is_too_long_is_named_by_its_number(model):
    strict = with_spec(model, on_overlong="error")
    with pytest.raises(BackboneError, match=r"^conversation 1: the response has \d+ tokens"):
        strict.score(SKIPPED)
    with pytest.raises(BackboneError, match=r"^conversation 2: the prompt has \d+ tokens"):
        strict.score([SKIPPED[0], SKIPPED[0], SKIPPED[2], SKIPPED[2]])
    with pytest.raises(BackboneError, match=r"^conversation 1: the response has \d+ tokens"):
        strict.score_responses("Is it safe?", ["Yes.", LONG])


def test_a_conversation_of_a_later_chunk_is_named_by_its_number(model, monkeypatch):
    monkeypatch.setattr("armo.model.conversations.CHUNK_ROWS", 2)
    conversations = [conversation(f"Is {k} safe?", "Yes.") for k in range(7)]
    with pytest.raises(BackboneError, match=r"^conversation 7: the response has"):
        with_spec(model, on_overlong="error").score([*conversations, SKIPPED[1], SKIPPED[0]])


def test_conversations_that_come_twice_are_run_once_and_score_alike(model, monkeypatch):
    planned = []
    plan = model.backbone.planner.plan
    monkeypatch.setattr(
        model.backbone.planner,
        "plan",
        lambda groups, **how: planned.extend(groups) or plan(groups, **how),
    )
    order = [0, 1, 0, 2, 1, 0, 4, 2]
    out = model.score([CONVERSATIONS[k] for k in order])
    assert len(planned) == 3
    assert sum(len(group.responses) for group in planned) == 4
    plain = model.score(CONVERSATIONS)
    for name in FIELDS:
        values = getattr(out, name)
        assert torch.equal(values[[0, 1, 3]], values[[5, 4, 7]])
        torch.testing.assert_close(values, getattr(plain, name)[order], atol=1e-5, rtol=0)


@settings(max_examples=10)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_any_order_of_prompts_and_responses_is_kept(encoder, numbers):
    model = make_model(encoder)
    responses = ("Yes.", "No.", "- one\n- two", "It warns.")
    texts = [(f"Is {prompt} safe?", responses[response]) for prompt, response in numbers]
    out = model.score([conversation(*text) for text in texts])
    for text, score in zip(texts, out.score, strict=True):
        alone = model.score([conversation(*text)])
        assert float(score) == pytest.approx(float(alone.score), abs=1e-5)


@pytest.mark.parametrize("chunk_rows", [1, 2, 3])
def test_scores_do_not_depend_on_the_chunks(model, out, monkeypatch, chunk_rows):
    monkeypatch.setattr("armo.model.conversations.CHUNK_ROWS", chunk_rows)
    assert_same(model.score(CONVERSATIONS), out, atol=1e-5, rtol=0)
    assert model.score([]).truncated.shape == (0,)


def embeddings_of(model, count, *, seed=0):
    return torch.randn(count, model.backbone.dim, generator=torch.Generator().manual_seed(seed))


def test_what_is_measured_on_the_text_moves_the_adjusted_rewards_by_its_coefficients(encoder):
    model = make_model(encoder, covariates=MEASURED)
    h = embeddings_of(model, 1).expand(2, -1)
    texts = ["Yes, seven minutes.", "**Yes**, **seven** minutes?"]
    out = model.score_embeddings(h, h, texts=texts)
    moved = torch.tensor([measure(texts[1], name) - measure(texts[0], name) for name in MEASURED])
    assert moved.tolist() == [2.0, 0.0, 1.0]
    expected = model.adjusted_style @ moved.double()
    torch.testing.assert_close(out.adjusted[1] - out.adjusted[0], expected)
    difference = float(out.gating_weights[0] @ expected)
    assert float(out.score[1] - out.score[0]) == pytest.approx(difference)
    assert abs(difference) > 0.1
    assert torch.equal(out.rewards[0], out.rewards[1]), "rewards stay raw"


def test_beyond_its_range_a_covariate_may_cost_but_does_not_pay(encoder):
    model = make_model(encoder, covariates=("bold",))
    model.covariate_range.copy_(torch.tensor([[1.0], [3.0]]))
    h = embeddings_of(model, 1).expand(6, -1)
    texts = ["**b** " * bold + "words" for bold in (0, 1, 2, 3, 4, 50)]
    adjusted = model.score_embeddings(h, h, texts=texts).adjusted
    slope = model.adjusted_style[:, 0]
    assert bool((slope > 0.0).any())
    assert bool((slope < 0.0).any())
    for row, (paid, costs) in enumerate(((0, 1), (1, 1), (2, 2), (3, 3), (3, 4), (3, 50))):
        counted = torch.where(slope > 0.0, paid, costs) - torch.where(slope > 0.0, 0, 1)
        torch.testing.assert_close(adjusted[row] - adjusted[0], slope * counted)


def test_a_model_without_covariates_does_not_look_at_texts(encoder):
    model = make_model(encoder)
    h = embeddings_of(model, 2)
    plain = model.score_embeddings(h, h)
    assert_same(model.score_embeddings(h, h, texts=["**One**", "two"]), plain, atol=0, rtol=0)


@pytest.mark.parametrize("texts", [None, [], ["Yes."], ["Yes.", "No.", "Perhaps."]])
def test_a_model_that_measures_texts_names_what_it_needs(encoder, texts):
    model = make_model(encoder, covariates=MEASURED)
    h = embeddings_of(model, 2)
    with pytest.raises(
        ValueError, match=r"`texts` must be the 2 responses .* bold, log_length, questions"
    ):
        model.score_embeddings(h, h, texts=texts)


def test_texts_are_measured_whole_even_where_the_backbone_cuts_them(encoder):
    model = make_model(encoder, covariates=("bold",))
    cut = [conversation("Hi", LONG), conversation("Hi", LONG + "**at the end**")]
    out = model.score(cut)
    assert out.truncated.tolist() == [True, True]
    torch.testing.assert_close(out.rewards[0], out.rewards[1])
    torch.testing.assert_close(
        out.adjusted[1] - out.adjusted[0], model.adjusted_style[:, 0], atol=1e-5, rtol=0
    )


def test_a_caller_may_weigh_a_model_that_measures_texts(encoder):
    model = make_model(encoder, covariates=MEASURED)
    out = model.score(CONVERSATIONS, weights={"honesty": 1.0})
    torch.testing.assert_close(out.score, out.adjusted[:, 1])
