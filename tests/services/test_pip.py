"""What pip says when it fails is read in one place.

Run: python -m helpers test tests/services/test_pip.py
"""

import errno
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support import refuses
from support.kits import only_wheels

from helpers.models.pip import (
    USER_OPTIONS,
    PipError,
    PipFailure,
    download_wheel,
    pip_error,
    read_failure,
    read_settings,
    run_pip,
    users_options,
    users_settings,
)


@pytest.mark.parametrize(
    ("output", "kind", "package"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "disk-full",
            "",
        ),
        (
            "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError'\n"
            "ERROR: No matching distribution found for torch==2.13.0",
            "unreachable",
            "torch==2.13.0",
        ),
        ("socket.gaierror: [Errno -2] Name or service not known", "unreachable", ""),
        (
            "SSLCertVerificationError: [SSL: CERTIFICATE_VERIFY_FAILED]\nWARNING: Retrying",
            "certificate",
            "",
        ),
        (
            "ERROR: Could not find a version that satisfies the requirement six==9 (from versions: none)\n"
            "ERROR: No matching distribution found for six==9",
            "missing",
            "six==9",
        ),
        ("error: metadata-generation-failed", "other", ""),
        ("", "other", ""),
    ],
)
def test_why_pip_failed(output, kind, package):
    failure = read_failure(output)
    assert (failure.kind, failure.package) == (kind, package)
    assert failure.line == (output.splitlines()[-1].strip() if output else "no output")


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("certificate", "pip-certificate"),
        ("missing", "pip-unreachable"),
        ("unreachable", "pip-unreachable"),
        ("other", "pip-failed"),
    ],
)
def test_a_failure_is_told_in_two_sentences(kind, code):
    with refuses(code) as refusal:
        raise pip_error(PipFailure(kind, "six", "pip's last line"), "Downloading six")
    assert refusal.value.what.startswith("Downloading six failed: ")
    assert ("pip's last line" in refusal.value.what) == (code == "pip-failed")


def test_a_full_disk_stays_an_error_of_the_disk():
    error = pip_error(PipFailure("disk-full", "", ""), "Downloading six")
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC


def test_pip_returns_what_it_printed_or_raises():
    printed = []
    assert run_pip("--version", on_output=printed.append).startswith("pip ")
    assert "".join(printed).startswith("pip ")
    with pytest.raises(PipError) as error:
        run_pip("install", "--no-such-option")
    assert error.value.failure.kind == "other"


@pytest.fixture
def index(monkeypatch, tmp_path):
    """Let pip find packages in a folder and nowhere else, and return it."""
    for name, value in only_wheels(tmp_path / "index").items():
        if name.startswith("PIP_"):
            monkeypatch.setenv(name, value)
    return tmp_path / "index"


def get_words(folder):
    download_wheel("Downloading llm-words==1.0", "llm-words==1.0", folder)


def test_a_wheel_arrives_behind_a_bar(index, tmp_path, capsys):
    only_wheels(index, "llm_words-1.0-py3-none-any.whl")
    get_words(tmp_path / "got")
    assert [path.name for path in (tmp_path / "got").iterdir()] == [
        "llm_words-1.0-py3-none-any.whl"
    ]
    assert "Downloading llm-words==1.0: 100%" in capsys.readouterr().out


def test_no_index_is_an_error_that_says_what_to_check(index, tmp_path):
    with refuses("pip-unreachable") as refusal:
        get_words(tmp_path)
    assert "the package index does not answer" in refusal.value.what
    assert "HTTPS_PROXY" in refusal.value.fix


def test_a_login_page_in_place_of_the_index_says_what_to_check(index, tmp_path, monkeypatch):
    class Portal(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!DOCTYPE html><title>Welcome to Hotel WiFi</title>")

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Portal) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        with refuses("pip-unreachable") as refusal:
            get_words(tmp_path)
        server.shutdown()
    assert "something else answers in its place" in refusal.value.what


# --- what the user's own variables and files may say ------------------------------------------

