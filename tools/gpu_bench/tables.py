"""Markdown tables, the one format of the console output and of the README."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["markdown_table"]


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a GitHub table, columns padded so that it reads well in a terminal too.

    Args:
        headers: Column titles; the first column is left-aligned, the others right-aligned.
        rows: Cells, as many per row as there are headers.

    Raises:
        ValueError: A row's length differs from the headers'.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"row {list(row)} has {len(row)} cells, expected {len(headers)}")
    widths = [max(3, *(len(row[column]) for row in [headers, *rows])) for column in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(headers), rule, *(line(row) for row in rows)])
