"""Building an offline kit: wheels for other machines, models, the course; again, interrupted, in the wrong place.

Run: python -m helpers test tests/services/test_kit_build.py
"""

import errno
import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import pytest
from packaging.tags import sys_tags
from support import ROOT, refuses
from support.kits import list_files, only_wheels

from course.kit.build import _write_course, build, course_files
from course.kit.wheels import PLATFORMS, Target
from helpers.models.kit import SUMS, read_kit

# --- wheels for other systems ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "python", "has", "has_not"),
    [
        (
            "windows",
            "3.12",
            {"pywin32", "waitress", "colorama"},
            {"gunicorn", "appnope", "pexpect", "nvidia-cublas"},
        ),
        ("macos", "3.13", {"appnope", "gunicorn", "pexpect"}, {"pywin32", "pywinpty", "waitress"}),
        ("linux", "3.11", {"gunicorn", "pexpect", "overrides"}, {"pywin32", "appnope", "colorama"}),
    ],
)
def test_a_marker_speaks_of_the_participants_machine(platform, python, has, has_not):
    for patch in (0, 99):
        wanted = {one.name for one in Target(platform, python).requirements(patch)}
        assert has | {"pip", "setuptools", "torch", "pytest"} <= wanted
        assert not has_not & wanted


def test_a_marker_of_a_patch_release_is_asked_at_both_ends():
    versions = [
        {
            str(one.specifier)
            for one in Target("linux", "3.11").requirements(patch)
            if one.name == "soupsieve"
        }
        for patch in (0, 99)
    ]
    assert versions[0] != versions[1]
    assert all(len(found) == 1 for found in versions)


@pytest.mark.skipif(sys.platform != "linux", reason="speaks of Linux")
def test_the_tags_of_a_target_are_those_that_its_own_python_has():
    here = {str(tag) for tag in Target("linux", "{}.{}".format(*sys.version_info[:2])).tags}
    own = {str(tag) for tag in sys_tags()}
    # This machine may have a newer glibc than the oldest that the kit is for, and nothing but that.
    assert {tag for tag in here - own if "manylinux" not in tag} == set()
    assert len(here & own) > 300


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny, index):
    """Return a small kit for three systems, and the Python whose patch releases want different wheels."""
    folder = tmp_path_factory.mktemp("small") / "kit"
    build(folder, ["tiny-phi3"], list(PLATFORMS), ["3.11"])
    return folder


def test_a_kit_has_the_wheels_of_each_system_and_patch_release(built):
    names = sorted(path.name for path in (built / "wheels").glob("*.whl"))
    for system in ("win_amd64", "macosx_11_0_arm64", "manylinux2014_x86_64"):
        assert [
            name for name in names if name.startswith("markupsafe-3.0.4-cp311-") and system in name
        ], names
    assert [name for name in names if name.startswith("pywinpty-3.1.2-cp311-cp311-win_amd64")], (
        names
    )
    assert not [
        name for name in names if name.startswith("pywinpty") and "win" not in name.split("-")[-1]
    ]
    assert {
        "six-1.17.0-py2.py3-none-any.whl",
        "soupsieve-2.10-py3-none-any.whl",
        "soupsieve-4.1.2-py3-none-any.whl",
    } <= set(names)
    kit = read_kit(str(built))
    assert "windows, macos, linux" in (built / "index.html").read_text(encoding="utf-8")
    page = (built / "wheels" / "index.html").read_text(encoding="utf-8")
    assert page.count("<a ") == len(names)
    for name in names:
        assert f'"{name}#sha256={kit.files[f"wheels/{name}"]}"' in page


def test_pip_chooses_the_wheels_that_each_target_can_use_and_leaves_the_rest(built):
    names = {path.name for path in (built / "wheels").glob("*.whl")}
    assert not [
        name
        for name in names
        if any(
            word in name
            for word in (
                "cp312",
                "cp313",
                "win32.whl",
                "x86_64.whl-",
                "musllinux",
                "aarch64",
                "macosx_10_9",
                "1.16.0",
            )
        )
    ]
    assert len(names) == 3 + 1 + 3


def test_a_package_that_the_index_lacks_is_named_with_the_machine(tmp_path, index, monkeypatch):
    for name, value in only_wheels(tmp_path / "index", "six-1.17.0-py3-none-any.whl").items():
        monkeypatch.setenv(name, value)
    with refuses("wheel-absent") as refusal:
        build(tmp_path / "kit", ["tiny-phi3"], ["macos"], ["3.12"])
    assert "no wheel of markupsafe==3.0.4 for Python 3.12 on macos." in refusal.value.what


