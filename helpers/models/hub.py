"""Chooses the few files that one track needs of a repository of the Hugging Face Hub, and refuses what it cannot use.

``helpers.models.sources`` runs this in a process of its own, as ``helpers.models.download`` says.
It loads no weights.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path, PurePosixPath

import httpx
import yaml
from huggingface_hub import HfApi, ModelCard, constants, errors
from huggingface_hub.file_download import hf_hub_url
from huggingface_hub.utils import build_hf_headers

from helpers.errors import CourseError
from helpers.models.download import (
    BUSY,
    TRIES,
    ContentError,
    Download,
    File,
    LengthError,
    certificate_trouble,
    patience,
    retried,
)
from helpers.models.space import check_disk, check_memory, memory_needed
from helpers.models.steps import answer, is_of_the_disk, tell
from helpers.models.usable import (
    first_file,
    make_tokenizer,
    other_revision,
    refuse_other_engine,
    refuse_other_weights,
    refuse_packed,
    refuse_unexportable,
    refuse_unknown_model,
    weight_files,
)

WEB = "https://huggingface.co"
# What a tokenizer, a configuration or a reader needs. No *.py: the course runs no code of a
# repository.
SMALL = (".json", ".jinja", ".txt", ".model", "README.md", "LICENSE")
SMALL_BYTES = 100_000_000


def download(
    track: str,
    repo: str,
    folder: Path,
    finished: Path,
    revision: str | None = None,
    commit: str | None = None,
    onnx_folder: str | None = None,
    export: bool = False,
) -> dict:
    """Bring the files of one track into ``folder``, but those that are right in ``folder`` or ``finished`` already.

    For the track ``"onnx"`` they come from one folder of the repository: ``onnx_folder``, or else
    the one for the CPU. ``commit`` is looked for first, then ``revision``: a commit, branch or tag,
    or else the default branch. With ``export``, the files of track A are to be exported: what the
    builder cannot export does not come.

    Returns ``commit``, ``licence``, ``task``, ``context_length``, ``parameters``, ``bytes``, and
    ``sha256`` by file.
    """
    headers, trouble = retried(_headers, (), _for_listings())
    try:
        try:
            info = _info(repo, revision, commit, headers)
        except errors.HfHubHTTPError as error:
            # The Hub answers so to a token that it does not know, for a public repository, too.
            if _status(error) != httpx.codes.UNAUTHORIZED or "authorization" not in headers:
                raise
            headers, trouble = (
                build_hf_headers(token=False),
                "is not accepted by the Hub: it is wrong, or has expired",
            )
            info = _info(repo, revision, commit, headers)
        if trouble:
            where, fix = token_place(os.environ)
            tell(f"The token in {where} {trouble}. {repo} is public: going on without it. {fix}")
        return _bring(
            track, repo, Download({}, folder, finished, headers), info, onnx_folder, export
        )
    except errors.HfHubHTTPError as error:
        if not trouble or _status(error) not in (401, 403):
            raise
        where, fix = token_place(os.environ)
        raise CourseError(
            "hub-token",
            f"The token in {where} {trouble}, and without one the Hub does not give {repo}.",
            fix,
        ) from error


def _bring(track, repo, files, info, onnx_folder, export):
    """Bring the files that ``info`` lists: the small ones first, which tell whether the large ones are worth it."""
    listing = _listing(repo, info)
    if info.pipeline_tag not in (None, "text-generation"):
        raise CourseError(
            "hub-task",
            f"{repo} is a model for {info.pipeline_tag}, and the course runs text-generation.",
            "Choose an instruct model.",
        )
    prefix = ""
    if track == "onnx":
        prefix = (_onnx_folder(repo, listing, onnx_folder) + "/").removeprefix("./")
    else:
        base = (info.card_data or {}).get("base_model")
        refuse_other_weights(repo, listing, base if isinstance(base, str) else None)
    files.files = {
        name.removeprefix(prefix): file for name, file in listing.items() if name.startswith(prefix)
    }
    try:
        small = [
            name
            for name, file in files.files.items()
            if name.endswith(SMALL)
            and file.size <= SMALL_BYTES
            and ("/" not in name or name.startswith("additional_chat_templates/"))
        ]
        check_disk(repo, files.missing(small) / 1e6, files.folder)
        files.fetch(small, bar=False)
        config = _read_config(
            repo, files, "genai_config.json" if track == "onnx" else "config.json"
        )
        if track == "onnx":
            wanted = [*small, *_onnx_files(repo, files, config)]
            _refuse_without_template(repo, files)
        else:
            wanted = [*small, *_safetensors(repo, files, config)]
            types = info.safetensors.parameters if info.safetensors else {}
            refuse_packed(repo, files.files, config, types)
            if export:
                refuse_unexportable(repo, config)
        facts = _facts(repo, info, files)
        facts["bytes"] = sum(files.files[name].size for name in wanted)
        check_memory(repo, memory_needed(facts["bytes"]))
        check_disk(repo, files.missing(wanted) / 1e6, files.folder)
        _refuse_unloadable(track, repo, files, small, config)
        files.fetch(wanted)
    except ContentError:
        raise CourseError(
            "hub-changed",
            f"{prefix}{files.current} of {repo} came with other content than the Hub "
            "lists: its hash is another.",
            "Run this again; if it stays, something between you and the "
            "Hub changes files: ask who runs the proxy.",
        ) from None
    _drop_unreadable_card(files)
    return facts | {"sha256": files.sha256}


def _info(repo, revision, commit, headers):
    """Return what the Hub says of a repository; of its newest commit where the recorded one is gone."""
    limits = _for_listings()
    try:
        return retried(
            lambda: HfApi(headers=headers, token=False).model_info(
                repo, revision=commit or revision, files_metadata=True, timeout=limits.lost
            ),
            (httpx.ReadError, httpx.RemoteProtocolError),
            limits,
        )
    except errors.RevisionNotFoundError:
        if not commit:
            raise
        return _info(repo, revision, None, headers)


def _for_listings():
    return patience(os.environ.get("HF_HUB_ETAG_TIMEOUT"))


def _listing(repo, info):
    """Return the files of a repository by name, those that have a plain name and a hash."""
    listing, seen = {}, set()
    for sibling in info.siblings or []:
        name = sibling.rfilename
        # It becomes a file on this disk: nothing in it may lead out of the folder, or be two files
        # to Linux alone.
        plain = all(re.fullmatch(r"[\w+-][\w.+-]*", part, re.ASCII) for part in name.split("/"))
        if (
            plain
            and type(sibling.size) is int
            and (sibling.lfs or sibling.blob_id)
            and name.lower() not in seen
        ):
            listing[name] = File(
                hf_hub_url(repo, name, revision=info.sha),
                sibling.size,
                sibling.lfs.sha256 if sibling.lfs else None,
                sibling.blob_id,
            )
            seen.add(name.lower())
    return listing


def _read_config(repo, files, name):
    """Return the object in the file that describes the model; raise an error where there is none."""
    if name not in files.files:
        raise other_revision(
            "hub-config", repo, f"{repo} has no {name}, so nothing says what kind of model it is."
        )
    config = _read_json(files, name)
    if not config:
        raise other_revision(
            "hub-config", repo, f"{name} of {repo} is no JSON that describes a model."
        )
    return config


def _read_json(files, name):
    """Return the object in a file that is here; an empty one for anything else."""
    try:
        content = (
            json.loads(files.path(name).read_text(encoding="utf-8")) if name in files.sha256 else {}
        )
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _facts(repo, info, files):
    """Return what a repository says about its model, as far as the course shows it."""
    config, genai = (
        _read_json(files, "config.json"),
        _read_json(files, "genai_config.json").get("model", {}),
    )
    nested = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    lengths = (
        genai.get("context_length"),
        config.get("max_position_embeddings"),
        config.get("n_positions"),
        nested.get("max_position_embeddings"),
    )
    context_length = next(
        (length for length in lengths if type(length) is int and length > 0), None
    )
    if context_length is None:
        raise CourseError(
            "hub-context",
            f"{repo} does not say how many tokens its model takes.",
            "Choose another repository; its config.json has max_position_embeddings.",
        )
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
    if "README.md" in files.sha256:
        try:
            ModelCard.load(files.path("README.md"))
        except (ValueError, yaml.YAMLError):  # UnicodeDecodeError is a ValueError
            files.sha256.pop("README.md")


# --- which files ----------------------------------------------------------------------------


def _onnx_folder(repo, listing, folder):
    """Return the folder of the ONNX model for the CPU; it has a ``genai_config.json``."""
    folders = sorted(
        str(PurePosixPath(name).parent)
        for name in listing
        if PurePosixPath(name).name == "genai_config.json"
    )
    if folder is None and not folders:
        raise CourseError(
            "hub-no-onnx",
            f"{repo} has no ONNX files for onnxruntime-genai.",
            f"Run python -m helpers prepare --model hub:{repo} --export to make them here; "
            f"or try hub:{repo}-onnx, where some authors keep them.",
        )
    on_cpu = [name for name in folders if "cpu" in name.lower()] or [
        name for name in folders if name == "."
    ]
    # acc-level-4: int8 arithmetic, the fastest on a CPU; where there are several, the last of the
    # names.
    chosen = folder or max(on_cpu, key=lambda name: ("int4" in name, name), default=None)
    if not folder and len(on_cpu) > 1:
        tell(
            f"{repo} has {len(on_cpu)} ONNX folders for the CPU: {', '.join(on_cpu)}. {chosen} is taken; to take "
            "another, give the model an entry with its `folder` in data/models.toml, as phi-3-mini-4k has."
        )
    folder = chosen
    if folder not in folders:
        raise CourseError(
            "hub-no-onnx",
            f"{repo} has no ONNX files for the CPU: it has {', '.join(folders) or 'none at all'}.",
            f"Run python -m helpers prepare --model hub:{repo.removesuffix('-onnx')} --export to make "
            "them here.",
        )
    return folder


def _safetensors(repo, files, config):
    """Return the names of the weights, and insist that the Hub has each."""
    index = first_file(files.files, config)
    weights = weight_files(repo, files.files, config, _read_json(files, index) if index else {})
    others = sorted(
        name
        for name in files.files
        if name.endswith(".safetensors") and "/" not in name and name not in weights
    )
    if others:
        tell(
            f"Of the weights of {repo}, {weights[0]}{f' and {len(weights) - 1} more' if weights[1:] else ''} are "
            f"taken, which transformers loads, and not {', '.join(others)}. For those, choose a repository that has "
            "them as model.safetensors."
        )
    return weights


def _onnx_files(repo, files, config):
    """Return the names of an ONNX model and its weights, and insist that the Hub has each that is named."""
    model = config.get("model") if isinstance(config.get("model"), dict) else {}
    decoder = model.get("decoder") if isinstance(model.get("decoder"), dict) else {}
    graph = decoder.get("filename")
    if not isinstance(graph, str) or graph not in files.files or not graph.endswith(".onnx"):
        raise other_revision(
            "hub-graph", repo, f"genai_config.json of {repo} names no ONNX file that is there."
        )
    return [
        name
        for name in files.files
        if "/" not in name and (name.endswith(".onnx") or re.search(r"[._]data(\.\d+)?$", name))
    ]


def _refuse_without_template(repo, files):
    """Raise an error unless there are a tokenizer and a chat template that the chat model reads."""
    if "tokenizer.json" not in files.sha256:
        raise CourseError(
            "hub-no-tokenizer",
            f"{repo} has no tokenizer.json, which track B and the chat model read.",
            "Choose a repository that has one; most that transformers has saved do.",
        )
    template = _read_json(files, "tokenizer_config.json").get("chat_template")
    if (
        "chat_template.jinja" in files.sha256
        or (files.finished / "chat_template.jinja").exists()
        or (isinstance(template, str) and template.strip())
    ):
        return
    raise _no_template(repo, files)


def _no_template(repo, files):
    return CourseError(
        "hub-no-template",
        f"{repo} has no chat template: nothing says how a conversation becomes its "
        "prompt, and llm/v1/chat needs that.",
        "Choose an instruct model, or write the template that its authors describe to "
        f"{files.finished / 'chat_template.jinja'}, and run this again.",
    )


def _refuse_unloadable(track, repo, files, small, config):
    """Let the libraries that are to load the model read its small files, in a folder that has these alone."""
    with tempfile.TemporaryDirectory(dir=files.folder, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for file in small:
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copy(files.path(file), folder / file)
        with contextlib.suppress(FileNotFoundError):  # the user's own template
            shutil.copy(files.finished / "chat_template.jinja", folder)
        if track == "onnx":
            refuse_other_engine(repo, folder, config, config["model"]["decoder"]["filename"])
        else:
            refuse_unknown_model(repo, folder, config)
        tokenizer = make_tokenizer(repo, folder)
        if track == "transformers":
            try:
                tokenizer.get_chat_template()
            except ValueError:  # none, or several and none of them called "default"
                raise _no_template(repo, files) from None


# --- tokens -----------------------------------------------------------------------------------


def _headers():
    """Return the headers of a request, and what is wrong with the user's token, None where nothing is."""
    try:
        headers = build_hf_headers()
    except (OSError, ValueError):  # of a file that is no text, or not the user's to read
        return build_hf_headers(token=False), "cannot be read"
    if re.fullmatch("Bearer [!-~]+", headers.get("authorization", "Bearer none")):
        return headers, None
    return build_hf_headers(token=False), "has characters that no token has"


