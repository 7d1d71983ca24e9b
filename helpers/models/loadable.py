"""Refuses a repository of the Hugging Face Hub that a track cannot load, before its weights are downloaded.

File names are checked first. Then transformers or onnxruntime-genai loads the repository's small
files, and its own message is quoted.
"""

import importlib.metadata
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from helpers.errors import CourseError
from helpers.models.hub_errors import WEB
from helpers.models.steps import is_of_the_disk

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Loading a pickle can run any code of its author's.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


# --- track A ----------------------------------------------------------------------------------


def check_safetensors(repo: str, names: Collection[str], base: str | None) -> None:
    """Raise CourseError if a repository's file names show that transformers finds no safetensors there.

    ``base`` is the repository that this one was made from, if its model card names it.
    """
    root = [name for name in names if "/" not in name]
    instead = f"hub:{base}" if base else "the repository that its model card names as the base"
    if "model_index.json" in root or "modules.json" in root:
        library = "diffusers" if "model_index.json" in root else "sentence-transformers"
        raise CourseError(
            "hub-task",
            f"{repo} is a model for {library}, which writes no text.",
            "Choose an instruct model.",
        )
    if WEIGHTS in root or INDEX in root:
        return
    if "adapter_config.json" in root:
        raise CourseError(
            "hub-adapter",
            f"{repo} is an adapter (LoRA), which changes another model's weights and has none of its own.",
            f"Choose {instead}, or a repository in which the adapter has been merged.",
        )
    if any(name.endswith(".gguf") for name in names):
        raise CourseError(
            "hub-gguf",
            f"{repo} has its weights as GGUF, which is for llama.cpp.",
            f"Choose {instead}.",
        )
    if any(name.endswith(PICKLES) for name in root):
        raise CourseError(
            "hub-pickles",
            f"{repo} has its weights only as pickles, and loading a pickle can run any code.",
            f"Choose a repository with {WEIGHTS}; some have it in a branch: hub:{repo}@refs/pr/1, for one.",
        )
    found = sorted(name for name in names if name.endswith(".safetensors"))
    more = f"; it has {found[0]}, which transformers does not look for" if found else ""
    raise CourseError(
        "hub-no-safetensors",
        f"{repo} has no {WEIGHTS} and no {INDEX}{more}.",
        f"Choose {instead}, or another revision: hub:{repo}@REVISION.",
    )


def choose_weights(repo: str, names: Collection[str], index: dict) -> list[str]:
    """Return the safetensors files that transformers loads: one file, or all that the index lists.

    ``index`` is the content of model.safetensors.index.json, empty if there is no such file.
    """
    if WEIGHTS in names:  # transformers prefers it to an index
        return [WEIGHTS]
    weight_map = index.get("weight_map")
    chosen = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not chosen:
        raise inconsistent_error("hub-index", repo, f"{INDEX} of {repo} names no weights.")
    # transformers follows an index to a pickle, too.
    missing = [name for name in chosen if name not in names or not name.endswith(".safetensors")]
    if missing:
        what = f"{INDEX} of {repo} names {missing[0]}, which the Hub does not have as safetensors."
        raise inconsistent_error("hub-weights", repo, what)
    return sorted(chosen)


def inconsistent_error(code: str, repo: str, what: str) -> CourseError:
    """Return the error for a repository whose files contradict each other."""
    return CourseError(
        code,
        what,
        f"Look at {WEB}/{repo}/tree/main, and choose another revision: hub:{repo}@REVISION.",
    )


def refuse_quantized(repo: str, names: Collection[str], config: dict) -> None:
    """Raise CourseError if the weights are quantized.

    transformers needs another package for most kinds of quantized weights, reads some of them (of
    MLX, of old GPTQ) as if they were plain, and cannot save the others as MLflow needs it.
    """
    kind = config.get("quantization_config") or config.get("quantization")
    if kind or "quantize_config.json" in names:
        method = kind.get("quant_method") if isinstance(kind, dict) else None
        raise CourseError(
            "hub-quantized",
            f"{repo} has quantized weights{f' ({method})' if method else ''}, and track A takes plain ones.",
            "Choose the repository that it was made from, or a smaller model.",
        )


