"""Fetches from the Hugging Face Hub the few files that one track needs of a repository, and checks each.

``helpers.models`` runs this in a process of its own (``python -m helpers.hub``): the Hub's client reads once,
at its import, whether it may use the network, and in the rest of the course it may not. It loads no model.
"""

import errno
import hashlib
import json
import os
import re
import ssl
import sys
import threading
import time
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import httpx
import tenacity
import yaml
from huggingface_hub import HfApi, ModelCard, constants
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
SMALL_BYTES = 100_000_000
# Bytes that a cut connection may lose. The client's own blocks are of 10 MB: a minute of a bad network.
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
BUSY = (429, 500, 502, 503, 504)
TRIES, LONGEST_WAIT = 5, 60  # seconds


def download(track, repo, folder, finished, *, revision=None, commit=None, onnx_folder=None):
    """Bring the files of one track into ``folder``, but those that are right in ``folder`` or ``finished`` already.

    Parameters
    ----------
    track : str
        ``"transformers"`` for safetensors, ``"onnx"`` for the folder of one ONNX model.
    repo : str
        Such as ``"microsoft/Phi-3-mini-4k-instruct"``.
    folder, finished : pathlib.Path
        The first exists. For ``"onnx"`` the files stand in it without their folder in the repository.
    revision : str, optional
        A commit, branch or tag; left out, the repository's default branch.
    commit : str, optional
        The commit to look for first.
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
    info = _info(repo, revision, commit)
    listing = _listing(repo, info)
    if info.pipeline_tag not in (None, "text-generation"):
        raise CourseError(f"{repo} is a model for {info.pipeline_tag}, and the course runs text-generation.",
                          "Choose an instruct model.")
    prefix = ""
    if track == "onnx":
        prefix = (_onnx_folder(repo, listing, onnx_folder) + "/").removeprefix("./")
    else:
        _refuse_without_safetensors(repo, listing)
    here = [name for name in listing if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
    files = _Files(repo, info.sha, listing, folder, finished, prefix)
    # The small files come first: they tell whether the large ones are worth the wait.
    first = [name for name in here if name.endswith(SMALL) and listing[name].size <= SMALL_BYTES]
    check_disk(repo, files.missing(first) / 1e6, folder)
    files.fetch(first, _Progress(None))
    _refuse_without_template(repo, files, track)
    wanted = [*first, *(_onnx_files(repo, files, here) if track == "onnx" else _safetensors(repo, files))]
    facts = _facts(repo, info, files)
    facts["bytes"] = sum(listing[name].size for name in wanted)
    check_memory(repo, memory_needed(facts["bytes"]))
    check_disk(repo, files.missing(wanted) / 1e6, folder)
    files.fetch(wanted, _Progress(facts["bytes"]))
    _drop_unreadable_card(files)
    return facts | {"sha256": files.sha256}


def _info(repo, revision, commit):
    """Return what the Hub says of a repository; of its newest commit where the recorded one is gone."""
    try:
        return _retried(lambda: HfApi().model_info(repo, revision=commit or revision, files_metadata=True))
    except RevisionNotFoundError:
        if not commit:
            raise
        return _retried(lambda: HfApi().model_info(repo, revision=revision, files_metadata=True))


def _listing(repo, info):
    """Return the files of a repository by name, those that have a plain name and a hash."""
    listing, seen = {}, set()
    for sibling in info.siblings or []:
        name = sibling.rfilename
        # It becomes a file on this disk: nothing in it may lead out of the folder, or be two files to Linux alone.
        plain = all(re.fullmatch(r"[\w+-][\w.+-]*", part, re.ASCII) for part in name.split("/"))
        if plain and type(sibling.size) is int and (sibling.lfs or sibling.blob_id) and name.lower() not in seen:
            listing[name] = sibling
            seen.add(name.lower())
    return listing


def _facts(repo, info, files):
    """Return what a repository says about its model, as far as the course shows it."""
    config, genai = files.read_json("config.json"), files.read_json("genai_config.json").get("model", {})
    nested = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    lengths = (genai.get("context_length"), config.get("max_position_embeddings"), config.get("n_positions"),
               nested.get("max_position_embeddings"))
    context_length = next((length for length in lengths if type(length) is int and length > 0), None)
    if context_length is None:
        raise CourseError(f"{repo} does not say how many tokens its model takes.",
                          "Choose another repository; its config.json has max_position_embeddings.")
    licence = (info.card_data or {}).get("license")
    return {
        "commit": info.sha,
        "licence": licence if isinstance(licence, str) else "not stated",
        "task": "text-generation",
        "context_length": context_length,
        "parameters": info.safetensors.total if info.safetensors and not genai else None,
    }


def _drop_unreadable_card(files):
    """Leave out a model card whose fields nobody can read: the course then writes one."""
    path = files.path("README.md")
    if files.name("README.md") in files.listing and path.exists():
        try:
            ModelCard.load(path)
        except (ValueError, yaml.YAMLError):  # UnicodeDecodeError is a ValueError
            files.sha256.pop("README.md")


class _Files:
    """The files of one commit, and the folders that they go to.

    Parameters
    ----------
    repo, commit : str
    listing : dict of str to huggingface_hub.hf_api.RepoSibling
        With sizes and hashes.
    folder, finished : pathlib.Path
        Where they arrive; where some may be already.
    prefix : str
        What to leave out at the start of a name.
    """

    def __init__(self, repo, commit, listing, folder, finished, prefix):
        self.repo, self.commit, self.listing = repo, commit, listing
        self.folder, self.finished, self.prefix = folder, finished, prefix
        self.sha256 = {}

    def name(self, short):
        """Return the name in the repository."""
        return self.prefix + short

    def path(self, short):
        """Return where a file is, or will be."""
        arrived = self.folder / short
        return self.finished / short if short in self.sha256 and not arrived.exists() else arrived

    def read_json(self, short):
        """Return the object in a file that is here; an empty one for anything else."""
        if short not in self.sha256:
            return {}
        try:
            content = json.loads(self.path(short).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def incomplete(self, name):
        """Return the file that a download goes on in. Its name holds the hash: other content, other file."""
        sibling, short = self.listing[name], name.removeprefix(self.prefix)
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        return self.folder / f"{short}.{digest[:12]}.incomplete"

    def missing(self, names):
        """Return the bytes that are still to come."""
        total = 0
        for name in names:
            short = name.removeprefix(self.prefix)
            there = (self.folder / short, self.incomplete(name), self.finished / short)
            total += max(self.listing[name].size - max((path.stat().st_size for path in there if path.is_file()),
                                                       default=0), 0)
        return total

    def fetch(self, names, progress):
        """Bring each file that is not here yet, one after the other, and check what came."""
        for name in names:
            short = name.removeprefix(self.prefix)
            if short not in self.sha256 and not any(self._is_right(name, place / short)
                                                    for place in (self.folder, self.finished)):
                self._fetch_one(name, short, progress)
            progress.finished(self.listing[name].size)

    def _fetch_one(self, name, short, progress):
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
        arrived = self.folder / short
        incomplete.replace(arrived)
        if not self._is_right(name, arrived):
            arrived.unlink()
            raise CourseError(
                f"{name} of {self.repo} came with other content than the Hub lists: its hash is another.",
                "Run this again; if it stays, something between you and the Hub changes files: ask who runs the proxy.")

    def _is_right(self, name, path):
        """Tell whether a file has the hash that the Hub lists: sha256, or git's for what git itself keeps."""
        sibling = self.listing[name]
        if not path.is_file() or path.stat().st_size != sibling.size:
            return False
        digest = hashlib.sha256()
        blob = hashlib.sha1(b"blob %d\0" % sibling.size, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                if not sibling.lfs:
                    blob.update(block)
        right = digest.hexdigest() == sibling.lfs.sha256 if sibling.lfs else blob.hexdigest() == sibling.blob_id
        if right:
            self.sha256[path.name] = digest.hexdigest()
        return right


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


def _safetensors(repo, files):
    """Return the names of the weights, and insist that the Hub has each."""
    index, names = "model.safetensors.index.json", ["model.safetensors"]
    if index in files.listing:
        weight_map = files.read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise CourseError(f"{index} of {repo} names no weights.",
                              f"Look at {WEB}/{repo}/tree/main, and choose another revision: hub:{repo}@REVISION.")
    for name in sorted(set(names)):
        # Whatever an index says: nothing but safetensors comes.
        if name not in files.listing or "/" in name or not name.endswith(".safetensors"):
            raise CourseError(f"{repo} says that it has {name}, and the Hub has no such safetensors.",
                              f"Look at {WEB}/{repo}/tree/main, and choose another revision: hub:{repo}@REVISION.")
    config = files.read_json("config.json")
    if config.get("auto_map"):
        # Its folder tells whether transformers has the model built in, and does not take seconds to import.
        built_in = Path(find_spec("transformers").origin).with_name("models") / str(config.get("model_type"))
        if not built_in.is_dir():
            raise CourseError(f"{repo} needs code of its own to be loaded, and the course runs no repository's code.",
                              "Choose a model of a kind that transformers has built in, such as Phi-3.")
    return sorted(set(names))


def _onnx_files(repo, files, here):
    """Return the names of an ONNX model and its weights, and refuse what would load a library of somebody's."""
    config = files.read_json("genai_config.json")
    decoder = config.get("model", {}).get("decoder", {}) if isinstance(config.get("model"), dict) else {}
    graph = decoder.get("filename") if isinstance(decoder, dict) else None
    if not isinstance(graph, str) or files.name(graph) not in here or not graph.endswith(".onnx"):
        raise CourseError(f"genai_config.json of {repo} names no ONNX file that is there.",
                          f"Look at {WEB}/{repo}/tree/main, and choose another revision: hub:{repo}@REVISION.")
    for key, value in _walk(config):
        if key == "custom_ops_library" or (key == "provider_options" and value):
            raise CourseError(f"genai_config.json of {repo} sets {key}, which can load a library and run any code.",
                              "Choose another repository: the course takes plain models for the CPU.")
    return [name for name in here if name.endswith(".onnx") or re.search(r"[._]data(\.\d+)?$", name)]


def _walk(value):
    """Yield every key and value of nested objects and lists."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield key, inner
        yield from _walk(inner)


def _refuse_without_template(repo, files, track):
    """Raise an error unless there is a tokenizer with a chat template."""
    if "tokenizer.json" not in files.sha256:
        raise CourseError(f"{repo} has no tokenizer.json, which both tracks read.",
                          "Choose a repository that has one; most that transformers has saved do.")
    own = files.finished / "chat_template.jinja"
    template = files.read_json("tokenizer_config.json").get("chat_template")
    if isinstance(template, list) and track == "transformers":  # several, by name
        template = next((each.get("template") for each in template if isinstance(each, dict)
                         and each.get("name") == "default"), None)
    if "chat_template.jinja" in files.sha256 or own.exists() or (isinstance(template, str) and template.strip()):
        return
    raise CourseError(
        f"{repo} has no chat template: nothing says how a conversation becomes its prompt, and llm/v1/chat needs that.",
        f"Choose an instruct model, or write the template that its authors describe to {own}, and run this again.")


# --- what goes wrong on the way ---------------------------------------------------------------


def _is_passing(error):
    return isinstance(error, httpx.ReadError | httpx.RemoteProtocolError) \
        or (isinstance(error, HfHubHTTPError) and error.response.status_code in BUSY)


def _wait(state):
    """Return the seconds that the Hub asks for, or twice as many as the last time."""
    error = state.outcome.exception()
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(int(asked) if asked.isdigit() else 2 ** (state.attempt_number - 1), LONGEST_WAIT)


def _retried(call):
    """Call, and call again where the Hub is busy; it says when it will not be."""
    return tenacity.Retrying(retry=tenacity.retry_if_exception(_is_passing), wait=_wait,
                             stop=tenacity.stop_after_attempt(TRIES), reraise=True)(call)


def explain(error, repo):
    """Return the CourseError that says in two sentences what stopped a download; None for what a disk refuses.

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
        tries = f", also after {TRIES} tries" if status in BUSY else ""
        return CourseError(f"The Hub answers {status} for {repo}{tries}.",
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
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES):
        return None  # the disk's own errors have their sentences
    if isinstance(error, httpx.RequestError | httpx.InvalidURL | OSError | UnicodeError | ValueError):
        return CourseError(f"The way to {endpoint} does not work: {type(error).__name__}: {str(error)[:200]}.",
                           "Look at HF_ENDPOINT, HTTPS_PROXY, SSL_CERT_FILE and HF_TOKEN: unset what you do not need.")
    return CourseError(f"The Hub describes {repo} in a way that its client does not read: {type(error).__name__}.",
                       "Choose another repository or revision, and report it if it was one of the course's.")


def _certificate_trouble(error):
    """Return OpenSSL's reason where a certificate was refused, else None."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return None


def main(arguments):
    """Download for the process that started this one, and print facts or an error as a line of JSON."""
    # When that process ends, however it ends, so does this one: nobody else may write to its folder.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    order = json.loads(arguments[0])
    folder, finished = Path(order.pop("folder")), Path(order.pop("finished"))
    try:
        result = {"facts": download(order.pop("track"), order["repo"], folder, finished,
                                    **{key: value for key, value in order.items() if key != "repo"})}
    except Exception as error:
        known = explain(error, order["repo"])
        if known is None:
            raise
        result = {"error": [known.what, known.fix]}
    print("\n" + json.dumps(result), flush=True)
    return int("error" in result)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
