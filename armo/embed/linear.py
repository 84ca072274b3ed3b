"""Faster float32 matrix products on a CPU."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

# oneDNN keeps compiled code for each shape it has met, and torch what it asked oneDNN for, 250 kB
# each: up to 1,024 of either, where one batch needs a handful. Batches come in as many sizes, and
# memory grew by 100 MB and more. Read on first use.
for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "32")

# A weight that is laid out anew is there twice: of a large model, only the first layers are.
PACKED_BYTES = 2**30


@dataclass(frozen=True, eq=False, slots=True)
class _Packed:
    # Shares the weight's memory and so keeps it: no later weight can come to the same address.
    source: Tensor
    version: int
    layout: Tensor

    def holds(self, weight: Tensor) -> bool:
        """Whether the weight is still the one that was laid out, unchanged."""
        return (
            weight.data_ptr() == self.source.data_ptr()
            and weight._version == self.version
            and weight.shape == self.source.shape
            and weight.stride() == self.source.stride()
        )


class PackedProducts(TorchFunctionMode):
    """While active, oneDNN multiplies by frozen weights, which are laid out for it once.

    Torch gives float32 products to MKL, which takes a slower path on processors that are not
    Intel's: on an AMD EPYC, oneDNN, which torch carries as well, is more than twice as fast
    (`benchmarks/embed.py`). Where torch lacks it, or a gradient is asked for, torch multiplies.
    """

    def __init__(self) -> None:
        """Start with no weight laid out; each is on its first use."""
        super().__init__()
        self.usable = (
            platform.machine() in ("x86_64", "AMD64")
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        )
        # By identity, and none for a weight that is gone.
        self._packed = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type["PackedProducts"], tuple[()]]:
        # A copy has weights of its own, which it lays out itself.
        return PackedProducts, ()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Multiply by a frozen weight; leave everything else as it is."""
        if func is F.linear and self.usable and not kwargs:
            input, weight, *rest = args
            bias = rest[0] if rest else None
            layout = self._layout(input, weight, bias)
            if layout is not None:
                return torch.ops.mkldnn._linear_pointwise(input, layout, bias, "none", [], "")
        return func(*args, **(kwargs or {}))

    def _layout(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if not _suits(input, weight, bias):
            return None
        packed: _Packed | None = self._packed.get(weight)
        if packed is None or not packed.holds(weight):
            self._packed.pop(weight, None)
            held = sum(packed.source.nbytes for packed in self._packed.values())
            if held + weight.nbytes > PACKED_BYTES:
                return None
            packed = _Packed(
                weight.detach(),
                weight._version,
                torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None),
            )
            self._packed[weight] = packed
        return packed.layout


def _suits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN can multiply and gives what torch would."""
    operands = [part for part in (input, weight, bias) if part is not None]
    if torch.is_grad_enabled() and any(part.requires_grad for part in operands):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    if any(part.device.type != "cpu" or part.dtype != torch.float32 for part in operands):
        return False
    # Not a quantised weight, which may call itself float32.
    if type(weight) is not torch.nn.Parameter or weight.is_inference():
        return False
    if weight.ndim != 2 or not weight.numel() or input.shape[-1:] != weight.shape[1:]:
        return False
    # oneDNN reads a bias without its strides.
    return bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())