def token_place(environment: Mapping[str, str]) -> tuple[str, str]:
    """Return where the Hub's client has the user's token from, and what to do about one that does not work."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):  # in the client's order
        if environment.get(name, "").strip():
            return name, f"Unset {name}, or set it to a read token from {WEB}/settings/tokens."
    named = [
        ("HF_TOKEN_PATH", "the file that HF_TOKEN_PATH names"),
        ("HF_HOME", "$HF_HOME/token"),
        ("XDG_CACHE_HOME", "$XDG_CACHE_HOME/huggingface/token"),
    ]
    place = next(
        (place for name, place in named if name in environment), "~/.cache/huggingface/token"
    )
    return (
        place,
        "Run `hf auth login` for a new one, or `hf auth logout` or delete that file to be without one.",
    )


# --- what goes wrong on the way ---------------------------------------------------------------


def _status(error):
    return error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None


# The first row whose types or function fit an error says what stopped a download.
TROUBLES = (
    (
        errors.GatedRepoError,
        "hub-gated",
        "{repo} is gated: its owner wants you to accept a licence first.",
        "Accept it on {web}/{repo}, make a read token on {web}/settings/tokens, set HF_TOKEN to it, "
        "and run this again.",
    ),
    (
        (errors.RepositoryNotFoundError, errors.HFValidationError),
        "hub-no-repository",
        "The Hub has no repository called {repo}, or it is private.",
        "Look it up on {web} and write it as there, such as hub:microsoft/Phi-3-mini-4k-instruct; "
        "for a private one, set "
        "HF_TOKEN.",
    ),
    (
        errors.RevisionNotFoundError,
        "hub-no-revision",
        "{repo} has no such revision.",
        "Choose a branch, tag or commit of {web}/{repo}/tree/main, or leave @REVISION out.",
    ),
    (
        errors.RemoteEntryNotFoundError,
        "hub-no-file",
        "The Hub lists {file} of {repo} and does not have it.",
        "Run this again later, or choose another revision: hub:{repo}@REVISION.",
    ),
    (
        lambda error: _status(error) in (401, 403),
        "hub-token",
        "The Hub refuses {repo} to the token in {token}.",
        "{token_fix}",
    ),
    (
        lambda error: _status(error) in BUSY,
        "hub-busy",
        "The Hub answers {status} for {repo}, also after {tries} tries.",
        "Run this again later; what has arrived stays.",
    ),
    (
        errors.HfHubHTTPError,
        "hub-status",
        "The Hub answers {status} for {repo}.",
        "Run this again later; what has arrived stays.",
    ),
    (
        certificate_trouble,
        "hub-certificate",
        "The certificate of {endpoint} is not accepted: {certificate}; this machine's clock says {now:%Y-%m-%d %H:%M}.",
        "Set the clock if it is off; if it is right, a proxy opens the connection: "
        "set SSL_CERT_FILE to the certificate "
        "that its owner gives you.",
    ),
    (
        httpx.ProxyError,
        "hub-proxy",
        "The proxy did not connect to {endpoint}: {error}.",
        "Correct HTTPS_PROXY, or unset it where no proxy is needed.",
    ),
    (
        httpx.TransportError,
        "hub-no-answer",
        "The network or the Hub, {endpoint}, has no answer.",
        "Check the network and the proxy (HTTPS_PROXY), and run this again; what has arrived stays.",
    ),
    (
        (LengthError, json.JSONDecodeError, UnicodeDecodeError),
        "hub-other-answer",
        "Something between you and {endpoint} answers in its place, such as a proxy's login page.",
        "Log in to the network in a browser, or set HTTPS_PROXY, and run this again.",
    ),
    (
        (httpx.RequestError, httpx.InvalidURL, OSError, UnicodeError, ValueError),
        "hub-settings",
        "The way to {endpoint} does not work: {kind}: {error:.200}.",
        "Look at HF_ENDPOINT, HTTPS_PROXY, SSL_CERT_FILE and HF_TOKEN: unset what you do not need.",
    ),
    (
        Exception,
        "hub-unreadable",
        "The Hub describes {repo} in a way that its client does not read: {kind}.",
        "Choose another repository or revision, and report it if it was one of the course's.",
    ),
)


def explain(error: Exception, repo: str) -> CourseError:
    """Return the CourseError that says in two sentences what stopped a download."""
    code, *sentences = next(
        row
        for fits, *row in TROUBLES
        if (isinstance(error, fits) if isinstance(fits, type | tuple) else fits(error))
    )
    token, token_fix = token_place(os.environ)
    file = re.search(r"/resolve/[^/]+/(\S+?)\.?$", str(error), re.MULTILINE)
    return CourseError(
        code,
        *(
            sentence.format(
                repo=repo,
                web=WEB,
                endpoint=constants.ENDPOINT,
                file=file[1] if file else "a file",
                status=_status(error),
                tries=TRIES,
                token=token,
                token_fix=token_fix,
                certificate=certificate_trouble(error),
                now=datetime.now(),
                kind=type(error).__name__,
                error=str(error),
            )
            for sentence in sentences
        ),
    )


def work(order: dict) -> dict:
    """Download as ``HubRepository.make`` orders; return the facts, or raise a CourseError or what the disk refuses."""
    try:
        return download(
            **order | {"folder": Path(order["folder"]), "finished": Path(order["finished"])}
        )
    except Exception as error:
        # The disk's own errors have their sentences.
        if isinstance(error, CourseError) or is_of_the_disk(error):
            raise
        raise explain(error, order["repo"]) from error


if __name__ == "__main__":
    # At once: torch takes its time to leave, and a thread may wait for a server.
    os._exit(answer(work, sys.argv[1]))
