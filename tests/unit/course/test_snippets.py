"""Every command and every snippet that the texts print: run here as printed, or read by the program that it names.

They come out of the texts themselves. One that no line of TREATMENTS is about fails: nobody runs it.

Run: python -m helpers test tests/unit/course/test_snippets.py
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from support import OURS, PAGES, ROOT
from support.commands import TARGETS, find_fault, read_helpers, read_settings
from support.markdown import inline_code, split_fences, without_fences
from support.user import make_checkout

from course.commands import COMMANDS
from helpers import in_terminal
from helpers.models.catalogue import CatalogueEntry, read_catalogue
from helpers.models.sources import source_of
from helpers.paths import BUILD, model_cache
from serving import openai_server, spark_batch

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("notebooks/*.md")),
             *sorted(ROOT.glob("notebooks/*.ipynb")), ROOT / "CONTRIBUTING.md",
             *sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"))]
DATA = {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}
SHELLS = ("", "sh", "bash", "console", "powershell")

# What is done with a command: RUN runs it in a checkout of the course, in this order. READ has the program that it
# names read it, as all commands are read, and says why no more. The first pattern that a command fits counts.
RUN, READ = "run", "read"
TREATMENTS = (
    (r"python -m helpers run -p .*", RUN, ""),
    (r"export [A-Z_]+=\S+", RUN, ""),
    (r"mlflow run \. .*", RUN, ""),
    (r"papermill .*", RUN, ""),
    (r"mlflow artifacts download .*", RUN, ""),
    (r"python -m helpers deploy azureml --dry-run", RUN, ""),
    (r"python -m nbstripout .*", RUN, ""),
    (r"(make|python -m helpers) clean", RUN, ""),
    (r"python -m helpers (exercises|COMMAND)", RUN, ""),
    (r"(make|(\.venv/bin/)?python -m helpers) run( MODEL=\S+| --model \S+)?", READ,
     "this file runs it with other parameters"),
    (r"python -m helpers notebook .*", READ, "tests/unit/notebooks/test_course.py runs each page by it"),
    (r"(make|python -m helpers) (test|check)", READ, "what runs this test"),
    (r"(make|python -m helpers) lab( MODEL=\S+)?", READ, "tests/unit/notebooks/test_browser.py opens JupyterLab"),
    (r"(make|python -m helpers) ui", READ, "tests/unit/notebooks/test_ui.py opens it"),
    (r"python -m helpers serve( .*)?", READ, "tests/unit/serving/test_openai_service.py serves by it"),
    (r"python -m helpers batch .*", READ, "tests/unit/serving/test_spark_batch.py runs that program"),
    (r"python -m pip install --editable \"\.\[(spark|azure)\]\"", READ, "tests/support/extras.py installs its pins"),
    (r"python -m helpers deploy azureml( --part online)?", READ, "tests/unit/course/test_azure.py answers as Azure does"),
    (r"az ml [a-z -]+", READ, "it needs an account; tests/unit/course/test_azure.py sends what it would send"),
    (r"docker (build|run) .*", READ, "tests/unit/course/test_container.py runs what an image would run"),
    (r"docker buildx imagetools inspect .*", READ, "it asks Docker's registry"),
    (r"kubectl (create|apply) .*", READ, "it needs a cluster; tests/unit/course/test_container.py checks the files"),
    (r"python -m uv pip compile .*", READ, "tests/unit/course/test_container.py compares what it made"),
    (r"(make|python -m helpers) doctor", READ, "tests/unit/course/test_doctor.py runs it"),
    (r"(make|python -m helpers) (bench|mutate)( --keep)?", READ, "it takes an hour"),
    (r"(make|python -m helpers) generate", READ, "tests/unit/course/test_generate.py compares what it writes"),
    (r"(make|python -m helpers) distclean", READ, "it takes .venv away; tests/unit/course/test_setup.py sees what"),
    (r"make setup", READ, "tests/unit/course/test_setup.py sets up, for minutes"),
    (r"python -m helpers prepare( .*)?", READ, "tests/unit/helpers/test_hub.py fetches and exports from a Hub"),
    (r"python -m helpers kit build .*", READ, "it fetches gigabytes; tests/unit/course/test_kit_build.py builds small ones"),
    (r"python -m helpers kit serve .*", READ, "tests/unit/course/test_kit_serve.py serves one"),
    (r"python -m helpers kit check .*", READ, "tests/unit/course/test_kit_serve.py checks one"),
    (r"COURSE_KIT=\S+ python3 -m helpers run", READ, "tests/unit/course/test_kit_room.py runs the course from a kit"),
    (r"\$env:\w+=.*", READ, "its twin for a POSIX shell is run, and PowerShell is not everywhere"),
    (r"conda env create .*", READ, "conda fetches gigabytes; tests/unit/course/test_generate.py compares the file"),
    (r"mlflow (run|models build-docker|models generate-dockerfile|models serve)", READ, "the command's name alone"),
    (r"mlflow models serve .*", READ, "tests/unit/notebooks/test_course.py serves by these lines"),
    (r"curl .*/v1/chat/completions .*", READ, "tests/unit/serving/test_openai_clients.py asks by curl"),
    (r"curl .*", READ, "tests/unit/notebooks/test_course.py asks by these lines"),
)
# Inline code of several words that is no command: what is said in a page or by it.
SAID = ("Answer in one short sentence.", "Failed to predict data", "Not yet:", "What is the capital of Spain?",
        "kill -9", "-(-waiting // target)", "9 // 4", "spark.executor.memoryOverhead=2g")


@dataclass(frozen=True)
class Snippet:
    """A piece of code in a text: where it stands, its language, the code, and the line of prose before it."""

    place: str
    language: str  # of a fenced block; "inline" for inline code, "printed" for what a page prints for a terminal
    text: str
    before: str = ""


def find_snippets(path: Path) -> list[Snippet]:
    """Return all snippets of a document or a page, in the order of its texts; inline code comes after fenced code."""
    place = path.relative_to(ROOT).as_posix()
    if path.suffix != ".ipynb":
        return list(read_text(place, path.read_text(encoding="utf-8")))
    found = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            solution = " solution" if "solution" in cell.metadata.get("tags", []) else ""
            found += read_text(place + solution, cell.source)
        elif "in_terminal(" in cell.source:
            found += [Snippet(place, "printed", lines.split("\n")[-1]) for lines in printed(cell.source)]
    return found


def read_text(place, text):
    lines = without_fences(text).split("\n")
    for fence in split_fences(text)[1]:
        before = next((line.strip() for line in reversed(lines[:fence.line - 1]) if line.strip()), "")
        yield Snippet(place, fence.language, fence.text, before)
    yield from (Snippet(place, "inline", code) for code in inline_code(text))


def printed(source: str) -> list[str]:
    """Return what a cell prints for a terminal, with names of ours in place of the page's own."""
    uri = "sqlite:///" + (BUILD / "mlflow.db").as_posix()
    known = {"in_terminal": in_terminal, "alias": "champion", "folder": Path("a folder"), "json": json,
             "store": SimpleNamespace(uri=uri), "tracking_address": uri, "name": "slm-onnx", "port": 5001,
             "server": SimpleNamespace(address="http://127.0.0.1:5001"), "messages": []}
    for node in ast.parse(source).body:  # the words of a command that is run and printed
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Dict):
            exec(compile(ast.Module([node], []), "cell", "exec"), known)
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name) and node.func.id == "in_terminal"]
    return [eval(compile(ast.Expression(call), "cell", "eval"), known).strip() for call in calls]


