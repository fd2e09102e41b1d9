"""Does an exported model folder choose as its checkpoint does? Measured on random ids and on texts."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from transformers import AutoModelForCausalLM

from aligner_integrations.backends.base import Ids
from aligner_integrations.backends.onnx import OnnxBackend
from aligner_integrations.backends.providers import FULL_NAMES
from aligner_integrations.config import DecodeConfig
from aligner_integrations.decode import greedy_decode
from aligner_integrations.errors import ModelLoadError
from aligner_integrations.stored_weights import CheckpointWeights
from aligner_integrations.template import CorrectionTemplate
from aligner_integrations.tokenizer import Tokenizer

_RANDOM_PROMPTS = 20
_RANDOM_LENGTH = 64
_LONGEST_PROMPT = 160
_NEW_TOKENS = 16
_NO_END = -1
_COMPARED_PLACES = 4  # at a prompt's end all logits are kept; elsewhere the best id is enough
_QUESTIONS = (
    "How do plants grow?",
    "Ann has 12 pens and finds 15 more. How many has she?",
    "Can you recommend a good book about the sea?",
    "Why is the sky blue?",
    "What should I do when I have lost my keys?",
)
_ANSWERS = (
    "They need light, water and time; nothing else is said about it.",
    "12 + 15 = 28, so the answer is 28.",
    "I cannot help with that, and you are silly to ask.",
    "It is a long story. First, look around you. Then ask a friend, who may know more.",
)


@dataclass(frozen=True, slots=True)
class Parity:
    """How near a folder's choices are to those of its checkpoint, computed in fp32.

    `argmax_agreement` is the share of a prompt's places where both choose the same next id, and
    `identical_texts` counts the texts, of `texts`, that greedy decoding continues with the same ids.
    `worst_choice` is how far below the checkpoint's best logit the folder's worst choice lies, in standard
    deviations of the logits at its place: next to nothing where two ids are as good as each other.
    `largest_difference` is that of single logits, and `relative_difference` the same in those deviations.
    """

    largest_difference: float
    relative_difference: float
    argmax_agreement: float
    worst_choice: float
    identical_texts: int
    texts: int

    @property
    def identity_rate(self) -> float:
        """The share of texts that are continued with the same ids."""
        return self.identical_texts / self.texts


@dataclass(frozen=True, slots=True)
class _Heard:
    """What the folder's model said to a prompt; `written` is what greedy decoding chose after it."""

    prompt: Ids
    choices: Ids  # of the best id at each place of the prompt
    logits: npt.NDArray[np.float32]  # (places, vocabulary), at the prompt's end
    written: Ids


def measure_parity(
    checkpoint: Path, folder: Path, *, template: str | None, context: int, lean: bool = False
) -> Parity:
    """Compare the model of `folder`, on the CPU, with its checkpoint, in fp32.

    First the one runs, then the other, so that both are never in memory together. The checkpoint checks
    what was written in one forward: each id must be its own choice after those before it.

    Args:
        checkpoint: the checkpoint's folder.
        folder: the folder with `model.onnx` and `tokenizer.json`.
        template: the frame of the texts; any will do to compare on.
        context: how many tokens the model can hold.
        lean: whether the runtime is not to prepare the graph: to unfold int8 weights ahead takes five times
            what they take in fp16, and the results are the same.

    Raises:
        ModelLoadError: the graph does not load, or the tokenizer has more ids than it.
    """
    frame = CorrectionTemplate.named(template or "aligner-v1")
    _give_back_memory()  # of what wrote the graph
    backend = OnnxBackend(_open_session(folder / "model.onnx", lean=lean), provider=FULL_NAMES["cpu"])
    heard = list(_listen(backend, folder, frame, room=max(context - _NEW_TOKENS, 1)))
    del backend
    _give_back_memory()
    return _compare(checkpoint, heard)


