"""The one downloader: when it asks again, where it goes on, and what it does not keep.

Run: python -m helpers test tests/helpers/test_download.py
"""

import hashlib
import random
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError
from support import ROOT
from support.in_process import download_here
from support.web_server import web_server

from helpers.files import sha256
from helpers.models.download import TRIES, ContentError, Download, File, retried, seconds_to_wait

CONTENT = {"big": random.Random(1).randbytes(200_000), "small.json": b"{}", "deep/er/d.txt": b"d"}
RATE = {"RateLimit": '"api";r=0;t=55'}


@pytest.mark.parametrize(("status", "attempt", "headers", "seconds"), [
    # What a server asks for is respected, at every attempt, and capped.
    (429, 1, {"Retry-After": "7"}, 7), (429, 4, {"Retry-After": "7"}, 7), (503, 2, {"Retry-After": "0"}, 0),
    (429, 1, {"Retry-After": "3600"}, 60), (429, 1, RATE, 55), (429, 3, RATE | {"Retry-After": "9"}, 9),
    # Where it does not say, twice as long each time.
    (429, 1, {}, 1), (500, 2, {}, 2), (502, 3, {}, 4), (504, 4, {}, 8), (408, 1, {}, 1),
    (503, 2, {"Retry-After": "Wed, 21 Oct 2037 07:28:00 GMT"}, 2), (503, 1, {"Retry-After": "-5"}, 1),
    # A connection that broke.
    (None, 1, {}, 1), (None, 4, {}, 8),
    # No more than five times.
    (429, 5, {"Retry-After": "7"}, None), (500, 5, {}, None), (None, 5, {}, None), (503, 6, {}, None),
    # What another try does not change.
    (400, 1, {}, None), (401, 1, {}, None), (403, 1, {"Retry-After": "7"}, None), (404, 1, {}, None),
    (416, 1, {}, None), (501, 1, {}, None)])
def test_when_a_request_is_made_again(status, attempt, headers, seconds):
    assert seconds_to_wait(status, attempt, httpx.Headers(headers)) == seconds


def answer(status, **headers):
    return HfHubHTTPError("no", response=httpx.Response(status, headers=headers, request=httpx.Request("GET", "x:/")))


def calls(*outcomes):
    """Return a function that raises or returns these, one a call."""
    left = list(outcomes)

    def call():
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return call


def test_a_call_is_made_again_as_the_policy_says(monkeypatch, capsys):
    pauses = download_here(monkeypatch)
    assert retried(calls(answer(429, **{"Retry-After": "7"}), answer(500), httpx.ReadError("reset"), "good"),
                   (httpx.ReadError,)) == "good"
    assert pauses == [7, 2, 4]
    assert capsys.readouterr().out.splitlines() == ["Busy: the next try is in 7 s", "Busy: the next try is in 2 s"]
    for final in (httpx.ConnectError("gone"), answer(404), answer(401)):  # http_get has tried again itself
        with pytest.raises(type(final)):
            retried(calls(final), (httpx.ReadError,))
    assert pauses == [7, 2, 4]