def check_architecture(repo: str, folder: Path, config: dict) -> None:
    """Raise CourseError unless transformers makes a causal language model from config.json in ``folder``.

    The model is made on the device "meta", which has shapes and no weights.
    """
    # Importing them takes seconds: a repository that is refused earlier does not have to wait.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    version = importlib.metadata.version("transformers")

    def to_error(why):
        if "custom code" in why:
            return CourseError(
                "hub-code",
                f"{repo} needs code of its own, and the course runs no code from a repository.",
                "Choose a model of a kind that transformers has built in, such as Phi-3.",
            )
        what = f"transformers {version} makes no language model from config.json of {repo}: {why}."
        if config.get("model_type") in list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            return inconsistent_error("hub-config", repo, what)
        return CourseError(
            "hub-architecture",
            what,
            "Choose an instruct model whose config.json names an architecture that ends with "
            "ForCausalLM, such as Phi-3.",
        )

    def make():
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(loaded, trust_remote_code=False)
        return type(model).__name__, loaded.architectures or []

    made, named = _translate_errors(make, repo, folder, to_error)
    # transformers would make up the weights that another architecture does not have.
    if named and made.lower() not in [name.lower() for name in named]:
        raise CourseError(
            "hub-architecture",
            f"config.json of {repo} names {named[0]}, and transformers would load it as {made}.",
            "Choose an instruct model whose config.json names an architecture that ends with "
            "ForCausalLM, such as Phi-3.",
        )


def load_tokenizer(repo: str, folder: Path) -> Any:
    """Return the tokenizer that transformers makes from ``folder``; raise CourseError if it makes none."""
    from transformers import AutoTokenizer

    def make():
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        # transformers makes some tokenizers without a vocabulary, for which every word is unknown.
        if set(tokenizer.encode("Hello", add_special_tokens=False)) <= {tokenizer.unk_token_id}:
            raise ValueError("it has no vocabulary")
        return tokenizer

    return _translate_errors(
        make,
        repo,
        folder,
        lambda why: CourseError(
            "hub-no-tokenizer",
            f"transformers cannot make a tokenizer from the files of {repo}: {why}.",
            "Choose a repository that has a tokenizer.json; most that transformers has saved do.",
        ),
    )


def _translate_errors(call, repo, folder, to_error):
    """Return what ``call`` returns; where it fails, raise what ``to_error`` makes of its first sentence."""
    try:
        return call()
    # transformers documents no list of what it raises for a file that it cannot read.
    except Exception as error:
        if is_of_the_disk(error):
            raise
        lines = [line.strip() for line in str(error).replace(str(folder), repo).splitlines()]
        why = next(filter(None, lines), type(error).__name__).split(". ")[0]
        raise to_error(f"{why:.200}".rstrip(".: ")) from error


# --- track B ----------------------------------------------------------------------------------


def check_genai_config(repo: str, folder: Path, config: dict, graph: str) -> None:
    """Raise CourseError unless onnxruntime-genai accepts genai_config.json in ``folder``.

    The folder has no ONNX files yet: once the engine asks for ``graph``, it has accepted the rest.
    """
    for key, value in _walk(config):
        if key == "custom_ops_library" or (key == "provider_options" and value):
            raise CourseError(
                "hub-library",
                f"genai_config.json of {repo} sets {key}, which can load a library and run any code.",
                "Choose a repository, or a folder of it, that was made for the CPU without such a library.",
            )
    import onnxruntime_genai as og

    try:
        og.Model(str(folder))
    except Exception as error:  # the engine raises RuntimeError and its own types
        if graph in str(error):
            return
        why = str(error).replace(f"{folder}/", "").replace(str(folder), "").strip().rstrip(".")
    else:
        why = f"it does not ask for {graph}"
    raise CourseError(
        "hub-engine",
        f"onnxruntime-genai {importlib.metadata.version('onnxruntime-genai')} does not load {repo}: {why:.200}.",
        "Choose a model for text alone or another revision, or make the files here: python -m helpers "
        "prepare --model hub:ORG/NAME --export, with the repository that this one was made from.",
    )


def _walk(value: object) -> Iterator[tuple]:
    """Yield every key and value of nested objects and lists."""
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield key, inner
        yield from _walk(inner)
