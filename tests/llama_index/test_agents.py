"""Agents over an `AlignedLLM`: their events, result and memory agree, and their tool calls are untouched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama_index.core.agent.react.formatter import ReActChatFormatter
from llama_index.core.agent.react.output_parser import ReActOutputParser
from llama_index.core.agent.workflow import (
    AgentOutput,
    AgentStream,
    AgentWorkflow,
    CodeActAgent,
    FunctionAgent,
    ReActAgent,
    ToolCall,
    ToolCallResult,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    CompletionResponse,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    ThinkingBlock,
)
from llama_index.core.llms import LLM, CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.memory import BaseMemory, ChatMemoryBuffer
from llama_index.core.tools import BaseTool, FunctionTool
from llama_index.core.workflow import Event
from pydantic import BaseModel

from aligner_integrations import Aligner
from aligner_integrations.errors import CorrectionFailedError
from aligner_integrations.llama_index import AlignedLLM
from aligner_integrations.llama_index.parts import PartReader, Protocol
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.testing.llama_agents import opened
from aligner_integrations.testing.replay_llm import ReplayLLM
from tests.llama_index.engines import (
    ANSWER,
    BAD,
    CORRECTED,
    GOOD,
    failing,
    mending,
    replaying,
    said_to,
)

# Making an agent, LlamaIndex looks at every attribute, deprecated ones of pydantic among them; and a ReAct
# agent asks its context whether it runs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning:inspect"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
]

QUESTION = "How is it treated ?"
Agent: TypeAlias = FunctionAgent | ReActAgent | CodeActAgent | AgentWorkflow


@dataclass
class Ran:
    """What an agent's run has shown: its events, its result and what it keeps."""

    result: AgentOutput
    memory: list[ChatMessage]
    events: list[Event] = field(default_factory=list)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def turns(self) -> list[list[AgentStream]]:
        """The stream of each of the LLM's answers."""
        turns: list[list[AgentStream]] = [[]]
        for event in self.events:
            if isinstance(event, AgentStream):
                turns[-1].append(event)
            elif isinstance(event, AgentOutput):
                turns.append([])
        return turns[:-1]

    @property
    def streamed(self) -> list[str]:
        """The text of each of the LLM's answers: its deltas, which every event has to add up to."""
        texts: list[str] = []
        for turn in self.turns:
            text = ""
            for event in turn:
                text += event.delta
                assert event.response == text
            texts.append(text)
        return texts

    @property
    def kept(self) -> list[str]:
        return [one.content or "" for one in self.memory if one.role == MessageRole.ASSISTANT and one.content]

    def everything(self) -> str:
        return repr([opened(event) for event in self.events]) + repr(self.result) + repr(self.memory)


async def run(agent: Agent, question: str = QUESTION, memory: BaseMemory | None = None) -> Ran:
    memory = memory or ChatMemoryBuffer.from_defaults(token_limit=9000, tokenizer_fn=str.split)
    handler = agent.run(user_msg=question, memory=memory)
    events = [event async for event in handler.stream_events(expose_internal=True)]
    result = await handler
    assert isinstance(result, AgentOutput)
    return Ran(result, await memory.aget_all(), events)


class Clinic:
    """Tools that note how they were called."""

    def __init__(self) -> None:
        self.called: list[dict[str, Any]] = []

    def look_up(self, name: str, notes: list[str] | None = None) -> str:
        """Look up a name."""
        self.called.append({"name": name, "notes": notes})
        return f"{name}: {BAD}"

    @property
    def tools(self) -> list[BaseTool | Callable[..., Any]]:
        return [FunctionTool.from_defaults(self.look_up)]


ARGS = {"name": f"Ann. {BAD}", "notes": ["So. Answer: a. b.", 'He said: "No."', BAD]}
BEFORE = f"I am not sure. {BAD} I look it up"
each_stream = pytest.mark.parametrize("streaming", [True, False])


def shouting() -> Aligner:
    """An aligner that rewrites every sentence."""
    return scripted_aligner(lambda question, prefix, sentence: f"{sentence.upper()}!")


def calling(**options: Any) -> ReplayLLM:
    return replaying(calls=[{"name": "look_up", "args": ARGS}], before_tools=BEFORE, **options)


# Agents that call functions.


