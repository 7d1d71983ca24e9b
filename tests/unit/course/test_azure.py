"""Shipping to Azure Machine Learning: what is decided, the files, and the order of the steps.

tests/nightly/test_azure.py has the real SDK read the files and ask a service that answers as recorded.

Run: python -m helpers test tests/unit/course/test_azure.py
"""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import yaml
from support import ROOT, refuses, stand_ins
from support.chat import AS_SHOWN, chat_model_for

from course import azure
from course.azure import (
    TEMPLATES,
    Plan,
    check_endpoint_name,
    choose_instance,
    fill,
    judge,
    make_folder,
    model_memory,
    quota_cores,
    send,
    service_requirements,
    steps,
    values,
)

ANSWERS = json.loads((ROOT / "tests" / "support" / "azure" / "answers.json").read_text(encoding="utf-8"))
PLAN = Plan("slm-onnx", "3", "tiny-phi3", 0.6, ("messages", "max_tokens"), "3.12", ("mlflow==3.17.2",), "slm-onnx",
            "Standard_D2as_v4")

# --- what is decided ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slm", "slm-onnx", "S1-2-3", "a" * 26, "x9y", "a-b-c-d"])
def test_a_name_that_azure_takes(name):
    check_endpoint_name(name)


@pytest.mark.parametrize("name", ["", "ab", "a" * 27, "1slm", "-slm", "slm-", "slm--onnx", "slm_onnx", "slm.onnx",
                                  "slm onnx", "slm/onnx", "schön", "slm\n", "slm;rm", "②③④"])
def test_a_name_that_azure_refuses_is_refused_here(name):
    with refuses("endpoint-name"):
        check_endpoint_name(name)


@pytest.mark.parametrize(("megabytes", "name"), [
    (1, "Standard_D2as_v4"), (2_500, "Standard_D2as_v4"), (6_442, "Standard_D2as_v4"), (6_443, "Standard_D4as_v4"),
    (12_884, "Standard_D4as_v4"), (16_300, "Standard_D8as_v4"), (16_400, "Standard_D8as_v4"),
    (25_770, "Standard_D16as_v4"), (100_000, "Standard_D32as_v4"),
])
def test_the_smallest_machine_with_the_memory_is_chosen(megabytes, name):
    assert choose_instance(megabytes) == name


def test_a_model_too_large_for_all_machines_is_refused():
    with refuses("model-too-large"):
        choose_instance(200_000)


@pytest.mark.parametrize(("course_model", "size", "megabytes"), [
    ("smollm2-135m", 10**9, 2_500),  # the catalogue knows
    ("phi-3-mini-4k", 1, 16_300),
    ("hub:org/name", 3 * 10**9, 7_000),  # a model of the Hub has no entry: twice its size, and the libraries
    ("no such model", 10**9, 3_000),
    (None, 10**9, 3_000),
])
def test_a_models_memory_is_the_catalogues_or_follows_from_its_size(course_model, size, megabytes):
    assert model_memory(course_model, size) == megabytes


@pytest.mark.parametrize(("instance_type", "count", "cores"), [
    ("Standard_D2as_v4", 1, 4), ("Standard_D4as_v4", 1, 8), ("Standard_D4as_v4", 5, 24), ("Standard_D4as_v4", 10, 48),
    ("Standard_NC4as_T4_v3", 1, None),
])
def test_a_quota_needs_a_fifth_more_machines_rounded_up(instance_type, count, cores):
    assert quota_cores(instance_type, count) == cores


@pytest.mark.parametrize(("logged", "installed"), [
    (["mlflow==3.17.2", "tokenizers==0.23.3"], ("mlflow==3.17.2", "tokenizers==0.23.3")),
    (["pydantic==2.14.3", "Flask_CORS>=6"], ("pydantic", "flask-cors")),
    (["pydantic-settings==2.1"], ("pydantic-settings==2.1",)),
    (["flask==3.1.3", "gunicorn==26.2.0", "opentelemetry-api==1.45.2", "opentelemetry-sdk==1.45.2"],
     ("flask", "gunicorn", "opentelemetry-api", "opentelemetry-sdk")),
    (["torch==2.13.0"], ("--extra-index-url https://download.pytorch.org/whl/cpu", "torch==2.13.0")),
    (["torch-geometric==2.0"], ("torch-geometric==2.0",)),
    ([], ()),
])
def test_a_service_installs_what_was_logged_but_for_the_servers_own_pins(logged, installed):
    assert service_requirements(logged) == installed


