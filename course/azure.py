"""Ships a registered model to Azure Machine Learning.

It fills ``build/azureml`` with the files of ``deploy/azureml``, the model and ``score.py``. Then it
prints the steps as ``az ml`` commands, or takes them in your workspace by azure-ai-ml. Both read the
same files with the same settings, those of `plan_steps`.
"""

import getpass
import hashlib
import logging
import platform
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name

from course.kit.build import course_files
from helpers.errors import CourseError
from helpers.files import folder_bytes
from helpers.models.catalogue import find_entry
from helpers.models.space import memory_needed
from helpers.paths import BUILD, ROOT, VENV_PYTHON
from serving.package import SHARED_FILES

YAML_FOLDER = ROOT / "deploy" / "azureml"
TARGET_FOLDER = BUILD / "azureml"
PARTS = ("online", "batch", "job")
AZURE_DOCS = "https://learn.microsoft.com/azure/machine-learning"
MACHINES = f"{AZURE_DOCS}/reference-managed-online-endpoints-vm-sku-list"
PRICES = "https://azure.microsoft.com/pricing/details/machine-learning/"
QUOTAS = "https://ml.azure.com/quota"
INSTANCE_TYPE = "Standard_D2as_v4"
# Megabytes that this machine's 8 GiB leave for a model, with a quarter for the system.
INSTANCE_MEMORY = 6_400
REQUEST_SECONDS = 180  # as in online-deployment.yaml; Azure gives a request no more
# Packages that the inference server pins by itself: its version counts, whatever the model was
# logged with.
PINNED_BY_SERVER = {
    "flask",
    "flask-cors",
    "gunicorn",
    "pydantic",
    "opentelemetry-api",
    "opentelemetry-sdk",
}
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TOKEN_SCOPE = "https://management.azure.com/.default"

# --- what is shipped ------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is shipped, and under which name."""

    name: str  # of all that is made in the workspace, but the batch endpoint
    version: str  # of the model, in the course's registry and in the workspace
    course_model: str  # a name of the catalogue, or "unknown"
    megabytes: float
    instance_type: str
    max_tokens: int | None = None  # the most that a request may ask for
    # For one caller, as the run that logged the model measured it.
    tokens_per_second: float | None = None

    @property
    def batch_endpoint(self) -> str:
        """Return the batch endpoint's name, as no two endpoints of a region may have the same."""
        return f"{self.name}-batch"


def default_name(model: str) -> str:
    """Return a name that differs from those of the others in a shared workspace, and is the same at each run."""
    me = f"{getpass.getuser()} {platform.node()} {ROOT}"
    return f"{model}-" + "".join(
        chr(ord("a") + byte % 26) for byte in hashlib.sha256(me.encode()).digest()[:5]
    )


def check_name(name: str) -> None:
    """Raise CourseError for a name that Azure would refuse for an endpoint or a cluster, after the model's upload.

    The rules, for endpoints and for clusters:
    https://learn.microsoft.com/azure/machine-learning/how-to-manage-quotas
    https://learn.microsoft.com/azure/machine-learning/how-to-create-attach-compute-cluster
    """
    if not re.fullmatch(
        r"(?=.{3,24}\Z)(?!.*-\d+\Z)[A-Za-z][A-Za-z0-9]*(-[A-Za-z0-9]+)*", name, re.ASCII
    ):
        raise CourseError(
            "endpoint-name",
            f"Azure takes no endpoint and no cluster called {name!r}.",
            "Choose 3 to 24 letters, digits and single hyphens, the first a letter, and a letter after "
            "the last hyphen: --endpoint NAME.",
        )


def model_memory(course_model: str | None, size: int) -> float:
    """Return the megabytes that a model takes: what the catalogue says, or an estimate from its ``size`` in bytes."""
    try:
        known = find_entry(course_model).memory if course_model else None
    except CourseError:  # the tag names a model that this catalogue does not have
        known = None
    return known or memory_needed(size)


def service_requirements(logged: Sequence[str]) -> list[str]:
    """Return what the service installs for a model: its requirements, without pins that the server sets.

    On Linux the torch of the package index is the build for a GPU, 3 GB. Where torch is asked for,
    PyTorch's index of builds for a CPU is added. pip prefers these: 2.13.0+cpu counts as newer than
    2.13.0.
    """
    names = [canonicalize_name(re.match(r"[\w.-]*", requirement)[0]) for requirement in logged]
    index = [f"--extra-index-url {TORCH_CPU_INDEX}"] if "torch" in names else []
    return index + [
        name if name in PINNED_BY_SERVER else requirement
        for name, requirement in zip(names, logged, strict=True)
    ]


