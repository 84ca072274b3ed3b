"""The package as a user gets it: the built wheel, and what importing it costs."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import armo

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # From a copy: a build writes beside the package, and packs what an earlier one left there.
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("armo", "conf"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", folder, source], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_configuration_file_and_the_corpus(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (ROOT / "conf").rglob("*.yaml"):
        assert f"armo/conf/{file.relative_to(ROOT / 'conf')}" in names
    for name in ("ratings", "preferences", "counterfactuals"):
        assert f"armo/data/builtin/{name}.jsonl.gz" in names
    assert "armo/py.typed" in names


def test_the_command_works_from_any_directory_with_the_wheel_alone(wheel, tmp_path):
    installed = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--target", installed, wheel], check=True, capture_output=True)
    done = subprocess.run(
        [installed / "bin" / "armo", "train", "experiment=demo", "--cfg", "job"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "run_name: demo" in done.stdout


def test_importing_armo_loads_neither_training_nor_dataset_libraries():
    code = "import sys, armo; print(*{'datasets', 'lightning', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_public_names_are_there_and_lazy():
    assert set(armo.__all__) == {*armo._MODULES, "__version__"} == set(dir(armo))
    for name, module in armo._MODULES.items():
        found = getattr(armo, name)
        assert found is getattr(sys.modules[module], name)
        # Aliases of types have no module of their own.
        assert getattr(found, "__module__", module) in (module, "typing")
    (guarded,) = [
        n for n in ast.parse(Path(armo.__file__).read_text()).body if isinstance(n, ast.If)
    ]
    for_checkers = {a.name: n.module for n in guarded.body for a in n.names}
    assert for_checkers == armo._MODULES
    with pytest.raises(AttributeError, match="module 'armo' has no attribute 'Nothing'"):
        armo.Nothing  # noqa: B018
    code = "import sys, armo; print(*sorted(m for m in sys.modules if m.startswith('armo.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["armo.model", "armo.model.registration"]
