from __future__ import annotations

import pytest

from diffusers_ext import zoo


@pytest.fixture(scope="session")
def real():
    """Real pictures that nothing was trained on or reported on."""
    return zoo.scenes(1000, seed=31337)


@pytest.fixture(scope="session")
def judge():
    return zoo.load_judge()
