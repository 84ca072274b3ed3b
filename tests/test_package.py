"""The package as a user gets it: the built wheel, and what importing it costs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
