"""Export: a checkpoint becomes a folder that loads and corrects, or nothing is written at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto

from aligner_integrations import Aligner, AlignerConfig, DecodeConfig, stored_weights
from aligner_integrations.backends.onnx import OnnxBackend
from aligner_integrations.cli import main
from aligner_integrations.correction import apply_edits
from aligner_integrations.decode import draft_decode, greedy_decode
from aligner_integrations.errors import MissingDependencyError, ModelLoadError, TemplateError
from aligner_integrations.export import LEAST_AGREEMENT, ExportReport, export_checkpoint, write_config
from aligner_integrations.model_folder import HubOptions
from aligner_integrations.stored_weights import quantize
from tests.checkpoints import ARCHITECTURES, HEAD_SIZE, checkpoint
from tests.hub import fill_cache
from tests.miniature import exported, make_folder

QUESTION = "Ann has 2 red pens and finds 5 more. How many pens has she?"
ANSWER = "Ann begins with 2 pens. She has 2 + 5 = 8 pens."
END, KEEP = 1, 2
CONFIG = AlignerConfig("tiny", "sentence", keep_token="<|keep|>", max_length=192)
FUSED = ("llama", "qwen2")  # the others have attention windows, or are no Llama


@cache
def backend(dtype: str) -> OnnxBackend:
    return OnnxBackend.load(exported(dtype), provider="cpu")


@cache
def export(architecture: str, dtype: Any = "fp32", attention: Any = "fused") -> ExportReport:
    out = make_folder("exported") / architecture
    return export_checkpoint(
        checkpoint(architecture), out, template="aligner-v1", dtype=dtype, attention=attention
    )


def graph_of(report: ExportReport) -> Any:
    return onnx.load(report.out / "model.onnx").graph


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [*((name, "fused") for name in ARCHITECTURES), *((name, "plain") for name in FUSED)],
)
def test_the_graph_of_each_architecture_chooses_as_its_checkpoint(architecture: str, attention: str) -> None:
    report = export(architecture, attention=attention)
    assert report.attention == (attention if architecture in FUSED else "plain")
    kinds = {node.op_type for node in graph_of(report).node}
    assert ("GroupQueryAttention" in kinds) == (report.attention == "fused")
    assert report.parity.argmax_agreement == 1.0
    assert report.parity.identical_texts == report.parity.texts == 20
    assert report.parity.relative_difference < 1e-3


# optimum-onnx 0.1 feeds Gemma 2 a cache of the wrong shape, whoever exported it.
@pytest.mark.parametrize("io_binding", [False, True])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gemma2"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:optimum")
def test_optimum_runs_the_folder_as_transformers_runs_the_checkpoint(
    architecture: str, io_binding: bool
) -> None:
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(checkpoint(architecture), attn_implementation="eager")
    ours: Any = ORTModelForCausalLM.from_pretrained(export(architecture).out, use_io_binding=io_binding)
    ids = torch.arange(20, 60)[None]
    given: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 16}
    wanted, found = (model.generate(**given, do_sample=False) for model in (plain, ours))
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_guided_equals_greedy_equals_transformers(architecture: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source: Any = AutoModelForCausalLM.from_pretrained(checkpoint(architecture), attn_implementation="eager")
    runner = OnnxBackend.load(export(architecture).out, provider="cpu")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        prompt: list[int] = rng.integers(8, 290, 40).tolist()
        given: Any = {"config": DecodeConfig(max_draft_tokens=8), "eos_id": END, "max_new_tokens": 40}
        plain = greedy_decode(runner, prompt, [], **given)
        ids = torch.tensor([prompt])
        theirs = source.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=END
        )
        assert plain.ids == [id for id in theirs[0, len(prompt) :].tolist() if id != END]
        reference = list(plain.ids)
        for place in rng.integers(0, len(reference), seed):
            reference[place : place + 1] = rng.integers(8, 290, 2).tolist()
        guided = draft_decode(runner, prompt, reference, **given)
        assert guided.ids == plain.ids
        assert guided.stats.forwards < plain.stats.forwards / 2


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int8-dynamic"])
@pytest.mark.parametrize("architecture", ["qwen2", "gemma"])
def test_what_a_precision_costs_is_measured_and_written(architecture: str, dtype: Any) -> None:
    report = export(architecture, dtype)
    assert report.parity.relative_difference > 0
    assert LEAST_AGREEMENT[dtype] <= report.parity.argmax_agreement <= 1
    said = json.loads((report.out / "aligner.json").read_text(encoding="utf-8"))
    assert said["precision"] == {
        "dtype": dtype,
        "identity_rate": report.parity.identical_texts / 20,
        "argmax_agreement": report.parity.argmax_agreement,
        "texts": 20,
    }
    assert report.size == (report.out / "model.onnx").stat().st_size < 0.75 * export(architecture).size
    graph = graph_of(report)
    assert ("MatMulInteger" in {node.op_type for node in graph.node}) == (dtype == "int8-dynamic")
    cache = next(each for each in graph.input if each.name == "past_key_values.0.key")
    half = TensorProto.FLOAT16 if dtype == "fp16" else TensorProto.FLOAT
    assert cache.type.tensor_type.elem_type == half
    aligner = Aligner.from_pretrained(report.out, safeguards="off")
    assert aligner.correct(QUESTION, ANSWER).stats.forwards > 0


@pytest.mark.parametrize(
    ("architecture", "attention"), [("qwen2", "fused"), ("qwen2", "plain"), ("gemma", "plain")]
)
def test_tied_weights_are_stored_once(architecture: str, attention: str) -> None:
    report = export(architecture, attention=attention)
    stored = (checkpoint(architecture) / "model.safetensors").stat().st_size
    graph = graph_of(report)
    vocabulary = graph.output[0].type.tensor_type.shape.dim[2].dim_value
    assert [list(each.dims) for each in graph.initializer if vocabulary in each.dims] == [[vocabulary, 64]]
    weights = sum(len(each.raw_data) for each in graph.initializer)
    angles = 2 * 512 * HEAD_SIZE // 2 * 4
    assert weights < stored + angles + 4096


def test_shards_give_the_same_folder() -> None:
    whole = export("llama").out
    parts = make_folder("exported") / "sharded"
    export_checkpoint(checkpoint("llama", sharded=True), parts, template="aligner-v1")
    assert sorted(path.name for path in parts.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert (parts / "model.onnx").read_bytes() == (whole / "model.onnx").read_bytes()


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_weights_of_a_large_model_go_to_a_file_of_their_own(
    dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_weights, "_INLINE", 0)
    report = export_checkpoint(checkpoint("qwen2"), tmp_path / "out", dtype=dtype)
    files = {path.name: path.stat().st_size for path in report.out.iterdir() if path.name.startswith("model")}
    assert files.keys() == {"model.onnx", "model.onnx_data"}
    assert sum(files.values()) == report.size
    assert files["model.onnx_data"] > files["model.onnx"]
    inline = OnnxBackend.load(export("qwen2", dtype).out, provider="cpu")
    ids = list(range(20, 50))
    beside = OnnxBackend.load(report.out, provider="cpu")
    wanted, found = (one.forward(ids, one.make_cache(), last=5) for one in (inline, beside))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("opset", [14, 20])
@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_other_operator_sets(opset: int, attention: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export_checkpoint(checkpoint("llama"), out, opset=opset, attention=attention)
    imported = {each.domain: each.version for each in onnx.load(out / "model.onnx").opset_import}
    assert imported[""] == report.opset == opset
    assert report.parity.argmax_agreement == 1.0


def test_a_hub_name_is_exported_with_its_own_template(tmp_path: Path) -> None:
    fill_cache(tmp_path / "hub", "aligner/aligner-7b-v1.0", checkpoint("llama"))
    hub = HubOptions(cache_dir=tmp_path / "hub", local_files_only=True)
    report = export_checkpoint("aligner/aligner-7b-v1.0", tmp_path / "out", hub=hub)
    assert report.template == "aligner-v1"
    assert json.loads((tmp_path / "out" / "aligner.json").read_text())["template"] == "aligner-v1"
    assert Aligner.from_pretrained(tmp_path / "out").correct("Why?", "So.").stats.backend == "onnx"
    with pytest.raises(ModelLoadError, match=r"no folder me/other here.*hub's cache"):
        export_checkpoint("me/other", tmp_path / "other", hub=hub)
    assert not (tmp_path / "other").exists()


def test_the_folder_says_what_the_checkpoint_says(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("llama"), source)
    config = AlignerConfig("aligner-correction", edit_margin=1.5, licence="MIT", max_length=77)
    write_config(config, source)
    export_checkpoint(source, tmp_path / "own")
    found = AlignerConfig.load(tmp_path / "own")
    assert (found.template, found.edit_margin, found.licence) == ("aligner-correction", 1.5, "MIT")
    assert found.max_length == 512  # the checkpoint's context, whatever was said
    export_checkpoint(source, tmp_path / "named", template="stream-aligner")
    found = AlignerConfig.load(tmp_path / "named")
    assert (found.template, found.granularity, found.licence) == ("stream-aligner", "sentence", "MIT")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "own" / name).read_bytes() == (source / name).read_bytes()


def test_without_a_template_it_is_named_when_the_folder_is_loaded(tmp_path: Path) -> None:
    report = export_checkpoint(checkpoint("llama"), tmp_path / "out")
    assert report.template is None and "unknown" in report.shown()["export"]["template"]
    assert not (report.out / "aligner.json").exists()
    assert Aligner.from_pretrained(report.out, template="aligner-v1").config.max_length == 512


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_the_folder_loads_and_corrects(dtype: str) -> None:
    aligner = Aligner.from_pretrained(exported(dtype), safeguards="off")
    correction = aligner.correct(QUESTION, ANSWER)
    assert apply_edits(ANSWER, correction.edits) == correction.text
    assert correction.stats.forwards >= 2
    assert (correction.stats.backend, aligner.granularity) == ("onnx", "sentence")
    assert aligner.config == CONFIG


@pytest.mark.parametrize(("dtype", "least"), [("fp32", 1.0), ("int8", 0.95)])
def test_the_trained_graph_follows_its_checkpoint(dtype: str, least: float) -> None:
    said = json.loads((exported(dtype) / "aligner.json").read_text(encoding="utf-8"))
    assert said["precision"]["argmax_agreement"] >= least


def test_int8_chooses_as_fp32_does() -> None:
    equal = []
    for seed in range(10):
        ids = np.random.default_rng(seed).integers(0, 320, 60).tolist()
        whole, small = (
            one.forward(ids, one.make_cache(), last=60).argmax(-1)
            for one in (backend("fp32"), backend("int8"))
        )
        equal += (whole == small).tolist()
    assert sum(equal) >= 0.95 * len(equal)


def test_int8_is_small() -> None:
    whole, small = ((exported(dtype) / "model.onnx").stat().st_size for dtype in ("fp32", "int8"))
    assert small < 0.4 * whole


def graph_as_run(folder: Path, out: Path) -> Any:
    """The graph after the runtime's own optimizations, as it computes."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 4  # it warns that the file is made for this machine
    ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return onnx.load(out).graph


