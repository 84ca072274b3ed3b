"""Export: a scoring model in formats that other programs read, and what each cannot carry."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armo.artifacts import write_text
from armo.data.conversation import Conversation, PreferencePair, Prompt
from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.embed.boundary import PromptGroup
from armo.fit.decorrelation import style_part
from armo.fit.gating import GatingNetwork
from armo.model.plain import (
    ExportError,
    Format,
    Plan,
    check_conversations,
    check_export,
    fixed_conversations,
    refuse_existing,
    replacing_folder,
    write_export,
)
from armo.model.pretrained import CARD
from armo.model.published import (
    SECTION,
    Declared,
    PublishedParts,
    gating_output,
    merge_members,
    published_score,
)
from armo.model.reward_model import ArmoRewardModel

FORMATS: dict[Format, str] = {
    "armorm": "the layout of the published ArmoRM",
    "labels": "sequence classification, one label per objective",
    "single": "sequence classification, one label: the score at constant weights",
}
"""What a model can be exported to."""

PUBLISHED = "LlamaForRewardModelWithGating"
PUBLISHED_CODE = "RLHFlow/ArmoRM-Llama3-8B-v0.1--modeling_custom." + PUBLISHED
# The end of a user's turn and the opening of the answer, as the published code looks for them.
PUBLISHED_PATTERN = (128009, 128006, 78191, 128007, 271)
CHUNK_ROWS = 1024


@dataclass(frozen=True, eq=False, slots=True)
class Cost:
    """What a format costs on preference pairs.

    Attributes:
        own: Credit of the model per pair: 1 where it scores `chosen` higher, 0.5 for a tie, else 0.
        exported: The same of what was exported.
        groups: Prompt of each pair.
        reordered: Share of the pairs that are ranked otherwise.
    """

    own: Float[Tensor, " pairs"]
    exported: Float[Tensor, " pairs"]
    groups: Int[Tensor, " pairs"]
    reordered: float


@dataclass(frozen=True, eq=False, slots=True)
class ExportReport:
    """What was written, how it was checked, and what it lacks.

    Attributes:
        folder: The export.
        checked: Conversations that it was reloaded and compared on, with plain Transformers.
        deviation: Largest deviation there of what it gives from what it should.
        lost: What the format cannot carry, one sentence each.
        weights: Constant weights by objective, of the format `single`.
        cost: On the preference pairs, if any were given.
    """

    folder: Path
    checked: int
    deviation: float
    lost: tuple[str, ...]
    weights: dict[str, float]
    cost: Cost | None


@dataclass(frozen=True, eq=False, slots=True)
class _Rows:
    """Embedded conversations."""

    prompts: Float[Tensor, "batch dim"]
    responses: Float[Tensor, "batch dim"]
    texts: list[str]


def export_model(
    model: ArmoRewardModel,
    folder: str | Path,
    *,
    format: Format,
    weights: Mapping[str, float] | None = None,
    pairs: Sequence[PreferencePair] = (),
) -> ExportReport:
    """Write a model in a format that other programs read, reload it and compare.

    - `armorm`: the layout of the published ArmoRM, for Llama backbones that read the prompt at
      `turn_end`. Several members of a gate become one, of their mean logits.
    - `labels`: `...ForSequenceClassification` with one label per objective, its adjusted reward.
      The weights of the gate have to come from elsewhere.
    - `single`: the same with one label, the score at constant weights.

    Args:
        model: With a causal backbone, read at its last token.
        folder: Where to write; must not exist, or be empty.
        format: One of `FORMATS`.
        weights: Constant weights of `single`, by objective. Without, the mean weights of the gate
            on the prompts of `pairs`; without those, its weights for the average training prompt.
        pairs: To measure what the format costs.

    Raises:
        ExportError: If the format cannot carry the model, saying why; or if the export, loaded
            with plain Transformers, does not give what it should. Nothing is left behind.
    """
    check_format(format)
    if weights is not None and format != "single":
        raise ExportError("`weights` are for `format=single`; the other formats have none")
    output = Path(folder).expanduser()
    refuse_existing(output)
    _check_backbone(model)
    pairs = [pair for pair in pairs if pair.preference > 0.5]
    conversations = check_conversations(model)
    if not conversations:
        raise ExportError("the model reads too few tokens to check an export on any conversation")
    rows = _embed(model, conversations)
    pair_rows = _embed(
        model, [Conversation(p.prompt, text) for p in pairs for text in (p.chosen, p.rejected)]
    )
    with torch.no_grad():
        if format == "armorm":
            plan = _plan_armorm(model, rows)
        elif format == "labels":
            plan = _plan_labels(model)
        else:
            plan = _plan_single(model, weights=weights, prompts=pair_rows.prompts)
        plan.lost += _lost_style(model, plan, rows)
        with replacing_folder(output) as temporary:
            write_export(model, temporary, plan, format=format)
            deviation = check_export(
                model,
                temporary,
                plan,
                conversations,
                plan.outputs(rows.responses, rows.prompts),
                format=format,
            )
            write_text(temporary / CARD, _card(model, plan, format=format))
        cost = _cost(model, plan, pairs, pair_rows) if pairs else None
    return ExportReport(output, len(conversations), deviation, tuple(plan.lost), plan.weights, cost)


def check_format(format: str) -> None:
    """Refuse a format that is not known."""
    if format not in FORMATS:
        raise ExportError(f"`format` must be {', '.join(FORMATS)}, got {format!r}")


def _check_backbone(model: ArmoRewardModel) -> None:
    """Refuse a backbone that a sequence classification cannot read as the model does."""
    spec = model.backbone.spec
    if model.backbone.planner.conversations is None:
        raise ExportError(
            f"{spec.id} is an encoder, of which the model reads the mean over the response; "
            f"sequence classification reads an encoder's first token, so no format can carry it: "
            f"score with armo, or train with `embed=causal`"
        )
    if spec.pooling != "last" or spec.layers != (-1,):
        raise ExportError(
            f"the model reads {spec.pooling} of layers {list(spec.layers)}; every format reads the "
            f"last token of the last layer: train with `embed.backbone.spec.pooling=last "
            f"embed.backbone.spec.layers=[-1]`"
        )
    config = model.backbone.model.config
    if config.get_text_config() is not config:
        raise ExportError(f"{spec.id} is more than a language model; no format can carry it")


def _plan_armorm(model: ArmoRewardModel, rows: _Rows) -> Plan:
    spec, gate = model.backbone.spec, _gate(model)
    kind = model.backbone.model.config.model_type
    if kind != "llama":
        raise ExportError(
            f"the published layout has a Llama trunk, {spec.id} is {kind!r}; use `format=labels`"
        )
    if spec.prompt_position != "turn_end" or not model.backbone.runner.causal:
        raise ExportError(
            "the published layout reads the prompt at the end of the user's turn, this model at "
            f"{spec.prompt_position}; train with `embed.backbone.spec.prompt_position=turn_end`"
        )
    count, lost = len(model.objectives.names), []
    heads, adjusted = model.head_weights.cpu(), model.adjusted_weights.cpu()
    transform = torch.linalg.lstsq(heads.T, adjusted.T, driver="gelsd").solution
    # As it is written, in float32: objectives that hardly differ make for large entries.
    rounded = heads.float().double().T @ transform.float().double()
    apart = float((rounded - adjusted.T).norm() / adjusted.norm())
    if apart > 1e-5:
        lost.append(
            "`rewards` are the adjusted rewards: no matrix makes these of the raw ones "
            f"(the best one leaves {apart:.1%}), as after `leace`"
        )
        heads, transform = adjusted, torch.eye(count, dtype=torch.float64)
    elif bool(model.head_intercepts.any()):
        lost.append(
            f"`rewards` lack the intercepts of the heads, up to "
            f"{float(model.head_intercepts.abs().max()):.3g}: "
            f"add `{SECTION}.reward_intercepts` of config.json"
        )
    if logistic := [
        n for n, x in zip(model.objectives.names, model.links, strict=True) if x == "logistic"
    ]:
        lost.append(f"`rewards` of {', '.join(logistic)} are log-odds, not probabilities")
    layers, exact = merge_members(gate)
    parts = PublishedParts(heads, transform, 1.0, gate.temperature, layers)
    if not exact:
        ours, theirs = gate(rows.prompts), gating_output(parts, rows.prompts)
        lost.append(
            f"one gate, of the mean logits, stands for the mean weights of {gate.members}: they "
            f"deviate by {float((ours - theirs).abs().max()):.2g} at most on "
            f"{len(rows.prompts)} prompts"
        )
    if bool(model.adjusted_offset.any()):
        missing = gating_output(parts, rows.prompts) @ model.adjusted_offset.cpu()
        lost.append(
            "scores lack a constant of the prompt, the same for all responses to it, which are "
            f"ranked as before ({float(missing.min()):.3g} to {float(missing.max()):.3g} on "
            f"{len(missing)} prompts): add `gating_output @ {SECTION}.adjusted_offsets`"
        )
    pattern = _pattern(model)
    if tuple(pattern) != PUBLISHED_PATTERN:
        lost.append(
            f"the published code looks for the tokens {list(PUBLISHED_PATTERN)} before an answer; "
            f"here it must look for {pattern}, `{SECTION}.gating_pattern`"
        )

    def score(h: Tensor, p: Tensor) -> Tensor:
        return published_score(parts, h, p)

    return Plan(
        heads=parts.tensors(),
        config={
            "architectures": [PUBLISHED],
            "auto_map": {"AutoModelForSequenceClassification": PUBLISHED_CODE},
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "num_objectives": count,
            "gating_temperature": gate.temperature,
            "gating_hidden_dim": len(layers[0][1]) if len(layers) > 1 else 1,
            "gating_n_hidden": len(layers) - 1,
            SECTION: _declared(model) | {"gating_pattern": pattern},
        },
        outputs=score,
        score=score,
        lost=lost,
    )


def _plan_labels(model: ArmoRewardModel) -> Plan:
    names, matrix = model.objectives.names, model.adjusted_weights.cpu()
    gate, bias = _gate(model), [names[k] for k in model.objectives.bias_indices]
    apart = f" ({', '.join(bias)} with none)" if bias else ""
    lost = [
        "the gate: a response gets one adjusted reward per objective and no score; weigh them with "
        f"the gating weights of its prompt{apart}"
    ]
    if bool(model.adjusted_offset.any()):
        lost.append(
            "labels lack a constant each, the same for all conversations: add "
            f"`{SECTION}.adjusted_offsets` of config.json"
        )
    return Plan(
        heads={"score.weight": matrix},
        config={
            "id2label": {str(k): name for k, name in enumerate(names)},
            "label2id": {name: k for k, name in enumerate(names)},
            "problem_type": "regression",
            SECTION: _declared(model),
        },
        outputs=lambda h, p: h.double() @ matrix.T,
        score=lambda h, p: (gate(p.double()) * (h.double() @ matrix.T)).sum(1),
        lost=lost,
    )


def _plan_single(
    model: ArmoRewardModel, *, weights: Mapping[str, float] | None, prompts: Tensor
) -> Plan:
    gate, names = _gate(model), model.objectives.names
    if weights is not None:
        mix, source = torch.tensor(model.objectives.mix(weights)).double(), "those given"
    elif len(prompts):
        mix, source = gate(prompts.double()).mean(0), "the gate's mean on the prompts of the pairs"
    elif bool(gate.mean.any()) or not bool(gate.output.weight.any()):
        mix, source = gate(gate.mean), "the gate's for the average training prompt"
    else:
        raise ExportError(
            "`format=single` needs `weights={OBJECTIVE: 2, ...}` or pairs (`input`): this gate "
            "does not know its average training prompt"
        )
    matrix = mix[None] @ model.adjusted_weights.cpu()
    constant = float(mix @ model.adjusted_offset.cpu())
    lost = []
    if bool(gate.output.weight.any()):
        lost.append(f"the gate: weights are the same for every prompt, {source}")
    if constant:
        lost.append(
            f"scores lack the constant {constant:.3g}, `{SECTION}.score_offset` of config.json; no "
            "ranking depends on it"
        )
    chosen = dict(zip(names, mix.tolist(), strict=True))
    return Plan(
        heads={"score.weight": matrix},
        config={
            "id2label": {"0": "score"},
            "label2id": {"score": 0},
            "problem_type": "regression",
            SECTION: {"weights": chosen, "score_offset": constant, "beta": float(model.beta)},
        },
        outputs=lambda h, p: h.double() @ matrix.T,
        score=lambda h, p: (h.double() @ matrix.T)[:, 0],
        lost=lost,
        weights={name: weight for name, weight in chosen.items() if weight > 0.0},
    )


def _pattern(model: ArmoRewardModel) -> list[int]:
    """Return the tokens from the end of a user's turn up to the answer."""
    conversations = model.backbone.planner.conversations
    assert conversations is not None
    tokens = conversations.tokenise(
        [PromptGroup(c.prompt, (c.response,)) for c in fixed_conversations()]
    )
    tails = []
    for group in tokens:
        tails.append(group.responses[0].ids[len(group.prompt) - 1 :])
    shared = next(
        (k for k, column in enumerate(zip(*tails, strict=False)) if len(set(column)) > 1), 0
    )
    if not shared:
        raise ExportError("no tokens tell where an answer begins, as the published layout needs")
    return tails[0][:shared]


