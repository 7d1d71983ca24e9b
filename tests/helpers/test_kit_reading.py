"""Reading an offline kit: what is none, what one holds, and bringing a model from it. ``course.kit`` builds one.

Run: python -m helpers test tests/helpers/test_kit_reading.py
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
from support.web_server import web_server

from helpers.files import sha256
from helpers.models.kit import COURSE, MANIFEST, build_command, kit_address, local_address, open_kit, read_kit

NOBODY = "http://127.0.0.1:9"  # the discard port
NOISE = random.Random(1).randbytes(200_000)
WEIGHTS = "/models/tiny-phi3/transformers/model.safetensors"


def entry(content):
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_kit(folder, files, **head):
    """Write a kit of these files, and its manifest."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest = {"format": 1, "complete": True, "models": ["tiny-phi3"], "platforms": ["linux"], "pythons": ["3.12"],
                "files": {name: entry(content) for name, content in files.items()}}
    (folder / MANIFEST).write_text(json.dumps(manifest | head), encoding="utf-8")
    return folder


def change_manifest(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture
def small(tmp_path):
    """Return a kit that a test may damage: one model, of noise."""
    parts = {"transformers": {"config.json": b"{}", "model.safetensors": NOISE},
             "onnx": {"model.onnx": b"graph", "deep/model.data": b"weights"}}
    files = {COURSE: b"PK", "wheels/index.html": b"<html>"}
    for part, contents in parts.items():
        files |= {f"models/tiny-phi3/{part}/{name}": content for name, content in contents.items()}
        receipt = {"recipe": {"made by": part}, "facts": {}, "files": {
            name: entry(content) | {"mtime_ns": 1} for name, content in contents.items()}}
        files[f"models/tiny-phi3/{part}.receipt.json"] = json.dumps(receipt).encode()
    return write_kit(tmp_path / "a kit", files)


@pytest.fixture
def target(tmp_path, monkeypatch):
    """Return an empty folder for a model; what is downloaded, is downloaded in this process."""
    download_here(monkeypatch)
    (tmp_path / "modèl").mkdir()
    return tmp_path / "modèl"


# --- fetching a model -------------------------------------------------------------------------


def part_files(kit, part="transformers"):
    prefix = f"models/tiny-phi3/{part}/"
    return {name.removeprefix(prefix): entry["sha256"] for name, entry in kit.files.items() if name.startswith(prefix)}


def hashes(folder):
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


WEIGHTS = "/models/tiny-phi3/transformers/model.safetensors"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_dropped_connection_is_taken_up_where_it_broke(built, tmp_path, ranges):
    log = []
    with web_server(built, {WEIGHTS: 5000}, ranges, log=log) as url:
        kit = read_kit(url)
        assert kit.models() == ["tiny-phi3"]
        kit.fetch("tiny-phi3", "transformers", tmp_path)
    assert hashes(tmp_path) == part_files(kit)
    assert [header for path, header in log if path == WEIGHTS] == [None, "bytes=5000-"]


@pytest.mark.parametrize("over_http", [False, True])
def test_what_an_interrupted_fetch_left_is_used(built, tmp_path, over_http):
    whole, half, log = tmp_path / "config.json", tmp_path / "model.safetensors.part", []
    shutil.copy(built / "models/tiny-phi3/transformers/config.json", whole)
    before = whole.stat().st_mtime_ns
    half.write_bytes((built / WEIGHTS[1:]).read_bytes()[:7000])
    with web_server(built, log=log) if over_http else contextlib.nullcontext(str(built)) as address:
        kit = read_kit(address)
        kit.fetch("tiny-phi3", "transformers", tmp_path)
    assert hashes(tmp_path) == part_files(kit)
    assert whole.stat().st_mtime_ns == before
    if over_http:
        assert [header for path, header in log if path == WEIGHTS] == ["bytes=7000-"]
        assert not [path for path, _ in log if path.endswith("/config.json")]


@pytest.mark.parametrize("half", [b"of another kit", b"x" * 10_000_000])
def test_half_a_file_of_another_kit_is_thrown_away(built, tmp_path, half):
    (tmp_path / "model.safetensors.part").write_bytes(half)
    with web_server(built) as url:
        kit = read_kit(url)
        kit.fetch("tiny-phi3", "transformers", tmp_path)
    assert hashes(tmp_path) == part_files(kit)


def test_a_file_with_another_sha256_is_named_and_not_kept(small, tmp_path):
    data = bytearray((small / WEIGHTS[1:]).read_bytes())
    data[-1] ^= 1
    (small / WEIGHTS[1:]).write_bytes(data)
    target = tmp_path / "model"
    target.mkdir()
    says = r"model\.safetensors of the kit .* is not as it was built, and was not used\."
    with web_server(small) as url, pytest.raises(CourseError, match=says):
        read_kit(url).fetch("tiny-phi3", "transformers", target)
    assert not list(target.glob("model.safetensors*"))


def test_a_kit_that_is_gone_is_an_error_after_some_tries_and_what_came_stays(built, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.kit.TRIES", 3)
    log = []
    with web_server(built, {WEIGHTS: 5000}, log=log, leaves=True) as url:
        says = r"model\.safetensors of the kit .* could not be read: .*what is here stays"
        with pytest.raises(CourseError, match=says):
            read_kit(url).fetch("tiny-phi3", "transformers", tmp_path)
    assert (tmp_path / "model.safetensors.part").stat().st_size == 5000
    assert [header for path, header in log if path == WEIGHTS] == [None] + ["bytes=5000-"] * 3


def test_a_model_that_the_kit_lacks_is_an_error_that_names_what_it_has(built, tmp_path):
    kit = read_kit(str(built))
    assert kit.receipt("smollm2-135m", "onnx") is None
    assert kit.receipt("tiny-phi3", "onnx")["files"].keys() == part_files(kit, "onnx").keys()
    with pytest.raises(CourseError, match=r"does not have smollm2-135m \(onnx\)\. It has tiny-phi3; build it with:"):
        kit.fetch("smollm2-135m", "onnx", tmp_path)


# --- COURSE_KIT -------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "says"), [
    ("http://127.0.0.1:9", r"The kit http://127.0.0.1:9 has no answer: .+\. Check the address"),
    ("http://no-such-host.invalid:8750/", "has no answer: "),
    ("no/such/folder", "is no kit: it has no manifest.json. Name what `kit serve` printed"),
    ("192.168.1.5:8750", "is no kit: it has no manifest.json. Name what `kit serve` printed, such as http://192.168"),
    ("ftp://kit", "ftp://kit is no address that a kit is read from. Set COURSE_KIT to a URL"),
    ("pyproject.toml", "is no kit: "),
    ("http://", "http:// is no address that a kit is read from"),
    ("http://[::1", "is no address that a kit is read from"),
    ("http://host:port", "is no address that a kit is read from"),
    ("http://ann:sesame@192.168.1.5:8750", "http://192.168.1.5:8750 is no address .* without a name or a password"),
    ("~nobody-of-that-name/kit", "is no address that a kit is read from"),
])
def test_an_address_that_is_no_kit_is_an_error_that_says_what_one_looks_like(value, says, monkeypatch):
    monkeypatch.setenv("COURSE_KIT", value)
    with pytest.raises(CourseError, match=says):
        open_kit()


