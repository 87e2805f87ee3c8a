"""``hypermlp bench``: benchmarks from the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from hypermlp.bench import report as reports
from hypermlp.bench.providers import ATTENTION_PROVIDERS, Case, Provider
from hypermlp.bench.runner import Settings, passed, run

app = typer.Typer(help="Measure speed and memory, after checking that what is measured is correct.")

_PIPED_WIDTH = 140
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@app.callback()
def _group() -> None:
    """Keeps ``attention`` a sub-command while it is the only one."""


@app.command()
def attention(
    lengths: Annotated[str, typer.Option(help="Tokens of each row, separated by commas.")] = "512,1024,2048,4096,8192",
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of the layers.")] = 256,
    num_heads: Annotated[int, typer.Option(min=1)] = 2,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Most rounds of each length and mode.")] = 20,
    seconds: Annotated[float, typer.Option(min=0, help="Stop a length and mode after this, with 3 rounds.")] = 10.0,
    memory_limit: Annotated[float, typer.Option(help="GiB; a layer that needs more is skipped.")] = 3.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=", ".join(_DTYPES))] = "float32",
    seed: Annotated[int, typer.Option()] = 0,
    only: Annotated[str | None, typer.Option(help="Names of layers, separated by commas; all by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write JSON; attention-DEVICE.json by default.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to write the picture; beside the JSON by default.")] = None,
) -> None:
    """Compare HyperGLU and softmax layers: time, tokens/s and extra peak memory, forward and forward+backward.

    Every layer is first checked, values and gradients, against a float64 computation. One that
    fails is not timed, and the command exits with status 1.
    """
    # piped output has no width of its own, and a wrapped table is no table
    console = Console() if sys.stdout.isatty() else Console(width=_PIPED_WIDTH)
    case = Case(1, hidden_size, num_heads, batch, _device(device), _dtype(dtype))
    settings = Settings(_lengths(lengths), case, threads, repeats, seconds, int(memory_limit * 2**30), seed)
    report = run(_providers(only), settings, log=lambda line: console.print(line, highlight=False, markup=False))
    for table in reports.rich_tables(report):
        console.print(table)
    out = out or Path(f"attention-{torch.device(device).type}.json")
    plot = plot or out.with_suffix(".png")
    reports.write_json(report, out)
    reports.plot(report, plot)
    console.print(f"written: {out} and {plot}", highlight=False, markup=False)
    if not passed(report):
        console.print("[red]A layer failed its check: see above.[/red]")
        raise typer.Exit(1)


def _lengths(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers such as 512,1024", param_hint="--lengths")
    return lengths


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(_DTYPES)}", param_hint="--dtype")
    return _DTYPES[name]


def _device(name: str) -> str:
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r} is neither cpu nor cuda", param_hint="--device")
    if kind == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this PyTorch sees no CUDA device: use cpu", param_hint="--device")
    return name


def _providers(only: str | None) -> list[Provider]:
    known = {provider.name: provider for provider in ATTENTION_PROVIDERS}
    names = list(known) if only is None else only.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"{unknown} not among {list(known)}", param_hint="--only")
    return [known[name] for name in names]


if __name__ == "__main__":
    app()
