"""What the real SDK of Azure Machine Learning reads from our files and asks of the service, which answers as recorded.

Run: python -m helpers nightly tests/nightly/test_azure.py
"""

import http.server
import io
import json
import re
import shutil
import sys
import threading
from functools import partialmethod
from types import MappingProxyType, SimpleNamespace
from urllib.parse import parse_qsl, urlsplit

import mlflow
import pytest
import requests
import urllib3
from support import ROOT, refuses
from support.chat import AS_SHOWN, SECRET, chat_model_for

from course import azure
from course.azure import PARTS, YAML_FOLDER, Plan, load, plan_steps, send
from course.environment import install_extra

# The SDK's own warnings: the process that gathers the results has no such classes, and ends when it
# is sent one.
pytestmark = pytest.mark.filterwarnings(r"ignore:::(azure|marshmallow)\b")
HERE = ROOT / "tests" / "support" / "azure"
ANSWERS = json.loads((HERE / "answers.json").read_text(encoding="utf-8"))
WHO = {
    "createdBy": "somebody",
    "createdAt": "2026-11-28T12:00:00Z",
    "lastModifiedAt": "2026-11-28T12:00:00Z",
}
WORKSPACE = {
    "subscription_id": "00000000-0000-0000-0000-000000000000",
    "resource_group_name": "group",
    "workspace_name": "space",
}
PLAN = Plan("slm-onnx-abcde", "3", "tiny-phi3", 0.6, "Standard_D2as_v4")


@pytest.fixture
def registry(store, tmp_path, monkeypatch):
    """Let the course's store be an empty one; return its client."""
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("COURSE_TRACKING_URI", store)
    monkeypatch.setattr(
        azure, "course_files", lambda: [ROOT / "README.md", ROOT / "helpers" / "errors.py"]
    )
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment(
        experiment_id=mlflow.create_experiment("e", (tmp_path / "artifacts").as_uri())
    )
    yield mlflow.MlflowClient(store)
    mlflow.set_tracking_uri(before)


@pytest.fixture
def registered(registry, tiny):
    """Register the chat model on the toy model, as the chat page does."""
    logged = mlflow.pyfunc.log_model(
        name="slm-onnx", **chat_model_for(tiny) | {"input_example": AS_SHOWN}
    )
    version = mlflow.register_model(
        logged.model_uri, "slm-onnx", tags={"model": "tiny-phi3"}
    ).version
    registry.set_registered_model_alias("slm-onnx", "champion", version)
    return registry


@pytest.fixture(scope="module")
def sdk():
    """Let this process find azure-ai-ml, where it has none of the course's own packages."""
    folder = str(install_extra("azure"))
    sys.path.append(folder)
    yield
    sys.path.remove(folder)


def with_sdk(test):
    return pytest.mark.usefixtures("sdk")(test)


STEPS = {step.kind: step for step in plan_steps(PLAN)}


@pytest.fixture
def filled(tmp_path):
    """Fill the files, beside folders as small as can be."""
    for name in ("model", "code", "course"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "MLmodel").write_text("flavors: {}\n", encoding="utf-8")
    (tmp_path / "code" / "score.py").write_text(
        "def init(): ...\n\n\ndef run(request): ...\n", encoding="utf-8"
    )
    (tmp_path / "course" / "README.md").write_text("# The course\n", encoding="utf-8")
    for file in YAML_FOLDER.glob("*.yaml"):
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


@with_sdk
@pytest.mark.parametrize("kind", STEPS)
def test_azure_ai_ml_loads_each_file_with_its_settings(kind, filled):
    settings = STEPS[kind].settings
    assert getattr(load(kind, filled, settings), "name", None) == settings.get(
        "name", "blue" if settings else None
    )


@with_sdk
@pytest.mark.parametrize(
    ("kind", "line", "wrong"),
    [
        ("model", "type: mlflow_model", "type: [mlflow_model]"),
        ("model", "path: model", "folder: model"),
        ("environment", "conda_file:", "conda:"),
        ("online_endpoint", "auth_mode: key", "auth_mode: none"),
        ("online_deployment", "scoring_script:", "script:"),
        ("online_deployment", "instance_count: 1", "instance_count: one"),
        ("online_deployment", "request_timeout_ms: 180000", "request_timeout: 180"),
        (
            "online_deployment",
            "max_concurrent_requests_per_instance: 8",
            "max_concurrent_requests_per_instance: many",
        ),
        ("compute", "min_instances: 0", "instances: 0"),
        ("batch_endpoint", "auth_mode: aad_token", "auth: aad_token"),
        ("batch_deployment", "output_action: append_row", "output_action: append"),
        ("batch_deployment", "mini_batch_size: 1", "mini_batch_size: few"),
        ("job", "instance_count: 1", "instances: 1"),
    ],
)
def test_azure_ai_ml_refuses_a_wrong_field(kind, line, wrong, filled):
    from azure.ai.ml.exceptions import ValidationException
    from marshmallow import ValidationError

    path = filled / STEPS[kind].file
    text = path.read_text(encoding="utf-8")
    assert line in text
    path.write_text(text.replace(line, wrong), encoding="utf-8")
    with pytest.raises((ValidationException, ValidationError)):
        load(kind, filled, STEPS[kind].settings)


