"""The input of a stream, so wrapped that whoever reads it can end it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TypeVar

T = TypeVar("T")


class Source(Iterator[T]):
    """An iterator that can be ended from outside; it closes the one beneath."""

    def __init__(self, beneath: Iterator[T]) -> None:
        self._beneath: Iterator[T] | None = beneath

    def __next__(self) -> T:
        if self._beneath is None:
            raise StopIteration
        return next(self._beneath)

    def close(self) -> None:
        beneath, self._beneath = self._beneath, None
        close(beneath)


class AsyncSource(AsyncIterator[T]):
    """An iterator that is closed once, however many hands close it.

    langchain-core reads it through a tee whose branches close it too, some when they are collected.
    """

    def __init__(self, beneath: AsyncIterator[T]) -> None:
        self._beneath: AsyncIterator[T] | None = beneath

    async def __anext__(self) -> T:
        if self._beneath is None:
            raise StopAsyncIteration
        return await anext(self._beneath)

    async def aclose(self) -> None:
        beneath, self._beneath = self._beneath, None
        await aclose(beneath)


def close(iterator: object) -> None:
    """Close `iterator` if it can be."""
    if (close := getattr(iterator, "close", None)) is not None:
        close()


async def aclose(iterator: object) -> None:
    """Close `iterator` if it can be."""
    if (aclose := getattr(iterator, "aclose", None)) is not None:
        await aclose()
