"""Tells by a repository's small files whether a track can load what is in it, and refuses what it cannot.

The names of the files and what the small ones say come in, before the large ones travel; a
CourseError goes out. It keeps no lists of kinds: transformers, the engine of track B and its
builder are asked themselves.
"""

import copy
import importlib.metadata
import re
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path

from helpers.errors import CourseError
from helpers.models.steps import is_of_the_disk

# Formats that run code of their author's when they are loaded, or that transformers turns into
# such.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Files in which older tools say how they have packed weights. Newer ones say it in config.json.
PACKED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# Types of weights, and of the masks and counters beside them, in the safetensors' own words.
PLAIN = {"F64", "F32", "F16", "BF16", "I64", "U8", "BOOL"}


# --- track A: by the names --------------------------------------------------------------------


def refuse_other_weights(repo: str, names: Collection[str], base: str | None) -> None:
    """Raise an error where the names of a repository's files say that it has no weights for ``transformers``.

    ``base`` is the repository that it was made from, where its card says so.
    """
    root = [name for name in names if "/" not in name]
    other = (
        f"Choose hub:{base}, which it was made from."
        if base
        else "Choose the repository that it was made from; its card names it."
    )
    if "model_index.json" in root:
        raise CourseError(
            "hub-task",
            f"{repo} is a pipeline of diffusers (it has a model_index.json), and the course "
            "runs text-generation.",
            "Choose an instruct model.",
        )
    if "modules.json" in root:
        raise CourseError(
            "hub-task",
            f"{repo} is a model for sentence-transformers (it has a modules.json): it makes "
            "vectors, no text.",
            "Choose an instruct model.",
        )
    if WEIGHTS in root or INDEX in root:
        return
    if "adapter_config.json" in root:
        raise CourseError(
            "hub-adapter",
            f"{repo} is an adapter (LoRA): it changes the weights of another model, and "
            "has none of its own.",
            f"Choose {f'hub:{base}' if base else 'the model that its card names'}, or a repository in "
            "which the adapter has been merged.",
        )
    weights = [name for name in root if name.endswith(".safetensors")]
    if any(name.endswith(".gguf") for name in names) and not weights:
        raise CourseError(
            "hub-gguf", f"{repo} has its weights as GGUF, which is for llama.cpp.", other
        )
    pickles = [name for name in root if name.endswith(PICKLES)]
    if pickles and not weights:
        raise CourseError(
            "hub-pickles",
            f"{repo} has its weights only as pickles, and a pickle can run any code while "
            "it is loaded.",
            f"Choose a repository with {WEIGHTS}; some have it in a branch: "
            f"hub:{repo}@refs/pr/1, for one.",
        )
    if not weights:
        deeper = sorted(
            {name.rpartition("/")[0] for name in names if name.endswith(".safetensors")}
        )
        more = (
            f"; what is in its folder {deeper[0]} transformers does not look for" if deeper else ""
        )
        raise CourseError(
            "hub-no-safetensors",
            f"{repo} has no {WEIGHTS}, so track A has nothing to load{more}.",
            other,
        )


def weight_files(repo: str, names: Collection[str], config: dict, index: dict) -> list[str]:
    """Return the names of the safetensors that transformers loads of a folder with these files.

    ``index`` is what model.safetensors.index.json, or the index that ``config`` names, holds.
    """
    # The order is that of _get_resolved_checkpoint_files in transformers/modeling_utils.py.
    first = first_file(names, config)
    if first is None:
        found = ", ".join(
            sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
        )
        raise CourseError(
            "hub-no-safetensors",
            f"{repo} has its weights as {found}, and transformers looks for {WEIGHTS} or {INDEX}.",
            f"Choose another repository of this model, or another revision: hub:{repo}@REVISION.",
        )
    chosen = [first]
    if first.endswith(".index.json"):
        weight_map = index.get("weight_map")
        chosen = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not chosen or not all(isinstance(name, str) for name in chosen):
            raise other_revision("hub-index", repo, f"{first} of {repo} names no weights.")
    for name in sorted(set(chosen)):
        # Whatever an index says: nothing but safetensors comes.
        if name not in names or not name.endswith(".safetensors"):
            raise other_revision(
                "hub-weights",
                repo,
                f"{repo} says that it has {name}, and the Hub has no such safetensors.",
            )
    return sorted(set(chosen))


def first_file(names: Collection[str], config: dict) -> str | None:
    """Return the file of weights, or the index of them, that transformers opens first; None where there is none."""
    named = config.get("transformers_weights")
    if isinstance(named, str):
        return named
    return next((name for name in (WEIGHTS, INDEX) if name in names), None)


def other_revision(code: str, repo: str, what: str) -> CourseError:
    """Return the error for a repository whose files do not agree."""
    return CourseError(
        code,
        what,
        f"Look at https://huggingface.co/{repo}/tree/main, and choose another revision: "
        f"hub:{repo}@REVISION.",
    )