def kind_of(snippet: Snippet) -> str:
    """Return what a snippet is: "commands", "output", "folders", "word", or its language."""
    text, language = snippet.text, snippet.language
    if language == "inline":
        field = re.fullmatch(r"\{.*\}|\w+: \S+|[a-z_]+=(\S+|\{.*\})|(GET|POST) /\S+|slm_\w+.*", text)
        if text in SAID or field or not re.search(r"[\s=\\]|^-|^\$|/bin/", text):
            return "word"
        if re.match(r"--?[a-z]", text):
            return "option"
        if re.fullmatch(r"\.venv\S+", text):
            return "path"
        return "variable" if re.fullmatch(r"[A-Z]+=\S*", text) else "commands"
    if language == "printed":
        return "commands"
    if language in SHELLS:
        if snippet.before.endswith("prints:"):
            return "output"
        return "folders" if all(re.match(r"\S+/ {2,}\S", line) for line in text.split("\n")) else "commands"
    return language


def treat(command: str) -> tuple[str, str]:
    """Return what is done with a command, and why; KeyError where nobody has thought of it."""
    for pattern, how, why in TREATMENTS:
        if re.fullmatch(pattern, command, re.DOTALL):
            return how, why
    raise KeyError(f"nobody runs this one: {command}")


SNIPPETS = [snippet for path in DOCUMENTS for snippet in find_snippets(path)]
LINES = [(snippet.place, line) for snippet in SNIPPETS if kind_of(snippet) == "commands"
         for line in snippet.text.split("\n") if line.strip()]
