"""A finished answer: corrected as a whole, or sentence by sentence and put together again."""

from __future__ import annotations

from aligner_integrations.aligner import Aligner, has_words
from aligner_integrations.correction import Correction, DecodeStats, Edit
from aligner_integrations.decode import PromptCache
from aligner_integrations.errors import AlignerError, InputTooLongError
from aligner_integrations.resilience import Budget, ErrorPolicy
from aligner_integrations.sentences import SentenceBuffer
from aligner_integrations.stream import SentenceSession, stand_in


def correct_finished(
    aligner: Aligner,
    question: str,
    answer: str,
    *,
    feedback: str,
    errors: ErrorPolicy,
    cache: PromptCache | None = None,
) -> Correction:
    """Correct a finished answer.

    A `cache` that an earlier answer has used saves the tokens with which both prompts begin; its backend
    runs the forwards.

    Raises:
        AlignerError: a correction failed, or an answer-level model's context cannot hold it, and `errors`
            does not say what to show instead.
    """
    if aligner.granularity == "sentence":
        return _correct_by_sentence(aligner, question, answer, feedback, errors, cache)
    try:
        return _correct_whole(aligner, question, answer, feedback, errors.budget(), cache)
    except AlignerError as error:
        if errors.on_error == "raise":  # unlike a stream also when it is too long: nothing is shown yet
            raise
        return stand_in(aligner, question, answer, error, errors)


def _correct_whole(
    aligner: Aligner, question: str, answer: str, feedback: str, budget: Budget, cache: PromptCache | None
) -> Correction:
    core = answer.strip()
    if not has_words(core):
        return aligner.untouched(question, answer)
    with budget.sentence() as deadline:
        prompt = aligner.encode_prompt(question, "", core, feedback)
        reference = aligner.encode_text(core)
        room = aligner.config.max_length - len(prompt)
        if room <= len(reference):
            raise InputTooLongError(
                f"question and answer take {len(prompt)} tokens and a correction as long as the answer "
                f"{len(reference) + 1} more; the model's context has {aligner.config.max_length}"
            )
        wanted = aligner.decode_config.max_new_tokens or room
        decoded = aligner.run(prompt, reference, min(wanted, room), cache, deadline)
    lead, _, tail = answer.partition(core)
    return aligner.finish(question, (lead, core, tail), reference, decoded)


def _correct_by_sentence(
    aligner: Aligner,
    question: str,
    answer: str,
    feedback: str,
    errors: ErrorPolicy,
    cache: PromptCache | None,
) -> Correction:
    session, buffer = SentenceSession(aligner, question, feedback, cache, errors.budget()), SentenceBuffer()
    parts: list[Correction] = []
    for piece in (*buffer.push(answer), *buffer.flush()):
        try:
            part = session.correct(piece)
        except AlignerError as error:
            part = stand_in(aligner, question, piece, error, errors)
        session.accept(part.text)
        parts.append(part)
    return _merge(question, answer, parts) if parts else aligner.untouched(question, answer)


def _merge(question: str, answer: str, parts: list[Correction]) -> Correction:
    edits: list[Edit] = []
    start = 0
    for part in parts:
        edits += (Edit(start + edit.start, start + edit.end, edit.replacement) for edit in part.edits)
        start += len(part.answer)
    return Correction(
        question=question,
        answer=answer,
        text="".join(part.text for part in parts),
        proposed="".join(part.proposed for part in parts),
        edits=tuple(edits),
        # The same finding of many sentences is said once.
        findings=tuple(dict.fromkeys(finding for part in parts for finding in part.findings)),
        stats=_merge_stats([part.stats for part in parts]),
    )


def _merge_stats(parts: list[DecodeStats]) -> DecodeStats:
    """Sum what the sentences cost; the worst reason to finish stands for all."""
    reasons = {part.finish_reason for part in parts}
    return DecodeStats(
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        cached_tokens=sum(part.cached_tokens for part in parts),
        new_tokens=sum(part.new_tokens for part in parts),
        forwards=sum(part.forwards for part in parts),
        drafted_tokens=sum(part.drafted_tokens for part in parts),
        accepted_tokens=sum(part.accepted_tokens for part in parts),
        seconds=sum(part.seconds for part in parts),
        finish_reason="deadline" if "deadline" in reasons else "length" if "length" in reasons else "eos",
        backend=parts[0].backend,
        provider=parts[0].provider,
    )
