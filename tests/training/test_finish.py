"""From checkpoint to model folder: measured, its margin set."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligner_integrations import Aligner
from aligner_integrations.checksums import check_sums
from aligner_integrations.config import AlignerConfig
from aligner_integrations.errors import ModelLoadError
from aligner_integrations.evaluation.figures import TARGETS
from aligner_integrations.training.finish import finish
from tests.miniature import data_folder, trained


def test_finish_exports_measures_and_sets_the_margin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained() / "checkpoint"
    capsys.readouterr()
    report = finish(checkpoint, tmp_path / "model", data=data_folder(), rows_a_task=2)
    config = AlignerConfig.load(tmp_path / "model")
    assert config.edit_margin == report.best_margin()
    assert config.max_length == 192  # the checkpoint's own context
    assert (config.template, config.granularity, config.keep_token) == ("tiny", "sentence", "<|keep|>")
    assert config.licence == "Apache-2.0" and config.languages == ("en",)
    assert set(report.figures(config.edit_margin)) == set(TARGETS)
    assert set(report.counts()) >= {"sum-wrong", "sum-right", "rude", "ordinary", "harmful", "good"}
    assert Aligner.from_pretrained(tmp_path / "model").decode_config.edit_margin == config.edit_margin
    assert set(check_sums(tmp_path / "model").values()) == {"as listed"}
    assert capsys.readouterr().out == ""  # showing the report is the command's part


def test_no_checkpoint_is_a_load_error(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json is missing"):
        finish(tmp_path, tmp_path / "model", data=data_folder())
