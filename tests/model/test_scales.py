"""Scales of rewards, their ranges and directions, and thresholds on them."""

import json
import math

import pytest
import torch
from conftest import conversation, make_model
from safetensors.torch import load_file, save_file

from armo.artifacts import ArtifactError, digest_file
from armo.fit.heads import ObjectiveHeads, RewardUncertainty
from armo.model.pretrained import folder_seal
from armo.model.reward_model import ArmoRewardModel

CONVERSATIONS = [
    conversation("How do I boil an egg?", "Put it in hot water for seven minutes."),
    conversation("How do I boil an egg?", "No."),
    conversation("Name three dogs.", "- one\n- two\n- **three**"),
]


@pytest.fixture(scope="module")
def scored(encoder):
    model: ArmoRewardModel = make_model(encoder)
    return model, {s: model.score(CONVERSATIONS, scale=s) for s in ("raw", "rating", "standard")}


def test_each_scale_says_its_ranges_and_directions(scored):
    _, out = scored
    assert out["raw"].ranges == ((0.0, 1.0),) * 5
    assert out["rating"].ranges == ((1, 5), (1, 5), (0, 10), (0, 4), (0, 4))
    assert out["standard"].ranges == ((-math.inf, math.inf),) * 5
    assert out["raw"].higher_is_better == out["standard"].higher_is_better == (True,) * 5
    assert out["rating"].higher_is_better == (True, True, False, True, True)


def test_standard_rewards_are_the_adjusted_ones_and_scores_are_the_same_on_all(scored):
    _, out = scored
    assert torch.equal(out["standard"].rewards, out["raw"].adjusted)
    for name in ("score", "adjusted", "gating_weights", "contributions"):
        for scale in ("rating", "standard"):
            assert torch.equal(getattr(out[scale], name), getattr(out["raw"], name))


def test_an_end_of_the_raw_scale_is_an_end_of_the_ratings(scored):
    _, out = scored
    for k, ((low, high), up) in enumerate(
        zip(out["rating"].ranges, out["rating"].higher_is_better, strict=True)
    ):
        raw = out["raw"].rewards[:, k]
        share = raw if up else 1 - raw
        torch.testing.assert_close(out["rating"].rewards[:, k], low + share * (high - low))


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("scale", ["unit", "", None])
def test_an_unknown_scale_is_refused(scored, scale):
    with pytest.raises(ValueError, match="`scale` must be raw or rating or standard"):
        scored[0].score(CONVERSATIONS, scale=scale)


@pytest.mark.parametrize("scale", ["raw", "rating", "standard"])
@pytest.mark.parametrize("name", ["honesty", "harm"])
def test_a_response_passes_where_its_reward_is_as_good_as_the_threshold(scored, scale, name):
    model, out = scored
    k = model.objectives.index(name)
    rewards = out[scale].rewards[:, k]
    up = out[scale].higher_is_better[k]
    for limit in rewards.tolist():
        found = model.score(CONVERSATIONS, scale=scale, thresholds={name: limit}).passes
        assert torch.equal(found, rewards >= limit if up else rewards <= limit)
        assert bool(found.any())
    assert model.score(CONVERSATIONS, scale=scale).passes.tolist() == [True] * 3


def test_all_thresholds_must_be_passed(scored):
    model, out = scored
    middle = {
        name: float(out["raw"].rewards[:, k].median())
        for k, name in enumerate(model.objectives.names[:2])
    }
    alone = [model.score(CONVERSATIONS, thresholds={n: v}).passes for n, v in middle.items()]
    both = model.score(CONVERSATIONS, thresholds=middle).passes
    assert torch.equal(both, alone[0] & alone[1])
    turns, texts = CONVERSATIONS[0][:1], [c[-1]["content"] for c in CONVERSATIONS[:2]]
    assert torch.equal(model.score_responses(turns, texts, thresholds=middle).passes, both[:2])


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"charm": 0.5}, "Unknown objective 'charm'"),
        ({"honesty": math.nan}, "`thresholds` must be finite"),
        ({"honesty": math.inf}, "`thresholds` must be finite"),
        ({"honesty": "0.5"}, "`thresholds` must be numbers by objective"),
        ({"honesty": None}, "`thresholds` must be numbers by objective"),
        ([0.5], "`thresholds` must be numbers by objective"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_thresholds_that_say_nothing_are_refused(scored, thresholds, message):
    with pytest.raises(ValueError, match=message):
        scored[0].score(CONVERSATIONS, thresholds=thresholds)


def known(model, *, factors=2):
    """Random uncertainty of the first four objectives; the last one has none."""
    dim = model.backbone.dim
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(factors, dim, dim, generator=generator)).Q
    heads = ObjectiveHeads(model.objectives.names, model.head_weights, model.head_intercepts)
    return RewardUncertainty(
        heads=heads,
        vectors=basis,
        values=torch.rand(factors, dim, generator=generator).double(),
        centres=torch.randn(factors, dim, generator=generator).double(),
        shares=torch.tensor([0.1, 0.2]).double(),
        factor_of=torch.tensor([0, 1, 0, 1, -1]),
        alphas=torch.arange(1, 6).double(),
        sigmas=torch.tensor([0.1, 0.2, 0.3, 0.4, torch.nan]).double(),
        quantiles=torch.full((5,), 2.0).double(),
        miscoverage=0.1,
    )


