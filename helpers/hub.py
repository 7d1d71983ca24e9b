"""Fetches from the Hugging Face Hub the few files that one track needs of a repository, and checks each.

``helpers.models`` runs this in a process of its own (``python -m helpers.hub``): the Hub's client reads once,
at its import, whether it may use the network, and in the rest of the course it may not. It loads no model.
"""

import hashlib
import json
import re
import ssl
import sys
import time
from datetime import datetime
from pathlib import Path, PurePosixPath

import httpx
import tenacity
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import hf_hub_url, http_get
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from helpers.errors import CourseError
from helpers.machine import check_disk, check_memory, memory_needed

WEB = "https://huggingface.co"
# Formats that run code of their author's when they are loaded, or that transformers turns into such.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What a tokenizer, a configuration or a reader needs. No *.py: the course runs no code of a repository.
SMALL = (".json", ".jinja", ".txt", ".model", "README.md", "LICENSE")
# Bytes that a cut connection may lose. The client's own blocks are of 10 MB: a minute of a bad network.
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
BUSY = (429, 500, 502, 503, 504)
TRIES, LONGEST_WAIT = 5, 60  # seconds


def download(track, repo, revision, folder, onnx_folder=None):
    """Bring the files of one track into ``folder``; what is there already and right, stays.

    Parameters
    ----------
    track : str
        ``"transformers"`` for safetensors, ``"onnx"`` for the folder of one ONNX model.
    repo : str
        Such as ``"microsoft/Phi-3-mini-4k-instruct"``.
    revision : str or None
        A commit, branch or tag; None for the repository's default branch.
    folder : pathlib.Path
        Exists. For ``"onnx"`` the files stand in it without their folder in the repository.
    onnx_folder : str, optional
        The folder in the repository; left out, the one for the CPU is looked for.

    Returns
    -------
    dict
        ``commit``, ``licence``, ``task``, ``context_length``, ``parameters``, ``bytes`` and ``sha256`` by file.

    Raises
    ------
    CourseError
        All that can go wrong between here and a good folder.
    """
    info = _retried(lambda: HfApi().model_info(repo, revision=revision, files_metadata=True))
    # A name goes to this disk: nothing in it may lead out of the folder, on Windows either.
    listing = {sibling.rfilename: sibling for sibling in info.siblings if not re.search(r"[\\:]", sibling.rfilename)}
    if info.pipeline_tag not in (None, "text-generation"):
        raise CourseError(f"{repo} is a model for {info.pipeline_tag}, and the course runs text-generation.",
                          "Choose an instruct model.")
    prefix = ""
    if track == "onnx":
        prefix = _onnx_folder(repo, listing, onnx_folder) + "/"
        prefix = "" if prefix == "./" else prefix
        wanted = [name for name in listing if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
                  and name.endswith((*SMALL, ".onnx", ".data"))]
        first = [name for name in wanted if name.endswith(SMALL)]
    else:
        _refuse_without_safetensors(repo, listing)
        wanted = first = [name for name in listing if "/" not in name and name.endswith(SMALL)]
    files = _Files(repo, info.sha, listing, folder, prefix)
    # The small files come first: they tell whether the large ones are worth the wait.
    files.fetch(first, _Progress(None))
    _refuse_without_template(repo, folder)
    if track == "transformers":
        wanted = [*first, *_safetensors(repo, listing, folder)]
    facts = _facts(info, folder, [name.removeprefix(prefix) for name in wanted])
    facts["bytes"] = sum(listing[name].size for name in wanted)
    check_memory(repo, memory_needed(facts["bytes"]))
    check_disk(repo, sum(files.missing(name) for name in wanted) / 1e6, folder)
    files.fetch(wanted, _Progress(facts["bytes"]))
    files.keep_only(wanted)
    return facts | {"sha256": files.sha256}


def _facts(info, folder, names):
    """Return what a repository says about its model, as far as the course shows it."""
    config = _read_json(folder / "config.json")
    genai = _read_json(folder / "genai_config.json").get("model", {})
    licence = (info.card_data or {}).get("license")
    return {
        "commit": info.sha,
        "licence": licence if isinstance(licence, str) else "not stated",
        "task": "text-generation",
        "context_length": genai.get("context_length") or config.get("max_position_embeddings"),
        "parameters": info.safetensors.total if info.safetensors and "config.json" in names else None,
    }


