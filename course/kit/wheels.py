"""Gathers the wheels that a system and a Python need, whatever machine this is.

constraints.txt says which ones, with markers that are evaluated for that system; pip fetches them.
``kit_build`` calls it, and owns the folder.
"""

import contextlib
import errno
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags, mac_platforms, platform_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from course import environment as setup
from helpers.errors import CourseError
from helpers.models.kit import PLATFORM_NAMES, progress_bar
from helpers.paths import ROOT

CONSTRAINTS = ROOT / "constraints.txt"
# The oldest that torch's own wheels run on: glibc 2.28, macOS 14. pip does not know by itself that a system
# takes the wheels of older ones, https://packaging.python.org/specifications/platform-compatibility-tags.
PLATFORMS = {
    "windows": {"os_name": "nt", "sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64",
                "tags": ("win_amd64",)},
    "macos": {"os_name": "posix", "sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64",
              "tags": tuple(mac_platforms((14, 0), "arm64"))},
    "linux": {"os_name": "posix", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64",
              "tags": (*(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)), "manylinux2014_x86_64",
                       "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64")},
}
# A marker may ask for a patch release, and the participants have different ones: both ends are gathered.
PATCHES = (99, 0)
# Measured: the wheels of one system and Python, and what pip holds beside them while it fetches.
WHEELS_MEGABYTES = 900
BATCH = 8  # wheels in one call of pip: what is finished when somebody interrupts


@dataclass(frozen=True)
class Target:
    """A system and a Python that the kit has wheels for.

    Attributes
    ----------
    platform : str
        A key of ``PLATFORMS``, or this machine's own name where it is none of them.
    python : str
        Such as ``"3.12"``.
    """

    platform: str
    python: str

    def requirements(self, patch):
        """Return what constraints.txt wants on this target for a patch release of its Python."""
        environment = default_environment()
        if self.platform in PLATFORMS:
            environment |= {key: value for key, value in PLATFORMS[self.platform].items() if key != "tags"}
        version = f"{self.python}.{patch}"
        environment |= {"python_version": self.python, "python_full_version": version,
                        "implementation_version": version}
        lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
        wanted = (Requirement(line) for line in lines if line and not line.startswith("#"))
        return [one for one in wanted if one.marker is None or one.marker.evaluate(environment)]

    def platform_tags(self):
        """Return the tags of its wheels that are made for one system, best first."""
        return PLATFORMS[self.platform]["tags"] if self.platform in PLATFORMS else tuple(platform_tags())

    def tags(self):
        """Return every tag that a wheel for it may have."""
        version, nodot = tuple(map(int, self.python.split("."))), self.python.replace(".", "")
        return {*cpython_tags(version, [f"cp{nodot}"], self.platform_tags()),
                *compatible_tags(version, f"cp{nodot}", self.platform_tags())}

    def pip_options(self, patch):
        """Return the options that make pip choose wheels for it."""
        return ["--only-binary", ":all:", "--implementation", "cp", "--python-version", f"{self.python}.{patch}",
                *(word for abi in (f"cp{self.python.replace('.', '')}", "abi3", "none") for word in ("--abi", abi)),
                *(word for tag in self.platform_tags() for word in ("--platform", tag))]


def this_platform():
    """Return the name of this machine's system: a key of ``PLATFORMS``, or a name of its own."""
    machine = platform.system(), platform.machine()
    return PLATFORM_NAMES.get(machine, " ".join(machine))


def _wheels(folder):
    """Return the wheels of a folder: path, name, version and tags of each."""
    wheels = []
    for path in sorted(folder.glob("*.whl")):
        with contextlib.suppress(InvalidWheelFilename):
            name, version, _, tags = parse_wheel_filename(path.name)
            wheels.append((path, name, version, tags))
    return wheels


def _answers(wheel, requirement, tags):
    _, name, version, its_tags = wheel
    return name == canonicalize_name(requirement.name) and requirement.specifier.contains(version, prereleases=True) \
        and not its_tags.isdisjoint(tags)


def missing_wheels(site, target, wanted):
    """Return the requirements that no whole wheel of the kit answers."""
    tags, wheels = target.tags(), [wheel for wheel in _wheels(site.folder / "wheels")
                                   if site.has(f"wheels/{wheel[0].name}")]
    return [one for one in wanted if not any(_answers(wheel, one, tags) for wheel in wheels)]


