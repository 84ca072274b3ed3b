"""The configuration class that Transformers makes of a model folder's `config.json`."""

import importlib
from typing import Any, ClassVar

from transformers import PretrainedConfig

FIELDS = (
    "format",
    "model_type",
    "architectures",
    "problem_type",
    "id2label",
    "label2id",
    "objectives",
    "backbone",
    "gate",
    "covariates",
    "links",
    "files",
)
"""All fields of `config.json`, in their order there."""

# Those that every configuration of Transformers has.
_KNOWN = ("architectures", "problem_type", "id2label", "label2id")


class ArmoConfig(PretrainedConfig):
    """What `AutoConfig` returns for a model folder; `ModelConfig` is what armo reads in it.

    The fields are those of `config.json`. `num_labels` is 1: the one label is the score.
    """

    model_type: ClassVar[str] = "armo"

    def __init__(self, **values: Any) -> None:
        """Keep the fields of `config.json`, and what Transformers knows of every model."""
        for name in FIELDS:
            if name not in ("model_type", *_KNOWN):
                setattr(self, name, values.pop(name, None))
        values.pop("model_type", None)
        # Nothing here reads it: where a text ends, the mask says. Others look for it, and set it.
        self.pad_token_id: int | None = values.pop("pad_token_id", None)
        super().__init__(**values)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from the content of `config.json`, and let the auto classes know the model."""
        # Here, not when armo is imported: it takes seconds, and only now is it sure to be needed.
        importlib.import_module("armo.model.reward_model")
        return super().from_dict(config_dict, **kwargs)

    def declared(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        values = {name: getattr(self, name, None) for name in FIELDS}
        return values | {"id2label": {str(k): name for k, name in (self.id2label or {}).items()}}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what `save_pretrained` writes: nothing that depends on a library's version."""
        return self.declared()
