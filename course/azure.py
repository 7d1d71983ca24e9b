"""Ships a registered model to Azure Machine Learning.

The address of a model comes in. ``build/azureml`` goes out: the files of ``deploy/azureml``, filled, beside the model
and ``score.py``; then the ``az ml`` commands, in order, or what azure-ai-ml makes of the same files in your workspace.
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course.kit.build import course_files
from helpers.errors import CourseError
from helpers.files import folder_bytes
from helpers.models.catalogue import find_entry
from helpers.models.space import memory_needed
from helpers.paths import BUILD, ROOT, VENV_PYTHON
from serving.package import SHARED_FILES

TEMPLATES = ROOT / "deploy" / "azureml"
TARGET = BUILD / "azureml"
PARTS = ("online", "batch", "job")
PRICES = "https://azure.microsoft.com/pricing/details/machine-learning/"
QUOTAS = "https://ml.azure.com/quota"
# Cores and GiB of memory. The names are from Azure's list for online endpoints:
# https://learn.microsoft.com/azure/machine-learning/reference-managed-online-endpoints-vm-sku-list
INSTANCES = {"Standard_D2as_v4": (2, 8), "Standard_D4as_v4": (4, 16), "Standard_D8as_v4": (8, 32),
             "Standard_D16as_v4": (16, 64), "Standard_D32as_v4": (32, 128)}
SHARE = 0.75  # of a machine's memory for the model and its server; the rest is the system's
# Packages that the inference server pins by itself: its version counts, whatever the model was logged with.
OF_THE_SERVER = {"flask", "flask-cors", "gunicorn", "pydantic", "opentelemetry-api", "opentelemetry-sdk"}
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SCOPE = "https://management.azure.com/.default"

# --- what is decided ------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What the files are filled with."""

    model: str
    version: str
    course_model: str  # a name of the catalogue, or "unknown"
    megabytes: float
    fields: tuple[str, ...]  # of a request, as the model's signature has them
    python: str  # such as 3.12
    requirements: tuple[str, ...]
    endpoint: str
    instance_type: str

    @property
    def batch_endpoint(self) -> str:
        """Return the name of the second endpoint: no two of a region may have one."""
        return f"{self.endpoint}-batch"


def check_endpoint_name(name: str) -> None:
    """Raise CourseError for a name that Azure would refuse, alone or with the ``-batch`` of the second endpoint.

    https://learn.microsoft.com/azure/machine-learning/how-to-manage-quotas has the rules.
    """
    if not re.fullmatch(r"(?=.{3,26}\Z)[A-Za-z][A-Za-z0-9]*(-[A-Za-z0-9]+)*", name, re.ASCII):
        raise CourseError("endpoint-name", f"Azure takes no endpoints called {name!r} and {f'{name}-batch'!r}.",
                          "Choose 3 to 26 letters, digits and single hyphens, the first a letter: --endpoint NAME.")


def choose_instance(megabytes: float) -> str:
    """Return the smallest machine of which ``megabytes`` of memory leave the system its share."""
    for name, (_, gibibytes) in INSTANCES.items():
        if megabytes <= SHARE * gibibytes * 2**30 / 1e6:
            return name
    raise CourseError("model-too-large", f"The model takes {math.ceil(megabytes):,} MB of memory, more than any "
                      "machine that the course knows.", "Choose one of Azure's list: --instance-type NAME.")


def model_memory(course_model: str | None, size: int) -> float:
    """Return the megabytes that a model takes: what the catalogue says, or what its ``size`` in bytes lets expect."""
    try:
        known = find_entry(course_model).memory if course_model else None
    except CourseError:  # the tag names a model that this catalogue does not have
        known = None
    return known or memory_needed(size)


def quota_cores(instance_type: str, count: int = 1) -> int | None:
    """Return the cores that a quota has to have free: Azure holds 20 % more machines ready, for upgrades."""
    return math.ceil(count * 1.2) * INSTANCES[instance_type][0] if instance_type in INSTANCES else None


