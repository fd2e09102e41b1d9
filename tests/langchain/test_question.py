"""Which question an answer is corrected against: found in every shape of chain, never guessed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompt_values import StringPromptValue
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import (
    Runnable,
    RunnableBranch,
    RunnableConfig,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
)
from langchain_core.runnables.history import RunnableWithMessageHistory
from langgraph.graph import END, START, MessagesState, StateGraph

from aligner_integrations.errors import QuestionNotFoundError
from aligner_integrations.langchain import AlignerRunnable
from aligner_integrations.langchain.question import question_text
from tests.langchain.forms import FORMS, ask, model, tell, text_of
from tests.langchain.forms import run as run_form

ANSWER = "It is so."


def run(form: str, runnable: Runnable[Any, Any], given: Any, config: RunnableConfig | None = None) -> str:
    return text_of(run_form(form, runnable, given, config))


def rewritten() -> Runnable[Any, Any]:
    """A first model rewrites the question, a second one answers."""
    second = ChatPromptTemplate.from_messages([("human", "Say: {text}")])
    return (
        ask() | model("Which bears?") | StrOutputParser() | {"text": RunnablePassthrough()} | second | model()
    )


def branching() -> Runnable[Any, Any]:
    """A model decides which branch answers."""
    decide = ask(words="Is {%s} an animal?") | model("yes") | (lambda message: message.text == "yes")
    return RunnableBranch((decide, ask() | model()), ask(words="Never {%s}") | model())


def failing() -> Runnable[Any, Any]:
    """The first chain fails after its model has answered; the second one takes over."""

    def fail(message: BaseMessage) -> BaseMessage:
        raise ValueError("no good")

    return (ask(words="First {%s}") | model() | fail).with_fallbacks([ask() | model()])


def inner_twice() -> Runnable[Any, Any]:
    inner = (ask() | model()).with_config(run_name="a")
    return (inner | StrOutputParser()).with_config(run_name="b")


def calling_inside() -> Runnable[Any, Any]:
    return RunnableLambda(lambda given: (ask() | model()).invoke(given))


def calling_twice_the_same() -> Runnable[Any, Any]:
    """A loop, as in an agent: the same human message goes to the model again and again."""

    def loop(given: dict[str, str]) -> str:
        upstream = ask() | model() | StrOutputParser()
        upstream.invoke(given)
        return upstream.invoke(given)

    return RunnableLambda(loop)


def with_retriever() -> Runnable[Any, Any]:
    retrieve: Runnable[Any, str] = RunnableLambda(lambda given: f"documents on {given['topic']}")
    return RunnablePassthrough.assign(documents=retrieve) | ask() | model()


def with_model_in_retriever() -> Runnable[Any, Any]:
    return RunnablePassthrough.assign(queries=ask(words="Queries for {%s}") | model()) | ask() | model()


UPSTREAM: dict[str, Callable[[], Runnable[Any, Any]]] = {
    "plain": lambda: ask() | model(),
    "parser": lambda: ask() | model() | StrOutputParser(),
    "bound": lambda: ask() | model().bind(stop=["no"]),
    "retried": lambda: ask() | model().with_retry(),
    "named inner chain": lambda: (ask() | model()).with_config(run_name="inner"),
    "inner chain at the end": lambda: ask() | (model() | StrOutputParser()).with_config(run_name="inner"),
    "inner chain twice": inner_twice,
    "branch after a deciding model": branching,
    "fallback after a failure": failing,
    "model called in a function": calling_inside,
    "same question twice in a function": calling_twice_the_same,
    "retriever": with_retriever,
    "model in the retriever": with_model_in_retriever,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", UPSTREAM)
def test_last_human_message_of_the_model_upstream(name: str, form: str) -> None:
    # As text the answer has lost the id that would name its model: the order of the steps must do.
    chained = UPSTREAM[name]() | StrOutputParser() | AlignerRunnable(tell())
    assert run(form, chained, {"topic": "bears"}) == "<What of bears?>"


@pytest.mark.parametrize("form", FORMS)
def test_messages_too(form: str) -> None:
    chained = ask() | model() | AlignerRunnable(tell())
    assert run(form, chained, {"topic": "bears"}) == "<What of bears?>"


@pytest.mark.parametrize("form", FORMS)
def test_last_model_before_the_aligner_counts(form: str) -> None:
    aligned = StrOutputParser() | AlignerRunnable(tell())
    assert run(form, rewritten() | aligned, {"topic": "bears"}) == "<Say: Which bears?>"
    nested = rewritten().with_config(run_name="inner") | aligned
    assert run(form, nested, {"topic": "bears"}) == "<Say: Which bears?>"


@pytest.mark.parametrize("form", FORMS)
def test_models_after_the_aligner_do_not_count(form: str) -> None:
    further: Runnable[Any, dict[str, str]] = RunnableLambda(lambda message: {"topic": text_of(message)})
    chained = ask() | model() | AlignerRunnable(tell()) | further | ask(words="Then {%s}") | model("So.")
    assert run(form, chained, {"topic": "bears"}) == "So."
    again = chained | AlignerRunnable(tell())
    assert run(form, again, {"topic": "bears"}) == "<Then <What of bears?>>"


@pytest.mark.parametrize("form", FORMS)
def test_several_aligners_in_one_chain(form: str) -> None:
    chained = ask() | model() | AlignerRunnable(tell()) | StrOutputParser() | AlignerRunnable(tell())
    assert run(form, chained, {"topic": "bears"}) == "<What of bears?>"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", ["question", "input", "query"])
def test_input_of_the_chain_comes_before_the_models_message(form: str, key: str) -> None:
    chained = ask(key) | model() | AlignerRunnable(tell())
    assert run(form, chained, {key: "bears"}) == "<bears>"


@pytest.mark.parametrize("form", FORMS)
def test_documents_in_the_human_message_are_no_question(form: str) -> None:
    """A chain that streams does not record its input; its prompt's input tells."""
    gather = RunnableParallel(context=RunnableLambda(lambda text: "docs"), question=RunnablePassthrough())
    prompt = ChatPromptTemplate.from_template("Answer from this: {context}. Question: {question}")
    chained = gather | prompt | model() | StrOutputParser() | AlignerRunnable(tell())
    assert run(form, chained, "What of bears?") == "<What of bears?>"


