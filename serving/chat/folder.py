"""Reads a model's configuration: lengths, end tokens, the ONNX file, names of inputs and outputs.

The folder is what onnxruntime-genai's builder writes. This file opens no model: `decoder` does.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from mlflow.protos.databricks_pb2 import INVALID_STATE

from .contract import Refusal, as_whole_number

# A graph with two sets of rotary factors compares the length with the most that the short factors
# are made for.
ROPE_SWITCH = re.compile(
    rb"/model/constants/[^\x00-\x1f]*/(\d+)\x12.{1,3}/model/rope_caches_subgraph/Greater", re.S
)
ONNX_FILE = re.compile(r"(\w[\w.-]{0,100}/){0,3}\w[\w.-]{0,100}\.onnx")
OTHER_KINDS = {"encoder", "vision", "speech", "embedding"}
CACHE_NAMES = {
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}


@dataclass(frozen=True)
class Config:
    """What a model's folder says of its model.

    Attributes
    ----------
    onnx_file
        The model's graph.
    context_length
        The most tokens of a prompt and its answer together.
    end_tokens
        The tokens that end an answer.
    vocab_size
        The number of logits for each token.
    head_size, layers
        The size of an attention head, and the number of layers: the key/value cache has two tensors
        for each layer.
    names
        The names of the graph's inputs and outputs, by their names in ``genai_config.json``. Those
        of the cache hold a ``%d`` for the layer.
    """

    onnx_file: Path
    context_length: int
    end_tokens: tuple[int, ...]
    vocab_size: int
    head_size: int
    layers: int
    names: dict[str, str]


def unusable(reason: str) -> Refusal:
    """Return the error that says why a folder can't be served."""
    return Refusal(
        f"This folder is no model that can be served: {reason}.",
        "unusable_model",
        error_code=INVALID_STATE,
    )


def read_json(path: Path, needed: bool = True) -> dict:
    """Return the object in a JSON file; an empty one for a missing file that is not ``needed``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if needed or path.exists() else {}
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise unusable(f"{path.name} is missing, or not an object in JSON")
    return value


def read_config(folder: Path) -> Config:
    """Read ``genai_config.json``. A Refusal says what can't be served.

    Builders differ: one end token or a list of them; the model's context length, or the search's.
    """
    text = read_json(folder / "genai_config.json")
    model = _object(text, "model")
    search = _object(text, "search")
    decoder = model.get("decoder")
    if not isinstance(decoder, dict) or not OTHER_KINDS.isdisjoint(model):
        raise unusable("genai_config.json describes something else than a decoder of text")
    if "custom_ops_library" in json.dumps(text):
        raise unusable("genai_config.json asks for a library of its own, which is code")
    context_length = _number(model.get("context_length"), 2) or _number(search.get("max_length"), 2)
    ends = model.get("eos_token_id")
    ends = tuple(
        token
        for token in (ends if isinstance(ends, list) else [ends])
        if _number(token, 0) is not None
    )
    vocab_size = _number(model.get("vocab_size"), 1)
    if not (context_length and ends and vocab_size and max(ends) < vocab_size):
        raise unusable(
            "genai_config.json lacks a context_length, eos_token_id or vocab_size that can be"
        )
    head_size = _number(decoder.get("head_size"), 1)
    layers = _number(decoder.get("num_hidden_layers"), 1)
    if not (head_size and layers):
        raise unusable("genai_config.json lacks its decoder's head_size or num_hidden_layers")
    name = decoder.get("filename")
    if not isinstance(name, str) or not ONNX_FILE.fullmatch(name) or not (folder / name).is_file():
        raise unusable("genai_config.json names no ONNX file in its folder")
    window = _object(decoder, "sliding_window")
    if not window.get("layers"):
        # Such an export sees all tokens, and its model was trained to see a window of them. Up to
        # the window's size both are the same.
        context_length = min(
            context_length, _number(window.get("window_size"), 1) or context_length
        )
    if switch := ROPE_SWITCH.search((folder / name).read_bytes()):
        # Beyond the switch, the model would read all tokens anew with other rotary factors.
        context_length = min(context_length, int(switch[1]))
    names = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "logits": "logits",
    } | CACHE_NAMES
    given = _object(decoder, "inputs") | _object(decoder, "outputs")
    names |= {key: given[key] for key in names if isinstance(given.get(key), str)}
    if not all(names[key].count("%d") == names[key].count("%") == 1 for key in CACHE_NAMES):
        raise unusable(
            "genai_config.json names tensors of the cache without a place for the layer's number"
        )
    return Config(folder / name, context_length, ends, vocab_size, head_size, layers, names)


def _object(values, name):
    return values[name] if isinstance(values.get(name), dict) else {}


def _number(value, least):
    """Return a whole number that is at least ``least``, None for anything else."""
    value = as_whole_number(value)
    return value if type(value) is int and least <= value < 2**31 else None
