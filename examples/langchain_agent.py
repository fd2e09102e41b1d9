"""Correct an agent with tools: one middleware, and every stream, the state and the history agree.

The chat model here replays a tool call and an answer; in your agent it is any chat model.
`--scripted` takes a rule for the aligner's model.
"""

from __future__ import annotations

import sys
from typing import Any

from langchain.agents import create_agent
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from aligner_integrations import Aligner
from aligner_integrations.langchain import AlignerMiddleware
from aligner_integrations.testing.replay import ReplayModel

ANSWER = "The farmer sells 56/4 = 14 cows. The farmer now has 56-14 = 420 cows."


@tool
def count_cows(farm: str) -> int:
    """Count the cows of a farm."""
    return 56


def load_aligner() -> Aligner:
    if "--scripted" not in sys.argv:
        return Aligner.from_pretrained()
    from aligner_integrations.testing import scripted_aligner

    return scripted_aligner(lambda question, prefix, sentence: sentence.replace("= 420", "= 42"))


def main() -> None:
    model = ReplayModel(answer=ANSWER, calls=[{"name": "count_cows", "args": {"farm": "hill"}}])
    agent = create_agent(
        model, [count_cows], middleware=[AlignerMiddleware(load_aligner())], checkpointer=InMemorySaver()
    )
    question = "A quarter of the hill farm's cows is sold. How many are left?"
    config: Any = {"configurable": {"thread_id": "cows"}}
    for message, _ in agent.stream({"messages": [HumanMessage(question)]}, config, stream_mode="messages"):
        if isinstance(message, AIMessageChunk):
            print(message.text, end="", flush=True)
    stored = agent.get_state(config).values["messages"][-1]
    print(f"\nstored: {stored.text}")
    print(f"{stored.response_metadata['aligner']['changed']} sentence(s) corrected")


if __name__ == "__main__":
    main()
