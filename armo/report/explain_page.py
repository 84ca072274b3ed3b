"""Explanations as one HTML page: what decides each pair, drawn; nothing loaded from elsewhere."""

import html
from collections.abc import Sequence

import matplotlib
from matplotlib.patches import Patch

from armo.data.conversation import Prompt
from armo.report.drawing import (
    AFTER,
    BEFORE,
    PALETTE,
    STYLE,
    Picture,
    add_legend,
    label_rows,
    make_sheet,
    minus,
    to_svg,
)
from armo.report.explain import Explanation
from armo.report.pages import html_page, html_table
from armo.report.plots import PLOTTED
from armo.report.tables import Table

NO_RUN = (
    "Nearest training prompts are left out: a model folder does not hold them. Give the run that "
    "made the model, `run=FOLDER`."
)
SHEET = (
    "pre{white-space:pre-wrap;background:#f6f7f9;padding:.6rem;font-size:14px}"
    ".beside{display:flex;flex-wrap:wrap;gap:2rem;align-items:flex-start}.beside>*{max-width:100%}"
    "section{border-top:2px solid #ddd;margin-top:2rem}.note{font-size:14px;color:#555}"
    "body{max-width:84rem}.prompts td:last-child{text-align:left;white-space:pre-wrap}"
    "td:first-child,.prompts td{overflow-wrap:anywhere}th{white-space:nowrap}"
)


def explanation_page(explanations: Sequence[Explanation], *, title: str) -> str:
    """Render explanations as one page, an overview first."""
    links = "".join(
        f'<tr><th scope="row" class="t"><a href="#pair-{number}">{html.escape(each.id)}</a></th>'
        f'<td class="t">{html.escape(each.verdict)}</td>'
        f'<td class="t">{html.escape(_decided_by(each))}</td></tr>'
        for number, each in enumerate(explanations)
    )
    overview = (
        '<section id="summary" aria-labelledby="summary-heading"><h2 id="summary-heading">All '
        'pairs</h2><div class="scroll" tabindex="0" role="region" aria-label="All pairs, table">'
        '<table><caption>All pairs</caption><thead><tr><th scope="col" class="t">pair</th>'
        '<th scope="col" class="t">verdict</th><th scope="col" class="t">decided by</th></tr>'
        f"</thead><tbody>{links}</tbody></table></div></section>"
    )
    pairs = "".join(_section(number, each) for number, each in enumerate(explanations))
    return html_page(title, overview + pairs, style=SHEET)


def _decided_by(explanation: Explanation) -> str:
    reasons = explanation.comparison.reasons
    name = next(iter(reasons))
    return f"{name} {reasons[name]:+.3f}" if explanation.scored else ""


def _section(number: int, explanation: Explanation) -> str:
    objectives, style = explanation.objectives, explanation.style
    plots = ""
    if explanation.scored:
        pictures = plot_weights(objectives), plot_waterfall(objectives)
        plots = "".join(
            f"<h3>{html.escape(picture.title)}</h3>"
            f"<figure>{to_svg(picture, name=f'pair-{number}-{place}')}</figure>"
            for place, picture in enumerate(pictures, start=1)
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
        f'<section id="pair-{number}" aria-labelledby="pair-{number}-heading">'
        f'<h2 id="pair-{number}-heading">{html.escape(explanation.id)}</h2>'
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


def plot_weights(table: Table) -> Picture:
    """Draw the weights that are not zero, the heaviest first."""
    pairs = zip(table.column("objective"), table.column("weight"), strict=True)
    heaviest = sorted((p for p in pairs if p[1] > 0.0), key=lambda p: -p[1])[:PLOTTED]
    with matplotlib.rc_context(STYLE):
        figure, axes = make_sheet(0.34 * len(heaviest) + 0.8)
        axes.barh(range(len(heaviest)), [weight for _, weight in heaviest], 0.62, color=AFTER)
        label_rows(axes, [name for name, _ in heaviest])
        axes.set_xlim(left=0.0)
        axes.set_xlabel("gating weight")
    text = "; ".join(f"{name} {weight:.3f}" for name, weight in heaviest)
    return Picture("Weights of the objectives on this prompt", f"{text}.", figure)


def plot_waterfall(table: Table) -> Picture:
    """Draw how the contributions of the objectives add up, the largest difference first."""
    pairs = zip(table.column("objective"), table.column("difference"), strict=True)
    steps = [(name, difference) for name, difference in pairs if difference != 0.0]
    if len(steps) > PLOTTED:
        rest = steps[PLOTTED - 1 :]
        steps = [*steps[: PLOTTED - 1], (f"{len(rest)} others", sum(d for _, d in rest))]
    with matplotlib.rc_context(STYLE):
        figure, axes = make_sheet(0.34 * (len(steps) + 1) + 1.2)
        total = 0.0
        for place, (_, difference) in enumerate(steps):
            forward = difference > 0.0
            axes.barh(
                place,
                difference,
                0.62,
                left=total,
                color=AFTER if forward else PALETTE[1],
                hatch="" if forward else "////",
                edgecolor="white",
            )
            total += difference
            axes.plot([total, total], [place - 0.31, place + 1.31], color="#4b5563", linewidth=0.8)
        axes.barh(len(steps), total, 0.62, color=BEFORE, edgecolor="#4b5563")
        label_rows(axes, [*(name for name, _ in steps), "difference of the scores"], at=0.0)
        axes.set_xlabel("B scores more, below zero; A scores more, above")
        samples = [
            Patch(facecolor=AFTER),
            Patch(facecolor=PALETTE[1], hatch="////", edgecolor="white"),
        ]
        add_legend(figure, samples, ["speaks for A", "speaks for B"])
    text = "; ".join(minus(f"{name} {difference:+.3f}") for name, difference in steps)
    whole = minus(f"{total:+.3f}")
    return Picture(
        "From a tie to the difference of the scores", f"{text}; together {whole}.", figure
    )
