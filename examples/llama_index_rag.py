"""Correct a query engine of LlamaIndex: the answer streams corrected, and its sources stay beside it.

Embedding and LLM are small stand-ins for yours. `--scripted` takes a rule for the aligner's model.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from pathlib import Path
from typing import Any

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding

from aligner_integrations import Aligner
from aligner_integrations.llama_index import AlignerQueryEngine
from aligner_integrations.testing.replay_llm import ReplayLLM

TEXTS = Path(__file__).parent / "data" / "answers.jsonl"
ANSWER = "The herd has 51+5 = 56 cows. The farmer sells 56/4 = 14 cows. The farmer now has 56-14 = 420 cows."


class WordEmbedding(BaseEmbedding):
    """A bag of words. Your embedding model goes here."""

    def _get_text_embedding(self, text: str) -> list[float]:
        places = [zlib.crc32(word.encode()) % 512 for word in re.findall(r"\w+", text.lower())]
        return [float(places.count(place)) for place in range(512)]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


def load_aligner() -> Aligner:
    if "--scripted" not in sys.argv:
        return Aligner.from_pretrained()
    from aligner_integrations.testing import scripted_aligner

    return scripted_aligner(lambda question, prefix, sentence: sentence.replace("= 420", "= 42"))


def main() -> None:
    rows = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    pages = [Document(text=row["question"], metadata={"source": row["source"]}) for row in rows]
    index = VectorStoreIndex.from_documents(pages, embed_model=WordEmbedding())
    llm = ReplayLLM(answer=ANSWER)  # your LLM goes here
    engine = AlignerQueryEngine(index.as_query_engine(llm=llm, streaming=True), load_aligner())
    response: Any = engine.query("The farmer sells a quarter of the herd. How many cows are left?")
    response.print_response_stream()
    print("\nfrom:", response.source_nodes[0].metadata["source"])


if __name__ == "__main__":
    main()
