"""Runs the server as a program of its own on a stand-in out of a registry."""

import signal
import subprocess
import sys
from pathlib import Path

import httpx

from support import ROOT
from support.service import body, wait_for

URI = "models:/stand-in@champion"


class Program:
    """The server as a program of its own."""

    def __init__(self, log: Path, *words):
        self.log = log
        with log.open("w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving.service", "--model", URI, *map(str, words)],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # Where the tests run in the background, a shell has told them and their children to
                # ignore Ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def wait(self):
        """Wait until it is ready; return its address."""
        wait_for(
            lambda: "Serving" in self.said() or self.process.poll() is not None, "the program", 120
        )
        assert self.process.poll() is None, self.said()
        return self.said().partition(" at ")[2].split("/v1\n")[0]

    def said(self):
        return self.log.read_text(encoding="utf-8")


def ask(address, text, **fields):
    return get(f"{address}/v1/chat/completions", "POST", content=body(text, **fields))


def get(url, method="GET", **fields):
    # httpx reads all certificates of the system for a client of its own, which takes longer than
    # the answer.
    return httpx.request(method, url, timeout=120, trust_env=False, verify=False, **fields)
