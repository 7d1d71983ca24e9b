"""Starts the service: ``python -m serving.service --model models:/slm-onnx@champion``."""

import signal
import sys

# As the first process of a container, Python would ignore these signals until a handler is there,
# and the imports below take seconds. The service later sets handlers that let answers end first.
for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):  # the last one is Windows'
    # Under nohup, SIGHUP is ignored, and stays so.
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
        signal.signal(getattr(signal, name), lambda *_: sys.exit(0))

from .command_line import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
