"""What `aligner bench --memory` measures: how far memory grows while one long answer is corrected.

Each model is loaded in a fresh process, because a process keeps what it once took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aligner_integrations.aligner import Aligner
from aligner_integrations.errors import AlignerError
from aligner_integrations.evaluation.batches import QUESTION, SENTENCES, forced_answers

GOAL_MB = 300.0
_MB = 1e6
_SECONDS = 600


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes of a process: the model's files, resident once it is loaded, at the most, and the growth."""

    model: str
    provider: str
    answer_tokens: int
    forwards: int
    model_bytes: int
    loaded_bytes: int
    peak_bytes: int

    @property
    def grown_bytes(self) -> int:
        """How far it grew over the loaded model while correcting."""
        return self.peak_bytes - self.loaded_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "grown_bytes": self.grown_bytes, "goal_bytes": int(GOAL_MB * _MB)}

    def shown(self) -> dict[str, dict[str, str]]:
        """Return a title with rows of text, for people."""
        sizes = {
            "the model's files": self.model_bytes,
            "process, model loaded": self.loaded_bytes,
            "process, at most": self.peak_bytes,
        }
        rows = {name: f"{size / _MB:.0f} MB" for name, size in sizes.items()}
        rows["over the loaded model"] = f"{self.grown_bytes / _MB:.0f} MB, asked: <= {GOAL_MB:g} MB"
        what = f"{self.model}, {self.provider}, {self.answer_tokens} tokens, {self.forwards} forward(s)"
        return {f"memory: {what}": rows}


def run_memory(
    folder: str | os.PathLike[str], *, answer_tokens: int = 2000, provider: str = "auto"
) -> MemoryReport:
    """Correct one answer of about `answer_tokens` tokens in a fresh process.

    A sentence-level model decides by itself; an answer-level one is made to leave the answer as it is.

    Raises:
        AlignerError: the process failed; the message is its last line.
    """
    command = [sys.executable, "-m", __name__, os.fspath(folder), str(answer_tokens), provider]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise AlignerError(f"the measured process failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
    return MemoryReport(**json.loads(done.stdout))


def measure_here(folder: Path, answer_tokens: int, provider: str) -> MemoryReport:
    """Load the model and correct one long answer in this process."""
    aligner = Aligner.from_pretrained(folder, provider=provider)
    rng = np.random.default_rng(0)
    if aligner.granularity == "sentence":
        question, answer = QUESTION, ""
        while len(aligner.tokenizer.encode_text(answer)) < answer_tokens:
            answer += f"{rng.choice(SENTENCES)} "
    else:
        ((question, answer),), aligner = forced_answers(aligner, [answer_tokens], rng)
    aligner.correct(question, "Yes.")  # what the first forward sets up belongs to loading
    loaded = _resident()
    _forget_peak()
    correction = aligner.correct(question, answer)
    return MemoryReport(
        model=folder.name,
        provider=correction.stats.provider,
        answer_tokens=len(aligner.tokenizer.encode_text(answer)),
        forwards=correction.stats.forwards,
        model_bytes=sum(path.stat().st_size for path in folder.glob("model.onnx*")),
        loaded_bytes=loaded,
        peak_bytes=_peak(),
    )


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    """Return a line of what Linux says about this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _forget_peak() -> None:
    """Let the peak begin anew: loading a model takes more than running it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    given = sys.argv[1:]
    print(json.dumps(asdict(measure_here(Path(given[0]), int(given[1]), given[2]))))