# --- the folder -----------------------------------------------------------------------------


def make_folder(
    uri: str, name: str | None = None, instance_type: str | None = None, folder: Path | None = None
) -> Plan:
    """Fill ``folder`` for the model at an address of the registry, and return the plan.

    The folder, ``build/azureml`` unless another is named, is replaced when the new one is complete.
    An error leaves the former one.

    Raises
    ------
    CourseError
        A name that Azure refuses, no model at that address or no files of it, one of another
        contract, or one that needs more memory than the default machine has.
    """
    folder = folder or TARGET_FOLDER
    version = _find_version(uri)
    name = name or default_name(version.name)
    check_name(name)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(YAML_FOLDER, part)
        plan = _fetch(version, name, instance_type, part)
        shutil.copyfile(part / "model" / "serving_input_example.json", part / "request.json")
        copy_code(part / "code")
        for file in course_files():
            _copy(file, part / "course" / file.relative_to(ROOT))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return plan


def copy_code(folder: Path) -> None:
    """Copy the scoring script to a folder's top, where Azure looks for it, and what it imports to ``serving``."""
    _copy(ROOT / "serving" / "score.py", folder / "score.py")
    for name in SHARED_FILES:
        _copy(ROOT / "serving" / name, folder / "serving" / name)


def _copy(file, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)


def _find_version(uri):
    """Return the registered version at an address."""
    import mlflow
    from mlflow.exceptions import MlflowException

    from helpers.tracking import tracking_store

    address = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if not address:
        raise CourseError(
            "model-address",
            f"{uri!r} is no address of a registered model.",
            "Such as: models:/slm-onnx@champion, or models:/slm-onnx/1.",
        )
    store = tracking_store().uri
    mlflow.set_tracking_uri(store)
    name, alias, number = address.groups()
    client = mlflow.MlflowClient(store)
    try:
        return (
            client.get_model_version_by_alias(name, alias)
            if alias
            else client.get_model_version(name, number)
        )
    except MlflowException:
        raise CourseError(
            "model-unregistered",
            f"The registry of {store} has no model at {uri}.",
            "Run the page that registers it, such as ChatModel, or name another with --model.",
        ) from None


def _fetch(version, name, instance_type, part):
    """Copy a model's folder to ``part``, write its conda.yaml, and return the plan."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        folder = Path(
            mlflow.artifacts.download_artifacts(
                f"models:/{version.name}/{version.version}", dst_path=str(part / "model")
            )
        )
        logged = mlflow.models.Model.load(str(folder))
    except (MlflowException, FileNotFoundError):
        raise CourseError(
            "model-gone",
            f"The registry names version {version.version} of {version.name}, and its "
            "files are gone.",
            "Log and register it again, or name another version: --model models:/NAME/VERSION.",
        ) from None
    schema = logged.get_input_schema()
    fields = schema.input_names() if schema and schema.has_input_names() else ()
    if "messages" not in fields or not (folder / "serving_input_example.json").exists():
        raise CourseError(
            "model-other-contract",
            f"{version.name} is no chat model with an example: its requests have no messages.",
            "Name one that takes them, such as models:/slm-onnx@champion.",
        )
    course_model, size = version.tags.get("model"), folder_bytes(folder)
    needed = model_memory(course_model, size)
    if instance_type is None and needed > INSTANCE_MEMORY:
        raise CourseError(
            "model-too-large",
            f"The model takes {needed:,.0f} MB of memory, and the default machine, "
            f"{INSTANCE_TYPE}, leaves it {INSTANCE_MEMORY:,} MB.",
            f"Choose a larger one, --instance-type NAME, from {MACHINES}.",
        )
    python = logged.flavors["python_function"]
    write_conda(part / "conda.yaml", python["python_version"], folder / "requirements.txt")
    return Plan(
        name,
        str(version.version),
        course_model or "unknown",
        size / 1e6,
        instance_type or INSTANCE_TYPE,
        python.get("config", {}).get("max_tokens_limit"),
        _measured_speed(version.run_id),
    )


def write_conda(file: Path, python: str, requirements: Path) -> None:
    """Add a model's Python, such as 3.12.4, and its file of requirements to conda.yaml, which has the server's."""
    environment = yaml.safe_load(file.read_text(encoding="utf-8"))
    _, pip, packages = environment["dependencies"]
    logged = [
        line.strip()
        for line in requirements.read_text(encoding="utf-8").split("\n")
        if line.strip()
    ]
    packages["pip"] += service_requirements(logged)
    environment["dependencies"] = [f"python={'.'.join(python.split('.')[:2])}", pip, packages]
    file.write_text(yaml.safe_dump(environment, sort_keys=False), encoding="utf-8")


def _measured_speed(run_id):
    """Return the tokens per second that the run of a model measured; None where the run or the figure is gone."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return (
            mlflow.MlflowClient().get_run(run_id).data.metrics.get("tokens_per_second")
            if run_id
            else None
        )
    except MlflowException:
        return None


