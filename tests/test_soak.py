"""T22: mixed streams for a long time. Memory does not grow, and no thread stays.

Deselected unless it is asked for: `pytest -m soak tests/test_soak.py --soak-minutes 30`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aligner_integrations import Aligner, CircuitBreaker
from aligner_integrations.errors import CorrectionFailedError
from aligner_integrations.langchain import AlignedChatModel, AlignerRunnable, StreamAlignerCallbackHandler
from aligner_integrations.llama_index import AlignedLLM
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.testing.replay import ReplayModel
from aligner_integrations.testing.replay_llm import ReplayLLM

QUESTION = "What is 12 + 13?"
SENTENCES = (
    "The sum of 12 and 13 is 26. ",
    "It is even.\n\n",
    "- One more point.\n",
    "```py\nprint(12 + 13)\n```\n",
    "And so on. ",
)
WARM_UP = 0.25  # of the time: until then pools, arenas and caches fill
SLOPE = 0.5  # MiB a minute
GROWTH = 16.0  # MiB in all, for runs so short that a slope says little


def resident() -> float:
    """Return the memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Mix:
    """Every kind of stream, finished answer and fault, on shared objects."""

    def __init__(self) -> None:
        self.aligner = Aligner.from_pretrained()
        self.failing = scripted_aligner(self._fail, breaker=CircuitBreaker(5, 0.01))
        self.dice = random.Random(22)
        self.runnable = AlignerRunnable(self.aligner)

    def _fail(self, question: str, prefix: str, sentence: str) -> str:
        if self.dice.random() < 0.5:
            raise RuntimeError("down")
        time.sleep(0.002)
        return sentence

    def answer(self) -> str:
        return "".join(self.dice.choices(SENTENCES, k=self.dice.randint(1, 8)))

    def core(self) -> None:
        answer = self.answer()
        whole = self.aligner.correct(QUESTION, answer).text
        chunks = [answer[at : at + 7] for at in range(0, len(answer), 7)]
        shown = "".join(map(str, self.aligner.correct_stream(QUESTION, chunks)))
        assert shown == whole
        for segment in self.aligner.correct_stream(QUESTION, iter(chunks), sentence_seconds=30.0):
            if segment.index == 1:
                break
        self.aligner.correct_batch([(QUESTION, self.answer()) for _ in range(4)])

    def faults(self) -> None:
        answer = self.answer()
        for options in ({}, {"sentence_seconds": 0.001}, {"answer_seconds": 0.004}):
            stream = self.failing.correct_stream(QUESTION, [answer], on_error="pass_through", **options)  # type: ignore[arg-type]
            assert "".join(map(str, stream)) == answer
        stream = self.aligner.correct_stream(QUESTION, [answer], on_error="withhold", sentence_seconds=0.002)
        assert "".join(segment.original for segment in stream) == answer
        with contextlib.suppress(CorrectionFailedError):
            self.failing.correct(QUESTION, answer)

    def langchain(self) -> None:
        model = ReplayModel(answer=self.answer(), delay=0.0)
        given = {"question": QUESTION, "answer": model.answer}
        whole = self.runnable.invoke(given)["answer"]
        aligned = AlignedChatModel(model=model, aligner=self.aligner)
        assert "".join(str(chunk.text) for chunk in aligned.stream(QUESTION)) == whole
        heard: list[Any] = []
        handler = StreamAlignerCallbackHandler(self.aligner, sink=heard.append)
        model.invoke(QUESTION, {"callbacks": [handler]})
        assert "".join(map(str, heard)) == whole
        for _ in aligned.stream(QUESTION):
            break

    def llama_index(self) -> None:
        llm = AlignedLLM(ReplayLLM(answer=self.answer()), self.aligner)
        parts = [response.delta or "" for response in llm.stream_complete(QUESTION)]
        assert "".join(parts) == llm.complete(QUESTION).text

    async def tasks(self) -> None:
        async def one() -> None:
            model = ReplayModel(answer=self.answer(), delay=0.0)
            async for _ in AlignedChatModel(model=model, aligner=self.aligner).astream(QUESTION):
                if self.dice.random() < 0.1:
                    break

        running = [asyncio.create_task(one()) for _ in range(4)]
        await asyncio.sleep(0.01)
        running[0].cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def round(self) -> None:
        for part in (self.core, self.faults, self.langchain, self.llama_index):
            part()
        both = [threading.Thread(target=part) for part in (self.core, self.langchain)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        asyncio.run(self.tasks())


@pytest.mark.soak
def test_t22_memory_does_not_grow_and_no_thread_stays(
    pytestconfig: pytest.Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # pytest keeps every record to the end: that would be growth, too
    minutes = float(pytestconfig.getoption("--soak-minutes"))
    mix = Mix()
    mix.round()
    gc.collect()
    threads = set(threading.enumerate())
    started, rounds = time.monotonic(), 0
    times, sizes = list[float](), list[float]()
    while (now := (time.monotonic() - started) / 60) < minutes:
        mix.round()
        rounds += 1
        if now > WARM_UP * minutes and rounds % 3 == 0:
            gc.collect()
            times.append(now)
            sizes.append(resident())
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)
    assert set(threading.enumerate()) <= threads
    slope = float(np.polyfit(times, sizes, 1)[0])
    growth = sizes[-1] - sizes[0]
    print(
        f"\nsoak: {minutes:g} minutes, {rounds} rounds, {len(sizes)} samples, {sizes[0]:.1f} to "
        f"{sizes[-1]:.1f} MiB (most {max(sizes):.1f}), slope {slope:+.3f} MiB a minute"
    )
    assert growth < GROWTH  # it may shrink: what the warm-up took is given back
    assert slope < SLOPE or minutes < 10