@each_stream
@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
async def test_a_function_agent(streaming: bool, chunk_size: int) -> None:
    clinic, upstream = Clinic(), calling(chunk_size=chunk_size)
    agent = FunctionAgent(tools=clinic.tools, llm=AlignedLLM(upstream, mending()), streaming=streaming)
    ran = await run(agent)
    before = BEFORE.replace(BAD, GOOD)
    assert str(ran.result) == CORRECTED and ran.kept == [before, CORRECTED]
    assert [output.response.content for output in ran.of(AgentOutput)[:2]] == [before, CORRECTED]
    if streaming:
        assert ran.streamed == [before, CORRECTED]
    # Tools are called as the LLM asked, and what they give is theirs.
    assert clinic.called == [ARGS]
    assert [event.tool_kwargs for event in ran.of(ToolCall)] == [ARGS]
    (tool_result,) = ran.of(ToolCallResult)
    assert tool_result.tool_output.content == f"{ARGS['name']}: {BAD}"
    assert [selection.tool_kwargs for selection in ran.result.tool_calls] == [ARGS]
    assert said_to(upstream).count(f"assistant: {before}") == 1


def known(name: str) -> str:
    """Look up a name."""
    return "Known."


@each_stream
@pytest.mark.parametrize("kind", ["function", "react", "workflow"])
async def test_no_event_holds_the_raw_text(kind: str, streaming: bool) -> None:
    """Here no tool's argument has it, so that it may be nowhere at all."""
    args = {"name": "Ann"}
    if kind == "react":
        upstream = replaying(lambda prompt: react_turn(prompt, args), is_function_calling_model=False)
    else:
        upstream = replaying(before_tools=BEFORE, calls=[{"name": "look_up", "args": args}], seed=5)
    llm, tools = AlignedLLM(upstream, mending()), [FunctionTool.from_defaults(known, name="look_up")]
    make: dict[str, Callable[[], Agent]] = {
        "function": lambda: FunctionAgent(tools=[*tools], llm=llm, streaming=streaming),
        "react": lambda: ReActAgent(tools=[*tools], llm=llm, streaming=streaming),
        "workflow": lambda: AgentWorkflow.from_tools_or_functions([*tools], llm),
    }
    ran = await run(make[kind]())
    assert str(ran.result) == CORRECTED
    assert BAD not in ran.everything() and GOOD in ran.everything()
    assert BAD not in said_to(upstream)


async def test_each_tool_call_comes_with_the_stream() -> None:
    agent = FunctionAgent(tools=Clinic().tools, llm=AlignedLLM(calling(), mending()))
    ran = await run(agent)
    first, second = ran.turns
    assert [call.tool_kwargs for call in first[-1].tool_calls] == [ARGS]
    assert all(event.tool_calls == [] for event in (*first[:-1], *second))
    assert all(event.raw is None or set(event.raw) == {"usage"} for event in (*first, *second))


@each_stream
@pytest.mark.parametrize("thoughts", [True, False])
async def test_thoughts_beside_tool_calls(streaming: bool, thoughts: bool) -> None:
    text = f"{BAD} {BAD}"
    upstream = replaying(before_tools=text, calls=[{"name": "look_up", "args": {"name": "Ann"}}])
    llm = AlignedLLM(upstream, mending(), thoughts=thoughts)
    ran = await run(FunctionAgent(tools=Clinic().tools, llm=llm, streaming=streaming))
    assert ran.kept == [f"{GOOD} {GOOD if thoughts else BAD}", CORRECTED]
    assert not streaming or ran.streamed == ran.kept


@each_stream
async def test_a_workflow_of_tools_or_functions(streaming: bool) -> None:
    clinic = Clinic()
    workflow = AgentWorkflow.from_tools_or_functions(clinic.tools, AlignedLLM(calling(seed=2), mending()))
    workflow.agents["Agent"].streaming = streaming
    ran = await run(workflow)
    assert isinstance(workflow.agents["Agent"], FunctionAgent)
    assert str(ran.result) == CORRECTED and ran.kept == [BEFORE.replace(BAD, GOOD), CORRECTED]
    assert not streaming or ran.streamed == ran.kept
    assert clinic.called == [ARGS]


def two_agents(one: LLM, other: LLM, *, streaming: bool, clinic: Clinic) -> AgentWorkflow:
    nurse = FunctionAgent(
        name="nurse", description="Listens.", llm=one, can_handoff_to=["doctor"], streaming=streaming
    )
    doctor = FunctionAgent(
        name="doctor", description="Decides.", llm=other, tools=clinic.tools, streaming=streaming
    )
    return AgentWorkflow(agents=[nurse, doctor], root_agent="nurse")


