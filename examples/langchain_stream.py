"""Put an aligner behind a LangChain chain and read the corrected answer while it streams.

The chat model here replays a recorded answer; in your chain it is any chat model. Without the
parser the chunks are messages. `--scripted` takes a rule for the aligner's model.
"""

from __future__ import annotations

import sys

from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from aligner_integrations import Aligner
from aligner_integrations.langchain import AlignerRunnable

ANSWER = """Sam bakes 3 x 7 = 21 pies.
His sister bakes 6 x 7 = 42 pies.
Together they bake 21 + 42 = 630 pies."""


def load_aligner() -> Aligner:
    if "--scripted" not in sys.argv:
        return Aligner.from_pretrained()
    from aligner_integrations.testing import scripted_aligner

    return scripted_aligner(lambda question, prefix, sentence: sentence.replace("= 630", "= 63"))


def main() -> None:
    prompt = ChatPromptTemplate.from_messages([("human", "{question}")])
    model = GenericFakeChatModel(messages=iter([AIMessage(ANSWER)]))
    chain = prompt | model | StrOutputParser() | AlignerRunnable(load_aligner())
    question = "Sam bakes 3 pies a day and his sister 6. How many do they bake in 7 days?"
    for chunk in chain.stream({"question": question}):
        print(chunk, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
