"""What tests share: where things are, errors by their code, and programs run as a user runs them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

from course.pages import read_pages, tracks_to_run
from helpers import CourseError

ROOT = Path(__file__).resolve().parents[2]
# What importing helpers has put into this process's environment; a user's shell has none of it.
OURS = ("HF_", "MLFLOW_", "DO_NOT_TRACK", "TOKENIZERS_", "TRANSFORMERS_", "LITELLM_")
TRACKS = ("TransformerPipeline", "CustomPythonWrapper")  # parallel, heading by heading
PAGES = tuple(tracks_to_run())
ALL_PAGES = tuple(page.name for page in read_pages())
# What each page registers.
NAMES = {
    "TransformerPipeline": "slm-transformers",
    "CustomPythonWrapper": "slm-onnx-prompt",
    "ChatModel": "slm-onnx",
}


def find_cell(page: str, text: str) -> str:
    """Return the source of the one code cell of a page that holds a text."""
    cells = nbformat.read(ROOT / "notebooks" / f"{page}.ipynb", as_version=4).cells
    (source,) = [cell.source for cell in cells if cell.cell_type == "code" and text in cell.source]
    return source


@contextmanager
def refuses(code: str) -> Iterator[pytest.ExceptionInfo]:
    """Expect a CourseError of this code; its sentences may get better without a test's breaking."""
    with pytest.raises(CourseError) as refusal:
        yield refusal
    assert refusal.value.code == code, refusal.value
    # Each is a sentence: it ends as one, and what to do begins as one.
    for sentence in (refusal.value.what, refusal.value.fix):
        assert sentence.endswith((".", "!", "?", ")")) and not sentence.isupper(), sentence
    assert refusal.value.fix[0].isupper(), refusal.value.fix


def user_environment() -> dict[str, str]:
    """Return this process's environment without what importing helpers has put into it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)}


def run_python(
    folder: Path, *arguments, network: bool = True, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess:
    """Run this Python as a user would, and return what it printed.

    ``network=False`` refuses every address but this machine's, and fails the test if one was asked
    for; ``folder`` gets the note of it.
    """
    environment = user_environment() | variables
    refused = folder / "refused.log"
    if not network:
        paths = [
            str(ROOT / "tests" / "support" / "no_network"),
            *filter(None, [variables.get("PYTHONPATH")]),
        ]
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "REFUSED_LOG": str(refused)}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    assert not refused.exists(), refused.read_text(encoding="utf-8")
    return result


def interrupt(command: list, begun: Callable[[], bool]) -> None:
    """Start a program of the course, press Ctrl-C once ``begun`` says that it is at work, and see how it ends."""
    # preexec_fn: where the tests run in the background, a shell has told them and their children to
    # ignore Ctrl-C.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not begun():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all that runs in it
    _, said = process.communicate()
    # A shell shows both codes as 130. Python takes the second one by itself where the interruption
    # fell into code that an import was compiling, whatever the program then does.
    assert process.returncode in (130, -signal.SIGINT), said
    assert "Interrupted. What is finished stays" in said
    assert "Traceback" not in said