def test_the_runtime_unfolds_int8_to_fp32_while_loading(tmp_path: Path) -> None:
    stored = onnx.load(exported("int8") / "model.onnx").graph
    assert any(tensor.data_type == TensorProto.INT8 for tensor in stored.initializer)
    run = graph_as_run(exported("int8"), tmp_path / "optimized.onnx")
    assert not [tensor.name for tensor in run.initializer if tensor.data_type == TensorProto.INT8]
    constants = {tensor.name for tensor in run.initializer}
    assert not [node.name for node in run.node if node.op_type == "Cast" and set(node.input) <= constants]
    assert not [node.name for node in run.node if "Dequantize" in node.op_type]


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(0, 30), st.booleans())
def test_guided_equals_greedy_on_int8(seed: int, changes: int, kept: bool) -> None:
    """Also with a reference that is near to what is written, so that drafts are taken and refused."""
    rng = np.random.default_rng(seed)
    prompt: list[int] = rng.integers(8, 320, 40).tolist()
    keep_id = KEEP if kept else None
    config = DecodeConfig(max_draft_tokens=8)
    plain = greedy_decode(
        backend("int8"), prompt, [], config=config, eos_id=END, max_new_tokens=40, keep_id=keep_id
    )
    reference = list(plain.ids)
    for place in rng.integers(0, max(len(reference), 1), changes % 5):
        reference[place : place + 1] = rng.integers(8, 320, rng.integers(0, 3)).tolist()
    guided = draft_decode(
        backend("int8"), prompt, reference, config=config, eos_id=END, max_new_tokens=40, keep_id=keep_id
    )
    assert (guided.ids, guided.kept) == (plain.ids, plain.kept)
    assert guided.stats.forwards <= plain.stats.forwards


