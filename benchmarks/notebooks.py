"""Measures the tests, a model's preparation, the pages and the chat model: ``python -m helpers bench``.

A run is written to ``build/bench/bench.json``. ``--keep`` adds it to ``data/bench.json``, from which
``python -m helpers generate`` makes the tables of the documents.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.chat import bench_chat
from benchmarks.figures import (
    BENCH,
    MODEL,
    RATIOS,
    find_misses,
    keep_run,
    machine_name,
    read_runs,
    write_runs,
)
from course.environment import pins
from course.execute import PAGES
from helpers.errors import CourseError
from helpers.files import folder_bytes
from helpers.paths import BUILD, ROOT

CONTENDERS = ("mlflow", "onnxruntime-genai", "openvino-genai", "torch", "transformers", "xllamacpp")
# A page runs in a process of its own, whose time and memory are the page's. It writes the metrics
# that the page has logged.
_PAGE = """
import json, sys
from pathlib import Path
from course.execute import execute
page, model, store, folder = sys.argv[1:]
run = execute(page, {"model": model, "tracking_uri": store}, Path(folder)).run
Path(folder, f"{page}.json").write_text(json.dumps(run.data.metrics), encoding="utf-8")
"""


def bench(keep: bool, folder: Path = BUILD / "bench", kept: Path = BENCH) -> int:
    """Measure a run and write it to ``folder``; if ``keep`` is set, add the last run to ``kept`` instead.

    Prints the targets that the run misses. Returns the exit code.
    """
    target = folder / "bench.json"
    if not keep:
        folder.mkdir(parents=True, exist_ok=True)
        write_runs([_measure(folder)], target)
    elif not target.exists():
        raise CourseError(
            "bench-missing", "There is no measurement to keep.", "Measure first: make bench."
        )
    (run,) = read_runs(target)
    for name in find_misses(run):
        print(f"misses its target: {name}. If you keep the run, give the reason under `missed`.")
    if keep:
        write_runs(keep_run(read_runs(kept), run), kept)
        print(
            f"Kept in {kept}: {run['date']}, {machine_name(run)}. "
            "For the tables: python -m helpers generate"
        )
    else:
        print(f"Written: {target}. To keep it for the tables: python -m helpers bench --keep")
    return 0


def _measure(folder):
    store = "sqlite:///" + (folder / "mlflow.db").as_posix()
    test = _bench_test(folder)  # first: a checkout that fails its tests is not measured
    prepare = bench_prepare(folder)
    pages = {}
    tracks = {}
    for page in PAGES:
        pages[f"{page} on {MODEL}"], tracks[page] = bench_page(page, MODEL, store, folder)
    ratios, chat = bench_chat(store)
    speeds = {page: track["tokens_per_second"] for page, track in tracks.items()}
    ratios["track_ratio"] = speeds["CustomPythonWrapper"] / speeds["TransformerPipeline"]
    pinned = pins(("bench",))
    versions = {name: pinned[name] for name in CONTENDERS}
    return {
        "machine": {
            "cores": os.cpu_count(),
            "processor": _processor(),
            "system": platform.system(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()} | versions,
        "ratios": {name: ratios[name] for name in RATIOS},
        "raw": {"pages": pages, "tracks": tracks, "chat": chat, "test": test, "prepare": prepare},
    }


def bench_page(page: str, model: str, store: str, folder: Path) -> tuple[dict, dict]:
    """Run a page. Return its seconds and peak memory, and the metrics of its MLflow run."""
    seconds, peak = run_measured(
        [sys.executable, "-c", _PAGE, page, model, store, str(folder)],
        ROOT,
        folder / f"{page}-{model}.log",
    )
    print(f"{page} on {model}: {seconds:.0f} s, {peak / 1e9:.1f} GB", flush=True)
    metrics = json.loads((folder / f"{page}.json").read_text(encoding="utf-8"))
    return {"seconds": seconds, "peak_memory_bytes": peak}, metrics


def _bench_test(folder):
    """Time ``make test`` in a clone of the last commit, before and after set-up."""
    with tempfile.TemporaryDirectory(prefix="bench ") as parent:
        clone = Path(parent) / "course"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("COURSE_")
        }
        # The Python that made this environment.
        python = getattr(sys, "_base_executable", sys.executable)
        command = [python, "-m", "helpers", "test"]
        setup, _ = run_measured(
            [*command, "--collect-only"], clone, folder / "setup.log", environment
        )
        tests, _ = run_measured(command, clone, folder / "test.log", environment)
        disk_bytes = folder_bytes(clone)
    print(
        f"the tests: {tests / 60:.1f} min, and set-up {setup / 60:.1f}; {disk_bytes / 1e9:.1f} GB",
        flush=True,
    )
    return {"seconds": setup + tests, "tests_seconds": tests, "disk_bytes": disk_bytes}


def bench_prepare(folder: Path, model: str = MODEL) -> dict:
    """Measure how long and how much memory a model's preparation takes, with an empty cache."""
    with tempfile.TemporaryDirectory(prefix="bench ") as cache:
        seconds, peak = run_measured(
            [sys.executable, "-m", "helpers", "prepare", "--model", model],
            ROOT,
            folder / "prepare.log",
            dict(os.environ, COURSE_CACHE=cache),
        )
    print(f"{model} prepared: {seconds:.0f} s, {peak / 1e9:.2f} GB", flush=True)
    return {"seconds": seconds, "peak_memory_bytes": peak}


def run_measured(
    command: list, folder: Path, log: Path, environment: dict | None = None
) -> tuple[float, int]:
    """Run a program. Return its seconds and the peak memory, in bytes, of it with its children."""
    started = time.perf_counter()
    peak = 0
    with log.open("w", encoding="utf-8") as output:
        process = psutil.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        while process.poll() is None:
            peak = max(peak, _memory(process))
            time.sleep(0.2)
    if process.returncode:
        raise CourseError(
            "bench-failed", f"{log.stem} ended with {process.returncode}.", f"Read {log}."
        )
    return time.perf_counter() - started, peak


def _memory(process):
    """Return the resident memory, in bytes, of a process and its descendants."""
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # one of them has just ended
    return total


def _processor():
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
