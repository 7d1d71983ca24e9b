"""Measures the course and writes ``build/bench/bench.json``: the tests, a model's set-up, both pages, the chat model.

``--keep`` adds the run to ``data/bench.json``, of which ``python -m helpers generate`` makes the README's tables.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from course.bench.chat import bench_chat
from course.bench.figures import keep_run, misses, read_runs, write_runs
from course.execute import PAGES
from helpers.errors import CourseError
from helpers.measurement import folder_bytes
from helpers.paths import BUILD, ROOT

# In a process of its own, so that its time and its memory are the page's: it prints what the page's run measured.
_PAGE = """
import json, sys
from pathlib import Path
from course.execute import execute
page, model, store, folder = sys.argv[1:]
run = execute(page, {"model": model, "tracking_uri": store}, Path(folder)).run
print(json.dumps(run.data.metrics))
"""


def bench(keep: bool) -> int:
    """Measure all, print what misses its reach, and write the run; with ``keep``, beside those of other machines."""
    folder = BUILD / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    store = "sqlite:///" + (folder / "mlflow.db").as_posix()
    test = _bench_test(folder)  # first: what fails a test need not be measured
    prepare = _bench_prepare(folder)
    notebooks, tracks = [], {}
    for model in ("tiny-phi3", "smollm2-135m"):
        for page in PAGES:
            log = folder / f"{page}-{model}.log"
            seconds, peak = run_measured([sys.executable, "-c", _PAGE, page, model, store, str(folder)], ROOT, log)
            notebooks.append({"notebook": page, "model": model, "seconds": seconds, "peak_memory_bytes": peak})
            print(f"{page} on {model}: {seconds:.0f} s, {peak / 1e9:.1f} GB", flush=True)
            tracks[page] = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    ratios, chat = bench_chat(store)
    ratios["track_ratio"] = tracks[PAGES[1]]["tokens_per_second"] / tracks[PAGES[0]]["tokens_per_second"]
    run = {
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "system": platform.system(),
                    "memory_bytes": psutil.virtual_memory().total},
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {
            name: importlib.metadata.version(name)
            for name in ("mlflow", "onnxruntime-genai", "torch", "transformers", "xllamacpp")},
        "ratios": ratios,
        "raw": {"notebooks": notebooks, "tracks": tracks, "chat": chat, "test": test, "prepare": prepare},
    }
    target = folder / "bench.json"
    write_runs([run], target)
    for name in misses(run):
        print(f"misses what it should reach: {name}")
    if keep:
        write_runs(keep_run(read_runs(), run))
    print(f"Written: {target}" + (", and kept in data/bench.json. For the README: python -m helpers generate" if keep
                                  else ". To keep it for the README: python -m helpers bench --keep"))
    return 0


def _bench_test(folder):
    """Time the README's test command on a clone of what is committed, with nothing set up in it."""
    with tempfile.TemporaryDirectory(prefix="bench ") as parent:
        clone = Path(parent) / "course"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COURSE_")}
        python = getattr(sys, "_base_executable", sys.executable)  # the one that made this environment
        command = [python, "-m", "helpers", "test"]
        setup, _ = run_measured([*command, "--collect-only"], clone, folder / "setup.log", environment)
        tests, _ = run_measured(command, clone, folder / "test.log", environment)
        disk_bytes = folder_bytes(clone)
    print(f"the tests: {tests / 60:.1f} min, and set-up {setup / 60:.1f}; {disk_bytes / 1e9:.1f} GB", flush=True)
    return {"seconds": setup + tests, "tests_seconds": tests, "disk_bytes": disk_bytes}


def _bench_prepare(folder):
    """Time the default model's way into an empty cache, and the call that finds it there."""
    with tempfile.TemporaryDirectory(prefix="bench ") as cache:
        environment = dict(os.environ, COURSE_CACHE=cache)
        seconds, peak = run_measured([sys.executable, "-m", "helpers", "prepare", "--model", "smollm2-135m"], ROOT,
                                     folder / "prepare.log", environment)
        code = ("import time; from helpers import prepare_model; started = time.perf_counter(); "
                "prepare_model('smollm2-135m'); print(time.perf_counter() - started)")
        warm = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True,
                              capture_output=True, text=True).stdout
    figures = {"seconds": seconds, "peak_memory_bytes": peak, "warm_seconds": float(warm)}
    print(f"smollm2-135m: {seconds:.0f} s, {peak / 1e9:.2f} GB; found again in {float(warm):.3f} s", flush=True)
    return figures


def run_measured(command: list, folder: Path, log: Path, environment: dict | None = None) -> tuple[float, int]:
    """Run a program; return its seconds and the peak memory, in bytes, of it and its children together."""
    started, peak = time.perf_counter(), 0
    with log.open("w", encoding="utf-8") as output:
        process = psutil.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            peak = max(peak, _memory(process))
            time.sleep(0.2)
    if process.returncode:
        raise CourseError("bench-failed", f"{log.stem} ended with {process.returncode}.", f"Read {log}.")
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
