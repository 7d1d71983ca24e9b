"""Says what the measurements should reach, and puts those of several machines together: runs come in, ranges go out.

A run is what ``make bench`` writes: ``machine``, ``date``, ``versions``, ``ratios`` and, behind
them, ``raw`` figures. Nothing in it is rounded: whoever shows a figure rounds it. A run that is
kept although it misses something says why, in ``missed``: the name of each figure with a sentence.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from course.execute import PAGES
from helpers.paths import DATA

BENCH = DATA / "bench.json"
KEPT = 5  # runs of each machine in data/bench.json
# What each ratio should reach.
REACH = {
    "single_overhead": {
        "at_least": 1.0,
        "what": "one conversation through `predict`",
        "against": "a bare engine loop",
    },
    "rows16": {
        "at_least": 1.8,
        "what": "16 rows in one `predict`",
        "against": "16 times `predict`",
    },
    "callers8": {
        "at_least": 1.5,
        "what": "8 threads, 32 requests of mixed length",
        "against": "the lesson's wrapper behind a lock",
    },
    "callers8_llamacpp": {
        "at_least": 1.25,
        "what": "the same load",
        "against": "llama.cpp with 8 slots",
    },
    "single_llamacpp": {"at_least": 0.95, "what": "one stream", "against": "llama.cpp, one stream"},
    "single_openvino": {
        "at_least": 1.2,
        "what": "one stream",
        "against": "OpenVINO GenAI, one stream",
    },
    "callers8_openvino": {
        "at_least": 0.8,
        "what": "the load of 8 callers",
        "against": "OpenVINO GenAI",
    },
    "rows16_openvino": {"at_least": 0.8, "what": "the 16 rows", "against": "OpenVINO GenAI"},
    "json_rate": {
        "at_least": 0.8,
        "what": "tokens per second of an answer bound to a JSON schema",
        "against": "a free answer of as many tokens",
    },
    "turn5_llamacpp": {
        "under": 0.6,
        "what": "seconds to the first token of a conversation's 5th turn",
        "against": "llama.cpp with its prompt cache",
    },
    "newcomer_ttft": {
        "under": 1.0,
        "what": "seconds to a stream's first token beside 7 running answers, 95th percentile",
        "against": "three steps of these answers, and reading its prompt alone",
    },
    "track_ratio": {"at_least": 4.0, "what": "track B's tokens per second", "against": "track A's"},
    "memory": {
        "under": 1.6,
        "what": "peak memory of a process that loads it, less 200 MB",
        "against": "the size of the model's folder",
    },
    "log_disk": {
        "under": 1.05,
        "what": "bytes that logging adds",
        "against": "the size of the model's folder",
    },
    "service8_llamacpp": {
        "at_least": 1.15,
        "what": "8 HTTP clients, answers of mixed length, half of them streamed",
        "against": "llama.cpp's server",
    },
    "service32_llamacpp": {
        "at_least": 1.15,
        "what": "32 such clients",
        "against": "llama.cpp's server with 8 or 32 slots, whichever is faster",
    },
    "service8_mlflow": {
        "at_least": 1.5,
        "what": "the 8 clients",
        "against": "`mlflow models serve` with the lesson's wrapper",
    },
    "service32_mlflow": {"at_least": 1.5, "what": "the 32 clients", "against": "the same"},
    "service_ttft95_llamacpp": {
        "under": 0.7,
        "what": "seconds to the first token of 8 clients' streams, 95th percentile",
        "against": "llama.cpp's server",
    },
    "soak_memory": {
        "under": 1.05,
        "what": "the server's memory after 10,000 requests",
        "against": "after the first 1,000",
    },
    "spark_two_workers": {"what": "rows per second on two workers", "against": "on one worker"},
    "spark_predict": {
        "what": "the same on two workers",
        "against": "one `predict` in one process on all cores",
    },
}
# These stand on the service's page.
SERVICE = [name for name in REACH if name.startswith(("service", "soak"))]
BATCH = [name for name in REACH if name.startswith("spark")]  # and these on the batch's
CONTENDERS = {
    "chat_model": "the chat model, int8",
    "llama_cpp": "llama.cpp, Q4_1",
    "openvino": "OpenVINO GenAI, Q4_1",
}
FIDELITY = ("chat", "fidelity")
# The instructions of a processor that multiply whole numbers of 8 bits, as Linux names them.
INT8 = ("amx_int8", "avx512_vnni", "avx_vnni_int8", "avx_vnni", "i8mm", "asimddp")
UNITS = {"ms": 1e-3, "s": 1, "min": 60, "GB": 1e9, "": 1}


@dataclass(frozen=True)
class Figure:
    """A row of the README's table of figures: where a run's ``raw`` has it, and what it should stay under."""

    what: str
    path: tuple[str, ...]
    unit: str = ""
    digits: int = 0
    # Such as {"under": 60}, in seconds or bytes, on 2 cores.
    budget: dict = field(default_factory=dict)

    def find(self, run: dict) -> float | None:
        """Return a run's figure; None where it has none."""
        found = run["raw"]
        for step in self.path:
            found = found.get(step) if found else None
        return found


