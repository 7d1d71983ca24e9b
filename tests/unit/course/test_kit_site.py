"""The folder of a kit while it is built: what is taken into it, what is removed, and the course's archive.

Run: python -m helpers test tests/unit/course/test_kit_site.py
"""

import json
import os
import stat
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import pytest
from support import ROOT, refuses

from course.kit import build as kit
from helpers.files import sha256
from helpers.models.folders import list_file, write_receipt
from helpers.models.kit import MANIFEST, read_kit

HEAD = {
    "format": 1,
    "course": "0",
    "built_on": "here",
    "models": [],
    "platforms": [],
    "pythons": [],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "kit").mkdir()
    return tmp_path / "kit"


def put(site, name, text):
    site.add(name, lambda draft: draft.write_text(text, encoding="utf-8"))


def listed(folder):
    return set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])


def test_a_kit_is_complete_when_it_is_finished_and_not_before(folder):
    site = kit._Site(folder, HEAD)
    put(site, "wheels/a.whl", "a")
    site.note(site.listed)
    with refuses("kit-incomplete"):
        read_kit(str(folder))
    site.finish()
    assert list(read_kit(str(folder)).problems()) == []
    assert listed(folder) == {"wheels/a.whl"}


def test_the_same_again_stays_as_it_is_and_another_takes_its_place(folder):
    put(kit._Site(folder, HEAD), "a", "one")
    site = kit._Site(folder, HEAD)
    site.listed["a"] = list_file(folder / "a")
    os.utime(folder / "a", ns=(1, 1))
    put(site, "a", "one")
    assert (folder / "a").stat().st_mtime_ns == 1
    assert site.has("a")
    put(site, "a", "two")
    assert (folder / "a").read_text(encoding="utf-8") == "two"
    assert site.listed["a"]["sha256"] == site.wanted["a"]["sha256"] == sha256(folder / "a")
    assert not (site.staging / "draft").exists()


def test_a_file_that_no_kit_has_written_is_refused_and_stays(folder):
    (folder / "index.html").write_text("mine", encoding="utf-8")
    site = kit._Site(folder, HEAD)
    with refuses("kit-file-of-yours") as refusal:
        put(site, "index.html", "kit")
    assert str(folder / "index.html") in refusal.value.what
    assert (folder / "index.html").read_text(encoding="utf-8") == "mine"


def test_what_is_not_wanted_any_more_goes_with_its_empty_folders(folder, tmp_path):
    site = kit._Site(folder, HEAD)
    for name in (
        "models/a/onnx/deep/x",
        "models/a/onnx/y",
        "models/b/x",
        "wheels/a.whl",
        "wheels/b.whl",
    ):
        put(site, name, name)
    site.finish()
    (folder / "models" / "b" / "notes.txt").write_text("mine", encoding="utf-8")
    site = kit._Site(folder, HEAD)
    site.keep("wheels/a.whl")
    site.finish()
    assert {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    } == {"wheels/a.whl", "models/b/notes.txt", MANIFEST}
    assert not (folder / "models" / "a").exists()
    assert listed(folder) == {"wheels/a.whl"}


@pytest.mark.skipif(sys.platform == "win32", reason="a symbolic link takes rights there")
def test_nothing_behind_a_link_is_removed(folder, tmp_path):
    site = kit._Site(folder, HEAD)
    put(site, "models/a/x", "a")
    site.finish()
    elsewhere = (folder / "models" / "a").rename(tmp_path / "elsewhere")
    (folder / "models" / "a").symlink_to(elsewhere)
    kit._Site(folder, HEAD).finish()
    assert (elsewhere / "x").exists()


def test_a_model_that_is_not_as_it_was_prepared_is_not_copied(folder, cache):
    made = cache / "tiny-phi3" / "onnx"
    made.mkdir(parents=True)
    (made / "model.onnx").write_text("graph", encoding="utf-8")
    write_receipt(
        made, {"recipe": {}, "facts": {}, "files": {"model.onnx": list_file(made / "model.onnx")}}
    )
    names = ["models/tiny-phi3/onnx.receipt.json", "models/tiny-phi3/onnx/model.onnx"]
    assert sorted(name for name, _ in kit._model_files("tiny-phi3")) == names
    site = kit._Site(folder, HEAD)
    kit._add_model(site, "tiny-phi3", "tiny-phi3")
    assert sorted(site.wanted) == sorted(listed(folder)) == names
    (made / "model.onnx").write_text("GRAPH", encoding="utf-8")
    # The kit's own is whole: nothing is copied.
    kit._add_model(kit._Site(folder, HEAD), "tiny-phi3", "tiny-phi3")
    (folder / names[1]).write_text("other", encoding="utf-8")
    with refuses("model-changed") as refusal:
        kit._add_model(kit._Site(folder, HEAD), "tiny-phi3", "tiny-phi3")
    assert str(made / "model.onnx") in refusal.value.what
    assert refusal.value.fix.endswith("prepare --model tiny-phi3.")


def test_the_archive_of_the_course_has_no_outputs_and_the_files_own_times(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    page, script, old = (
        tmp_path / name for name in ("notebooks/Page.ipynb", "Makefile", "LICENSE")
    )
    notebook = nbformat.read(ROOT / "notebooks" / "TransformerPipeline.ipynb", 4)
    next(cell for cell in notebook.cells if cell.cell_type == "code").update(
        execution_count=3, outputs=[nbformat.v4.new_output("stream", text="Zoë's secret")]
    )
    nbformat.write(notebook, page)
    script.write_text("run:\n", encoding="utf-8")
    script.chmod(0o755)
    os.utime(script, (time.mktime((2024, 5, 6, 7, 8, 10, 0, 0, -1)),) * 2)
    old.touch()
    os.utime(old, (0, 0))
    monkeypatch.setattr(kit, "ROOT", tmp_path)
    monkeypatch.setattr(kit, "course_files", lambda: [old, script, page])
    for name in ("a.zip", "b.zip"):
        kit._write_course(tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        inside = archive.read("slm-mlflow-course/notebooks/Page.ipynb").decode("utf-8")
    assert list(entries) == [
        f"slm-mlflow-course/{name}" for name in ("LICENSE", "Makefile", "notebooks/Page.ipynb")
    ]
    assert entries["slm-mlflow-course/Makefile"].date_time == (2024, 5, 6, 7, 8, 10)
    assert entries["slm-mlflow-course/LICENSE"].date_time == (1980, 1, 1, 0, 0, 0)
    assert entries["slm-mlflow-course/notebooks/Page.ipynb"].compress_type == zipfile.ZIP_DEFLATED
    if os.name == "posix":
        assert entries["slm-mlflow-course/Makefile"].external_attr >> 16 & stat.S_IXUSR
    assert "Zoë's secret" not in inside
    assert '"execution_count": 3' not in inside
    assert nbformat.reads(inside, 4).cells[0] == notebook.cells[0]


def test_a_page_that_was_not_run_travels_as_it_is(tmp_path):
    kit._write_course(tmp_path / "course.zip")
    with zipfile.ZipFile(tmp_path / "course.zip") as archive:
        for name in ("notebooks/TransformerPipeline.ipynb", "data/kit.html", "course/kit/build.py"):
            assert archive.read(f"slm-mlflow-course/{name}") == Path(ROOT, name).read_bytes()
