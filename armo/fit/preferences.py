"""Preferences as tensors: which responses to a prompt are better, and the losses that say so."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Sampler

Margins = Literal["ignore", "scale", "subtract"]


class PreferenceBatch(NamedTuple):
    """Comparisons of responses to one prompt each; those with fewer responses are padded.

    Attributes:
        prompts: Prompt embedding of each comparison.
        adjusted: Adjusted rewards of its responses; zero where padded.
        style: Their surface features; zero where padded.
        ranks: Lower is better, equal is tied; NaN where padded.
        weights: How much each comparison counts.
        margins: Log-odds by which the first response is to be ahead.
        flipped: Probability that a comparison is the wrong way round; one half is a tie.
        folds: Part of the cross-validation.
    """

    prompts: Float[Tensor, "batch dim"]
    adjusted: Float[Tensor, "batch responses objectives"]
    style: Float[Tensor, "batch responses features"]
    ranks: Float[Tensor, "batch responses"]
    weights: Float[Tensor, " batch"]
    margins: Float[Tensor, " batch"]
    flipped: Float[Tensor, " batch"]
    folds: Int[Tensor, " batch"]


@dataclass(frozen=True, eq=False, slots=True)
class Preferences:
    """What a gate is trained on: pairs and longer lists of responses, ranked.

    Prompts and responses are there once, however many comparisons they are in; a batch is drawn
    by indexing, and padded only to its own longest comparison.

    Attributes:
        prompts: Prompt embeddings.
        adjusted: Adjusted rewards of the responses, from heads that were fitted without the
            ratings of their prompts.
        style: Surface features of the responses, in any units; there may be none.
        prompt_of: Prompt of each comparison.
        responses: Responses of each comparison, the chosen one of a pair first; -1 pads.
        ranks: Their ranks, lower is better, equal is tied; NaN pads.
        groups: Prompt group of each comparison: no group is on two sides of a split.
        weights: How much each comparison counts; zero or more.
        balance: What its weight is multiplied by in training, so that style does not tell which
            response is better; one where that is not asked for.
        strengths: How clear each one was, as a multiple of what is usual; NaN where not known.
        margins: Log-odds by which the first response is to be ahead; zero until the settings of
            the loss say otherwise.
        flipped: Probability that a comparison is the wrong way round; one half is a tie.
        folds: Part of the cross-validation; all zero until dealt.
    """

    prompts: Float[Tensor, "prompts dim"]
    adjusted: Float[Tensor, "all_responses objectives"]
    style: Float[Tensor, "all_responses features"]
    prompt_of: Int[Tensor, " comparisons"]
    responses: Int[Tensor, "comparisons responses"]
    ranks: Float[Tensor, "comparisons responses"]
    groups: Int[Tensor, " comparisons"]
    weights: Float[Tensor, " comparisons"]
    balance: Float[Tensor, " comparisons"]
    strengths: Float[Tensor, " comparisons"]
    margins: Float[Tensor, " comparisons"]
    flipped: Float[Tensor, " comparisons"]
    folds: Int[Tensor, " comparisons"]

    @classmethod
    def of_pairs(
        cls,
        prompts: Float[Tensor, "pairs dim"],
        differences: Float[Tensor, "pairs objectives"],
        groups: Int[Tensor, " pairs"],
        *,
        style: Float[Tensor, "pairs features"] | None = None,
        weights: Float[Tensor, " pairs"] | None = None,
        balance: Float[Tensor, " pairs"] | None = None,
        strengths: Float[Tensor, " pairs"] | None = None,
        flipped: Float[Tensor, " pairs"] | None = None,
    ) -> "Preferences":
        """Take pairs of which only differences are known, chosen minus rejected.

        Args:
            prompts: Prompt embedding of each pair.
            differences: Adjusted rewards of the chosen minus those of the rejected response.
            groups: Prompt group of each pair.
            style: Surface features of the chosen minus those of the rejected response.
            weights: How much each pair counts; equal by default.
            balance: What its weight is multiplied by in training; one by default.
            strengths: How clear each one was; unknown by default.
            flipped: Probability that a pair is the wrong way round; zero by default.
        """
        count = len(prompts)
        none = torch.zeros(count, dtype=differences.dtype)
        measured = differences[:, :0] if style is None else style
        return cls(
            prompts=prompts,
            adjusted=torch.cat([differences, torch.zeros_like(differences)]),
            style=torch.cat([measured, torch.zeros_like(measured)]),
            prompt_of=torch.arange(count),
            responses=torch.stack([torch.arange(count), torch.arange(count) + count], dim=1),
            ranks=torch.tensor([0.0, 1.0]).expand(count, 2),
            groups=groups,
            weights=none + 1.0 if weights is None else weights,
            balance=none + 1.0 if balance is None else balance,
            strengths=none + torch.nan if strengths is None else strengths,
            margins=none,
            flipped=none if flipped is None else flipped,
            folds=torch.zeros(count, dtype=torch.int64),
        )

    def __len__(self) -> int:
        """Return the number of comparisons."""
        return len(self.prompt_of)

    def __getitem__(self, rows: Int[Tensor, " batch"]) -> PreferenceBatch:
        """Return some comparisons."""
        present = ~self.ranks[rows].isnan()
        longest = int(present.sum(1).max())
        responses = self.responses[rows, :longest].clamp(min=0)
        there = present[:, :longest, None]
        return PreferenceBatch(
            prompts=self.prompts[self.prompt_of[rows]],
            adjusted=torch.where(there, self.adjusted[responses], 0.0),
            style=torch.where(there, self.style[responses], 0.0),
            ranks=self.ranks[rows, :longest],
            weights=self.weights[rows],
            margins=self.margins[rows],
            flipped=self.flipped[rows],
            folds=self.folds[rows],
        )

    def comparisons(self, rows: Int[Tensor, " batch"]) -> PreferenceBatch:
        """Return some comparisons without their prompts, which take most of the room."""
        return replace(self, prompts=self.prompts[:, :0])[rows]

    def single(self) -> "Preferences":
        """Return the same in single precision."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Preferences(
            **{k: v.float() if v.is_floating_point() else v for k, v in values.items()}
        )

    def to(self, device: torch.device) -> "Preferences":
        """Return the same on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Preferences(**{name: value.to(device) for name, value in values.items()})

    @property
    def digest(self) -> str:
        """SHA-256 of everything."""
        digest = hashlib.sha256()
        for field in fields(self):
            tensor = getattr(self, field.name).contiguous()
            digest.update(f"{field.name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


class Batches(Sampler[Tensor]):
    """Rows of each batch, as tensors: in order, or in an order of each epoch's own."""

    def __init__(
        self, count: int, *, size: int, seed: int | None = None, rank: int = 0, world: int = 1
    ) -> None:
        """Deal rows to batches.

        Args:
            count: Number of rows.
            size: Rows per batch.
            seed: Of the order, together with the epoch; without it the rows keep theirs.
            rank: Which of the processes that share the batches this is.
            world: Number of these processes; all get as many rows, some of which twice.
        """
        self.count, self.size, self.seed = count, size, seed
        self.rank, self.world = rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is next; Lightning calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the rows of one batch after the other."""
        order = torch.arange(self.count)
        if self.seed is not None:
            # Large and odd: no two seeds share the orders of their epochs.
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
            order = torch.randperm(self.count, generator=generator)
        share = math.ceil(self.count / self.world)
        order = torch.cat([order, order])[: share * self.world]
        yield from order[self.rank :: self.world].split(self.size)

    def __len__(self) -> int:
        """Return the number of batches."""
        return math.ceil(math.ceil(self.count / self.world) / self.size)


def plackett_luce_loss(
    logits: Float[Tensor, "*members batch responses"],
    ranks: Float[Tensor, "batch responses"],
    *,
    flipped: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, "*members batch"]:
    """Minus the log-probability of each ranking: pairs, best of several, or whole rankings.

    The best response is drawn from all of them with probability `softmax(logits)`, the next one
    from those that remain, and so on. Responses that tie share the target of their draw equally;
    the last rank, with nothing left to beat, is no draw, unless all tie. So two responses have
    the Bradley-Terry loss `-log sigmoid(u_1 - u_2)`, a tie of two half of it either way round,
    one right response among several the cross-entropy of a softmax, and a strict ranking the
    loss of Plackett and Luce.

    Args:
        logits: Preference log-odds of each response, of one or several models.
        ranks: Lower is better; NaN where there is no response.
        flipped: Probability that a comparison is the wrong way round. The target of a draw among
            `m` responses gives `1 - flipped` to the best and `flipped / (m - 1)` to each other:
            label smoothing, and for a pair the judges' vote.

    References:
        Bradley and Terry, "Rank Analysis of Incomplete Block Designs", Biometrika 39, 1952;
        Plackett, "The Analysis of Permutations", Applied Statistics 24(2), 1975;
        Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML 2007.

    Example:
        >>> plackett_luce_loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
        tensor([0.6931])
    """
    if ranks.shape[1] == 2 and bool((ranks[:, 0] < ranks[:, 1]).all()):
        # Only pairs, the better one first: most of all data, and many times faster.
        ahead = logits[..., 0] - logits[..., 1]
        return -F.logsigmoid(ahead) + (0.0 if flipped is None else flipped * ahead)
    present = ~ranks.isnan()
    order = ranks.nan_to_num(torch.inf)
    itself = torch.eye(ranks.shape[1], dtype=torch.bool, device=ranks.device)
    # For each response, those that are still there when its rank is drawn.
    remaining = (order[:, None, :] >= order[:, :, None]) & present[:, None, :] | itself
    tied = (order[:, None, :] == order[:, :, None]).sum(-1)
    worst = torch.where(present, order, -torch.inf).amax(1, keepdim=True)
    best = order.amin(1, keepdim=True)
    drawn = present & ((order < worst) | (best == worst))
    others = (remaining.sum(-1) - 1).clamp(min=1)
    away = (0.0 if flipped is None else flipped[:, None]) / others
    rivals = logits.unsqueeze(-2)
    total = rivals.masked_fill(~remaining, -torch.inf).logsumexp(-1)
    mean = (1.0 - (others + 1) * away) * logits + away * (rivals * remaining).sum(-1)
    return torch.where(drawn, (total - mean) / tied, 0.0).sum(-1)


def on_first(values: Float[Tensor, " batch"], responses: int) -> Float[Tensor, "batch responses"]:
    """Put a value on the first response of each comparison, and zero on the others."""
    return F.pad(values[:, None], (0, responses - 1))


def ranked_right(
    scores: Float[Tensor, "*members batch responses"], ranks: Float[Tensor, "batch responses"]
) -> Float[Tensor, "*members batch"]:
    """Share of the ordered pairs of each comparison whose scores are in that order.

    Equal scores count half; NaN where all responses tie.

    Args:
        scores: Of the responses.
        ranks: Lower is better; NaN where there is no response.
    """
    better = ranks[:, :, None] < ranks[:, None, :]
    apart = scores.unsqueeze(-1) - scores.unsqueeze(-2)
    right = (apart > 0).to(scores.dtype) + 0.5 * (apart == 0).to(scores.dtype)
    counted: Tensor = (right * better).sum((-1, -2)) / better.sum((-1, -2))
    return counted


def style_correlations(
    scores: Float[Tensor, "*members batch responses"],
    style: Float[Tensor, "batch responses features"],
    ranks: Float[Tensor, "batch responses"],
    *,
    weights: Float[Tensor, "*members batch"],
) -> Float[Tensor, "*members features"]:
    """Correlation of scores with style within comparisons, both less the comparison's mean.

    Of pairs, it is the correlation about zero of score differences with style differences.

    Args:
        scores: Of the responses.
        style: Their surface features.
        ranks: NaN where there is no response.
        weights: How much each comparison counts.
    """
    present = (~ranks.isnan()).to(scores.dtype)
    count = present.sum(-1, keepdim=True)
    u = (scores - (scores * present).sum(-1, keepdim=True) / count) * present
    z = style - (style * present[..., None]).sum(-2, keepdim=True) / count[..., None]
    z = z * present[..., None]
    products = torch.einsum("...b,...bn,bnf->...f", weights, u, z)
    u_squares = torch.einsum("...b,...bn->...", weights, u.square())[..., None]
    z_squares = torch.einsum("...b,bnf->...f", weights, z.square())
    # A feature that is the same in all responses, or a score that is, correlates with nothing.
    return products * (u_squares * z_squares).clamp(min=1e-30).rsqrt()
