"""Shows rows as a table: rows come in, HTML goes to a notebook and aligned text to a terminal."""

import html
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A caption, column headings or none, and rows of text; the first cell of a row is its heading.

    Attributes
    ----------
    caption : str
    columns : tuple of str
    rows : tuple of tuple of str
        All of one length.
    """

    caption: str
    columns: tuple
    rows: tuple

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col" style="{_LEFT}">{html.escape(column)}</th>' for column in self.columns)
        head = f"<thead><tr>{head}</tr></thead>" if head else ""
        body = "".join(
            f'<tr><th scope="row" style="{_LEFT}">{_keep(row[0])}</th>'
            + "".join(f'<td style="{_LEFT}">{_keep(cell)}</td>' for cell in row[1:]) + "</tr>"
            for row in self.rows
        )
        return (f'<table><caption style="caption-side: top; white-space: nowrap; {_LEFT}">'
                f"{html.escape(self.caption)}</caption>{head}<tbody>{body}</tbody></table>")

    def __repr__(self) -> str:
        lines = [*([self.columns] if self.columns else []), *self.rows]
        lines = [[" ".join(cell.splitlines()) for cell in line] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                   for line in lines]
        if self.columns:
            aligned.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.caption, "", *aligned])


_LEFT = "text-align: left; vertical-align: top"


def _keep(text):
    """Escape text, and keep its line breaks and leading spaces visible."""
    return f'<span style="white-space: pre-wrap">{html.escape(text)}</span>'


def show_table(caption: str, rows: dict | list[tuple], columns: tuple = ()) -> Table:
    """Return a table for the last line of a cell: a notebook renders it as HTML, ``print`` as text.

    A dict gives two columns, its keys and its values, and needs no headings in ``columns``.
    """
    pairs = rows.items() if isinstance(rows, dict) else rows
    return Table(caption, tuple(columns), tuple(tuple(str(cell) for cell in row) for row in pairs))
