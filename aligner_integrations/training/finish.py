"""From checkpoint to model folder: export, measure, set the margin, write what it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from aligner_integrations.aligner import Aligner
from aligner_integrations.checksums import write_sums
from aligner_integrations.config import AlignerConfig
from aligner_integrations.evaluation.figures import Report, evaluate
from aligner_integrations.export import export_checkpoint, write_config

_CONFIG = AlignerConfig(
    template="tiny",
    granularity="sentence",
    keep_token="<|keep|>",
    languages=("en",),
    licence="Apache-2.0",
    description="Sentence-level aligner, Llama architecture, trained from scratch; decides, then acts.",
    data=(
        "gsm8k_steps (MIT), paradetox (CC0-1.0), medquad_qa (CC-BY-4.0), caia_safety_qa (CC-BY-4.0), "
        "mrben_steps (MIT), prmbench_steps (Apache-2.0), jbb_pairs (MIT), gptfuzz_pairs (MIT), "
        "xstest_triples (CC-BY-4.0), truthfulqa_triples (Apache-2.0), bbq_bias (CC-BY-4.0), "
        "pandalm_pairs (Apache-2.0)"
    ),
)


def finish(checkpoint: Path, folder: Path, *, data: Path, rows_a_task: int = 600) -> Report:
    """Export `checkpoint` to `folder`, measure it on held-out rows and set its edit margin."""
    export_checkpoint(checkpoint, folder, config=_CONFIG, dtype="int8", overwrite=True)
    report = evaluate(Aligner.from_pretrained(folder), data, rows_a_task=rows_a_task)
    config = AlignerConfig.load(folder)
    write_config(replace(config, edit_margin=report.best_margin()), folder)
    write_sums(folder)
    return report
