"""The commands and the Python blocks of the documents, run as printed in a checkout.

Run: python -m helpers nightly tests/nightly/test_snippets.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from support import OURS, PAGES, ROOT
from support.commands import find_commands, read_settings
from support.markdown import read_html
from support.user import make_checkout

from helpers.paths import model_cache

# What is run, in this order: the rest wants what the pages log. Other tests run the other commands,
# but for those that fetch gigabytes, or want an account or a cluster.
RUN = (
    r"python -m helpers run -p .*",
    r"export [A-Z_]+=\S+",
    r"mlflow run \. .*",
    r"papermill .*",
    r"mlflow artifacts download .*",
    r"python -m helpers deploy azureml --dry-run",
    r"python -m nbstripout .*",
    r"(make|python -m helpers) clean",
    r"python -m helpers exercises",
)
# The call with which a page ends here: it has its parameters, its checks and its store, and the
# third its model.
LAST_CALL = dict.fromkeys(PAGES, "mlflow.set_experiment(") | {"ChatModel": "log_model("}
# What it does then, in place of the minute that it takes elsewhere.
END = """
with mlflow.start_run(run_id=run.info.run_id if "run" in globals() else None):
    mlflow.log_metric("tokens_per_second", 7)
    mlflow.log_text(f"question,answer\\n{question},yes\\n", "answers.csv")
if "model_info" in globals():
    version = mlflow.register_model(model_info.model_uri, "slm-onnx")
    mlflow.MlflowClient().set_registered_model_alias("slm-onnx", "champion", version.version)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Return a checkout in which a page takes seconds: its first cells are the real ones."""
    folder = make_checkout(tmp_path_factory.mktemp("snippets") / "a course")
    for page, call in LAST_CALL.items():
        file = folder / "notebooks" / f"{page}.ipynb"
        notebook = nbformat.read(file, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        (last, *_) = [number for number, cell in enumerate(code) if call in cell.source]
        notebook.cells = [*code[: last + 1], nbformat.v4.new_code_cell(END)]
        nbformat.write(notebook, file)
    return folder


def user_environment(checkout: Path) -> dict:
    """Return the environment of somebody who has activated ``.venv`` and prepared the models, in this checkout."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("COURSE_", "PYTHON", *OURS))
    }
    # The packages are this environment's own, and the course among them is another checkout.
    return kept | {
        "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"],
        "PYTHONPATH": str(checkout),
        "COURSE_CACHE": str(model_cache()),
        "OMP_NUM_THREADS": "1",
    }


def files_of(folder: Path) -> set[str]:
    """Return what stands in a checkout, but for what git ignores by name and a run may leave: build/ and bytecode."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] != "build" and "__pycache__" not in path.parts
    }


def test_the_commands_run_as_printed_and_leave_nothing_but_build(checkout, smol):
    environment = user_environment(checkout)
    where = [sys.executable, "-c", "from helpers.paths import ROOT; print(ROOT)"]
    said = subprocess.run(
        where, cwd=checkout, env=environment, capture_output=True, text=True
    ).stdout
    assert Path(said.strip()) == checkout.resolve()  # what is cleaned away below is this one's
    before = files_of(checkout)
    commands = [line for pattern in RUN for line in find_commands() if re.fullmatch(pattern, line)]
    assert len(commands) >= len(RUN)
    for command in commands:
        if command.startswith("export "):
            environment |= read_settings(command)[0]
            continue
        if command.startswith("make ") and not shutil.which("make"):
            command = command.replace("make ", "python -m helpers ")
        result = subprocess.run(
            command,
            shell=True,
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        assert result.returncode == 0, (command, result.stdout + result.stderr)
        asked = re.search(r"question[ =]\"(.*?)\"", command)
        pages = "".join(path.read_text(encoding="utf-8") for path in checkout.glob("build/*.ipynb"))
        assert not asked or f"Q  {asked[1]}" in result.stdout or asked[1] in pages, command
        assert files_of(checkout) == before, command
        if command == commands[0]:  # docs/chat-model.md wants the pages to have run
            check_python_blocks(checkout)
            assert files_of(checkout) == before
    assert not (checkout / "build").exists()


def check_python_blocks(checkout):
    """Paste the blocks of docs/chat-model.md into one Python, as it says, and compare what they print."""
    page = read_html(ROOT / "docs" / "chat-model.md")
    blocks = [code.text for code in page.select("code.language-python")]
    printed = page.select_one("pre > code:not([class])").text
    assert len(blocks) == 2
    environment = user_environment(checkout)
    del environment["PYTHONPATH"]  # it imports nothing of the course
    mark = "print(chr(0))\n"
    last = "import sys; print({name.split('.')[0] for name in sys.modules} & {'helpers', 'course', 'serving'})\n"
    result = subprocess.run(
        [sys.executable, "-i", "-q"],
        cwd=checkout,
        env=environment,
        text=True,
        encoding="utf-8",
        input=mark.join(f"{block}\n" for block in [*blocks, last]),
        capture_output=True,
    )
    *said, imported = result.stdout.split("\0\n")
    assert "Traceback" not in result.stderr and "Error" not in result.stderr, result.stderr
    assert imported == "set()\n"
    assert said[0] == printed
    answer = json.loads(said[1])
    assert (list(answer), type(answer["answer"]), type(answer["sure"])) == (
        ["answer", "sure"],
        str,
        bool,
    )
