"""Tables in Markdown, of rows that are mappings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LONGEST_CELL = 100


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table, with the keys of the first row as its head."""
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
    lines = [head, ["---"] * len(head), *([text(row.get(key, "")) for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
