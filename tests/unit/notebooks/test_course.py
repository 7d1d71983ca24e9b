"""The course from end to end: both notebooks by papermill, what they leave in MLflow, other processes.

Run: python -m helpers test tests/unit/notebooks/test_course.py
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import mlflow
import nbformat
import pandas as pd
import papermill
import psutil
import pytest
import transformers
from huggingface_hub import ModelCard
from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA
from support import NAMES, PAGES, ROOT, TRACKS, refuses, run_python
from support.projects import activated, project

from course.execute import execute, print_answers
from helpers.operations.programs import free_port
from helpers.signatures import find_signature
from helpers.tracking import tracking_store
from serving.chat_model import ClientHabits

pytestmark = pytest.mark.slow

# Other than the defaults, each of them.
OTHER = {"question": "What is the capital of France?", "system_prompt": "Answer in one sentence.", "max_tokens": 24,
         "temperature": 0.3}
METRICS = {"load_seconds", "first_token_seconds", "tokens_per_second", "disk_bytes", "peak_memory_bytes"}


def words(parameters):
    return [word for name, value in parameters.items() for word in ("-p", name, value)]


@dataclass(frozen=True)
class Course:
    """A store to which both pages have logged, on the real model; their folder; what each command printed."""

    store: str
    folder: Path
    results: dict


@pytest.fixture(scope="module")
def course(tmp_path_factory, smol):
    """Run the pages on the real model, solved, with other parameters than their own, each as a user does."""
    folder = tmp_path_factory.mktemp("cöurse 1")
    store, results = "sqlite:///" + (folder / "mlflow.db").as_posix(), {}
    parameters = OTHER | {"model": "smollm2-135m", "tracking_uri": store}
    for page in PAGES:
        results[page] = run_python(folder, "-m", "helpers", "notebook", page, "--solved", *words(parameters),
                                   "--output", folder, network=False)
    return Course(store, folder, results)


@pytest.fixture(params=PAGES)
def page(request):
    return request.param


def latest_run(store, page, model="smollm2-135m"):
    """Return the only run of a page on a model: the page runs itself once more as a project, on the tiny one."""
    mlflow.set_tracking_uri(store)
    (run,) = mlflow.search_runs(experiment_names=[page], filter_string=f"params.model = '{model}'",
                                output_format="list")
    return run


def test_a_notebook_runs_on_the_real_model_with_other_parameters(course, page):
    result = course.results[page]
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Q  {OTHER['question']}" in result.stdout
    assert result.stdout.count("  Q  ") == 2  # those of the project that the page runs stay in the page
    # What the kernel's process says beside the page goes to a file of its own.
    said = result.stderr + (course.folder / f"{page}.log").read_text(encoding="utf-8")
    assert "TCP without encryption" not in said
    assert "Warning" not in said, said


def test_the_run_holds_its_parameters_measurements_and_answers(course, page):
    run = latest_run(course.store, page)
    assert run.info.status == "FINISHED"
    parameters = {name: str(value) for name, value in OTHER.items()} | {"model": "smollm2-135m"}
    assert parameters.items() <= run.data.params.items()  # MLflow's flavor adds its model_config
    assert set(run.data.metrics) == METRICS
    assert all(value > 0 for value in run.data.metrics.values())
    assert run.data.metrics["peak_memory_bytes"] < 4e9
    assert run.info.run_name == ("smollm2-135m: question=What is the capital of France?, system_prompt=Answer in one "
                                 "sentence., max_tokens=24, temperature=0.3")
    champion = mlflow.MlflowClient().get_model_version_by_alias(NAMES[page], "champion")
    assert (champion.run_id, champion.tags["model"]) == (run.info.run_id, "smollm2-135m")

    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/answers.csv")
    table = pd.read_csv(io.StringIO(text), keep_default_na=False)
    assert list(table["question"]) == [OTHER["question"], "Who are you?"]
    assert all(isinstance(answer, str) and answer.strip() for answer in table["answer"])
    assert not [answer for answer in table["answer"] if "<|" in answer]
    if "Paris" not in table["answer"][0]:
        warnings.warn(f"{page} says of the capital of France: {table['answer'][0]!r}", stacklevel=1)


def find_models(store, page):
    """Return the logged models of the only run."""
    return [mlflow.get_logged_model(output.model_id) for output in latest_run(store, page).outputs.model_outputs]


def test_nothing_is_logged_outside_the_store(course, page):
    run = latest_run(course.store, page)
    artifacts = tracking_store(course.store).artifact_location
    assert run.info.artifact_uri.startswith(artifacts)
    models = find_models(course.store, page)
    assert [model.name for model in models] == [NAMES[page]]
    assert all(model.artifact_location.startswith(artifacts) for model in models)
    assert not (ROOT / "notebooks" / "mlruns").exists()
    assert not (ROOT / "notebooks" / "mlflow.db").exists()


def test_the_pages_show_no_warning_and_no_empty_widget(course, page):
    notebook = nbformat.read(course.folder / f"{page}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    red = "".join(output.text for output in outputs if output.get("name") == "stderr")
    # MLflow's register_model reports to stderr; nothing else may.
    assert all(line.startswith(("Successfully registered model", "Created version")) for line in red.splitlines()), red
    assert not [output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    # A number that stands alone is what a cell's last line happened to return.
    assert not [output for output in outputs if re.fullmatch(r"-?[\d.]+", output.get("data", {}).get("text/plain", ""))]
    # What is printed in one breath may come in two pieces.
    checks = ["".join(output.text for output in cell.outputs if output.get("name") == "stdout")
              for cell in code if "check(" in cell.source]
    assert len(checks) == {"CustomPythonWrapper": 3, "ChatModel": 5}.get(page, 4)
    assert all(said.startswith("PASS\n") for said in checks), checks
    html = (course.folder / f"{page}.html").read_text(encoding="utf-8")
    assert ("data:image/svg+xml;base64," in html) is (page in TRACKS)
    assert 'src="images/' not in html


ASK = """
import json, sys, mlflow
store, name, request, params = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
mlflow.set_tracking_uri(store)
model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
print(json.dumps(model.predict(request, params=params)))
"""


def ask(python, store, name, request, params=None):
    """Predict in a fresh process, away from the course, and return what it answers."""
    result = python("-c", ASK, store, name, json.dumps(request), json.dumps(params), cwd=ROOT.parent, network=False,
                    MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["slm-transformers", "slm-onnx"])
def test_a_fresh_process_loads_a_chat_champion_and_gets_a_completion(python, course, name):
    messages = [{"role": "system", "content": "Answer in one short sentence."},
                {"role": "user", "content": "What colour is the sky?"}]
    (completion,) = ask(python, course.store, name, {"messages": messages, "max_tokens": 12})
    (choice,) = completion["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    assert isinstance(choice["message"]["content"], str)
    usage = completion["usage"]
    assert 0 < usage["completion_tokens"] <= 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_fresh_process_loads_the_prompt_champion_and_gets_a_text_for_each_row(python, course):
    prompts = [f"<|im_start|>user\nName a {thing}.<|im_end|>\n<|im_start|>assistant\n" for thing in ("fruit", "city")]
    answers = ask(python, course.store, "slm-onnx-prompt", {"prompt": prompts}, {"max_tokens": 12, "temperature": 0.0})
    assert len(answers) == 2
    assert all(isinstance(answer, str) and answer.strip() and "<|" not in answer for answer in answers)
    assert answers[0] != answers[1]


def test_the_chat_model_needs_its_old_folder_for_stop_and_for_nothing_else(store, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.transformers_dir, folder)
    mlflow.set_tracking_uri(store)
    mlflow.create_experiment("stop", artifact_location=tracking_store(store).artifact_location)
    mlflow.set_experiment("stop")
    info = mlflow.transformers.log_model(
        transformers.pipeline("text-generation", model=str(folder)), name="chat", task="llm/v1/chat",
        model_config={"max_new_tokens": 4, "do_sample": False}, pip_requirements=["mlflow", "transformers"],
        model_card=ModelCard.load(folder / "README.md"))
    shutil.rmtree(folder)
    model = mlflow.pyfunc.load_model(info.model_uri)
    request = {"messages": [{"role": "user", "content": "Hi"}]}
    assert model.predict(request)[0]["usage"]["completion_tokens"] <= 4
    with pytest.raises(OSError, match="Repo id must be"):
        model.predict(request | {"stop": ["a"]})


def test_the_signatures_are_the_contracts(course):
    mlflow.set_tracking_uri(course.store)
    prompt = find_signature("models:/slm-onnx-prompt@champion")
    assert str(prompt.inputs) == "['prompt': Any (required)]"
    assert str(prompt.outputs) == "[string (required)]"
    assert [(param.name, param.default) for param in prompt.params] == [("max_tokens", 24), ("temperature", 0.3)]
    chat = find_signature("models:/slm-transformers@champion")
    assert chat.inputs.input_names()[:3] == ["messages", "temperature", "max_tokens"]
    assert "choices" in chat.outputs.input_names()
    # Track B's page shows these two as track A's.
    assert chat.inputs == CHAT_MODEL_INPUT_SCHEMA
    assert chat.outputs == CHAT_MODEL_OUTPUT_SCHEMA
    onnx = find_signature("models:/slm-onnx@champion")
    served = set(chat.inputs.input_names()) - {"tools", "custom_inputs"}
    assert set(onnx.inputs.input_names()) == served | set(ClientHabits.model_fields) | {
        "seed", "stream_options", "max_completion_tokens", "response_format"}


@pytest.mark.skipif(sys.platform == "win32", reason="the page prints other lines there")
def test_the_lines_for_two_terminals_serve_the_model_and_ask_it(course, tmp_path):
    # One page for all: the lines differ in the model's name only. The port may be taken on this machine.
    notebook = nbformat.read(course.folder / "ChatModel.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and '"serve"' in cell.source]
    serve, ask = "".join(output.text for output in cell.outputs).replace("5001", str(free_port())).strip().split("\n\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(["sh", "-c", serve], cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        ask = ask.replace("curl ", "curl --silent --retry 90 --retry-delay 1 --retry-connrefused ")
        asked = subprocess.run(["sh", "-c", ask], cwd=tmp_path, capture_output=True, text=True)
        assert server.poll() is None, (tmp_path / "log").read_text()
    finally:
        for process in (*psutil.Process(server.pid).children(recursive=True), server):
            process.terminate()
        server.wait()
    (completion,) = json.loads(asked.stdout)
    assert "Paris" in completion["choices"][0]["message"]["content"], completion


def test_a_refused_connection_is_noticed(python):
    code = "import socket, contextlib\nwith contextlib.suppress(OSError): socket.create_connection(('192.0.2.1', 9), 1)"
    with pytest.raises(AssertionError, match=r"socket\.\w+ 192\.0\.2\.1"):
        python("-c", code, network=False)


@pytest.mark.skipif(sys.platform == "win32", reason="a path of this kind is no path on Windows")
@pytest.mark.parametrize(("entry", "page"), [
    ("chat_model", PAGES[2])])  # the other two run their own entries, by `course`
def test_mlflow_run_takes_extreme_parameters_and_asks_nothing_of_the_network(python, store, tmp_path, entry, page):
    # A question like an option and with quotes in it, an answer as long as the context leaves, a whole number as
    # temperature, and a terminal that has no letters for the answers.
    question = "-5? Who's the author of \"Hamlet\" & why?"
    parameters = {"model": "tiny-phi3", "tracking_uri": store, "question": question, "system_prompt": "",
                  "max_tokens": 4000, "temperature": 1}
    result = python(*project(entry, **parameters), cwd=tmp_path, network=False, PYTHONIOENCODING="ascii",
                    **activated(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Q  {question}" in result.stdout
    (shown,) = re.findall(r"page: (\S.*)\.html", result.stdout)
    run = latest_run(store, page, "tiny-phi3")
    assert run.data.params["question"] == question
    assert run.data.params["max_tokens"] == "4000"
    kinds = {param.name: param.dtype.name for param in find_signature(f"models:/{NAMES[page]}@champion").params or []}
    assert kinds in ({}, {"max_tokens": "long", "temperature": "double"})
    counts = re.findall(r"(\d+) tokens out|'completion_tokens': (\d+)",
                        Path(f"{shown}.ipynb").read_text(encoding="utf-8"))
    assert counts
    assert all(int(one or other) <= 4000 for one, other in counts)


# --- without a model ----------------------------------------------------------------------------

# A page in small: it logs a run of its own, while somebody else logs one to the same experiment, before and after it.
SMALL_PAGE = """
import subprocess, sys, mlflow
def log(question):
    mlflow.set_tracking_uri({store!r})
    mlflow.set_experiment("Small")
    with mlflow.start_run():
        mlflow.log_metric("tokens_per_second", 7)
        mlflow.log_text("question,answer\\n" + question + ",yes\\n", "answers.csv")