QUOTA = ANSWERS["quota"]["body"]["error"]


@pytest.mark.parametrize(("status", "code", "text", "expected", "says"), [
    (400, "BadRequest", json.dumps(QUOTA), "azure-quota", "it takes 8 cores, and of 6 there are 0 in use"),
    (403, "Forbidden", "OutOfQuota: no more", "azure-quota", "Standard_D2as_v4"),
    (409, "QuotaExceeded", "QuotaExceeded: cores", "azure-quota", ""),
    (200, "ResourceNotReady", "User container has crashed or terminated.", "azure-crashed", ""),
    (400, "BadRequest", "There is already an endpoint with this name, Endpoint name needs to be unique within a "
     "region.", "endpoint-taken", "slm-onnx"),
    (401, "ExpiredAuthenticationToken", "The access token expiry UTC time", "azure-token", "expired"),
    (401, "", "", "azure-token", ""),
    (403, "AuthorizationFailed", "The client does not have authorization", "azure-forbidden", ""),
    (404, "ResourceNotFound", "The Resource was not found.", "azure-not-found", ""),
    (None, "", "getaddrinfo failed", "azure-unreachable", ""),
    (400, "ValidationError", "One or more\nfields.", "azure-refused", "ValidationError: One or more fields."),
    (503, "", "x" * 5_000, "azure-refused", "503"),
])
def test_an_answer_of_the_service_becomes_two_sentences(status, code, text, expected, says):
    error = judge(status, code, text, PLAN)
    assert error.code == expected and says in error.what
    assert len(error.what) < 300 and error.what.endswith(".") and error.fix.endswith(".")


# --- the files ------------------------------------------------------------------------------


def test_a_marked_line_gets_its_value_and_the_rest_stays():
    text = "# a comment\nname: old  # filled: model\nkept: 1  # and why\n  - a  # filled: requirements\n"
    assert fill(text, {"model": 'a "b": c', "requirements": ("x==1", "y")}) == (
        '# a comment\nname: "a \\"b\\": c"\nkept: 1  # and why\n  - "x==1"\n  - "y"\n')


def test_every_file_is_yaml_that_is_filled_everywhere():
    used = set()
    for template in TEMPLATES.glob("*.yaml"):
        text = template.read_text(encoding="utf-8")
        used |= set(re.findall("# filled: (.*)", text))
        filled = fill(text, values(PLAN))
        assert "# filled" not in filled and text.startswith("# ")
        assert yaml.safe_load(filled).keys() == yaml.safe_load(text).keys()
    assert used == set(values(PLAN))


@pytest.fixture(scope="module")
def registry(tiny, empty_database, tmp_path_factory):
    """Register the chat model on the toy model, as the chat page does, and two stand-ins; return the store."""
    folder = tmp_path_factory.mktemp("registry")
    store = "sqlite:///" + Path(shutil.copy(empty_database, folder / "azure.db")).as_posix()
    with stand_ins.registry(store, folder) as register:
        register("Plain")
        register("Plain", "gone")
        logged = mlflow.pyfunc.log_model(name="slm-onnx", **chat_model_for(tiny) | {"input_example": AS_SHOWN})
        version = mlflow.register_model(logged.model_uri, "slm-onnx", tags={"model": "tiny-phi3"}).version
        mlflow.MlflowClient().set_registered_model_alias("slm-onnx", "champion", version)
        yield store


@pytest.fixture
def registered(registry, monkeypatch):
    """Let the course's store be that one, and the course be small."""
    monkeypatch.setenv("COURSE_TRACKING_URI", registry)
    monkeypatch.setattr(azure, "course_files", lambda: [ROOT / "README.md", ROOT / "helpers" / "errors.py"])


