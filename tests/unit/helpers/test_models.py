"""Model set-up: what is made, when it is refused, and what bad luck leaves behind.

Run: python -m helpers test tests/unit/helpers/test_models.py
"""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from support import ROOT, refuses
from support.prepared import check_entry, names
from support.steps import CONFIG, entry_of, stand_in

from helpers import CourseError, prepare_model, read_catalogue
from helpers.files import locked, sha256
from helpers.models.catalogue import find_entry
from helpers.models.convert import tiny_phi3
from helpers.models.folders import read_receipt, write_receipt
from helpers.models.prepare import _disk_errors, cache_state, cached_models, exact_context_length
from helpers.models.space import disk_errors, existing
from helpers.models.steps import call_in_subprocess, is_of_the_disk, run_program, run_step
from helpers.paths import model_cache


def snapshot(folder):
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


# --- the models that are here -------------------------------------------------------------------


def test_the_converter_writes_the_same_tiny_model_on_every_machine(tiny, tmp_path):
    tiny_phi3(tmp_path, 1, tiny.entry.context_length)
    written = tiny.transformers_dir
    assert names(tmp_path) == names(written) - {"README.md"}
    for name in names(tmp_path):
        assert sha256(tmp_path / name) == sha256(written / name), name


def test_the_entry_tells_the_truth_about_the_folders(tiny):
    check_entry(tiny)


# --- prepare_model ------------------------------------------------------------------------------


@pytest.fixture
def words(cache, monkeypatch):
    """Let prepare_model make models of a few words; return its cache."""
    monkeypatch.delenv("COURSE_KIT", raising=False)
    monkeypatch.setattr("helpers.models.prepare.find_entry", entry_of)
    monkeypatch.setattr("helpers.models.space.free_memory", lambda: 10**6)
    stand_in(monkeypatch)
    return cache


@pytest.mark.parametrize(
    ("track", "folders"),
    [
        (None, ["transformers", "onnx"]),
        ("transformers", ["transformers", None]),
        ("onnx", [None, "onnx"]),
    ],
)
def test_a_track_gets_what_it_needs(words, track, folders):
    prepared = prepare_model("words", track)
    assert [prepared.transformers_dir, prepared.onnx_dir] == [
        folder and words / "words" / folder for folder in folders
    ]
    assert set(prepared.sources) == {folder for folder in folders if folder}
    assert (words / "words" / "onnx").exists() == (track != "transformers")


def test_a_model_that_only_the_hub_knows_tells_what_came_of_itself(words, monkeypatch):
    facts = {
        "transformers": {
            "commit": "c1",
            "licence": "mit",
            "task": "text-generation",
            "context_length": 4096,
            "parameters": 7,
            "bytes": 3_000_000_000,
        },
        "onnx": {
            "commit": "c2",
            "licence": "other",
            "task": "text-generation",
            "context_length": 2048,
            "parameters": None,
            "bytes": 1_000_000_000,
        },
    }
    monkeypatch.setattr(
        "helpers.models.sources.call_in_subprocess",
        lambda title, module, order: facts[order["track"]] | {"files": []},
    )
    monkeypatch.setattr("helpers.models.prepare.find_entry", find_entry)
    monkeypatch.setattr("helpers.models.prepare.exact_context_length", lambda folder: math.inf)
    entry = prepare_model("hub:org/name").entry
    assert (entry.name, entry.licence, entry.parameters, entry.context_length) == (
        "hub:org/name",
        "mit",
        7,
        4096,
    )
    with refuses("track-unknown"):
        prepare_model("hub:org/name", "ONNX")
    # Both folders; two copies of the larger.
    assert (entry.download, entry.disk, entry.memory) == (4000, 4000, 7000)
    assert prepare_model("hub:org/name", "onnx").entry.disk == 1000
    # One of the catalogue keeps its own figures, but for the memory.
    monkeypatch.setattr("helpers.models.prepare.find_entry", entry_of)
    entry = prepare_model("far", "onnx").entry
    assert (entry.licence, entry.disk, entry.memory) == ("MIT", 2, 3000)


