"""The ONNX model on its cache: logits are equal to the last bit, whatever else is in the cache and in the step.

Run: python -m helpers test tests/unit/serving/test_decoder.py
"""

import dataclasses
import random
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest

from serving.chat import decoder as decoder_module
from serving.chat.contract import Refusal
from serving.chat.decoder import Decoder
from serving.chat.engine import end_piece
from serving.chat.folder import read_config
from serving.chat.model import check_folder

PIECE = 32  # twice the head size of tiny-phi3


@pytest.fixture(scope="module")
def config(tiny):
    return read_config(tiny.onnx_dir)


@pytest.fixture(scope="module")
def decoder(config):
    return Decoder(config, threads=1, room=512)


def prompt_of(size, seed=0):
    chance = random.Random(seed)
    return [chance.randrange(5, 500) for _ in range(size)]


def read(decoder, slot, prompt, start=0, piece=PIECE):
    """Read a prompt from ``start`` on in pieces, and return the logits behind it."""
    while start < len(prompt):
        end = end_piece(start, len(prompt), piece)
        logits = decoder.read(slot, prompt[start:end], start)
        start = end
    return logits


def alone(decoder, prompt, count):
    """Return the logits behind a prompt and behind each of ``count`` greedy tokens, and these tokens."""
    found, tokens = [read(decoder, 0, prompt)], []
    for place in range(count):
        tokens.append(int(found[-1].argmax()))
        found.append(decoder.step(tokens[-1:], [len(prompt) + place + 1])[0])
    return found, tokens


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_join_and_leave_at_random_get_the_logits_that_they_get_alone(decoder, seed):
    chance = random.Random(seed)
    prompts = [
        prompt_of(chance.choice((2, 5, 31, 33, 64, 65, 100, 129)), chance.random())
        for _ in range(14)
    ]
    counts = [chance.randrange(1, 25) for _ in prompts]
    expected = [alone(decoder, *job) for job in zip(prompts, counts, strict=True)]
    # Running: (number of the prompt, tokens so far), slot by slot.
    waiting, running = list(range(len(prompts))), []
    compared = 0
    while waiting or running:
        if waiting and len(running) < 8 and chance.random() < 0.5:
            number = waiting.pop()
            assert np.array_equal(
                read(decoder, len(running), prompts[number]), expected[number][0][0]
            )
            running.append([number, 0])
        if not running:
            continue
        tokens = [expected[number][1][done] for number, done in running]
        lengths = [len(prompts[number]) + done + 1 for number, done in running]
        for row, logits in zip(running, decoder.step(tokens, lengths), strict=True):
            row[1] += 1
            assert np.array_equal(logits, expected[row[0]][0][row[1]])
            compared += 1
        for slot in reversed(range(len(running))):
            if running[slot][1] == counts[running[slot][0]]:
                last = len(running) - 1
                if slot != last:
                    decoder.swap(
                        slot, last, lengths[slot], lengths[last], trim=chance.random() < 0.5
                    )
                running[slot] = running[last]
                lengths[slot] = lengths[last]
                running.pop()
    assert compared == sum(counts)


