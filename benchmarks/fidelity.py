"""Says how near each contender keeps to the model: their answers come in beside those of transformers in fp32.

A contender that answers faster with other weights, rounded to 8 or 4 bits, has to show what the
rounding changed.
"""

import statistics
from collections.abc import Callable

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


def equal_tokens(answer: list, reference: list) -> int:
    """Return how many tokens two answers have in common before the first difference."""
    pairs = enumerate(zip(answer, reference, strict=False))
    return next(
        (place for place, (ours, theirs) in pairs if ours != theirs),
        min(len(answer), len(reference)),
    )


def fidelity(them: Contenders) -> tuple[dict, dict]:
    """Compare the contenders with transformers in fp32, on 24 questions. Return no ratios, and the figures.

    ``equal_tokens`` is the mean number of greedy tokens before the first that is not fp32's, and
    ``reference_tokens`` the mean number of tokens of fp32's own answers, end tokens left out: what
    equals it, equals fp32. ``next_token_agreement`` is the share of places in fp32's answers at
    which a contender that has read all before takes the same token. Of the chat model this is
    measured on its ONNX file, because it shows no logits.
    """
    prompts = [them.encode([{"role": "user", "content": question}]) for question in QUESTIONS]
    references = _answer_in_fp32(them, prompts)
    figures = {
        "chat_model": {
            "equal_tokens": _mean(
                _equal_text(them, *pair) for pair in zip(QUESTIONS, references, strict=True)
            ),
            "next_token_agreement": _agreement(
                lambda *one: _next_by_engine(them, *one), prompts, references
            ),
        }
    }
    if them.gguf:
        for name, ask in (("llama_cpp", _ask_llama), ("openvino", _ask_openvino)):
            answers = ask(them, prompts, them.tokens)
            equal = _mean(map(equal_tokens, answers, references))
            figures[name] = {
                "equal_tokens": equal,
                "next_token_agreement": _agreement(
                    lambda *one, ask=ask: _next_by_asking(them, ask, *one), prompts, references
                ),
            }
    return {}, {
        "fidelity": {"prompts": len(prompts), "reference_tokens": _mean(map(len, references))}
        | figures
    }


def _mean(counts):
    return statistics.mean(map(float, counts))


def _answer_in_fp32(them, prompts):
    """Return the greedy answers of the original, without end tokens; it leaves the memory again."""
    import torch  # takes seconds, and only a measurement needs it
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        them.prepared.transformers_dir, dtype=torch.float32
    )
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    answers = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        found = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=them.tokens,
            do_sample=False,
            pad_token_id=ends[0],
        )
        answers.append([token for token in found[0, len(prompt) :].tolist() if token not in ends])
    return answers


def _equal_text(them, question, reference):
    """Count the chat model's equal tokens. It answers with text, so both texts are cut into tokens anew."""
    (answer,) = them.chat.predict(
        {"messages": [{"role": "user", "content": question}], "max_tokens": them.tokens}
    )
    texts = (
        answer["choices"][0]["message"]["content"],
        them.template.decode(reference, skip_special_tokens=True),
    )
    return equal_tokens(*(them.template.encode(text, add_special_tokens=False) for text in texts))


def _agreement(next_tokens: Callable, prompts: list, references: list) -> float:
    """Return the share of places at which ``next_tokens(prompt, reference)`` has the reference's token."""
    same = [
        ours == theirs
        for prompt, reference in zip(prompts, references, strict=True)
        for ours, theirs in zip(next_tokens(prompt, reference), reference, strict=True)
    ]
    return _mean(same)


def _next_by_engine(them, prompt, reference):
    """Return the token with the highest logit at each place of the reference."""
    generator, found = them.generator(len(prompt) + len(reference) + 1), []
    for piece in (prompt, *([token] for token in reference[:-1])):
        generator.append_tokens(piece)
        found.append(int(np.argmax(generator.get_logits()[0, -1])))
    return found[: len(reference)]  # an answer may be empty


def _next_by_asking(them, ask, prompt, reference):
    """Ask for one token after each beginning of the reference: the greedy one has the highest logit."""
    beginnings = [prompt + reference[:place] for place in range(len(reference))]
    return [(answer or [None])[0] for answer in ask(them, beginnings, 1)]


def _ask_llama(them, prompts, max_tokens):
    return [
        [
            token
            for event in llama_events(
                them.llama, prompt=prompt, n_predict=max_tokens, return_tokens=True
            )
            for token in event["tokens"]
        ]
        for prompt in prompts
    ]


def _ask_openvino(them, prompts, max_tokens):
    return them.openvino.answer(
        [(prompt, max_tokens) for prompt in prompts], CALLERS, ignore_eos=False
    )
