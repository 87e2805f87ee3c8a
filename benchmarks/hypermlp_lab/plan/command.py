"""``hypermlp plan``: what a model of some size asks of each of many GPUs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from hypermlp.checks import shown
from hypermlp_lab.console import user_errors
from hypermlp_lab.plan.costs import Step
from hypermlp_lab.plan.search import Limits, choose
from hypermlp_lab.plan.sizes import sized_model
from hypermlp_lab.training.recipe import parameter_count

_GIGA = 1e9
# of GPUs, sequences and tokens: meshes are tried one by one
_MOST = 1e9
_ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
# what each row stands for, beside its number
_MEMORY = {
    "weights": "its shard, and what FSDP2 gathers of the others' while a block is computed",
    "gradients": "likewise",
    "optimizer": "AdamW's two moments of its shard",
    "operator": "queries, keys, values and output of attention, kept for the backward",
    "activations": "all else that is kept for the backward",
    "logits": "the loss: the softmax of the logits, and gradients",
    "block": "nothing: no block is computed once more",
    "at once": "all of it",
}
_MEMORY_ONCE_MORE = {
    "operator": "queries, keys, values and output of attention, of the block that is computed once more",
    "activations": "the inputs of all blocks, which are kept",
    "block": "all else of the block that is computed once more",
    "at once": "the most at one time: the logits go before a block is computed once more",
}
_COMPUTED = {"recomputed": "blocks once more in the backward", "together": ""}
_SENT = {
    "weights": "gathered by FSDP2",
    "gradients": "summed by FSDP2",
    "heads": "sums of what heads on several GPUs give",
    "sequence": "keys and values of a sequence on several GPUs",
    "together": "",
}


@user_errors()
def plan(
    params: Annotated[
        float | None, typer.Option(help="Parameters, such as 7e9; or --hidden-size and --layers instead.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 4096,
    gpus: Annotated[int, typer.Option(help="GPUs, one process each.")] = 8,
    memory_gb: Annotated[float, typer.Option(help="Memory of a GPU, in 1e9 bytes.")] = 80.0,
    headroom: Annotated[float, typer.Option(help="Share of it that is left for what no formula here counts.")] = 0.1,
    batch: Annotated[
        int | None, typer.Option(help="Sequences a step, over all GPUs. Default: as many as GPUs.")
    ] = None,
    mixer: Annotated[str, typer.Option(help="hyperglu, hypermlp, relu or softmax.")] = "hyperglu",
    dtype: Annotated[str, typer.Option(help="Of the computation: bfloat16, float16 or float32.")] = "bfloat16",
    hidden_size: Annotated[int | None, typer.Option(help="Width. Default: 128 a layer.")] = None,
    layers: Annotated[int | None, typer.Option(help="Blocks. Default: what --params asks for.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Default: 2, of softmax and relu hidden-size / 128.")] = None,
    max_lag: Annotated[int | None, typer.Option(help="Lags of the tables, and the window. Default: seq-len.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens there are.")] = 32000,
    checkpointing: Annotated[
        bool | None, typer.Option(help="Compute blocks once more in the backward. Default: where it is needed.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Processes that share a layer's heads. Default: chosen.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Processes that share a sequence. Default: chosen.")] = None,
    gpus_per_node: Annotated[int, typer.Option(help="Heads are shared within a machine alone.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what training takes: memory of a GPU, FLOPs and bytes sent a step, and a mesh that fits.

    From formulas, which tests compare with measured small cases; nothing is built and no GPU is asked. Status 1 where
    no mesh fits.
    """
    batch = gpus if batch is None else batch
    sizes = {"seq-len": seq_len, "gpus": gpus, "batch": batch, "gpus-per-node": gpus_per_node, "heads": heads}
    for name, value in (sizes | {"sequence": sequence, "memory-gb": memory_gb}).items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} must be positive, got {shown(value)}")
        if value is not None and value > _MOST:
            raise ValueError(f"--{name} must be at most {_MOST:g}, got {shown(value)}")
    if not 0 <= headroom < 1:
        raise ValueError(f"--headroom must be a share from 0 to below 1, got {headroom}")
    if dtype not in _ITEMSIZES:
        raise ValueError(f"--dtype must be one of {', '.join(_ITEMSIZES)}, got {dtype!r}")
    model = sized_model(
        params, mixer=mixer, seq_len=seq_len, vocab_size=vocab_size, hidden_size=hidden_size, num_layers=layers,
        num_heads=num_heads, max_lag=max_lag,
    )  # fmt: skip
    limits = Limits(gpus, gpus_per_node, (1 - headroom) * memory_gb * _GIGA, heads, sequence, checkpointing)
    step, fits = choose(Step(model, seq_len, batch, itemsize=_ITEMSIZES[dtype]), limits)
    report = _report(step, fits, gpus, dtype, memory_gb)
    typer.echo(json.dumps(report, indent=2) if as_json else "\n".join(_lines(report, headroom)))
    if not fits:
        typer.echo(
            f"hypermlp: no mesh fits: this one, of the least memory, takes {step.peak() / _GIGA:,.1f} GB of "
            f"{(1 - headroom) * memory_gb:,.1f}: give more --gpus or --memory-gb, a shorter --seq-len or --max-lag, "
            "or leave --heads, --sequence, --checkpointing to be chosen",
            err=True,
        )
        raise typer.Exit(1)


