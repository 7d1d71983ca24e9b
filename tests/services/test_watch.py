"""Load, dashboard and drift: the arithmetic by tables of cases, and a real server on loopback that is watched.

Run: python -m helpers test tests/services/test_watch.py
"""

import asyncio
import itertools
import json
import math
from concurrent.futures import Future

import httpx
import pytest
from bs4 import BeautifulSoup
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from support import refuses

from helpers.operations.load import Reply, RequestResult, count_outcomes, start_load
from helpers.servers import running
from helpers.show.dashboard import (
    Dashboard,
    add_increases,
    increase,
    quantile,
    read_figures,
    read_metrics,
    scrape,
    watch,
)
from helpers.show.drawing import draw_bars, draw_line
from helpers.show.drift import Band, chart_drift, judge, learn_band

INF, NAN = math.inf, math.nan
OK = ("slm_requests_total", ("outcome", "ok"))
BUSY = ("slm_requests_total", ("outcome", "busy"))
BEGUN = ("process_start_time_seconds",)


# --- two scrapes ------------------------------------------------------------------------------

SCRAPE = """\
# HELP slm_requests_total Requests that ended.
# TYPE slm_requests_total counter
slm_requests_total{outcome="ok"} 12.0
# TYPE slm_requests_created gauge
slm_requests_created{outcome="ok"} 1.7e9
# TYPE slm_request_seconds histogram
slm_request_seconds_bucket{le="0.5"} 8.0
slm_request_seconds_bucket{le="+Inf"} 12.0
slm_request_seconds_count 12.0
slm_request_seconds_sum 7.5
# TYPE slm_requests_running gauge
slm_requests_running 3.0
"""


def test_a_scrape_is_read_by_name_and_labels():
    samples = read_metrics(SCRAPE)
    assert samples[OK] == 12
    assert samples["slm_request_seconds_bucket", ("le", "+Inf")] == 12
    assert samples["slm_requests_running",] == 3


@pytest.mark.parametrize(
    ("before", "after", "grown"),
    [
        ({}, {}, {}),
        ({OK: 5}, {OK: 5}, {OK: 0}),
        ({OK: 5}, {OK: 12}, {OK: 7}),
        ({OK: 5}, {OK: 6, BUSY: 2}, {OK: 1, BUSY: 2}),  # an outcome that had not come before
        # A restart: a counter that fell, and then all of them began at 0, the one that did not fall as
        # well.
        ({OK: 5, BUSY: 1}, {OK: 3, BUSY: 4}, {OK: 3, BUSY: 4}),
        # A restart that no counter shows, since more has come since than there was before.
        ({BEGUN: 100.0, OK: 5}, {BEGUN: 160.0, OK: 9}, {OK: 9}),
        ({BEGUN: 100.0, OK: 5}, {BEGUN: 100.0, OK: 9}, {OK: 4}),
        # A gauge may fall: that is no restart, and no increase.
        ({OK: 5, ("slm_requests_running",): 3}, {OK: 6, ("slm_requests_running",): 0}, {OK: 1}),
    ],
)
def test_counters_grow_between_two_scrapes(before, after, grown):
    assert increase(before, after) == grown


def test_increases_add_up_over_a_restart():
    scrapes = [{OK: 5}, {OK: 9}, {OK: 2}, {OK: 3, BUSY: 1}]
    grown = [increase(before, after) for before, after in itertools.pairwise(scrapes)]
    assert add_increases(grown) == {OK: 4 + 2 + 1, BUSY: 1}
    assert add_increases([]) == {}