@pytest.mark.parametrize(
    ("window", "longest"),
    [
        # What the builder of onnxruntime-genai 0.18 writes of Phi-3-mini-4k.
        (
            {"window_size": 2047, "slide_key_value_cache": False, "layers": [], "cache_slack": 0},
            2047,
        ),
        ({"window_size": 2047}, 2047),
        ({"window_size": 512, "layers": [0, 1, 3]}, math.inf),  # the graph has the window in these
        ({"window_size": -1, "layers": []}, math.inf),
        ({"layers": []}, math.inf),
        (None, math.inf),
    ],
)
def test_a_window_that_the_graph_lacks_bounds_the_prompt_and_its_answer(tmp_path, window, longest):
    decoder = {"filename": "model.onnx"} | ({"sliding_window": window} if window else {})
    (tmp_path / "genai_config.json").write_text(
        json.dumps({"model": {"decoder": decoder}}), encoding="utf-8"
    )
    assert exact_context_length(tmp_path) == longest


def test_the_entry_of_track_b_has_the_bound_and_that_of_track_a_has_not(words, monkeypatch):
    for bound, track, length in (
        (20, "onnx", 20),
        (20, None, 20),
        (20, "transformers", 64),
        (100, "onnx", 64),
    ):
        monkeypatch.setattr(
            "helpers.models.prepare.exact_context_length", lambda folder, bound=bound: bound
        )
        assert prepare_model("words", track).entry.context_length == length


def test_what_was_exported_once_need_not_be_asked_for_again(words, monkeypatch):
    def download(title, module, order):
        files = {"model.safetensors": b"words", "config.json": CONFIG}
        for name, content in files.items():
            (Path(order["partial"]) / name).write_bytes(content)
        return {
            "commit": "c1",
            "bytes": 5,
            "files": list(files),
        }

    monkeypatch.setattr("helpers.models.sources.call_in_subprocess", download)
    prepare_model("far", export=True)
    assert cached_models() == ["hub:org/far"]
    kept = snapshot(words)
    for track in (None, "onnx"):
        assert (
            prepare_model("far", track).sources["onnx"] == "org/far@c1, exported with int8 weights"
        )
    assert snapshot(words) == kept


def test_a_prepared_model_is_not_touched_again(filled_cache):
    before = snapshot(filled_cache)
    prepare_model("tiny-phi3")
    assert snapshot(filled_cache) == before


def test_a_damaged_model_is_found_and_made_anew(words):
    prepare_model("words")
    good = snapshot(words)
    (words / "words" / "onnx" / "model.onnx").write_bytes(b"?")
    assert cache_state("words") == "damaged"
    prepare_model("words")
    assert cache_state("words") == "ready"
    assert {name for name, changed in snapshot(words).items() if good[name] != changed} == {
        "words/onnx/model.onnx",
        "words/onnx/genai_config.json",
        "words/onnx.receipt.json",
    }


def test_a_clock_that_was_wrong_when_a_model_was_made_does_no_harm(filled_cache):
    for path in (filled_cache / "tiny-phi3").rglob("*"):
        os.utime(path, (4_000_000_000, 4_000_000_000))  # the year 2096
    before = sha256(filled_cache / "tiny-phi3" / "onnx" / "model.onnx.data")
    assert prepare_model("tiny-phi3").onnx_dir.is_dir()
    assert cache_state("tiny-phi3") == "ready"
    assert sha256(filled_cache / "tiny-phi3" / "onnx" / "model.onnx.data") == before


def test_an_unknown_model_is_refused_with_the_names(cache):
    with refuses("model-unknown") as refusal:
        prepare_model("phi-9")
    assert "'phi-9'" in refusal.value.what
    assert "tiny-phi3, smollm2-135m, phi" in refusal.value.fix
    assert not cache.exists()


def test_what_is_in_the_cache_is_told_without_making_anything(words):
    assert cached_models() == []
    assert cache_state("words") == "not prepared"
    assert not words.exists()
    prepare_model("tiny-phi3", "transformers")
    assert cache_state("tiny-phi3") == "not prepared"  # one of two folders that belong together
    with locked(words / "tiny-phi3", lambda: None):
        assert cache_state("tiny-phi3") == "being prepared"
    assert cached_models() == ["tiny-phi3"]


def test_a_folder_that_an_interruption_left_mixed_is_not_ready(words):
    prepare_model("words")
    folder = words / "words" / "onnx"
    write_receipt(folder, read_receipt(folder) | {"recipe": None})
    assert cache_state("words") == "not prepared"


