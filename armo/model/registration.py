"""Makes armo's model folders known to Transformers, once that is asked for models at all.

Transformers imports its parts when they are first used, and registering a class imports most of
them. So `import armo` registers nothing: it waits for Transformers' own table of configurations.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register the configuration with `AutoConfig`, now or as soon as that is imported.

    The configuration in turn registers model and tokenizer, when the first one is read.
    """
    if AUTO_CONFIG in sys.modules:
        _register_config()
    elif not any(isinstance(finder, _AfterAutoConfig) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterAutoConfig())


class _AfterAutoConfig(MetaPathFinder):
    """Registers the configuration right after `AutoConfig` was made.

    It stays: some ask where a module is, and import it only later or never.
    """

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # A namespace package's path is a sequence to type checkers, and not at run time.
        if fullname != AUTO_CONFIG:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register_config()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_config() -> None:
    auto = importlib.import_module(AUTO_CONFIG)
    config = importlib.import_module("armo.model.config").ArmoConfig
    auto.AutoConfig.register("armo", config, exist_ok=True)
