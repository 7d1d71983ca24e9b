"""A run of the benchmark that meets all targets, for the tests of the targets and of the tables."""

from benchmarks.figures import MODEL, RATIOS
from course.execute import PAGES


def run(date="2026-01-02", cores=2, **ratios):
    """Return a run in which all figures meet their targets and all rates are equal."""
    pages = {f"{page} on {MODEL}": {"seconds": 10.4, "peak_memory_bytes": 1.26e9} for page in PAGES}
    rates = dict.fromkeys(
        ("chat_model", "one_predict", "llama_cpp_8_slots", "lesson_behind_a_lock"), 100.4
    )
    return {
        "machine": {"cores": cores, "processor": "Fast", "system": "Linux", "memory_bytes": 15.7e9},
        "date": date,
        "versions": {"python": "3.11.7"},
        "ratios": {name: ratio.at_least or 0.5 for name, ratio in RATIOS.items()} | ratios,
        "raw": {
            "pages": pages,
            "prepare": {"seconds": 1, "peak_memory_bytes": 1e9},
            "chat": {
                part: {"tokens_per_second": rates} for part in ("single", "rows16", "callers8")
            },
        },
    }
