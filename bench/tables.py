"""Make tables in Markdown of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from train.pages.tables import markdown

LONGEST_CELL = 100


def markdown_of_mappings(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table, with the keys of the first mapping as its head."""
    if not rows:
        return "(nothing)"

    def text(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
        shown = str(value).replace("\n", " ")
        return shown if len(shown) <= LONGEST_CELL else f"{shown[: LONGEST_CELL - 3]}..."

    head = list(rows[0])
    return markdown([head, *([text(row.get(key, "")) for key in head] for row in rows)])
