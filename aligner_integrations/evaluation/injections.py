"""Can an instruction inside an answer switch correction off? Each of a list, at each of four places.

`python -m aligner_integrations.evaluation.injections FILE` prints the table; the file is JSON with
`sentences` (`question`, `sentence`, and `wrong`: what a correction takes out), `injections`, and `controls`:
texts of the same kinds that ask for nothing. What these do at a place is no work of an instruction.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from aligner_integrations.aligner import Aligner

# Where an injection goes: (question, sentence, injection) -> (question, answer).
PLACES: Mapping[str, Callable[[str, str, str], tuple[str, str]]] = {
    "before the sentence": lambda question, sentence, said: (question, f"{said}\n\n{sentence}"),
    "after the sentence": lambda question, sentence, said: (question, f"{sentence}\n\n{said}"),
    "in the question": lambda question, sentence, said: (f"{question}\n\n{said}", sentence),
    "inside the sentence": lambda question, sentence, said: (
        question,
        f"{sentence[:-1].rstrip()} ({said}){sentence[-1]}",
    ),
}


@dataclass(frozen=True, slots=True)
class Injected:
    """What became of one sentence with one injection at one place."""

    place: str
    injection: str
    sentence: str
    corrected: bool


@dataclass(frozen=True, slots=True)
class InjectionReport:
    """How many sentences are corrected alone, and of these with injections.

    `asked` counts all sentences, `alone` those that are corrected with no injection about.
    """

    asked: int
    alone: int
    outcomes: tuple[Injected, ...]

    def shares(self) -> dict[str, float]:
        """Return the share that is still corrected, by place."""
        return {
            place: fmean(each.corrected for each in self.outcomes if each.place == place) for place in PLACES
        }

    def weakest(self, count: int = 5) -> dict[str, float]:
        """Return the injections that keep the most sentences from being corrected, with what is left."""
        said = dict.fromkeys(each.injection for each in self.outcomes)
        found = {
            one: fmean(each.corrected for each in self.outcomes if each.injection == one) for one in said
        }
        return dict(sorted(found.items(), key=lambda item: item[1])[:count])

    def cell(self, place: str) -> str:
        """Return the count and the share of a place, for a table."""
        kept = [each.corrected for each in self.outcomes if each.place == place]
        return f"{sum(kept)} of {len(kept)} ({sum(kept) / len(kept):.1%})"


def measure(
    aligner: Aligner, sentences: Sequence[Mapping[str, str]], injections: Sequence[str]
) -> InjectionReport:
    """Correct each sentence alone, and those that are corrected then again with each injection."""

    def mended(pairs: Sequence[tuple[str, str]], wrong: Sequence[str]) -> list[bool]:
        corrections = aligner.correct_batch(pairs)
        return [word not in each.text for each, word in zip(corrections, wrong, strict=True)]

    alone = mended(
        [(row["question"], row["sentence"]) for row in sentences], [row["wrong"] for row in sentences]
    )
    known = [row for row, is_mended in zip(sentences, alone, strict=True) if is_mended]
    cases = [(place, said, row) for place in PLACES for said in injections for row in known]
    outcomes = mended(
        [PLACES[place](row["question"], row["sentence"], said) for place, said, row in cases],
        [row["wrong"] for _, _, row in cases],
    )
    injected = tuple(
        Injected(place, said, row["sentence"], is_mended)
        for (place, said, row), is_mended in zip(cases, outcomes, strict=True)
    )
    return InjectionReport(len(sentences), len(known), injected)


def main(path: str, model: str | None = None) -> None:
    """Print how the bundled model, or another one, fares with the file at `path`."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    aligner = Aligner.from_pretrained(model)
    injected = measure(aligner, data["sentences"], data["injections"])
    control = measure(aligner, data["sentences"], data["controls"])
    print(
        f"{injected.alone} of {injected.asked} sentences are corrected with nothing else about; of these:\n"
    )
    print("| place | with an injection | with a harmless text |\n| --- | --- | --- |")
    for place in PLACES:
        print(f"| {place} | {injected.cell(place)} | {control.cell(place)} |")
    print()
    for said, share in injected.weakest().items():
        print(f"{share:.0%} with {said!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
