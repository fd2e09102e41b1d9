"""What `aligner doctor` finds: versions, cache, the providers that really load, and the model."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from huggingface_hub import constants

from aligner_integrations import __version__
from aligner_integrations.aligner import Aligner
from aligner_integrations.backends.providers import FULL_NAMES
from aligner_integrations.errors import AlignerError, ProviderUnavailableError

# In the order of the floors.
_PACKAGES = (
    *("numpy", "tokenizers", "sentencex", "huggingface-hub", "onnxruntime", "onnxruntime-gpu"),
    *("torch", "transformers", "langchain-core", "langchain", "llama-index-core"),
)


def examine(model: str | None = None) -> tuple[dict[str, dict[str, str]], AlignerError | None]:
    """Return what was found, by subject, and the error that stopped the search, if one did.

    What was found is worth showing also when the model is what ails.
    """
    report = {"versions": _versions(), "cache": _cache()}
    try:
        report["providers"] = _providers(model)
        report["model"] = _model(model)
    except AlignerError as error:
        return report, error
    return report, None


def _versions() -> dict[str, str]:
    found = {"aligner-integrations": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cache() -> dict[str, str]:
    folder = Path(constants.HF_HUB_CACHE)
    # The cache's snapshots are links to its blobs: counting them would count twice.
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return {"folder": str(folder), "size": f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"}


def _providers(model: str | None) -> dict[str, str]:
    """Load the model on each provider: that one is listed does not mean that it runs."""
    found: dict[str, str] = {}
    for name in FULL_NAMES:
        try:
            backend = Aligner.from_pretrained(model, provider=name).backend
            found[name] = f"loads ({backend.provider})"
        except ProviderUnavailableError as error:
            found[name] = f"does not load: {' '.join(str(error).split())}"
    return found


def _model(model: str | None) -> dict[str, str]:
    aligner = Aligner.from_pretrained(model)
    stats = aligner.correct("How many days has a week?", "A week has seven days.").stats
    return {
        "folder": model or "bundled",
        "backend": aligner.backend.name,
        "provider": aligner.backend.provider,
        "template": aligner.template.name,
        "granularity": aligner.granularity,
        "edit margin": f"{aligner.decode_config.edit_margin:g} logits",
        "context": f"{aligner.config.max_length} tokens",
        "licence": aligner.config.licence or "not stated",
        "one sentence": f"{stats.seconds * 1000:.1f} ms, {stats.forwards} forward(s)",
    }