def test_a_repository_is_ready_with_the_files_of_one_track(words, monkeypatch):
    monkeypatch.setattr(
        "helpers.models.sources.call_in_subprocess",
        lambda title, module, order: {
            "commit": "c1",
            "licence": "mit",
            "task": "text-generation",
            "context_length": 1,
            "parameters": 1,
            "bytes": 1,
            "files": [],
        },
    )
    monkeypatch.setattr("helpers.models.prepare.find_entry", find_entry)
    monkeypatch.setattr("helpers.models.prepare.exact_context_length", lambda folder: math.inf)
    for name in ("hub:org/name", "hub:org/name@v1"):
        prepare_model(name, "onnx")
        assert cache_state(name) == "ready"
    (words / "somebody's").mkdir()
    (words / "somebody's" / "x.receipt.json").write_text(
        '{"recipe": {"hub": "x"}, "files": {}}', encoding="utf-8"
    )
    assert cached_models() == ["hub:org/name", "hub:org/name@v1"]


def test_where_another_process_prepares_a_model_it_is_waited_for(words, capsys):
    (words / "words").mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path; from helpers.files import locked\n"
        "with locked(Path(sys.argv[1]), lambda: None): print('in', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, words / "words"],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        process.stdout.readline()

        def release(text, **options):
            said.append(text)
            process.stdin.write("\n")
            process.stdin.flush()

        said = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.print", release)
            prepare_model("words")
    assert said == ["Another process prepares Words; waiting for it."]


# --- too little memory, too little disk ---------------------------------------------------------


def in_a_container(monkeypatch, folder, most, used):
    """Let this process see a container's limit, in bytes, and hold little itself: it has run other tests."""
    folder.mkdir()
    for name, value in (
        ("memory.max", most),
        ("memory.current", used),
        ("memory.stat", "inactive_file 0"),
    ):
        (folder / name).write_text(f"{value}\n")
    monkeypatch.setattr("helpers.models.space.CGROUP", folder)
    monkeypatch.setattr(
        "psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=10**7))
    )


def test_too_little_memory_is_refused_with_the_numbers_and_a_smaller_model(
    cache, tmp_path, monkeypatch
):
    in_a_container(monkeypatch, tmp_path / "cgroup", 11 * 10**8, 10**7)
    with refuses("memory-short") as refusal:
        prepare_model("smollm2-135m")
    assert str(refusal.value) == (
        "SmolLM2-135M-Instruct takes 2,500 MB of memory, and 1,100 MB are free. Close programs, or choose a smaller "
        "model, such as tiny-phi3 (1,000 MB)."
    )
    # Refused before anything was begun.
    assert not [path for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]


def test_too_little_memory_is_refused_before_a_load_too(filled_cache, tmp_path, monkeypatch):
    in_a_container(monkeypatch, tmp_path / "cgroup", 10**9, 2 * 10**8)
    with refuses("memory-short") as refusal:
        prepare_model("tiny-phi3")
    assert "takes 1,000 MB of memory, and 810 MB are free. Close programs." in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "amount"), [("tiny-phi3", "2 MB"), ("hub:org/name", "more space")]
)
def test_a_disk_that_fills_up_on_the_way_is_the_same_error(tmp_path, name, amount):
    with refuses("disk-full") as refusal, _disk_errors(find_entry(name), tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert f" takes {amount} in {tmp_path}, and " in refusal.value.what


REFUSED = CourseError("not-writable", "No.", "Yes.")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "full"),
        (errno.EDQUOT, "full"),
        (errno.EFBIG, "file-too-large"),
        (errno.EACCES, "not-writable"),
        (errno.EPERM, "not-writable"),
        (errno.EROFS, "not-writable"),
        (errno.ENOTDIR, "not-writable"),
        (errno.EEXIST, "not-writable"),
        (errno.EISDIR, "not-writable"),
    ],
)
def test_what_a_disk_refuses_is_said_in_sentences(tmp_path, number, code):
    with (
        refuses(code),
        disk_errors(tmp_path, lambda: CourseError("full", "Full.", "Empty it."), REFUSED),
    ):
        raise OSError(number, "no")


def test_another_error_of_the_disk_stays_what_it_is(tmp_path):
    for number in (errno.EIO, errno.ENOENT):
        with pytest.raises(OSError), disk_errors(tmp_path, lambda: None, REFUSED):
            raise OSError(number, "no")
    with refuses("not-writable"), disk_errors(tmp_path / "gone", lambda: None, REFUSED):
        raise OSError(errno.ENOENT, "no")