if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] == "stranger":
        log("stranger")
    else:
        import os
        strangers = {{k: v for k, v in os.environ.items() if k != "MLFLOW_RUN_CONTEXT"}}
        stranger = [sys.executable, {file!r}, "stranger"]
        subprocess.run(stranger, env=strangers, check=True)
        log("mine")
        subprocess.run(stranger, env=strangers, check=True)
"""


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Return a folder that stands for the course's notebooks."""
    folder = tmp_path / "notebooks"
    (folder / "images").mkdir(parents=True)
    monkeypatch.setattr("course.execute.NOTEBOOKS", folder)
    return folder


def write_page(path, source):
    """Write a notebook of one code cell, with a cell for papermill's parameters before it."""
    cells = [nbformat.v4.new_code_cell("tracking_uri = ''", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell(source)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def test_a_page_that_ran_beside_others_prints_its_own_answers(notebooks, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_RUN_CONTEXT", '{"team": "blue"}')
    file = tmp_path / "small.py"
    file.write_text(SMALL_PAGE.format(store=store, file=str(file)), encoding="utf-8")
    write_page(notebooks / "Small.ipynb", file.read_text(encoding="utf-8"))
    execution = execute("Small", {"tracking_uri": store}, tmp_path / "out")
    assert len(mlflow.search_runs(experiment_names=["Small"])) == 3
    assert execution.run.data.tags["team"] == "blue"
    print_answers(execution)
    assert re.findall("  Q  (.*)", capsys.readouterr().out) == ["mine"]
    assert execution.page == tmp_path / "out" / "Small.html"
    assert os.environ["MLFLOW_RUN_CONTEXT"] == '{"team": "blue"}'


def test_a_notebook_whose_python_is_ended_by_the_system_says_so(notebooks, tmp_path):
    write_page(notebooks / "Dies.ipynb", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)\nos._exit(9)")
    with refuses("kernel-ended"):
        execute("Dies", {}, tmp_path / "out")


@pytest.mark.parametrize("page", PAGES[1:2])  # they share the call that looks
def test_papermill_fails_on_a_parameter_that_the_notebook_does_not_have(page, store, tmp_path):
    # The plain papermill that anybody may run, which only logs a line by itself.
    with pytest.raises(papermill.PapermillExecutionError, match="no parameter called temprature"):
        papermill.execute_notebook(
            ROOT / "notebooks" / f"{page}.ipynb", tmp_path / "out.ipynb", kernel_name="python3",
            parameters={"temprature": 1.0, "model": "tiny-phi3", "tracking_uri": store}, progress_bar=False)


def test_an_error_in_a_notebook_is_two_sentences_without_a_stack(python, tmp_path):
    result = python("-m", "helpers", "notebook", "TransformerPipeline", "-p", "max_tokens", "0", "--output", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: max_tokens is 0. Choose a whole number")
    assert str(tmp_path / "TransformerPipeline.html") in result.stderr
    html = (tmp_path / "TransformerPipeline.html").read_text(encoding="utf-8")
    assert "CourseError: max_tokens is 0." in html
    assert "Traceback" not in html + result.stderr
