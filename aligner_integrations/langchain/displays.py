"""Displays: what a streaming handler hands on, in the form that four user interfaces take.

No interface is imported here. Each display is given the interface's own object, or gives plain text.
A display belongs to one answer on the screen; the runs of that answer may interleave.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterable, Iterator
from typing import ClassVar, Protocol, TypeAlias
from uuid import UUID

from aligner_integrations.langchain.sources import aclose, close
from aligner_integrations.langchain.updates import RunSegment, TextUpdate

Shown: TypeAlias = RunSegment | TextUpdate


class Placeholder(Protocol):
    """What `streamlit.empty()` returns."""

    def markdown(self, body: str, /) -> object:
        """Show `body` in place of what was shown."""


class StreamedMessage(Protocol):
    """A `chainlit.Message`."""

    content: str

    def stream_token(self, token: str, /, is_sequence: bool = ...) -> Awaitable[object]:
        """Append `token`, or show it in place of the content."""

    def update(self) -> Awaitable[object]:
        """Send the content as it is now."""


class ShownText:
    """The text that is shown: the runs in order of first appearance, a blank line between them."""

    def __init__(self) -> None:
        self._runs: dict[UUID, str] = {}

    @property
    def text(self) -> str:
        """The full text that is shown now."""
        # A run without text has no place on the screen, so it gets no blank line either.
        return "\n\n".join(text for text in self._runs.values() if text)

    def update(self, item: Shown) -> str:
        """Take the next segment or update and return the full text that is shown now."""
        self._change(item)
        return self.text

    def _change(self, item: Shown) -> tuple[str, TextUpdate]:
        """Apply `item`; return what was shown of its run before, and the update that was applied."""
        if not isinstance(item, RunSegment | TextUpdate):
            raise TypeError(f"item must be a RunSegment or a TextUpdate, not {type(item).__name__}")
        before = self._runs.get(item.run_id, "")
        if isinstance(item, RunSegment):
            end = len(before)
            item = TextUpdate(run_id=item.run_id, start=end, end=end, text=item.text, segment=item)
        # An append is one copy of the text: the slices at its ends are the text itself and nothing.
        self._runs[item.run_id] = item.apply(before)
        return before, item


def gradio_texts(items: Iterable[Shown]) -> Iterator[str]:
    """Give the full text after each change: what the function of a `gradio.ChatInterface` yields.

    An item that changes nothing on the screen gives nothing. Closing this closes the stream of items.
    """
    shown, drawn = ShownText(), ""
    source = iter(items)
    try:
        for item in source:
            if (text := _drawable(shown.update(item))) != drawn:
                drawn = text
                yield text
    finally:
        close(source)


async def agradio_texts(items: AsyncIterable[Shown]) -> AsyncIterator[str]:
    """Do what `gradio_texts` does, for items that are read with `async for`."""
    shown, drawn = ShownText(), ""
    source = aiter(items)
    try:
        async for item in source:
            if (text := _drawable(shown.update(item))) != drawn:
                drawn = text
                yield text
    finally:
        await aclose(source)


class StreamlitDisplay:
    """A sink that draws the full text into a placeholder: `StreamlitDisplay(st.empty())`."""

    def __init__(self, placeholder: Placeholder) -> None:
        self._placeholder = placeholder
        self._shown = ShownText()
        self._drawn = ""

    def __call__(self, item: Shown) -> None:
        if (text := _drawable(self._shown.update(item))) != self._drawn:
            self._placeholder.markdown(text)
            self._drawn = text


class ChainlitDisplay:
    """An async sink that streams into a message: `ChainlitDisplay(cl.Message(content=""))`.

    Text at the end is appended; any other change shows the full text again. When the answer has ended,
    call the message's `send()`, as always in Chainlit.
    """

    def __init__(self, message: StreamedMessage) -> None:
        self._message = message
        self._shown = ShownText()
        self._drawn = ""

    async def __call__(self, item: Shown) -> None:
        # What is drawn is noted first: two runs may be in here at once, and the message changes its
        # content before it waits for the network.
        before, text = self._drawn, _drawable(self._shown.update(item))
        self._drawn = text
        if text == before:
            return
        if text.startswith(before):
            await self._message.stream_token(text[len(before) :])
        elif text:
            await self._message.stream_token(text, is_sequence=True)
        else:
            # stream_token takes no notice of empty text, and withdrawn text must not stay on the screen.
            self._message.content = ""
            await self._message.update()


class SSEDisplay:
    r"""Server-sent events: one frame for each item, the same for appended and for replaced text.

    A frame's data is JSON: `run`, `start`, `end`, `text`, and `settled` (corrected, and stays). The
    offsets count UTF-16 code units, as JavaScript does. After the last frame send `SSEDisplay.end_frame`,
    or the browser asks again. In the browser:

        const shown = new Map();
        const source = new EventSource("/answer?question=" + encodeURIComponent(question));
        source.onmessage = ({ data }) => {
          const { run, start, end, text } = JSON.parse(data);
          const before = shown.get(run) ?? "";
          shown.set(run, before.slice(0, start) + text + before.slice(end));
          output.textContent = [...shown.values()].filter(Boolean).join("\n\n");
        };
        source.onerror = () => source.close();
        source.addEventListener("end", () => source.close());
    """

    # Without data a browser would drop the event.
    end_frame: ClassVar[str] = "event: end\ndata: {}\n\n"

    def __init__(self) -> None:
        self._shown = ShownText()
        self._units: dict[UUID, int] = {}

    def frame(self, item: Shown) -> str:
        """Return the frame that makes the browser show `item`."""
        before, update = self._shown._change(item)
        # Counted from the end: updates change the last sentence, and only that much is read.
        total = self._units.get(update.run_id, 0)
        start = total - _utf16_units(before[update.start :])
        end = total - _utf16_units(before[update.end :])
        self._units[update.run_id] = total - (end - start) + _utf16_units(update.text)
        data = {
            "run": str(update.run_id),
            "start": start,
            "end": end,
            "text": update.text,
            "settled": update.settled,
        }
        # ASCII alone: line ends cannot break the frame, and half a character survives UTF-8.
        return f"data: {json.dumps(data, ensure_ascii=True)}\n\n"


def _utf16_units(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _drawable(text: str) -> str:
    """Join surrogates that came one by one, and mark lone ones: interfaces send UTF-8, which has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
