"""Aligners in LangChain: `prompt | model | AlignerRunnable()`."""

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    from aligner_integrations.errors import MissingDependencyError

    if error.name != "langchain_core":
        raise  # langchain-core is there, but broken: its own message says more
    raise MissingDependencyError(
        "aligner_integrations.langchain needs langchain-core, which is not installed; "
        'pip install "aligner-integrations[langchain]"',
        name="langchain_core",
    ) from error

from typing import TYPE_CHECKING, Any

from aligner_integrations.langchain.callbacks import (
    AsyncStreamAlignerCallbackHandler,
    StreamAlignerCallbackHandler,
)
from aligner_integrations.langchain.chat_model import AlignedChatModel
from aligner_integrations.langchain.runnable import AlignerRunnable
from aligner_integrations.langchain.updates import RunSegment, TextUpdate

if TYPE_CHECKING:
    from aligner_integrations.langchain.middleware import AlignerMiddleware

__all__ = [
    "AlignedChatModel",
    "AlignerMiddleware",
    "AlignerRunnable",
    "AsyncStreamAlignerCallbackHandler",
    "RunSegment",
    "StreamAlignerCallbackHandler",
    "TextUpdate",
]


def __getattr__(name: str) -> Any:
    """Load the middleware when it is asked for: it needs langchain and langgraph, the others do not."""
    if name == "AlignerMiddleware":
        from aligner_integrations.langchain.middleware import AlignerMiddleware

        return AlignerMiddleware
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
