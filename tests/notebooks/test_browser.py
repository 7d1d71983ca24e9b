"""Runs each track in JupyterLab, in a real browser, and looks at the page as a learner does.

JupyterLab gets copies of the notebooks: it saves what it shows.
Run: python -m helpers test tests/notebooks/test_browser.py
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import nbformat
import pytest

from course.doctor.checks import find_chromium
from course.execute import PAGES
from helpers.paths import BUILD, NOTEBOOKS

try:
    from playwright.sync_api import expect, sync_playwright
except ModuleNotFoundError:
    sync_playwright = None

CHROMIUM = find_chromium()
MISSING = " ".join([
    "" if CHROMIUM else "Install Chromium (on Debian: apt-get install chromium) or Google Chrome, on the PATH.",
    "" if sync_playwright else "Install Playwright: python -m helpers test does, with the other test packages.",
]).strip()
if MISSING:
    # CI installs both: a skip there would hide that nobody looks at the pages any more.
    if os.environ.get("CI") == "true":
        pytest.fail(MISSING, pytrace=False)
    pytest.skip(MISSING, allow_module_level=True)

# Chromium's sandbox refuses to start as root. The other flags keep it from calling home.
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                  "--disable-background-networking", "--disable-component-update"]
pytestmark = pytest.mark.slow

# The longest that any one wait may take. A whole track takes 10 to 20 seconds.
PATIENCE = 180
CODE_CELL = ".jp-Notebook .jp-CodeCell"
# True once the first cell has its number and no cell waits for the kernel any longer, also when one has failed.
ALL_DONE = """selector => {
    const prompts = [...document.querySelectorAll(selector + " .jp-InputPrompt")].map(prompt => prompt.textContent);
    return /\\d/.test(prompts[0]) && !prompts.some(prompt => prompt.includes("*"));
}"""
# JupyterLab shows an error, a warning and MLflow's word on a new version in the same red box.
RED_BOX = f'{CODE_CELL} .jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]'
HARMLESS = re.compile(r"Successfully registered model '[\w-]+'\.|Created version '1' of model '[\w-]+'\.")


@pytest.fixture(scope="module")
def browser():
    """Start Chromium without a window."""
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)


@pytest.fixture(scope="module", params=PAGES)
def page(request, browser, tiny, tmp_path_factory):
    """Run a track and show its page. The model is there before: its progress bars would be on the page."""
    with run_all_cells(browser, request.param, tmp_path_factory.mktemp(request.param)) as page:
        yield page


# First, while no track's JupyterLab is up: the absence of red lines below says something because of this.
def test_an_error_would_be_seen(browser, tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in ("1/0", "2")]
    # Without a kernel's name JupyterLab asks for one.
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    with run_all_cells(browser, "Broken", tmp_path, notebook) as page:
        assert "ZeroDivisionError: division by zero" in red_lines(page)
        assert prompts(page) == ["[1]:", "[ ]:"]


def test_every_code_cell_has_run(page):
    assert prompts(page) == [f"[{number + 1}]:" for number in range(len(prompts(page)))]


def test_no_error_and_no_warning_is_shown(page):
    assert [line for line in red_lines(page) if not HARMLESS.fullmatch(line)] == []


def test_the_diagram_is_loaded(page):
    diagram = page.locator('.jp-MarkdownCell img[src*="mlflow-loop.svg"]')
    assert diagram.evaluate("image => image.naturalWidth") > 0


def test_the_signature_is_a_table(page):
    table = page.locator(f"{CODE_CELL} table", has=page.locator("caption", has_text=re.compile("^Signature$")))
    expect(table).to_have_count(1)
    expect(table.locator("thead th")).to_have_text(["Field", "Part", "Type", "Required", "Default"])


def test_the_last_cell_shows_the_champion(page):
    expect(page.locator(CODE_CELL).last.locator("caption")).to_have_text("The champion")


def prompts(page):
    """Return what stands left of each code cell, such as ``"[1]:"``."""
    return page.locator(f"{CODE_CELL} .jp-InputPrompt").all_text_contents()


def red_lines(page):
    """Return the lines in a page's red boxes."""
    # Not innerText: that is empty for cells that the browser has not laid out, those out of view.
    return [line for box in page.locator(RED_BOX).all_text_contents() for line in box.splitlines() if line.strip()]


@contextmanager
def run_all_cells(browser, name, folder, notebook=None):
    """Run a notebook with Run > Run All Cells and yield its page; leave a screenshot of its end.

    Parameters
    ----------
    browser : playwright.sync_api.Browser
    name : str
        Such as ``"TransformerPipeline"``.
    folder : pathlib.Path
        Gets the copies, JupyterLab's own files and the tracking store.
    notebook : nbformat.NotebookNode, optional
        Written under that name; the course has it otherwise.
    """
    shutil.copytree(NOTEBOOKS, folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    copy = folder / "notebooks" / f"{name}.ipynb"
    if notebook:
        nbformat.write(notebook, copy)
    code_cells = sum(cell.cell_type == "code" for cell in nbformat.read(copy, as_version=4).cells)
    screenshot = BUILD / "browser" / f"{name}.png"
    screenshot.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex()
    with jupyterlab(folder, token) as address, browser.new_page(viewport={"width": 1280, "height": 1000}) as page:
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(f"{address}/lab/tree/{name}.ipynb?token={token}")
        # The notebook's own indicator says idle before there is a session, and Run All then skips the code.
        expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=PATIENCE * 1000)
        # JupyterLab puts the cells on the page one by one.
        expect(page.locator(CODE_CELL)).to_have_count(code_cells, timeout=PATIENCE * 1000)
        page.locator("#jp-MainMenu").get_by_text("Run", exact=True).click()
        page.locator("li[data-command='runmenu:run-all']").click()
        try:
            page.wait_for_function(ALL_DONE, arg=CODE_CELL)
        finally:
            page.locator(".jp-Notebook .jp-Cell").last.scroll_into_view_if_needed()
            page.screenshot(path=screenshot)
        yield page


@contextmanager
def jupyterlab(folder, token):
    """Serve ``folder/notebooks`` on this machine and yield the server's address."""
    # A user's own Jupyter and MLflow settings play no part.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "MLFLOW_"))}
    environment |= {
        "JUPYTER_TOKEN": token,
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "IPYTHONDIR": str(folder / "ipython"),
        "COURSE_MODEL": "tiny-phi3",
        "COURSE_TRACKING_URI": f"sqlite:///{(folder / 'mlflow.db').as_posix()}",
    }
    # Otherwise a question about Jupyter's news lies over the page, and the server asks PyPI for a newer one.
    settings = folder / "config/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    log = folder / "jupyterlab.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
             "--ServerApp.port=0", f"--ServerApp.root_dir={folder / 'notebooks'}",
             "--KernelManager.transport_encryption=auto"],
            env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield find_address(server, log)
    finally:
        server.terminate()  # it ends its kernels, too
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def find_address(server, log):
    """Return the address in JupyterLab's log, once somebody listens there."""
    end = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < end:
        found = re.search(r"http://127\.0\.0\.1:(\d+)/lab", log.read_text(errors="replace"))
        with suppress(ConnectionRefusedError):
            if found:
                socket.create_connection(("127.0.0.1", int(found[1]))).close()
                return f"http://127.0.0.1:{found[1]}"
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text(errors='replace')}", pytrace=False)
