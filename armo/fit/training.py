"""Training the gate on preferences, in Lightning, from the best constant mix onwards."""

import copy
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from armo.artifacts import digest_json, read_json, read_tensors, write_json, write_tensors
from armo.fit.constant import fit_constant_mix
from armo.fit.gating import EVALUATED, GatingDiagnostics, GatingNetwork, diagnose
from armo.fit.heads import deal_folds
from armo.fit.preferences import (
    Batches,
    Margins,
    PreferenceBatch,
    Preferences,
    on_first,
    plackett_luce_loss,
    ranked_right,
    style_correlations,
)

log = logging.getLogger(__name__)

Keep = Literal["auto", "gate", "constant"]

CSV = partial(CSVLogger, name="", version="logs")

# Folder of a training's checkpoint, while it is not finished.
CHECKPOINTS = ".unfinished"

# Settings of a trainer that say when it stops or how often it logs.
LENGTH = ("max_epochs", "max_steps", "max_time", "log_every_n_steps")

# Two-sided 95 % interval of the normal distribution.
INTERVAL = 1.96


@dataclass(frozen=True, slots=True)
class Gain:
    """By how much the gate is ahead of the best constant mix, on prompts neither was fitted on.

    Attributes:
        mean: Mean over comparisons.
        error: Its standard error, comparisons of one prompt taken together.
    """

    mean: float
    error: float

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.mean - INTERVAL * self.error

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.mean + INTERVAL * self.error


@dataclass(frozen=True, slots=True)
class GatingSummary:
    """How the gate was trained; losses and accuracies on prompts that were held out of each member.

    Attributes:
        comparisons: Pairs and lists trained on.
        trained: Whether a gate was trained at all.
        kept: What the model scores with: the gate, or the best constant mix.
        epochs: Best epoch of each member; 0 is the constant mix that it started from.
        constant_weights: The best constant mix, by objective.
        constant_loss: Loss of constant mixes.
        constant_accuracy: Their share of ordered pairs ranked right.
        loss: The gate's loss.
        accuracy: The gate's share of ordered pairs ranked right.
        loss_gain: By how much the gate's loss is lower.
        accuracy_gain: By how much its accuracy is higher.
        beta: Scale of score differences in the preference probability, fitted on comparisons as
            they were made: not balanced for style, and with nothing beside the score to explain
            them. So the probability is that of what judges say, their taste in style included.
        best_single: The objective that ranks most of the ordered pairs right by itself.
        style: What the judges gave to style by itself, in log-odds per root mean square of the
            feature's difference between two responses; empty unless it is a nuisance.
        diagnostics: What the whole gate does with the prompts it was trained on, whether or not
            it was kept.
    """

    comparisons: int
    trained: bool
    kept: Literal["gate", "constant"]
    epochs: tuple[int, ...]
    constant_weights: dict[str, float]
    constant_loss: float
    constant_accuracy: float
    loss: float
    accuracy: float
    loss_gain: Gain
    accuracy_gain: Gain
    beta: float
    best_single: str
    style: dict[str, float]
    diagnostics: GatingDiagnostics

    @property
    def better(self) -> bool:
        """Whether the gate is shown to have a lower loss than the best constant mix."""
        return self.loss_gain.low > 0.0

    @property
    def verdict(self) -> str:
        """What came of the comparison, in one sentence."""
        if not self.trained:
            return "No gate was trained: the constant mix is used."
        gain = self.loss_gain
        shown = f"loss lower by {gain.mean:.4f} [{gain.low:.4f}, {gain.high:.4f}]"
        if self.better:
            return f"The gate beats the best constant mix on held-out prompts: {shown}."
        kept = "the constant mix is kept" if self.kept == "constant" else "it is kept all the same"
        return f"The gate is NOT shown to beat the best constant mix: {shown}; {kept}."

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "GatingSummary":
        """Read what `dataclasses.asdict` wrote."""
        return cls(
            **{
                **values,
                "epochs": tuple(values["epochs"]),
                "loss_gain": Gain(**values["loss_gain"]),
                "accuracy_gain": Gain(**values["accuracy_gain"]),
                "diagnostics": GatingDiagnostics(**values["diagnostics"]),
            }
        )