@pytest.mark.parametrize(
    ("share", "buckets", "value"),
    [
        (0.5, {}, NAN),  # the metric is missing
        (0.5, {1: 0, INF: 0}, NAN),  # nothing came
        (0.5, {INF: 4}, NAN),  # no bound at all
        (0.5, {1: 2, 2: 4}, NAN),  # no histogram: its last bound has to be infinite
        (0.5, {1: 10, 2: 10, INF: 10}, 0.5),  # inside the first bucket, from 0
        (0.5, {1: 0, 2: 10, INF: 10}, 1.5),  # inside the second
        (0.95, {1: 50, 2: 90, 4: 100, INF: 100}, 3.0),
        (0.9, {1: 50, 2: 90, 4: 100, INF: 100}, 2.0),  # just at a bound
        (0.99, {1: 5, 2: 6, INF: 10}, 2),  # beyond the last finite bound: that bound
        (0.0, {1: 0, 2: 3, INF: 3}, 1),
        (1.0, {1: 0, 2: 3, 4: 3, INF: 3}, 2),
        (0.5, {INF: 10, 2: 10, 1: 0}, 1.5),  # in any order
    ],
)
def test_a_quantile_is_prometheus_estimate(share, buckets, value):
    assert quantile(share, buckets) == pytest.approx(value, nan_ok=True)


def test_figures_of_a_window():
    grown = {
        OK: 6,
        BUSY: 2,
        ("slm_requests_total", ("outcome", "cancelled")): 2,
        ("slm_requests_total", ("outcome", "timeout")): 0,
        ("slm_prompt_tokens_total",): 90,
        ("slm_completion_tokens_total",): 48,
        ("slm_answer_tokens_sum",): 48,
        ("slm_answer_tokens_count",): 6,
        ("slm_request_seconds_bucket", ("le", "1.0")): 0,
        ("slm_request_seconds_bucket", ("le", "2.0")): 6,
        ("slm_request_seconds_bucket", ("le", "+Inf")): 6,
    }
    now = {
        ("slm_requests_running",): 3,
        ("slm_requests_waiting",): 1,
        ("slm_model_failed_version",): 9,
        ("slm_model_version", ("model", "slm"), ("version", "6")): 0,
        ("slm_model_version", ("model", "slm"), ("version", "7")): 1,
    }
    figures = read_figures(grown, now, 4.0)
    assert figures.outcomes == {"busy": 2, "cancelled": 2, "ok": 6}
    assert (
        figures.requests,
        figures.seconds,
        figures.prompt_tokens,
        figures.completion_tokens,
    ) == (10, 4, 90, 48)
    assert figures.answer_tokens == 8
    assert figures.refused_share == 2 / 8  # who left was not refused
    assert figures.request_seconds[0.5] == 1.5
    assert all(map(math.isnan, figures.first_token_seconds.values()))
    assert (figures.running, figures.waiting, figures.version, figures.failed_version) == (
        3,
        1,
        "7",
        "9",
    )


def test_figures_of_a_server_that_tells_nothing():
    figures = read_figures({}, {}, 1.0)
    assert (figures.requests, figures.outcomes, figures.version, figures.failed_version) == (
        0,
        {},
        "",
        "",
    )
    assert all(
        map(
            math.isnan,
            (figures.answer_tokens, figures.refused_share, figures.running, figures.waiting),
        )
    )


# --- the dashboard ----------------------------------------------------------------------------


def scrape_of(ok, running=0, begun=100.0, version="1"):
    return {
        BEGUN: begun,
        OK: ok,
        ("slm_requests_running",): running,
        ("slm_requests_waiting",): 0,
        ("slm_model_version", ("model", "slm"), ("version", version)): 1,
    }


def test_a_dashboard_counts_over_a_restart_and_says_that_nobody_answered():
    dashboard = Dashboard("The server", span=1.5)
    for at, now in enumerate(
        [
            scrape_of(10),
            scrape_of(14, 2),
            None,
            None,
            scrape_of(3, begun=103.0, version="2"),
            scrape_of(5, begun=103.0, version="2"),
        ]
    ):
        dashboard.add(float(at), now)
    assert dashboard.whole.requests == 4 + 3 + 2
    assert [point and point.requests for point in dashboard.points] == [4, None, None, 3, 2]
    assert dict(dashboard.states()) == {
        "serves": "version 2; 2 of 6 scrapes had no answer",
        "requests ended": "ok 9",
    }
    rows = {name: (value, points) for name, value, points in dashboard.rows()}
    assert rows["requests per second"][0] == "1.8"
    assert rows["requests running, at most"][0] == "2"


