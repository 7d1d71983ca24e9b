"""Writes the files that are made from others: environment.yml, constraints.txt, the documents' tables and the chart.

In come pyproject.toml, data/models.toml and data/bench.json.
"""

import hashlib
import re
import subprocess
import sys

from course.bench.figures import BENCH, FIGURES, REACH, UNITS, machine_name, misses, read_runs, show_range
from course.environment import TORCH_CPU_INDEX, project
from helpers.models.catalogue import read_catalogue
from helpers.paths import DATA, ROOT

CHART = DATA / "bench.svg"
PAGES_WITH_TABLES = (ROOT / "README.md", ROOT / "docs" / "models.md", ROOT / "docs" / "chat-model.md")
TABLE = re.compile(r"(<!-- (figures|models|ratios) -->\n)(.*?)(<!-- /\2 -->)", re.DOTALL)
# What the CUDA build of torch asks for on Linux; the course takes the CPU build.
CUDA_PACKAGES = ("nvidia-", "cuda-", "triton")


def generate() -> int:
    """Write all of them. constraints.txt asks the package index; the rest needs no network."""
    constraints = ROOT / "constraints.txt"
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11",
               "--all-extras", "--no-header", "--no-annotate", "--upgrade", "pyproject.toml"]
    resolved = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    constraints.write_text(
        "# Every package of the course at one version, for pip install --constraint. Made from pyproject.toml:\n"
        "# python -m helpers generate\n"
        + "".join(line + "\n" for line in resolved.splitlines() if not line.startswith(CUDA_PACKAGES)),
        encoding="utf-8")
    (ROOT / "environment.yml").write_text(environment_yml(), encoding="utf-8")
    for page in PAGES_WITH_TABLES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw_chart(read_runs()[-1]["raw"]["chat"]["growth"])
    return 0


def environment_yml() -> str:
    """Return environment.yml as text, made from pyproject.toml."""
    course = project()
    oldest = re.search(r">=([\d.]+)", course["requires-python"])[1]
    pip = [f"--extra-index-url {TORCH_CPU_INDEX}", *course["dependencies"],
           *course["optional-dependencies"]["dev"], "--editable ."]
    return "\n".join([
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
    ])


def with_tables(text: str) -> str:
    """Return a document's text with its tables made anew, from ``data/bench.json`` and ``data/models.toml``."""
    runs = read_runs()
    tables = {"figures": figures_table(runs), "ratios": ratios_table(runs), "models": models_table()}
    return TABLE.sub(lambda match: match[1] + tables[match[2]] + match[4], text)


def models_table() -> str:
    """Return the catalogue as a Markdown table."""
    lines = ["| `MODEL=` | what it is | download | disk | memory |", "|---|---|---|---|---|"]
    for name, entry in read_catalogue().items():
        download = f"{entry.download:,} MB" if entry.download else "none"
        lines.append(f"| `{name}` | [{entry.title}]({entry.homepage}): {entry.summary} "
                     f"| {download} | {entry.disk:,} MB | {entry.memory:,} MB |")
    return "\n".join(lines) + "\n"


def figures_table(runs: list[dict]) -> str:
    """Return what the pages and commands take, over all runs, as a Markdown table."""
    lines = ["| what | measured | budget |", "|---|---|---|"]
    for figure in FIGURES:
        unit, scale = figure.unit, UNITS[figure.unit]
        if values := [value / scale for value in map(figure.find, runs) if value is not None]:
            budget = f"{figure.budget['under'] / scale:g} {unit} " if figure.budget else ""
            shown = f"{show_range(values, figure.digits)} {unit}".strip()
            lines.append(f"| {figure.what} | {shown} | {budget}|")
    dates = {}
    for run in runs:
        dates.setdefault(f"{machine_name(run)}, Python {run['versions']['python']}", []).append(run["date"])
    measured = "; ".join(f"{machine}: {', '.join(dict.fromkeys(days))}" for machine, days in dates.items())
    return "\n".join(lines) + (f"\n\n{_missed(runs, ratios=False)}Measured by `make bench` in {len(runs)} runs on "
                               f"{measured}.\n")


def ratios_table(runs: list[dict]) -> str:
    """Return the chat model's comparisons over all runs as a Markdown table, and what missed its reach."""
    lines = ["| what | against | times | reach |", "|---|---|---|---|"]
    for name, reach in REACH.items():
        values = [run["ratios"][name] for run in runs if name in run["ratios"]]
        if not values:  # no kept run has measured it
            continue
        bound = "; ".join(f"{kind.replace('_', ' ')} {reach[kind]}" for kind in ("at_least", "under") if kind in reach)
        days = [run["date"] for run in runs if name in misses(run)]
        bound += f"; missed on {', '.join(days)}" if days else ""
        lines.append(f"| {reach['what']} | {reach['against']} | {show_range(values, 3)} | {bound} |")
    rates = [(what, [run["raw"]["chat"][part]["tokens_per_second"][name] for run in runs if "chat" in run["raw"]])
             for what, part, name in (("one conversation", "single", "chat_model"),
                                      ("16 rows", "rows16", "one_predict"), ("8 callers", "callers8", "chat_model"),
                                      ("llama.cpp with 8 callers", "callers8", "llama_cpp_8_slots"),
                                      ("the lesson's wrapper with 8 callers", "callers8", "lesson_behind_a_lock"))]
    return "\n".join(lines) + "\n\n" + _missed(runs, ratios=True) + (
        "In tokens per second: " + "; ".join(f"{what} {show_range(values, 0)}" for what, values in rates)
        + ". The time to read the prompts is in these figures.\n")


def _missed(runs, ratios):
    """Return a sentence for each ratio, or each other figure, that missed what it should reach, with the reason."""
    lines = [f"Missed on {run['date']}, {REACH[name]['what'] if ratios else name}: "
             f"{run.get('missed', {}).get(name, 'no reason is known.')}\n\n"
             for run in runs for name in misses(run) if (name in REACH) is ratios]
    return "".join(lines)


def bench_digest() -> str:
    """Return the sha256 of ``data/bench.json``, which the chart carries as its source."""
    return hashlib.sha256(BENCH.read_bytes()).hexdigest()


def draw_chart(growth: dict) -> None:
    """Write ``data/bench.svg``: tokens per second by callers, and what a longer prompt costs."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    callers, prompts = growth["tokens_per_second_by_callers"], growth["by_prompt_tokens"]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.family": "sans-serif"}):
        figure = Figure(figsize=(9, 3), layout="constrained")
        panels = figure.subplots(1, 3)
        for panel, title, xlabel, points in (
            (panels[0], "Tokens per second", "callers at once", callers),
            (panels[1], "Seconds to the first token", "tokens of prompt",
             {size: entry["first_token_seconds"] for size, entry in prompts.items()}),
            (panels[2], "Then tokens per second", "tokens of prompt",
             {size: entry["then_tokens_per_second"] for size, entry in prompts.items()}),
        ):
            panel.plot(list(map(int, points)), list(points.values()), marker="o", color="#1f5fa8")
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.set(title=title, xlabel=xlabel)
            panel.set_ylim(bottom=0)
            panel.grid(color="#dddddd")
        figure.savefig(CHART, metadata={"Date": None, "Description": f"data/bench.json, sha256 {bench_digest()}"})
