"""The commands ``train``, ``demo``, ``generate`` and ``doctor``."""

from __future__ import annotations

import codecs
import shlex
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from hypermlp.doctor import main as diagnose
from hypermlp.generation import stream as stream_tokens
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp.ops.attention import Backend
from hypermlp_lab.console import INTERRUPTED, Data, Device, chosen_device, say, user_errors
from hypermlp_lab.text import decode, encode
from hypermlp_lab.training import Trainer, TrainingConfig, load_corpus, run_report
from hypermlp_lab.training.checkpoint import delete_checkpoints, latest_checkpoint, load_byte_model
from hypermlp_lab.training.config import Precision
from hypermlp_lab.training.demo import Demo, printable
from hypermlp_lab.training.display import run_shown
from hypermlp_lab.training.files import check_folder, delete, read_json, write_json
from hypermlp_lab.training.memory import check_memory
from hypermlp_lab.training.recipe import byte_model, match_parameters, parameter_count

app = typer.Typer(
    help="HyperMLP and HyperGLU attention: train, compare and sample small language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# of a run, beside its checkpoints and what run_report writes
_OPTIONS = "options.json"
_FILES = (_OPTIONS, *run_report.FILES)
# rows of a batch when many are asked for
_SAMPLES_AT_ONCE = 64

Dtype = Annotated[Precision, typer.Option(help="bfloat16 trains under autocast, with float32 weights.")]
BackendOption = Annotated[Backend, typer.Option("--backend", help="Path of the operator.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.")]
SeqLen = Annotated[int, typer.Option(help="Bytes of a training window.")]
HiddenSize = Annotated[int, typer.Option(help="Width of the model.")]
Layers = Annotated[int, typer.Option(help="Transformer blocks.")]
BatchSize = Annotated[int, typer.Option(help="Windows in a step.")]
LearningRate = Annotated[float, typer.Option(help="Highest learning rate.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete the run in --out and start anew.")]
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
    match: Annotated[
        str | None, typer.Option(help="Widen the MLPs to the parameters of a model with this mixer, as the demo does.")
    ] = None,
    data: Data = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    backend: BackendOption = "auto",
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/MIXER.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the newest checkpoint in --out, with its options; --steps may be more."
        ),
    ] = False,
    fresh: Fresh = False,
) -> None:
    """Train one byte language model."""
    console = Console()
    out = Path("runs") / mixer if out is None else out
    options: dict[str, Any] = {
        "mixer": mixer, "steps": steps, "seq_len": seq_len, "hidden_size": hidden_size, "layers": layers,
        "batch_size": batch_size, "lr": lr, "max_lag": max_lag, "data": None if data is None else str(data.resolve()),
        "dtype": dtype, "seed": seed, "match": match,
    }  # fmt: skip
    with user_errors():
        if resume and fresh:
            raise ValueError("--resume goes on with a run and --fresh deletes it: leave one of them out")
        check_folder(out, *_FILES)
        options = _saved_options(out, options, context) if resume else options
        trainer = _build_trainer(options, out, chosen_device(device), backend)
        assert trainer.lock is not None
        with trainer.lock:
            if resume:
                trainer.resume(longer=True)
                write_json(out / _OPTIONS, options)
            else:
                _start(out, options, fresh)
            _train(trainer, options["mixer"], out, console)


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
    fresh: Fresh = False,
) -> None:
    """Train HyperGLU and softmax models of equal size on real text and compare them.

    The same command given again goes on where a demo stopped, or shows the result of one that has ended.
    """
    with user_errors():
        config = TrainingConfig(steps, batch_size=batch_size, seq_len=seq_len, lr=lr, seed=seed, dtype=dtype)
        corpus = load_corpus(data)
        corpus.check_length(seq_len)
        comparison = Demo(corpus, config, hidden_size, layers, out, chosen_device(device), backend)
        finished = comparison.run(Console(), fresh=fresh)
    if not finished:
        raise typer.Exit(INTERRUPTED)


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
    samples: Annotated[int, typer.Option(help="Continuations to draw, each under a line that counts them.")] = 1,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    seed: Annotated[int | None, typer.Option(help="Makes the sample reproducible.")] = None,
    device: Device = "auto",
    backend: BackendOption = "auto",
) -> None:
    """Continue a text with a trained model."""
    with user_errors():
        if samples < 1:
            raise ValueError(f"--samples must be 1 or more, got {samples}")
        if stream and samples > 1:
            raise ValueError("--stream prints one text: leave --samples out")
        if not prompt:
            raise ValueError("--prompt is empty: give at least one character to go on from")
        model = load_byte_model(checkpoint, backend=backend, device=chosen_device(device))
        prompt_ids = encode(prompt)
        options: dict[str, Any] = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty,
            "stop": [encode(text)[0].tolist() for text in stop or ()],
        }  # fmt: skip
        if stream:
            _print_stream(prompt_ids, stream_tokens(model, prompt_ids, max_new_tokens, seed=seed, **options))
            return
        # in groups: any number of samples fits into memory, and the first come early
        for first in range(0, samples, _SAMPLES_AT_ONCE):
            count = min(_SAMPLES_AT_ONCE, samples - first)
            # of later groups from words, not numbers: the neighbouring seed's first group is another
            own_seed = seed if seed is None or not first else Random(f"{seed}, from {first}").getrandbits(63)
            steps = stream_tokens(model, prompt_ids, max_new_tokens, num_samples=count, seed=own_seed, **options)
            _print_samples(prompt_ids.expand(count, -1), steps, max_new_tokens, first if samples > 1 else None)


