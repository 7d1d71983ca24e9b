"""Measures the course and writes ``build/bench/bench.json``: the tests, a model's set-up, both pages, the chat model.

``--keep`` puts that run into ``data/bench.json``, of which ``python -m helpers generate`` makes the
README's tables.
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
from benchmarks.figures import BENCH, REACH, keep_run, machine_name, misses, read_runs, write_runs
from course.environment import pins
from course.execute import PAGES
from helpers.errors import CourseError
from helpers.files import folder_bytes
from helpers.paths import BUILD, ROOT

# In a process of its own, so that its time and its memory are the page's: it writes what the page's
# run measured.
_PAGE = """
import json, sys
from pathlib import Path
from course.execute import execute
page, model, store, folder = sys.argv[1:]
run = execute(page, {"model": model, "tracking_uri": store}, Path(folder)).run
Path(folder, f"{page}.json").write_text(json.dumps(run.data.metrics), encoding="utf-8")
"""


def bench(keep: bool, folder: Path = BUILD / "bench", kept: Path = BENCH) -> int:
    """Measure all and write the run to ``folder``; or, to keep, put the run that stands there into ``kept``."""
    target = folder / "bench.json"
    if not keep:
        folder.mkdir(parents=True, exist_ok=True)
        write_runs([_measure(folder)], target)
    elif not target.exists():
        raise CourseError(
            "bench-missing", "There is no measurement to keep.", "Measure first: make bench."
        )
    (run,) = read_runs(target)
    for name in misses(run):
        print(
            f"misses what it should reach: {name}. Whoever keeps the run says why, in its `missed`."
        )
    if keep:
        write_runs(keep_run(read_runs(kept), run), kept)
        print(
            f"Kept in {kept}: {run['date']}, {machine_name(run)}. For the README: python -m helpers generate"
        )
    else:
        print(f"Written: {target}. To keep it for the README: python -m helpers bench --keep")
    return 0


def _measure(folder):
    store = "sqlite:///" + (folder / "mlflow.db").as_posix()
    test = _bench_test(folder)  # first: what fails a test need not be measured
    prepare = bench_prepare(folder)
    pages, tracks = {}, {}
    for model in ("tiny-phi3", "smollm2-135m"):
        for page in PAGES:
            pages[f"{page} on {model}"], tracks[page] = bench_page(page, model, store, folder)
    ratios, chat = bench_chat(store)
    pinned = pins(("bench",))
    speeds = {page: track["tokens_per_second"] for page, track in tracks.items()}
    ratios["track_ratio"] = speeds["CustomPythonWrapper"] / speeds["TransformerPipeline"]
    return {
        "machine": {
            "cores": os.cpu_count(),
            "processor": _processor(),
            "system": platform.system(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()}
        | {
            name: pinned[name]
            for name in (
                "mlflow",
                "onnxruntime-genai",
                "openvino-genai",
                "torch",
                "transformers",
                "xllamacpp",
            )
        },
        "ratios": {name: ratios[name] for name in REACH},
        "raw": {"pages": pages, "tracks": tracks, "chat": chat, "test": test, "prepare": prepare},
    }


def bench_page(page: str, model: str, store: str, folder: Path) -> tuple[dict, dict]:
    """Run a page; return its seconds and peak memory, and the metrics of the MLflow run that it made."""
    seconds, peak = run_measured(
        [sys.executable, "-c", _PAGE, page, model, store, str(folder)],
        ROOT,
        folder / f"{page}-{model}.log",
    )
    print(f"{page} on {model}: {seconds:.0f} s, {peak / 1e9:.1f} GB", flush=True)
    metrics = json.loads((folder / f"{page}.json").read_text(encoding="utf-8"))
    return {"seconds": seconds, "peak_memory_bytes": peak}, metrics


def _bench_test(folder):
    """Time the README's test command on a clone of what is committed, with nothing set up in it."""
    with tempfile.TemporaryDirectory(prefix="bench ") as parent:
        clone = Path(parent) / "course"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("COURSE_")
        }
        # The one that made this environment.
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


def bench_prepare(folder: Path, model: str = "smollm2-135m") -> dict:
    """Time a model's way into an empty cache, and the call that finds it there."""
    with tempfile.TemporaryDirectory(prefix="bench ") as cache:
        environment = dict(os.environ, COURSE_CACHE=cache)
        seconds, peak = run_measured(
            [sys.executable, "-m", "helpers", "prepare", "--model", model],
            ROOT,
            folder / "prepare.log",
            environment,
        )
        code = (
            "import time; from helpers import prepare_model; started = time.perf_counter(); "
            f"prepare_model({model!r}); print(time.perf_counter() - started)"
        )
        warm = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    figures = {"seconds": seconds, "peak_memory_bytes": peak, "warm_seconds": float(warm)}
    print(
        f"{model}: {seconds:.0f} s, {peak / 1e9:.2f} GB; found again in {float(warm):.3f} s",
        flush=True,
    )
    return figures


def run_measured(
    command: list, folder: Path, log: Path, environment: dict | None = None
) -> tuple[float, int]:
    """Run a program; return its seconds and the peak memory, in bytes, of it and its children together."""
    started, peak = time.perf_counter(), 0
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
    """Return the bytes that a process and its descendants hold right now."""
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # it ended between two looks
    return total


def _processor():
    """Return the processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
