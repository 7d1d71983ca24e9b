"""Chooses the few files that one track needs of a repository of the Hugging Face Hub, and refuses what it cannot use.

``helpers.models.sources`` runs this in a process of its own, as ``helpers.models.download`` says. It loads no model.
"""

import json
import re
import ssl
import sys
from collections.abc import Iterator
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import httpx
import yaml
from huggingface_hub import HfApi, ModelCard, constants, errors
from huggingface_hub.file_download import hf_hub_url
from huggingface_hub.utils import build_hf_headers

from helpers.errors import CourseError
from helpers.models.download import BUSY, TRIES, ContentError, Download, File, retried
from helpers.models.space import check_disk, check_memory, memory_needed
from helpers.models.steps import answer, is_of_the_disk

WEB = "https://huggingface.co"
# Formats that run code of their author's when they are loaded, or that transformers turns into such.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What a tokenizer, a configuration or a reader needs. No *.py: the course runs no code of a repository.
SMALL = (".json", ".jinja", ".txt", ".model", "README.md", "LICENSE")
SMALL_BYTES = 100_000_000


def download(track: str, repo: str, folder: Path, finished: Path, revision: str | None = None,
             commit: str | None = None, onnx_folder: str | None = None) -> dict:
    """Bring the files of one track into ``folder``, but those that are right in ``folder`` or ``finished`` already.

    For the track ``"onnx"`` they come from one folder of the repository: ``onnx_folder``, or else the one for the CPU.
    ``commit`` is looked for first, then ``revision``: a commit, branch or tag, or else the default branch.

    Returns ``commit``, ``licence``, ``task``, ``context_length``, ``parameters``, ``bytes``, and ``sha256`` by file.
    """
    info = _info(repo, revision, commit)
    listing = _listing(repo, info)
    if info.pipeline_tag not in (None, "text-generation"):
        raise CourseError("hub-task", f"{repo} is a model for {info.pipeline_tag}, and the course runs "
                          "text-generation.", "Choose an instruct model.")
    prefix = ""
    if track == "onnx":
        prefix = (_onnx_folder(repo, listing, onnx_folder) + "/").removeprefix("./")
    else:
        _refuse_without_safetensors(repo, listing)
    here = {name.removeprefix(prefix): file for name, file in listing.items()
            if name.startswith(prefix) and "/" not in name.removeprefix(prefix)}
    files = Download(here, folder, finished, build_hf_headers())
    try:
        # The small files come first: they tell whether the large ones are worth the wait.
        small = [name for name, file in here.items() if name.endswith(SMALL) and file.size <= SMALL_BYTES]
        check_disk(repo, files.missing(small) / 1e6, folder)
        files.fetch(small, bar=False)
        _refuse_without_template(repo, files, track)
        wanted = [*small, *(_onnx_files(repo, files) if track == "onnx" else _safetensors(repo, files))]
        facts = _facts(repo, info, files)
        facts["bytes"] = sum(here[name].size for name in wanted)
        check_memory(repo, memory_needed(facts["bytes"]))
        check_disk(repo, files.missing(wanted) / 1e6, folder)
        files.fetch(wanted)
    except ContentError:
        raise CourseError("hub-changed", f"{prefix}{files.current} of {repo} came with other content than the Hub "
                          "lists: its hash is another.", "Run this again; if it stays, something between you and the "
                          "Hub changes files: ask who runs the proxy.") from None
    _drop_unreadable_card(files)
    return facts | {"sha256": files.sha256}


def _info(repo, revision, commit):
    """Return what the Hub says of a repository; of its newest commit where the recorded one is gone."""
    try:
        return retried(lambda: HfApi().model_info(repo, revision=commit or revision, files_metadata=True, timeout=30),
                       (httpx.ReadError, httpx.RemoteProtocolError))
    except errors.RevisionNotFoundError:
        if not commit:
            raise
        return _info(repo, revision, None)


