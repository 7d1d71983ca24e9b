"""The chat model on the toy model, as MLflow would load it."""

import pytest
from support.chat import AS_SHOWN, load_chat


@pytest.fixture(scope="module")
def chat(tiny):
    """Return a chat model for a module's tests; it answers 16 tokens where a request says nothing."""
    model = load_chat(tiny.onnx_dir)
    yield model
    model.close()


@pytest.fixture
def fresh(tiny):
    """Return a chat model for one test, which may break it."""
    model = load_chat(tiny.onnx_dir)
    yield model
    model.close()


@pytest.fixture(scope="module")
def as_shown(chat):
    """Return the choices of the answer to ``AS_SHOWN``, to ask for again after something went wrong."""
    return chat.predict(None, AS_SHOWN)[0]["choices"]
