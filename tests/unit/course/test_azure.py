"""Shipping to Azure Machine Learning: what is decided, the files, and the order of the steps.

tests/nightly/test_azure.py has the real SDK read the files and ask a service that answers as
recorded.

Run: python -m helpers test tests/unit/course/test_azure.py
"""

import json
import re
import shlex
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
    YAML_FOLDER,
    Plan,
    check_name,
    describe_timeout,
    make_folder,
    model_memory,
    plan_steps,
    send,
    service_requirements,
)

PLAN = Plan("slm-onnx-abcde", "3", "tiny-phi3", 0.6, "Standard_D2as_v4")

# --- what is decided ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slm", "slm-onnx", "S1-2-3a", "a" * 24, "x9y", "a-b-c-d"])
def test_a_name_that_azure_takes(name):
    check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "ab",
        "a" * 25,
        "1slm",
        "-slm",
        "slm-",
        "slm--onnx",
        "slm_onnx",
        "slm.onnx",
        "slm onnx",
        "slm/onnx",
        "schön",
        "slm\n",
        "slm;rm",
        "②③④",
        "slm-onnx-1",
    ],
)
def test_a_name_that_azure_refuses_is_refused_here(name):
    with refuses("endpoint-name"):
        check_name(name)


def test_two_participants_of_a_workspace_make_nothing_of_the_same_name(monkeypatch):
    mine = azure.default_name("slm-transformers")
    assert mine == azure.default_name("slm-transformers")
    check_name(mine)
    monkeypatch.setattr(azure.platform, "node", lambda: "another machine")
    names = [
        {
            setting
            for step in plan_steps(Plan(azure.default_name("slm-transformers"), "1", "m", 1, "M"))
            for key, setting in step.settings.items()
            if key == "name"
        }
    ]
    monkeypatch.undo()
    names.append(
        {
            setting
            for step in plan_steps(Plan(mine, "1", "m", 1, "M"))
            for key, setting in step.settings.items()
            if key == "name"
        }
    )
    assert names[0] and names[1] and not names[0] & names[1]


@pytest.mark.parametrize(
    ("course_model", "size", "megabytes"),
    [
        ("smollm2-135m", 10**9, 2_500),  # the catalogue knows
        ("phi-3-mini-4k", 1, 16_300),
        # A model of the Hub has no entry: twice its size, and the libraries.
        ("hub:org/name", 3 * 10**9, 7_000),
        ("no such model", 10**9, 3_000),
        (None, 10**9, 3_000),
    ],
)
def test_a_models_memory_is_the_catalogues_or_follows_from_its_size(course_model, size, megabytes):
    assert model_memory(course_model, size) == megabytes


@pytest.mark.parametrize(
    ("logged", "installed"),
    [
        (["mlflow==3.17.2", "tokenizers==0.23.3"], ["mlflow==3.17.2", "tokenizers==0.23.3"]),
        (["pydantic==2.14.3", "Flask_CORS>=6"], ["pydantic", "flask-cors"]),
        (["pydantic-settings==2.1"], ["pydantic-settings==2.1"]),
        (
            [
                "flask==3.1.3",
                "gunicorn==26.2.0",
                "opentelemetry-api==1.45.2",
                "opentelemetry-sdk==1.45.2",
            ],
            ["flask", "gunicorn", "opentelemetry-api", "opentelemetry-sdk"],
        ),
        (
            ["torch==2.13.0"],
            ["--extra-index-url https://download.pytorch.org/whl/cpu", "torch==2.13.0"],
        ),
        (
            ["torch-geometric==2.0", "-c constraints.txt"],
            ["torch-geometric==2.0", "-c constraints.txt"],
        ),
        ([], []),
    ],
)
def test_a_service_installs_what_was_logged_but_for_the_servers_own_pins(logged, installed):
    assert service_requirements(logged) == installed