# --- the steps ------------------------------------------------------------------------------


def _file_of(kind):
    return f"{kind.replace('_', '-')}.yaml"


@dataclass(frozen=True)
class Step:
    """One thing that is made in the workspace: the settings go into its file, by ``--set`` or by azure-ai-ml."""

    kind: str  # as in the command, with underscores
    settings: dict[str, str]  # what differs from the file; a dot leads into a part
    cost: str
    help_page: str  # in AZURE_DOCS: the page to read when Azure refuses the step
    flag: str = ""  # of the command; _make has the calls that do the same
    delete: str = ""  # the command that takes it away
    archive: str = ""  # the command that hides it, where there is none to take it away

    @property
    def file(self) -> str:
        """Return the name of its file."""
        return _file_of(self.kind)

    @property
    def command(self) -> str:
        """Return the ``az ml`` command that makes it."""
        words = ["az", "ml", self.kind.replace("_", "-"), "create", "--file", self.file]
        words += [self.flag] if self.flag else []
        words += (
            ["--set", *(f"{name}={value}" for name, value in self.settings.items())]
            if self.settings
            else []
        )
        return shlex.join(words)


def plan_steps(plan: Plan, parts: Sequence[str] = PARTS) -> list[Step]:
    """Return what is made, in order."""
    name, version, batch = plan.name, plan.version, plan.batch_endpoint
    hour = f"1 x {plan.instance_type}, by the hour"
    registered = {"name": name, "version": version}
    deployed = {"model": f"azureml:{name}:{version}", "environment": f"azureml:{name}:{version}"}
    made = (
        [
            Step(
                "model",
                registered | {"tags.course_model": plan.course_model},
                "the storage of its files",
                "how-to-manage-models",
                archive=f"az ml model archive --name {name} --version {version}",
            ),
            Step(
                "environment",
                registered,
                "the storage of its image",
                "how-to-manage-environments-v2",
                archive=f"az ml environment archive --name {name} --version {version}",
            ),
        ]
        if set(parts) & {"online", "batch"}
        else []
    )
    if "online" in parts:
        help_page = "how-to-troubleshoot-online-endpoints"
        made += [
            Step(
                "online_endpoint",
                {"name": name},
                "nothing yet",
                help_page,
                delete=f"az ml online-endpoint delete --name {name} --yes",
            ),
            Step(
                "online_deployment",
                {"endpoint_name": name, **deployed, "instance_type": plan.instance_type},
                f"{hour}, also while nobody asks, until it is deleted",
                help_page,
                flag="--all-traffic",
            ),
        ]
    if "batch" in parts:
        help_page = "how-to-troubleshoot-batch-endpoints"
        made += [
            Step(
                "compute",
                {"name": name, "size": plan.instance_type},
                f"nothing yet; {hour}, while a batch runs",
                "how-to-create-attach-compute-cluster",
                delete=f"az ml compute delete --name {name} --yes",
            ),
            Step(
                "batch_endpoint",
                {"name": batch},
                "nothing",
                help_page,
                delete=f"az ml batch-endpoint delete --name {batch} --yes",
            ),
            Step(
                "batch_deployment",
                {"endpoint_name": batch, **deployed, "compute": f"azureml:{name}"},
                "nothing until a batch runs",
                help_page,
                flag="--set-default",
            ),
        ]
    if "job" in parts:
        made.append(
            Step(
                "job", {}, "1 x Standard_D4as_v4, by the hour, until it ends", "how-to-train-model"
            )
        )
    return made


