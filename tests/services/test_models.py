"""A model is prepared by the program that a user starts: interrupted, on a full disk, and in a cache that is read-only.

Run: python -m helpers test tests/services/test_models.py
"""

import sys

import pytest
from support import interrupt

from helpers.models.prepare import cache_state

COMMAND = [sys.executable, "-m", "helpers", "prepare", "--model", "tiny-phi3"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_ends_a_step_and_says_what_stays(cache):
    interrupt(COMMAND, lambda: bool(list(cache.glob("tiny-phi3/transformers.*.partial"))))
    assert cache_state("tiny-phi3") == "not prepared"
    assert not list(cache.rglob("*.receipt.json"))


def test_a_full_disk_is_an_error_that_says_how_much_is_needed(mounted):
    result = mounted("size=200k", COMMAND)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "The disk is too full: Tiny random Phi-3 takes 2 MB" in result.stderr
    assert "COURSE_CACHE" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(mounted):
    result = mounted("size=1m,ro", COMMAND)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "cannot be written. " in result.stderr.replace("\n      ", "")
    assert "COURSE_CACHE" in result.stderr


def test_a_read_only_cache_that_holds_the_model_is_good_enough(mounted, tiny):
    result = mounted("size=9m", COMMAND, fill=tiny.onnx_dir.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "is ready" in result.stdout
