"""Aligners in LlamaIndex: `AlignerQueryEngine(index.as_query_engine(streaming=True))`."""

try:
    import llama_index.core  # noqa: F401
except ImportError as error:
    from aligner_integrations.errors import MissingDependencyError

    if error.name not in ("llama_index", "llama_index.core"):
        raise  # llama-index-core is there, but broken: its own message says more
    raise MissingDependencyError(
        "aligner_integrations.llama_index needs llama-index-core, which is not installed; "
        'pip install "aligner-integrations[llama-index]"',
        name="llama_index",
    ) from error

from aligner_integrations.llama_index.instrumentation import CorrectionEnd, CorrectionStart
from aligner_integrations.llama_index.llm import AlignedLLM
from aligner_integrations.llama_index.postprocessor import AlignerPostprocessor
from aligner_integrations.llama_index.query_engine import AlignerQueryEngine

__all__ = ["AlignedLLM", "AlignerPostprocessor", "AlignerQueryEngine", "CorrectionEnd", "CorrectionStart"]
