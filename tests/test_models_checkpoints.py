"""Checkpoints are whole or not there: sealed, found again, passed over when damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from models.checkpoints import HASHES, clear_partial, find_damage, latest, partial_folder, seal


def write_checkpoint(folder: Path, step: int, keep: int = 2) -> Path:
    partial = partial_folder(folder, step)
    (partial / "shards").mkdir(parents=True)
    (partial / "weights.safetensors").write_bytes(bytes(range(200)) + step.to_bytes())
    (partial / "shards" / "0.bin").write_bytes(b"part")
    return seal(partial, folder, keep)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_whole_checkpoint_is_found_and_old_ones_go(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        write_checkpoint(tmp_path, step)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-4"]
    assert latest(tmp_path) == tmp_path / "checkpoint-10"
    assert latest(tmp_path, before=10) == tmp_path / "checkpoint-4"
    assert latest(tmp_path, before=4) is None
    assert latest(tmp_path / "nothing-here") is None


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda c: flip(c / "weights.safetensors"), "weights.safetensors has changed"),
        (lambda c: (c / "weights.safetensors").write_bytes(b""), "weights.safetensors has changed"),
        (lambda c: flip(c / "shards" / "0.bin"), "0.bin has changed"),
        (lambda c: (c / "shards" / "0.bin").unlink(), "0.bin is missing"),
        (lambda c: (c / HASHES).unlink(), "hashes.json is missing"),
        (lambda c: (c / HASHES).write_text((c / HASHES).read_text()[:40]), "cannot be read"),
    ],
    ids=["bit", "cut", "bit below", "gone", "no hashes", "torn hashes"],
)
def test_a_damaged_checkpoint_is_told_and_the_previous_one_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], word: str
) -> None:
    write_checkpoint(tmp_path, 2)
    damage(write_checkpoint(tmp_path, 4))
    with caplog.at_level(logging.WARNING, "traitdose"):
        assert latest(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-4 is damaged" in caplog.text
    assert word in caplog.text
    whole = write_checkpoint(tmp_path, 4)  # the run comes by again
    assert find_damage(whole) is None
    assert latest(tmp_path) == whole


def test_a_half_written_checkpoint_is_never_seen(tmp_path: Path) -> None:
    partial = partial_folder(tmp_path, 6)
    partial.mkdir(parents=True)
    (partial / "weights.safetensors").write_bytes(b"half")
    assert latest(tmp_path) is None
    clear_partial(tmp_path)
    assert not list(tmp_path.iterdir())
