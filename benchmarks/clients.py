"""Times the requests of several HTTP clients, which run in a process of their own.

Clients inside a busy process would measure that process, too. ``Clients`` starts this file as a
program, writes jobs to it as lines of JSON, and reads the times.
"""

import asyncio
import json
import subprocess
import sys
import time
from types import TracebackType
from typing import Self

import aiohttp

from helpers.errors import CourseError
from helpers.operations.load import Reply
from helpers.paths import ROOT

TIMEOUT = 600  # seconds for one answer


class Clients:
    """The program with the HTTP clients, for as long as the block runs."""

    def __enter__(self) -> Self:
        self._program = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.clients"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._program.communicate()

    def ask(self, url: str, bodies: list[dict], callers: int) -> tuple[float, list[dict]]:
        """Send requests, ``callers`` at once.

        Returns
        -------
        tuple
            The seconds until all had their answers, and a dict for each request, in order:
            ``seconds``; ``first_token_seconds``, None if the answer was not streamed; ``tokens``,
            as the server counts them; ``texts`` of MLflow's server, which counts no tokens.

        Raises
        ------
        CourseError
            A request failed.
        """
        self._program.stdin.write(
            json.dumps({"url": url, "bodies": bodies, "callers": callers}) + "\n"
        )
        self._program.stdin.flush()
        seconds, replies = json.loads(self._program.stdout.readline())
        if errors := [reply["error"] for reply in replies if reply.get("error")]:
            raise CourseError(
                "bench-request",
                f"{len(errors)} of {len(replies)} requests to {url} failed. "
                f"The first: {errors[0]!r}.",
                "Read that server's log.",
            )
        return seconds, replies


async def run_job(url: str, bodies: list[dict], callers: int) -> tuple[float, list[dict]]:
    """Send the requests from ``callers`` clients, each its next one after its answer."""
    waiting = iter(enumerate(bodies))
    replies = {}
    timeout = aiohttp.ClientTimeout(TIMEOUT)
    connector = aiohttp.TCPConnector(limit=0)
    # Each job has a session: a server may close a connection that was idle between two jobs.
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def call():
            for place, body in waiting:
                replies[place] = await _ask(session, url, body)

        started = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(callers)))
        seconds = time.perf_counter() - started
    return seconds, [replies[place] for place in range(len(bodies))]


async def _ask(session, url, body):
    started = time.perf_counter()
    reply = Reply()
    # llama.cpp's server closes the connection after a stream, although it announces keep-alive.
    headers = {"Connection": "close"} if body.get("stream") else {}
    try:
        async with session.post(url, json=body, headers=headers) as response:
            if response.status != 200:
                return {"error": f"{response.status}: {(await response.text())[:200]}"}
            if not body.get("stream"):
                answer = json.loads(await response.read())
                reply.read_whole(answer)
                return {
                    "seconds": time.perf_counter() - started,
                    "first_token_seconds": None,
                    "tokens": reply.tokens,
                    "texts": answer.get("predictions"),
                }
            async for line in response.content:
                reply.read_line(line.decode().strip(), time.perf_counter() - started)
    except (aiohttp.ClientError, TimeoutError) as error:
        return {"error": repr(error)}
    if reply.outcome != "ok":
        return {"error": reply.outcome}
    return {
        "seconds": time.perf_counter() - started,
        "first_token_seconds": reply.first_token_seconds,
        "tokens": reply.tokens,
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(asyncio.run(run_job(**json.loads(line)))), flush=True)
