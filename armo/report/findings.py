"""The findings of a report in sentences, made from the numbers of its tables."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from armo.report.bias import RIGHT
from armo.report.drawing import BASELINES, minus
from armo.report.tables import Evaluation, Table

FEW = 3
"""Models that a sentence tells one by one."""

SHOWING = 6
"""Pairs that can show a bias, all of them going one way: of five, one in sixteen does by chance."""


def summarize(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Say what the tables show, in their order.

    Returns:
        The name of a table and a sentence or two on it. A table of which nothing can be said in
        a sentence has none.
    """
    result = []
    for table in evaluation.tables:
        say = SENTENCES.get(table.name)
        if table.columns[:4] == ("model", "overall", "low", "high"):
            say = _standings
        elif table.columns[:2] == ("subset", "cases"):
            say = _levels
        text = say(table) if say is not None and table.rows else ""
        if text:
            result.append((table.name, text))
    return result


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"


def _benchmark(table: Table) -> str:
    return table.title.split(":")[0]


def _models(rows: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
    return [row for row in rows if row[0] not in BASELINES]


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _standings(table: Table) -> str:
    """Who is best, whether surely so, and what a null baseline gets."""
    models = sorted(_models(table.rows), key=lambda row: -row[1])
    nulls = sorted((row for row in table.rows if row[0] in BASELINES), key=lambda row: -row[1])
    if not models:
        return ""
    best, first = models[0], next(row for row in table.rows if row[0] not in BASELINES)
    name = _benchmark(table)
    score = f"{best[1]:.3f}{_range(best[2], best[3])}"
    if len(models) == 1:
        text = f"{name}: {best[0]} scores {score}."
    else:
        text = f"{name}: {best[0]} is best of {len(models)} models with {score}"
        compared = models[1] if best is first else best
        if compared[4] is not None:
            gain = compared[4] if best is not first else -compared[4]
            low, high, p_value = compared[5:8]
            known = low is not None and high is not None and p_value is not None
            clear = known and (low > 0.0 or high < 0.0) and p_value < 0.05
            other = compared if best is first else first
            notes = [] if p_value is None else [f"p = {p_value:.3g}"]
            notes += [] if clear else ["not more than chance would give"]
            text += (
                f", {gain:.3f} ahead of {other[0]} ({', '.join(notes)})"
                if gain
                else f", as has {other[0]}"
            )
        text += "."
    if nulls:
        null = nulls[0]
        text += f" The best null baseline, {null[0]}, gets {null[1]:.3f}"
        behind = [row[0] for row in models if row[2] is None or row[2] <= null[1]]
        verb = "is" if len(behind) == 1 else "are"
        text += f"; {_join(behind)} {verb} not clearly better than that." if behind else "."
    return text


def _levels(table: Table) -> str:
    """What models lose from easy to hard pairs."""
    rows = {row[0].strip(): row for row in table.rows}
    if not {"easy", "hard"} <= set(rows):
        return ""
    losses = [
        (rows["easy"][2 + k] - rows["hard"][2 + k], name, k)
        for k, name in enumerate(table.columns[2:])
        if name not in BASELINES
        and rows["easy"][2 + k] is not None
        and rows["hard"][2 + k] is not None
    ]
    if not losses:
        return ""
    _, name, k = min(losses)
    text = f"{rows['easy'][2 + k]:.3f} on easy to {rows['hard'][2 + k]:.3f} on hard pairs"
    if len(losses) == 1:
        return f"{_benchmark(table)}: {name} goes from {text}."
    return f"{_benchmark(table)}: {name} loses least to style, from {text}."


def _probes(table: Table) -> str:
    """Which pattern moves a model's preferences most; of many models the best and the worst."""
    found = []
    for k, name in enumerate(table.columns[2::3]):
        rows = [row for row in table.rows if row[2 + 3 * k] is not None]
        clear = [row for row in rows if row[1] >= SHOWING and _off_half(row[3 + 3 * k : 5 + 3 * k])]
        if not clear:
            found.append((0, f"{name} shows no clear bias"))
            continue
        row = max(clear, key=lambda row: abs(row[2 + 3 * k] - 0.5))
        text = f"{name} is biased on {len(clear)} of {len(rows)} patterns, most on {row[0]}"
        found.append((len(clear), f"{text} (wins {row[2 + 3 * k]:.0%})"))
    if len(found) > FEW:
        ordered = sorted(found, key=lambda pair: pair[0])
        found = [ordered[0], ordered[-1]]
        return f"Bias probes: least, {found[0][1]}; most, {found[1][1]}."
    return "Bias probes: " + "; ".join(text for _, text in found) + "."


def _off_half(interval: Sequence[float | None]) -> bool:
    low, high = interval
    return low is not None and high is not None and (low > 0.5 or high < 0.5)


def _length(table: Table) -> str:
    """Which model follows length least, beside what is right, which no model scored."""
    told = {row[0]: minus(f"{row[1]:+.2f}") for row in table.rows if row[1] is not None}
    rows = [row for row in table.rows if row[0] in told and row[0] != RIGHT]
    if not rows:
        return ""
    row = min(rows, key=lambda row: abs(row[1]))
    least = "" if len(rows) == 1 else f", the least of {len(rows)} models"
    beside = f"; what is right correlates {told[RIGHT]}" if RIGHT in told else ""
    text = f"Length: scores of {row[0]} correlate {told[row[0]]} with length within prompts"
    return f"{text}{least}{beside}."


def _best_of_n(table: Table) -> str:
    last: dict[str, tuple[Any, ...]] = {}
    for row in table.rows:
        last[row[0]] = row
    models = sorted(_models(last.values()), key=lambda row: -row[3])
    if not models:
        return ""
    best = models[0]
    text = f"Best of {best[1]}: the picks of {best[0]} have a gold score of {best[3]:.3f}"
    others = [f"{n} {last[n][3]:.3f}" for n in ("random", "longer", "gold itself") if n in last]
    return f"{text} ({', '.join(others)})." if others else f"{text}."


def _calibration(table: Table) -> str:
    rows = [row for row in table.rows if row[2] is not None]
    if not rows:
        return ""
    row = min(rows, key=lambda row: row[2])
    least = "are off by" if len(rows) == 1 else "are off least, by"
    more = "more than" if row[2] > row[6] else "no more than"
    return (
        f"Calibration: preference probabilities of {row[0]} {least} {row[2]:.3f}"
        f"{_range(row[3], row[4])} on average, {more} a calibrated model would show by chance "
        f"(at most {row[6]:.3f})."
    )


def _abstention(table: Table) -> str:
    full = max(table.column("coverage"))
    half = [row for row in table.rows if abs(row[1] - full / 2) < 1e-9 and row[2] is not None]
    if not half:
        return ""
    row = max(half, key=lambda row: row[2])
    whole = next(r for r in table.rows if r[0] == row[0] and r[1] == full)
    return (
        f"Abstention: answering the clearest half of the pairs only, {row[0]} is right on "
        f"{row[2]:.3f} of them instead of {whole[2]:.3f}."
    )


def _correlations(table: Table) -> str:
    means = {}
    for name in dict.fromkeys(table.column("model")):
        rows = [row for row in table.rows if row[0] == name and row[1] != row[2]]
        rows = [row for row in rows if row[3] is not None and row[4] is not None]
        if rows:
            means[name] = [sum(abs(row[k]) for row in rows) / len(rows) for k in (3, 4)]
    if not means:
        return ""
    if len(means) > FEW:
        before, after = ([mean[k] for mean in means.values()] for k in (0, 1))
        return (
            f"Objectives: the mean size of their correlations is {min(before):.2f} to "
            f"{max(before):.2f} before the reward transform, by model, and {min(after):.2f} to "
            f"{max(after):.2f} after it."
        )
    parts = [f"for {name} from {mean[0]:.2f} to {mean[1]:.2f}" for name, mean in means.items()]
    return (
        "Objectives: by the reward transform the mean size of their correlations goes "
        f"{_join(parts)}."
    )


def _weights_by_kind(table: Table) -> str:
    heaviest: dict[str, dict[str, tuple[float, str]]] = {}
    for model, kind, _, objective, weight in table.rows:
        kinds = heaviest.setdefault(model, {})
        kinds[kind] = max(kinds.get(kind, (-1.0, "")), (weight, objective))
    counts = {
        model: len({objective for _, objective in kinds.values()})
        for model, kinds in heaviest.items()
    }
    of = f"over {len(set(table.column('kind')))} kinds of prompt"
    if len(counts) > FEW:
        low, high = min(counts.values()), max(counts.values())
        some = f"{low}" if low == high else f"{low} to {high}"
        return f"Weights, {of}: {some} different objectives weigh most, by model."
    parts = [
        f"{model} weighs {next(iter(heaviest[model].values()))[1]} most everywhere"
        if count == 1
        else f"{model} weighs {count} different objectives most"
        for model, count in counts.items()
    ]
    return f"Weights, {of}: {'; '.join(parts)}."


def _rivals(table: Table) -> str:
    rows = {row[0]: row for row in table.rows}
    best = max(
        (row for row in table.rows if row[0] != "gated score"), key=lambda row: row[1], default=None
    )
    row = rows.get("gated score")
    if row is None:
        return ""
    text = f"The gated score is right on {row[1]:.3f}{_range(row[2], row[3])} of the test pairs"
    return f"{text}; the best of its rivals, “{best[0]}”, on {best[1]:.3f}." if best else f"{text}."


def _style(table: Table) -> str:
    rows = [row for row in table.rows if row[0] == "score"]
    if not rows:
        return ""
    row, left = (max(rows, key=lambda row: abs(row[k])) for k in (2, 3))
    before, after, most = (minus(f"{value:+.2f}") for value in (row[2], row[3], left[3]))
    return (
        f"Style: the score's correlation with {row[1]} within prompts goes from {before} to "
        f"{after} by decorrelation; the largest then left is {most}, with {left[1]}."
    )


def _data_findings(table: Table) -> str:
    """The worst finding on a data set, and how many there are."""
    counts = Counter(table.column("severity"))
    total = _join([f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items()])
    worst = dict(zip(table.columns, table.rows[0], strict=True))
    return f"{total}; the first {worst['severity']}: {worst['finding']} ({worst['count']:,})."


SENTENCES: Mapping[str, Callable[[Table], str]] = {
    "abstention": _abstention,
    "best_of_n": _best_of_n,
    "bias_probes": _probes,
    "calibration": _calibration,
    "correlations": _correlations,
    "findings": _data_findings,
    "length_bias": _length,
    "rivals": _rivals,
    "style": _style,
    "weights_by_kind": _weights_by_kind,
}