def _lost_style(model: ArmoRewardModel, plan: Plan, rows: _Rows) -> list[str]:
    if not model.covariates or not bool(model.adjusted_style.any()):
        return []
    columns = [SURFACE_FEATURES.index(name) for name in model.covariates]
    measured = surface_features(rows.texts)[:, columns].double()
    weights = _gate(model)(rows.prompts.double())
    if plan.weights:
        weights = torch.tensor(model.objectives.mix(plan.weights)).expand_as(weights)
    style = style_part(measured, model.adjusted_style.cpu(), model.covariate_range.cpu())
    parts = weights * style
    return [
        f"style stays in the score: {', '.join(model.covariates)} are measured on the text, which "
        f"no format can; on {len(parts)} conversations they move it by up to "
        f"{float(parts.sum(1).abs().max()):.2g}"
    ]


def _cost(model: ArmoRewardModel, plan: Plan, pairs: Sequence[PreferencePair], rows: _Rows) -> Cost:
    device = model.head_weights.device
    out = model.score_embeddings(
        rows.responses.to(device), rows.prompts.to(device), texts=rows.texts
    )
    own, exported = [
        scores.cpu().reshape(-1, 2).diff(dim=1)[:, 0].neg()
        for scores in (out.score, plan.score(rows.responses, rows.prompts))
    ]
    known = ~(own.isnan() | exported.isnan())
    numbers: dict[Prompt, int] = {}
    groups = torch.tensor([numbers.setdefault(pair.prompt, len(numbers)) for pair in pairs])
    credits = [(d > 0).double() + 0.5 * (d == 0).double() for d in (own[known], exported[known])]
    reordered = float((credits[0] != credits[1]).double().mean())
    return Cost(credits[0], credits[1], groups[known], reordered)


