"""Computes a server's figures from scrapes of its /metrics, and shows them while a load runs.

The arithmetic is that of Prometheus. `watch` shows the figures as HTML without JavaScript, which
stays on the page, and as text.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import httpx
from IPython.display import display
from prometheus_client.parser import text_string_to_metric_families

from helpers.show.drawing import highest_of
from helpers.show.tables import LineTable

QUANTILES = (0.5, 0.95, 0.99)
Samples = dict[tuple, float]  # by name and labels


def read_metrics(text: str) -> Samples:
    """Return the value of each sample of a scrape by its name and its sorted labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(address: str) -> Samples:
    """Read a server's /metrics once. Raises httpx.HTTPError if it does not answer."""
    with _client(address) as http:
        return _scrape(http)


def _client(address):
    # A proxy would not find this machine's servers.
    return httpx.Client(base_url=address, timeout=5, trust_env=False)


def _scrape(http):
    return read_metrics(http.get("/metrics").raise_for_status().text)


def increase(before: Samples, after: Samples) -> Samples:
    """Return how much each counter grew between two scrapes. After a restart, counters begin at 0.

    A restart is seen by another start time of the process or, if the server does not report that, by
    a counter that fell.
    """
    counters = {
        key: value
        for key, value in after.items()
        if key[0].endswith(("_total", "_bucket", "_count", "_sum"))
    }
    start_time = ("process_start_time_seconds",)
    restarted = before.get(start_time) != after.get(start_time) or any(
        value < before.get(key, 0) for key, value in counters.items()
    )
    return {
        key: value - (0 if restarted else before.get(key, 0)) for key, value in counters.items()
    }


def add_increases(increases: list[Samples]) -> Samples:
    """Return the sum of several increases of each counter."""
    total = {}
    for grown in increases:
        for key, value in grown.items():
            total[key] = total.get(key, 0) + value
    return total


def quantile(share: float, buckets: dict[float, float]) -> float:
    """Return a quantile of a histogram, estimated as Prometheus' `histogram_quantile` does.

    Parameters
    ----------
    share : float
        From 0 to 1.
    buckets : dict
        By each upper bound, how many observations are not larger; the last bound is infinite.

    Returns
    -------
    float
        Interpolated linearly inside a bucket; the highest finite bound if it is larger; nan without
        observations.
    """
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0
    if not total or bounds[-1] != math.inf or len(bounds) < 2:
        return math.nan
    rank = share * total
    low = 0.0
    below = 0.0
    for bound in bounds[:-1]:
        if buckets[bound] >= rank and buckets[bound] > below:
            return low + (bound - low) * (rank - below) / (buckets[bound] - below)
        low = bound
        below = buckets[bound]
    return low


@dataclass(frozen=True)
class Figures:
    """What a server did in a period, and its state at the end.

    Attributes
    ----------
    seconds : float
    outcomes : dict
        How many requests ended, by ``ok`` or the error's code.
    prompt_tokens, completion_tokens : float
    answer_tokens : float
        The mean of an answer; nan without answers.
    request_seconds, first_token_seconds : dict
        Quantiles by share, such as 0.95; nan without requests.
    running, waiting : float
    version : str
        Empty if the server does not report it.
    failed_version : str
        The version that did not load; empty without one.
    """

    seconds: float
    outcomes: dict[str, int]
    prompt_tokens: float
    completion_tokens: float
    answer_tokens: float
    request_seconds: dict[float, float]
    first_token_seconds: dict[float, float]
    running: float
    waiting: float
    version: str
    failed_version: str

    @property
    def requests(self) -> int:
        """How many requests ended."""
        return sum(self.outcomes.values())

    @property
    def refused_share(self) -> float:
        """The share of requests that were refused or failed; nan without requests. Cancelled requests do not count."""
        cancelled = self.outcomes.get("cancelled", 0)
        answered = self.requests - cancelled
        return (answered - self.outcomes.get("ok", 0)) / answered if answered else math.nan


def read_figures(grown: Samples, now: Samples, seconds: float) -> Figures:
    """Return the figures of a period from the counters' increase; what a server does not report is 0 or nan."""

    def labelled(name, label):
        return {dict(key[1:])[label]: value for key, value in grown.items() if key[0] == name}

    def quantiles(name):
        buckets = {float(bound): value for bound, value in labelled(f"{name}_bucket", "le").items()}
        return {share: quantile(share, buckets) for share in QUANTILES}

    answers = grown.get(("slm_answer_tokens_count",), 0)
    failed = now.get(("slm_model_failed_version",), 0)
    return Figures(
        seconds=seconds,
        outcomes={
            outcome: round(value)
            for outcome, value in sorted(labelled("slm_requests_total", "outcome").items())
            if value
        },
        prompt_tokens=grown.get(("slm_prompt_tokens_total",), 0),
        completion_tokens=grown.get(("slm_completion_tokens_total",), 0),
        answer_tokens=grown.get(("slm_answer_tokens_sum",), 0) / answers if answers else math.nan,
        request_seconds=quantiles("slm_request_seconds"),
        first_token_seconds=quantiles("slm_first_token_seconds"),
        running=now.get(("slm_requests_running",), math.nan),
        waiting=now.get(("slm_requests_waiting",), math.nan),
        version=next(
            (
                dict(key[1:])["version"]
                for key, value in now.items()
                if key[0] == "slm_model_version" and value
            ),
            "",
        ),
        failed_version=f"{failed:.0f}" if failed else "",
    )


