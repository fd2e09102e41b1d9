"""Correct finished answers: a wrong sum, and a sentence that is fine.

Run it with the bundled model, or with `--scripted` to see the mechanics with a rule for a model.
"""

from __future__ import annotations

import sys

from aligner_integrations import Aligner

QUESTION = "A farmer has 51 cows, buys 5 and sells a quarter of the herd. How many are left?"
ANSWER = """The farmer has 51+5 = 56 cows in the herd.
The farmer sells 56/4 = 14 cows.
The farmer now has 56-14 = 420 cows."""


def load_aligner() -> Aligner:
    if "--scripted" not in sys.argv:
        return Aligner.from_pretrained()
    from aligner_integrations.testing import scripted_aligner

    return scripted_aligner(lambda question, prefix, sentence: sentence.replace("= 420", "= 42"))


def main() -> None:
    correction = load_aligner().correct(QUESTION, ANSWER)
    print(correction.text)
    for edit in correction.edits:
        print(f"  {correction.answer[edit.start : edit.end]!r} -> {edit.replacement!r}")
    for finding in correction.findings:
        print(f"  {finding.check}: {finding.detail} ({finding.action})")
    print(f"{correction.stats.forwards} forwards on {correction.stats.provider}")


if __name__ == "__main__":
    main()