# --- track A: by what the small files say -----------------------------------------------------


def refuse_packed(repo: str, names: Collection[str], config: dict, types: dict[str, int]) -> None:
    """Raise an error where weights are quantized in a way that transformers does not see, and would read as plain.

    ``types`` has the number of weights of each type, as the Hub counts them; it may be empty.
    """
    if config.get("quantization_config"):
        return  # transformers sees it, and is asked
    said = next((name for name in PACKED if name in names), None)
    if isinstance(config.get("quantization"), dict):  # MLX
        said = "the key quantization of config.json"
    packed = {name: count for name, count in types.items() if name not in PLAIN}
    if not said and sum(packed.values()) > sum(types.values()) / 100:
        said = f"{max(packed, key=packed.get)} among the types of its weights"
    if said:
        raise _quantized(repo, f"{said} says so, and transformers would read them as plain ones")


def _quantized(repo, why):
    return CourseError(
        "hub-quantized",
        f"{repo} has quantized weights that the course's packages cannot load: {why}.",
        "Choose the repository that it was made from, which has plain weights, or a smaller model.",
    )


def refuse_unknown_model(repo: str, folder: Path, config: dict) -> None:
    """Ask transformers whether it makes a causal language model of config.json in ``folder``; raise an error if not.

    The model is made on the device "meta", where it has shapes and no weights.
    """
    # Now: it takes seconds, and whoever is refused earlier is not to wait for them.
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
    from transformers.quantizers.auto import AutoHfQuantizer, get_hf_quantizer

    kind, version = config.get("model_type"), importlib.metadata.version("transformers")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise CourseError(
                "hub-code",
                f"{repo} needs code of its own to be loaded, and the course runs no "
                "repository's code.",
                "Choose a model of a kind that transformers has built in, such as Phi-3.",
            )
        raise _architecture(
            repo,
            f"the model_type of its config.json is {kind!r:.80}, which transformers {version} "
            "does not know",
        )
    loaded = _asked(
        lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True),
        lambda why: other_revision(
            "hub-config", repo, f"transformers {version} cannot read config.json of {repo}: {why}."
        ),
    )
    if type(loaded) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _architecture(
            repo, f"transformers {version} has no causal language model of the type {kind}"
        )
    # A class that writes text has weights for it; of any other, AutoModelForCausalLM would make up
    # what is missing.
    names, writers = (
        loaded.architectures or [],
        {
            model.lower()
            for models in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
            for model in (models if isinstance(models, tuple) else (models,))
        },
    )
    if names and not any(str(name).lower() in writers for name in names):
        raise _architecture(repo, f"its config.json says that it is a {names[0]!s:.80}")
    quantizer = None
    if loaded_as := getattr(loaded, "quantization_config", None):
        quantizer = _asked(
            lambda: _quantizer(get_hf_quantizer, AutoHfQuantizer, loaded, loaded_as),
            lambda why: _quantized(repo, why),
        )
    dtype = _asked(
        lambda: _number_type(torch, loaded.dtype),
        lambda why: CourseError(
            "hub-dtype",
            f"config.json of {repo} wants numbers of the type {str(loaded.dtype).removeprefix('torch.'):.40}, "
            "with which a CPU runs no model.",
            "Choose a repository of this model in bfloat16, float16 or float32.",
        ),
    )

    def make():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(loaded), trust_remote_code=False)
            if quantizer:
                quantizer.preprocess_model(
                    model=model,
                    dtype=dtype,
                    device_map=None,
                    checkpoint_files=[],
                    use_kernels=False,
                )

    _asked(
        make,
        (lambda why: _quantized(repo, why))
        if quantizer
        else lambda why: other_revision(
            "hub-config",
            repo,
            f"transformers {version} cannot make a model of config.json of {repo}: {why}.",
        ),
    )


def _quantizer(get_hf_quantizer, kinds, config, quantization):
    """Return what transformers loads quantized weights with; raise an error where it cannot, here, and save them."""
    if not kinds.supports_quant_method(quantization):
        raise ValueError(f"transformers does not know {quantization.get('quant_method')!r:.40}")
    quantizer, _, device_map = get_hf_quantizer(copy.deepcopy(config), None, None, True, {})
    if device_map not in (None, "cpu", {"": "cpu"}):
        raise ValueError("they are for another processor")
    # MLflow logs a model by saving it. What transformers unpacks while it loads, such as fp8 and
    # mxfp4, it does answer with, and saves as something else: the logged copy would be another
    # model.
    if not quantizer.is_serializable() or quantizer.get_weight_conversions():
        raise ValueError(
            "transformers unpacks them while it loads, and could not save them for MLflow as they were"
        )
    return quantizer


