"""Writes the generated files: environment.yml, constraints.txt, the container's pins, tables and charts.

Their sources are pyproject.toml, deploy/container/requirements.in, data/models.toml,
data/bench.json, MLproject and the notebooks.
"""

import hashlib
import re
import subprocess
import sys

import nbformat
import yaml

from benchmarks.figures import (
    BATCH_RATIOS,
    BENCH,
    CHAT_RATIOS,
    FIGURES,
    MODEL,
    SERVICE_RATIOS,
    SET_UP_FIGURES,
    SUMMARY,
    UNITS,
    find,
    find_misses,
    machine_name,
    read_runs,
    show_range,
)
from course.environment import project
from course.execute import PAGES
from course.exercises import pair
from course.install import TORCH_CPU_INDEX
from course.pages import read_pages
from helpers.models.catalogue import read_catalogue
from helpers.paths import DATA, NOTEBOOKS, ROOT

IMAGE = ROOT / "deploy" / "container" / "requirements.in"
CHART = DATA / "bench.svg"
SERVICE_CHART = DATA / "service.svg"
DOCUMENTS_WITH_TABLES = ("models", "figures", "chat-model", "serving", "batch", "parameters")
PAGES_WITH_TABLES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in DOCUMENTS_WITH_TABLES),
)
TABLE = re.compile(
    r"(<!-- (summary|pages|figures|models|ratios|service|batch|entries|exercises) -->\n)(.*?)(<!-- /\2 -->)",
    re.DOTALL,
)
LINE_STYLES = (("#1f5fa8", "-"), ("#b3541e", "--"))
SERVERS = {"openai_server": "this service", "llama_cpp": "llama.cpp's server"}
NOT_MEASURED = "No run has measured it.\n"
# Requirements of torch's CUDA build on Linux; the course installs the CPU build.
CUDA_PACKAGES = ("nvidia-", "cuda-", "triton")


