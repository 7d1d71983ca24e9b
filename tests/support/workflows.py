"""The workflows of .github, and their steps run by bash with stand-ins for programs that a test must not start."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from support import ROOT, user_environment

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# It notes its words, a NUL behind each and a record separator behind the last, and prints what it
# was given.
STAND_IN = r"""#!/bin/sh
{{ printf '%s\0' {name} "$@"; printf '\036'; }} >> {log}
printf '%s' {printed}
"""


@dataclass(frozen=True)
class Steps:
    """What a job's steps did: their exit code and words, the stand-ins' calls, and the files that GitHub reads."""

    returncode: int
    said: str
    calls: list[list[str]]
    summary: str
    output: str


def read_workflow(path: Path) -> dict:
    """Return a workflow. YAML 1.1 reads its key ``on`` as True."""
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in workflow.items()}


def read_jobs() -> list[dict]:
    """Return the jobs of all workflows that have steps."""
    return [
        job for path in WORKFLOWS for job in read_workflow(path)["jobs"].values() if "steps" in job
    ]


def read_snippets(document: Path, language: str) -> list[str]:
    """Return the fenced blocks of a document that are in a language."""
    tokens = MarkdownIt().parse(document.read_text(encoding="utf-8"))
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def read_commands(workflow: str, job: str) -> list[str]:
    """Return the ``run`` lines of a job, in order."""
    steps = read_workflow(ROOT / ".github" / "workflows" / workflow)["jobs"][job]["steps"]
    return [step["run"] for step in steps if "run" in step]


def run_steps(
    workflow: str,
    job: str,
    folder: Path,
    variables: dict[str, str],
    cwd: Path | None = None,
    stand_ins: dict[str, str] | None = None,
) -> Steps:
    """Run a job's ``run`` lines as a runner does, until one fails.

    Parameters
    ----------
    folder : pathlib.Path
        For the files that GitHub reads; and the working directory, unless ``cwd`` is another.
    variables : dict
        What the steps' ``env`` holds.
    stand_ins : dict, optional
        Programs by name, and what they print; left out, a ``python`` that prints nothing. Where
        there is none called so, ``python`` is the running one.
    """
    if sys.platform == "win32":
        pytest.skip("the stand-ins are scripts for a POSIX shell")
    programs, log = folder / "programs", folder / "calls"
    programs.mkdir()
    for name, printed in ({"python": ""} if stand_ins is None else stand_ins).items():
        program = programs / name
        program.write_text(
            STAND_IN.format(log=shlex.quote(str(log)), name=name, printed=shlex.quote(printed)),
            encoding="utf-8",
        )
        program.chmod(0o755)
    files = {"GITHUB_STEP_SUMMARY": folder / "summary", "GITHUB_OUTPUT": folder / "output"}
    for file in files.values():
        file.touch()
    own = {
        name: value
        for name, value in user_environment().items()
        if not name.startswith(("COURSE_", "PYTEST_"))
    }
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = (
        own | variables | {name: str(file) for name, file in files.items()} | {"PATH": path}
    )
    for command in read_commands(workflow, job):
        # These are the options of `shell: bash`.
        result = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command],
            cwd=cwd or folder,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        if result.returncode:
            break
    calls = log.read_text(encoding="utf-8").split("\x1e")[:-1] if log.exists() else []
    return Steps(
        result.returncode,
        result.stdout + result.stderr,
        [call.split("\0")[:-1] for call in calls],
        files["GITHUB_STEP_SUMMARY"].read_text(encoding="utf-8"),
        files["GITHUB_OUTPUT"].read_text(encoding="utf-8"),
    )
