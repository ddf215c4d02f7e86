"""Markdown of the pages that are made from results: tables, folded parts, pictures."""

from __future__ import annotations

from collections.abc import Sequence

SIGNIFICANT = ("improved", "regressed")  # verdicts that are set in bold


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, and numbers to the right."""
    right = [
        k > 0 and bool(rows) and all(row[k][:1].isdigit() or row[k][:1] in "+-–*>" for row in rows)
        for k in range(len(head))
    ]
    lines = [
        "| " + " | ".join(map(_cell, head)) + " |",
        "|" + "|".join("---:" if numeric else "---" for numeric in right) + "|",
        *("| " + " | ".join(map(_cell, row)) + " |" for row in rows),
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or " "


def details(title: str, body: str) -> str:
    """A part that is folded until the reader opens it."""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def picture(seen: str, path: str | None) -> str:
    """A picture and what is seen on it; nothing without a path."""
    return f"![{seen}]({path})" if path else ""


def percent(value: float | None) -> str:
    """A share in per cent, a dash for none."""
    return "–" if value is None else f"{100 * value:.1f}%"