def generate() -> int:
    """Write all generated files. Needs the package index. Returns the exit code."""
    constraints = ROOT / "constraints.txt"
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--universal",
        "--python-version",
        "3.11",
        "--extra",
        "dev",
        "--extra",
        "nightly",
        "--extra",
        "bench",
        "--no-header",
        "--no-annotate",
        "--upgrade",
        "pyproject.toml",
    ]
    resolved = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    constraints.write_text(
        "# Every package of the course at one version, for pip install --constraint. Made from pyproject.toml:\n"
        "# python -m helpers generate\n"
        + "".join(
            line + "\n" for line in resolved.splitlines() if not line.startswith(CUDA_PACKAGES)
        ),
        encoding="utf-8",
    )
    (command,) = re.findall(
        r"^# python (-m uv pip compile .*)$", IMAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
    (ROOT / "environment.yml").write_text(environment_yml(), encoding="utf-8")
    return generate_tables()


def generate_tables() -> int:
    """Write the tables in the documents and the charts, without a network. Returns the exit code."""
    for page in PAGES_WITH_TABLES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    runs = read_runs()
    draw_chart(runs[-1]["raw"]["chat"]["growth"])
    if growth := service_growth(runs):
        draw_service_chart(growth)
    return 0


def environment_yml() -> str:
    """Return environment.yml as text, made from pyproject.toml."""
    course = project()
    oldest = re.search(r">=([\d.]+)", course["requires-python"])[1]
    pip = [
        f"--extra-index-url {TORCH_CPU_INDEX}",
        *course["dependencies"],
        *course["optional-dependencies"]["dev"],
        "--editable .",
    ]
    return "\n".join(
        [
            "# For conda, in place of .venv: conda env create --file environment.yml. Made from pyproject.toml:",
            "# python -m helpers generate",
            f"name: {course['name']}",
            "channels:",
            "  - conda-forge",
            "dependencies:",
            f"  - python={oldest}",
            "  - pip",
            "  - pip:",
            *(f"      - {line}" for line in pip),
            "",
        ]
    )


def with_tables(text: str) -> str:
    """Return a document's text with its tables generated again."""
    runs = read_runs()
    tables = {
        "summary": summary_table(runs),
        "pages": pages_table(),
        "figures": figures_table(runs),
        "ratios": ratios_table(runs),
        "models": models_table(),
        "service": service_table(runs),
        "batch": batch_table(runs),
        "entries": entries_table(),
        "exercises": exercises_table(),
    }
    return TABLE.sub(lambda match: match[1] + tables[match[2]] + match[4], text)


def models_table() -> str:
    """Return the catalogue as a Markdown table."""
    lines = ["| `MODEL=` | what it is | download | disk | memory |", "|---|---|---|---|---|"]
    for name, entry in read_catalogue().items():
        download = f"{entry.download:,} MB" if entry.download else "none"
        lines.append(
            f"| `{name}` | [{entry.title}]({entry.homepage}): {entry.summary} "
            f"| {download} | {entry.disk:,} MB | {entry.memory:,} MB |"
        )
    return "\n".join(lines) + "\n"


def pages_table() -> str:
    """Return data/pages.toml as a Markdown table."""
    lines = ["| | page | time | afterwards you can |", "|---|---|---|---|"]
    for number, page in enumerate(read_pages(), 1):
        label = f", {page.label}" if page.label else ""
        lines.append(
            f"| {number} | [{page.name}](notebooks/{page.name}.ipynb){label} | {page.minutes} minutes "
            f"| {page.afterwards} |"
        )
    return "\n".join(lines) + "\n"


def entries_table() -> str:
    """Return the entry points of MLproject and their parameters as a Markdown table."""
    entries = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["entry_points"]
    lines = ["| entry | parameters |", "|---|---|"]
    for entry, content in entries.items():
        lines.append(f"| `{entry}` | {', '.join(f'`{name}`' for name in content['parameters'])} |")
    return "\n".join(lines) + "\n"


def exercises_table() -> str:
    """Return the number of each page's exercises as a Markdown table."""
    lines = ["| page | exercises |", "|---|---|"]
    for page in sorted(NOTEBOOKS.glob("*.ipynb")):
        exercises = pair(nbformat.read(page, as_version=4))
        lines.append(f"| [{page.stem}](../notebooks/{page.name}) | {len(exercises)} |")
    return "\n".join(lines) + "\n"


def summary_table(runs: list[dict]) -> str:
    """Return the README's table: what a learner and an operator decide by, over all runs."""
    lines = [
        f"| with `{MODEL}` | " + " | ".join(f"`{page}`" for page in PAGES) + " |",
        "|---" * (1 + len(PAGES)) + "|",
    ]
    for row in SUMMARY:
        cells = [_show(runs, row.paths.get(page), row.unit, row.digits) for page in PAGES]
        lines.append(f"| {row.what} | {' | '.join(cells)} |")
    set_up = [
        f"{figure.what}: {shown}"
        for figure in SET_UP_FIGURES
        if (shown := _show(runs, ("raw", *figure.path), figure.unit, figure.digits))
    ]
    return "\n".join(lines) + f"\n\nSet-up: {'; '.join(set_up)}.\n"


def figures_table(runs: list[dict]) -> str:
    """Return all figures that are not ratios, over all runs, and the machines that they come from."""
    lines = ["| what | measured | target |", "|---|---|---|"]
    titles = {}
    for figure in FIGURES:
        if shown := _show(runs, ("raw", *figure.path), figure.unit, figure.digits):
            name = ": ".join(figure.path)
            titles[name] = figure.what
            scaled = None if figure.under is None else figure.under / UNITS[figure.unit]
            target = _show_target(runs, name, None, scaled, figure.unit)
            lines.append(f"| {figure.what} | {shown} | {target} |")
    dates = {}
    for run in runs:
        machine = f"{machine_name(run)}, Python {run['versions']['python']}"
        dates.setdefault(machine, {})[run["date"]] = None
    measured = "; ".join(f"{machine}: {', '.join(days)}" for machine, days in dates.items())
    return (
        "\n".join(lines)
        + f"\n\n{_explain_misses(runs, titles)}"
        + f"Measured by `make bench` in {len(runs)} runs on {measured}.\n"
    )


def ratios_table(runs: list[dict]) -> str:
    """Return the chat model's comparisons over all runs."""
    rates = [
        f"{what} {shown}"
        for what, part, name in (
            ("one caller", "single", "chat_model"),
            ("16 rows", "rows16", "one_predict"),
            ("8 callers", "callers8", "chat_model"),
            ("llama.cpp with 8 callers", "callers8", "llama_cpp_8_slots"),
            ("track B's wrapper with 8 callers", "callers8", "lesson_behind_a_lock"),
        )
        if (shown := _show(runs, ("raw", "chat", part, "tokens_per_second", name)))
    ]
    return _comparison(runs, CHAT_RATIOS) + (
        f"In tokens per second, with the time to read the prompts: {'; '.join(rates)}.\n"
    )


def service_table(runs: list[dict]) -> str:
    """Return the service's comparisons over all runs, and its times by clients in the last run."""
    growth = service_growth(runs)
    if not growth:
        return NOT_MEASURED
    lines = [
        "| clients | server | whole answer, median | 95th percentile | first token, median | 95th percentile |",
        "|---|---|---|---|---|---|",
    ]
    for clients, servers in growth.items():
        for name, title in SERVERS.items():
            if name in servers:
                cells = [
                    f"{servers[name][part][share]:.2f} s"
                    for part in ("whole", "first_token")
                    for share in ("median", "p95")
                ]
                lines.append(f"| {clients} | {title} | {' | '.join(cells)} |")
    return _comparison(runs, SERVICE_RATIOS) + "\n".join(lines) + "\n"


def batch_table(runs: list[dict]) -> str:
    """Return the batch's comparisons over all runs, and its rows per second."""
    spark = ("raw", "chat", "spark")
    rates = [
        f"{what} {shown}"
        for what, name in (("one worker", "1"), ("two workers", "2"), ("one `predict`", "predict"))
        if (shown := _show(runs, (*spark, "rows_per_second", name), "", 1))
    ]
    if not rates:
        return NOT_MEASURED
    start = _show(runs, (*spark, "few_rows_seconds"), "s")
    return _comparison(runs, BATCH_RATIOS) + (
        f"In rows per second: {'; '.join(rates)}. A run of 8 rows, most of which is the start, "
        f"takes {start}.\n"
    )


def _show(runs, path, unit="", digits=0):
    """Return the range of a figure over the runs that have it, with its unit; empty without one."""
    values = [find(run, path) for run in runs] if path else []
    values = [value / UNITS[unit] for value in values if value is not None]
    return f"{show_range(values, digits)} {unit}".strip() if values else ""


def _show_target(runs, name, at_least, under, unit=""):
    """Return a figure's target, and the days of the runs that missed it."""
    bounds = {"at least": at_least, "under": under}
    parts = [f"{word} {bound:g} {unit}".strip() for word, bound in bounds.items() if bound]
    days = dict.fromkeys(run["date"] for run in runs if name in find_misses(run))
    if days:
        parts.append(f"missed on {', '.join(days)}")
    return "; ".join(parts)


def _comparison(runs, ratios):
    """Return these ratios over all runs as a Markdown table, and the reasons for missed targets."""
    lines = ["| what | compared with | times | target |", "|---|---|---|---|"]
    for name, ratio in ratios.items():
        if shown := _show(runs, ("ratios", name), "", 3):
            target = _show_target(runs, name, ratio.at_least, ratio.under)
            lines.append(f"| {ratio.what} | {ratio.against} | {shown} | {target} |")
    titles = {
        name: f"{ratio.what}, compared with {ratio.against}" for name, ratio in ratios.items()
    }
    return "\n".join(lines) + "\n\n" + _explain_misses(runs, titles)


def service_growth(runs: list[dict]) -> dict:
    """Return the service's times by clients, of the last run that has them; empty without one."""
    measured = [find(run, ("raw", "chat", "service", "growth")) for run in runs]
    return next((growth for growth in reversed(measured) if growth), {})


def _explain_misses(runs, titles):
    """Return a sentence for each missed target among these names; equal sentences of a day once."""
    lines = [
        f"Missed on {run['date']}, {titles[name]}: "
        f"{run.get('missed', {}).get(name, 'no reason is known.')}\n\n"
        for run in runs
        for name in find_misses(run)
        if name in titles
    ]
    return "".join(dict.fromkeys(lines))


def bench_digest() -> str:
    """Return the sha256 of ``data/bench.json``, which each chart's file names as its source."""
    return hashlib.sha256(BENCH.read_bytes()).hexdigest()


def draw_chart(growth: dict) -> None:
    """Write ``data/bench.svg``: tokens per second by callers, and times by length of the prompt."""
    callers, prompts = growth["tokens_per_second_by_callers"], growth["by_prompt_tokens"]
    _draw(
        CHART,
        [
            ("Tokens per second", "callers at once", {"": callers}),
            (
                "Seconds to the first token",
                "tokens of prompt",
                {"": {size: entry["first_token_seconds"] for size, entry in prompts.items()}},
            ),
            (
                "Then tokens per second",
                "tokens of prompt",
                {"": {size: entry["then_tokens_per_second"] for size, entry in prompts.items()}},
            ),
        ],
    )


def draw_service_chart(growth: dict) -> None:
    """Write ``data/service.svg``: seconds of an answer, and to its first token, by clients."""

    def lines(part, share):
        return {
            title: {clients: servers[name][part][share] for clients, servers in growth.items()}
            for name, title in SERVERS.items()
            if all(name in servers for servers in growth.values())
        }

    _draw(
        SERVICE_CHART,
        [
            ("Answer, median (s)", "clients at once", lines("whole", "median")),
            ("Answer, 95th percentile (s)", "clients at once", lines("whole", "p95")),
            ("First token, 95th percentile (s)", "clients at once", lines("first_token", "p95")),
        ],
    )


def _draw(path, panels):
    """Write a chart. Each panel has a title, a label of the x-axis, and lines of points by name."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "bench", "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=(9, 3), layout="constrained")
        for axes, (title, xlabel, lines) in zip(
            figure.subplots(1, len(panels)), panels, strict=True
        ):
            for (name, points), (color, style) in zip(lines.items(), LINE_STYLES, strict=False):
                axes.plot(
                    list(map(int, points)),
                    list(points.values()),
                    style,
                    marker="o",
                    color=color,
                    label=name,
                )
            if len(lines) > 1:
                axes.legend()
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.set(title=title, xlabel=xlabel)
            axes.set_ylim(bottom=0)
            axes.grid(color="#dddddd")
        figure.savefig(
            path,
            metadata={"Date": None, "Description": f"data/bench.json, sha256 {bench_digest()}"},
        )
