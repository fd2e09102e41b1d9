"""`AlignedChatModel(loop="closed")`: the wrapped model goes on from the corrected text, in one message."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.callbacks import CallbackManagerForLLMRun, UsageMetadataCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tracers import BaseTracer
from langchain_core.tracers.schemas import Run
from pydantic import Field, ValidationError

from aligner_integrations import Aligner
from aligner_integrations.closed_loop import MAX_RESTARTS
from aligner_integrations.errors import CorrectionFailedError
from aligner_integrations.langchain import AlignedChatModel
from aligner_integrations.read_ahead import READ_AHEAD
from aligner_integrations.template import GO_ON
from aligner_integrations.testing import scripted_aligner
from tests.langchain.forms import FORMS, graph_of, run
from tests.test_closed_loop import Write, mending, random_rule, sequential, writer

RAW = "bad"
ANSWERS = {"": "Fine. It is bad. So weep. And so on.", "Fine. It is good.": " So smile.\nBye."}
SHOWN = "Fine. It is good. So smile.\nBye."


class Tracer(BaseTracer):
    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.runs.append(run)


class Continuing(BaseChatModel):
    """Writes on from the assistant's message that stands last, or before the one that asks for it."""

    write: Write
    chunk_size: int = 4
    in_blocks: bool = False
    streams: bool = True
    asked: list[list[BaseMessage]] = Field(default_factory=list)
    options: list[dict[str, Any]] = Field(default_factory=list)
    given: list[str] = Field(default_factory=list)  # every chunk, and "closed" at the end of each stream

    @property
    def _llm_type(self) -> str:
        return "continuing"

    def prefix_of(self, messages: list[BaseMessage]) -> str:
        last = messages[-2] if messages[-1].content == GO_ON else messages[-1]
        return str(last.text) if isinstance(last, AIMessage) else ""

    def _begin(self, messages: list[BaseMessage], options: dict[str, Any]) -> str:
        self.asked.append(messages)
        self.options.append(options)
        return self.write(self.prefix_of(messages))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        text = self._begin(messages, kwargs)
        message = AIMessage(text, usage_metadata=usage(len(text)), response_metadata={"model_name": "it"})
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        text = self._begin(messages, kwargs)
        own = f"it-{len(self.asked)}"
        try:
            for at in range(0, len(text), self.chunk_size):
                self.given.append(text[at : at + self.chunk_size])
                content: Any = self.given[-1]
                if self.in_blocks:
                    content = [{"type": "text", "text": content, "index": 0, "id": f"block-{own}"}]
                yield ChatGenerationChunk(message=AIMessageChunk(content=content, id=own))
            last = AIMessageChunk(
                content=[] if self.in_blocks else "",
                id=own,
                usage_metadata=usage(len(text)),
                response_metadata={"model_name": "it", "finish_reason": "stop"},
            )
            yield ChatGenerationChunk(message=last)
        finally:
            self.given.append("closed")

    def _should_stream(self, **kwargs: Any) -> bool:
        return self.streams


def usage(output: int) -> Any:
    return {"input_tokens": 10, "output_tokens": output, "total_tokens": 10 + output}


def closed(model: BaseChatModel, aligner: Aligner | None = None, **options: Any) -> AlignedChatModel:
    aligner = aligner or scripted_aligner(mending)
    return AlignedChatModel(
        model=model, aligner=aligner, loop="closed", **{"continuation": "prefill"} | options
    )


