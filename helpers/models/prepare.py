"""Prepares a model for the tracks, once: downloads, converts and exports it. No model is loaded here."""

import contextlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from helpers.errors import CourseError
from helpers.files import is_writable, locked
from helpers.models.catalogue import HUB_NAME, TRACKS, CatalogueEntry, find_entry, read_catalogue
from helpers.models.folders import changed_files, read_receipt
from helpers.models.sources import ensure_folder, hub_name, is_from_hub, source_of, was_exported
from helpers.models.space import check_memory, disk_errors, disk_full, memory_needed
from helpers.paths import model_cache


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready for the tracks that were asked for; the folder of another track is None."""

    entry: CatalogueEntry  # context_length is lowered to what the ONNX files support
    transformers_dir: Path | None  # for transformers: safetensors, configuration, tokenizer
    onnx_dir: Path | None  # for onnxruntime_genai: ONNX, genai_config.json, tokenizer
    # Where the files of each track came from, to the commit or the hash: log it with a run.
    sources: dict[str, str]


def prepare_model(name: str, track: str | None = None, export: bool = False) -> PreparedModel:
    """Prepare a model: download, check, convert and export it. Do nothing if it is ready.

    Parameters
    ----------
    name : str
        A name of ``data/models.toml``, or ``hub:org/name`` for a repository of the Hugging Face
        Hub.
    track : str, optional
        ``"transformers"`` or ``"onnx"``, to prepare one track only.
    export : bool, optional
        For a repository of the Hub: make the ONNX files here, from its safetensors.

    Raises CourseError: unknown name, no network, a file with the wrong hash, too little memory, a
    full disk or a read-only cache; a repository of the Hub that a track cannot use.
    """
    entry = find_entry(name)
    if track not in (None, *TRACKS):
        raise CourseError(
            "track-unknown", f"track is {track!r}.", f"Choose one of: {', '.join(TRACKS)}."
        )
    tracks = TRACKS if track is None else (track,)
    home = model_cache() / entry.folder
    facts = {}
    sources = {}
    with _disk_errors(entry, home):
        home.mkdir(parents=True, exist_ok=True)
        with _only_process(home, entry.title):
            for needed in tracks:
                folder = home / needed
                # An export that was asked for once is kept.
                exported = export or (needed == "onnx" and was_exported(entry, folder))
                source = source_of(entry, needed, exported)
                facts[needed] = ensure_folder(source, folder)
                sources[needed] = source.origin(facts[needed])
    entry = _with_facts(entry, facts)
    if "onnx" in tracks:
        longest = min(entry.context_length, exact_context_length(home / "onnx"))
        entry = replace(entry, context_length=longest)
    check_memory(entry.title, entry.memory)  # the next step is to load it
    return PreparedModel(
        entry,
        transformers_dir=home / "transformers" if "transformers" in tracks else None,
        onnx_dir=home / "onnx" if "onnx" in tracks else None,
        sources=sources,
    )


def _only_process(home, title):
    """Let one process at a time prepare a model; a cache that cannot be written needs no lock."""
    if not is_writable(home):
        return contextlib.nullcontext()
    say = f"Another process prepares {title}; waiting for it."
    return locked(home, lambda: print(say, flush=True))


def exact_context_length(folder: Path) -> float:
    """Return for how many tokens an ONNX folder gives the original model's answers; infinity without a limit.

    If all layers of a model have a sliding window, as in Phi-3-mini-4k, its builder makes a cache of
    that size but no window in the graph. Beyond the window the tokens differ from the model's, and 16
    tokens later onnxruntime-genai fails. If the builder lists the layers, graph and cache agree.
    https://github.com/microsoft/onnxruntime-genai/issues/2334
    """
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    window = config.get("model", {}).get("decoder", {}).get("sliding_window") or {}
    size = window.get("window_size") or 0
    return size if size > 0 and not window.get("layers") else math.inf


def _disk_errors(entry, home):
    refused = CourseError(
        "cache-not-writable",
        f"The model cache {home} cannot be written.",
        "Set COURSE_CACHE to a folder that is yours, or make this one writable.",
    )
    return disk_errors(home, lambda: disk_full(entry.title, entry.disk, home), refused)


def _with_facts(entry, facts):
    """Return the entry with the memory for its files and, for a ``hub:`` name, with what its repository says."""
    # An export has the facts of the safetensors that it was made from: they count once.
    sizes = {found["commit"]: found["bytes"] for found in facts.values() if "bytes" in found}
    if not sizes:
        return entry
    if HUB_NAME.fullmatch(entry.name):
        found = next(iter(facts.values()))
        found = {key: found[key] for key in ("licence", "task", "context_length", "parameters")}
        size = round(sum(sizes.values()) / 1e6)
        entry = replace(entry, **found, download=size, disk=size)
    return replace(entry, memory=round(memory_needed(max(sizes.values()))))


def cached_models() -> list[str]:
    """Return the names of all models that have files in the cache, as ``prepare_model`` takes them."""
    names = {}
    catalogue = read_catalogue()
    for receipt in sorted(model_cache().glob("*/*.receipt.json")):
        folder = receipt.with_name(receipt.name.removesuffix(".receipt.json"))
        recipe = read_receipt(folder)["recipe"] or {}
        name = folder.parent.name if folder.parent.name in catalogue else hub_name(recipe)
        if name in catalogue or HUB_NAME.fullmatch(name or ""):
            names[name] = None
    return list(names)


def cache_state(name: str) -> str:
    """Tell whether a model is prepared: all its files are there and have their sizes.

    Returns ``"ready"``, ``"not prepared"``, ``"damaged"``, or ``"being prepared"`` by another
    process.
    """
    entry = find_entry(name)
    home = model_cache() / entry.folder
    if not home.is_dir():
        return "not prepared"
    try:
        with locked(home, _refuse_to_wait) if is_writable(home) else contextlib.nullcontext():
            folders = [
                path.with_name(path.name.removesuffix(".receipt.json"))
                for path in home.glob("*.receipt.json")
            ]
            if any(changed_files(folder) for folder in folders):
                return "damaged"
            parts = {folder.name for folder in folders if read_receipt(folder)["recipe"]}
    except BlockingIOError:
        return "being prepared"
    ready = parts & set(TRACKS) if is_from_hub(entry) else parts >= set(TRACKS)
    return "ready" if ready else "not prepared"


def _refuse_to_wait():
    raise BlockingIOError
