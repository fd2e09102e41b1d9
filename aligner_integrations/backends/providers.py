"""Execution providers: which to try, and what to say about the one that loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from aligner_integrations.errors import ProviderUnavailableError

logger = logging.getLogger(__name__)

# Short names in the order in which `auto` tries them, with ONNX Runtime's own names.
FULL_NAMES: dict[str, str] = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
_NAMES = ("auto", *FULL_NAMES)


def choose_providers(asked: str, listed: Sequence[str]) -> list[str]:
    """Return the short names to try, in order.

    `listed` is what ONNX Runtime says it was built with. That a provider is listed does not mean
    that it loads: whoever makes the session must compare `session.get_providers()[0]`.

    Raises:
        ValueError: `asked` is not one of the names.
        ProviderUnavailableError: `asked` names a provider that this onnxruntime lacks.
    """
    if asked not in _NAMES:
        raise ValueError(f"provider must be one of {', '.join(_NAMES)}; got {asked!r}")
    if asked == "auto":
        return [name for name, full in FULL_NAMES.items() if full in listed]
    if FULL_NAMES[asked] not in listed:
        raise ProviderUnavailableError(
            f"provider {asked!r} was asked for, but this onnxruntime has only {', '.join(listed)}; "
            'use provider="cpu", or run `pip uninstall onnxruntime` and '
            '`pip install "aligner-integrations[onnx-gpu]"`'
        )
    return [asked]


def report_fallback(*, asked: str, used: str, why: Mapping[str, str]) -> None:
    """Warn, once for this load, when better providers were tried in vain."""
    if why:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in why.items())
        logger.warning("provider %r was asked for, %r is used, because %s", asked, used, reasons)
