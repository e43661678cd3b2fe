"""Writes docs/distributed_plan.md: what optimizers cost on up to 1,024 ranks, on paper.

python benchmarks/plans.py; takes a minute on one core, and gives the same on every machine
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import language_models
from torch import nn

from structprecond import SOAP, KLShampoo, Muon, PerParameter, SIRFShampoo, SplitHeads
from structprecond.plan import Forecast, plan
from structprecond.tables import human

PAGE = Path(__file__).parents[1] / "docs/distributed_plan.md"
WORLDS = (8, 64, 128, 256, 1024)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2 124M": language_models.gpt2,
    "Llama 1B": language_models.llama_1b,
    "Llama 7B": language_models.llama_7b,
}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SOAP": SOAP,
    "KLShampoo": KLShampoo,
    "Muon": Muon,
    "SIRFShampoo": partial(SIRFShampoo, batch_size=1),
}
# AdamW computes each entry alone, so that rows of an embedding are updated as the whole one
SPLIT: dict[str, Any] = {
    "routes": {"embedding": "adamw", "head": "adamw"},
    "combine_params": (
        SplitHeads("embedding.weight", heads=32),
        SplitHeads("lm_head.weight", heads=32),
        PerParameter(),
    ),
}
BLOCKS: dict[str, Any] = {"structures": {1: "auto", 2: "block1024diagonal"}}
REMEDIES: dict[str, tuple[Callable[..., Any], str]] = {
    "as it is": (SOAP, "fsdp"),
    "owned in groups of 128": (SOAP, "replicate=8,shard=128"),
    "embeddings in 32 rows each": (partial(SOAP, **SPLIT), "fsdp"),
    "the same, in groups of 128": (partial(SOAP, **SPLIT), "replicate=8,shard=128"),
    "and with blocks of 1,024": (partial(SOAP, **SPLIT, **BLOCKS), "replicate=8,shard=128"),
}


def state(forecast: Forecast) -> str:
    """Return the largest state of a rank, and over the ideal."""
    return f"{human(forecast.largest('state_bytes'))} ({forecast.ratio('state_bytes'):.2f})"


def slowest(forecast: Forecast) -> str:
    """Return the operations of the slowest step over the ideal."""
    return f"{forecast.ratio('slowest_operations'):.2f}"


def busiest(forecast: Forecast) -> str:
    """Return the most bytes that a rank sends or receives in a step."""
    sent = max(rank.collect_sent + rank.spread_sent for rank in forecast.ranks)
    received = max(rank.collect_received + rank.spread_received for rank in forecast.ranks)
    return human(max(sent, received))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def remedies(world: int = WORLDS[-1]) -> str:
    """Return a table of what SOAP costs for the largest model, in several ways."""
    rows = []
    for name, (optimizer, mesh) in REMEDIES.items():
        found = plan(language_models.llama_7b, optimizer, world=world, mesh=mesh)
        owned = found.parameter_bytes / len(found.ranks)
        operations = f"{found.largest('slowest_operations'):.2g}"
        rows.append([name, human(owned), state(found), operations, busiest(found)])
    header = ["SOAP", "parameters", "largest state", "operations of the slowest step"]
    return table([*header, "sent or received"], rows)


def page() -> str:
    """Return the page."""
    found = {
        (model, name): [plan(build, optimizer, world=world) for world in WORLDS]
        for model, build in MODELS.items()
        for name, optimizer in OPTIMIZERS.items()
    }
    header = ["model", "optimizer", *(f"{world:,} ranks" for world in WORLDS)]

    def of(show: Callable[[Forecast], str]) -> str:
        return table(header, ([*names, *map(show, some)] for names, some in found.items()))

    return TEXT.format(
        state=of(state), slowest=of(slowest), busiest=of(busiest), remedies=remedies()
    )


TEXT = """# Plans for many ranks

What does an optimizer cost on each of 1,024 ranks? This command tells it in seconds, on one machine
and without allocating the model, before you rent any:

```bash
python -m structprecond.plan --world 1024 --mesh fsdp --optimizer SOAP --set lr=0.01 my_models:build
```

`my_models:build` is a function of yours that returns the model. `--mesh` takes `fsdp`, `ddp` (with
all ranks in `mesh=`), `hsdp:16x4` for 16 ranks that shard and 4 that replicate, or the dimensions,
as in `replicate=4,shard=16`; tensor parallelism is not planned. `--optimizer` also takes a function
of yours, `package.module:name`, that returns the optimizer of a model and passes on `mesh=`.
`--by-rank` prints a line per rank. In Python, `structprecond.plan.plan` returns the same as data.

The plan builds the optimizer of the first rank, whose state and exchanges are those of a real run:
bytes and collectives are exact, as tests with real ranks check. Operations are estimates.

## Three language models

Under FSDP2 (`--mesh fsdp`), with float32 parameters and default settings. This command writes the
page:

```bash
python benchmarks/plans.py
```

The largest state of a rank, and in parentheses how many times that is the ideal, the same on all:

{state}
The operations of the slowest step, with all refreshes, of the slowest rank over the ideal:

{slowest}
The most that a rank sends or receives in a step, for gradients and parameters on the way in and
updated parameters on the way out, in addition to what FSDP sends:

{busiest}
## What to do when units run out

Each unit has one owner. From some number of ranks on, the largest unit decides, and more ranks save
nothing. The plan then says so, names the unit, and advises what follows here for SOAP and Llama 7B
on 1,024 ranks:

{remedies}
- **Split the embedding.** It is the largest unit of all three models. AdamW treats each number
  alone, so `SplitHeads("embedding.weight", heads=32)` makes 32 rows with an owner each and changes
  nothing else. For matrices, `SplitHeads` makes rows with factors of their own, which is another
  method: it suits attention heads and fused projections.
- **Own within groups.** `init_device_mesh("cuda", (8, 128), mesh_dim_names=("replicate", "shard"))`
  shards over 128 ranks. The largest state stays about the same, and the optimizer sends nothing
  outside the groups; parameters and gradients take 8 times the memory of 1,024 shards.
- **Smaller factors.** Block structures, as in `structures={{1: "auto", 2: "block1024diagonal"}}`,
  make state smaller and refreshes much cheaper. They do not even out what is left: blocks have the
  owner of their matrix.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Write what optimizers cost on many ranks.")
    parser.add_argument("--output", type=Path, default=PAGE)
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="Some Kronecker factors")
    given.output.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
