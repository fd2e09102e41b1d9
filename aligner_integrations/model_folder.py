"""From a model's name to its parts: find the folder, or fetch it from the hub, and load what it holds."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import textwrap
from collections.abc import Collection
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from aligner_integrations.backends import LoadedBackend, check_options, load_backend
from aligner_integrations.config import AlignerConfig
from aligner_integrations.errors import MissingDependencyError, ModelLoadError
from aligner_integrations.template import TEMPLATE_NAMES, CorrectionTemplate
from aligner_integrations.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Published checkpoints whose authors say which frame they were trained on (papers and model cards).
KNOWN_TEMPLATES = {
    "aligner/aligner-7b-v1.0": "aligner-v1",
    "whitzardagent/thought-aligner-7b": "thought-aligner",
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
# What is fetched: at the top of a repository, these and the weights of one backend; code and pickles never.
_SMALL_FILES = ("*.json", "tokenizer.model", "merges.txt")
_WEIGHTS = {
    "onnx": ("model.onnx", "model.onnx_data", "model.onnx.data"),
    "torch": ("model.safetensors", "model-*.safetensors"),
}
_SAFETENSORS = {"model.safetensors", "model.safetensors.index.json"}
# Where a folder may say which token ends a text, in the order in which they are believed.
_NAMES_THE_END = ("tokenizer_config.json", "generation_config.json", "config.json", "genai_config.json")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True, slots=True)
class HubOptions:
    """Which state of a repository to take, as whom, and where to keep it; see huggingface-hub."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What runs the network, and on what; see `load_backend`."""

    backend: str = "auto"
    provider: str = "auto"
    provider_options: dict[str, Any] | None = None
    device: str | None = None
    dtype: str = "auto"
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What a model folder holds, loaded. `source` differs between models and between states of one."""

    backend: LoadedBackend
    tokenizer: Tokenizer
    config: AlignerConfig
    template: CorrectionTemplate | None
    source: str


def load_model(
    model: str | Path, *, template: str | CorrectionTemplate | None, run: RunOptions, hub: HubOptions
) -> ModelParts:
    """Load a folder, or a repository of the hub. What is small is checked before weights are fetched.

    Args:
        model: a folder, or a hub name `owner/name` where there is no folder of that name.
        template: the frame; `None` takes that of `aligner.json`, or of a known name.
        run: the backend and its options.
        hub: how to fetch.

    Raises:
        ModelLoadError: there is no such model, or a file of it is missing, damaged or refused.
        TemplateError: no template has the name, or it needs a system instruction.
        MissingDependencyError: an extra is not installed.
        ProviderUnavailableError: the provider asked for did not load.
        ValueError: an option is unknown, or another backend's.
    """
    check_options(
        run.backend,
        provider=run.provider,
        provider_options=run.provider_options,
        device=run.device,
        dtype=run.dtype,
    )
    frame = CorrectionTemplate.named(template) if isinstance(template, str) else template
    folder, repository = _find_folder(model, hub)
    if frame is None and not (folder / "aligner.json").is_file():
        frame = _known_template(folder)
    config = _read_config(folder, frame)
    tokenizer = _load_tokenizer(folder)
    if repository and not hub.local_files_only:
        _fetch_weights(repository, folder, run.backend, hub)
    name = choose_backend({path.name for path in folder.iterdir()}, run.backend, where=str(folder))
    runner = load_backend(
        name,
        folder,
        provider=run.provider,
        provider_options=run.provider_options,
        device=run.device,
        dtype=run.dtype,
        threads=run.threads,
    )
    if tokenizer.vocab_size > runner.vocab_size:
        raise ModelLoadError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids and the model only {runner.vocab_size}; "
            "take the tokenizer that the checkpoint was trained with, or resize the model's embeddings"
        )
    return ModelParts(runner, tokenizer, config, frame, _fingerprint(folder))


def find_checkpoint(model: str | Path, hub: HubOptions) -> tuple[Path, str | None]:
    """Return a checkpoint's folder, fetched first if `model` is a hub name, and its template if it is known.

    Raises:
        ModelLoadError: the repository cannot be fetched, or holds no safetensors.
    """
    folder = Path(model)
    if not folder.is_dir() and isinstance(model, str) and _HUB_NAME.fullmatch(model):
        folder = _fetch(model, _SMALL_FILES, hub)
        if not hub.local_files_only:
            _fetch_weights(model, folder, "torch", hub)
    known = _known_template(folder)
    return folder, None if known is None else known.name


def choose_backend(names: Collection[str], asked: str, *, where: str) -> str:
    """Return the backend for a folder with files of these names: the one asked for, or the best.

    Raises:
        ModelLoadError: no file is a model for it; the message says what is there instead.
    """
    graph, weights = "model.onnx" in names, not _SAFETENSORS.isdisjoint(names)
    if asked == "auto":
        if graph and weights and importlib.util.find_spec("onnxruntime") is None:
            logger.warning("onnxruntime is not installed: %s runs on PyTorch", where)
            return "torch"
        asked = "onnx" if graph else "torch"
    elif asked == "onnx" and not graph:
        raise ModelLoadError(
            f"{where} holds no model.onnx; make one from the checkpoint with `aligner export`, "
            "or pass backend='torch'"
        )
    if asked == "onnx" or weights:
        return asked
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if "adapter_config.json" in names:
        found = "an adapter without its model: load both with peft, `merge_and_unload()`, and save the whole"
    elif pickles:
        found = (
            f"pickled files ({', '.join(pickles)}), which are refused, because opening one can run any code: "
            "convert them where you trust them (`save_pretrained(..., safe_serialization=True)`)"
        )
    else:
        found = "a model.onnx, which backend='onnx' or 'auto' loads" if graph else "no weights at all"
    raise ModelLoadError(
        f"{where} holds no model.safetensors{'' if graph else ' and no model.onnx'}, but {found}"
    )


def _find_folder(model: str | Path, hub: HubOptions) -> tuple[Path, str]:
    """Return the folder of a model and, when it was fetched, the repository's name."""
    if not isinstance(model, str | Path):
        raise TypeError(f"model must be a str or Path, got {type(model).__name__}")
    if os.path.isdir(model):
        return Path(model), ""
    if isinstance(model, str) and _HUB_NAME.fullmatch(model):
        return _fetch(model, _SMALL_FILES, hub), model
    what = "is a file" if os.path.isfile(model) else "does not exist"
    raise ModelLoadError(
        f"model folder {model} {what}; give a folder that holds tokenizer.json with model.onnx or "
        "model.safetensors, or a hub name like 'owner/name'"
    )