class Service(requests.adapters.BaseAdapter):
    """Azure as far as the SDK sees it. It keeps what it was asked, and what was uploaded."""

    # What takes the service a while: it answers with the address of an operation.
    SLOW = ("onlineEndpoints", "batchEndpoints", "deployments", "computes")
    FILLED_IN = MappingProxyType(
        {"flavors": {}, "scaleSettings": {"scaleType": "Default"}, "provisioningState": "Succeeded"}
    )

    def __init__(self, refused):
        super().__init__()
        self.refused = refused
        self.asked = []
        self.uploaded = set()
        self.made = {}
        self.polls = 0

    def send(self, request, **_):
        url = urlsplit(request.url)
        body = request.body.decode() if isinstance(request.body, bytes) else request.body
        if url.hostname.endswith(".blob.core.windows.net"):
            self.uploaded.add(normal(url.path))
            written = "metadata" if "comp=metadata" in url.query else "blob"
            answer = ANSWERS["no blob" if request.method == "HEAD" else written]
        else:
            body = json.loads(body) if body else None
            self.asked.append(
                {
                    "method": request.method,
                    "path": normal(url.path),
                    "query": normal(dict(parse_qsl(url.query))),
                    "body": normal(body),
                }
            )
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
            end = next(
                (refusal for place, refusal in self.refused.items() if name.endswith(place)), "done"
            )
            return ANSWERS["running" if self.polls % 2 else end]
        if name == "startPendingUpload":
            return ANSWERS["upload"]
        if name in ("space", "workspaceblobstore", "listSecrets"):
            return ANSWERS[
                {"space": "workspace", "workspaceblobstore": "datastore"}.get(name, "secrets")
            ]
        if method == "PUT":
            self.made[path] = {
                "id": path,
                "name": name,
                "type": kind,
                "location": "eastus2",
                "systemData": WHO,
            } | body
            self.made[path]["properties"] = {**self.FILLED_IN, **body["properties"]}
        if name == "versions":  # those that have a digest, or the last one: there are none
            return {"status": 200, "body": {"value": []}}
        if path not in self.made:
            return ANSWERS["no workspace"]
        headers = {}
        if method == "PUT" and kind in self.SLOW:
            headers = {
                "Azure-AsyncOperation": "https://management.azure.com/subscriptions/0/providers/"
                f"Microsoft.MachineLearningServices/locations/eastus2/mfeOperationsStatus/{kind}:{name}"
            }
        return {"status": 201 if headers else 200, "headers": headers, "body": self.made[path]}


def respond(request, status, headers, body):
    response = requests.Response()
    response.status_code = status
    response.request = request
    response.url = request.url
    response.reason = "as told"
    data = b"" if body is None else json.dumps(body).encode()
    response.headers.update(
        headers | {"Content-Type": "application/json", "Content-Length": str(len(data))}
    )
    response.raw = urllib3.HTTPResponse(
        io.BytesIO(data), headers=response.headers, status=status, preload_content=False
    )
    return response


def normal(value):
    """Return a request without what differs from run to run: identifiers, digests, this Python's version."""
    if isinstance(value, dict):
        return {
            name: normal(item)
            for name, item in value.items()
            if not re.match("(azureml|mlflow.source).git", name)
        }
    if isinstance(value, list):
        return [normal(item) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"\b[0-9a-f]{64}\b|\b[0-9a-f]{32}\b", "DIGEST", value)
    value = re.sub(
        r"(?<!subscriptions/)\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "IDENTIFIER", value
    )
    return re.sub(r"(?<=/jobs/)[a-z]+_[a-z]+_[a-z0-9]+", "JOB", value)


