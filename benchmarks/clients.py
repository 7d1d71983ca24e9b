"""HTTP clients in a process of their own: jobs come in as lines of JSON, what each request took goes out.

Who measures a server from inside another busy process measures that process, too. ``Clients``
starts this file as a program, and talks to it.
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

SECONDS = 600  # for one answer


class Clients:
    """So many HTTP clients as a job wants, on the other side of a pipe."""

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
        """Send requests, ``callers`` at a time. Return the seconds until all had their answers, and what each took.

        Of each request, in order: ``seconds``; ``first_token_seconds``, None for an answer that
        comes whole; its ``tokens``, as the server counted them; ``texts``, if it is MLflow's
        server, which counts none.

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
    """Let ``callers`` work off the requests, each as soon as it is free."""
    left, replies = iter(enumerate(bodies)), {}
    timeout, connector = aiohttp.ClientTimeout(SECONDS), aiohttp.TCPConnector(limit=0)
    # A session for each job: a server may close a connection that was idle between two jobs.
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def call():
            for place, body in left:
                replies[place] = await _ask(session, url, body)

        started = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(callers)))
        seconds = time.perf_counter() - started
    return seconds, [replies[place] for place in range(len(bodies))]


async def _ask(session, url, body):
    started, reply = time.perf_counter(), Reply()
    # llama.cpp's server ends a connection behind a stream, though it says that it keeps it: nobody
    # keeps one here.
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
