import re
from dataclasses import replace

import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st

from armo.artifacts import ArtifactError
from armo.data.conversation import Conversation, Message, PreferencePair, RatedResponse
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.sources import ScorableRow
from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.embed.backbone import Backbone
from armo.embed.boundary import PromptGroup
from armo.embed.extract import Team, embed_rows
from armo.embed.spec import BackboneError
from armo.report import explain
from armo.report.explain import TrainingPrompts, explain_pairs, read_texts_again
from armo.report.explain_page import explanation_page, plot_waterfall, plot_weights
from armo.report.plots import PLOTTED
from armo.report.tables import Table

MEASURED = ("bold", "log_length", "questions")
NAME = "<script>alert('&')</script>"


def user(text):
    return (Message("user", text),)


ROWS = [
    ScorableRow("egg", user("How do I boil an egg?"), ("In **hot** water?", "No."), single=False),
    ScorableRow("dogs", user("Name three dogs."), ("- one", "The quick fox jumps"), single=False),
    ScorableRow(NAME, user(NAME), (f"Yes {NAME}", "No."), single=False),
]


@pytest.fixture(scope="module", params=[("encoder", MEASURED), ("causal", ())])
def model(request):
    backbone, covariates = request.param
    return make_model(request.getfixturevalue(backbone), covariates=covariates)


@pytest.fixture(scope="module")
def explained(model):
    return list(explain_pairs(model, ROWS))


def test_an_explanation_is_what_compare_and_score_say(model, explained):
    assert [each.id for each in explained] == [row.id for row in ROWS]
    for row, each in zip(ROWS, explained, strict=True):
        prompt = [{"role": "user", "content": row.prompt[0].content}]
        out = model.score_responses(prompt, row.responses)
        comparison = model.compare(prompt, *row.responses)
        difference = pytest.approx(comparison.score_difference, abs=1e-4)
        assert each.comparison.score_difference == difference
        table = each.objectives
        assert table.column("sum so far")[-1] == difference
        differences = table.column("difference")
        sizes = [abs(d) for d in differences]
        assert sizes == sorted(sizes, reverse=True)
        for n in range(len(differences)):
            assert table.column("sum so far")[n] == pytest.approx(sum(differences[: n + 1]))
        for cells in table.rows:
            k = model.objectives.index(cells[0])
            expected = [
                out.gating_weights[0, k],
                *out.rewards[:, k],
                *out.adjusted[:, k],
                out.contributions[0, k] - out.contributions[1, k],
            ]
            assert cells[1:7] == pytest.approx([float(x) for x in expected], abs=1e-4)
            assert (cells[8] is None) == (cells[0] in ("verbosity", "formatting"))
            if cells[8] is not None:
                needed = abs(comparison.score_difference) / float(out.gating_weights[0, k])
                assert cells[8] == pytest.approx(needed, rel=1e-3, abs=1e-4)


@pytest.fixture(params=[1e6, 1.5])
def of_range(model, request):
    """The model, with covariates that count up to so much."""
    kept = model.covariate_range.clone()
    model.covariate_range[1] = request.param
    yield model
    model.covariate_range.copy_(kept)


def test_what_style_moves_the_score_by_is_what_the_same_embeddings_lose_without_it(of_range):
    model, row = of_range, ROWS[0]
    [each] = explain_pairs(model, [row])
    measured = surface_features(row.responses)
    shown = {cells[0]: cells[1:] for cells in each.style.rows}
    for name, (a, b) in zip(SURFACE_FEATURES, measured.T.tolist(), strict=True):
        assert (name in shown) == bool(a or b)
        if name in shown:
            assert shown[name][:2] == (a, b)
    if not model.covariates:
        assert each.style.columns == ("feature", "A", "B")
        return
    embedded = model.backbone.embed([PromptGroup(row.prompt, row.responses)])
    prompts = embedded.prompts.values.expand(2, -1)
    with_style = model.score_embeddings(embedded.responses.values, prompts, texts=row.responses)
    same = model.score_embeddings(embedded.responses.values, prompts, texts=["Yes.", "Yes."])
    moved = (with_style.score - same.score).diff().neg()
    assert sum(cells[3] or 0.0 for cells in each.style.rows) == pytest.approx(float(moved))
    assert {c[0] for c in each.style.rows if c[3] is not None} == {*MEASURED} & {*shown}


def test_explanations_do_not_depend_on_the_chunks(model, explained, monkeypatch):
    monkeypatch.setattr(explain, "CHUNK_PAIRS", 2)
    for once, again in zip(explained, explain_pairs(model, ROWS), strict=True):
        assert again.id == once.id
        assert again.comparison.score_difference == pytest.approx(
            once.comparison.score_difference, abs=1e-4
        )


