"""The image and its Kubernetes manifests: that they agree with the program, and the requirements.

No image is built. tests/nightly/test_container.py installs the requirements and runs the program by
its ENTRYPOINT.

Run: python -m helpers test tests/unit/course/test_container.py
"""

import ast
import importlib.metadata
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT, find_cell, stand_ins
from support.container import (
    APPLIED,
    CLUSTER,
    CONTAINER,
    IMAGE,
    OPTIONS,
    POD,
    PROBES,
    REQUIREMENTS,
    SERVER,
    TOKEN,
    VARIABLES,
    manifest_args,
    not_windows,
    options_of,
)
from support.service import running

from serving.service import command_line, metrics

MANIFESTS = APPLIED | OPTIONS
LABELS = POD["metadata"]["labels"].items()
DOCUMENT = (ROOT / "docs" / "container.md").read_text(encoding="utf-8")


def docker_run():
    """Return the options and the arguments of the document's `docker run`."""
    (line,) = re.findall(r"^docker run (.*)$", DOCUMENT, re.MULTILINE)
    options = {}
    arguments = []
    words = iter(shlex.split(line))
    for word in words:
        if word.startswith("--"):
            options.setdefault(word, []).append(
                "" if word in ("--rm", "--read-only") else next(words)
            )
        else:
            arguments.append(word)
    return options, arguments


# --- the manifests and the program ----------------------------------------------------------


# An operator's own kind, and values of a Helm chart.
NOT_CORE = ("pod-monitor.yaml", "prometheus-adapter.yaml")
OLDEST = "1.30"  # it brought the sleep before SIGTERM


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name not in NOT_CORE])
def test_a_manifest_is_what_kubernetes_takes(name):
    kubernetes_validate.validate(MANIFESTS[name], OLDEST, strict=True)
    kubernetes_validate.validate(MANIFESTS[name], kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    "fault",
    [
        {"terminationGracePeriodSecond": 150},
        {"terminationGracePeriodSeconds": "150"},
        {"containers": None},
    ],
)
def test_a_wrong_field_of_a_manifest_is_noticed(fault):
    deployment = json.loads(json.dumps(APPLIED["deployment.yaml"]))
    deployment["spec"]["template"]["spec"] |= fault
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, OLDEST, strict=True)


def test_each_manifest_says_what_it_is_for():
    for path in CONTAINER.glob("*/*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# "), path


def hadolint(file):
    """Return what hadolint complains of; it has no build for Windows."""
    tool = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([tool, "--no-color", str(file)], capture_output=True, text=True)
    assert found.returncode == bool(found.stdout), found.stderr
    return found.stdout


@not_windows
def test_hadolint_finds_nothing_in_the_dockerfile():
    assert hadolint(CONTAINER / "Dockerfile") == ""


@not_windows
@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        (
            "ARG PYTHON=python:3.13-slim-trixie@sha256:\\w+\n\nFROM \\S+ AS",
            "FROM python AS",
            "DL3006",
        ),
        ("--no-cache-dir ", "", "DL3042"),
        ("# hadolint ignore=DL3022\n", "", "DL3022"),
        (r'CMD \["--allowed-host".*', "CMD --allowed-host localhost", "DL3025"),
    ],
)
def test_hadolint_finds_what_is_planted(old, new, rule, tmp_path):
    text, count = re.subn(old, new, (CONTAINER / "Dockerfile").read_text(encoding="utf-8"))
    assert count == 1
    (tmp_path / "Dockerfile").write_text(text, encoding="utf-8")
    assert rule in hadolint(tmp_path / "Dockerfile")


