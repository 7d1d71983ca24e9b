"""Names what the benchmark measures and its targets, and keeps the runs of several machines.

A run is what ``make bench`` writes: ``machine``, ``date``, ``versions``, ``ratios`` and ``raw``, the
figures behind the ratios. A run is not rounded: whoever shows a figure rounds it. A run that is kept
although it misses a target gives the reasons in ``missed``, a sentence for each name.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from course.execute import PAGES
from helpers.paths import DATA

BENCH = DATA / "bench.json"
KEPT_RUNS = 5  # of each machine, in data/bench.json
MODEL = "smollm2-135m"
UNITS = {"ms": 1e-3, "s": 1, "min": 60, "GB": 1e9, "": 1}


@dataclass(frozen=True)
class Ratio:
    """A comparison of two figures of one run, and its target.

    Attributes
    ----------
    what, against : str
        The two things that are compared.
    at_least, under : float, optional
        The target.
    """

    what: str
    against: str
    at_least: float | None = None
    under: float | None = None


CHAT_RATIOS = {
    "single_overhead": Ratio(
        "tokens per second, one caller of `predict`", "a bare `og.Generator` loop", at_least=1.0
    ),
    "single_llamacpp": Ratio("tokens per second, one stream", "llama.cpp", at_least=0.95),
    "single_openvino": Ratio("tokens per second, one stream", "OpenVINO GenAI", at_least=1.2),
    "rows16": Ratio("tokens per second, 16 rows in one `predict`", "16 calls", at_least=1.8),
    "rows16_openvino": Ratio(
        "tokens per second, 16 rows in one `predict`", "OpenVINO GenAI", at_least=0.8
    ),
    "callers8": Ratio(
        "tokens per second, 8 callers", "track B's wrapper, one caller at a time", at_least=1.5
    ),
    "callers8_llamacpp": Ratio(
        "tokens per second, 8 callers", "llama.cpp with 8 slots", at_least=1.25
    ),
    "callers8_openvino": Ratio("tokens per second, 8 callers", "OpenVINO GenAI", at_least=0.8),
    "turn5_llamacpp": Ratio(
        "seconds to the first token of a conversation's fifth answer",
        "llama.cpp with its prompt cache",
        under=0.6,
    ),
    "track_ratio": Ratio("tokens per second, track B", "track A", at_least=4.0),
}
SERVICE_RATIOS = {
    "service8_llamacpp": Ratio(
        "tokens per second, 8 clients, half of them streaming",
        "llama.cpp's server",
        at_least=1.15,
    ),
    "service32_llamacpp": Ratio(
        "tokens per second, 32 clients, half of them streaming",
        "llama.cpp's server with 8 or 32 slots, whichever is faster",
        at_least=1.15,
    ),
    "service8_mlflow": Ratio(
        "tokens per second, 8 clients",
        "`mlflow models serve` with track B's wrapper",
        at_least=1.5,
    ),
    "service32_mlflow": Ratio(
        "tokens per second, 32 clients",
        "`mlflow models serve` with track B's wrapper",
        at_least=1.5,
    ),
}
BATCH_RATIOS = {
    "spark_two_workers": Ratio("rows per second, two workers", "one worker"),
    "spark_predict": Ratio(
        "rows per second, two workers", "one `predict` in one process on all cores"
    ),
}
RATIOS = CHAT_RATIOS | SERVICE_RATIOS | BATCH_RATIOS


@dataclass(frozen=True)
class Figure:
    """A measured figure, and its target.

    Attributes
    ----------
    what : str
        Its name in a table.
    path : tuple of str
        The keys that lead to it in a run's ``raw``.
    unit : str
        One of ``UNITS``.
    digits : int
        Decimal places that a table shows.
    under : float, optional
        The target on 2 cores, in seconds or bytes.
    """

    what: str
    path: tuple[str, ...]
    unit: str = ""
    digits: int = 0
    under: float | None = None


def _page_figures(page):
    ran = ("pages", f"{page} on {MODEL}")
    measured = ("tracks", page)
    return (
        Figure(f"`{page}`: time of Run All", (*ran, "seconds"), "s", 0, 180),
        Figure(f"`{page}`: peak memory of Run All", (*ran, "peak_memory_bytes"), "GB", 1, 4e9),
        Figure(f"`{page}`: time to the first token", (*measured, "first_token_seconds"), "s", 2),
        Figure(f"`{page}`: then tokens per second", (*measured, "tokens_per_second")),
        Figure(f"`{page}`: the logged model on disk", (*measured, "disk_bytes"), "GB", 2),
    )


SET_UP_FIGURES = (
    Figure("time to prepare the model", ("prepare", "seconds"), "s"),
    Figure(
        "peak memory while preparing the model", ("prepare", "peak_memory_bytes"), "GB", 1, 2.5e9
    ),
    Figure("`make test` from a bare checkout", ("test", "seconds"), "min", 1, 900),
    Figure("`make test` after set-up", ("test", "tests_seconds"), "min", 1, 660),
    Figure("disk after `make test`, packages and models included", ("test", "disk_bytes"), "GB", 1),
)
FIGURES = (
    *SET_UP_FIGURES,
    *(figure for page in PAGES for figure in _page_figures(page)),
    Figure(
        "the chat model with 8 callers: peak memory",
        ("chat", "memory", "callers8_bytes"),
        "GB",
        2,
        0.62e9,
    ),
    Figure(
        "the service: time that it adds to a request, median",
        ("chat", "service", "overhead", "added_seconds"),
        "ms",
        1,
        0.010,
    ),
    *(
        Figure(
            f"{contender}: share of next tokens that agree with transformers in fp32",
            ("chat", "fidelity", name, "next_token_agreement"),
            "",
            3,
        )
        for name, contender in (
            ("chat_model", "the chat model, int8"),
            ("llama_cpp", "llama.cpp, Q4_1"),
            ("openvino", "OpenVINO GenAI, Q4_1"),
        )
    ),
)


@dataclass(frozen=True)
class SummaryRow:
    """A row of the README's table: one figure of each page or of its model.

    ``paths`` has, for a page, the keys that lead to its figure in a run. ``unit`` and ``digits`` are
    as in `Figure`.
    """

    what: str
    paths: dict[str, tuple[str, ...]]
    unit: str = ""
    digits: int = 0


def _of_each_page(*path):
    """Return a path for each page, with the page's name in place of ``PAGE``."""
    return {page: tuple(key.replace("PAGE", page) for key in path) for page in PAGES}


