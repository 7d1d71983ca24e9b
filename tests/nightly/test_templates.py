"""The chat templates of more model families: our prompt is the one that transformers makes.

The fast tests, in tests/unit/serving/test_templates.py, have the other templates.

Run: python -m helpers test tests/nightly/test_templates.py
"""

import pytest
from support.templates import CONVERSATIONS, FAMILIES, assert_same_prompt, write_folder

from serving.chat.prompt import PromptEncoder


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_is_that_of_transformers(tmp_path, name):
    source = FAMILIES[name].read_text(encoding="utf-8")
    encoder = PromptEncoder(write_folder(tmp_path, source))
    for messages in CONVERSATIONS.values():
        assert_same_prompt(encoder, name, messages)
