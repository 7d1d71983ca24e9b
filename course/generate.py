"""Writes the files that are made from others: environment.yml, constraints.txt, what documents and the container need.

In come pyproject.toml, deploy/container/requirements.in, data/models.toml and data/bench.json.
"""

import hashlib
import re
import subprocess
import sys

import nbformat
import yaml

from benchmarks.figures import (
    BATCH,
    BENCH,
    FIGURES,
    REACH,
    SERVICE,
    UNITS,
    machine_name,
    misses,
    read_runs,
    show_range,
)
from course.environment import project
from course.exercises import pair
from course.install import TORCH_CPU_INDEX
from helpers.models.catalogue import read_catalogue
from helpers.paths import DATA, NOTEBOOKS, ROOT

IMAGE = ROOT / "deploy" / "container" / "requirements.in"
CHART, SERVICE_CHART = DATA / "bench.svg", DATA / "service.svg"
DOCUMENTS_WITH_TABLES = ("models", "chat-model", "serving", "batch", "parameters")
PAGES_WITH_TABLES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in DOCUMENTS_WITH_TABLES),
)
TABLE = re.compile(
    r"(<!-- (figures|models|ratios|service|batch|entries|exercises) -->\n)(.*?)(<!-- /\2 -->)",
    re.DOTALL,
)
LINES = (("#1f5fa8", "-"), ("#b3541e", "--"))
SERVERS = {"openai_server": "this server", "llama_cpp": "llama.cpp's"}
# What the CUDA build of torch asks for on Linux; the course takes the CPU build.
CUDA_PACKAGES = ("nvidia-", "cuda-", "triton")


