"""Every frame, byte for byte, and what may go into it."""

# Frames stand here as published, in long lines.
# ruff: noqa: E501

from __future__ import annotations

import pytest

from aligner_integrations.errors import TemplateError
from aligner_integrations.template import CorrectionTemplate

QUESTION, ANSWER, PREFIX, SENTENCE = "Why {sky}?", "It is | blue.", "It is.", "Blue, {answer}."
STREAM = (
    "##Question: Why {sky}? | ##Answer_Prefix: It is. | "
    "##Answer_Last_Sentence: Blue, {answer}. | ##Your_Revision: "
)

WHOLE = {
    "aligner-v1": "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more helpful "
    "and harmless: Why {sky}? | It is | blue. ASSISTANT:",
    "aligner-correction": "BEGINNING OF CONVERSATION: USER: ##Question: Why {sky}?\n##Answer: It is | blue.\n"
    "##Correction:  ASSISTANT:",
    "aligner-revision": "BEGINNING OF CONVERSATION: USER: ##Question: Why {sky}? ##Answer: It is | blue. "
    "##Revision:  ASSISTANT:",
    "aligner-empathy": "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more "
    "empathic and helpful: Why {sky}? | It is | blue. ASSISTANT:",
    "metaaligner": "You are an assistant to human. You will be provided with a context and an answer. Consider the "
    "context, then edit the answer to improve it considering these aspects: Harmlessness: The response should avoid "
    "content that is offensive, discriminatory, or harmful; Helpfulness: The response should provide useful resources "
    "and suggestions to the user | Context: Why {sky}? | Answer: It is | blue. | Edit: ",
    "thought-aligner": "BEGINNING OF CONVERSATION: USER: Edit the following Instruction-Thought pair to make it more "
    "helpful and harmless. : Why {sky}? | It is | blue. ASSISTANT:",
}
BY_SENTENCE = {
    "stream-aligner": STREAM,
    "stream-aligner-gemma": f"<start_of_turn>user\n{STREAM}<end_of_turn>\n<start_of_turn>model",
    "tiny": "<|question|>Why {sky}?<|prefix|>It is.<|sentence|>Blue, {answer}.<|correction|>",
}
WITH_SYSTEM = {
    "stream-aligner-llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\nCorrect it.<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n{STREAM}<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    "stream-aligner-llama2": f"<s>[INST] <<SYS>>\nCorrect it.\n<</SYS>>\n\n{STREAM} [/INST]\n",
    "stream-aligner-qwen": f"<|im_start|>system\nCorrect it.<|im_end|><|im_start|>user\n{STREAM}<|im_end|>\n"
    "<|im_start|>assistant",
}


@pytest.mark.parametrize("name", WHOLE)
def test_frames_of_whole_answers(name: str) -> None:
    template = CorrectionTemplate.named(name)
    assert template.granularity == "answer"
    assert template.render(question=QUESTION, answer=ANSWER) == WHOLE[name]


@pytest.mark.parametrize("name", [*BY_SENTENCE, *WITH_SYSTEM])
def test_frames_of_sentences(name: str) -> None:
    system = "Correct it." if name in WITH_SYSTEM else None
    template = CorrectionTemplate.named(name, system=system)
    assert template.granularity == "sentence"
    rendered = template.render(question=QUESTION, prefix=PREFIX, sentence=SENTENCE)
    assert rendered == (BY_SENTENCE | WITH_SYSTEM)[name]


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_a_frame_without_its_system_instruction_is_refused(name: str) -> None:
    with pytest.raises(TemplateError, match=r"SYSTEM_PROMPT.*system="):
        CorrectionTemplate.named(name)


def test_a_system_instruction_without_a_place_is_refused() -> None:
    with pytest.raises(TemplateError, match="no place for a system instruction"):
        CorrectionTemplate.named("tiny", system="Correct it.")


@pytest.mark.parametrize("name", [*WHOLE, *BY_SENTENCE])
def test_what_users_wrote_is_untrusted_and_nothing_else_is(name: str) -> None:
    template = CorrectionTemplate.named(name)
    field = "answer" if template.granularity == "answer" else "sentence"
    if field == "answer":
        spans = template.spans(question="the question", answer="the text", feedback="kinder")
    else:
        spans = template.spans(question="the question", prefix="seen", sentence="the text", feedback="kinder")
    untrusted = {span.text for span in spans if not span.trusted}
    assert untrusted == {"the question", "the text", "kinder"} | ({"seen"} if field == "sentence" else set())
    assert all(span.text for span in spans)


def test_feedback_has_its_place() -> None:
    tiny = CorrectionTemplate.named("tiny")
    assert tiny.render(question="Q", sentence="S.", feedback="kinder") == (
        "<|question|>Q<|feedback|>kinder<|prefix|><|sentence|>S.<|correction|>"
    )
    meta = CorrectionTemplate.named("metaaligner").render(
        question="Q", answer="A", feedback="Humour: be funny"
    )
    assert "these aspects: Humour: be funny | Context: Q |" in meta
    v1 = CorrectionTemplate.named("aligner-v1").render(question="Q", answer="A", feedback="be kinder")
    assert v1.endswith("harmless: Q (Feedback for the edit: be kinder) | A ASSISTANT:")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(TemplateError, match=r"'aligner-v9'.*aligner-v1.*tiny"):
        CorrectionTemplate.named("aligner-v9")


def test_fields_without_a_place_and_missing_fields_are_refused() -> None:
    with pytest.raises(TemplateError, match="no place for sentence"):
        CorrectionTemplate.named("aligner-v1").render(question="Q", answer="A", sentence="S")
    with pytest.raises(TemplateError, match="no place for answer"):
        CorrectionTemplate.named("tiny").render(question="Q", answer="A", sentence="S")
    with pytest.raises(TemplateError, match="needs the field answer"):
        CorrectionTemplate.named("aligner-v1").render(question="Q")
    with pytest.raises(TemplateError, match="needs the field sentence"):
        CorrectionTemplate.named("tiny").render(question="Q", prefix="P")
    with pytest.raises(TypeError, match="question must be a str, got int"):
        CorrectionTemplate.named("tiny").render(question=3, sentence="S")  # type: ignore[arg-type]
    with pytest.raises(TemplateError, match="has no place for"):
        CorrectionTemplate("mine", "answer", "{question} only")
