"""Race optimizers over several tasks, each at its best learning rate and momentum.

For each optimizer and task, one seed searches (`search.py`); the best settings then run with other
seeds. The search starts at the recommended settings, so its first run shows these untouched. Toys
run at the recommended settings with four learning rates. Every finished run is a line in a file, so
an interrupted race resumes with the first missing run, and several processes may share the work.

    python benchmarks/scoreboard.py             # do the missing runs
    python benchmarks/scoreboard.py --variants  # structures and refresh intervals
    python benchmarks/scoreboard.py --widths    # learning rates for models of three widths
    python benchmarks/scoreboard.py --plan      # tell how many are missing, and how long they take
    python benchmarks/scoreboard.py --time      # time the steps of all, on a quiet machine
    python benchmarks/scoreboard.py --report    # write docs/scoreboard.md and the README's table
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from entrants import ENTRANTS, KNOWN, VARIANTS, WIDTHS
from records import Records, Setting, claimed
from search import BUDGET, Found, search
from tasks.burgers import Burgers
from tasks.digits import Digits
from tasks.language import Language
from tasks.toys import TOYS
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm
from training import Run, train

TASKS: dict[str, Callable[[], Any]] = {
    "language": cache(Language),
    "burgers": cache(Burgers),
    "digits": cache(Digits),
    **{name: cache(toy) for name, toy in TOYS.items()},
    **{f"width {width}": cache(partial(Language.of_width, width)) for width in (64, 128, 256)},
}
TUNED = ("language", "burgers", "digits")
"""The tasks with a search and several seeds; the others are toys."""
FACTORS = (0.1, 0.3, 1.0, 3.0)
"""The factors on the recommended learning rate for toys."""
ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "scoreboard.jsonl"
SEARCH_SEED = 0

Get = Callable[[Setting], Run]


class MissingRunError(Exception):
    """A run is not in the records."""


def setting_of(task: str, name: str, lr: float, momentum: float, seed: int) -> Setting:
    """Return the setting of a run."""
    steps = TASKS[task]().steps
    return Setting(task, name, KNOWN[name].settings, lr, momentum, seed, steps)


def tuned(get: Get, task: str, name: str) -> Found:
    """Search for the best settings of an entrant on a task."""
    entrant = ENTRANTS[name]

    def loss(lr: float, momentum: float) -> float:
        return get(setting_of(task, name, lr, momentum, SEARCH_SEED)).final_loss

    return search(loss, entrant.lr, entrant.momentum, entrant.momenta)


def repeats(get: Get, task: str, name: str, found: Found) -> list[Run]:
    """Return the runs of the best settings with other seeds."""
    seeds = range(SEARCH_SEED + 1, SEARCH_SEED + 1 + ENTRANTS[name].seeds)
    return [get(setting_of(task, name, *found.best, seed)) for seed in seeds]


def on_toy(get: Get, task: str, name: str) -> list[Run]:
    """Return the runs of an entrant on a toy."""
    entrant = ENTRANTS[name]
    return [
        get(setting_of(task, name, entrant.lr * factor, entrant.momentum, SEARCH_SEED))
        for factor in FACTORS
    ]


def on_width(get: Get, task: str, name: str) -> list[Run]:
    """Return the runs of an optimizer on a model of some width, for five learning rates."""
    entrant = WIDTHS[name]
    rates = [entrant.lr * 2.0**power for power in range(-2, 3)]
    return [get(setting_of(task, name, lr, entrant.momentum, SEARCH_SEED)) for lr in rates]


def as_recommended(get: Get, task: str, name: str) -> list[Run]:
    """Return the runs of a variant at the recommended learning rate, with two seeds."""
    variant = VARIANTS[name]
    return [get(setting_of(task, name, variant.lr, variant.momentum, seed)) for seed in (1, 2)]


def campaign(get: Get, task: str, name: str) -> None:
    """Do all runs of an entrant on a task."""
    if task.startswith("width"):
        on_width(get, task, name)
    elif name in VARIANTS:
        as_recommended(get, task, name)
    elif task in TUNED:
        repeats(get, task, name, tuned(get, task, name))
    else:
        on_toy(get, task, name)


def from_records(records: Records, setting: Setting) -> Run:
    """Return a finished run, or raise `MissingRunError`."""
    if setting not in records.runs:
        raise MissingRunError(setting)
    return records.runs[setting]


def make(name: str, task: Any, momentum: float, model: nn.Module, lr: float) -> Optimizer:
    """Make the optimizer of an entrant."""
    return KNOWN[name].make(model, lr, momentum, task.samples)


def do(setting: Setting) -> Run:
    """Do a run."""
    task = TASKS[setting.task]()
    run = Run(setting.entrant, setting.lr, setting.seed, setting.steps)
    every = max(1, setting.steps // 20)
    build = partial(make, setting.entrant, task, setting.momentum)
    try:
        return train(run, build, task, eval_every=every, quiet=True)
    except (RuntimeError, ValueError) as error:  # a peer that fails on numbers has diverged
        print(f"{setting}: {error}", file=sys.stderr)
        run.diverged = True
        return run


def count_missing(records: Records, task: str, name: str) -> int:
    """Return how many runs of a campaign are missing, as far as that is known."""
    found = 0

    def get(setting: Setting) -> Run:
        nonlocal found
        found += setting in records.runs
        return from_records(records, setting)

    try:
        campaign(get, task, name)
    except MissingRunError:
        total = len(FACTORS)
        if task.startswith("width"):
            total = 5
        elif name in VARIANTS:
            total = 2
        elif task in TUNED:
            total = BUDGET + ENTRANTS[name].seeds
        return max(0, total - found)
    return 0


def campaigns(tasks: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield tasks and entrants whose packages are there."""
    for name in names:
        if KNOWN[name].available:
            yield from ((task, name) for task in tasks)
        else:
            print(f"{name} is left out: {KNOWN[name].package} is missing", file=sys.stderr)


