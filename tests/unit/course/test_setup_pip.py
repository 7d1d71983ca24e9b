"""What set-up tells pip (to ask a kit and nobody else, to take the CPU build of torch), and the environment it makes.

Run: python -m helpers test tests/unit/course/test_setup_pip.py
"""

import io
import json
import os
import sys
import urllib.error
from pathlib import Path

import pytest
from support import refuses

from course import environment, install
from course.install import TORCH_CPU_INDEX, cpu_torch_options, pip_environment
from helpers.models.kit import Kit


@pytest.fixture
def users(monkeypatch):
    """Let the user's pip have an index, options and a proxy of its own."""
    for name, value in {
        "PIP_INDEX_URL": "https://index.example/simple",
        "PIP_NO_BINARY": ":all:",
        "Pip_User": "1",
        "PIP_CACHE_DIR": "/cache",
        "PIP_CONFIG_FILE": "/etc/pip.conf",
        "no_proxy": "localhost",
        "https_proxy": "http://proxy.example",
    }.items():
        monkeypatch.setenv(name, value)


def test_without_a_kit_pip_has_the_users_own_settings():
    assert pip_environment(None) is None


@pytest.mark.parametrize(
    ("address", "links", "trusted", "direct"),
    [
        (
            "http://192.168.1.5:8750",
            "http://192.168.1.5:8750/wheels/index.html",
            "192.168.1.5:8750",
            True,
        ),
        (
            "http://kits.example.org",
            "http://kits.example.org/wheels/index.html",
            "kits.example.org",
            False,
        ),
        ("https://kits.example.org", "https://kits.example.org/wheels/index.html", None, False),
        ("https://teacher.local", "https://teacher.local/wheels/index.html", None, True),
        (
            str(Path("/media/Kit für alle").resolve()),
            Path("/media/Kit für alle/wheels/index.html").resolve().as_uri(),
            None,
            False,
        ),
    ],
)
def test_with_a_kit_pip_asks_it_and_nobody_else(users, address, links, trusted, direct):
    variables = pip_environment(Kit(address, {}))
    assert {
        name: value for name, value in variables.items() if name.upper().startswith("PIP_")
    } == {
        "PIP_CACHE_DIR": "/cache",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": links,
    } | ({"PIP_TRUSTED_HOST": trusted} if trusted else {})
    assert " " not in links  # pip takes what stands behind a space for another place
    # A kit in the room is asked directly, and one behind a proxy through it.
    assert variables["no_proxy"] == ("*" if direct else "localhost")
    assert variables["https_proxy"] == "http://proxy.example"


PLAIN = ("--constraint", "c.txt", "torch==2.13.0")
WITH_INDEX = ["--extra-index-url", TORCH_CPU_INDEX, *PLAIN]


def plan_torch(tmp_path, requires):
    """Return a pip whose plan is to install torch with these requirements; None: it is there already."""

    def pip(*words):
        assert words[:3] == ("install", "--dry-run", "--no-deps")
        assert words[-1] == "torch==2.13.0"
        chosen = (
            []
            if requires is None
            else [{"metadata": {"requires_dist": requires} if requires else {}}]
        )
        Path(words[words.index("--report") + 1]).write_text(
            json.dumps({"install": chosen}), encoding="utf-8"
        )

    return pip


@pytest.mark.parametrize(
    ("page", "options"),
    [
        (b'<a href="torch-2.13.0%2Bcpu-cp312-cp312-win_amd64.whl">', WITH_INDEX),
        (b'<a href="torch-2.12.0%2Bcpu-cp312-cp312-win_amd64.whl">', list(PLAIN)),
        (b"<form action='/login'>Please log in.</form>", list(PLAIN)),
        (urllib.error.URLError("no route"), list(PLAIN)),
        (TimeoutError(), list(PLAIN)),
    ],
)
@pytest.mark.parametrize(
    "requires", [None, [], ["filelock", "sympy>=1.13", "cudalike; extra == 'x'"]]
)
def test_pytorchs_own_index_is_asked_where_it_has_that_torch(
    tmp_path, monkeypatch, page, options, requires
):
    def open_page(url, timeout):
        assert url == f"{TORCH_CPU_INDEX}/torch/"
        if isinstance(page, Exception):
            raise page
        return io.BytesIO(page)

    monkeypatch.setattr("urllib.request.urlopen", open_page)
    assert (
        cpu_torch_options(plan_torch(tmp_path, requires), tmp_path / "plan.json", *PLAIN) == options
    )


