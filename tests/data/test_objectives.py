import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import MinMaxScaler

from armo.data.objectives import Objective, ObjectiveSet

finite = st.floats(-1e6, 1e6)


@st.composite
def objectives(draw):
    low, span = draw(finite), draw(st.floats(1e-2, 1e6))
    return Objective("honesty", low, low + span, higher_is_better=draw(st.booleans()))


def make_set():
    return ObjectiveSet(
        (
            Objective("honesty", 1, 5, group="quality", meaning="no false claims"),
            Objective("verbosity", 0, 4, bias=True),
            Objective("harm", 0, 10, higher_is_better=False),
        )
    )


@given(objectives(), st.floats(0, 1))
def test_a_rating_survives_the_round_trip_through_the_unit_scale(objective, share):
    rating = min(objective.high, objective.low + share * (objective.high - objective.low))
    unit = objective.to_unit(rating)
    assert 0.0 <= unit <= 1.0
    assert math.isclose(objective.from_unit(unit), rating, rel_tol=1e-9, abs_tol=1e-6)


@given(objectives(), st.lists(st.floats(0, 1), min_size=1))
def test_to_unit_agrees_with_scikit_learns_min_max_scaler(objective, shares):
    span = objective.high - objective.low
    ratings = np.minimum(objective.high, objective.low + span * np.array(shares))
    scaler = MinMaxScaler().fit([[objective.low], [objective.high]])
    expected = scaler.transform(ratings[:, None])[:, 0]
    if not objective.higher_is_better:
        expected = 1 - expected
    got = [objective.to_unit(float(rating)) for rating in ratings]
    # The scaler subtracts after it divides, so it loses digits on a narrow scale far from zero.
    np.testing.assert_allclose(got, expected, atol=1e-6)


@given(objectives())
def test_the_good_end_of_the_scale_is_one_and_the_bad_end_zero(objective):
    good, bad = objective.high, objective.low
    if not objective.higher_is_better:
        good, bad = bad, good
    assert objective.to_unit(good) == 1.0
    assert objective.to_unit(bad) == 0.0


def test_an_objective_where_lower_is_better_is_turned_round():
    harm = Objective("harm", 0, 10, higher_is_better=False)
    assert harm.to_unit(2) == 0.8
    assert harm.from_unit(0.8) == pytest.approx(2)
    assert harm.scale == (10, -10)


@given(objectives(), st.floats(0, 1))
def test_scale_is_the_affine_map_of_from_unit(objective, unit):
    offset, slope = objective.scale
    assert objective.from_unit(unit) == offset + slope * unit


@pytest.mark.parametrize("rating", [0.99, 5.01, -3.0, math.nan, math.inf, -math.inf])
def test_a_rating_outside_the_scale_is_an_error(rating):
    with pytest.raises(ValueError, match="of 'honesty' is outside its scale 1 to 5"):
        Objective("honesty", 1, 5).to_unit(rating)


@pytest.mark.parametrize(
    ("low", "high"), [(5, 1), (1, 1), (math.nan, 1), (0, math.inf), (-math.inf, 0)]
)
def test_a_scale_needs_a_finite_low_end_below_a_finite_high_end(low, high):
    with pytest.raises(ValueError, match="'honesty'"):
        Objective("honesty", low, high)


def test_an_objective_needs_a_name():
    with pytest.raises(ValueError, match="`name`"):
        Objective("", 0, 1)


def test_objectives_keep_their_declared_order():
    declared = make_set()
    assert declared.names == ("honesty", "verbosity", "harm")
    assert [declared.index(name) for name in declared.names] == [0, 1, 2]
    assert declared.bias_indices == (1,)
    assert declared.mixed_indices == (0, 2)


def test_objectives_survive_the_round_trip_through_json():
    declared = make_set()
    assert ObjectiveSet.from_dicts(json.loads(json.dumps(declared.to_dicts()))) == declared


def test_objectives_are_built_from_a_mapping_as_configuration_spells_it():
    declared = make_set()
    mapping = {fields.pop("name"): fields for fields in declared.to_dicts()}
    assert ObjectiveSet.from_mapping(mapping) == declared


def test_objectives_declared_twice_are_named():
    with pytest.raises(ValueError, match=r"declared twice: honesty\."):
        ObjectiveSet(
            (Objective("honesty", 1, 5), Objective("safety", 1, 5), Objective("honesty", 0, 1))
        )


def test_a_set_needs_an_objective():
    with pytest.raises(ValueError, match="At least one objective is needed"):
        ObjectiveSet(())


def test_a_set_of_bias_objectives_alone_makes_no_score():
    with pytest.raises(ValueError, match="`bias: false`"):
        ObjectiveSet((Objective("verbosity", 0, 4, bias=True),))


def test_an_unknown_objective_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'humour'; there are honesty, verbosity, harm\."):
        make_set().index("humour")


@given(
    st.dictionaries(
        st.sampled_from(["honesty", "verbosity", "harm"]), st.floats(0.0, 1e6), min_size=1
    )
)
def test_a_mix_is_the_weights_over_their_sum_in_column_order(weights):
    declared = make_set()
    total = sum(weights.values())
    if total <= 0.0:
        with pytest.raises(ValueError, match="not all zero"):
            declared.mix(weights)
        return
    expected = [weights.get(name, 0.0) / total for name in declared.names]
    assert declared.mix(weights) == pytest.approx(expected)
    assert sum(declared.mix(weights)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"honesty": 0.0},
        {"honesty": 2.0, "harm": -1.0},
        {"honesty": math.nan},
        {"honesty": 1.0, "harm": math.nan},
        {"honesty": math.inf},
        {"honesty": 1e308, "harm": 1e308},
    ],
)
def test_weights_that_make_no_mix_are_shown(weights):
    with pytest.raises(ValueError, match="`weights` must not be negative") as caught:
        make_set().mix(weights)
    assert str(weights) in str(caught.value)


def test_a_mix_of_an_unknown_objective_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'humour'; there are honesty, verbosity, harm\."):
        make_set().mix({"honesty": 1.0, "humour": 1.0})
