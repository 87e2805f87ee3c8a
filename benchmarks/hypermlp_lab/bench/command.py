"""``hypermlp bench``: benchmarks from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

import torch
import typer
from rich.console import Console

from hypermlp_lab.bench import results
from hypermlp_lab.bench.decoding import (
    COMPILED_PROVIDERS,
    DECODE_PROVIDERS,
    DECODE_PROVIDERS_ON_GPU,
    DecodeBenchmark,
    DecodeCase,
)
from hypermlp_lab.bench.layers import ATTENTION_PROVIDERS, LAYER_PROVIDERS_ON_GPU, LayerBenchmark, LayerCase
from hypermlp_lab.bench.measure import MODES
from hypermlp_lab.bench.models import MODEL_PROVIDERS, ModelBenchmark, ModelCase, Size, check_memory
from hypermlp_lab.bench.operators import OPERATOR_PROVIDERS, OperatorBenchmark, OperatorCase
from hypermlp_lab.bench.run import Benchmark, passed, run
from hypermlp_lab.bench.settings import Case, Provider, Settings, present
from hypermlp_lab.console import chosen_device, require, say, user_errors
from hypermlp_lab.training.files import check_place, write_json

app = typer.Typer(help="Measure speed and memory, after checking that what is measured is correct.")

RESULTS = Path("runs/bench")
_PIPED_WIDTH = 170
# seconds, or GiB: so that bytes are a number, too
_MOST = 1e12
# more than any machine has; PyTorch takes no number beyond 32 bits
_MOST_THREADS = 4096
# seconds for one call of an operator; what is expected to need more is left out
_LONGEST_CALL = 3.0
_LAYER_LENGTHS = "512,1024,2048,4096,8192"
_OPERATOR_LENGTHS = "1024,2048,4096,8192,16384,32768"
_P = TypeVar("_P", bound=Provider)
_C = TypeVar("_C", bound=Case)
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

Threads = Annotated[int, typer.Option(min=1, max=_MOST_THREADS, help="CPU threads.")]
Repeats = Annotated[int, typer.Option(min=1, help="Most rounds of each length and mode.")]
Seconds = Annotated[float, typer.Option(min=0, help="Stop a length and mode after this, with 3 rounds.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1)]
Only = Annotated[str | None, typer.Option(help="Names, separated by commas; all by default.")]
Out = Annotated[Path | None, typer.Option(help="Where to write JSON; runs/bench/COMMAND-DEVICE.json by default.")]
Plot = Annotated[
    Path | None, typer.Option(help="Where to write the picture, .png, .svg or .pdf; beside the JSON by default.")
]


@app.command()
@user_errors()
def attention(
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of each row, separated by commas; 512 to 8192 for layers, 1024 to 32768 for operators."
        ),
    ] = None,
    level: Annotated[
        str | None, typer.Option(help="layer or operator, without projections; by default operator on cuda.")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(min=1, help="256 for layers, 1024 for operators.")] = None,
    num_heads: Annotated[int, typer.Option(min=1, help="Heads of HyperGLU, and of softmax layers.")] = 2,
    batch: Annotated[int | None, typer.Option(min=1, help="1 for layers, 4 for operators.")] = None,
    threads: Threads = 1,
    repeats: Repeats = 20,
    seconds: Seconds = 10.0,
    memory_limit: Annotated[
        float | None, typer.Option(help="GiB; what needs more is skipped. 3 on the CPU, else what is free.")
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(_DTYPES)}; bfloat16 on cuda.")] = None,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="Without backward.")] = False,
    seed: Seed = 0,
    only: Only = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Compare HyperGLU and softmax: time, rate and extra peak memory, forward and forward+backward.

    On the CPU whole layers are compared, on a GPU the operators alone. Each is first checked, values and
    gradients, against a float64 computation. One that fails is not timed, and the command exits with status 1.
    """
    there = _device(device)
    on_gpu = there.type == "cuda"
    operators = _is_operator(level, on_gpu)
    contexts = _lengths((_OPERATOR_LENGTHS if operators else _LAYER_LENGTHS) if lengths is None else lengths)
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size or (1024 if operators else 256), "num_heads": num_heads,
        "batch": batch or (4 if operators else 1), "device": device,
        "dtype": _dtype(dtype or ("bfloat16" if on_gpu else "float32")),
    }  # fmt: skip
    if memory_limit is not None or not on_gpu:
        memory_limit = 2**30 * _finite(3.0 if memory_limit is None else memory_limit, "--memory-limit")
    limits: dict[str, Any] = {
        "modes": MODES[:1] if forward_only else MODES, "threads": threads, "repeats": repeats,
        "seconds": _finite(seconds, "--seconds"), "memory_limit": None if memory_limit is None else int(memory_limit),
        "seed": seed,
    }  # fmt: skip
    out, plot = _places("attention", device, out, plot)
    if operators:
        chosen = _chosen(present(OPERATOR_PROVIDERS, there), only)
        settings = Settings(OperatorCase(**sizes).at(*contexts), **limits, longest_call=_LONGEST_CALL)
        _run(OperatorBenchmark(chosen, settings), out, plot)
    else:
        providers = _chosen(LAYER_PROVIDERS_ON_GPU if on_gpu else ATTENTION_PROVIDERS, only)
        _run(LayerBenchmark(providers, Settings(LayerCase(**sizes).at(*contexts), **limits)), out, plot)