def _rates(comparison, **names):
    """Return the paths to tokens per second in a comparison, by page and contender."""
    return {
        page: ("raw", "chat", *comparison, "tokens_per_second", name)
        for page, name in names.items()
    }


SUMMARY = (
    SummaryRow(
        "time of Run All", _of_each_page("raw", "pages", f"PAGE on {MODEL}", "seconds"), "s"
    ),
    SummaryRow(
        "peak memory of Run All",
        _of_each_page("raw", "pages", f"PAGE on {MODEL}", "peak_memory_bytes"),
        "GB",
        1,
    ),
    SummaryRow(
        "the logged model on disk", _of_each_page("raw", "tracks", "PAGE", "disk_bytes"), "GB", 2
    ),
    SummaryRow(
        "time to the first token",
        _of_each_page("raw", "tracks", "PAGE", "first_token_seconds"),
        "s",
        2,
    ),
    SummaryRow(
        "tokens per second, one caller", _of_each_page("raw", "tracks", "PAGE", "tokens_per_second")
    ),
    SummaryRow(
        "tokens per second, 8 callers",
        _rates(("callers8",), CustomPythonWrapper="lesson_behind_a_lock", ChatModel="chat_model"),
    ),
    SummaryRow(
        "tokens per second, 16 rows in one call", _rates(("rows16",), ChatModel="one_predict")
    ),
    SummaryRow(
        "tokens per second, 8 HTTP clients",
        _rates(("service", "crowds", "8"), CustomPythonWrapper="mlflow", ChatModel="openai_server"),
    ),
    SummaryRow(
        "8 callers: times llama.cpp's tokens per second",
        {"ChatModel": ("ratios", "callers8_llamacpp")},
        "",
        2,
    ),
    SummaryRow(
        "8 callers: times OpenVINO GenAI's tokens per second",
        {"ChatModel": ("ratios", "callers8_openvino")},
        "",
        2,
    ),
)


def find(values: dict | None, path: Iterable[str]) -> float | None:
    """Return the figure under these keys, None if the run has not measured it."""
    for key in path:
        values = values.get(key) if values else None
    return values


def meets(value: float, at_least: float | None = None, under: float | None = None) -> bool:
    """Return whether an unrounded figure meets its target; a figure without a target does."""
    return (at_least is None or value >= at_least) and (under is None or value < under)


def find_misses(run: dict) -> list[str]:
    """Return the names of a run's ratios and figures that miss their targets."""
    missed = [
        name
        for name, ratio in RATIOS.items()
        if name in run["ratios"] and not meets(run["ratios"][name], ratio.at_least, ratio.under)
    ]
    for figure in FIGURES:
        value = find(run["raw"], figure.path)
        if value is not None and not meets(value, under=figure.under):
            missed.append(": ".join(figure.path))
    return missed


def read_runs(path: Path = BENCH) -> list[dict]:
    """Return the kept runs, oldest first."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def write_runs(runs: list[dict], path: Path = BENCH) -> None:
    """Write the kept runs."""
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")


def machine_name(run: dict) -> str:
    """Describe a run's machine, such as ``"2 cores (AMD EPYC, Linux, 25 GB)"``."""
    machine = run["machine"]
    return (
        f"{machine['cores']} cores ({machine['processor']}, {machine['system']}, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB)"
    )


def keep_run(runs: list[dict], run: dict) -> list[dict]:
    """Add a run, and drop the oldest runs of its machine beyond ``KEPT_RUNS``."""
    if run["raw"] in [kept["raw"] for kept in runs]:
        return runs
    same_machine = [kept for kept in runs if machine_name(kept) == machine_name(run)]
    dropped = same_machine[: max(len(same_machine) + 1 - KEPT_RUNS, 0)]
    return [*(kept for kept in runs if kept not in dropped), run]


def show_range(values: Iterable[float], digits: int = 2) -> str:
    """Return the range of the values, such as ``"5.67 to 9.09"``; one number if both ends are equal."""
    values = list(values)
    least = f"{min(values):,.{digits}f}"
    most = f"{max(values):,.{digits}f}"
    return least if least == most else f"{least} to {most}"
