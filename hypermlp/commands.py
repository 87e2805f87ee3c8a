"""The commands ``train``, ``demo`` and ``generate``."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from hypermlp.generation import decode, encode
from hypermlp.generation import stream as stream_tokens
from hypermlp.models import LanguageModel
from hypermlp.ops.attention import Backend
from hypermlp.training import Trainer, TrainingConfig, load_corpus, report
from hypermlp.training.checkpoint import latest_checkpoint, load_model
from hypermlp.training.config import Precision
from hypermlp.training.demo import Demo, printable, save_curves
from hypermlp.training.display import TrainingDisplay
from hypermlp.training.recipe import byte_model

app = typer.Typer(
    help="HyperMLP and HyperGLU attention: train, compare and sample small language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# shell convention for a program ended by Ctrl-C: 128 + SIGINT
_INTERRUPTED = 130

Data = Annotated[Path | None, typer.Option(help="Text file or folder. Default: Python's standard library.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
Dtype = Annotated[Precision, typer.Option(help="bfloat16 trains under autocast, with float32 weights.")]
BackendOption = Annotated[Backend, typer.Option("--backend", help="Path of the operator.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.")]
SeqLen = Annotated[int, typer.Option(help="Bytes of a training window.")]
HiddenSize = Annotated[int, typer.Option(help="Width of the model.")]
Layers = Annotated[int, typer.Option(help="Transformer blocks.")]
BatchSize = Annotated[int, typer.Option(help="Windows in a step.")]
LearningRate = Annotated[float, typer.Option(help="Highest learning rate.")]
Seed = Annotated[int, typer.Option(help="Of the initial weights and the data order.")]


@app.command()
def train(
    context: typer.Context,
    mixer: Annotated[
        str, typer.Option(help="hyperglu, hypermlp, relu, softmax, or a label of the paper's study such as R-cg-q.")
    ] = "hyperglu",
    steps: Steps = 450,
    seq_len: SeqLen = 256,
    hidden_size: HiddenSize = 128,
    layers: Layers = 3,
    batch_size: BatchSize = 16,
    lr: LearningRate = 8e-3,
    max_lag: Annotated[
        int | None, typer.Option(help="Lags a layer reaches back over. Default: seq-len for hyper mixers.")
    ] = None,
    data: Data = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    backend: BackendOption = "auto",
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/MIXER.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out, with its options.")
    ] = False,
) -> None:
    """Train one byte language model."""
    console = Console()
    out = Path("runs") / mixer if out is None else out
    options: dict[str, Any] = {
        "mixer": mixer, "steps": steps, "seq_len": seq_len, "hidden_size": hidden_size, "layers": layers,
        "batch_size": batch_size, "lr": lr, "max_lag": max_lag, "data": None if data is None else str(data.resolve()),
        "dtype": dtype, "seed": seed,
    }  # fmt: skip
    with _user_errors():
        options = _saved_options(out, options, context) if resume else _new_options(out, options)
        trainer = _build_trainer(options, out, _device(device), backend)
        if resume:
            trainer.resume()
        else:
            out.mkdir(parents=True, exist_ok=True)
            (out / "options.json").write_text(json.dumps(options, indent=2) + "\n")
    name = options["mixer"]
    console.print(f"{name}: {trainer.model.num_parameters():,} parameters, {trainer.corpus.name}", highlight=False)
    with TrainingDisplay(console, name, trainer.config.steps, trainer.progress.step) as watcher, _user_errors():
        trainer.watcher = watcher
        finished = trainer.run()
    if not finished:
        console.print(f"Stopped after step {trainer.progress.step}. Go on with:", highlight=False)
        console.print(f"hypermlp train --resume --out {out}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(_INTERRUPTED)
    reports = [report.RunReport.of(name, trainer)]
    report.write_json(out / "report.json", reports, data=trainer.corpus.name, device=str(trainer.device))
    console.print(report.table(reports))
    save_curves(out / "curves.png", reports, f"{name} on {trainer.corpus.name}", console)
    console.print(f"Sample with: hypermlp generate {out}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def demo(
    steps: Steps = 450,
    data: Data = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, numbers and picture.")] = Path("runs/demo"),
    seed: Seed = 0,
    seq_len: SeqLen = 256,
    hidden_size: HiddenSize = 128,
    layers: Layers = 3,
    batch_size: BatchSize = 16,
    lr: LearningRate = 8e-3,
    device: Device = "auto",
    dtype: Dtype = "float32",
    backend: BackendOption = "auto",
) -> None:
    """Train HyperGLU and softmax models of equal size on real text and compare them.

    An interrupted demo goes on where it stopped when the same command is given again.
    """
    with _user_errors():
        config = TrainingConfig(steps, batch_size=batch_size, seq_len=seq_len, lr=lr, seed=seed, dtype=dtype)
        corpus = load_corpus(data)
        corpus.check_length(seq_len)
        comparison = Demo(corpus, config, hidden_size, layers, out, _device(device), backend)
        finished = comparison.run(Console())
    if not finished:
        raise typer.Exit(_INTERRUPTED)


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, or of one checkpoint.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "import ",
    max_new_tokens: Annotated[int, typer.Option(help="Bytes to add.")] = 300,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest byte.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from that many likeliest bytes.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest bytes of that probability.")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: bytes that came before are less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End when this text comes; may be given again.")] = None,
    samples: Annotated[int, typer.Option(help="Continuations to draw.")] = 1,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    seed: Annotated[int | None, typer.Option(help="Makes the sample reproducible.")] = None,
    device: Device = "auto",
    backend: BackendOption = "auto",
) -> None:
    """Continue a text with a trained model."""
    with _user_errors():
        if stream and samples > 1:
            raise ValueError("--stream prints one text: leave --samples out")
        model = load_model(checkpoint, backend=backend, device=_device(device))
        steps = stream_tokens(
            model, encode(prompt), max_new_tokens, num_samples=samples, temperature=temperature, top_k=top_k,
            top_p=top_p, repetition_penalty=repetition_penalty, stop=[list(text.encode()) for text in stop or ()],
            seed=seed,
        )  # fmt: skip
        if stream:
            _print_stream(prompt, steps)
        else:
            console = Console(stderr=True)
            shown = track(
                steps, "Generating", max_new_tokens, console=console, transient=True, disable=not console.is_terminal
            )
            tokens = torch.stack(list(shown), dim=1)
            for row in tokens.cpu():
                typer.echo(printable(prompt + decode(row)))


def _print_stream(prompt: str, steps: Iterable[Tensor]) -> None:
    """Text as its bytes come; the bytes of one character are held back until it is whole."""
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    typer.echo(printable(prompt), nl=False)
    for token in steps:
        typer.echo(printable(text.decode(bytes([int(token)]))), nl=False)
    typer.echo(printable(text.decode(b"", final=True)))


def _build_trainer(options: dict[str, Any], out: Path, device: torch.device, backend: Backend) -> Trainer:
    config = TrainingConfig(
        **{name: options[name] for name in ("steps", "batch_size", "seq_len", "lr", "seed", "dtype")}
    )
    model_config = byte_model(
        options["mixer"],
        hidden_size=options["hidden_size"],
        num_layers=options["layers"],
        seq_len=options["seq_len"],
        max_lag=options["max_lag"],
    )
    corpus = load_corpus(options["data"])
    torch.manual_seed(config.seed)
    return Trainer(LanguageModel(model_config, backend=backend), corpus, config, out=out, device=device)


def _new_options(out: Path, options: dict[str, Any]) -> dict[str, Any]:
    found = latest_checkpoint(out)
    if found is not None:
        raise ValueError(f"{found} exists: add --resume to go on from it, or choose another --out")
    return options


def _saved_options(out: Path, options: dict[str, Any], context: typer.Context) -> dict[str, Any]:
    """Options of the run in ``out``; those given again must agree."""
    if latest_checkpoint(out) is None or not (out / "options.json").is_file():
        raise ValueError(f"no training run to resume in {str(out)!r}: check --out, or leave --resume out")
    saved: dict[str, Any] = json.loads((out / "options.json").read_text())
    for name, value in options.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT" and value != saved[name]:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {value} differs from the run in {out}, which has {saved[name]}: leave it out")
    return saved


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is none that PyTorch knows: try cpu, cuda or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch finds no GPU here; use --device cpu")
    return device


@contextmanager
def _user_errors() -> Iterator[None]:
    """One line instead of a traceback for what the user can mend."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        typer.echo(f"hypermlp: {error}", err=True)
        raise typer.Exit(2) from error
