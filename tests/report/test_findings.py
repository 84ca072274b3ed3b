import pytest
from sample_tables import FEW, MANY, ONE

from armo.report.bias import RIGHT
from armo.report.drawing import MINUS
from armo.report.findings import summarize
from armo.report.tables import Evaluation, Table

STANDING = ("model", "overall", "low", "high", "ahead of a by", "from", "to", "p")


def say(*tables):
    return [text for _, text in summarize(Evaluation(tables))]


def standings(*rows):
    [text] = say(Table("x_models", "X: models", STANDING, rows))
    return text


FIRST = ("a", 0.8, 0.75, 0.85, None, None, None, None)
RANDOM = ("random", 0.5, 0.45, 0.55, -0.3, -0.35, -0.25, 0.0005)


def test_the_best_model_is_named_with_its_lead_over_the_first():
    second = ("b", 0.9, 0.88, 0.92, 0.1, 0.05, 0.15, 0.001)
    assert standings(FIRST, second, RANDOM) == (
        "X: b is best of 2 models with 0.900 [0.880, 0.920], 0.100 ahead of a (p = 0.001). "
        "The best null baseline, random, gets 0.500."
    )


def test_the_first_model_s_lead_is_that_over_the_second_best():
    second = ("b", 0.7, 0.65, 0.75, -0.1, -0.15, -0.05, 0.001)
    third = ("c", 0.75, 0.7, 0.8, -0.05, -0.12, 0.02, 0.2)
    assert standings(FIRST, second, third) == (
        "X: a is best of 3 models with 0.800 [0.750, 0.850], 0.050 ahead of c "
        "(p = 0.2, not more than chance would give)."
    )


def test_models_that_do_not_beat_a_null_baseline_are_named():
    length = ("longer", 0.78, 0.7, 0.8, -0.02, -0.05, 0.02, 0.3)
    second = ("b", 0.85, 0.79, 0.92, 0.05, 0.01, 0.15, 0.01)
    text = standings(FIRST, second, RANDOM, length)
    assert text.endswith("longer, gets 0.780; a is not clearly better than that.")
    worse = ("b", 0.7, 0.6, 0.8, -0.1, -0.15, -0.01, 0.01)
    assert standings(FIRST, worse, length).endswith("a and b are not clearly better than that.")


def test_one_model_is_not_called_the_best():
    assert standings(FIRST) == "X: a scores 0.800 [0.750, 0.850]."


def test_who_loses_least_from_easy_to_hard_is_said():
    columns = ("subset", "cases", "a", "b", "longer")
    rows = (("easy", 9, 0.9, 0.8, 0.6), ("hard", 9, 0.5, 0.6, 0.6))
    assert say(Table("rm_bench", "RM-Bench: scores", columns, rows)) == [
        "RM-Bench: b loses least to style, from 0.800 on easy to 0.600 on hard pairs."
    ]
    assert say(Table("x", "X", columns, rows[:1])) == []


def test_only_clear_biases_count():
    columns = ("pattern", "pairs", "a", "a low", "a high", "b", "b low", "b high")
    rows = (
        ("bold", 9, 0.6, 0.55, 0.65, 0.52, 0.45, 0.55),
        ("lists", 9, 0.3, 0.2, 0.4, 0.48, 0.45, 0.55),
        ("emoji", 9, 0.9, 0.4, 1.0, None, None, None),
    )
    assert say(Table("bias_probes", "B", columns, rows)) == [
        "Bias probes: a is biased on 2 of 3 patterns, most on lists (wins 30%); "
        "b shows no clear bias."
    ]


def test_of_many_models_the_ends_are_told():
    texts = dict(summarize(MANY))
    assert texts["bias_probes"].count(" biased on ") == 2
    assert max(map(len, texts.values())) < 330


def test_the_model_with_the_least_correlation_with_length_is_named():
    assert dict(summarize(FEW))["length_bias"] == (
        "Length: scores of armorm-llama3-8b correlate +0.01 with length within prompts, the least "
        "of 3 models."
    )
    assert "least" not in dict(summarize(ONE))["length_bias"]


def test_what_is_right_is_no_model_that_follows_length():
    table = Table("length_bias", "L", ("model", "r"), (("a", 0.2), (RIGHT, 0.05)))
    assert say(table) == [
        "Length: scores of a correlate +0.20 with length within prompts; what is right correlates "
        "+0.05."
    ]


