"""`Aligner.from_pretrained`: checkpoints, exports and repositories of the hub, and every bad one of them."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aligner_integrations import Aligner, CorrectionTemplate, DecodeConfig
from aligner_integrations.backends import BACKENDS
from aligner_integrations.cli import main
from aligner_integrations.decode import draft_decode, greedy_decode
from aligner_integrations.errors import MissingDependencyError, ModelLoadError, TemplateError
from aligner_integrations.model_folder import KNOWN_TEMPLATES, choose_backend
from aligner_integrations.template import TEMPLATE_NAMES
from tests.checkpoints import ARCHITECTURES, CONTEXT, checkpoint, plain_onnx
from tests.hub import COMMIT, fill_cache, serve

GENAI = Path(__file__).parent / "data" / "genai_tiny"
QUESTION = "She has 12 pens and finds 15 more. How many are there?"
ANSWER = "She has 12 + 15 = 28 pens. The bakery opens at eight."
SHORT = DecodeConfig(max_new_tokens=48)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing by a second thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(model: str | Path | None, **options: Any) -> Aligner:
    options = {"template": "aligner-v1", "decode": SHORT, "safeguards": "off", **options}
    return Aligner.from_pretrained(model, **options)


def copy_of(source: Path, folder: Path, *names: str) -> Path:
    """A copy of the files called `names`, of all without them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or [file.name for file in source.iterdir()]:
        shutil.copyfile(source / name, folder / name)
    return folder


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def proposed(aligner: Aligner) -> str:
    return aligner.correct(QUESTION, ANSWER).proposed