def test_a_dashboard_says_who_did_not_load_and_who_does_not_answer():
    dashboard = Dashboard("The server")
    dashboard.add(0.0, scrape_of(1) | {("slm_model_failed_version",): 4})
    assert dict(dashboard.states())["serves"] == "version 1; version 4 did not load"
    dashboard.add(1.0, None)
    assert dict(dashboard.states())["serves"].startswith("nobody answers")


def test_a_dashboard_that_has_seen_nothing_shows_dashes():
    dashboard = Dashboard("<The server>")
    dashboard.add(0.0, None)
    page = BeautifulSoup(dashboard._repr_html_(), "html.parser")
    assert page.caption.get_text() == "<The server>"
    assert "nan" not in page.get_text() + repr(dashboard)
    assert len(page.find_all("tr")) == 1 + len(dashboard.rows()) + len(dashboard.states())


@pytest.mark.parametrize(
    ("values", "path", "bars"),
    [
        ([], "", ""),
        ([NAN], "", " "),
        ([0], "M0.0 23.0h0.1", "▁"),
        ([0, 4], "M0.0 23.0h0.1L180.0 1.0", "▁█"),
        ([4, NAN, 4], "M0.0 1.0h0.1M180.0 1.0h0.1", "█ █"),  # a gap where nobody answered
    ],
)
def test_lines_and_bars(values, path, bars):
    svg = BeautifulSoup(draw_line(values, "a <name>"), "html.parser").svg
    assert svg.path["d"] == path
    assert svg["aria-label"].startswith("a <name>, over time")
    assert draw_bars(values) == bars


def test_bars_fit_a_line_and_keep_the_highest():
    bars = draw_bars([0.0] * 500 + [9.0] + [0.0] * 500)
    assert len(bars) <= 40
    assert bars.count("█") == 1


# --- the band ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "least", "band"),
    [
        # Mean 10, moving ranges 2: 10 +- 2.66 * 2.
        ([9, 11, 9, 11, 9, 11], 0, Band(10 - 5.32, 10, 10 + 5.32)),
        ([5, 5, 5, 5, 5, 5], 1, Band(4, 5, 6)),  # nothing changes: the least room
        ([0, 0, 0, 0, 0, 0], 0.1, Band(0, 0, 0.1)),  # no count and no share is below 0
        # An empty window teaches nothing.
        ([9, NAN, 11, 9, 11, 9, 11], 0, Band(10 - 5.32, 10, 10 + 5.32)),
    ],
)
def test_a_band_is_learned(values, least, band):
    learned = learn_band(values, least)
    assert (learned.low, learned.middle, learned.high) == pytest.approx(
        (band.low, band.middle, band.high)
    )


def test_a_band_needs_windows_in_which_something_happened():
    with refuses("few-windows"):
        learn_band([1, 2, 3, 4, 5, NAN, NAN], 0)


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(1.9, "below"), (2, "inside"), (3, "inside"), (4, "inside"), (4.1, "above"), (NAN, "empty")],
)
def test_a_value_is_judged(value, verdict):
    assert judge(value, Band(2, 3, 4)) == verdict


@pytest.mark.parametrize(
    ("then", "first"), [([5, 6, 5], None), ([5, 60, 5], 8), ([0, 60, 5], 7), ([NAN, NAN, 60], 9)]
)
def test_a_chart_names_the_first_window_outside(then, first):
    # The first window is far off itself; it made the band, so it is not judged.
    chart = chart_drift("tokens", [9, 5, 5, 5, 5, 5, *then], learned=6, least=1)
    assert chart.first_outside == first
    page = BeautifulSoup(chart._repr_html_(), "html.parser")
    assert page.figcaption.get_text() == page.svg["aria-label"] == chart.caption
    assert len(page.find_all("circle")) == sum(not math.isnan(value) for value in chart.values)
    assert len(repr(chart).splitlines()) == 4 + len(chart.values)
    assert ("no window leaves it" in chart.caption) == (first is None)


