"""Watches a server by its /metrics: two scrapes come in, the figures of the time between them come out.

The arithmetic is Prometheus' own, small enough to read. `watch` shows it while it happens, as HTML
without JavaScript that stays on the page as it was last, and as text.
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
    """Return each sample of a scrape under its name and its sorted labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(address: str) -> Samples:
    """Read a server's /metrics once. An httpx.HTTPError says that it did not answer."""
    with _client(address) as http:
        return _scrape(http)


def _client(address):
    # No proxy would find this machine's servers.
    return httpx.Client(base_url=address, timeout=5, trust_env=False)


def _scrape(http):
    return read_metrics(http.get("/metrics").raise_for_status().text)


def increase(before: Samples, after: Samples) -> Samples:
    """Return by how much each counter grew. After a restart of the server all of them began at 0.

    A restart shows by the time at which the process began; where the system does not tell it, by a
    counter that fell.
    """
    grows = {
        key: value
        for key, value in after.items()
        if key[0].endswith(("_total", "_bucket", "_count", "_sum"))
    }
    begun = ("process_start_time_seconds",)
    restarted = before.get(begun) != after.get(begun) or any(
        value < before.get(key, 0) for key, value in grows.items()
    )
    return {key: value - (0 if restarted else before.get(key, 0)) for key, value in grows.items()}


def add_increases(increases: list[Samples]) -> Samples:
    """Return by how much each counter grew in all."""
    total = {}
    for grown in increases:
        for key, value in grown.items():
            total[key] = total.get(key, 0) + value
    return total


def quantile(share: float, buckets: dict[float, float]) -> float:
    """Return the value below which a share of a histogram's observations lies, as `histogram_quantile` estimates it.

    Parameters
    ----------
    share : float
        From 0 to 1.
    buckets : dict
        How many observations are at most as large as each bound; the last bound is infinite.

    Returns
    -------
    float
        On a straight line inside its bucket. The highest finite bound where it lies beyond, nan
        where there is nothing.
    """
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0
    if not total or bounds[-1] != math.inf or len(bounds) < 2:
        return math.nan
    rank, low, below = share * total, 0.0, 0.0
    for bound in bounds[:-1]:
        if buckets[bound] >= rank and buckets[bound] > below:
            return low + (bound - low) * (rank - below) / (buckets[bound] - below)
        low, below = bound, buckets[bound]
    return low


@dataclass(frozen=True)
class Figures:
    """What a server did in a time, and how it stood at the end of it.

    Attributes
    ----------
    seconds : float
    outcomes : dict
        How many requests ended, by ``ok`` or an error's code.
    prompt_tokens, completion_tokens : float
    answer_tokens : float
        Of an answer, on average; nan where there was none.
    request_seconds, first_token_seconds : dict
        By share, such as 0.95; nan where there was none.
    running, waiting : float
    version : str
        Empty where the server does not tell.
    failed_version : str
        Of a version that did not load, else empty.
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
        """Which share of the requests was refused or failed; nan where there was none. Who left was not refused."""
        left = self.outcomes.get("cancelled", 0)
        answered = self.requests - left
        return (answered - self.outcomes.get("ok", 0)) / answered if answered else math.nan


def read_figures(grown: Samples, now: Samples, seconds: float) -> Figures:
    """Return the figures of a time in which the counters grew so much; what a server does not tell is 0 or nan."""

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
    """A server's figures over time: HTML with a small chart for each, and a text twin.

    ``at`` and ``now`` of a scrape go in: seconds since the first, and its samples or None where
    nobody answered.
    """

    def __init__(self, title: str, span: float = 5.0):
        # A point of a chart tells of so many seconds before it.
        self.title, self._span = title, span
        self._scrapes: list[tuple[float, Samples | None]] = []
        self._grown: list[Samples] = []
        self._known: Samples | None = None
        self.points: list[Figures | None] = []

    def add(self, at: float, now: Samples | None) -> None:
        """Add a scrape."""
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
        """Return for each figure its name, its value over the whole time, and its points."""
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

        # A restart makes a gauge fall to 0 at once, so of these two the highest says more than the
        # last.
        tops = {
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
                for name, values in tops.items()
            ),
            (
                "refused or failed, share",
                f"{whole.refused_share:.0%}".replace("nan%", "-"),
                points(lambda point: point.refused_share),
            ),
        ]

    def states(self) -> list[tuple[str, str]]:
        """Return what is no number over time: who serves, and how requests ended."""
        whole, away = self.whole, sum(now is None for _, now in self._scrapes)
        serves = (
            f"version {whole.version or 'unknown'}" if self._scrapes[-1][1] else "nobody answers"
        )
        if whole.failed_version:
            serves += f"; version {whole.failed_version} did not load"
        if away:
            serves += f"; {away} of {len(self._scrapes)} looks had no answer"
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
    """Show a server's figures while something works; what is shown last stays on the page.

    Parameters
    ----------
    address : str
        Of the server, without ``/v1``.
    work : callable
        Begins the work, such as `start_load`. It is called after the first look, so that nothing is
        missed.
    every : float
        Seconds between two looks.

    Returns
    -------
    tuple of Dashboard and the work's result
    """
    dashboard, start, handle, begun = (
        Dashboard(f"The server at {address}"),
        time.perf_counter(),
        None,
        None,
    )
    with _client(address) as http:
        while True:
            finished = begun is not None and begun.done()
            try:
                now = _scrape(http)
            except httpx.HTTPError:
                now = None  # that nobody answers is a figure, too
            dashboard.add(time.perf_counter() - start, now)
            if handle is None:
                handle = display(dashboard, display_id=True)
            else:
                handle.update(dashboard)
            if finished:
                return dashboard, begun.result()
            begun = begun or work()
            time.sleep(every)
