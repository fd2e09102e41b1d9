"""`AlignerRunnable` in every form: same text, still a stream, closed when it is cut short."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableConfig, RunnableLambda, RunnablePassthrough
from pydantic import ValidationError

from aligner_integrations import Aligner
from aligner_integrations import options as options_module
from aligner_integrations.errors import (
    CorrectionFailedError,
    MissingDependencyError,
    QuestionNotFoundError,
)
from aligner_integrations.langchain import AlignerRunnable
from aligner_integrations.testing import scripted_aligner
from tests.langchain.forms import FORMS, ask, model, run, shout, tell, text_of

QUESTION: RunnableConfig = {"configurable": {"question": "What of bears?"}}
ANSWER = "One bear. Two bears. Three bears."
SENTENCES = ["One bear. ", "Two bears. ", "Three bears."]


def letters(text: str) -> list[str]:
    return list(text)


@pytest.mark.parametrize("granularity", ["sentence", "answer"])
@pytest.mark.parametrize("form", FORMS)
def test_same_kind_and_same_text_in_every_form(form: str, granularity: Any) -> None:
    aligner = AlignerRunnable(shout(granularity=granularity))
    assert run(form, aligner, ANSWER, QUESTION) == ANSWER.upper()
    message = AIMessage(ANSWER, id="m1")
    assert run(form, aligner, message, QUESTION) == AIMessage(ANSWER.upper(), id="m1")
    given = {"question": "What?", "answer": ANSWER, "source": 7}
    assert run(form, aligner, given) == {**given, "answer": ANSWER.upper()}
    given |= {"answer": message}
    assert run(form, aligner, given) == {**given, "answer": AIMessage(ANSWER.upper(), id="m1")}


@pytest.mark.parametrize(
    "text", ["", " \n", "\x00", "\ud800", "a\r\nb\tc", "مرحبا. كيف حالك؟", "<|end|> <|keep|>."]
)
def test_copying_aligner_changes_nothing(text: str) -> None:
    aligner = AlignerRunnable(scripted_aligner(lambda question, prefix, sentence: sentence))
    for form in FORMS:
        if form in ("stream", "astream") and not text:
            assert list(aligner.stream(text, QUESTION)) == []
        else:
            assert run(form, aligner, text, QUESTION) == text


def test_mapping_question_may_be_messages() -> None:
    given = {"question": [("human", "What?")], "answer": "It is so."}
    assert AlignerRunnable(tell()).invoke(given)["answer"] == "<What?>"
    keyed = AlignerRunnable(tell(), question_key="asked")
    assert keyed.invoke({"asked": "Why?", "answer": "It is so."})["answer"] == "<Why?>"


@pytest.mark.parametrize("order", [("question", "source", "answer"), ("answer", "question", "source")])
def test_mapping_streams_whatever_comes_first(order: tuple[str, ...]) -> None:
    pieces: dict[str, list[Any]] = {
        "question": ["What?"],
        "source": [7],
        "answer": letters(ANSWER),
    }
    chunks = [{key: value} for key in order for value in pieces[key]]
    out = list(AlignerRunnable(shout()).transform(iter(chunks)))
    assert {"source": 7} in out
    assert [chunk["answer"] for chunk in out if "answer" in chunk] == [each.upper() for each in SENTENCES]


def test_mapping_from_assign_streams() -> None:
    answer = ask("question") | model(ANSWER) | StrOutputParser()
    chained = RunnablePassthrough.assign(answer=answer) | AlignerRunnable(shout())
    parts = list(chained.stream({"question": "bears"}))
    assert parts[0] == {"question": "bears"}
    assert [part["answer"] for part in parts[1:]] == [each.upper() for each in SENTENCES]


@pytest.mark.parametrize("form", ["ainvoke", "astream", "abatch"])
async def test_the_event_loop_goes_on_while_correcting(form: str) -> None:
    threads: set[int] = set()

    def note(question: str, prefix: str, sentence: str) -> str:
        threads.add(threading.get_ident())
        return sentence

    aligner = AlignerRunnable(scripted_aligner(note))
    if form == "ainvoke":
        await aligner.ainvoke(ANSWER, QUESTION)
    elif form == "astream":
        assert "".join([part async for part in aligner.astream(ANSWER, QUESTION)]) == ANSWER
    else:
        await aligner.abatch([ANSWER, ANSWER], QUESTION)
    assert threads and threading.get_ident() not in threads


def test_batch_keeps_the_order() -> None:
    answers = [f"Bear {number}." for number in range(20)]
    out = AlignerRunnable(shout()).batch(answers, {**QUESTION, "max_concurrency": 4})
    assert out == [answer.upper() for answer in answers]


def failing(at: str) -> Aligner:
    def rule(question: str, prefix: str, sentence: str) -> str:
        if at in sentence:
            raise RuntimeError("broken model")
        return sentence.upper()

    return scripted_aligner(rule)


@pytest.mark.parametrize("at", ["One", "Two", "Three"])
@pytest.mark.parametrize("form", FORMS)
def test_on_error(form: str, at: str) -> None:
    with pytest.raises(CorrectionFailedError):
        run(form, AlignerRunnable(failing(at)), ANSWER, QUESTION)
    sentence = next(each for each in SENTENCES if at in each).strip()
    shown = ANSWER.upper().replace(sentence.upper(), sentence)
    passing = AlignerRunnable(failing(at), on_error="pass_through")
    assert run(form, passing, ANSWER, QUESTION) == shown
    withholding = AlignerRunnable(failing(at), on_error="withhold", withheld_text="[no]")
    assert run(form, withholding, ANSWER, QUESTION) == ANSWER.upper().replace(sentence.upper(), "[no]")


def test_deadlines_are_configurable_fields() -> None:
    runnable = AlignerRunnable(
        scripted_aligner(lambda q, p, s: s.upper(), delay=0.3), on_error="pass_through"
    )
    field = ConfigurableField(id="limit")
    limited = runnable.configurable_fields(sentence_seconds=field)
    given = {"question": "Q?", "answer": "It is so."}
    assert limited.invoke(given)["answer"] == "IT IS SO."
    assert limited.invoke(given, {"configurable": {"limit": 0.05}})["answer"] == "It is so."
    for wrong in (0.0, -1.0, "soon"):
        with pytest.raises(ValidationError, match="sentence_seconds"):
            AlignerRunnable(sentence_seconds=wrong)  # type: ignore[arg-type]


def test_sentences_before_a_failing_one_are_shown() -> None:
    out = AlignerRunnable(failing("Three")).transform(iter(letters(ANSWER)), QUESTION)
    assert [next(out), next(out)] == ["ONE BEAR. ", "TWO BEARS. "]
    with pytest.raises(CorrectionFailedError):
        next(out)


@pytest.mark.parametrize("form", FORMS)
def test_configurable_fields(form: str) -> None:
    aligner = AlignerRunnable(shout()).configurable_fields(
        feedback=ConfigurableField(id="feedback"), edit_margin=ConfigurableField(id="edit_margin")
    )
    assert run(form, aligner, ANSWER, QUESTION) == ANSWER.upper()
    # The scripted model is sure of itself by 10,000 logits; a wider margin keeps the answer.
    config: RunnableConfig = {"configurable": {"question": "What?", "edit_margin": 2e4, "feedback": "shout"}}
    assert run(form, aligner, ANSWER, config) == ANSWER


def test_feedback_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    stream = Aligner.stream

    def note(self: Aligner, question: str, **options: Any) -> Any:
        seen.append(options["feedback"])
        return stream(self, question, **options)

    monkeypatch.setattr(Aligner, "stream", note)
    aligner = AlignerRunnable(shout(), feedback="be kind").configurable_fields(
        feedback=ConfigurableField(id="feedback")
    )
    aligner.invoke(ANSWER, QUESTION)
    aligner.invoke(ANSWER, {"configurable": {"question": "What?", "feedback": "be blunt"}})
    assert seen == ["be kind", "be blunt"]


@pytest.mark.parametrize("given", [42, None, ["a"], {"topic": "x"}, {"answer": "x"}, {"question": "x"}])
@pytest.mark.parametrize("form", FORMS)
def test_other_input_is_refused_with_the_cure(form: str, given: Any) -> None:
    with pytest.raises(TypeError, match=r"'question' and 'answer'"):
        run(form, AlignerRunnable(shout()), given, QUESTION)


@pytest.mark.parametrize(
    "chunks",
    [
        [42],
        ["a. ", AIMessageChunk(content="b")],
        [AIMessageChunk(content="a"), "b"],
        [{"question": "x"}],
        [{"question": "x"}, "b"],
    ],
)
def test_mixed_streams_are_refused(chunks: list[Any]) -> None:
    with pytest.raises(TypeError):
        list(AlignerRunnable(shout()).transform(iter(chunks), QUESTION))


def test_bad_options_are_refused() -> None:
    wrong: Any = "aligner-7b"
    with pytest.raises(TypeError, match="aligner must be an Aligner"):
        AlignerRunnable(wrong)
    for option in ({"on_error": wrong}, {"edit_margin": -1.0}, {"question_key": 3}):
        with pytest.raises(ValueError, match=next(iter(option))):
            AlignerRunnable(**option)


def test_bundled_aligner_is_loaded_once_and_late(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Aligner] = []

    def load() -> Aligner:
        time.sleep(0.02)
        loads.append(shout())
        return loads[0]

    monkeypatch.setattr(options_module, "_bundled", [])
    monkeypatch.setattr(Aligner, "from_pretrained", load)
    first, second = AlignerRunnable(), AlignerRunnable()
    assert not loads
    assert [*first.batch([ANSWER] * 4, QUESTION), second.invoke(ANSWER, QUESTION)] == [ANSWER.upper()] * 5
    assert len(loads) == 1


async def test_events_and_callbacks_show_the_parts() -> None:
    chained = (
        ask() | model(ANSWER) | StrOutputParser() | AlignerRunnable(shout()).with_config(run_name="align")
    )
    parts = [
        event["data"]["chunk"]
        async for event in chained.astream_events({"topic": "bears"}, version="v2")
        if event["event"] == "on_chain_stream" and event["name"] == "align"
    ]
    assert parts == [each.upper() for each in SENTENCES]


def test_wrappers_and_schemas() -> None:
    aligner = AlignerRunnable(shout())
    for wrapped in (
        aligner.with_retry(),
        aligner.with_fallbacks([RunnableLambda(lambda text: "no")]),
        aligner.with_config(tags=["x"]),
    ):
        assert wrapped.invoke(ANSWER, QUESTION) == ANSWER.upper()
    assert aligner.get_name() == "AlignerRunnable"
    assert {"string", "object"} <= {each.get("type") for each in aligner.get_input_jsonschema()["anyOf"]}
    assert "aligner" not in aligner.model_dump()


def test_usual_chain_of_the_readme() -> None:
    prompt = ChatPromptTemplate.from_messages([("human", "{question}")])
    chained = (
        prompt
        | model("2 + 2 = 5.")
        | AlignerRunnable(scripted_aligner(lambda question, prefix, sentence: sentence.replace("5", "4")))
    )
    assert text_of(chained.invoke({"question": "What is 2 + 2?"})) == "2 + 2 = 4."


def test_missing_langchain_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("aligner_integrations.langchain")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langchain_core", None)
    with pytest.raises(MissingDependencyError, match=r"aligner-integrations\[langchain\]"):
        importlib.import_module("aligner_integrations.langchain")


def test_only_this_package_registers_the_recorder() -> None:
    code = (
        "import sys, aligner_integrations; assert 'langchain_core' not in sys.modules;"
        "from langchain_core.tracers.context import _configure_hooks as hooks; before = len(hooks);"
        "import aligner_integrations.langchain; assert len(hooks) == before + 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("form", ["invoke", "ainvoke", "stream", "astream"])
def test_an_empty_answer_keeps_its_key(form: str) -> None:
    given = {"question": "What?", "answer": ""}
    assert run(form, AlignerRunnable(shout()), given) == given
    gone = AlignerRunnable(scripted_aligner(lambda question, prefix, sentence: ""))
    assert run(form, gone, {"question": "What?", "answer": "So."}) == given


def test_an_empty_question_is_none() -> None:
    with pytest.raises(QuestionNotFoundError):
        AlignerRunnable(shout()).invoke({"question": " ", "answer": "So."})
    found = AlignerRunnable(tell()).invoke({"question": "", "answer": "So."}, QUESTION)
    assert found["answer"] == f"<{QUESTION['configurable']['question']}>"