def _listing(repo, info):
    """Return the files of a repository by name, those that have a plain name and a hash."""
    listing, seen = {}, set()
    for sibling in info.siblings or []:
        name = sibling.rfilename
        # It becomes a file on this disk: nothing in it may lead out of the folder, or be two files to Linux alone.
        plain = all(re.fullmatch(r"[\w+-][\w.+-]*", part, re.ASCII) for part in name.split("/"))
        if plain and type(sibling.size) is int and (sibling.lfs or sibling.blob_id) and name.lower() not in seen:
            listing[name] = File(hf_hub_url(repo, name, revision=info.sha), sibling.size,
                                 sibling.lfs.sha256 if sibling.lfs else None, sibling.blob_id)
            seen.add(name.lower())
    return listing


def _read_json(files, name):
    """Return the object in a file that is here; an empty one for anything else."""
    try:
        content = json.loads(files.path(name).read_text(encoding="utf-8")) if name in files.sha256 else {}
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _facts(repo, info, files):
    """Return what a repository says about its model, as far as the course shows it."""
    config, genai = _read_json(files, "config.json"), _read_json(files, "genai_config.json").get("model", {})
    nested = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    lengths = (genai.get("context_length"), config.get("max_position_embeddings"), config.get("n_positions"),
               nested.get("max_position_embeddings"))
    context_length = next((length for length in lengths if type(length) is int and length > 0), None)
    if context_length is None:
        raise CourseError("hub-context", f"{repo} does not say how many tokens its model takes.",
                          "Choose another repository; its config.json has max_position_embeddings.")
    licence = (info.card_data or {}).get("license")
    return {"commit": info.sha, "licence": licence if isinstance(licence, str) else "not stated",
            "task": "text-generation", "context_length": context_length,
            "parameters": info.safetensors.total if info.safetensors and not genai else None}


def _drop_unreadable_card(files):
    """Leave out a model card whose fields nobody can read: the course then writes one."""
    if "README.md" in files.sha256:
        try:
            ModelCard.load(files.path("README.md"))
        except (ValueError, yaml.YAMLError):  # UnicodeDecodeError is a ValueError
            files.sha256.pop("README.md")


# --- which files ----------------------------------------------------------------------------


def _onnx_folder(repo, listing, folder):
    """Return the folder of the ONNX model for the CPU; it has a ``genai_config.json``."""
    folders = sorted(str(PurePosixPath(name).parent) for name in listing
                     if PurePosixPath(name).name == "genai_config.json")
    if folder is None and not folders:
        raise CourseError("hub-no-onnx", f"{repo} has no ONNX files for onnxruntime-genai.",
                          f"Run python -m helpers prepare --model hub:{repo} --export to make them here; "
                          f"or try hub:{repo}-onnx, where some authors keep them.")
    on_cpu = [name for name in folders if "cpu" in name.lower()] or [name for name in folders if name == "."]
    # acc-level-4: int8 arithmetic, the fastest on a CPU; where there are several, the last of the names.
    folder = folder or max(on_cpu, key=lambda name: ("int4" in name, name), default=None)
    if folder not in folders:
        raise CourseError("hub-no-onnx",
                          f"{repo} has no ONNX files for the CPU: it has {', '.join(folders) or 'none at all'}.",
                          f"Run python -m helpers prepare --model hub:{repo.removesuffix('-onnx')} --export to make "
                          "them here.")
    return folder


def _refuse_without_safetensors(repo, listing):
    root = [name for name in listing if "/" not in name]
    if "model.safetensors" in root or "model.safetensors.index.json" in root:
        return
    if any(name.endswith(PICKLES) for name in root):
        raise CourseError("hub-pickles", f"{repo} has its weights only as pickles, and a pickle can run any code while "
                          "it is loaded.", "Choose a repository with model.safetensors; some have it in a branch: "
                          f"hub:{repo}@refs/pr/1, for one.")
    raise CourseError("hub-no-safetensors", f"{repo} has no model.safetensors, so track A has nothing to load.",
                      f"Choose the repository that {repo} was made from, or look at {WEB}/{repo}/tree/main.")


