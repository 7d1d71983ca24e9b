"""Measures the course and writes ``build/bench/bench.json``.

``python -m helpers generate`` makes the README's table from ``data/bench.json``, a committed copy.
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

from course.bench.chat import REACH, bench_chat
from helpers.errors import CourseError
from course.execute import PAGES
from helpers.measurement import folder_bytes
from helpers.paths import BUILD, ROOT

# In seconds and bytes, on 2 cores.
BUDGETS = {
    "tiny-phi3": {"seconds": 60, "peak_memory_bytes": 4e9},
    "smollm2-135m": {"seconds": 300, "peak_memory_bytes": 4e9},
    "prepare": {"warm_seconds": 0.5, "peak_memory_bytes": 2.5e9},
    "test": {"seconds": 1200},
}


def bench():
    """Run the tests on a bare clone, a model's set-up, both notebooks on both models, the chat model's comparisons."""
    folder = BUILD / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    store = "sqlite:///" + (folder / "mlflow.db").as_posix()
    test = _bench_test(folder)  # first: what fails a test need not be measured
    prepare = _bench_prepare(folder)
    notebooks, tracks = [], {}
    for model in ("tiny-phi3", "smollm2-135m"):
        for track in TRACKS:
            command = [sys.executable, "-m", "helpers", "notebook", track, "-p", "model", model,
                       "-p", "tracking_uri", store, "--output", str(folder)]
            seconds, peak = _run(command, ROOT, folder / f"{track}-{model}.log")
            notebooks.append({"notebook": track, "model": model, "seconds": round(seconds, 1),
                              "peak_memory_bytes": peak})
            print(f"{track} on {model}: {seconds:.0f} s, {peak / 1e9:.1f} GB", flush=True)
            tracks[track] = latest_run(track, store).data.metrics
    ratios, chat = bench_chat(store)
    ratios["track_ratio"] = round(tracks["CustomPythonWrapper"]["tokens_per_second"]
                                  / tracks["TransformerPipeline"]["tokens_per_second"], 2)
    figures = {
        "ratios": {name: ratios[name] for name in REACH},
        "raw": {"notebooks": notebooks, "tracks": tracks, "chat": chat, "test": test, "prepare": prepare,
                "budgets": BUDGETS, "reach": REACH},
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "system": platform.system(),
                    "memory_bytes": psutil.virtual_memory().total},
        "versions": {"python": platform.python_version()} | {
            name: importlib.metadata.version(name)
            for name in ("mlflow", "onnxruntime-genai", "torch", "transformers", "xllamacpp")},
        "date": datetime.date.today().isoformat(),
    }
    target = folder / "bench.json"
    target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {target}. Copy it to data/bench.json and run `python -m helpers generate` for the README.")
    return 0


def _bench_test(folder):
    """Time the README's test command on a clone of what is committed, with nothing set up in it."""
    with tempfile.TemporaryDirectory(prefix="bench ") as parent:
        clone = Path(parent) / "course"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COURSE_")}
        python = getattr(sys, "_base_executable", sys.executable)  # the one that made this environment
        seconds, _ = _run([python, "-m", "helpers", "test"], clone, folder / "test.log", environment)
        disk_bytes = folder_bytes(clone)
    print(f"the tests on a bare clone: {seconds / 60:.1f} min, {disk_bytes / 1e9:.1f} GB", flush=True)
    return {"seconds": round(seconds, 1), "disk_bytes": disk_bytes}


def _bench_prepare(folder):
    """Time the default model's way into an empty cache, and the call that finds it there."""
    with tempfile.TemporaryDirectory(prefix="bench ") as cache:
        environment = dict(os.environ, COURSE_CACHE=cache)
        seconds, peak = _run([sys.executable, "-m", "helpers", "prepare", "--model", "smollm2-135m"], ROOT,
                             folder / "prepare.log", environment)
        code = ("import time; from helpers import prepare_model; started = time.perf_counter(); "
                "prepare_model('smollm2-135m'); print(time.perf_counter() - started)")
        warm = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True,
                              capture_output=True, text=True).stdout
    figures = {"seconds": round(seconds, 1), "peak_memory_bytes": peak, "warm_seconds": round(float(warm), 4)}
    print(f"smollm2-135m: {seconds:.0f} s, {peak / 1e9:.2f} GB; found again in {float(warm):.3f} s", flush=True)
    return figures


def _run(command, folder, log, environment=None):
    """Run a program; return its seconds and the peak memory, in bytes, of it and its children together."""
    started, peak = time.perf_counter(), 0
    with log.open("w", encoding="utf-8") as output:
        process = psutil.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            peak = max(peak, _memory(process))
            time.sleep(0.2)
    if process.returncode:
        raise CourseError(f"{' '.join(command[2:5])} ended with {process.returncode}.", f"Read {log}.")
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