def script(answers: dict[str, str] = ANSWERS) -> Continuing:
    return Continuing(write=answers.__getitem__)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    form=st.sampled_from(FORMS),
    chunk_size=st.sampled_from([1, 3, 20, 600]),
    share=st.sampled_from([0.1, 0.3, 0.8]),
    how=st.sampled_from(["plain", "blocks", "whole"]),
)
def test_it_is_the_sequential_algorithm(
    seed: int, form: str, chunk_size: int, share: float, how: str
) -> None:
    write, rule = writer(seed), random_rule(seed, share)
    naive = sequential(write, rule)
    model = Continuing(write=write, chunk_size=chunk_size, in_blocks=how == "blocks", streams=how != "whole")
    message = run(form, closed(model, scripted_aligner(rule)), "How is it?")
    assert str(message.text) == naive.text
    assert len(model.asked) == (1 + naive.restarts) * (2 if "batch" in form else 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_blocks", [False, True])
def test_all_rounds_are_one_message(form: str, in_blocks: bool) -> None:
    model = Continuing(write=ANSWERS.__getitem__, in_blocks=in_blocks)
    message = run(form, closed(model), "How is it?")
    assert message.text == SHOWN
    assert message.id == "it-1" or "batch" in form
    assert message.response_metadata["model_name"] == "it"
    assert message.response_metadata["finish_reason"] == "stop"
    if in_blocks:
        (block,) = message.content
        assert block["text"] == SHOWN
    receipt = message.response_metadata["aligner"]
    assert (receipt["rounds"], receipt["restarts"], receipt["changed"]) == (2, 1, 1)
    assert receipt["shown_chars"] == len(SHOWN)
    assert receipt["requested_chars"] - receipt["thrown_away_chars"] == len(SHOWN) - len("good") + len("bad")
    first, second = model.asked[:2] if "batch" not in form else (model.asked[0], model.asked[-1])
    assert first == [HumanMessage("How is it?")]
    assert second == [*first, AIMessage("Fine. It is good.")]


class Metered(Continuing):
    """Tells its usage chunk by chunk."""

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        for chunk in super()._stream(*args, **kwargs):
            message = chunk.message.model_copy(update={"usage_metadata": usage(1)})
            yield ChatGenerationChunk(message=message)


@pytest.mark.parametrize("form", FORMS)
def test_t18_usage_is_all_that_was_requested_once(form: str) -> None:
    """What was thrown away is counted, too, whether it was looked at or not."""
    heard = UsageMetadataCallbackHandler()
    answers = {"": f"Fine. It is bad. {'More. ' * 40}", "Fine. It is good.": " So smile. Bye."}
    model = Metered(write=answers.__getitem__)
    message = run(form, closed(model), "How is it?", {"callbacks": [heard]})
    calls = 2 if "batch" in form else 1
    receipt = message.response_metadata["aligner"]
    assert message.usage_metadata["output_tokens"] == receipt["requested_chunks"]
    assert message.usage_metadata["input_tokens"] == 10 * receipt["requested_chunks"]
    if calls == 1:
        assert heard.usage_metadata["it"] == message.usage_metadata
        gave = len(model.given) - model.given.count("closed") + 1  # the last chunk has no text
        # In async runs a thread may be at one more chunk when its round is closed.
        assert receipt["requested_chunks"] in ((gave,) if form in ("invoke", "stream") else (gave, gave - 1))
        assert receipt["requested_chars"] > len("".join(answers.values())) - len(answers[""])


@pytest.mark.parametrize("form", FORMS)
def test_t18_usage_of_whole_answers_is_added_up(form: str) -> None:
    model = Continuing(write=ANSWERS.__getitem__, streams=False)
    message = run(form, closed(model), "How is it?")
    output = sum(map(len, ANSWERS.values()))
    assert message.usage_metadata == {
        "input_tokens": 20,
        "output_tokens": output,
        "total_tokens": 20 + output,
    }


@pytest.mark.parametrize("mode", ["messages", "updates", "values"])
def test_t4_no_stream_of_a_graph_tells_what_was_thrown_away(mode: str) -> None:
    question = {"messages": [HumanMessage("How is it?")]}
    events = list(graph_of(closed(script())).stream(question, stream_mode=mode))
    assert RAW not in repr(events) and "weep" not in repr(events)
    if mode == "messages":
        assert "".join(message.text for message, _ in events) == SHOWN
        assert len({message.id for message, _ in events if message.text}) == 1
    else:
        assert SHOWN in repr(events) or repr(SHOWN)[1:-1] in repr(events)


async def test_event_streams_hear_one_message() -> None:
    events = [event async for event in closed(script()).astream_events("How is it?", version="v2")]
    assert "weep" not in repr(events) and RAW not in repr(events)
    parts = [event["data"]["chunk"].text for event in events if event["event"] == "on_chat_model_stream"]
    assert "".join(parts) == SHOWN
    stream = closed(script()).stream_events("How is it?", version="v3")
    assert "weep" not in repr(list(stream)) and stream.output.text == SHOWN


async def collected(stream: AsyncIterator[Any], count: int) -> list[str]:
    return [(await anext(stream)).text for _ in range(count)]


async def test_t11_breaking_off_closes_the_round_that_runs() -> None:
    before = threading.active_count()
    for number in (1, 3):
        model = script({"": f"Fine. It is bad. {'More. ' * 40}", "Fine. It is good.": f" So. {'And. ' * 40}"})
        stream = closed(model).stream("How is it?")
        texts = [next(stream).text for _ in range(number)]
        assert texts == ["Fine. ", "It is good. ", "So. "][:number]
        assert isinstance(stream, Iterator)
        stream.close()  # type: ignore[attr-defined]
        assert model.given[-1] == "closed"
        assert len(model.given) < 3 * READ_AHEAD
        assert threading.active_count() == before


async def test_t11_a_cancelled_task_leaves_nothing_running() -> None:
    model = script({"": f"Fine. It is bad. {'More. ' * 40}", "Fine. It is good.": f" So. {'And. ' * 40}"})
    stream = closed(model).astream("How is it?")
    assert await collected(stream, 2) == ["Fine. ", "It is good. "]
    await stream.aclose()  # type: ignore[attr-defined]
    await asyncio.sleep(0.05)
    assert len(asyncio.all_tasks()) == 1


def test_upstream_writes_on_while_a_sentence_is_corrected() -> None:
    """What it wrote is used where nothing changed: one round, and no chunk is asked for twice."""
    seen: list[int] = []
    came = threading.Event()

    def rule(question: str, prefix: str, sentence: str) -> str:
        if not prefix:
            assert came.wait(10)  # the first sentence is only corrected once the whole answer is there
        seen.append(len(model.given))
        return sentence

    def write(prefix: str) -> str:
        return "Fine. So it is. Bye."

    class Telling(Continuing):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            yield from super()._stream(*args, **kwargs)
            came.set()

    model = Telling(write=write)
    message = closed(model, scripted_aligner(rule)).invoke("How is it?")
    assert message.text == write("")
    assert seen[0] == len(model.given) == 6
    assert len(model.asked) == 1
    assert message.response_metadata["aligner"]["thrown_away_chars"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_restarts_are_limited(form: str) -> None:
    def write(prefix: str) -> str:
        return "".join(f"{number} is bad. " for number in range(prefix.count("good"), 12))

    for limit in (0, 2, MAX_RESTARTS):
        model = Continuing(write=write)
        message = run(form, closed(model, max_restarts=limit), "How is it?")
        assert message.text == "".join(f"{number} is good. " for number in range(12))
        assert len(model.asked) == (1 + limit) * (2 if "batch" in form else 1)


def calling(text: str) -> type[Continuing]:
    """A model that says `text` and calls a tool, in one chunk or in several."""

    class Calling(Continuing):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            self.asked.append(args[0])
            call: Any = {"name": "look", "args": "{}", "id": "1", "index": 0, "type": "tool_call_chunk"}
            pieces = re.findall(r".{1,9}", text) if self.chunk_size < 100 else []
            for piece in pieces:
                yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
            rest = "" if pieces else text
            yield ChatGenerationChunk(message=AIMessageChunk(content=rest, tool_call_chunks=[call]))

    return Calling


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_size", [9, 100])
def test_an_answer_that_calls_tools_is_not_interrupted(form: str, chunk_size: int) -> None:
    text = "It is bad." if chunk_size < 100 else "It is bad. Look."
    model = calling(text)(write=ANSWERS.__getitem__, chunk_size=chunk_size)
    message = run(form, closed(model), "How is it?")
    assert message.text == text.replace("bad", "good")
    (call,) = message.tool_calls
    assert call["name"] == "look"
    assert len(model.asked) == (2 if "batch" in form else 1)


def test_data_is_left_alone() -> None:
    model = script()
    message = closed(model).invoke("How is it?", response_format={"type": "json_object"})
    assert message.text == ANSWERS[""]
    assert message.response_metadata["aligner"] == {"sentences": 0, "left_alone": "structured output"}


@pytest.mark.parametrize("form", FORMS)
def test_t10_failures(form: str) -> None:
    def rule(question: str, prefix: str, sentence: str) -> str:
        if "bad" in sentence:
            raise RuntimeError("no memory left")
        return sentence

    failing = scripted_aligner(rule)
    with pytest.raises(CorrectionFailedError):
        run(form, closed(script(), failing), "How is it?")
    message = run(form, closed(script(), failing, on_error="pass_through"), "How is it?")
    assert message.text == ANSWERS[""]
    withholding = closed(
        script({"": ANSWERS[""], "Fine. Hm.": " Bye."}), failing, on_error="withhold", withheld_text="Hm."
    )
    assert run(form, withholding, "How is it?").text == "Fine. Hm. Bye."
    with pytest.raises(KeyError):  # upstream's own error, in its second round
        run(form, closed(script({"": ANSWERS[""]})), "How is it?")


@pytest.mark.parametrize("form", ["invoke", "ainvoke", "stream", "astream"])
def test_trace_original_shows_a_run_for_each_round(form: str) -> None:
    tracer = Tracer()
    message = run(form, closed(script(), trace_original=True), "How is it?", {"callbacks": [tracer]})
    assert message.text == SHOWN
    outputs = [repr(one.outputs) for root in tracer.runs for one in (root, *root.child_runs)]
    assert len(outputs) == 3 and sum("So smile" in output for output in outputs) == 2


def test_wrong_options_are_refused() -> None:
    for options in ({"loop": "half"}, {"continuation": "hope"}, {"max_restarts": -1}):
        with pytest.raises(ValidationError, match=next(iter(options))):
            AlignedChatModel(model=script(), **options)
