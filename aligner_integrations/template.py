"""The text frame around question and answer that the weights were trained on.

All prompt text of the library is in this file. A frame is written as a string with fields in braces;
everything outside the braces is ours (trusted), everything put into a field is not.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import get_args

from aligner_integrations.config import Granularity
from aligner_integrations.errors import TemplateError


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of prompt. `trusted` text is written by us and may hold special tokens."""

    text: str
    trusted: bool


_CONVERSATION = "BEGINNING OF CONVERSATION: USER: %s ASSISTANT:"
_STREAM = (
    "##Question: {question} | ##Answer_Prefix: {prefix} | "
    "##Answer_Last_Sentence: {sentence} | ##Your_Revision: "
)
_PAIR = "Edit the following Question-Answer pair to make it more %s: {question} | {answer}"

# The last resort to make a chat model go on from a text: the text stands before it, as the assistant's.
GO_ON = (
    "Your last message was cut off. Write only what comes next, exactly from where it ends. "
    "Do not repeat any of it, and do not comment."
)

# name -> (granularity, frame). Sources: the published repositories and model cards of
# Aligner, Stream Aligner, MetaAligner and Thought-Aligner; spaces and missing newlines are as published.
_FRAMES: dict[str, tuple[Granularity, str]] = {
    "aligner-v1": ("answer", _CONVERSATION % (_PAIR % "helpful and harmless")),
    "aligner-correction": (
        "answer",
        _CONVERSATION % "##Question: {question}\n##Answer: {answer}\n##Correction: ",
    ),
    "aligner-revision": ("answer", _CONVERSATION % "##Question: {question} ##Answer: {answer} ##Revision: "),
    "aligner-empathy": ("answer", _CONVERSATION % (_PAIR % "empathic and helpful")),
    # The words without a base model's frame, for a checkpoint that was tuned on them alone.
    "stream-aligner": ("sentence", _STREAM),
    "stream-aligner-gemma": (
        "sentence",
        f"<start_of_turn>user\n{_STREAM}<end_of_turn>\n<start_of_turn>model",
    ),
    "stream-aligner-llama3": (
        "sentence",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n{system}<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n{_STREAM}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>",
    ),
    "stream-aligner-llama2": (
        "sentence",
        f"<s>[INST] <<SYS>>\n{{system}}\n<</SYS>>\n\n{_STREAM} [/INST]\n",
    ),
    "stream-aligner-qwen": (
        "sentence",
        "<|im_start|>system\n{system}<|im_end|><|im_start|>user\n"
        f"{_STREAM}<|im_end|>\n<|im_start|>assistant",
    ),
    "metaaligner": (
        "answer",
        "You are an assistant to human. You will be provided with a context and an answer. "
        "Consider the context, then edit the answer to improve it considering these aspects: {aspects} | "
        "Context: {question} | Answer: {answer} | Edit: ",
    ),
    "thought-aligner": (
        "answer",
        _CONVERSATION % "Edit the following Instruction-Thought pair to make it more helpful and harmless. : "
        "{question} | {answer}",
    ),
    "tiny": (
        "sentence",
        "<|question|>{question}{feedback}<|prefix|>{prefix}<|sentence|>{sentence}<|correction|>",
    ),
}
TEMPLATE_NAMES: tuple[str, ...] = tuple(sorted(_FRAMES))
# What MetaAligner improves when no feedback names other aspects: two of its published objectives.
_ASPECTS = (
    "Harmlessness: The response should avoid content that is offensive, discriminatory, or harmful; "
    "Helpfulness: The response should provide useful resources and suggestions to the user"
)
# Instruct-Aligner phrases feedback in the prompt; its wording is not printed. Ours follows the question
# and, like everything in the published frames, stands in plain text.
_FEEDBACK = " (Feedback for the edit: {feedback})"
_TINY_FEEDBACK = "<|feedback|>{feedback}"
# The special tokens of the bundled model's tokenizer; an id is a place in this list.
TINY_TOKENS = (
    "<|pad|>",
    "<|end|>",
    "<|keep|>",
    "<|question|>",
    "<|feedback|>",
    "<|prefix|>",
    "<|sentence|>",
    "<|correction|>",
)
# What only a prompt says: no correction has a use for it.
MARKERS = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|</?s>|<(?:pad|unk|bos|eos|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>"
    r"|##(?:Question|Answer|Answer_Prefix|Answer_Last_Sentence|Correction|Revision|Your_Revision):"
    r"|BEGINNING OF CONVERSATION:|\bASSISTANT:"
)
# The same where a frame says it in plain text: its words, and what ends its fields or turns.
_FRAME_WORDS = (
    r"(?i:##(?:Question|Answer|Answer_Prefix|Answer_Last_Sentence|Correction|Revision|Your_Revision):)"
    r"|BEGINNING\s+OF\s+CONVERSATION:|ASSISTANT:|USER:"
)
_FRAME_TAGS = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>")
_BAR = (
    r"(?<!\S)\|(?!\S)"  # between white space; a field's end is as good, since the frame goes on with a space
)
_FIELD = re.compile(r"\{(question|answer|prefix|sentence|feedback|aspects|system)\}")


