"""Where the responses of some lists are, one list after the other, and which prompts they share."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from armo.data.conversation import ResponseList, prompt_group


def list_of_response(rows: Sequence[ResponseList]) -> Int[Tensor, " responses"]:
    """Number of the list of each response."""
    counts = torch.tensor([len(row.responses) for row in rows], dtype=torch.int64)
    return torch.arange(len(rows)).repeat_interleave(counts)


def prompt_of_list(rows: Sequence[ResponseList]) -> Int[Tensor, " lists"]:
    """Number of the prompt group of each list, to resample by."""
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(prompt_group(row.prompt), len(numbers)) for row in rows]
    return torch.tensor(groups, dtype=torch.int64)
