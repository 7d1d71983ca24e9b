"""Reading an offline kit: what is none, what one holds, and copying a model from it. ``course.kit`` builds one.

Run: python -m helpers test tests/unit/helpers/test_kit_reading.py
"""

import contextlib
import json
import random
import subprocess
import sys

import pytest
from support import ROOT, refuses
from support.kits import NOBODY, write_sums
from support.web_server import web_server

from helpers.files import sha256
from helpers.models.kit import SUMS, UNFINISHED, kit_address, local_address, open_kit, read_kit

NOISE = random.Random(1).randbytes(200_000)
WEIGHTS = "/models/tiny-phi3/transformers/model.safetensors"
ZEROS = "0" * 64


@pytest.fixture
def small(tmp_path):
    """Return a kit that a test may damage: one model, of noise."""
    folder = tmp_path / "a kit"
    parts = {
        "transformers": {"config.json": b"{}", "model.safetensors": NOISE},
        "onnx": {"model.onnx": b"graph", "deep/model.data": b"weights"},
    }
    for track, contents in parts.items():
        home = folder / "models" / "tiny-phi3"
        for name, content in contents.items():
            (home / track / name).parent.mkdir(parents=True, exist_ok=True)
            (home / track / name).write_bytes(content)
        sizes = {name: len(content) for name, content in contents.items()}
        receipt = {"recipe": {"made by": track}, "facts": {}, "files": sizes}
        (home / f"{track}.receipt.json").write_text(json.dumps(receipt), encoding="utf-8")
    (folder / "course.zip").write_bytes(b"PK")
    write_sums(folder)
    return folder


@pytest.fixture
def target(tmp_path):
    """Return an empty folder for a model."""
    (tmp_path / "modèl").mkdir()
    return tmp_path / "modèl"


def at(folder, over_http, **options):
    """Return a context that gives the address of a kit: its URL, or its folder."""
    return web_server(folder, **options) if over_http else contextlib.nullcontext(str(folder))


def hashes(folder):
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("over_http", [False, True])
@pytest.mark.parametrize("track", ["transformers", "onnx"])
def test_a_model_comes_from_a_url_or_a_folder(small, target, over_http, track, capsys):
    with at(small, over_http) as address:
        kit = read_kit(address)
        assert kit.models() == ["tiny-phi3"]
        kit.fetch("tiny-phi3", track, target)
    assert hashes(target) == hashes(small / "models" / "tiny-phi3" / track)
    assert f"Fetching tiny-phi3 ({track}) from the kit: 100%" in capsys.readouterr().out


def test_a_file_that_is_here_and_right_does_not_come_again(small, target):
    log = []
    (target / "config.json").write_bytes(b"{}")
    (target / "model.safetensors").write_bytes(b"wrong")
    with web_server(small, log=log) as url:
        read_kit(url).fetch("tiny-phi3", "transformers", target)
    assert not [path for path, _ in log if path.endswith("/config.json")]
    assert (target / "model.safetensors").read_bytes() == NOISE


@pytest.mark.parametrize("over_http", [False, True])
def test_a_file_with_another_hash_is_named_and_not_kept(small, target, over_http):
    (small / WEIGHTS[1:]).write_bytes(NOISE[:-1] + b"?")
    with at(small, over_http) as address, refuses("kit-changed") as refusal:
        read_kit(address).fetch("tiny-phi3", "transformers", target)
    assert f"{WEIGHTS[1:]} of the kit {address} is not as it was built" in refusal.value.what
    assert {path.name for path in target.iterdir()} == {"config.json"}


@pytest.mark.parametrize(
    ("server", "why"),
    [
        ({"cuts": {WEIGHTS: 70_000}}, "the connection broke"),
        ({"gone": [WEIGHTS]}, ""),
        ({"busy": {WEIGHTS: [(503, "1")]}}, "the server answers 503"),
        (None, "No such file or directory"),
    ],
)
def test_a_kit_that_is_gone_is_an_error_and_finished_files_stay(small, target, server, why):
    with at(small, server is not None, **(server or {})) as address:
        kit = read_kit(address)
        if server is None:
            (small / WEIGHTS[1:]).unlink()
        with refuses("kit-unread") as refusal:
            kit.fetch("tiny-phi3", "transformers", target)
    assert f"{WEIGHTS[1:]} of the kit {address} could not be read: {why}" in refusal.value.what
    assert (target / "config.json").read_bytes() == b"{}"
    assert not (target / "model.safetensors").exists()


def test_a_file_of_the_kit_that_may_not_be_read_is_not_blamed_on_the_cache(small, target):
    (small / WEIGHTS[1:]).unlink()
    (small / WEIGHTS[1:]).mkdir()
    with refuses("kit-unread"):
        read_kit(str(small)).fetch("tiny-phi3", "transformers", target)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's full device")
def test_a_full_disk_is_no_fault_of_the_kit(small, target):
    (target / "config.json.incomplete").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        read_kit(str(small)).fetch("tiny-phi3", "transformers", target)


def test_a_kit_in_the_room_is_read_past_a_proxy(small, target, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, NOBODY)
    monkeypatch.setenv("no_proxy", "example.org")
    with web_server(small) as url:
        read_kit(url).fetch("tiny-phi3", "onnx", target)
        monkeypatch.setattr("helpers.models.kit.local_address", lambda url: False)
        with refuses("kit-no-answer"):  # elsewhere, the proxy is asked
            read_kit(url)


