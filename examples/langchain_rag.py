"""Correct a retrieval chain: the question runs beside the retriever, the answer is corrected as it streams.

Retriever and chat model are small stand-ins; in your chain they are any. `--scripted` takes a rule for
the aligner's model.
"""

from __future__ import annotations

import itertools
import sys

from langchain_core.documents import Document
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from aligner_integrations import Aligner
from aligner_integrations.langchain import AlignerRunnable

SHELF = [
    Document("The farm has 56 cows. A quarter of the herd is sold each spring."),
    Document("The farm's well gives 300 litres an hour."),
]
ANSWER = "The farm has 56 cows. It sells 56/4 = 14 cows. The farmer now has 56-14 = 420 cows."


def load_aligner() -> Aligner:
    if "--scripted" not in sys.argv:
        return Aligner.from_pretrained()
    from aligner_integrations.testing import scripted_aligner

    return scripted_aligner(lambda question, prefix, sentence: sentence.replace("= 420", "= 42"))


def search(question: str) -> str:
    words = set(question.lower().split())
    best = max(SHELF, key=lambda page: len(words & set(page.page_content.lower().split())))
    return best.page_content


def main() -> None:
    prompt = ChatPromptTemplate.from_template("Answer from this:\n{context}\n\nQuestion: {question}")
    chain = (
        {"context": RunnableLambda(search), "question": RunnablePassthrough()}
        | prompt
        | GenericFakeChatModel(messages=itertools.repeat(ANSWER))
        | StrOutputParser()
        | AlignerRunnable(load_aligner())
    )
    # The chain's input is the question that the aligner reads; the pages are not mistaken for it.
    for chunk in chain.stream("How many cows are left after the herd was sold in spring?"):
        print(chunk, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
