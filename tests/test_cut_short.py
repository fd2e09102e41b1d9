"""Streams that are cut short, read slowly, shared by many, or end with the program: nothing is left behind.

These are the core's, with deadlines on, so that corrections run in threads; those of the frameworks are in
`langchain/test_streams_at_length.py` and `llama_index/`.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from aligner_integrations import Aligner
from aligner_integrations.langchain import AlignedChatModel
from aligner_integrations.llama_index import AlignedLLM
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.testing.replay import ReplayModel
from aligner_integrations.testing.replay_llm import ReplayLLM

QUESTION = "What is said?"
SENTENCES = ("The first is bad. ", "So is the second, bad. ", "A third bad one. ", "And bad at last. ")


def mend(question: str, prefix: str, sentence: str) -> str:
    return sentence.replace("bad", "good")


def ended(before: set[threading.Thread]) -> bool:
    """Whether all threads that are not in `before` end, apart from the event loop's own workers."""
    end = time.monotonic() + 5
    while left := {each for each in set(threading.enumerate()) - before if "asyncio" not in each.name}:
        if time.monotonic() > end:
            return False
        next(iter(left)).join(0.05)
    return True


class Upstream:
    """Says the sentences word by word, and knows whether it was closed."""

    def __init__(self, text: str = "".join(SENTENCES)) -> None:
        self.said, self.characters, self.closed = 0, 0, False
        self._words = re.findall(r"\S+\s*", text)

    def __iter__(self) -> Iterator[str]:
        try:
            for word in self._words:
                self.said += 1
                self.characters += len(word)
                yield word
        finally:
            self.closed = True


# T11: cut short.


@pytest.mark.parametrize("seconds", [None, 5.0])
@pytest.mark.parametrize("way", ["break", "close", "error", "drop"])
@pytest.mark.parametrize("outputs", range(1, len(SENTENCES)))
def test_t11_a_stream_that_is_cut_short_leaves_nothing(outputs: int, way: str, seconds: float | None) -> None:
    before, upstream = set(threading.enumerate()), Upstream()
    aligner = scripted_aligner(mend)
    shown: list[str] = []

    def read() -> None:
        stream = aligner.correct_stream(QUESTION, iter(upstream), sentence_seconds=seconds)
        for segment in stream:
            shown.append(segment.text)
            if len(shown) == outputs:
                if way == "error":
                    raise KeyError("reader")
                if way == "close":
                    stream.close()  # type: ignore[attr-defined]
                if way != "drop":
                    break

    if way == "error":
        with pytest.raises(KeyError):
            read()
    else:
        read()
    gc.collect()
    assert upstream.closed
    if way != "drop":
        assert shown == [each.replace("bad", "good") for each in SENTENCES[:outputs]]
        assert upstream.said < len(re.findall(r"\S+", "".join(SENTENCES)))
    assert ended(before)
    # The next answer is not affected.
    again = aligner.correct_stream(QUESTION, iter(Upstream()), sentence_seconds=seconds)
    assert "".join(map(str, again)) == "".join(SENTENCES).replace("bad", "good")


@pytest.mark.parametrize("late", [False, True])
async def test_t11_a_task_that_is_cancelled_in_mid_correction(late: bool) -> None:
    """Whether the correction is within its time or was given up: its thread ends."""
    before = set(threading.enumerate())
    begun, go_on = threading.Event(), threading.Event()

    def rule(question: str, prefix: str, sentence: str) -> str:
        begun.set()
        go_on.wait(20)
        return sentence

    aligner = scripted_aligner(rule)
    seconds = 0.05 if late else 20.0
    correcting = aligner.acorrect(QUESTION, "It is bad.", on_error="pass_through", sentence_seconds=seconds)
    task = asyncio.create_task(correcting)
    await asyncio.to_thread(begun.wait, 10)
    if late:
        await task
    task.cancel()
    if not late:
        with pytest.raises(asyncio.CancelledError):
            await task
    assert asyncio.all_tasks() == {asyncio.current_task()}
    go_on.set()
    assert await asyncio.to_thread(ended, before | {threading.current_thread()})


# T12: read slowly.


def with_context(aligner: Aligner, length: int) -> Aligner:
    """The same with a context of so many tokens, as a model has one."""
    config = replace(aligner.config, max_length=length)
    return Aligner(aligner.backend, aligner.tokenizer, config, decode=aligner.decode_config, safeguards="off")


def say(words: int) -> Iterator[str]:
    for word in range(words):
        yield "word. " if word % 25 == 24 else "word "