def test_the_cuda_build_of_torch_is_refused(tmp_path, monkeypatch):
    index = only_wheels(
        tmp_path / "index",
        "torch-9.9-cp312-cp312-manylinux_2_28_x86_64.whl",
        requires="Requires-Dist: nvidia-cublas\n",
    )
    for name, value in index.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "constraints.txt").write_text("torch==9.9\n", encoding="utf-8")
    monkeypatch.setattr("course.kit.wheels.CONSTRAINTS", tmp_path / "constraints.txt")
    with refuses("cuda-build"):
        build(tmp_path / "kit", ["tiny-phi3"], ["linux"], ["3.12"])
    assert not list((tmp_path / "kit").rglob("torch-*"))


# --- building again ---------------------------------------------------------------------------


def test_a_second_build_keeps_what_is_right_drops_what_is_stale_and_leaves_the_users_files(small):
    (small / "wheels" / "my notes.txt").write_text("mine", encoding="utf-8")
    (small / "my.txt").write_text("mine", encoding="utf-8")
    damaged = next((small / "wheels").glob("six-*.whl"))
    with zipfile.ZipFile(damaged, "a") as wheel:  # still a wheel, and another one
        wheel.writestr("changed_by_somebody.py", "")
    changed = small / "models" / "tiny-phi3" / "onnx" / "model.onnx"
    changed.write_bytes(bytes(changed.stat().st_size))
    before = list_files(small)
    build(small, ["tiny-phi3"], ["linux"], ["3.11"])
    after = list_files(small)
    gone = {name for name in before if name not in after}
    assert {name.split("-")[0] for name in gone} == {"wheels/markupsafe", "wheels/pywinpty"}
    assert all("win_amd64" in name or "macosx" in name for name in gone)
    stayed = {name for name in after if before.get(name) == after[name]}
    assert {name for name in stayed if name.endswith(".whl")} == {
        name for name in after if name.endswith(".whl")
    } - {f"wheels/{damaged.name}"}
    page = (small / "wheels" / "index.html").read_text(encoding="utf-8")
    assert page.count("<a ") == len(list((small / "wheels").glob("*.whl")))
    assert (small / "my.txt").read_text(encoding="utf-8") == "mine"
    assert list(read_kit(str(small)).problems()) == []
    assert not {"my.txt", "wheels/my notes.txt"} & read_kit(str(small)).files.keys()


def test_half_a_wheel_that_an_interrupted_first_build_left_is_fetched_again(tmp_path, index, tiny):
    folder = tmp_path / "kit"
    build(folder, ["tiny-phi3"], ["linux"], ["3.13"])
    wheel = next((folder / "wheels").glob("six-*.whl"))
    wheel.write_bytes(wheel.read_bytes()[:100])
    (folder / SUMS).unlink()
    (folder / "SHA256SUMS.unfinished").touch()
    build(folder, ["tiny-phi3"], ["linux"], ["3.13"])
    assert wheel.stat().st_size > 100


def test_a_kit_is_a_list_that_sha256sum_reads(built):
    if not shutil.which("sha256sum"):
        pytest.skip("needs sha256sum")
    assert (
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=built).returncode
        == 0
    )


@pytest.mark.parametrize(
    "there",
    [
        {"index.html": "my site"},
        {"photos/a.jpg": "mine"},
    ],
)
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, there):
    folder = tmp_path / "kit"
    for name, text in there.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    with refuses("kit-other-folder"):
        build(folder, ["tiny-phi3"], ["linux"], ["3.13"])
    assert {
        name: (folder / name).read_text(encoding="utf-8") for name in list_files(folder)
    } == there


@pytest.mark.parametrize("folder", [ROOT, ROOT.parent, ROOT / "data", ROOT / "data" / "models"])
def test_a_kit_is_not_built_over_the_course_or_its_models(folder):
    with refuses("kit-in-course"):
        build(folder, ["tiny-phi3"])


def test_a_list_cannot_make_a_build_remove_what_is_outside(small, tmp_path):
    (tmp_path / "precious").write_text("mine", encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.whl").write_text("mine", encoding="utf-8")
    if os.name == "posix":
        (small / "link").symlink_to(tmp_path / "elsewhere")
    with (small / SUMS).open("a", encoding="utf-8") as sums:
        sums.write(f"{'0' * 64}  ../precious\n{'0' * 64}  link/x.whl\n")
    build(small, ["tiny-phi3"], ["linux"], ["3.13"])
    assert (tmp_path / "precious").exists()
    assert (tmp_path / "elsewhere" / "x.whl").exists()


def test_the_course_in_a_kit_is_all_of_it_and_nothing_else():
    ours = {path.relative_to(ROOT).as_posix() for path in course_files()}
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()} == ours
    assert not [name for name in ours if name.startswith(("data/models/", "build/", ".venv/"))]