class Dashboard:
    """A server's figures over time, as HTML with a small chart for each, and as text."""

    def __init__(self, title: str, span: float = 5.0):
        self.title = title
        self._span = span  # seconds before a point of a chart that count for it
        self._scrapes: list[tuple[float, Samples | None]] = []
        self._grown: list[Samples] = []
        self._known: Samples | None = None
        self.points: list[Figures | None] = []

    def add(self, at: float, now: Samples | None) -> None:
        """Add a scrape: seconds since the first one, and its samples, None if the server did not answer."""
        self._grown.append(increase(self._known, now) if now and self._known is not None else {})
        self._known = self._known if now is None else now
        self._scrapes.append((at, now))
        if len(self._scrapes) > 1:
            first = next(
                index for index, (then, _) in enumerate(self._scrapes) if then >= at - self._span
            )
            self.points.append(self._between(min(first, len(self._scrapes) - 2)) if now else None)

    @property
    def whole(self) -> Figures:
        """The figures of the whole time."""
        return self._between(0)

    def _between(self, first):
        at, _ = self._scrapes[-1]
        return read_figures(
            add_increases(self._grown[first + 1 :]), self._known or {}, at - self._scrapes[first][0]
        )

    def rows(self) -> list[tuple[str, str, list[float]]]:
        """Return for each figure its name, its value over the whole time, and the points of its chart."""
        whole = self.whole

        def points(read):
            return [math.nan if point is None else read(point) for point in self.points]

        def percentiles(name):
            values = [f"{getattr(whole, name)[share]:.2f}" for share in QUANTILES]
            return " / ".join(values).replace("nan", "-"), points(
                lambda point: getattr(point, name)[0.95]
            )

        def rate(read):
            return (
                f"{read(whole) / whole.seconds:.1f}" if whole.seconds else "-",
                points(lambda point: read(point) / point.seconds),
            )

        # A restart sets a gauge to 0 at once: the highest value says more than the last one.
        gauges = {
            name: points(lambda point, name=name: getattr(point, name))
            for name in ("running", "waiting")
        }
        return [
            ("requests per second", *rate(lambda point: point.requests)),
            ("tokens per second, answers", *rate(lambda point: point.completion_tokens)),
            ("tokens per second, prompts", *rate(lambda point: point.prompt_tokens)),
            ("seconds to the first token, p50 / p95 / p99", *percentiles("first_token_seconds")),
            ("seconds to the end, p50 / p95 / p99", *percentiles("request_seconds")),
            *(
                (
                    f"requests {name}, at most",
                    f"{highest_of(values):.0f}".replace("nan", "-"),
                    values,
                )
                for name, values in gauges.items()
            ),
            (
                "refused or failed, share",
                f"{whole.refused_share:.0%}".replace("nan%", "-"),
                points(lambda point: point.refused_share),
            ),
        ]

    def states(self) -> list[tuple[str, str]]:
        """Return the rows without a chart: the version that serves, and how requests ended."""
        whole = self.whole
        failed_scrapes = sum(now is None for _, now in self._scrapes)
        serves = (
            f"version {whole.version or 'unknown'}" if self._scrapes[-1][1] else "nobody answers"
        )
        if whole.failed_version:
            serves += f"; version {whole.failed_version} did not load"
        if failed_scrapes:
            serves += f"; {failed_scrapes} of {len(self._scrapes)} scrapes had no answer"
        ends = ", ".join(f"{outcome} {count}" for outcome, count in whole.outcomes.items())
        return [("serves", serves), ("requests ended", ends or "none")]

    def _table(self):
        rows = [*self.rows(), *((name, value, []) for name, value in self.states())]
        return LineTable(self.title, self._columns(), tuple(rows))

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def __repr__(self) -> str:
        return repr(self._table())

    def _columns(self):
        return "figure", "the whole time", f"over {self._scrapes[-1][0]:.0f} seconds"


def watch(address: str, work: Callable[[], Future], every: float = 0.25) -> tuple[Dashboard, Any]:
    """Show a server's figures while some work runs; the last figures stay on the page.

    Parameters
    ----------
    address : str
        The server's address, without ``/v1``.
    work : callable
        Starts the work, such as `start_load`. It is called after the first scrape, so that nothing
        is missed.
    every : float
        Seconds between two scrapes.

    Returns
    -------
    tuple of Dashboard and the work's result
    """
    dashboard = Dashboard(f"The server at {address}")
    start = time.perf_counter()
    handle = None
    running = None
    with _client(address) as http:
        while True:
            finished = running is not None and running.done()
            try:
                now = _scrape(http)
            except httpx.HTTPError:
                now = None  # the dashboard shows that the server did not answer
            dashboard.add(time.perf_counter() - start, now)
            if handle is None:
                handle = display(dashboard, display_id=True)
            else:
                handle.update(dashboard)
            if finished:
                return dashboard, running.result()
            running = running or work()
            time.sleep(every)
