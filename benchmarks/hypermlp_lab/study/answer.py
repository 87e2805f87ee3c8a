"""The answer in words and tables, for the page and for the documentation: rows of plain text."""

from __future__ import annotations

from statistics import median

from hypermlp_lab.page import Table
from hypermlp_lab.study.claims import BY_TASK, CLAIMS, COMPONENTS, LEVEL_MARGIN, PUBLISHED, Claim
from hypermlp_lab.study.plan import COMMON
from hypermlp_lab.study.results import TASKS_MEASURE, Results
from hypermlp_lab.study.runs import TEXT
from hypermlp_lab.study.statistics import Estimate, Verdict, estimate, verdict, verdict_on_level

NAMES = {TASKS_MEASURE: "the six tasks", TEXT: "text"}
_NONE = "-"


def headline(results: Results) -> list[str]:
    """The answer in a few sentences, whichever it is."""
    if not results.records:
        return ["Nothing has been measured yet."]
    lines = [_sentence(results, claim, measure) for claim in CLAIMS[:2] for measure in (TASKS_MEASURE, TEXT)]
    missing = sum(results.missing.values())
    if missing:
        where = ", ".join(f"{count} of {name}" for name, count in results.missing.items() if count)
        lines.append(f"The study is not complete: {missing} runs are still to be made ({where}).")
    return lines


def claim_verdict(results: Results, claim: Claim, measure: str) -> tuple[Estimate | None, Verdict]:
    """Our advantage of the claim's first variant, and what it says of the claim."""
    found = results.advantage(claim.better, claim.other, measure)
    return found, verdict_on_level(found, LEVEL_MARGIN[measure]) if claim.level else verdict(found)


def claims_table(results: Results) -> Table:
    rows = []
    for claim in CLAIMS:
        for measure in (TASKS_MEASURE, TEXT):
            found, said = claim_verdict(results, claim, measure)
            paper = claim.published(measure)
            who = f"{claim.better} against {claim.other}"
            common = _difference(results.advantage(claim.better, claim.other, measure, COMMON), measure)
            quoted = _NONE if paper is None else format(paper, "+.4f" if measure == TEXT else "+.2f")
            rows.append([claim.text, who, NAMES[measure], quoted, _difference(found, measure), said, common])
    caption = (
        "The paper's claims. Figures are advantages of the first variant, percent points more right answers on tasks "
        "and nats less on text, with 95 % bootstrap intervals over seeds. A verdict is on the best settings, and needs "
        "at least three seeds and Student's interval on the same side of zero, too; of 22 verdicts about one is due to "
        "chance. The paper's text loss is per token of another text."
    )
    return Table(caption, ["claim", "variants", "on", "paper", "here", "verdict", "common setting"], rows)


def components_table(results: Results) -> Table:
    rows = [
        [name, f"{better} against {other}"]
        + [_difference(results.advantage(better, other, measure), measure) for measure in (TASKS_MEASURE, TEXT)]
        for name, better, other in COMPONENTS
    ]
    caption = "What each component adds, paired by seed, each variant at its best setting: percent points; nats less."
    return Table(caption, ["component", "variants", "six tasks", "text"], rows)


def by_task_table(results: Results) -> Table:
    """What decides each task: mixing, the width of queries and keys, the learning rate of the tables."""
    rows = []
    for measure in (*results.tasks, TEXT):
        row = [
            _difference(results.advantage(better, other, measure), measure, seeds=False) for _, better, other in BY_TASK
        ]
        slower = [gain for job in results.jobs if job.name == measure for gain in results.of_slower_tables(job)]
        rows.append([measure, *row, _range(slower, measure)])
    caption = (
        "By task: percent points more right, nats less on text, paired by seed, each variant at its best setting. The "
        "last column is from the sweep: a tenth of the learning rate for the tables, all else equal; median over "
        "variants, and range."
    )
    return Table(caption, ["task", *(name for name, *_ in BY_TASK), "slower tables"], rows)


def scores_table(results: Results, which: str) -> Table:
    rows = []
    for variant in results.variants:
        if which == COMMON and variant.fixed_start is not None:
            continue
        paper = PUBLISHED.get(variant.name)
        quoted = [_NONE, _NONE]
        if paper is not None:
            text = _number(paper.text, 4) if paper.quoted else f"about {paper.text:.3f}"
            quoted = [_number(paper.tasks, 2), text]
        means = [_mean(results, variant.name, measure, which) for measure in results.measures]
        rows.append([variant.name, *means, *quoted])
    setting = "its best setting"
    if which == COMMON:
        lrs = f"{results.preset.common_lr:g}, on text {results.preset.text_common_lr:g}"
        setting = f"the common setting (learning rate {lrs}, reset_parameters, the usual heads)"
    caption = (
        f"Every variant at {setting}: mean over seeds [95 % bootstrap interval]. Tasks in % right, text in nats a byte."
    )
    headings = ["variant", "six tasks", *results.tasks, "text", "paper: MAD", "paper: loss"]
    return Table(caption, headings, rows)


