"""Programs that a page starts: real small ones, which end early, hang, leave children behind or take a port.

Run: python -m helpers test tests/services/test_programs.py
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import requests

from helpers.errors import CourseError
from helpers.operations.programs import free_port, start_program
from helpers.paths import ROOT

READY = r"^ready at (\S+)$"
# A parent whose child outlives it, unless somebody ends it; both say their number.
FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
print("ready at http://nowhere:1", flush=True)
time.sleep(600)
"""


def python(code):
    return [sys.executable, "-c", code]


@pytest.fixture
def log(tmp_path, monkeypatch):
    # Which start_program sets for its process: here it is put back.
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # as in a shell that nobody has prepared
    return tmp_path / "logs" / "small.log"


@pytest.fixture
def started():
    """Return start_program; what a test has started ends with it."""
    programs = []

    def start(*arguments, **options):
        programs.append(start_program(*arguments, **options))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


def is_gone(number):
    """Tell whether a process ends within ten seconds. A zombie that nobody has waited for has ended."""
    try:
        psutil.Process(number).wait(timeout=10)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    return True


def children_in(log):
    return [int(number) for number in re.findall(r"child (\d+)", log.read_text(encoding="utf-8"))]


@pytest.fixture
def late(log, monkeypatch):
    """Return a function that lets all time be over once the log holds a text, so that nobody waits for it."""

    def once(text):
        def now():
            return float(log.exists() and text in log.read_text(encoding="utf-8")) * 1_000

        monkeypatch.setattr(
            "helpers.operations.programs.time",
            SimpleNamespace(monotonic=now, sleep=lambda seconds: time.sleep(0.01)),
        )

    return once


def test_a_line_of_its_output_tells_its_address(started, log):
    program = started(
        python("import os, time; print('hello\\nready at', os.environ['WHERE']); time.sleep(600)"),
        READY,
        log,
        WHERE="http://127.0.0.1:5",
    )
    assert (program.address, program.log, program.running) == ("http://127.0.0.1:5", log, True)


def test_half_a_line_is_not_its_address(started, log):
    program = started(
        python(
            "import sys, time; sys.stdout.write('ready at http://127.0.0.1:5'); sys.stdout.flush(); "
            "time.sleep(1); print('4321'); time.sleep(600)"
        ),
        READY,
        log,
    )
    assert program.address == "http://127.0.0.1:54321"


def test_an_address_that_answers_200_tells_that_it_is_ready(started, log, tmp_path):
    (tmp_path / "health").touch()
    port = free_port()
    program = started(
        [
            sys.executable,
            "-m",
            "http.server",
            str(port),
            "--bind",
            "127.0.0.1",
            "--directory",
            str(tmp_path),
        ],
        f"http://127.0.0.1:{port}/health",
        log,
    )
    assert program.address == f"http://127.0.0.1:{port}"
    assert requests.get(f"{program.address}/health", timeout=10).status_code == 200


def test_another_answer_than_200_is_not_ready(log, late, tmp_path):
    late("404")  # it was asked
    port = free_port()
    with pytest.raises(CourseError) as refusal:
        start_program(
            [
                sys.executable,
                "-m",
                "http.server",
                str(port),
                "--bind",
                "127.0.0.1",
                "--directory",
                str(tmp_path),
            ],
            f"http://127.0.0.1:{port}/health",
            log,
        )
    assert refusal.value.code == "program-not-ready"


def test_a_proxy_of_the_shell_is_not_asked_for_this_machine(started, log, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "example.org")
    port = free_port()
    program = started(
        [
            sys.executable,
            "-m",
            "http.server",
            str(port),
            "--bind",
            "127.0.0.1",
            "--directory",
            str(tmp_path),
        ],
        f"http://127.0.0.1:{port}/",
        log,
    )
    assert requests.get(program.address, timeout=10).status_code == 200
    assert os.environ["no_proxy"].split(",")[0] == "example.org"