def test_the_folder_has_the_model_the_script_and_files_that_name_both(registered, tmp_path):
    plan = make_folder("models:/slm-onnx@champion", folder=tmp_path / "azureml")
    folder = tmp_path / "azureml"
    assert (plan.model, plan.version, plan.course_model, plan.endpoint) == ("slm-onnx", "1", "tiny-phi3", "slm-onnx")
    assert plan.instance_type == "Standard_D2as_v4" and "messages" in plan.fields
    assert plan.requirements == ("mlflow",) and plan.python == f"{sys.version_info.major}.{sys.version_info.minor}"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"model/MLmodel", "code/score.py", "code/serving/errors.py", "course/README.md", "course/helpers/errors.py",
            "request.json"} <= files
    assert (folder / "code" / "score.py").read_bytes() == (ROOT / "serving" / "score.py").read_bytes()
    assert json.loads((folder / "request.json").read_text(encoding="utf-8")) == AS_SHOWN
    read = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yaml")}
    assert read["model"]["version"] == "1" and read["model"]["tags"]["course_model"] == "tiny-phi3"
    assert read["online-deployment"]["model"] == "azureml:slm-onnx:1"
    for name in ("model", "online-deployment", "batch-deployment", "job"):
        path = read[name].get("path") or read[name].get("code") or read[name]["code_configuration"]["code"]
        assert (folder / path).is_dir()


def test_a_second_version_of_another_name_fills_the_files_anew(registered, tmp_path):
    make_folder("models:/slm-onnx@champion", folder=tmp_path / "azureml")
    (tmp_path / "azureml" / "model" / "left.txt").touch()
    plan = make_folder("models:/slm-onnx/1", "my-slm", "Standard_F8s_v2", folder=tmp_path / "azureml")
    assert (plan.endpoint, plan.batch_endpoint, plan.instance_type) == ("my-slm", "my-slm-batch", "Standard_F8s_v2")
    assert not (tmp_path / "azureml" / "model" / "left.txt").exists()


@pytest.mark.parametrize(("uri", "endpoint", "code"), [
    ("slm-onnx", None, "model-address"),
    ("runs:/1/model", None, "model-address"),
    ("models:/slm-onnx", None, "model-address"),
    ("models:/slm-onnx@nobody", None, "model-unregistered"),
    ("models:/slm-onnx/7", None, "model-unregistered"),
    ("models:/other@champion", None, "model-unregistered"),
    ("models:/slm-onnx@champion", "1st", "endpoint-name"),
    ("models:/stand-in@champion", None, "model-other-contract"),
])
def test_what_cannot_be_shipped_is_refused_and_leaves_the_former_folder(uri, endpoint, code, registered, tmp_path):
    (tmp_path / "azureml").mkdir()
    (tmp_path / "azureml" / "former").touch()
    with refuses(code):
        make_folder(uri, endpoint, folder=tmp_path / "azureml")
    assert [path.name for path in (tmp_path / "azureml").iterdir()] == ["former"]
    assert not list(tmp_path.glob("azureml.*"))


def test_a_version_whose_files_are_gone_says_so(registered, tmp_path):
    shutil.rmtree(mlflow.artifacts.download_artifacts("models:/gone/1"))
    with refuses("model-gone"):
        make_folder("models:/gone@champion", folder=tmp_path / "azureml")
    assert not list(tmp_path.glob("azureml*"))


