"""Refuses every connection and look-up that leaves this machine, and notes each try.

It works in any Python that has this folder on its PYTHONPATH; REFUSED_LOG names the file of notes.
"""

import os
import sys
from pathlib import Path

LOOPBACK = {"", "localhost", "127.0.0.1", "::1", "0.0.0.0", None}


def _refuse(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a Unix socket has no host
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if isinstance(host, bytes):
        host = host.decode()
    if host not in LOOPBACK:
        with Path(os.environ["REFUSED_LOG"]).open("a", encoding="utf-8") as log:
            log.write(f"{event} {host}\n")
        raise OSError(f"the test refuses the network: {host}")


sys.addaudithook(_refuse)
