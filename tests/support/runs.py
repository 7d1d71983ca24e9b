"""A run of the benchmark, as the tests of the gate and of the tables want it."""

from benchmarks.figures import REACH
from course.execute import PAGES


def run(date="2026-01-02", cores=2, **ratios):
    """Return a run in which each figure is in its budget; the chat model's rates are all of one size."""
    pages = {
        f"{page} on {model}": {"seconds": 10.4, "peak_memory_bytes": 1.26e9}
        for page in PAGES
        for model in ("tiny-phi3", "smollm2-135m")
    }
    rates = dict.fromkeys(
        ("chat_model", "one_predict", "llama_cpp_8_slots", "lesson_behind_a_lock"), 100.4
    )
    return {
        "machine": {"cores": cores, "processor": "Fast", "system": "Linux", "memory_bytes": 15.7e9},
        "date": date,
        "versions": {"python": "3.11.7"},
        "ratios": {name: reach.get("at_least", 0.5) for name, reach in REACH.items()} | ratios,
        "raw": {
            "pages": pages,
            "prepare": {"seconds": 1, "peak_memory_bytes": 1e9, "warm_seconds": 0.0104},
            "chat": {
                part: {"tokens_per_second": rates} for part in ("single", "rows16", "callers8")
            },
        },
    }