def _page_figures(page, model, seconds):
    ran = ("pages", f"{page} on {model}")
    return (
        Figure(f"`{page}` on `{model}`, Run All", (*ran, "seconds"), "s", 0, {"under": seconds}),
        Figure("its peak memory", (*ran, "peak_memory_bytes"), "GB", 1, {"under": 4e9}),
    )


def _track_figures(page):
    return (
        Figure(
            f"`{page}`: seconds to the first token", ("tracks", page, "first_token_seconds"), "s", 2
        ),
        Figure("then tokens per second", ("tracks", page, "tokens_per_second")),
        Figure("a logged copy of it, on disk", ("tracks", page, "disk_bytes"), "GB", 2),
    )


def _fidelity_figures(name, title):
    return (
        Figure(
            f"{title}: tokens of these before the first that differs, a mean",
            (*FIDELITY, name, "equal_tokens"),
            "",
            1,
        ),
        Figure(
            "the share of next tokens that agree", (*FIDELITY, name, "next_token_agreement"), "", 3
        ),
    )


FIGURES = (
    *(
        figure
        for model, seconds in (("tiny-phi3", 30), ("smollm2-135m", 180))
        for page in PAGES
        for figure in _page_figures(page, model, seconds)
    ),
    Figure(
        "`smollm2-135m` fetched, converted and exported: peak memory",
        ("prepare", "peak_memory_bytes"),
        "GB",
        1,
        {"under": 2.5e9},
    ),
    Figure("the same, found in the cache", ("prepare", "warm_seconds"), "s", 3, {"under": 0.5}),
    Figure(
        "`make test` from a bare checkout, set-up and models in it",
        ("test", "seconds"),
        "min",
        1,
        {"under": 900},
    ),
    Figure("`make test` once set up", ("test", "tests_seconds"), "min", 1, {"under": 660}),
    Figure(
        "disk after that: packages, models, what the tests left", ("test", "disk_bytes"), "GB", 1
    ),
    *(figure for page in PAGES for figure in _track_figures(page)),
    Figure(
        "the server: what it adds to a request, at the median",
        ("chat", "service", "overhead", "added_seconds"),
        "ms",
        1,
        {"under": 0.010},
    ),
    Figure(
        "threads and descriptors that 9,000 requests leave behind in it",
        ("chat", "service", "soak", "left_behind"),
        "",
        0,
        {"under": 1},
    ),
    *(
        Figure(
            f"{title}: seconds to the first token of a conversation's 5th turn",
            ("chat", "conversation", name, "5", "first_token_seconds"),
            "s",
            2,
        )
        for name, title in (
            ("chat_model", "the chat model"),
            ("llama_cpp", "llama.cpp with its prompt cache"),
        )
    ),
    Figure(
        "tokens of a greedy answer by transformers in fp32, a mean",
        (*FIDELITY, "reference_tokens"),
        "",
        1,
    ),
    *(figure for name, title in CONTENDERS.items() for figure in _fidelity_figures(name, title)),
)


def reaches(value: float, reach: dict) -> bool:
    """Tell whether a figure is ``at_least`` what it should be, or ``under`` it; without either, it always is."""
    return value >= reach.get("at_least", value) and (
        "under" not in reach or value < reach["under"]
    )


def misses(run: dict) -> list[str]:
    """Return the names of a run's figures that miss their reach or their budget."""
    measured = [(name, run["ratios"].get(name), reach) for name, reach in REACH.items()]
    measured += [(": ".join(figure.path), figure.find(run), figure.budget) for figure in FIGURES]
    return [
        name for name, value, reach in measured if value is not None and not reaches(value, reach)
    ]


def read_runs(path: Path = BENCH) -> list[dict]:
    """Return the runs that are kept, oldest first."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def write_runs(runs: list[dict], path: Path = BENCH) -> None:
    """Write the runs that are kept."""
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")


def machine_name(run: dict) -> str:
    """Return what the system says of a run's machine, such as ``"2 cores (AMD EPYC, Linux, 25 GB)"``."""
    machine = run["machine"]
    return (
        f"{machine['cores']} cores ({machine['processor']}, {machine['system']}, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB)"
    )


def int8_instructions(cpuinfo: str) -> list[str]:
    """Return the instructions for whole numbers of 8 bits that ``/proc/cpuinfo`` tells of, such as ``["asimddp"]``."""
    told = {
        name
        for line in cpuinfo.splitlines()
        if line.startswith(("flags", "Features"))
        for name in line.partition(":")[2].split()
    }
    return [name for name in INT8 if name in told]


def keep_run(runs: list[dict], run: dict) -> list[dict]:
    """Return the runs with one more, last; the oldest ones of its machine make way for it, those of others stay."""
    if run["raw"] in [one["raw"] for one in runs]:
        return runs
    same = [one for one in runs if machine_name(one) == machine_name(run)]
    gone = same[: max(len(same) + 1 - KEPT, 0)]
    return [*(one for one in runs if one not in gone), run]


def show_range(values: Iterable[float], digits: int = 2) -> str:
    """Return the smallest and the largest of some figures, such as ``"5.67 to 9.09"``; one where they look alike."""
    values = list(values)
    least, most = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
    return least if least == most else f"{least} to {most}"
