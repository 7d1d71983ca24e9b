"""What the folders of a prepared model hold."""

import json
from pathlib import Path

from helpers.models.prepare import PreparedModel


def names(folder: Path) -> set[str]:
    """Return the names of a folder's files."""
    return {path.name for path in folder.iterdir()}


def check_entry(prepared: PreparedModel) -> None:
    """Hold a model's folders against its entry in the catalogue."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(prepared.transformers_dir, trust_remote_code=False)
    assert model.num_parameters() == prepared.entry.parameters
    assert model.dtype.is_floating_point
    assert model.config.max_position_embeddings == prepared.entry.context_length
    genai = json.loads((prepared.onnx_dir / "genai_config.json").read_text())
    assert genai["model"]["context_length"] == prepared.entry.context_length
    files = [path for path in prepared.onnx_dir.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) / 1e6 <= prepared.entry.disk