def service_requirements(logged: Sequence[str]) -> tuple[str, ...]:
    """Return what the service installs for a model: its requirements, without the pins that are the server's matter.

    On Linux the torch of the package index is the build for a GPU, 3 GB: where torch is asked for, PyTorch's own index
    of builds for a CPU comes first.
    """
    kept = []
    for requirement in logged:
        name = re.split(r"[=<>~!\[; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")
        kept.append(name if name in OF_THE_SERVER else requirement)
    if any(re.match(r"torch\b(?!-)", requirement) for requirement in kept):
        kept.insert(0, f"--extra-index-url {TORCH_CPU_INDEX}")
    return tuple(kept)


# --- the files ------------------------------------------------------------------------------


def values(plan: Plan) -> dict[str, Any]:
    """Return what stands for each ``# filled:`` of the files."""
    return {
        "model": plan.model, "version": plan.version, "course_model": plan.course_model,
        "megabytes": f"{plan.megabytes:.0f}", "description": f"Version {plan.version} of the course's {plan.model}. "
        f"A request is a JSON object with messages. Its fields: {', '.join(plan.fields)}.",
        "environment": f"{plan.model}-serving", "model_version": f"azureml:{plan.model}:{plan.version}",
        "environment_version": f"azureml:{plan.model}-serving:{plan.version}", "endpoint": plan.endpoint,
        "batch_endpoint": plan.batch_endpoint, "instance_type": plan.instance_type, "code": "code", "course": "course",
        "python": f"python={plan.python}", "requirements": plan.requirements}


def fill(text: str, filled: dict[str, Any]) -> str:
    """Return a file with its values: a line that ends with ``# filled: NAME`` gets the one of that name.

    A list makes a line for each of its items. Comments stay where they are.
    """
    def replace(line):
        found = filled[line["name"]]
        lines = found if isinstance(found, tuple) else [found]
        return "\n".join(f"{line['head']}{json.dumps(one, ensure_ascii=False)}" for one in lines)

    return re.sub(r"^(?P<head> *(?:[\w$]+: |- )).*?  # filled: (?P<name>\w+)$", replace, text, flags=re.MULTILINE)


def make_folder(uri: str, endpoint: str | None = None, instance_type: str | None = None,
                folder: Path | None = None) -> Plan:
    """Fill ``folder`` for the model at an address of the registry, and return what it was filled with.

    The folder, ``build/azureml`` unless another is named, is there when it is whole: until then, and after an error,
    the former one is.

    Raises
    ------
    CourseError
        A name that Azure refuses, no model at that address, one of another contract, or one too large.
    """
    folder = folder or TARGET
    name, version, tags = _find_model(uri)
    endpoint = endpoint or name
    check_endpoint_name(endpoint)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        plan = _fetch(name, version, tags, endpoint, instance_type, part)
        for template in TEMPLATES.glob("*.yaml"):
            text = fill(template.read_text(encoding="utf-8"), values(plan))
            (part / template.name).write_text(text, encoding="utf-8")
        shutil.copyfile(part / "model" / "serving_input_example.json", part / "request.json")
        (part / "code").mkdir()
        shutil.copyfile(ROOT / "serving" / "score.py", part / "code" / "score.py")
        (part / "code" / "serving").mkdir()
        for shared in SHARED_FILES:
            shutil.copyfile(ROOT / "serving" / shared, part / "code" / "serving" / shared)
        for file in course_files():
            copy = part / "course" / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return plan


def _find_model(uri):
    """Return the name, the version and the tags of a registered model."""
    import mlflow
    from mlflow.exceptions import MlflowException

    from helpers.tracking import tracking_store

    address = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if not address:
        raise CourseError("model-address", f"{uri!r} is no address of a registered model.",
                          "Such as: models:/slm-onnx@champion, or models:/slm-onnx/1.")
    store = tracking_store().uri
    mlflow.set_tracking_uri(store)
    name, alias, number = address.groups()
    client = mlflow.MlflowClient(store)
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException:
        raise CourseError("model-unregistered", f"The registry of {store} has no model at {uri}.",
                          "Run the page that registers it, such as ChatModel, or name another with --model.") from None
    return name, str(found.version), found.tags