@pytest.mark.parametrize(
    ("gain", "p_value", "told"),
    [
        (-0.1, 0.04, "0.100 ahead of b (p = 0.04)"),
        (-0.1, 0.5, "0.100 ahead of b (p = 0.5, not more than chance would give)"),
        (-0.1, None, "0.100 ahead of b (not more than chance would give)"),
        (0.0, 1.0, "a is best of 2 models with 0.800 [0.700, 0.900], as has b."),
    ],
)
def test_a_lead_is_told_with_its_evidence(gain, p_value, told):
    columns = ("model", "overall", "low", "high", "ahead of a by", "from", "to", "p")
    first = ("a", 0.8, 0.7, 0.9, None, None, None, None)
    rows = (first, ("b", 0.8 + gain, 0.6, 0.8, gain, -0.2, -0.01 if gain else 0.2, p_value))
    assert told in say(Table("x_models", "X: overall", columns, rows))[0]


def test_a_few_pairs_show_no_bias():
    columns = ("pattern", "pairs", "a", "a low", "a high")
    for pairs, told in ((5, "no clear bias"), (6, "biased on 1 of 1")):
        rows = (("bold", pairs, 1.0, 1.0, 1.0),)
        assert told in say(Table("bias_probes", "B", columns, rows))[0]


@pytest.mark.parametrize("most", [0.02, 0.04])
def test_a_calibration_error_is_held_against_chance(most):
    columns = ("model", "pairs", "error", "low", "high", "if calibrated", "at most")
    rows = (("a", 9, 0.03, 0.02, 0.05, 0.01, most), ("b", 9, 0.05, 0.02, 0.06, 0.01, most))
    [text] = say(Table("calibration", "C", columns, rows))
    assert text.startswith("Calibration: preference probabilities of a are off least, by 0.030 [")
    assert ("no more than" in text) == (most == 0.04)


def test_what_abstention_gains_is_that_of_one_model():
    columns = ("model", "coverage", "accuracy", "low", "high")
    rows = (("a", 100, 0.7, 0.6, 0.8), ("b", 100, 0.75, 0.7, 0.8), ("a", 50, 0.9, 0.8, 0.95))
    assert say(Table("abstention", "A", columns, (*rows, ("b", 50, 0.8, 0.7, 0.9)))) == [
        "Abstention: answering the clearest half of the pairs only, a is right on 0.900 of them "
        "instead of 0.700."
    ]


def test_the_sizes_of_correlations_are_averaged():
    columns = ("model", "objective", "other", "rewards", "adjusted")
    rows = (("m", "a", "b", 0.5, 0.1), ("m", "a", "c", -0.7, -0.3), ("m", "a", "a", 1.0, 1.0))
    assert say(Table("correlations", "C", columns, rows)) == [
        "Objectives: by the reward transform the mean size of their correlations goes for m from "
        "0.60 to 0.20."
    ]


def test_different_heaviest_objectives_are_counted():
    columns = ("model", "kind", "prompts", "objective", "weight")
    rows = [("m", "code", 9, "a", 0.7), ("m", "code", 9, "b", 0.3), ("n", "code", 9, "a", 1.0)]
    rows += [
        ("m", "advice", 9, "a", 0.2),
        ("m", "advice", 9, "b", 0.8),
        ("n", "advice", 9, "a", 1.0),
    ]
    assert say(Table("weights_by_kind", "W", columns, tuple(rows))) == [
        "Weights, over 2 kinds of prompt: m weighs 2 different objectives most; n weighs a most "
        "everywhere."
    ]


def test_the_training_report_names_the_best_rival_and_what_style_is_left():
    rivals = Table(
        "rivals",
        "R",
        ("score", "accuracy", "low", "high"),
        (("gated score", 0.8, 0.7, 0.9), ("length only", 0.5, 0.4, 0.6), ("probe", 0.7, 0.6, 0.8)),
    )
    columns = ("of", "with", "within, before", "within, after", "across, before", "across, after")
    rows = (("score", "log_length", 0.4, 0.05, 0.0, 0.0), ("score", "bold", 0.1, -0.2, 0.0, 0.0))
    assert say(rivals, Table("style", "S", columns, rows)) == [
        "The gated score is right on 0.800 [0.700, 0.900] of the test pairs; the best of its "
        "rivals, “probe”, on 0.700.",
        "Style: the score's correlation with log_length within prompts goes from +0.40 to +0.05 "
        f"by decorrelation; the largest then left is {MINUS}0.20, with bold.",
    ]


@pytest.mark.parametrize("evaluation", [ONE, FEW, MANY])
def test_every_sentence_is_one_and_belongs_to_a_table_of_the_page(evaluation):
    found = summarize(evaluation)
    assert len(found) >= 9
    names = [table.name for table in evaluation.tables]
    assert [names.index(name) for name, _ in found] == sorted(names.index(n) for n, _ in found)
    for _, text in found:
        assert text.endswith(".")
        assert "None" not in text
        assert "nan" not in text


def test_a_lead_without_a_p_value_is_said_to_have_none():
    second = ("b", 0.9, None, None, 0.1, None, None, None)
    assert "0.100 ahead of a (not more than chance would give)" in standings(FIRST, second, RANDOM)
