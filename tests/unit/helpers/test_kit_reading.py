"""Reading an offline kit: what is none, what one holds, and bringing a model from it. ``course.kit`` builds one.

Run: python -m helpers test tests/unit/helpers/test_kit_reading.py
"""

import contextlib
import hashlib
import json
import random
import subprocess
import sys

import pytest
from support import ROOT, refuses
from support.in_process import download_here
from support.kits import NOBODY, change_manifest
from support.web_server import web_server

from helpers.files import sha256
from helpers.models.kit import (
    COURSE,
    MANIFEST,
    build_command,
    kit_address,
    local_address,
    open_kit,
    read_kit,
)

NOISE = random.Random(1).randbytes(200_000)
WEIGHTS = "/models/tiny-phi3/transformers/model.safetensors"


def entry(content):
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_kit(folder, files, **head):
    """Write a kit of these files, and its manifest."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest = {
        "format": 1,
        "complete": True,
        "models": ["tiny-phi3"],
        "platforms": ["linux"],
        "pythons": ["3.12"],
        "files": {name: entry(content) for name, content in files.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest | head), encoding="utf-8")
    return folder


@pytest.fixture
def small(tmp_path):
    """Return a kit that a test may damage: one model, of noise."""
    parts = {
        "transformers": {"config.json": b"{}", "model.safetensors": NOISE},
        "onnx": {"model.onnx": b"graph", "deep/model.data": b"weights"},
    }
    files = {COURSE: b"PK", "wheels/index.html": b"<html>"}
    for part, contents in parts.items():
        files |= {f"models/tiny-phi3/{part}/{name}": content for name, content in contents.items()}
        receipt = {
            "recipe": {"made by": part},
            "facts": {},
            "files": {name: entry(content) | {"mtime_ns": 1} for name, content in contents.items()},
        }
        files[f"models/tiny-phi3/{part}.receipt.json"] = json.dumps(receipt).encode()
    return write_kit(tmp_path / "a kit", files)


@pytest.fixture
def target(tmp_path, monkeypatch):
    """Return an empty folder for a model; what is downloaded, is downloaded in this process."""
    download_here(monkeypatch)
    (tmp_path / "modèl").mkdir()
    return tmp_path / "modèl"


# --- fetching a model -------------------------------------------------------------------------


def in_kit(kit, track="transformers"):
    return {
        name: entry["sha256"] for name, entry in kit.receipt("tiny-phi3", track)["files"].items()
    }


def hashes(folder):
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("over_http", [False, True])
@pytest.mark.parametrize("track", ["transformers", "onnx"])
def test_a_model_comes_from_a_url_or_a_folder(small, target, over_http, track):
    with web_server(small) if over_http else contextlib.nullcontext(str(small)) as address:
        kit = read_kit(address)
        assert kit.models() == ["tiny-phi3"]
        assert kit.fetch("tiny-phi3", track, target, target) == in_kit(kit, track) == hashes(target)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_dropped_connection_is_taken_up_where_it_broke(small, target, ranges):
    log = []
    with web_server(small, {WEIGHTS: 70_000}, ranges, log=log) as url:
        kit = read_kit(url)
        kit.fetch("tiny-phi3", "transformers", target, target)
        assert hashes(target) == in_kit(kit)
    assert [header for path, header in log if path == WEIGHTS] == [None, "bytes=70000-"]


@pytest.mark.parametrize("over_http", [False, True])
def test_what_an_interrupted_fetch_left_is_used(small, target, over_http):
    whole, log = target / "config.json", []
    whole.write_bytes(b"{}")
    before = whole.stat().st_mtime_ns
    (target / f"model.safetensors.{entry(NOISE)['sha256'][:12]}.incomplete").write_bytes(
        NOISE[:7000]
    )
    with web_server(small, log=log) if over_http else contextlib.nullcontext(str(small)) as address:
        kit = read_kit(address)
        kit.fetch("tiny-phi3", "transformers", target, target)
        assert hashes(target) == in_kit(kit)
    assert whole.stat().st_mtime_ns == before
    if over_http:
        assert [header for path, header in log if path == WEIGHTS] == ["bytes=7000-"]
        assert not [path for path, _ in log if path.endswith("/config.json")]


@pytest.mark.parametrize("over_http", [False, True])
@pytest.mark.parametrize("damage", [NOISE[:-1] + b"?", NOISE[:-1], NOISE + b"?"])
def test_a_file_with_another_sha256_is_named_and_not_kept(small, target, damage, over_http):
    (small / WEIGHTS[1:]).write_bytes(damage)
    with (
        web_server(small) if over_http else contextlib.nullcontext(str(small)) as address,
        refuses("kit-changed") as refusal,
    ):
        read_kit(address).fetch("tiny-phi3", "transformers", target, target)
    assert f"{WEIGHTS[1:]} of the kit {address} is not as it was built" in refusal.value.what
    assert not (target / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("server", "why"),
    [
        (
            {"cuts": {WEIGHTS: 70_000}, "leaves": True},
            "Server disconnected without sending a response.",
        ),
        ({"gone": [WEIGHTS]}, "Server disconnected without sending a response."),
        ({"busy": {WEIGHTS: [(503, "1")] * 9}}, "the server answers 503."),
        (None, "No such file or directory."),
    ],
)
def test_a_kit_that_is_gone_is_an_error_and_what_came_stays(small, target, server, why):
    address = web_server(small, **server) if server else contextlib.nullcontext(str(small))
    with address as address:
        kit = read_kit(address)
        if server is None:
            (small / WEIGHTS[1:]).unlink()
        with refuses("kit-unread") as refusal:
            kit.fetch("tiny-phi3", "transformers", target, target)
    assert refusal.value.what == f"{WEIGHTS[1:]} of the kit {address} could not be read: {why}"
    assert (target / "config.json").read_bytes() == b"{}"
    if server and "cuts" in server:
        (half,) = target.glob("*.incomplete")
        assert half.stat().st_size == 70_000


def test_a_disk_that_fills_up_is_no_fault_of_the_kit(small, target, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("helpers.models.download._copy", full)
    with pytest.raises(OSError, match="No space left on device"):
        read_kit(str(small)).fetch("tiny-phi3", "transformers", target, target)


def test_a_kit_in_the_room_is_read_past_a_proxy(small, tmp_path, monkeypatch, capsys):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, NOBODY)
    monkeypatch.setenv("no_proxy", "example.org")
    (tmp_path / "model").mkdir()
    with web_server(small) as url:  # in a process of its own, as a user has it
        kit = read_kit(url)
        kit.fetch("tiny-phi3", "transformers", tmp_path / "model", tmp_path / "model")
        assert hashes(tmp_path / "model") == in_kit(kit)
    assert "Fetching tiny-phi3 (transformers) from the kit: 100%" in capsys.readouterr().out


def test_a_kit_behind_a_proxy_is_asked_through_it(small, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("helpers.models.kit.local_address", lambda url: False)
    monkeypatch.setattr("helpers.models.kit.ask", lambda *arguments: asked.append(arguments) or {})
    read_kit(str(small)).fetch("tiny-phi3", "transformers", tmp_path, tmp_path)
    assert asked[0][3] == {}


def test_a_model_that_the_kit_lacks_has_no_receipt(small):
    kit = read_kit(str(small))
    assert kit.receipt("smollm2-135m", "onnx") is None
    assert kit.receipt("tiny-phi3", "onnx")["files"].keys() == {"model.onnx", "deep/model.data"}


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        (lambda receipt: receipt["files"].popitem(), True),
        (lambda receipt: receipt["files"].update(more={}), True),
        (lambda receipt: receipt.update(recipe=None), True),
        (lambda receipt: receipt.update(facts=[]), True),
        (lambda receipt: receipt.pop("files"), True),
        (lambda receipt: receipt.update(recipe={"made by": "ONNX"}), False),
    ],
)
def test_a_receipt_that_is_not_the_kits_own_is_refused(small, change, listed):
    file = small / "models/tiny-phi3/onnx.receipt.json"
    receipt = json.loads(file.read_text(encoding="utf-8"))
    change(receipt)
    file.write_text(json.dumps(receipt), encoding="utf-8")
    if listed:  # its hash is the manifest's; its content makes no sense
        change_manifest(
            small,
            lambda manifest: manifest["files"].update(
                {"models/tiny-phi3/onnx.receipt.json": entry(file.read_bytes())}
            ),
        )
    with refuses("kit-changed"):
        read_kit(str(small)).receipt("tiny-phi3", "onnx")


# --- whether it is as it was built --------------------------------------------------------------


@pytest.mark.parametrize("over_http", [False, True])
def test_problems_names_each_file_that_is_not_as_it_was_built(small, over_http):
    names = [f"models/tiny-phi3/onnx/{name}" for name in ("model.onnx", "deep/model.data")]
    (small / names[0]).write_bytes(b"GRAPH")
    (small / names[1]).write_bytes(b"we")
    (small / COURSE).unlink()
    (small / "notes.txt").write_text("mine", encoding="utf-8")
    with web_server(small) if over_http else contextlib.nullcontext(str(small)) as address:
        kit = read_kit(address)
        assert sorted(kit.problems()) == [
            "course.zip is missing: the server answers 404."
            if over_http
            else "course.zip is missing.",
            f"{names[1]} has 2 bytes, and 7 were built.",
            f"{names[0]} has been changed: its sha256 is another.",
        ]
        assert kit.unknown() == ([] if over_http else ["notes.txt"])
    if not over_http:
        assert len(list(kit.problems(hashes=False))) == 2  # the content of none is read


@pytest.mark.skipif(sys.platform == "win32", reason="a symbolic link takes rights there")
def test_a_link_that_leads_out_of_a_kit_is_named(small, tmp_path):
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (small / "link.txt").symlink_to(tmp_path / "secret")
    change_manifest(
        small, lambda manifest: manifest["files"].update({"link.txt": entry(b"secret")})
    )
    assert list(read_kit(str(small)).problems()) == [
        "link.txt lies outside of the kit's folder, behind a link."
    ]


def test_the_command_that_builds_a_kit_again_names_its_models_and_targets(small):
    kit = read_kit(str(small))
    assert build_command(kit, ["windows"], ["3.13"]) == (
        f'python -m helpers kit build "{small}" --model tiny-phi3 --platform linux windows --python 3.12 3.13'
    )
    with web_server(small) as url:
        assert build_command(read_kit(url)) == (
            "python -m helpers kit build DIR --model tiny-phi3 --platform linux --python 3.12"
        )


# --- COURSE_KIT -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "code", "says"),
    [
        (NOBODY, "kit-no-answer", NOBODY),
        ("http://no-such-host.invalid:8750/", "kit-no-answer", "no-such-host"),
        ("no/such/folder", "kit-absent", MANIFEST),
        ("192.168.1.5:8750", "kit-absent", MANIFEST),
        ("pyproject.toml", "kit-absent", "pyproject.toml"),
        ("ftp://kit", "kit-address", "ftp://kit"),
        ("http://", "kit-address", "http://"),
        ("http://[::1", "kit-address", "http://[::1"),
        ("http://host:port", "kit-address", "host:port"),
        ("http://ann:sesame@192.168.1.5:8750", "kit-address", "http://192.168.1.5:8750"),
        ("~nobody-of-that-name/kit", "kit-address", "~nobody"),
        (f"http://{'a' * 70}", "kit-address", "aaaa"),
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


def _manifest(name="a", size=1, version=1, models=(), complete=True):
    return json.dumps(
        {
            "format": version,
            "complete": complete,
            "models": models,
            "platforms": [],
            "pythons": [],
            "files": {name: {"size": size, "sha256": "0" * 64}},
        }
    ).encode()


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"<!DOCTYPE html><title>Sign in</title>", "kit-other-answer"),
        (b"{", "kit-broken"),
        (b"[]", "kit-broken"),
        (b'{"files": {}}', "kit-broken"),
        (b"\xff", "kit-broken"),
        (b"[" * 200_000, "kit-broken"),
        (_manifest(size=1.5), "kit-broken"),
        (_manifest(size=10**400), "kit-broken"),
        (_manifest(name="..\\x"), "kit-broken"),
        (_manifest(name="a\nb"), "kit-broken"),
        (_manifest(models=["x; touch pwned"]), "kit-broken"),
        (_manifest(complete="no"), "kit-broken"),
        (_manifest(complete=False), "kit-incomplete"),
        (_manifest(version=99), "kit-newer"),
    ],
)
def test_an_answer_that_is_no_manifest_is_an_error(answer, code, tmp_path, monkeypatch):
    with web_server(tmp_path, answer=answer) as url:
        monkeypatch.setenv("COURSE_KIT", url)
        with refuses(code):
            open_kit()


def test_a_server_that_is_busy_is_no_kit_yet(small):
    with web_server(small, busy={f"/{MANIFEST}": [(503, "1")]}) as url:
        with refuses("kit-other-answer") as refusal:
            read_kit(url)
        assert "503" in refusal.value.what


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/x", "a\\..\\x", "C:x", "a//b", ".", "a/./b", "", "x\0"]
)
def test_a_manifest_that_leads_out_of_a_folder_is_refused(small, name):
    change_manifest(
        small, lambda manifest: manifest["files"].update({name: {"size": 1, "sha256": "0" * 64}})
    )
    with refuses("kit-broken"):
        read_kit(str(small))


def test_a_kit_of_a_newer_course_says_where_that_course_is(small):
    change_manifest(small, lambda manifest: manifest.update(format=2))
    with refuses("kit-newer") as refusal:
        read_kit(str(small))
    assert COURSE in refusal.value.fix


def test_a_kit_that_is_being_built_is_read_where_that_is_wanted(small):
    change_manifest(small, lambda manifest: manifest.update(complete=False))
    with refuses("kit-incomplete"):
        read_kit(str(small))
    assert read_kit(str(small), complete=False).models() == ["tiny-phi3"]


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
            url.replace("http", "HTTP") + "/manifest.json?x#y",
        ):
            assert read_kit(address).address == url


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://192.168.1.5:8750", True),
        ("http://10.0.0.1", True),
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