def test_a_dry_run_prints_the_commands_in_order_and_what_costs(registered, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(azure, "TARGET", tmp_path / "azureml")

    assert azure.deploy("models:/slm-onnx@champion", dry_run=True) == 0
    said = capsys.readouterr().out
    commands = re.findall(r"^  (az ml .*)$", said, re.MULTILINE)
    created = [command for command in commands if " create " in command]
    assert [command.split(" --file ")[1].split()[0] for command in created] == [
        "model.yaml", "environment.yaml", "online-endpoint.yaml", "online-deployment.yaml", "compute.yaml",
        "batch-endpoint.yaml", "batch-deployment.yaml", "job.yaml"]
    assert azure.PRICES in said and "4 free cores" in said
    assert "az ml online-endpoint delete --name slm-onnx --yes" in commands
    assert not re.search(r"[$€]\s?\d|\d+[.,]\d\d (USD|EUR)", said)  # no price is invented


@pytest.mark.parametrize(("parts", "kinds"), [
    (["online"], ["model", "environment", "online_endpoint", "online_deployment"]),
    (["batch"], ["model", "environment", "compute", "batch_endpoint", "batch_deployment"]),
    (["job"], ["job"]),
])
def test_a_part_has_its_own_steps(parts, kinds):
    assert [step.kind for step in steps(PLAN, parts)] == kinds
    assert all((TEMPLATES / step.file).exists() and step.file in step.command for step in steps(PLAN, parts))


def test_without_the_sdk_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "azure.ai.ml", None)
    with refuses("azure-missing"):
        azure.sign_in(tmp_path)


# --- what the SDK asks of the service --------------------------------------------------------


@pytest.fixture
def no_sdk(monkeypatch):
    """Let something stand in for azure-ai-ml that reads a file as its kind; return its error of the service."""
    class AzureError(Exception):
        pass

    class HttpResponseError(AzureError):
        status_code, error = 403, None

    def loader(kind):
        return lambda file, params_override=(): SimpleNamespace(kind=kind, name="blue", params=params_override)

    kinds = {f"load_{step.kind}": loader(step.kind) for step in steps(PLAN)}
    ml = SimpleNamespace(**kinds)
    modules = {
        "azure.ai": SimpleNamespace(ml=ml), "azure.ai.ml": ml,
        "azure.ai.ml.exceptions": SimpleNamespace(MlException=AzureError),
        "azure.core.exceptions": SimpleNamespace(AzureError=AzureError, HttpResponseError=HttpResponseError),
        "azure.ai.ml.entities._load_functions": SimpleNamespace(
            load_model_batch_deployment=kinds["load_batch_deployment"])}
    for name in modules:
        for parent in [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]:
            monkeypatch.setitem(sys.modules, parent, modules.get(parent, SimpleNamespace()))
    return HttpResponseError


class Client:
    """Keeps what it is asked to make, and refuses one kind."""

    def __init__(self, refused=None, error=None):
        self.made = []
        self.refused = refused
        self.error = error

    def create_or_update(self, entity):
        self.made.append((entity.kind, *entity.params))
        if entity.kind == self.refused:
            raise self.error
        return SimpleNamespace(result=lambda: None)

    begin_create_or_update = create_or_update


def test_the_steps_are_made_in_order_and_the_new_deployment_gets_the_traffic(no_sdk, tmp_path, capsys):
    client = Client()
    send(PLAN, steps(PLAN), client, tmp_path)
    assert client.made == [
        ("model",), ("environment",), ("online_endpoint",), ("online_deployment",),
        ("online_endpoint", {"traffic": {"blue": 100}}), ("compute",), ("batch_endpoint",), ("batch_deployment",),
        ("batch_endpoint", {"defaults": {"deployment_name": "blue"}}), ("job",)]
    said = capsys.readouterr().out
    assert re.findall("^az ml .*", said, re.MULTILINE) == [step.command for step in steps(PLAN)]
    assert "still there" not in said


def test_a_step_that_is_refused_says_what_is_left_and_how_it_goes(no_sdk, tmp_path, capsys):
    with refuses("azure-forbidden"):
        send(PLAN, steps(PLAN), Client("online_deployment", no_sdk("no")), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        send(PLAN, steps(PLAN), Client("environment", KeyboardInterrupt()), tmp_path)
    first, second = capsys.readouterr().out.split("still there")[1:]
    assert re.findall(r"^  az ml (\S+) (?:delete|archive) ", first, re.MULTILINE) == [
        "online-endpoint", "environment", "model"]
    assert re.findall(r"^  az ml (\S+) (?:delete|archive) ", second, re.MULTILINE) == ["environment", "model"]