class OutOfFold(NamedTuple):
    """Each comparison by the member that never saw its prompt.

    Attributes:
        losses: Not weighted.
        scores: Of the responses.
        right: Share of its ordered pairs that are in order; NaN where all tie.
    """

    losses: Float[Tensor, " comparisons"]
    scores: Float[Tensor, "comparisons responses"]
    right: Float[Tensor, " comparisons"]


class GatingTrainer(L.LightningModule):
    """Trains the members of a gate together, each on all folds but its own.

    Every member has a `beta` and style coefficients of its own. After each epoch, each is
    evaluated on its own fold, and those that have never been better are remembered; in the end
    `use_best` returns to them. All of it is in a Lightning checkpoint. What an epoch draws depends
    on the seed and the epoch only, so a training that was resumed ends as if it had not stopped.
    """

    def __init__(
        self,
        gate: GatingNetwork,
        *,
        beta: Float[Tensor, " members"],
        style: Float[Tensor, "members features"],
        nuisance: bool = False,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        entropy: float = 0.0,
        style_penalty: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Wrap a gate for training.

        Args:
            gate: The network, already at its starting point.
            beta: Starting values.
            style: Starting coefficients of the surface features.
            nuisance: Whether style explains preferences beside the score.
            learning_rate: Of AdamW.
            weight_decay: Of AdamW on the MLP; it pulls the gate towards its constant logits.
            entropy: Reward for the entropy of a prompt's weights, in units of the loss per nat.
            style_penalty: Penalty on the sum of squared correlations of scores with style.
            seed: Of the dropout, together with the epoch.
        """
        super().__init__()
        self.save_hyperparameters(ignore=["gate", "beta", "style"])
        self.gate = gate
        self.log_beta = nn.Parameter(beta.log().float())
        self.style = nn.Parameter(style.float(), requires_grad=nuisance)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.entropy = entropy
        self.style_penalty = style_penalty
        self.seed = seed
        self.best = copy.deepcopy(gate).requires_grad_(False)
        self.register_buffer("best_log_beta", self.log_beta.detach().clone())
        self.register_buffer("best_style", self.style.detach().clone())
        self.register_buffer("best_loss", torch.full((gate.members,), torch.inf))
        self.register_buffer("best_epoch", torch.zeros(gate.members, dtype=torch.int64))
        self.best_log_beta: Tensor
        self.best_style: Tensor
        self.best_loss: Tensor
        self.best_epoch: Tensor
        self._trained: list[Tensor] = []

    def forward(
        self,
        prompts: Float[Tensor, "batch dim"],
        adjusted: Float[Tensor, "batch responses objectives"],
    ) -> Float[Tensor, "members batch responses"]:
        """Return each member's scores."""
        return torch.einsum("mbk,bnk->mbn", self.gate.member_weights(prompts), adjusted)

    def losses(
        self, batch: PreferenceBatch, scores: Float[Tensor, "members batch responses"]
    ) -> Float[Tensor, "members batch"]:
        """Return each member's loss of each comparison, not weighted."""
        odds = self.log_beta.exp()[:, None, None] * scores
        odds = odds + torch.einsum("bnf,mf->mbn", batch.style, self.style)
        odds = odds - on_first(batch.margins, odds.shape[-1])
        return plackett_luce_loss(odds, batch.ranks, flipped=batch.flipped)

    def on_train_start(self) -> None:
        """Stop at once where the training that is resumed had been stopped."""
        stopping = self.trainer.early_stopping_callback
        if stopping is not None and stopping.stopped_epoch:
            self.trainer.should_stop = True

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Draw the dropout of each epoch from its own seed."""
        # Not in `on_train_epoch_start`, which Lightning leaves out of the first epoch resumed.
        if batch_idx == 0:
            torch.manual_seed(self.seed + 1_000_003 * self.current_epoch + self.global_rank)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch: the mean over comparisons, added up over members."""
        weights = self.gate.member_weights(batch.prompts)
        scores = torch.einsum("mbk,bnk->mbn", weights, batch.adjusted)
        counted = self._others(batch) * batch.weights
        loss = (self.losses(batch, scores) * counted).mean(1)
        if self.entropy:
            nats = torch.special.entr(weights).sum(-1)
            loss = loss - self.entropy * (nats * counted).mean(1)
        if self.style_penalty:
            correlations = style_correlations(scores, batch.style, batch.ranks, weights=counted)
            loss = loss + self.style_penalty * correlations.square().sum(-1)
        self._trained.append(loss.detach().mean())
        return loss.sum()

    def on_train_epoch_end(self) -> None:
        """Log the loss once: Lightning takes a tenth of a step to do it every time."""
        self.log("train_loss", torch.stack(self._trained).mean(), sync_dist=True)
        self._trained.clear()

    def validation_step(self, preferences: Preferences, batch_idx: int) -> None:
        """Evaluate each member on its own fold, and remember those that have never been better."""
        evaluated = self.out_of_fold(preferences)
        losses = self._of_folds(evaluated.losses, preferences)
        better = losses < self.best_loss
        self.remember(better, losses, epoch=self.current_epoch + 1)
        # Of the best so far: training goes on as long as any member still improves.
        self.log("val_loss", self.best_loss.mean(), prog_bar=True, batch_size=1, sync_dist=True)
        self.log("val_loss_now", losses.mean(), batch_size=1, sync_dist=True)
        accuracies = self._of_folds(evaluated.right, preferences)
        self.log("val_accuracy", accuracies.mean(), prog_bar=True, batch_size=1, sync_dist=True)

    def _of_folds(
        self, values: Float[Tensor, " comparisons"], preferences: Preferences
    ) -> Float[Tensor, " members"]:
        known = ~values.isnan()
        folds, weights = preferences.folds[known], preferences.weights[known].double()
        sums = torch.zeros(2, self.gate.members, dtype=torch.float64, device=folds.device)
        sums[0].index_add_(0, folds, values[known].double() * weights)
        sums[1].index_add_(0, folds, weights)
        # A fold in which nothing counts has no loss, and its member stays where it started.
        return (sums[0] / sums[1].clamp(min=1e-30)).float()

    @torch.no_grad()
    def remember(self, better: Tensor, losses: Float[Tensor, " members"], *, epoch: int) -> None:
        """Take some members as the best so far."""
        self.best_loss[better] = losses[better]
        self.best_epoch[better] = epoch
        self.best_log_beta[better] = self.log_beta[better]
        self.best_style[better] = self.style[better]
        for best, now in zip(self.best.parameters(), self.gate.parameters(), strict=True):
            best[better] = now[better]

    @torch.no_grad()
    def use_best(self) -> None:
        """Return each member to where it was best."""
        self.gate.load_state_dict(self.best.state_dict())
        self.log_beta.copy_(self.best_log_beta)
        self.style.copy_(self.best_style)

    def remember_start(self, preferences: Preferences) -> None:
        """Take all members as they are as the best so far."""
        losses = self._of_folds(self.out_of_fold(preferences).losses, preferences)
        everyone = torch.ones(self.gate.members, dtype=torch.bool)
        self.remember(everyone, losses, epoch=0)

    @torch.no_grad()
    def out_of_fold(self, preferences: Preferences) -> "OutOfFold":
        """Judge each comparison by the member that never saw its prompt."""
        # Each prompt once, and of the members only the one that is asked.
        members = self.gate.members
        pairs = preferences.prompt_of * members + preferences.folds
        distinct, place = pairs.unique(return_inverse=True)
        weights = self.gate.own_weights(
            preferences.prompts, distinct // members, distinct % members
        )
        losses = torch.empty_like(preferences.weights)
        right = torch.empty_like(preferences.weights)
        found = torch.zeros_like(preferences.ranks)
        for rows in torch.arange(len(preferences)).split(EVALUATED):
            batch = preferences.comparisons(rows)
            of_prompts = weights[place[rows]]
            scores = torch.einsum("bk,bnk->bn", of_prompts, batch.adjusted)
            odds = self.log_beta.exp()[batch.folds, None] * scores
            odds = odds + torch.einsum("bnf,bf->bn", batch.style, self.style[batch.folds])
            odds = odds - on_first(batch.margins, odds.shape[1])
            losses[rows] = plackett_luce_loss(odds, batch.ranks, flipped=batch.flipped)
            right[rows] = ranked_right(scores, batch.ranks)
            found[rows, : scores.shape[1]] = scores
        return OutOfFold(losses, found, right)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the constant logits, `beta` and the style coefficients are not decayed."""
        undecayed = [self.gate.output.bias, self.log_beta, self.style]
        free = {id(parameter) for parameter in undecayed}
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(
            [
                {
                    "params": [p for p in learned if id(p) not in free],
                    "weight_decay": self.weight_decay,
                },
                {"params": [p for p in learned if id(p) in free], "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
            fused=True,
        )

    def _others(self, batch: PreferenceBatch) -> Float[Tensor, "members batch"]:
        """Whether a member trains on a comparison: unless it is in the member's own fold."""
        members = torch.arange(self.gate.members, device=batch.folds.device)
        return (batch.folds != members[:, None]).to(batch.weights.dtype)


class PreferenceDataModule(L.LightningDataModule):
    """Preferences in batches of one indexing each: no Python per row in the loop."""

    def __init__(self, preferences: Preferences, *, batch_size: int, seed: int) -> None:
        """Take the preferences of all folds.

        Args:
            preferences: What `GatingTrainer` trains on and is evaluated on.
            batch_size: Comparisons per step and device.
            seed: Of their order.
        """
        super().__init__()
        self.preferences = preferences
        self.batch_size, self.seed = batch_size, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in random order, each process its share."""
        rank, world = 0, 1
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
        return self._load(
            Batches(
                len(self.preferences),
                size=self.batch_size,
                seed=self.seed,
                rank=rank,
                world=world,
            )
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """All preferences, in order; every process evaluates them all."""
        whole: Any = [self.preferences]
        return DataLoader(whole, batch_size=None)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch, without Lightning's walk through what it might be made of."""
        if isinstance(batch, Preferences):
            return batch.to(device)
        return PreferenceBatch(*(tensor.to(device) for tensor in batch))

    def _load(self, batches: Batches) -> DataLoader[Any]:
        rows: Any = self.preferences
        return DataLoader(rows, sampler=batches, batch_size=None)


@torch.random.fork_rng()  # the caller's generators are left alone
def fit_gating(
    preferences: Preferences,
    *,
    objectives: Sequence[str],
    mixed: Sequence[int],
    folder: Path,
    nuisance: bool = False,
    style_names: Sequence[str] = (),
    trainer: Callable[..., L.Trainer] = L.Trainer,
    logger: Callable[..., Logger] = CSV,
    progress: bool = True,
    keep: Keep = "auto",
    folds: int = 5,
    hidden_dim: int = 64,
    hidden_layers: int = 1,
    dropout: float = 0.5,
    temperature: float = 1.0,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    batch_size: int = 256,
    margins: Margins = "scale",
    label_smoothing: float = 0.0,
    entropy: float = 0.0,
    style_penalty: float = 0.0,
    patience: int = 10,
    seed: int = 0,
) -> tuple[GatingNetwork, GatingSummary]:
    """Train a gate on preferences: one member for each fold of the prompts, then averaged.

    Each member starts at the best constant mix of the folds it is trained on, and is stopped where
    its loss on its own fold is lowest. So every comparison is scored by a member that never saw
    its prompt, and these scores say how far the gate is ahead of constant mixes that never saw it
    either, and what `beta` is. They are a little too good, since the epoch was chosen by them.

    A training that was cut off goes on at its last epoch when it is called again with the same
    arguments, and ends with the same bits.

    Args:
        preferences: What to train on.
        objectives: Names of the columns of adjusted rewards.
        mixed: Columns that may get weight.
        folder: Where logs and checkpoints of the training go.
        nuisance: Whether what judges give to style is explained by the surface features, whose
            terms in the loss are dropped at scoring: then the gate need not find it in the
            rewards.
        style_names: Columns of the surface features.
        trainer: Makes the Lightning trainer; its settings are the user's.
        logger: Makes the Lightning logger, given `save_dir`.
        progress: Whether to show a progress bar.
        keep: `auto` keeps the gate if its held-out loss is shown to be lower than that of the best
            constant mix (95 % interval), else that mix; `gate` and `constant` keep what they say.
        folds: Number of members, and of parts of the prompts.
        hidden_dim: Width of a hidden layer.
        hidden_layers: Number of hidden layers.
        dropout: Share of hidden units dropped in training.
        temperature: Divides the gate's logits.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW, towards the constant mix.
        batch_size: Comparisons per step.
        margins: What the margin of a pair does: `scale` multiplies its weight (Wang et al.,
            "HelpSteer2-Preference", 2024), `subtract` takes it off the log-odds (Touvron et al.,
            "Llama 2", 2023, section 3.2.2), `ignore` nothing. A pair without one is plain.
        label_smoothing: Share of comparisons taken to be the wrong way round.
        entropy: Reward for the entropy of a prompt's weights, in units of the loss per nat.
        style_penalty: Penalty on the sum of squared correlations of scores with style.
        patience: Epochs without improvement of any member before stopping.
        seed: Of initialisation, dropout, order of comparisons and the folds.

    Returns:
        The gate, in evaluation mode, and how it was trained.

    Raises:
        ValueError: If a setting is out of range, or there are fewer distinct prompts than folds.
    """
    for name, given, known in (
        ("keep", keep, get_args(Keep)),
        ("margins", margins, get_args(Margins)),
    ):
        if given not in known:
            raise ValueError(f"`{name}` knows {', '.join(known)}, not {given!r}.")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"`label_smoothing` must be from 0 to below 0.5, got {label_smoothing}.")
    if min(entropy, style_penalty, weight_decay) < 0.0:
        raise ValueError("`entropy`, `style_penalty` and `weight_decay` must not be negative.")
    if not isinstance(folds, int) or min(folds - 1, batch_size, patience) < 1:
        raise ValueError(
            f"`folds` must be at least 2, `batch_size` and `patience` at least 1, got {folds}, "
            f"{batch_size} and {patience}."
        )
    if style_penalty and not preferences.style.shape[1]:
        raise ValueError("`style_penalty` needs style features, and there are none.")
    torch.manual_seed(seed)
    ready = _prepare(
        preferences, margins=margins, smoothing=label_smoothing, folds=folds, seed=seed
    )
    everything = ready.comparisons(torch.arange(len(ready)))
    whole = fit_constant_mix(everything, mixed=mixed, nuisance=nuisance)
    starts = [
        fit_constant_mix(
            ready.comparisons((ready.folds != fold).nonzero()[:, 0]),
            mixed=mixed,
            nuisance=nuisance,
        )
        for fold in range(folds)
    ]
    gate = GatingNetwork(
        dim=ready.prompts.shape[1],
        objectives=len(objectives),
        mixed=mixed,
        members=folds,
        hidden_dim=hidden_dim,
        hidden_layers=hidden_layers,
        dropout=dropout,
        temperature=temperature,
    )
    prompts = ready.prompts
    gate.start_from(weights=torch.stack([mix.weights for mix in starts]), prompts=prompts)
    module = GatingTrainer(
        gate,
        beta=torch.tensor([mix.beta for mix in starts]),
        style=torch.stack([mix.style for mix in starts]),
        nuisance=nuisance,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        entropy=entropy,
        style_penalty=style_penalty,
        seed=seed,
    )
    constant = module.out_of_fold(ready)
    gated = constant
    # Of one objective, all mixes are the same.
    trained = keep != "constant" and len(mixed) > 1
    if trained:
        # How long to train may change between two tries; how to train may not.
        how = {
            name: str(value)
            for name, value in getattr(trainer, "keywords", {}).items()
            if name not in LENGTH
        }
        settings = [gate.shape, dict(module.hparams), batch_size, patience, how]
        key = digest_json([settings, ready.digest])
        callbacks: list[Callback] = [EarlyStopping("val_loss", mode="min", patience=patience)]
        if progress:
            callbacks.append(RichProgressBar())
        _train(
            module,
            PreferenceDataModule(ready, batch_size=batch_size, seed=seed),
            checkpoint=folder / CHECKPOINTS / f"{key}.ckpt",
            trainer=partial(trainer, logger=logger(save_dir=folder), enable_progress_bar=progress),
            callbacks=callbacks,
        )
        gated = module.out_of_fold(ready)
    loss_gain = _gain(constant.losses - gated.losses, ready)
    kept: Literal["gate", "constant"] = "gate" if keep == "gate" else "constant"
    if keep == "auto" and loss_gain.low > 0.0:
        kept = "gate"
    two = ready.responses[:, :2]
    diagnostics = diagnose(
        gate.eval(),
        ready.prompts,
        prompt_of=ready.prompt_of,
        differences=ready.adjusted[two[:, 0]] - ready.adjusted[two[:, 1]],
        objectives=objectives,
    )
    if kept == "constant":
        gate.start_from(weights=whole.weights.expand(folds, -1), prompts=prompts)
    # The judgements themselves, as often as they were made and whatever the style: what the
    # probability of a preference is about.
    scores = (gated if kept == "gate" else constant).scores
    judged = everything._replace(
        adjusted=scores[..., None],
        weights=preferences.weights,
        margins=torch.zeros_like(everything.margins),
        flipped=preferences.flipped,
    )
    style = fit_constant_mix(judged, mixed=[0], nuisance=True).style if nuisance else torch.empty(0)
    summary = GatingSummary(
        comparisons=len(ready),
        trained=trained,
        kept=kept,
        epochs=tuple(module.best_epoch.tolist()),
        constant_weights=dict(zip(objectives, whole.weights.tolist(), strict=True)),
        constant_loss=_mean(constant.losses, ready.weights),
        constant_accuracy=_mean(constant.right, ready.weights),
        loss=_mean(gated.losses, ready.weights),
        accuracy=_mean(gated.right, ready.weights),
        loss_gain=loss_gain,
        accuracy_gain=_gain(gated.right - constant.right, ready),
        beta=fit_constant_mix(judged, mixed=[0]).beta,
        best_single=objectives[_best_single(everything, mixed)],
        style=dict(zip(style_names, style.tolist(), strict=True)) if nuisance else {},
        diagnostics=diagnostics,
    )
    fine = summary.better or not trained
    log.log(logging.INFO if fine else logging.WARNING, summary.verdict)
    for sentence in diagnostics.warnings if trained else ():
        log.warning(sentence)
    return gate.eval(), summary


