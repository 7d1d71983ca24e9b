"""The one downloader: when it asks again, where it goes on, and what it does not keep.

Run: python -m helpers test tests/services/test_download.py
"""

import hashlib
import random
import ssl
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError
from support.in_process import download_here
from support.web_server import web_server

from helpers.files import sha256
from helpers.models.download import (
    BROKEN,
    TRIES,
    ContentError,
    Download,
    File,
    LengthError,
    Patience,
    Silence,
    patience,
    retried,
    seconds_to_wait,
)

CONTENT = {"big": random.Random(1).randbytes(200_000), "small.json": b"{}", "deep/er/d.txt": b"d"}
RATE = {"RateLimit": '"api";r=0;t=55'}


@pytest.mark.parametrize(
    ("status", "attempt", "headers", "seconds"),
    [
        # What a server asks for is respected, at every attempt, and capped.
        (429, 1, {"Retry-After": "7"}, 7),
        (429, 4, {"Retry-After": "7"}, 7),
        (503, 2, {"Retry-After": "0"}, 0),
        (429, 1, {"Retry-After": "3600"}, 60),
        (429, 1, RATE, 55),
        (429, 3, RATE | {"Retry-After": "9"}, 9),
        # Where it does not say, twice as long each time.
        (429, 1, {}, 1),
        (500, 2, {}, 2),
        (502, 3, {}, 4),
        (504, 4, {}, 8),
        (408, 1, {}, 1),
        (503, 2, {"Retry-After": "Wed, 21 Oct 2037 07:28:00 GMT"}, 2),
        (503, 1, {"Retry-After": "-5"}, 1),
        # A connection that broke.
        (None, 1, {}, 1),
        (None, 4, {}, 8),
        # No more than five times.
        (429, 5, {"Retry-After": "7"}, None),
        (500, 5, {}, None),
        (None, 5, {}, None),
        (503, 6, {}, None),
        # What another try does not change.
        (400, 1, {}, None),
        (401, 1, {}, None),
        (403, 1, {"Retry-After": "7"}, None),
        (404, 1, {}, None),
        (416, 1, {}, None),
        (501, 1, {}, None),
    ],
)
def test_when_a_request_is_made_again(status, attempt, headers, seconds):
    assert seconds_to_wait(status, attempt, httpx.Headers(headers)) == seconds


@pytest.mark.parametrize(
    ("status", "failures", "silent", "lost", "seconds"),
    [
        # Refused at once, as where a name is not found: asked after 0, 1 and 3 seconds, and said after
        # 7.
        (None, 1, 0, 9, 1),
        (None, 2, 1, 9, 2),
        (None, 3, 3, 9, 4),
        (None, 4, 7, 9, None),
        # Still for 6 seconds, and one more connection.
        (None, 1, 6, 9, 1),
        (None, 2, 9, 9, None),
        (None, 1, 7.9, 9, 1),
        (None, 1, 8, 9, None),
        # Whoever has set a longer time waits for it.
        (None, 1, 60, 90, 1),
        (None, 2, 89, 90, None),
        # A server that answers is there, however long it is busy.
        (503, 1, 30, 9, 1),
        (429, 4, 100, 9, 8),
    ],
)
def test_a_network_that_is_lost_is_not_waited_for(status, failures, silent, lost, seconds):
    assert seconds_to_wait(status, failures, httpx.Headers(), silent, lost) == seconds


@pytest.mark.parametrize(
    ("asked", "limits"),
    [
        (None, (5, 8)),
        ("", (5, 8)),
        ("soon", (5, 8)),
        ("0", (5, 8)),
        ("-5", (5, 8)),
        ("10", (10, 15)),
        ("60", (60, 90)),
        ("2", (2, 8)),
    ],
)
def test_how_long_nothing_may_come_is_what_a_user_has_set(asked, limits):
    assert patience(asked) == limits
    assert patience(None).lost < 10


class Clock:
    """A clock that tests set; nobody sleeps by it."""

    def __init__(self):
        self.now, self.pauses = 0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    download_here(monkeypatch)
    clock = Clock()
    monkeypatch.setattr("helpers.models.download.time", clock)
    return clock


def answer(status, **headers):
    return HfHubHTTPError(
        "no", response=httpx.Response(status, headers=headers, request=httpx.Request("GET", "x:/"))
    )


def calls(*outcomes):
    """Return a function that raises or returns these, one a call."""
    left = list(outcomes)

    def call():
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return call


def refused_certificate():
    error = httpx.ConnectError("no")
    error.__cause__ = ssl.SSLCertVerificationError()
    error.__cause__.verify_message = "expired"
    return error


