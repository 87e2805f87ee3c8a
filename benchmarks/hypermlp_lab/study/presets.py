"""Sizes of the study: a minute, a few hours on two cores, and the published protocol."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypermlp_lab.study.runs import TEXT, Job
from hypermlp_lab.study.tasks import Task

MAD, NAMES = "mad", ("smoke", "cpu", "full")


@dataclass(frozen=True)
class Preset:
    """One size of the study.

    Args:
        name: ``"smoke"``, ``"cpu"`` or ``"full"``.
        tasks: jobs of ``hypermlp study mad``.
        text: that of ``hypermlp study text``.
        task_seeds, text_seeds: how many seeds are reported.
        lrs, text_lrs, weight_decays: tried for every variant alike, see :func:`~hypermlp_lab.study.plan.search`.
        table_lrs: learning rates of the tables of sequence mixing that are tried beside the one of all, as multiples.
        baseline_heads, hyper_heads: the usual number, then others that the best setting is tried with.
        common_lr, text_common_lr: of the common setting: this, the library's start, the first weight decay, the
            usual heads.
        sweep_seed: of weights and data of the sweep; none of those that are reported.
        tiers: how many tiers of variants; None for all.
    """

    name: str
    tasks: tuple[Job, ...]
    text: Job
    task_seeds: int = 5
    text_seeds: int = 3
    lrs: tuple[float, ...] = (3e-3, 8e-3, 2e-2)
    text_lrs: tuple[float, ...] = (3e-3, 8e-3, 2e-2)
    weight_decays: tuple[float, ...] = (0.1,)
    table_lrs: tuple[float, ...] = (0.1,)
    baseline_heads: tuple[int, ...] = (4, 8, 2)
    hyper_heads: tuple[int, ...] = (2, 4, 8)
    common_lr: float = 8e-3
    text_common_lr: float = 8e-3
    sweep_seed: int = 1000
    tiers: int | None = None

    def seeds_of(self, job: Job) -> range:
        return range(self.text_seeds if job.name == TEXT else self.task_seeds)

    def lrs_of(self, job: Job) -> tuple[float, ...]:
        return self.text_lrs if job.name == TEXT else self.lrs

    def common_lr_of(self, job: Job) -> float:
        return self.text_common_lr if job.name == TEXT else self.common_lr


def preset(name: str, *, data: str | None = None, device: str = "cpu") -> Preset:
    """The preset called ``name``.

    Args:
        name: of :data:`NAMES`.
        data: text of the language models; None for the standard library.
        device: where to train.
    """
    if name not in NAMES:
        raise ValueError(f"preset must be one of {NAMES}, got {name!r}")
    made = {"smoke": _smoke, "cpu": _cpu, "full": _full}[name]()
    return replace(
        made,
        tasks=tuple(replace(job, device=device) for job in made.tasks),
        text=replace(made.text, device=device, data=data),
    )


def _job(task: Task, **options: int) -> Job:
    return Job(task.name, seq_len=task.width, task=task, **options)  # type: ignore[arg-type]


def _smoke() -> Preset:
    options = {"hidden_size": 16, "num_layers": 1, "mix_rank": 2, "steps": 3, "batch_size": 4, "train_examples": 16}
    options |= {"eval_examples": 8, "evaluations": 1}
    tasks = (
        Task("recall", 16, 16), Task("noisy-recall", 32, 16, noise_vocab=16, noise=0.2),
        Task("fuzzy-recall", 16, 24), Task("selective-copying", 16, 16, copied=4),
        Task("memorization", 16, 8), Task("compression", 16, 8),
    )  # fmt: skip
    text = Job(TEXT, 16, 1, 2, 16, 3, 4, eval_examples=8, evaluations=1)
    return Preset(
        "smoke", tuple(_job(task, **options) for task in tasks), text, task_seeds=2, text_seeds=2, lrs=(3e-3,),
        text_lrs=(3e-3,), common_lr=3e-3, text_common_lr=3e-3,
        table_lrs=(), baseline_heads=(2,), hyper_heads=(2,),
    )  # fmt: skip


def _cpu() -> Preset:
    """About 20,000 CPU seconds: 2 to 14 for each run on a task, 45 for each on text.

    As large as allows all variants, starts and seeds. Recall and copying are cut off while they are being
    learnt, so that scores are neither at chance nor perfect.
    """
    options = {"hidden_size": 64, "num_layers": 2, "mix_rank": 8, "batch_size": 32, "train_examples": 6400}
    tasks = (
        _job(Task("recall", 16, 64), steps=150, **options),
        _job(Task("noisy-recall", 32, 64, noise_vocab=16, noise=0.2), steps=200, **options),
        _job(Task("fuzzy-recall", 12, 64, motif=2), steps=300, **options),
        _job(Task("selective-copying", 16, 64, copied=8), steps=250, **options),
        _job(Task("memorization", 512, 32), steps=60, **options | {"train_examples": 256}),
        _job(Task("compression", 16, 12), steps=300, **options),
    )
    # on few, short sequences a rank of 16 leaves the MLPs half of their width: 4 learns better at equal parameters
    text = Job(TEXT, 96, 2, 4, 128, 500, 16, eval_examples=128, evaluations=8)
    return Preset("cpu", tasks, text)


def _full() -> Preset:
    """MAD's published sizes and sweep, and a model of GPT-2's size on bytes."""
    options = {"hidden_size": 128, "num_layers": 2, "mix_rank": 16, "batch_size": 128, "eval_examples": 1280}
    base = {"schedule": "constant", "dtype": "bfloat16", "evaluations": 20}
    jobs = []
    for task, examples in _published():
        steps = 200 * -(-examples // 128)
        jobs.append(replace(_job(task, steps=steps, train_examples=examples, **options), **base))  # type: ignore[arg-type]
    text = Job(TEXT, 768, 12, 16, 1024, 20_000, 64, eval_examples=512, evaluations=40, dtype="bfloat16")
    return Preset(
        "full", tuple(jobs), text, lrs=(1e-4, 5e-4, 1e-3), weight_decays=(0.0, 0.1), baseline_heads=(16, 1),
        hyper_heads=(2, 4), common_lr=5e-4, text_lrs=(1e-4, 3e-4, 1e-3), text_common_lr=3e-4,
    )  # fmt: skip


def _published() -> list[tuple[Task, int]]:
    """Every setting of MAD's tasks: the base, and each difficulty by itself; with the training sequences."""
    noisy = Task("noisy-recall", 32, 128, noise_vocab=16, noise=0.2)
    found: list[tuple[Task, int]] = []
    for base in (Task("recall", 16, 128), noisy, Task("fuzzy-recall", 16, 128)):
        found += [(base, 12_800), *((replace(base, seq_len=length), 12_800) for length in (256, 512, 1024))]
        found += [(replace(base, vocab_size=n + base.noise_vocab), 12_800) for n in (32, 64, 128)]
        found += [(base, count) for count in (6400, 3200, 1600, 800)]
    found += [(replace(noisy, noise=share), 12_800) for share in (0.4, 0.6, 0.8)]
    copying = Task("selective-copying", 16, 256)
    found += [(copying, 12_800), *((replace(copying, seq_len=length), 12_800) for length in (512, 1024))]
    found += [(replace(copying, vocab_size=n), 12_800) for n in (32, 64, 128)]
    found += [(copying, count) for count in (6400, 3200, 1600, 800)]
    found += [(replace(copying, copied=n), 12_800) for n in (32, 64, 96)]
    found += [(Task("memorization", n, 32), 256) for n in (256, 512, 1024, 2048, 4096, 8192)]
    compression = Task("compression", 16, 32)
    found += [(compression, 12_800), *((replace(compression, vocab_size=n), 12_800) for n in (32, 64, 128))]
    found += [(replace(compression, seq_len=length), 12_800) for length in (64, 128, 256)]
    found += [(compression, count) for count in (6400, 3200, 1600, 800)]
    return found
