"""Reading ahead changes when items are fetched, and nothing else; nothing goes on behind it."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import aclosing

import pytest

from aligner_integrations.read_ahead import read_ahead
from aligner_integrations.read_ahead_async import AsyncReadAhead

SIZES = (0, 1, 3, 100)


class Counting:
    """A source that tells how far it was read, and in which thread it was closed."""

    def __init__(self, length: int = 1000, *, fails_at: int = -1) -> None:
        self.length, self.fails_at = length, fails_at
        self.given = 0
        self.closed_in: list[threading.Thread] = []
        self.came = threading.Condition()

    def __call__(self) -> Generator[int]:
        try:
            for number in range(self.length):
                if number == self.fails_at:
                    raise ConnectionError("the line is dead")
                with self.came:
                    self.given += 1
                    self.came.notify_all()
                yield number
        finally:
            self.closed_in.append(threading.current_thread())

    async def slowly(self) -> AsyncGenerator[int]:
        for number in self():
            await asyncio.sleep(0)
            yield number

    def wait_for(self, given: int) -> bool:
        with self.came:
            return self.came.wait_for(lambda: self.given >= given, timeout=10)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("size", SIZES)
async def test_all_items_come_in_order(size: int) -> None:
    assert list(read_ahead(Counting()(), size)) == list(range(1000))
    assert [item async for item in AsyncReadAhead(Counting().slowly(), size)] == list(range(1000))
    assert list(read_ahead([3, 1, 2], size)) == [3, 1, 2]


def test_it_reads_ahead_up_to_its_bound() -> None:
    source = Counting()
    items = read_ahead(source(), 5)
    assert next(items) == 0
    assert source.wait_for(6)  # one was taken, five wait
    assert not threading.Event().wait(0.05) and source.given == 6
    items.close()
    (thread,) = source.closed_in
    assert thread is not threading.current_thread() and not thread.is_alive()
    assert source.given == 6


async def test_the_task_reads_ahead_up_to_its_bound() -> None:
    source = Counting()
    items = AsyncReadAhead(source.slowly(), 5)
    assert await anext(items) == 0
    for _ in range(50):
        await asyncio.sleep(0)
    assert source.given == 6
    await items.aclose()
    assert len(asyncio.all_tasks()) == 1
    for _ in range(50):
        await asyncio.sleep(0)
    assert source.given == 6


def test_without_a_size_nothing_is_read_before_it_is_wanted() -> None:
    source = Counting()
    items = read_ahead(source(), 0)
    assert next(items) == 0 and source.given == 1
    items.close()
    assert source.closed_in == [threading.current_thread()]


@pytest.mark.parametrize("size", SIZES)
async def test_an_error_comes_after_what_came_before_it(size: int) -> None:
    seen: list[int] = []
    with pytest.raises(ConnectionError):
        seen += map(int, read_ahead(Counting(fails_at=3)(), size))
    with pytest.raises(ConnectionError):
        for item in read_ahead(Counting(fails_at=3)(), size):
            seen.append(item)
    with pytest.raises(ConnectionError):
        async for item in AsyncReadAhead(Counting(fails_at=3).slowly(), size):
            seen.append(item)
    assert seen[-6:] == [0, 1, 2] * 2


async def test_a_cancelled_reader_leaves_no_task() -> None:
    hangs = asyncio.Event()
    closed: list[bool] = []

    async def hanging() -> AsyncGenerator[int]:
        try:
            yield 0
            await hangs.wait()
        finally:
            closed.append(True)

    async def read() -> None:
        async with aclosing(AsyncReadAhead(hanging(), 5)) as items:
            async for _ in items:
                pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed == [True] and len(asyncio.all_tasks()) == 1


async def test_closing_does_not_wait_for_an_upstream_that_hangs() -> None:
    async def hanging() -> AsyncGenerator[int]:
        yield 0
        await asyncio.Event().wait()

    items = AsyncReadAhead(hanging(), 5)
    assert await anext(items) == 0
    await asyncio.wait_for(items.aclose(), timeout=5)


@pytest.mark.parametrize("size", [0, 2])
def test_the_source_runs_in_the_context_of_its_reader(size: int) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nobody's")

    def source() -> Generator[str]:
        yield variable.get()

    def read() -> list[str]:
        variable.set("the reader's")
        return list(read_ahead(source(), size))

    run: Callable[[Callable[[], list[str]]], list[str]] = contextvars.copy_context().run
    assert run(read) == ["the reader's"]
