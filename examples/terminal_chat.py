"""A terminal chat on callbacks: text is shown as it comes, and a sentence is rewritten when it must be.

The chain is not touched: a handler reads along and feeds the screen. Type questions, or pipe them in; an
empty line ends. `--scripted` takes a rule for the aligner's model.
"""

from __future__ import annotations

import itertools
import sys

from langchain_core.language_models import GenericFakeChatModel
from langchain_core.prompts import ChatPromptTemplate
from rich.console import Console
from rich.live import Live
from rich.text import Text

from aligner_integrations import Aligner
from aligner_integrations.langchain import StreamAlignerCallbackHandler, TextUpdate
from aligner_integrations.langchain.displays import ShownText

ANSWER = "The farmer sells 56/4 = 14 cows. The farmer now has 56-14 = 420 cows."


def load_aligner() -> Aligner:
    if "--scripted" not in sys.argv:
        return Aligner.from_pretrained()
    from aligner_integrations.testing import scripted_aligner

    return scripted_aligner(lambda question, prefix, sentence: sentence.replace("= 420", "= 42"))


def main() -> None:
    prompt = ChatPromptTemplate.from_messages([("human", "{question}")])
    chain = prompt | GenericFakeChatModel(messages=itertools.repeat(ANSWER))
    console, aligner = Console(), load_aligner()
    lines = iter(input, "") if sys.stdin.isatty() else iter(["How many cows are left?"])
    for question in lines:
        shown = ShownText()
        with Live(console=console) as screen:

            def show(update: TextUpdate, shown: ShownText = shown, screen: Live = screen) -> None:
                screen.update(Text(shown.update(update)))

            handler = StreamAlignerCallbackHandler(aligner, sink=show, mode="optimistic")
            for _ in chain.stream({"question": question}, {"callbacks": [handler]}):
                pass  # what the chain itself gives is the raw answer


if __name__ == "__main__":
    main()
