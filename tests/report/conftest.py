import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the tests here share synthetic.py and browser.py

from synthetic import make_bundle

from whence.report.bundle import Bundle


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return make_bundle()
