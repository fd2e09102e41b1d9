"""For tests, ours and users': an aligner whose model is a function. `conformance` checks streaming guards."""

from aligner_integrations.testing.doubles import (
    ScriptedBackend,
    byte_tokenizer,
    replay_correction,
    scripted_aligner,
)

__all__ = ["ScriptedBackend", "byte_tokenizer", "replay_correction", "scripted_aligner"]
