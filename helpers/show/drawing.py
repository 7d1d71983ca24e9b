"""Draws values as an SVG line for a notebook, and as a row of text bars for a terminal."""

import html
import math


def draw_svg(description: str, width: int, height: int, shapes: str) -> str:
    """Return an SVG picture. ``description`` is for screen readers."""
    return (
        f'<svg role="img" aria-label="{html.escape(description)}" width="{width}" height="{height}" '
        f'viewBox="-1 0 {width + 2} {height}">{shapes}</svg>'
    )


def draw_line(values: list[float], name: str) -> str:
    """Return an SVG line for values from 0 up, in the colour of the text; nan leaves a gap."""
    width = 180
    height = 24
    highest = highest_of(values)
    step = width / max(len(values) - 1, 1)
    points = [
        None
        if math.isnan(value)
        else (index * step, height - 1 - (height - 2) * value / (highest or 1))
        for index, value in enumerate(values)
    ]
    path = ""
    before = None
    for point in points:
        if point:
            path += f"{'L' if before else 'M'}{point[0]:.1f} {point[1]:.1f}" + (
                "" if before else "h0.1"
            )
        before = point
    description = f"{name}, over time" + ("" if math.isnan(highest) else f": at most {highest:.3g}")
    line = (
        f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="1.5" '
        'stroke-linecap="round"/>'
    )
    return draw_svg(description, width, height, line)


def draw_bars(values: list[float]) -> str:
    """Return a row of at most 40 text bars; each shows the highest of its values."""
    size = math.ceil(len(values) / 40) or 1
    groups = [highest_of(values[start : start + size]) for start in range(0, len(values), size)]
    highest = highest_of(groups)
    return "".join(
        " " if math.isnan(value) else "▁▂▃▄▅▆▇█"[min(int(8 * value / (highest or 1)), 7)]
        for value in groups
    )


def highest_of(values: list[float]) -> float:
    """Return the highest value that is not nan; nan if there is none."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)