@each_stream
@pytest.mark.parametrize("shared", [True, False])
async def test_a_handoff_between_two_agents(streaming: bool, shared: bool) -> None:
    reason = f"{BAD} So it is."
    handoff = [{"name": "handoff", "args": {"to_agent": "doctor", "reason": reason}}]
    nurse = replaying(before_tools=f"{BAD} I hand off", calls=handoff)
    aligner = mending()
    clinic = Clinic()
    # The tool's message of the handoff is one for the doctor's LLM, too: it answers at once.
    workflow = two_agents(
        AlignedLLM(nurse, aligner),
        AlignedLLM(replaying(), aligner if shared else mending()),
        streaming=streaming,
        clinic=clinic,
    )
    ran = await run(workflow)
    assert [event.current_agent_name for event in ran.of(AgentOutput)][:2] == ["nurse", "doctor"]
    assert str(ran.result) == CORRECTED
    assert ran.kept[0] == f"{GOOD} I hand off" and ran.kept[-1] == CORRECTED
    assert not streaming or ran.streamed == [f"{GOOD} I hand off", CORRECTED]
    (handed,) = ran.of(ToolCall)
    assert handed.tool_kwargs == handoff[0]["args"]
    assert reason in ran.of(ToolCallResult)[0].tool_output.content


async def test_several_runs_with_one_memory() -> None:
    upstream = replaying()
    agent = FunctionAgent(llm=AlignedLLM(upstream, mending()))
    memory = ChatMemoryBuffer.from_defaults(token_limit=9000, tokenizer_fn=str.split)
    for turn in range(1, 4):
        ran = await run(agent, f"{QUESTION} {turn}", memory)
        assert ran.streamed == [CORRECTED] and ran.kept == [CORRECTED] * turn
    assert BAD not in said_to(upstream)


class Thinking(ReplayLLM):
    """Thinks before it speaks, and says so as providers do: a block that grows, and what is new of it."""

    thought: str = f"I wonder. {BAD}"

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        spoken = await super().astream_chat(messages, **kwargs)

        async def said() -> ChatResponseAsyncGen:
            for end in range(3, len(self.thought) + 3, 3):
                message = ChatMessage(role="assistant", blocks=[ThinkingBlock(content=self.thought[:end])])
                given = {"thinking_delta": self.thought[end - 3 : end]}
                yield ChatResponse(message=message, delta="", additional_kwargs=given)
            async for response in spoken:
                response.message.blocks.insert(0, ThinkingBlock(content=self.thought))
                yield response

        return said()


@pytest.mark.parametrize("kind", [FunctionAgent, ReActAgent])
async def test_thinking_deltas_are_passed_on_once_each(kind: type[FunctionAgent | ReActAgent]) -> None:
    text = "Thought: I know.\nAnswer: So it is. Fine." if kind is ReActAgent else "So it is. Fine."
    upstream = Thinking(answer=text)
    ran = await run(kind(llm=AlignedLLM(upstream, shouting())))
    (turn,) = ran.turns
    assert "".join(event.thinking_delta or "" for event in turn) == upstream.thought
    assert ran.streamed == [
        "Thought: I KNOW.!\nAnswer: SO IT IS.! FINE.!" if kind is ReActAgent else "SO IT IS.! FINE.!"
    ]


async def test_a_failing_aligner_fails_the_run_or_does_not() -> None:
    with pytest.raises(CorrectionFailedError):
        await run(FunctionAgent(llm=AlignedLLM(replaying(), failing())))
    llm = AlignedLLM(replaying(), failing(), on_error="withhold", withheld_text="Hm.")
    ran = await run(FunctionAgent(llm=llm))
    assert ran.streamed == ran.kept == [str(ran.result)] == [ANSWER.replace(BAD, "Hm.")]


async def test_a_run_that_is_cancelled_closes_the_llm() -> None:
    upstream = replaying(chunk_size=1, delay=0.001)
    handler = FunctionAgent(llm=AlignedLLM(upstream, mending())).run(user_msg=QUESTION)
    async for event in handler.stream_events():
        if isinstance(event, AgentStream):
            break
    await handler.cancel_run()
    with pytest.raises(Exception):  # noqa: B017  # which one is LlamaIndex's affair
        await handler
    for _ in range(1000):
        if not upstream.open_streams:
            break
        await asyncio.sleep(0)
    assert upstream.open_streams == 0 and upstream.handed_out < len(ANSWER)