def run_all(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """Do the missing runs, except those of campaigns that another process works on."""
    records = Records(path)
    bar = tqdm(total=sum(count_missing(records, *pair) for pair in pairs), unit="run")
    for task, name in pairs:
        with claimed(path, f"{task} {name}") as ours:
            if not ours:
                continue
            records.read()

            def get(setting: Setting) -> Run:
                if setting not in records.runs:
                    records.add(setting, do(setting))
                    bar.update()
                    bar.set_postfix_str(f"{setting.task}, {setting.entrant}")
                return records.runs[setting]

            campaign(get, task, name)
    bar.close()


def time_steps(names: Sequence[str], task: Any, rounds: int = 10, steps: int = 6) -> Any:
    """Return the seconds of a step of each entrant, one number per round.

    In each round, every optimizer makes some steps, so that busy moments hit all alike. The first
    round is left out. The learning rates are tiny: all models stay close to their start, so their
    passes cost the same. With AdamW's own rate, those of this model take half as long again after
    30 steps.
    """
    jobs = {}
    for name in names:
        torch.manual_seed(0)
        model = task.model()
        entrant = KNOWN[name]
        jobs[name] = (model, make(name, task, entrant.momentum, model, 1e-6 * entrant.lr))
    batches = task.batches(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in tqdm(range(rounds + 1), unit="round"):
        for name, (model, optimizer) in jobs.items():
            start = time.perf_counter()
            for _ in range(steps):
                optimizer.zero_grad()
                task.loss(model, next(batches)).backward()
                optimizer.step()
            if number:
                times[name].append((time.perf_counter() - start) / steps)
    return times


def estimate(records: Records, pairs: Sequence[tuple[str, str]]) -> str:
    """Return how many runs are missing, and how long they take on one thread."""
    seconds = total = 0.0
    for task, name in pairs:
        same = [r for s, r in records.runs.items() if s.task == task and r.curve]
        usual = {"language": 120.0, "burgers": 25.0, "digits": 8.0}.get(task, 1.5)
        if same:
            usual = statistics.median(run.curve[-1][1] for run in same)
        missing = count_missing(records, task, name)
        total += missing
        seconds += missing * usual
    return f"{total:.0f} runs are missing, about {seconds / 60:.0f} minutes of one process."


def main(argv: Sequence[str] | None = None) -> None:
    """Do the missing runs, time steps, or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    raced = [task for task in TASKS if not task.startswith("width")]
    parser.add_argument("--tasks", nargs="+", default=raced, choices=raced)
    parser.add_argument("--entrants", nargs="+", default=list(ENTRANTS), choices=ENTRANTS)
    parser.add_argument("--variants", action="store_true", help="structures and intervals instead")
    parser.add_argument("--widths", action="store_true", help="learning rates by width instead")
    parser.add_argument("--out", type=Path, default=OUT, help="the runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plan", action="store_true", help="tell what is missing")
    parser.add_argument("--time", action="store_true", help="time steps of the language task")
    parser.add_argument("--report", action="store_true", help="write the page and the table")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.report:
        from report import write

        write(Records(args.out), ROOT)
        return
    pairs = list(campaigns(args.tasks, args.entrants))
    if args.variants:
        pairs = list(campaigns(["language"], list(VARIANTS)))
    if args.widths:
        pairs = list(campaigns([task for task in TASKS if task not in raced], list(WIDTHS)))
    if args.time:
        names = list(dict.fromkeys(name for _, name in pairs))
        Records(args.out).add_times(time_steps(names, TASKS["language"]()))
        return
    print(estimate(Records(args.out), pairs))
    if not args.plan:
        run_all(args.out, pairs)


if __name__ == "__main__":
    main()
