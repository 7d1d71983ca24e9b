"""What /metrics shows, in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
TOKENS = [2**power for power in range(13)]


class Metrics:
    """The metrics of one service, in a registry of their own."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "slm_requests",
            "Requests that ended, by outcome: ok or an error's code",
            ["outcome"],
            registry=registry,
        )
        self.prompt_tokens = Counter("slm_prompt_tokens", "Tokens of prompts", registry=registry)
        self.completion_tokens = Counter(
            "slm_completion_tokens", "Tokens of answers", registry=registry
        )
        self.first_token = Histogram(
            "slm_first_token_seconds",
            "From a request to the first text of its answer",
            buckets=SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "slm_request_seconds",
            "From a request to the end of its answer",
            buckets=SECONDS,
            registry=registry,
        )
        self.answer_tokens = Histogram(
            "slm_answer_tokens", "Tokens of an answer", buckets=TOKENS, registry=registry
        )
        self.running = Gauge(
            "slm_requests_running", "Requests that are in the model", registry=registry
        )
        self.waiting = Gauge(
            "slm_requests_waiting", "Requests that wait to be admitted", registry=registry
        )
        self.rows = Gauge(
            "slm_rows_running",
            "Answers that the model's engine writes now, if the model counts them",
            registry=registry,
        )
        self.version = Gauge(
            "slm_model_version",
            "1 for the version that answers",
            ["model", "version"],
            registry=registry,
        )
        self.failed_version = Gauge(
            "slm_model_failed_version",
            "The alias's version while it does not load, else 0",
            registry=registry,
        )
        self.load_failures = Counter(
            "slm_model_load_failures", "Tries to load a version that failed", registry=registry
        )
        ProcessCollector(registry=registry)