def _fetch(name, version, tags, endpoint, instance_type, part):
    """Copy a model's folder to ``part``, and return the plan that it makes."""
    import mlflow
    from mlflow.exceptions import MlflowException

    part.mkdir(parents=True)
    try:
        folder = Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=str(part / "model")))
        logged = mlflow.models.Model.load(str(folder))
    except (MlflowException, FileNotFoundError):
        raise CourseError("model-gone", f"The registry names version {version} of {name}, and its files are gone.",
                          "Log and register it again, or name another version: --model models:/NAME/VERSION.") from None
    schema = logged.get_input_schema()
    fields = tuple(schema.input_names()) if schema and schema.has_input_names() else ()
    if "messages" not in fields or not (folder / "serving_input_example.json").exists():
        raise CourseError("model-other-contract", f"{name} is no chat model with an example: its requests have no "
                          "messages.", "Name one that takes them, such as models:/slm-onnx@champion.")
    size = folder_bytes(folder)
    requirements = (folder / "requirements.txt").read_text(encoding="utf-8").split("\n")
    python = ".".join(logged.flavors["python_function"]["python_version"].split(".")[:2])
    return Plan(
        name, version, tags.get("model", "unknown"), size / 1e6, fields, python,
        service_requirements([line.strip() for line in requirements if line.strip()]), endpoint,
        instance_type or choose_instance(model_memory(tags.get("model"), size)))


# --- the steps ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One thing that is made in the workspace."""

    kind: str  # as in the command, with underscores
    command: str
    cost: str
    remove: str = ""  # the command that takes it away; empty where that of another step does

    @property
    def file(self) -> str:
        """Return the name of its file."""
        return f"{self.kind.replace('_', '-')}.yaml"


def steps(plan: Plan, parts: Sequence[str] = PARTS) -> list[Step]:
    """Return what is made, in order, and with which ``az ml`` command."""
    hour = f"1 x {plan.instance_type}, by the hour"
    made = [
        Step("model", "az ml model create --file model.yaml", "the storage of its files",
             f"az ml model archive --name {plan.model} --version {plan.version}"),
        Step("environment", "az ml environment create --file environment.yaml", "the storage of its image",
             f"az ml environment archive --name {plan.model}-serving --version {plan.version}"),
    ] if set(parts) & {"online", "batch"} else []
    if "online" in parts:
        made += [
            Step("online_endpoint", "az ml online-endpoint create --file online-endpoint.yaml", "nothing yet",
                 f"az ml online-endpoint delete --name {plan.endpoint} --yes"),
            Step("online_deployment", "az ml online-deployment create --file online-deployment.yaml --all-traffic",
                 f"{hour}, asked or not, until it is deleted"),
        ]
    if "batch" in parts:
        made += [
            Step("compute", "az ml compute create --file compute.yaml", f"nothing yet; {hour}, while a batch runs",
                 "az ml compute delete --name slm-batch --yes"),
            Step("batch_endpoint", "az ml batch-endpoint create --file batch-endpoint.yaml", "nothing",
                 f"az ml batch-endpoint delete --name {plan.batch_endpoint} --yes"),
            Step("batch_deployment", "az ml batch-deployment create --file batch-deployment.yaml --set-default",
                 "nothing until a batch runs"),
        ]
    if "job" in parts:
        made.append(Step("job", "az ml job create --file job.yaml", "1 x Standard_D4as_v4, by the hour, until it ends"))
    return made


def print_commands(plan: Plan, made: Sequence[Step], folder: Path | None = None) -> None:
    """Print the commands, what each begins to cost, and how to ask and to remove what was made."""
    cores, gibibytes = INSTANCES.get(plan.instance_type, ("?", "?"))
    print(f"{folder or TARGET} has version {plan.version} of {plan.model}: {plan.megabytes:,.1f} MB, for a "
          f"{plan.instance_type} ({cores} cores, {gibibytes} GiB).\nSign in, set your workspace, and run there:\n")
    print("  az login\n  az configure --defaults group=YOUR-GROUP workspace=YOUR-WORKSPACE")
    for step in made:
        print(f"  {step.command}\n      # costs: {step.cost}")
    print(f"\nWhat an hour of a machine costs in your region: {PRICES}")
    kinds = {step.kind for step in made}
    if "online_deployment" in kinds:
        if needed := quota_cores(plan.instance_type):
            print(f"The deployment asks for {needed} free cores of your quota: {QUOTAS}")
        print(f"Ask it: az ml online-endpoint invoke --name {plan.endpoint} --request-file request.json")
    if "batch_deployment" in kinds:
        print(f"Send it a batch: az ml batch-endpoint invoke --name {plan.batch_endpoint} --input FOLDER")
    _print_removal("When you are done, remove what was made:", made)


