"""Gathers the wheels that a system and a Python need, whatever machine this is.

constraints.txt says which ones, with markers that are evaluated for that system; pip fetches them
into the kit.
"""

import os
import platform
from dataclasses import dataclass

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms, platform_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

from course.install import cpu_torch_options
from helpers.errors import CourseError
from helpers.files import progress_bar
from helpers.models.kit import PLATFORM_NAMES
from helpers.models.pip import PipError, explain, run_pip
from helpers.paths import ROOT

CONSTRAINTS = ROOT / "constraints.txt"
# The oldest that all wheels run on: glibc 2.31 (llguidance), macOS 14 (torch). pip does not know
# that a system takes the wheels of older ones,
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
# A marker may ask for a patch release, and the participants have different ones: both ends are
# gathered.
PATCHES = (99, 0)
# Measured: the wheels of one system and Python, and what pip holds beside them while it fetches.
WHEELS_MEGABYTES = 900
BATCH = 8  # wheels in one call of pip: what is finished when somebody interrupts


@dataclass(frozen=True)
class Target:
    """A system and a Python that the kit has wheels for, such as ``"3.12"``.

    ``platform`` is a key of ``PLATFORMS``, or this machine's own name where it is none of them.
    """

    platform: str
    python: str

    def __str__(self):
        return f"Python {self.python} on {self.platform}"

    def requirements(self, patch: int) -> list[Requirement]:
        """Return what constraints.txt wants on this target for a patch release of its Python."""
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
        """Return the tags of its wheels that are made for one system, best first."""
        return (
            PLATFORMS[self.platform]["tags"]
            if self.platform in PLATFORMS
            else tuple(platform_tags())
        )

    def tags(self) -> set[Tag]:
        """Return every tag that a wheel for it may have."""
        version, interpreter = (
            tuple(map(int, self.python.split("."))),
            "cp" + self.python.replace(".", ""),
        )
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


def _wheels(site):
    """Return project, version, build and tags of each wheel that is in the kit, whole, by its path there."""
    return {
        name: parse_wheel_filename(name.removeprefix("wheels/"))
        for name in site.listed
        if name.endswith(".whl") and site.has(name)
    }


def _answers(wheel, requirement, tags):
    project, version, _, its_tags = wheel
    return (
        project == canonicalize_name(requirement.name)
        and not its_tags.isdisjoint(tags)
        and requirement.specifier.contains(version, prereleases=True)
    )


def missing_wheels(site, target: Target, patch: int) -> list[Requirement]:
    """Return what a target wants for a patch release of its Python, and no wheel of the kit answers."""
    tags, wheels = target.tags(), _wheels(site).values()
    return [
        one
        for one in target.requirements(patch)
        if not any(_answers(wheel, one, tags) for wheel in wheels)
    ]


def add_wheels(site, target: Target) -> None:
    """Fetch what the kit lacks for one system and Python."""
    for patch in PATCHES:
        # torch comes first, and alone: it has options of its own.
        missing = sorted(missing_wheels(site, target, patch), key=lambda one: one.name != "torch")
        if not missing:
            continue
        with progress_bar(f"Fetching wheels for {target}", len(missing)) as bar:
            while missing:
                size = 1 if missing[0].name == "torch" else BATCH
                batch, missing = missing[:size], missing[size:]
                _fetch(site, target, patch, batch)
                bar.update(len(batch))


def _fetch(site, target, patch, batch):
    """Let pip fetch some wheels, and take them into the kit once they are whole."""
    # Without the markers: pip would ask this machine about them.
    words = [*target.pip_options(patch), *(f"{one.name}{one.specifier}" for one in batch)]
    if batch[0].name == "torch" and "linux" in target.platform.lower():
        none = ["--ignore-installed", "--target", site.staging / "none"]
        words = cpu_torch_options(
            lambda *words: _pip(site, target, *words, *none), site.staging / "plan.json", *words
        )
    fetched = site.staging / "wheels"
    _pip(site, target, "download", "--no-deps", "--dest", fetched, *words)
    for wheel in sorted(fetched.glob("*.whl")):
        site.take(f"wheels/{wheel.name}", wheel)
    site.note(site.listed)


def _pip(site, target, *arguments):
    """Run pip with space for its temporary files in the kit's folder rather than in a small /tmp."""
    scratch = site.staging / "tmp"
    scratch.mkdir(exist_ok=True)
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    try:
        run_pip(*map(str, arguments), environment=dict(os.environ, **places))
    except PipError as error:
        failure = error.failure
        if failure.kind == "missing":
            raise CourseError(
                "wheel-absent",
                f"The package index has no wheel of {failure.package} for {target}.",
                "Check the index that pip uses (python -m pip config list), or leave this platform or Python out.",
            ) from None
        if failure.kind == "unreachable":
            raise CourseError(
                "pip-unreachable",
                f"pip could not get the wheels for {target} from the package index.",
                "Check the network, the proxy (HTTPS_PROXY) and pip's index (python -m pip config list), and "
                "run this again; what is finished stays.",
            ) from None
        raise explain(failure, f"Fetching the wheels for {target}") from None


def keep_wanted_wheels(site, targets: list[Target]) -> None:
    """Take each wheel that a target wants; the rest of those listed is stale."""
    wheels = _wheels(site)
    for target in targets:
        tags, wanted = (
            target.tags(),
            [one for patch in PATCHES for one in target.requirements(patch)],
        )
        for name in wheels.keys() - site.wanted.keys():
            if any(_answers(wheels[name], one, tags) for one in wanted):
                site.keep(name)
