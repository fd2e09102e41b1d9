"""Run a Hugging Face checkpoint (`config.json` and safetensors) with PyTorch and transformers."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from aligner_integrations.backends.base import Ids, KVCache, Logits, Row, Scores
from aligner_integrations.backends.providers import report_fallback
from aligner_integrations.errors import MissingDependencyError, ModelLoadError, ProviderUnavailableError

try:
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
except ModuleNotFoundError as error:
    # A broken install fails on a module of its own: that error must reach the user unchanged.
    if error.name not in ("torch", "transformers"):
        raise
    raise MissingDependencyError(
        f"backend 'torch' needs {error.name}, which is not installed; run "
        '`pip install "aligner-integrations[torch]"`',
        name=error.name,
    ) from error

_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_DTYPES |= {str(kind).removeprefix("torch."): kind for kind in _DTYPES.values()}


class TorchCache:
    """Keys and values of one sequence: for each layer a pair of shape (1, heads, length, head size).

    The `DynamicCache` is made without the model's config. With it, layers that see a sliding window would
    drop what lies before the window, and after a trim it would be missing; the model masks it anyway.
    """

    def __init__(self) -> None:
        self.states = DynamicCache()

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return int(self.states.get_seq_length())

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens; nothing is copied."""
        held = self.length
        if not 0 <= length <= held:
            raise ValueError(f"length must be from 0 to {held}, got {length}")
        if length < held:
            # How many to drop, as a negative number: of the two ways to say it, all versions know this one.
            self.states.crop(length - held)


