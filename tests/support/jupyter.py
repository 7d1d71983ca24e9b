"""Opens notebooks in a browser, in a JupyterLab of this machine."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from course.commands import lab_options
from helpers.paths import BUILD, NOTEBOOKS

try:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import BrowserContext, Page, expect, sync_playwright
except ModuleNotFoundError:
    Axe = expect = sync_playwright = None

# The longest that any one wait may take. A whole page takes 10 to 20 seconds.
PATIENCE = 180
SCREENSHOTS = BUILD / "browser"
# What a learner's laptop shows at least.
SCREEN = {"width": 1366, "height": 768}
CHROMIUM = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    os.path.expandvars(r"%ProgramFiles%\Google\Chrome\Application\chrome.exe"),
)
# Chromium's sandbox refuses to start as root. The other flags keep it from calling home, and from
# any other machine.
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]
CODE_CELL = ".jp-Notebook .jp-CodeCell"
# True once the first cell has its number and no cell waits for the kernel any longer, also when one
# has failed.
ALL_DONE = """selector => {
    const prompts = [...document.querySelectorAll(selector + " .jp-InputPrompt")].map(prompt => prompt.textContent);
    return /\\d/.test(prompts[0]) && !prompts.some(prompt => prompt.includes("*"));
}"""
# JupyterLab's own command, and what the cell then shows.
RUN = """async ([index, seconds]) => {
    const notebook = jupyterapp.shell.currentWidget.content;
    notebook.activeCellIndex = index;
    const tooLong = new Promise((_, reject) => setTimeout(reject, 1000 * seconds, Error(`cell ${index} does not end`)));
    await Promise.race([jupyterapp.commands.execute("notebook:run-cell"), tooLong]);
}"""
OUTPUTS = "index => jupyterapp.shell.currentWidget.content.widgets[index].model.toJSON().outputs"
EXECUTE = "code => jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code}).done"
WRITE = "([index, source]) => jupyterapp.shell.currentWidget.content.widgets[index].model.sharedModel.setSource(source)"
# JupyterLab shows an error, a warning and MLflow's word on a new version in the same red box.
RED_BOX = f'{CODE_CELL} .jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]'


def find_chromium() -> str | None:
    """Return the path of the browser that the tests drive; None if there is none."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


def need_chromium() -> None:
    """Skip the module that asks where no browser can be driven; on CI, fail."""
    missing = " ".join(
        [
            ""
            if find_chromium()
            else "Install Chromium (on Debian: apt-get install chromium) or Google Chrome.",
            ""
            if sync_playwright
            else "Install Playwright and axe: python -m helpers test does so, with other packages.",
        ]
    ).strip()
    if missing:
        # CI installs both: a skip there would hide that nobody looks at the pages any more.
        if os.environ.get("CI") == "true":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing, allow_module_level=True)


@contextmanager
def browser() -> Iterator[tuple["BrowserContext", list[str]]]:
    """Start Chromium without a window; yield its context, and a list that gets each address that its pages ask."""
    asked = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_FLAGS)
        context = chromium.new_context(viewport=SCREEN)
        context.set_default_timeout(PATIENCE * 1000)
        expect.set_options(timeout=PATIENCE * 1000)
        context.on("request", lambda request: asked.append(request.url))
        context.on(
            "page", lambda page: page.on("websocket", lambda socket: asked.append(socket.url))
        )
        yield context, asked
        chromium.close()


def elsewhere(asked: list[str]) -> list[str]:
    """Return those of the addresses that are not on this machine."""
    return sorted(
        {
            url
            for url in asked
            if urlsplit(url).scheme not in ("data", "blob")
            and urlsplit(url).hostname not in ("127.0.0.1", "localhost")
        }
    )