@app.command()
@user_errors()
def decode(
    lengths: Annotated[
        str, typer.Option(help="Contexts in tokens, separated by commas.")
    ] = "256,1024,2048,4096,8192,16384",
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of the layers.")] = 512,
    num_heads: Annotated[int, typer.Option(min=1)] = 2,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    window: Annotated[int, typer.Option(min=1, help="max_lag of the windowed layer.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Tokens timed together.")] = 16,
    recompute_limit: Annotated[int, typer.Option(min=0, help="Longest context computed anew for every token.")] = 4096,
    threads: Threads = 2,
    repeats: Repeats = 30,
    seconds: Seconds = 20.0,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help=", ".join(_DTYPES))] = "float32",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also steps through torch.compile; a minute more for each context.")
    ] = False,
    seed: Seed = 0,
    only: Only = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Compare one layer's time per generated token: HyperGLU with and without a cache, softmax with the same cache.

    Decoded outputs are first checked against a float64 run over the whole context. A layer that
    fails is not timed, and the command exits with status 1.
    """
    on_gpu = _device(device).type == "cuda"
    seconds = _finite(seconds, "--seconds")
    out, plot = _places("decode", device, out, plot)
    providers = DECODE_PROVIDERS_ON_GPU if on_gpu else DECODE_PROVIDERS
    chosen = _chosen((*providers, *COMPILED_PROVIDERS) if compiled else providers, only)
    contexts = _lengths(lengths)
    if min(contexts) <= steps:
        raise typer.BadParameter(f"{min(contexts)} is not more than --steps {steps}", param_hint="--lengths")
    case = DecodeCase(
        hidden_size=hidden_size, num_heads=num_heads, batch=batch, device=device, dtype=_dtype(dtype), window=window,
        steps=steps, recompute_limit=recompute_limit,
    )  # fmt: skip
    settings = Settings(case.at(*contexts), threads=threads, repeats=repeats, seconds=seconds, seed=seed)
    _run(DecodeBenchmark(chosen, settings), out, plot)


@app.command()
@user_errors()
def models(
    lengths: Annotated[str, typer.Option(help="Tokens of a sequence, separated by commas.")] = "256",
    size: Annotated[
        str, typer.Option(help="demo: make demo's models; gpt2: of GPT-2's size, 124M parameters.")
    ] = "demo",
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 16,
    threads: Threads = 1,
    repeats: Repeats = 20,
    seconds: Seconds = 60.0,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Of products: float32 or bfloat16; weights are float32.")] = "float32",
    only: Only = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Compare training steps of whole models of equal parameters: forward, backward and AdamW.

    Each is first checked, loss and gradient, against the dense path in float32. One that fails is not timed, and
    the command exits with status 1.
    """
    here = present(MODEL_PROVIDERS, _device(device))
    if size not in get_args(Size):
        raise typer.BadParameter(f"{size!r} is none of {', '.join(get_args(Size))}", param_hint="--size")
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"{dtype!r} is neither float32 nor bfloat16", param_hint="--dtype")
    seconds = _finite(seconds, "--seconds")
    out, plot = _places("models", device, out, plot)
    chosen = _chosen(here, only)
    case = ModelCase(size=cast(Size, size), batch=batch, device=device, dtype=_DTYPES[dtype])
    settings = Settings(case.at(*_lengths(lengths)), threads=threads, repeats=repeats, seconds=seconds)
    check_memory(settings.cases, chosen)
    _run(ModelBenchmark(chosen, settings), out, plot)


