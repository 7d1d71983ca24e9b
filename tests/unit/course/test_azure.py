"""Shipping to Azure Machine Learning: what is decided, the files, and what the real SDK asks of the service.

The service is a transport of azure.core's: it answers as recorded in tests/unit/course/azure/answers.json, and what it was
asked has to be what stands in the JSON files beside it. Nothing leaves this machine.

Run: python -m helpers test tests/unit/course/test_azure.py
"""

import http.server
import io
import json
import re
import shutil
import sys
import threading
from functools import partialmethod
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from urllib.parse import parse_qsl, urlsplit

import mlflow
import pytest
import requests
import urllib3
import yaml
from support import ROOT, refuses, stand_ins
from support.chat import AS_SHOWN, SECRET, chat_model_for
from support.extras import install_extra

from course import azure
from course.azure import (
    PARTS,
    TEMPLATES,
    Plan,
    check_endpoint_name,
    choose_instance,
    fill,
    judge,
    load,
    make_folder,
    model_memory,
    quota_cores,
    send,
    service_requirements,
    steps,
    values,
)

# The SDK's own warnings: the process that gathers the results has no such classes, and ends when it is sent one.
pytestmark = pytest.mark.filterwarnings(r"ignore:::(azure|marshmallow)\b")

HERE = Path(__file__).parent / "azure"
ANSWERS = json.loads((HERE / "answers.json").read_text(encoding="utf-8"))
WHO = {"createdBy": "somebody", "createdAt": "2026-11-28T12:00:00Z", "lastModifiedAt": "2026-11-28T12:00:00Z"}
WORKSPACE = {"subscription_id": "00000000-0000-0000-0000-000000000000", "resource_group_name": "group",
             "workspace_name": "space"}
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


@pytest.fixture
def registry(store, tmp_path, monkeypatch):
    """Let the course's store be an empty one; return its client."""
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("COURSE_TRACKING_URI", store)
    monkeypatch.setattr(azure, "course_files", lambda: [ROOT / "README.md", ROOT / "helpers" / "errors.py"])
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("e", (tmp_path / "artifacts").as_uri()))
    yield mlflow.MlflowClient(store)
    mlflow.set_tracking_uri(before)


@pytest.fixture
def registered(registry, tiny):
    """Register the chat model on the toy model, as the chat page does."""
    logged = mlflow.pyfunc.log_model(name="slm-onnx", **chat_model_for(tiny) | {"input_example": AS_SHOWN})
    version = mlflow.register_model(logged.model_uri, "slm-onnx", tags={"model": "tiny-phi3"}).version
    registry.set_registered_model_alias("slm-onnx", "champion", version)
    return registry


def test_the_folder_has_the_model_the_script_and_files_that_name_both(registered, tmp_path):
    plan = make_folder("models:/slm-onnx@champion", folder=tmp_path / "azureml")
    folder = tmp_path / "azureml"
    assert (plan.model, plan.version, plan.course_model, plan.endpoint) == ("slm-onnx", "1", "tiny-phi3", "slm-onnx")
    assert plan.instance_type == "Standard_D2as_v4" and "messages" in plan.fields
    assert plan.requirements == ("mlflow",) and plan.python == f"{sys.version_info.major}.{sys.version_info.minor}"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"model/MLmodel", "code/score.py", "course/README.md", "course/helpers/errors.py", "request.json"} <= files
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
    stand_ins.register(tmp_path / "stand-in", "Plain")
    (tmp_path / "azureml").mkdir()
    (tmp_path / "azureml" / "former").touch()
    with refuses(code):
        make_folder(uri, endpoint, folder=tmp_path / "azureml")
    assert [path.name for path in (tmp_path / "azureml").iterdir()] == ["former"]
    assert not list(tmp_path.glob("azureml.*"))


def test_a_version_whose_files_are_gone_says_so(registered, tmp_path):
    shutil.rmtree(tmp_path / "artifacts")
    with refuses("model-gone"):
        make_folder("models:/slm-onnx@champion", folder=tmp_path / "azureml")
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


# --- the files, as azure-ai-ml reads them ----------------------------------------------------

@pytest.fixture(scope="module")
def sdk():
    """Let this process find azure-ai-ml, where it has none of the course's own packages."""
    folder = str(install_extra("azure"))
    sys.path.append(folder)
    yield
    sys.path.remove(folder)