class TorchBackend:
    """One model on one device; shared by threads, because all state is in the caches."""

    name = "torch"
    batches = True

    def __init__(self, model: Any) -> None:  # a model for causal language modelling, of any architecture
        self._model = model.eval()
        self._device: torch.device = model.device
        self.provider = str(self._device)
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        takes = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"
        self._keeps = "logits_to_keep" in takes

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str | None = None,
        dtype: str = "auto",
        threads: int | None = None,
    ) -> TorchBackend:
        """Load the checkpoint in `folder`: `config.json` and safetensors, in one file or in many.

        Args:
            folder: the checkpoint. Nothing is fetched, no code in it is run.
            device: PyTorch's name, such as `"cpu"` or `"cuda:0"`; `None` takes CUDA where it works.
            dtype: `"fp32"`, `"fp16"`, `"bf16"` or PyTorch's names of these. `"auto"` is fp32 on the
                CPU and the checkpoint's own type on anything else.
            threads: threads inside one forward. PyTorch knows one number for the whole process:
                this sets it for all who use PyTorch there. `None` leaves it.

        Raises:
            ModelLoadError: the folder holds no such checkpoint, or it is damaged, incomplete or too large.
            ProviderUnavailableError: PyTorch cannot use the device.
            ValueError: `device`, `dtype` or `threads` is none that there is.
        """
        if dtype != "auto" and dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of auto, {', '.join(_DTYPES)}; got {dtype!r}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        place = _first_device() if device is None else _find_device(device)
        kind = _DTYPES.get(dtype) or (torch.float32 if place.type == "cpu" else "auto")
        model = _read_checkpoint(Path(folder), kind)
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            return cls(model.to(place))
        except torch.OutOfMemoryError as error:
            raise ModelLoadError(
                f"{folder} is too large for {place}; try dtype='bf16' or device='cpu'"
            ) from error

    def make_cache(self) -> TorchCache:
        """Return an empty cache."""
        return TorchCache()

    @torch.inference_mode()
    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        """Run `ids` after what `cache` holds; logits of shape (last, vocabulary) for the end of `ids`."""
        return _fetch(self._run([Row(ids, cache, last)])[0])

    @torch.inference_mode()
    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """Run all rows in one forward; of each place scored, three numbers are fetched from the device."""
        return _score(self._run(rows), rows) if rows else []

    def _run(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Return the logits of each row, (last, vocabulary), in the model's type and on its device."""
        for row in rows:
            self._check(row)
        if len(rows) > 1:
            return self._run_together(rows)
        inputs = {"input_ids": torch.tensor([rows[0].ids], device=self._device)}
        return [self._call(inputs, cast(TorchCache, rows[0].cache).states, keep=rows[0].last)[0]]

    def _run_together(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Pad the pasts on the left and the inputs on the right, run, and give each row its part.

        So nothing lies between past and input: distances, which sliding windows are measured in, stay.
        What is on the right comes after all that is real, so it needs no mask; and it has none, because a
        place that may look at nothing, not even at itself, is NaN to some kernels.
        """
        caches = [cast(TorchCache, row.cache) for row in rows]
        held, counts = [cache.length for cache in caches], [len(row.ids) for row in rows]
        past, width = max(held), max(counts)
        padded = [row.ids + [0] * (width - len(row.ids)) for row in rows]
        starts, lengths = torch.tensor([held, counts], device=self._device)[:, :, None]
        steps = torch.arange(past + width, device=self._device)
        inputs = {
            "input_ids": torch.tensor(padded, device=self._device),
            # A position beyond a row's end could be one that the model does not have.
            "position_ids": starts + steps[:width].minimum(lengths - 1),
            "attention_mask": (steps >= past - starts).long() if min(held) < past else None,
        }
        places = sorted({place for row in rows for place in range(len(row.ids) - row.last, len(row.ids))})
        states = _side_by_side([cache.states for cache in caches])
        logits = self._call(inputs, states, keep=torch.tensor(places, device=self._device))
        found = []
        for number, (cache, row) in enumerate(zip(caches, rows, strict=True)):
            cache.states = _part(states, number, slice(past - held[number], past + counts[number]))
            first = places.index(counts[number] - row.last)
            found.append(logits[number, first : first + row.last])
        return found

    def _call(
        self, inputs: dict[str, Any], states: DynamicCache, *, keep: int | torch.Tensor
    ) -> torch.Tensor:
        """Run the model; logits (rows, kept, vocabulary) of the last `keep` places or of those named."""
        kept: dict[str, Any] = {"logits_to_keep": keep} if self._keeps else {}
        logits = self._model(**inputs, **{self._cache_name: states}, **kept, use_cache=True).logits
        if not self._keeps:
            logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
        return cast(torch.Tensor, logits)

    def _check(self, row: Row) -> None:
        if not 1 <= row.last <= len(row.ids):
            raise ValueError(f"last must be from 1 to {len(row.ids)}, got {row.last}")
        # On CUDA such an id would stop the whole process from using the device again.
        if min(row.ids) < 0 or max(row.ids) >= self.vocab_size:
            raise ValueError(
                f"ids must be from 0 to {self.vocab_size - 1}, got {min(row.ids)} to {max(row.ids)}; "
                "are the tokenizer and the model from the same checkpoint?"
            )


def _score(logits: list[torch.Tensor], rows: Sequence[Row]) -> list[Scores]:
    # Each place's next id; the last place of a row has none.
    following = [id for row in rows for id in (*row.ids[len(row.ids) - row.last + 1 :], 0)]
    nexts = torch.tensor(following, device=logits[0].device).split([row.last for row in rows])
    found = []
    for own, ids in zip(logits, nexts, strict=True):
        best = own.argmax(-1)  # documented: the first, so the lowest id, among equals
        known = own.gather(1, torch.stack([best, ids], dim=1))
        found.append(torch.cat([best[:, None].float(), known.float()], dim=1))  # ids below 2^24 are exact
    numbers = torch.cat(found).cpu().split([row.last for row in rows])
    return [
        Scores(part[:, 0].int().tolist(), part[:, 1].tolist(), part[:, 2].tolist(), row=partial(_fetch, own))
        for part, own in zip(numbers, logits, strict=True)
    ]


def _fetch(logits: torch.Tensor, place: int | slice = slice(None)) -> Logits:
    return cast(Logits, logits[place].float().cpu().numpy())


def _pairs(states: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    layers = cast(list[Any], states.layers)  # a layer's keys may be None, but never when it has been run
    return [(layer.keys, layer.values) for layer in layers]


def _side_by_side(rows: list[DynamicCache]) -> DynamicCache:
    """Return one cache of all rows, padded on the left to the longest."""
    pairs = [_pairs(row) for row in rows]
    nothing = [(keys[:, :, :0], values[:, :, :0]) for keys, values in max(pairs, key=len)]
    joined = DynamicCache()
    for number, layer in enumerate(zip(*(own or nothing for own in pairs), strict=True)):
        joined.update(_padded([keys for keys, _ in layer]), _padded([values for _, values in layer]), number)
    return joined


def _padded(parts: list[torch.Tensor]) -> torch.Tensor:
    """Join parts of shape (1, heads, length, head size) to (rows, heads, longest, head size)."""
    sequences = [part[0].transpose(0, 1) for part in parts]
    return pad_sequence(sequences, batch_first=True, padding_side="left").transpose(1, 2)


def _part(joined: DynamicCache, number: int, places: slice) -> DynamicCache:
    """Return a row's part as a cache of its own, which does not keep the others' memory alive."""
    own = DynamicCache()
    for index, (keys, values) in enumerate(_pairs(joined)):  # `update` copies what it is given
        own.update(keys[number, None, :, places], values[number, None, :, places], index)
    return own


def _first_device() -> torch.device:
    """Return CUDA where it works, else the CPU."""
    if torch.cuda.is_available():
        try:
            return _find_device("cuda")
        except ProviderUnavailableError as error:
            report_fallback(asked="auto", used="cpu", why={"cuda": str(error)})
    return torch.device("cpu")


def _find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be a name like 'cpu', 'cuda' or 'cuda:1'; got {name!r}") from error
    try:
        (torch.ones(1, device=device) + 1).item()  # that it is listed does not mean that it works
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ProviderUnavailableError(
            f"device {name!r} was asked for, but PyTorch {torch.__version__} cannot use it: {reason}; "
            "use device='cpu', or install the PyTorch build for it (https://pytorch.org/get-started)"
        ) from error
    return device


def _read_checkpoint(path: Path, dtype: torch.dtype | str) -> Any:
    if not (path / "config.json").is_file():
        raise ModelLoadError(f"{path} is no checkpoint: give the folder that holds its config.json")
    pickled = sorted(file.name for file in path.glob("*.bin"))
    if pickled and not any(path.glob("*.safetensors")):
        raise ModelLoadError(
            f"{path} holds its weights as {pickled[0]}, a pickle; it can run code when it is read, so it is "
            "refused. If you trust it: `from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained({str(path)!r}).save_pretrained('converted')`, and copy tokenizer.json there"
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        # The fused kinds of attention leave Gemma 2's cap on its scores out, some without a word.
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            dtype=dtype,
            attn_implementation="eager" if capped else None,
            output_loading_info=True,
        )
    except Exception as error:  # what config, safetensors and PyTorch raise shares no base
        raise ModelLoadError(f"transformers cannot load {path}: {error}") from error
    model, found = loaded
    if lacking := sorted(found["missing_keys"]):  # transformers would fill them with random numbers
        raise ModelLoadError(
            f"{path} is incomplete: it lacks {len(lacking)} of the model's weights, first {lacking[0]}; "
            "copy all its .safetensors files"
        )
    return model


__all__ = ["TorchBackend", "TorchCache"]
