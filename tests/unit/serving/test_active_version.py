"""Which version of the model answers, and how the next one takes over.

Run: python -m helpers test tests/unit/serving/test_active_version.py
"""

import asyncio
import threading
from types import SimpleNamespace

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from serving.errors import ProgramError, ServiceError
from serving.service import active_version
from serving.service.active_version import ActiveModel, ModelAddress
from serving.service.metrics import Metrics


class StandInVersion:
    """A loaded version that counts how it is used."""

    own_name = None

    def __init__(self, number, is_broken):
        self.number = number
        self.users = 1
        self.closed = threading.Event()
        self.counts = {"running": 0, "closed": False}
        self.model = SimpleNamespace(stats=lambda: self.counts, try_once=self._try_once)
        self._is_broken = is_broken

    def _try_once(self):
        if self._is_broken == "slow":
            self.closed.wait(30)
        elif self._is_broken:
            raise ValueError("This model is broken.")

    def close(self):
        self.closed.set()


class StandInAddress:
    """An address whose alias a test moves. ``broken`` has the numbers that do not load."""

    uri = "models:/stand-in@champion"
    registered_name = "stand-in"
    has_alias = True

    def __init__(self, number="1", broken=(), slow=()):
        self.number = number
        self.broken = set(broken)
        self._slow = slow
        self.loaded = []

    def find_version(self):
        if self.number is None:
            raise MlflowException("There is no such alias.")
        return self.number

    def load(self, number):
        is_broken = "slow" if number in self._slow else number in self.broken
        self.loaded.append(StandInVersion(number, is_broken))
        return self.loaded[-1]


def run(scenario, **address):
    """Run a scenario with an address, the active model that has loaded from it, and its metrics."""

    async def start():
        stand_in, metrics = StandInAddress(**address), Metrics()
        active = ActiveModel(stand_in, metrics, patience=5)
        await active.start()
        await scenario(
            stand_in,
            active,
            lambda name, **labels: metrics.registry.get_sample_value(name, labels),
        )

    asyncio.run(start())


def test_when_the_alias_moves_its_version_takes_over_and_the_one_before_ends_its_requests():
    async def scenario(address, active, metric):
        version = active.acquire()
        address.number = "2"
        await active.poll_alias()
        assert (active.current.number, active.failed_version) == ("2", None)
        assert metric("slm_model_version", model="stand-in", version="2") == 1
        assert metric("slm_model_version", model="stand-in", version="1") is None
        assert (version.number, version.users, version.closed.is_set()) == ("1", 1, False)
        active.release(version)
        assert version.closed.wait(30)
        assert not active.current.closed.is_set()

    run(scenario)


def test_a_version_that_does_not_load_is_tried_again_with_growing_pauses(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(active_version.time, "monotonic", lambda: now)

    async def scenario(address, active, metric):
        nonlocal now
        address.number = "2"
        tries = []
        for _ in range(60):
            await active.poll_alias()
            assert (active.current.number, active.failed_version) == ("1", "2")
            tries.append(len(address.loaded) - 1)
            now += 5
        assert [tries.index(count) for count in range(1, 6)] == [0, 2, 6, 14, 30]
        assert metric("slm_model_failed_version") == 2
        assert metric("slm_model_load_failures_total") == tries[-1]
        assert 0 < active.retry_seconds <= 320
        assert address.loaded[1].closed.wait(30)
        address.broken = set()
        now += 900
        await active.poll_alias()
        assert (active.current.number, active.failed_version) == ("2", None)
        assert metric("slm_model_failed_version") == 0
        assert active.retry_seconds is None

    run(scenario, broken=["2"])


def test_a_failed_version_is_tried_at_once_when_the_alias_comes_back_to_it():
    async def scenario(address, active, metric):
        for number, current, failed in (("2", "1", "2"), ("1", "1", None), ("3", "1", "3")):
            address.number = number
            await active.poll_alias()
            assert (active.current.number, active.failed_version) == (current, failed)
            assert metric("slm_model_failed_version") == int(failed or 0)
        address.number = "1"
        await active.poll_alias()
        address.broken = set()
        address.number = "2"
        await active.poll_alias()
        assert (active.current.number, active.failed_version) == ("2", None)

    run(scenario, broken=["2", "3"])


def test_a_version_that_gives_no_answer_is_not_tried_again_until_the_alias_moves(monkeypatch):
    monkeypatch.setattr(active_version, "FIRST_PAUSE", 0.0)  # any other failure is tried at once

    async def scenario(address, active, metric):
        active._patience = 0.01
        address.number = "2"
        for _ in range(3):
            await active.poll_alias()
        assert (active.current.number, active.failed_version) == ("1", "2")
        assert (len(address.loaded), active.retry_seconds) == (2, None)
        address.number = "1"
        await active.poll_alias()
        address.number = "2"
        await active.poll_alias()
        assert len(address.loaded) == 3

    run(scenario, slow=["2"])


def test_a_registry_that_does_not_answer_changes_nothing():
    async def scenario(address, active, metric):
        address.number = None
        await active.poll_alias()
        assert (active.current.number, active.failed_version) == ("1", None)
        assert len(address.loaded) == 1
        address.number = "2"
        await active.poll_alias()
        assert active.current.number == "2"

    run(scenario)


def test_a_model_that_has_ended_by_itself_is_not_ready_and_ends_the_service():
    async def scenario(address, active, metric):
        active.require_current()
        active.current.counts["closed"] = True
        with pytest.raises(ServiceError) as refusal:
            active.require_current()
        assert (refusal.value.status, refusal.value.code) == (503, "closed")
        with pytest.raises(ProgramError, match="The model has ended by an error"):
            await asyncio.wait_for(active.watch(0.01), 30)

    run(scenario)


@pytest.mark.parametrize(
    ("address", "what"),
    [
        (
            {"number": None},
            "names no version at models:/stand-in@champion: "
            "MlflowException: There is no such alias.",
        ),
        ({"broken": ["1"]}, "does not load: ValueError: This model is broken."),
    ],
)
def test_without_a_first_version_the_service_does_not_start(address, what):
    async def scenario(*_):
        raise AssertionError("The service started.")

    with pytest.raises(ProgramError) as refusal:
        run(scenario, **address)
    assert refusal.value.what.endswith(what)
    assert refusal.value.fix.endswith("--model.")


@pytest.mark.parametrize(
    ("uri", "own_name", "given", "name", "has_alias"),
    [
        ("models:/slm-onnx@champion", "other", None, "slm-onnx", True),
        ("models:/slm-onnx/3", None, None, "slm-onnx", False),
        ("models:/m-0123", None, None, "model", False),
        ("/a/folder", "slm-onnx", None, "slm-onnx", False),
        ("/a/folder", "slm-onnx", "mine", "mine", False),
        ("models:/slm-onnx@champion", None, "mine", "mine", True),
    ],
)
def test_a_model_has_one_name(uri, own_name, given, name, has_alias):
    address = ModelAddress(uri)
    active = ActiveModel(address, Metrics(), 5, given)
    active.current = SimpleNamespace(own_name=own_name)
    assert (active.name, bool(address.has_alias)) == (name, has_alias)
    assert {uri, name} <= active.names


def test_a_copy_that_fails_is_removed(tmp_path, monkeypatch):
    def download(uri):
        folder = active_version.Path(active_version.tempfile.mkdtemp())
        (folder / "half").write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    before = active_version.tempfile.tempdir
    with pytest.raises(OSError):
        ModelAddress("models:/slm-onnx@champion", tmp_path).load("1")
    assert list(tmp_path.iterdir()) == []
    assert active_version.tempfile.tempdir == before