def _other_revision(code, repo, what):
    return CourseError(code, what, f"Look at {WEB}/{repo}/tree/main, and choose another revision: "
                       f"hub:{repo}@REVISION.")


def _safetensors(repo, files):
    """Return the names of the weights, and insist that the Hub has each."""
    index, names = "model.safetensors.index.json", ["model.safetensors"]
    if index in files.files:
        weight_map = _read_json(files, index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise _other_revision("hub-index", repo, f"{index} of {repo} names no weights.")
    for name in sorted(set(names)):
        # Whatever an index says: nothing but safetensors comes.
        if name not in files.files or not name.endswith(".safetensors"):
            raise _other_revision("hub-weights", repo,
                                  f"{repo} says that it has {name}, and the Hub has no such safetensors.")
    config = _read_json(files, "config.json")
    if config.get("auto_map"):
        # Its folder tells whether transformers has the model built in, and does not take seconds to import.
        built_in = Path(find_spec("transformers").origin).with_name("models") / str(config.get("model_type"))
        if not built_in.is_dir():
            raise CourseError("hub-code", f"{repo} needs code of its own to be loaded, and the course runs no "
                              "repository's code.",
                              "Choose a model of a kind that transformers has built in, such as Phi-3.")
    return sorted(set(names))


def _onnx_files(repo, files):
    """Return the names of an ONNX model and its weights, and refuse what would load a library of somebody's."""
    config = _read_json(files, "genai_config.json")
    decoder = config.get("model", {}).get("decoder", {}) if isinstance(config.get("model"), dict) else {}
    graph = decoder.get("filename") if isinstance(decoder, dict) else None
    if not isinstance(graph, str) or graph not in files.files or not graph.endswith(".onnx"):
        raise _other_revision("hub-graph", repo, f"genai_config.json of {repo} names no ONNX file that is there.")
    for key, value in _walk(config):
        if key == "custom_ops_library" or (key == "provider_options" and value):
            raise CourseError("hub-library", f"genai_config.json of {repo} sets {key}, which can load a library and "
                              "run any code.", "Choose another repository: the course takes plain models for the CPU.")
    return [name for name in files.files if name.endswith(".onnx") or re.search(r"[._]data(\.\d+)?$", name)]


def _walk(value) -> Iterator[tuple]:
    """Yield every key and value of nested objects and lists."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield key, inner
        yield from _walk(inner)


def _refuse_without_template(repo, files, track):
    """Raise an error unless there is a tokenizer with a chat template."""
    if "tokenizer.json" not in files.sha256:
        raise CourseError("hub-no-tokenizer", f"{repo} has no tokenizer.json, which both tracks read.",
                          "Choose a repository that has one; most that transformers has saved do.")
    own = files.finished / "chat_template.jinja"
    template = _read_json(files, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list) and track == "transformers":  # several, by name
        template = next((each.get("template") for each in template if isinstance(each, dict)
                         and each.get("name") == "default"), None)
    if "chat_template.jinja" in files.sha256 or own.exists() or (isinstance(template, str) and template.strip()):
        return
    raise CourseError("hub-no-template", f"{repo} has no chat template: nothing says how a conversation becomes its "
                      "prompt, and llm/v1/chat needs that.",
                      f"Choose an instruct model, or write the template that its authors describe to {own}, and run "
                      "this again.")


# --- what goes wrong on the way ---------------------------------------------------------------


def _status(error):
    return error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None


def _certificate_trouble(error):
    """Return OpenSSL's reason where a certificate was refused, else None."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return None


def _is_other_answer(error):
    return isinstance(error, json.JSONDecodeError | UnicodeDecodeError) or "Consistency check failed" in str(error)


# The first row whose types or function fit an error says what stopped a download.
TROUBLES = (
    (errors.GatedRepoError, "hub-gated", "{repo} is gated: its owner wants you to accept a licence first.",
     "Accept it on {web}/{repo}, make a read token on {web}/settings/tokens, set HF_TOKEN to it, and run this again."),
    ((errors.RepositoryNotFoundError, errors.HFValidationError), "hub-no-repository",
     "The Hub has no repository called {repo}, or it is private.",
     "Look it up on {web} and write it as there, such as hub:microsoft/Phi-3-mini-4k-instruct; for a private one, set "
     "HF_TOKEN."),
    (errors.RevisionNotFoundError, "hub-no-revision", "{repo} has no such revision.",
     "Choose a branch, tag or commit of {web}/{repo}/tree/main, or leave @REVISION out."),
    (errors.RemoteEntryNotFoundError, "hub-no-file", "The Hub lists {file} of {repo} and does not have it.",
     "Run this again later, or choose another revision: hub:{repo}@REVISION."),
    (lambda error: _status(error) in (401, 403), "hub-token", "The Hub refuses {repo} to this token.",
     "Make a read token on {web}/settings/tokens and set HF_TOKEN to it, or unset HF_TOKEN."),
    (lambda error: _status(error) in BUSY, "hub-busy", "The Hub answers {status} for {repo}, also after {tries} tries.",
     "Run this again later; what has arrived stays."),
    (errors.HfHubHTTPError, "hub-status", "The Hub answers {status} for {repo}.",
     "Run this again later; what has arrived stays."),
    (_certificate_trouble, "hub-certificate",
     "The certificate of {endpoint} is not accepted: {certificate}; this machine's clock says {now:%Y-%m-%d %H:%M}.",
     "Set the clock if it is off; if it is right, a proxy opens the connection: set SSL_CERT_FILE to the certificate "
     "that its owner gives you."),
    (httpx.ProxyError, "hub-proxy", "The proxy did not connect to {endpoint}: {error}.",
     "Correct HTTPS_PROXY, or unset it where no proxy is needed."),
    (httpx.TransportError, "hub-no-answer", "The network or the Hub, {endpoint}, has no answer.",
     "Check the network and the proxy (HTTPS_PROXY), and run this again; what has arrived stays."),
    (_is_other_answer, "hub-other-answer",
     "Something between you and {endpoint} answers in its place, such as a proxy's login page.",
     "Log in to the network in a browser, or set HTTPS_PROXY, and run this again."),
    ((httpx.RequestError, httpx.InvalidURL, OSError, UnicodeError, ValueError), "hub-settings",
     "The way to {endpoint} does not work: {kind}: {error:.200}.",
     "Look at HF_ENDPOINT, HTTPS_PROXY, SSL_CERT_FILE and HF_TOKEN: unset what you do not need."),
    (Exception, "hub-unreadable", "The Hub describes {repo} in a way that its client does not read: {kind}.",
     "Choose another repository or revision, and report it if it was one of the course's."),
)


def explain(error: Exception, repo: str) -> CourseError:
    """Return the CourseError that says in two sentences what stopped a download."""
    code, *sentences = next(row for fits, *row in TROUBLES
                            if (isinstance(error, fits) if isinstance(fits, type | tuple) else fits(error)))
    file = re.search(r"/resolve/[^/]+/(\S+?)\.?$", str(error), re.MULTILINE)
    return CourseError(code, *(sentence.format(
        repo=repo, web=WEB, endpoint=constants.ENDPOINT, file=file[1] if file else "a file", status=_status(error),
        tries=TRIES, certificate=_certificate_trouble(error), now=datetime.now(), kind=type(error).__name__,
        error=str(error)) for sentence in sentences))


def work(order: dict) -> dict:
    """Download as ``HubRepository.make`` orders; return the facts, or raise a CourseError or what the disk refuses."""
    try:
        return download(**order | {"folder": Path(order["folder"]), "finished": Path(order["finished"])})
    except Exception as error:
        # The disk's own errors have their sentences.
        if isinstance(error, CourseError) or is_of_the_disk(error):
            raise
        raise explain(error, order["repo"]) from error


if __name__ == "__main__":
    sys.exit(answer(work, sys.argv[1]))
