"""Training the gate on preference pairs, in Lightning, from the best constant mix onwards."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jaxtyping import Float, Int
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data import TensorDataset as Pairs

from armo.artifacts import read_json, read_tensors, write_json, write_tensors
from armo.fit.gating import GatingNetwork

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GatingSummary:
    """How the gate was trained, all figures on held-out prompts of the training side.

    Attributes:
        pairs: Pairs trained on.
        held_out_pairs: Pairs on held-out prompts, for early stopping.
        epochs: Epochs until the best loss; 0 if the constant mix was never beaten.
        constant_weights: The best constant mix, by objective.
        constant_loss: Its Bradley-Terry loss.
        constant_accuracy: Its share of pairs ranked right.
        loss: The gate's loss.
        accuracy: The gate's share of pairs ranked right.
        beta: Scale of score differences in the preference probability.
        style: What the judges gave to style by itself, in log-odds per root mean square of the
            covariate's difference between two responses; empty without nuisance covariates.
    """

    pairs: int
    held_out_pairs: int
    epochs: int
    constant_weights: dict[str, float]
    constant_loss: float
    constant_accuracy: float
    loss: float
    accuracy: float
    beta: float
    style: dict[str, float]


@dataclass(frozen=True, eq=False, slots=True)
class ConstantMix:
    """The best weights that do not look at the prompt; float64.

    Attributes:
        weights: Over all objectives; zero for those that are not mixed.
        beta: Scale of score differences in the preference probability.
        style: Log-odds per unit of each nuisance covariate.
    """

    weights: Float[Tensor, " objectives"]
    beta: float
    style: Float[Tensor, " covariates"]


def bradley_terry_loss(
    differences: Float[Tensor, " batch"],
    *,
    beta: Float[Tensor, ""],
    style: Float[Tensor, " batch"] | None = None,
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Weighted mean of `-log sigmoid(beta (score_chosen - score_rejected) + style)`.

    Args:
        differences: Score of the chosen minus score of the rejected response.
        beta: Positive scale.
        style: Log-odds that are due to style and not to the score.
        weights: Of the pairs; equal by default.

    References:
        Bradley and Terry, "Rank Analysis of Incomplete Block Designs", Biometrika 39, 1952.

    Example:
        >>> bradley_terry_loss(torch.tensor([0.0]), beta=torch.tensor(1.0))
        tensor(0.6931)
    """
    logits = beta * differences
    losses = F.softplus(-(logits if style is None else logits + style))
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def fit_constant_mix(
    differences: Float[Tensor, "batch objectives"],
    *,
    mixed: Sequence[int],
    nuisance: Float[Tensor, "batch covariates"] | None = None,
    weights: Float[Tensor, " batch"] | None = None,
    decay: float = 1e-4,
) -> ConstantMix:
    """Fit the constant weights and `beta` that explain the preferences best.

    Minimises the Bradley-Terry loss over weights that are non-negative and sum to one on the
    mixed objectives, by L-BFGS on their logits, plus `decay` times the squared logits, the
    squared log of `beta` and the squared style coefficients, which keeps them finite where an
    objective deserves no weight, or where the pairs can be told apart without error.

    Args:
        differences: Adjusted rewards of the chosen minus those of the rejected responses.
        mixed: Columns that may get weight.
        nuisance: Covariates of the chosen minus those of the rejected responses, whose own
            effect on the preferences is estimated beside the weights.
        weights: Of the pairs; equal by default.
        decay: Pull towards equal weights.
    """
    values = differences[:, list(mixed)].double()
    measured = (nuisance if nuisance is not None else differences[:, :0]).double()
    pair_weights = None if weights is None else weights.double()
    logits = torch.zeros(len(mixed), dtype=torch.float64, requires_grad=True)
    log_beta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    style = torch.zeros(measured.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits, log_beta, style], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bradley_terry_loss(
            values @ logits.softmax(dim=0),
            beta=log_beta.exp(),
            style=measured @ style,
            weights=pair_weights,
        )
        loss = loss + decay * (logits - logits.mean()).square().sum() + decay * log_beta.square()
        loss = loss + decay * style.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    mix = torch.zeros(differences.shape[1], dtype=torch.float64)
    mix[list(mixed)] = logits.detach().softmax(dim=0)
    return ConstantMix(mix, float(log_beta.detach().exp()), style.detach())