def settings_table(results: Results) -> Table:
    """The chosen settings, and the parameters that go with them."""
    rows = []
    for _, cell in results.cells:
        run = results.setting(cell.variant, cell.job)
        if run is None:
            rows.append([cell.variant.name, cell.job.name, "not chosen yet", *[_NONE] * 4])
            continue
        record = results.records[run]
        lrs = results.preset.lrs_of(cell.job)
        at_end = " (an end of the sweep)" if len(lrs) > 1 and run.lr in (min(lrs), max(lrs)) else ""
        tables = f", tables x {run.table_lr:g}" if run.table_lr != 1 else ""
        chosen = f"{run.start}, lr {run.lr:g}{at_end}{tables}, decay {run.weight_decay:g}, {run.heads} heads"
        counts = [f"{record[name]:,}" for name in ("parameters", "layer_parameters")]
        widths = ", ".join(f"{name} {width}" for name, width in record.get("widths", {}).items()) or _NONE
        rows.append([cell.variant.name, cell.job.name, chosen, *counts, widths, f"{record['total_cpu_seconds']:.0f}"])
    caption = (
        "The setting that was best on the split to choose by, with parameters of the model and of one attention layer."
    )
    return Table(caption, ["variant", "task", "setting", "model", "layer", "widths", "CPU s"], rows)


def sweep_table(results: Results) -> Table:
    """Every run that a setting was chosen by, on the split to choose by."""
    rows = []
    for job in results.jobs:
        for run, record in results.swept(job):
            numbers = [f"{x:g}" for x in (run.lr, run.table_lr, run.weight_decay, run.heads)]
            ended = f" (diverged at step {record['diverged_at']})" if record["diverged_at"] else ""
            score = f"{100 * record['selection']:.1f} %" if job.higher_is_better else f"{record['selection']:.4f}"
            rows.append([job.name, run.label, run.start, *numbers, score + ended])
    caption = "The sweep, scored on the split that settings are chosen on and with a seed that is not reported."
    return Table(
        caption, ["task", "variant", "start", "learning rate", "of tables, times", "decay", "heads", "score"], rows
    )


def jobs_table(results: Results) -> Table:
    rows = []
    for job in results.jobs:
        chance = _NONE if job.task is None else f"{100 * job.task.chance:.1f} %"
        size = f"{job.num_layers} layers, width {job.hidden_size}, mix rank {job.mix_rank}"
        data = f"{job.train_examples:,} sequences" if job.task else "windows of the text"
        vocab = str(job.size.vocab_size)
        rows.append([job.name, size, vocab, str(job.seq_len), f"{job.steps} x {job.batch_size}", data, chance])
    headings = ["task", "model", "tokens known", "length", "steps x batch", "trained on", "chance"]
    return Table("What was learnt, and by how much training.", headings, rows)


def _sentence(results: Results, claim: Claim, measure: str) -> str:
    found, _ = claim_verdict(results, claim, measure)
    if found is None:
        return f"{claim.better} against {claim.other} on {NAMES[measure]}: no data yet."
    names = {"G-cg-q-12o": "HyperGLU", "R-cg-q-12o": "HyperMLP"}
    who, than = names[claim.better], "softmax attention with RoPE and convolutions"
    said = {1: f"{who} is better than {than}", -1: f"{who} is worse than {than}"}.get(
        found.sign, f"between {who} and {than} it is not decided at this size"
    )
    said = said[0].upper() + said[1:]
    planned = results.seeds(measure)
    seeds = f"{found.count} of {planned}" if found.count < planned else f"{found.count}"
    return f"On {NAMES[measure]}: {said}: {_difference(found, measure, seeds=False)}, {seeds} seeds."


def _difference(found: Estimate | None, measure: str, *, seeds: bool = True) -> str:
    if found is None:
        return "no data"
    unit = "nats" if measure == TEXT else "points"
    text = _with_interval(found, "+" + _format(measure))
    return f"{text} ({found.count} seeds)" if seeds else f"{text} {unit}"


def _range(values: list[float], measure: str) -> str:
    if not values:
        return "no data"
    low, middle, high = (format(x, "+" + _format(measure)) for x in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high}, {len(values)} variants)"


def _mean(results: Results, variant: str, measure: str, which: str) -> str:
    found = estimate(list(results.scores(variant, measure, which).values()))
    if found is None:
        return "no data"
    text, planned = _with_interval(found, _format(measure)), results.seeds(measure)
    return text if found.count == planned else f"{text} ({found.count} of {planned} seeds)"


def _with_interval(found: Estimate, spec: str) -> str:
    mean, low, high = (format(value, spec) for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]" if found.count > 1 else mean


def _format(measure: str) -> str:
    """Of nats, or of percent points."""
    return ".4f" if measure == TEXT else ".1f"


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"
