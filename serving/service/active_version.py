"""Holds the version of the model that answers, and replaces it when the registry's alias moves.

The next version is loaded beside the current one and tried with a request. Then it takes over, and
the one before is closed when its last request has ended. A version that does not load is tried
again, with growing pauses, while the current one goes on.
"""

import asyncio
import logging
import math
import shutil
import tempfile
import threading
import time
from pathlib import Path

import mlflow

from ..errors import ProgramError, ServiceError, first_line, hide_password
from ..served_model import ServedModel
from .metrics import Metrics
from .threads import in_thread

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 900.0  # seconds between two tries to load a version

_logger = logging.getLogger("serving")


class NoAnswerError(Exception):
    """A version was loaded and does not answer.

    The thread that asks it goes on, because nothing can end it. Another try would add one more, so
    the version is not tried again until the alias moves.
    """


class LoadedVersion:
    """A version that is loaded, and how many use it: the requests in it, and `ActiveModel`."""

    def __init__(self, number: str, model: mlflow.pyfunc.PyFuncModel, copy: Path):
        self.number = number
        self.model = ServedModel(model)
        config = model.metadata.flavors["python_function"].get("config") or {}
        self.own_name = config.get("model") if isinstance(config.get("model"), str) else None
        self._copy = copy
        self.users = 1  # `ActiveModel` itself

    def close(self) -> None:
        """Free the model's memory, and remove the folder that MLflow may have copied it to."""
        try:
            self.model.close()
        finally:
            shutil.rmtree(self._copy, ignore_errors=True)


class ModelAddress:
    """Where a model is: a registered name with an alias or a version, or any other MLflow URI.

    Parameters
    ----------
    uri : str
        Such as ``models:/slm-onnx@champion``, or a model's folder.
    copies : Path, optional
        A folder of this program alone, for copies of models that lie behind a tracking server.
    """

    def __init__(self, uri: str, copies: Path | None = None):
        self.uri = uri
        self._copies = copies
        is_registered = uri.startswith("models:/") and not uri.startswith("models:/m-")
        place = uri.removeprefix("models:/") if is_registered else ""
        place, _, self._alias = place.partition("@")
        name, _, number = place.partition("/")
        self.has_alias = bool(self._alias)
        self.registered_name = name or None
        self._number = number or "1"

    def find_version(self) -> str:
        """Return the number of the version that the address points to now.

        Raises
        ------
        Exception
            MLflow's: the registry does not answer, or knows no such version.
        """
        if not self.has_alias:
            return self._number
        client = mlflow.MlflowClient()
        return str(client.get_model_version_by_alias(self.registered_name, self._alias).version)

    def load(self, number: str) -> LoadedVersion:
        """Load the version of this number. Raises whatever MLflow or the model raises.

        A model in the store's own folder is loaded from there. MLflow copies one from a tracking
        server to a temporary folder, which is the version's own.
        """
        uri = f"models:/{self.registered_name}/{number}" if self.has_alias else self.uri
        copy = Path(tempfile.mkdtemp(dir=self._copies))
        try:
            before, tempfile.tempdir = tempfile.tempdir, str(copy)
            try:
                folder = mlflow.artifacts.download_artifacts(uri)
            finally:
                tempfile.tempdir = before
            return LoadedVersion(number, mlflow.pyfunc.load_model(folder), copy)
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise


