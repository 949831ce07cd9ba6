"""What every test gets: a leak check around it and around the processes it starts, and reproducible hypothesis runs."""

from __future__ import annotations

import pytest
from hypothesis import settings

from fdshare.testing import fdshare_no_leaks

__all__ = ["fdshare_no_leaks"]  # a fixture is found by its name in a conftest

# No example database: a checkout stays clean, and a run does not depend on the one before.
settings.register_profile("fdshare", deadline=None, database=None, derandomize=True)
settings.load_profile("fdshare")


@pytest.fixture(autouse=True)
def no_leaks(fdshare_no_leaks: None) -> None:
    """Check descriptors, threads and children after every test, in the test's child processes too."""