def save_gating(folder: Path, name: str, gate: GatingNetwork, summary: GatingSummary) -> None:
    """Write a gate's tensors with its shape, and how it was trained."""
    write_tensors(folder / f"{name}.safetensors", gate.state_dict())
    write_json(folder / f"{name}.json", {"gate": gate.shape, "summary": asdict(summary)})


def load_gating(folder: Path, name: str) -> tuple[GatingNetwork, GatingSummary]:
    """Read what `save_gating` wrote; any tensor missing or too many is an error."""
    described = read_json(folder / f"{name}.json")
    gate = GatingNetwork(**described["gate"])
    gate.load_state_dict(read_tensors(folder / f"{name}.safetensors"), strict=True)
    return gate.eval(), GatingSummary.from_json(described["summary"])


def _prepare(
    preferences: Preferences, *, margins: Margins, smoothing: float, folds: int, seed: int
) -> Preferences:
    """Apply the settings of the loss, deal the folds, and put everything into usual units."""
    _, groups = preferences.groups.unique(return_inverse=True)
    fold_of_group = deal_folds(groups, folds=folds, group_count=int(groups.max()) + 1, seed=seed)
    # A tie has no side to be ahead on.
    strengths = preferences.strengths.masked_fill(preferences.flipped == 0.5, torch.nan)
    known = strengths.nan_to_num(1.0 if margins == "scale" else 0.0)
    weights = preferences.weights * preferences.balance
    weights = weights * known if margins == "scale" else weights
    flipped, ranks = preferences.flipped, preferences.ranks
    # A pair that is as likely one way round as the other has no order to get right.
    count = (~ranks.isnan()).sum(1)
    tie = (flipped == 0.5) & (count == 2)
    apart = ranks.nan_to_num(torch.inf).amin(1) < ranks.nan_to_num(-torch.inf).amax(1)
    if not bool((apart & ~tie).any()):
        raise ValueError("no comparison to train the gate on is ordered: all of them are ties")
    longest = int(count.max())
    ready = replace(
        preferences,
        responses=preferences.responses[:, :longest],
        ranks=torch.where(tie[:, None], 0.0 * ranks, ranks)[:, :longest],
        weights=weights / weights.mean(),
        balance=torch.ones_like(weights),
        margins=known if margins == "subtract" else torch.zeros_like(known),
        flipped=flipped * (1.0 - smoothing) + (1.0 - flipped) * smoothing,
        folds=fold_of_group[groups],
    )
    batch = ready.comparisons(torch.arange(len(ready)))
    there = ~batch.ranks.isnan()[..., None]
    away = (batch.style - batch.style.sum(1, keepdim=True) / there.sum(1, keepdim=True)) * there
    # Of pairs, the root mean square of the difference: twice that of the deviations.
    spread = 2.0 * (away.square().sum((0, 1)) / there.sum((0, 1))).sqrt()
    return replace(ready, style=ready.style / torch.where(spread > 0, spread, 1.0)).single()