def print_commands(plan: Plan, steps: Sequence[Step], folder: Path | None = None) -> None:
    """Print the commands, what each begins to cost, and how to ask and to remove what was made."""
    print(
        f"{folder or TARGET_FOLDER} has version {plan.version} of the model: {plan.megabytes:,.1f} MB, for a "
        f"{plan.instance_type}.\nSign in, set your workspace, and run this in that folder:\n"
    )
    print("  az login\n  az configure --defaults group=YOUR-GROUP workspace=YOUR-WORKSPACE")
    for step in steps:
        print(f"  {step.command}\n      # costs: {step.cost}")
    print(f"\nWhat an hour of a machine costs in your region: {PRICES}")
    print(f"How many cores you may have: {QUOTAS}")
    if any(step.kind == "online_deployment" for step in steps):
        print(describe_timeout(plan))
    _print_use_and_removal(plan, steps, "request.json")


def describe_timeout(plan: Plan) -> str:
    """Return how long the longest answer takes, against the most that Azure gives a request."""
    limit = f"Azure ends a request after {REQUEST_SECONDS} seconds (request_timeout_ms)."
    if not plan.max_tokens:
        return f"{limit} A request that asks for max_tokens N needs a machine of N / {REQUEST_SECONDS} tokens a second."
    if not plan.tokens_per_second:
        return (
            f"{limit} An answer of {plan.max_tokens:,} tokens, the most that the model writes, needs "
            f"{plan.max_tokens / REQUEST_SECONDS:.1f} tokens a second. Nobody has measured this model."
        )
    seconds = plan.max_tokens / plan.tokens_per_second
    told = (
        f"{limit} The run that logged the model measured {plan.tokens_per_second:,.1f} tokens a second for one "
        f"caller: there an answer of {plan.max_tokens:,} tokens, the most that the model writes, takes "
        f"{seconds:,.0f} seconds."
    )
    if seconds <= REQUEST_SECONDS:
        return told
    fitting = int(plan.tokens_per_second * REQUEST_SECONDS)
    return f"{told} On such a machine callers have to ask for max_tokens {fitting:,} or less."


def _print_use_and_removal(plan, steps, request):
    """Print how to ask what was made, and how to remove it."""
    kinds = {step.kind for step in steps}
    if "online_deployment" in kinds:
        print(f"Ask it: az ml online-endpoint invoke --name {plan.name} --request-file {request}")
    if "batch_deployment" in kinds:
        print(
            f"Send it a batch: az ml batch-endpoint invoke --name {plan.batch_endpoint} --input FOLDER"
        )
    _print_removal("When you are done:", steps)


def _print_removal(title, steps):
    deleted = [step.delete for step in reversed(steps) if step.delete]
    archived = [step.archive for step in reversed(steps) if step.archive]
    if deleted or archived:
        print(title)
    if deleted:
        print(
            "\n".join(
                [
                    "Delete what costs by the hour, or could:",
                    *(f"  {command}" for command in deleted),
                ]
            )
        )
    if archived:
        print(
            "\n".join(
                [
                    "Hide the rest from the workspace's lists:",
                    *(f"  {command}" for command in archived),
                ]
            )
        )
        print(
            "Azure's command line deletes no model and no environment. The model's files stay in the workspace's "
            "storage account, and the image in its container registry: you pay for that storage until you delete "
            "them there.",
            flush=True,
        )


# --- the workspace --------------------------------------------------------------------------


def sign_in(folder: Path = ROOT) -> Any:
    """Return an ``azure.ai.ml.MLClient`` for the workspace that a config.json in ``folder`` names.

    The sign-in is that of ``DefaultAzureCredential``: ``az login``, a managed identity, or
    AZURE_CLIENT_ID and its kin. A proxy is taken from HTTPS_PROXY. Raises CourseError where the
    SDK, the sign-in or the workspace is missing.
    """
    try:
        from azure.ai.ml import MLClient
        from azure.ai.ml.exceptions import ValidationException
        from azure.core.exceptions import AzureError
        from azure.identity import DefaultAzureCredential
    except ImportError:
        raise CourseError(
            "azure-missing",
            "The SDK of Azure Machine Learning is not installed.",
            f'Install it ({VENV_PYTHON.relative_to(ROOT)} -m pip install -e ".[azure]"), or take --dry-run and az.',
        ) from None
    # It would log each way to sign in that is not set up.
    logging.getLogger("azure").setLevel(logging.ERROR)
    credential = DefaultAzureCredential()
    try:
        client = MLClient.from_config(
            credential, path=folder, enable_telemetry=False, show_progress=False
        )
    except (ValidationException, ValueError):  # no file, or one that is not JSON
        raise CourseError(
            "azure-workspace",
            "No config.json here names your workspace.",
            "In https://ml.azure.com choose the workspace's name, top right, and Download config file; put that file "
            "into the course's folder.",
        ) from None
    try:
        credential.get_token(TOKEN_SCOPE)
    except AzureError:
        raise CourseError(
            "azure-sign-in",
            "Nobody is signed in to Azure on this machine.",
            "Run `az login`, and this again.",
        ) from None
    return client


