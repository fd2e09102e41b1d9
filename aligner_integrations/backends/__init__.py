"""What runs the network: one file per backend, loaded only when asked for."""

from __future__ import annotations

import os
from typing import Any

from aligner_integrations.backends.base import Backend

# The order of preference when the user names none.
BACKENDS: tuple[str, ...] = ("onnx",)


def load_backend(
    name: str,
    folder: str | os.PathLike[str],
    *,
    provider: str = "auto",
    threads: int | None = None,
    provider_options: dict[str, Any] | None = None,
) -> Backend:
    """Load the model in `folder` with the backend called `name`.

    Args:
        name: one of `BACKENDS`; also the name of the extra that installs it.
        folder: the model folder.
        provider: `"auto"`, `"tensorrt"`, `"cuda"` or `"cpu"`.
        threads: threads inside one forward; `None` takes the physical cores of this process.
        provider_options: handed verbatim to ONNX Runtime for an accelerator.

    Raises:
        ValueError: `name` or `provider` is unknown.
        MissingDependencyError: the backend's extra is not installed.
        ModelLoadError: the folder holds no model that the backend can load.
        ProviderUnavailableError: the provider asked for did not load.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    from aligner_integrations.backends.onnx import OnnxBackend  # loads onnxruntime

    return OnnxBackend.load(folder, provider=provider, threads=threads, provider_options=provider_options)


__all__ = ["BACKENDS", "load_backend"]