@each_stream
async def test_the_last_word_of_an_agent_that_was_stopped(streaming: bool) -> None:
    clinic = Clinic()
    agent = FunctionAgent(
        tools=clinic.tools,
        llm=AlignedLLM(calling(), mending()),
        streaming=streaming,
        early_stopping_method="generate",
    )
    memory = ChatMemoryBuffer.from_defaults(token_limit=9000, tokenizer_fn=str.split)
    handler = agent.run(user_msg=QUESTION, memory=memory, max_iterations=1)
    events = [event async for event in handler.stream_events()]
    result = await handler
    assert BAD not in str(result) and GOOD in str(result)
    texts = [event.delta for event in events if isinstance(event, AgentStream)]
    assert BAD not in "".join(texts)


async def test_many_runs_on_one_llm() -> None:
    def rule(question: str, prefix: str, sentence: str) -> str:
        return sentence.replace(BAD, f"Asked by {question}.")

    upstream = replaying(lambda question: f"I know {question}. {BAD} So says {question}.", seed=1)
    llm = AlignedLLM(upstream, scripted_aligner(rule))
    names = [f"canary-{number}-end" for number in range(30)]
    all_ran = await asyncio.gather(*(run(FunctionAgent(llm=llm), name) for name in names))
    for name, ran in zip(names, all_ran, strict=True):
        text = f"I know {name}. Asked by {name}. So says {name}."
        assert ran.streamed == ran.kept == [str(ran.result)] == [text]


# ReAct agents, whose tool calls are text.

INPUT = json.dumps(ARGS)
ACTION = f"Action: look_up\nAction Input: {INPUT}"
LONG_ACTION = f'{ACTION[:-1]}, "more": "One. Answer: Two. Three. Thought: Four."}}\nObservation: Four. Five.'
THOUGHT = f"I need a tool. {BAD} So I take one."


def react_turn(prompt: str, args: dict[str, Any] = ARGS) -> str:
    """Act first; with an observation in hand, answer."""
    if not prompt.startswith("Observation:") and "Observation: Ann" not in prompt:
        return f"Thought: {THOUGHT}\nAction: look_up\nAction Input: {json.dumps(args)}"
    return f"Thought: I can answer. {BAD}\nAnswer: {ANSWER}"


def reacting(**options: Any) -> ReplayLLM:
    return replaying(react_turn, is_function_calling_model=False, **options)


