"""Starts a standalone Spark cluster on this machine from the pip package: a master and its workers.

``python -m course.cluster FOLDER SITE WORDS...`` starts one in ``FOLDER``, with pyspark from the
folder ``SITE``, and runs the batch program on it with the arguments ``WORDS``.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from helpers.operations.programs import Program, start_program
from helpers.paths import ROOT
from serving.batch_cluster import DAEMON_JAVA_OPTIONS

BATCH = [sys.executable, "-m", "serving.batch"]


class Cluster:
    """A running cluster: its master and its workers.

    It writes to ``folder``; ``site`` is the folder in which pyspark is installed.
    """

    def __init__(self, folder: Path, site: Path):
        self.folder = folder
        self.workers = []
        self._spark = str(site / "pyspark" / "bin" / "spark-class")
        self._variables = {
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_LOCAL_DIRS": str(folder / "scratch"),
            "SPARK_DAEMON_JAVA_OPTS": DAEMON_JAVA_OPTIONS,
            "PYTHONPATH": str(site),
        }
        self.master = self._start(
            "master", "master.Master", r"Starting Spark master at (spark://\S+)", "--port", 0
        )
        self.address = self.master.address

    def _start(self, log, name, ready, *words) -> Program:
        command = [
            self._spark,
            f"org.apache.spark.deploy.{name}",
            "--host",
            "127.0.0.1",
            "--webui-port",
            "0",
        ]
        return start_program(
            [*command, *map(str, words)], ready, self.folder / f"{log}.log", **self._variables
        )

    def add_worker(self) -> Program:
        """Start a worker that runs one task at a time."""
        number = len(self.workers)
        worker = self._start(
            f"worker-{number}",
            "worker.Worker",
            r"registered with master (spark://\S+)",
            "--cores",
            1,
            "--memory",
            "1g",
            "--work-dir",
            self.folder / f"work-{number}",
            self.address,
        )
        self.workers.append(worker)
        return worker

    def python_bytes(self) -> int:
        """Return the resident bytes of all the workers' Python processes together."""
        total = 0
        for worker in self.workers:
            for process in psutil.Process(worker.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss if process.name().startswith("python") else 0
        return total

    def stop(self) -> None:
        """End the programs that still run."""
        for program in (*self.workers, self.master):
            program.kill()

    def batch(self, *words: str | Path, **variables: str) -> subprocess.Popen:
        """Start the batch program on this cluster."""
        environment = self.environment(**variables)
        environment["PYTHONPATH"] += os.pathsep + str(ROOT)
        return subprocess.Popen(
            [*BATCH, "--master", self.address, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def environment(self, **variables: str) -> dict:
        """Return the environment variables for a program that uses the cluster."""
        return os.environ | self._variables | variables


@contextlib.contextmanager
def running(folder: Path, site: Path, workers: int = 2) -> Iterator[Cluster]:
    """Run a cluster while the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(folder, site)
    try:
        for _ in range(workers):
            cluster.add_worker()
        yield cluster
    finally:
        cluster.stop()


if __name__ == "__main__":
    with running(Path(sys.argv[1]), Path(sys.argv[2])) as one:
        process = one.batch(*sys.argv[3:])
        output, errors = process.communicate()
        print(output, end="")
        print(errors, end="", file=sys.stderr)
    sys.exit(process.returncode)
