"""The caches of the ONNX backend, and many rows in one forward: always what one row alone gives."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner_integrations.backends.base import Batching, Ids, Row, Scores
from aligner_integrations.backends.onnx import OnnxBackend
from aligner_integrations.backends.onnx_graph import DecoderGraph, GrowingCache, OnnxCache
from aligner_integrations.errors import ModelLoadError
from tests.models_for_tests import fused_model, onnx_model

IDS: Ids = np.random.default_rng(1).integers(0, 300, 200).tolist()


@cache
def traced() -> OnnxBackend:
    return OnnxBackend.load(onnx_model(0), provider="cpu", threads=1)


@cache
def fused() -> OnnxBackend:
    return OnnxBackend.load(fused_model(0), provider="cpu", threads=1)


def graph(backend: OnnxBackend) -> DecoderGraph:
    return backend._graph


def alone(backend: OnnxBackend, before: Ids, ids: Ids, last: int) -> Scores:
    """The scores of `ids` after `before` with a cache that has seen nothing else."""
    fresh = backend.make_cache()
    if before:
        backend.forward(before, fresh, last=1)
    return Scores.of(backend.forward(ids, fresh, last=last), ids)


def assert_same(found: Scores, wanted: Scores) -> None:
    assert found.best == wanted.best
    np.testing.assert_allclose(found.best_logits, wanted.best_logits, atol=1e-4)
    np.testing.assert_allclose(found.next_logits[:-1], wanted.next_logits[:-1], atol=1e-4)
    for place in range(len(wanted.best)):
        np.testing.assert_allclose(found.row(place), wanted.row(place), atol=1e-4)


rows_of_a_batch = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(1, 30), st.integers(0, 8)),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("backend", [traced, fused], ids=["traced", "fused"])
@settings(max_examples=25)
@given(shapes=rows_of_a_batch)
def test_many_rows_get_what_each_gets_alone(backend: object, shapes: list[tuple[int, int, int, int]]) -> None:
    """Rows differ in what they hold, how much of it was trimmed away, in input and in places asked for."""
    model: OnnxBackend = backend()  # type: ignore[operator]
    assert isinstance(model, Batching)
    rows, wanted = [], []
    for at, (held, length, last, cut) in enumerate(shapes):
        before, ids = IDS[at : at + held], IDS[90 + at : 90 + at + length]
        own = model.make_cache()
        if held:
            model.forward(before + IDS[:cut], own, last=1)
            own.trim(held)
        rows.append(Row(ids, own, min(last, length)))
        wanted.append(alone(model, before, ids, min(last, length)))
    for row, found, expected in zip(rows, model.score(rows), wanted, strict=True):
        assert_same(found, expected)
        assert row.cache.length == shapes[rows.index(row)][0] + len(row.ids)
    # The caches go on from there, each for itself.
    for at, row in enumerate(rows):
        before = IDS[at : at + shapes[at][0]] + row.ids
        assert_same(model.score([Row([5, 6], row.cache, 2)])[0], alone(model, before, [5, 6], 2))


@settings(max_examples=25)
@given(steps=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 6)), max_size=8))
def test_dead_places_are_as_if_they_had_never_been(steps: list[tuple[int, int, int]]) -> None:
    """On an accelerator trimmed tokens stay in the cache, masked, and inputs are filled up likewise."""
    model = traced()
    masked = GrowingCache(graph(model), gaps=True)
    masked._dead_places = 20  # in place of 1,024, so that it is reached
    plain: Ids = []
    for length, cut, fill in steps:
        ids = IDS[len(plain) : len(plain) + length]
        output, start = masked.run(graph(model), ids, last=len(ids), width=len(ids) + fill)
        wanted = alone(model, plain, ids, len(ids))
        np.testing.assert_allclose(
            output.rows(0, start, start + len(ids)), [wanted.row(at) for at in range(len(ids))], atol=1e-4
        )
        plain = (plain + ids)[: max(len(plain) + len(ids) - cut, 0)]
        masked.trim(len(plain))
        assert masked.length == len(plain)
    values, exact = masked.take(), model.make_cache()
    if plain:
        model.forward(plain, exact, last=1)
    for mine, theirs in zip(values, cast(GrowingCache, exact).take(), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


@pytest.mark.parametrize("backend", [traced, fused], ids=["traced", "fused"])
def test_a_long_input_goes_through_in_blocks(backend: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over thousands of tokens at a time would take gigabytes; nothing else may come of it."""
    model: OnnxBackend = backend()  # type: ignore[operator]
    wanted = alone(model, [], IDS, 60)
    widths: list[int] = []
    inner = model.make_cache()
    monkeypatch.setattr("aligner_integrations.backends.onnx._BLOCK", 32)

    class Watched:
        length = property(lambda self: inner.length)
        lost = False

        def run(self, graph: DecoderGraph, ids: Ids, *, last: int, width: int) -> object:
            widths.append(len(ids))
            return inner.run(graph, ids, last=last, width=width)

    found = model.score([Row(IDS, cast(OnnxCache, Watched()), 60)])[0]
    assert widths == [32] * 6 + [8]
    assert_same(found, wanted)
    # Whoever waits for it may give it up in between.
    widths.clear()
    inner = model.make_cache()
    left = iter((None, None))
    with pytest.raises(StopIteration):
        model.score([Row(IDS, cast(OnnxCache, Watched()), 60, lambda: next(left))])
    assert widths == [32] * 3


@pytest.mark.parametrize("last", [0, 4])
def test_places_that_are_not_there_are_refused(last: int) -> None:
    with pytest.raises(ValueError, match="last must be from 1 to 3"):
        fused().score([Row([1, 2, 3], fused().make_cache(), last)])
    with pytest.raises(ValueError, match="last must be from 1 to 3"):
        rows = [Row([1, 2, 3], traced().make_cache(), each) for each in (1, last)]
        traced().score(rows)


def test_a_model_with_a_sliding_window_has_no_gaps_in_its_cache(tmp_path: Path) -> None:
    """The window counts places: a dead one would push a living one out of sight."""
    shutil.copy(onnx_model(0) / "model.onnx", tmp_path / "model.onnx")
    for said, gaps in (({}, True), ({"sliding_window": None}, True), ({"sliding_window": 24}, False)):
        (tmp_path / "config.json").write_text(json.dumps(said), encoding="utf-8")
        session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        model = OnnxBackend(session, provider="CUDAExecutionProvider", file=tmp_path / "model.onnx")
        assert model._gaps == gaps
        assert model._width(5) == (16 if gaps else 5)
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        OnnxBackend(session, provider="CUDAExecutionProvider", file=tmp_path / "model.onnx")