def _report(step: Step, fits: bool, gpus: int, dtype: str, memory_gb: float) -> dict[str, Any]:
    """All that is known, as JSON has it."""
    attention, memory, flops, sent = step.model.attention, step.memory(), step.flops(), step.sent()
    return {
        "model": {
            "mixer": attention.mixer, "parameters": parameter_count(step.model), "hidden_size": step.model.hidden_size,
            "layers": step.model.num_layers, "num_heads": attention.num_heads, "max_lag": attention.max_lag,
            "vocab_size": step.model.vocab_size, "intermediate_size": step.model.intermediate_size,
        },
        "step": {"batch": step.batch, "seq_len": step.seq_len, "tokens": step.batch * step.seq_len, "dtype": dtype},
        "gpus": gpus, "memory_gb": memory_gb, "fits": fits,
        "mesh": {"data": step.mesh.data, "heads": step.mesh.heads, "sequence": step.mesh.sequence},
        "rows_at_once": step.rows, "passes": step.passes, "checkpointing": step.checkpointing,
        "memory_bytes": memory, "memory_bytes_peak": step.peak(),
        "flops": flops, "flops_total": sum(flops.values()), "flops_per_gpu": sum(flops.values()) / gpus,
        "sent_bytes": sent, "sent_bytes_total": sum(sent.values()),
    }  # fmt: skip


def _lines(report: dict[str, Any], headroom: float) -> list[str]:
    model, step, mesh = report["model"], report["step"], report["mesh"]
    memory = report["memory_bytes"] | {"at once": report["memory_bytes_peak"]}
    lags = "" if model["max_lag"] is None else f", {model['max_lag']:,} lags"
    blocks = "computed once more in the backward" if report["checkpointing"] else "kept for the backward"
    lines = [
        f"{model['mixer']}, {model['parameters']:,} parameters: {model['layers']} layers of width "
        f"{model['hidden_size']:,} with {model['num_heads']} heads{lags}, a vocabulary of {model['vocab_size']:,}",
        f"{report['gpus']:,} GPUs, {step['batch']:,} sequences of {step['seq_len']:,} tokens a step, {step['dtype']}",
        "",
        f"mesh: data {mesh['data']} x heads {mesh['heads']} x sequence {mesh['sequence']} "
        "(GPUs that share a batch, a layer's heads, a sequence's tokens)",
        f"sequences at once: {report['rows_at_once']}, passes a step: {report['passes']}, blocks {blocks}",
        "",
        *_table("memory of a GPU, GB", memory, _GIGA, _MEMORY | (_MEMORY_ONCE_MORE if report["checkpointing"] else {})),
        f"of {report['memory_gb']:,.1f} GB, of which {100 * headroom:g} % stay free",
        "",
        *_table("computed a step by each GPU, TFLOP", report["flops"], 1e12 * report["gpus"], _COMPUTED),
        "",
        *_table("sent a step by each GPU, GB", report["sent_bytes"], _GIGA, _SENT),
    ]
    if mesh["sequence"] > 1:
        lines += [
            "",
            "The Triton kernels refuse a part of the queries: sequences over processes take the chunked path.",
        ]
    return lines


def _table(title: str, values: dict[str, int], unit: float, meaning: dict[str, str]) -> list[str]:
    """A row of each value and what it stands for, and their sum where ``meaning`` has a row for it."""
    if "together" in meaning:
        values = values | {"together": sum(values.values())}
    rows = ((name, value / unit, meaning.get(name, "")) for name, value in values.items())
    return [title, *(f"  {name:<12}{number:>12,.2f}  {text}".rstrip() for name, number, text in rows)]
