"""Write tables in Markdown."""

from collections.abc import Iterable, Sequence

NUMBERS = "---:"  # columns of numbers have this alignment


def markdown(rows: Iterable[Sequence[str]], align: str = "---") -> str:
    """Return a table, head first; the first column is text, and `align` is for the others."""
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [head, ["---", *[align] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
