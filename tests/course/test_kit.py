"""The offline kit: two participants who have nothing else, and what bad luck does to a kit.

Run: python -m helpers test tests/test_kit.py
"""

import contextlib
import hashlib
import http.client
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from packaging.tags import sys_tags
from support import OURS, ROOT
from support.web_server import web_server
from test_setup import user

from course.environment import pins
from course.kit.build import build
from course.kit.wheels import PLATFORMS, Target
from helpers import CourseError, kit_build, kit_serve
from helpers.models.kit import MANIFEST, check, read_kit, sha256

COMMAND = [sys.executable, "-m", "helpers", "kit"]
NOBODY = "http://127.0.0.1:9"  # the discard port
# Pure and compiled, for one system alone, and with a marker that asks for a patch release.
FEW = """# such as constraints.txt
markupsafe==3.0.4
pywinpty==3.1.2 ; os_name == 'nt'
six==1.17.0
soupsieve==2.10 ; python_full_version < '3.11.5'
soupsieve==4.1.2 ; python_full_version >= '3.11.5'
"""


def files(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
            for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def served(folder):
    """Serve a kit as a user does; give its URL and, afterwards, see that the server said nothing of an error."""
    port = free_port()
    with subprocess.Popen([*COMMAND, "serve", folder, "--port", str(port)], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, encoding="utf-8") as process:
        try:
            while "Ctrl-C" not in (line := process.stdout.readline()):
                assert line, process.communicate()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            said = process.communicate()[1]
    assert said == ""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Return a kit of tiny-phi3 and all packages for this machine, whose build was interrupted once."""
    folder = tmp_path_factory.mktemp("kit") / "Kit für alle"
    command = [*COMMAND, "build", folder, "--model", "tiny-phi3"]
    if sys.platform != "win32":  # which has no SIGINT for another process
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   encoding="utf-8", start_new_session=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while len(list(folder.glob("wheels/*.whl"))) < 12:  # in the middle of the second or third call of pip
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all that runs in it
        errors = process.communicate()[1]
        assert process.returncode == 130, errors
        assert "Interrupted. What is finished stays" in errors
        assert "Traceback" not in errors
        with pytest.raises(CourseError, match=r"is not finished\. Run `kit build` with the same folder again"):
            read_kit(str(folder))
    finished = {name: when for name, when in files(folder).items() if name.endswith(".whl")} if folder.exists() else {}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout + result.stderr
    assert finished.items() <= files(folder).items()
    assert not (folder / "kit.partial").exists()
    return folder


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Return constraints of five lines in the place of constraints.txt."""
    path = tmp_path / "constraints.txt"
    path.write_text(FEW, encoding="utf-8")
    monkeypatch.setattr("helpers.kit_wheels.CONSTRAINTS", path)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny):
    """Return a small kit for three systems and two Pythons: six targets that are not all this machine."""
    folder = tmp_path_factory.mktemp("small")
    path = folder / "constraints.txt"
    path.write_text(FEW, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers.kit_wheels.CONSTRAINTS", path)
        build(folder / "kit", ["tiny-phi3"], list(PLATFORMS), ["3.11", "3.13"])
    return folder / "kit"


@pytest.fixture
def small(built, tmp_path):
    """Return a copy of the small kit that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "a kit"))


# --- the two participants -------------------------------------------------------------------


def participant(folder, url):
    """Unpack the course as a participant does, and start its one command with nothing but the kit to ask."""
    folder.mkdir(parents=True)
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("GET", "/course.zip")
    (folder / "course.zip").write_bytes(connection.getresponse().read())
    with zipfile.ZipFile(folder / "course.zip") as zipped:
        zipped.extractall(folder)
    course = folder / "slm-mlflow-course"
    environment = {name: value for name, value in os.environ.items()
                   if not name.upper().startswith(("COURSE_", "PIP_", "UV_", *OURS))}
    # An index that would be asked if set-up did not shut it out, and would refuse: no log may name it.
    environment |= {"COURSE_KIT": url, "PIP_CONFIG_FILE": os.devnull,
                    "PIP_NO_CACHE_DIR": "1", "PIP_INDEX_URL": NOBODY, "PIP_EXTRA_INDEX_URL": NOBODY,
                    "HTTPS_PROXY": NOBODY, "HTTP_PROXY": NOBODY, "http_proxy": NOBODY,
                    "PYTHONPATH": str(ROOT / "tests" / "no_network"), "REFUSED_LOG": str(folder / "refused.log")}
    python = getattr(sys, "_base_executable", sys.executable)
    process = subprocess.Popen([python, "-m", "helpers", "run", "--model", "tiny-phi3"], cwd=course, env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    return course, process


def test_two_participants_at_once_run_both_notebooks_from_one_url_and_nothing_else(big, tmp_path):
    with served(big) as url:
        both = [participant(tmp_path / f"Zoë und Jörg {number}", url) for number in (1, 2)]
        outputs = [process.communicate()[0] for _, process in both]
    kit = read_kit(str(big))
    for (course, process), output in zip(both, outputs, strict=True):
        log = (course / "build" / "setup.log").read_text(encoding="utf-8")
        assert process.returncode == 0, output[-3000:] + log[-3000:]
        refused = course.parent / "refused.log"
        assert not refused.exists(), refused.read_text(encoding="utf-8")
        assert NOBODY not in log
        assert output.count("  Q  ") == output.count("  A  ") > 2
        assert output.count("tokens per second; page: ") == 2
        # Nothing was made here: the files are the kit's own, to the last byte.
        assert "Exporting" not in output
        assert "Making random weights" not in output
        home = course / "data" / "models" / "tiny-phi3"
        in_kit = {name: entry["sha256"] for name, entry in kit.files.items()
                  if name.startswith("models/tiny-phi3/") and not name.endswith(".receipt.json")}
        assert len(in_kit) > 8
        assert {name: sha256(home.parent / name.removeprefix("models/")) for name in in_kit} == in_kit
        own = course / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        code = "from course.environment import differing_packages; print(differing_packages())"
        assert subprocess.run([own, "-c", code], cwd=course, capture_output=True, text=True).stdout == "{}\n"


def test_a_model_comes_from_a_folder_as_well(big, tmp_path, python, tiny):
    cache = tmp_path / "cache"
    result = python("-m", "helpers", "prepare", "--model", "tiny-phi3", network=False, COURSE_KIT=str(big),
                    COURSE_CACHE=str(cache))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Exporting" not in result.stdout
    made, copied = tiny.onnx_dir / "model.onnx", cache / "tiny-phi3" / "onnx" / "model.onnx"
    assert sha256(copied) == sha256(made)


def test_the_whole_kit_is_as_it_was_built_and_every_command_of_the_course_can_come_from_it(big):
    result = subprocess.run([*COMMAND, "check", big], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " MB: as they were built." in result.stdout
    names = {path.name.split("-")[0].lower().replace("_", "-") for path in (big / "wheels").glob("*.whl")}
    assert {*pins(tests=True), "setuptools"} <= names
    with zipfile.ZipFile(big / "course.zip") as course:
        notebook = json.loads(course.read("slm-mlflow-course/notebooks/TransformerPipeline.ipynb"))
        inside = set(course.namelist())
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    assert {f"slm-mlflow-course/{name}" for name in ("pyproject.toml", "constraints.txt", "helpers/kit.py")} <= inside
    assert not [name for name in inside if ".venv" in name or "/build/" in name or "data/models/" in name]


# --- wheels for other systems ---------------------------------------------------------------


@pytest.mark.parametrize(("platform", "python", "has", "has_not"), [
    ("windows", "3.12", {"pywin32", "waitress", "colorama"}, {"gunicorn", "appnope", "pexpect", "nvidia-cublas"}),
    ("macos", "3.13", {"appnope", "gunicorn", "pexpect"}, {"pywin32", "pywinpty", "waitress"}),
    ("linux", "3.11", {"gunicorn", "pexpect", "overrides"}, {"pywin32", "appnope", "colorama"}),
])
def test_a_marker_speaks_of_the_participants_machine(platform, python, has, has_not):
    for patch in (0, 99):
        wanted = {one.name for one in Target(platform, python).requirements(patch)}
        assert has | {"pip", "setuptools", "torch", "pytest"} <= wanted
        assert not has_not & wanted


def test_a_marker_of_a_patch_release_is_asked_at_both_ends():
    versions = [{str(one.specifier) for one in Target("linux", "3.11").requirements(patch) if one.name == "soupsieve"}
                for patch in (0, 99)]
    assert versions[0] != versions[1]
    assert all(len(found) == 1 for found in versions)


@pytest.mark.skipif(sys.platform != "linux", reason="speaks of Linux")
def test_the_tags_of_a_target_are_those_that_its_own_python_has():
    here = {str(tag) for tag in Target("linux", "{}.{}".format(*sys.version_info[:2])).tags()}
    own = {str(tag) for tag in sys_tags()}
    # This machine may have a newer glibc than the oldest that the kit is for, and nothing but that.
    assert {tag for tag in here - own if "manylinux" not in tag} == set()
    assert len(here & own) > 300


def test_a_kit_has_the_wheels_of_each_system_and_python(built):
    names = sorted(path.name for path in (built / "wheels").glob("*.whl"))
    for python in ("cp311", "cp313"):
        for system in ("win_amd64", "macosx_11_0_arm64", "manylinux2014_x86_64"):
            assert [name for name in names if name.startswith(f"markupsafe-3.0.4-{python}-") and system in name], names
        assert [name for name in names if name.startswith(f"pywinpty-3.1.2-{python}-{python}-win_amd64")], names
    assert not [name for name in names if name.startswith("pywinpty") and "win" not in name.split("-")[-1]]
    assert {"six-1.17.0-py2.py3-none-any.whl", "soupsieve-2.10-py3-none-any.whl",
            "soupsieve-4.1.2-py3-none-any.whl"} <= set(names)
    kit = read_kit(str(built))
    assert kit.manifest["platforms"] == ["windows", "macos", "linux"]
    page = (built / "wheels" / "index.html").read_text(encoding="utf-8")
    assert page.count("<a ") == len(names)
    for name in names:
        assert f'"{name}#sha256={kit.files[f"wheels/{name}"]["sha256"]}"' in page


def only_wheels(folder, *names, requires=""):
    """Write wheels without contents, and return the environment in which pip finds them and nothing else."""
    folder.mkdir(exist_ok=True)
    for name in names:
        project, version = name.split("-")[:2]
        with zipfile.ZipFile(folder / name, "w") as wheel:
            info = f"{project}-{version}.dist-info"
            wheel.writestr(f"{info}/METADATA",
                           f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n{requires}")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n")
            wheel.writestr(f"{info}/RECORD", "")
    return {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder.as_uri(),
            "HTTPS_PROXY": NOBODY, "https_proxy": NOBODY}


def test_the_cuda_build_of_torch_is_refused(tmp_path, python):
    torch = f"torch-{pins(tests=False)['torch']}"
    index = only_wheels(tmp_path / "index", f"{torch}-cp312-cp312-manylinux_2_28_x86_64.whl",
                        requires="Requires-Dist: nvidia-cublas\n")
    result = python("-m", "helpers", "kit", "build", tmp_path / "kit", "--model", "tiny-phi3", "--platform", "linux",
                    "--python", "3.12", **index)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "is the CUDA build, 3 GB that this course never uses." in result.stderr
    assert not list((tmp_path / "kit").rglob("torch-*"))


def test_a_package_that_the_index_lacks_is_named_with_the_machine(tmp_path, few, monkeypatch):
    for name, value in only_wheels(tmp_path / "index", "six-1.17.0-py3-none-any.whl").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CourseError, match=r"has no wheel of markupsafe==3.0.4 for Python 3.12 on macos\. Check the"):
        build(tmp_path / "kit", ["tiny-phi3"], ["macos"], ["3.12"])


# --- building again ---------------------------------------------------------------------------


def test_a_second_build_keeps_what_is_there_drops_what_is_stale_and_leaves_the_users_files(small, few):
    (small / "wheels" / "my notes.txt").write_text("mine", encoding="utf-8")
    (small / "my.txt").write_text("mine", encoding="utf-8")
    damaged = next((small / "wheels").glob("six-*.whl"))
    damaged.write_bytes(damaged.read_bytes()[:1000])
    before = files(small)
    build(small, ["tiny-phi3"], ["linux", "macos"], ["3.13"])
    after = files(small)
    gone = {name for name in before if name not in after}
    assert {name.split("-")[0] for name in gone} == {"wheels/markupsafe", "wheels/pywinpty", "wheels/soupsieve"}
    assert all("win_amd64" in name or "cp311" in name or name == "wheels/soupsieve-2.10-py3-none-any.whl"
               for name in gone)
    # The two pages and the manifest speak of other wheels now; the damaged one was fetched anew.
    rewritten = {"index.html", "wheels/index.html", MANIFEST, f"wheels/{damaged.name}"}
    assert {name for name in after if before.get(name) != after[name]} <= rewritten | {"course.zip"}
    assert (small / "my.txt").read_text(encoding="utf-8") == "mine"
    kit = read_kit(str(small))
    assert list(kit.problems()) == []
    assert kit.unknown() == ["my.txt", "wheels/my notes.txt"]


@pytest.mark.parametrize("there", [
    {"index.html": "my site"}, {"manifest.json": '{"name": "my app"}'}, {"photos/a.jpg": "mine"},
    {"manifest.json": '{"files": {"thesis.txt": {"size": 4}}}', "thesis.txt": "mine"},
])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, few, there):
    folder = tmp_path / "kit"
    for name, text in there.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(CourseError, match=r"kit holds something else than a kit\. Build into a new or an empty folder"):
        build(folder, ["tiny-phi3"], ["linux"], ["3.13"])
    assert {name: (folder / name).read_text(encoding="utf-8") for name in files(folder)} == there


@pytest.mark.parametrize("folder", [ROOT, ROOT.parent, ROOT / "data", ROOT / "data" / "models"])
def test_a_kit_is_not_built_over_the_course_or_its_models(folder):
    with pytest.raises(CourseError, match="holds the course or its models"):
        build(folder, ["tiny-phi3"])


def test_a_manifest_cannot_make_a_build_remove_what_is_outside(small, few, tmp_path):
    (tmp_path / "precious").write_text("mine", encoding="utf-8")
    change_manifest(small, lambda manifest: manifest["files"].update(
        {"../precious": {"size": 4, "sha256": sha256(tmp_path / "precious")}}))
    with pytest.raises(CourseError, match="something else than a kit"):
        build(small, ["tiny-phi3"], ["linux"], ["3.13"])
    assert (tmp_path / "precious").exists()


def test_the_course_in_a_kit_is_all_of_it_and_nothing_else():
    ours = {path.relative_to(ROOT).as_posix() for path in kit_build.course_files()}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()} <= ours
    assert not [name for name in ours if name.startswith(("data/models/", "build/", ".venv/"))]


def test_a_model_that_is_not_in_the_catalogue_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(CourseError, match="no model called 'phi-9'"):
        build(tmp_path / "kit", ["tiny-phi3", "phi-9"])
    assert not (tmp_path / "kit").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "kit").write_text("mine", encoding="utf-8")
    with pytest.raises(CourseError, match="cannot be written as a folder"):
        build(tmp_path / "kit", ["tiny-phi3"])


def test_two_builds_do_not_write_into_one_folder(small, few):
    from filelock import FileLock

    with FileLock(small / ".lock"), pytest.raises(CourseError, match="Another build is at work"):
        build(small, ["tiny-phi3"])


@pytest.fixture
def tiny_disk(tmp_path):
    """Return a function that runs a command with a disk of its own in ``folder``."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def run(size, command):
        script = f"mount -t tmpfs -o size={size} tmpfs '{folder}' && exec \"$@\""
        return subprocess.run(["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", *map(str, command)],
                              cwd=ROOT, capture_output=True, text=True, encoding="utf-8")

    if not shutil.which("unshare") or run("1m", ["true"]).returncode:
        pytest.skip("needs Linux with user namespaces to mount a disk of its own")
    return folder, run


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(tiny_disk):
    folder, run = tiny_disk
    result = run("9m", [*COMMAND, "build", folder / "kit", "--model", "tiny-phi3"])
    assert result.returncode == 1, result.stdout + result.stderr
    assert "has 9 MB free, and the rest of the kit takes about" in result.stderr
    assert "Fetching" not in result.stdout


def test_a_disk_that_fills_up_is_an_error_that_says_so(tiny_disk, few):
    folder, run = tiny_disk
    code = ("import sys; from pathlib import Path; from helpers import CourseError, kit_build, kit_wheels;"
            "kit_wheels.CONSTRAINTS = Path(sys.argv[1]); kit_build.WHEELS_MEGABYTES = 0\n"
            "try: kit_build.build(Path(sys.argv[2]), ['tiny-phi3'], ['windows'], ['3.13'])\n"
            "except CourseError as error: print(error)")
    result = run("2m", [sys.executable, "-c", code, few, folder / "kit"])
    assert "The disk is full: " in result.stdout, result.stdout + result.stderr
    assert "what is finished stays." in result.stdout


# --- checking ---------------------------------------------------------------------------------


def change_manifest(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize(("damage", "says"), [
    ("changed", "has been changed: its sha256 is another."), ("truncated", "has 100 bytes, and "),
    ("missing", "is missing")])
@pytest.mark.parametrize("over_http", [False, True])
def test_check_names_a_file_that_is_not_as_it_was_built(small, damage, says, over_http, capsys):
    name = "models/tiny-phi3/onnx/model.onnx.data"
    if damage == "changed":
        (small / name).write_bytes(bytes((small / name).stat().st_size))
    elif damage == "truncated":
        (small / name).write_bytes((small / name).read_bytes()[:100])
    else:
        (small / name).unlink()
    with web_server(small) if over_http else contextlib.nullcontext(str(small)) as address:
        assert check(address) == 1
    printed = capsys.readouterr().out
    assert f"FAIL  {name} {says}" in printed
    assert printed.count("FAIL") == 1
    assert ("Tell whoever serves it" if over_http else "Build it again: python -m helpers kit build") in printed


def test_check_names_a_file_that_is_the_users_and_does_not_fail(small, capsys):
    (small / "notes.txt").write_text("mine", encoding="utf-8")
    assert check(str(small)) == 0
    assert "unknown: notes.txt is no part of the kit" in capsys.readouterr().out


# --- serving ----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="a symbolic link takes rights there")
def test_a_link_that_leads_out_of_a_kit_is_named_and_not_served(small, tmp_path, capsys):
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (small / "link.txt").symlink_to(tmp_path / "secret")
    change_manifest(small, lambda manifest: manifest["files"].update(
        {"link.txt": {"size": 6, "sha256": sha256(tmp_path / "secret")}}))
    assert check(str(small)) == 1
    assert "FAIL  link.txt lies outside of the kit's folder, behind a link." in capsys.readouterr().out
    with pytest.raises(CourseError, match=r"is not whole: link\.txt lies outside"):
        kit_serve.serve(small, "127.0.0.1", 0)


def test_the_server_gives_what_the_manifest_lists_and_nothing_else(small, tmp_path):
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (small / "notes.txt").write_text("secret", encoding="utf-8")
    course = (small / "course.zip").read_bytes()
    with served(small) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)

        def ask(path, method="GET", **headers):
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer, answer.read()

        for path in ("/../secret", "/%2e%2e/secret", "/..%2fsecret", "/wheels/../../secret", "/%2e%2e%5csecret",
                     f"/{quote(str(tmp_path))}/secret", f"//{quote(str(tmp_path))}/secret",
                     "/notes.txt", "/.lock", "/wheels",
                     "/models/", "/nothing", "/wheels/index.html/", "/%00", "/%ff"):
            answer, body = ask(path)
            assert (path, answer.status) == (path, 404)
            assert b"secret" not in body
            assert str(tmp_path).encode() not in body
            assert b"Traceback" not in body
        assert ask("/")[1] == (small / "index.html").read_bytes()
        assert ask("/wheels/")[1] == ask("/wheels/index.html")[1] == (small / "wheels" / "index.html").read_bytes()
        assert json.loads(ask("/manifest.json")[1])["complete"] is True
        assert ask("/course.zip")[1] == course
        answer, body = ask("/course.zip", Range="bytes=100-")
        assert (answer.status, body) == (206, course[100:])
        answer, body = ask("/course.zip", "HEAD")
        assert (answer.status, int(answer.headers["content-length"]), body) == (200, len(course), b"")
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask("/course.zip", method)[0].status == 405
        assert "uvicorn" not in str(answer.headers).lower()


def test_many_participants_read_at_once(small):
    name = "/models/tiny-phi3/transformers/model.safetensors"
    good = sha256(small / name[1:])
    found = []

    def read(url):
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        connection.request("GET", name)
        found.append(hashlib.sha256(connection.getresponse().read()).hexdigest())

    with served(small) as url:
        threads = [threading.Thread(target=read, args=[url]) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [good] * 40


def test_serve_says_when_its_port_is_taken_and_when_a_file_is_missing(small, python):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = python("-m", "helpers", "kit", "serve", small, "--port", port)
    assert result.returncode == 1
    assert f"Port {port} is taken." in result.stderr
    assert f"--port {port + 1}" in result.stderr
    (small / "course.zip").unlink()
    result = python("-m", "helpers", "kit", "serve", small)
    assert result.returncode == 1
    assert "is not whole: course.zip is missing." in result.stderr
    assert "Build it again: python -m helpers kit build" in result.stderr


def test_serve_tells_how_to_reach_the_room_and_what_participants_type(small):
    for host, says in (("127.0.0.1", "--host 0.0.0.0"), ("0.0.0.0", "Participants open that address.")):
        with subprocess.Popen([*COMMAND, "serve", small, "--host", host, "--port", str(free_port())], cwd=ROOT,
                              stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
            lines = [process.stdout.readline() for _ in range(2)]
            while says not in lines[-1]:
                assert lines[-1], lines
                lines.append(process.stdout.readline())
            process.terminate()
        assert any(line.startswith("  http://") for line in lines)
        assert not any("http://0.0.0.0" in line for line in lines)


# --- set-up from a kit that is not right --------------------------------------------------------


@pytest.fixture
def empty(small):
    """Return a kit whose page of wheels has none."""
    for wheel in (small / "wheels").glob("*.whl"):
        wheel.unlink()
    page = small / "wheels" / "index.html"
    page.write_text("<!DOCTYPE html><html><body></body></html>", encoding="utf-8")
    change_manifest(small, lambda manifest: manifest.update(
        files={name: entry for name, entry in manifest["files"].items() if not name.endswith(".whl")},
        platforms=["windows"]))
    return small


@pytest.fixture
def course(built, tmp_path):
    """Return the course as a participant unpacks it."""
    with zipfile.ZipFile(built / "course.zip") as zipped:
        zipped.extractall(tmp_path)
    return tmp_path / "slm-mlflow-course"


def list_wheel(kit, wheel, digest):
    """Put a wheel into a kit and its page."""
    shutil.copy(wheel, kit / "wheels")
    (kit / "wheels" / "index.html").write_text(
        f'<!DOCTYPE html><html><body><a href="{wheel.name}#sha256={digest}">{wheel.name}</a></body></html>',
        encoding="utf-8")


@pytest.mark.parametrize(("over_http", "lacks"), [(True, "setuptools"), (False, "accelerate")])
def test_a_wheel_that_the_kit_lacks_is_taken_from_nowhere_else(empty, course, big, over_http, lacks):
    if lacks != "setuptools":
        (wheel,) = (big / "wheels").glob("setuptools-*.whl")
        list_wheel(empty, wheel, sha256(wheel))
    with web_server(empty) if over_http else contextlib.nullcontext(str(empty)) as address:
        # What the kit lacks, the first would have; with the second, pip would take no wheel at all.
        result = user(course, "setup", COURSE_KIT=address, PIP_FIND_LINKS=(big / "wheels").as_uri(),
                      PIP_NO_BINARY=":all:")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "The kit has no wheel of {} for Python {}.{} on ".format(lacks, *sys.version_info[:2]) in result.stderr
    assert "--platform windows " in result.stderr.replace("windows linux", "windows ")
    assert "Traceback" not in result.stderr


def test_a_changed_wheel_is_not_installed(empty, course, big):
    (wheel,) = (big / "wheels").glob("setuptools-*.whl")
    list_wheel(empty, wheel, "0" * 64)
    result = user(course, "setup", COURSE_KIT=str(empty))
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"A wheel of the kit {empty} is not as it was built: setuptools" in result.stderr.replace("\n       ", " ")


def test_a_kit_that_stops_answering_is_named(built, course):
    with web_server(built, gone=["/wheels/index.html"]) as url:
        result = user(course, "setup", COURSE_KIT=url)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"error: The kit {url} has stopped answering." in result.stderr


def test_a_kit_that_has_no_answer_is_named_before_anything_is_set_up(course):
    result = user(course, "setup", COURSE_KIT=NOBODY)
    assert result.returncode == 1
    assert f"error: The kit {NOBODY} has no answer: " in result.stderr
    assert not (course / ".venv").exists()