def test_a_change_beyond_the_rating_scale_is_said_to_be():
    objective = Objective("x", 1, 5)
    changes = (None, 4.0, -4.0, 4.1, -4.1)
    said = [explain._within(change, objective) for change in changes]
    assert said == [None, 4.0, -4.0, "beyond", "beyond"]


def test_a_row_without_two_responses_is_named(model):
    row = ScorableRow("lonely", user("Hi"), ("Yes.",), single=False)
    with pytest.raises(ValueError, match="row 'lonely' has 1 responses, not two"):
        next(explain_pairs(model, [row]))


def reading(model, **changes):
    backbone = model.backbone
    spec = replace(backbone.spec, **changes)
    return make_model(
        Backbone(spec, model=backbone.model, tokenizer=backbone.tokenizer),
        covariates=model.covariates,
    )


LONG = ScorableRow("long", user("Hi"), ("Yes.", "word " * 500), single=False)


def test_a_pair_that_is_too_long_is_named_or_has_no_score(model):
    with pytest.raises(BackboneError, match=r"^row 'long': the response has \d+ tokens"):
        list(explain_pairs(reading(model, on_overlong="error"), [*ROWS, LONG]))
    [each] = explain_pairs(reading(model, on_overlong="skip"), [LONG])
    assert not each.scored
    assert each.verdict.startswith("no score: longer than the backbone reads")
    page = explanation_page([each], title="x")
    assert "<svg" not in page
    assert "no score" in page


def test_the_verdict_names_the_preferred_response(model):
    a, b = ROWS[0].responses
    back = ScorableRow("back", ROWS[0].prompt, (b, a), single=False)
    tie = ScorableRow("tie", ROWS[0].prompt, (a, a), single=False)
    verdicts = [each.verdict for each in explain_pairs(model, [ROWS[0], back, tie])]
    assert {verdict[0] for verdict in verdicts[:2]} == {"A", "B"}
    probabilities = [float(re.search(r"probability ([\d.]+)", v)[1]) for v in verdicts[:2]]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=2e-3)
    assert min(probabilities) >= 0.5
    more = [re.search(r"it scores ([\d.]+) more than ([AB])$", v).groups() for v in verdicts[:2]]
    assert float(more[0][0]) == pytest.approx(float(more[1][0]), abs=2e-3)
    assert [other for _, other in more] == ["BA"["AB".index(v[0])] for v in verdicts[:2]]
    assert verdicts[2] == "a tie"


def test_the_page_loads_nothing_and_escapes_all_texts(explained):
    page = explanation_page(explained, title=NAME)
    links = re.findall(r"""(?:src|href|data|action)\s*=\s*["']([^"']*)""", page)
    assert all(link.startswith("#") for link in links)
    assert {f"#pair-{k}" for k in range(3)} <= {*links}
    assert not re.search(r"<(script|link|iframe|img|object|embed)\b|@import", page)
    # Title and heading, the id twice, the prompt, and response A.
    assert page.count("&lt;script&gt;") == 6
    assert page.count("<svg") == page.count("</svg>") == 6
    assert "`run=FOLDER`" in page
    assert explanation_page(explained, title=NAME) == page


COLUMNS = ("objective", "weight", "difference")


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=2 * PLOTTED))
def test_the_waterfall_starts_each_step_where_the_last_one_ended(differences):
    rows = tuple((f"o{k}", 0.5, d) for k, d in enumerate(differences))
    [axes] = plot_waterfall(Table("objectives", "", COLUMNS, rows)).figure.axes
    *steps, total = axes.patches
    moved = [d for d in differences if d != 0.0]
    assert len(steps) == min(len(moved), PLOTTED)
    ends = 0.0
    for step in steps:
        assert step.get_x() == pytest.approx(ends)
        ends += step.get_width()
    assert (total.get_x(), total.get_width()) == (0.0, pytest.approx(sum(differences)))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[-1] == "difference of the scores"
    if len(moved) > PLOTTED:
        assert labels[-2] == f"{len(moved) - PLOTTED + 1} others"


def test_the_weights_are_drawn_heaviest_first_without_those_that_are_zero():
    rows = (("a", 0.25, 0.0), ("bias", 0.0, 0.0), ("b", 0.75, 1.0))
    [axes] = plot_weights(Table("objectives", "", COLUMNS, rows)).figure.axes
    assert [bar.get_width() for bar in axes.patches] == [0.75, 0.25]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]