COMMAND_LINES = list(dict.fromkeys(line for _, line in LINES))


# --- all of them are read --------------------------------------------------------------------


def test_each_text_has_snippets_where_it_had_some():
    places = {snippet.place.split()[0] for snippet in SNIPPETS if kind_of(snippet) != "word"}
    assert {"README.md", "CONTRIBUTING.md", "docs/chat-model.md", "docs/models.md", "docs/parameters.md",
            "docs/troubleshooting.md", "docs/workshop.md", ".github/ISSUE_TEMPLATE/bug_report.yml",
            *(f"notebooks/{page}.ipynb" for page in PAGES)} <= places
    assert sum(snippet.language == "printed" for snippet in SNIPPETS) == 10


@pytest.mark.parametrize("command", [
    pytest.param(line, marks=[pytest.mark.slow] if line.startswith("mlflow ") else []) for line in COMMAND_LINES])
def test_a_command_is_one_that_its_program_takes_and_somebody_runs(command):
    how, why = treat(command)
    assert find_fault(command) is None
    assert bool(why) == (how == READ)
    for file in re.findall(r"tests/\S+\.py", why):
        assert (ROOT / file).is_file()


def test_each_treatment_is_some_commands():
    first = {next((pattern for pattern, _, _ in TREATMENTS if re.fullmatch(pattern, line, re.DOTALL)), None)
             for line in COMMAND_LINES}
    assert [pattern for pattern, _, _ in TREATMENTS if pattern not in first] == []
    assert [words for words in SAID if words not in {snippet.text for snippet in SNIPPETS}] == []


@pytest.mark.parametrize(("command", "says"), [
    ("make runn", "the Makefile has no runn"),
    ("make run MODLE=tiny-phi3", "the Makefile has no MODLE"),
    ("make run MODEL=tiny-phi4", "no model called 'tiny-phi4'"),
    ("python -m helpers rum", "no command called rum"),
    ("python -m helpers run --modle tiny-phi3", "usage"),
    ("python -m helpers run --model tiny-phi4", "no model called 'tiny-phi4'"),
    ("python -m helpers run -p model tiny-phi4", "no model called 'tiny-phi4'"),
    ("python -m helpers run -p qestion Who?", "qestion"),
    ("python -m helpers notebook TrackA", "no notebook called 'TrackA'"),
    ("python -m helpers kit build kit --platform win", "usage"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("mlflow rum . -e chat_model", "no command rum"),
        ("mlflow run . --env-mgr local", "No such option"),
        ("mlflow models serve --env-manager local", "Missing option"))),
    ("papermill notebooks/TrackA.ipynb build/out.ipynb", "there is no notebooks/TrackA.ipynb"),
    ("papermill notebooks/ChatModel.ipynb build/out.ipynb -p question", "-p"),
    ("COURSE_KITT=kit python3 -m helpers run", "no table in docs/ has COURSE_KITT"),
    ('$env:COURSE_KIT="kit"; python -m helpers rum', "no command called rum"),
    ("export MLFLOW_TRACKING_URI=sqlite:///mlflow.db", "not the course's store"),
    ("conda env create --file environment.yaml", "no environment.yaml"),
    ("curl http://example.org/invocations", "asks another machine"),
    ("az ml model make", "the course prints no such command"),
    ("docker build --file deploy/Dockerfile .", "there is no deploy/Dockerfile"),
    ("pip install x", "nobody knows how to read pip"),
])
def test_a_command_that_would_fail_is_noticed(command, says):
    assert says in (find_fault(command) or "")