def add_wheels(site, target):
    """Fetch what the kit lacks for one system and Python."""
    for patch in PATCHES:
        missing = missing_wheels(site, target, target.requirements(patch))
        torch = [one for one in missing if one.name == "torch"]
        rest = [one for one in missing if one.name != "torch"]
        batches = [torch] if torch else []
        batches += [rest[start:start + BATCH] for start in range(0, len(rest), BATCH)]
        if not batches:
            continue
        with progress_bar(f"Fetching wheels for Python {target.python} on {target.platform}", len(missing)) as bar:
            for batch in batches:
                options = _torch_index(site, target, patch, batch[0]) if batch is torch else []
                _fetch(site, target, patch, batch, options)
                bar.update(len(batch))


def _torch_index(site, target, patch, torch):
    """Return pip's options for the CPU build of torch, and raise CourseError where pip would take the CUDA one."""
    if "linux" not in target.platform.lower():
        return []
    requirement = f"torch{torch.specifier}"
    options = []
    if setup.reachable(setup.TORCH_CPU_INDEX + "/torch/", requirement.replace("==", "-")):
        options = ["--extra-index-url", setup.TORCH_CPU_INDEX]
    plan = site.staging / "plan.json"
    _pip(site, target, ["install", "--dry-run", "--ignore-installed", "--no-deps", "--report", plan,
                        "--target", site.staging / "none", *target.pip_options(patch), *options, requirement])
    (chosen,) = json.loads(plan.read_text(encoding="utf-8"))["install"]
    if any(re.match(r"(nvidia|cuda)[-_]", needed) for needed in chosen["metadata"].get("requires_dist", [])):
        raise setup.cuda_refused(requirement)
    return options


def _fetch(site, target, patch, batch, options):
    """Let pip fetch some wheels, and take them into the kit once they are whole."""
    fetched = site.staging / "wheels"
    # Without the markers: pip would ask this machine about them.
    requirements = [f"{one.name}{one.specifier}" for one in batch]
    _pip(site, target, ["download", "--no-deps", "--dest", fetched, *target.pip_options(patch), *options,
                        *requirements])
    for wheel in sorted(fetched.glob("*.whl")):
        site.take(f"wheels/{wheel.name}", wheel)
    site.note(site.listed)


def _pip(site, target, arguments):
    """Run pip with room for its temporary files in the kit's folder rather than in a small /tmp."""
    scratch = site.staging / "tmp"
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--disable-pip-version-check"]
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    done = subprocess.run(command, env=dict(os.environ, PYTHONUTF8="1", PIP_USER="0", **places), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace")
    if done.returncode == 0:
        return
    if "No space left on device" in done.stdout:
        raise OSError(errno.ENOSPC, "No space left on device")
    system = f"Python {target.python} on {target.platform}"
    missing = re.search(r"No matching distribution found for (\S+)", done.stdout)
    if missing and not re.search(r"Retrying|Connection|getaddrinfo", done.stdout):
        raise CourseError(f"The package index has no wheel of {missing[1]} for {system}.",
                          "Check the index that pip uses (python -m pip config list), or leave this platform or Python "
                          "out.")
    if missing or re.search(r"Retrying|Connection|getaddrinfo", done.stdout):
        raise CourseError(f"pip could not get the wheels for {system} from the package index.",
                          "Check the network, the proxy (HTTPS_PROXY) and pip's index (python -m pip config list), and "
                          "run this again; what is finished stays.")
    last = next((line.strip() for line in reversed(done.stdout.splitlines()) if line.strip()), "no output")
    raise CourseError(f"pip failed to fetch the wheels for {system}: {last[:300]}",
                      "Look at pip's own settings (python -m pip config list) and run this again; if it stays, report "
                      "it with that line.")


def keep_wanted_wheels(site, targets):
    """Take each wheel that a target wants; the rest of those listed is stale."""
    wheels = _wheels(site.folder / "wheels")
    for target in targets:
        tags, wanted = target.tags(), [one for patch in PATCHES for one in target.requirements(patch)]
        for wheel in wheels:
            name = f"wheels/{wheel[0].name}"
            if name not in site.wanted and site.has(name) and any(_answers(wheel, one, tags) for one in wanted):
                site.keep(name, site.has(name))
