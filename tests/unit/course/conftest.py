"""A small kit that was really built, for the tests that serve, check and rebuild one."""

import shutil
from pathlib import Path

import pytest
from support import kits

from course.kit.build import build
from course.kit.wheels import PLATFORMS


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Let pip find handmade wheels and nothing else, and let five lines stand for constraints.txt."""
    folder = tmp_path_factory.mktemp("index")
    path = folder / "constraints.txt"
    path.write_text(kits.CONSTRAINTS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("course.kit.wheels.CONSTRAINTS", path)
        for name, value in kits.only_wheels(folder / "wheels", *kits.WHEELS).items():
            patch.setenv(name, value)
        yield path


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny, index):
    """Return a small kit for three systems and two Pythons: six targets that are not all this machine."""
    folder = tmp_path_factory.mktemp("small") / "kit"
    build(folder, ["tiny-phi3"], list(PLATFORMS), ["3.11", "3.13"])
    return folder


@pytest.fixture
def small(built, tmp_path):
    """Return a copy of the small kit that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "a kit"))
