"""Correct one node of a LangGraph graph: wrap its chat model, and stream, state and checkpoint agree.

The chat model here replays an answer; in your graph it is any chat model. `--scripted` takes a rule for
the aligner's model.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from aligner_integrations import Aligner
from aligner_integrations.langchain import AlignedChatModel

ANSWER = "Sam bakes 3 x 7 = 21 pies. Together they bake 21 + 42 = 630 pies."


def load_aligner() -> Aligner:
    if "--scripted" not in sys.argv:
        return Aligner.from_pretrained()
    from aligner_integrations.testing import scripted_aligner

    return scripted_aligner(lambda question, prefix, sentence: sentence.replace("= 630", "= 63"))


def main() -> None:
    upstream = GenericFakeChatModel(messages=itertools.repeat(ANSWER))
    model = AlignedChatModel(model=upstream, aligner=load_aligner())

    def answer(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("answer", answer)
    builder.add_edge(START, "answer")
    graph = builder.compile(checkpointer=InMemorySaver())

    config: Any = {"configurable": {"thread_id": "pies"}}
    question = HumanMessage("Sam bakes 3 pies a day and his sister 6. How many in 7 days?")
    events: Any = graph.stream({"messages": [question]}, config, stream_mode="messages")
    for message, _ in events:
        print(message.text, end="", flush=True)
    print("\nstored:", graph.get_state(config).values["messages"][-1].text)


if __name__ == "__main__":
    main()