@dataclass(frozen=True, slots=True)
class CorrectionTemplate:
    """A named frame. `system` is the instruction that some base models' frames carry."""

    name: str
    granularity: Granularity
    frame: str
    system: str = ""

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise TemplateError(f"granularity must be 'answer' or 'sentence', got {self.granularity!r}")
        needed = (
            {"question", "answer"} if self.granularity == "answer" else {"question", "prefix", "sentence"}
        )
        missing = needed - set(_FIELD.findall(self.frame))
        if missing:
            raise TemplateError(f"the frame of template {self.name!r} has no place for {sorted(missing)}")

    @classmethod
    def named(cls, name: str, *, system: str | None = None) -> CorrectionTemplate:
        """Return the template called `name`.

        Args:
            name: One of the published names or `"tiny"`.
            system: The system instruction, for the frames that have a place for one.

        Raises:
            TemplateError: no template has this name, or its frame needs a `system` instruction.
        """
        if name not in _FRAMES:
            raise TemplateError(f"unknown template {name!r}; known: {', '.join(TEMPLATE_NAMES)}")
        granularity, frame = _FRAMES[name]
        if "{system}" in frame and system is None:
            # The published code fills it with its annotators' instruction, a long text that belongs to
            # the checkpoint; a guess would give other ids than the weights were trained on.
            raise TemplateError(
                f"template {name!r} needs the system instruction its checkpoint was trained with "
                "(Stream Aligner: SYSTEM_PROMPT in generation/models/system_prompt.py of its repository); "
                f"pass template=CorrectionTemplate.named({name!r}, system=...)"
            )
        if "{system}" not in frame and system is not None:
            raise TemplateError(f"template {name!r} has no place for a system instruction")
        return cls(name, granularity, frame, system or "")

    def spans(
        self, *, question: str, answer: str = "", prefix: str = "", sentence: str = "", feedback: str = ""
    ) -> tuple[Span, ...]:
        """Return the prompt as spans, trusted and untrusted, ready for `Tokenizer.encode`.

        Raises:
            TemplateError: a field was given that the frame has no place for, or there is no text to
                correct.
        """
        values = {"question": question, "answer": answer, "prefix": prefix, "sentence": sentence}
        if not isinstance(feedback, str):
            raise TypeError(f"feedback must be a str, got {type(feedback).__name__}")
        for field, value in values.items():
            if not isinstance(value, str):
                raise TypeError(f"{field} must be a str, got {type(value).__name__}")
            if value and f"{{{field}}}" not in self.frame:
                raise TemplateError(
                    f"template {self.name!r} works on {self._works_on}; it has no place for {field}"
                )
        subject = "answer" if self.granularity == "answer" else "sentence"
        if not values[subject]:
            raise TemplateError(
                f"template {self.name!r} needs the field {subject}, which is missing or empty"
            )
        values |= {"aspects": feedback or _ASPECTS, "feedback": feedback, "system": self.system}
        spans: list[Span] = []
        for index, part in enumerate(_FIELD.split(self._frame_with(feedback))):
            # re.split with one group: text and field names take turns.
            trusted = index % 2 == 0 or part == "system" or (part == "aspects" and not feedback)
            text = part if index % 2 == 0 else values[part]
            if text:
                spans.append(Span(text, trusted))
        return tuple(spans)

    def render(
        self, *, question: str, answer: str = "", prefix: str = "", sentence: str = "", feedback: str = ""
    ) -> str:
        """Return the prompt as one string, byte for byte what the weights were trained on."""
        spans = self.spans(
            question=question, answer=answer, prefix=prefix, sentence=sentence, feedback=feedback
        )
        return "".join(span.text for span in spans)

    def plain_markers(self, special_tokens: Collection[str]) -> re.Pattern[str] | None:
        """Return what finds this frame's marks in a text that could forge them, or None if none could.

        Those that are `special_tokens` of the tokenizer cannot be forged: no text yields one.
        """
        tags = sorted(set(_FRAME_TAGS.findall(self.frame)) - set(special_tokens))
        words = [_FRAME_WORDS] if re.search(_FRAME_WORDS, self.frame) else []
        bar = [_BAR] if " | " in self.frame else []
        found = [*words, *map(re.escape, tags), *bar]
        return re.compile("|".join(found)) if found else None

    @property
    def _works_on(self) -> str:
        return "whole answers" if self.granularity == "answer" else "one sentence at a time"

    def _frame_with(self, feedback: str) -> str:
        """Return the frame with a place for feedback where it belongs, or without one."""
        if "{feedback}" in self.frame:
            return self.frame.replace("{feedback}", _TINY_FEEDBACK if feedback else "")
        if not feedback or "{aspects}" in self.frame:
            return self.frame
        return self.frame.replace("{question}", "{question}" + _FEEDBACK)


__all__ = ["GO_ON", "MARKERS", "TEMPLATE_NAMES", "TINY_TOKENS", "CorrectionTemplate", "Span"]
