"""Verdicts already given, in one SQLite file. Each call opens and closes it, so that processes may share it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WAIT = 60.0  # seconds for another process to finish its write
TABLE = """CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, verdict TEXT NOT NULL, given TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP)"""


class JudgeCache:
    """A dictionary on disk from a key to anything JSON can hold."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()

    def get(self, key: str) -> Any:
        """What was put under the key, or None."""
        if not self.path.exists():
            return None
        with self._open() as connection:
            row = connection.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, model: str, verdict: Any) -> None:
        """Keep the verdict; of two for one key the first stays."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO verdicts (key, model, verdict) VALUES (?, ?, ?)",
                (key, model, json.dumps(verdict)),
            )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(self.path, timeout=WAIT)
            try:
                with connection:  # commits, or rolls back
                    connection.execute(TABLE)
                    yield connection
            finally:
                connection.close()
        except sqlite3.DatabaseError as error:
            raise ValueError(f"cache: {self.path}: {error}; name another file, or remove this one") from None
