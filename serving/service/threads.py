"""Runs a function on a thread of its own, for the event loop."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any


async def in_thread(function: Callable, *arguments: Any) -> Any:
    """Call a function on a daemon thread, which the end of the program does not wait for.

    The program would wait for the threads of `asyncio.to_thread`, and a model may take minutes.
    """
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def call():
        result, error = None, None
        try:
            result = function(*arguments)
        except Exception as raised:
            error = raised
        except BaseException as raised:  # a model's sys.exit() ends the thread and nothing else
            error = RuntimeError(type(raised).__name__)
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits any more
            loop.call_soon_threadsafe(lambda: done.cancelled() or done.set_result((result, error)))

    threading.Thread(target=call, daemon=True).start()
    result, error = await done
    if error:
        raise error
    return result