class GatingTrainer(L.LightningModule):
    """Trains a gate and `beta` on batches of prompt embeddings and reward differences.

    A batch is `(prompts, differences, nuisance, weights)`: the prompt embedding of each pair,
    once; the adjusted rewards of its chosen minus those of its rejected response; the same of the
    nuisance covariates, of which there may be none; and the weight of the pair in the loss. Both
    responses share the pair's gating weights, so the score difference is `gate . differences`.
    """

    def __init__(
        self,
        gate: GatingNetwork,
        *,
        beta: float,
        style: Float[Tensor, " covariates"],
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
    ) -> None:
        """Wrap a gate for training.

        Args:
            gate: The network, already at its starting point.
            beta: Starting value.
            style: Starting coefficients of the nuisance covariates.
            learning_rate: Of AdamW.
            weight_decay: Of AdamW on the MLP; it pulls the gate towards its constant logits.
        """
        super().__init__()
        self.gate = gate
        self.log_beta = nn.Parameter(torch.tensor(math.log(beta)))
        self.style = nn.Parameter(style.float())
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    def forward(
        self, prompts: Float[Tensor, "batch dim"], differences: Float[Tensor, "batch objectives"]
    ) -> Float[Tensor, " batch"]:
        """Return the score difference of each pair."""
        scores: Tensor = (self.gate(prompts) * differences).sum(dim=-1)
        return scores

    def loss(
        self,
        prompts: Float[Tensor, "batch dim"],
        differences: Float[Tensor, "batch objectives"],
        nuisance: Float[Tensor, "batch covariates"],
        weights: Float[Tensor, " batch"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " batch"]]:
        """Return the loss of some pairs, and their score differences."""
        scores = self(prompts, differences)
        loss = bradley_terry_loss(
            scores, beta=self.log_beta.exp(), style=nuisance @ self.style, weights=weights
        )
        return loss, scores

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss, _ = self.loss(*batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on held-out prompts."""
        loss, scores = self.loss(*batch)
        accuracy = (scores > 0).float().mean()
        self.log("val_loss", loss, prog_bar=True, batch_size=len(batch[0]))
        self.log("val_accuracy", accuracy, prog_bar=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the constant logits, `beta` and the style coefficients are not decayed."""
        undecayed = [self.gate.constant, self.log_beta, self.style]
        free = {id(parameter) for parameter in undecayed}
        return torch.optim.AdamW(
            [
                {
                    "params": [p for p in self.parameters() if id(p) not in free],
                    "weight_decay": self.weight_decay,
                },
                {"params": undecayed, "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
        )


class PairDataModule(L.LightningDataModule):
    """Pairs as tensors, batches by one indexing each: no Python per row in the loop."""

    def __init__(self, train: Pairs, held_out: Pairs, *, batch_size: int, seed: int) -> None:
        """Take the pairs of both sides.

        Args:
            train: What `GatingTrainer` takes, to train on.
            held_out: The same for held-out prompts.
            batch_size: Pairs per step.
            seed: Of the order of the training pairs.
        """
        super().__init__()
        self.train, self.held_out = train, held_out
        self.batch_size, self.seed = batch_size, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in random order."""
        generator = torch.Generator().manual_seed(self.seed)
        order = RandomSampler(self.train, generator=generator)
        batches = BatchSampler(order, self.batch_size, drop_last=False)
        return DataLoader(self.train, sampler=batches, batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        """All held-out pairs, in order."""
        batches = BatchSampler(SequentialSampler(self.held_out), 65536, drop_last=False)
        return DataLoader(self.held_out, sampler=batches, batch_size=None)


def fit_gating(
    prompts: Float[Tensor, "batch dim"],
    differences: Float[Tensor, "batch objectives"],
    groups: Int[Tensor, " batch"],
    *,
    objectives: Sequence[str],
    mixed: Sequence[int],
    folder: Path,
    nuisance: Float[Tensor, "batch covariates"] | None = None,
    nuisance_names: Sequence[str] = (),
    weights: Float[Tensor, " batch"] | None = None,
    trainer: Callable[..., L.Trainer] = L.Trainer,
    log: Literal["csv", "tensorboard"] = "csv",
    progress: bool = True,
    hidden_dim: int = 64,
    hidden_layers: int = 1,
    dropout: float = 0.5,
    temperature: float = 1.0,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    batch_size: int = 256,
    held_out: float = 0.2,
    patience: int = 10,
    seed: int = 0,
) -> tuple[GatingNetwork, GatingSummary]:
    """Train a gate on preference pairs, stopping early on held-out prompts.

    The gate starts at the best constant mix of the pairs trained on. If no epoch has a lower
    loss on held-out prompts than that start, the start is returned.

    Args:
        prompts: Prompt embedding of each pair.
        differences: Adjusted rewards, chosen minus rejected, from heads that were fitted
            without the ratings of the pair's prompt.
        groups: Prompt group of each pair; a group is never on both sides.
        objectives: Names of the columns of `differences`.
        mixed: Columns that may get weight.
        folder: Where logs and checkpoints of the training go.
        nuisance: Covariates of the chosen minus those of the rejected responses, any units. What
            judges give to style is then explained by these, whose terms in the loss are dropped
            at scoring, and the gate need not find it in the rewards.
        nuisance_names: Columns of `nuisance`.
        weights: Of the pairs in the loss; equal by default.
        trainer: Makes the Lightning trainer; its settings are the user's.
        log: Logger to use; `tensorboard` needs that package.
        progress: Whether to show a progress bar.
        hidden_dim: Width of a hidden layer.
        hidden_layers: Number of hidden layers.
        dropout: Share of hidden units dropped in training.
        temperature: Divides the gate's logits.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW, towards the constant mix.
        batch_size: Pairs per step.
        held_out: Share of the prompts held out.
        patience: Epochs without improvement before stopping.
        seed: Of initialisation, dropout, order of pairs and the held-out prompts.

    Returns:
        The gate, in evaluation mode, and how it was trained.

    Raises:
        ValueError: If there are too few distinct prompts to hold some out.
    """
    L.seed_everything(seed, verbose=False)
    shuffled = _shuffle_groups(groups, seed=seed)
    group_count = int(shuffled.max()) + 1
    if group_count < 2 or not 0.0 < held_out < 1.0:
        raise ValueError(
            f"`held_out` must be between 0 and 1, got {held_out}, and the pairs need at least two "
            f"distinct prompts, got {group_count}."
        )
    aside = shuffled < min(group_count - 1, max(1, round(held_out * group_count)))
    if nuisance is None:
        nuisance = differences[:, :0]
    spread = nuisance[~aside].square().mean(0).sqrt()
    nuisance = nuisance / torch.where(spread > 0, spread, 1.0)
    if weights is None:
        weights = torch.ones(len(prompts))
    mix = fit_constant_mix(
        differences[~aside], mixed=mixed, nuisance=nuisance[~aside], weights=weights[~aside]
    )
    gate = GatingNetwork(
        dim=prompts.shape[1],
        objectives=differences.shape[1],
        mixed=mixed,
        hidden_dim=hidden_dim,
        hidden_layers=hidden_layers,
        dropout=dropout,
        temperature=temperature,
    )
    gate.start_from(weights=mix.weights, prompts=prompts[~aside].float())
    module = GatingTrainer(
        gate,
        beta=mix.beta,
        style=mix.style,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )
    start = copy.deepcopy(module.state_dict())
    checkpoint = ModelCheckpoint(folder / "checkpoints", monitor="val_loss", mode="min")
    callbacks: list[Callback] = [
        EarlyStopping("val_loss", mode="min", patience=patience),
        checkpoint,
    ]
    if progress:
        callbacks.append(RichProgressBar())
    run = trainer(
        callbacks=callbacks,
        logger=_make_logger(log, folder),
        enable_progress_bar=progress,
        enable_model_summary=False,
    )
    tensors = [part.float() for part in (prompts, differences, nuisance, weights)]
    held = [part[aside] for part in tensors]
    constant_loss, constant_accuracy = _evaluate(module, held)
    data = PairDataModule(
        Pairs(*(part[~aside] for part in tensors)),
        Pairs(*held),
        batch_size=batch_size,
        seed=seed,
    )
    run.fit(module, datamodule=data)
    best = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=True)
    module = module.cpu()
    module.load_state_dict(best["state_dict"])
    loss, accuracy = _evaluate(module, held)
    epochs = int(best["epoch"]) + 1
    if loss >= constant_loss:
        logger.info("No epoch beat the best constant mix on held-out prompts; it is kept.")
        module.load_state_dict(start)
        loss, accuracy, epochs = constant_loss, constant_accuracy, 0
    Path(checkpoint.best_model_path).unlink()
    summary = GatingSummary(
        pairs=int((~aside).sum()),
        held_out_pairs=int(aside.sum()),
        epochs=epochs,
        constant_weights=dict(zip(objectives, mix.weights.tolist(), strict=True)),
        constant_loss=constant_loss,
        constant_accuracy=constant_accuracy,
        loss=loss,
        accuracy=accuracy,
        beta=float(module.log_beta.detach().exp()),
        style=dict(zip(nuisance_names, module.style.detach().tolist(), strict=True)),
    )
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
    return gate.eval(), GatingSummary(**described["summary"])


@torch.no_grad()
def _evaluate(module: GatingTrainer, pairs: Sequence[Tensor]) -> tuple[float, float]:
    module.eval()
    loss, scores = module.loss(*pairs)
    module.train()
    return float(loss), float((scores > 0).double().mean())


def _shuffle_groups(groups: Int[Tensor, " rows"], *, seed: int) -> Int[Tensor, " rows"]:
    """Renumber groups at random, so that the held-out ones are a random sample."""
    _, inverse = groups.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(int(inverse.max()) + 1, generator=generator)[inverse]


def _make_logger(log: str, folder: Path) -> Logger:
    if log == "csv":
        return CSVLogger(folder, name="", version="logs")
    if log == "tensorboard":
        return TensorBoardLogger(folder, name="", version="logs")
    raise ValueError(f"`log` must be csv or tensorboard, got {log!r}.")