def with_sdk(test):
    return pytest.mark.slow(pytest.mark.index(pytest.mark.usefixtures("sdk")(test)))


STEPS = {step.kind: step for step in steps(PLAN)}


@pytest.fixture
def filled(tmp_path):
    """Fill the files, beside folders as small as can be."""
    for name in ("model", "code", "course"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "MLmodel").write_text("flavors: {}\n", encoding="utf-8")
    (tmp_path / "code" / "score.py").write_text("def init(): ...\n\n\ndef run(request): ...\n", encoding="utf-8")
    (tmp_path / "course" / "README.md").write_text("# The course\n", encoding="utf-8")
    for template in TEMPLATES.glob("*.yaml"):
        text = fill(template.read_text(encoding="utf-8"), values(PLAN))
        (tmp_path / template.name).write_text(text, encoding="utf-8")
    return tmp_path


@with_sdk
@pytest.mark.parametrize("kind", STEPS)
def test_azure_ai_ml_loads_each_file_as_it_stands_and_filled(kind, filled):
    for folder in (TEMPLATES, filled):
        assert load(STEPS[kind], folder)


@with_sdk
@pytest.mark.parametrize(("kind", "line", "wrong"), [
    ("model", "type: mlflow_model", "type: [mlflow_model]"),
    ("model", "path: model", "folder: model"),
    ("environment", "conda_file:", "conda:"),
    ("online_endpoint", "auth_mode: key", "auth_mode: none"),
    ("online_deployment", "scoring_script:", "script:"),
    ("online_deployment", "instance_count: 1", "instance_count: one"),
    ("online_deployment", "request_timeout_ms: 180000", "request_timeout: 180"),
    ("online_deployment", "max_concurrent_requests_per_instance: 8", "max_concurrent_requests_per_instance: many"),
    ("compute", "min_instances: 0", "instances: 0"),
    ("batch_endpoint", "auth_mode: aad_token", "auth: aad_token"),
    ("batch_deployment", "output_action: append_row", "output_action: append"),
    ("batch_deployment", "mini_batch_size: 1", "mini_batch_size: few"),
    ("job", "instance_count: 1", "instances: 1"),
])
def test_azure_ai_ml_refuses_a_wrong_field(kind, line, wrong, filled):
    from azure.ai.ml.exceptions import ValidationException
    from marshmallow import ValidationError

    path = filled / STEPS[kind].file
    text = path.read_text(encoding="utf-8")
    assert line in text
    path.write_text(text.replace(line, wrong), encoding="utf-8")
    with pytest.raises((ValidationException, ValidationError)):
        load(STEPS[kind], filled)


# --- what the SDK asks of the service --------------------------------------------------------


class Service(requests.adapters.BaseAdapter):
    """Azure as far as the SDK sees it. It keeps what it was asked, and what was uploaded."""

    # What takes the service a while: it answers with the address of an operation.
    SLOW = ("onlineEndpoints", "batchEndpoints", "deployments", "computes")
    FILLED_IN = MappingProxyType({"flavors": {}, "scaleSettings": {"scaleType": "Default"},
                                  "provisioningState": "Succeeded"})

    def __init__(self, refused):
        super().__init__()
        self.refused, self.asked, self.uploaded, self.made, self.polls = refused, [], set(), {}, 0

    def send(self, request, **_):
        url = urlsplit(request.url)
        body = request.body.decode() if isinstance(request.body, bytes) else request.body
        if url.hostname.endswith(".blob.core.windows.net"):
            self.uploaded.add(normal(url.path))
            written = "metadata" if "comp=metadata" in url.query else "blob"
            answer = ANSWERS["no blob" if request.method == "HEAD" else written]
        else:
            body = json.loads(body) if body else None
            self.asked.append({"method": request.method, "path": normal(url.path),
                               "query": normal(dict(parse_qsl(url.query))), "body": normal(body)})
            answer = self.answer(request.method, url.path, body)
        return respond(request, answer["status"], answer.get("headers", {}), answer["body"])

    def close(self):
        pass

    def answer(self, method, path, body):
        *_, kind, name = path.split("/")
        for end, refusal in self.refused.items():
            if path.endswith(end) and (method == "PUT" or refusal == "no workspace"):
                return ANSWERS[refusal]
        if "mfeOperationsStatus" in path:
            self.polls += 1
            end = next((refusal for place, refusal in self.refused.items() if name.endswith(place)), "done")
            return ANSWERS["running" if self.polls % 2 else end]
        if name == "startPendingUpload":
            return ANSWERS["upload"]
        if name in ("space", "workspaceblobstore", "listSecrets"):
            return ANSWERS[{"space": "workspace", "workspaceblobstore": "datastore"}.get(name, "secrets")]
        if method == "PUT":
            self.made[path] = {"id": path, "name": name, "type": kind, "location": "eastus2", "systemData": WHO} | body
            self.made[path]["properties"] = {**self.FILLED_IN, **body["properties"]}
        if name == "versions":  # those that have a digest, or the last one: there are none
            return {"status": 200, "body": {"value": []}}
        if path not in self.made:
            return ANSWERS["no workspace"]
        headers = {}
        if method == "PUT" and kind in self.SLOW:
            headers = {"Azure-AsyncOperation": "https://management.azure.com/subscriptions/0/providers/"
                       f"Microsoft.MachineLearningServices/locations/eastus2/mfeOperationsStatus/{kind}:{name}"}
        return {"status": 201 if headers else 200, "headers": headers, "body": self.made[path]}