def test_a_call_that_brings_something_is_no_failure(monkeypatch):
    pauses, size = download_here(monkeypatch), [0]

    def call():
        size[0] += 100 if size[0] < 1000 else 0
        raise httpx.ReadError("reset")

    with pytest.raises(httpx.ReadError):
        retried(call, (httpx.ReadError,), lambda: size[0])
    assert size == [1000]
    assert pauses == [1] * 10 + [2, 4, 8]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Return a folder that a web server may offer, and the pauses that nobody waits for."""
    for name, content in CONTENT.items():
        (tmp_path / "web" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "web" / name).write_bytes(content)
    return tmp_path / "web", download_here(monkeypatch)


def listed(url, *names):
    return {name: File(f"{url}/{name}", len(CONTENT[name]), hashlib.sha256(CONTENT[name]).hexdigest())
            for name in names or CONTENT}


def download(url, tmp_path, *names, finished="none"):
    (tmp_path / "got").mkdir(exist_ok=True)
    return Download(listed(url, *names), tmp_path / "got", tmp_path / finished)


def half_of(download, name, content):
    path = download.folder / f"{name}.{download.files[name].sha256[:12]}.incomplete"
    path.write_bytes(content)
    return path


def got(tmp_path):
    return {path.relative_to(tmp_path / "got").as_posix(): path.read_bytes()
            for path in (tmp_path / "got").rglob("*") if path.is_file()}


def test_files_arrive_over_http_or_from_a_folder_and_are_listed(served, tmp_path, capsys):
    web, _ = served
    with web_server(web) as url:
        for place in (url, str(web)):
            one = download(place, tmp_path)
            assert one.missing(one.files) == 200_003
            one.fetch(one.files)
            assert got(tmp_path) == CONTENT
            assert one.missing(one.files) == 0
            assert one.sha256 == {name: sha256(web / name) for name in CONTENT}
            assert "Progress 200003 of 200003" in capsys.readouterr().out
            for name in CONTENT:
                (tmp_path / "got" / name).unlink()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_goes_on_where_it_stopped(served, tmp_path, ranges):
    web, pauses = served
    log = []
    with web_server(web, {"/big": 70_000}, ranges, log=log) as url:
        download(url, tmp_path, "big").fetch(["big"])
    assert got(tmp_path) == {"big": CONTENT["big"]}
    assert log == [("/big", None), ("/big", "bytes=65536-")]
    assert pauses == [1]


@pytest.mark.parametrize("over_http", [True, False])
def test_half_a_file_is_completed(served, tmp_path, over_http):
    web, _ = served
    log = []
    with web_server(web, log=log) as url:
        one = download(url if over_http else str(web), tmp_path, "big")
        half_of(one, "big", CONTENT["big"][:7000])
        assert one.missing(["big"]) == 193_000
        one.fetch(["big"])
    assert got(tmp_path) == {"big": CONTENT["big"]}
    assert log == ([("/big", "bytes=7000-")] if over_http else [])


@pytest.mark.parametrize("half", [b"not of this file", b"?", CONTENT["big"] + b"and more", b"x" * 200_000])
@pytest.mark.parametrize("over_http", [True, False])
def test_half_a_file_that_is_wrong_or_longer_than_the_file_is_thrown_away(served, tmp_path, half, over_http):
    web, _ = served
    log = []
    with web_server(web, log=log) as url:
        one = download(url if over_http else str(web), tmp_path, "big")
        half_of(one, "big", half)
        one.fetch(["big"])
    assert got(tmp_path) == {"big": CONTENT["big"]}
    assert one.sha256["big"] == sha256(web / "big")
    if len(half) > 200_000:
        assert log == [("/big", None)] * over_http  # not asked for what lies behind its end


def test_a_file_that_arrived_and_was_not_checked_is_not_asked_for(served, tmp_path):
    web, _ = served
    log = []
    with web_server(web, log=log) as url:
        one = download(url, tmp_path, "big")
        half_of(one, "big", CONTENT["big"])
        one.fetch(["big"])
    assert log == []
    assert got(tmp_path) == {"big": CONTENT["big"]}


def test_how_far_a_download_is_is_printed_for_a_bar(served, tmp_path, monkeypatch, capsys):
    web, _ = served
    ticks = iter(range(100))
    clock = SimpleNamespace(monotonic=lambda: next(ticks), sleep=None)
    monkeypatch.setattr("helpers.models.download.time", clock)
    with web_server(web) as url:
        one = download(url, tmp_path)
        half_of(one, "big", CONTENT["big"][:70_000])
        one.fetch(["small.json", "big"])
        steps = [2, 70_002, 135_538, 200_002]  # of the client's block, and no less than what was here
        assert capsys.readouterr().out.splitlines() == [f"Progress {done} of 200002" for done in steps]
        one.fetch(["deep/er/d.txt"], bar=False)
        assert capsys.readouterr().out == ""
        clock.monotonic = lambda: 100  # no time passes
        for path in (tmp_path / "got").iterdir():
            if path.is_file():
                path.unlink()
        one = download(url, tmp_path)
        one.fetch(["big", "small.json"])
        assert capsys.readouterr().out.splitlines() == ["Progress 0 of 200002", "Progress 200002 of 200002"]


def test_a_file_with_another_hash_is_not_kept(served, tmp_path):
    web, _ = served
    (web / "big").write_bytes(CONTENT["big"][:-1] + b"?")
    with web_server(web) as url:
        one = download(url, tmp_path, "small.json", "big")
        with pytest.raises(ContentError):
            one.fetch(one.files)
    assert one.current == "big"
    assert got(tmp_path) == {"small.json": b"{}"}
    assert set(one.sha256) == {"small.json"}


def test_where_there_is_gits_hash_alone_it_counts(served, tmp_path):
    web, _ = served
    blob = hashlib.sha1(b"blob 2\0{}").hexdigest()
    for digest, right in ((blob, True), ("0" * 40, False)):
        assert bool(File("", 2, None, digest).read_hash(web / "small.json")) == right
    assert File("", 2, None, blob).read_hash(web / "small.json") == sha256(web / "small.json")
    assert File("", 3, None, blob).read_hash(web / "small.json") is None
    assert File("", 2, None, blob).read_hash(web / "none") is None


def test_what_is_here_or_finished_already_does_not_come_again(served, tmp_path):
    web, _ = served
    log = []
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "big").write_bytes(CONTENT["big"])
    (tmp_path / "finished" / "small.json").write_bytes(b"[]")  # damaged
    with web_server(web, log=log) as url:
        one = download(url, tmp_path, "big", "small.json", finished="finished")
        one.fetch(one.files)
        one.fetch(one.files)
    assert got(tmp_path) == {"small.json": b"{}"}
    assert [path for path, _ in log] == ["/small.json"]
    assert [one.path(name).parent.name for name in one.files] == ["finished", "got"]


def test_a_busy_server_is_asked_as_often_as_the_policy_says_and_no_more(served, tmp_path):
    web, pauses = served
    log, busy = [], {"/big": [(429, "7")] * 2 + [(503, "3")], "/small.json": [(429, "2")] * 50}
    with web_server(web, busy=busy, log=log) as url:
        one = download(url, tmp_path, "big", "small.json")
        one.fetch(["big"])
        assert pauses == [7, 7, 3]
        with pytest.raises(HfHubHTTPError) as refusal:
            one.fetch(["small.json"])
    assert refusal.value.response.status_code == 429
    assert len(log) == 4 + TRIES
    assert pauses[3:] == [2] * (TRIES - 1)


@pytest.mark.parametrize(("cuts", "ranges"), [({}, [None]), ({"/big": 70_000}, [None, "bytes=65536-"])])
def test_a_network_that_is_lost_is_said_after_a_few_seconds_and_what_came_stays(served, tmp_path, cuts, ranges):
    web, pauses = served
    log = []
    with web_server(web, cuts, log=log, leaves=True, gone=[] if cuts else ["/big"]) as url, \
            pytest.raises(httpx.RemoteProtocolError):
        download(url, tmp_path, "big").fetch(["big"])
    # The client's own tries, a second apart, and nobody's around them.
    assert [asked for _, asked in log] == ranges + ranges[-1:] * (6 - len(ranges))
    assert pauses == [1] * 5
    (half,) = (tmp_path / "got").iterdir()
    assert half.stat().st_size == (65_536 if cuts else 0)


def test_a_page_in_place_of_a_file_does_no_harm_to_the_next_try(served, tmp_path):
    web, _ = served
    with web_server(web, answer=b"<title>Welcome to Hotel WiFi</title>") as url, \
            pytest.raises(OSError, match="Consistency check failed"):
        download(url, tmp_path, "big").fetch(["big"])
    with web_server(web) as url:
        download(url, tmp_path, "big").fetch(["big"])
    assert got(tmp_path) == {"big": CONTENT["big"]}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own account of a process")
def test_memory_does_not_grow_with_the_size_of_a_file(tmp_path):
    code = ("import sys; from pathlib import Path; from helpers.models.download import Download, File\n"
            "url, size, folder, digest = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]\n"
            "Download({'big': File(url, size, digest)}, folder, folder).fetch(['big'])\n"
            "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])")
    peaks = []
    for size in (1_000, 200_000_000):
        with (tmp_path / "big").open("wb") as file:
            file.truncate(size)
        digest = sha256(tmp_path / "big")
        got = tmp_path / str(size)
        got.mkdir()
        with web_server(tmp_path) as url:
            result = subprocess.run([sys.executable, "-c", code, f"{url}/big", str(size), got, digest], cwd=ROOT,
                                    capture_output=True, text=True, env={"HF_HUB_OFFLINE": "0", "PATH": ""})
        assert result.returncode == 0, result.stderr
        assert sha256(got / "big") == digest
        peaks.append(int(result.stdout.split()[-1]) / 1000)
    assert peaks[1] - peaks[0] < 60  # megabytes, of 200 more
