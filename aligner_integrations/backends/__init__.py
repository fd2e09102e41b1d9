"""What runs the network: one file per backend, loaded only when asked for."""

from __future__ import annotations

import os
from typing import Any, Protocol

from aligner_integrations.backends.base import Backend
from aligner_integrations.backends.providers import FULL_NAMES

# The order of preference when the user names none.
BACKENDS: tuple[str, ...] = ("onnx", "torch")


class LoadedBackend(Backend, Protocol):
    """A backend with a model of its own, whose logits are `vocab_size` numbers a place."""

    @property
    def vocab_size(self) -> int:
        """How many ids the model knows."""
        ...


def load_backend(
    name: str,
    folder: str | os.PathLike[str],
    *,
    provider: str = "auto",
    threads: int | None = None,
    provider_options: dict[str, Any] | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> LoadedBackend:
    """Load the model in `folder` with the backend called `name`.

    Args:
        name: one of `BACKENDS`; also the name of the extra that installs it.
        folder: the model folder.
        provider: `"auto"`, `"tensorrt"`, `"cuda"` or `"cpu"`, for `"onnx"`.
        threads: threads inside one forward; `None` takes the physical cores of this process.
        provider_options: handed verbatim to ONNX Runtime for an accelerator.
        device: `"cpu"`, `"cuda"`, ..., for `"torch"`; `None` takes the best there is.
        dtype: `"auto"`, `"fp32"`, `"bf16"` or `"fp16"`, or PyTorch's names of these, for `"torch"`.

    Raises:
        ValueError: `name` or `provider` is unknown, or an option is another backend's.
        MissingDependencyError: the backend's extra is not installed.
        ModelLoadError: the folder holds no model that the backend can load.
        ProviderUnavailableError: the provider asked for did not load.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    check_options(name, provider=provider, provider_options=provider_options, device=device, dtype=dtype)
    if name == "torch":
        from aligner_integrations.backends.torch import TorchBackend  # loads torch and transformers

        return TorchBackend.load(folder, device=device, dtype=dtype, threads=threads)
    from aligner_integrations.backends.onnx import OnnxBackend  # loads onnxruntime

    return OnnxBackend.load(folder, provider=provider, threads=threads, provider_options=provider_options)


def check_options(
    name: str, *, provider: str, provider_options: dict[str, Any] | None, device: str | None, dtype: str
) -> None:
    """Raise a `ValueError` for options that the backend `name` does not know; `"auto"` is any of them."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    if provider not in ("auto", *FULL_NAMES):
        raise ValueError(f"provider must be one of auto, {', '.join(FULL_NAMES)}; got {provider!r}")
    for_onnx = provider != "auto" or bool(provider_options)
    for_torch = device is not None or dtype != "auto"
    if for_torch and (name == "onnx" or for_onnx):
        raise ValueError(
            f"device={device!r} and dtype={dtype!r} are for PyTorch: pass backend='torch' alone with them; "
            "for ONNX Runtime choose provider='cuda' or 'tensorrt', and the precision with `aligner export`"
        )
    if for_onnx and name == "torch":
        raise ValueError(
            f"provider={provider!r} and provider_options are for ONNX Runtime, and here PyTorch runs: "
            "pass device='cuda' or 'cpu' instead, or make a model.onnx with `aligner export`"
        )


__all__ = ["BACKENDS", "LoadedBackend", "check_options", "load_backend"]
