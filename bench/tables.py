"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LONGEST_CELL = 100


def markdown(rows: Iterable[Sequence[str]], align: str = "---:") -> str:
    """A table, head first; the first column is text, and `align` is for the others: numbers."""
    head, *body = rows
    lines = [head, ["---", *[align] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_of_mappings(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table, with the keys of the first mapping as its head."""
    if not rows:
        return "(nothing)"

    def text(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
        shown = str(value).replace("|", "\\|").replace("\n", " ")
        return shown if len(shown) <= LONGEST_CELL else f"{shown[: LONGEST_CELL - 3]}..."

    head = list(rows[0])
    return markdown([head, *([text(row.get(key, "")) for key in head] for row in rows)], "---")