def test_what_ends_early_says_its_last_line(log):
    with pytest.raises(CourseError) as refusal:
        start_program(
            python("import sys; print('first'); sys.exit('no such model.\\n\\n')"), READY, log
        )
    assert refusal.value.code == "program-ended"
    assert refusal.value.what.endswith("no such model.")
    assert "first" not in refusal.value.what and str(log) in refusal.value.fix


def test_what_ends_without_a_word_is_said_so(log):
    with pytest.raises(CourseError, match="it printed nothing") as refusal:
        start_program(python("raise SystemExit(3)"), READY, log)
    assert (refusal.value.code, refusal.value.what[-1]) == ("program-ended", ".")


def test_what_is_never_ready_is_ended_with_its_children(log, late):
    late("ready at")
    with pytest.raises(CourseError) as refusal:
        start_program(python(FAMILY), "^never$", log)
    assert refusal.value.code == "program-not-ready"
    assert "ready at http://nowhere:1" in refusal.value.what
    (child,) = children_in(log)
    assert is_gone(child)


def test_a_port_that_is_taken_is_refused_before_anything_starts(log):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(CourseError) as refusal:
            start_program(python("pass"), f"http://127.0.0.1:{listener.getsockname()[1]}/", log)
    assert refusal.value.code == "port-taken"
    assert not log.exists()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_its_children_end_with_it(started, log, end):
    program = started(python(FAMILY), READY, log)
    (child,) = children_in(log)
    getattr(program, end)()
    assert not program.running
    assert is_gone(child)
    getattr(program, end)()  # a second time is no error


def test_stop_lets_it_say_goodbye(started, log):
    program = started(
        python(
            "import signal, sys, time\n"
            "def end(*_):\n    time.sleep(0.5)\n    print('goodbye')\n    sys.exit()\n"
            "signal.signal(signal.SIGTERM, end)\nprint('ready at x')\ntime.sleep(600)"
        ),
        READY,
        log,
    )
    program.stop()
    assert log.read_text(encoding="utf-8").splitlines()[-1] == "goodbye"


def test_stop_ends_what_does_not_listen(started, log):
    program = started(
        python(
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
            "print('ready at x'); time.sleep(600)"
        ),
        READY,
        log,
    )
    program.stop(seconds=0.5)
    assert not program.running


def test_what_was_killed_by_somebody_else_does_not_run(started, log):
    program = started(
        python("import os, time; print('ready at', os.getpid()); time.sleep(600)"), READY, log
    )
    os.kill(int(program.address), signal.SIGKILL)
    assert is_gone(int(program.address))
    assert not program.running
    program.stop()


def test_a_second_one_with_the_same_log_ends_the_first(started, log):
    first, second = (
        started(python(f"import time; print('ready at {number}'); time.sleep(600)"), READY, log)
        for number in (1, 2)
    )
    assert (first.running, second.running, second.address) == (False, True, "2")


def test_all_end_with_the_process_that_started_them_also_when_it_is_killed(log):
    process = subprocess.Popen(
        python(
            f"import time\nfrom pathlib import Path\nfrom helpers.operations.programs import start_program\n"
            f"start_program({python(FAMILY)!r}, {READY!r}, Path({str(log)!r}))\n"
            f"time.sleep(600)"
        ),
        cwd=ROOT,
    )
    while not (log.exists() and children_in(log)):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    (child,) = children_in(log)
    assert is_gone(child)


def test_ctrl_c_while_it_starts_ends_it(log):
    process = subprocess.Popen(
        python(
            f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom pathlib import Path\n"
            f"from helpers.operations.programs import start_program\n"
            f"try:\n    start_program({python(FAMILY)!r}, '^never$', Path({str(log)!r}))\n"
            f"except KeyboardInterrupt:\n    print('interrupted', flush=True)\n    input()"
        ),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    while not (log.exists() and children_in(log)):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    (child,) = children_in(log)
    assert is_gone(child)  # while the page's process goes on
    process.communicate("\n")