def _gate(model: ArmoRewardModel) -> GatingNetwork:
    return copy.deepcopy(model.gate).cpu()


def _embed(model: ArmoRewardModel, conversations: Sequence[Conversation]) -> _Rows:
    """Embed conversations, in float32 on the CPU."""
    prompts, responses = [], []
    for start in range(0, len(conversations), CHUNK_ROWS):
        chunk = conversations[start : start + CHUNK_ROWS]
        groups: dict[Prompt, dict[str, int]] = {}
        for conversation in chunk:
            texts = groups.setdefault(conversation.prompt, {})
            texts.setdefault(conversation.response, len(texts))
        out = model.backbone.embed([PromptGroup(p, tuple(texts)) for p, texts in groups.items()])
        starts, places = 0, {}
        for k, (prompt, texts) in enumerate(groups.items()):
            places[prompt] = (k, starts)
            starts += len(texts)
        number = [places[c.prompt][0] for c in chunk]
        row = [places[c.prompt][1] + groups[c.prompt][c.response] for c in chunk]
        prompts.append(out.prompts.values[number].cpu())
        responses.append(out.responses.values[row].cpu())
    none = torch.zeros(0, model.backbone.dim)
    return _Rows(
        torch.cat([none, *prompts]),
        torch.cat([none, *responses]),
        [conversation.response for conversation in conversations],
    )


