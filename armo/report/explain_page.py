"""Explanations as one HTML page: what decides each pair, drawn; nothing loaded from elsewhere."""

import html
from collections.abc import Sequence

from matplotlib.figure import Figure

from armo.data.conversation import Prompt
from armo.report.explain import Explanation
from armo.report.pages import AFTER, BEFORE, PALETTE, PLOTTED, html_page, html_table, to_svg
from armo.report.tables import Table

NO_RUN = (
    "Nearest training prompts are left out: a model folder does not hold them. Give the run that "
    "made the model, `run=FOLDER`."
)
STYLE = (
    "pre{white-space:pre-wrap;background:#f6f7f9;padding:.6rem;font-size:14px}"
    ".beside{display:flex;flex-wrap:wrap;gap:2rem;align-items:flex-start}"
    "section{border-top:2px solid #ddd;margin-top:2rem}.note{font-size:14px;color:#555}"
    "body{max-width:84rem}.prompts td:last-child{text-align:left;white-space:pre-wrap}"
    "td:first-child,.prompts td{overflow-wrap:anywhere}th{white-space:nowrap}"
)


def explanation_page(explanations: Sequence[Explanation], *, title: str) -> str:
    """Render explanations as one page, an overview first."""
    links = "".join(
        f'<tr><td><a href="#pair-{number}">{html.escape(each.id)}</a></td>'
        f"<td>{html.escape(each.verdict)}</td><td>{html.escape(_decided_by(each))}</td></tr>"
        for number, each in enumerate(explanations)
    )
    overview = f"<table><tr><th>pair</th><th>verdict</th><th>decided by</th></tr>{links}</table>"
    pairs = "".join(_section(number, each) for number, each in enumerate(explanations))
    return html_page(title, overview + pairs, style=STYLE)


def _decided_by(explanation: Explanation) -> str:
    reasons = explanation.comparison.reasons
    name = next(iter(reasons))
    return f"{name} {reasons[name]:+.3f}" if explanation.scored else ""


def _section(number: int, explanation: Explanation) -> str:
    objectives, style = explanation.objectives, explanation.style
    plots = ""
    if explanation.scored:
        plots = (
            f"<h3>Weights of the objectives on this prompt</h3>{to_svg(plot_weights, objectives)}"
            f"<h3>From a tie to the difference of the scores</h3>"
            f"{to_svg(plot_waterfall, objectives)}"
        )
    a, b = explanation.responses
    texts = "".join(
        f"<details><summary>{name}</summary><pre>{html.escape(text)}</pre></details>"
        for name, text in (("Prompt", _prompt_text(explanation.prompt)), ("A", a), ("B", b))
    )
    nearest = f'<p class="note">{html.escape(NO_RUN)}</p>'
    if explanation.nearest is not None:
        nearest = f'<div class="prompts">{_titled(explanation.nearest)}</div>'
    return (
        f'<section id="pair-{number}"><h2>{html.escape(explanation.id)}</h2>'
        f"<p>{html.escape(explanation.verdict)}.</p>{texts}{plots}"
        f'<div class="beside"><div>{_titled(objectives)}</div><div>{_titled(style)}</div></div>'
        f"{nearest}</section>"
    )


def _titled(table: Table) -> str:
    return (
        f"<h3>{html.escape(table.title)}</h3>{html_table(table)}"
        f'<p class="note">{html.escape(table.note)}</p>'
    )


def _prompt_text(prompt: Prompt) -> str:
    if len(prompt) == 1:
        return prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def plot_weights(table: Table) -> Figure:
    """Draw the weights that are not zero, the heaviest first."""
    pairs = zip(table.column("objective"), table.column("weight"), strict=True)
    heaviest = sorted((p for p in pairs if p[1] > 0.0), key=lambda p: -p[1])[:PLOTTED]
    figure = Figure(figsize=(8, 0.4 * len(heaviest) + 1), layout="constrained")
    axes = figure.subplots()
    places = range(len(heaviest))
    axes.barh(places, [weight for _, weight in heaviest], color=AFTER)
    axes.set_yticks(list(places), [name for name, _ in heaviest])
    axes.invert_yaxis()
    axes.set_xlim(left=0.0)
    axes.set_xlabel("gating weight")
    return figure


def plot_waterfall(table: Table) -> Figure:
    """Draw how the contributions of the objectives add up, the largest difference first."""
    pairs = zip(table.column("objective"), table.column("difference"), strict=True)
    steps = [(name, difference) for name, difference in pairs if difference != 0.0]
    if len(steps) > PLOTTED:
        rest = steps[PLOTTED - 1 :]
        steps = [*steps[: PLOTTED - 1], (f"{len(rest)} others", sum(d for _, d in rest))]
    figure = Figure(figsize=(8, 0.4 * (len(steps) + 1) + 1), layout="constrained")
    axes = figure.subplots()
    total = 0.0
    for place, (_, difference) in enumerate(steps):
        colour = AFTER if difference > 0.0 else PALETTE[1]
        axes.barh(place, difference, left=total, color=colour)
        total += difference
        axes.plot([total, total], [place - 0.4, place + 1.4], color="#555", linewidth=0.8)
    axes.barh(len(steps), total, color=BEFORE)
    axes.set_yticks(
        list(range(len(steps) + 1)), [*(name for name, _ in steps), "difference of the scores"]
    )
    axes.invert_yaxis()
    axes.axvline(0.0, color="#555", linewidth=1)
    axes.set_xlabel("B scores more, below zero; A scores more, above")
    return figure