# --- what loads


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_and_its_export_load_by_one_call_and_write_the_same(architecture: str) -> None:
    folders = (checkpoint(architecture), plain_onnx(architecture), checkpoint(architecture, sharded=True))
    aligners = [load(folder) for folder in folders]
    assert [aligner.backend.name for aligner in aligners] == ["torch", "onnx", "torch"]
    assert len({aligner.source for aligner in aligners}) == 3
    whole, exported, sharded = map(proposed, aligners)
    assert whole == exported == sharded
    for aligner in aligners:
        assert (aligner.config.max_length, aligner.granularity) == (CONTEXT, "answer")
        assert aligner.tokenizer.eos_id == aligner.tokenizer.token_id(
            json.loads((folders[0] / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
        )


def test_a_sentence_level_checkpoint_corrects_sentences_and_streams() -> None:
    frames = ("stream-aligner-gemma", CorrectionTemplate.named("stream-aligner-qwen", system="Be kind."))
    for architecture, frame in zip(("gemma2", "qwen2"), frames, strict=True):
        alike = [load(make(architecture), template=frame) for make in (checkpoint, plain_onnx)]
        assert {aligner.granularity for aligner in alike} == {"sentence"}
        one, other = (aligner.correct_sentence(QUESTION, "She counts.", ANSWER) for aligner in alike)
        assert one.proposed == other.proposed
        segments = list(alike[0].correct_stream(QUESTION, [ANSWER[:20], ANSWER[20:]]))
        assert "".join(segment.original for segment in segments) == ANSWER
        assert all(segment.stats.backend == "torch" for segment in segments)


def test_an_export_of_onnxruntime_genai_writes_what_genai_itself_writes(tmp_path: Path) -> None:
    aligner = load(GENAI / "model")
    assert (aligner.backend.name, aligner.config.max_length) == ("onnx", 256)
    rows = json.loads((GENAI / "expected.json").read_text(encoding="utf-8"))
    for row in rows:
        # The prompt's ids in the file are those of the whole text in one piece, by its own tokenizer.
        assert aligner.encode_prompt(row["question"], "", row["answer"], "") == row["prompt"]
        reference = aligner.tokenizer.encode_text(row["answer"])
        new = len(row["continuation"])
        for decode in (greedy_decode, draft_decode):
            found = decode(
                *(aligner.backend, row["prompt"], reference), config=SHORT, eos_id=2, max_new_tokens=new
            )
            assert found.ids == row["continuation"]
    # Its own file alone says how a text ends, how long the context is, and how wide a head.
    copy_of(GENAI / "model", tmp_path, "model.onnx", "model.onnx.data", "tokenizer.json", "genai_config.json")
    again = load(tmp_path)
    assert (again.tokenizer.eos_id, again.config.max_length) == (2, 256)
    (tmp_path / "genai_config.json").write_text('{"model": {}}', encoding="utf-8")
    with pytest.raises(ModelLoadError, match=r"genai_config\.json"):
        load(tmp_path)


def test_a_folder_with_both_runs_on_onnx_runtime_where_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    both = copy_of(plain_onnx("llama"), copy_of(checkpoint("llama"), tmp_path / "both"))
    assert load(both).backend.name == "onnx"
    assert load(both, backend="torch", device="cpu", dtype="float32").backend.name == "torch"
    assert load(both, backend="onnx", provider="cpu", threads=1).backend.name == "onnx"
    assert caplog.records == []
    hide = {"onnxruntime": None, "aligner_integrations.backends.onnx": None}
    with monkeypatch.context() as patch:
        for name, module in hide.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with caplog.at_level(logging.WARNING):
            assert load(both).backend.name == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        f"onnxruntime is not installed: {both} runs on PyTorch"
    ]


def test_what_aligner_json_says_goes_before_a_table_and_after_the_argument(tmp_path: Path) -> None:
    folder = copy_of(checkpoint("gemma"), tmp_path / "model")
    said = {"template": "aligner-correction", "max_length": 300, "edit_margin": 0.5}
    (folder / "aligner.json").write_text(json.dumps(said), encoding="utf-8")
    aligner = load(folder, template=None, decode=None)
    assert aligner.template.name == "aligner-correction"
    assert (aligner.config.max_length, aligner.decode_config.edit_margin) == (300, 0.5)
    assert load(folder, template="aligner-revision").template.name == "aligner-revision"
    snapshot = fill_cache(tmp_path / "cache", "aligner/aligner-7b-v1.0", folder)
    assert load(snapshot, template=None).template.name == "aligner-correction"


def test_older_tokenizer_files_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = checkpoint("qwen2"), tmp_path / "older"
    copy_of(source, folder, "config.json", "model.safetensors")
    parts = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps(parts["model"]["vocab"]), encoding="utf-8")
    merges = [" ".join(pair) for pair in parts["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    added = {token.pop("id"): token for token in parts["added_tokens"]}
    said = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    aligner, expected = load(folder), load(source)
    prompts = [each.encode_prompt(QUESTION, "", ANSWER, "") for each in (aligner, expected)]
    assert prompts[0] == prompts[1]
    assert proposed(aligner) == proposed(expected)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(MissingDependencyError, match=r"make it of vocab\.json.*integrations\[torch\]"):
            load(folder)
    (folder / "vocab.json").write_text("{]", encoding="utf-8")
    with pytest.raises(ModelLoadError, match=r"cannot make it of vocab\.json.*save_pretrained") as caught:
        load(folder)
    assert caught.value.__cause__ is not None
    (folder / "vocab.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"no such thing")
    with pytest.raises(ModelLoadError, match=r"cannot make it of tokenizer\.model.*tokenizer\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({}, "</s>"),
        ({"config.json": {"eos_token_id": 300}}, 300),
        ({"config.json": {"eos_token_id": 300}, "generation_config.json": {"eos_token_id": [301, 300]}}, 301),
        (
            {
                "generation_config.json": {"eos_token_id": 301},
                "tokenizer_config.json": {"eos_token": {"content": "<s>"}},
            },
            "<s>",
        ),
        ({"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": None}}, "</s>"),
        ({"tokenizer_config.json": {"eos_token": "<nowhere>"}}, "no end-of-text token; looked for <nowhere>"),
        (
            {"generation_config.json": {"eos_token_id": 99_999}},
            "no end-of-text token; looked for token 99999",
        ),
        ({"tokenizer_config.json": {"eos_token": {}}}, r"tokenizer_config\.json is not a valid"),
        ({"generation_config.json": []}, r"generation_config\.json is not a valid"),
    ],
)
def test_the_end_of_a_text_is_the_one_that_the_folder_names(
    files: dict[str, Any], end: str | int, tmp_path: Path
) -> None:
    copy_of(plain_onnx("llama"), tmp_path, "model.onnx", "tokenizer.json")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    if isinstance(end, str) and not end.startswith("<"):
        with pytest.raises(ModelLoadError, match=end):
            load(tmp_path)
        return
    tokenizer = load(tmp_path).tokenizer
    assert tokenizer.eos_id == (end if isinstance(end, int) else tokenizer.token_id(end))


# --- the hub


def test_the_hub_cache_serves_known_names_with_their_template(tmp_path: Path) -> None:
    name, cache = "aligner/aligner-7b-v1.0", tmp_path / "cache"
    snapshot = fill_cache(cache, name, checkpoint("llama", sharded=True))
    options = {"template": None, "cache_dir": cache, "local_files_only": True}
    aligner = load(name, **options)
    assert (aligner.template.name, aligner.granularity) == ("aligner-v1", "answer")
    assert aligner.backend.name == "torch"
    assert proposed(aligner) == proposed(load(checkpoint("llama")))
    for where in (snapshot, str(snapshot), os.path.relpath(snapshot)):
        assert load(where, template=None).source == aligner.source
    assert load(name, **options, revision=COMMIT).source == aligner.source
    thoughts = "WhitzardAgent/Thought-Aligner-7B"
    fill_cache(cache, thoughts, plain_onnx("qwen2"))
    assert load(thoughts, **options).template.name == "thought-aligner"
    assert load(thoughts, **options | {"template": "aligner-v1"}).template.name == "aligner-v1"
    assert set(KNOWN_TEMPLATES.values()) <= set(TEMPLATE_NAMES)


def test_the_source_follows_the_blobs_behind_the_names(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path, "me/mine", plain_onnx("llama"))
    (snapshot / "README.md").symlink_to("../../blobs/gone")  # a blob that somebody has cleaned away
    first = load(snapshot).source
    assert load(snapshot).source == first
    blob = (snapshot / "model.onnx").resolve()
    os.utime(blob, ns=(1, 1))
    assert load(snapshot).source != first


def test_an_export_with_weights_beside_it_loads_from_a_cache_of_links(tmp_path: Path) -> None:
    fill_cache(tmp_path, "me/genai", GENAI / "model")
    aligner = load("me/genai", cache_dir=tmp_path, local_files_only=True)
    assert proposed(aligner) == proposed(load(GENAI / "model"))


def test_what_is_not_in_the_cache_is_told_with_the_cure(tmp_path: Path) -> None:
    fill_cache(tmp_path, "me/mine", plain_onnx("llama"))
    local = {"cache_dir": tmp_path, "local_files_only": True}
    with pytest.raises(ModelLoadError, match=r"no folder me/other here.*hub's cache.*local_files_only"):
        load("me/other", **local)
    with pytest.raises(ModelLoadError, match=r"me/mine at revision v2 is not in the hub's cache"):
        load("me/mine", **local, revision="v2")
    with pytest.raises(ModelLoadError, match=r"me/mi--ne could not be fetched.*HFValidationError"):
        load("me/mi--ne", **local)
    for name in ("me/my/mine", "./me/mine", "mine", "me/", "", "me/mi ne", "a\0b", "x" * 5000):
        with pytest.raises(ModelLoadError, match=r"does not exist; give a folder.*or a hub name"):
            load(name, **local)
    with pytest.raises(ModelLoadError, match="does not exist; give a folder"):
        load(Path("me/mine"), **local)


ON_LINE = """
import json, sys
from urllib.request import urlopen
from huggingface_hub.utils import disable_progress_bars
from aligner_integrations import Aligner, DecodeConfig
from aligner_integrations.errors import AlignerError
disable_progress_bars()
address, cache = sys.argv[1:]

def load(name, **options):
    options = {"template": "aligner-v1", "cache_dir": cache, **options}
    try:
        aligner = Aligner.from_pretrained(name, decode=DecodeConfig(max_new_tokens=8), **options)
        return [aligner.backend.name, aligner.template.name]
    except AlignerError as error:
        return [type(error).__name__, str(error)]

found = {
    "both": load("me/both", token="hf_token"),
    "both, torch": load("me/both", backend="torch"),
    "plain": load("me/plain"),
    "untemplated": load("me/plain", template=None, cache_dir=cache + "2"),
    "nothing": load("me/nothing"),
    "revision": load("me/plain", revision="v9"),
    "gated": load("me/gated"),
    "pickled": load("me/pickled"),
    "no onnx": load("me/plain", backend="onnx", cache_dir=cache + "2"),
}
urlopen(address + "/down").close()
found |= {"both, down": load("me/both"), "other, down": load("me/other")}
print(json.dumps(found))
"""


def test_repositories_are_fetched_from_the_hub_weights_of_one_backend_only(tmp_path: Path) -> None:
    """The real client of huggingface-hub against a server of ours, in a process that knows no other."""
    plain = {file.name: file.read_bytes() for file in checkpoint("llama", sharded=True).iterdir()}
    extras = {
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"raise",
        "step-9/model.safetensors": b"",
        "a.pt": b"",
    }
    both = {file.name: file.read_bytes() for file in (GENAI / "model").iterdir()}
    small = {name: content for name, content in plain.items() if not name.endswith(".safetensors")}
    small.pop("model.safetensors.index.json")
    repositories = {
        "me/both": {**both, **extras, "model.safetensors": b"not fetched at first", "config.json": b"{}"},
        "me/plain": {**plain, **extras},
        "me/gated": plain,
        "me/pickled": {**small, **extras},
    }
    with serve(repositories, gated="me/gated") as (address, fetched):
        quiet = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", ON_LINE, address, str(tmp_path / "cache")],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **quiet, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_TOKEN": ""},
        )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["both"] == found["both, down"] == ["onnx", "aligner-v1"]
    assert found["both, torch"][0] == "ModelLoadError"  # those bytes are no weights; but they were fetched
    assert found["plain"] == ["torch", "aligner-v1"]
    told = {
        "untemplated": r"pass template='\.\.\.', one of aligner-correction",
        "nothing": "no folder me/nothing here.*no hub repository me/nothing that you may see.*hf auth login",
        "revision": "me/plain at revision v9: there is no such revision",
        "gated": "me/gated is gated: accept its terms.*hf auth login",
        "pickled": r"hub repository me/pickled.*pickled files \(a\.pt, pytorch_model\.bin\).*refused",
        "no onnx": "hub repository me/plain holds no model.onnx.*aligner export",
        "other, down": "me/other could not be fetched.*check the connection.*local_files_only=True",
    }
    for case, pattern in told.items():
        assert found[case][0] == "ModelLoadError"
        assert re.search(pattern, found[case][1]), found[case][1]
    files = {name: [file for file in fetched if file.startswith(name)] for name in repositories}
    assert sorted(files["me/both"]) == sorted(
        f"me/both/{name}" for name in (*both, "config.json", "model.safetensors")
    )
    assert fetched.index("me/both/model.safetensors") > fetched.index("me/both/model.onnx.data")
    shards = [f"me/plain/{name}" for name in plain if name.endswith(".safetensors")]
    # Nothing else cost more than the small files: neither a frame that is missing nor a backend that cannot.
    assert sorted(file for file in fetched if file.endswith(".safetensors")) == sorted(
        [*shards, "me/both/model.safetensors"]
    )
    assert not any(file.endswith((".bin", ".pt", ".py")) for file in fetched)
    assert files["me/gated"] == []