@pytest.mark.parametrize(
    ("max_tokens", "speed", "says"),
    [
        (2_048, 100, "2,048 tokens, the most that the model writes, takes 20 seconds."),
        (
            2_048,
            8,
            "takes 256 seconds. On such a machine callers have to ask for max_tokens 1,440 or less.",
        ),
        (1_800, 10, "takes 180 seconds."),
        (2_048, None, "needs 11.4 tokens a second. Nobody has measured"),
        (None, 100, "needs a machine of N / 180 tokens a second."),
    ],
)
def test_a_dry_run_says_whether_the_longest_answer_arrives_in_time(max_tokens, speed, says):
    plan = Plan("slm", "1", "m", 1, "M", max_tokens, speed)
    assert says in describe_timeout(plan)
    assert ("have to ask" in describe_timeout(plan)) == ("have to ask" in says)


def test_the_timeout_that_is_told_is_the_deployments():
    deployment = yaml.safe_load(
        (YAML_FOLDER / "online-deployment.yaml").read_text(encoding="utf-8")
    )
    assert deployment["request_settings"]["request_timeout_ms"] == azure.REQUEST_SECONDS * 1000


# --- the files ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(tiny, empty_database, tmp_path_factory):
    """Register the chat model on the toy model, as the chat page does, and two stand-ins; return the store."""
    folder = tmp_path_factory.mktemp("registry")
    store = "sqlite:///" + Path(shutil.copy(empty_database, folder / "azure.db")).as_posix()
    with stand_ins.registry(store, folder) as register:
        register("Plain")
        register("Plain", "gone")
        with mlflow.start_run():
            logged = mlflow.pyfunc.log_model(
                name="slm-onnx",
                **chat_model_for(tiny)
                | {"input_example": AS_SHOWN, "model_config": {"max_tokens_limit": 500}},
            )
            mlflow.log_metric("tokens_per_second", 2.5)
        version = mlflow.register_model(
            logged.model_uri, "slm-onnx", tags={"model": "tiny-phi3"}
        ).version
        mlflow.MlflowClient().set_registered_model_alias("slm-onnx", "champion", version)
        yield store


@pytest.fixture
def registered(registry, monkeypatch):
    """Let the course's store be that one, and the course be small."""
    monkeypatch.setenv("COURSE_TRACKING_URI", registry)
    monkeypatch.setattr(
        azure, "course_files", lambda: [ROOT / "README.md", ROOT / "helpers" / "errors.py"]
    )


def test_the_folder_has_the_model_the_script_and_the_files(registered, tmp_path):
    plan = make_folder("models:/slm-onnx@champion", folder=tmp_path / "azureml")
    folder = tmp_path / "azureml"
    assert plan == Plan(
        azure.default_name("slm-onnx"),
        "1",
        "tiny-phi3",
        plan.megabytes,
        azure.INSTANCE_TYPE,
        500,
        2.5,
    )
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        "model/MLmodel",
        "code/score.py",
        "code/serving/errors.py",
        "course/README.md",
        "course/helpers/errors.py",
        "request.json",
    } <= files
    assert (folder / "code" / "score.py").read_bytes() == (
        ROOT / "serving" / "score.py"
    ).read_bytes()
    assert json.loads((folder / "request.json").read_text(encoding="utf-8")) == AS_SHOWN
    assert (
        plan.megabytes
        == sum(path.stat().st_size for path in (folder / "model").rglob("*") if path.is_file())
        / 1e6
    )
    for path in YAML_FOLDER.glob("*.yaml"):
        if path.name != "conda.yaml":
            assert (folder / path.name).read_bytes() == path.read_bytes()
    python, pip, packages = yaml.safe_load((folder / "conda.yaml").read_text(encoding="utf-8"))[
        "dependencies"
    ]
    assert (python, pip) == (f"python={sys.version_info.major}.{sys.version_info.minor}", "pip")
    assert packages["pip"][0].startswith("azureml-inference-server-http==") and packages["pip"][
        1:
    ] == ["mlflow"]
    read = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in folder.glob("*.yaml")
    }
    for name in ("model", "online-deployment", "batch-deployment", "job"):
        path = (
            read[name].get("path")
            or read[name].get("code")
            or read[name]["code_configuration"]["code"]
        )
        assert (folder / path).is_dir()


