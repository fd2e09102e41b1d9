"""Recorded answers, corrected as they stream through a chain: what `make demo` runs."""

from __future__ import annotations

import json
from pathlib import Path

from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate
from rich.console import Console

from aligner_integrations import Aligner, Segment
from aligner_integrations.cli import marked
from aligner_integrations.langchain import AlignerRunnable

ANSWERS = Path(__file__).parent / "data" / "answers.jsonl"
CONSOLE = Console(highlight=False, soft_wrap=True)


def main() -> None:
    rows = [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").splitlines()]
    segments: list[Segment] = []

    def show(segment: Segment) -> None:
        CONSOLE.print(marked(segment.original, segment.edits, plain=not CONSOLE.is_terminal), end="")
        segments.append(segment)

    aligner = Aligner.from_pretrained()
    model = GenericFakeChatModel(messages=iter([AIMessage(row["answer"]) for row in rows]))
    prompt = ChatPromptTemplate.from_messages([("human", "{question}")])
    chain = prompt | model | AlignerRunnable(aligner, sink=show)
    for row in rows:
        CONSOLE.print(row["question"], style="bold")
        for _ in chain.stream({"question": row["question"]}):
            pass  # shown already, with its edits
        CONSOLE.print("\n")

    ran = [segment for segment in segments if segment.stats.forwards]
    forwards = sum(segment.stats.forwards for segment in ran)
    tokens = sum(len(aligner.tokenizer.encode_text(segment.text)) for segment in ran)
    seconds = sum(segment.stats.seconds for segment in ran)
    for name, figure in (
        ("sentences", f"{len(ran)}"),
        ("corrected", f"{sum(segment.changed for segment in ran)}"),
        ("forwards", f"{forwards}"),
        ("tokens per forward", f"{tokens / forwards:.1f}"),
        ("milliseconds per sentence", f"{1000 * seconds / len(ran):.1f}"),
    ):
        CONSOLE.print(f"{name:<28}{figure}")


if __name__ == "__main__":
    main()
