"""The three tiers: which files belong to which, what becomes of words, and when a file has outgrown its share.

Run: python -m helpers test tests/unit/course/test_tiers.py
"""

import json
import subprocess
import tomllib

import pytest
from filelock import FileLock
from support import ROOT, refuses

from course import tiers

ALL = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Return the commands that would have been run, and the names of the models and extras that were made ready."""
    commands, models = [], []
    monkeypatch.setattr(
        subprocess, "call", lambda command, **options: commands.append(command) or 0
    )
    monkeypatch.setattr(tiers, "prepare_model", models.append)
    monkeypatch.setattr(tiers, "install_extra", models.append)
    monkeypatch.setattr(tiers, "BUILD", tmp_path / "build")
    return commands, models


@pytest.mark.parametrize(
    ("tier", "folders", "models"),
    [
        ("check", ["tests/unit"], ["tiny-phi3"]),
        (
            "test",
            ["tests/unit", "tests/pages", "tests/services"],
            ["tiny-phi3", "smollm2-135m", "spark"],
        ),
        ("nightly", ["tests/nightly"], ["tiny-phi3", "smollm2-135m", "spark", "azure"]),
    ],
)
def test_a_tier_runs_its_folders_with_its_models(called, tier, folders, models):
    commands, prepared = called
    tiers.run_tests(tier, ["--junitxml=build/junit.xml", "-k", "course"])
    assert [word for word in commands[0] if word.startswith("tests/")] == folders
    assert commands[0][-3:] == ["--junitxml=build/junit.xml", "-k", "course"]
    assert prepared == models


def test_a_file_that_is_named_is_run_alone(called):
    tiers.run_tests("test", ["-k", "course", "tests/unit/course/test_tiers.py::test_a", "-x"])
    assert [word for word in called[0][0] if word.startswith("tests/")] == [
        "tests/unit/course/test_tiers.py::test_a"
    ]


def test_a_second_whole_run_in_one_folder_is_refused_and_a_part_is_not(called):
    tiers.BUILD.mkdir()
    with FileLock(tiers.BUILD / "tests.lock"):
        with refuses("tests-running"):
            tiers.run_tests("nightly", [])
        tiers.run_tests("nightly", ["tests/unit/course/test_tiers.py"])
        tiers.run_tests("check", [])
    tiers.run_tests("nightly", [])
    assert len(called[0]) == 3


def test_each_test_file_is_in_one_tier():
    folders = {folder for tier in tiers.TIERS.values() for folder in tier.folders}
    assert {file.split("/")[1] for file in ALL} <= folders


def test_a_whole_tier_is_known_by_its_files_and_a_part_is_none():
    nightly = {file for file in ALL if file.startswith("tests/nightly/")}
    assert tiers.find_tier(nightly) == "nightly"
    assert tiers.find_tier(ALL - nightly) == "test"
    assert tiers.find_tier(nightly - {min(nightly)}) is None


@pytest.mark.parametrize(
    ("measured", "too_long"),
    [
        ({"a": 10, "b": 90}, set()),  # as kept
        ({"a": 100, "b": 900}, set()),  # a slower machine
        ({"a": 14, "b": 86}, set()),  # not half again
        ({"a": 17, "b": 83}, {"a"}),
        ({"a": 10, "b": 80, "new": 10}, {"new"}),
        ({"a": 10, "b": 89, "new": 1}, set()),  # within the noise
        ({"a": 10}, set()),  # b is gone, which made nothing slower
    ],
)
def test_a_file_that_takes_over_half_again_its_share_is_named(measured, too_long):
    assert set(tiers.find_outgrown("test", measured, {"a": 1, "b": 9})) == too_long


def test_durations_are_kept_by_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiers, "MEASURED", tmp_path / "measured.json")
    monkeypatch.setattr(tiers, "BASELINE", tmp_path / "kept.json")
    with refuses("durations-missing"):
        tiers.update_baseline()
    here, gone = "tests/unit/course/test_tiers.py", "tests/unit/test_gone.py"
    tiers.BASELINE.write_text(json.dumps({"test": {here: 1.0}, "nightly": {gone: 3.0, here: 1.0}}))
    tiers.MEASURED.write_text(json.dumps({"test": {here: 2.0}}))
    assert tiers.update_baseline() == 0
    assert json.loads(tiers.BASELINE.read_text()) == {"test": {here: 2.0}, "nightly": {here: 1.0}}
    assert "100.0%     2.0 s  tests/unit/course/test_tiers.py" in capsys.readouterr().out


# --- policies -----------------------------------------------------------------------------------


def test_each_policy_of_contributing_has_a_test_that_runs_before_a_change_is_sent():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| to change | open |")[1].split("\n\n")[0]
    named = {line.split("|")[1].strip() for line in table.splitlines()[2:]}
    policies = tomllib.loads((ROOT / "tests" / "policies.toml").read_text(encoding="utf-8"))
    assert {policy["change"] for policy in policies["policy"]} == named
    for policy in policies["policy"]:
        assert policy["tests"], policy
        for test in policy["tests"]:
            file, _, name = test.partition("::")
            assert file.split("/")[1] in tiers.TIERS["test"].folders, test
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), test