def test_a_call_is_made_again_as_the_policy_says(clock, capsys):
    assert (
        retried(
            calls(
                answer(429, **{"Retry-After": "7"}), answer(500), httpx.ReadError("reset"), "good"
            ),
            BROKEN,
            patience(None),
        )
        == "good"
    )
    assert clock.pauses == [7, 2, 4]
    assert capsys.readouterr().out.splitlines() == [
        "Busy: the next try is in 7 s",
        "Busy: the next try is in 2 s",
    ]
    for final in (
        answer(404),
        answer(401),
        refused_certificate(),
        httpx.ProxyError("no"),
        OSError("the disk's"),
    ):
        with pytest.raises(type(final)):
            retried(calls(final), BROKEN, patience(None))
    assert clock.pauses == [7, 2, 4]


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("refused"),
        httpx.ConnectError("Name or service not known"),
        httpx.RemoteProtocolError("cut"),
        httpx.ReadError("reset"),
    ],
)
def test_what_fails_at_once_is_said_within_ten_seconds(clock, error):
    with pytest.raises(type(error)):
        retried(calls(*[error] * 9), BROKEN, patience(None))
    assert clock.pauses == [1, 2, 4]
    assert clock.now < 10


def test_a_connection_that_is_still_is_made_anew_once_and_then_given_up(clock):
    def still():
        clock.now += 6  # the read timeout
        raise httpx.ReadTimeout("still")

    with pytest.raises(httpx.ReadTimeout):
        retried(still, BROKEN, Patience(6, 9))
    assert clock.pauses == [1]


def test_a_name_look_up_that_never_ends_is_left(clock):
    ready, ends = threading.Event(), threading.Event()

    def look_up():
        ready.set()
        ends.wait()

    def later():
        ready.wait()
        clock.now = 9

    threading.Thread(target=later).start()
    with pytest.raises(httpx.ReadTimeout, match="nothing came for 8 s"):
        retried(look_up, BROKEN, patience(None))
    ends.set()
    assert clock.pauses == []


def test_a_byte_every_few_seconds_is_slow_and_not_lost(clock):
    silence, looked = Silence(), []

    def trickle():
        for _ in range(20):
            clock.now += 4
            looked.append(silence.seconds())
            silence.heard()
        return "all"

    assert retried(trickle, BROKEN, patience(None), silence) == "all"
    assert set(looked) == {4}


def test_what_the_disk_takes_is_no_silence(clock):
    silence = Silence()
    clock.now = 3
    with silence.paused():
        clock.now = 100
        assert silence.seconds() == 0
    assert silence.seconds() == 0
    clock.now = 102
    assert silence.seconds() == 2


def test_a_server_that_is_busy_for_long_is_not_lost(clock):
    assert (
        retried(
            calls(answer(503, **{"Retry-After": "60"}), httpx.ConnectError("restarts"), "good"),
            BROKEN,
            patience(None),
        )
        == "good"
    )
    assert clock.pauses == [60, 2]