def respond(request, status, headers, body):
    response = requests.Response()
    response.status_code, response.request, response.url, response.reason = status, request, request.url, "as told"
    data = b"" if body is None else json.dumps(body).encode()
    response.headers.update(headers | {"Content-Type": "application/json", "Content-Length": str(len(data))})
    response.raw = urllib3.HTTPResponse(io.BytesIO(data), headers=response.headers, status=status,
                                        preload_content=False)
    return response


def normal(value):
    """Return a request without what differs from run to run: identifiers, digests, this Python's version."""
    if isinstance(value, dict):
        return {name: normal(item) for name, item in value.items() if not re.match("(azureml|mlflow.source).git", name)}
    if isinstance(value, list):
        return [normal(item) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"\b[0-9a-f]{64}\b|\b[0-9a-f]{32}\b", "DIGEST", value)
    value = re.sub(r"(?<!subscriptions/)\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "IDENTIFIER", value)
    return re.sub(r"(?<=/jobs/)[a-z]+_[a-z]+_[a-z0-9]+", "JOB", value)


@pytest.fixture
def connect(monkeypatch):
    """Return a function that makes a real client of a service, and returns both."""
    from azure.ai.ml import MLClient, _artifacts
    from azure.core.credentials import AccessToken
    from azure.core.pipeline.transport import RequestsTransport

    originals = {name: getattr(_artifacts._blob_storage_helper, name).__init__
                 for name in ("BlobServiceClient", "ContainerClient")}

    class Transport(RequestsTransport):
        def sleep(self, duration):
            pass

    def make(**refused):
        service, session = Service(refused), requests.Session()
        session.trust_env = False
        session.mount("https://", service)
        transport = Transport(session=session, session_owner=False)
        for name in ("BlobServiceClient", "ContainerClient"):  # what uploads gets no transport of the client's
            kind = getattr(_artifacts._blob_storage_helper, name)
            monkeypatch.setattr(kind, "__init__", partialmethod(originals[name], transport=transport))
        credential = SimpleNamespace(get_token=lambda *scopes, **more: AccessToken(SECRET, 2**33))
        client = MLClient(credential, **WORKSPACE, transport=transport, enable_telemetry=False, show_progress=False)
        return service, client

    return make


def see_in_file(name, service):
    """See that a service was asked what stands in a file."""
    found = {"asked": service.asked, "uploaded": sorted(service.uploaded)}
    file = HERE / f"{name}.json"
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    assert SECRET not in text and "zqsignature" not in text
    if not file.exists():
        file.write_text(text, encoding="utf-8")
        pytest.fail(f"{file} was not there: it was written. Read it, and run this again.")
    assert json.loads(file.read_text(encoding="utf-8")) == json.loads(text)


@with_sdk
@pytest.mark.parametrize("part", PARTS)
def test_the_requests_of_a_part_are_those_on_file(part, connect, filled, capsys):
    service, client = connect()
    send(PLAN, steps(PLAN, [part]), client, filled)
    see_in_file(part, service)
    said = capsys.readouterr().out
    assert re.findall("^az ml .*", said, re.MULTILINE) == [step.command for step in steps(PLAN, [part])]
    assert SECRET not in said and "still there" not in said


@with_sdk
@pytest.mark.parametrize(("place", "answer", "code", "left"), [
    ("/deployments/blue", "quota", "azure-quota", ["online-endpoint", "environment", "model"]),
    ("/deployments/blue", "forbidden quota", "azure-quota", ["online-endpoint", "environment", "model"]),
    ("deployments:blue", "crashed", "azure-crashed", ["online-endpoint", "environment", "model"]),
    ("/onlineEndpoints/slm-onnx", "taken", "endpoint-taken", ["online-endpoint", "environment", "model"]),
    ("/environments/slm-onnx-serving/versions/3", "expired", "azure-token", ["environment", "model"]),
    ("/models/slm-onnx/versions/3", "forbidden", "azure-forbidden", ["model"]),
    ("/datastores/workspaceblobstore", "no workspace", "azure-not-found", ["model"]),
])
def test_a_refusal_is_two_sentences_and_says_what_is_left_and_how_it_goes(
        place, answer, code, left, connect, filled, capsys):
    _, client = connect(**{place: answer})
    with refuses(code) as refusal:
        send(PLAN, steps(PLAN, ["online"]), client, filled)
    said = capsys.readouterr().out
    told = said[said.index("still there"):]
    assert re.findall(r"^  az ml (\S+) (?:delete|archive) ", told, re.MULTILINE) == left
    assert SECRET not in said + str(refusal.value) and refusal.value.__suppress_context__


@with_sdk
def test_a_run_that_is_interrupted_says_what_is_left(connect, filled, capsys, monkeypatch):
    _, client = connect()
    monkeypatch.setattr(client, "begin_create_or_update", lambda entity: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        send(PLAN, steps(PLAN, ["online"]), client, filled)
    assert "az ml online-endpoint delete --name slm-onnx --yes" in capsys.readouterr().out


@with_sdk
def test_the_same_deployment_again_asks_the_same(connect, filled):
    service, client = connect()
    for _ in range(2):
        service.asked.clear()
        send(PLAN, steps(PLAN, ["online"]), client, filled)
    puts = [asked for asked in service.asked if asked["method"] == "PUT"]
    golden = json.loads((HERE / "online.json").read_text(encoding="utf-8"))["asked"]
    assert puts == [asked for asked in golden if asked["method"] == "PUT"]


@with_sdk
def test_a_proxy_is_asked_for_the_way_and_its_refusal_is_told(filled, monkeypatch):
    from azure.ai.ml import MLClient
    from azure.core.credentials import AccessToken

    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            asked.append(self.path)
            self.send_error(403)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
        for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        credential = SimpleNamespace(get_token=lambda *scopes, **more: AccessToken(SECRET, 2**33))
        client = MLClient(credential, **WORKSPACE, enable_telemetry=False, show_progress=False, retry_total=0)
        with refuses("azure-unreachable"):
            send(PLAN, steps(PLAN, ["online"])[:1], client, filled)
        proxy.shutdown()
    assert set(asked) == {"management.azure.com:443"}


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """Let nobody be signed in: there is only the command line to ask, and there is none."""
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "AzureCliCredential")
    monkeypatch.setenv("PATH", str(tmp_path))


@with_sdk
def test_without_a_workspace_it_says_which_file_is_missing(nobody, tmp_path):
    with refuses("azure-workspace"):
        azure.sign_in(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with refuses("azure-workspace"):
        azure.sign_in(tmp_path)


@with_sdk
def test_with_nobody_signed_in_it_says_how_to(nobody, tmp_path):
    names = WORKSPACE | {"resource_group": "group"}
    (tmp_path / "config.json").write_text(json.dumps(names), encoding="utf-8")
    with refuses("azure-sign-in"):
        azure.sign_in(tmp_path)


@with_sdk
def test_nothing_is_copied_before_somebody_is_signed_in(registered, nobody, tmp_path, monkeypatch):
    monkeypatch.setattr(azure, "ROOT", tmp_path)
    monkeypatch.setattr(azure, "TARGET", tmp_path / "azureml")
    with refuses("azure-workspace"):
        azure.deploy("models:/slm-onnx@champion")
    with refuses("endpoint-name"):
        azure.deploy("models:/slm-onnx@champion", endpoint="1st")
    assert not (tmp_path / "azureml").exists()