class ActiveModel:
    """The version that answers.

    All but loading happens on the event loop's thread, so there are no locks.

    Parameters
    ----------
    address : ModelAddress
        Where the model is.
    metrics : Metrics
        Where versions and failures are counted.
    patience : float
        Seconds in which a version that has been loaded has to answer its first requests.
    name : str, optional
        The name that requests use. By default the registered one, or the model's own.
    """

    def __init__(
        self, address: ModelAddress, metrics: Metrics, patience: float, name: str | None = None
    ):
        self.address = address
        self._metrics = metrics
        self._patience = patience
        self._name = name
        self.current: LoadedVersion | None = None
        self.failed_version: str | None = None  # the alias's version, while it does not load
        self._pause = FIRST_PAUSE
        self._next_try = 0.0  # on the clock of time.monotonic

    @property
    def name(self) -> str:
        """The name that requests and answers use for the model."""
        own_name = self.current.own_name if self.current else None
        return self._name or self.address.registered_name or own_name or "model"

    @property
    def names(self) -> set[str]:
        """All names that a request may use for the model."""
        return {self.name, self.address.uri, self.address.uri.removeprefix("models:/")}

    @property
    def retry_seconds(self) -> float | None:
        """Seconds until the failed version is tried again, None where none will be."""
        seconds = max(self._next_try - time.monotonic(), 0.0)
        return seconds if self.failed_version and math.isfinite(seconds) else None

    def require_current(self) -> LoadedVersion:
        """Return the current version.

        Raises
        ------
        ServiceError
            No version is loaded yet, or the model's engine has ended by an error.
        """
        if self.current is None:
            raise ServiceError(
                503, "The model is not loaded yet. Try again soon.", "loading", retry_after=1
            )
        if self.current.model.stats()["closed"]:
            raise ServiceError(503, "The model has ended by an error. Try again later.", "closed")
        return self.current

    def acquire(self) -> LoadedVersion:
        """Return the current version. It stays open until `release`."""
        self.current.users += 1
        return self.current

    def release(self, version: LoadedVersion) -> None:
        """End one use of a version. The last one closes it."""
        version.users -= 1
        if not version.users:
            threading.Thread(target=version.close, daemon=True).start()

    async def start(self) -> None:
        """Load the first version.

        Raises
        ------
        ProgramError
            There is none, or it does not load.
        """
        try:
            number = await in_thread(self.address.find_version)
        except Exception as error:  # MLflow's, or its database's
            store = hide_password(mlflow.get_tracking_uri())
            raise ProgramError(
                f"The store {store} names no version at {self.address.uri}: {first_line(error)}.",
                "Register a version under that name and alias, or name another one: --model.",
            ) from None
        try:
            await self._swap_in(number)
        except Exception as error:  # whatever a model raises while it is loaded
            raise ProgramError(
                f"The model at {self.address.uri} does not load: {first_line(error)}.",
                "Name another one: --model.",
            ) from None

    async def watch(self, seconds: float) -> None:
        """Poll the alias for ever, every ``seconds`` seconds.

        Raises
        ------
        ProgramError
            The model has ended by an error of its own.
        """
        while True:
            await asyncio.sleep(seconds)
            if self.current.model.stats()["closed"]:
                raise ProgramError(
                    "The model has ended by an error, which the log shows above.",
                    "Start the service again.",
                )
            if self.address.has_alias:
                await self.poll_alias()

    async def poll_alias(self) -> None:
        """Look once where the alias points, and load that version if it is another one."""
        try:
            number = await in_thread(self.address.find_version)
        except Exception as error:  # the registry is locked or away, or the alias is gone
            _logger.warning(
                "The registry does not tell where %s points: %s.",
                self.address.uri,
                type(error).__name__,
            )
            return
        if number == self.current.number:
            self._note_failure(None)
        elif number != self.failed_version or time.monotonic() >= self._next_try:
            if number != self.failed_version:
                self._pause = FIRST_PAUSE
            try:
                await self._swap_in(number)
                self._note_failure(None)
                _logger.warning("Version %s answers now.", number)
            except Exception as error:  # whatever it is, the version before goes on
                self._note_failure(number)
                pause = math.inf if isinstance(error, NoAnswerError) else self._pause
                self._next_try = time.monotonic() + pause
                _logger.error(
                    "Version %s did not load (%s); version %s goes on. Next try in %g seconds.",
                    number,
                    type(error).__name__,
                    self.current.number,
                    pause,
                )
                self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _note_failure(self, number):
        self.failed_version = number
        self._metrics.failed_version.set(int(number or 0))
        if number:
            self._metrics.load_failures.inc()

    async def _swap_in(self, number):
        """Load a version, try it with one request, and let it take over."""
        version = await in_thread(self.address.load, number)
        try:
            async with asyncio.timeout(self._patience) as patience:
                await in_thread(version.model.try_once)
        except BaseException:
            self.release(version)
            if patience.expired():
                raise NoAnswerError(f"It gave no answer in {self._patience:g} seconds.") from None
            raise
        before, self.current = self.current, version
        self._metrics.version.clear()
        self._metrics.version.labels(self.name, number).set(1)
        self._metrics.rows.set_function(lambda: version.model.stats()["running"])
        if before:
            self.release(before)