def generate() -> int:
    """Write all of them. The first two ask the package index; the rest needs no network."""
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
    """Return a document's text with its tables made anew, from ``data/bench.json`` and ``data/models.toml``."""
    runs = read_runs()
    tables = {
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


def entries_table() -> str:
    """Return the entry points of MLproject, with the names of their parameters, as a Markdown table."""
    entries = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["entry_points"]
    lines = ["| entry | parameters |", "|---|---|"]
    for entry, content in entries.items():
        lines.append(f"| `{entry}` | {', '.join(f'`{name}`' for name in content['parameters'])} |")
    return "\n".join(lines) + "\n"


def exercises_table() -> str:
    """Return how many exercises each page has as a Markdown table."""
    lines = ["| page | exercises |", "|---|---|"]
    for page in sorted(NOTEBOOKS.glob("*.ipynb")):
        exercises = pair(nbformat.read(page, as_version=4))
        lines.append(f"| [{page.stem}](../notebooks/{page.name}) | {len(exercises)} |")
    return "\n".join(lines) + "\n"


def figures_table(runs: list[dict]) -> str:
    """Return what the pages and commands take, over all runs, as a Markdown table."""
    lines = ["| what | measured | budget |", "|---|---|---|"]
    for figure in FIGURES:
        unit, scale = figure.unit, UNITS[figure.unit]
        if values := [value / scale for value in map(figure.find, runs) if value is not None]:
            budget = (
                f"{figure.budget['under'] / scale:g} {unit}".strip() + " " if figure.budget else ""
            )
            shown = f"{show_range(values, figure.digits)} {unit}".strip()
            lines.append(f"| {figure.what} | {shown} | {budget}|")
    dates = {}
    for run in runs:
        dates.setdefault(f"{machine_name(run)}, Python {run['versions']['python']}", []).append(
            run["date"]
        )
    measured = "; ".join(
        f"{machine}: {', '.join(dict.fromkeys(days))}" for machine, days in dates.items()
    )
    return "\n".join(lines) + (
        f"\n\n{_missed(runs)}Measured by `make bench` in {len(runs)} runs on {measured}.\n"
    )


def ratios_table(runs: list[dict]) -> str:
    """Return the chat model's comparisons over all runs as a Markdown table, and what missed its reach."""
    rates = [
        (
            what,
            [
                run["raw"]["chat"][part]["tokens_per_second"][name]
                for run in runs
                if "chat" in run["raw"]
            ],
        )
        for what, part, name in (
            ("one conversation", "single", "chat_model"),
            ("16 rows", "rows16", "one_predict"),
            ("8 callers", "callers8", "chat_model"),
            ("llama.cpp with 8 callers", "callers8", "llama_cpp_8_slots"),
            ("the lesson's wrapper with 8 callers", "callers8", "lesson_behind_a_lock"),
        )
    ]
    return _reach_table(runs, [name for name in REACH if name not in SERVICE + BATCH]) + (
        "In tokens per second: "
        + "; ".join(f"{what} {show_range(values, 0)}" for what, values in rates)
        + ". The time to read the prompts is in these figures.\n"
    )


def service_table(runs: list[dict]) -> str:
    """Return the server's comparisons over all runs, and how the seconds grew with the clients in the last of them."""
    growth = service_growth(runs)
    if not growth:
        return "No run has measured it.\n"
    lines = [
        "| clients | server | whole answer, median | 95th percentile | first token, median | 95th percentile |",
        "|---|---|---|---|---|---|",
    ]
    for clients, servers in growth.items():
        for name, title in SERVERS.items():
            if found := servers.get(name):
                seconds = [
                    found[part][share]
                    for part in ("whole", "first_token")
                    for share in ("median", "p95")
                ]
                lines.append(
                    f"| {clients} | {title} | "
                    + " | ".join(f"{value:.2f} s" for value in seconds)
                    + " |"
                )
    return _reach_table(runs, SERVICE) + "\n".join(lines) + "\n"


def batch_table(runs: list[dict]) -> str:
    """Return the batch's comparisons over all runs, and its rows per second."""
    measured = [
        run["raw"]["chat"]["spark"] for run in runs if "spark" in run["raw"].get("chat", {})
    ]
    if not measured:
        return "No run has measured it.\n"
    rates = [
        (what, [found["rows_per_second"][name] for found in measured])
        for what, name in (("one worker", "1"), ("two workers", "2"), ("one `predict`", "predict"))
    ]
    return (
        _reach_table(runs, BATCH)
        + "In rows per second: "
        + "; ".join(f"{what} {show_range(values, 1)}" for what, values in rates)
        + (
            f". A run of 8 rows, all of it a start, takes "
            f"{show_range([found['few_rows_seconds'] for found in measured], 0)} s.\n"
        )
    )


def _reach_table(runs, names):
    """Return these ratios over all runs, and what missed its reach."""
    lines = ["| what | against | times | reach |", "|---|---|---|---|"]
    for name in names:
        reach, values = REACH[name], [run["ratios"][name] for run in runs if name in run["ratios"]]
        if not values:  # no kept run has measured it
            continue
        bound = "; ".join(
            f"{kind.replace('_', ' ')} {reach[kind]}"
            for kind in ("at_least", "under")
            if kind in reach
        )
        days = dict.fromkeys(run["date"] for run in runs if name in misses(run))
        bound += f"; missed on {', '.join(days)}" if days else ""
        lines.append(
            f"| {reach['what']} | {reach['against']} | {show_range(values, 3)} | {bound} |"
        )
    return "\n".join(lines) + "\n\n" + _missed(runs, names)


def service_growth(runs: list[dict]) -> dict:
    """Return how the server's seconds grew with its clients, in the last run that measured it; empty without one."""
    return next(
        (
            run["raw"]["chat"]["service"]["growth"]
            for run in reversed(runs)
            if "service" in run["raw"].get("chat", {})
        ),
        {},
    )


def _missed(runs, names=()):
    """Return a sentence for each of these ratios that missed its reach; without names, for each other figure.

    Two runs of one day that missed it for one reason have one sentence.
    """
    lines = [
        f"Missed on {run['date']}, {REACH[name]['what'] if names else name}: "
        f"{run.get('missed', {}).get(name, 'no reason is known.')}\n\n"
        for run in runs
        for name in misses(run)
        if (name in names if names else name not in REACH)
    ]
    return "".join(dict.fromkeys(lines))


def bench_digest() -> str:
    """Return the sha256 of ``data/bench.json``, which the chart carries as its source."""
    return hashlib.sha256(BENCH.read_bytes()).hexdigest()


def draw_chart(growth: dict) -> None:
    """Write ``data/bench.svg``: tokens per second by callers, and what a longer prompt costs."""
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
    """Write ``data/service.svg``: how the seconds of an answer, and to its first token, grow with the clients."""

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
    """Write a chart: of each panel its title, what stands below, and lines of points by name."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "bench", "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=(9, 3), layout="constrained")
        for axes, (title, xlabel, lines) in zip(
            figure.subplots(1, len(panels)), panels, strict=True
        ):
            for (name, points), (color, style) in zip(lines.items(), LINES, strict=False):
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
