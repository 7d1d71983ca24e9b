"""Connects the batch program to its Spark cluster.

From top to bottom: translation of Spark's errors, checks before the start, the session, the lock
against a second driver, and the watch that ends a run whose cluster is lost.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import ProgramError

OLDEST_JAVA = 17
# For short programs on few cores.
FAST_START_JAVA_OPTIONS = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
# SPARK_DAEMON_JAVA_OPTS for a master and its workers on one machine. A worker removes a program's
# folder 30 seconds after the program has ended.
DAEMON_JAVA_OPTIONS = (
    f"{FAST_START_JAVA_OPTIONS} -Dspark.worker.cleanup.enabled=true -Dspark.worker.cleanup.interval=30 "
    "-Dspark.worker.cleanup.appDataTtl=30"
)
BEAT_SECONDS = 5.0  # between two checks of the cluster, each of which renews the lock
LOST_CHECKS = 4  # checks in a row without a master or an executor: the cluster is lost
SILENT_BEATS = 4  # intervals in which a lock does not change: its driver is dead
NO_EXECUTOR_CHECKS = 12  # checks without an executor: warn once

# --- errors ---------------------------------------------------------------------------------


class BatchError(ProgramError):
    """A failure that the user of the batch program can fix."""


ADVICE_RUN_AGAIN = "Run the same command again: it answers the rows that are missing."
ADVICE_MORE_MEMORY = (
    "Give the executors more memory with --conf: spark.executor.memory is for Java, "
    "spark.executor.memoryOverhead for the Python processes and their models, and "
    f"spark.executor.pyspark.memory limits these. {ADVICE_RUN_AGAIN}"
)
ADVICE_START_CLUSTER = f"Start the master and its workers. {ADVICE_RUN_AGAIN}"
# A pattern of an exception's type and message, what happened, and what to do. The first match
# counts, and the text of its group replaces {}.
MEANINGS = (
    (
        r"No space left on device|Disk quota exceeded",
        "A disk is full.",
        f"Free space where the rows are written, and where the workers keep their files. {ADVICE_RUN_AGAIN}",
    ),
    (
        r"MemoryError|bad_alloc|Cannot allocate memory|DefaultCPUAllocator|"
        r"exit(?:ed with)? (?:code|status):? 137|killed by YARN for exceeding|"
        r"OutOfMemoryError|[Ff]ailed to allocate memory|failed to map segment|"
        # Python's error where an extension failed to allocate memory and did not say so.
        r"SystemError: error return without exception set",
        "A worker ran out of memory.",
        ADVICE_MORE_MEMORY,
    ),
    (
        r"Python worker exited unexpectedly",
        "A worker's Python process was ended, most likely because memory ran out.",
        ADVICE_MORE_MEMORY,
    ),
    (
        r"cancelled as part of cancellation of all jobs|All masters are unresponsive|"
        r"Could not connect to .*master|Master removed our application|"
        r"SparkContext was shut down|Cannot call methods on a stopped SparkContext",
        "The cluster's master is lost.",
        ADVICE_START_CLUSTER,
    ),
    (
        # Only at the start: a worker's own refused connection is further back in the text.
        r"Answer from Java side is empty|Py4JNetworkError|^ConnectionRefusedError",
        "Spark's Java program on this machine has ended, most likely because memory ran out.",
        f"Give it more memory: --conf spark.driver.memory=2g. {ADVICE_RUN_AGAIN}",
    ),
    (
        r"JAVA_GATEWAY_EXITED",
        "Spark's Java program did not start.",
        "Correct the settings of --conf, and JAVA_HOME.",
    ),
    (
        r"ModuleNotFoundError|No module named",
        "A worker's Python lacks a package that the model needs.",
        "Install what the model requires on every worker, or name another Python there: set the "
        "variable PYSPARK_PYTHON to its path.",
    ),
    (
        r"PYTHON_VERSION_MISMATCH|Python in worker has different version",
        "The workers' Python has another version than this one.",
        "Set the variable PYSPARK_PYTHON to the path of a Python of this version on the workers.",
    ),
    (
        r"reading Parquet column \[?([^\s,\]]+)",
        "The column {} has another type in one of the input's files.",
        "Write all files with one type for it.",
    ),
    (
        r"reading file ([^\n]+?)\.(?:\s|$)|RuntimeException: ([^\n]+?) is not a Parquet file",
        "Spark can't read the file {}.",
        "Write it again as Parquet, or remove it from the input's folder.",
    ),
    (
        r"(?:Illegal Parquet type|Parquet type not yet supported|Unrecognized Parquet type): "
        r"([^\n]+?)\.?(?:\s*SQLSTATE|\n|$)",
        "Spark can't read the type of one of the input's columns: {}.",
        "Write the column in another type, such as times in microseconds.",
    ),
)


# The line of a Python traceback that has the exception: the first one that is not indented.
PYTHON_REASON = r"Traceback \(most recent call last\):\n(?:[ \t].*\n)*(\S.*)"


def to_batch_error(error: BaseException) -> BatchError:
    """Translate an exception, mostly one of Spark's, into a BatchError by its text."""
    text = f"{type(error).__name__}: {error}"
    for pattern, what, fix in MEANINGS:
        if match := re.search(pattern, text):
            return BatchError(what.format(*filter(None, match.groups())), fix)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    others = [line for line in lines if not line.startswith("An error occurred while calling")]
    from_python = re.findall(PYTHON_REASON, str(error))
    reason = [*from_python[-1:], *causes[-1:], *others, "Spark gives no reason"][0]
    return BatchError(
        f"The job failed: {reason[:300].rstrip('.')}.",
        f"If it failed on a worker, the logs of the executors have more. {ADVICE_RUN_AGAIN}",
    )