@pytest.mark.parametrize("form", ["stream", "astream"])
def test_the_first_prompt_holds_what_was_asked(form: str) -> None:
    """A chain may ask its own questions on the way: the user's is the one that went in first."""
    rephrase = ask("question") | model("And bees?") | StrOutputParser() | (lambda text: {"question": text})
    chained = rephrase | ask("question") | model() | AlignerRunnable(tell())
    assert text_of(run(form, chained, {"question": "bears"})) == "<bears>"


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_failed_is_no_rival(form: str) -> None:
    def answer(topic: str) -> str:
        try:
            first.invoke("First?")
        except ConnectionError:
            return str(model().invoke("Second?").text)
        raise AssertionError("the first model did not fail")

    class Failing(FakeListChatModel):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            raise ConnectionError

    first = Failing(responses=[])
    chained = RunnableLambda(answer) | AlignerRunnable(tell(), question_key="none")
    assert run(form, chained, {"topic": "bears"}) == "<Second?>"


def test_keys_are_tried_in_order() -> None:
    everything = {"messages": [("human", "d")], "query": "c", "input": "b", "question": "a"}
    chained = ask() | model() | AlignerRunnable(tell())
    for expected in "abcd":
        assert run("invoke", chained, everything | {"topic": "x"}) == f"<{expected}>"
        everything.pop({"a": "question", "b": "input", "c": "query", "d": "messages"}[expected])


def test_question_key_names_the_key() -> None:
    chained = ask("asked") | model() | AlignerRunnable(tell(), question_key="asked")
    assert run("invoke", chained, {"asked": "bears", "question": "no"}) == "<bears>"


@pytest.mark.parametrize("form", FORMS)
def test_plain_text_into_a_retrieval_chain(form: str) -> None:
    prompt = ChatPromptTemplate.from_messages([("human", "{question}")])
    gather = RunnableParallel(context=RunnableLambda(lambda text: "docs"), question=RunnablePassthrough())
    chained = gather | prompt | model() | StrOutputParser() | AlignerRunnable(tell())
    assert run(form, chained, "What of bears?") == "<What of bears?>"


@pytest.mark.parametrize("form", FORMS)
def test_messages_into_a_model(form: str) -> None:
    messages = [
        SystemMessage("Be brief."),
        HumanMessage("What of bears?"),
        AIMessage("?"),
        HumanMessage("Bears!"),
    ]
    assert run(form, model() | AlignerRunnable(tell()), messages) == "<Bears!>"


@pytest.mark.parametrize("form", FORMS)
def test_configured_question_comes_before_the_chain(form: str) -> None:
    config: RunnableConfig = {"configurable": {"question": "configured"}}
    chained = ask("question") | model() | AlignerRunnable(tell())
    assert run(form, chained, {"question": "bears"}, config) == "<configured>"


@pytest.mark.parametrize("form", FORMS)
def test_question_in_the_input_comes_before_everything(form: str) -> None:
    config: RunnableConfig = {"configurable": {"question": "configured"}}
    chained = RunnablePassthrough.assign(answer=ask() | model() | StrOutputParser()) | AlignerRunnable(tell())
    given = {"question": "given", "topic": "bears"}
    assert run_form(form, chained, given, config) == {**given, "answer": "<given>"}


@pytest.mark.parametrize("form", FORMS)
def test_answer_of_a_plain_generator_with_a_configured_question(form: str) -> None:
    def words(given: Iterator[str]) -> Iterator[str]:
        for _ in given:
            yield from ("It ", "is ", "so.")

    async def awords(given: AsyncIterator[str]) -> AsyncIterator[str]:
        async for _ in given:
            for word in ("It ", "is ", "so."):
                yield word

    from langchain_core.runnables import RunnableGenerator

    chained = RunnableGenerator(words, awords) | AlignerRunnable(tell())
    config: RunnableConfig = {"configurable": {"question": "configured"}}
    assert run(form, chained, "anything", config) == "<configured>"


