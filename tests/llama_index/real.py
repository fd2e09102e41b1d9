"""Real text, indexed: medquad answers of tests/data, and an embedding that needs no model and no hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from functools import cache
from pathlib import Path

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode, TextNode

RECORDED = Path(__file__).parent.parent / "data" / "recorded_answers.jsonl.gz"
_WORD = re.compile(r"\w+")


class HashingEmbedding(BaseEmbedding):
    """A bag of words: each word counts at a place that its hash says. The same text, the same vector."""

    model_name: str = "hashing"
    size: int = 256

    def _get_text_embedding(self, text: str) -> list[float]:
        vector = [0.0] * self.size
        for word in _WORD.findall(text.lower()):
            digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            place = int.from_bytes(digest[:4], "little") % self.size
            vector[place] += 1.0 if digest[4] & 1 else -1.0
        norm = math.sqrt(sum(value * value for value in vector)) or 1.0
        return [value / norm for value in vector]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


@cache
def medquad() -> list[tuple[str, str]]:
    """Return the recorded (question, answer) pairs of medquad (CC-BY-4.0)."""
    with gzip.open(RECORDED, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["question"], row["answer"]) for row in rows if row["source"] == "medquad_qa"]


@cache
def _nodes(chunk_size: int) -> tuple[BaseNode, ...]:
    documents = [Document(text=answer, doc_id=str(row)) for row, (_, answer) in enumerate(medquad())]
    nodes = SentenceSplitter(chunk_size=chunk_size, chunk_overlap=0).get_nodes_from_documents(documents)
    for node in nodes:
        # Set afterwards, for the splitter would count it.
        node.metadata = {"row": int(node.ref_doc_id or 0), "title": medquad()[int(node.ref_doc_id or 0)][0]}
    return tuple(nodes)


def medquad_nodes(count: int | None = None, *, chunk_size: int = 96) -> list[TextNode]:
    """Return nodes of the recorded answers, of at most `chunk_size` tokens each; fresh copies."""
    chosen = _nodes(chunk_size)[:count]
    return [node.model_copy(deep=True) for node in chosen if isinstance(node, TextNode)]


def vector_index(nodes: list[TextNode] | None = None) -> VectorStoreIndex:
    """Return an index over `nodes`, or over all nodes of the recorded answers."""
    return VectorStoreIndex(nodes if nodes is not None else medquad_nodes(), embed_model=HashingEmbedding())