def test_a_receipt_is_the_kits_own_or_none(small):
    kit = read_kit(str(small))
    assert kit.receipt("smollm2-135m", "onnx") is None
    assert kit.receipt("tiny-phi3", "onnx")["files"].keys() == {"model.onnx", "deep/model.data"}
    (small / "models/tiny-phi3/onnx.receipt.json").write_text("{}", encoding="utf-8")
    with refuses("kit-changed"):
        kit.receipt("tiny-phi3", "onnx")


@pytest.mark.parametrize("over_http", [False, True])
def test_problems_names_each_file_that_is_not_as_it_was_built(small, over_http):
    (small / "models/tiny-phi3/onnx/model.onnx").write_bytes(b"GRAPH")
    (small / "course.zip").unlink()
    (small / "notes.txt").write_text("mine", encoding="utf-8")
    with at(small, over_http) as address:
        assert list(read_kit(address).problems()) == [
            "course.zip could not be read: "
            + ("the server answers 404." if over_http else "No such file or directory."),
            "models/tiny-phi3/onnx/model.onnx is not as it was built.",
        ]


# --- COURSE_KIT -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "code", "says"),
    [
        (NOBODY, "kit-no-answer", NOBODY),
        ("http://no-such-host.invalid:8750/", "kit-no-answer", "no-such-host"),
        ("no/such/folder", "kit-absent", SUMS),
        ("192.168.1.5:8750", "kit-absent", SUMS),
        ("pyproject.toml", "kit-absent", "pyproject.toml"),
        ("ftp://kit", "kit-address", "ftp://kit"),
        ("http://", "kit-address", "http://"),
        ("http://[::1", "kit-address", "http://[::1"),
        ("http://host:port", "kit-address", "host:port"),
        ("http://ann:sesame@192.168.1.5:8750", "kit-address", "http://192.168.1.5:8750"),
        ("~nobody-of-that-name/kit", "kit-address", "~nobody"),
        ("http://host:0", "kit-address", "host:0"),
        ("http://10.0.0.1 8750", "kit-no-answer", "10.0.0.1 8750"),
    ],
)
def test_an_address_that_is_no_kit_is_an_error_that_says_what_one_looks_like(
    value, code, says, monkeypatch
):
    monkeypatch.setenv("COURSE_KIT", value)
    with refuses(code) as refusal:
        open_kit()
    assert says in refusal.value.what
    assert "sesame" not in str(refusal.value)
    if code != "kit-no-answer":
        assert "http://192.168.1.5:8750" in refusal.value.fix


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"<!DOCTYPE html><title>Sign in</title>", "kit-other-answer"),
        (b"", "kit-broken"),
        (b"\xff", "kit-broken"),
        (b"abc  a\n", "kit-broken"),
        *(
            (f"{ZEROS}  {name}\n".encode(), "kit-broken")
            for name in ("../x", "/etc/x", "a\\..\\x", "C:x", "a/./b", "")
        ),
    ],
)
def test_an_answer_that_is_no_list_is_an_error(answer, code, tmp_path):
    with web_server(tmp_path, answer=answer) as url, refuses(code):
        read_kit(url)


def test_a_server_that_is_busy_is_no_kit_yet(small):
    with web_server(small, busy={f"/{SUMS}": [(503, "1")]}) as url:
        with refuses("kit-other-answer") as refusal:
            read_kit(url)
        assert "503" in refusal.value.what


@pytest.mark.parametrize("over_http", [False, True])
def test_a_kit_that_is_being_built_is_not_read(small, over_http):
    (small / SUMS).rename(small / UNFINISHED)
    with at(small, over_http) as address, refuses("kit-incomplete"):
        read_kit(address)


def test_a_kit_of_an_older_course_is_to_be_built_again(small):
    (small / SUMS).rename(small / "manifest.json")
    with refuses("kit-absent") as refusal:
        read_kit(str(small))
    assert "older course: build it again" in refusal.value.fix


def test_no_course_kit_is_no_kit_and_a_relative_one_starts_at_the_courses_folder(
    monkeypatch, tmp_path
):
    monkeypatch.delenv("COURSE_KIT", raising=False)
    assert open_kit() is None
    monkeypatch.setenv("COURSE_KIT", "  ")
    assert open_kit() is None
    assert kit_address() == ""
    monkeypatch.chdir(tmp_path)
    with refuses("kit-absent") as refusal:
        read_kit("build/no kit here")
    assert str(ROOT / "build" / "no kit here") in refusal.value.what


def test_the_address_line_of_a_browser_will_do(small):
    with web_server(small) as url:
        for address in (
            url + "/",
            url + "/index.html",
            url.replace("http", "HTTP") + f"/{SUMS}?x#y",
        ):
            assert read_kit(address).address == url


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://192.168.1.5:8750", True),
        ("http://127.0.0.1", True),
        ("http://[fe80::1]", True),
        ("http://teacher:8750", True),
        ("http://teacher.local", True),
        ("https://kits.example.org", False),
        ("http://8.8.8.8", False),
    ],
)
def test_a_kit_in_the_room_is_asked_without_the_proxy(url, local):
    assert local_address(url) is local


def test_a_kit_is_read_by_a_bare_python(small):
    code = (
        "import sys; from helpers.models.kit import read_kit; print(read_kit(sys.argv[1]).models())"
    )
    result = subprocess.run(
        [
            sys.executable,
            "-S",
            "-I",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}",
            small,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.stdout == "['tiny-phi3']\n", result.stderr
