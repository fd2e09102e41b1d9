"""Every display shows what the reducer of the updates says, and at the end the corrected answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aligner_integrations.correction import Segment
from aligner_integrations.langchain.displays import (
    ChainlitDisplay,
    Shown,
    ShownText,
    SSEDisplay,
    StreamlitDisplay,
    agradio_texts,
    gradio_texts,
)
from aligner_integrations.langchain.updates import RunSegment, TextUpdate

RUNS = (UUID(int=2), UUID(int=1), UUID(int=3))

# Two code units, one, lone halves of a pair, line ends that frames, JavaScript and JSON care about.
LETTERS = 'ab😀👩\u200d🚀é\ud83d\ude00\n\r\u2028\x85\x00"\\ .:'
texts = st.text(st.sampled_from(LETTERS) | st.characters(exclude_categories=()), max_size=6)


class Placeholder:
    """`st.empty()` as Streamlit 1.67.0 has it: each call shows its text in place of the last."""

    def __init__(self) -> None:
        self.drawn: list[str] = []

    def markdown(self, body: object, unsafe_allow_html: bool = False, *, help: str | None = None) -> object:
        str(body).encode()  # protobuf takes no lone surrogates
        self.drawn.append(str(body))
        return self


class Message:
    """`chainlit.Message` as Chainlit 2.12.0 has it, with what the browser then shows."""

    def __init__(self) -> None:
        self.content = ""
        self.streaming = False
        self.screen = ""
        self.sent: list[tuple[str, bool]] = []

    async def stream_token(self, token: str, is_sequence: bool = False) -> None:
        if not token:
            return
        self.content = token if is_sequence else self.content + token
        self.sent.append((token, is_sequence))
        if not self.streaming:
            self.streaming = True
            self.screen = self.content
        else:
            self.screen = token if is_sequence else self.screen + token
        await asyncio.sleep(0)

    async def update(self) -> bool:
        self.streaming = False
        self.screen = self.content
        await asyncio.sleep(0)
        return True


def units(text: str) -> list[int]:
    """The UTF-16 code units of `text`: a string as JavaScript has it."""
    return [
        unit
        for code in map(ord, text)
        for unit in ((code,) if code < 0x10000 else (0xD7C0 + (code >> 10), 0xDC00 + (code & 0x3FF)))
    ]


@dataclass
class Browser:
    """An EventSource and the reducer of the documentation; its strings are lists of code units."""

    shown: dict[str, list[int]] = field(default_factory=dict)
    open: bool = True
    settled: bool | None = None

    def receive(self, body: bytes) -> None:
        kind, data = "message", list[str]()
        # A line ends with CRLF, CR or LF; nothing else ends one.
        for line in body.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                kind = value
            elif name == "data":
                data.append(value)
            elif not line:
                if data:
                    self.dispatch(kind, "\n".join(data))
                kind, data = "message", []
        assert not data, "a frame without its end"

    def dispatch(self, kind: str, data: str) -> None:
        assert self.open
        if kind == "end":
            self.open = False
            return
        assert kind == "message"
        change = json.loads(data)
        before = self.shown.get(change["run"], [])
        assert 0 <= change["start"] <= change["end"] <= len(before)
        self.shown[change["run"]] = (
            before[: change["start"]] + units(change["text"]) + before[change["end"] :]
        )
        self.settled = change["settled"]

    @property
    def text(self) -> list[int]:
        blank, joined = units("\n\n"), list[int]()
        for text in filter(None, self.shown.values()):
            joined += blank + text if joined else text
        return joined


def segment(text: str, original: str = "", index: int = 0, start: int = 0) -> Segment:
    return Segment(original=original, text=text, index=index, start=start)


def run_segment(run_id: UUID, text: str) -> RunSegment:
    return RunSegment(original=text, text=text, index=0, start=0, run_id=run_id)


@dataclass
class Story:
    """Items as a handler gives them, with the answers that must be shown at the end."""

    items: list[Shown]
    answers: dict[UUID, str]

    def expected(self) -> list[str]:
        """What is shown after each item, by the plain reducer."""
        shown: dict[UUID, str] = {}
        after = []
        for item in self.items:
            before = shown.get(item.run_id, "")
            shown[item.run_id] = before + item.text if isinstance(item, RunSegment) else item.apply(before)
            after.append("\n\n".join(text for text in shown.values() if text))
        return after


def held(run_id: UUID, sentences: list[tuple[str, str]]) -> Iterator[Shown]:
    for _, text in sentences:
        yield run_segment(run_id, text)


def optimistic(run_id: UUID, sentences: list[tuple[str, str]], ahead: list[int]) -> Iterator[Shown]:
    """Each sentence piece by piece; its correction when `ahead` characters of the next are shown too."""
    answer, arrived, settled, shown = "".join(original for original, _ in sentences), 0, 0, 0
    for (original, text), more in zip(sentences, ahead, strict=True):
        settled += len(original)
        while arrived < min(settled + more, len(answer)):
            piece = answer[arrived : arrived + 1 + more]
            place = shown + arrived - (settled - len(original))
            yield TextUpdate(run_id=run_id, start=place, end=place, text=piece)
            arrived += len(piece)
        yield TextUpdate(
            run_id=run_id,
            start=shown,
            end=shown + len(original),
            text=text,
            segment=segment(text, original),
        )
        shown += len(text)


@st.composite
def stories(draw: st.DrawFn) -> Story:
    streams, answers = [], {}
    for run_id in RUNS[: draw(st.integers(1, 3))]:
        corrections = st.tuples(texts, texts) | texts.map(lambda text: (text, text))
        sentences = draw(st.lists(corrections, max_size=5))
        size = len(sentences)
        ahead = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
        stream = held(run_id, sentences) if draw(st.booleans()) else optimistic(run_id, sentences, ahead)
        streams.append(list(stream))
        answers[run_id] = "".join(text for _, text in sentences)
    order = draw(st.permutations([index for index, stream in enumerate(streams) for _ in stream]))
    sources = [iter(stream) for stream in streams]
    return Story([next(sources[index]) for index in order], answers)


def random_updates() -> st.SearchStrategy[Story]:
    """Updates as no handler gives them: anywhere, of any length, past the end too."""
    places = st.tuples(st.integers(0, 12), st.integers(0, 6))

    def update(run_id: UUID, place: tuple[int, int], text: str, settled: bool) -> TextUpdate:
        start, length = place
        last = segment(text) if settled else None
        return TextUpdate(run_id=run_id, start=start, end=start + length, text=text, segment=last)

    updates = st.builds(update, st.sampled_from(RUNS), places, texts, st.booleans())
    items = st.lists(updates | st.builds(run_segment, st.sampled_from(RUNS), texts), max_size=12)
    return items.map(lambda items: Story(items, {}))


def drawable(text: str) -> str:
    """Pairs joined and lone halves marked, one character at a time."""
    return bytes(byte for unit in units(text) for byte in unit.to_bytes(2, "big")).decode(
        "utf-16-be", "replace"
    )


async def each(items: list[Shown]) -> AsyncIterator[Shown]:
    for item in items:
        await asyncio.sleep(0)
        yield item


async def all_of(parts: AsyncIterator[str]) -> list[str]:
    return [part async for part in parts]


def changes(after: list[str]) -> list[str]:
    """The texts that differ from what was on the screen before."""
    drawn = [drawable(text) for text in after]
    return [text for before, text in zip(["", *drawn], drawn, strict=False) if text != before]


EMOJI = Story(
    [
        TextUpdate(run_id=RUNS[0], start=0, end=0, text="😀😀 teh"),
        TextUpdate(run_id=RUNS[0], start=6, end=6, text=" end. 🚀"),
        TextUpdate(run_id=RUNS[0], start=3, end=11, text="the end.", segment=segment("the end.")),
    ],
    {RUNS[0]: "😀😀 the end. 🚀"},
)
# The two halves of one character arrive one by one, and what came first is taken back to nothing.
HALVES = Story(
    [
        TextUpdate(run_id=RUNS[0], start=0, end=0, text="\ud83d"),
        TextUpdate(run_id=RUNS[0], start=1, end=1, text="\ude00"),
        TextUpdate(run_id=RUNS[0], start=0, end=2, text="", segment=segment("")),
        TextUpdate(run_id=RUNS[0], start=0, end=0, text="So."),
    ],
    {RUNS[0]: "So."},
)


@given(stories() | random_updates())
@example(EMOJI)
@example(HALVES)
def test_every_display_shows_what_the_reducer_says(story: Story) -> None:
    after = story.expected()
    shown, sse, browser = ShownText(), SSEDisplay(), Browser()
    placeholder, message = Placeholder(), Message()
    streamlit, chainlit = StreamlitDisplay(placeholder), ChainlitDisplay(message)

    async def play() -> None:
        for item, text in zip(story.items, after, strict=True):
            assert shown.update(item) == text == shown.text
            streamlit(item)
            assert (placeholder.drawn or [""])[-1] == drawable(text)
            await chainlit(item)
            assert message.screen == message.content == drawable(text)
            browser.receive(sse.frame(item).encode())
            assert browser.text == units(text)
            assert browser.settled is (isinstance(item, RunSegment) or item.settled)

    asyncio.run(play())
    assert placeholder.drawn == changes(after)
    assert list(gradio_texts(story.items)) == changes(after)
    assert asyncio.run(all_of(agradio_texts(each(story.items)))) == changes(after)
    browser.receive(SSEDisplay.end_frame.encode())
    assert not browser.open
    if story.answers:
        order = dict.fromkeys(item.run_id for item in story.items)
        answers = [story.answers[run_id] for run_id in order if story.answers[run_id]]
        assert shown.text == "\n\n".join(answers)


@given(stories())
def test_frames_do_not_depend_on_how_they_arrive(story: Story) -> None:
    """One frame is one event, whatever the text holds: all frames at once show the same."""
    sse, browser = SSEDisplay(), Browser()
    frames = [sse.frame(item) for item in story.items]
    assert all(frame.isascii() and frame.count("\n") == 2 and "\r" not in frame for frame in frames)
    browser.receive("".join([*frames, SSEDisplay.end_frame]).encode())
    assert browser.text == units((story.expected() or [""])[-1])


def test_offsets_count_utf16_units() -> None:
    sse = SSEDisplay()
    frames = [json.loads(sse.frame(item).removeprefix("data: ")) for item in EMOJI.items]
    assert [(frame["start"], frame["end"]) for frame in frames] == [(0, 0), (8, 8), (5, 13)]
    assert [frame["settled"] for frame in frames] == [False, False, True]
    assert {frame["run"] for frame in frames} == {str(RUNS[0])}


def test_chainlit_appends_where_it_can_and_replaces_where_it_must() -> None:
    message = Message()
    display = ChainlitDisplay(message)

    async def play() -> None:
        for item in EMOJI.items:
            await display(item)
        await display(run_segment(RUNS[1], "Next."))

    asyncio.run(play())
    whole = "😀😀 the end. 🚀"
    assert message.sent == [("😀😀 teh", False), (" end. 🚀", False), (whole, True), ("\n\nNext.", False)]


def test_chainlit_runs_at_once() -> None:
    """Two runs whose items are awaited together lose nothing."""
    message = Message()
    display = ChainlitDisplay(message)

    async def run(run_id: UUID, letter: str) -> None:
        for _ in range(20):
            await display(run_segment(run_id, letter))

    async def play() -> None:
        await asyncio.gather(run(RUNS[0], "a"), run(RUNS[1], "b"))

    asyncio.run(play())
    assert message.screen == message.content == "a" * 20 + "\n\n" + "b" * 20


def test_halves_of_a_character_do_not_stop_an_interface() -> None:
    """Streamlit and Gradio refuse text that is not UTF-8; the character is whole once both halves came."""
    assert list(gradio_texts(HALVES.items)) == ["\ufffd", "😀", "", "So."]


def test_breaking_off_closes_the_stream() -> None:
    closed: list[str] = []

    def items() -> Iterator[Shown]:
        try:
            while True:
                yield run_segment(RUNS[0], "So.")
        finally:
            closed.append("sync")

    async def aitems() -> AsyncIterator[Shown]:
        try:
            while True:
                yield run_segment(RUNS[0], "So.")
        finally:
            closed.append("async")

    source: Any = items()
    texts: Any = gradio_texts(source)
    assert next(texts) == "So."
    texts.close()

    async def play() -> None:
        atexts: Any = agradio_texts(aitems())
        assert await anext(atexts) == "So."
        await atexts.aclose()
        assert closed == ["sync", "async"]

    asyncio.run(play())


def call_chainlit(item: Any) -> None:
    asyncio.run(ChainlitDisplay(Message()).__call__(item))


@pytest.mark.parametrize(
    "take",
    [
        lambda item: ShownText().update(item),
        lambda item: StreamlitDisplay(Placeholder())(item),
        lambda item: SSEDisplay().frame(item),
        lambda item: list(gradio_texts([item])),
        lambda item: asyncio.run(all_of(agradio_texts(each([item])))),
        call_chainlit,
    ],
    ids=["shown", "streamlit", "sse", "gradio", "agradio", "chainlit"],
)
@pytest.mark.parametrize("item", ["text", None, segment("So.")], ids=["str", "None", "Segment"])
def test_anything_else_is_a_type_error(take: Callable[[Any], object], item: Any) -> None:
    kind = type(item).__name__
    with pytest.raises(TypeError, match=f"^item must be a RunSegment or a TextUpdate, not {kind}$"):
        take(item)