@pytest.fixture
def connect(monkeypatch):
    """Return a function that makes a real client of a service, and returns both."""
    from azure.ai.ml import MLClient, _artifacts
    from azure.core.credentials import AccessToken
    from azure.core.pipeline.transport import RequestsTransport

    originals = {
        name: getattr(_artifacts._blob_storage_helper, name).__init__
        for name in ("BlobServiceClient", "ContainerClient")
    }

    class Transport(RequestsTransport):
        def sleep(self, duration):
            pass

    def make(**refused):
        service, session = Service(refused), requests.Session()
        session.trust_env = False
        session.mount("https://", service)
        transport = Transport(session=session, session_owner=False)
        # What uploads gets no transport of the client's.
        for name in ("BlobServiceClient", "ContainerClient"):
            kind = getattr(_artifacts._blob_storage_helper, name)
            monkeypatch.setattr(
                kind, "__init__", partialmethod(originals[name], transport=transport)
            )
        credential = SimpleNamespace(get_token=lambda *scopes, **more: AccessToken(SECRET, 2**33))
        client = MLClient(
            credential,
            **WORKSPACE,
            transport=transport,
            enable_telemetry=False,
            show_progress=False,
        )
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
    send(plan_steps(PLAN, [part]), client, filled)
    see_in_file(part, service)
    said = capsys.readouterr().out
    assert re.findall("^az ml .*", said, re.MULTILINE) == [
        step.command for step in plan_steps(PLAN, [part])
    ]
    assert SECRET not in said and "still be there" not in said


@with_sdk
@pytest.mark.parametrize(
    ("place", "answer", "code", "words", "left"),
    [
        (
            "/deployments/blue",
            "quota",
            "azure-refused",
            "Additional needed: 8",
            ["online-endpoint", "environment", "model"],
        ),
        (
            "/deployments/blue",
            "forbidden quota",
            "azure-refused",
            "exceeds the quota of cores",
            ["online-endpoint", "environment", "model"],
        ),
        (
            "deployments:blue",
            "crashed",
            "azure-refused",
            "User container has crashed",
            ["online-endpoint", "environment", "model"],
        ),
        (
            "/onlineEndpoints/slm-onnx-abcde",
            "taken",
            "azure-refused",
            "There is already an endpoint with this name",
            ["online-endpoint", "environment", "model"],
        ),
        (
            "/environments/slm-onnx-abcde/versions/3",
            "expired",
            "azure-sign-in",
            "The access token expiry UTC time",
            ["environment", "model"],
        ),
        (
            "/models/slm-onnx-abcde/versions/3",
            "forbidden",
            "azure-refused",
            "does not have authorization",
            ["model"],
        ),
        (
            "/datastores/workspaceblobstore",
            "no workspace",
            "azure-refused",
            "was not found",
            ["model"],
        ),
    ],
)
def test_a_refusal_has_azures_words_and_what_is_left_and_how_it_goes(
    place, answer, code, words, left, connect, filled, capsys
):
    _, client = connect(**{place: answer})
    with refuses(code) as refusal:
        send(plan_steps(PLAN, ["online"]), client, filled)
    said = capsys.readouterr().out
    told = said[said.index("still be there") :]
    assert words in refusal.value.what
    assert re.findall(r"^  az ml (\S+) (?:delete|archive) ", told, re.MULTILINE) == left
    assert SECRET not in said + str(refusal.value) and refusal.value.__suppress_context__


@with_sdk
def test_a_run_that_is_interrupted_says_what_is_left(connect, filled, capsys, monkeypatch):
    _, client = connect()
    monkeypatch.setattr(
        client, "begin_create_or_update", lambda entity: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        send(plan_steps(PLAN, ["online"]), client, filled)
    assert "az ml online-endpoint delete --name slm-onnx-abcde --yes" in capsys.readouterr().out


@with_sdk
def test_the_same_deployment_again_asks_the_same(connect, filled):
    service, client = connect()
    for _ in range(2):
        service.asked.clear()
        send(plan_steps(PLAN, ["online"]), client, filled)
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
        client = MLClient(
            credential, **WORKSPACE, enable_telemetry=False, show_progress=False, retry_total=0
        )
        with refuses("azure-unreachable"):
            send(plan_steps(PLAN, ["online"])[:1], client, filled)
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
    monkeypatch.setattr(azure, "TARGET_FOLDER", tmp_path / "azureml")
    with refuses("azure-workspace"):
        azure.deploy("models:/slm-onnx@champion")
    with refuses("endpoint-name"):
        azure.deploy("models:/slm-onnx@champion", "1st")
    assert not (tmp_path / "azureml").exists()
