"""T4 beyond the streams: no log at INFO and no error of ours repeats what users or models wrote."""

from __future__ import annotations

import ast
import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.prompts import ChatPromptTemplate
from llama_index.core.schema import NodeWithScore, TextNode

import aligner_integrations
from aligner_integrations import Aligner
from aligner_integrations.errors import AlignerError
from aligner_integrations.langchain import (
    AlignedChatModel,
    AlignerMiddleware,
    AlignerRunnable,
    AsyncStreamAlignerCallbackHandler,
    StreamAlignerCallbackHandler,
)
from aligner_integrations.llama_index import AlignedLLM, AlignerPostprocessor, AlignerQueryEngine
from aligner_integrations.testing import conformance, llama_index, scripted_aligner
from aligner_integrations.testing.conformance import ReplayModel
from aligner_integrations.testing.llama_index import ReplayLLM
from tests.llama_index.real import medquad_nodes, vector_index

PACKAGE = Path(aligner_integrations.__file__).parent
ASKED, SAID, KEPT = "Qz7asked", "Qz7said", "Qz7kept"  # canaries of the question, the answer and the nodes
QUESTION = f"Who is {ASKED}?"
ANSWER = f"He is known. The man {SAID} lives in Rome. That is all."


def failing(question: str, prefix: str, sentence: str) -> str:
    """A model that quotes all it was given when it breaks, in its message and in a note."""
    error = RuntimeError(f"bad input: {question!r} {prefix!r} {sentence!r}")
    error.add_note(sentence)
    raise error


def mending(question: str, prefix: str, sentence: str) -> str:
    return sentence.replace(SAID, "X")


def tells(text: str) -> list[str]:
    return [canary for canary in (ASKED, SAID, KEPT) if canary in text]


