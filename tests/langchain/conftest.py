"""What holds for every test of the LangChain adapter."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from aligner_integrations.langchain.question import recorder


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    """After a test the recorder has forgotten every run."""
    yield
    if len(recorder):
        gc.collect()
    assert len(recorder) == 0
