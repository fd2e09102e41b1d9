"""What `aligner bench --adapters` measures; the figures themselves are no test's business."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from aligner_integrations.cli import app
from aligner_integrations.evaluation.adapters import as_rows, run_adapters

ADAPTERS = {
    "AlignerRunnable",
    "AlignerRunnable, async",
    "AlignedChatModel",
    "AlignedChatModel, async",
    "StreamAlignerCallbackHandler",
    "AsyncStreamAlignerCallbackHandler, async",
}


def test_every_adapter_is_measured() -> None:
    costs = run_adapters(rounds=1, chunks=50)
    assert {cost.name for cost in costs} == ADAPTERS == set(as_rows(costs))
    assert all(cost.chunks == 50 for cost in costs)
    with pytest.raises(ValueError, match="rounds"):
        run_adapters(rounds=0)


def test_the_command_prints_it(monkeypatch: pytest.MonkeyPatch) -> None:
    small = run_adapters(rounds=1, chunks=20)
    monkeypatch.setattr("aligner_integrations.evaluation.adapters.run_adapters", lambda rounds: small)
    told = CliRunner().invoke(app, ["bench", "--adapters", "--rounds", "2"])
    assert told.exit_code == 0 and "us a chunk" in told.stdout
    told = CliRunner().invoke(app, ["bench", "--adapters", "--rounds", "2", "--json"])
    assert {cost["name"] for cost in json.loads(told.stdout)} == ADAPTERS