def ours(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it is chained to, as far as this library raised it."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        raised_by_us = trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(PACKAGE)
        if isinstance(error, AlignerError) or raised_by_us:
            yield error
        error = error.__cause__ or error.__context__


def check_error(error: BaseException) -> None:
    found = list(ours(error))
    assert found
    for each in found:
        said = (str(each), repr(each), *getattr(each, "__notes__", ()))
        assert not any(map(tells, said)), said


def check_logs(caplog: pytest.LogCaptureFixture) -> None:
    for record in caplog.records:
        if record.levelno < logging.INFO:
            continue
        said = record.getMessage() + str(record.args)
        assert not tells(said), (record.name, said)
        if record.name.startswith("aligner_integrations"):
            assert record.exc_info is None, record.getMessage()


def agent(model: ReplayModel, aligner: Aligner, **options: Any) -> Any:
    return create_agent(model, [], middleware=[AlignerMiddleware(aligner, **options)])


PROMPT = ChatPromptTemplate.from_messages([("human", "{question}")])
LANGCHAIN: dict[str, Callable[..., Any]] = {
    "AlignerRunnable": lambda model, aligner, **options: PROMPT | model | AlignerRunnable(aligner, **options),
    "AlignedChatModel": lambda model, aligner, **options: AlignedChatModel(
        model=model, aligner=aligner, **options
    ),
    "AlignerMiddleware": agent,
    "StreamAlignerCallbackHandler": lambda model, aligner, **options: (
        lambda sink: StreamAlignerCallbackHandler(aligner, sink=sink, **options)
    ),
    "AsyncStreamAlignerCallbackHandler": lambda model, aligner, **options: (
        lambda sink: AsyncStreamAlignerCallbackHandler(aligner, sink=sink, **options)
    ),
}
INDEX = vector_index(medquad_nodes(10))
LLAMA: dict[str, Callable[..., Any]] = {
    "AlignerQueryEngine": lambda llm, aligner, **options: AlignerQueryEngine(
        INDEX.as_query_engine(llm=llm, streaming=True), aligner, **options
    ),
    "AlignedLLM": lambda llm, aligner, **options: AlignedLLM(llm, aligner, **options),
}
ENDINGS = {
    "mended": (mending, {}),
    "raised": (failing, {"on_error": "raise"}),
    "passed through": (failing, {"on_error": "pass_through"}),
    "withheld": (failing, {"on_error": "withhold"}),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", [*LANGCHAIN, *LLAMA])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_t4_no_log_and_no_error_of_a_surface_holds_text(
    name: str, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    rule, options = ENDINGS[ending]
    aligner = scripted_aligner(rule)
    with caplog.at_level(logging.INFO):
        if name in LANGCHAIN:
            model = ReplayModel(answer=ANSWER, chunk_size=5, seed=7)
            target = LANGCHAIN[name](model, aligner, **options)
            report = conformance.check(target, canary=SAID, question=QUESTION, upstream=model)
        else:
            llm = ReplayLLM(answer=ANSWER, chunk_size=5, seed=7)
            target = LLAMA[name](llm, aligner, **options)
            report = llama_index.check(target, canary=SAID, question=QUESTION, llm=llm)
    errors = [surface.error for surface in report.surfaces if surface.error]
    assert bool(errors) == (ending == "raised")
    assert not any(map(tells, errors)), errors
    check_logs(caplog)


class Odd:
    """No text, but it quotes one."""

    def __repr__(self) -> str:
        return f"{ASKED} {SAID} {KEPT}"

    __str__ = __repr__


def chunks() -> Iterator[Any]:
    yield ANSWER
    yield Odd()


BROKEN = scripted_aligner(failing)
WHOLE = scripted_aligner(failing, granularity="answer")
NODES = [NodeWithScore(node=TextNode(text=f"It is {KEPT} here."), score=1.0)]
TOO_LONG = f"{ASKED} {SAID} " * 400
RAISING: dict[str, Callable[[], Any]] = {
    "correct": lambda: BROKEN.correct(QUESTION, ANSWER),
    "correct, whole": lambda: WHOLE.correct(QUESTION, ANSWER),
    "correct_sentence": lambda: BROKEN.correct_sentence(QUESTION, "", ANSWER),
    "correct_batch": lambda: BROKEN.correct_batch([(QUESTION, ANSWER)] * 3),
    "acorrect": lambda: asyncio.run(BROKEN.acorrect(QUESTION, ANSWER)),
    "push": lambda: BROKEN.stream(QUESTION).push(ANSWER),
    "correct_stream": lambda: list(BROKEN.correct_stream(QUESTION, [ANSWER])),
    "postprocessor": lambda: AlignerPostprocessor(BROKEN).postprocess_nodes(NODES, query_str=QUESTION),
    "runnable": lambda: AlignerRunnable(BROKEN).invoke({"question": QUESTION, "answer": ANSWER}),
    "runnable, batch": lambda: AlignerRunnable(BROKEN).batch([{"question": QUESTION, "answer": ANSWER}] * 2),
    "no question": lambda: AlignerRunnable(BROKEN).invoke(ANSWER),
    "no answer": lambda: AlignerRunnable(BROKEN).invoke({"question": QUESTION, "text": ANSWER}),
    "odd answer": lambda: AlignerRunnable(BROKEN).invoke({"question": QUESTION, "answer": Odd()}),
    "odd input": lambda: AlignerRunnable(BROKEN).invoke(Odd()),
    "odd question": lambda: BROKEN.correct(Odd(), ANSWER),  # type: ignore[arg-type]
    "odd pair": lambda: BROKEN.correct_batch([(QUESTION, Odd())]),  # type: ignore[list-item]
    "odd pairs": lambda: BROKEN.correct_batch([Odd()]),  # type: ignore[list-item]
    "odd chunk": lambda: list(scripted_aligner(mending).correct_stream(QUESTION, chunks())),
    "odd feedback": lambda: BROKEN.correct(QUESTION, ANSWER, feedback=Odd()),  # type: ignore[arg-type]
    "odd rule": lambda: scripted_aligner(lambda *fields: Odd()).correct("", SAID),  # type: ignore[arg-type]
    "too long": lambda: Aligner.from_pretrained().correct_sentence("Q", "", TOO_LONG),
    "closed": lambda: closed().push(ANSWER),
    "wrong granularity": lambda: WHOLE.correct_sentence(QUESTION, "", ANSWER),
}


def closed() -> Any:
    stream = scripted_aligner(mending).stream(QUESTION)
    stream.close()
    return stream


@pytest.mark.parametrize("name", RAISING)
def test_t4_no_error_quotes_text(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(Exception) as caught:
        RAISING[name]()
    check_error(caught.value)
    check_logs(caplog)


def test_findings_of_a_failure_name_its_type_alone() -> None:
    for on_error in ("pass_through", "withhold"):
        correction = BROKEN.correct(QUESTION, ANSWER, on_error=on_error)
        (finding,) = correction.findings
        assert "RuntimeError" in finding.detail
        assert tells(finding.detail) == []


# --- what the package may not do at all


def trees() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_no_file_runs_code_or_reads_pickles() -> None:
    """Nothing is evaluated and nothing unpickled; a training run's own state is tensors alone."""
    running = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
    pickles = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name.split(".")[0] for alias in node.names}
                if isinstance(node, ast.ImportFrom):
                    modules = {(node.module or "").split(".")[0]}
                assert not modules & pickles, f"{name}:{node.lineno}"
                assert "subprocess" not in modules or name.startswith("evaluation/"), f"{name}:{node.lineno}"
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in running, f"{name}:{node.lineno} calls {called}"
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("trust_remote_code", "False") == "False", f"{name}:{node.lineno}"
            assert given.get("shell", "False") == "False", f"{name}:{node.lineno}"
            assert given.get("allow_pickle", "False") == "False", f"{name}:{node.lineno}"
            if called == "torch.load":
                assert given.get("weights_only") == "True", f"{name}:{node.lineno} may unpickle code"


def test_no_log_call_above_debug_is_given_text() -> None:
    """A text may be measured or its type named; the one error that is logged is a folder's."""
    levels = {"info", "warning", "error", "critical", "exception", "log"}
    texts = {"question", "answer", "text", "sentence", "prefix", "piece", "core", "proposed", "shown_text"}
    texts |= {"chunk", "prompt", "feedback", "node", "message", "correction", "segment", "error", "exc"}
    calls = 0
    for name, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr not in levels or ast.unparse(node.func.value) not in ("logger", "_log", "log"):
                continue
            calls += 1
            assert isinstance(node.args[0], ast.Constant), f"{name}:{node.lineno} formats before it logs"
            assert not any(keyword.arg == "exc_info" for keyword in node.keywords), f"{name}:{node.lineno}"
            for argument in map(ast.unparse, node.args[1:]):
                told = argument.startswith(("len(", "type(")) or (name, argument) == ENGINES_FOLDER
                assert told or argument.split(".")[0] not in texts, f"{name}:{node.lineno} logs {argument}"
    assert calls >= 5


ENGINES_FOLDER = ("backends/session.py", "error")
