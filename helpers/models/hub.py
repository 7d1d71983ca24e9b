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
from helpers.models.hub_errors import hub_error, is_other_size, status_of, token_place
from helpers.models.loadable import (
    INDEX,
    choose_weights,
    load_tokenizer,
    other_revision,
    refuse_other_engine,
    refuse_other_model,
    refuse_other_weights,
    refuse_quantized,
)
from helpers.models.space import check_disk, check_memory, memory_needed
from helpers.models.steps import answer, is_of_the_disk, tell

# Endings of the files that a tokenizer, a configuration or a reader needs.
SMALL = (".json", ".jinja", ".txt", ".model", "README.md", "LICENSE")
LARGEST_SMALL = 100_000_000  # bytes


@dataclass(frozen=True)
class Download:
    """The files of one commit that a track may need, and where they are written.

    Attributes
    ----------
    repo : str
        ``org/name``.
    info : ModelInfo
        What the Hub says about the commit.
    files : dict of str to RepoSibling
        Size and hash of each file, by its path in the track's folder.
    prefix : str
        That folder in the repository, such as ``"cpu/"``; empty for the root.
    headers : dict
        What authenticates a request.
    folder, finished : Path
        Files are written to ``folder``. One that is whole in ``finished`` is not downloaded again.
    """

    repo: str
    info: ModelInfo
    files: dict[str, RepoSibling]
    prefix: str
    headers: dict[str, str]
    folder: Path
    finished: Path

    def path(self, name: str) -> Path:
        """Return where a file is that has been downloaded."""
        return next(path for path in (self.folder / name, self.finished / name) if path.is_file())

    def read_json(self, name: str) -> dict:
        """Return the JSON object in a file; an empty one if the file is missing or holds something else."""
        try:
            content = json.loads(self.path(name).read_text(encoding="utf-8"))
        except (StopIteration, ValueError, RecursionError):
            return {}
        return content if name in self.files and isinstance(content, dict) else {}

    def is_whole(self, path: Path, name: str) -> bool:
        """Tell whether the file at ``path`` has the size and the hash that the Hub lists for ``name``."""
        listed = self.files[name]
        if not is_size(path, listed.size):
            return False
        if listed.lfs:
            return sha256(path) == listed.lfs.sha256
        return git_hash(path.read_bytes()) == listed.blob_id

    def size(self, names: list[str]) -> int:
        """Return the bytes of these files."""
        return sum(self.files[name].size for name in names)

    def missing(self, names: list[str]) -> int:
        """Return the bytes of these files that are not here yet."""
        return sum(max(self.files[name].size - self._arrived(name), 0) for name in names)

    def _arrived(self, name):
        places = (self.folder / name, _incomplete(self.folder / name), self.finished / name)
        return max(path.stat().st_size if path.is_file() else 0 for path in places)

    def fetch(self, names: list[str], progress: "Progress") -> None:
        """Download each file that is not whole yet, and check its hash."""
        for name in names:
            if any(self.is_whole(place / name, name) for place in (self.folder, self.finished)):
                progress.update(self.files[name].size)
            else:
                self._fetch_one(name, progress)

    def _fetch_one(self, name, progress):
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        incomplete = _incomplete(target)
        url = hf_hub_url(self.repo, self.prefix + name, revision=self.info.sha)
        try:
            with incomplete.open("ab") as stream:
                # snapshot_download starts an interrupted file from its beginning; http_get resumes.
                http_get(
                    url,
                    stream,
                    resume_size=min(stream.tell(), self.files[name].size),
                    headers=self.headers,
                    expected_size=self.files[name].size,
                    tqdm_class=progress.bar,
                )
        except OSError as error:
            if is_other_size(error):
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


