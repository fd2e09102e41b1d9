"""Aligners behind LangChain and LlamaIndex: answers corrected offline, also while they stream."""

from aligner_integrations.aligner import Aligner
from aligner_integrations.closed_loop import ClosedLoop, LoopStats
from aligner_integrations.config import AlignerConfig, DecodeConfig
from aligner_integrations.correction import Correction, DecodeStats, Edit, Finding, Segment
from aligner_integrations.resilience import CircuitBreaker
from aligner_integrations.stream import StreamCorrector
from aligner_integrations.template import CorrectionTemplate

__version__ = "0.1.0"

__all__ = [
    "Aligner",
    "AlignerConfig",
    "CircuitBreaker",
    "ClosedLoop",
    "Correction",
    "CorrectionTemplate",
    "DecodeConfig",
    "DecodeStats",
    "Edit",
    "Finding",
    "LoopStats",
    "Segment",
    "StreamCorrector",
    "__version__",
]
