"""What the commands have in common: one-line errors, a console, objects from a configuration."""

import logging
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from rich.console import Console

from armo.sweeps import JobError

CONFIG = {"version_base": "1.3", "config_path": "pkg://armo.conf"}

T = TypeVar("T")


def fail(error: Exception) -> NoReturn:
    """Say in one line what went wrong, and end with exit status 1."""
    print(f"armo: error: {one_line(error)}", file=sys.stderr)
    sys.exit(1)


def one_line(error: Exception) -> str:
    """Return the message of an error in one line, or its kind if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def in_one_line(task: Callable[[DictConfig], T]) -> Callable[[DictConfig], T]:
    """Turn any error into one line and exit status 1; all of it with `hydra.verbose=true`.

    A job of a sweep raises it instead, with its number, and the sweeper decides what becomes of
    the others.
    """

    @wraps(task)
    def run(cfg: DictConfig) -> T:
        quieten()
        try:
            return task(cfg)
        except KeyboardInterrupt:
            resumes = (
                "; the same command goes on where it was"
                if task.__name__ in ("train", "evaluate")
                else ""
            )
            print(f"armo: interrupted{resumes}", file=sys.stderr)
            sys.exit(130)
        except MissingMandatoryValue as error:
            print(f"armo: {error.full_key} is needed: {error.full_key}=...", file=sys.stderr)
            sys.exit(2)
        except Exception as error:
            context = HydraConfig.get()
            if context.verbose:
                raise
            if context.mode == RunMode.MULTIRUN:
                sweep = Path(context.sweep.dir)
                raise JobError(one_line(error), job=context.job.num, sweep=sweep) from None
            fail(error)

    return run


def build(section: DictConfig, **more: Any) -> Any:
    """Make the function that a section names, its settings filled in as plain values."""
    try:
        return instantiate(section, _convert_="all", **more)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None  # what the function itself says, on its own
        raise


def columns_of(cfg: DictConfig) -> Any:
    """Return the map of columns of a configuration as plain values."""
    return OmegaConf.to_container(cfg.columns) if cfg.columns is not None else None


def make_console(*, width: int = 110) -> Console:
    """Return a console; wide enough for the tables where the output is no terminal, but a file."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def quieten() -> None:
    """Silence what libraries say about themselves; what armo says stays."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "httpx", "markdown_it"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("lightning", "torch"):
        warnings.filterwarnings("ignore", module=rf"{module}\..*")