def _train(
    module: GatingTrainer,
    data: PreferenceDataModule,
    *,
    checkpoint: Path,
    trainer: Callable[..., L.Trainer],
    callbacks: list[Callback],
) -> None:
    """Train from the start, or on from a checkpoint of these very settings; take the best."""
    module.remember_start(data.preferences)
    # The newest epoch, under a name that no other settings or data share.
    saving = ModelCheckpoint(
        checkpoint.parent,
        checkpoint.stem,
        monitor=None,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    run = trainer(
        callbacks=[*callbacks, saving],
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    try:
        run.fit(module, datamodule=data, ckpt_path=checkpoint if checkpoint.exists() else None)
    except SystemExit:
        # What Lightning makes of Ctrl-C, which is to end more than the training.
        if not run.interrupted:
            raise
        raise KeyboardInterrupt from None
    if run.interrupted:
        raise KeyboardInterrupt
    module.cpu().use_best()
    shutil.rmtree(checkpoint.parent, ignore_errors=True)


def _best_single(batch: PreferenceBatch, mixed: Sequence[int]) -> int:
    """Return the mixed objective that by itself ranks most right."""
    alone = [_mean(ranked_right(batch.adjusted[..., k], batch.ranks), batch.weights) for k in mixed]
    return mixed[alone.index(max(alone))]


def _gain(differences: Float[Tensor, " comparisons"], preferences: Preferences) -> Gain:
    """Weighted mean with a standard error that is robust to what one prompt's rows share."""
    known = ~differences.isnan()
    weights = torch.where(known, preferences.weights, 0.0).double()
    mean = _mean(differences, preferences.weights)
    _, groups = preferences.groups.unique(return_inverse=True)
    away = weights * (differences.nan_to_num(0.0).double() - mean)
    sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, away)
    return Gain(mean, float(sums.square().sum().sqrt() / weights.sum()))


def _mean(values: Float[Tensor, " comparisons"], weights: Float[Tensor, " comparisons"]) -> float:
    known = ~values.isnan()
    return float((values[known].double() * weights[known]).sum() / weights[known].sum())