@pytest.mark.parametrize(("text", "kinds"), [
    ("Run `helm install x` or `pip install x`.", ["commands", "commands"]),
    ("Set `X=1` with `--export`, `-p`; a `word`, `n: 2`, `{\"a\": 1}`.",
     ["variable", "option", "option", "word", "word", "word"]),
    ("It prints:\n\n```\n4\n```\n- Then:\n\n  ```sh\n  make rum\n  ```", ["output", "commands"]),
    ("```\na/   one\n```\n```rust\nx\n```", ["folders", "rust"]),
    ("```\nmake run", ["commands"]),
])
def test_what_a_snippet_is(text, kinds):
    found = list(read_text("x.md", text))
    assert [kind_of(snippet) for snippet in found] == kinds
    for snippet in found:
        if kind_of(snippet) == "commands" and snippet.text != "make run":
            with pytest.raises(KeyError, match="nobody runs this one"):
                treat(snippet.text)


def of_kind(kind):
    found = [snippet for snippet in SNIPPETS if kind_of(snippet) == kind]
    assert found, f"no text has a snippet of the kind {kind}"
    return found


def test_every_block_is_of_a_kind_that_somebody_reads():
    known = {"commands", "word", "option", "path", "variable", "output", "folders", "python", *DATA}
    assert [snippet for snippet in SNIPPETS if kind_of(snippet) not in known] == []


def test_options_variables_paths_and_folders_that_are_named_are_there(capsys):
    for program in (openai_server, spark_batch):
        with pytest.raises(SystemExit):
            program.read_options(["--help"])
    helps = "\n".join([capsys.readouterr().out, *(help_of(name) for name in COMMANDS)])
    for snippet in of_kind("option"):
        assert re.search(rf"(?<![\w-]){snippet.text}(?![\w-])", helps), snippet
    for snippet in of_kind("variable"):
        name, value = snippet.text.split("=")
        assert find_fault(f"make {name}=" + ("tiny-phi3" if value in ("", "name") else value)) is None, snippet
    assert {snippet.text for snippet in of_kind("path")} == {".venv/bin/python", ".venv\\Scripts\\python"}
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    for snippet in of_kind("folders"):
        for line in snippet.text.split("\n"):
            folder = line.split()[0]
            assert (ROOT / folder).is_dir() or folder in ignored, folder


def help_of(name):
    """Return the options that a command's parser has, those of its actions, too."""
    from argparse import ArgumentParser, _SubParsersAction

    parser = ArgumentParser(prog=name)
    for add_options in COMMANDS[name].options:
        add_options(parser)
    actions = [action for action in parser._actions if isinstance(action, _SubParsersAction)]
    parsers = [parser, *(inner for action in actions for inner in action.choices.values())]
    return "\n".join(one.format_help() for one in parsers) + ("\n-p" if COMMANDS[name].parameters else "")