def test_a_second_version_of_another_name_fills_the_folder_anew(registered, tmp_path):
    make_folder("models:/slm-onnx@champion", folder=tmp_path / "azureml")
    (tmp_path / "azureml" / "model" / "left.txt").touch()
    plan = make_folder(
        "models:/slm-onnx/1", "my-slm", "Standard_F8s_v2", folder=tmp_path / "azureml"
    )
    assert (plan.name, plan.batch_endpoint, plan.instance_type) == (
        "my-slm",
        "my-slm-batch",
        "Standard_F8s_v2",
    )
    assert not (tmp_path / "azureml" / "model" / "left.txt").exists()


def test_a_model_too_large_for_the_machine_asks_for_another(registered, tmp_path, monkeypatch):
    monkeypatch.setattr(azure, "model_memory", lambda course_model, size: 16_300)
    with refuses("model-too-large"):
        make_folder("models:/slm-onnx@champion", folder=tmp_path / "azureml")
    plan = make_folder(
        "models:/slm-onnx@champion", None, "Standard_D8as_v4", folder=tmp_path / "azureml"
    )
    assert plan.instance_type == "Standard_D8as_v4"


@pytest.mark.parametrize(
    ("uri", "endpoint", "code"),
    [
        ("slm-onnx", None, "model-address"),
        ("runs:/1/model", None, "model-address"),
        ("models:/slm-onnx", None, "model-address"),
        ("models:/slm-onnx@nobody", None, "model-unregistered"),
        ("models:/slm-onnx/7", None, "model-unregistered"),
        ("models:/other@champion", None, "model-unregistered"),
        ("models:/slm-onnx@champion", "1st", "endpoint-name"),
        ("models:/stand-in@champion", None, "model-other-contract"),
    ],
)
def test_what_cannot_be_shipped_is_refused_and_leaves_the_former_folder(
    uri, endpoint, code, registered, tmp_path
):
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