def test_a_call_that_brings_something_is_no_failure(clock):
    silence = Silence()

    def call():
        if silence.blocks < 10:
            silence.blocks += 1
            silence.heard()
        raise httpx.ReadError("reset")

    with pytest.raises(httpx.ReadError):
        retried(call, BROKEN, patience(None), silence)
    assert clock.pauses == [1] * 10 + [2, 4]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Return a folder that a web server may offer, and the pauses that nobody waits for."""
    for name, content in CONTENT.items():
        (tmp_path / "web" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "web" / name).write_bytes(content)
    return tmp_path / "web", download_here(monkeypatch)


def listed(url, *names):
    return {
        name: File(f"{url}/{name}", len(CONTENT[name]), hashlib.sha256(CONTENT[name]).hexdigest())
        for name in names or CONTENT
    }


def download(url, tmp_path, *names, finished="none"):
    (tmp_path / "got").mkdir(exist_ok=True)
    return Download(listed(url, *names), tmp_path / "got", tmp_path / finished)


def half_of(download, name, content):
    path = download.folder / f"{name}.{download.files[name].sha256[:12]}.incomplete"
    path.write_bytes(content)
    return path


def got(tmp_path):
    return {
        path.relative_to(tmp_path / "got").as_posix(): path.read_bytes()
        for path in (tmp_path / "got").rglob("*")
        if path.is_file()
    }


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
    assert log == [("/big", None), ("/big", "bytes=70000-")]
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


@pytest.mark.parametrize(
    "half", [b"not of this file", b"?", CONTENT["big"] + b"and more", b"x" * 200_000]
)
@pytest.mark.parametrize("over_http", [True, False])
def test_half_a_file_that_is_wrong_or_longer_than_the_file_is_thrown_away(
    served, tmp_path, half, over_http
):
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
    one = download("", tmp_path, "small.json", "big")
    clock = Clock()
    monkeypatch.setattr("helpers.models.download.time", clock)
    for now, done in ((1, 5), (1.1, 6), (1.3, 7), (1.4, 8), (1.4, 10)):  # the last is all of it
        clock.now = now
        one._show(done, 10)
    assert capsys.readouterr().out.splitlines() == [f"Progress {done} of 10" for done in (5, 7, 10)]
    monkeypatch.setattr("helpers.models.download.time", time)
    with web_server(web) as url:
        one = download(url, tmp_path)
        half_of(one, "big", CONTENT["big"][:70_000])
        one.fetch(["small.json", "big"])
        steps = [int(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
        assert steps == sorted(steps)
        assert steps[0] == 2
        assert all(step > 70_002 for step in steps[1:])  # no less than what was here
        assert steps[-1] == 200_002
        one.fetch(["deep/er/d.txt"], bar=False)
        assert capsys.readouterr().out == ""


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
    log = []
    busy = {"/big": [(429, "7")] * 2 + [(503, "3")], "/small.json": [(429, "2")] * 50}
    with web_server(web, busy=busy, log=log) as url:
        one = download(url, tmp_path, "big", "small.json")
        one.fetch(["big"])
        assert pauses == [7, 7, 3]
        with pytest.raises(HfHubHTTPError) as refusal:
            one.fetch(["small.json"])
    assert refusal.value.response.status_code == 429
    assert len(log) == 4 + TRIES
    assert pauses[3:] == [2] * (TRIES - 1)


@pytest.mark.parametrize(
    ("cuts", "ranges"), [({}, [None]), ({"/big": 70_000}, [None, "bytes=70000-"])]
)
def test_a_network_that_is_lost_is_said_after_a_few_seconds_and_what_came_stays(
    served, tmp_path, monkeypatch, cuts, ranges
):
    web, _ = served
    log, pauses = [], []
    clock = SimpleNamespace(sleep=pauses.append, monotonic=lambda: time.monotonic() + sum(pauses))
    monkeypatch.setattr("helpers.models.download.time", clock)
    with (
        web_server(web, cuts, log=log, leaves=True, gone=[] if cuts else ["/big"]) as url,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        download(url, tmp_path, "big").fetch(["big"])
    # After the last byte: at once, and after 1, 3 and 7 seconds. Nobody else's tries are around
    # them.
    assert [asked for _, asked in log] == ranges + ranges[-1:] * (4 - len(ranges))
    assert pauses == [1, 2, 4]
    assert [path.stat().st_size for path in (tmp_path / "got").iterdir()] == (
        [70_000] if cuts else []
    )
    with web_server(web) as url:
        download(url, tmp_path, "big").fetch(["big"])
    assert got(tmp_path) == {"big": CONTENT["big"]}


@pytest.mark.parametrize(("asked", "seconds"), [(None, 5), ("45", 45)])
def test_a_connection_waits_as_long_as_a_user_has_set(
    served, tmp_path, monkeypatch, asked, seconds
):
    web, _ = served
    monkeypatch.delenv("HF_HUB_DOWNLOAD_TIMEOUT", raising=False)
    if asked:
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", asked)
    timeouts = []
    get_session().event_hooks["request"].append(
        lambda request: timeouts.append(request.extensions["timeout"])
    )
    with web_server(web) as url:
        download(url, tmp_path, "big").fetch(["big"])
    assert timeouts == [dict.fromkeys(("connect", "read", "write", "pool"), seconds)]


@pytest.mark.parametrize("half", [0, 150_000])
def test_a_page_in_place_of_a_file_does_no_harm_to_the_next_try(served, tmp_path, half):
    web, _ = served
    (tmp_path / "portal").mkdir()
    (tmp_path / "portal" / "big").write_bytes(b"<title>Welcome to Hotel WiFi</title>")
    for place, options in (
        (web, {"answer": b"<title>Welcome to Hotel WiFi</title>"}),
        # Without its length, and with it.
        (tmp_path / "portal", {"ranges": False}),
    ):
        with web_server(place, **options) as url, pytest.raises(LengthError):
            one = download(url, tmp_path, "big")
            if half:
                half_of(one, "big", CONTENT["big"][:half])
            one.fetch(["big"])
    log = []
    with web_server(web, log=log) as url:
        download(url, tmp_path, "big").fetch(["big"])
    assert got(tmp_path) == {"big": CONTENT["big"]}
    if half:
        assert log == [("/big", "bytes=150000-")]  # nor to what was here before