@each_stream
@pytest.mark.parametrize("is_chat_model", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
async def test_a_react_agent(streaming: bool, is_chat_model: bool, chunk_size: int) -> None:
    clinic, upstream = Clinic(), reacting(chunk_size=chunk_size, is_chat_model=is_chat_model)
    agent = ReActAgent(tools=clinic.tools, llm=AlignedLLM(upstream, mending()), streaming=streaming)
    ran = await run(agent)
    assert str(ran.result) == CORRECTED
    assert clinic.called == [ARGS]
    acted, answered = f"Thought: {THOUGHT.replace(BAD, GOOD)}\n{ACTION}", f"Thought: I can answer. {GOOD}"
    if streaming:
        assert ran.streamed == [acted, f"{answered}\nAnswer: {CORRECTED}"]
    (kept,) = ran.kept
    assert kept.startswith(f"Thought: {THOUGHT.replace(BAD, GOOD)}\nAction: look_up")
    assert kept.endswith(f"{answered}\nAnswer: {CORRECTED}")
    # What the LLM is asked at the next step is the corrected thought, and its own action.
    assert THOUGHT not in said_to(upstream) and THOUGHT.replace(BAD, GOOD) in said_to(upstream)


@each_stream
async def test_a_react_agent_under_an_aligner_that_rewrites_all(streaming: bool) -> None:
    clinic = Clinic()
    agent = ReActAgent(tools=clinic.tools, llm=AlignedLLM(reacting(), shouting()), streaming=streaming)
    ran = await run(agent)
    assert clinic.called == [ARGS]
    shouted = "".join(segment.text for segment in shouting().stream(QUESTION).correct_chunks([ANSWER]))
    assert str(ran.result) == shouted
    if streaming:
        acted, answered = ran.streamed
        assert acted.endswith(f"\n{ACTION}")
        assert acted.startswith("Thought: I NEED A TOOL.! ")
        assert answered.startswith("Thought: I CAN ANSWER.! ") and answered.endswith(f"\nAnswer: {shouted}")


@each_stream
async def test_thoughts_of_a_react_agent_may_be_left_alone(streaming: bool) -> None:
    clinic, upstream = Clinic(), reacting(seed=4)
    llm = AlignedLLM(upstream, mending(), thoughts=False)
    ran = await run(ReActAgent(tools=clinic.tools, llm=llm, streaming=streaming))
    assert str(ran.result) == CORRECTED and clinic.called == [ARGS]
    assert not streaming or ran.streamed == [
        f"Thought: {THOUGHT}\n{ACTION}",
        f"Thought: I can answer. {BAD}\nAnswer: {CORRECTED}",
    ]


@each_stream
async def test_a_workflow_of_a_react_agent(streaming: bool) -> None:
    clinic = Clinic()
    workflow = AgentWorkflow.from_tools_or_functions(clinic.tools, AlignedLLM(reacting(), mending()))
    workflow.agents["Agent"].streaming = streaming
    ran = await run(workflow)
    assert isinstance(workflow.agents["Agent"], ReActAgent)
    assert str(ran.result) == CORRECTED and clinic.called == [ARGS]


class Note(BaseModel):
    """A note."""

    text: str


@each_stream
async def test_what_an_agent_gives_as_data_is_left_alone(streaming: bool) -> None:
    def answer(prompt: str) -> str:
        return json.dumps({"text": BAD}) if "<current_conversation>" in prompt else ANSWER

    llm = AlignedLLM(replaying(answer, is_function_calling_model=False), mending())
    ran = await run(ReActAgent(llm=llm, output_cls=Note, streaming=streaming))
    assert str(ran.result) == CORRECTED
    assert ran.result.structured_response == {"text": BAD}


async def test_predict_and_call_by_react() -> None:
    clinic = Clinic()
    formatter, parser = ReActChatFormatter.from_defaults(), ReActOutputParser()
    given: dict[str, Any] = {"react_chat_formatter": formatter, "output_parser": parser}
    tools: list[BaseTool] = [FunctionTool.from_defaults(clinic.look_up)]
    llm = AlignedLLM(reacting(), shouting())
    response = await llm.apredict_and_call(tools, user_msg=QUESTION, **given)
    assert clinic.called == [ARGS] and response.response == f"{ARGS['name']}: {BAD}"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        # An answer without any mark, as LlamaIndex lets it be.
        ("It is so. Yes", "IT IS SO.! YES!"),
        # After its answer an agent calls no tool, whatever it says.
        (
            "Thought: One.\nAnswer: Two.\nAction: Three.\nFour.",
            "Thought: ONE.!\nAnswer: TWO.!\nACTION: THREE.!\nFOUR.!",
        ),
        ("Thought: One.\nAnswer: Thought: Two. Three", "Thought: ONE.!\nAnswer: THOUGHT: TWO.! THREE!"),
        # An action without an input is none: LlamaIndex has the LLM try again, but the reader has seen it.
        (
            "Thought: One.\nAction: None\nAnswer: Two. Three",
            "Thought: ONE.!\nAction: None\nAnswer: TWO.! THREE!",
        ),
        ("Thought: One. Action: none. Answer: Two.", "Thought: ONE.! Action: none. Answer: TWO.!"),
        ("One. Action Input: Two. Three", "ONE.! ACTION INPUT: TWO.! THREE!"),
        # A thought may come before its mark, and marks in words are none.
        (f"I look.\n{ACTION}", f"I LOOK.!\n{ACTION}"),
        ("Thought: One ReAction: Two. Three", "Thought: ONE REACTION: TWO.! THREE!"),
        (f"Thought: One.\nThought: Two.\n{ACTION}", f"Thought: ONE.!\nThought: TWO.!\n{ACTION}"),
        ("Thought: One.\nAction: look_up\nThought: Two.", "Thought: ONE.!\nAction: look_up\nThought: TWO.!"),
        # What an input is made of is nobody's but the tool's.
        (f"Thought: One.\n{LONG_ACTION}", f"Thought: ONE.!\n{LONG_ACTION}"),
    ],
)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 1000])
def test_marks(said: str, shown: str, chunk_size: int) -> None:
    llm = AlignedLLM(replaying(said, chunk_size=chunk_size), shouting())
    messages = ReActAgent(llm=llm).formatter.format([], [ChatMessage(role="user", content=QUESTION)])
    assert llm.chat(messages).message.content == shown
    assert "".join(part.delta or "" for part in llm.stream_chat(messages)) == shown