def _print_removal(title, made):
    removals = [step.remove for step in reversed(made) if step.remove]
    if removals:
        print("\n".join([title, *(f"  {command}" for command in removals)]), flush=True)


# --- the workspace --------------------------------------------------------------------------


def sign_in(folder: Path = ROOT) -> Any:
    """Return an ``azure.ai.ml.MLClient`` for the workspace that a config.json in ``folder`` names.

    The sign-in is that of ``DefaultAzureCredential``: ``az login``, a managed identity, or AZURE_CLIENT_ID and its
    kin. A proxy is taken from HTTPS_PROXY. Raises CourseError where the SDK, the sign-in or the workspace is missing.
    """
    try:
        from azure.ai.ml import MLClient
        from azure.ai.ml.exceptions import ValidationException
        from azure.core.exceptions import AzureError
        from azure.identity import DefaultAzureCredential
    except ImportError:
        raise CourseError(
            "azure-missing", "The SDK of Azure Machine Learning is not installed.",
            f'Install it ({VENV_PYTHON.relative_to(ROOT)} -m pip install -e ".[azure]"), or take --dry-run and az.',
        ) from None
    logging.getLogger("azure").setLevel(logging.ERROR)  # each way to sign in that is not set up would be told
    credential = DefaultAzureCredential()
    try:
        client = MLClient.from_config(credential, path=folder, enable_telemetry=False, show_progress=False)
    except (ValidationException, ValueError):  # no file, or one that is not JSON
        raise CourseError(
            "azure-workspace", "No config.json here names your workspace.",
            "In https://ml.azure.com choose the workspace's name, top right, and Download config file; put that file "
            "into the course's folder.") from None
    try:
        credential.get_token(SCOPE)
    except AzureError:
        raise CourseError("azure-sign-in", "Nobody is signed in to Azure on this machine.",
                          "Run `az login`, and this again.") from None
    return client


def send(plan: Plan, made: Sequence[Step], client: Any, folder: Path | None = None) -> None:
    """Make each step in the workspace, and wait for it.

    A CourseError tells what the service refused. What was begun by then is printed, with the commands that remove it.
    """
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    begun = []
    try:
        for step in made:
            print(f"{step.command}\n    # costs: {step.cost}", flush=True)
            begun.append(step)
            _make(step, client, folder or TARGET)
    except BaseException as error:
        _print_removal("What this run has begun is still there. It is removed by:", begun)
        if isinstance(error, AzureError | MlException):
            raise explain(error, plan) from None
        raise


def load(step: Step, folder: Path) -> Any:
    """Return what azure-ai-ml makes of a step's file."""
    from azure.ai import ml
    from azure.ai.ml.entities._load_functions import load_model_batch_deployment

    if step.kind == "batch_deployment":  # load_batch_deployment, which is public, knows no settings
        return load_model_batch_deployment(folder / step.file)
    return getattr(ml, f"load_{step.kind}")(folder / step.file)


def _make(step, client, folder):
    """Create what a step's file says, and wait for the service."""
    from azure.ai import ml

    entity = load(step, folder)
    if step.kind in ("model", "environment", "job"):
        client.create_or_update(entity)
        return
    client.begin_create_or_update(entity).result()
    if step.kind == "online_deployment":  # as --all-traffic does
        endpoint = ml.load_online_endpoint(
            folder / "online-endpoint.yaml", params_override=[{"traffic": {entity.name: 100}}])
        client.begin_create_or_update(endpoint).result()
    if step.kind == "batch_deployment":  # as --set-default does
        endpoint = ml.load_batch_endpoint(
            folder / "batch-endpoint.yaml", params_override=[{"defaults": {"deployment_name": entity.name}}])
        client.begin_create_or_update(endpoint).result()


AGAIN = "and this again; what is made stays"
MORE_QUOTA = f"Ask for more at {QUOTAS}, or choose a smaller machine: --instance-type NAME."


