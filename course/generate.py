"""Writes the files that are made from others: environment.yml, constraints.txt, the README's tables and chart."""

import hashlib
import json
import re
import subprocess
import sys
import tomllib

from helpers.models.catalogue import read_catalogue
from helpers.paths import DATA, ROOT
from course.environment import TORCH_CPU_INDEX

BENCH, CHART = DATA / "bench.json", DATA / "bench.svg"
TABLE = re.compile(r"(<!-- (figures|models|ratios) -->\n)(.*?)(<!-- /\2 -->)", re.DOTALL)
# What the CUDA build of torch asks for on Linux; the course takes the CPU build.
CUDA_PACKAGES = ("nvidia-", "cuda-", "triton")


def generate():
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
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
    draw_chart(json.loads(BENCH.read_text(encoding="utf-8"))["raw"]["chat"]["growth"])
    return 0


def environment_yml():
    """Return environment.yml as text, made from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = re.search(r">=([\d.]+)", project["requires-python"])[1]
    pip = [f"--extra-index-url {TORCH_CPU_INDEX}", *project["dependencies"],
           *project["optional-dependencies"]["dev"], "--editable ."]
    return "\n".join([
        "# For conda, in place of .venv: conda env create --file environment.yml. Made from pyproject.toml:",
        "# python -m helpers generate",
        f"name: {project['name']}",
        "channels:",
        "  - conda-forge",
        "dependencies:",
        f"  - python={oldest}",
        "  - pip",
        "  - pip:",
        *(f"      - {line}" for line in pip),
        "",
    ])


def with_tables(readme):
    """Return the README's text with its tables made anew, from ``data/bench.json`` and ``data/models.toml``."""
    figures = json.loads(BENCH.read_text(encoding="utf-8"))
    tables = {"figures": figures_table(figures), "ratios": ratios_table(figures), "models": models_table()}
    return TABLE.sub(lambda match: match[1] + tables[match[2]] + match[4], readme)


def models_table():
    """Return the catalogue as a Markdown table."""
    lines = ["| `MODEL=` | what it is | download | disk | memory |", "|---|---|---|---|---|"]
    for name, card in read_catalogue().items():
        download = f"{card.download:,} MB" if card.download else "none"
        lines.append(f"| `{name}` | [{card.title}]({card.homepage}): {card.summary} "
                     f"| {download} | {card.disk:,} MB | {card.memory:,} MB |")
    return "\n".join(lines) + "\n"


def figures_table(figures):
    """Return the measurements as a Markdown table.

    Parameters
    ----------
    figures : dict
        What ``course.bench.notebooks`` writes.
    """
    machine, raw = figures["machine"], figures["raw"]
    lines = ["| what | measured | budget |", "|---|---|---|"]
    for entry in raw["notebooks"]:
        budget = raw["budgets"][entry["model"]]
        lines += [
            f"| `{entry['notebook']}` on `{entry['model']}`, Run All | {entry['seconds']:.0f} s "
            f"| {budget['seconds']} s |",
            f"| its peak memory | {entry['peak_memory_bytes'] / 1e9:.1f} GB "
            f"| {budget['peak_memory_bytes'] / 1e9:.0f} GB |",
        ]
    prepare, budget = raw["prepare"], raw["budgets"]["prepare"]
    lines += [
        f"| `smollm2-135m` fetched, converted and exported: peak memory | {prepare['peak_memory_bytes'] / 1e9:.1f} GB "
        f"| {budget['peak_memory_bytes'] / 1e9} GB |",
        f"| the same, found in the cache | {prepare['warm_seconds']:.3f} s | {budget['warm_seconds']} s |",
    ]
    test = raw["test"]
    lines.append(f"| `make test` from a bare checkout, set-up and models in it | {test['seconds'] / 60:.0f} min "
                 f"| {raw['budgets']['test']['seconds'] // 60} min |")
    lines.append(f"| disk after that: packages, models, what the tests left | {test['disk_bytes'] / 1e9:.1f} GB | |")
    for name, track in raw["tracks"].items():
        lines += [
            f"| `{name}`: first token, then | {track['first_token_seconds']:.2f} s, "
            f"{track['tokens_per_second']:.0f} tokens per second | |",
            f"| a logged copy of it, on disk | {track['disk_bytes'] / 1e9:.2f} GB | |",
        ]
    return "\n".join(lines) + (
        f"\n\nMeasured by `make bench` on {machine['cores']} cores ({machine['processor']}, {machine['system']}), "
        f"Python {figures['versions']['python']}, {figures['date']}.\n")


def ratios_table(figures):
    """Return the chat model's comparisons as a Markdown table, from what ``course.bench.notebooks`` writes."""
    raw = figures["raw"]
    lines = ["| what | against | times | reach |", "|---|---|---|---|"]
    for name, reach in raw["reach"].items():
        bound = f"at least {reach['at_least']}" if "at_least" in reach else f"under {reach['under']}"
        lines.append(f"| {reach['what']} | {reach['against']} | {figures['ratios'][name]} | {bound} |")
    rates = {name: raw["chat"][name]["tokens_per_second"] for name in ("single", "rows16", "callers8")}
    return "\n".join(lines) + (
        f"\n\nIn tokens per second: one conversation {rates['single']['chat_model']:.0f}, "
        f"16 rows {rates['rows16']['one_predict']:.0f}, 8 callers {rates['callers8']['chat_model']:.0f} "
        f"(llama.cpp {rates['callers8']['llama_cpp_8_slots']:.0f}, "
        f"the lesson's wrapper {rates['callers8']['lesson_behind_a_lock']:.0f}). "
        "The time to read the prompts is in these figures.\n")


def bench_digest():
    """Return the sha256 of ``data/bench.json``, which the chart carries as its source."""
    return hashlib.sha256(BENCH.read_bytes()).hexdigest()


def draw_chart(growth):
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
