"""Correct a chat engine of LlamaIndex: wrap its LLM, and the history holds the text that was shown.

A chat engine writes its history from the LLM's stream, so the LLM is the place. The one here replays
answers; in your engine it is any. `--scripted` takes a rule for the aligner's model.
"""

from __future__ import annotations

import sys

from llama_index.core.chat_engine import SimpleChatEngine

from aligner_integrations import Aligner
from aligner_integrations.llama_index import AlignedLLM
from aligner_integrations.testing.replay_llm import ReplayLLM

TURNS = {
    "Sam bakes 3 pies a day. How many in 7 days?": "Sam bakes 3 x 7 = 21 pies.",
    "And his sister, who bakes 6 a day?": "His sister bakes 6 x 7 = 42 pies.",
    "How many do they bake together?": "That is a sum. Together they bake 21 + 42 = 630 pies.",
}


def load_aligner() -> Aligner:
    if "--scripted" not in sys.argv:
        return Aligner.from_pretrained()
    from aligner_integrations.testing import scripted_aligner

    return scripted_aligner(lambda question, prefix, sentence: sentence.replace("= 630", "= 63"))


def main() -> None:
    upstream = ReplayLLM(answer=TURNS.__getitem__)  # your LLM goes here
    engine = SimpleChatEngine.from_defaults(llm=AlignedLLM(upstream, load_aligner()))
    for question in TURNS:
        print(f"> {question}")
        for token in engine.stream_chat(question).response_gen:
            print(token, end="", flush=True)
        print()
    print("\nhistory:")
    for message in engine.chat_history:
        print(f"  {message.role.value}: {message.content}")


if __name__ == "__main__":
    main()
