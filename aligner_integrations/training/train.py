"""The training run: a recipe file and the data folder in, a Hugging Face checkpoint out.

Everything is decided by the recipe's seed. The run writes `state.pt` and resumes from it.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from aligner_integrations.training.curriculum import (
    Curriculum,
    Example,
    Stage,
    Weights,
    make_batches,
)
from aligner_integrations.training.held_out import held_out_figures
from aligner_integrations.training.initial import set_up_copying
from aligner_integrations.training.rows import Row, load_rows
from aligner_integrations.training.vocabulary import train_tokenizer

logger = logging.getLogger(__name__)
_POOL_TOKENS = 600_000
_MODEL_ENTRIES = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rope_theta",
}
_OPTIMIZER_ENTRIES = {"matrix_rate", "rate", "weight_decay", "warmup_steps", "decay_share"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the recipe file says; see tiny.toml for the meaning of each entry."""

    seed: int
    vocabulary: int
    max_length: int
    buckets: list[int]
    checkpoint_seconds: float
    model: dict[str, int]
    optimizer: dict[str, float]
    weights: Weights
    stages: list[Stage]
    total_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total_tokens", sum(stage.tokens for stage in self.stages))

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe; raises ValueError naming what is wrong with it."""
        try:
            raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
            raw["weights"] = Weights(**raw["weights"])
            raw["stages"] = [Stage(**stage) for stage in raw["stages"]]
            recipe = cls(**raw)
            faults = list(_faults(recipe))
        except KeyError as error:
            raise ValueError(f"recipe {path} lacks {error}") from error
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"recipe {path} cannot be read: {error}") from error
        if faults:
            raise ValueError(f"recipe {path}: {'; '.join(faults)}")
        return recipe


def _faults(recipe: Recipe) -> Iterator[str]:
    """Say what would stop a run only after it has begun."""
    for section, needed in (("model", _MODEL_ENTRIES), ("optimizer", _OPTIMIZER_ENTRIES)):
        if missing := sorted(needed - getattr(recipe, section).keys()):
            yield f"[{section}] lacks {', '.join(missing)}"
    if not recipe.stages:
        yield "there are no stages"
    if list(recipe.buckets) != sorted(recipe.buckets) or max(recipe.buckets, default=0) < recipe.max_length:
        yield f"buckets must rise up to max_length ({recipe.max_length}), got {recipe.buckets}"
    for stage in recipe.stages:
        if stage.tokens < 1 or not sum(stage.mixture.values()) > 0:
            yield f"stage {stage.name!r} needs tokens and a mixture with a share above 0"


@dataclass(slots=True)
class Progression:
    """Where a run stands; saved with every checkpoint."""

    stage: int = 0
    pool: int = 0
    step: int = 0
    tokens: int = 0
    stage_tokens: int = 0


def train(recipe_path: Path, *, data: Path, out: Path, device: str = "cpu", compiled: bool = True) -> Path:
    """Train by the recipe and return the checkpoint folder, `out/checkpoint`.

    A run that left `out/state.pt` goes on from there, with the data and the weights it would have had.

    Raises:
        FileNotFoundError: the recipe or a source in the data folder is missing.
        ValueError: the recipe is wrong, or `out` holds a run by another one.
    """
    recipe = Recipe.load(recipe_path)
    out.mkdir(parents=True, exist_ok=True)
    rows = load_rows(data)
    tokenizer = _tokenizer(rows, recipe, out)
    curriculum = Curriculum(rows, tokenizer, weights=recipe.weights, max_length=recipe.max_length)
    for stage in recipe.stages:
        curriculum.check(stage)
    run = TrainingRun(recipe, out, device=device, compiled=compiled)
    run.resume()
    run.go(curriculum, lambda: held_out_figures(run.model, tokenizer, rows, device=device))
    return run.save_checkpoint()


def _tokenizer(rows: list[Row], recipe: Recipe, out: Path) -> Tokenizer:
    path = out / "tokenizer.json"
    if not path.exists():
        chosen = [row for row in rows if not row.dev]
        random.Random(recipe.seed).shuffle(chosen)
        texts = itertools.chain.from_iterable((r.question, r.sentence, r.target or "") for r in chosen)
        train_tokenizer(texts, size=recipe.vocabulary).save(str(path))
    return Tokenizer.from_file(str(path))


class TrainingRun:
    """Model, optimizer and progress of one run."""

    def __init__(self, recipe: Recipe, out: Path, *, device: str, compiled: bool) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.out, self.device = recipe, out, device
        config = LlamaConfig(
            vocab_size=recipe.vocabulary,
            max_position_embeddings=recipe.max_length,
            num_key_value_heads=recipe.model["num_attention_heads"],
            tie_word_embeddings=True,
            attention_bias=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            **recipe.model,
        )
        self.model = LlamaForCausalLM(config)
        # Short rows: written out and compiled, attention is faster here than the fused kernel is on a CPU.
        self.model.set_attn_implementation("eager")
        set_up_copying(self.model)
        nn.Module.to(self.model, device)
        self._body: Callable[..., Any] = self.model.model
        if compiled:
            # One graph a bucket, and one more each for measuring; the default limit gives up after eight.
            torch._dynamo.config.recompile_limit = 4 * len(recipe.buckets)
            self._body = torch.compile(self.model.model, dynamic=False)
        self.optimizers = _make_optimizers(self.model, recipe)
        self.progress = Progression()

    def resume(self) -> None:
        """Continue from `state.pt` if the run left one."""
        path = self.out / "state.pt"
        if path.exists():
            # Onto the CPU first: a run begun on a GPU may go on without one.
            state = torch.load(path, weights_only=True, map_location="cpu")
            try:
                self.model.load_state_dict(state["model"])
                for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{path} is of another recipe; choose another folder: {error}") from error
            self.progress = Progression(**state["progress"])

    def go(self, curriculum: Curriculum, figures: Callable[[], dict[str, float]]) -> None:
        """Train through all stages, saving and measuring as the recipe says."""
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        saved = time.monotonic()
        with Progress(*columns) as bar:
            shown = bar.add_task("training", total=self.recipe.total_tokens)
            while self.progress.stage < len(self.recipe.stages):
                stage = self.recipe.stages[self.progress.stage]
                if stage.before and not self.progress.stage_tokens:
                    torch.save(self.model.state_dict(), self.out / "before.pt")
                losses = [self._step(batch, stage.batch_tokens) for batch in self._pool(curriculum, stage)]
                self.progress.pool += 1
                mean = sum(losses) / len(losses)
                self._record(stage.name, mean)
                said = f"{stage.name} {losses[-1]:.3f}"
                bar.update(shown, completed=self.progress.tokens, description=said)
                if self.progress.stage_tokens >= stage.tokens:
                    self._blend(stage.before)
                    self.progress.stage += 1
                    self.progress.stage_tokens = self.progress.pool = 0
                if time.monotonic() - saved > self.recipe.checkpoint_seconds:
                    self._save_state()
                    self._record("held out", losses[-1], **figures())
                    saved = time.monotonic()
        self._save_state()
        self._record("held out", 0.0, **figures())

    @torch.no_grad()
    def _blend(self, share: float) -> None:
        """Move the weights back by `share` of the way to where they were before the stage."""
        if share:
            before = torch.load(self.out / "before.pt", weights_only=True, map_location=self.device)
            for name, weight in self.model.named_parameters():  # tied ones once
                weight.lerp_(before[name], share)

    def save_checkpoint(self) -> Path:
        """Write the model as a Hugging Face checkpoint with its tokenizer."""
        folder = self.out / "checkpoint"
        self.model.save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes((self.out / "tokenizer.json").read_bytes())
        return folder

    def _pool(self, curriculum: Curriculum, stage: Stage) -> Iterator[list[Example]]:
        number = self.progress.pool
        left = stage.tokens - self.progress.stage_tokens
        examples = curriculum.pool(stage, number, tokens=min(_POOL_TOKENS, max(left, 1)))
        seed = f"{self.recipe.seed}/{stage.name}/{number}"
        return make_batches(examples, buckets=self.recipe.buckets, tokens=stage.batch_tokens, seed=seed)

    def _step(self, batch: list[Example], batch_tokens: int) -> float:
        length = next(size for size in self.recipe.buckets if max(len(e.ids) for e in batch) <= size)
        rows = max(batch_tokens // length, 1)  # padded to one shape a bucket
        ids, targets = (torch.zeros(rows, length, dtype=torch.long) for _ in range(2))
        weights = torch.zeros(rows, length)
        for row, example in enumerate(batch):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            targets[row, : len(example.ids)] = torch.tensor(example.targets)
            weights[row, : len(example.ids)] = torch.tensor(example.weights)
        loss = self._loss(ids.to(self.device), targets.to(self.device), weights.to(self.device))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        share = self._rate_share()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(example.ids) for example in batch)
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.stage_tokens += tokens
        return float(loss.detach())

    def _loss(self, ids: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Weighted cross-entropy; the output projection runs only where a token has a weight."""
        wanted = weights[:, 1:] > 0
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            hidden = self._body(input_ids=ids, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[:, :-1][wanted])
        losses = nn.functional.cross_entropy(logits.float(), targets[:, 1:][wanted], reduction="none")
        chosen = weights[:, 1:][wanted]
        return (losses * chosen).sum() / chosen.sum()

    def _rate_share(self) -> float:
        """Share of the peak rates: rise at the start, stay, fall to zero over the end of some stages."""
        settings, progress = self.recipe.optimizer, self.progress
        stage = self.recipe.stages[progress.stage]
        warm = min(1.0, (progress.step + 1) / settings["warmup_steps"])
        left = 1.0 - progress.stage_tokens / stage.tokens if stage.decay else 1.0
        return stage.rate * warm * min(1.0, max(left, 0.01) / settings["decay_share"])

    def _save_state(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": {entry.name: getattr(self.progress, entry.name) for entry in fields(Progression)},
        }
        torch.save(state, self.out / "state.tmp")
        (self.out / "state.tmp").replace(self.out / "state.pt")

    def _record(self, stage: str, loss: float, **figures: float) -> None:
        progress = self.progress
        entry = {"stage": stage, "step": progress.step, "tokens": progress.tokens, "loss": round(loss, 4)}
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({**entry, **figures, "time": round(time.time())}) + "\n")


def _make_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (rare facts are learned sooner), AdamW for embeddings and vectors."""
    settings = recipe.optimizer
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(
        matrices,
        lr=settings["matrix_rate"],
        weight_decay=settings["weight_decay"],
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(others, lr=settings["rate"], betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]
