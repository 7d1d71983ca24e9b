"""Writes the files that are made from others: environment.yml, constraints.txt, the README's tables."""

import json
import re
import subprocess
import sys
import tomllib

from helpers.catalogue import read_catalogue
from helpers.paths import DATA, ROOT
from helpers.setup import TORCH_CPU_INDEX

BENCH = DATA / "bench.json"
TABLE = re.compile(r"(<!-- (figures|models) -->\n)(.*?)(<!-- /\2 -->)", re.DOTALL)
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
    tables = {"figures": figures_table(json.loads(BENCH.read_text(encoding="utf-8"))), "models": models_table()}
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
        What ``helpers.bench`` writes.
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
    test = raw["test"]
    lines.append(f"| `make test` from a bare checkout, set-up and models in it | {test['seconds'] / 60:.0f} min "
                 f"| {raw['budgets']['test']['seconds'] // 60} min |")
    lines.append(f"| disk after that: packages, models, what the tests left | {test['disk_bytes'] / 1e9:.1f} GB | |")
    for name, track in raw["tracks"].items():
        lines += [
            f"| `{name}`: first token, then | {track['first_token_seconds']:.2f} s, "
            f"{track['tokens_per_second']:.0f} tokens per second | |",
            f"| its logged model, on disk, for each run | {track['disk_bytes'] / 1e9:.2f} GB | |",
        ]
    lines.append(f"| track B's tokens per second over track A's | {figures['ratios']['track_ratio']:.1f} | |")
    return "\n".join(lines) + (
        f"\n\nMeasured by `make bench` on {machine['cores']} cores ({machine['processor']}, {machine['system']}), "
        f"Python {figures['versions']['python']}, {figures['date']}.\n")
