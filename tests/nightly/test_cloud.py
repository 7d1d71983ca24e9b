"""Cloud on the other track and on the real model: what its page on tiny-phi3 has to show, it has to show there, too.

Run: python -m helpers nightly tests/nightly/test_cloud.py
"""

import pytest
from support.executed import Executed, execute_once

from tests.pages.test_cloud import *  # noqa: F403


@pytest.fixture(scope="module", params=["cloud-onnx", "real-Cloud"])
def executed(request, smol) -> Executed:
    return execute_once(request.param)
