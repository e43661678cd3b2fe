"""How one gradient that is 1e5 times too large affects a run, and for how long.

A small noisy regression of 100 steps; noise replaces the gradient of step 50. Prints medians over
the seeds: the loss before, the worst loss after, the steps until the loss is at most 1.5 times the
loss before, the last loss, and the last loss of a run without the outlier.

    python benchmarks/outlier.py
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial

import torch
from torch import nn

from structprecond import KLSOAP, SOAP, AdamW, KLShampoo, Muon, Shampoo

STEPS, OUTLIER = 100, 50
Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
CONTESTANTS: dict[str, Build] = {
    "SOAP, clip_rms=3": partial(SOAP, lr=0.02, weight_decay=0.0, clip_rms=3.0),
    "SOAP": partial(SOAP, lr=0.02, weight_decay=0.0),
    "KLSOAP": partial(KLSOAP, lr=0.02, weight_decay=0.0),
    "KLShampoo": partial(KLShampoo, lr=0.02, weight_decay=0.0),
    "Shampoo": partial(Shampoo, lr=0.02),
    "Muon": partial(Muon, lr=0.02, weight_decay=0.0, scale_mode="match_rms_adamw"),
    "AdamW": partial(AdamW, lr=0.02, weight_decay=0.0),
}


def losses(build: Build, seed: int, outlier: bool) -> list[float]:
    """Return the loss before every step."""
    torch.manual_seed(seed)
    p = nn.Parameter(torch.randn(8, 6))
    target = torch.randn(8, 6)
    optimizer = build([p])
    result = []
    for step in range(STEPS):
        loss = (p - target).square().mean()
        result.append(loss.item())
        optimizer.zero_grad()
        (loss + 0.05 * (torch.randn(8, 6) * p).sum()).backward()
        noise = torch.randn(8, 6)
        if outlier and step == OUTLIER:
            p.grad = 1e5 * noise
        optimizer.step()
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Print a table; return the median of the last losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=7)
    args = parser.parse_args(argv)
    print("| optimizer | before | worst | steps to recover | last | last without |")
    print("|---|---:|---:|---:|---:|---:|")
    last = {}
    for name, build in CONTESTANTS.items():
        runs = [losses(build, seed, outlier=True) for seed in range(args.seeds)]
        undisturbed = [losses(build, seed, outlier=False)[-1] for seed in range(args.seeds)]
        before = statistics.median(run[OUTLIER] for run in runs)
        worst = statistics.median(max(run[OUTLIER + 1 :]) for run in runs)
        recovered = [_steps_to_recover(run) for run in runs]
        steps = statistics.median(recovered)
        last[name] = statistics.median(run[-1] for run in runs)
        print(
            f"| {name} | {before:.2f} | {worst:.3g} | {steps if steps < STEPS else 'never'} | "
            f"{last[name]:.3g} | {statistics.median(undisturbed):.2f} |"
        )
    print(f"\n{date.today()}, {platform.machine()}, {args.seeds} seeds, torch {torch.__version__}")
    return last


def _steps_to_recover(run: Sequence[float]) -> int:
    """Return the number of steps from the outlier until recovery, STEPS if never."""
    after = run[OUTLIER + 1 :]
    # start at the worst loss: before it, the loss has not recovered
    worst = max(range(len(after)), key=after.__getitem__)
    steps = (i for i in range(worst, len(after)) if after[i] <= 1.5 * run[OUTLIER])
    return next(steps, STEPS - 1) + 1


if __name__ == "__main__":
    main()
