"""A closed loop around a model that really writes: in this process, and behind a server.

The aligner is the bundled one. Upstream says a wrong sum and goes on with it; only in a closed loop does what
it says after the corrected sum fit to that.
"""

from __future__ import annotations

import functools
import operator
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from aligner_integrations import Aligner, ClosedLoop
from aligner_integrations.langchain import AlignedChatModel
from aligner_integrations.options import load_bundled
from tests.langchain.forms import FORMS, collect, run
from tests.langchain.pens_chat import PensChat
from tests.pens_model import RIGHT, WRONG, answer, pens_model, question, sentences

pytestmark = pytest.mark.slow  # the model is trained, and a server started, once


@pytest.fixture(scope="module")
def bundled() -> Aligner:
    return load_bundled()


# Which chat template the way needs.
WAYS = (
    *(("prefill", "prefill"), ("prefix", "prefix"), ("continue_final_message", "closed")),
    *(("instruct", "closed"), ("auto", "closed")),
)


def half_corrected(one: int, other: int) -> str:
    """What an open loop shows of a wrong sum: it is corrected, and what follows is not."""
    first, second, *_ = sentences(one, other, one + other)
    return first + second + "".join(sentences(one, other, one + other + 1)[2:])


@pytest.mark.parametrize("pens", WRONG)
def test_upstream_reckons_badly_and_keeps_to_it(pens: tuple[int, int], bundled: Aligner) -> None:
    one, other = pens
    assert PensChat().invoke(question(*pens)).text == answer(one, other, one + other + 1)
    opened = AlignedChatModel(model=PensChat(), aligner=bundled)
    assert opened.invoke(question(*pens)).text == half_corrected(*pens)


@pytest.mark.parametrize(("continuation", "template"), WAYS)
@pytest.mark.parametrize("pens", WRONG)
def test_in_process_it_goes_on_from_the_corrected_sum(
    pens: tuple[int, int], continuation: Any, template: str, bundled: Aligner
) -> None:
    model = PensChat(template=template)
    closed = AlignedChatModel(model=model, aligner=bundled, loop="closed", continuation=continuation)
    message = closed.invoke(question(*pens))
    assert message.text == answer(*pens, sum(pens))
    assert message.response_metadata["aligner"]["restarts"] == 1
    # All that it wrote is paid for, thrown away or not.
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] == len(model.tokens)


@pytest.mark.parametrize("form", FORMS)
def test_in_process_it_does_so_in_every_form(form: str, bundled: Aligner) -> None:
    for pens in (WRONG[0], RIGHT[0]):
        closed = AlignedChatModel(model=PensChat(), aligner=bundled, loop="closed", continuation="prefill")
        message = run(form, closed, question(*pens))
        assert message.text == answer(*pens, sum(pens))
        assert message.response_metadata["aligner"]["rounds"] == (2 if pens in WRONG else 1)


def test_the_core_needs_no_framework_for_it(bundled: Aligner) -> None:
    from langchain_core.messages import AIMessage, HumanMessage

    def upstream(asked: str, prefix: str) -> Iterator[str]:
        begun = [AIMessage(prefix)] if prefix else []
        for chunk in PensChat().stream([HumanMessage(asked), *begun]):
            yield str(chunk.text)

    stream = ClosedLoop(upstream, bundled).stream(question(*WRONG[0]))
    assert "".join(segment.text for segment in stream) == answer(*WRONG[0], sum(WRONG[0]))
    assert stream.stats.restarts == 1 and stream.stats.thrown_away_chars > 0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The model behind transformers' own server; what a client of it has to know."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, log = pens_model(), tmp_path_factory.mktemp("server") / "log"
    script = Path(__file__).parent.parent / "openai_server.py"
    with log.open("w") as written:
        server = subprocess.Popen(
            [sys.executable, str(script), str(port)],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=written,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log)
            yield {
                **{"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "none", "model": str(folder)},
                **{"temperature": 0, "max_tokens": 100, "timeout": 60, "max_retries": 0},
            }
        finally:
            server.kill()
            server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


# As of 4.57 the server takes no chat completion that ends with a message of the assistant; with its
# Responses API the model's template has the say.
APIS = ({"continuation": "auto"}, {"continuation": "prefill", "use_responses_api": True})


def over_http(served: dict[str, Any], api: dict[str, Any], aligner: Aligner) -> AlignedChatModel:
    from langchain_openai import ChatOpenAI

    client = {name: value for name, value in api.items() if name != "continuation"}
    return AlignedChatModel(
        model=ChatOpenAI(**served, **client), aligner=aligner, loop="closed", continuation=api["continuation"]
    )


def check(message: Any, pens: tuple[int, int]) -> None:
    assert message.text == answer(*pens, sum(pens))
    receipt = message.response_metadata["aligner"]
    assert receipt["rounds"] == (2 if pens in WRONG else 1)
    said = sentences(*pens, sum(pens) + (pens in WRONG))[:2] + sentences(*pens, sum(pens))[2:]
    assert receipt["requested_chars"] - receipt["thrown_away_chars"] == len("".join(said))


@pytest.mark.parametrize("api", APIS, ids=["chat", "responses"])
def test_over_http_it_goes_on_from_the_corrected_sum(
    api: dict[str, Any], served: dict[str, Any], bundled: Aligner
) -> None:
    for pens in (*WRONG, RIGHT[0]):
        check(over_http(served, api, bundled).invoke(question(*pens)), pens)
    check(run("stream", over_http(served, api, bundled), question(*WRONG[0])), WRONG[0])


@pytest.mark.parametrize("api", APIS, ids=["chat", "responses"])
async def test_over_http_the_async_twins_do_too(
    api: dict[str, Any], served: dict[str, Any], bundled: Aligner
) -> None:
    async with httpx.AsyncClient(timeout=60) as client:  # the client's own would outlive this event loop
        closed = over_http({**served, "http_async_client": client}, api, bundled)
        for pens in (WRONG[0], RIGHT[0]):
            check(await closed.ainvoke(question(*pens)), pens)
            parts = await collect(closed, question(*pens))
            check(functools.reduce(operator.add, parts), pens)
