"""The `aligner` command: arguments in, one call per sub-command.

Exit status: 0 well, 1 failed, 2 bad usage. An error is one line on standard error. On a terminal
what changed is struck and inserted in colour; piped, the output is the corrected text alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from aligner_integrations import Aligner, DecodeConfig
from aligner_integrations.cli_options import (
    AnswerSecondsOption,
    BackendOption,
    DataOption,
    JsonOption,
    MarginOption,
    ModelOption,
    OnErrorOption,
    ProviderOption,
    QuestionOption,
    RevisionOption,
    SafeguardsOption,
    SeedOption,
    SentenceSecondsOption,
    TemperatureOption,
    TemplateOption,
    TopKOption,
    TopPOption,
)
from aligner_integrations.errors import AlignerError, CorrectionFailedError, MissingDependencyError
from aligner_integrations.safeguards.policy import SafeguardMode
from aligner_integrations.terminal import marked as marked
from aligner_integrations.terminal import read_chunks, show, show_report

if TYPE_CHECKING:
    from aligner_integrations.evaluation.figures import Report
    from aligner_integrations.evaluation.harm import HarmReport
    from aligner_integrations.evaluation.loop import LoopReport
    from aligner_integrations.resilience import OnError

app = typer.Typer(
    name="aligner",
    help="Correct answers with an aligner: finished ones, and ones that are still coming.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

# typer carries its own copy of click; this is the UsageError of whichever copy is in use.
_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__base__)


# What each extra brings: only these, when missing, mean that the extra is not installed.
_EXTRA_PACKAGES = {
    "train": ("torch", "transformers", "onnx", "optimum", "onnxruntime"),
    "eval": ("onnxruntime", "matplotlib"),
    "export": ("torch", "transformers", "safetensors", "onnx", "optimum", "onnxruntime"),
    "langchain": ("langchain_core",),
}


@app.command()
def correct(
    question: QuestionOption,
    answer: Annotated[str, typer.Option("--answer", "-a", help="The answer to correct.")],
    feedback: Annotated[str, typer.Option("--feedback", help="An instruction for the correction.")] = "",
    as_json: JsonOption = False,
    model: ModelOption = None,
    template: TemplateOption = None,
    backend: BackendOption = "auto",
    provider: ProviderOption = "auto",
    revision: RevisionOption = None,
    edit_margin: MarginOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    on_error: OnErrorOption = "raise",
    sentence_seconds: SentenceSecondsOption = None,
    answer_seconds: AnswerSecondsOption = None,
    safeguards: SafeguardsOption = "keep_original",
) -> None:
    """Correct a finished answer."""
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    aligner = _load(model, edit_margin, template, backend, provider, revision, safeguards, **drawing)
    correction = aligner.correct(
        question,
        answer,
        feedback=feedback,
        on_error=cast("OnError", on_error),
        sentence_seconds=sentence_seconds,
        answer_seconds=answer_seconds,
    )
    if as_json:
        record = {**dataclasses.asdict(correction), "changed": correction.changed}
        plain = json.dumps(record, ensure_ascii=False)
        lossless = plain.encode(errors="ignore").decode() == plain  # no lone surrogates, which JSON escapes
        typer.echo(plain if lossless else json.dumps(record))
        return
    show(correction.answer, correction)
    typer.echo()


@app.command()
def stream(
    question: QuestionOption,
    model: ModelOption = None,
    template: TemplateOption = None,
    backend: BackendOption = "auto",
    provider: ProviderOption = "auto",
    revision: RevisionOption = None,
    edit_margin: MarginOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    on_error: OnErrorOption = "raise",
    sentence_seconds: SentenceSecondsOption = None,
    answer_seconds: AnswerSecondsOption = None,
    safeguards: SafeguardsOption = "keep_original",
) -> None:
    """Correct an answer that comes in on standard input; corrected text goes out as it comes."""
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    aligner = _load(model, edit_margin, template, backend, provider, revision, safeguards, **drawing)
    for segment in aligner.correct_stream(
        question,
        read_chunks(),
        on_error=cast("OnError", on_error),
        sentence_seconds=sentence_seconds,
        answer_seconds=answer_seconds,
    ):
        show(segment.original, segment)


@app.command()
def doctor(
    model: ModelOption = None,
    template: TemplateOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the model's files with their SHA256SUMS instead.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what is installed and which providers really load, and correct one sentence as a check."""
    from aligner_integrations import doctor

    report, failure = doctor.verify(model) if verify else doctor.examine(model, template=template)
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        show_report(report)
    if failure is not None:
        raise failure


