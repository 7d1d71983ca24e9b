"""Downloads the wheels that a system and a Python need, also those of another system than this machine's.

constraints.txt says which: its markers are evaluated for that system and Python.
"""

import os
import platform
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms, platform_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

from course.install import cpu_torch_options
from helpers.errors import CourseError
from helpers.files import progress_bar
from helpers.models.kit import PLATFORM_NAMES
from helpers.models.pip import PipError, pip_error, run_pip
from helpers.paths import ROOT

CONSTRAINTS = ROOT / "constraints.txt"
# The oldest systems that all wheels run on: glibc 2.31 (llguidance), macOS 14 (torch). pip has to be
# told each older tag that a system also takes,
# https://packaging.python.org/specifications/platform-compatibility-tags.
PLATFORMS = {
    "windows": {
        "os_name": "nt",
        "sys_platform": "win32",
        "platform_system": "Windows",
        "platform_machine": "AMD64",
        "tags": ("win_amd64",),
    },
    "macos": {
        "os_name": "posix",
        "sys_platform": "darwin",
        "platform_system": "Darwin",
        "platform_machine": "arm64",
        "tags": tuple(mac_platforms((14, 0), "arm64")),
    },
    "linux": {
        "os_name": "posix",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "tags": (
            *(f"manylinux_2_{minor}_x86_64" for minor in range(31, 4, -1)),
            "manylinux2014_x86_64",
            "manylinux2010_x86_64",
            "manylinux1_x86_64",
            "linux_x86_64",
        ),
    },
}
# A marker may ask for a patch release, and participants have different ones: wheels for the newest and
# the oldest are gathered.
PATCHES = (99, 0)
# Measured: the wheels of one system and Python, and pip's temporary files.
WHEELS_MEGABYTES = 900


@dataclass(frozen=True)
class Target:
    """A system and a Python that the kit has wheels for.

    ``platform`` is a key of ``PLATFORMS``, or this machine's own name; ``python`` is such as ``"3.12"``.
    """

    platform: str
    python: str

    def __str__(self):
        return f"Python {self.python} on {self.platform}"

    def requirements(self, patch: int) -> list[Requirement]:
        """Return the lines of constraints.txt that apply to this target with a patch release of its Python."""
        version = f"{self.python}.{patch}"
        environment = (
            default_environment()
            | PLATFORMS.get(self.platform, {})
            | {
                "python_version": self.python,
                "python_full_version": version,
                "implementation_version": version,
            }
        )
        lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
        wanted = (Requirement(line) for line in lines if line and not line.startswith("#"))
        return [one for one in wanted if one.marker is None or one.marker.evaluate(environment)]

    def platform_tags(self) -> tuple[str, ...]:
        """Return the tags of wheels for its system, best first."""
        return (
            PLATFORMS[self.platform]["tags"]
            if self.platform in PLATFORMS
            else tuple(platform_tags())
        )

    @cached_property
    def tags(self) -> set[Tag]:
        """Every tag that a wheel for it may have."""
        version = tuple(map(int, self.python.split(".")))
        interpreter = "cp" + self.python.replace(".", "")
        return {
            *cpython_tags(version, [interpreter], self.platform_tags()),
            *compatible_tags(version, interpreter, self.platform_tags()),
        }

    def pip_options(self, patch: int) -> list[str]:
        """Return the options that make pip choose wheels for it."""
        return [
            "--only-binary",
            ":all:",
            "--implementation",
            "cp",
            "--python-version",
            f"{self.python}.{patch}",
            *(
                word
                for abi in ("cp" + self.python.replace(".", ""), "abi3", "none")
                for word in ("--abi", abi)
            ),
            *(word for tag in self.platform_tags() for word in ("--platform", tag)),
        ]


def this_platform() -> str:
    """Return the name of this machine's system: a key of ``PLATFORMS``, or a name of its own."""
    machine = platform.system(), platform.machine()
    return PLATFORM_NAMES.get(machine, " ".join(machine))


def add_wheels(folder: Path, targets: list[Target]) -> list[Path]:
    """Fetch the wheels that ``folder`` lacks for the targets; return all that they need."""
    # pip may have been interrupted while it wrote one.
    for wheel in folder.glob("*.whl"):
        if not zipfile.is_zipfile(wheel):
            wheel.unlink()
    total = sum(len(_missing(folder, target, PATCHES[0])) for target in targets)
    with progress_bar("Fetching wheels", total) as bar:
        for target in targets:
            for patch in PATCHES:
                missing = _missing(folder, target, patch)
                torch = [one for one in missing if one.name == "torch"]
                if torch:  # it has options of its own
                    _download(folder, target, patch, torch, bar)
                if others := [one for one in missing if one.name != "torch"]:
                    _download(folder, target, patch, others, bar)
    wheels = _wheels(folder)
    return [
        folder / name
        for name, wheel in wheels.items()
        if any(
            _satisfies(wheel, one, target)
            for target in targets
            for patch in PATCHES
            for one in target.requirements(patch)
        )
    ]


def missing_share(folder: Path, targets: list[Target]) -> float:
    """Return how many sets of wheels for one target are still to come, as a sum of shares."""
    return sum(
        len(_missing(folder, target, PATCHES[0])) / len(target.requirements(PATCHES[0]))
        for target in targets
    )


def _wheels(folder):
    """Return project, version, build and tags of each wheel in ``folder``, by its name."""
    return {path.name: parse_wheel_filename(path.name) for path in folder.glob("*.whl")}


def _satisfies(wheel, requirement, target):
    """Tell whether a wheel is what a requirement asks for, and can be installed on the target."""
    project, version, _, tags = wheel
    return (
        project == canonicalize_name(requirement.name)
        and requirement.specifier.contains(version, prereleases=True)
        and not tags.isdisjoint(target.tags)
    )


def _missing(folder, target, patch):
    """Return the requirements of a target that no wheel in ``folder`` answers."""
    wheels = _wheels(folder).values()
    return [
        one
        for one in target.requirements(patch)
        if not any(_satisfies(wheel, one, target) for wheel in wheels)
    ]


def _download(folder, target, patch, requirements, bar):
    """Let pip download wheels; its cache keeps them if it is interrupted."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # Without the markers: pip would ask this machine about them.
        words = [
            *target.pip_options(patch),
            *(f"{one.name}{one.specifier}" for one in requirements),
        ]
        if requirements[0].name == "torch" and "linux" in target.platform.lower():
            none = ["--ignore-installed", "--target", f"{scratch}/none"]
            words = cpu_torch_options(
                lambda *words: _pip(scratch, target, None, *words, *none),
                Path(scratch, "plan.json"),
                *words,
            )
        _pip(scratch, target, bar, "download", "--no-deps", "--dest", folder, *words)


def _pip(scratch, target, bar, *arguments):
    """Run pip with its temporary files in ``scratch``: /tmp may be small."""
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), scratch)

    def show(text):
        if bar:
            bar.update(text.count("Collecting "))

    try:
        run_pip(*map(str, arguments), environment=dict(os.environ, **places), on_output=show)
    except PipError as error:
        failure = error.failure
        if failure.kind == "missing":
            raise CourseError(
                "wheel-absent",
                f"The package index has no wheel of {failure.package} for {target}.",
                "Check the index that pip uses (python -m pip config list), or leave this platform or Python out.",
            ) from None
        raise pip_error(failure, f"Fetching the wheels for {target}") from None