def test_block_and_single_steps_agree_on_int8() -> None:
    ids = np.random.default_rng(3).integers(0, 320, 32).tolist()
    block = backend("int8").forward(ids, backend("int8").make_cache(), last=32)
    memory = backend("int8").make_cache()
    single = np.concatenate([backend("int8").forward([id], memory, last=1) for id in ids])
    assert np.abs(block - single).max() < 1e-4
    assert (block.argmax(-1) == single.argmax(-1)).all()


MATRICES = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(-8, 8, width=32)
)


@given(MATRICES)
def test_quantizing_errs_by_half_a_step_at_most(weights: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    codes, scales = quantize(weights)
    assert codes.dtype == np.int8 and scales.dtype == np.float32
    assert codes.shape == weights.shape and int(np.abs(codes.astype(int)).max()) <= 127
    assert scales.shape in ((1, weights.shape[1]), (weights.shape[0], 1))
    assert (np.abs(codes * scales - weights) <= 0.5001 * scales + 1e-9).all()


def test_quantizing_takes_the_better_axis() -> None:
    weights = np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32)
    weights[:, 0] *= 20.0  # a column of its own size wants a scale of its own
    assert quantize(weights)[1].shape == (1, 40)
    assert quantize(weights.T.copy())[1].shape == (40, 1)


