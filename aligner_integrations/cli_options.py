"""The options that several sub-commands of `aligner` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

QuestionOption = Annotated[str, typer.Option("--question", "-q", help="What was asked.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Model folder, or hub name OWNER/NAME; else the bundled model.")
]
TemplateOption = Annotated[
    str | None, typer.Option("--template", help="The prompt's frame, for a model without aligner.json.")
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a hub name; a commit pins it.")
]
BackendOption = Annotated[str, typer.Option("--backend", help="auto, onnx or torch.")]
ProviderOption = Annotated[str, typer.Option("--provider", help="auto, tensorrt, cuda or cpu.")]
MarginOption = Annotated[
    float | None,
    typer.Option("--edit-margin", min=0.0, help="How sure (in logits) the model must be before it edits."),
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0.0, help="Above 0 tokens are drawn, not the best taken.")
]
TopPOption = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw from the fewest that reach this chance.")
]
TopKOption = Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many of the best; 0: all.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Draw the same each time.")]
OnErrorOption = Annotated[
    str, typer.Option("--on-error", help="For a failed correction: raise, pass_through or withhold.")
]
SentenceSecondsOption = Annotated[
    float | None, typer.Option("--sentence-seconds", help="So long each correction may take.")
]
AnswerSecondsOption = Annotated[
    float | None, typer.Option("--answer-seconds", help="So long all corrections may take together.")
]
SafeguardsOption = Annotated[
    Literal["keep_original", "off"],
    typer.Option("--safeguards", help="keep_original shows no harmful correction, off shows every one."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DataOption = Annotated[
    Path, typer.Option("--data", exists=True, file_okay=False, help="Folder with the Q-A-C data.")
]
