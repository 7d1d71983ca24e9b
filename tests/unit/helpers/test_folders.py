"""Whole folders: when one is made, when it is made anew, and what stays of it and beside it.

Run: python -m helpers test tests/unit/helpers/test_folders.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from helpers.files import locked
from helpers.models.folders import changed_files, ensure, read_receipt, receipt_path

RECIPE = {"seed": 1}
TEXTS = {"a.txt": "alpha", "b.txt": "beta", "deep/er/c.txt": "gamma"}


def writes(texts, **made):
    """Return a maker that writes these files; ``made`` is what it returns."""

    def make(partial):
        make.calls += 1
        for name, text in texts.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(text, encoding="utf-8")
        return made

    make.calls = 0
    return make


def refuse(partial):
    raise AssertionError("made anew")


def texts(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def folder(tmp_path):
    """Return a folder that is whole."""
    folder = tmp_path / "mödel"
    assert ensure(folder, RECIPE, writes(TEXTS, facts={"commit": "c1"})) == {"commit": "c1"}
    return folder


def test_a_folder_is_made_once_and_its_facts_stay(folder):
    assert ensure(folder, RECIPE, refuse) == {"commit": "c1"}
    assert texts(folder) == TEXTS
    assert not list(folder.parent.glob("*.partial"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("be", encoding="utf-8"),
        lambda path: (path.unlink(), path.mkdir(), path.rmdir()),
    ],
    ids=["missing", "shorter", "gone and back"],
)
def test_a_damaged_folder_is_made_again_and_the_users_own_file_stays(folder, damage, capsys):
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    damage(folder / "b.txt")
    assert changed_files(folder) == ["b.txt"]
    make = writes(TEXTS)
    ensure(folder, RECIPE, make)
    assert make.calls == 1
    assert texts(folder) == TEXTS | {"notes.txt": "mine"}
    assert f"{folder / 'b.txt'} is missing or damaged" in capsys.readouterr().out


def test_another_recipe_makes_the_folder_again(folder):
    ensure(folder, {"seed": 2}, writes(TEXTS | {"a.txt": "ALPHA"}))
    assert texts(folder)["a.txt"] == "ALPHA"
    assert read_receipt(folder)["facts"] == {}


def test_a_folder_of_an_earlier_version_is_still_whole(folder):
    receipt = read_receipt(folder)
    receipt["files"] = {
        name: {"size": size, "mtime_ns": 1, "sha256": "0" * 64}
        for name, size in receipt["files"].items()
    }
    receipt_path(folder).write_text(json.dumps(receipt), encoding="utf-8")
    assert ensure(folder, RECIPE, refuse) == {"commit": "c1"}


def test_what_a_maker_does_not_write_any_more_goes(folder):
    ensure(folder, {"seed": 2}, writes({"a.txt": "ALPHA"}))
    assert texts(folder) == {"a.txt": "ALPHA"}


def test_a_file_of_the_users_is_put_aside_and_not_written_over(tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.txt").write_text("alpha", encoding="utf-8")  # the same as what comes
    (folder / "b.txt").write_text("mine", encoding="utf-8")
    ensure(folder, RECIPE, writes(TEXTS))
    assert texts(folder) == TEXTS | {"b.txt.yours": "mine"}
    (folder / "c.txt").write_text("mine", encoding="utf-8")
    (folder / "c.txt.yours").write_text("older", encoding="utf-8")
    ensure(folder, {"seed": 2}, writes(TEXTS | {"c.txt": "new"}))
    assert (folder / "c.txt.yours.yours").read_text(encoding="utf-8") == "mine"
    assert (folder / "c.txt.yours").read_text(encoding="utf-8") == "older"
    printed = capsys.readouterr().out
    assert (
        f"The model has a file called b.txt, too: yours is now {folder / 'b.txt.yours'}." in printed
    )
    assert "a.txt" not in printed


def interrupted_at(monkeypatch, stop):
    """Let the move of the file ``stop`` to its folder end as Ctrl-C would."""
    move = Path.replace

    def replace(self, target):
        if Path(target).name == stop and ".partial" in str(self):
            raise KeyboardInterrupt
        return move(self, target)

    monkeypatch.setattr(Path, "replace", replace)


def test_files_that_were_moved_before_an_interruption_are_ours_and_not_trusted(folder, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, "b.txt")
        ensure(folder, {"seed": 2}, writes({"a.txt": "ALPHA", "b.txt": "BETA"}))
    assert (folder / "a.txt").read_text(encoding="utf-8") == "ALPHA"  # moved
    assert (folder / "b.txt").read_text(encoding="utf-8") == "beta"  # not yet
    assert read_receipt(folder)["recipe"] is None
    # What comes now is another version still: no file of ours becomes the user's, and no old one
    # stays.
    ensure(folder, {"seed": 3}, writes({"a.txt": "a", "d.txt": "d"}))
    assert texts(folder) == {"a.txt": "a", "d.txt": "d"}


def test_an_old_file_that_an_interruption_left_goes_with_the_next_version(folder, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def unlink(self, missing_ok=False):
            raise KeyboardInterrupt

        patch.setattr(Path, "unlink", unlink)
        ensure(folder, {"seed": 2}, writes({"a.txt": "ALPHA"}))
    ensure(folder, {"seed": 2}, writes({"a.txt": "ALPHA"}))
    assert texts(folder) == {"a.txt": "ALPHA"}


def test_after_an_interruption_a_first_folder_is_not_trusted_and_not_the_users(
    tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, "b.txt")
        ensure(folder, RECIPE, writes(TEXTS))
    ensure(folder, {"seed": 2}, writes({"a.txt": "ALPHA"}))
    assert texts(folder) == {"a.txt": "ALPHA"}


def test_a_maker_that_goes_on_finds_what_it_left_and_may_leave_out_what_is_right(
    folder, monkeypatch
):
    (folder / "b.txt").write_text("be", encoding="utf-8")
    names = list(TEXTS)

    def breaks_off(partial):
        (partial / "b.txt.half").write_text("bet", encoding="utf-8")
        raise KeyboardInterrupt

    def goes_on(partial):
        assert (partial / "b.txt.half").read_text(encoding="utf-8") == "bet"
        (partial / "b.txt").write_text("beta", encoding="utf-8")
        return {"files": names, "facts": {"commit": "c1"}}

    with pytest.raises(KeyboardInterrupt):
        ensure(folder, RECIPE, breaks_off)
    assert ensure(folder, RECIPE, goes_on) == {"commit": "c1"}
    assert texts(folder) == TEXTS
    assert not list(folder.parent.glob("*.partial"))
    ensure(folder, RECIPE, refuse)


def test_what_another_recipe_left_half_done_goes(folder):
    def breaks_off(partial):
        (partial / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(folder, {"seed": 2}, breaks_off)
    ensure(folder, {"seed": 3}, writes(TEXTS))
    assert not list(folder.parent.glob("*.partial"))
    assert texts(folder) == TEXTS


def test_what_fails_leaves_the_folder_as_it_was(folder):
    (folder / "a.txt").unlink()
    before = texts(folder)
    receipt = receipt_path(folder).read_text(encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        ensure(folder, RECIPE, lambda partial: 1 / 0)
    assert texts(folder) == before
    assert receipt_path(folder).read_text(encoding="utf-8") == receipt


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../victim": 4}},
        {"files": {"C:\\victim": 4}},
        {"files": {"a.txt": "5"}},
        {"files": {"a.txt": None}},
        {"files": []},
        {"facts": []},
        {"recipe": "x"},
    ],
)
def test_a_receipt_that_makes_no_sense_is_not_believed(folder, change):
    victim = folder.parent / "victim"
    victim.write_text("mine", encoding="utf-8")
    receipt = json.loads(receipt_path(folder).read_text(encoding="utf-8"))
    receipt_path(folder).write_text(json.dumps(receipt | change), encoding="utf-8")
    assert read_receipt(folder) == {"recipe": None, "facts": {}, "files": {}}
    ensure(folder, RECIPE, writes(TEXTS))
    assert victim.read_text(encoding="utf-8") == "mine"


def test_a_folder_may_be_a_link_to_another_disk(tmp_path):
    other, folder = tmp_path / "other disk" / "model", tmp_path / "model"
    other.mkdir(parents=True)
    folder.symlink_to(other)
    seen = []

    def make(partial):
        seen.append(partial)
        writes(TEXTS)(partial)

    ensure(folder, RECIPE, make)
    assert seen[0].parent == other.parent  # a file is moved, not copied: it has to be on that disk
    assert texts(other) == TEXTS
    (other / "a.txt").unlink()
    (other.parent / "model.0000.partial").mkdir()  # of another recipe
    ensure(folder, RECIPE, writes(TEXTS))
    assert not list(other.parent.glob("*.partial"))
    assert not changed_files(folder)


def test_a_lock_is_held_against_other_processes_and_says_that_somebody_waits(tmp_path):
    code = (
        "import sys; from pathlib import Path; from helpers.files import locked\n"
        "with locked(Path(sys.argv[1]), lambda: print('waiting', flush=True)): print('in', flush=True)"
    )
    with locked(tmp_path, lambda: pytest.fail("nobody has it")):
        process = subprocess.Popen(
            [sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "waiting\n"
    assert process.communicate()[0] == "in\n"
    # Where nobody should wait, ``on_busy`` raises.
    with locked(tmp_path, lambda: pytest.fail("it was given back")):
        pass
