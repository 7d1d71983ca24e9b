"""The layout for crowds on the tiny model: as near to fp32 as int8 is, and nobody's company changes an answer.

Run: python -m helpers test tests/unit/helpers/test_crowd.py
"""

import runpy
import sys

import numpy as np
import onnxruntime_genai as og

from helpers.models.crowd import rewrite

LENGTHS = (40, 7, 23, 33, 2)
ROWS = [[5 + (7 * place * place + length) % 500 for place in range(length)] for length in LENGTHS]


def logits(engine, rows, steps=4):
    """Return the logits of each row for the first tokens of a greedy answer, by step."""
    options = og.GeneratorParams(engine)
    options.set_search_options(batch_size=len(rows), max_length=64, min_length=0, do_sample=False, num_beams=1)
    generator = og.Generator(engine, options)
    width = max(map(len, rows))
    found = []
    generator.append_tokens(np.array([row + [0] * (width - len(row)) for row in rows], dtype=np.int32))
    for _ in range(steps):
        found.append(np.array(generator.get_logits()).reshape(len(rows), -1).copy())
        generator.generate_next_token()
    return np.array(found)


def test_it_keeps_to_fp32_as_int8_does_and_no_answer_depends_on_its_company(tiny, tmp_path, monkeypatch):
    command = ["builder", "-m", "local", "-i", tiny.transformers_dir, "-o", tmp_path / "fp32", "-p", "fp32",
               "-e", "cpu", "-c", tmp_path / "cache"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))  # in this process: to import torch takes its time
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    rewrite(tmp_path / "fp32", tiny.onnx_dir, tmp_path / "crowd")
    fp32, int8, crowd = (og.Model(str(folder)) for folder in (tmp_path / "fp32", tiny.onnx_dir, tmp_path / "crowd"))
    exact, together = logits(fp32, ROWS, 1), logits(crowd, ROWS)
    error = np.abs(together[:1] - exact).max()
    assert 0 < error < np.abs(logits(int8, ROWS, 1) - exact).max()
    for place, row in enumerate(ROWS):
        assert np.array_equal(logits(crowd, [row])[:, 0], together[:, place])
        assert np.array_equal(logits(crowd, [row, ROWS[0][::-1]])[:, 0], together[:, place])
