"""Correct an agent of LlamaIndex: wrap its LLM, and its events, its result and its memory agree.

The LLM here replays a tool call and an answer; in your agent it is any that calls functions. `--scripted`
takes a rule for the aligner's model.
"""

from __future__ import annotations

import asyncio
import sys

from llama_index.core.agent.workflow import AgentStream, FunctionAgent, ToolCallResult

from aligner_integrations import Aligner
from aligner_integrations.llama_index import AlignedLLM
from aligner_integrations.testing.replay_llm import ReplayLLM

ANSWER = "The farmer sells 56/4 = 14 cows. The farmer now has 56-14 = 420 cows."


def count_cows(farm: str) -> int:
    """Count the cows of a farm."""
    return 56


def load_aligner() -> Aligner:
    if "--scripted" not in sys.argv:
        return Aligner.from_pretrained()
    from aligner_integrations.testing import scripted_aligner

    return scripted_aligner(lambda question, prefix, sentence: sentence.replace("= 420", "= 42"))


async def ask(agent: FunctionAgent, question: str) -> None:
    handler = agent.run(user_msg=question)
    async for event in handler.stream_events():
        if isinstance(event, AgentStream):
            print(event.delta, end="", flush=True)
        elif isinstance(event, ToolCallResult):
            print(f"{event.tool_name}: {event.tool_output.content}")
    print(f"\nresult: {await handler}")


def main() -> None:
    calls = [{"name": "count_cows", "args": {"farm": "hill"}}]
    upstream = ReplayLLM(answer=ANSWER, calls=calls)  # your LLM goes here
    agent = FunctionAgent(tools=[count_cows], llm=AlignedLLM(upstream, load_aligner()))
    asyncio.run(ask(agent, "A quarter of the hill farm's cows is sold. How many are left?"))


if __name__ == "__main__":
    main()