# --- bad input


def test_a_folder_without_a_frame_lists_the_frames() -> None:
    with pytest.raises(
        ModelLoadError, match=r"no aligner\.json.*template='\.\.\.', one of aligner-correction"
    ):
        load(checkpoint("llama"), template=None)
    with pytest.raises(TemplateError, match=r"unknown template 'aligner-v9'; known: aligner-correction"):
        load(checkpoint("llama"), template="aligner-v9")
    with pytest.raises(TemplateError, match="system instruction"):
        load(checkpoint("llama"), template="stream-aligner-llama2")


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    copy_of(checkpoint("llama"), tmp_path, "config.json", "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"has no tokenizer: neither tokenizer\.json.*copy it"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        (
            ["pytorch_model-00001-of-00002.bin"],
            "auto",
            r"pickled files \(pytorch_model-0.*refused.*safe_serial",
        ),
        (["consolidated.00.pth"], "torch", r"pickled files \(consolidated\.00\.pth\)"),
        (["adapter_config.json", "adapter_model.safetensors"], "auto", r"an adapter.*merge_and_unload"),
        (["pytorch_model.bin"], "onnx", r"holds no model\.onnx; make one.*aligner export"),
        (["model.onnx"], "torch", r"no model\.safetensors, but a model\.onnx, which backend='onnx'"),
        ([], "auto", "no weights at all"),
    ],
)
def test_a_folder_without_usable_weights_says_what_is_there(
    names: list[str], asked: str, message: str, tmp_path: Path
) -> None:
    copy_of(checkpoint("llama"), tmp_path, "config.json", "tokenizer.json", "tokenizer_config.json")
    for name in names:
        (tmp_path / name).write_bytes(b"\x80\x04cposix\nsystem\n(S'touch stolen'\ntR.")
    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path, backend=asked)