# Where pip would install, what it would take and how it would tell so: the course says that itself.
OURS = {
    "abi",
    "all-releases",
    "break-system-packages",
    "check-build-dependencies",
    "compile",
    "config-settings",
    "debug",
    "dest",
    "destination-dir",
    "destination-directory",
    "disable-pip-version-check",
    "dry-run",
    "editable",
    "exists-action",
    "force-reinstall",
    "group",
    "help",
    "ignore-installed",
    "ignore-requires-python",
    "implementation",
    "isolated",
    "local-log",
    "log",
    "log-file",
    "no-binary",
    "no-build-isolation",
    "no-clean",
    "no-color",
    "no-compile",
    "no-dependencies",
    "no-deps",
    "no-python-version-warning",
    "no-require-hashes",
    "no-user",
    "no-warn-conflicts",
    "no-warn-script-location",
    "only-dependencies",
    "only-deps",
    "only-final",
    "platform",
    "pre",
    "prefer-binary",
    "prefix",
    "progress-bar",
    "python",
    "python-version",
    "quiet",
    "refresh-package",
    "report",
    "require-venv",
    "require-virtualenv",
    "requirement",
    "requirements-from-script",
    "root",
    "root-user-action",
    "source",
    "source-dir",
    "source-directory",
    "src",
    "target",
    "upgrade",
    "upgrade-strategy",
    "use-pep517",
    "user",
    "verbose",
}
HOSTILE = {
    "TARGET": "elsewhere",
    "USER": "1",
    "PREFIX": "elsewhere",
    "ROOT": "elsewhere",
    "DRY_RUN": "1",
    "QUIET": "3",
    "REPORT": "elsewhere.json",
    "PYTHON": "elsewhere",
    "REQUIRE_VIRTUALENV": "1",
    "NO_BINARY": ":all:",
    "IGNORE_INSTALLED": "1",
    "NO_BUILD_ISOLATION": "0",
    "LOG": os.devnull + "/pip.log",
    "VERSION": "26.0",
    "PROGRESS_BAR": "off",
    "DEST": "elsewhere",
    "PLATFORM": "win32",
    "ISOLATED": "1",
    "REQUIREMENT": "none.txt",
    "EDITABLE": "elsewhere",
    "VERBOSE": "perhaps",
    "GROUP": "none",
    "ONLY_DEPS": "1",
}
LIST = r"""global.index-url='https://name:p%40ss@index.example/simple'
global.extra-index-url='\nhttps://a.example\nhttps://b.example'
global.target='/elsewhere'
global.timeout='3'
install.timeout='9'
download.timeout='5'
install.find-links='C:\\wheels'
:env:.cert='/of/the/environment'
"""


def test_each_option_of_pip_is_the_users_or_the_courses():
    code = (
        "from pip._internal.commands import create_command\n"
        "for name in ('install', 'download'):\n"
        "    for option in create_command(name).parser.option_list_all:\n"
        "        print(*(long[2:] for long in option._long_opts), sep='\\n')"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert set(said.stdout.split()) == USER_OPTIONS | OURS
    assert not USER_OPTIONS & OURS


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("install", {"timeout": "9", "find-links": "C:\\wheels"}),
        ("download", {"timeout": "5"}),
        ("wheel", {"timeout": "3"}),
    ],
)
def test_what_pips_files_say_of_where_packages_come_from_is_kept(command, settings):
    assert (
        read_settings(command, LIST)
        == {
            "index-url": "https://name:p%40ss@index.example/simple",
            "extra-index-url": "\nhttps://a.example\nhttps://b.example",
        }
        | settings
    )


def test_a_variable_wins_over_a_file_and_other_options_are_emptied(tmp_path):
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nproxy = http://file\ntimeout = 3\nquiet = 3\n"
        f"log = {os.devnull}/pip.log\n"
        "[install]\nretries = 1\nuser = 1\n",
        encoding="utf-8",
    )
    variables = dict(
        os.environ,
        PIP_CONFIG_FILE=str(file),
        PIP_TIMEOUT="7",
        PIP_TARGET="elsewhere",
        PIP_NO_INPUT="1",
        ALL_PROXY="http://shell",
    )
    settings = users_settings("install", sys.executable, variables)
    assert (
        settings.items()
        >= {
            "PIP_PROXY": "http://file",
            "PIP_RETRIES": "1",
            "PIP_TARGET": "",
            "PIP_CONFIG_FILE": os.devnull,
        }.items()
    )
    assert {"PIP_TIMEOUT", "PIP_NO_INPUT", "PIP_USER", "ALL_PROXY"} & set(settings) == set()
    assert (
        users_options("install", sys.executable, variables).items()
        >= {"proxy": "http://file", "timeout": "7", "retries": "1"}.items()
    )
    assert (
        not {"user", "target", "log", "quiet"}
        & users_options("install", sys.executable, variables).keys()
    )


def make_hostile(monkeypatch, tmp_path, way):
    """Let the variables, or a file, hold what would make pip install elsewhere, nothing or in silence."""
    if way == "variables":
        for name, value in HOSTILE.items():
            monkeypatch.setenv(f"PIP_{name}", value)
        return
    lines = [
        f"{name.lower().replace('_', '-')} = {value}"
        for name, value in HOSTILE.items()
        # With the first two, pip does not even list.
        if name not in ("VERBOSE", "VERSION", "PYTHON", "ISOLATED")
    ]
    (tmp_path / "pip.conf").write_text("\n".join(["[global]", *lines]), encoding="utf-8")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))


@pytest.mark.parametrize("way", ["variables", "file"])
def test_a_wheel_arrives_whatever_else_pip_is_told(index, tmp_path, monkeypatch, capsys, way):
    only_wheels(index, "llm_words-1.0-py3-none-any.whl")
    make_hostile(monkeypatch, tmp_path, way)
    get_words(tmp_path / "got")
    assert [path.name for path in (tmp_path / "got").iterdir()] == [
        "llm_words-1.0-py3-none-any.whl"
    ]
    assert "Downloading llm-words==1.0: 100%" in capsys.readouterr().out
