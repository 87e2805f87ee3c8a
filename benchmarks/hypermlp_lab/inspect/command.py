"""``hypermlp inspect``: what the heads of a trained model do over a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from hypermlp.inspect import record
from hypermlp_lab.console import Device, chosen_device, require, user_errors
from hypermlp_lab.inspect.report import PAGE, write
from hypermlp_lab.inspect.views import view
from hypermlp_lab.text import decode
from hypermlp_lab.training.checkpoint import load_byte_model
from hypermlp_lab.training.files import check_folder, naming


@user_errors()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, or of one checkpoint.")],
    text: Annotated[Path, typer.Option(help="File to read.")],
    start: Annotated[int, typer.Option(min=0, help="First byte of it to take.")] = 0,
    length: Annotated[int, typer.Option(min=1, help="Bytes to take; maps grow with their square.")] = 256,
    out: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path("runs/inspect"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Write over an earlier page in --out.")] = False,
    device: Device = "auto",
) -> None:
    """Draw what the heads of a trained model do over a text, on one HTML page."""
    require("a page", "jinja2", "matplotlib")
    check_folder(out, PAGE)
    if not fresh and (out / PAGE).exists():
        raise ValueError(f"{out} holds a page: choose another --out, or add --fresh to write over it")
    if not fresh and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds other files: choose another --out, or add --fresh to write a page beside them")
    with naming(text, "cannot be read"):
        content = text.read_bytes()
    taken = content[start : start + length]
    if not taken:
        raise ValueError(f"{text} has {len(content)} bytes, none of them from --start {start} on: give more text")
    model = load_byte_model(checkpoint, device=chosen_device(device))
    tokens = torch.tensor([list(taken)], device=next(model.parameters()).device)
    views = [view(call) for call in record(model, tokens)]
    c = model.config
    lags = c.max_lags or (() if c.attention.max_lag is None else (c.attention.max_lag,))
    window = f", {' / '.join(map(str, lags))} lags" if lags else ""
    page = write(
        views,
        out,
        model=f"{checkpoint}: {c.attention.mixer}, {c.num_layers} layers of width {c.hidden_size}, "
        f"{c.attention.num_heads} heads{window}, {model.num_parameters():,} parameters.",
        source=f"{len(taken)} bytes of {text}, from byte {start} on, of {len(content):,}.",
        text=decode(tokens[0]),
    )
    typer.echo(f"Page: {page}")