class _Files:
    """The files of one commit, and the folder that they go to.

    Parameters
    ----------
    repo, commit : str
    listing : dict of str to huggingface_hub.hf_api.RepoSibling
        With sizes and hashes.
    folder : pathlib.Path
    prefix : str
        What to leave out at the start of a name.
    """

    def __init__(self, repo, commit, listing, folder, prefix):
        self.repo, self.commit, self.listing, self.folder, self.prefix = repo, commit, listing, folder, prefix
        self.sha256 = {}

    def path(self, name):
        return self.folder / name.removeprefix(self.prefix)

    def incomplete(self, name):
        """Return the file that a download goes on in. Its name holds the hash: other content, other file."""
        sibling = self.listing[name]
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        return self.path(name).with_name(f"{self.path(name).name}.{digest[:12]}.incomplete")

    def missing(self, name):
        """Return the bytes that are still to come."""
        there = next((path.stat().st_size for path in (self.path(name), self.incomplete(name)) if path.exists()), 0)
        return max(self.listing[name].size - there, 0)

    def fetch(self, names, progress):
        """Bring each file that is not here yet, one after the other, and check what came."""
        for name in names:
            path = self.path(name)
            if path.name not in self.sha256 and not (path.exists() and self._is_right(name)):
                self._fetch_one(name, progress)
            progress.finished(self.listing[name].size)

    def keep_only(self, names):
        """Remove what an earlier try left behind."""
        wanted = {self.path(name) for name in names}
        for path in self.folder.iterdir():
            if path not in wanted:
                path.unlink()

    def _fetch_one(self, name, progress):
        sibling, incomplete = self.listing[name], self.incomplete(name)
        url = hf_hub_url(self.repo, name, revision=self.commit)

        def get():
            # Opened anew for each try, so that it goes on where the last one stopped.
            if incomplete.exists() and incomplete.stat().st_size > sibling.size:
                incomplete.unlink()
            with incomplete.open("ab") as file:
                http_get(url, file, resume_size=file.tell(), expected_size=sibling.size,
                         headers=build_hf_headers(), tqdm_class=progress.bar)

        _retried(get)
        incomplete.replace(self.path(name))
        if not self._is_right(name):
            self.path(name).unlink()
            raise CourseError(
                f"{name} of {self.repo} came with other content than the Hub lists: its hash is another.",
                "Run this again; if it stays, something between you and the Hub changes files: ask who runs the proxy.")

    def _is_right(self, name):
        """Tell whether a file has the hash that the Hub lists: sha256, or git's for what git itself keeps."""
        sibling, path = self.listing[name], self.path(name)
        if path.stat().st_size != sibling.size:
            return False
        digest = hashlib.sha256()
        blob = hashlib.sha1(b"blob %d\0" % sibling.size, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                if not sibling.lfs:
                    blob.update(block)
        self.sha256[path.name] = digest.hexdigest()
        return digest.hexdigest() == sibling.lfs.sha256 if sibling.lfs else blob.hexdigest() == sibling.blob_id


class _Progress:
    """Prints ``Progress done of total`` now and then, for the one bar of ``helpers.models``.

    Parameters
    ----------
    total : int or None
        Bytes; None prints nothing.
    """

    def __init__(self, total):
        self.total, self.done, self.printed = total, 0, 0.0
        progress = self

        class Bar(tqdm):
            """What the Hub's client paints, as a line of ours."""

            def __init__(self, *args, **options):
                super().__init__(*args, **options | {"disable": True})
                self.arrived = options.get("initial", 0)

            def update(self, n=1):
                self.arrived += n
                progress.show(progress.done + self.arrived)

        self.bar = Bar

    def finished(self, size):
        self.done += size
        self.show(self.done)

    def show(self, done):
        if self.total and (time.monotonic() - self.printed > 0.2 or done == self.total):
            self.printed = time.monotonic()
            print(f"Progress {done} of {self.total}", flush=True)


# --- which files ----------------------------------------------------------------------------


def _onnx_folder(repo, listing, folder):
    """Return the folder of the ONNX model for the CPU; it has a ``genai_config.json``."""
    folders = sorted(str(PurePosixPath(name).parent) for name in listing
                     if PurePosixPath(name).name == "genai_config.json")
    if folder is None and not folders:
        raise CourseError(f"{repo} has no ONNX files for onnxruntime-genai.",
                          f"Run python -m helpers prepare --model hub:{repo} --export to make them here; "
                          f"or try hub:{repo}-onnx, where some authors keep them.")
    on_cpu = [name for name in folders if "cpu" in name.lower()] or [name for name in folders if name == "."]
    # acc-level-4: int8 arithmetic, the fastest on a CPU; where there are several, the last of the names.
    folder = folder or next(iter(sorted(on_cpu, key=lambda name: ("int4" in name, name), reverse=True)), None)
    if folder not in folders:
        raise CourseError(f"{repo} has no ONNX files for the CPU: it has {', '.join(folders) or 'none at all'}.",
                          f"Run python -m helpers prepare --model hub:{repo.removesuffix('-onnx')} --export to make "
                          "them here.")
    return folder


def _refuse_without_safetensors(repo, listing):
    root = [name for name in listing if "/" not in name]
    if "model.safetensors" in root or "model.safetensors.index.json" in root:
        return
    if any(name.endswith(PICKLES) for name in root):
        raise CourseError(f"{repo} has its weights only as pickles, and a pickle can run any code while it is loaded.",
                          "Choose a repository with model.safetensors; some have it in a branch: "
                          f"hub:{repo}@refs/pr/1, for one.")
    raise CourseError(f"{repo} has no model.safetensors, so track A has nothing to load.",
                      f"Choose the repository that {repo} was made from, or look at {WEB}/{repo}/tree/main.")


def _safetensors(repo, listing, folder):
    """Return the names of the weights, and insist that the Hub has each."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_read_json(index).get("weight_map", {}).values())) if index.exists() else ["model.safetensors"]
    for name in names:
        if name not in listing or "/" in name:
            raise CourseError(f"{repo} says that it has {name}, and the Hub has no such file.",
                              f"Look at {WEB}/{repo}/tree/main, and choose another revision: hub:{repo}@REVISION.")
    return names


def _refuse_without_template(repo, folder):
    """Raise an error unless a tokenizer's folder has a chat template."""
    # The user's own template stands in the finished folder, beside this one.
    own = folder.with_name(folder.name.split(".")[0]) / "chat_template.jinja"
    if (folder / "chat_template.jinja").exists() or own.exists() \
            or "chat_template" in _read_json(folder / "tokenizer_config.json"):
        return
    raise CourseError(
        f"{repo} has no chat template: nothing says how a conversation becomes its prompt, and llm/v1/chat needs that.",
        f"Choose an instruct model, or write the template that its authors describe to {own}, and run this again.")


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# --- what goes wrong on the way ---------------------------------------------------------------


def _is_passing(error):
    return isinstance(error, HfHubHTTPError) and error.response.status_code in BUSY


def _wait(state):
    """Return the seconds that the Hub asks for, or twice as many as the last time."""
    asked = state.outcome.exception().response.headers.get("Retry-After", "")
    return min(int(asked) if asked.isdigit() else 2 ** (state.attempt_number - 1), LONGEST_WAIT)


def _retried(call):
    """Call, and call again where the Hub is busy; it says when it will not be."""
    return tenacity.Retrying(retry=tenacity.retry_if_exception(_is_passing), wait=_wait,
                             stop=tenacity.stop_after_attempt(TRIES), reraise=True)(call)


def explain(error, repo):
    """Return the CourseError that says in two sentences what stopped a download, or None.

    Parameters
    ----------
    error : Exception
    repo : str
    """
    endpoint = constants.ENDPOINT
    again = "Check the network and the proxy (HTTPS_PROXY), and run this again; what has arrived stays."
    if isinstance(error, CourseError):
        return error
    if isinstance(error, GatedRepoError):
        return CourseError(f"{repo} is gated: its owner wants you to accept a licence first.",
                           f"Accept it on {WEB}/{repo}, make a read token on {WEB}/settings/tokens, "
                           "set HF_TOKEN to it, and run this again.")
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return CourseError(f"The Hub has no repository called {repo}, or it is private.",
                           f"Look it up on {WEB} and write it as there, such as hub:microsoft/Phi-3-mini-4k-instruct; "
                           "for a private one, set HF_TOKEN.")
    if isinstance(error, RevisionNotFoundError):
        return CourseError(f"{repo} has no such revision.",
                           f"Choose a branch, tag or commit of {WEB}/{repo}/tree/main, or leave @REVISION out.")
    if isinstance(error, RemoteEntryNotFoundError):
        name = re.search(r"/resolve/[^/]+/(\S+?)\.?$", str(error), re.MULTILINE)
        return CourseError(f"The Hub lists {name[1] if name else 'a file'} of {repo} and does not have it.",
                           f"Run this again later, or choose another revision: hub:{repo}@REVISION.")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return CourseError(f"The Hub refuses {repo} to this token.",
                               f"Make a read token on {WEB}/settings/tokens and set HF_TOKEN to it, or unset HF_TOKEN.")
        return CourseError(f"The Hub answers {status} for {repo}, also after {TRIES} tries.",
                           "Run this again later; what has arrived stays.")
    certificate = _certificate_trouble(error)
    if certificate:
        return CourseError(
            f"The certificate of {endpoint} is not accepted: {certificate}; this machine's clock says "
            f"{datetime.now():%Y-%m-%d %H:%M}.",
            "Set the clock if it is off; if it is right, a proxy opens the connection: "
            "set SSL_CERT_FILE to the certificate that its owner gives you.")
    if isinstance(error, httpx.ProxyError):
        return CourseError(f"The proxy did not connect to {endpoint}: {error}.",
                           "Correct HTTPS_PROXY, or unset it where no proxy is needed.")
    if isinstance(error, httpx.TransportError):
        return CourseError(f"The network or the Hub, {endpoint}, has no answer.", again)
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) \
            or (isinstance(error, OSError) and "Consistency check failed" in str(error)):
        return CourseError(f"Something between you and {endpoint} answers in its place, such as a proxy's login page.",
                           "Log in to the network in a browser, or set HTTPS_PROXY, and run this again.")
    return None


def _certificate_trouble(error):
    """Return OpenSSL's reason where a certificate was refused, else None."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return None


def main(arguments):
    """Download for the process that started this one, and print facts or an error as a line of JSON."""
    track, repo, revision, folder, onnx_folder = arguments
    try:
        result = {"facts": download(track, repo, revision or None, Path(folder), onnx_folder or None)}
    except Exception as error:
        known = explain(error, repo)
        if known is None:
            raise
        result = {"error": [known.what, known.fix]}
    print("\n" + json.dumps(result), flush=True)
    return int("error" in result)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
