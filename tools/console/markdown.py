"""Format tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(titles: Sequence[str], rows: Iterable[Iterable[str]], text: int | None = None) -> list[str]:
    """Return the lines of a table.

    Args:
        titles: of the columns.
        rows: each has a cell per column.
        text: number of left-aligned columns; the others are right-aligned (default: all left).
    """
    left = len(titles) if text is None else text
    rule = "|" + "---|" * left + "---:|" * (len(titles) - left)
    head, *body = (f"| {' | '.join(cells)} |" for cells in (titles, *rows))
    return [head, rule, *body]