@pytest.mark.parametrize(
    "needed",
    [
        "nvidia-cublas==13.0; platform_system == 'Linux'",
        "cuda-toolkit[cublas]==13.0",
        "nvidia_nccl_cu13",
    ],
)
def test_a_torch_that_asks_for_cuda_is_refused(tmp_path, monkeypatch, needed):
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(b""))
    with refuses("cuda-build") as refusal:
        cpu_torch_options(
            plan_torch(tmp_path, ["filelock", needed]), tmp_path / "plan.json", *PLAIN
        )
    assert "torch==2.13.0" in refusal.value.what
    assert TORCH_CPU_INDEX in refusal.value.fix


@pytest.mark.parametrize("terminal", [True, False])
def test_the_log_keeps_all_that_pip_and_uv_say_and_a_terminal_shows_one_line_of_it(
    tmp_path, monkeypatch, capsys, terminal
):
    said = [
        "Looking in links\n",
        "Collecting six\n  Downloading",
        " six.whl\n",
        "Resolved 2 packages in 1ms\n",
    ]
    monkeypatch.setattr(install, "LOG", tmp_path / "build" / "setup.log")
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    for text in said:
        install._log_and_show(text)
    assert (tmp_path / "build" / "setup.log").read_text(encoding="utf-8") == "".join(said)
    shown = [line.rstrip() for line in capsys.readouterr().out.split("\r") if line]
    assert shown == (["Collecting six"] if terminal else [])


@pytest.fixture
def venv(tmp_path, monkeypatch):
    """Let the environment be one in an empty folder, and return its folder."""
    venv = tmp_path / ".venv"
    for name, value in {
        "ROOT": tmp_path,
        "VENV": venv,
        "VENV_PYTHON": venv / "python",
        "STAMP": venv / "course.stamp",
    }.items():
        monkeypatch.setattr(environment, name, value)
    monkeypatch.setattr(install, "LOG", tmp_path / "setup.log")
    return venv


def test_a_python_without_venv_is_told_how_to_get_it(venv, monkeypatch):
    monkeypatch.setattr(
        environment, "run_program", lambda command, variables, log: log("no ensurepip") or (1, "")
    )
    with refuses("venv-failed") as refusal:
        environment._make_venv()
    assert "python3-venv" in refusal.value.fix
    assert install.LOG.read_text(encoding="utf-8") == "no ensurepip"


@pytest.mark.parametrize(
    ("says", "stamp", "made"),
    [
        ("{version} {venv}\n", None, False),  # the user's own
        ("{version} {venv}\n", '{{"state": "of other pins"}}', False),
        ("{version} {venv}\n", environment.UNFINISHED, True),
        ("3.10.1 (main) {venv}\n", None, True),
        ("{version} /elsewhere/.venv\n", None, True),
        ("ModuleNotFoundError\n", None, True),
    ],
)
def test_an_environment_that_was_interrupted_or_moved_or_is_of_another_python_is_made_anew(
    venv, monkeypatch, says, stamp, made
):
    venv.mkdir()
    (venv / "python").touch()
    if stamp:
        environment.STAMP.write_text(stamp, encoding="utf-8")
    calls = []

    def run(command, variables, log):
        calls.append(command[:3])
        # What was there is gone before, and the stamp says so from the first moment.
        if command[1:3] == ["-m", "venv"]:
            assert [path.name for path in venv.iterdir()] == ["course.stamp"]
            assert environment.STAMP.read_text(encoding="utf-8") == environment.UNFINISHED
        return 0, says.format(version=sys.version, venv=venv)

    monkeypatch.setattr(environment, "run_program", run)
    environment._make_venv()
    assert ([sys.executable, "-m", "venv"] in calls) == made
    assert (venv / "python").exists() == (not made)
