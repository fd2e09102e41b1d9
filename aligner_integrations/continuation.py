"""How a model is made to go on from a given text, as far as that is the same for every framework."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

# `auto`: the best way that the model is known to have, else `instruct`.
# `prefill`: the text is the assistant's, in the last message; the API goes on from it.
# `continue_final_message`: the same, and vLLM's and Hugging Face's options that ask for it.
# `prefix`: the same, and Mistral's and DeepSeek's mark on the message.
# `instruct`: a message of the user asks for it, after the assistant's. Any chat model takes it; how well it
#     keeps to it is its own affair. What it repeats is removed.
Continuation: TypeAlias = Literal["auto", "prefill", "continue_final_message", "prefix", "instruct"]

# Claude models to which the last message of a call may be the assistant's. 4.6 and later refuse it.
_CLAUDE_WITH_PREFILL = re.compile(
    r"claude-(?:[123]\b|instant|(?:opus|sonnet|haiku)-4(?:-[0-5])?(?!\d|-\d{1,2}\b))"
)

_LONGEST = 2000  # characters of the shown text in which a repetition is looked for
_SHORTEST = 8  # what is shorter may well be said again


def claude_goes_on(name: str) -> bool:
    """Whether a Claude model of that name goes on from a last message of the assistant."""
    return _CLAUDE_WITH_PREFILL.search(name) is not None


class Repetition:
    """Removes what an answer repeats at its beginning of the text that it was to go on from.

    Text is held as long as it may be such a repetition; a repetition begins where a word does.
    """

    def __init__(self, shown: str) -> None:
        text = shown.strip()[-_LONGEST:]
        starts = [at for at in range(len(text)) if at == 0 or not (text[at - 1 : at + 1].isalnum())]
        self._tails = [text[at:] for at in starts if not text[at].isspace()]
        self._tails = [tail for tail in self._tails if len(tail) >= min(_SHORTEST, len(text))]
        self.held = ""

    def feed(self, text: str) -> str:
        """Take text; return what is new of all that has come."""
        self.held += text
        begun = self.held.lstrip()
        if any(len(tail) > len(begun) and tail.startswith(begun) for tail in self._tails):
            return ""
        return self.end()

    def end(self) -> str:
        """Return what is held, without what it repeats."""
        begun = self.held.lstrip()
        repeated = max((len(tail) for tail in self._tails if begun.startswith(tail)), default=0)
        new = begun[repeated:] if repeated else self.held
        self.held, self._tails = "", []
        return new