def _run(benchmark: Benchmark[_P, _C], out: Path, picture: Path) -> None:
    """Measure, show, and write the results; status 1 where something was wrong."""
    # piped output has no width of its own, and a wrapped table is no table
    console = Console() if sys.stdout.isatty() else Console(width=_PIPED_WIDTH)

    log = partial(say, console)
    report = run(benchmark, log)
    for table in results.rich_tables(report):
        console.print(table)
    if all(row["skipped"] for row in report["rows"]):
        log(f"nothing was measured, for the reasons above: {out} and {picture} are as they were")
        raise typer.Exit(1)
    write_json(out, report, indent=1)
    results.plot(report, picture)
    log(f"written: {out} and {picture}")
    if not passed(report):
        console.print("[red]A layer failed its check: see above.[/red]")
        raise typer.Exit(1)


def _is_operator(level: str | None, on_gpu: bool) -> bool:
    if level not in (None, "layer", "operator"):
        raise typer.BadParameter(f"{level!r} is neither layer nor operator", param_hint="--level")
    return on_gpu if level is None else level == "operator"


def _lengths(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1 or max(lengths) >= 2**63:
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers such as 512,1024", param_hint="--lengths")
    return lengths


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(_DTYPES)}", param_hint="--dtype")
    return _DTYPES[name]


def _device(name: str) -> torch.device:
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r} is neither cpu nor cuda", param_hint="--device")
    if kind == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this PyTorch sees no CUDA device: use cpu", param_hint="--device")
    return chosen_device(name, "cpu, cuda, cuda:1, ...")


def _finite(value: float, option: str) -> float:
    if not 0 <= value <= _MOST:
        raise typer.BadParameter(f"{value} is not a number from 0 to {_MOST:g}", param_hint=option)
    return value


def _places(name: str, device: str, out: Path | None, plot: Path | None) -> tuple[Path, Path]:
    """Where to write, which is tried before minutes of measuring, not after."""
    require("a benchmark", "matplotlib")
    out = out or RESULTS / f"{name}-{torch.device(device).type}.json"
    check_place(out)
    plot = plot or out.with_name(f"{out.stem}.png")
    if plot.suffix not in results.PICTURES:
        raise ValueError(f"--plot {plot} must end in {', '.join(results.PICTURES)}, to say what kind of picture it is")
    if plot.resolve() == out.resolve():
        raise ValueError(f"--out {out} is JSON, and the picture would be written over it: give it another name, .json")
    check_place(plot)
    return out, plot


def _chosen(providers: Sequence[_P], only: str | None) -> list[_P]:
    known = {provider.name: provider for provider in providers}
    names = list(known) if only is None else only.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"{unknown} not among {list(known)}", param_hint="--only")
    return [known[name] for name in names]


if __name__ == "__main__":
    app()
