"""Checkpoint to model folder: ONNX with cache, tokenizer, `aligner.json`, and a parity check.

Run by `aligner export`, and by `aligner train` at its end. Needs the extra `export`. The graph is written
without weights, which then go from file to file one by one: they are never in memory as a whole.
"""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias, get_args

import onnx
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from aligner_integrations.config import AlignerConfig
from aligner_integrations.errors import MissingDependencyError, ModelLoadError
from aligner_integrations.evaluation.parity import Parity, measure_parity
from aligner_integrations.llama_graph import can_fuse, write_llama_graph
from aligner_integrations.logit_graph import narrow_logits
from aligner_integrations.model_folder import HubOptions, choose_backend, find_checkpoint
from aligner_integrations.stored_weights import CheckpointWeights, Dtype, store_weights, take_weights
from aligner_integrations.template import CorrectionTemplate

logger = logging.getLogger(__name__)

Attention: TypeAlias = Literal["fused", "plain"]

OPSETS = range(14, 21)  # what the exporter of PyTorch and the graph step can both write
# What is copied as it is; the first two have to be there.
_COPIED = ("config.json", "tokenizer.json")
_COPIED_IF_THERE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
# The least share of a prompt's places where graph and checkpoint choose the same next id. Below it the graph
# is not the checkpoint's: what each precision costs by rounding was measured to be far less.
LEAST_AGREEMENT: dict[Dtype, float] = {"fp32": 0.99, "fp16": 0.95, "int8": 0.8, "int8-dynamic": 0.5}
# In fp32 another choice than the checkpoint's must be as good, but for this share of the logits' deviation.
NEAR_TIE = 1e-3
_EXPORTER_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (Warning, "Converting a tensor to a Python"),
    (Warning, "torch.tensor results are registered as constants"),
    (DeprecationWarning, "You are using the legacy TorchScript-based ONNX export"),
    (DeprecationWarning, "The feature will be removed"),
    (UserWarning, "Exporting aten::index operator of advanced indexing"),
)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was exported, and how near it is to the checkpoint; `size` is in bytes, of graph and weights."""

    out: Path
    dtype: Dtype
    attention: Attention
    opset: int
    template: str | None
    size: int
    parity: Parity

    def to_dict(self) -> dict[str, Any]:
        """Return the report as what JSON can hold."""
        parity = asdict(self.parity) | {"identity_rate": self.parity.identity_rate}
        own = {name: getattr(self, name) for name in ("dtype", "attention", "opset", "template", "size")}
        return {"out": str(self.out), **own, "parity": parity}

    def shown(self) -> dict[str, dict[str, str]]:
        """Return the report as rows of text, by subject."""
        parity = self.parity
        return {
            "export": {
                "folder": str(self.out),
                "precision": f"{self.dtype}, {self.size / 1e6:.1f} MB",
                "graph": f"{self.attention} attention, opset {self.opset}",
                "template": self.template or "unknown; name one when loading: template='...'",
            },
            "beside the checkpoint": {
                "same next token": f"{parity.argmax_agreement:.2%} of places",
                "same continuation": f"{parity.identical_texts} of {parity.texts} texts",
                "largest difference of logits": (
                    f"{parity.largest_difference:.2g} ({parity.relative_difference:.2g} standard deviations)"
                ),
            },
        }


def export_checkpoint(
    checkpoint: str | Path,
    out: Path,
    *,
    config: AlignerConfig | None = None,
    template: str | None = None,
    dtype: Dtype = "fp32",
    opset: int = 18,
    attention: Attention = "fused",
    overwrite: bool = False,
    hub: HubOptions | None = None,
) -> ExportReport:
    """Export a checkpoint to the model folder `out`, once its graph is found to follow the checkpoint.

    The folder is made beside `out` and put in place at the end: what fails leaves nothing behind.

    Args:
        checkpoint: a folder with `config.json`, `tokenizer.json` and weights as safetensors, or the name of
            such a repository on the hub.
        out: the folder to make; it may exist only if it is empty, or with `overwrite`.
        config: what `aligner.json` is to say; the checkpoint's own is taken without it, if there is one.
            The context (`max_length`) is always the checkpoint's.
        template: the frame, in place of the one that `config` or the checkpoint names. Without any, the
            folder gets no `aligner.json` and the frame is named when it is loaded.
        dtype: `"fp32"`; `"fp16"` for accelerators; `"int8"`, which stores each matrix as int8 with a scale a
            row or column, unfolded while loading, so that it computes in fp32; or `"int8-dynamic"`, which
            multiplies in int8, so that a block of ids and single ones no longer get the same logits.
        opset: the version of ONNX's operators.
        attention: `"fused"` into one node where the architecture allows it, or `"plain"`, for TensorRT.
        overwrite: whether an existing `out` is replaced.
        hub: how to fetch a repository.

    Raises:
        ModelLoadError: the repository cannot be fetched, the checkpoint lacks a file or is of an unknown
            kind, or its graph differs from it.
        TemplateError: there is no such template.
        OSError: `out` cannot be written, or is there already.
        ValueError: `dtype`, `opset` or `attention` is none of those.
    """
    _check_options(dtype, opset, attention)
    checkpoint, known = find_checkpoint(checkpoint, hub or HubOptions())
    model_config = _read_checkpoint(checkpoint)
    if config is None and not (checkpoint / "aligner.json").is_file():
        template = template or known
    said = _find_config(checkpoint, config, template, model_config.max_position_embeddings)
    fused = attention == "fused" and can_fuse(model_config)
    frame = None if said is None else said.template
    with _new_folder(out, checkpoint=checkpoint, overwrite=overwrite) as folder:
        size = _write_model(checkpoint, model_config, folder, dtype=dtype, opset=opset, fused=fused)
        context = model_config.max_position_embeddings
        with _quiet():
            parity = measure_parity(checkpoint, folder, template=frame, context=context, lean=dtype == "int8")
        _check_parity(parity, dtype, checkpoint)
        if said is not None:
            precision = {"dtype": dtype, "identity_rate": parity.identity_rate, "texts": parity.texts}
            write_config(said, folder, precision=precision | {"argmax_agreement": parity.argmax_agreement})
    report = ExportReport(out, dtype, "fused" if fused else "plain", opset, frame, size, parity)
    logger.info("exported %s: %s", checkpoint, report.to_dict())
    return report


def write_config(config: AlignerConfig, folder: Path, *, precision: dict[str, Any] | None = None) -> None:
    """Write `aligner.json`; `precision`, as measured at the export, stays as it is where none is given."""
    path = folder / "aligner.json"
    said = asdict(config)
    if precision is None and path.is_file():
        precision = json.loads(path.read_text(encoding="utf-8")).get("precision")
    if precision is not None:
        said["precision"] = precision
    path.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_options(dtype: str, opset: int, attention: str) -> None:
    for name, value, known in (
        ("dtype", dtype, get_args(Dtype)),
        ("attention", attention, get_args(Attention)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    if opset not in OPSETS:
        raise ValueError(f"opset must be from {OPSETS.start} to {OPSETS.stop - 1}, got {opset}")


def _read_checkpoint(checkpoint: Path) -> Any:
    """Return a checkpoint's transformers config, once all that an export needs is there."""
    if not checkpoint.is_dir():
        raise ModelLoadError(
            f"{checkpoint} is not a folder; give one that holds config.json, tokenizer.json and "
            "model.safetensors, or a hub name like 'owner/name'"
        )
    cures = {
        "config.json": "it is written by `save_pretrained`",
        "tokenizer.json": "save the tokenizer beside it with `AutoTokenizer...save_pretrained(...)`",
    }
    for name in _COPIED:
        if not (checkpoint / name).is_file():
            raise ModelLoadError(f"{checkpoint} is not a checkpoint: {name} is missing; {cures[name]}")
    choose_backend({path.name for path in checkpoint.iterdir()}, "torch", where=str(checkpoint))
    try:
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{checkpoint}/config.json is of no use: {error}") from error
    if not isinstance(getattr(config, "max_position_embeddings", None), int):
        raise ModelLoadError(f"{checkpoint}/config.json does not say the context: max_position_embeddings")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelLoadError(f"{checkpoint} is quantized; export the checkpoint that it was made from")
    return config


