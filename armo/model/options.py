"""What Transformers hands to a model that it loads, and where and in what dtype that puts it."""

from collections.abc import Mapping
from typing import Any

# What the auto classes and pipelines of Transformers pass to every model that they load.
HANDED_DOWN = (
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "low_cpu_mem_usage",
    "torch_dtype",
)
SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")


def refuse_options(options: Mapping[str, Any]) -> None:
    """Refuse options that change something, other than those that the auto classes hand down."""
    handed = dict(options)
    if handed.get("use_safetensors") is True:  # nothing else is ever read
        del handed["use_safetensors"]
    if handed.get("_from_auto") and {*(handed.get("adapter_kwargs") or {})} <= {
        "token",
        "revision",
    }:
        handed.pop("adapter_kwargs", None)  # where peft is installed
    unknown = [
        name
        for name, value in handed.items()
        if name not in HANDED_DOWN and value is not None and value is not False and value != {}
    ]
    if unknown:
        raise TypeError(f"`from_pretrained` does not take {', '.join(unknown)}")


def placement(device: str, device_map: Any, *, auto: bool) -> tuple[str, Any]:
    """Tell a single device from a map of several.

    Raises:
        ValueError: If both are given.
    """
    if device != "auto" and device_map is not None:
        raise ValueError("give `device` or `device_map`, not both")
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return ("cpu" if auto and device == "auto" else device), None
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return f"cuda:{device_map}", None
    if isinstance(device_map, Mapping) or device_map in SPREADING:
        return device, device_map
    return str(device_map), None


def dtype_name(dtype: Any) -> str | None:
    """Name a dtype as configurations spell it; None for the backbone's own."""
    return None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