def _number_type(torch, dtype):
    """Return a model's type of number; raise an error where it is none that transformers makes a model of."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)  # as transformers does; torch refuses integers and 8 bit
    finally:
        torch.set_default_dtype(before)
    return dtype


def _architecture(repo, why):
    return CourseError(
        "hub-architecture",
        f"{repo} is no language model that track A can load: {why}.",
        "Choose an instruct model whose config.json has architectures that end with ForCausalLM, such "
        "as Phi-3.",
    )


def _asked(call, refusal):
    """Return what a call of a library returns; raise ``refusal`` with its first sentence where it raises anything."""
    try:
        return call()
    # What a library raises for a file that it does not expect is no part of its contract.
    except Exception as error:
        if is_of_the_disk(error):
            raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise refusal(f"{first:.200}".rstrip(".: ") or type(error).__name__) from error


def make_tokenizer(repo: str, folder: Path) -> object:
    """Return the tokenizer that transformers makes of the files in ``folder``; raise an error where it makes none."""
    from transformers import AutoTokenizer

    def make():
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        # Without its vocabulary, transformers makes some kinds of tokenizer all the same: they have
        # no pieces.
        if set(tokenizer.encode("Hello", add_special_tokens=False)) <= {tokenizer.unk_token_id}:
            raise ValueError("it has no piece for a letter")
        return tokenizer

    return _asked(
        make,
        lambda why: CourseError(
            "hub-no-tokenizer",
            f"transformers cannot make a tokenizer of the files of {repo}: {why}.",
            "Choose a repository that has a tokenizer.json; most that transformers has saved do.",
        ),
    )


# --- track B ----------------------------------------------------------------------------------


def refuse_other_engine(repo: str, folder: Path, config: dict, graph: str) -> None:
    """Ask onnxruntime-genai whether it loads what genai_config.json in ``folder`` describes; raise an error if not.

    The folder has no ONNX files: where the engine wants to open ``graph``, it has taken all the
    rest.
    """
    for key, value in walk(config):
        if key == "provider_options" and value:
            names = (
                [name for entry in value if isinstance(entry, dict) for name in entry]
                if isinstance(value, list)
                else []
            )
            raise CourseError(
                "hub-library",
                f"genai_config.json of {repo} sets {key}"
                + (f" for {names[0]!s:.40}" if names else "")
                + ", which can load a library and run any "
                "code.",
                "Choose a repository or a folder of it that was made for the CPU.",
            )
        if key == "custom_ops_library":
            raise CourseError(
                "hub-library",
                f"genai_config.json of {repo} sets {key}, which can load a library and "
                "run any code.",
                "Choose another repository: the course takes plain models for the CPU.",
            )
    model, version = config["model"], importlib.metadata.version("onnxruntime-genai")
    more = [key for key in ("vision", "speech", "audio", "embedding", "encoder") if model.get(key)]
    if more:
        raise CourseError(
            "hub-engine",
            f"{repo} has more than a decoder of text: genai_config.json has a section {more[0]}.",
            "Choose a model for text alone.",
        )
    import onnxruntime_genai as og

    try:
        og.Model(str(folder))
    except Exception as error:  # of Python's RuntimeError and what its binding makes of others
        if graph in str(error):
            return
        why = str(error).replace(f"{folder}/", "").replace(str(folder), "").strip().rstrip(".")
        raise CourseError(
            "hub-engine",
            f"onnxruntime-genai {version} does not load {repo}: {why:.200}.",
            "Choose another repository or revision of this model, or make the files here: python -m "
            "helpers prepare --model hub:ORG/NAME --export, with the model that this one was made "
            "from.",
        ) from None


def walk(value: object) -> Iterator[tuple]:
    """Yield every key and value of nested objects and lists."""
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        yield key, inner
        yield from walk(inner)


def refuse_unexportable(repo: str, config: dict) -> None:
    """Raise an error where the builder of onnxruntime-genai exports no model with this config.json for the CPU."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in exportable():
        raise CourseError(
            "hub-export",
            f"The builder of onnxruntime-genai "
            f"{importlib.metadata.version('onnxruntime-genai')} exports no {name!s:.80} for the CPU, "
            f"which {repo} is.",
            f"Leave --export out and choose track A for it, or look for its ONNX files: hub:{repo}-onnx.",
        )
    if config.get("quantization_config"):
        raise CourseError(
            "hub-export",
            f"{repo} has quantized weights, and an export starts from plain ones.",
            "Choose the repository that it was made from.",
        )


def exportable() -> set[str]:
    """Return the names of the architectures that the builder exports for the CPU."""
    # Its text is read: to import it would take seconds, and it lists them nowhere but in the chain
    # of its questions.
    builder = Path(find_spec("onnxruntime_genai").origin).with_name("models") / "builder.py"
    branches = re.findall(
        r"^    (?:el)?if (.*architectures\[0\] == .*):\n((?: {8}.*\n)*)",
        builder.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return {
        name
        for question, branch in branches
        if 'execution_provider = "cuda"' not in branch
        for name in re.findall(r'architectures\[0\] == "(\w+)"', question)
    }