def test_answer_of_a_plain_function() -> None:
    answer: Runnable[Any, str] = RunnableLambda(lambda given: f" {ANSWER} ")
    assert run("invoke", answer | AlignerRunnable(tell()), "What of bears?").strip() == "<What of bears?>"
    assert run("invoke", answer | AlignerRunnable(tell()), {"question": "bears"}).strip() == "<bears>"
    # The inner chain's input is a bare text too, but it is the raw answer.
    tidy = (RunnableLambda(str.strip) | AlignerRunnable(tell())).with_config(run_name="inner")
    assert run("invoke", answer | tidy, "What of bears?") == "<What of bears?>"


@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning")
@pytest.mark.parametrize("form", ["invoke", "ainvoke", "stream", "astream"])
def test_chat_history(form: str) -> None:
    prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "What of {topic}?")])
    history = InMemoryChatMessageHistory()
    chained = RunnableWithMessageHistory(
        prompt | model() | AlignerRunnable(tell()),
        lambda session_id: history,
        input_messages_key="topic",
        history_messages_key="history",
    )
    config: RunnableConfig = {"configurable": {"session_id": "1"}}
    assert run(form, chained, {"topic": "bears"}, config) == "<What of bears?>"
    assert run(form, chained, {"topic": "bees"}, config) == "<What of bees?>"
    assert history.messages[-1].text == "<What of bees?>"


def graph_of_one_node() -> Any:
    chained = model() | AlignerRunnable(tell())
    graph = StateGraph(MessagesState)
    graph.add_node("answer", lambda state: {"messages": [chained.invoke(state["messages"])]})
    graph.add_edge(START, "answer")
    graph.add_edge("answer", END)
    return graph.compile()


def graph_of_two_nodes() -> Any:
    aligner = AlignerRunnable(tell())
    graph = StateGraph(MessagesState)
    graph.add_node("answer", lambda state: {"messages": [model().invoke(state["messages"])]})
    graph.add_node("align", lambda state: {"messages": [aligner.invoke(state["messages"][-1])]})
    graph.add_edge(START, "answer")
    graph.add_edge("answer", "align")
    graph.add_edge("align", END)
    return graph.compile()


@pytest.mark.parametrize("form", ["invoke", "ainvoke"])
@pytest.mark.parametrize("graph", [graph_of_one_node, graph_of_two_nodes])
def test_nodes_of_a_graph(graph: Callable[[], Any], form: str) -> None:
    result = run_form(form, graph(), {"messages": [("human", "What of bears?")]})
    assert result["messages"][-1].text == "<What of bears?>"


NOT_FOUND: dict[str, tuple[Callable[[Runnable[Any, Any]], Runnable[Any, Any]], Any]] = {
    "alone": (lambda aligner: aligner, ANSWER),
    "first in its chain": (lambda aligner: aligner | StrOutputParser(), ANSWER),
    "fed by a parallel step": (lambda aligner: RunnableParallel(aligned=aligner), ANSWER),
    "fed by a chain in a function": (
        lambda aligner: RunnableLambda(lambda text: (RunnableLambda(str.upper) | aligner).invoke(text)),
        ANSWER,
    ),
    "fed by a function": (
        lambda aligner: RunnableLambda(lambda text: aligner.invoke(f"{text} Yes.")),
        ANSWER,
    ),
    "unknown key": (lambda aligner: RunnableLambda(lambda given: ANSWER) | aligner, {"topic": "bears"}),
    "the answer under a known key": (
        lambda aligner: (lambda given: given["input"]) | aligner,
        {"input": ANSWER},
    ),
    "no human message": (lambda aligner: model() | aligner, [SystemMessage("Be brief.")]),
    "picture only": (
        lambda aligner: model() | aligner,
        [HumanMessage([{"type": "image", "url": "https://example.org/bear.png"}])],
    ),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_not_found_is_an_error_that_names_the_cures(name: str) -> None:
    build, given = NOT_FOUND[name]
    with pytest.raises(QuestionNotFoundError) as caught:
        build(AlignerRunnable(tell())).invoke(given)
    for cure in ('{"question": ..., "answer": ...}', '"configurable"', "prompt | model | AlignerRunnable()"):
        assert cure in str(caught.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("What?", "What?"),
        ("  ", ""),
        (HumanMessage("What?"), "What?"),
        (HumanMessage([{"type": "text", "text": "What"}, {"type": "text", "text": "?"}]), "What?"),
        (AIMessage("No."), ""),
        ([HumanMessage("One?"), AIMessage("No."), HumanMessage("Two?"), AIMessage("No.")], "Two?"),
        ([{"role": "user", "content": "What?"}], "What?"),
        ([("human", "What?")], "What?"),
        ([ChatMessage(role="user", content="What?")], "What?"),
        (StringPromptValue(text="What?"), "What?"),
        ([], ""),
        ([1, 2], ""),
        (None, ""),
        (42, ""),
        ({"a": 1}, ""),
    ],
)
def test_question_text(value: object, text: str) -> None:
    assert question_text(value) == text