def test_a_disk_that_is_not_there_is_named(tmp_path, monkeypatch):
    assert existing(tmp_path / "a" / "b") == tmp_path
    # As of a drive of Windows that is not in.
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with refuses("disk-absent"):
        existing(tmp_path)


def test_a_cache_that_is_a_file_is_an_error_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("mine", encoding="utf-8")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    with refuses("cache-not-writable") as refusal:
        prepare_model("tiny-phi3")
    assert str(tmp_path / "cache" / "tiny-phi3") in refusal.value.what
    assert "COURSE_CACHE" in refusal.value.fix


def test_a_relative_cache_starts_at_the_courses_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_CACHE", "build/cache")
    monkeypatch.chdir(tmp_path)
    assert model_cache() == ROOT / "build" / "cache"


# --- long steps ---------------------------------------------------------------------------------


def step(code):
    return [sys.executable, "-c", code]


def test_a_step_paints_one_bar_from_what_its_program_prints(capsys):
    code = (
        "print('Note for the user: busy'); print('Saving 1/4'); print('Saving 3/4'); print('done')"
    )
    assert run_step("Saving", step(code), r"Saving (\d+)/(\d+)").splitlines()[-1] == "done"
    printed = capsys.readouterr()
    assert "busy" in printed.out.splitlines()
    assert "Saving: 100%" in printed.out
    assert printed.err == ""


def test_a_program_ends_when_whoever_runs_it_is_interrupted():
    def interrupt(text):
        raise KeyboardInterrupt  # as the stop button of a notebook does: to this process alone

    before = psutil.Process().children()
    with pytest.raises(KeyboardInterrupt):
        run_program(
            step("import time; print('here', flush=True); time.sleep(600)"),
            dict(os.environ),
            interrupt,
        )
    assert psutil.Process().children() == before


def test_a_step_that_fails_says_so_with_its_last_line():
    with refuses("step-failed") as refusal:
        run_step("Exporting", step("raise SystemExit('the weights are odd')"))
    assert refusal.value.what == "Exporting failed: the weights are odd."


@pytest.mark.parametrize(
    "code",
    [
        "raise OSError(28, 'No space left on device')",
        "raise SystemExit('I/O error: ... (os error 28)')",
    ],
)
def test_a_disk_that_fills_up_in_a_step_is_an_error_of_the_disk(code):
    with pytest.raises(OSError) as error:
        run_step("Exporting", step(code))
    assert error.value.errno == errno.ENOSPC


def test_a_module_of_ours_answers_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "worker.py").write_text(
        "import os, sys\n"
        "from helpers import CourseError\n"
        "from helpers.models.steps import run_worker\n"
        "def work(order):\n"
        "    print('Progress 1 of 2')\n"
        "    if order.get('errno'): raise OSError(order['errno'], 'no')\n"
        "    if order.get('code'): raise CourseError(order['code'], 'What.', 'Fix.')\n"
        "    return order | {'offline': os.environ['HF_HUB_OFFLINE']}\n"
        "sys.exit(run_worker(work, sys.argv[1]))\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    assert call_in_subprocess("Asking", "worker", {"größe": 1}) == {
        "größe": 1,
        "offline": "0",
    }
    with refuses("odd"):
        call_in_subprocess("Asking", "worker", {"code": "odd"})
    with pytest.raises(OSError) as error:
        call_in_subprocess("Asking", "worker", {"errno": errno.EFBIG})
    assert error.value.errno == errno.EFBIG
    with refuses("step-failed"):
        call_in_subprocess("Asking", "worker", {"errno": errno.EIO})


def test_what_the_disk_refuses_is_told_apart_from_other_errors():
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
        assert is_of_the_disk(OSError(number, "no"))
    for error in (OSError(errno.EIO, "no"), OSError(errno.ECONNRESET, "no"), ValueError("no")):
        assert not is_of_the_disk(error)


def test_the_catalogue_is_read_in_its_order():
    assert list(read_catalogue())[:3] == ["tiny-phi3", "smollm2-135m", "phi-3-mini-4k"]
    assert find_entry("hub:Org/name@refs/pr/1").folder == "hub--Org--name@refs--pr--1"
