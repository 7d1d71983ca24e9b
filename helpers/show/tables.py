"""Shows tables: plain, folded, with bars or with lines, in HTML for a notebook and as text for a terminal."""

import html
import re
from dataclasses import dataclass

from helpers.show.drawing import draw_bars, draw_line

# Without these classes, JupyterLab and an exported page read text between two `$` as mathematics.
NO_MATHEMATICS = 'class="mathjax_ignore tex2jax_ignore"'


@dataclass(frozen=True)
class Table:
    """A table of text: a caption, headings for the columns, and rows whose first cell is the row's heading.

    Attributes
    ----------
    caption : str
    columns : tuple of str
        May be empty.
    rows : tuple of tuple of str
        All rows have the same length.
    """

    caption: str
    columns: tuple
    rows: tuple

    def _repr_html_(self) -> str:
        return (
            f'<table {NO_MATHEMATICS}><caption style="caption-side: top; white-space: nowrap; {_LEFT}">'
            f"{self._title()}</caption>{self._head()}<tbody>{self._body()}</tbody></table>"
        )

    def _title(self):
        return html.escape(self.caption)

    def _head(self):
        head = "".join(
            f'<th scope="col" style="{_LEFT}">{html.escape(column)}</th>' for column in self.columns
        )
        return f"<thead><tr>{head}</tr></thead>" if head else ""

    def _body(self):
        return "".join(map(_row, self.rows))

    def __repr__(self) -> str:
        lines = [*([self.columns] if self.columns else []), *self.rows]
        lines = [[" ".join(cell.splitlines()) for cell in line] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        if self.columns:
            aligned.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.caption, "", *aligned])


class FoldedTable(Table):
    """A table of fields, in which the fields inside a field, such as ``messages[].role``, are folded below it.

    Their rows follow the row of the outer field.
    """

    def _body(self):
        body = ""
        rows = list(self.rows)
        while rows:
            top = rows.pop(0)
            body += _row(top)
            inside = []
            while rows and rows[0][0].startswith(tuple(f"{top[0]}{mark}" for mark in "[{.")):
                inside.append(rows.pop(0))
            if inside:
                count = f"{len(inside)} field{'s' if len(inside) > 1 else ''} inside {html.escape(top[0])}"
                body += (
                    f'<tr><td colspan="{len(top)}" style="{_LEFT}"><details><summary>{count}</summary><table>'
                    f"{self._head()}<tbody>{''.join(map(_row, inside))}</tbody></table></details></td></tr>"
                )
        return body


class BarTable(Table):
    """A table whose last column, a number from 0 to 1 such as ``"0.25"``, is shown as a bar."""

    def _body(self):
        bar = '<div style="width: {:.2%}; min-width: 1px; height: 0.8em; background: currentColor"></div>'
        return "".join(
            _row(row[:-1], f'<td style="width: 12em; {_LEFT}">{bar.format(float(row[-1]))}</td>')
            for row in self.rows
        )

    def __repr__(self) -> str:
        rows = tuple((*row[:-1], "#" * round(20 * float(row[-1]))) for row in self.rows)
        return repr(Table(self.caption, self.columns, rows))


class LineTable(Table):
    """A table with three columns, the last a list of values over time, drawn as a line unless it is empty."""

    def _body(self):
        return "".join(
            _row(row[:-1], f'<td style="{_LEFT}">{draw_line(row[-1], row[0])}</td>')
            if row[-1]
            else _row(row[:1], f'<td colspan="2" style="{_LEFT}">{_escape(row[1])}</td>')
            for row in self.rows
        )

    def __repr__(self) -> str:
        rows = tuple((*row[:-1], draw_bars(row[-1])) for row in self.rows)
        return repr(Table(self.caption, self.columns, rows))


# The stages of an answer, by the name of their span: a word, a letter, and the opacity of the bar.
STAGES = {
    "wait": ("waiting", ".", 0.15),
    "prefill": ("reading", "r", 0.5),
    "decode": ("writing", "w", 1.0),
}
TEXT_WIDTH = 60  # characters


class Timeline(Table):
    """A table of callers with the stages of their answers: a name of STAGES, its begin and its end, from 0 to 1.

    HTML shows bars, and text a line of letters for each caller.
    """

    def _title(self):
        legend = ", ".join(
            f'<span style="opacity: {shade}">&#9632;</span> {word}'
            for word, _, shade in STAGES.values()
        )
        return f"{super()._title()}: {legend}"

    def _body(self):
        bar = (
            '<div title="{}" style="position: absolute; left: {:.2%}; width: {:.2%}; height: 100%; opacity: {}; '
            'background: currentColor"></div>'
        )
        lane = (
            '<td style="width: 36em"><div style="position: relative; height: 0.9em">{}</div></td>'
        )
        return "".join(
            _row(
                (name,),
                lane.format(
                    "".join(
                        bar.format(STAGES[stage][0], begin, end - begin, STAGES[stage][2])
                        for stage, begin, end in stages
                    )
                ),
            )
            for name, stages in self.rows
        )

    def __repr__(self) -> str:
        lines = [
            f"{self.caption}: {', '.join(f'{letter} {word}' for word, letter, _ in STAGES.values())}"
        ]
        for name, stages in self.rows:
            line = [" "] * TEXT_WIDTH
            for stage, begin, end in stages:
                first = round(begin * (TEXT_WIDTH - 1))
                last = round(end * (TEXT_WIDTH - 1))
                line[first : last + 1] = STAGES[stage][1] * (last + 1 - first)
            lines.append(f"{name:12}{''.join(line).rstrip()}")
        return "\n".join(lines)


_LEFT = "text-align: left; vertical-align: top"


def _row(row, more=""):
    cells = "".join(f'<td style="{_LEFT}">{_escape(cell)}</td>' for cell in row[1:])
    return f'<tr><th scope="row" style="{_LEFT}">{_escape(row[0])}</th>{cells}{more}</tr>'


def _escape(text):
    """Return text as HTML with its line breaks and spaces; an address becomes a link."""
    shown = html.escape(text)
    if re.fullmatch(r"https?://\S+", text):
        shown = f'<a href="{shown}" target="_blank" rel="noopener">{shown}</a>'
    return f'<span style="white-space: pre-wrap">{shown}</span>'


def show_table(caption: str, rows: dict | list[tuple], columns: tuple = ()) -> Table:
    """Return a table for the last line of a cell: a notebook shows it as HTML, ``print`` as text.

    A dict becomes two columns, its keys and its values; ``columns`` may then be empty.
    """
    pairs = rows.items() if isinstance(rows, dict) else rows
    return Table(caption, tuple(columns), tuple(tuple(str(cell) for cell in row) for row in pairs))