@app.command()
def doctor(
    seconds: Annotated[float, typer.Option(help="For timing on a GPU, 0 for none.")] = 20.0,
) -> None:
    """Say what works here and what does not, on one screen to paste into a report.

    The same as python -m hypermlp.doctor. Status 1 where something that should work does not.
    """
    raise typer.Exit(diagnose(["--seconds", str(seconds)], typer.echo))


def _print_samples(prompts: Tensor, steps: Iterable[Tensor], max_new_tokens: int, before: int | None) -> None:
    """Texts, counted on from ``before`` by a line above each; None for one text without."""
    console = Console(stderr=True)
    shown = track(steps, "Generating", max_new_tokens, console=console, transient=True, disable=not console.is_terminal)
    tokens = torch.stack([*prompts.T, *(step.cpu() for step in shown)], dim=1)
    for number, row in enumerate(tokens, 1):
        above = "" if before is None else f"--- sample {before + number} ---\n"
        typer.echo(above + printable(decode(row)))


def _train(trainer: Trainer, name: str, out: Path, console: Console) -> None:
    say(console, f"{name}: {trainer.model.num_parameters():,} parameters, {trainer.corpus.name}")
    if not run_shown(trainer, name, console):
        say(console, f"Stopped after step {trainer.progress.step}. Go on with:")
        say(console, shlex.join(["hypermlp", "train", "--resume", "--out", str(out)]))
        raise typer.Exit(INTERRUPTED)
    reports = [run_report.RunReport.of(name, trainer)]
    run_report.write_json(out, reports, trainer.corpus, trainer.device)
    console.print(run_report.table(reports))
    run_report.save_curves(out, reports, f"{name} on {trainer.corpus.name}", console)
    say(console, "Sample with: " + shlex.join(["hypermlp", "generate", str(out)]))


def _print_stream(prompt_ids: Tensor, steps: Iterable[Tensor]) -> None:
    """Text as its bytes come; the bytes of one character are held back until it is whole."""
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in chain((prompt_ids[0],), steps):
        typer.echo(printable(text.decode(bytes(token.tolist()))), nl=False)
    typer.echo(printable(text.decode(b"", final=True)))


def _build_trainer(options: dict[str, Any], out: Path, device: torch.device, backend: Backend) -> Trainer:
    config = TrainingConfig(
        **{name: options[name] for name in ("steps", "batch_size", "seq_len", "lr", "seed", "dtype")}
    )
    model_config = _model_config(options)
    check_memory(model_config, config, device)
    corpus = load_corpus(options["data"])
    torch.manual_seed(config.seed)
    return Trainer(LanguageModel(model_config, backend=backend), corpus, config, out=out, device=device)


def _model_config(options: dict[str, Any]) -> LanguageModelConfig:
    """Of the model to train, as wide as the one to match."""
    shape = {
        "hidden_size": options["hidden_size"], "num_layers": options["layers"],
        "seq_len": options["seq_len"], "max_lag": options["max_lag"],
    }  # fmt: skip
    own = byte_model(options["mixer"], **shape)
    if options["match"] is None:
        return own
    other = byte_model(options["match"], **shape)
    if parameter_count(own) > parameter_count(other):
        raise ValueError(
            f"--match {options['match']}: {options['mixer']} has {parameter_count(own):,} parameters and it has "
            f"{parameter_count(other):,}, and a model is only widened: train {options['match']} with "
            f"--match {options['mixer']}"
        )
    return match_parameters(own, other)[0]


def _start(out: Path, options: dict[str, Any], fresh: bool) -> None:
    """Make ``out`` the folder of a new run, which it may not be yet unless ``fresh``."""
    files = [out / name for name in _FILES]
    checkpoint, file = latest_checkpoint(out), next((file for file in files if file.exists()), None)
    if not fresh and (found := checkpoint or file) is not None:
        remedy = (
            "--resume to go on from it, or --fresh to delete that run" if checkpoint else "--fresh to write over it"
        )
        raise ValueError(f"{found} exists: add {remedy}, or choose another --out")
    delete_checkpoints(out)
    delete(files)
    write_json(out / _OPTIONS, options)


def _saved_options(out: Path, options: dict[str, Any], context: typer.Context) -> dict[str, Any]:
    """Options of the run in ``out``; those given again must agree, but for more steps."""
    file = out / _OPTIONS
    if latest_checkpoint(out) is None or not file.is_file():
        raise ValueError(f"no training run to resume in {str(out)!r}: check --out, or leave --resume out")
    saved = {"match": None} | read_json(file)  # older runs do not have it
    if saved.keys() != options.keys() or not isinstance(saved["mixer"], str):
        raise ValueError(f"{file} is not what a training run wrote: restore it, or start anew with --fresh")
    for name, value in options.items():
        source = context.get_parameter_source(name)
        if source is None or source.name == "DEFAULT" or value == saved[name]:
            continue
        if name == "steps" and isinstance(saved[name], int) and value > saved[name]:
            saved[name] = value
        else:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {value} differs from the run in {out}, which has {saved[name]}: leave it out")
    return saved