def test_a_dry_run_prints_the_commands_in_order_and_what_costs(
    registered, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(azure, "TARGET_FOLDER", tmp_path / "azureml")

    assert azure.deploy("models:/slm-onnx@champion", "my-slm", dry_run=True) == 0
    said = capsys.readouterr().out
    commands = [
        shlex.split(command) for command in re.findall(r"^  (az ml .*)$", said, re.MULTILINE)
    ]
    created = [command for command in commands if "create" in command]
    assert [command[5] for command in created] == [
        "model.yaml",
        "environment.yaml",
        "online-endpoint.yaml",
        "online-deployment.yaml",
        "compute.yaml",
        "batch-endpoint.yaml",
        "batch-deployment.yaml",
        "job.yaml",
    ]
    # What is created is what is deleted, or archived.
    made = {
        command[2]: next(word for word in command if word.startswith("name="))[5:]
        for command in created
        if any(word.startswith("name=") for word in command)
    }
    removed = {
        command[2]: command[5] for command in commands if command[3] in ("delete", "archive")
    }
    assert (
        made
        == removed
        == {
            "model": "my-slm",
            "environment": "my-slm",
            "online-endpoint": "my-slm",
            "compute": "my-slm",
            "batch-endpoint": "my-slm-batch",
        }
    )
    assert "you pay for that storage until you delete them there" in said
    assert (
        azure.PRICES in said
        and "takes 200 seconds." in said
        and "ask for max_tokens 450 or less." in said
    )
    assert not re.search(r"[$€]\s?\d|\d+[.,]\d\d (USD|EUR)", said)  # no price is invented


@pytest.mark.parametrize(
    ("parts", "kinds"),
    [
        (["online"], ["model", "environment", "online_endpoint", "online_deployment"]),
        (["batch"], ["model", "environment", "compute", "batch_endpoint", "batch_deployment"]),
        (["job"], ["job"]),
    ],
)
def test_a_part_has_its_own_steps(parts, kinds):
    assert [step.kind for step in plan_steps(PLAN, parts)] == kinds
    assert all(
        (YAML_FOLDER / step.file).exists() and step.file in step.command
        for step in plan_steps(PLAN, parts)
    )


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
        pass

    class ClientAuthenticationError(HttpResponseError):
        pass

    def loader(kind):
        return lambda file, params_override: SimpleNamespace(
            kind=kind, name="blue", settings=params_override[0]
        )

    kinds = {f"load_{step.kind}": loader(step.kind) for step in plan_steps(PLAN)}
    ml = SimpleNamespace(**kinds)
    modules = {
        "azure.ai": SimpleNamespace(ml=ml),
        "azure.ai.ml": ml,
        "azure.ai.ml.exceptions": SimpleNamespace(MlException=AzureError),
        "azure.core.exceptions": SimpleNamespace(
            AzureError=AzureError,
            HttpResponseError=HttpResponseError,
            ClientAuthenticationError=ClientAuthenticationError,
        ),
        "azure.ai.ml.entities._load_functions": SimpleNamespace(
            load_model_batch_deployment=kinds["load_batch_deployment"]
        ),
    }
    for name in modules:
        for parent in [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]:
            monkeypatch.setitem(sys.modules, parent, modules.get(parent, SimpleNamespace()))
    return HttpResponseError


class Client:
    """Keeps what it is asked to make and whether somebody waits for it, and refuses one kind."""

    def __init__(self, refused=None, error=None):
        self.done = []
        self.refused = refused
        self.error = error

    def create_or_update(self, entity):
        if entity.kind == self.refused:
            raise self.error
        self.done.append((entity.kind, entity.settings))

    def begin_create_or_update(self, entity):
        if entity.kind == self.refused:
            raise self.error
        return SimpleNamespace(result=lambda: self.done.append((entity.kind, entity.settings)))


def test_the_steps_are_made_in_order_each_is_awaited_and_the_new_deployment_gets_the_traffic(
    no_sdk, tmp_path, capsys
):
    client, made = Client(), plan_steps(PLAN)
    send(made, client, tmp_path)
    expected = [(step.kind, step.settings) for step in made]
    expected.insert(4, ("online_endpoint", {"name": "slm-onnx-abcde", "traffic": {"blue": 100}}))
    expected.insert(
        8,
        (
            "batch_endpoint",
            {"name": "slm-onnx-abcde-batch", "defaults": {"deployment_name": "blue"}},
        ),
    )
    assert client.done == expected
    said = capsys.readouterr().out
    assert re.findall("^az ml .*", said, re.MULTILINE) == [step.command for step in made]
    assert "still be there" not in said


def test_a_step_that_is_refused_says_what_is_left_and_how_it_goes(no_sdk, tmp_path, capsys):
    with refuses("azure-refused") as refusal:
        send(plan_steps(PLAN), Client("online_deployment", no_sdk("(Code) No\nroom.")), tmp_path)
    assert refusal.value.what == "Azure refused online-deployment.yaml: (Code) No room."
    assert "how-to-troubleshoot-online-endpoints" in refusal.value.fix
    with pytest.raises(KeyboardInterrupt):
        send(plan_steps(PLAN), Client("environment", KeyboardInterrupt()), tmp_path)
    first, second = capsys.readouterr().out.split("still be there")[1:]
    assert re.findall(r"^  az ml (\S+) (?:delete|archive) ", first, re.MULTILINE) == [
        "online-endpoint",
        "environment",
        "model",
    ]
    assert re.findall(r"^  az ml (\S+) (?:delete|archive) ", second, re.MULTILINE) == [
        "environment",
        "model",
    ]
