"""The models are really made, from nothing, and are what their entries say. The real one is there, too.

Run: python -m helpers test tests/nightly/test_models.py
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import torch
from support.prepared import check_entry, names
from support.steps import entry_of
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from helpers import prepare_model
from helpers.files import sha256
from helpers.models.catalogue import find_entry
from helpers.models.sources import Export, RandomWeights, ensure_folder, source_of


def test_a_model_is_made_whole_from_nothing_in_an_odd_path(cache, tiny):
    prepared = prepare_model("tiny-phi3")
    assert prepared.transformers_dir == cache / "tiny-phi3" / "transformers"
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    } <= names(prepared.transformers_dir)
    assert {"model.onnx", "genai_config.json", "tokenizer.json"} <= names(prepared.onnx_dir)
    config = json.loads((prepared.onnx_dir / "genai_config.json").read_text())
    assert config["model"]["type"] == "phi3"
    # Seeded: the weights are those of every other machine's tiny-phi3 with these pins.
    for name in ("model.safetensors", "tokenizer.json"):
        assert sha256(prepared.transformers_dir / name) == sha256(tiny.transformers_dir / name)
    assert not list(cache.rglob("*.partial"))


def test_the_entry_tells_the_truth_about_the_folders(smol):
    check_entry(smol)


def test_the_gguf_is_the_published_one(smol):
    (gguf,) = (smol.onnx_dir.parent / "gguf").glob("*.gguf")
    source = source_of(smol.entry, "transformers")
    with gguf.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == source.member_sha256
    assert Path(source.member).name == gguf.name


def test_nothing_is_asked_of_the_network_once_a_model_is_there(python):
    for name in ("tiny-phi3", "smollm2-135m"):
        result = python("-m", "helpers", "prepare", "--model", name, network=False)
        assert result.returncode == 0, result.stderr


def test_an_export_is_its_model_beyond_the_window_too_alone_and_in_a_batch_of_one_length(
    tmp_path, monkeypatch
):
    home = tmp_path / "hömes"
    home.mkdir()
    monkeypatch.delenv("COURSE_KIT", raising=False)

    class Windowed(RandomWeights):
        def make(self, partial, folder):
            super().make(partial, folder)
            config = Phi3Config.from_pretrained(partial, sliding_window=32)
            Phi3ForCausalLM.from_pretrained(partial, config=config).save_pretrained(partial)

    monkeypatch.setattr("helpers.models.sources.PRECISION", "fp32")
    ensure_folder(
        Export(entry_of("tiny-phi3"), Windowed(find_entry("tiny-phi3"), 1)), home / "onnx"
    )
    assert not list(home.rglob("builder-*"))
    reference = AutoModelForCausalLM.from_pretrained(home / "transformers")
    engine = og.Model(str(home / "onnx"))
    assert reference.config.sliding_window == 32
    # The graph gives the last place's logits alone, so og.Generator takes a batch of one length
    # only.
    for lengths in ([20], [100], [40, 40, 40]):
        rows = [
            [5 + (7 * place * place + length + number) % 500 for place in range(length)]
            for number, length in enumerate(lengths)
        ]
        settings = og.GeneratorParams(engine)
        settings.set_search_options(max_length=128, batch_size=len(rows), do_sample=False)
        generator = og.Generator(engine, settings)
        generator.append_tokens(
            np.array([row + [0] * (max(lengths) - len(row)) for row in rows], dtype=np.int32)
        )
        for _ in range(20):
            found = np.array(generator.get_logits())[:, -1].copy()
            for row, logits in zip(rows, found, strict=True):
                with torch.no_grad():
                    expected = reference(torch.tensor([row]), use_cache=False).logits[0, -1].numpy()
                assert np.abs(logits - expected).max() < 1e-3
            generator.generate_next_token()
            if generator.is_done():
                break
            for row, token in zip(rows, generator.get_next_tokens(), strict=True):
                row.append(int(token))