def test_both_columns_of_a_table_are_one_command(monkeypatch):
    pairs = re.findall(r"^\|[^|]*\| `make ([^`|]+)` \| `python -m helpers ([^`|]+)` \|$",
                       (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(pairs) >= 9
    if not shutil.which("make"):
        pytest.skip("there is no make")
    monkeypatch.delenv("COURSE_MODEL")
    for target, words in pairs:
        assert read_recipe(target) == read_helpers(words.split()), target
    # A target that no text names is a command all the same.
    assert set(TARGETS) <= set(COMMANDS)


def read_recipe(target):
    """Return what `python -m helpers` reads from what make would run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COURSE_", "MAKE"))}
    said = subprocess.run(["make", "--dry-run", "--no-print-directory", *target.split()], cwd=ROOT, text=True,
                          capture_output=True, check=True, env=environment).stdout
    settings, command = read_settings(said.strip())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        return read_helpers(command.replace('"', "").split()[3:])


@pytest.mark.parametrize("entry", yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["entry_points"])
def test_the_command_of_an_entry_of_mlproject_is_one_that_the_course_takes(entry):
    project = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["entry_points"][entry]
    values = {name: "'{}'".format(parameter.get("default", name)) for name, parameter in project["parameters"].items()}
    assert find_fault(project["command"].format(**values)) is None


def test_the_lines_that_the_pages_print_differ_in_the_models_name_alone():
    # tests/unit/notebooks/test_course.py runs those of one page.
    lines = [re.sub(r"models:/slm-[a-z-]+@", "models:/NAME@", snippet.text)
             for snippet in SNIPPETS
             if snippet.language == "printed" and snippet.place != "notebooks/Operations.ipynb"]
    assert len(lines) == 2 * len(PAGES)
    assert len(set(lines)) == 2


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_can_read_what_is_meant_for_it():
    text = "\n".join(line for line in COMMAND_LINES if not line.startswith("$env:"))
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


def check_data(language: str, text: str, folder: Path) -> None:
    """Read a block of data; models as in data/models.toml are read as those are."""
    data = DATA[language](text)
    if language == "toml" and all(isinstance(table, dict) and "licence" in table for table in data.values()):
        (folder / "models.toml").write_text(text, encoding="utf-8")
        for entry in read_catalogue(folder / "models.toml").values():
            for track in ("transformers", "onnx"):
                source_of(entry, track)


def test_blocks_of_data_can_be_read(tmp_path):
    for snippet in SNIPPETS:
        if snippet.language in DATA:
            check_data(snippet.language, snippet.text, tmp_path)
    check_data("toml", (ROOT / "data" / "models.toml").read_text(encoding="utf-8"), tmp_path)
    fields = set(CatalogueEntry.__dataclass_fields__) - {"name", "source", "disk"}
    lacking = "[words]\nlicence = 'MIT'\n" + "".join(f"{name} = 1\n" for name in sorted(fields - {"licence"}))
    for language, text, error in (("toml", lacking, KeyError), ("json", "{'a': 1}", ValueError),
                                  ("yaml", "a: b: c", yaml.YAMLError)):
        with pytest.raises(error):
            check_data(language, text, tmp_path)


def test_what_the_code_tells_people_to_run_are_commands():
    found = set()
    for room in ("helpers", "course", "serving"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found |= set(re.findall(r"-m helpers [a-z]+(?: [a-z]+(?= --))?(?: --[a-z-]+)?", node.value))
                    found |= {f"make {word}" for word in re.findall(
                        r"(?:`|: )make ([a-z]+)(?=[.,`]|$| [A-Z]+=)", node.value)}
    assert len(found) > 10
    for command in sorted(found):
        if command.startswith("make "):
            assert find_fault(command) is None, command
            continue
        name, *words = command.removeprefix("-m helpers ").split()
        assert name in COMMANDS, command
        assert all(word in help_of(name) for word in words), command


# --- and these are run -----------------------------------------------------------------------

# The call with which a page ends here: it has its parameters, its checks and its store, and the third its model.
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
        notebook.cells = [*code[:last + 1], nbformat.v4.new_code_cell(END)]
        nbformat.write(notebook, file)
    return folder


def user_environment(checkout: Path, **variables: str) -> dict:
    """Return the environment of somebody who has activated ``.venv`` and prepared the models, in this checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COURSE_", "PYTHON", *OURS))}
    # The packages are this environment's own, and the course among them is another checkout.
    return kept | {"PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"],
                   "PYTHONPATH": str(checkout), "COURSE_CACHE": str(model_cache()), "OMP_NUM_THREADS": "1"} | variables


def files_of(folder: Path) -> set[str]:
    """Return what stands in a checkout, but for what git ignores by name and a run may leave: build/ and bytecode."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")
            if path.relative_to(folder).parts[0] != "build" and "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_commands_run_as_printed_and_leave_nothing_but_build(checkout, smol):
    environment = user_environment(checkout)
    where = [sys.executable, "-c", "from helpers.paths import ROOT; print(ROOT)"]
    said = subprocess.run(where, cwd=checkout, env=environment, capture_output=True, text=True).stdout
    assert Path(said.strip()) == checkout.resolve()  # what is cleaned away below is this one's
    before = files_of(checkout)
    order = [pattern for pattern, how, _ in TREATMENTS if how == RUN]
    commands = sorted((line for line in COMMAND_LINES if treat(line)[0] == RUN), key=lambda line: next(
        number for number, pattern in enumerate(order) if re.fullmatch(pattern, line, re.DOTALL)))
    blocks = [snippet.text for snippet in SNIPPETS if snippet.language == "python" and "solution" not in snippet.place]
    assert len(blocks) == 2
    assert commands[0].startswith("python -m helpers run ")  # the page wants the pages to have run
    for command in commands:
        if command.startswith("export "):
            environment |= read_settings(command)[0]
            continue
        if command.startswith("make ") and not shutil.which("make"):
            command = command.replace("make ", "python -m helpers ")
        result = subprocess.run(command.replace("COMMAND", "help"), shell=True, cwd=checkout, env=environment,
                                capture_output=True, text=True, encoding="utf-8", errors="replace")
        assert result.returncode == 0, (command, result.stdout + result.stderr)
        asked = re.search(r"question[ =]\"(.*?)\"", command)
        pages = "".join(path.read_text(encoding="utf-8") for path in checkout.glob("build/*.ipynb"))
        assert not asked or f"Q  {asked[1]}" in result.stdout or asked[1] in pages, command
        assert files_of(checkout) == before, command
        if command == commands[0]:
            check_python_blocks(checkout, blocks)
            assert files_of(checkout) == before
    assert not (checkout / "build").exists()


def check_python_blocks(checkout, blocks):
    """Paste the blocks of docs/chat-model.md into one Python, as it says, and compare what they print."""
    environment = user_environment(checkout)
    del environment["PYTHONPATH"]  # it imports nothing of the course
    mark = "print(chr(0))\n"
    last = "import sys; print({name.split('.')[0] for name in sys.modules} & {'helpers', 'course', 'serving'})\n"
    result = subprocess.run([sys.executable, "-i", "-q"], cwd=checkout, env=environment, text=True, encoding="utf-8",
                            input=mark.join(f"{block}\n" for block in [*blocks, last]), capture_output=True)
    *said, imported = result.stdout.split("\0\n")
    assert "Traceback" not in result.stderr and "Error" not in result.stderr, result.stderr
    assert imported == "set()\n"
    printed = [snippet.text + "\n" for snippet in SNIPPETS if kind_of(snippet) == "output"]
    assert printed == said[:1]
    answer = json.loads(said[1])
    assert (list(answer), type(answer["answer"]), type(answer["sure"])) == (["answer", "sure"], str, bool)


@pytest.mark.slow
def test_the_chat_models_blocks_are_on_one_page():
    places = {snippet.place for snippet in SNIPPETS if snippet.language == "python" and "solution" not in snippet.place}
    assert places == {"docs/chat-model.md"}
