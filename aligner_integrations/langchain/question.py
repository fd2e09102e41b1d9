"""Find the question that an answer in a chain belongs to.

A runnable at the end of `prompt | model | aligner` receives the answer alone. LangChain tells
callback handlers what every chain and every model received, so one small handler, the
`QuestionRecorder`, is put into every run by LangChain's configure hook (registered below, when this
module is imported). It notes per run where the run stands in its chain, what the chain was given,
and the last human message of each model called inside it. Notes go when their run ends.

Runs form a tree. A model is *upstream* of the aligner when, where their branches part, its step comes
earlier; parallel branches are never upstream of each other. When several models are equally near and
were asked different things there is no answer to "which one?", and none is guessed.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage, ChatMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import RunnableConfig
from langchain_core.tracers.context import register_configure_hook

from aligner_integrations.errors import QuestionNotFoundError
from aligner_integrations.langchain.jobs import inline

# Keys under which chains usually take the question, best first (the contract's order).
_KEYS = ("question", "input", "query", "messages")
# Model calls remembered per run: enough to see that they disagree, bounded for loops without end.
_MAX_ASKS = 32
# LangChain tags a child with its place: a sequence's step, a graph's step, a branch after its conditions.
_STEP = re.compile(r"(?:seq|graph):step:(\d+)")
# All branches of a parallel step share one place, so none comes before another.
_PARALLEL = -1

# Where a run stands: (run id, place in its parent); the place is None when the parent gives no order.
_Position = tuple[int, int | None]


@dataclass(slots=True, eq=False)
class _Ask:
    """One call of a model: what it was asked, and the way from the root run down to it."""

    question: str
    lineage: tuple[_Position, ...]
    failed: bool = False


@dataclass(slots=True, eq=False)
class _Given:
    """What a prompt was filled from. A chain that streams does not say what it was given; its prompt does."""

    inputs: object
    lineage: tuple[_Position, ...]


@dataclass(slots=True, eq=False)
class _Run:
    """What is noted of one chain run. Holds run ids as numbers: a UUID here would keep itself alive."""

    parent: _Run | None
    lineage: tuple[_Position, ...]
    inputs: object
    asks: deque[_Ask] = field(default_factory=lambda: deque(maxlen=_MAX_ASKS))
    given: deque[_Given] = field(default_factory=lambda: deque(maxlen=_MAX_ASKS))


class QuestionRecorder(BaseCallbackHandler):
    """Notes, for every run in progress, what its chain was given and what its models were asked."""

    # Called in place, on the event loop too: every method is a few dictionary operations.
    run_inline = inline
    ignore_llm = False
    ignore_retriever = True
    ignore_agent = True
    ignore_retry = True
    ignore_custom_event = True

    def __init__(self) -> None:
        # Keyed by the UUID object that the run itself holds: a run that is dropped without ending (an
        # abandoned generator, a killed thread) takes its notes along.
        self._runs: WeakKeyDictionary[UUID, _Run] = WeakKeyDictionary()

    def __len__(self) -> int:
        """How many runs are noted now; 0 when nothing runs."""
        return len(self._runs)

    def __bool__(self) -> bool:
        return True

    def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note the run, its place and its input."""
        parent = self.run(parent_run_id)
        lineage = (*(parent.lineage if parent else ()), (run_id.int, _place(tags)))
        self._runs[run_id] = _Run(parent, lineage, inputs)
        if kwargs.get("run_type") == "prompt":
            given = _Given(inputs, lineage)
            for above in _upwards(parent):
                above.given.append(given)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget the run."""
        self._runs.pop(run_id, None)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget the run; what its models said never reached the chain around it."""
        run = self._runs.pop(run_id, None)
        for ask in tuple(run.asks) if run else ():
            ask.failed = True

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note the last human message for every chain around the model."""
        if run := self.run(parent_run_id):
            self._note(run, _last_human(messages[0]) if messages else "", run_id, tags)

    def on_llm_start(
        self,
        serialized: dict[str, Any],
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note a completion model's prompt: all of it is the human's message."""
        if run := self.run(parent_run_id):
            self._note(run, prompts[0] if prompts else "", run_id, tags)

    def on_llm_error(
        self, error: BaseException, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """Note that the model failed: no answer is its."""
        run = self.run(parent_run_id)
        for ask in tuple(run.asks) if run else ():
            ask.failed = ask.failed or ask.lineage[-1][0] == run_id.int

    def run(self, run_id: UUID | None) -> _Run | None:
        """Return the notes of a run in progress."""
        return None if run_id is None else self._runs.get(run_id)

    def _note(self, run: _Run, question: str, run_id: UUID, tags: list[str] | None) -> None:
        ask = _Ask(question, (*run.lineage, (run_id.int, _place(tags))))
        for above in _upwards(run):
            above.asks.append(ask)


def _upwards(run: _Run | None) -> Iterator[_Run]:
    while run is not None:
        yield run
        run = run.parent


recorder = QuestionRecorder()
_recorder_var: ContextVar[QuestionRecorder | None] = ContextVar("aligner_question", default=recorder)
register_configure_hook(_recorder_var, inheritable=True)


def find_question(
    answer: str,
    *,
    run_id: UUID,
    parent_run_id: UUID | None,
    tags: Sequence[str],
    config: RunnableConfig,
    question_key: str | None = None,
    message_id: str | None = None,
) -> str:
    """Return the question that `answer` belongs to; the first of these that is there.

    `config["configurable"]["question"]`; the input of the chain around the aligner; the last human
    message that the model upstream received. `message_id` is the answer's, if it is a message: models
    without ids of their own name their run in it, which settles which model it came from.

    Raises:
        QuestionNotFoundError: none is there, or several models were asked different things.
    """
    if configured := question_text(config.get("configurable", {}).get("question")):
        return configured
    parent = recorder.run(parent_run_id)
    own = (*(parent.lineage if parent else ()), (run_id.int, _place(tags)))
    found, rivals = _search(parent, own, answer, question_key, message_id)
    if found:
        return found
    why = (
        f"{rivals} models upstream were asked different things"
        if rivals > 1
        else "no chain input and no model upstream tells what was asked"
    )
    raise QuestionNotFoundError(
        f"the question for this answer was not found: {why}. Give it in one of three ways: "
        'pass {"question": ..., "answer": ...} as input; or set config={"configurable": '
        '{"question": ...}}; or run the aligner in one chain with its model (prompt | model | '
        "AlignerRunnable()), with question_key=... where the chain's input names it otherwise"
    )


def _search(
    parent: _Run | None,
    own: tuple[_Position, ...],
    answer: str,
    question_key: str | None,
    message_id: str | None,
) -> tuple[str, int]:
    """Return the question, or "" and how many upstream models disagree about it."""
    keys = (question_key,) if question_key else _KEYS
    for run in _upwards(parent):
        # A copy: branches in other threads may be starting models just now.
        upstream = [ask for ask in tuple(run.asks) if not ask.failed and _is_upstream(ask.lineage, own)]
        if upstream:
            if text := _chain_question(run.inputs, keys, bare=True) or _prompt_question(run, own, keys):
                return text, 1
            asked = _asked(upstream, message_id)
            return (asked.pop(), 1) if len(asked) == 1 else ("", len(asked))
    # No model ran here (a plain function answered): only the inputs are left.
    for run in _upwards(parent):
        bare = _is_fed_by_chain(run, own)
        if (text := _chain_question(run.inputs, keys, bare=bare)) and text != answer:
            return text, 1
    return "", 0


def _prompt_question(run: _Run, own: tuple[_Position, ...], keys: tuple[str, ...]) -> str:
    """Return the question that the first prompt upstream was filled with; "" if there is none, or several."""
    given = [each for each in tuple(run.given) if _is_upstream(each.lineage, own)]
    first = [each for each in given if not any(_is_later(each.lineage, other.lineage) for other in given)]
    texts = {_chain_question(each.inputs, keys, bare=False) for each in first}
    return texts.pop() if len(texts) == 1 else ""


def _is_fed_by_chain(run: _Run, own: tuple[_Position, ...]) -> bool:
    """Whether a bare text given to `run` is its question, not an answer on its way to the aligner.

    It is when a step of `run` stands between the two, and none before `run` that may have made it.
    """
    place = own[len(run.lineage)][1]
    first = run.lineage[0][1]
    places = {above for _, above in run.lineage[1:]} | ({first} if first is not None else set())
    return place is not None and place > 1 and places <= {1, _PARALLEL}


def _asked(upstream: list[_Ask], message_id: str | None) -> set[str]:
    """Return what the model next upstream was asked: one text, or several when that is open."""
    if message_id:
        named = {ask.question for ask in upstream if str(UUID(int=ask.lineage[-1][0])) in message_id}
        if named:
            return named
    return {
        ask.question
        for ask in upstream
        if not any(_is_later(other.lineage, ask.lineage) for other in upstream)
    }


def _is_upstream(asked: Iterable[_Position], own: Iterable[_Position]) -> bool:
    places = _parting(asked, own)
    if places is None:
        return False
    before, after = places
    return before is None or after is None or before < after


def _is_later(one: Iterable[_Position], than: Iterable[_Position]) -> bool:
    places = _parting(one, than)
    if places is None:
        return False
    later, earlier = places
    return later is not None and earlier is not None and later > earlier


def _parting(one: Iterable[_Position], other: Iterable[_Position]) -> tuple[int | None, int | None] | None:
    """Return the places of two runs in the last run that they share."""
    for (run, place), (other_run, other_place) in zip(one, other, strict=False):
        if run != other_run:
            return place, other_place
    return None


def _place(tags: Iterable[str] | None) -> int | None:
    for tag in tags or ():
        if match := _STEP.fullmatch(tag):
            return int(match[1])
        if tag.startswith("map:key:"):
            return _PARALLEL
        if tag.startswith("condition:"):
            return 0
        if tag.startswith("branch:"):
            return 1
    return None


def _chain_question(inputs: object, keys: Iterable[str], *, bare: bool) -> str:
    """Return the question in a chain's input; a bare text or message counts only if `bare`."""
    if isinstance(inputs, Mapping):
        return next((text for key in keys if (text := question_text(inputs.get(key)))), "")
    if bare or isinstance(inputs, (list, PromptValue)):
        return question_text(inputs)
    return ""


def question_text(value: object) -> str:
    """Return the text of a question given as text, as a message or as messages; "" if it is none."""
    if isinstance(value, str):
        return value if value.strip() else ""
    if isinstance(value, PromptValue):
        return _last_human(value.to_messages())
    if isinstance(value, BaseMessage):
        return _last_human([value])
    if isinstance(value, (list, tuple)) and value:
        try:
            return _last_human(convert_to_messages(value))
        except (ValueError, TypeError, NotImplementedError, KeyError):
            return ""  # a list of something else
    return ""


def _last_human(messages: Sequence[BaseMessage]) -> str:
    """Return the text of the last human message that has one; a summary of the talk only for want of one."""
    texts = []
    for message in reversed(messages):
        role = message.role.lower() if isinstance(message, ChatMessage) else message.type
        if role in ("user", "human", "HumanMessageChunk") and (text := str(message.text)).strip():
            texts.append((message.additional_kwargs.get("lc_source") == "summarization", text))
    return min(texts, key=itemgetter(0), default=(False, ""))[1]