@pytest.mark.parametrize("size", [2, 3, 5, 31, 32, 33, 64, 65, 66, 129, 200])
def test_a_prompt_gets_the_same_logits_in_any_pieces_and_behind_any_part_of_another(decoder, size):
    prompt = prompt_of(size)
    expected = read(decoder, 0, prompt)
    for piece in (3, 7, 16, 31):
        assert np.array_equal(read(decoder, 1, prompt, piece=piece), expected)
    for shared in {1, 8, 30, 31, 32, 33, size // 2, size - 3, size - 2} & set(range(1, size - 1)):
        read(decoder, 2, prompt_of(300, seed=1))  # what was there before
        decoder.copy(0, 2, shared)
        assert np.array_equal(read(decoder, 2, prompt, start=shared), expected)


def test_the_last_token_alone_is_rounded_in_another_way_which_is_why_no_piece_is_one_token(decoder):
    prompt = prompt_of(65)
    expected = read(decoder, 0, prompt)
    read(decoder, 1, prompt[:-1])
    assert not np.array_equal(decoder.read(1, prompt[-1:], 64), expected)


def test_memory_is_taken_by_tokens_and_given_back(config):
    decoder = Decoder(config, threads=1, room=config.context_length)
    size = sum(cache.nbytes for cache in decoder._caches)
    one_slot, process = size / decoder.slots, psutil.Process()
    assert decoder.held == [0] * 16

    def taken():
        return process.memory_info().rss - before

    before = process.memory_info().rss
    for slot in range(16):
        decoder.copy(0, slot, 1) if slot else decoder.read(0, prompt_of(2), 0)
    assert taken() < size / 4
    for cache in decoder._caches:
        cache[:4] = 1  # as four slots full of tokens would
    assert taken() > 3 * one_slot
    for slot in range(4):
        decoder.release(slot)
    assert taken() < size / 4
    assert decoder.held[:4] == [0] * 4
    read(decoder, 5, prompt_of(50))
    assert decoder.held[5] == 50
    decoder.swap(5, 6, 50, 1, trim=False)
    assert decoder.held[5:7] == [50, 50]
    decoder.swap(5, 6, 1, 50, trim=True)
    assert decoder.held[5:7] == [50, 1]


@pytest.mark.parametrize(("most", "slots"), [(16, 16), (15, 8), (3, 2), (1, 1), (0, None)])
def test_a_system_with_less_memory_gets_fewer_slots(config, monkeypatch, most, slots):
    # Heads, room, head size, bytes.
    reserve, one_slot = decoder_module._reserve_pages, 4 * 64 * 16 * 4

    def limited(size):
        if size > most * one_slot:
            raise OSError("no memory")
        return reserve(size)

    monkeypatch.setattr(decoder_module, "_reserve_pages", limited)
    if slots:
        assert Decoder(config, threads=1, room=64).slots == slots
        return
    with pytest.raises(Refusal) as refusal:
        Decoder(config, threads=1, room=64)
    assert refusal.value.message == (
        "The system has no memory for a cache of 64 tokens. Load the model with a smaller cache_tokens."
    )


OTHER_TENSORS = (
    "its ONNX file has other inputs or outputs than tokens, a mask, logits and the cache"
)
OTHER_SHAPE = "its ONNX file does not work with a cache of the shape that genai_config.json says"
WRONG = {
    "a head size": ({"head_size": 32}, OTHER_SHAPE),
    "a vocabulary": ({"vocab_size": 100}, OTHER_SHAPE),
    "fewer layers": ({"layers": 1}, OTHER_TENSORS),
    "more layers": ({"layers": 3}, OTHER_TENSORS),
    **{
        f"a name of {key}": (
            {"names": {key: f"other.{'%d.' if '%d' in name else ''}x"}},
            OTHER_TENSORS,
        )
        for key, name in {
            "input_ids": "",
            "attention_mask": "",
            "logits": "",
            "past_key_names": "%d",
            "present_value_names": "%d",
        }.items()
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_a_folder_whose_cache_is_another_than_it_says_is_refused(config, name):
    changes, says = WRONG[name]
    changes = {
        field: config.names | value if field == "names" else value
        for field, value in changes.items()
    }
    with pytest.raises(Refusal) as refusal:
        Decoder(dataclasses.replace(config, **changes), threads=1, room=64)
    assert refusal.value.message == f"This folder is no model that can be served: {says}."


def test_a_folder_whose_graph_is_broken_is_refused_before_anything_is_logged(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny.onnx_dir, tmp_path / "model"))
    check_folder(folder)
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(Refusal, match="onnxruntime can't load its ONNX file"):
        check_folder(folder)
