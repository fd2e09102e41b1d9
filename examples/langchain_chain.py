"""Correct the answers of a LangChain chain: whole, in a batch, and as a mapping with its question.

The chat model here replays a recorded answer; in your chain it is any chat model. `--scripted`
takes a rule for the aligner's model.
"""

from __future__ import annotations

import itertools
import sys

from langchain_core.language_models import GenericFakeChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from aligner_integrations import Aligner
from aligner_integrations.langchain import AlignerRunnable

ANSWER = "A baker fills 12 trays. Each holds 5 rolls, so he bakes 12 x 5 = 70 rolls."


def load_aligner() -> Aligner:
    if "--scripted" not in sys.argv:
        return Aligner.from_pretrained()
    from aligner_integrations.testing import scripted_aligner

    return scripted_aligner(lambda question, prefix, sentence: sentence.replace("= 70", "= 60"))


def main() -> None:
    prompt = ChatPromptTemplate.from_messages([("human", "{question}")])
    upstream = prompt | GenericFakeChatModel(messages=itertools.repeat(ANSWER)) | StrOutputParser()
    aligner = AlignerRunnable(load_aligner())
    question = "A baker fills 12 trays with 5 rolls each. How many rolls?"

    # At the end of a chain the aligner finds the question by itself.
    chain = upstream | aligner
    print(chain.invoke({"question": question}))
    print(chain.batch([{"question": question}, {"question": "How many rolls?"}]))

    # Given a mapping, it reads the question there, and every other key passes.
    print((RunnablePassthrough.assign(answer=upstream) | aligner).invoke({"question": question}))


if __name__ == "__main__":
    main()