def test_t12_memory_is_flat_over_a_hundred_thousand_tokens() -> None:
    aligner = with_context(scripted_aligner(mend), 400)
    characters, blocks = 0, list[int]()
    for number, segment in enumerate(aligner.correct_stream(QUESTION, say(100_000), sentence_seconds=30.0)):
        characters += len(segment.text)
        if number % 500 == 499:
            gc.collect()
            blocks.append(sys.getallocatedblocks())
    assert characters == 4_000 * (24 * len("word ") + len("word. "))
    assert len(blocks) == 8
    assert max(blocks[1:]) - blocks[0] < 1_000  # of some hundred thousand; one a sentence would be 3,500


@pytest.mark.parametrize("kind", ["core", "chat model", "llm"])
def test_t12_upstream_is_never_far_ahead_of_a_slow_reader(kind: str) -> None:
    """What is asked for is what is read: nothing runs ahead to fill a buffer."""
    sentence = "Here is one more of them. "
    aligner, answer = scripted_aligner(mend), sentence * 300
    read, most = 0, 0
    if kind == "core":
        upstream = Upstream(answer)
        for segment in aligner.correct_stream(QUESTION, iter(upstream)):
            read += len(segment.original)
            most = max(most, upstream.characters - read)
    elif kind == "chat model":
        model = ReplayModel(answer=answer, delay=0.0)
        for chunk in AlignedChatModel(model=model, aligner=aligner).stream(QUESTION):
            read += len(str(chunk.text))
            most = max(most, model.handed_out - read)
    else:
        llm = ReplayLLM(answer=answer)
        for response in AlignedLLM(llm, aligner).stream_complete(QUESTION):
            read += len(response.delta or "")
            most = max(most, llm.handed_out - read)
    assert read == len(answer)
    assert most <= 2 * len(sentence)


# T13: shared by many.


@pytest.mark.parametrize("kind", ["threads", "tasks"])
async def test_t13_two_hundred_streams_with_deadlines_do_not_cross(kind: str) -> None:
    def tell(question: str, prefix: str, sentence: str) -> str:
        return f"{sentence[:-1]} {' '.join(re.findall(r'canary-[0-9]+', question + prefix))}."

    aligner = scripted_aligner(tell)
    together = threading.Barrier(50)

    def one(number: int) -> str:
        canary = f"canary-{number:03}"
        if kind == "threads":
            together.wait(60)
        chunks = iter(Upstream(f"One {canary} sings. Two fly. Three are gone. "))
        stream = aligner.correct_stream(f"What of {canary}?", chunks, sentence_seconds=30.0)
        return "".join(map(str, stream))

    if kind == "threads":
        with ThreadPoolExecutor(50) as pool:
            found = await asyncio.to_thread(lambda: list(pool.map(one, range(200))))
    else:
        found = await asyncio.gather(*(asyncio.to_thread(one, number) for number in range(200)))
    crossings = sum(
        heard != f"canary-{number:03}"
        for number, text in enumerate(found)
        for heard in re.findall(r"canary-[0-9]+", text)
    )
    assert crossings == 0
    assert all(text.count("canary") == 2 + 3 + 6 for text in found)


# A program that is told to end in mid-stream.

PROGRAM = """
import signal, sys, time
from aligner_integrations import Aligner

if sys.argv[1] == "exit":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(3))
seconds = float(sys.argv[2]) or None

def words():
    try:
        for word in sys.argv[3].split(" "):
            time.sleep(0.002)
            yield word + " "
    finally:
        print("upstream closed", file=sys.stderr, flush=True)

aligner = Aligner.from_pretrained()
for segment in aligner.correct_stream("What is 12 + 13?", words(), sentence_seconds=seconds):
    sys.stdout.write(segment.text)
    sys.stdout.flush()
"""
ANSWER = " ".join(f"The sum of 12 and {number} is {number + 13}." for number in range(60))


@functools.cache
def whole() -> str:
    return "".join(map(str, Aligner.from_pretrained().correct_stream("What is 12 + 13?", [f"{ANSWER} "])))


@pytest.mark.parametrize("seconds", [0.0, 10.0])
@pytest.mark.parametrize("way", ["default", "exit"])
def test_t11_sigterm_in_mid_stream_leaves_a_prefix_and_no_process(way: str, seconds: float) -> None:
    command = [sys.executable, "-c", PROGRAM, way, str(seconds), ANSWER]
    pipe: Any = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=False) as running:
        assert running.stdout is not None and running.stderr is not None
        shown = b""
        while shown.count(b".") < 5:
            assert select.select([running.stdout], [], [], 60)[0], "nothing came"
            shown += os.read(running.stdout.fileno(), 4096)
        running.send_signal(signal.SIGTERM)
        told = time.monotonic()
        shown += running.stdout.read()
        said = running.stderr.read().decode()
        code = running.wait(30)
    assert time.monotonic() - told < 10
    text = shown.decode()
    assert whole().startswith(text)
    assert len(text) < len(whole())
    assert code == (-signal.SIGTERM if way == "default" else 3), said
    assert ("upstream closed" in said) == (way == "exit")
    assert "Traceback" not in said and "Fatal" not in said