def _manifest(name="a", size=1, version=1, models=(), complete=True):
    return json.dumps({"format": version, "complete": complete, "models": models, "platforms": [], "pythons": [],
                       "files": {name: {"size": size, "sha256": "0" * 64}}}).encode()


@pytest.mark.parametrize(("answer", "says"), [
    (b"<!DOCTYPE html><title>Sign in</title>", "answers with a web page instead of a kit's manifest.json"),
    (b"{", "is broken"), (b"[]", "is broken"), (b'{"files": {}}', "is broken"), (b"\xff", "is broken"),
    (b"[" * 200_000, "is broken"), (_manifest(size=1.5), "is broken"), (_manifest(size=10**400), "is broken"),
    (_manifest(name="..\\x"), "is broken"), (_manifest(name="a\nb"), "is broken"),
    (_manifest(models=["x; touch pwned"]), "is broken"), (_manifest(complete="no"), "is broken"),
    (_manifest(complete=False), "is not finished"), (_manifest(version=99), "was built by a newer version")])
def test_an_answer_that_is_no_manifest_is_an_error(answer, says, tmp_path, monkeypatch):
    with web_server(tmp_path, answer=answer) as url:
        monkeypatch.setenv("COURSE_KIT", url)
        with pytest.raises(CourseError, match=says):
            open_kit()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a\\..\\x", "C:x", "a//b", ".", "a/./b", "", "x\0"])
def test_a_manifest_that_leads_out_of_a_folder_is_refused(small, name):
    change_manifest(small, lambda manifest: manifest["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(CourseError, match="is broken"):
        read_kit(str(small))


def test_a_kit_of_a_newer_course_is_refused(small):
    change_manifest(small, lambda manifest: manifest.update(format=2))
    with pytest.raises(CourseError, match=r"was built by a newer version of the course\. Take the course from it, too"):
        read_kit(str(small))


def test_no_course_kit_is_no_kit_and_a_relative_one_starts_at_the_courses_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("COURSE_KIT", raising=False)
    assert open_kit() is None
    monkeypatch.setenv("COURSE_KIT", "")
    assert open_kit() is None
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CourseError) as error:
        read_kit("build/no kit here")
    assert str(ROOT / "build" / "no kit here") in error.value.what


def test_the_address_line_of_a_browser_will_do(built):
    with web_server(built) as url:
        for address in (url + "/", url + "/index.html", url.replace("http", "HTTP") + "/manifest.json?x#y"):
            assert read_kit(address).address == url


@pytest.mark.parametrize(("url", "local"), [
    ("http://192.168.1.5:8750", True), ("http://10.0.0.1", True), ("http://127.0.0.1", True),
    ("http://[fe80::1]", True),
    ("http://teacher:8750", True), ("http://teacher.local", True), ("https://kits.example.org", False),
    ("http://8.8.8.8", False)])
def test_a_kit_in_the_room_is_asked_without_the_proxy(url, local):
    assert local_address(url) is local


