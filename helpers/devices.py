"""Checks whether a track's engine can run on a device, before a model is loaded."""

from helpers.errors import CourseError
from helpers.requirements import GPU_BUILDS

# The values of the parameter `device`. "mps" is Apple's GPU, "dml" is DirectML on Windows.
DEVICES = ("cpu", "cuda", "mps", "dml")
CPU = 'or leave device at "cpu".'


def torch_device(device: str) -> str:
    """Return ``device`` for ``transformers.pipeline``: ``"cpu"``, ``"cuda"`` or ``"mps"``.

    Raises
    ------
    CourseError
        torch was built without the device, or this machine does not have it.
    """
    import torch

    if device == "dml":
        raise CourseError(
            "device-track",
            "Track A has no DirectML: torch does not run on it.",
            "Use track B, which has it; " + CPU,
        )
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device]:
        raise CourseError(
            "device-absent",
            f'device is "{device}", and torch {torch.__version__} finds no such device here.',
            "Install the build of torch for it, as https://pytorch.org/get-started/locally says; "
            + CPU,
        )
    return device


def onnx_provider(device: str) -> str:
    """Return ``device`` as the execution provider of onnxruntime-genai: ``"cpu"``, ``"cuda"`` or ``"dml"``.

    Raises
    ------
    CourseError
        The installed package was built without the device.
    """
    import onnxruntime_genai as og

    if device == "mps":
        raise CourseError(
            "device-track",
            "Track B does not run on Apple's GPU: onnxruntime-genai has no provider for it.",
            "Use track A, which does; " + CPU,
        )
    available = {"cpu": True, "cuda": og.is_cuda_available(), "dml": og.is_dml_available()}
    if not available[device]:
        raise CourseError(
            "device-absent",
            f'device is "{device}", and the installed onnxruntime-genai was built without it.',
            f"Install {GPU_BUILDS['onnxruntime-genai'][device]}=={og.__version__} in its place; "
            + CPU,
        )
    return device