def test_the_base_image_is_pinned_by_its_digest_and_says_where_that_is_from():
    text = (CONTAINER / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(
        r"^ARG PYTHON=python:3\.13-slim-trixie@sha256:[0-9a-f]{64}$", text, re.MULTILINE
    )
    assert {IMAGE.one("FROM", stage).split()[0] for stage in ("packages", "base")} == {"${PYTHON}"}
    assert re.search(
        r"^# https://github.com/docker-library/repo-info/blob/[0-9a-f]{40}/\S+$", text, re.MULTILINE
    )


def test_the_last_stage_has_no_model_and_the_other_one_has():
    assert list(IMAGE.stages) == ["packages", "base", "with-model", "server"]
    assert [name for name, _ in IMAGE.stages["server"]] == ["FROM"]
    assert IMAGE.one("FROM", "server") == "base AS server"
    assert IMAGE.one("COPY", "with-model").split()[-1] == options_of().model == "/model"


def test_a_build_sends_what_the_dockerfile_copies_and_no_more():
    sent = {
        line.removeprefix("!")
        for line in (CONTAINER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = [value.split() for stage in IMAGE.stages for value in IMAGE.all("COPY", stage)]
    assert sent == {
        path
        for words in copied
        if not any(word.startswith("--from") for word in words)
        for path in words[:-1]
        if not path.startswith("--")
    }
    assert all(list(ROOT.glob(path)) for path in sent)


def test_every_option_is_one_of_the_programs():
    assert options_of(*IMAGE.words("CMD")).allowed_host == ["localhost", "127.0.0.1"]
    options = options_of(*manifest_args())
    assert options.host == "0.0.0.0" and options.concurrent == 32 and options.waiting == 64
    with pytest.raises(SystemExit):
        options_of(*manifest_args(), "--no-such-option")


def test_the_names_that_a_pod_answers_to_are_the_services_and_its_own():
    name = APPLIED["service.yaml"]["metadata"]["name"]
    namespace = CLUSTER["metadata.namespace"]
    assert options_of(*manifest_args()).allowed_host == [
        name,
        f"{name}.{namespace}",
        f"{name}.{namespace}.svc",
        f"{name}.{namespace}.svc.cluster.local",
        "127.0.0.1",
    ]
    assert manifest_args()[4] != SERVER["args"][4] == "--allowed-host=$(POD_IP)"


def test_there_is_one_port():
    port = options_of().port
    assert IMAGE.one("EXPOSE") == str(port)
    assert f"'127.0.0.1', {port}," in IMAGE.words("HEALTHCHECK")[2]
    assert SERVER["ports"] == [{"name": "http", "containerPort": port}]
    assert [one["targetPort"] for one in APPLIED["service.yaml"]["spec"]["ports"]] == ["http"]
    assert APPLIED["network-policy.yaml"]["spec"]["ingress"][0]["ports"] == [{"port": "http"}]
    assert [one["port"] for one in OPTIONS["pod-monitor.yaml"]["spec"]["podMetricsEndpoints"]] == [
        "http"
    ]
    assert docker_run()[0]["--publish"] == [f"127.0.0.1:{port}:{port}"]


def test_a_kubelet_without_a_token_reads_the_probes_and_the_rest_wants_one(tmp_path):
    asked_by_address = {"Host": "10.1.2.3:8000"}
    with running(stand_ins.save(tmp_path / "model", "Streams"), token=TOKEN) as service:
        for probe in PROBES.values():
            assert probe["port"] == "http"
            assert service.client.get(probe["path"], headers=asked_by_address).status_code == 200
        assert service.client.get("/v1/models", headers=asked_by_address).status_code == 421
        assert (
            service.client.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code
            == 401
        )
        (metrics,) = OPTIONS["pod-monitor.yaml"]["spec"]["podMetricsEndpoints"]
        bearer = {"Authorization": f"{metrics['authorization']['type']} {TOKEN}"}
        assert (
            service.client.get(metrics["path"], headers=bearer).text.count(
                "slm_requests_waiting 0.0"
            )
            == 1
        )
    assert PROBES["startupProbe"]["path"] == PROBES["readinessProbe"]["path"] == "/ready"
    assert PROBES["livenessProbe"]["path"] == "/health"


def test_a_pod_has_the_time_to_end_what_it_has_begun():
    options = options_of(*manifest_args())
    pause = SERVER["lifecycle"]["preStop"]["sleep"]["seconds"]
    close = 5  # what Server.shutdown gives the model
    assert options.drain >= options.timeout
    assert pause + options.drain + close < POD["spec"]["terminationGracePeriodSeconds"]
    assert options_of(*IMAGE.words("CMD")).drain + close < int(*docker_run()[0]["--stop-timeout"])
    startup = SERVER["startupProbe"]["periodSeconds"] * SERVER["startupProbe"]["failureThreshold"]
    assert startup < APPLIED["deployment.yaml"]["spec"]["progressDeadlineSeconds"]


def test_nobody_is_root_and_nothing_is_writable_but_tmp():
    user = IMAGE.one("USER")
    pod = POD["spec"]["securityContext"]
    container = SERVER["securityContext"]
    (options, _) = docker_run()
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"{pod['runAsUser']}:{pod['runAsGroup']}" == user == options["--user"][0]
    assert pod["runAsNonRoot"] is True and pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert options["--cap-drop"] == ["ALL"] and options["--security-opt"] == ["no-new-privileges"]
    assert "--read-only" in options and options["--tmpfs"] == ["/tmp"]
    mounts = {one["mountPath"]: one for one in SERVER["volumeMounts"]}
    volumes = {one["name"]: one for one in POD["spec"]["volumes"]}
    assert set(mounts) == {options_of().model, "/tmp"} and mounts["/model"]["readOnly"] is True
    assert "emptyDir" in volumes[mounts["/tmp"]["name"]]
    assert options["--volume"][0].endswith(":/model:ro")
    assert IMAGE.variables()["HOME"] == "/tmp"
    assert POD["spec"]["automountServiceAccountToken"] is False


def test_the_token_comes_from_the_secret_and_stands_in_no_file():
    secret = OPTIONS["secret.yaml"]
    place = {"name": secret["metadata"]["name"], "key": "token"}
    assert secret["stringData"] == {"token": ""}
    assert VARIABLES[command_line.TOKEN]["secretKeyRef"] == place
    assert (
        OPTIONS["pod-monitor.yaml"]["spec"]["podMetricsEndpoints"][0]["authorization"][
            "credentials"
        ]
        == place
    )
    assert f"kubectl create secret generic {place['name']} --from-file={place['key']}=" in DOCUMENT
    assert docker_run()[0]["--env"] == [command_line.TOKEN]


def test_all_that_select_pods_select_these():
    deployment = APPLIED["deployment.yaml"]
    budget = APPLIED["disruption-budget.yaml"]["spec"]
    policy = APPLIED["network-policy.yaml"]["spec"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        APPLIED["service.yaml"]["spec"]["selector"],
        budget["selector"]["matchLabels"],
        policy["podSelector"]["matchLabels"],
        OPTIONS["egress-to-tracking.yaml"]["spec"]["podSelector"]["matchLabels"],
        OPTIONS["pod-monitor.yaml"]["spec"]["selector"]["matchLabels"],
        *(one["labelSelector"]["matchLabels"] for one in POD["spec"]["topologySpreadConstraints"]),
    ]
    assert all(selector and selector.items() <= LABELS for selector in selectors)
    target = APPLIED["autoscaler.yaml"]["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]
    assert budget["maxUnavailable"] < APPLIED["autoscaler.yaml"]["spec"]["minReplicas"]
    assert policy["egress"] == [] and policy["policyTypes"] == ["Ingress", "Egress"]


def test_the_autoscaler_goes_by_figures_that_the_program_has_and_prometheus_hands_on():
    figures = {
        metric.name for metric in metrics.Metrics().registry.collect() if metric.type == "gauge"
    }
    (rule,) = OPTIONS["prometheus-adapter.yaml"]["rules"]["custom"]
    (names,) = re.findall(r'__name__=~"(.*?)"', rule["seriesQuery"])
    assert set(re.findall(r'(\w+)!=""', rule["seriesQuery"])) == set(rule["resources"]["overrides"])
    targets = {
        one["pods"]["metric"]["name"]: int(one["pods"]["target"]["averageValue"])
        for one in APPLIED["autoscaler.yaml"]["spec"]["metrics"]
    }
    assert set(targets) == {name for name in figures if re.fullmatch(names, name)}
    options = options_of(*manifest_args())
    assert set(targets) == {"slm_requests_waiting", "slm_requests_running"}
    assert 0 < targets["slm_requests_waiting"] < options.waiting
    assert 0 < targets["slm_requests_running"] < options.concurrent


# --- the requirements -----------------------------------------------------------------------


def read_requirements(path):
    """Return the requirements of a file, each with its hashes."""
    lines = re.sub(r" \\\n\s*", " ", path.read_text(encoding="utf-8")).splitlines()
    return {
        Requirement(line.split(" --hash=")[0]): re.findall(
            r"--hash=sha256:[0-9a-f]{64}(?=\s|$)", line
        )
        for line in lines
        if line and not line.startswith("#")
    }


def pins_on(requirements, version, system="linux"):
    """Return the pins that hold for a version of Python on a system."""
    where = {
        "python_full_version": f"{version}.0",
        "python_version": version,
        "sys_platform": system,
        "platform_system": system.capitalize(),
        "platform_machine": "x86_64",
        "os_name": "posix",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "extra": "",
    }
    return {
        canonicalize_name(one.name): str(one.specifier)
        for one in requirements
        if one.marker is None or one.marker.evaluate(where)
    }


def closure(names):
    """Return the packages that these need, as they are installed here."""
    found, todo = {}, [Requirement(name) for name in names]
    while todo:
        one = todo.pop()
        key = (canonicalize_name(one.name), tuple(sorted(one.extras)))
        if key in found:
            continue
        found[key] = True
        for line in importlib.metadata.requires(one.name) or []:
            other = Requirement(line)
            if other.marker is None or any(
                other.marker.evaluate({"extra": extra}) for extra in (*one.extras, "")
            ):
                todo.append(other)
    return {name for name, _ in found}


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_requirements_are_at_the_versions_of_the_constraints_and_each_has_its_hashes(version):
    requirements = read_requirements(REQUIREMENTS)
    constraints = pins_on(read_requirements(ROOT / "constraints.txt"), version)
    stale = {
        name: pin
        for name, pin in pins_on(requirements, version).items()
        if constraints.get(name) != pin
    }
    assert stale == {}, "run the command that requirements.in ends its comment with"
    assert [str(one) for one, hashes in requirements.items() if not hashes] == []


def test_the_requirements_are_all_that_the_image_needs_and_no_more():
    wanted = [one.name for one in read_requirements(CONTAINER / "requirements.in")]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert set(pins_on(read_requirements(REQUIREMENTS), version, sys.platform)) == closure(wanted)


def test_the_image_has_what_the_program_and_the_logged_model_import():
    wanted = {one.name for one in read_requirements(CONTAINER / "requirements.in")}
    packages, used = importlib.metadata.packages_distributions(), set()
    sent = re.findall(
        r"^!(serving/\S+)$",
        (CONTAINER / "Dockerfile.dockerignore").read_text("utf-8"),
        re.MULTILINE,
    )
    assert len(sent) > 4
    files = itertools.chain((ROOT / "serving" / "chat").glob("*.py"), *map(ROOT.glob, sent))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else ([node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            )
            used |= {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert {
        name for name in used if not wanted & {canonicalize_name(one) for one in packages[name]}
    } == set()
    # What the page logs it with; MLflow itself stands for its skinny half.
    call = re.search(
        r"pinned\((.*?)\)", find_cell("ChatModel", "pip_requirements=pinned("), re.DOTALL
    )
    logged = set(re.findall(r'"([\w-]+)"', call[1]))
    assert logged - {"mlflow"} <= wanted and {"mlflow", "mlflow-skinny"} & logged


def test_the_command_that_makes_the_requirements_is_the_one_that_made_them():
    (command,) = re.findall(
        r"^# python -m (uv pip compile .*)$",
        (CONTAINER / "requirements.in").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert (
        f"#    {command.replace('--quiet ', '')}"
        in REQUIREMENTS.read_text(encoding="utf-8").replace("--quiet ", "").splitlines()
    )
    assert command in DOCUMENT
