"""The program: its options, who may reach the service, and how it starts and ends."""

import argparse
import ipaddress
import logging
import os
import re
import signal
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from ..errors import ProgramError
from .active_version import ModelAddress
from .app import Limits, Service
from .http_server import Server, listen

TOKEN = "SERVE_TOKEN"  # the environment variable with the bearer token
HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?|[0-9A-Fa-f:.]+")
LIMIT_HELPS = {
    "concurrent": "requests in the model at once; left out: 64, or 1 for a model without streams",
    "waiting": "requests that may wait to be admitted",
    "max_body": "bytes of a request",
    "max_tokens": "tokens that a request may ask for",
    "timeout": "seconds for an answer",
    "drain": "seconds that answers get to end after SIGTERM",
    "poll": "seconds between two polls of the alias",
    "keep_alive": "seconds until an idle connection is closed",
}


def read_options(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="serve",
        description="Serve an MLflow chat model to OpenAI's clients.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        default="models:/slm-onnx@champion",
        help="models:/NAME@ALIAS, models:/NAME/VERSION or a model's folder",
    )
    parser.add_argument(
        "--name", help="the name that requests use; left out: the registered or the model's own"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help=f"another one than this machine needs a token in {TOKEN}",
    )
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a host name that callers may use; repeat the option for more",
    )
    for field in fields(Limits):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=field.default,
            help=LIMIT_HELPS[field.name],
            type=_positive(float if field.type is float else int),
        )
    parser.add_argument(
        "--caller-header",
        metavar="HEADER",
        help="the header that names a caller; callers share no prompts in the model's cache",
    )
    parser.add_argument(
        "--traces", metavar="EXPERIMENT", help="write a trace of each request, without its texts"
    )
    parser.add_argument(
        "--trace-texts", action="store_true", help="write the texts into the traces, too"
    )
    return parser.parse_args(words)


def _positive(kind):
    def number(text):
        value = kind(text)
        if not 0 < value < 2**31:
            raise argparse.ArgumentTypeError("it has to be above 0")
        return value

    return number


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_reach(host: str, token: str | None, allowed: list[str]) -> set[str]:
    """Return the host names under which the service may be called.

    Raises
    ------
    ProgramError
        The service can be reached from other machines and lacks a token or a name, or one of them
        can't work.
    """
    if token is not None and not token.isprintable():
        raise ProgramError(
            f"The token in {TOKEN} holds a character that no HTTP header may have.",
            "Set it to printable characters.",
        )
    for name in allowed:
        if not HOST_NAME.fullmatch(name):
            raise ProgramError(
                f"--allowed-host {name} is no host name.",
                "Give the name alone, without scheme, port or *: --allowed-host api.example.com.",
            )
    names = {name.lower() for name in allowed}
    if is_loopback(host):
        return names | {"127.0.0.1", "localhost", "::1", host.lower()}
    if not token:
        raise ProgramError(
            f"Other machines can reach {host}, and the service has no token.",
            f"Set the variable {TOKEN} to a long random text that its callers know.",
        )
    if not names:
        raise ProgramError(
            "The service has no host name under which other machines may call it.",
            "Name it: --allowed-host NAME, once for each name.",
        )
    return names


def main(words: list[str]) -> int:
    """Serve until a signal comes. Return the exit code."""
    options = read_options(words)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        # When its terminal ends, the service lets answers end, as after SIGTERM.
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        _serve(options)
    except ProgramError as error:
        print(f"error: {error.what}\n       {error.fix}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _serve(options):
    token = os.environ.get(TOKEN, "").strip() or None  # a file's last line end is no part of it
    hosts = check_reach(options.host, token, options.allowed_host)
    try:
        # MLflow copies models to the temporary folder. This one is removed with the program.
        copies = tempfile.TemporaryDirectory(prefix="service-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ProgramError(
            f"There is no temporary folder to write to: {error.strerror}.",
            "Name one in the variable TMPDIR.",
        ) from None
    with copies as folder:
        tempfile.tempdir = folder
        service = Service(
            ModelAddress(options.model, Path(folder)),
            Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)}),
            name=options.name,
            traces=options.traces,
            trace_texts=options.trace_texts,
            caller_header=options.caller_header,
            separates_addresses=not is_loopback(options.host),
        )
        Server(service, listen(options.host, options.port), token, hosts).run()