# --- the load ---------------------------------------------------------------------------------


def event(**chunk):
    return f"data: {json.dumps(chunk)}"


HEAD = event(choices=[{"delta": {"role": "assistant", "content": ""}}])
TEXT = event(choices=[{"delta": {"content": "a"}}])
END = event(choices=[{"delta": {}, "finish_reason": "stop"}], usage=None)
USAGE, DONE = event(choices=[], usage={"completion_tokens": 3}), "data: [DONE]"


@pytest.mark.parametrize(
    ("lines", "outcome", "first", "tokens"),
    [
        ([], "broken off", None, 0),
        (
            [HEAD, "", TEXT, TEXT, END, USAGE, DONE],
            "ok",
            2,
            3,
        ),  # the first text, not the first chunk
        ([HEAD, TEXT, TEXT], "broken off", 1, 0),
        ([HEAD, TEXT, event(error={"code": "failed"})], "failed", 1, 0),
        ([": a comment", HEAD, END, DONE], "ok", None, 0),
    ],
)
def test_a_stream_is_read(lines, outcome, first, tokens):
    reply = Reply()
    for seconds, line in enumerate(lines):
        reply.read_line(line, seconds)
    assert (reply.outcome, reply.first_token_seconds, reply.tokens) == (outcome, first, tokens)


def test_outcomes_are_counted():
    rows = [
        RequestResult(0, 1.0, None, 4, 200, "ok"),
        RequestResult(0, 3.0, None, 6, 200, "ok"),
        RequestResult(1, 0.01, None, 0, 429, "busy"),
    ]
    assert count_outcomes(rows) == [("busy", 1, 0, "0.01"), ("ok", 2, 10, "2.00")]
    assert count_outcomes([]) == []


