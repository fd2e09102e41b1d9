"""What `aligner doctor` finds: versions, caches, what really loads, and the model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants

from aligner_integrations import __version__
from aligner_integrations.aligner import BUNDLED_MODEL, Aligner
from aligner_integrations.backends import load_backend
from aligner_integrations.backends.providers import FULL_NAMES, engine_cache_folder
from aligner_integrations.checksums import AS_LISTED, check_sums
from aligner_integrations.errors import AlignerError, ModelLoadError

# In the order of the floors.
_PACKAGES = (
    *("numpy", "tokenizers", "sentencex", "huggingface-hub", "onnxruntime", "onnxruntime-gpu"),
    *("tensorrt-cu13", "torch", "transformers", "langchain-core", "langchain", "llama-index-core"),
)


def examine(
    model: str | None = None, *, template: str | None = None
) -> tuple[dict[str, dict[str, str]], AlignerError | None]:
    """Return what was found, by subject, and the error that stopped the search, if one did.

    What was found is worth showing also when the model is what ails.
    """
    report = {"versions": _versions(), "cache": _caches()}
    try:
        aligner = Aligner.from_pretrained(model, template=template)
    except AlignerError as error:
        report["providers"] = _providers(None, None)
        return report, error
    # A checkpoint for PyTorch says nothing about providers; the bundled model does.
    told = (model, template) if aligner.backend.name == "onnx" else (None, None)
    report["providers"] = _providers(*told)
    try:
        report["model"] = _model(aligner, model)
    except AlignerError as error:
        return report, error
    return report, None


def verify(model: str | None = None) -> tuple[dict[str, dict[str, str]], AlignerError | None]:
    """Return how each file of a model folder compares with its list, and an error if one differs."""
    folder = BUNDLED_MODEL if model is None else Path(model)
    try:
        found = check_sums(folder)
    except AlignerError as error:
        return {}, error
    wrong = [f"{name} is {state}" for name, state in found.items() if state != AS_LISTED]
    if not wrong:
        return {"files": found}, None
    cure = "install the package again" if model is None else "fetch the model again"
    return {"files": found}, ModelLoadError(f"{folder} is not as released: {', '.join(wrong)}; {cure}")


def _versions() -> dict[str, str]:
    found = {"aligner-integrations": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if importlib.util.find_spec("torch") is not None:
        found["torch on cuda"] = _torch_on_cuda()
    return found


def _torch_on_cuda() -> str:
    try:
        # A device is tried before the folder is read, and this one holds no checkpoint.
        load_backend("torch", Path(__file__).parent, device="cuda")
    except ModelLoadError:
        pass
    except AlignerError as error:
        return f"does not run: {_line(error)}"
    return "runs"


def _caches() -> dict[str, str]:
    engines = engine_cache_folder()
    hub = {"folder": constants.HF_HUB_CACHE, "size": _size(Path(constants.HF_HUB_CACHE))}
    return {**hub, "TensorRT engines": str(engines), "size of engines": _size(engines)}


def _size(folder: Path) -> str:  # the hub's snapshots are links to its blobs, not to be counted twice
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def _providers(model: str | None, template: str | None) -> dict[str, str]:
    """Load the model on each provider: that one is listed does not mean that it runs."""
    found: dict[str, str] = {}
    for name in FULL_NAMES:
        try:
            aligner = Aligner.from_pretrained(model, template=template, backend="onnx", provider=name)
            found[name] = f"loads ({aligner.backend.provider})"
        except AlignerError as error:
            found[name] = f"does not load: {_line(error)}"
    return found


def _model(aligner: Aligner, model: str | None) -> dict[str, str]:
    short = aligner.with_options(decode=replace(aligner.decode_config, max_new_tokens=16))
    stats = short.correct("How many days has a week?", "A week has seven days.").stats
    return {
        "folder": model or "bundled",
        "backend": aligner.backend.name,
        "provider": aligner.backend.provider,
        **_precision(aligner, BUNDLED_MODEL if model is None else Path(model)),
        "template": aligner.template.name,
        "granularity": aligner.granularity,
        "edit margin": f"{aligner.decode_config.edit_margin:g} logits",
        "context": f"{aligner.config.max_length} tokens",
        "licence": aligner.config.licence or "not stated",
        "one sentence": f"{stats.seconds * 1000:.1f} ms, {stats.forwards} forward(s)",
    }


def _precision(aligner: Aligner, folder: Path) -> dict[str, str]:
    if aligner.backend.name != "onnx" or not (folder / "model.onnx").is_file():
        return {}
    from aligner_integrations.backends.session import read_graph  # loads onnxruntime

    inputs = read_graph(folder / "model.onnx").inputs
    kinds = {node.kind for node in inputs if node.name.startswith("past_key_values.")}
    return {"keys and values": ", ".join(sorted(kinds))}


def _line(error: AlignerError) -> str:
    return " ".join(str(error).split())