@app.command()
def bench(
    model: ModelOption = None,
    size: Annotated[str | None, typer.Option("--size", help="Make a random model instead: 100m.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Rounds; ratios are of medians.")] = 20,
    provider: Annotated[
        str, typer.Option("--provider", help="auto, tensorrt, cuda or cpu; several, with commas, in turn.")
    ] = "auto",
    peers: Annotated[bool, typer.Option("--peers", help="Time transformers and optimum too.")] = False,
    plots: Annotated[
        Path | None, typer.Option("--plots", file_okay=False, help="Folder for plots and JSON.")
    ] = None,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="Time the LangChain adapters instead.")
    ] = False,
    batch: Annotated[bool, typer.Option("--batch", help="Time a batch beside one by one instead.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Measure the memory of a long answer.")] = False,
    replay: Annotated[bool, typer.Option("--replay", help="Count forwards of corrections.")] = False,
    loop: Annotated[bool, typer.Option("--loop", help="Count what a closed loop asks for.")] = False,
    data: Annotated[
        Path | None, typer.Option("--data", exists=True, file_okay=False, help="For --replay and --loop.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time guided decoding beside plain greedy decoding and one prefill, on the same session."""
    if adapters + batch + memory + replay + loop > 1:
        raise typer.BadParameter("--adapters, --batch, --memory, --replay and --loop exclude each other")
    if loop:
        from aligner_integrations.evaluation.loop import run_loop

        if data is None:
            raise typer.BadParameter("--loop needs --data, the folder with the answers")
        return _tell(run_loop(data), as_json=as_json)
    if adapters:
        with _extra("langchain"):
            from aligner_integrations.evaluation.adapters import as_rows, run_adapters
        costs = run_adapters(rounds=rounds)
        if as_json:
            typer.echo(json.dumps([dataclasses.asdict(cost) for cost in costs]))
        else:
            show_report({"what an adapter adds, its aligner doing nothing": as_rows(costs)})
        return
    with _extra("export"), _extra("eval"):
        from aligner_integrations.evaluation.suite import run_suite

        reports = run_suite(
            "batch" if batch else "memory" if memory else "replay" if replay else "answer",
            model=model,
            size=size,
            providers=provider.split(","),
            rounds=rounds,
            peers=peers,
            plots=plots,
            data=data,
        )
    if as_json:
        records = [report.to_dict() for report in reports]
        typer.echo(json.dumps(records if len(records) > 1 else records[0]))
        return
    for report in reports:
        show_report(report.shown())


@app.command(name="export")
def export_model(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder with config, tokenizer and safetensors, or hub name OWNER/NAME.")
    ],
    out: Annotated[Path, typer.Argument(help="The model folder to make.")],
    dtype: Annotated[
        Literal["fp32", "fp16", "int8", "int8-dynamic"],
        typer.Option(
            "--dtype", help="int8 is stored so and computes in fp32; int8-dynamic multiplies in int8."
        ),
    ] = "fp32",
    opset: Annotated[int, typer.Option("--opset", min=14, max=20, help="Version of ONNX's operators.")] = 18,
    attention: Annotated[
        Literal["fused", "plain"], typer.Option("--attention", help="plain is for TensorRT.")
    ] = "fused",
    template: Annotated[str | None, typer.Option("--template", help="The frame it was trained on.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint to a model folder for ONNX Runtime, and say how near it is to the checkpoint."""
    with _extra("export"):
        from aligner_integrations.export import export_checkpoint
    report = export_checkpoint(
        checkpoint,
        out,
        template=template,
        dtype=dtype,
        opset=opset,
        attention=attention,
        overwrite=force,
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        show_report(report.shown())


@app.command(name="train")
def train_model(
    recipe: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The recipe, a TOML file.")],
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for the run, its checkpoint and its model.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
) -> None:
    """Train an aligner by a recipe, export it to OUT/model and print its figures."""
    if (out / "state.pt").exists() and not resume:
        raise FileExistsError(f"{out} holds a run already; add --resume, or choose another --out")
    with _extra("train"):
        from aligner_integrations.training.finish import finish
        from aligner_integrations.training.train import train
    checkpoint = train(recipe, data=data, out=out, device=device)
    report = finish(checkpoint, out / "model", data=data)
    _show_figures(report, report.best_margin(), as_json=False)


@app.command(name="eval")
def evaluate_model(
    data: DataOption,
    model: ModelOption = None,
    template: TemplateOption = None,
    backend: BackendOption = "auto",
    provider: ProviderOption = "auto",
    revision: RevisionOption = None,
    edit_margin: MarginOption = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Held-out rows of each task, at most.")] = 600,
    harm: Annotated[
        bool, typer.Option("--harm", help="Measure the safeguards on published corrections instead.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a model on held-out rows: each figure beside its target, and the curve over the margin."""
    if harm:
        from aligner_integrations.evaluation.harm import run_harm

        return _tell(run_harm(data), as_json=as_json)
    with _extra("eval"):
        from aligner_integrations.evaluation.figures import evaluate
    aligner = _load(model, edit_margin, template, backend, provider, revision)
    figures = evaluate(aligner, data, rows_a_task=rows)
    _show_figures(figures, aligner.decode_config.edit_margin, as_json=as_json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        status = app(args=arguments, prog_name="aligner", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except _UsageError as error:
        # No message means `aligner` alone: the help is on the screen already.
        message = error.format_message()
        return _fail(message, status=2) if message else 2
    except (AlignerError, OSError, TypeError, ValueError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader went away (`aligner ... | head`): nothing is left to say, or to flush at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        # What the backend said may quote the text; on the user's own screen it is of use.
        cause = f": {error.__cause__}" if isinstance(error, CorrectionFailedError) else ""
        return _fail((str(error) or type(error).__name__) + cause, status=1)
    except typer.Abort:
        return _fail("aborted", status=1)


def _load(
    model: str | None,
    edit_margin: float | None,
    template: str | None,
    backend: str,
    provider: str,
    revision: str | None,
    safeguards: SafeguardMode = "keep_original",
    **drawing: Any,
) -> Aligner:
    """Return the aligner; what is not given stays as the model's folder has it."""
    changes = drawing if edit_margin is None else {"edit_margin": edit_margin, **drawing}
    DecodeConfig(**changes)  # what is wrong with it is said before a model is loaded
    aligner = Aligner.from_pretrained(
        model,
        template=template,
        backend=backend,
        provider=provider,
        revision=revision,
        safeguards=safeguards,
    )
    return aligner.with_options(decode=dataclasses.replace(aligner.decode_config, **changes))


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Turn an import that fails for want of the extra `name` into an error that names it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA_PACKAGES[name]:
            raise  # a broken install must not be called a missing one
        raise MissingDependencyError(
            f'{error.name} is not installed; run `pip install "aligner-integrations[{name}]"`',
            name=error.name,
        ) from error


def _show_figures(report: Report, margin: float, *, as_json: bool) -> None:
    from aligner_integrations.evaluation.figures import TARGETS

    figures, curve = report.figures(margin), [(at, *report.precision_recall(at)) for at, _ in report.curve()]
    if as_json:
        record = {"edit_margin": margin, "rows": report.counts(), "figures": figures, "curve": curve}
        typer.echo(json.dumps(record))
        return
    shown = {name: f"{share:.1%} (target {TARGETS[name]:.0%})" for name, share in figures.items()}
    points = {f"margin {at:g}": f"{precision:.3f} / {recall:.3f}" for at, precision, recall in curve}
    show_report({f"figures at edit margin {margin:g}": shown, "precision / recall of changing": points})


def _tell(report: HarmReport | LoopReport, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        show_report(report.shown())


def _fail(message: str, *, status: int) -> int:
    sys.stderr.write(f"aligner: {' '.join(message.split())}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
