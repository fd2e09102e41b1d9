from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aligner_integrations.options import is_structured

SCHEMA = {"type": "json_schema", "json_schema": {"name": "Advice"}}


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": SCHEMA},
        {"extra_body": {"response_format": SCHEMA}},
        {"additional_kwargs": {"response_format": SCHEMA}},
        {"model_kwargs": {"response_mime_type": "application/json"}},
        {"model_kwargs": {"text": {"format": SCHEMA}}},
        {"format": "json"},
    ],
)
def test_who_asks_for_data_gets_data(given: dict[str, Any]) -> None:
    """In the call, or in the model's own options, directly or held by another option."""
    assert is_structured(None, given)
    assert is_structured(SimpleNamespace(**given), {})


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_mime_type": "text/plain"},
        {"extra_body": {"a": 1}},
    ],
)
def test_who_asks_for_prose_gets_prose(given: dict[str, Any]) -> None:
    assert not is_structured(None, given)
    assert not is_structured(SimpleNamespace(**given), {})
