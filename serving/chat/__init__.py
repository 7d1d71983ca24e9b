"""The chat model: answers conversations for many callers at once, with an ONNX model.

Read the files in this order: `contract` (what a request may hold), `prompt` (messages become
tokens), `engine` (the loop that runs all answers), `decoder` (the ONNX session and its key/value
cache), `sampler`, `schema` and `text` (a token is chosen and becomes text), `model` (what MLflow
calls), `package` (what MLflow logs). Nothing here imports the course.
"""

from .contract import SETTINGS, SIGNATURE, ChatRequest, Refusal, Settings, read_request
from .model import ChatModel, check_folder
from .package import package_code
from .prompt import PromptEncoder

__all__ = [
    "SETTINGS",
    "SIGNATURE",
    "ChatModel",
    "ChatRequest",
    "PromptEncoder",
    "Refusal",
    "Settings",
    "check_folder",
    "package_code",
    "read_request",
]
