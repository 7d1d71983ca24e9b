"""The walk through a page in a browser, on the other pages of those that tests/pages/test_browser.py can walk.

Run: python -m helpers nightly tests/nightly/test_browser.py
"""

import pytest

from course.execute import PAGES
from tests.pages.test_browser import *  # noqa: F403
from tests.pages.test_browser import WALKED, walk_through


@pytest.fixture(scope="module", params=[page for page in PAGES if page not in WALKED])
def walk(request, chromium, lab):
    yield from walk_through(request.param, chromium, lab)