def _incomplete(path):
    return path.with_name(path.name + ".incomplete")


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
    folder: Path,
    finished: Path,
    revision: str | None = None,
    commit: str | None = None,
    onnx_folder: str | None = None,
) -> dict:
    """Download one track's files into ``folder``, except for those that are whole in ``finished``.

    Parameters
    ----------
    track : str
        ``"transformers"``, or ``"onnx"``, whose files are in one folder of the repository:
        ``onnx_folder``, by default the one for the CPU.
    revision : str, optional
        A commit, branch or tag; by default the default branch.
    commit : str, optional
        The commit of the files in ``finished``. It is taken as long as the repository has it.

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
        refuse_other_weights(repo, listing, base if isinstance(base, str) else None)
    files = {
        name.removeprefix(prefix): file for name, file in listing.items() if name.startswith(prefix)
    }
    files = Download(repo, info, files, prefix, headers, folder, finished)

    small = [name for name in files.files if _is_small(name, files.files[name].size)]
    check_disk(repo, files.missing(small) / 1e6, folder)
    files.fetch(small, Progress(0))
    config = _read_config(files, "genai_config.json" if track == "onnx" else "config.json")
    facts = _read_facts(files)
    weights = _choose_onnx(files, config) if track == "onnx" else _choose_safetensors(files, config)
    wanted = [*small, *weights]
    facts["bytes"] = files.size(wanted)
    check_memory(repo, memory_needed(facts["bytes"]))
    check_disk(repo, files.missing(wanted) / 1e6, folder)
    _refuse_unloadable(track, files, small, config)

    files.fetch(wanted, Progress(facts["bytes"]))
    return facts | {"files": _without_unreadable_card(files, wanted)}


def _read_info(repo, revision, commit):
    """Return what the Hub says about a commit, and the headers that it accepts.

    If the user's token is not valid, the Hub refuses it even for a public repository: then the
    repository is asked for without a token.
    """

    def ask(token):
        headers = build_hf_headers(token=token)
        try:
            return _model_info(repo, commit or revision, headers), headers
        except RevisionNotFoundError:
            if not commit:
                raise
            return _model_info(repo, revision, headers), headers  # the recorded commit is gone

    problem = "is not accepted by the Hub"
    try:
        return ask(None)
    except HfHubHTTPError as error:
        if status_of(error) != httpx.codes.UNAUTHORIZED or not get_token():
            raise
    except (UnicodeError, httpx.LocalProtocolError):
        problem = "has characters that no token has"
    place, fix = token_place(os.environ)
    try:
        found = ask(False)
    except HfHubHTTPError as error:
        raise CourseError(
            "hub-token",
            f"The token in {place} {problem}, and without one the Hub does not give {repo}.",
            fix,
        ) from error
    tell(f"The token in {place} {problem}. Going on without a token. {fix}")
    return found


def _model_info(repo, revision, headers):
    return HfApi(headers=headers, token=False).model_info(
        repo,
        revision=revision,
        files_metadata=True,
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
    )


def _is_small(name, size):
    """Tell whether a file is downloaded before the weights, to decide whether the track can use them."""
    in_root = "/" not in name or name.startswith("additional_chat_templates/")
    return in_root and name.endswith(SMALL) and size <= LARGEST_SMALL


def _read_config(files, name):
    """Return the content of the file that describes the model."""
    if config := files.read_json(name):
        return config
    what = f"is no JSON of {files.repo} that describes a model"
    if name not in files.files:
        what = f"is missing in {files.repo}, so nothing says what kind of model it is"
    raise other_revision("hub-config", files.repo, f"{name} {what}.")


def _read_facts(files):
    """Return what the Hub and the configuration say about the model, as far as the course shows it."""
    config = files.read_json("config.json")
    genai = files.read_json("genai_config.json").get("model", {})
    nested = config.get("text_config")
    lengths = (
        genai.get("context_length"),
        config.get("max_position_embeddings"),
        config.get("n_positions"),
        nested.get("max_position_embeddings") if isinstance(nested, dict) else None,
    )
    context_length = next((length for length in lengths if type(length) is int), None)
    if context_length is None:
        raise CourseError(
            "hub-context",
            f"{files.repo} does not say how many tokens its model takes.",
            "Choose another repository; its config.json has max_position_embeddings.",
        )
    info = files.info
    licence = (info.card_data or {}).get("license")
    return {
        "commit": info.sha,
        "licence": licence if isinstance(licence, str) else "not stated",
        "task": "text-generation",
        "context_length": context_length,
        "parameters": info.safetensors.total if info.safetensors and not genai else None,
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
        tell(
            f"{repo} has {len(on_cpu)} ONNX folders for the CPU: {', '.join(on_cpu)}. {chosen} is taken; to "
            "take another, give the model an entry with its `folder` in data/models.toml, as "
            "phi-3-mini-4k has."
        )
    return chosen


def _choose_onnx(files, config):
    """Return the names of the ONNX model and its weights."""
    model = config.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    graph = decoder.get("filename") if isinstance(decoder, dict) else None
    if not isinstance(graph, str) or graph not in files.files or not graph.endswith(".onnx"):
        raise other_revision(
            "hub-graph",
            files.repo,
            f"genai_config.json of {files.repo} names no ONNX file that is there.",
        )
    return [
        name
        for name in files.files
        if "/" not in name and (name.endswith(".onnx") or re.search(r"[._]data(\.\d+)?$", name))
    ]


def _choose_safetensors(files, config):
    """Return the names of the weights that transformers loads."""
    refuse_quantized(files.repo, files.files, config)
    weights = choose_weights(files.repo, files.files, files.read_json(INDEX))
    others = sorted(
        name
        for name in files.files
        if name.endswith(".safetensors") and "/" not in name and name not in weights
    )
    if others:
        more = f" and {len(weights) - 1} more" if weights[1:] else ""
        tell(
            f"{files.repo} has several sets of weights: {weights[0]}{more} are downloaded, which "
            f"transformers loads, but not {', '.join(others)}."
        )
    return weights


# --- can the track load it? -------------------------------------------------------------------


def _refuse_unloadable(track, files, small, config):
    """Let the libraries read the small files, in a folder that has no weights."""
    if track == "onnx" and "tokenizer.json" not in files.files:
        raise CourseError(
            "hub-no-tokenizer",
            f"{files.repo} has no tokenizer.json, which track B and the chat model read.",
            "Choose a repository that has one; most that transformers has saved do.",
        )
    users_template = files.finished / "chat_template.jinja"
    with tempfile.TemporaryDirectory(dir=files.folder, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for file in small:
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copy(files.path(file), folder / file)
        if users_template.is_file():
            shutil.copy(users_template, folder)
        if track == "onnx":
            refuse_other_engine(files.repo, folder, config, config["model"]["decoder"]["filename"])
        else:
            refuse_other_model(files.repo, folder, config)
        tokenizer = load_tokenizer(files.repo, folder)
        try:
            tokenizer.get_chat_template()
        except ValueError:  # there is none, or none of several is called "default"
            raise CourseError(
                "hub-no-template",
                f"{files.repo} has no chat template: nothing says how a conversation becomes its "
                "prompt, and llm/v1/chat needs that.",
                "Choose an instruct model, or write the template that its authors describe to "
                f"{users_template}, and run this again.",
            ) from None


def _without_unreadable_card(files, names):
    """Return the names without a model card that cannot be read: the course then writes one."""
    if "README.md" in names:
        try:
            ModelCard.load(files.path("README.md"))
        except (ValueError, yaml.YAMLError):  # UnicodeDecodeError is a ValueError
            return [name for name in names if name != "README.md"]
    return names


# --- the process ------------------------------------------------------------------------------


class _ToldRetries(logging.Handler):
    """Shows the user what huggingface_hub logs while it waits and tries again, without addresses."""

    def emit(self, record):
        for line in record.getMessage().splitlines():
            if "://" not in line:
                tell(f"huggingface_hub: {line}")


def work(order: dict) -> dict:
    """Download as ``HubRepository.make`` orders; return the facts and the files."""
    retries = _ToldRetries(logging.WARNING)
    logging.getLogger("huggingface_hub").addHandler(retries)
    try:
        paths = {name: Path(order[name]) for name in ("folder", "finished")}
        return download(**order | paths)
    except Exception as error:
        # A full disk has its sentence in helpers.models.space.
        if isinstance(error, CourseError) or is_of_the_disk(error):
            raise
        raise hub_error(error, order["repo"]) from error
    finally:
        logging.getLogger("huggingface_hub").removeHandler(retries)


if __name__ == "__main__":
    # At once: torch takes seconds to end.
    os._exit(answer(work, sys.argv[1]))