WORDS = (
    *("Thought:", "Answer:", "Action:", "Action Input:", "Action", "Input:", " ", "\n", "Re", '{"a": "b."}'),
    *("It is bad. ", "No", "Thoughtful", "Answ", "er:", ":", "<execute>", "</execute>", "<", "x = 1. y"),
)
MARKED = st.lists(st.sampled_from(WORDS), max_size=14).map("".join)
PROTOCOLS: list[Protocol | None] = ["react", "code", None]


@settings(max_examples=300)
@given(
    text=MARKED,
    cuts=st.lists(st.integers(1, 9), max_size=60),
    protocol=st.sampled_from(PROTOCOLS),
)
@example(text="Thought:Answer: a", cuts=[8], protocol="react")
def test_marks_are_found_wherever_the_text_is_cut(
    text: str, cuts: list[int], protocol: Protocol | None
) -> None:
    def parts_of(chunks: Sequence[str]) -> list[tuple[str, str]]:
        reader = PartReader(protocol)
        parts = [part for chunk in chunks for part in reader.read(chunk)] + reader.read("", last=True)
        whole: list[tuple[str, str]] = []
        for kind, part in parts:
            if whole and whole[-1][0] == kind:
                whole[-1] = (kind, whole[-1][1] + part)
            else:
                whole.append((kind, part))
        return whole

    chunks, rest = [], text
    for size in cuts:
        chunks.append(rest[:size])
        rest = rest[size:]
    parts = parts_of([*chunks, rest])
    assert parts == parts_of([text])
    assert "".join(part for _, part in parts) == text


async def test_only_the_system_can_ask_for_marks() -> None:
    """Else a user could have text pass uncorrected."""
    llm = AlignedLLM(replaying(f"Thought: a.\n{ACTION}"), shouting())
    for role in ("user", "assistant", "tool"):
        asking = ChatMessage(role=role, content="Write Action Input: and <execute>.")
        messages = [asking, ChatMessage(role="user", content=QUESTION)]
        text = llm.chat(messages).message.content or ""
        assert text.startswith("THOUGHT: A.!") and ACTION not in text


# Agents that write code.


CODE = 'print("It is. So."); x = 1. + 2.\nprint(x)'


def code_turn(question: str) -> str:
    return f"I compute. {BAD}\n<execute>\n{CODE}\n</execute>\n{BAD} Wait"


class CodeLLM(CustomLLM):
    """An LLM that calls no functions: it writes code first, and then answers."""

    chunk_size: int = 3

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata()

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text=ANSWER if "It ran." in prompt else code_turn(prompt))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        text = self.complete(prompt).text

        def said() -> CompletionResponseGen:
            for at in range(0, len(text), self.chunk_size):
                end = at + self.chunk_size
                yield CompletionResponse(text=text[:end], delta=text[at:end])

        return said()


@each_stream
@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
async def test_a_code_agent(streaming: bool, chunk_size: int) -> None:
    ran_code: list[str] = []

    def execute(code: str) -> str:
        """Run code."""
        ran_code.append(code)
        return "It ran."

    llm = AlignedLLM(CodeLLM(chunk_size=chunk_size), mending())
    ran = await run(CodeActAgent(code_execute_fn=execute, llm=llm, streaming=streaming))
    assert ran_code == [CODE]
    assert str(ran.result) == CORRECTED
    assert BAD not in ran.everything()
    assert not streaming or ran.streamed == [code_turn("").replace(BAD, GOOD), CORRECTED]


@each_stream
async def test_a_code_agent_that_may_hand_off(streaming: bool) -> None:
    """Then LlamaIndex asks with tools, and the code is text all the same."""
    ran_code: list[str] = []

    def execute(code: str) -> str:
        """Run code."""
        ran_code.append(code)
        return "It ran."

    class Coding(ReplayLLM):
        def _turn(self, prompt: str | list[ChatMessage]) -> tuple[str, list[dict[str, Any]]]:
            return (CORRECTED if "It ran." in repr(prompt) else code_turn("")), []

    llm = AlignedLLM(Coding(answer=""), shouting())
    coder = CodeActAgent(
        name="coder", description="Codes.", code_execute_fn=execute, llm=llm, streaming=streaming
    )
    other = FunctionAgent(name="other", description="Answers.", llm=llm)
    ran = await run(AgentWorkflow(agents=[coder, other], root_agent="coder"))
    assert ran_code == [CODE]
    assert str(ran.result).startswith("ACINETOBACTER") and BAD not in ran.everything()
