"""What is done about each check: the defaults, what a user says instead, and where it is said."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from typing import Any

import pytest

from aligner_integrations import Aligner
from aligner_integrations.safeguards import CHECK_NAMES, SafeguardPolicy, guard_correction, inspect_correction
from aligner_integrations.safeguards.checks import CHECKS
from aligner_integrations.safeguards.policy import REPAIRED_CHECKS, resolve_safeguards
from aligner_integrations.safeguards.repair import REPAIRS
from aligner_integrations.testing import scripted_aligner

ANSWER = "The sum of 12 and 30 is 43, so you have 43 apples."
LOOPED = ANSWER + " apples apples apples apples"


def test_every_check_has_its_actions_and_every_repair_its_check() -> None:
    assert set(CHECKS) == set(CHECK_NAMES)
    assert set(REPAIRS) == set(REPAIRED_CHECKS)
    for granularity in ("sentence", "answer"):
        policy = SafeguardPolicy.for_granularity(granularity)
        assert set(policy.actions) == set(CHECK_NAMES)
    assert SafeguardPolicy.for_granularity("sentence") == SafeguardPolicy()


@pytest.mark.parametrize(
    ("action", "kept", "found"),
    [("keep_original", True, ["kept_original"]), ("accept", False, ["accepted"]), ("off", False, [])],
)
def test_an_action_decides_what_is_shown_and_what_is_said(action: Any, kept: bool, found: list[str]) -> None:
    policy = SafeguardPolicy().with_actions({"repetition": action})
    shown, findings = guard_correction("Q", ANSWER, LOOPED, policy=policy)
    assert shown == (ANSWER if kept else LOOPED)
    assert [finding.action for finding in findings if finding.check == "repetition"] == found
    assert inspect_correction("Q", ANSWER, LOOPED, policy=policy) == findings


@pytest.mark.parametrize("check", CHECK_NAMES)
def test_each_check_can_be_turned_off_by_name(check: str) -> None:
    policy = resolve_safeguards("off", "sentence").with_actions({check: "accept"})
    only = {name for name, action in policy.actions.items() if action != "off"}
    assert only == {check}


def test_safeguards_may_be_said_in_four_ways() -> None:
    aligner = scripted_aligner(lambda *fields: LOOPED, safeguards="keep_original")
    assert aligner.correct_sentence("Q", "", ANSWER).text == ANSWER
    reported = aligner.with_options(safeguards={"repetition": "accept"}).correct_sentence("Q", "", ANSWER)
    assert (reported.text, reported.proposed) == (LOOPED, LOOPED)
    assert [(finding.check, finding.action) for finding in reported.findings] == [("repetition", "accepted")]
    free = aligner.with_options(safeguards="off").correct_sentence("Q", "", ANSWER)
    assert (free.text, free.findings) == (LOOPED, ())
    policy = SafeguardPolicy(max_growth=1.0, slack_chars=0).with_actions({"repetition": "off"})
    strict = aligner.with_options(safeguards=policy).correct_sentence("Q", "", ANSWER)
    assert [(finding.check, finding.action) for finding in strict.findings] == [("length", "kept_original")]
    assert (strict.text, strict.proposed) == (ANSWER, LOOPED)
    # Other options leave them as they are.
    assert aligner.with_options(safeguards=policy).with_options().safeguard_policy == policy


def test_a_mapping_keeps_the_other_defaults_of_the_granularity() -> None:
    whole = scripted_aligner(lambda *f: "", granularity="answer", safeguards={"length": "off"})
    assert whole.safeguard_policy == SafeguardPolicy.for_granularity("answer").with_actions({"length": "off"})
    single = scripted_aligner(lambda *f: "", safeguards={"length": "off"})
    assert single.safeguard_policy == SafeguardPolicy(actions={"length": "off"})


@pytest.mark.parametrize(
    ("safeguards", "named"),
    [
        ("on", "keep_original"),
        (None, "keep_original"),
        ({"spelling": "accept"}, "repetition"),
        ({"repetition": "ignore"}, "accept"),
        ({"repetition": "repair"}, "citations_lost"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(safeguards: Any, named: str) -> None:
    parts = scripted_aligner(lambda *fields: "")
    with pytest.raises(ValueError, match=f"safeguards.*{named}"):
        Aligner(parts.backend, parts.tokenizer, parts.config, safeguards=safeguards)
    with pytest.raises(ValueError, match=f"safeguards.*{named}"):
        resolve_safeguards(safeguards, "answer")


def test_a_policy_is_checked_where_it_is_made() -> None:
    with pytest.raises(ValueError, match="spelling"):
        SafeguardPolicy(actions={"spelling": "accept"})


def test_a_policy_is_plain_data() -> None:
    policy = SafeguardPolicy(special_tokens=frozenset({"<b>", "<a>"})).with_actions({"length": "off"})
    record = json.loads(json.dumps(policy.to_dict()))
    assert record["special_tokens"] == ["<a>", "<b>"]
    assert record["actions"]["length"] == "off"
    assert {policy: 1}[replace(policy)] == 1
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy
    assert policy != SafeguardPolicy()


def test_an_aligner_says_its_safeguards() -> None:
    aligner = scripted_aligner(lambda *fields: "", safeguards={"length": "off"})
    assert repr(aligner).endswith("safeguards={'length': 'off'})")
    assert "SafeguardPolicy(" in repr(aligner.with_options(safeguards=SafeguardPolicy()))
