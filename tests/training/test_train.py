"""A whole run in miniature: what it leaves, that it resumes to the same weights, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from aligner_integrations.training import train as training
from aligner_integrations.training.train import Recipe, train
from tests.miniature import RECIPE, data_folder, recipe_file, run_training, trained

FIGURES = {"keep sum-wrong", "keep ordinary", "auc sum-wrong", "auc rude", "auc harmful"}


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_run_goes_through_all_stages_in_order() -> None:
    log = read_log(trained())
    stages = [entry["stage"] for entry in log if entry["stage"] != "held out"]
    assert list(dict.fromkeys(stages)) == ["copy-random", "copy-text", "correct"]
    assert stages.count("copy-random") == 2 and stages.count("correct") >= 3  # pools within a stage
    tokens = [entry["tokens"] for entry in log]
    assert tokens == sorted(tokens) and tokens[-1] >= 700 + 1200


def test_the_log_has_losses_and_held_out_figures() -> None:
    log = read_log(trained())
    assert all(entry["loss"] > 0 for entry in log if entry["stage"] != "held out")
    measured = [entry for entry in log if entry["stage"] == "held out"]
    assert len(measured) >= 3 and log[-1] is measured[-1]
    for entry in measured:
        assert entry.keys() >= FIGURES
        assert all(0.0 <= entry[name] <= 1.0 for name in FIGURES)


def test_a_run_leaves_state_and_a_checkpoint_that_transformers_loads() -> None:
    out = trained()
    assert (out / "state.pt").is_file() and not (out / "state.tmp").exists()
    assert (out / "checkpoint" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 64, 2)
    assert (config.eos_token_id, config.pad_token_id, config.max_position_embeddings) == (1, 0, 192)


def test_training_lowers_the_loss_on_what_it_trains() -> None:
    """Enough to tell that gradients reach the weights: they have moved from where they began."""
    recipe = Recipe.load(recipe_file())
    begun = training.TrainingRun(recipe, trained(), device="cpu", compiled=False).model.state_dict()
    ended = load_file(trained() / "checkpoint" / "model.safetensors")
    moved = [name for name in ended if not torch.equal(ended[name], begun[name])]
    assert len(moved) == len(ended)


def interrupt_at(call: int) -> Callable[..., dict[str, float]]:
    """Figures that are interrupted at their n-th call, as by Ctrl-C at a pool border."""
    calls = iter(range(1, call + 1))

    def figures(*_: object, **__: object) -> dict[str, float]:
        if next(calls) == call:
            raise KeyboardInterrupt
        return {}

    return figures


@pytest.mark.parametrize("call", [1, 4])
def test_interrupted_and_resumed_gives_the_weights_of_an_uninterrupted_run(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training, "held_out_figures", interrupt_at(call))
        with pytest.raises(KeyboardInterrupt):
            run_training(tmp_path)
        assert not (tmp_path / "checkpoint").exists()
        patch.setattr(training, "held_out_figures", lambda *_, **__: {})
        run_training(tmp_path)
    resumed, whole = (load_file(out / "checkpoint" / "model.safetensors") for out in (tmp_path, trained()))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    said = ("stage", "step", "tokens", "loss")
    pools, wanted = (
        [tuple(entry[name] for name in said) for entry in read_log(out) if entry["stage"] != "held out"]
        for out in (tmp_path, trained())
    )
    assert pools == wanted


def test_a_finished_run_resumes_to_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained(), out)
    monkeypatch.setattr(training, "held_out_figures", lambda *_, **__: {})
    before = (out / "checkpoint" / "model.safetensors").read_bytes()
    steps = read_log(out)[-1]["step"]
    run_training(out)
    assert (out / "checkpoint" / "model.safetensors").read_bytes() == before
    assert read_log(out)[-1]["step"] == steps


def test_a_run_by_another_recipe_is_not_resumed(tmp_path: Path) -> None:
    shutil.copytree(trained(), tmp_path / "run")
    other = write_recipe(tmp_path, RECIPE.replace("hidden_size = 64", "hidden_size = 32"))
    with pytest.raises(ValueError, match=r"state\.pt is of another recipe"):
        train(other, data=data_folder(), out=tmp_path / "run", compiled=False)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed = 7", "", "seed"),
        ("seed = 7", "seed = 7\ncolour = 3", "colour"),
        ("seed = 7", "seed = ", "cannot be read"),
        ("[weights]", "[wights]", "weights"),
        ("first = 4.0", "", "first"),
        ("rate = 0.002", "", r"\[optimizer\] lacks rate"),
        ("num_attention_heads = 2", "", r"\[model\] lacks num_attention_heads"),
        ("buckets = [64, 128, 192]", "buckets = [64, 128]", r"buckets must rise up to max_length \(192\)"),
        ("buckets = [64, 128, 192]", "buckets = [192, 64]", "buckets must rise"),
        ("tokens = 700", "tokens = 0", "copy-random"),
        ("{ copy-random = 1.0 }", "{ copy-random = 0.0 }", "copy-random"),
        ("{ copy-random = 1.0 }", "3", "cannot be read"),
        ("batch_tokens = 256", "", "batch_tokens"),
    ],
)
def test_a_bad_recipe_says_what_is_wrong(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert old in RECIPE
    path = write_recipe(tmp_path, RECIPE.replace(old, new))
    with pytest.raises(ValueError, match=rf"recipe .*recipe\.toml.*{said}"):
        Recipe.load(path)


def test_a_recipe_without_stages_is_refused(tmp_path: Path) -> None:
    text = RECIPE[: RECIPE.index("[[stages]]")].replace("seed = 7", "seed = 7\nstages = []")
    with pytest.raises(ValueError, match="no stages"):
        Recipe.load(write_recipe(tmp_path, text))


def test_an_unknown_task_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, RECIPE.replace("{ copy-random = 1.0 }", "{ copy-fw = 1.0 }"))
    with pytest.raises(ValueError, match="no rows for copy-fw"):
        train(path, data=data_folder(), out=tmp_path / "run", compiled=False)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gsm8k_steps"):
        train(recipe_file(), data=tmp_path, out=tmp_path / "run", compiled=False)


def test_the_bundled_recipe_is_sound() -> None:
    recipe = Recipe.load(Path(training.__file__).with_name("tiny.toml"))
    assert recipe.total_tokens == sum(stage.tokens for stage in recipe.stages) > 10_000_000
