"""Fresh sums: the right step computes, the wrong one differs in the result alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner_integrations.training.arithmetic import SumFrame, compute, fill_frame, find_frame, slip

OPERATORS = "-+*/x×÷"


@st.composite
def frames(draw: st.DrawFn) -> SumFrame:
    joints = (
        draw(st.sampled_from(["", " "])),
        draw(st.sampled_from(["", " ", " $"])),
        draw(st.sampled_from(["=", " = ", " = $"])),
    )
    operands = st.integers(0, 999_999)
    operator = draw(st.sampled_from(OPERATORS))
    before, after = draw(st.sampled_from(["", "So it is ", "$"])), draw(st.sampled_from(["", ".", " pens."]))
    return SumFrame(before, draw(operands), operator, draw(operands), joints, after)


def result_of(frame: SumFrame, step: str) -> tuple[int, int, int]:
    """The two operands and the result that `step` shows inside `frame`."""
    gap, joint, equals = frame.joints
    assert step.startswith(frame.before) and step.endswith(frame.after)
    inner = step[len(frame.before) : len(step) - len(frame.after)]
    left, _, rest = inner.partition(gap + frame.operator + joint)
    right, _, result = rest.partition(equals)
    return int(left), int(right), int(result)


@given(frames(), st.integers(0, 10_000))
def test_right_step_computes_and_wrong_step_differs_in_the_result_alone(frame: SumFrame, seed: int) -> None:
    right_step, wrong_step = fill_frame(frame, random.Random(seed))
    left, right, result = result_of(frame, right_step)
    assert compute(left, frame.operator, right) == result
    *operands, wrong = result_of(frame, wrong_step)
    assert operands == [left, right]
    assert wrong != result and wrong >= 0


@given(st.integers(0, 999), st.sampled_from("+-*"), st.integers(0, 999), st.integers(0, 100))
def test_a_frame_filled_with_its_own_operands_is_the_step_of_the_data(
    left: int, operator: str, right: int, seed: int
) -> None:
    result = compute(left, operator, right)
    if result is not None:
        step = f"That is {left} {operator} {right} = {result} pens."
        frame = find_frame(step)
        assert frame is not None
        right_step, wrong_step = fill_frame(frame, random.Random(seed), fresh=False)
        assert right_step == step and wrong_step != step
        assert result_of(frame, wrong_step)[:2] == (left, right)


@given(frames(), st.integers(0, 100))
def test_filling_is_a_function_of_the_seed(frame: SumFrame, seed: int) -> None:
    assert fill_frame(frame, random.Random(seed)) == fill_frame(frame, random.Random(seed))


@given(st.integers(0, 10**6), st.sampled_from(OPERATORS), st.integers(0, 10**6), st.integers(0, 100))
def test_a_slip_is_never_the_result(left: int, operator: str, right: int, seed: int) -> None:
    result = compute(left, operator, right)
    if result is not None:
        wrong = slip(left, operator, right, result, random.Random(seed))
        assert wrong != result and wrong >= 0


@pytest.mark.parametrize(
    ("step", "operands"),
    [
        ("He paid 4 x $15 = $60 in all.", (4, "x", 15)),
        ("60-14=46", (60, "-", 14)),
        ("That is 12 / 4 = 3.", (12, "/", 4)),
        ("3 × 3 = 9 cats", (3, "×", 3)),
        ("So 36 inches / 4 = 9 inches.", (36, "/", 4)),
        ("He ate 3 red apples + 4 pears = 7 in all", (3, "+", 4)),
    ],
)
def test_a_right_sum_is_found_and_put_back(step: str, operands: tuple[int, str, int]) -> None:
    frame = find_frame(step)
    assert frame is not None and (frame.left, frame.operator, frame.right) == operands
    gap, joint, equals = frame.joints
    result = compute(*operands)
    assert (
        f"{frame.before}{operands[0]}{gap}{operands[1]}{joint}{operands[2]}{equals}{result}{frame.after}"
        == step
    )


@pytest.mark.parametrize(
    "step",
    [
        "No sum at all.",
        "4 + 4 = 9",  # wrong
        "1 + 1 = 2 and 2 + 2 = 4",  # two
        "1.5 + 2 = 3.5",
        "2 + 3 = 5.5",
        "5 + 5 = 10,000",
        "7 / 2 = 3",
        "3 - 5 = 2",
    ],
)
def test_other_steps_are_left_out(step: str) -> None:
    assert find_frame(step) is None


@pytest.mark.parametrize(("sum_", "result"), [((7, "/", 2), None), ((7, "÷", 0), None), ((2, "-", 3), None)])
def test_no_result_among_whole_numbers(sum_: tuple[int, str, int], result: None) -> None:
    assert compute(*sum_) is result