def judge(status: int | None, code: str, text: str, plan: Plan) -> CourseError:
    """Return the sentences for an answer of the service: its HTTP status, its error's code, and all of its words.

    A quota comes as 400, 403 or 409, deep inside the words, so these are read before the status is.
    """
    quota = re.search(r"Not enough quota available for (\S+) in .*?usage/limit: (\d+)/(\d+)\. Additional needed: (\d+)",
                      text, re.DOTALL)
    if quota:
        name, used, limit, needed = quota.groups()
        return CourseError("azure-quota", f"Your quota has no room for a {name}: it takes {needed} cores, and of "
                           f"{limit} there are {used} in use.", MORE_QUOTA)
    if re.search(r"OutOfQuota|QuotaExceeded|exceed.{0,40}quota|vCPU quota of", text):
        return CourseError("azure-quota", f"Your quota has no room for a {plan.instance_type}.", MORE_QUOTA)
    if "already an endpoint with this name" in text:
        return CourseError("endpoint-taken", f"Somebody in your region has an endpoint called {plan.endpoint}.",
                           "Choose another name: --endpoint NAME.")
    if "container has crashed" in text:
        return CourseError("azure-crashed", "Azure built the service, and its program ended before it was ready.",
                           "Read why: az ml online-deployment get-logs --endpoint-name "
                           f"{plan.endpoint} --name blue --lines 100.")
    if status == 401 or code in ("ExpiredAuthenticationToken", "InvalidAuthenticationToken"):
        return CourseError("azure-token", "Your sign-in to Azure has expired.", f"Run `az login`, {AGAIN}.")
    if status == 403:
        return CourseError("azure-forbidden", "Your account may not do that in this workspace.",
                           "Ask its owner for the role AzureML Data Scientist, or let config.json name another.")
    if status == 404:
        return CourseError("azure-not-found", "Azure does not find the workspace of config.json, or a part of it.",
                           "Download config.json again from https://ml.azure.com.")
    if status is None:
        return CourseError("azure-unreachable", "Azure did not answer.",
                           f"Check the network and the proxy (HTTPS_PROXY), {AGAIN}.")
    return CourseError("azure-refused", f"Azure refused this, {code or status}: {_shorten(text)}.",
                       "Its documentation has this code: https://aka.ms/oe-tsg.")


def _shorten(text):
    return re.sub(r"\s+", " ", text)[:200].rstrip(" .")


def explain(error: Exception, plan: Plan) -> CourseError:
    """Return the sentences for an error of azure-ai-ml."""
    from azure.core.exceptions import HttpResponseError

    if isinstance(error, HttpResponseError):
        return judge(error.status_code, getattr(error.error, "code", None) or "", str(error), plan)
    if type(error).__module__.startswith("azure.ai.ml"):
        return CourseError("azure-file", f"azure-ai-ml does not take a file: {_shorten(str(error))}.",
                           f"Compare {TEMPLATES.relative_to(ROOT)} with what the course has.")
    return judge(None, "", str(error), plan)


def deploy(uri: str, endpoint: str | None = None, instance_type: str | None = None, parts: Sequence[str] = PARTS,
           dry_run: bool = False) -> int:
    """Fill ``build/azureml`` and print the commands, or do in the workspace what they would. Return the exit code.

    Parameters
    ----------
    uri : str
        Such as ``models:/slm-onnx@champion``, in the course's store.
    endpoint : str, optional
        The model's name unless you choose one.
    instance_type : str, optional
        Azure's name of a machine; unless you choose one, the smallest that has the memory.
    parts : sequence of str, optional
        Some of ``online``, ``batch`` and ``job``.
    """
    if endpoint is not None:
        check_endpoint_name(endpoint)
    client = None if dry_run else sign_in()  # refused here, before anything is copied
    plan = make_folder(uri, endpoint, instance_type)
    made = steps(plan, parts)
    if dry_run:
        print_commands(plan, made)
        return 0
    send(plan, made, client)
    if "online" in parts:
        print(f"\nAsk it: az ml online-endpoint invoke --name {plan.endpoint} --request-file "
              f"{TARGET.relative_to(ROOT).as_posix()}/request.json")
    _print_removal("When you are done, remove what was made:", made)
    return 0