def take(page: "Page", name: str) -> None:
    """Leave a screenshot in ``build/browser``."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


class Notebook:
    """A notebook that is open in JupyterLab, with Playwright's ``page``. A cell's index counts Markdown cells, too."""

    def __init__(self, page: "Page"):
        self.page = page

    def save(self) -> None:
        """Press Ctrl-S, and wait until the server has written the file."""
        with self.page.expect_response(
            lambda response: response.request.method == "PUT" and "/api/contents/" in response.url
        ) as saved:
            self.page.keyboard.press("Control+s")
        assert saved.value.ok, saved.value.status_text

    def run_all(self) -> None:
        """Choose Run > Run All Cells, and wait until the last one is done or one has failed."""
        self.page.locator("#jp-MainMenu").get_by_text("Run", exact=True).click()
        self.page.locator("li[data-command='runmenu:run-all']").click()
        self.page.wait_for_function(ALL_DONE, arg=CODE_CELL)

    def run(self, index: int) -> str:
        """Do Run > Run Selected Cell and Do not Advance, wait until it is done, and return the text of its outputs."""
        self.page.evaluate(RUN, [index, PATIENCE])
        return self.text(index)

    def text(self, index: int) -> str:
        """Return a cell's outputs as text; an error is its traceback, the red box is left out."""
        texts = []
        for output in self.page.evaluate(OUTPUTS, index):
            if output["output_type"] == "error":
                texts.append("\n".join(["Traceback", *output["traceback"]]))
            elif output["output_type"] != "stream":
                texts.append(_joined(output["data"]["text/plain"]))
            elif output["name"] == "stdout":
                texts.append(_joined(output["text"]))
        return "\n".join(texts)

    def write(self, index: int, source: str) -> None:
        """Put other code into a cell."""
        self.page.evaluate(WRITE, [index, source])

    def execute(self, code: str) -> None:
        """Run code in the kernel, and in no cell."""
        assert self.page.evaluate(EXECUTE, code)["content"]["status"] == "ok"

    def cell(self, index: int):
        """Return the locator of a cell, which may be out of view."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index)

    def prompts(self) -> list[str]:
        """Return what stands left of each code cell, such as ``"[1]:"``."""
        return self.page.locator(f"{CODE_CELL} .jp-InputPrompt").all_text_contents()

    def red_lines(self) -> list[str]:
        """Return the lines in the red boxes."""
        # Not innerText: that is empty for cells that the browser has not laid out, those out of
        # view.
        return [
            line
            for box in self.page.locator(RED_BOX).all_text_contents()
            for line in box.splitlines()
            if line.strip()
        ]


def _joined(text):
    return text if isinstance(text, str) else "".join(text)


class Lab:
    """A JupyterLab at ``address``, which shows the notebooks in ``folder``."""

    def __init__(self, folder: Path, address: str, token: str):
        self.folder, self.address, self.token = folder, address, token

    @contextmanager
    def open(self, context: "BrowserContext", name: str, code_cells: int) -> Iterator[Notebook]:
        """Show ``name.ipynb`` in a tab of its own once its kernel is there; end the kernel and the tab thereafter."""
        page = context.new_page()
        # A workspace of its own: JupyterLab would open the other pages again in the same one.
        page.goto(f"{self.address}/lab/workspaces/{name}/tree/{name}.ipynb?token={self.token}")
        # The notebook's own indicator says idle before there is a session, and Run All then skips
        # the code.
        expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle")
        # JupyterLab puts the cells on the page one by one.
        expect(page.locator(CODE_CELL)).to_have_count(code_cells)
        try:
            yield Notebook(page)
        finally:
            page.evaluate("jupyterapp.serviceManager.sessions.shutdownAll()")
            page.close()


@contextmanager
def jupyterlab(folder: Path, model: str = "tiny-phi3") -> Iterator[Lab]:
    """Serve copies of the course's notebooks as `python -m helpers lab` does; ``folder`` gets all that is written."""
    notebooks = folder / "notebooks"
    shutil.copytree(NOTEBOOKS, notebooks, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    token = secrets.token_hex()
    # A user's own Jupyter and MLflow settings play no part.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JUPYTER", "MLFLOW_"))
    }
    environment |= {
        "JUPYTER_TOKEN": token,
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "IPYTHONDIR": str(folder / "ipython"),
        "COURSE_MODEL": model,
        "COURSE_TRACKING_URI": f"sqlite:///{(folder / 'mlflow.db').as_posix()}",
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        *lab_options(),
        "--no-browser",
        "--ServerApp.port=0",
        f"--ServerApp.root_dir={notebooks}",
        "--LabApp.expose_app_in_browser=True",
    ]
    with server(
        command, environment, folder / "jupyterlab.log", r"http://127\.0\.0\.1:\d+(?=/lab)"
    ) as address:
        yield Lab(notebooks, address, token)


@contextmanager
def server(
    command: list[str], environment: dict[str, str], log: Path, address: str
) -> Iterator[str]:
    """Run a server, and yield its address: what matches ``address`` in its log, once somebody listens there."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield _find_address(process, log, address)
    finally:
        process.terminate()  # it ends its own children, too: kernels, workers
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _find_address(process, log, address):
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        with suppress(ConnectionRefusedError):
            if found := re.search(address, log.read_text(errors="replace")):
                socket.create_connection(("127.0.0.1", urlsplit(found[0]).port)).close()
                return found[0]
        time.sleep(0.1)
    return pytest.fail(
        f"The server did not start:\n{log.read_text(errors='replace')}", pytrace=False
    )
