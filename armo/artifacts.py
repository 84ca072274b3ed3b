"""Writing and checking artifacts: safetensors and JSON, whole or not at all.

Every artifact is a folder with a `manifest.json` that says what made it, from what, and the
SHA-256 of each file in it. Files are written to a temporary name and renamed, so a reader sees a
whole file or none; the manifest is written last, so a folder with a manifest is complete. What
is not part of an artifact has a name that starts with a dot, or is in a folder `*_training`.
"""

import hashlib
import json
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor

MANIFEST = "manifest.json"
# What a training leaves beside its result. Some loggers write to theirs until the process ends.
TRAINING = "_training"
LOCK = ".lock"
# Beside the lock, not in it: older releases of filelock empty the file that they fail to lock.
LOCK_HOLDER = ".lock.json"
# Long enough for the holder to have written who it is, and for the system to free the lock of a
# process that was just killed.
LOCK_WAIT_S = 0.25


class ArtifactError(ValueError):
    """An artifact is missing, incomplete, damaged, or does not fit the others."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its place when the block succeeds.

    No two processes share a temporary name, on one machine or on several that share a folder.

    Raises:
        OSError: As the block raised it; one that names no file, as a full disk's, names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(path, temporary):
            yield temporary
            # Before the rename, lest a crash leave the name without the bytes. Over a network,
            # this is also when a full disk says so.
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Make the errors of writing to a file name it, which a full disk's do not by themselves.

    Args:
        path: The file.
        temporary: The name under which it is being written.
    """
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and str(error.filename) != str(temporary)
        if elsewhere or error.errno is None or isinstance(error, ConnectionError):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def delete_temporaries(folder: Path) -> None:
    """Delete what killed processes left of files they were writing; none may be writing now."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for one writing process, until the block ends or the process dies.

    The system frees the lock of a process that dies, however it dies. It holds against the other
    processes of this machine; against those of other machines, where their shared disk passes
    locks on, as NFS does. A block inside another for the same folder is refused as well: two
    writers in one process are as wrong as in two.

    Raises:
        ArtifactError: If the folder is held already, naming the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / LOCK_HOLDER
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=LOCK_WAIT_S)
    except Timeout:
        raise ArtifactError(
            f"{folder}: {_read_holder(holder)} is writing there. Wait until it is done, or stop it."
        ) from None
    with lock:
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)


def _read_holder(path: Path) -> str:
    try:
        holder = read_json(path)
        return f"process {holder['pid']} on {holder['host']}"
    except (ArtifactError, KeyError, TypeError):
        return "another process"


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step; floats keep all their digits, NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise ArtifactError(f"No such file: {path}") from None
    except UnicodeDecodeError:
        raise ArtifactError(f"{path}: not valid JSON: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path}: not valid JSON, line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise ArtifactError(f"{path}: not valid JSON: nested too deeply") from None


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in one step.

    Args:
        path: The file.
        tensors: Tensors by name.
        metadata: What the file's header says beside them. Safetensors shuffles the entries; only
            with one at most do the same tensors make the same bytes.
    """
    # Not `save_file`: it makes a temporary file of its own, which a killed process leaves under a
    # name that says nothing, readable by this user alone, and its errors are no OSErrors.
    content = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata=None if metadata is None else dict(metadata),
    )
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        ArtifactError: If the file is missing or damaged.
    """
    if not path.is_file():
        raise ArtifactError(f"No such file: {path}")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"{path}: damaged safetensors file: {error}") from None


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON text."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def finish_artifact(
    folder: Path, *, key: str, settings: Any, inputs: Mapping[str, str], **facts: Any
) -> None:
    """Write the manifest that declares every other file of `folder` complete.

    Args:
        folder: The artifact's folder, all its files written.
        key: What `is_current` compares: a digest of all that the content depends on.
        settings: The settings that made it, as JSON.
        inputs: Digest of each input, by name.
        facts: Whatever else a reader wants to know: versions, row counts.
    """
    files = {
        str(path.relative_to(folder)): digest_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
        if not any(part.endswith(TRAINING) for part in path.relative_to(folder).parent.parts)
    }
    write_json(
        folder / MANIFEST,
        {"key": key, "settings": settings, "inputs": dict(inputs), "files": files, **facts},
    )


def is_current(folder: Path, key: str) -> bool:
    """Whether `folder` is a complete, undamaged artifact made under `key`."""
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_json(folder / MANIFEST)
    return manifest.get("key") == key and not damaged_files(folder)


def damaged_files(folder: Path) -> list[str]:
    """Return the files of an artifact whose bytes are not those that its manifest declares."""
    files: dict[str, str] = read_json(folder / MANIFEST)["files"]
    return [
        name
        for name, digest in files.items()
        if not (folder / name).is_file() or digest_file(folder / name) != digest
    ]


def require_artifact(folder: Path, *, stage: str) -> dict[str, Any]:
    """Return the manifest of a complete, undamaged artifact.

    Raises:
        ArtifactError: If there is none, naming the stage that makes it.
    """
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(
            f"No finished `{stage}` artifact at {folder}. Make it with "
            f"`armo train stages=[{stage}]` and the same overrides."
        )
    if damaged := damaged_files(folder):
        raise ArtifactError(
            f"{folder}: {', '.join(damaged)} changed after it was written. Delete the folder "
            f"and run `armo train stages=[{stage}]` again."
        )
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    return manifest
