"""Detects when a figure drifts: learns a band from quiet windows, and judges later windows by it.

The rule is that of the individuals chart of statistical process control (NIST/SEMATECH e-Handbook
of Statistical Methods, 6.3.2.2): the mean of quiet windows, and 2.66 times their mean moving range
on either side. That is three standard deviations if the windows are independent.
"""

import html
import itertools
import math
import statistics
from dataclasses import dataclass

from helpers.errors import CourseError
from helpers.show.drawing import draw_svg
from helpers.show.tables import NO_MATHEMATICS, Table

FEWEST = 6  # windows that a band can be learned from


@dataclass(frozen=True)
class Band:
    """The range in which a figure stays while nothing changes, and its mean."""

    low: float
    middle: float
    high: float


def learn_band(values: list[float], least: float) -> Band:
    """Return the band of a figure, learned from quiet windows.

    Parameters
    ----------
    values : list of float
        One for each window; nan for an empty window, which is ignored.
    least : float
        The least half-width of the band. Without it, the band of a figure that never changed would
        have no width.

    Raises
    ------
    CourseError
        With the code ``few-windows`` if there are fewer than FEWEST.
    """
    values = [value for value in values if not math.isnan(value)]
    if len(values) < FEWEST:
        raise CourseError(
            "few-windows",
            f"{len(values)} windows are too few to learn a band from.",
            f"Give {FEWEST} or more windows with requests.",
        )
    middle = statistics.fmean(values)
    half_width = max(
        2.66 * statistics.fmean(abs(b - a) for a, b in itertools.pairwise(values)), least
    )
    return Band(max(middle - half_width, 0.0), middle, middle + half_width)


def judge(value: float, band: Band) -> str:
    """Return ``inside``, ``above``, ``below`` or, for nan, ``empty``. A value on the edge is inside."""
    if math.isnan(value):
        return "empty"
    if value > band.high:
        return "above"
    return "below" if value < band.low else "inside"


@dataclass(frozen=True)
class ControlChart:
    """Windows' values and a band: HTML shows a chart, text a table. The first ``learned`` windows made the band."""

    name: str
    values: tuple[float, ...]
    band: Band
    learned: int

    @property
    def first_outside(self) -> int | None:
        """The number of the first window, counted from 1, that is above or below; None if all stay."""
        return next(
            (
                number
                for number, value in enumerate(self.values, 1)
                if number > self.learned and judge(value, self.band) in ("above", "below")
            ),
            None,
        )

    @property
    def caption(self) -> str:
        """A description of the chart."""
        ends = (
            f"window {self.first_outside} leaves it"
            if self.first_outside
            else "no window leaves it"
        )
        return (
            f"{self.name}: a band from {self.band.low:.2f} to {self.band.high:.2f}, "
            f"learned from windows 1 to {self.learned}; {ends}"
        )

    def _repr_html_(self) -> str:
        width = 420
        height = 120
        edge = 8
        numbers = [value for value in self.values if not math.isnan(value)]
        top = max([*numbers, self.band.high]) or 1
        step = (width - 2 * edge) / max(len(self.values) - 1, 1)

        def place(value):
            return height - edge - (height - 2 * edge) * value / top

        marks = ""
        for index, value in enumerate(self.values):
            if not math.isnan(value):
                out = judge(value, self.band) != "inside"
                fill = (
                    "currentColor" if out else "none"
                )  # a filled dot differs from the others without colours
                marks += (
                    f'<circle cx="{edge + index * step:.1f}" cy="{place(value):.1f}" r="{5 if out else 3}" '
                    f'fill="{fill}" stroke="currentColor"/>'
                )
        border = edge + (self.learned - 0.5) * step
        shapes = (
            f'<rect x="0" width="{width}" y="{place(self.band.high):.1f}" fill="currentColor" opacity="0.15" '
            f'height="{place(self.band.low) - place(self.band.high):.1f}"/>'
            f'<path d="M0 {place(self.band.middle):.1f}h{width}" stroke="currentColor" stroke-dasharray="4 4"/>'
            f'<path d="M{border:.1f} 0v{height}" stroke="currentColor" stroke-dasharray="1 3"/>{marks}'
        )
        return (
            f'<figure {NO_MATHEMATICS} style="margin: 0">'
            f"<figcaption>{html.escape(self.caption)}</figcaption>"
            f"{draw_svg(self.caption, width, height, shapes)}</figure>"
        )

    def __repr__(self) -> str:
        rows = tuple(
            (
                str(number),
                f"{value:.2f}".replace("nan", "-"),
                "learned from" if number <= self.learned else judge(value, self.band),
            )
            for number, value in enumerate(self.values, 1)
        )
        return repr(Table(self.caption, ("window", "value", "verdict"), rows))


def chart_drift(name: str, values: list[float], learned: int, least: float) -> ControlChart:
    """Return a chart of a figure whose band is learned from its first windows; see `learn_band` for ``least``."""
    return ControlChart(name, tuple(values), learn_band(list(values[:learned]), least), learned)
