"""Operations on the real model, on both tracks: what its page on tiny-phi3 has to show, it has to show there, too.

Run: python -m helpers nightly tests/nightly/test_operations.py
"""

import pytest
from support.executed import Executed, execute_once

from helpers.models.catalogue import TRACKS
from tests.pages.test_operations import *  # noqa: F403


@pytest.fixture(scope="module", params=TRACKS)
def track(request, smol) -> str:
    return request.param


@pytest.fixture(scope="module")
def executed(track) -> Executed:
    return execute_once(f"real-Operations-{track}")
