"""More sums than the data holds: real steps with fresh numbers, right and wrong.

A step such as "He paid 4 x $15 = $60 in all." is kept as a frame; its operands are drawn anew and
the result is computed. Wrong results follow the kinds of slip that the data shows.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

# Up to three words (units) may stand behind an operand: "36 inches / 4 = 9 inches".
_UNITS = r"(?: ?[A-Za-z%]+){0,3}"
_SUM = re.compile(
    rf"(?<![\d.,])(\d{{1,6}})({_UNITS}\s*)([-+*/x×÷])(\s*\$?)(\d{{1,6}})({_UNITS}\s*=\s*\$?)"
    r"(\d{1,7})(?![\d,]|\.\d)"
)

_RESULT = re.compile(r"=\s*\$?(\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True, slots=True)
class SumFrame:
    """A real step around one sum: text before, operand, operator, operand, equals, text after."""

    before: str
    left: int
    operator: str
    right: int
    joints: tuple[str, str, str]
    after: str


def find_frame(step: str) -> SumFrame | None:
    """Return the frame of a right step with exactly one plain sum of whole numbers, else None."""
    matches = list(_SUM.finditer(step))
    if len(matches) != 1 or step.count("=") != 1:
        return None
    match = matches[0]
    left, gap, operator, joint, right, equals, result = match.groups()
    if compute(int(left), operator, int(right)) != int(result):
        return None
    operands = (int(left), operator, int(right))
    return SumFrame(step[: match.start()], *operands, (gap, joint, equals), step[match.end() :])


def find_results(sentence: str, right: str) -> list[tuple[int, int, str]]:
    """Return each result in `sentence`: where it starts and ends, and what it is in the `right` sentence.

    The two sentences may differ in one result; if they differ in anything else there are none.
    """
    same = 0
    while same < min(len(sentence), len(right)) and sentence[same] == right[same]:
        same += 1
    grown = len(right) - len(sentence)
    results: list[tuple[int, int, str]] = []
    mended = sentence == right
    for match in _RESULT.finditer(sentence):
        start, end = match.span(1)
        if not mended and start <= same <= end:
            if sentence[end:] != right[end + grown :]:
                return []
            results.append((start, end, right[start : end + grown]))
            mended = True
        else:
            results.append((start, end, match[1]))
    return results if mended else []


def compute(left: int, operator: str, right: int) -> int | None:
    """Return the whole-number result, None where there is none."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right if left >= right else None
    if operator in "*x×":
        return left * right
    return left // right if right and left % right == 0 else None


def fill_frame(frame: SumFrame, rng: random.Random, *, fresh: bool = True) -> tuple[str, str]:
    """Return (right step, wrong step): with fresh operands of about the original's size, or its own."""
    start, result, wrong = fill_sum(frame, rng, fresh=fresh)
    return f"{start}{result}{frame.after}", f"{start}{wrong}{frame.after}"


def fill_sum(frame: SumFrame, rng: random.Random, *, fresh: bool) -> tuple[str, int, int]:
    """Return the step up to its result, the right result and a wrong one."""
    left, right = frame.left, frame.right
    if fresh:
        left, right = _draw(frame.left, rng), _draw(frame.right, rng)
        if frame.operator == "-" and left < right:
            left, right = right, left
        if frame.operator in "/÷":
            right = max(right, 1)
            left = right * _draw(max(frame.left // max(frame.right, 1), 1), rng)
    result = compute(left, frame.operator, right)
    assert result is not None
    gap, joint, equals = frame.joints
    start = f"{frame.before}{left}{gap}{frame.operator}{joint}{right}{equals}"
    return start, result, slip(left, frame.operator, right, result, rng)


def slip(left: int, operator: str, right: int, result: int, rng: random.Random) -> int:
    """Return a wrong result of the kinds found in the data: off by little, by ten, another operation."""
    for _ in range(20):
        kind = rng.random()
        if kind < 0.6:
            wrong = result + rng.choice((3, -1, 12, 1, 2, -2))
        elif kind < 0.8:
            wrong = result + rng.choice((10, -10, 10 ** max(len(str(result)) - 1, 1)))
        elif kind < 0.93:
            other = compute(left, rng.choice("+-*/"), right)
            wrong = result if other is None else other
        else:
            digits = list(str(result))
            rng.shuffle(digits)
            wrong = int("".join(digits))
        if wrong != result and wrong >= 0:
            return wrong
    return result + 1


def _draw(like: int, rng: random.Random) -> int:
    """Draw a number near the size of `like`; small and round numbers stay common, as in the data."""
    if like < 10:
        return rng.randint(1, 12)
    size = 10 ** (len(str(like)) - 1)
    number = rng.randint(size, size * 10 - 1) if rng.random() < 0.8 else rng.randint(1, size)
    if like % 10 == 0 and rng.random() < 0.7:
        zeros = len(str(like)) - len(str(like).rstrip("0"))
        number = max(number // 10**zeros, 1) * 10**zeros
    return number
