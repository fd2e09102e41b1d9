"""Every example and every Python block of the docs runs as a reader would run it."""

from __future__ import annotations

import ast
import asyncio
import gc
import inspect
import io
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
PERMISSIVE = {"CC0-1.0", "CC-BY-4.0", "MIT", "Apache-2.0"}

# LlamaIndex's own: where an agent is made, every attribute is looked at, deprecated ones of pydantic among
# them; a ReAct agent asks its workflow a deprecated question; a chat engine's memory leaves a database open.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning:inspect"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*aiosqlite:ResourceWarning"),
    # The database's thread may find out that it is no longer wanted when the event loop is gone already.
    pytest.mark.filterwarnings(
        "ignore:Exception in thread .*_connection_worker_thread:pytest.PytestUnhandledThreadExceptionWarning"
    ),
]


@pytest.fixture
def swept(request: pytest.FixtureRequest) -> Iterator[None]:
    """What LlamaIndex leaves to the garbage collector goes here, where the filters above are; not later."""
    yield
    if "llama_index" in request.node.name:  # it takes a while
        gc.collect()


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page as (line of the first statement, code)."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(2)) + 1, inspect.cleandoc("\n" + match[2]))
        for match in BLOCK.finditer(text)
    ]


def run_example(path: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short_and_has_one_entry(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= (80 if path.name == "demo.py" else 60)
    functions = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert "main" in functions


# What each example shows, and what it must not show; `demo.py` has a test of its own.
CORRECTED = [
    ("closed_loop.py", "63 boxes", "630"),
    ("correct.py", "= 42", "= 420."),
    ("export_onnx.py", "20 of 20 texts", "differs"),
    ("langchain_agent.py", "= 42", "= 420"),
    ("langchain_chain.py", "= 60", "= 70"),
    ("langchain_rag.py", "= 42", "= 420"),
    ("langchain_stream.py", "= 63", "= 630"),
    ("langgraph_graph.py", "= 63", "= 630"),
    ("llama_index_agent.py", "= 42", "= 420"),
    ("llama_index_chat.py", "= 63", "= 630"),
    ("llama_index_rag.py", "= 42", "= 420"),
    ("terminal_chat.py", "= 42", "= 420"),
]


@pytest.mark.parametrize(("name", "right", "wrong"), CORRECTED)
@pytest.mark.parametrize("scripted", [True, False])
@pytest.mark.usefixtures("swept")
def test_example_shows_the_correction(
    name: str,
    right: str,
    wrong: str,
    scripted: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the bundled model too: the examples are chosen so that it has something to show."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    run_example(ROOT / "examples" / name, *(["--scripted"] if scripted else []), monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert right in shown
    assert wrong not in shown


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES} == {name for name, _, _ in CORRECTED} | {"demo.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("swept")
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of one page share their names, as in one notebook; `await` may stand at the top."""
    monkeypatch.chdir(ROOT)
    notebook = ModuleType("__main__")
    for line, code in blocks_of(page):
        # Leading newlines make a failure point at the line of the page.
        compiled = compile("\n" * (line - 1) + code, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if compiled.co_flags & inspect.CO_COROUTINE:
            asyncio.run(eval(compiled, notebook.__dict__))
        else:
            exec(compiled, notebook.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", page.read_text(encoding="utf-8"))  # code is no link
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_recorded_answers_are_whole_and_permissive() -> None:
    lines = (ROOT / "examples" / "data" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 20
    for row in rows:
        assert set(row) == {"question", "answer", "source", "licence"}
        assert row["answer"].strip() and row["source"]
        assert row["licence"] in PERMISSIVE


def test_demo_shows_every_answer_and_sums_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example(ROOT / "examples" / "demo.py", monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    lines = (ROOT / "examples" / "data" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        assert json.loads(line)["question"] in shown
    figures = dict(re.findall(r"^(sentences|corrected|forwards)\s+(\d+)$", shown, re.MULTILINE))
    assert int(figures["sentences"]) > 40
    assert int(figures["forwards"]) >= int(figures["sentences"])
    assert 0 <= int(figures["corrected"]) <= int(figures["sentences"])