class Small:
    """A chat server of a few lines: a token per word, as many at once as come, and figures by the real client."""

    def __init__(self):
        self.app = FastAPI()
        self.registry = CollectorRegistry()
        self.most = 0
        within = {"registry": self.registry}
        self.requests = Counter("slm_requests", "By outcome.", ["outcome"], **within)
        self.tokens = Counter("slm_completion_tokens", "Of answers.", **within)
        self.answer_tokens = Histogram(
            "slm_answer_tokens", "Of an answer.", buckets=[1, 2, 4, 8], **within
        )
        self.seconds = Histogram("slm_request_seconds", "Of a request.", **within)
        self.running = Gauge("slm_requests_running", "Now.", **within)
        Gauge("slm_model_version", "Serves.", ["model", "version"], **within).labels(
            "small", "3"
        ).set(1)
        self.app.get("/metrics")(lambda: Response(generate_latest(self.registry)))
        self.app.post("/v1/chat/completions")(self.answer)

    async def answer(self, request: Request):
        body = await request.json()
        if body["max_tokens"] < 1:
            self.requests.labels("invalid_value").inc()
            return JSONResponse({"error": {"code": "invalid_value"}}, 400)
        self.running.inc()
        self.most = max(self.most, int(self.running._value.get()))
        if not body.get("stream"):
            await asyncio.sleep(0.01)
            self.end(body["max_tokens"])
            return {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
        return StreamingResponse(self.stream(body), media_type="text/event-stream")

    async def stream(self, body):
        for _ in range(body["max_tokens"]):
            await asyncio.sleep(0.005)
            yield f"{TEXT}\n\n"
            if body.get("user") == "breaks":
                raise OSError
        self.end(body["max_tokens"])
        if body["stream_options"]["include_usage"]:
            yield event(choices=[], usage={"completion_tokens": body["max_tokens"]}) + "\n\n"
        yield f"{DONE}\n\n"

    def end(self, tokens):
        self.running.dec()
        self.requests.labels("ok").inc()
        self.tokens.inc(tokens)
        self.answer_tokens.observe(tokens)
        self.seconds.observe(0.02)


@pytest.fixture
def small():
    small = Small()
    with running(small.app) as small.address:
        yield small


def body(max_tokens=2, **more):
    return {"messages": [], "max_tokens": max_tokens} | more


def test_clients_share_the_requests_and_each_row_is_what_one_saw(small):
    asked = [body(stream=True)] * 6 + [body(4)] * 6 + [body(0)] * 2
    rows = start_load(small.address, asked, clients=3).result()
    assert sorted((row.outcome, row.status, row.tokens) for row in rows) == sorted(
        [("ok", 200, 2)] * 6 + [("ok", 200, 4)] * 6 + [("invalid_value", 400, 0)] * 2
    )
    streamed = [row for row in rows if row.tokens == 2]
    assert all(0 < row.first_token_seconds < row.seconds for row in streamed)
    assert all(row.first_token_seconds is None for row in rows if row.tokens != 2)
    assert small.most == 3


def test_after_its_time_no_client_begins_a_request(small):
    assert start_load(small.address, [body()] * 3, clients=2, seconds=0).result() == []


def test_what_does_not_come_has_an_outcome_of_its_own(small):
    (row,) = start_load(small.address, [body(stream=True, user="breaks")]).result()
    assert (row.status, row.outcome) == (200, "broken off")
    with running(FastAPI()) as gone:
        pass
    (row,) = start_load(gone, [body()]).result()
    assert (row.status, row.outcome) == (0, "no connection")


def test_a_window_is_what_happened_between_two_scrapes(small):
    start_load(small.address, [body(8)] * 3).result()
    before = scrape(small.address)
    start_load(small.address, [body(2)] * 4 + [body(0)]).result()
    after = scrape(small.address)
    figures = read_figures(increase(before, after), after, 1.0)
    assert figures.outcomes == {"invalid_value": 1, "ok": 4}
    assert (figures.answer_tokens, figures.completion_tokens, figures.version) == (2, 8, "3")
    assert 0.01 < figures.request_seconds[0.5] <= 0.025


def test_a_load_is_watched_from_before_its_start_to_its_end(small, capsys):
    start_load(small.address, [body()] * 5).result()
    dashboard, rows = watch(
        small.address,
        lambda: start_load(small.address, [body(stream=True)] * 40 + [body(0)], clients=4),
        every=0.05,
    )
    assert len(rows) == 41
    assert dashboard.whole.outcomes == {"invalid_value": 1, "ok": 40}
    assert dashboard.whole.completion_tokens == 80
    assert len(dashboard.points) > 1
    # The text twin, where there is no notebook.
    assert "invalid_value 1, ok 40" in capsys.readouterr().out


def test_what_ends_just_before_the_end_is_seen_by_a_last_look(small):
    class Work(Future):
        looks = 0

        def done(self):
            self.looks += 1
            if self.looks == 2:  # its last request ends at the very moment at which it is done
                start_load(small.address, [body()]).result()
            return self.looks >= 2

        def result(self):
            return "done"

    dashboard, _ = watch(small.address, Work, every=0)
    assert dashboard.whole.outcomes == {"ok": 1}


def test_nobody_who_answers_is_a_figure_and_no_error():
    with running(FastAPI()) as gone:
        pass
    with pytest.raises(httpx.ConnectError):
        scrape(gone)
    done = Future()
    done.set_result("done")
    dashboard, result = watch(gone, lambda: done, every=0)
    assert (result, dashboard.points) == ("done", [None])
    assert dict(dashboard.states())["serves"] == "nobody answers; 2 of 2 scrapes had no answer"