def _declared(model: ArmoRewardModel) -> dict[str, Any]:
    return Declared(
        model.objectives,
        tuple(model.head_intercepts.tolist()),
        tuple(model.adjusted_offset.tolist()),
        model.links,
        float(model.beta),
    ).to_dict()


def _card(model: ArmoRewardModel, plan: Plan, *, format: Format) -> str:
    lines = [f"# {FORMATS[format][0].upper()}{FORMATS[format][1:]}", "", "Exported by armo from "]
    lines[-1] += f"a model over `{model.backbone.spec.id}`."
    if format != "armorm":
        lines += [
            "Conversations are rendered with the chat template in this folder, without further "
            "special tokens; values are the logits as they are (`problem_type: regression`), no "
            "sigmoid or softmax."
        ]
    lines += [
        f"The model cuts conversations beyond {model.backbone.spec.max_tokens} tokens, and prompts "
        f"beyond {model.backbone.spec.max_prompt_tokens}; readers of this format may not."
    ]
    if format != "single":
        lines += ["", "| column | objective |", "| --- | --- |"]
        lines += [f"| {k} | {name} |" for k, name in enumerate(model.objectives.names)]
    if plan.weights:
        lines += ["", "| objective | weight |", "| --- | --- |"]
        lines += [f"| {name} | {weight:.4f} |" for name, weight in plan.weights.items()]
    if plan.lost:
        lines += ["", "Not in this format:", "", *(f"- {sentence}" for sentence in plan.lost)]
    return "\n".join(lines) + "\n"