def test_safetensors_beside_pickles_are_what_is_loaded(tmp_path: Path) -> None:
    folder = copy_of(checkpoint("llama"), tmp_path / "model")
    for name in ("pytorch_model.bin", "training_args.bin"):
        (folder / name).write_bytes(b"no pickle")
    assert load(folder).backend.name == "torch"
    assert choose_backend(os.listdir(folder), "auto", where="") == "torch"


@pytest.mark.parametrize("make", [checkpoint, plain_onnx])
def test_a_tokenizer_with_more_ids_than_the_model_is_refused(make: Any, tmp_path: Path) -> None:
    folder = copy_of(make("llama"), tmp_path / "model")
    known = load(folder).tokenizer.vocab_size
    parts = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    token = {**parts["added_tokens"][0], "id": known + 4, "content": "<|late|>"}
    change_json(folder / "tokenizer.json", added_tokens=[*parts["added_tokens"], token])
    with pytest.raises(ModelLoadError, match=rf"tokenizer has {known + 1} ids and the model only {known};"):
        load(folder)


def test_an_export_without_a_cache_is_refused(tmp_path: Path) -> None:
    import onnx

    folder = copy_of(plain_onnx("llama"), tmp_path / "model")
    graph = onnx.load(folder / "model.onnx")
    for values in (graph.graph.input, graph.graph.output):
        for value in [value for value in values if value.name.endswith(".value")]:
            values.remove(value)
    onnx.save(graph, folder / "model.onnx")
    with pytest.raises(ModelLoadError, match=r"model\.onnx"):
        load(folder)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for name, content in {
        "config.json": "[]",
        "tokenizer.json": "{]",
        "model.safetensors": "no weights",
        "aligner.json": '{"template": 3}',
    }.items():
        folder = copy_of(checkpoint("llama"), tmp_path / name)
        (folder / name).write_text(content, encoding="utf-8")
        with pytest.raises(
            ModelLoadError, match=name if name != "model.safetensors" else str(folder)
        ) as caught:
            load(folder)
        assert caught.value.__cause__ is not None
    change_json(copy_of(checkpoint("llama"), tmp_path / "short") / "config.json", max_position_embeddings=9)
    with pytest.raises(ModelLoadError, match=r"config\.json.*at least 16"):
        load(tmp_path / "short")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is a file; give a folder"):
        load(tmp_path / "short" / "tokenizer.json")
    shards = copy_of(checkpoint("llama", sharded=True), tmp_path / "shards")
    next(shards.glob("model-00002*")).unlink()
    with pytest.raises(ModelLoadError, match="shards"):
        load(shards)


