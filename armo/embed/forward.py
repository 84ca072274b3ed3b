"""Running a plan: batches through the model, shared prompts once, hidden states pooled."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from armo.embed.batching import token_batches
from armo.embed.linear import PackedProducts
from armo.embed.plan import Plan, SharedPrefix, Span, TokenSequence, shared_length, within
from armo.embed.spec import BackboneError

logger = logging.getLogger(__name__)

# The keys and values of a token that was run before take less room than running one.
CACHED_PER_RUN = 4

# Tokens in a batch from which on more of them are hardly run any faster per token: from there on
# a batch rather stays small than pads its rows.
CPU_ENOUGH = 256
GPU_ENOUGH = 8192

# How far two ways to the same hidden state may part before one counts as wrong.
SAME = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 1e-2}


class Runner:
    """Runs token sequences through a frozen model, within a budget of padded tokens per batch.

    Attributes:
        batch_tokens: The budget; halved, for good, whenever memory runs out.
        dim: Width of an embedding.
        causal: Whether no token's hidden state depends on a later token: tried out, not assumed.
        shares: Whether reading on from cached keys and values gives the same as reading at once.
    """

    def __init__(
        self, model: PreTrainedModel, *, layers: Sequence[int], batch_tokens: int, decoder: bool
    ) -> None:
        """Wrap a model; `decoder` says that it may be causal, which is then tried out."""
        self.model = model.eval().requires_grad_(False)
        self.model.config.use_cache = False  # nothing is generated: a cache is only memory
        self.layers = tuple(layers)
        self.products = PackedProducts()
        self.batch_tokens = batch_tokens
        self.enough = CPU_ENOUGH if model.device.type == "cpu" else GPU_ENOUGH
        self.causal = self.shares = False
        # The width of a token's states, which not every configuration says.
        self.dim = self._width()
        if decoder:
            self.causal, self.shares = self._try_out()

    @torch.inference_mode()
    def run(
        self,
        plan: Plan,
        *,
        max_rows: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "targets dim"]:
        """Run a plan.

        Args:
            plan: What to run.
            max_rows: Rows per batch at most; the token budget limits them anyway.
            progress: Called after each batch with the tokens that it ran, padding not counted.

        Returns:
            One embedding per target, in the model's dtype, on the CPU; NaN where missing.

        Raises:
            BackboneError: If memory runs out on a single sequence.
        """
        pooled = Pooled(plan.targets, device=self.model.device)
        told = progress or (lambda tokens: None)
        self._each_batch(
            plan.sequences,
            [len(sequence.ids) for sequence in plan.sequences],
            [len(sequence.ids) for sequence in plan.sequences],
            lambda batch: self._run_sequences(batch),
            pooled,
            told,
            max_rows=max_rows,
        )
        self._each_batch(
            plan.shared,
            [len(group.prefix.ids) for group in plan.shared],
            [
                len(group.prefix.ids) + max(len(tail.ids) for tail in group.tails)
                for group in plan.shared
            ],
            lambda batch: self._run_shared(batch, max_rows=max_rows),
            pooled,
            told,
            max_rows=max_rows,
        )
        return pooled.means(self.dim).to(self.model.dtype).cpu()

    def run_at_once(self, plan: Plan) -> Float[Tensor, "targets dim"]:
        """Run a plan without shared prompts in one batch, beside one of prompts alone.

        For callers who make batches themselves. Gradients are kept where they are asked for; the
        embeddings stay on the model's device, else they are those of `run`.
        """
        assert not plan.shared
        pooled = Pooled(plan.targets, device=self.model.device)
        alone = [s for s in plan.sequences if all(p.target < plan.prompts for p in s.spans)]
        rest = [s for s in plan.sequences if any(p.target >= plan.prompts for p in s.spans)]
        for batch in (alone, rest):
            for part in self._run_sequences(batch) if batch else ():
                pooled.add(part)
        return pooled.means(self.dim).to(self.model.dtype)

    @torch.inference_mode()
    def run_along(self, plan: Plan) -> Float[Tensor, "targets dim"]:
        """Run a plan whose sequences are mostly beginnings of the longest one, in one pass over it.

        The longest is run piece by piece, reading on from its own keys and values; at each piece's
        end, so is what the others have there instead. The embeddings are those of `run`, beyond
        rounding.

        Raises:
            BackboneError: If memory runs out.
        """
        assert self.shares
        assert not plan.shared
        pooled = Pooled(plan.targets, device=self.model.device)
        if plan.sequences:
            sums = self._within_memory(self._run_along, plan.sequences)
            if sums is None:
                longest = max(len(sequence.ids) for sequence in plan.sequences)
                raise BackboneError(f"out of memory on a single sequence of {longest} tokens")
            for part in sums:
                pooled.add(part)
        return pooled.means(self.dim).to(self.model.dtype).cpu()

    def _run_along(self, sequences: Sequence[TokenSequence]) -> Iterator["SpanSums"]:
        trunk = max(sequences, key=lambda sequence: len(sequence.ids)).ids
        common = [shared_length(sequence.ids, trunk) for sequence in sequences]
        for row, n in zip(sequences, common, strict=True):
            if n == 0:
                yield self._read_on(row, DynamicCache(config=self.model.config), after=0)
        cache = DynamicCache(config=self.model.config)
        for start, end in pairwise(sorted({0, *common})):
            rows = [s for s, n in zip(sequences, common, strict=True) if n > start]
            spans = [span for row in rows for span in within(row, start, end).spans]
            yield self._read_on(TokenSequence(trunk[start:end], tuple(spans)), cache, after=start)
            for row, n in zip(sequences, common, strict=True):
                if n == end and n < len(row.ids):
                    copied = _rows_of(cache, self._on_device(torch.tensor([0])))
                    yield self._read_on(within(row, n, len(row.ids)), copied, after=n)

    def _read_on(self, piece: TokenSequence, cache: DynamicCache, *, after: int) -> "SpanSums":
        """Run a piece of a sequence after what is in the cache, and add it there."""
        length = len(piece.ids)
        states = self._states(
            input_ids=self._on_device(torch.tensor([piece.ids])),
            attention_mask=self._on_device(torch.ones(1, after + length, dtype=torch.long)),
            position_ids=self._on_device(torch.arange(after, after + length)[None]),
            past_key_values=cache,
            use_cache=True,
        )
        return SpanSums(states, [piece.spans], length)

    def _each_batch(
        self,
        jobs: Sequence[Any],
        lengths: Sequence[int],
        whole: Sequence[int],
        run: Callable[[list[Any]], Iterator["SpanSums"]],
        pooled: "Pooled",
        progress: Callable[[int], None],
        *,
        max_rows: int | None,
    ) -> None:
        """Run jobs in batches; where memory runs out, in smaller ones from there on."""
        left = list(range(len(jobs)))
        while left:
            batches = token_batches(
                [lengths[job] for job in left],
                max_tokens=self.batch_tokens,
                enough=self.enough,
                max_rows=max_rows,
            )
            done: set[int] = set()
            for batch in batches:
                numbers = [left[k] for k in batch]
                sums = self._within_memory(run, [jobs[number] for number in numbers])
                if sums is None:
                    self._halve(max(whole[number] for number in numbers), rows=len(numbers))
                    break
                # A batch counts as a whole or not at all: none of it is added twice.
                for part in sums:
                    pooled.add(part)
                    progress(part.tokens)
                done.update(numbers)
            left = [job for job in left if job not in done]

    @staticmethod
    def _within_memory(
        run: Callable[[list[Any]], Iterator["SpanSums"]], jobs: list[Any]
    ) -> list["SpanSums"] | None:
        """Run a batch; None if memory ran out. With the error, all that it filled is let go."""
        try:
            return list(run(jobs))
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            return None

    def _halve(self, longest: int, *, rows: int) -> None:
        # Then the responses to a shared prompt are already run one by one, see `_run_shared`.
        if rows == 1 and CACHED_PER_RUN * self.batch_tokens < 2 * longest:
            raise BackboneError(
                f"out of memory on a single sequence of {longest} tokens; lower `max_tokens` or "
                f"use a smaller backbone"
            )
        self.batch_tokens //= 2
        logger.warning(
            "out of memory; going on with batches of %d tokens (`batch_tokens`)", self.batch_tokens
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _run_sequences(self, batch: Sequence[TokenSequence]) -> Iterator["SpanSums"]:
        ids, mask = pad([sequence.ids for sequence in batch], side="right")
        # Behind a causal sequence no padding is ever read: without a mask, attention is faster.
        whole = self.causal or bool(mask.all())
        states = self._states(
            input_ids=self._on_device(ids),
            attention_mask=None if whole else self._on_device(mask),
        )
        yield SpanSums(states, [sequence.spans for sequence in batch], int(mask.sum()))

    def _run_shared(
        self, groups: Sequence[SharedPrefix], *, max_rows: int | None
    ) -> Iterator["SpanSums"]:
        """Run prompts once, then all that follows them, reading on from their keys and values."""
        # Padded on the left, a prompt ends where what follows it begins: what counts distances by
        # columns, as sliding windows do, counts right.
        ids, mask = pad([group.prefix.ids for group in groups], side="left")
        lengths = mask.sum(dim=1)
        shift = (ids.shape[1] - lengths).tolist()
        cache = DynamicCache(config=self.model.config)
        states = self._states(
            input_ids=self._on_device(ids),
            attention_mask=self._on_device(mask),
            position_ids=self._on_device((mask.cumsum(dim=1) - 1).clamp(min=0)),
            past_key_values=cache,
            use_cache=True,
        )
        spans = [
            tuple(Span(s.target, s.start + by, s.end + by) for s in group.prefix.spans)
            for group, by in zip(groups, shift, strict=True)
        ]
        yield SpanSums(states, spans, int(lengths.sum()))
        del states

        tails = [(k, tail) for k, group in enumerate(groups) for tail in group.tails]
        longest = max(len(tail.ids) for _, tail in tails)
        rows = max(1, CACHED_PER_RUN * self.batch_tokens // (ids.shape[1] + longest))
        for batch in token_batches(
            [len(tail.ids) for _, tail in tails],
            max_tokens=self.batch_tokens,
            enough=self.enough,
            max_rows=rows if max_rows is None else min(rows, max_rows),
        ):
            of = torch.tensor([tails[k][0] for k in batch])
            after, after_mask = pad([tails[k][1].ids for k in batch], side="right")
            states = self._states(
                input_ids=self._on_device(after),
                attention_mask=self._on_device(torch.cat([mask[of], after_mask], dim=1)),
                # Padding stays at the last position of its row: there may be none beyond it.
                position_ids=self._on_device(lengths[of, None] + after_mask.cumsum(dim=1) - 1),
                past_key_values=_rows_of(cache, self._on_device(of)),
                use_cache=True,
            )
            yield SpanSums(states, [tails[k][1].spans for k in batch], int(after_mask.sum()))

    def _states(self, **inputs: Any) -> Float[Tensor, "batch tokens dim"]:
        # The compiler makes products of its own, and does not get past the ones packed here.
        with nullcontext() if torch.compiler.is_compiling() else self.products:
            if self.layers == (-1,):
                # Asked for all hidden states, a model keeps them all: gigabytes for a large one.
                last: Tensor = self.model(**inputs).last_hidden_state
                return last
            outputs = self.model(**inputs, output_hidden_states=True)
        return torch.cat([outputs.hidden_states[layer] for layer in self.layers], dim=-1)

    @torch.inference_mode()
    def _width(self) -> int:
        one = torch.ones(1, 1, dtype=torch.long, device=self.model.device)
        return self._states(input_ids=one, attention_mask=one).shape[-1]

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.model.device, non_blocking=True)

    @torch.inference_mode()
    def _try_out(self) -> tuple[bool, bool]:
        """Run a few random tokens in each of the ways, and compare.

        A model that reads ahead (some embedding models are made of decoders) would give a prompt
        another embedding after each response; one that keeps its state elsewhere cannot read on.
        """
        generator = torch.Generator().manual_seed(0)
        size = min(int(self.model.config.get_text_config().vocab_size), 1000)
        prompts, tails = [
            [torch.randint(size, (n,), generator=generator).tolist() for n in lengths]
            for lengths in ((9, 14), (5, 7))
        ]

        def row(ids: list[int], target: int) -> TokenSequence:
            return TokenSequence(ids, (Span(target, len(ids) - 1, len(ids)),))

        def same(sums: Iterator[SpanSums], reference: Tensor) -> bool:
            pooled = Pooled(4, device=self.model.device)
            for part in sums:
                pooled.add(part)
            difference = (pooled.means(self.dim) - reference).norm(dim=1) / reference.norm(dim=1)
            return bool((difference < SAME[self.model.dtype]).all())

        apart = [row(prompts[k], k) for k in (0, 1)]
        joined = [row(prompts[k] + tails[k], 2 + k) for k in (0, 1)]
        pooled = Pooled(4, device=self.model.device)
        for sequence in (*apart, *joined):
            for part in self._run_sequences([sequence]):
                pooled.add(part)
        reference = pooled.means(self.dim)

        self.causal = True
        both = [
            TokenSequence(j.ids, (a.spans[0], *j.spans)) for a, j in zip(apart, joined, strict=True)
        ]
        if not same(self._run_sequences(both), reference):
            self.causal = False
            logger.info("this model reads ahead: prompts are run apart from their responses")
            return False, False
        groups = [SharedPrefix(apart[k], [row(tails[k], 2 + k)]) for k in (0, 1)]
        try:
            shares = same(self._run_shared(groups, max_rows=None), reference)
            reason = "other embeddings"
        except Exception as error:  # each model fails in its own way
            if isinstance(error, RuntimeError) and _out_of_memory(error):
                raise
            shares, reason = False, f"{type(error).__name__}: {error}"
        if not shares:
            logger.info("this model cannot read on from cached prompts (%s)", reason)
        return True, shares


class SpanSums:
    """Sums of hidden states over the spans of one batch, in float32."""

    def __init__(
        self,
        states: Float[Tensor, "batch tokens dim"],
        spans: Sequence[tuple[Span, ...]],
        tokens: int,
    ) -> None:
        """Pool at once, so that the hidden states of a batch can go.

        Args:
            states: Hidden states of the batch.
            spans: Spans of each row.
            tokens: Tokens of the batch, padding not counted.
        """
        self.tokens = tokens
        flat = [(row, span) for row, of_row in enumerate(spans) for span in of_row]
        device = states.device
        self.targets = torch.tensor([s.target for _, s in flat], dtype=torch.long, device=device)
        edges = torch.tensor(
            [(s.start, s.end) for _, s in flat], dtype=torch.long, device=device
        ).reshape(-1, 2)
        self.counts = edges[:, 1] - edges[:, 0]
        if all(span.end - span.start == 1 for _, span in flat):
            rows = torch.tensor([row for row, _ in flat], dtype=torch.long, device=device)
            self.sums = states[rows, edges[:, 0]].float()
            return
        columns = torch.arange(states.shape[1], device=device)
        inside = (columns >= edges[:, :1]) & (columns < edges[:, 1:])
        if len(flat) == len(states) and all(len(of_row) == 1 for of_row in spans):
            # Left out, not weighted by nought: what stands in the padding may be no number.
            self.sums = states.float().masked_fill(~inside[:, :, None], 0.0).sum(dim=1)
        else:
            parts = [states[row, span.start : span.end].float().sum(dim=0) for row, span in flat]
            self.sums = torch.stack(parts)


class Pooled:
    """Means over spans, summed up batch by batch; a span may be spread over several batches."""

    def __init__(self, targets: int, *, device: torch.device) -> None:
        """Start with nothing for each of so many targets."""
        self.sums: Tensor | None = None
        self.counts = torch.zeros(targets, device=device)

    def add(self, part: SpanSums) -> None:
        """Add the sums of a batch."""
        if self.sums is None:
            self.sums = part.sums.new_zeros(len(self.counts), part.sums.shape[1])
        self.sums.index_add_(0, part.targets, part.sums)
        self.counts.index_add_(0, part.targets, part.counts.to(self.counts.dtype))

    def means(self, dim: int) -> Float[Tensor, "targets dim"]:
        """Return the means; NaN where nothing was added."""
        if self.sums is None:
            return torch.full((len(self.counts), dim), torch.nan, device=self.counts.device)
        return self.sums / self.counts[:, None]


def pad(
    rows: Sequence[list[int]], *, side: str
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Pad token ids to one length; return them with the mask of what is no padding.

    What stands in the padding does not matter: nothing reads it.

    Example:
        >>> pad([[5, 6], [7]], side="left")[0]
        tensor([[5, 6],
                [0, 7]])
    """
    length = max(len(row) for row in rows)
    gaps = [[0] * (length - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    if side == "left":
        ids = [gap + row for gap, row in zip(gaps, rows, strict=True)]
        mask = [gap + one for gap, one in zip(gaps, ones, strict=True)]
    else:
        ids = [row + gap for gap, row in zip(gaps, rows, strict=True)]
        mask = [one + gap for gap, one in zip(gaps, ones, strict=True)]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def _rows_of(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """Copy some rows of a cache, any row any number of times; the cache itself stays."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, on a GPU or, where the system says so before it kills, on a CPU."""
    signs = ("out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        sign in str(error) for sign in signs
    )
