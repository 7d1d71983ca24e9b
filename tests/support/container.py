"""The image's Dockerfile and the Kubernetes manifests, as the tests of the container read them."""

import json
import os
import re
import shlex
from dataclasses import dataclass

import pytest
import yaml

from serving.service.command_line import read_options
from support import ROOT

CONTAINER = ROOT / "deploy" / "container"
REQUIREMENTS = CONTAINER / "requirements.txt"
TOKEN = "a token of this test's"
# What the cluster fills in; the Pod's address is this machine's own here.
CLUSTER = {"status.podIP": "127.0.0.1", "metadata.namespace": "default"}
not_windows = pytest.mark.skipif(
    os.name == "nt", reason="2026-11-28: the image and its tools are for Linux"
)


def instructions(text: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions, each with what stands after it."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in whole.splitlines() if line.strip()]


@dataclass(frozen=True)
class Dockerfile:
    """What the stages of deploy/container/Dockerfile say."""

    stages: dict[str, list[tuple[str, str]]]

    def all(self, name, stage="base"):
        return [value for instruction, value in self.stages[stage] if instruction == name]

    def one(self, name, stage="base"):
        (value,) = self.all(name, stage)
        return value

    def words(self, name):
        """Return the words of a command in its exec form."""
        value = self.one(name)
        return json.loads(value[value.index("[") :])

    def variables(self):
        return dict(word.split("=", 1) for value in self.all("ENV") for word in shlex.split(value))


def read_dockerfile():
    stages = {}
    for name, value in instructions((CONTAINER / "Dockerfile").read_text(encoding="utf-8")):
        if name == "FROM":
            stages[value.split()[-1]] = []
        if stages:
            list(stages.values())[-1].append((name, value))
    return Dockerfile(stages)


def documents(*folders):
    """Return the manifests of these folders by their files' names."""
    return {
        path.name: yaml.safe_load(path.read_text(encoding="utf-8"))
        for folder in folders
        for path in sorted((CONTAINER / folder).glob("*.yaml"))
    }


IMAGE = read_dockerfile()
APPLIED = documents("kubernetes")
OPTIONS = documents("options")
POD = APPLIED["deployment.yaml"]["spec"]["template"]
(SERVER,) = POD["spec"]["containers"]
VARIABLES = {one["name"]: one["valueFrom"] for one in SERVER["env"]}
PROBES = {
    name: SERVER[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")
}


def manifest_args():
    """Return the Deployment's args as a Pod would have them."""
    known = {
        name: CLUSTER[source["fieldRef"]["fieldPath"]]
        for name, source in VARIABLES.items()
        if "fieldRef" in source
    }
    return [re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], word) for word in SERVER["args"]]


def options_of(*args):
    """Return the program's options as ENTRYPOINT and these words have it read them."""
    _, _, _, *words = IMAGE.words("ENTRYPOINT")  # Python, -m, and the package
    return read_options([*words, *args])
