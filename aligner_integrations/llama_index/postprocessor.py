"""`AlignerPostprocessor`: the text of retrieved nodes, corrected before an answer is made of it."""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import Field
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, ImageNode, Node, NodeWithScore, QueryBundle, TextNode

from aligner_integrations.aligner import Aligner, has_words
from aligner_integrations.correction import Correction
from aligner_integrations.errors import QuestionNotFoundError
from aligner_integrations.llama_index.instrumentation import CorrectionSpan
from aligner_integrations.llama_index.stored import StoresOptions
from aligner_integrations.options import CorrectionOptions
from aligner_integrations.resilience import WITHHELD_TEXT, OnError

ORIGINAL_KEY = "aligner_original"


class AlignerPostprocessor(StoresOptions, BaseNodePostprocessor):
    """Corrects the text of retrieved nodes against the query, all nodes in one batch.

    What the index holds is never touched: a node whose text changes is a copy, with its id, score,
    relationships, metadata and embedding, and with the original text in `metadata["aligner_original"]`, which
    neither the LLM nor an embedding model gets to see. Metadata is not corrected. Nodes that stay as they
    are, have no text, or hold an image come back as they came.

    It sees nodes, never the answer: for that take `AlignerQueryEngine` or `AlignedLLM`.

    Args:
        aligner: What corrects; without one the bundled model is loaded on first use.
        on_error: What a failed correction does: `"raise"`, `"pass_through"` (the sentence stays as it is) or
            `"withhold"` (`withheld_text` takes its place).
        withheld_text: Stands for a sentence that was withheld.
        sentence_seconds: A correction that takes longer is dropped and has failed; None: no limit.
        answer_seconds: So long the corrections of one node may take in all; None: no limit.
        feedback: Tells the aligner what to look for.
        edit_margin: Overrides the model's own margin, in logits.
    """

    on_error: OnError = "raise"
    withheld_text: str = WITHHELD_TEXT
    sentence_seconds: float | None = Field(default=None, gt=0.0)
    answer_seconds: float | None = Field(default=None, gt=0.0)
    feedback: str = ""
    edit_margin: float | None = Field(default=None, ge=0.0)

    def __init__(
        self,
        aligner: Aligner | None = None,
        *,
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
        sentence_seconds: float | None = None,
        answer_seconds: float | None = None,
        feedback: str = "",
        edit_margin: float | None = None,
        **more: Any,
    ) -> None:
        more.pop("class_name", None)  # LlamaIndex writes it into every dump
        super().__init__(
            aligner=aligner,
            on_error=on_error,
            withheld_text=withheld_text,
            sentence_seconds=sentence_seconds,
            answer_seconds=answer_seconds,
            feedback=feedback,
            edit_margin=edit_margin,
            **more,
        )
        CorrectionOptions.of(self)  # checks them

    @classmethod
    def class_name(cls) -> str:
        return "AlignerPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        texts = [_text_of(each.node) for each in nodes]
        chosen = [index for index, text in enumerate(texts) if has_words(text)]
        if not chosen:
            return nodes
        if query_bundle is None:
            raise QuestionNotFoundError(
                "nodes are corrected against a question, and there is none; give query_str= or query_bundle= "
                "to postprocess_nodes (a query engine does so by itself)"
            )
        question = query_bundle.query_str
        corrections = self._correct(question, [nodes[index] for index in chosen], [texts[i] for i in chosen])
        corrected = list(nodes)
        for index, correction in zip(chosen, corrections, strict=True):
            if correction.changed:
                node = _with_text(nodes[index].node, correction.text, correction.answer)
                corrected[index] = nodes[index].model_copy(update={"node": node})
        return corrected

    def _correct(self, question: str, nodes: list[NodeWithScore], texts: list[str]) -> list[Correction]:
        options = CorrectionOptions.of(self)
        spans = [CorrectionSpan(self, question, node_id=each.node_id) for each in nodes]
        for span in spans:
            span.begin()
        try:
            corrections = options.load().correct_batch(
                [(question, text) for text in texts],
                feedback=self.feedback,
                **options.errors(),
            )
        except BaseException as error:
            for span in spans:
                span.drop(error)
            raise
        for span, correction in zip(spans, corrections, strict=True):
            span.end(correction)
        return corrections


def _text_of(node: BaseNode) -> str:
    """Return the text of a node that may be corrected."""
    if isinstance(node, ImageNode) or (isinstance(node, Node) and node.image_resource is not None):
        return ""
    if isinstance(node, TextNode):
        return node.text
    return (node.text_resource.text or "") if isinstance(node, Node) and node.text_resource else ""


def _with_text(node: BaseNode, text: str, original: str) -> BaseNode:
    """Return a copy with another text; the first original stays on record."""
    kept = {
        "metadata": {**node.metadata, ORIGINAL_KEY: node.metadata.get(ORIGINAL_KEY, original)},
        "excluded_llm_metadata_keys": _with_key(node.excluded_llm_metadata_keys),
        "excluded_embed_metadata_keys": _with_key(node.excluded_embed_metadata_keys),
    }
    if isinstance(node, Node) and node.text_resource is not None:
        resource = node.text_resource.model_copy(update={"text": text})
        return node.model_copy(update={**kept, "text_resource": resource})
    return node.model_copy(update={**kept, "text": text})


def _with_key(keys: list[str]) -> list[str]:
    return keys if ORIGINAL_KEY in keys else [*keys, ORIGINAL_KEY]
