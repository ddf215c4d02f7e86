"""What this machine has, and what a run on it will use."""

from __future__ import annotations

import os
import platform
import shutil
import threading
import urllib.request
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from models.embedded import EMBEDDED, cache_dir, gguf_path
from scripts.plan import GB, installed_version, locked_versions
from scripts.tracking import has_wandb_key
from scripts.workers import usable_cores

HUB_SECONDS = 2.0


def print_doctor(console: Console) -> None:
    """Two tables: what is here, and what will be used."""
    import torch

    cuda = torch.cuda.is_available()
    memory = psutil.virtual_memory()
    free = shutil.disk_usage(Path.cwd()).free
    wrong = version_differences()
    hub = hub_reachable()

    here = _table("This machine")
    here.add_row(
        "python", _mark((3, 11) <= _python() < (3, 13)), f"{platform.python_version()} (3.11 and 3.12 are supported)"
    )
    here.add_row("packages", _mark(not wrong), _versions(wrong))
    here.add_row("cores", _mark(usable_cores() >= 2), f"{usable_cores()}, torch uses {torch.get_num_threads()} threads")
    here.add_row(
        "memory",
        _mark(memory.available > 5 * GB),
        f"{memory.available / GB:.0f} GB free of {memory.total / GB:.0f} GB (the quickstart takes about 5)",
    )
    here.add_row("disk", _mark(free > 4 * GB), f"{free / GB:.0f} GB free here (the quickstart takes about 2)")
    here.add_row("GPU", _mark(cuda, needed=False), _gpu())
    here.add_row(
        "hub", _mark(hub, needed=False), "reachable" if hub else "not reachable: embedded models and local paths only"
    )
    keys = found_keys()
    here.add_row("keys", _mark(bool(keys), needed=False), ", ".join(keys) or "none (none is needed)")
    console.print(here, "")

    use = _table("What will be used")
    use.add_row(
        "device",
        "",
        f"{torch.cuda.get_device_name()}, bf16" if cuda else f"CPU, fp32, {torch.get_num_threads()} threads",
    )
    for name in EMBEDDED:
        use.add_row("base", *_embedded_state(name))
    use.add_row("cache", "", f"{cache_dir()} (TRAITDOSE_CACHE changes it)")
    use.add_row("tracking", "", "wandb, online" if has_wandb_key() else "wandb, offline (no key; nothing asks for one)")
    console.print(use)


def version_differences() -> dict[str, tuple[str, str | None]]:
    """Packages that are not as pinned: name -> (pinned, installed or None)."""
    found = {name: (pinned, installed_version(name)) for name, pinned in locked_versions().items()}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def hub_reachable() -> bool:
    """Whether the model hub answers within HUB_SECONDS. The thread is left behind if name resolution hangs."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            with urllib.request.urlopen(request, timeout=HUB_SECONDS):
                answers.append(True)
        except Exception:  # whatever goes wrong here, the hub is not reachable
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answers == [True]


def found_keys() -> list[str]:
    """Names of the keys that are present; never their values."""
    token_file = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "token"
    found = ["WANDB_API_KEY"] if has_wandb_key() else []
    return found + (["HF_TOKEN"] if os.environ.get("HF_TOKEN") or token_file.is_file() else [])


def _python() -> tuple[int, int]:
    major, minor, _ = platform.python_version_tuple()
    return int(major), int(minor)


def _versions(wrong: dict[str, tuple[str, str | None]]) -> str:
    if not wrong:
        return f"all {len(locked_versions())} as pinned in requirements/cpu.lock"
    listed = [f"{name} {found or 'missing'} (pinned {pinned})" for name, (pinned, found) in wrong.items()]
    return f"{len(wrong)} not as pinned: " + ", ".join(listed[:5]) + (" ..." if len(listed) > 5 else "")


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    total = torch.cuda.get_device_properties(0).total_memory / GB
    bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
    name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{name}, {total:.0f} GB, CUDA {torch.version.cuda}, {bf16}"


def _embedded_state(name: str) -> tuple[str, str]:
    try:
        present = gguf_path(name).is_file()
    except ValueError as error:
        return _mark(False), str(error)
    converted = any((cache_dir() / "models").glob(f"{name.removeprefix('embedded:')}-*"))
    state = "converted, in the cache" if converted else "will be converted into the cache on first use (about 0.5 GB)"
    return _mark(present), f"{name}, {state}"


def _table(title: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 0)
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _mark(good: bool, needed: bool = True) -> str:
    if good:
        return "[green]✓[/]"
    return "[yellow]![/]" if needed else "[dim]-[/]"