def test_options_of_another_backend_and_slips_are_value_errors() -> None:
    onnx, torch = plain_onnx("llama"), checkpoint("llama")
    assert BACKENDS == ("onnx", "torch")
    with pytest.raises(ValueError, match="backend must be one of auto, onnx, torch; got 'onx'"):
        load(torch, backend="onx")
    for folder in (onnx, torch):
        with pytest.raises(ValueError, match="provider must be one of auto, tensorrt, cuda, cpu; got 'gpu'"):
            load(folder, provider="gpu")
    options: dict[str, Any]
    for options in ({"device": "cpu"}, {"dtype": "fp16"}, {"device": "cpu", "provider": "cpu"}):
        with pytest.raises(ValueError, match=r"are for PyTorch: pass backend='torch'"):
            load(onnx, **options)
    for options in ({"provider": "cpu"}, {"provider_options": {"device_id": "0"}}):
        for backend in ("auto", "torch"):
            with pytest.raises(ValueError, match=r"for ONNX Runtime.*pass device='cuda' or 'cpu'"):
                load(torch, backend=backend, **options)
    with pytest.raises(ValueError, match="device"):
        load(torch, device="abacus")
    with pytest.raises(ValueError, match="dtype must be one of"):
        load(torch, dtype="fp17")


def test_limits_of_shared_forwards_are_checked_and_carried_over() -> None:
    aligner = load(GENAI / "model", max_batch_tokens=100, micro_batch_ms=2.5)
    other = aligner.with_options(safeguards="keep_original")
    assert (other.max_batch_tokens, other.micro_batch_ms) == (100, 2.5)
    default = load(None, template=None)
    assert (default.max_batch_tokens, default.micro_batch_ms) == (8192, 0.0)
    parts = (aligner.backend, aligner.tokenizer, aligner.config)
    for wrong in (0, -1, 2.5, "many", None):
        with pytest.raises(ValueError, match="max_batch_tokens must be a whole number"):
            Aligner(*parts, max_batch_tokens=wrong)  # type: ignore[arg-type]
    for wrong in (-1, float("nan"), float("inf"), "soon", None):
        with pytest.raises(ValueError, match="micro_batch_ms must be a number of milliseconds"):
            Aligner(*parts, micro_batch_ms=wrong)  # type: ignore[arg-type]


# --- the command line


def test_the_command_takes_a_template_and_a_backend(capsys: pytest.CaptureFixture[str]) -> None:
    folder, words = str(checkpoint("llama")), ["correct", "-q", "Q?", "-a", "It is.", "--json"]
    assert main([*words, "--model", folder, "--template", "aligner-v1", "--backend", "torch"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["stats"]["backend"] == "torch"
    expected = Aligner.from_pretrained(folder, template="aligner-v1").correct("Q?", "It is.")
    assert record["proposed"] == expected.proposed
    assert main([*words, "--model", folder]) == 1
    assert "template" in capsys.readouterr().err
    assert main([*words, "--provider", "gpu"]) == 1
    assert "provider must be one of auto, tensorrt, cuda, cpu; got 'gpu'" in capsys.readouterr().err