def test_zeros_stay_zeros() -> None:
    codes, scales = quantize(np.zeros((3, 4), dtype=np.float32))
    assert not (codes * scales).any()


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    shutil.copytree(checkpoint("llama"), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def check_refused(source: Path, message: str, **given: Any) -> None:
    """The export fails with one error, and leaves nothing beside the checkpoint."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(ModelLoadError, match=message):
        export_checkpoint(source, source.parent / "model", **given)
    assert sorted(source.parent.iterdir()) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_what_a_checkpoint_lacks_is_named(name: str, broken: Path) -> None:
    (broken / name).unlink()
    check_refused(broken, rf"is not a checkpoint: {name} is missing")


def test_pickled_weights_are_refused(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    check_refused(broken, "pickled files")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized"),
        ({"model_type": "unheard-of"}, "config.json is of no use"),
        ({"num_hidden_layers": 3}, "lacks the weights model.layers.2"),
        ({"vocab_size": 200, "rope_theta": 500.0}, "has 480 ids|cannot load|does not follow"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(said: dict[str, Any], message: str, broken: Path) -> None:
    path = broken / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | said), encoding="utf-8")
    check_refused(broken, message)


def test_damaged_weights_are_refused(broken: Path) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    check_refused(broken, "cannot read .*model.safetensors")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(broken: Path) -> None:
    path = broken / "tokenizer.json"
    parts = json.loads(path.read_text(encoding="utf-8"))
    parts["added_tokens"].append(parts["added_tokens"][-1] | {"id": 5000, "content": "<|beyond|>"})
    path.write_text(json.dumps(parts), encoding="utf-8")
    check_refused(broken, "more|the model only 480")


def noise(weights: Any, **_: Any) -> Any:
    rng = np.random.default_rng(0)
    return rng.integers(-127, 127, weights.shape).astype(np.int8), np.ones((1, 1), dtype=np.float32)


def test_a_graph_that_does_not_follow_its_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_weights, "quantize", noise)
    kept = tmp_path / "model" / "kept"
    kept.parent.mkdir()
    kept.write_text("what was there", encoding="utf-8")
    with pytest.raises(ModelLoadError, match="int8 graph does not follow"):
        export_checkpoint(checkpoint("llama"), kept.parent, dtype="int8", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert kept.read_text(encoding="utf-8") == "what was there"


FULL_DISK = """
import resource, sys
from pathlib import Path
from aligner_integrations.export import export_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), overwrite=True)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    kept = tmp_path / "model" / "kept"
    kept.parent.mkdir()
    kept.write_text("what was there", encoding="utf-8")
    command = [sys.executable, "-c", FULL_DISK, str(checkpoint("llama")), str(kept.parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert f"nothing was written to {kept.parent}" in result.stdout, result.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "kept"]


def test_a_folder_with_something_in_it_is_replaced_only_when_told(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "kept").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        export_checkpoint(checkpoint("llama"), tmp_path / "model")
    export_checkpoint(checkpoint("llama"), tmp_path / "model", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "kept").exists()


def test_a_checkpoint_is_never_replaced(broken: Path) -> None:
    for out in (broken, broken.parent):
        with pytest.raises(FileExistsError, match="holds the checkpoint"):
            export_checkpoint(broken, out, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        export_checkpoint(broken, broken / "config.json", overwrite=True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dtype": "fp8"}, "dtype must be one of fp32, fp16, int8, int8-dynamic; got 'fp8'"),
        ({"opset": 13}, "opset must be from 14 to 20, got 13"),
        ({"opset": 21}, "opset must be from 14 to 20, got 21"),
        ({"attention": "flash"}, "attention must be one of fused, plain"),
    ],
)
def test_options_are_checked_before_anything_is_read(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_checkpoint(Path("nowhere"), Path("nowhere"), **option)


def test_an_unknown_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="aligner-v9"):
        export_checkpoint(checkpoint("llama"), tmp_path / "model", template="aligner-v9")


def test_what_is_missing_for_plain_attention_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx.model_configs", None)
    with pytest.raises(MissingDependencyError, match=r"aligner-integrations\[export\]"):
        export_checkpoint(checkpoint("llama"), tmp_path / "model", attention="plain")
    assert list(tmp_path.iterdir()) == []
    export_checkpoint(checkpoint("llama"), tmp_path / "model")  # fused, it is not needed


def test_the_command_exports_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(checkpoint("qwen2")), str(tmp_path / "model")
    assert main(["export", source, out, "--dtype", "int8", "--template", "aligner-v1", "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert printed.err == ""
    assert (report["dtype"], report["attention"], report["template"]) == ("int8", "fused", "aligner-v1")
    assert report["parity"]["identity_rate"] == report["parity"]["identical_texts"] / 20
    assert Aligner.from_pretrained(out).template.name == "aligner-v1"
    assert main(["export", source, out, "--attention", "plain", "--force"]) == 0
    assert "same continuation\t20 of 20 texts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere", "out"], 1, "nowhere is not a folder"),
        (["nowhere", "out", "--dtype", "fp8"], 2, "fp8"),
        (["nowhere", "out", "--opset", "9"], 2, "--opset"),
        (["nowhere"], 2, "Missing argument 'out'"),
    ],
)
def test_the_command_fails_in_one_line(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == status
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err


PEAK = """
import resource, sys
from pathlib import Path
import optimum.exporters.onnx.model_configs, transformers.models.llama.modeling_llama
from aligner_integrations.evaluation import parity
from aligner_integrations.export import export_checkpoint

# Fewer texts: each takes the same room as the one before.
parity._RANDOM_PROMPTS, parity._QUESTIONS = 2, parity._QUESTIONS[:1]

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), attention=sys.argv[3])
print(peak() - before)
"""


@cache
def wide_llama() -> Path:
    """A Llama of 150 MB, nearly all of it in three matrices: far more than anything else takes."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    folder = make_folder("wide")
    shutil.copytree(checkpoint("llama"), folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim = (
        1024,
        4096,
        3,
        64,
    )
    config.num_attention_heads = config.num_key_value_heads = 4
    LlamaForCausalLM._from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is counted in other units")
@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_an_export_takes_little_more_memory_than_the_checkpoint(attention: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PEAK, str(wide_llama()), str(tmp_path / "model"), attention]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert int(result.stdout) < 2.5 * (wide_llama() / "model.safetensors").stat().st_size


def test_the_written_config_is_read_back(tmp_path: Path) -> None:
    config = AlignerConfig("tiny", "sentence", 1.5, "<|keep|>", 64, ("en", "de"), "MIT", "größer", "own")
    write_config(config, tmp_path, precision={"dtype": "int8"})
    assert AlignerConfig.load(tmp_path) == config
    write_config(config, tmp_path)
    said = json.loads((tmp_path / "aligner.json").read_text(encoding="utf-8"))
    assert said["precision"] == {"dtype": "int8"}  # what was measured stays
