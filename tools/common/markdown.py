"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(titles: Sequence[str], rows: Iterable[Iterable[str]], text: int | None = None) -> list[str]:
    """Return the lines of a table: titles, and rows of as many cells.

    Args:
        titles: of the columns.
        rows: below them.
        text: number of columns that are aligned to the left; the others to the right (default: all to the left).
    """
    left = len(titles) if text is None else text
    rule = "|" + "---|" * left + "---:|" * (len(titles) - left)
    head, *body = (f"| {' | '.join(cells)} |" for cells in (titles, *rows))
    return [head, rule, *body]
