"""The model card: what was measured, put where people look first."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from armo.artifacts import MANIFEST, ArtifactError, digest_file, read_json, write_json, write_text
from armo.embed.spec import BackboneSpec
from armo.model.pretrained import CARD
from armo.report.pages import to_markdown
from armo.report.tables import Table

USAGE = "\n## Use\n"

METADATA: dict[str, Any] = {
    "library_name": "armo",
    "pipeline_tag": "text-classification",
    "tags": ["reward-model"],
}

TASK = "preference_evaluation"


def new_card(tables: Sequence[Table], *, spec: BackboneSpec, usage: str) -> str:
    """Write the card of a model that was just made.

    Args:
        tables: What is known of it.
        spec: Its backbone.
        usage: The section on how to use it.
    """
    data = ModelCardData(
        **METADATA,
        # A folder is nothing that the hub could link to.
        base_model=None if Path(spec.id).expanduser().exists() else spec.id,
    )
    text = to_markdown(tables, title="An armo reward model") + usage
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def fill_card(
    folder: Path,
    tables: Sequence[Table],
    *,
    title: str,
    name: str,
    accuracies: Sequence[tuple[str, float]],
) -> None:
    """Put a section of tables into the card of a model folder, instead of an earlier one.

    Args:
        folder: The model folder, on this machine.
        tables: What to show.
        title: Of the section; one of the same title is replaced, and nothing else.
        name: Of the model.
        accuracies: Titles of benchmarks with what the model gets overall, for the metadata that
            the hub reads.

    Raises:
        ArtifactError: If the metadata of the card cannot be read.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else "# An armo reward model\n"
    if not text.startswith("---"):
        text = f"---\n{ModelCardData(**METADATA).to_yaml()}\n---\n\n{text}"
    try:
        card = ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{path}: unreadable metadata, mend it: {reason}") from None
    data: Any = card.data  # typed as what all cards share
    data.model_name = name
    own = {title for title, _ in accuracies}
    others = [r for r in data.eval_results or () if r.dataset_name not in own]
    data.eval_results = others + [
        EvalResult(
            task_type=TASK,
            dataset_type=re.sub(r"[^\w.]+", "-", title.lower()).strip("-"),
            dataset_name=title,
            metric_type="accuracy",
            metric_value=round(value, 4),
        )
        for title, value in accuracies
    ]
    begin, end = (f"<!-- {edge}: {title} -->" for edge in ("begin", "end"))
    section = to_markdown(tables, title=title).replace("\n## ", "\n### ")
    section = f"{begin}\n\n#{section}\n{end}\n"
    body = card.text
    if begin in body and end in body:
        head, _, rest = body.partition(begin)
        body = head + section + rest.partition(end)[2].removeprefix("\n")
    elif USAGE in body:
        head, _, rest = body.partition(USAGE)
        body = f"{head}\n{section}{USAGE}{rest}"
    else:
        body = f"{body.rstrip()}\n\n{section}"
    write_text(path, f"---\n{data.to_yaml()}\n---\n\n{body.lstrip()}")
    manifest = folder / MANIFEST
    if manifest.is_file():  # the card is its only file that may change
        declared = read_json(manifest)
        declared["files"][CARD] = digest_file(path)
        write_json(manifest, declared)
