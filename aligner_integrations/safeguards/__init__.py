"""Do no harm: what may be shown in place of an answer. Pure functions, no model.

`checks.py` holds the single checks, `policy.py` what is done about each, `repair.py` what can be put back.
"""

from __future__ import annotations

from aligner_integrations.correction import Finding
from aligner_integrations.safeguards.checks import CHECKS
from aligner_integrations.safeguards.policy import CHECK_NAMES, SafeguardPolicy
from aligner_integrations.safeguards.repair import REPAIRS, restore_citations
from aligner_integrations.safeguards.wording import is_refusal, word_similarity

_PUT_BACK = {
    "code_changed": "the fences of code were put back",
    "links_lost": "missing links were put back",
    "citations_lost": "missing citations were put back",
}


def inspect_correction(
    question: str, answer: str, proposed: str, *, policy: SafeguardPolicy | None = None
) -> tuple[Finding, ...]:
    """Return what is wrong with showing `proposed` in place of `answer`.

    A finding whose `action` is `"kept_original"` means that the proposal is not shown. Without a
    policy the default one for single sentences holds.
    """
    if proposed == answer:
        return ()
    policy = policy or SafeguardPolicy()
    active = (check for name, check in CHECKS.items() if policy.actions[name] != "off")
    found = (check(question, answer, proposed, policy) for check in active)
    return tuple(finding for finding in found if finding is not None)


def guard_correction(
    question: str, answer: str, proposed: str, *, policy: SafeguardPolicy | None = None
) -> tuple[str, tuple[Finding, ...]]:
    """Return what to show in place of `answer`, and the findings: `proposed` repaired, or the answer."""
    policy = policy or SafeguardPolicy()
    if proposed == answer:
        return proposed, ()
    shown = proposed
    repaired: list[Finding] = []
    for check, restore in REPAIRS.items():
        before = shown
        shown = restore(answer, shown) if policy.actions[check] == "repair" else shown
        if shown != before:
            repaired.append(Finding(check, _PUT_BACK[check], "repaired"))
    findings = inspect_correction(question, answer, shown, policy=policy)
    if is_kept(findings):
        return answer, findings
    return shown, (*findings, *repaired)


def is_kept(findings: tuple[Finding, ...]) -> bool:
    """Return whether any finding says that the original stays."""
    return any(finding.action == "kept_original" for finding in findings)


__all__ = [
    "CHECK_NAMES",
    "SafeguardPolicy",
    "guard_correction",
    "inspect_correction",
    "is_kept",
    "is_refusal",
    "restore_citations",
    "word_similarity",
]
