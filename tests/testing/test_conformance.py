"""The conformance kit finds each fault on the surface where it is, and none where there is none."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import PIIMiddleware
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import Runnable
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from aligner_integrations.langchain import AlignedChatModel, AlignerRunnable
from aligner_integrations.testing import conformance, scripted_aligner
from aligner_integrations.testing.conformance import Report, Surface, check
from tests.testing import guards
from tests.testing.guards import ANSWER, CANARY, CLEAN, HIDDEN, PROMPT, SENTENCES, upstream

ALIGNER = scripted_aligner(lambda question, prefix, sentence: sentence.replace(CANARY, HIDDEN))
STREAMED = {"stream", "astream", "events v2"}
# A chain's callbacks and tracers are told the whole output of a stream at its end.
ALL_STREAMED = STREAMED | {"callbacks", "tracer"}


def faults(report: Report) -> dict[str, tuple[str, ...]]:
    return {surface.name: surface.faults for surface in report.failures}


def test_a_clean_guard_comes_out_clean_and_holds_one_sentence() -> None:
    model = upstream()
    target = PROMPT | model | guards.Guard(pieces=guards.by_sentence)
    report = check(target, canary=CANARY, expected=CLEAN, upstream=model)
    assert report.clean and not report.failures, str(report)
    report.assert_clean()
    stream = report["stream"]
    assert (stream.chunks, stream.leaked, stream.lost, stream.duplicated) == (3, 0, 0, 0)
    assert stream.held is not None and len(SENTENCES[0]) <= stream.held < len(SENTENCES[0]) + 8
    assert report["invoke"].held == len(ANSWER)


@pytest.mark.parametrize(
    ("pieces", "where", "found"),
    [
        (guards.raw, ALL_STREAMED, {"leaks", "loses", "adds"}),
        (guards.cut_in_two, ALL_STREAMED, {"leaks", "loses", "adds"}),
        (guards.without_last_piece, ALL_STREAMED, {"loses"}),
        (guards.without_a_space, ALL_STREAMED, {"loses"}),
        (guards.one_sentence_twice, ALL_STREAMED, {"duplicates"}),
        (guards.all_again_at_the_end, ALL_STREAMED, {"duplicates"}),
        (guards.one_word_more, ALL_STREAMED, {"adds"}),
    ],
    ids=lambda given: getattr(given, "__name__", None),
)
def test_a_fault_of_streams_is_found_on_streams_alone(
    pieces: Callable[[Iterator[str]], Iterator[str]], where: set[str], found: set[str]
) -> None:
    report = check(guards.chain(pieces), canary=CANARY)
    assert {name: set(what) for name, what in faults(report).items()} == dict.fromkeys(where, found)


@pytest.mark.parametrize(
    ("pieces", "column", "amount"),
    [
        (guards.raw, "leaked", len(CANARY)),
        (guards.cut_in_two, "leaked", len(CANARY)),
        (guards.without_last_piece, "lost", len(SENTENCES[-1])),
        (guards.without_a_space, "lost", 1),
        (guards.one_sentence_twice, "duplicated", len(SENTENCES[0])),
        (guards.all_again_at_the_end, "duplicated", len(CLEAN)),
        (guards.one_word_more, "foreign", len(" Ζωή!")),
    ],
)
def test_faults_are_counted_in_characters(pieces: Any, column: str, amount: int) -> None:
    report = check(guards.chain(pieces), canary=CANARY, expected=CLEAN, surfaces=["stream"])
    assert getattr(report["stream"], column) == amount


def test_a_guard_that_holds_all_is_clean_and_its_column_says_so() -> None:
    model = upstream()
    target = PROMPT | model | guards.Guard(pieces=guards.all_at_once)
    report = check(target, canary=CANARY, upstream=model, surfaces=["stream", "astream"])
    assert report.clean and [surface.held for surface in report.surfaces] == [len(ANSWER)] * 2


def test_what_is_raised_is_found_on_the_surface_that_raises() -> None:
    report = check(guards.chain(guards.by_sentence, fails_in="ainvoke"), canary=CANARY, expected=CLEAN)
    assert {name for name, what in faults(report).items() if "raises" in what} == {"ainvoke", "abatch"}
    assert set(faults(report)) == {"ainvoke", "abatch"}
    assert report["ainvoke"].error == "RuntimeError: no loop for me"
    with pytest.raises(AssertionError, match=r"not clean: ainvoke, abatch(.|\n)*no loop for me"):
        report.assert_clean()


def test_an_error_that_tells_the_canary_leaks() -> None:
    def tell(chunks: Iterator[str]) -> Iterator[str]:
        raise ValueError(f"refused: {''.join(chunks)}")
        yield

    report = check(guards.chain(tell), canary=CANARY, expected=CLEAN, surfaces=["stream"])
    assert report["stream"].leaked == len(CANARY)


def test_a_leak_of_invoke_does_not_excuse_the_others() -> None:
    report = check(guards.chain(guards.raw, whole=str), canary=CANARY)
    assert all("leaks" in surface.faults for surface in report.surfaces if surface.judged)


def test_a_final_message_that_is_not_the_stream_differs() -> None:
    def answer(state: MessagesState) -> dict[str, list[BaseMessage]]:
        message = AlignedChatModel(model=upstream(), aligner=ALIGNER).invoke(state["messages"])
        return {"messages": [message.model_copy(update={"content": "Something else."})]}

    graph: Any = StateGraph(MessagesState)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    report = check(graph.compile(), canary=CANARY, expected=CLEAN)
    assert report["messages"].faults == ("differs",)
    assert report["events v3"].faults == ("differs",)
    assert report["stored state"].equal is None and report["stored state"].lost


def test_metadata_is_searched_too() -> None:
    model = guards.WithMetadata(answer=CLEAN, delay=0.0)
    report = check(model, canary=CANARY, expected=CLEAN)
    assert faults(report)["stream"] == ("leaks",) and "invoke" not in faults(report)


def test_what_goes_in_is_no_leak() -> None:
    report = check(
        create_agent(AlignedChatModel(model=upstream(), aligner=ALIGNER)),
        canary=CANARY,
        question=f"Is {CANARY} right?",
        expected=CLEAN,
    )
    report.assert_clean()


@pytest.mark.parametrize("seed", range(3))
def test_the_corrected_chat_model_is_clean(seed: int) -> None:
    model = upstream(seed=seed)
    aligned = AlignedChatModel(model=model, aligner=ALIGNER)
    report = check(aligned, canary=CANARY, expected=CLEAN, upstream=model)
    report.assert_clean()
    held = report["stream"].held
    assert held is not None and held < 2 * len(SENTENCES[0])


def test_the_aligner_as_last_step_is_clean_and_its_model_is_not_judged() -> None:
    report = check(PROMPT | upstream() | AlignerRunnable(ALIGNER), canary=CANARY, expected=CLEAN)
    report.assert_clean()
    apart = [surface for surface in report.surfaces if not surface.judged]
    assert [surface.name for surface in apart] == [
        f"{name}, model runs" for name in ("events v2", "callbacks", "tracer")
    ]
    assert all(surface.leaked == len(CANARY) for surface in apart)
    assert str(report).count("not judged") == 3


@pytest.mark.parametrize("target", ["parsed", "before the parser"])
def test_text_chains_are_clean(target: str) -> None:
    guard = AlignerRunnable(ALIGNER)
    steps: Runnable[Any, Any] = StrOutputParser() | guard if target == "parsed" else guard | StrOutputParser()
    check(PROMPT | upstream() | steps, canary=CANARY, expected=CLEAN).assert_clean()


@tool
def look_up(name: str) -> str:
    """Look a name up."""
    return f"{name} is in the book."


@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize("calls", [False, True])
def test_agents_around_the_corrected_chat_model_are_clean(remembers: bool, calls: bool) -> None:
    given = {"calls": [{"name": "look_up", "args": {"name": "Ann"}}], "before_tools": f"I ask {CANARY}."}
    model = upstream(**(given if calls else {}))
    agent = create_agent(
        AlignedChatModel(model=model, aligner=ALIGNER),
        tools=[look_up] if calls else [],
        checkpointer=InMemorySaver() if remembers else None,
    )
    report = check(agent, canary=CANARY, expected=CLEAN, upstream=model)
    report.assert_clean()
    assert report["stored state"].lost == 0 and report["messages"].equal is True


def test_text_beside_tool_calls_is_searched() -> None:
    given = {"calls": [{"name": "look_up", "args": {"name": "Ann"}}], "before_tools": f"I ask {CANARY}."}
    agent = create_agent(upstream(chunks=[CLEAN], answer="", **given), tools=[look_up])
    report = check(agent, canary=CANARY, expected=CLEAN)
    leaking = {name for name, what in faults(report).items() if what == ("leaks",)}
    assert leaking == {surface.name for surface in report.surfaces} - {"custom", "async custom"}


def test_a_second_copy_under_another_id_is_a_duplicate() -> None:
    def answer(state: MessagesState) -> dict[str, list[BaseMessage]]:
        message = AlignedChatModel(model=upstream(), aligner=ALIGNER).invoke(state["messages"])
        return {"messages": [AIMessage(message.text, id="another")]}

    graph: Any = StateGraph(MessagesState)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    report = check(graph.compile(), canary=CANARY, expected=CLEAN, surfaces=["messages", "updates"])
    assert report["messages"].duplicated == len(CLEAN) and report["updates"].clean


def test_pii_middleware_as_installed() -> None:
    model = upstream()
    redact = PIIMiddleware("email", strategy="redact", apply_to_output=True)
    report = check(create_agent(model, middleware=[redact]), canary=CANARY, expected=CLEAN, upstream=model)
    leaking = {surface.name for surface in report.surfaces if surface.leaked == len(CANARY)}
    assert leaking == {
        *("messages", "async messages", "updates", "async updates", "values", "async values"),
        *("events v2", "callbacks", "tracer"),
    }
    assert {surface.name for surface in report.failures} == leaking
    assert report["events v3"].held == len(ANSWER)


class Showing(BaseCallbackHandler):
    """A handler that shows a sentence once it is whole; `early` shows raw tokens instead."""

    def __init__(self, sink: Callable[[Any], None], *, early: bool = False) -> None:
        self.sink, self.early, self.text, self.streamed = sink, early, "", False

    def on_llm_new_token(self, token: Any, *, chunk: Any = None, **kwargs: Any) -> None:
        self._take(str(chunk.text) if chunk is not None else str(token))

    def on_stream_event(self, event: Any, **kwargs: Any) -> None:
        if event["event"] == "content-block-delta":
            self._take(event["delta"].get("text", ""))

    def _take(self, text: str) -> None:
        self.streamed = True
        self.text += text
        if self.early:
            self.sink(text)
            return
        *whole, self.text = self.text.replace(". ", ". \0").split("\0")
        for sentence in whole:
            self.sink(sentence.replace(CANARY, HIDDEN))

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        if not self.streamed:
            self._take(response.generations[0][0].text)
        if not self.early:
            self.sink(self.text.replace(CANARY, HIDDEN))


class AsyncShowing(AsyncCallbackHandler):
    def __init__(self, sink: Callable[[Any], None]) -> None:
        self.inner = Showing(sink)

    async def on_llm_new_token(self, token: Any, *, chunk: Any = None, **kwargs: Any) -> None:
        await asyncio.sleep(0)
        self.inner.on_llm_new_token(token, chunk=chunk)

    async def on_stream_event(self, event: Any, **kwargs: Any) -> None:
        self.inner.on_stream_event(event)

    async def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.inner.on_llm_end(response)


def test_a_callback_handler_is_judged_by_its_sink() -> None:
    report = check(Showing, canary=CANARY, expected=CLEAN, upstream=upstream())
    report.assert_clean()
    assert len(report.surfaces) == 10 and report["stream"].chunks == 3
    assert report["stream"].held is not None and report["stream"].held < len(ANSWER) / 2
    early = check(lambda sink: Showing(sink, early=True), canary=CANARY, upstream=upstream())
    assert all(surface.leaked == len(CANARY) for surface in early.surfaces)


def test_an_async_handler_is_driven_in_async_runs() -> None:
    report = check(AsyncShowing, canary=CANARY, upstream=upstream())
    report.assert_clean()
    assert [surface.name for surface in report.surfaces] == [
        *("ainvoke", "astream", "events v3 async", "chain async", "graph async")
    ]


def test_a_sink_takes_segments() -> None:
    @dataclasses.dataclass
    class Segment:
        original: str
        text: str

    def make(sink: Callable[[Any], None]) -> Showing:
        return Showing(lambda text: sink(Segment("raw", text)))

    check(make, canary=CANARY, expected=CLEAN, upstream=upstream(), surfaces=["stream"]).assert_clean()


async def test_it_works_inside_a_running_loop() -> None:
    report = check(AlignedChatModel(model=upstream(), aligner=ALIGNER), canary=CANARY, expected=CLEAN)
    report.assert_clean()


def test_settings_of_the_caller_reach_every_run() -> None:
    heard: list[str] = []

    class Counting(BaseCallbackHandler):
        def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
            heard.append(kwargs["metadata"]["who"])

    check(
        upstream(answer=ANSWER),
        canary=CANARY,
        input=[HumanMessage("Who?")],
        config={"callbacks": [Counting()], "metadata": {"who": "me"}},
        surfaces=["invoke", "stream", "events v2", "callbacks", "tracer"],
    )
    assert heard == ["me"] * 5  # one run for each surface


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"canary": ""}, ValueError, "canary is empty"),
        ({"canary": 3}, TypeError, "canary must be a str"),
        ({"canary": "unsaid"}, ValueError, "not in upstream's answer"),
        ({"expected": ANSWER}, ValueError, "canary is part of expected"),
        ({"upstream": "model"}, TypeError, "upstream must be a chat model"),
        ({"surfaces": ["streams"]}, ValueError, "surfaces has 'streams'.*'stream'"),
        ({"surfaces": "stream"}, TypeError, "surfaces is a str"),
        ({"target": 3}, TypeError, "target is a int"),
        ({"target": Showing(print)}, TypeError, "a function that makes one"),
        ({"target": lambda sink: sink}, TypeError, "must return a callback handler"),
        ({"target": Showing, "upstream": None}, ValueError, "upstream is needed"),
    ],
)
def test_what_cannot_be_checked_is_refused(given: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments: dict[str, Any] = {"canary": CANARY, "upstream": upstream(), **given}
    with pytest.raises(error, match=says):
        check(arguments.pop("target", PROMPT | upstream()), **arguments)


def test_a_replayed_answer_needs_one_text() -> None:
    with pytest.raises(ValueError, match="answer is empty"):
        conformance.ReplayModel()
    with pytest.raises(ValueError, match="do not join"):
        conformance.ReplayModel(answer="one", chunks=["t", "wo"])
    cut = [chunk.text for chunk in upstream(seed=3).stream("?") if chunk.text]
    assert "".join(cut) == ANSWER and len(set(map(len, cut))) > 2
    assert [chunk.text for chunk in conformance.ReplayModel(chunks=["t", "wo"]).stream("?")][:2] == [
        "t",
        "wo",
    ]


def test_the_table_has_a_row_for_each_surface() -> None:
    report = Report((Surface(name="one", leaked=3, equal=False), Surface(name="two", judged=False)))
    assert not report.clean
    assert str(report).splitlines()[2:] == [
        "| one | 3 | - | - | - | - | 0 | no | leaks, differs |",
        "| two | 0 | - | - | - | - | 0 | - | not judged |",
    ]


PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"


def without_held(table: str) -> list[str]:
    """A table's rows without what depends on how two threads take turns."""
    rows = [line.split(" | ") for line in table.splitlines()]
    return [" | ".join(row[:5] + row[6:]) for row in rows]


# LlamaIndex's own: making an agent reads what pydantic deprecates.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning:inspect")
def test_the_tables_of_the_page_are_what_the_kit_prints() -> None:
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(block, names)
    for name in ("pii", "ours"):
        table = re.search(rf"^`print\({name}\)`.*?\n\n((?:\|.*\n)+)", text, re.MULTILINE)
        assert table is not None
        assert without_held(table[1].rstrip()) == without_held(str(names[name]))
    assert f"langchain {version('langchain')}:" in text


WITHOUT_LANGCHAIN = """
import sys
sys.modules["langchain_core"] = None
import aligner_integrations.testing
from aligner_integrations.errors import MissingDependencyError
try:
    import aligner_integrations.testing.conformance
except MissingDependencyError as error:
    print(error)
"""


def test_only_the_kit_needs_langchain() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_LANGCHAIN],
        cwd=PAGE.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'pip install "aligner-integrations[langchain]"' in ran.stdout
