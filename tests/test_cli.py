"""The `aligner` command as a shell sees it: output, exit status, one line of error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aligner_integrations import Aligner, Edit
from aligner_integrations.aligner import BUNDLED_MODEL
from aligner_integrations.cli import main, marked
from tests.checkpoints import plain_onnx
from tests.hub import COMMIT, serve

QUESTION = "A farmer has 56 cows and sells 14. How many are left?"
ANSWER = "The farmer now has 56-14 = 420 cows.  He is content."
SURE = "1000"  # a margin that no model overcomes: everything is kept


@pytest.fixture(scope="module")
def aligner() -> Aligner:
    return Aligner.from_pretrained()


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Put bytes on standard input, through a real pipe."""
    reader, writer = os.pipe()
    with os.fdopen(reader, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)

        def write(text: bytes) -> None:
            os.write(writer, text)
            os.close(writer)

        yield write


def test_correct_prints_the_corrected_text(aligner: Aligner, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["correct", "-q", QUESTION, "-a", ANSWER]) == 0
    printed = capsys.readouterr()
    assert printed.out == aligner.correct(QUESTION, ANSWER).text + "\n"
    assert printed.err == ""


def test_correct_json_holds_the_whole_correction(
    aligner: Aligner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["correct", "-q", QUESTION, "-a", ANSWER, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    expected = aligner.correct(QUESTION, ANSWER)
    assert (record["text"], record["changed"]) == (expected.text, expected.changed)
    assert record["stats"]["forwards"] == expected.stats.forwards
    assert set(record) >= {"question", "answer", "proposed", "edits", "findings"}


def test_bytes_that_are_no_text_come_out_as_they_went_in() -> None:
    """Arguments that are not UTF-8, and a stream on standard input that is not."""
    start = [sys.executable, "-m", "aligner_integrations.cli"]
    odd = b"Caf\xe9 \xff opens. So it does."

    def run(*arguments: str | bytes) -> bytes:
        given: list[str | bytes] = [*start, *arguments]
        return subprocess.run(given, input=odd, capture_output=True, check=True, timeout=120).stdout

    assert run("correct", "-q", "Q", "-a", odd) == odd + b"\n"
    assert run("stream", "-q", "Q") == odd
    record = json.loads(run("correct", "-q", "Q", "-a", odd, "--json"))
    assert os.fsencode(record["text"]) == odd


def test_edit_margin_keeps_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["correct", "-q", QUESTION, "-a", ANSWER, "--edit-margin", SURE]) == 0
    assert capsys.readouterr().out == ANSWER + "\n"


@pytest.mark.parametrize("command", ["correct", "stream"])
def test_safeguards_can_be_turned_off(
    command: str,
    aligner: Aligner,
    feed: Callable[[bytes], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "hell yea i just left the fuckin mall rt herm u know dem griffeys only came out in kids"
    free = aligner.with_options(safeguards="off").correct("", text).text
    assert free != aligner.correct("", text).text  # what the bundled model writes here is not fit to be shown
    if command == "stream":
        feed(text.encode())
    given = ["-a", text] if command == "correct" else []
    assert main([command, "-q", "", *given, "--safeguards", "off"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == free
    assert main([command, "-q", "", *given, "--safeguards", "on"]) == 2
    assert "'on'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "One. Two.\n\n- three\n", "Größe: 3 µm. 日本語です。終わり。", "a\x00b."]
)
def test_stream_gives_input_back_when_nothing_changes(
    text: str, feed: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    feed(text.encode())
    assert main(["stream", "-q", QUESTION, "--edit-margin", SURE]) == 0
    assert capsys.readouterr().out == text


def test_stream_equals_correct(
    aligner: Aligner, feed: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    feed(ANSWER.encode())
    assert main(["stream", "-q", QUESTION]) == 0
    assert capsys.readouterr().out == aligner.correct(QUESTION, ANSWER).text


def test_stream_sends_a_sentence_before_the_input_ends() -> None:
    command = [sys.executable, "-m", "aligner_integrations.cli", "stream", "-q", "Hm?", "--edit-margin", SURE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"The first sentence is here. The second")
        process.stdin.flush()
        # Blocks until something comes; the input is still open.
        assert os.read(process.stdout.fileno(), 1000).startswith(b"The first sentence is here.")
        process.stdin.write(b" too.")
        process.stdin.close()
        assert process.stdout.read().endswith(b"The second too.")
    assert process.returncode == 0


def test_a_deadline_and_what_to_do_then(
    feed: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    late = ["--answer-seconds", "0.000001"]
    assert main(["correct", "-q", QUESTION, "-a", ANSWER, *late]) == 1
    assert "answer_seconds" in capsys.readouterr().err
    assert main(["correct", "-q", QUESTION, "-a", ANSWER, "--on-error", "pass_through", *late]) == 0
    assert capsys.readouterr().out == ANSWER + "\n"
    feed(ANSWER.encode())
    assert main(["stream", "-q", QUESTION, "--on-error", "withhold", *late]) == 0
    assert "could not be checked" in capsys.readouterr().out
    assert main(["correct", "-q", QUESTION, "-a", ANSWER, "--on-error", "shrug"]) == 1
    assert "on_error must be one of" in capsys.readouterr().err


def test_terminal_shows_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = marked("He is rude.", (Edit(6, 10, "kind"),))
    assert text.plain == "He is rudekind."
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert "strike" in styles["rude"] and "underline" in styles["kind"]
    assert marked("He is rude.", (Edit(6, 10, "kind"),), plain=True).plain == "He is ~~rude~~**kind**."
    assert marked("He is rude.", (Edit(5, 10, ""),), plain=True).plain == "He is~~ rude~~."


def test_terminal_output_is_coloured_and_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    long = "A sentence that is much longer than a narrow terminal is wide stays one line. " * 3
    assert main(["correct", "-q", QUESTION, "-a", long, "--edit-margin", SURE]) == 0
    assert capsys.readouterr().out == long + "\n"


def test_doctor_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"versions", "cache", "providers", "model"}
    assert report["providers"]["cpu"] == "loads (CPUExecutionProvider)"
    assert set(report["providers"]) == {"tensorrt", "cuda", "cpu"}
    assert report["model"]["template"] == "tiny"
    assert main(["doctor"]) == 0
    assert "providers\tcpu\tloads (CPUExecutionProvider)" in capsys.readouterr().out.splitlines()


def test_doctor_takes_the_template_of_a_model_that_does_not_say_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(plain_onnx("llama"))
    assert main(["doctor", "--model", folder]) == 1
    assert "template=" in capsys.readouterr().err
    assert main(["doctor", "--model", folder, "--template", "aligner-v1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["template"] == "aligner-v1"
    assert report["providers"]["cpu"] == "loads (CPUExecutionProvider)"


def test_doctor_tells_what_it_found_when_the_model_ails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--model", str(tmp_path / "none")]) == 1
    printed = capsys.readouterr()
    assert "versions\tnumpy\t" in printed.out
    assert printed.err.startswith("aligner: ") and printed.err.count("\n") == 1


def test_doctor_verifies_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--verify"]) == 0
    assert "files\tmodel.onnx\tas listed" in capsys.readouterr().out.splitlines()
    copied = tmp_path / "tiny"
    shutil.copytree(BUNDLED_MODEL, copied)
    verify = ["doctor", "--verify", "--model", str(copied), "--json"]
    assert main(verify) == 0
    weights = bytearray((copied / "model.onnx").read_bytes())
    weights[len(weights) // 2] ^= 1  # one bit
    (copied / "model.onnx").write_bytes(weights)
    (copied / "tokenizer.json").unlink()
    (copied / "extra.bin").write_bytes(b"")
    capsys.readouterr()
    assert main(verify) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)["files"]
    states = {"model.onnx": "changed", "tokenizer.json": "missing", "extra.bin": "not listed"}
    assert found == {"README.md": "as listed", "aligner.json": "as listed", **states}
    assert "is not as released: extra.bin is not listed, model.onnx is changed" in printed.err
    (copied / "SHA256SUMS").write_text("no list", encoding="utf-8")
    assert main(verify) == 1
    assert "SHA256SUMS cannot be read" in capsys.readouterr().err
    assert main([*verify[:3], str(tmp_path)]) == 1
    assert "has no SHA256SUMS" in capsys.readouterr().err


def test_the_command_takes_the_revision_it_is_told() -> None:
    files = {path.name: path.read_bytes() for path in BUNDLED_MODEL.iterdir()}
    with serve({"me/mine": files}) as (address, fetched), tempfile.TemporaryDirectory() as home:
        hub = {"HF_ENDPOINT": address, "HF_HOME": home, "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        hub |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}

        def run(revision: str) -> subprocess.CompletedProcess[str]:
            given = ["correct", "-q", QUESTION, "-a", "Fine.", "--model", "me/mine", "--revision", revision]
            return subprocess.run(
                [sys.executable, "-m", "aligner_integrations.cli", *given],
                env={**os.environ, **hub},
                capture_output=True,
                text=True,
                timeout=120,
            )

        refused = run("v9")
        assert refused.returncode == 1
        assert "me/mine at revision v9: there is no such revision" in refused.stderr
        assert fetched == []
        pinned = run(COMMIT)
        assert pinned.stdout == "Fine.\n", pinned.stderr
        assert "me/mine/model.onnx" in fetched


def test_what_bench_cannot_measure_together_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--batch", "--memory"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert main(["bench", "--replay"]) == 1
    assert "data" in capsys.readouterr().err


def test_bench_reports_the_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--rounds", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {ratio["name"] for ratio in report["ratios"]} >= {"plain greedy : guided, unchanged answer"}
    forwards = {timing["name"]: timing["forwards"] for timing in report["timings"]}
    assert forwards["guided, unchanged"] == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["correct", "-q", "x"], 2, "--answer"),
        (["correct", "-q", "x", "-a", "y", "--edit-margin", "-1"], 2, "--edit-margin"),
        (["correct", "-q", "x", "-a", "y", "--edit-margin", "much"], 2, "--edit-margin"),
        (["correct", "-q", "x", "-a", "y", "--model", "no-such-folder"], 1, "no-such-folder"),
        (["stream"], 2, "--question"),
        (["improve"], 2, "improve"),
        (["bench", "--provider", "abacus"], 1, "abacus"),
        (["eval", "--data", "no-such-folder"], 2, "no-such-folder"),
        (["eval", "--data", "."], 1, "gsm8k_steps"),
        (["train", "no-such-recipe.toml", "--data", ".", "--out", "."], 2, "no-such-recipe.toml"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert printed.err.startswith("aligner: ") and printed.err.endswith("\n")
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_train_does_not_overwrite_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state.pt").touch()
    (tmp_path / "recipe.toml").touch()
    assert (
        main(["train", str(tmp_path / "recipe.toml"), "--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    )
    assert "--resume" in capsys.readouterr().err


def test_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.touch()
    for name in [name for name in sys.modules if name.startswith("aligner_integrations.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "aligner_integrations.export", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["train", str(recipe), "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 1
    assert 'pip install "aligner-integrations[train]"' in capsys.readouterr().err


def test_alone_it_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert "correct" in printed.out + printed.err
    assert main(["--help"]) == 0