def with_uncertainty(encoder):
    model = make_model(encoder)
    model.uncertainty = known(model)
    return model


def test_uncertainty_is_that_of_the_heads_on_the_scale_of_the_rewards(encoder):
    model = with_uncertainty(encoder)
    h = torch.randn(3, encoder.dim, generator=torch.Generator().manual_seed(1))
    out = model.score_embeddings(h, h)
    expected = model.uncertainty.deviations(h.double())
    torch.testing.assert_close(out.uncertainty, expected, equal_nan=True)
    raw, rating, standard = (
        model.score(CONVERSATIONS, scale=scale) for scale in ("raw", "rating", "standard")
    )
    assert bool((raw.uncertainty[:, :4] > 0).all())
    assert bool(raw.uncertainty[:, 4].isnan().all())
    widths = torch.tensor([high - low for low, high in rating.ranges])
    torch.testing.assert_close(rating.uncertainty, raw.uncertainty * widths, equal_nan=True)
    assert bool(standard.uncertainty.isnan().all())
    assert bool(make_model(encoder).score(CONVERSATIONS).uncertainty.isnan().all())


def test_uncertainty_is_saved_loaded_and_guarded(encoder, tmp_path):
    model = with_uncertainty(encoder)
    model.save_pretrained(tmp_path / "one")
    loaded = ArmoRewardModel.from_pretrained(tmp_path / "one", device="cpu")
    expected = model.score(CONVERSATIONS).uncertainty
    found = loaded.score(CONVERSATIONS).uncertainty
    torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-6, rtol=0)
    loaded.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "uncertainty.safetensors").is_file()
    make_model(encoder).save_pretrained(tmp_path / "two")
    assert not (tmp_path / "two" / "uncertainty.safetensors").exists()
    file = tmp_path / "one" / "uncertainty.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"uncertainty\.safetensors: changed after"):
        ArmoRewardModel.from_pretrained(tmp_path / "one", device="cpu")
    file.unlink()
    with pytest.raises(ArtifactError, match=r"No such file: .*uncertainty\.safetensors"):
        ArmoRewardModel.from_pretrained(tmp_path / "one", device="cpu")


def _put(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name])})


WRONG = {
    "missing": (lambda tensors: tensors.pop("sigmas"), "missing sigmas"),
    "missing share": (lambda tensors: tensors.pop("miscoverage"), "missing miscoverage"),
    "unexpected": (lambda tensors: tensors.update(x=torch.ones(1)), "unexpected x"),
    "a factor too few": (_put("vectors", lambda t: t[:-1]), r"`vectors` .* needs .*\[2, 32, 32\]"),
    "an objective too few": (_put("factor_of", lambda t: t[:-1]), r"`factor_of` .*\[4\].*\[5\]"),
    "no axis": (_put("values", lambda t: t[0, 0]), r"`vectors` .* needs .*\[1, 32, 32\]"),
    "transposed": (_put("values", lambda t: t.T), r"`vectors` .* needs .*\[32, 32, 32\]"),
    "rounded": (_put("alphas", lambda t: t.half()), "`alphas` is of torch.float16"),
    "an unknown factor": (_put("factor_of", lambda t: t + 1), "`factor_of` must be -1 or one of 2"),
    "nan": (_put("vectors", lambda t: t / 0 * 0), "not finite: vectors"),
    "nan of a known objective": (_put("sigmas", lambda t: t.roll(1)), "not finite: sigmas"),
    "nan quantiles": (_put("quantiles", lambda t: t * torch.nan), "not finite: quantiles"),
    "no share": (_put("miscoverage", lambda t: t * 20), "`miscoverage` must be between 0 and 1"),
    "several shares": (_put("miscoverage", lambda t: t.repeat(2)), "uncertainty.safetensors: "),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.usefixtures("no_type_checks")
def test_uncertainty_of_other_shape_or_not_finite_is_refused(encoder, tmp_path, what):
    model = make_model(encoder)
    file = tmp_path / "uncertainty.safetensors"
    known(model).save(file)
    RewardUncertainty.load(file, heads=known(model).heads)
    damage, message = WRONG[what]
    tensors = load_file(file)
    damage(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    with pytest.raises(ArtifactError, match=message) as caught:
        RewardUncertainty.load(file, heads=known(model).heads)
    assert "\n" not in str(caught.value)


def test_uncertainty_of_other_heads_does_not_load_even_where_its_digest_is_right(encoder, tmp_path):
    model = with_uncertainty(encoder)
    model.save_pretrained(tmp_path)
    file, weights = tmp_path / "uncertainty.safetensors", tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["alphas"][0] = torch.nan
    save_file(tensors, file)
    config = json.loads((tmp_path / "config.json").read_text())
    config["files"][file.name] = digest_file(file)
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = load_file(weights)
    save_file(own, weights, metadata={"sha256": folder_seal(config, own)})
    with pytest.raises(ArtifactError, match=r"uncertainty\.safetensors: not finite: alphas"):
        ArmoRewardModel.from_pretrained(tmp_path, device="cpu")
