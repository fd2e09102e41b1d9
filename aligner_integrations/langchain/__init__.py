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

from aligner_integrations.langchain.chat_model import AlignedChatModel
from aligner_integrations.langchain.runnable import AlignerRunnable

__all__ = ["AlignedChatModel", "AlignerRunnable"]