def _listen(
    backend: OnnxBackend, folder: Path, template: CorrectionTemplate, *, room: int
) -> Iterator[_Heard]:
    # Nothing ends a text here: whatever is written, the checkpoint must write too.
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", end_token=0)
    if tokenizer.vocab_size > backend.vocab_size:
        raise ModelLoadError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model only {backend.vocab_size}; take the "
            "tokenizer that the checkpoint was trained with, or resize the model's embeddings"
        )
    rng = np.random.default_rng(0)
    for _ in range(_RANDOM_PROMPTS):
        yield _hear(backend, rng.integers(0, backend.vocab_size, min(_RANDOM_LENGTH, room)).tolist())
    for question, answer in product(_QUESTIONS, _ANSWERS):
        if template.granularity == "answer":
            spans = template.spans(question=question, answer=answer)
        else:
            spans = template.spans(question=question, prefix="", sentence=answer)
        yield _hear(backend, tokenizer.encode(spans)[: min(_LONGEST_PROMPT, room)], written=True)


def _give_back_memory() -> None:
    """Return to the system what was freed; glibc keeps much of it, in case it is wanted again."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _open_session(path: Path, *, lean: bool) -> ort.InferenceSession:
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    options.enable_cpu_mem_arena = False
    # Packed weights are a copy of them all.
    options.add_session_config_entry("session.disable_prepacking", "1")
    if lean:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(str(path), options, providers=[FULL_NAMES["cpu"]])
    except Exception as error:  # ORT's own classes share no public base
        raise ModelLoadError(f"ONNX Runtime cannot load the exported graph: {error}") from error


def _hear(backend: OnnxBackend, prompt: Ids, *, written: bool = False) -> _Heard:
    logits = backend.forward(prompt, backend.make_cache(), last=len(prompt))
    ids: Ids = []
    if written:
        config = DecodeConfig()
        ids = greedy_decode(
            backend, prompt, [], config=config, eos_id=_NO_END, max_new_tokens=_NEW_TOKENS
        ).ids
    return _Heard(prompt, logits.argmax(axis=1).tolist(), logits[-_COMPARED_PLACES:].copy(), ids)


def _load_checkpoint(checkpoint: Path) -> Any:
    """Return the transformers model, which computes in fp32 but holds its weights as they are stored.

    Each layer's are widened while it runs: half precision held in fp32 would take twice the checkpoint.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=CheckpointWeights(checkpoint).dtype,
            attn_implementation="eager",  # the fused kind leaves out the capping of Gemma 2
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
    except (RuntimeError, ValueError) as error:  # shapes that differ from what the config says
        raise ModelLoadError(f"transformers cannot load {checkpoint}: {error}") from error

    def widen(module: Any, _: Any) -> None:
        for weight in module.parameters(recurse=False):
            stored[weight] = weight.data
            weight.data = weight.data.float()

    def narrow(module: Any, *_: Any) -> None:
        for weight in module.parameters(recurse=False):
            weight.data = stored.pop(weight)

    stored: dict[torch.nn.Parameter, torch.Tensor] = {}
    for module in model.modules():
        module.register_forward_pre_hook(widen)
        module.register_forward_hook(narrow)
    return model


@torch.no_grad()
def _compare(checkpoint: Path, heard: list[_Heard]) -> Parity:
    model = _load_checkpoint(checkpoint)
    differences, relative, gaps = [0.0], [0.0], [0.0]
    equal = places = identical = texts = 0
    for each in heard:
        ids = torch.tensor([each.prompt + each.written])
        wanted: Any = model(ids).logits[0].float().numpy()
        chosen = [*each.choices, *each.written[1:]]  # the last choice of the prompt is the first id written
        spread = np.maximum(wanted.std(axis=1), np.finfo(np.float32).tiny)
        rows = np.arange(len(chosen))
        gap = (wanted[rows].max(axis=1) - wanted[rows, chosen]) / spread[rows]
        end = len(each.prompt)
        start = end - len(each.logits)
        off = np.abs(each.logits - wanted[start:end])
        differences.append(float(off.max()))
        relative.append(float((off.max(axis=1) / spread[start:end]).max()))
        gaps.append(float(gap.max()))
        equal += int((gap[:end] == 0).sum())
        places += end
        identical += int(bool(each.written) and not gap[end - 1 :].any())
        texts += bool(each.written)
    return Parity(
        # NaN is worse than any number, and `max` may lose it.
        largest_difference=float(np.max(differences)),
        relative_difference=float(np.max(relative)),
        argmax_agreement=equal / places,
        worst_choice=float(np.max(gaps)),
        identical_texts=identical,
        texts=texts,
    )