def _fetch(name: str, patterns: Collection[str], hub: HubOptions) -> Path:
    """Return the snapshot folder of a repository, once it holds the files that `patterns` name."""
    import huggingface_hub  # takes longer to import than all else here

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=hub.revision,
            token=hub.token,
            cache_dir=hub.cache_dir,
            local_files_only=hub.local_files_only,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # what is raised for a network that fails differs between its versions
        raise ModelLoadError(_explain(name, hub, error)) from error
    return Path(folder)


def _fetch_weights(name: str, folder: Path, backend: str, hub: HubOptions) -> None:
    """Fetch the weights for a backend, into the snapshot that holds the small files already."""
    import huggingface_hub

    pinned = replace(hub, revision=folder.name)
    try:
        files = huggingface_hub.HfApi(token=hub.token).list_repo_files(name, revision=folder.name)
    except Exception as error:
        if any((folder / file).is_file() for file in (*_SAFETENSORS, "model.onnx")):
            return  # no connection, but all that an earlier load has fetched
        raise ModelLoadError(_explain(name, hub, error)) from error
    chosen = choose_backend(files, backend, where=f"hub repository {name}")
    _fetch(name, _WEIGHTS[chosen], pinned)


def _explain(name: str, hub: HubOptions, error: Exception) -> str:
    """Return what was asked of the hub, why it failed, and the cure."""
    from huggingface_hub import errors

    asked = f"hub repository {name}" + (f" at revision {hub.revision}" if hub.revision else "")
    login = "log in with `hf auth login` (`huggingface-cli login` before version 0.34) or pass token='hf_...'"
    if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError
        return f"{asked} is gated: accept its terms at https://huggingface.co/{name}, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no folder {name} here, and no {asked} that you may see; "
            f"look for a slip in the path or the name, or, when it is private, {login}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{asked}: there is no such revision; give a branch, a tag or a commit of it"
    if isinstance(error, errors.LocalEntryNotFoundError) and hub.local_files_only:
        return (
            f"there is no folder {name} here, and {asked} is not in the hub's cache; load it once without "
            "local_files_only=True, or say with cache_dir= where it is"
        )
    return (
        f"there is no folder {name} here, and {asked} could not be fetched "
        f"({type(error).__name__}: {_brief(error)}); check the connection, or the path if a folder was "
        "meant; what was fetched before loads with local_files_only=True"
    )