OBJECTIVES = ObjectiveSet((Objective("honesty", 1, 5),))
TOPICS = ("boil an egg", "name a dog", "warn of risks", "jump a fox", "know honest answers")


def rated(k):
    return RatedResponse(
        f"r{k}",
        f"source {k % 2}",
        Conversation(user(f"How do I {TOPICS[k]}?"), f"Answer {k}."),
        {"honesty": 1.0 + k % 4},
        split="test" if k == 1 else "train",
    )


RATINGS = [rated(k) for k in range(5)]
PAIRS = [
    PreferencePair(
        f"p{k}", "pairs", user(text), "Yes.", "No, seven.", category="advice", split=split
    )
    for k, (text, split) in enumerate(
        [("How do I boil an egg?", "train"), ("Is it safe?", "train"), ("Is it a dog?", "test")]
    )
]
KINDS = {"ratings": RATINGS, "pairs": PAIRS, "lists": (), "benchmark": ()}
TRAINED = {"How do I boil an egg?", "Is it safe?"} | {f"How do I {TOPICS[k]}?" for k in (2, 3, 4)}


@pytest.fixture(scope="module")
def run_folder(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    embed_rows(
        folder,
        load=lambda device: encoder,
        objectives=OBJECTIVES,
        **KINDS,
        test_fraction=0.5,
        min_ratings=1,
        shard_rows=2,
        team=Team("cpu"),
    )
    return folder


@pytest.fixture(scope="module")
def training(run_folder, encoder):
    return TrainingPrompts.load(run_folder, model=make_model(encoder))


def again(training, folder, **changes):
    return read_texts_again(
        training.data, folder, objectives=OBJECTIVES, **{**KINDS, **changes}, test_fraction=0.5
    )


def test_the_nearest_prompts_are_the_trained_ones_with_the_largest_cosine(
    training, encoder, tmp_path
):
    read = again(training, tmp_path)
    texts = [prompt[0].content for prompt in read(training.numbers.tolist())]
    assert {*texts} == TRAINED
    asked = ["How do I boil two eggs?", "Is it safe?", "Name a dog."]
    embedded = encoder.embed([PromptGroup(user(t), ()) for t in (*asked, *texts)]).prompts.values
    slow = torch.nn.functional.cosine_similarity(
        embedded[:3, None].double(), embedded[None, 3:].double(), dim=2
    )
    cosines, numbers = training.nearest(embedded[:3], count=3)
    for row in range(3):
        order = slow[row].argsort(descending=True)[:3]
        torch.testing.assert_close(cosines[row], slow[row][order], atol=1e-5, rtol=0)
        found = [prompt[0].content for prompt in read(numbers[row].tolist())]
        assert found == [texts[k] for k in order]
    assert read([int(numbers[1, 0])])[0] == user("Is it safe?")
    assert training.nearest(embedded[:1], count=99)[0].shape == (1, len(TRAINED))


def test_the_table_of_nearest_prompts_says_where_they_come_from(training, encoder, tmp_path):
    embedded = encoder.embed([PromptGroup(user("How do I boil an egg?"), ())]).prompts.values
    [plain] = training.tables(embedded, count=1)
    assert plain.rows[0][0] == pytest.approx(1.0, abs=1e-5)
    assert plain.rows[0][1:] == (2, "pairs, source 0", "advice")
    assert "texts are not known" in plain.note
    [told] = replace(training, text=again(training, tmp_path)).tables(embedded, count=2)
    assert told.columns == (*plain.columns, "prompt")
    assert told.rows[0][1:] == (*plain.rows[0][1:], "How do I boil an egg?")
    assert len(told.rows) == 2
    assert "not known" not in told.note


def test_rows_that_have_changed_give_no_texts(training, tmp_path):
    assert again(training, tmp_path, ratings=RATINGS[:-1]) is None
    assert again(training, tmp_path, ratings=RATINGS[::-1]) is None


def test_embeddings_of_another_backbone_are_refused(run_folder, encoder, causal):
    for other in (make_model(causal), reading(make_model(encoder), max_tokens=95)):
        with pytest.raises(ArtifactError, match=r"`run`: .* embedded by another backbone"):
            TrainingPrompts.load(run_folder, model=other)


def test_explanations_show_the_nearest_training_prompts(training, encoder):
    each = next(explain_pairs(make_model(encoder), ROWS[:1], training=training, nearest=2))
    assert len(each.nearest.rows) == 2
    page = explanation_page([each], title="x")
    assert "Nearest training prompts" in page
    assert "`run=FOLDER`" not in page