def _find_config(
    checkpoint: Path, config: AlignerConfig | None, template: str | None, context: int
) -> AlignerConfig | None:
    """Return what `aligner.json` is to say, or None where nobody says what the model was trained on."""
    if config is None and (checkpoint / "aligner.json").is_file():
        config = AlignerConfig.load(checkpoint)
    if template is not None:
        frame = CorrectionTemplate.named(template)
        config = replace(config or AlignerConfig(template), template=template, granularity=frame.granularity)
    elif config is not None:
        CorrectionTemplate.named(config.template)
    return None if config is None else replace(config, max_length=context)


def _write_model(
    checkpoint: Path, config: Any, folder: Path, *, dtype: Dtype, opset: int, fused: bool
) -> int:
    """Write graph, weights and what is copied; return the bytes that graph and weights take."""
    weights = CheckpointWeights(checkpoint)
    if fused:
        model, wanted = write_llama_graph(config, weights.names, half=dtype == "fp16", opset=opset)
    else:
        model, wanted = _trace(config, half=dtype == "fp16", opset=opset)
    store_weights(narrow_logits(model), wanted, weights, folder, dtype=dtype)
    for name in (*_COPIED, *_COPIED_IF_THERE):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    return sum(path.stat().st_size for path in folder.glob("model.onnx*"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing a bar while it loads."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


@contextmanager
def _new_folder(out: Path, *, checkpoint: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder beside `out` that takes its place if all goes well, and is gone if not."""
    out = out.resolve()
    if checkpoint.resolve().is_relative_to(out):
        raise FileExistsError(f"{out} holds the checkpoint; choose another folder to export to")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose another folder to export to")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} is not empty; choose another folder, or replace it (`--force`)")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
            fresh.mkdir()
            yield fresh
            if out.exists():
                out.rename(old)
            try:
                fresh.rename(out)
            except OSError:
                if old.exists():
                    old.rename(out)
                raise
    except OSError as error:
        message = f"nothing was written to {out}: {error.strerror or error}"
        raise (OSError(message) if error.errno is None else OSError(error.errno, message)) from error


def _trace(config: Any, *, half: bool, opset: int) -> tuple[Any, dict[str, bool]]:
    """Return the graph of an architecture that we do not write ourselves, and the weights to be added to it.

    It is traced, as optimum does it, on a model whose weights were never set: what was not written to takes
    no memory. Each is wanted transposed, or not.
    """
    kind = torch.float16 if half else torch.float32
    tasks, no_init_weights = _import_exporter()
    try:
        with no_init_weights():
            # Eager: the fused kind is traced with a check for rows of NaN that grows dear with the cache.
            source = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=kind).eval()
        make = tasks.get_exporter_config_constructor(
            "onnx", model=source, task="text-generation-with-past", library_name="transformers"
        )
    except (KeyError, ValueError) as error:
        raise ModelLoadError(
            f"optimum cannot export a {config.model_type!r} model: {error}; run it with backend='torch'"
        ) from error
    source.tie_weights()
    for number, weight in enumerate(source.parameters()):
        # Weights that are equal would be taken for one and the same.
        weight.data.view(-1)[:2] = torch.tensor(divmod(number, 1000), dtype=kind)[: weight.numel()]
    recipe = make(config, use_past=True, use_past_in_inputs=True, float_dtype="fp16" if half else "fp32")
    given = recipe.rename_ambiguous_inputs(recipe.generate_dummy_inputs(framework="pt"))
    inputs, places = recipe.ordered_inputs(source), {0: "batch_size", 1: "sequence_length"}
    if "position_ids" not in inputs:  # optimum leaves them out for Gemma; rows of unlike lengths need them
        first = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
        inputs = first | {"position_ids": places} | inputs
        given["position_ids"] = torch.arange(given["input_ids"].shape[1]).expand_as(given["input_ids"])
    # Left to its default it becomes an input of the trace that has no name.
    patched = recipe.patch_model_for_export(source, model_kwargs={"logits_to_keep": 0})
    with TemporaryDirectory() as scratch, torch.no_grad(), patched, warnings.catch_warnings():
        written = Path(scratch) / "graph.onnx"
        # What the exporter says of its own and transformers' code; that the graph is right, `parity` checks.
        for category, said in _EXPORTER_WARNINGS:
            warnings.filterwarnings("ignore", message=said, category=category)
        torch.onnx.export(
            source,
            (given,),
            written,
            input_names=list(inputs),
            output_names=list(recipe.outputs),
            dynamic_axes={**inputs, **recipe.outputs},
            opset_version=opset,
            export_params=False,
            do_constant_folding=False,
            dynamo=False,
        )
        model = onnx.load(written)
    return model, take_weights(model.graph, {name for name, _ in source.named_parameters()})


def _import_exporter() -> tuple[Any, Any]:
    try:
        importlib.import_module("optimum.exporters.onnx.model_configs")  # enters what can be exported
        from optimum.exporters.tasks import TasksManager
        from transformers.modeling_utils import no_init_weights
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != "optimum":
            raise
        raise MissingDependencyError(
            f"this architecture, or plain attention, is exported through optimum, which cannot be loaded "
            f'({error}); run `pip install "aligner-integrations[export]" "transformers<4.58"`',
            name="optimum",
        ) from error
    return TasksManager, no_init_weights


def _check_parity(parity: Parity, dtype: Dtype, checkpoint: Path) -> None:
    """Raise if the graph does not follow its checkpoint; comparisons with NaN fail."""
    agrees = parity.argmax_agreement >= LEAST_AGREEMENT[dtype]
    near = dtype != "fp32" or parity.worst_choice <= NEAR_TIE
    if not (agrees and near and parity.largest_difference < float("inf")):
        raise ModelLoadError(
            f"the {dtype} graph does not follow {checkpoint}: {parity.argmax_agreement:.1%} of next tokens "
            f"agree (needed are {LEAST_AGREEMENT[dtype]:.0%}), and logits differ by up to "
            f"{parity.largest_difference:.3g}; nothing was written. Try another dtype, or attention='plain'"
        )