def test_a_git_that_fails_is_named(monkeypatch, tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    with refuses("not-a-checkout") as refusal:
        course_files()
    assert "not a git repository" in refusal.value.what


def test_what_a_user_put_beside_the_courses_data_stays_there(request):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    own = ROOT / "data" / "customers of a test.csv"
    request.addfinalizer(lambda: own.unlink(missing_ok=True))
    own.write_text("secret", encoding="utf-8")
    assert own not in course_files()


def test_a_model_that_is_not_in_the_catalogue_is_refused_before_anything_is_made(tmp_path):
    with refuses("model-unknown"):
        build(tmp_path / "kit", ["tiny-phi3", "phi-9"])
    assert not (tmp_path / "kit").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "kit").write_text("mine", encoding="utf-8")
    with refuses("kit-not-writable"):
        build(tmp_path / "kit", ["tiny-phi3"])


def test_two_builds_do_not_write_into_one_folder(small):
    from filelock import FileLock

    with FileLock(small / ".lock"), refuses("kit-busy"):
        build(small, ["tiny-phi3"])


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(
    tmp_path, index, monkeypatch, capsys
):
    monkeypatch.setattr("course.kit.build.free_disk", lambda folder: 9.0)
    with refuses("disk-short") as refusal:
        build(tmp_path / "kit", ["tiny-phi3"])
    assert "has 9 MB free, and the rest of the kit takes about" in refusal.value.what
    assert "Fetching" not in capsys.readouterr().out


def test_a_disk_that_fills_up_is_an_error_that_says_so(tmp_path, index, monkeypatch):
    def full(folder, targets):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("course.kit.wheels.add_wheels", full)
    with refuses("disk-full"):
        build(tmp_path / "kit", ["tiny-phi3"], ["windows"], ["3.13"])
    with refuses("kit-incomplete"):
        read_kit(str(tmp_path / "kit"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_whoever_gets_a_kit_may_read_it_also_where_the_builders_files_are_private(
    index, tiny, tmp_path
):
    before = os.umask(0o077)
    try:
        build(tmp_path / "kit", ["tiny-phi3"])
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)
    private = [
        path
        for path in (tmp_path / "kit", *(tmp_path / "kit").rglob("*"))
        if path.name != ".lock"
        and path.stat().st_mode & (0o055 if path.is_dir() else 0o044)
        != (0o055 if path.is_dir() else 0o044)
    ]
    assert not private


# --- the archive of the course ------------------------------------------------------------------


def test_the_archive_of_the_course_has_no_outputs_and_the_files_own_times(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    page = tmp_path / "notebooks" / "Page.ipynb"
    script = tmp_path / "Makefile"
    notebook = nbformat.read(ROOT / "notebooks" / "TransformerPipeline.ipynb", 4)
    next(cell for cell in notebook.cells if cell.cell_type == "code").update(
        execution_count=3, outputs=[nbformat.v4.new_output("stream", text="Zoë's secret")]
    )
    nbformat.write(notebook, page)
    script.write_text("run:\n", encoding="utf-8")
    script.chmod(0o755)
    os.utime(script, (time.mktime((2024, 5, 6, 7, 8, 10, 0, 0, -1)),) * 2)
    monkeypatch.setattr("course.kit.build.ROOT", tmp_path)
    monkeypatch.setattr("course.kit.build.course_files", lambda: [script, page])
    with zipfile.ZipFile(_write_course(tmp_path / "course.zip")) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        inside = archive.read("slm-mlflow-course/notebooks/Page.ipynb").decode("utf-8")
    assert entries["slm-mlflow-course/Makefile"].date_time == (2024, 5, 6, 7, 8, 10)
    if os.name == "posix":
        assert entries["slm-mlflow-course/Makefile"].external_attr >> 16 & stat.S_IXUSR
    assert "Zoë's secret" not in inside
    assert nbformat.reads(inside, 4).cells[0] == notebook.cells[0]


def test_a_page_that_was_not_run_travels_as_it_is(built):
    with zipfile.ZipFile(built / "course.zip") as archive:
        for name in ("notebooks/TransformerPipeline.ipynb", "data/kit.html", "course/kit/build.py"):
            assert archive.read(f"slm-mlflow-course/{name}") == Path(ROOT, name).read_bytes()
