"""Shows a text as tokens, the files of a logged model, figures side by side, and answers over time."""

import html
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from helpers.show.tables import NO_MATHEMATICS, STAGES, BarTable, Table, Timeline

# The purpose of each file of a logged model, by the end of its name.
FILES = {
    "MLmodel": "how to load it: flavors, signature, versions",
    "requirements.txt": "what pip has to install",
    "conda.yaml": "the same for conda",
    "python_env.yaml": "which Python, and where the requirements stand",
    "serving_input_example.json": "the example as the body of an HTTP request",
    "input_example.json": "the example that you logged",
    "registered_model_meta": "its name and version in the registry",
    "model_card.md": "what the model's makers say of it",
    "model_card_data.yaml": "the fields on top of that card",
    "LICENSE.txt": "the licence of the weights",
    "index.json": "which weight lies in which file",
    ".safetensors": "weights",
    "genai_config.json": "how onnxruntime-genai runs the model",
    "generation_config.json": "settings of an answer, from the model's makers",
    "tokenizer_config.json": "what the tokenizer is called and how it is set",
    "tokenizer.json": "the tokenizer: pieces of text and their numbers",
    "config.json": "layers, sizes, vocabulary: the model's shape",
    ".jinja": "the chat template: messages to one text",
    ".onnx": "the computation, as a graph",
    ".onnx.data": "the weights of that graph",
    ".py": "the wrapper, as source",
}
# For each figure of `measure`: its name, its format, its scale, and which bar is better.
FIGURES = {
    "load_seconds": ("load", "{:.2f} s", 1, "shorter"),
    "first_token_seconds": ("first token", "{:.2f} s", 1, "shorter"),
    "tokens_per_second": ("then", "{:.1f} tokens per second", 1, "longer"),
    "peak_memory_bytes": ("peak memory", "{:,.0f} MB", 1e-6, "shorter"),
    "disk_bytes": ("on disk", "{:,.0f} MB", 1e-6, "shorter"),
}


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text: number, text, and whether it is markup. HTML shows boxes, and text a table."""

    rows: tuple[tuple[int, str, bool], ...]

    def _repr_html_(self) -> str:
        box = (
            "display: inline-block; margin: 2px; padding: 0 4px; border: 1px {} currentColor; "
            "font-family: monospace; text-align: center; white-space: pre"
        )
        boxes = "".join(
            f'<li style="{box.format("dashed" if markup else "solid")}">{html.escape(piece)}<br>'
            f"<small>{number}{' markup' if markup else ''}</small></li>"
            for number, piece, markup in self.rows
        )
        return f'<ol {NO_MATHEMATICS} style="list-style: none; padding: 0; margin: 0">{boxes}</ol>'

    def __repr__(self) -> str:
        rows = tuple(
            (str(number), piece, "markup" if markup else "text")
            for number, piece, markup in self.rows
        )
        return repr(Table(f"{len(rows)} tokens", ("number", "piece", "kind"), rows))


def show_tokens(tokenizer, text: str) -> Tokens:
    """Return the tokens of a text by a Hugging Face tokenizer, with markup marked.

    A space is shown as ``␣`` and a line break as ``⏎``; ``�`` is a part of a letter.
    """
    markup = set(tokenizer.get_added_vocab().values())
    visible = str.maketrans({" ": "␣", "\n": "⏎", "\r": "⏎", "\t": "⇥"})
    return Tokens(
        tuple(
            (number, tokenizer.decode([number]).translate(visible), number in markup)
            for number in tokenizer.encode(text, add_special_tokens=False)
        )
    )


def show_folder(folder: Path | str) -> Table:
    """Return a table of a logged model's files: path, size in bytes, purpose."""
    files = sorted(
        (path for path in Path(folder).rglob("*") if path.is_file()),
        key=lambda path: (len(path.relative_to(folder).parts), path.name),
    )
    return Table(
        "What is in the folder",
        ("file", "bytes", "what it is for"),
        tuple(
            (path.relative_to(folder).as_posix(), f"{path.stat().st_size:,}", _purpose(path.name))
            for path in files
        ),
    )


def _purpose(name):
    return FILES.get(max((end for end in FILES if name.endswith(end)), key=len, default=""), "")


def compare_figures(figures: dict[str, dict[str, float]]) -> BarTable:
    """Return a table with a bar for each figure of each page.

    Parameters
    ----------
    figures : dict
        What ``measure`` returned, by the page's name. A missing figure has no bar.
    """
    rows = []
    for figure, (what, form, scale, better) in FIGURES.items():
        values = {
            page: measured[figure]
            for page, measured in figures.items()
            # MLflow stores infinity as the largest float.
            if 0 <= measured.get(figure, math.nan) < sys.float_info.max
        }
        longest = max(values.values(), default=0) or 1
        rows += [
            (
                f"{what} ({better} is better)",
                page,
                form.format(value * scale),
                f"{value / longest:.4f}",
            )
            for page, value in values.items()
        ]
        if figure == "tokens_per_second":
            rows += [
                (what, page, "the answer was too short to measure", "0")
                for page, measured in figures.items()
                if "first_token_seconds" in measured and figure not in measured
            ]
    return BarTable("Side by side", ("figure", "page", "measured", "bar"), tuple(rows))


def show_timeline(caption: str, traces: dict[str, list]) -> Timeline:
    """Return a picture of how long the chat model's requests waited, were read and were answered.

    Parameters
    ----------
    caption : str
        What the picture shows.
    traces : dict
        The spans of each caller's trace, by the caller's name. The spans wait, prefill and decode
        are shown.
    """
    shown = {
        name: [span for span in spans if span.name in STAGES] for name, spans in traces.items()
    }
    start = min(span.start_time_ns for spans in shown.values() for span in spans)
    whole = max(span.end_time_ns for spans in shown.values() for span in spans) - start or 1
    return Timeline(
        caption,
        (),
        tuple(
            (
                name,
                tuple(
                    (
                        span.name,
                        (span.start_time_ns - start) / whole,
                        (span.end_time_ns - start) / whole,
                    )
                    for span in sorted(spans, key=lambda span: span.start_time_ns)
                ),
            )
            for name, spans in shown.items()
        ),
    )
