"""Measures how often each contender's next token is the one of transformers in fp32.

A contender that is faster because its weights are rounded to 8 or 4 bits has to show what the
rounding changed.
"""

import statistics

import numpy as np

from benchmarks.contenders import CALLERS, Contenders, llama_events

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do ships float?",
    "What does a compass show?",
    "Explain what a lighthouse is for.",
    "Write a short poem about the sea.",
    "Describe a storm in the mountains.",
    "Give me three tips for a good night's sleep.",
    "How is bread made?",
    "What is photosynthesis?",
    "Tell me about the moon.",
    "Who wrote Romeo and Juliet, and what is it about?",
    "What is a database index?",
    "Explain recursion to a child.",
    "Write a Python function that adds two numbers.",
    "How do vaccines work?",
    "What is the difference between weather and climate?",
    "Write a letter to a friend who has moved away.",
    "Name some animals that live in the desert.",
    "What makes a good teacher?",
    "How does a bicycle stay upright?",
    "Summarise the history of the printing press.",
    "What should I see in Rome?",
    "Why do leaves fall in autumn?",
)


def measure_fidelity(contenders: Contenders) -> tuple[dict, dict]:
    """Compare the contenders with transformers in fp32 on 24 questions. Return no ratios, and the figures.

    ``next_token_agreement`` is the share of positions in fp32's greedy answers at which a contender
    that has read everything before takes the same token. The chat model shows no logits: its ONNX
    file is measured through onnxruntime-genai.
    """
    prompts = [contenders.encode([{"role": "user", "content": text}]) for text in QUESTIONS]
    references = _answer_in_fp32(contenders, prompts)
    next_tokens = {"chat_model": _next_tokens_of_engine}
    if contenders.gguf:
        next_tokens["llama_cpp"] = _next_tokens_of_llama
        next_tokens["openvino"] = _next_tokens_of_openvino
    figures = {"prompts": len(prompts)}
    for name, find_next in next_tokens.items():
        found = [
            find_next(contenders, prompt, reference)
            for prompt, reference in zip(prompts, references, strict=True)
        ]
        figures[name] = {"next_token_agreement": agreement(found, references)}
    return {}, {"fidelity": figures}


def agreement(answers: list[list[int]], references: list[list[int]]) -> float:
    """Return the share of all positions at which the answers have the references' tokens."""
    return statistics.mean(
        float(token == expected)
        for answer, reference in zip(answers, references, strict=True)
        for token, expected in zip(answer, reference, strict=True)
    )


def _answer_in_fp32(contenders, prompts):
    """Return the greedy answers of transformers, without end tokens, and free its model."""
    # Both take seconds to import, and only a measurement needs them.
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        contenders.prepared.transformers_dir, dtype=torch.float32
    )
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    answers = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=contenders.tokens,
            do_sample=False,
            pad_token_id=ends[0],
        )
        answers.append([token for token in output[0, len(prompt) :].tolist() if token not in ends])
    return answers


def _next_tokens_of_engine(contenders, prompt, reference):
    """Return the token with the highest logit at each position of the reference."""
    generator = contenders.generator(len(prompt) + len(reference) + 1)
    tokens = []
    for piece in (prompt, *([token] for token in reference[:-1])):
        generator.append_tokens(piece)
        tokens.append(int(np.argmax(generator.get_logits()[0, -1])))
    return tokens[: len(reference)]  # a reference may be empty


def _beginnings(prompt: list, reference: list) -> list[list]:
    """Return the prompt with each beginning of the reference, for one greedy token after each."""
    return [prompt + reference[:position] for position in range(len(reference))]


def _first_tokens(answers):
    """Return the first token of each answer, None where an end token left it empty."""
    return [next(iter(answer), None) for answer in answers]


def _next_tokens_of_llama(contenders, prompt, reference):
    answers = []
    for beginning in _beginnings(prompt, reference):
        events = llama_events(contenders.llama, prompt=beginning, n_predict=1, return_tokens=True)
        answers.append([token for event in events for token in event["tokens"]])
    return _first_tokens(answers)


def _next_tokens_of_openvino(contenders, prompt, reference):
    requests = [(beginning, 1) for beginning in _beginnings(prompt, reference)]
    return _first_tokens(contenders.openvino.answer(requests, CALLERS, ignore_eos=False))
