"""What others offer for the same weights: transformers, its prompt lookup, and optimum's ONNX model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime as ort
import torch
from optimum.exporters.onnx import onnx_export_from_model
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from aligner_integrations.backends.base import Ids
from aligner_integrations.backends.onnx import available_cores
from aligner_integrations.backends.providers import FULL_NAMES
from aligner_integrations.evaluation.bench_models import checkpoint_of
from aligner_integrations.evaluation.forced import EOS, Pattern
from aligner_integrations.evaluation.timing import Block, Run, Setting, Way

_LOOKUP_TOKENS = 10
_OPSET = 18


@contextmanager
def load_peers(folder: Path, *, provider: str, threads: int | None = None) -> Iterator[Peers]:
    """Load the model in `folder` as others run it, on the same provider and with as many threads.

    Raises:
        ModelLoadError: the folder holds no checkpoint, and its graph is not one to make it from.
    """
    threads = threads or available_cores()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with TemporaryDirectory(prefix="aligner-peers-") as scratch:
            checkpoint = checkpoint_of(folder, Path(scratch))
            yield Peers(checkpoint, Path(scratch) / "optimum", provider=provider, threads=threads)
    finally:
        torch.set_num_threads(before)


class Peers:
    """The peers of one checkpoint; all write the text that they are told to."""

    def __init__(self, checkpoint: Path, exported: Path, *, provider: str, threads: int) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
        self._optimum = _exported(model, exported, provider, threads)
        self._device = "cpu" if provider == FULL_NAMES["cpu"] else "cuda"
        self._transformers = model.to(self._device)
        self._blocks: list[Block] = []
        for each in (self._transformers, self._optimum):
            each.forward = self._counted(each.forward)

    @property
    def setting(self) -> Setting:
        """What they run on."""
        return {
            "torch_device": self._device,
            "torch_threads": torch.get_num_threads(),
            "torch_attention": str(self._transformers.config._attn_implementation),
            "optimum_provider": str(self._optimum.providers[0]),
            "optimum_io_binding": int(self._optimum.use_io_binding),
        }

    def greedy_ways(self, pattern: Pattern) -> list[Way]:
        """Return the ways that take as long whatever they write: greedy decoding."""
        models = {"transformers generate": self._transformers, "optimum generate": self._optimum}
        return [Way(name, self._runner(model, pattern), pattern.target) for name, model in models.items()]

    def lookup_way(self, pattern: Pattern, *, mark: str = "") -> Way:
        """Return transformers' prompt lookup, whose draft is what followed the same tokens before."""
        run = self._runner(self._transformers, pattern, prompt_lookup_num_tokens=_LOOKUP_TOKENS)
        curve = "prompt lookup by edits" if pattern.edits else ""
        return Way(f"prompt lookup, {pattern.name}{mark}", run, pattern.target, curve, pattern.edits or 0)

    def _runner(self, model: Any, pattern: Pattern, **options: int) -> Callable[[], Run]:
        prompt = torch.tensor([pattern.prompt], device=self._device)
        forced = LogitsProcessorList([_ForcedText(pattern.text)])

        def run() -> Run:
            self._blocks.clear()
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                logits_processor=forced,
                max_new_tokens=len(pattern.target) + 1,
                do_sample=False,
                # Prompt lookup fails without an end-of-text token.
                eos_token_id=EOS,
                pad_token_id=EOS,
                **options,
            )[0, len(pattern.prompt) :].tolist()
            written = ids[:-1] if ids[-1] == EOS else ids
            return Run(written, len(self._blocks), len(ids), tuple(self._blocks))

        return run

    def _counted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Note each forward; its signature stays, because `generate` reads it."""

        @wraps(forward)
        def counted(*args: Any, **given: Any) -> Any:
            tokens = given["input_ids"].shape[1]
            self._blocks.append((tokens, int(given.get("logits_to_keep") or tokens)))
            return forward(*args, **given)

        return counted


def _exported(model: Any, folder: Path, provider: str, threads: int) -> Any:
    """Return the model as optimum exports and loads it, with its own default of I/O binding."""
    model.config._name_or_path = str(folder / "none")  # where it looks for a tokenizer, to export that too
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of itself and of transformers
        onnx_export_from_model(
            model,
            folder,
            task="text-generation-with-past",
            opset=_OPSET,
            do_validation=False,
            no_post_process=True,
        )
        return ORTModelForCausalLM.from_pretrained(folder, provider=provider, session_options=options)


class _ForcedText(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Makes the token that follows in `text` win; the others keep their scores.

    Assisted decoding asks it about each place of a draft. Nothing becomes impossible, because prompt
    lookup asks it, too, which of its candidates are.
    """

    def __init__(self, text: Ids) -> None:
        self._text = text

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores[:, self._text[min(input_ids.shape[1], len(self._text) - 1)]] = float("inf")
        return scores
