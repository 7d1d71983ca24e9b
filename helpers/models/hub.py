"""Downloads the files that one track needs from a repository of the Hugging Face Hub.

``helpers.models.sources`` runs this module in a process of its own: huggingface_hub decides at its
import whether it may use the network, and in the rest of the course it may not. No weights are
loaded here, and no code of a repository (``*.py``) is downloaded.
"""

import json
import logging
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import httpx
import yaml
from huggingface_hub import HfApi, ModelCard, constants, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils.sha import git_hash

from helpers.errors import CourseError
from helpers.files import is_plain, is_size, sha256
from helpers.models.hub_errors import hub_error, is_size_mismatch, status_of, token_place
from helpers.models.loadable import (
    INDEX,
    check_architecture,
    check_genai_config,
    check_safetensors,
    choose_weights,
    inconsistent_error,
    load_tokenizer,
    refuse_quantized,
)
from helpers.models.space import check_disk, check_memory, memory_needed
from helpers.models.steps import is_of_the_disk, notify_user, run_worker

# Endings of the files beside the weights that a tokenizer, a configuration or a reader needs.
METADATA_ENDINGS = (".json", ".jinja", ".txt", ".model", "README.md", "LICENSE")
LARGEST_METADATA = 100_000_000  # bytes
# Files that ONNX models keep their weights in, such as model.onnx.data and model.onnx_data_1.
ONNX_WEIGHTS = re.compile(r"[._]data([._]\d+)?$")


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit that a track may need, and where they are written.

    Attributes
    ----------
    repo : str
        ``org/name``.
    info : ModelInfo
        What the Hub says about the commit.
    listing : dict of str to RepoSibling
        The Hub's entry of each file, by its path below ``prefix``.
    prefix : str
        The ONNX model's folder in the repository, such as ``"cpu/"``; empty for the root.
    headers : dict
        HTTP headers, with the user's token.
    partial, finished : Path
        Files are written to ``partial``. One that is whole in ``finished`` is not downloaded again.
    """

    repo: str
    info: ModelInfo
    listing: dict[str, RepoSibling]
    prefix: str
    headers: dict[str, str]
    partial: Path
    finished: Path

    def path(self, name: str) -> Path:
        """Return the path of a file that has been downloaded."""
        return next(path for path in (self.partial / name, self.finished / name) if path.is_file())

    def read_json(self, name: str) -> dict:
        """Return the JSON object in a file; an empty one if the file is missing or holds something else."""
        try:
            content = json.loads(self.path(name).read_text(encoding="utf-8"))
        except (StopIteration, ValueError, RecursionError):
            return {}
        return content if name in self.listing and isinstance(content, dict) else {}

    def is_whole(self, path: Path, name: str) -> bool:
        """Tell whether the file at ``path`` has the size and the hash that the Hub lists for ``name``."""
        listed = self.listing[name]
        if not is_size(path, listed.size):
            return False
        if listed.lfs:
            return sha256(path) == listed.lfs.sha256
        return git_hash(path.read_bytes()) == listed.blob_id

    def total_bytes(self, names: list[str]) -> int:
        """Return the bytes of these files."""
        return sum(self.listing[name].size for name in names)

    def missing_bytes(self, names: list[str]) -> int:
        """Return the bytes of these files that are not here yet."""
        return sum(max(self.listing[name].size - self._present_bytes(name), 0) for name in names)

    def _present_bytes(self, name):
        places = (self.partial / name, self._incomplete(name), self.finished / name)
        return max(path.stat().st_size if path.is_file() else 0 for path in places)

    def _incomplete(self, name):
        """Return the file for an unfinished download; the hash in its name tells versions of a file apart."""
        listed = self.listing[name]
        digest = listed.lfs.sha256 if listed.lfs else listed.blob_id
        return self.partial / f"{name}.{digest[:8]}.incomplete"

    def fetch(self, names: list[str], progress: "Progress") -> None:
        """Download each file that is not whole yet, and check its hash."""
        for name in names:
            if self.is_whole(self.partial / name, name):
                progress.update(self.listing[name].size)
            elif self.is_whole(self.finished / name, name):
                (self.partial / name).unlink(missing_ok=True)
                progress.update(self.listing[name].size)
            else:
                self._fetch_one(name, progress)

    def _fetch_one(self, name, progress):
        target = self.partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        incomplete = self._incomplete(name)
        url = hf_hub_url(self.repo, self.prefix + name, revision=self.info.sha)
        try:
            with incomplete.open("ab") as stream:
                # snapshot_download starts an interrupted file from its beginning; http_get resumes.
                http_get(
                    url,
                    stream,
                    resume_size=min(stream.tell(), self.listing[name].size),
                    headers=self.headers,
                    expected_size=self.listing[name].size,
                    tqdm_class=progress.bar,
                )
        except OSError as error:
            if is_size_mismatch(error):
                incomplete.unlink()  # such as a proxy's login page
            raise
        incomplete.replace(target)
        if not self.is_whole(target, name):
            raise CourseError(
                "hub-changed",
                f"{self.prefix}{name} of {self.repo} arrived with another hash than the Hub lists.",
                "Run this again; if it stays, something between you and the Hub changes files: ask "
                "who runs the proxy.",
            )


class Progress:
    """Prints ``Progress DONE of TOTAL`` in bytes, for the progress bar of the process that waits for this one.

    It has the part of tqdm's interface that http_get uses. With a total of 0 it prints nothing.
    """

    def __init__(self, total: int):
        self.total = total
        self.done = 0

    def bar(self, initial: int = 0, **options) -> "Progress":
        """Begin a file of which ``initial`` bytes are here; the options are tqdm's."""
        self.update(initial)
        return self

    def update(self, count: float) -> None:
        """Count more bytes; http_get takes some back when a server sends a file from its beginning."""
        self.done += count
        if self.total:
            print(f"Progress {self.done} of {self.total}", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        """Do nothing: the next file goes on counting."""


def download(
    track: str,
    repo: str,
    partial: Path,
    finished: Path,
    revision: str | None = None,
    commit: str | None = None,
    onnx_folder: str | None = None,
) -> dict:
    """Download one track's files into ``partial``, except for those that are whole in ``finished``.

    Parameters
    ----------
    track : str
        ``"transformers"``, or ``"onnx"``, whose files are in one folder of the repository:
        ``onnx_folder``, by default the one for the CPU.
    revision : str, optional
        A commit, branch or tag; by default the default branch.
    commit : str, optional
        The commit of the files in ``finished``, preferred to ``revision`` if the repository has it.

    Returns
    -------
    dict
        ``commit``, ``licence``, ``task``, ``context_length``, ``parameters``, ``bytes``, and
        ``files``: the names of all files of the track.

    Raises
    ------
    CourseError
        The track cannot use the repository, or memory or disk are too small for it.
    """
    info, headers = _read_info(repo, revision, commit)
    if info.pipeline_tag not in (None, "text-generation"):
        raise CourseError(
            "hub-task",
            f"{repo} is a model for {info.pipeline_tag}, and the course runs text-generation.",
            "Choose an instruct model.",
        )
    listing = {file.rfilename: file for file in info.siblings or [] if is_plain(file.rfilename)}
    prefix = ""
    if track == "onnx":
        prefix = (_find_onnx_folder(repo, listing, onnx_folder) + "/").removeprefix("./")
    else:
        base = (info.card_data or {}).get("base_model")
        check_safetensors(repo, listing, base if isinstance(base, str) else None)
    listing = {
        name.removeprefix(prefix): file for name, file in listing.items() if name.startswith(prefix)
    }
    snapshot = Snapshot(repo, info, listing, prefix, headers, partial, finished)

    metadata = [
        name for name in snapshot.listing if _is_metadata(name, snapshot.listing[name].size)
    ]
    check_disk(repo, snapshot.missing_bytes(metadata) / 1e6, partial)
    snapshot.fetch(metadata, Progress(0))
    config = _read_config(snapshot, "genai_config.json" if track == "onnx" else "config.json")
    facts = _read_facts(snapshot, config if track == "onnx" else {})
    weights = (
        _choose_onnx(snapshot, config) if track == "onnx" else _choose_safetensors(snapshot, config)
    )
    wanted = [*metadata, *weights]
    facts["bytes"] = snapshot.total_bytes(wanted)
    check_memory(repo, memory_needed(facts["bytes"]))
    check_disk(repo, snapshot.missing_bytes(wanted) / 1e6, partial)
    _refuse_unloadable(track, snapshot, metadata, config)

    snapshot.fetch(wanted, Progress(facts["bytes"]))
    return facts | {"files": _without_unreadable_card(snapshot, wanted)}


def _read_info(repo, revision, commit):
    """Return what the Hub says about a commit, and the headers that it accepts.

    If the user's token is not valid, the Hub refuses it even for a public repository: then the
    repository is asked for without a token.
    """

    def info_with_token(token):
        headers = build_hf_headers(token=token)
        try:
            return _model_info(repo, commit or revision, headers), headers
        except RevisionNotFoundError:
            if not commit:
                raise
            return _model_info(repo, revision, headers), headers  # the recorded commit is gone

    problem = "is not accepted by the Hub"
    try:
        return info_with_token(None)
    except HfHubHTTPError as error:
        if status_of(error) != httpx.codes.UNAUTHORIZED or not get_token():
            raise
    except (UnicodeError, httpx.LocalProtocolError):
        problem = "has characters that no token has"
    except PermissionError:
        problem = "cannot be read"
    place, fix = token_place(os.environ)
    try:
        found = info_with_token(False)
    except HfHubHTTPError as error:
        raise CourseError(
            "hub-token",
            f"The token in {place} {problem}, and without one the Hub does not give {repo}.",
            fix,
        ) from error
    notify_user(f"The token in {place} {problem}. Going on without a token. {fix}")
    return found


def _model_info(repo, revision, headers):
    return HfApi(headers=headers, token=False).model_info(
        repo,
        revision=revision,
        files_metadata=True,
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
    )


def _is_metadata(name, size):
    """Tell whether a file is downloaded before the weights, to decide whether the track can use them."""
    in_root = "/" not in name or name.startswith("additional_chat_templates/")
    return in_root and name.endswith(METADATA_ENDINGS) and size <= LARGEST_METADATA


def _read_config(snapshot, name):
    """Return the content of the file that describes the model."""
    config = snapshot.read_json(name)
    # genai_config.json has an object `model`.
    if config and (name == "config.json" or isinstance(config.get("model"), dict)):
        return config
    what = f"{name} of {snapshot.repo} does not describe a model."
    if name not in snapshot.listing:
        what = f"{snapshot.repo} has no {name}."
    raise inconsistent_error("hub-config", snapshot.repo, what)


def _read_facts(snapshot, genai_config):
    """Return what the Hub and the configuration say about the model, as far as the course shows it."""
    config = snapshot.read_json("config.json")
    nested = config.get("text_config")
    lengths = (
        genai_config.get("model", {}).get("context_length"),
        config.get("max_position_embeddings"),
        config.get("n_positions"),
        nested.get("max_position_embeddings") if isinstance(nested, dict) else None,
    )
    context_length = next((length for length in lengths if type(length) is int), None)
    if context_length is None:
        raise CourseError(
            "hub-context",
            f"{snapshot.repo} does not say how many tokens its model takes.",
            "Choose another repository; its config.json has max_position_embeddings.",
        )
    info = snapshot.info
    licence = (info.card_data or {}).get("license")
    return {
        "commit": info.sha,
        "licence": licence if isinstance(licence, str) else "not stated",
        "task": "text-generation",
        "context_length": context_length,
        "parameters": info.safetensors.total if info.safetensors and not genai_config else None,
    }


# --- which files ------------------------------------------------------------------------------


def _find_onnx_folder(repo, listing, asked):
    """Return the folder of the repository that has the ONNX model for the CPU, or the one that was asked for."""
    folders = sorted(
        str(PurePosixPath(name).parent)
        for name in listing
        if PurePosixPath(name).name == "genai_config.json"
    )
    if not folders and not asked:
        raise CourseError(
            "hub-no-onnx",
            f"{repo} has no ONNX files for onnxruntime-genai.",
            f"Run python -m helpers prepare --model hub:{repo} --export to make them here; "
            f"or try hub:{repo}-onnx, where some authors keep them.",
        )
    on_cpu = [name for name in folders if "cpu" in name.lower()]
    on_cpu = on_cpu or [name for name in folders if name == "."]
    # int4 with accuracy level 4 (int8 arithmetic) is the fastest on a CPU, and sorts last.
    chosen = asked or max(on_cpu, key=lambda name: ("int4" in name, name), default=None)
    if chosen not in folders:
        raise CourseError(
            "hub-no-onnx",
            f"{repo} has no ONNX files for the CPU: it has {', '.join(folders) or 'none at all'}.",
            f"Run python -m helpers prepare --model hub:{repo.removesuffix('-onnx')} --export to make "
            "them here.",
        )
    if not asked and len(on_cpu) > 1:
        notify_user(
            f"{repo} has {len(on_cpu)} ONNX folders for the CPU: {', '.join(on_cpu)}. {chosen} is taken; to "
            "take another, give the model an entry with its `folder` in data/models.toml, as "
            "phi-3-mini-4k has."
        )
    return chosen


def _choose_onnx(snapshot, config):
    """Return the names of the ONNX model and its weights."""
    decoder = config["model"].get("decoder")
    graph = decoder.get("filename") if isinstance(decoder, dict) else None
    names = [name for name in snapshot.listing if "/" not in name]
    if graph not in names or not graph.endswith(".onnx"):
        raise inconsistent_error(
            "hub-graph",
            snapshot.repo,
            f"genai_config.json of {snapshot.repo} names no ONNX file that is there.",
        )
    return [name for name in names if name.endswith(".onnx") or re.search(ONNX_WEIGHTS, name)]


def _choose_safetensors(snapshot, config):
    """Return the names of the weights that transformers loads."""
    refuse_quantized(snapshot.repo, snapshot.listing, config)
    weights = choose_weights(snapshot.repo, snapshot.listing, snapshot.read_json(INDEX))
    others = sorted(
        name
        for name in snapshot.listing
        if name.endswith(".safetensors") and "/" not in name and name not in weights
    )
    if others:
        more = f" and {len(weights) - 1} more" if weights[1:] else ""
        notify_user(
            f"{snapshot.repo} has several sets of weights: {weights[0]}{more} are downloaded, which "
            f"transformers loads, but not {', '.join(others)}."
        )
    return weights


# --- can the track load it? -------------------------------------------------------------------


def _refuse_unloadable(track, snapshot, metadata, config):
    """Let the libraries read the small snapshot, in a folder that has no weights."""
    if track == "onnx" and "tokenizer.json" not in snapshot.listing:
        raise CourseError(
            "hub-no-tokenizer",
            f"{snapshot.repo} has no tokenizer.json, which track B and the chat model read.",
            "Choose a repository that has one; most that transformers has saved do.",
        )
    users_template = snapshot.finished / "chat_template.jinja"
    with tempfile.TemporaryDirectory(dir=snapshot.partial, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for file in metadata:
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copy(snapshot.path(file), folder / file)
        if users_template.is_file():
            shutil.copy(users_template, folder)
        if track == "onnx":
            check_genai_config(
                snapshot.repo, folder, config, config["model"]["decoder"]["filename"]
            )
        else:
            check_architecture(snapshot.repo, folder, config)
        tokenizer = load_tokenizer(snapshot.repo, folder)
        try:
            tokenizer.get_chat_template()
        except ValueError:  # there is none, or none of several is called "default"
            raise CourseError(
                "hub-no-template",
                f"{snapshot.repo} has no chat template: nothing says how a conversation becomes its "
                "prompt, and llm/v1/chat needs that.",
                "Choose an instruct model, or write the template that its authors describe to "
                f"{users_template}, and run this again.",
            ) from None


def _without_unreadable_card(snapshot, names):
    """Return the names without a model card that cannot be read: the course then writes one."""
    if "README.md" in names:
        try:
            ModelCard.load(snapshot.path("README.md"))
        except (ValueError, yaml.YAMLError):  # UnicodeDecodeError is a ValueError
            return [name for name in names if name != "README.md"]
    return names


# --- the process ------------------------------------------------------------------------------


class _RetryNotes(logging.Handler):
    """Shows the user huggingface_hub's log lines about waiting and trying again, without addresses."""

    def emit(self, record):
        for line in record.getMessage().splitlines():
            if "://" not in line:
                notify_user(f"huggingface_hub: {line}")


def work(request: dict) -> dict:
    """Download as ``HubRepository.make`` requests; return the facts and the snapshot."""
    retries = _RetryNotes(logging.WARNING)
    logging.getLogger("huggingface_hub").addHandler(retries)
    try:
        paths = {name: Path(request[name]) for name in ("partial", "finished")}
        return download(**request | paths)
    except Exception as error:
        # A full disk has its sentence in helpers.models.space.
        if isinstance(error, CourseError) or is_of_the_disk(error):
            raise
        raise hub_error(error, request["repo"]) from error
    finally:
        logging.getLogger("huggingface_hub").removeHandler(retries)


if __name__ == "__main__":
    # os._exit skips the end of the interpreter, which takes seconds once torch is imported.
    os._exit(run_worker(work, sys.argv[1]))
