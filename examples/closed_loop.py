"""Let the upstream model go on from the corrected text, so that what follows fits to it.

The model here is a function that goes on with the number it said last; in your program it asks any model
for what comes after `prefix`. `--scripted` takes a rule for the aligner's model.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from aligner_integrations import Aligner, ClosedLoop

SENTENCES = (
    "Sam bakes 3 x 7 = 21 pies.",
    " His sister bakes 6 x 7 = 42 pies.",
    " Together they bake 21 + 42 = 630 pies.",
    " So they need {number} boxes.",
    " They have {number} of them.",
)


def upstream(question: str, prefix: str) -> Iterator[str]:
    """Yield what comes after `prefix`, word by word."""
    said = prefix
    for sentence in SENTENCES[prefix.count(".") :]:
        number = (re.findall(r"\d+", said) or ["0"])[-1]
        for word in re.findall(r"\s*\S+", sentence.format(number=number)):
            said += word
            yield word


def load_aligner() -> Aligner:
    if "--scripted" not in sys.argv:
        return Aligner.from_pretrained()
    from aligner_integrations.testing import scripted_aligner

    return scripted_aligner(lambda question, prefix, sentence: sentence.replace("= 630", "= 63"))


def main() -> None:
    loop = ClosedLoop(upstream, load_aligner())
    stream = loop.stream("Sam bakes 3 pies a day and his sister 6. How many boxes for the pies of 7 days?")
    for segment in stream:
        print(segment.text, end="", flush=True)
    stats = stream.stats
    print(f"\n{stats.rounds} rounds, {stats.requested_chars} characters requested, ", end="")
    print(f"{stats.thrown_away_chars} of them thrown away")


if __name__ == "__main__":
    main()