def _brief(error: Exception) -> str:
    return textwrap.shorten(str(error), 240, placeholder=" ...")


def _known_template(folder: Path) -> CorrectionTemplate | None:
    """Return the template of a published checkpoint, which a folder of the hub's cache tells by its path.

    `_name_or_path` in a config.json says nothing here: it names what a training began with.
    """
    name = folder.absolute().parent.parent.name.removeprefix("models--").replace("--", "/").lower()
    known = KNOWN_TEMPLATES.get(name)
    return None if known is None else CorrectionTemplate.named(known)


def _read_config(folder: Path, template: CorrectionTemplate | None) -> AlignerConfig:
    """Return the folder's `aligner.json`, or for a plain checkpoint what `template` and its config say."""
    if (folder / "aligner.json").is_file():
        return AlignerConfig.load(folder)
    if template is None:
        raise ModelLoadError(
            f"{folder} has no aligner.json, which would say what prompt the model was trained on; "
            f"pass template='...', one of {', '.join(TEMPLATE_NAMES)}"
        )
    config = AlignerConfig(template.name, template.granularity)
    for name in ("config.json", "genai_config.json"):
        path = folder / name
        try:
            said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            length = said.get("max_position_embeddings") or said.get("model", {}).get("context_length")
            if length is not None:
                return replace(config, max_length=int(length))
        except (ValueError, TypeError, AttributeError, OSError) as error:
            raise ModelLoadError(f"{path} is not a valid {name}: {error}") from error
    return config


def _load_tokenizer(folder: Path) -> Tokenizer:
    """Load `tokenizer.json`, or make it from the older files of a slow tokenizer."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_file(path, end_token=_said_end(folder))
    older = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]
    if not older:
        raise ModelLoadError(
            f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model, nor vocab.json with "
            "merges.txt; copy it from the model that the checkpoint was tuned from"
        )
    try:
        return Tokenizer(_converted(folder, older[0]), end_token=_said_end(folder))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelLoadError(f"cannot load the tokenizer in {folder}: {error}") from error


def _said_end(folder: Path) -> str | int | None:
    """Return the end-of-text token that the folder names, or its id; of several the first."""
    for name in _NAMES_THE_END:
        try:
            path = folder / name
            said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            said = said["model"] if name == "genai_config.json" and said else said
            ends = [said.get("eos_token"), said.get("eos_token_id")]
            flat = [each["content"] if isinstance(each, dict) else each for each in ends]
            found = next((end for end in flat if end is not None), None)
            found = found[0] if isinstance(found, list) else found
            if isinstance(found, str | int):
                return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelLoadError(f"{folder / name} is not a valid {name}: {error}") from error
    return None


def _converted(folder: Path, file: str) -> str:
    """Return the tokenizer.json that transformers makes of the older files."""
    cure = "save it once with AutoTokenizer.from_pretrained(...).save_pretrained(...) and copy tokenizer.json"
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingDependencyError(
            f"{folder} has no tokenizer.json; to make it of {file} run "
            f'`pip install "aligner-integrations[torch]"`, or {cure}',
            name="transformers",
        ) from error
    try:
        slow = AutoTokenizer.from_pretrained(
            folder, use_fast=True, trust_remote_code=False, local_files_only=True
        )
        return str(slow.backend_tokenizer.to_str())
    except Exception as error:  # from missing converters to files that are damaged, in as many classes
        needed = [name for name in ("sentencepiece", "tiktoken") if importlib.util.find_spec(name) is None]
        install = f"`pip install {' '.join(needed)}`, which it may need, or " if needed else ""
        raise ModelLoadError(
            f"{folder} has no tokenizer.json, and transformers cannot make it of {file} ({_brief(error)}); "
            f"{install}{cure}"
        ) from error


def _fingerprint(folder: Path) -> str:
    """Return a name for this state of the folder's files; links, as in the hub's cache, are followed."""
    files = [(path.name, os.stat(path, follow_symlinks=path.exists())) for path in sorted(folder.iterdir())]
    stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    return sha256(repr((folder.resolve(), stamps)).encode()).hexdigest()[:16]
