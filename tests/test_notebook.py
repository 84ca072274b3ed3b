"""The notebooks run on the demo model, and what is committed is what they give."""

import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?![\w.]*\w)")


def committed(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def printed(cell):
    outputs = cell.get("outputs", [])
    return "".join(output.text for output in outputs if output.output_type == "stream")


def labelled_numbers(text):
    """The numbers of each line that begins with words: these words, then the numbers."""
    found = []
    for line in text.splitlines():
        numbers = NUMBER.findall(line)
        label = line[: line.find(numbers[0])].strip() if numbers else ""
        if label:
            found.append((label, numbers))
    return found


def is_close(first, second):
    """Whether two numbers differ as those of two machines may: counts by more than figures."""
    allowed = 0.03 if "." in first else max(3.0, 0.1 * abs(float(first)))
    return ("." in first) == ("." in second) and abs(float(first) - float(second)) <= allowed


def assert_alike(first, second):
    """Compare what two executions print, where it does not depend on what was picked."""
    compared = 0
    for one, other in zip(first.cells, second.cells, strict=True):
        before, after = labelled_numbers(printed(one)), labelled_numbers(printed(other))
        if [label for label, _ in before] != [label for label, _ in after]:
            continue  # another pair was shown
        for (label, old), (_, new) in zip(before, after, strict=True):
            assert len(old) == len(new), label
            assert all(map(is_close, old, new)), f"stale, run `make notebooks`: {label} {old} {new}"
            compared += len(old)
    assert compared >= 15


@pytest.fixture(scope="session")
def execute():
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute


def check_inspect_weights(text, report):
    for row in report["kinds"]:
        line = next(line for line in text.splitlines() if line.startswith(row["kind"]))
        _, _, *weights = line.split()
        # The report's means are over pairs, these over prompts.
        for name, weight in zip(("helpfulness", "honesty", "safety"), weights, strict=True):
            assert float(weight) == pytest.approx(row[name], abs=0.1)


def check_decorrelation(text, report):
    every = next(row for row in report["counterfactuals"] if row["pattern"] == "all")
    moved = every["moved, before"], every["moved, after"]
    assert re.search(rf"all +{every['pairs']} +{moved[0]:.3f} +{moved[1]:.3f}", text)
    for row in report["quarters"][:4]:
        assert f" {row['before']:.3f} [" in text
        assert f" {row['after']:.3f} [" in text


def check_compare_models(text, report):
    gate, constant = report["rivals"][:2]
    assert f" {gate['accuracy']:.3f} [{gate['low']:.3f}, {gate['high']:.3f}] " in text
    ahead = f"{constant['gate is ahead by']:.3f} [{constant['from']:.3f}, {constant['to']:.3f}]"
    assert ahead in text


def check_train_your_own_objective(text, report):
    assert re.search(r"row \d+: column 'personal \(1-5\)': 'N/A' is not a number", text)
    assert "objectives: helpfulness, honesty, safety, verbosity, formatting, personal" in text
    learned, by_rule, ceiling = (
        float(re.search(rf"{label} +(\d\.\d+)", text)[1])
        for label in ("rewards with ratings", "rewards with the rule", "rule with the ratings")
    )
    style = float(re.search(r"length and format alone +(\d\.\d+)", text)[1])
    assert style < learned < by_rule < ceiling


# Plots of each notebook, and what its figures must be.
NOTEBOOKS = {
    "inspect_weights": (4, check_inspect_weights),
    "decorrelation": (4, check_decorrelation),
    "compare_models": (3, check_compare_models),
    "train_your_own_objective": (2, check_train_your_own_objective),
}
notebooks = pytest.mark.parametrize("name", NOTEBOOKS)


@pytest.mark.slow
@notebooks
def test_a_notebook_runs_and_gives_what_is_committed(name, demo_folder, execute):
    fresh = execute(FOLDER / f"{name}.ipynb")
    assert_alike(committed(name), fresh)
    report = json.loads((demo_folder / "report" / "report.json").read_text())
    _, check = NOTEBOOKS[name]
    check("".join(map(printed, fresh.cells)), report)


@notebooks
def test_a_notebook_is_committed_with_its_outputs(name):
    cells = [cell for cell in committed(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == NOTEBOOKS[name][0]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    text = "".join(map(printed, cells))
    assert "\x1b" not in text, "the first cell trained the demo; execute it once more"
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|work|Users)/", text)


@notebooks
def test_a_notebook_says_first_what_it_needs(name):
    first = committed(name).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert "**Needs** the demo run" in first.source


def test_every_notebook_is_tested_and_linked():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {*NOTEBOOKS}
    readme = (FOLDER.parent / "README.md").read_text()
    assert all(f"(notebooks/{name}.ipynb)" in readme for name in NOTEBOOKS)
    linked = {
        link
        for name in NOTEBOOKS
        for cell in committed(name).cells
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", cell.source)
        if cell.cell_type == "markdown"
    }
    assert all((FOLDER / link).is_file() for link in linked)


def test_a_stale_number_is_found():
    fresh, stale = committed("decorrelation"), committed("decorrelation")
    assert_alike(fresh, stale)
    output = next(
        o
        for cell in stale.cells
        for o in cell.get("outputs", [])
        if "text" in o and "log_length" in o.text
    )
    output.text = re.sub(r"(log_length +\+0\.)\d\d", r"\g<1>99", output.text)
    with pytest.raises(AssertionError, match="stale, run `make notebooks`: log_length"):
        assert_alike(fresh, stale)