def send(steps: Sequence[Step], client: Any, folder: Path | None = None) -> None:
    """Make each step in the workspace, and wait for it.

    A CourseError tells what the service refused. What was begun by then is printed, with the
    commands that remove it.
    """
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    begun = []
    try:
        for step in steps:
            print(f"{step.command}\n    # costs: {step.cost}", flush=True)
            begun.append(step)
            _make(step, client, folder or TARGET_FOLDER)
    except BaseException as error:
        _print_removal("What this run has begun may still be there.", begun)
        if isinstance(error, AzureError | MlException):
            raise to_course_error(error, step) from None
        raise


def load(kind: str, folder: Path, settings: dict[str, Any]) -> Any:
    """Return what azure-ai-ml makes of a step's file with its settings, as ``--set`` does."""
    from azure.ai import ml
    from azure.ai.ml.entities._load_functions import load_model_batch_deployment

    # load_batch_deployment, which is public, does not know the `settings` of a model's deployment.
    loader = (
        load_model_batch_deployment if kind == "batch_deployment" else getattr(ml, f"load_{kind}")
    )
    return loader(folder / _file_of(kind), params_override=[settings])


def _make(step, client, folder):
    """Create what a step's file says, and wait for the service."""
    entity = load(step.kind, folder, step.settings)
    if step.kind in ("model", "environment", "job"):
        client.create_or_update(entity)
        return
    client.begin_create_or_update(entity).result()
    endpoint = {"name": step.settings.get("endpoint_name")}
    if step.flag == "--all-traffic":
        client.begin_create_or_update(
            load("online_endpoint", folder, endpoint | {"traffic": {entity.name: 100}})
        ).result()
    if step.flag == "--set-default":
        client.begin_create_or_update(
            load(
                "batch_endpoint", folder, endpoint | {"defaults": {"deployment_name": entity.name}}
            )
        ).result()


def to_course_error(error: Exception, step: Step) -> CourseError:
    """Return the sentences for what stopped a step, with Azure's own words and the page of its documents."""
    from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError

    words = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, ClientAuthenticationError):
        return CourseError(
            "azure-sign-in",
            f"Azure does not take your sign-in: {words}.",
            "Run `az login`, and this again; what is made stays.",
        )
    if isinstance(error, AzureError) and not isinstance(error, HttpResponseError):
        return CourseError(
            "azure-unreachable",
            f"Azure did not answer: {words}.",
            "Check the network and the proxy (HTTPS_PROXY), and this again; what is made stays.",
        )
    who = "Azure" if isinstance(error, HttpResponseError) else "azure-ai-ml"
    return CourseError(
        "azure-refused",
        f"{who} refused {step.file}: {words}.",
        f"Read {AZURE_DOCS}/{step.help_page}, and run this again; what is made stays.",
    )


def deploy(
    uri: str,
    name: str | None = None,
    instance_type: str | None = None,
    parts: Sequence[str] = PARTS,
    dry_run: bool = False,
) -> int:
    """Fill ``build/azureml`` and print the commands, or do in the workspace what they would. Return the exit code.

    Parameters
    ----------
    uri : str
        Such as ``models:/slm-onnx@champion``, in the course's store.
    name : str, optional
        Of all that is made. By default the model's name, and five letters from your user's name,
        machine and folder.
    instance_type : str, optional
        Azure's name of a machine.
    parts : sequence of str, optional
        Some of ``online``, ``batch`` and ``job``.
    """
    if name is not None:
        check_name(name)
    client = None if dry_run else sign_in()  # refused here, before anything is copied
    plan = make_folder(uri, name, instance_type)
    steps = plan_steps(plan, parts)
    if dry_run:
        print_commands(plan, steps)
        return 0
    send(steps, client)
    print()
    _print_use_and_removal(
        plan, steps, f"{TARGET_FOLDER.relative_to(ROOT).as_posix()}/request.json"
    )
    return 0