# --- checks before the start --------------------------------------------------------------------


def read_java_version(text: str) -> int:
    """Return Java's version from the output of ``java -version`` (8 for 1.8), or 0."""
    match = re.search(r'version "(?:1\.)?(\d+)', text)
    return int(match[1]) if match else 0


def check_installation() -> None:
    """Raise a BatchError unless this machine has pyspark and a Java that Spark runs on."""
    if sys.platform == "win32":
        raise BatchError(
            "Spark does not run on Windows itself: its programs are shell scripts, and it can't write "
            "files without Hadoop's native programs.",
            "Use Linux under Windows: https://learn.microsoft.com/windows/wsl/install. Set up the "
            "course there, too.",
        )
    if importlib.util.find_spec("pyspark") is None:
        raise BatchError(
            "This Python has no pyspark.",
            'Install it; in the course\'s folder: python -m pip install --editable ".[spark]".',
        )
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    fix = (
        f"Install Java {OLDEST_JAVA} or newer, such as Debian's openjdk-17-jre-headless or "
        "Temurin's, and set JAVA_HOME to its folder."
    )
    try:
        result = subprocess.run(
            [java or "java", "-version"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        place = "where JAVA_HOME points" if home else "on the PATH"
        raise BatchError(f"Spark needs Java, but there is none {place}.", fix) from None
    version = read_java_version(result.stderr)
    if version < OLDEST_JAVA:
        found = version or "unknown"
        raise BatchError(
            f"Spark needs Java {OLDEST_JAVA} or newer, but this one's version is {found}.", fix
        )


def check_master(master: str) -> None:
    """Raise a BatchError if ``master`` is no cluster's address, or a standalone master does not answer."""
    if not re.match(r"spark://|k8s://|yarn$", master):
        raise BatchError(
            f"{master} is not the address of a cluster.",
            "Give --master spark://HOST:PORT, yarn or k8s://HOST:PORT.",
        )
    if master.startswith("spark://") and not _master_is_reachable(master):
        raise BatchError(f"No Spark master answers at {master}.", "Start it, or correct --master.")


def _master_is_reachable(master):
    for address in master.removeprefix("spark://").split(","):  # there may be standby masters
        place = urlsplit(f"//{address}")
        try:
            with socket.create_connection((place.hostname, place.port), timeout=3):
                return True
        except (OSError, TypeError, ValueError):
            continue
    return False


# --- the session ----------------------------------------------------------------------------


def spark_config(master: str, conf: Sequence[str]) -> dict[str, str]:
    """Return Spark's configuration for a cluster. ``conf``, each NAME=VALUE, takes precedence."""
    chosen = {
        "spark.log.level": "ERROR",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.caseSensitive": "true",  # as Parquet is
        # Rows that Spark hands to Python at a time.
        "spark.sql.execution.arrow.maxRecordsPerBatch": "256",
        # Each task's files appear when that task ends, so that a later run can resume.
        "spark.hadoop.mapreduce.fileoutputcommitter.algorithm.version": "2",
        # The program itself writes _SUCCESS, once it has counted the rows.
        "spark.hadoop.mapreduce.fileoutputcommitter.marksuccessfuljobs": "false",
        # MLflow unpacks the model in the executor's own folder, and leaves it there.
        "spark.executorEnv.TMPDIR": ".",
    }
    if re.match(r"spark://(127\.|localhost)", master):
        chosen |= {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.extraJavaOptions": FAST_START_JAVA_OPTIONS,
            "spark.executor.extraJavaOptions": FAST_START_JAVA_OPTIONS,
        }
    for setting in conf:
        name, equals, value = setting.partition("=")
        if not equals:
            raise BatchError(
                f"--conf {setting} does not have the form NAME=VALUE.",
                "Write it like --conf spark.executor.memory=2g.",
            )
        chosen[name] = value
    return chosen


def start_spark(master: str, settings: Sequence[str] = ()) -> Any:
    """Return a Spark session on a cluster.

    From then on, this process does not compress zip files: MLflow zips the model for Spark, and
    weights hardly shrink.
    """
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(master).appName("batch")
    for name, value in spark_config(master, settings).items():
        builder = builder.config(name, value)
    # PySpark warns about this pandas at every function. The tests cover the functions used here.
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas", FutureWarning)
    shutil.register_archive_format("zip", _make_zip, description="ZIP file, not compressed")
    with _quiet_java():
        return builder.getOrCreate()


def _make_zip(base_name, base_dir, **_):
    """Write a zip file, with the arguments that ``shutil.make_archive`` gives."""
    with zipfile.ZipFile(f"{base_name}.zip", "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(Path(base_dir).rglob("*")):
            archive.write(path)
    return f"{base_name}.zip"


@contextlib.contextmanager
def _quiet_java():
    """Hide what Java writes to stderr while it runs, but show it if Java does not start."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 2)
        try:
            yield
        except Exception:
            output.seek(0)
            os.write(stderr, output.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


# --- the lock -------------------------------------------------------------------------------


def hadoop_path(spark: Any, path: str) -> tuple[Any, Any]:
    """Return Hadoop's Path and FileSystem for a path."""
    path = spark._jvm.org.apache.hadoop.fs.Path(path)
    return path, path.getFileSystem(spark._jsc.hadoopConfiguration())


def read_file(file_system: Any, path: Any) -> str | None:
    """Return a small file's text, None if it does not exist."""
    if not file_system.exists(path):
        return None
    stream = file_system.open(path)
    try:
        return bytes(stream.readAllBytes()).decode()
    finally:
        stream.close()


def write_file(file_system: Any, path: Any, text: str, overwrite: bool = True) -> None:
    """Write a small file."""
    stream = file_system.create(path, overwrite)
    try:
        stream.write(bytearray(text.encode()))
    finally:
        stream.close()


class DriverLock:
    """Keeps a second driver from writing to the same output.

    The lock is a file beside the output, in which its driver counts up while it works. A driver that
    finds a lock waits to see whether it changes.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        Its Hadoop reads and writes the file, wherever the output is.
    output : str
        The output's path.
    """

    def __init__(self, spark: Any, output: str):
        path, self._file_system = hadoop_path(spark, output)
        self._path = path.suffix(".lock")
        self._owner = f"process {os.getpid()} on {socket.gethostname()} ({uuid.uuid4().hex[:8]})"
        self._beats = 0

    def acquire(self) -> None:
        """Take the lock. Raises a BatchError if another driver works on the output."""
        try:
            self._write(overwrite=False)
            return
        except Exception:  # from Java: the file exists, or its folder can't be written
            text = self._read()
            if text is None:
                raise
        seconds = SILENT_BEATS * BEAT_SECONDS
        owner = text.partition(",")[0]
        print(
            f"This output is locked by {owner}. Waiting {seconds:g} seconds to see whether that "
            "still runs.",
            file=sys.stderr,
        )
        time.sleep(seconds)
        if self._read() not in (text, None):
            raise self._refusal(text)
        self._write()
        time.sleep(BEAT_SECONDS)
        if not self.beat():  # another driver waited, too, and took it after this one
            raise self._refusal(self._read())

    def _refusal(self, text):
        return BatchError(
            f"Another run writes to this output: {str(text).partition(',')[0]}.",
            "Wait for its end, or end it, and run the same command again.",
        )

    def beat(self) -> bool:
        """Renew the lock. Return whether it is still this driver's."""
        text = self._read()
        if text is None or (text and not text.startswith(self._owner)):
            return False  # another driver has taken over, and may have ended already
        self._write()  # also where a full disk has left the file empty
        return True

    def release(self) -> None:
        """Remove the lock, if it is still this driver's."""
        if (self._read() or "").startswith(self._owner):
            self._file_system.delete(self._path, False)

    def _write(self, overwrite=True):
        self._beats += 1
        write_file(self._file_system, self._path, f"{self._owner}, beat {self._beats}", overwrite)

    def _read(self):
        return read_file(self._file_system, self._path)


# --- the watch ------------------------------------------------------------------------------


def is_lost(checks: Sequence[tuple[bool, int]]) -> bool:
    """Return whether a cluster is lost.

    A check is a pair: whether a master answers, and the number of executors. Executors keep working
    without a master, and a standby master may take over, so both have to be missing.
    """
    last = checks[-LOST_CHECKS:]
    return len(last) == LOST_CHECKS and not any(has_master or count for has_master, count in last)


@contextlib.contextmanager
def watch_cluster(spark: Any, master: str, lock: DriverLock) -> Iterator[Callable[[], None]]:
    """Hold the lock while the block runs, and cancel its jobs if the lock or the cluster is lost.

    Spark would wait forever for a lost standalone cluster; YARN and Kubernetes report their loss.
    Yields a function that raises a BatchError if the lock or the cluster is lost.
    """
    ended = threading.Event()
    loss = []

    def check():
        if loss:
            raise loss[0]

    def watch():
        checks = []
        while not ended.wait(BEAT_SECONDS):
            try:
                error = _check_once(spark, master, lock, checks)
            except (
                Exception
            ) as failure:  # from Java: a failed check counts as one without a cluster
                checks.append((False, 0))
                error = to_batch_error(failure) if is_lost(checks) else None
            if error:
                loss.append(error)
                with contextlib.suppress(Exception):  # from Java, if it has ended
                    spark.sparkContext.cancelAllJobs()

    lock.acquire()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield check
    except Exception:
        check()  # raises the reason if the watch has cancelled the job
        raise
    finally:
        ended.set()
        watcher.join()
        with contextlib.suppress(Exception):  # from Java, if it has ended
            lock.release()


def _check_once(spark, master, lock, checks):
    """Renew the lock, and add a check of the cluster to ``checks``.

    Returns
    -------
    BatchError or None
        Says whether the lock or the cluster is lost; None if neither is.
    """
    if not lock.beat():
        return BatchError(
            "Another run has taken over this output, because this one did not renew its lock in time.",
            "Wait for the other run's end, and run the same command again.",
        )
    if not master.startswith("spark://"):
        checks.append((True, 0))
        return None
    # The driver counts as one.
    count = spark.sparkContext._jsc.sc().getExecutorMemoryStatus().size() - 1
    checks.append((_master_is_reachable(master), count))
    if len(checks) == NO_EXECUTOR_CHECKS and not any(count for _, count in checks):
        print(
            "The cluster has given no executor yet. Free a worker, or ask for less memory: "
            "--conf spark.executor.memory=1g. Still waiting.",
            file=sys.stderr,
        )
    if is_lost(checks):
        return BatchError("The cluster's master is lost.", ADVICE_START_CLUSTER)
    return None
