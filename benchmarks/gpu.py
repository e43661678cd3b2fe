"""Prove the library on a GPU: tests, parity with the CPU, times and floors of steps, graphs.

Every finished piece is a line in a file, so a run that was stopped resumes with the first missing
one.

    python benchmarks/gpu.py                              # all parts
    python benchmarks/gpu.py --part steps --minutes 5     # one part, for at most 5 minutes
    python benchmarks/gpu.py --device cpu --short --out short.jsonl  # a look at the program itself
    python benchmarks/gpu.py --report                     # write docs/gpu.md

`--peer-path NAME=DIR`, once per package, adds packages from local checkouts to the part `steps`:

    python benchmarks/gpu.py --part steps --peer-path dion=../dion --peer-path dash=../dash
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import OURS, PEERS, RACES, Build, with_peers
from roofline import Rates, compare, estimated_floor
from step_time import Contestant, race, wait
from torch import nn
from workloads import LARGE, WORKLOADS, fill_gradients

from structprecond import RECOMMENDED, SOAP, AdamW, CapturedStep, Muon, StructPrecondError
from structprecond.testing.table import STRATEGIES

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "gpu.jsonl"
PARTS = ("tests", "parity", "steps", "floor", "captured", "share")
TESTS = ("tests/core/test_devices.py", "tests/core/test_captured.py", "tests/linalg")
PRECISIONS = ("float32", "tf32", "bfloat16")
WITH_FLOOR = ("adamw", "muon, float32", "muon, bfloat16", "soap", "shampoo")
GOALS = {"W5": 2.0, "W6": 1.5}
"""The most that a step may take, in floors."""
Races = Mapping[str, Mapping[str, Build]]

Piece = tuple[dict[str, Any], Callable[[], Any]]
"""What tells a piece from others, and what does it."""


def device_name(device: str) -> str:
    """Return the name of the accelerator, or the device itself."""
    return torch.cuda.get_device_name() if device == "cuda" else device


# --- the parts -----------------------------------------------------------------------------------


def tests(device: str, short: bool) -> Iterator[Piece]:
    """Run the tests that use a GPU where there is one."""
    files = TESTS[:1] if short else TESTS

    def run() -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return {"exit": done.returncode, "summary": lines[-1] if lines else "", "failed": failed}

    yield {"files": list(files)}, run


def parity(device: str, short: bool) -> Iterator[Piece]:
    """Compare seven steps of each strategy with the same ones on the CPU."""
    names = [name for name, usage in STRATEGIES.items() if usage.protocol]
    for name in names[:3] if short else names:
        for dtype in (torch.float64, torch.float32):

            def run(name: str = name, dtype: torch.dtype = dtype) -> float:
                torch.manual_seed(0)
                models = [_network().to(dtype)]
                models.append(copy.deepcopy(models[0]).to(device))
                optimizers = [STRATEGIES[name].make(model) for model in models]
                for seed in range(7):
                    fill_gradients(models[0], seed)
                    for p, q in zip(*(m.parameters() for m in models), strict=True):
                        assert p.grad is not None
                        q.grad = p.grad.to(device)
                    for optimizer in optimizers:
                        optimizer.step()
                pairs = zip(*(m.parameters() for m in models), strict=True)
                return max(_distance(p, q.cpu()) for p, q in pairs)

            yield {"strategy": name, "dtype": str(dtype).removeprefix("torch.")}, run


def steps(device: str, short: bool, races: Races = RACES) -> Iterator[Piece]:
    """Time steps beside other packages."""
    chosen = [n for n in races if not short or n in WITH_FLOOR[:2] or PEERS.keys() & races[n]]
    for workload, name, precision in _cases(chosen, short):

        def run(
            workload: str = workload, name: str = name, precision: str = precision
        ) -> list[Any]:
            with _precision(precision) as dtype:
                found = race(workload, name, races[name], 1 if short else 3, device, dtype)
            syncs = _syncs(workload, races[name], device, dtype)
            return [asdict(result) | {"syncs": syncs} for result in found]

        peers = [peer for peer in races[name] if peer in PEERS]
        piece = {"workload": workload, "race": name, "precision": precision}
        yield piece | ({"peers": peers} if peers else {}), run


def floor(device: str, short: bool) -> Iterator[Piece]:
    """Compare steps with the time that their products and their memory traffic need at least."""
    for precision in PRECISIONS[:1] if short else PRECISIONS:

        def rates(precision: str = precision) -> dict[str, float]:
            with _precision(precision) as dtype:
                found = Rates(device, dtype)
                return {"TFLOP/s": found.speed / 1e12, "GB/s": found.bandwidth / 1e9}

        yield {"rates": precision}, rates
    for workload, name, precision in _cases(WITH_FLOOR[: 2 if short else None], short):

        def run(
            workload: str = workload, name: str = name, precision: str = precision
        ) -> dict[str, float]:
            with _precision(precision) as dtype:
                model = (WORKLOADS | LARGE)[workload]().to(device, dtype)
                build = RACES[name][OURS]
                least = estimated_floor(model, build)
                # steps compute in float32 except where the race says otherwise
                products = torch.bfloat16 if name == "muon, bfloat16" else torch.float32
                rates = partial(Rates, device, products)
                bound, measured = compare(least, build, model, 1 if short else 3, rates)
            return {"floor (ms)": bound, "step (ms)": measured, "step / floor": measured / bound}

        yield {"workload": workload, "race": name, "precision": precision}, run


def _cases(races: Sequence[str], short: bool) -> Iterator[tuple[str, str, str]]:
    """Yield workloads, races and precisions."""
    for workload in ("tiny",) if short else ("W1", "W2", "W3", "W4", "W5", "W6"):
        for name in races:
            # factors of width 2,048 and 8,192 are a matter of many devices
            if workload == "W6" and name.partition(" ")[0] not in ("muon,", "adamw"):
                continue
            for precision in PRECISIONS[:1] if short else PRECISIONS:
                yield workload, name, precision


@contextmanager
def _precision(name: str) -> Iterator[torch.dtype]:
    """Set the precision of float32 products; give the type of the parameters."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield torch.bfloat16 if name == "bfloat16" else torch.float32
    finally:
        torch.set_float32_matmul_precision("highest")


def captured(device: str, short: bool) -> Iterator[Piece]:
    """Compare `CapturedStep` with plain steps, in time and in the parameters."""
    for workload in ("tiny",) if short else ("W1", "W2", "W5"):
        for optimizer in (SOAP, Muon, AdamW):

            def run(workload: str = workload, optimizer: Any = optimizer) -> dict[str, float]:
                torch.manual_seed(0)
                model = (WORKLOADS | LARGE)[workload]().to(device)
                plain = optimizer(model, nonfinite="ignore")
                other = copy.deepcopy(model)
                base = optimizer(other, nonfinite="ignore")
                # the CPU has no graphs: there, both make plain steps
                replayed = CapturedStep(base) if device == "cuda" else None
                times: tuple[list[float], list[float]] = ([], [])
                for seed in range(5 if short else 35):
                    for kind, own in enumerate((model, other)):
                        _fill_in_place(own, seed)
                        wait(device)
                        start = time.perf_counter()
                        (plain.step if kind == 0 else replayed or base.step)()
                        wait(device)
                        times[kind].append(1e3 * (time.perf_counter() - start))
                pairs = zip(model.parameters(), other.parameters(), strict=True)
                medians = [sorted(t)[len(t) // 2] for t in times]
                return {
                    "plain": medians[0],
                    "captured": medians[1],
                    "replays": replayed.replays if replayed else 0,
                    "difference": max(_distance(p, q) for p, q in pairs),
                }

            yield {"workload": workload, "optimizer": optimizer.__name__}, run


def share(device: str, short: bool) -> Iterator[Piece]:
    """Measure the optimizer's share of a training step of GPT-2 124M, in bfloat16 autocast."""
    layers, width, tokens, batch = (1, 32, 16, 2) if short else (12, 768, 1024, 32)
    settings = {"SOAP": {"precondition_frequency": 10}, "Muon": {}, "AdamW": {}}
    for name, more in settings.items():

        def run(name: str = name, more: Any = more) -> dict[str, float]:
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(
                width, max(width // 64, 1), 4 * width, 0.0, "gelu", batch_first=True
            )
            body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
            vocabulary = 64 if short else 50304
            head = nn.Linear(width, vocabulary, bias=False)
            model = nn.Sequential(nn.Embedding(vocabulary, width), body, head).to(device)
            kinds: dict[str, Any] = {"SOAP": SOAP, "Muon": Muon, "AdamW": AdamW}
            optimizer = kinds[name](model, **RECOMMENDED[name] | more)
            parts: tuple[list[float], list[float]] = ([], [])
            for _ in range(3 if short else 21):
                x = torch.randint(vocabulary, (batch, tokens), device=device)
                optimizer.zero_grad()
                wait(device)
                start = time.perf_counter()
                with torch.autocast(device, torch.bfloat16):
                    logits = model(x)[:, :-1].flatten(0, 1)
                    loss = nn.functional.cross_entropy(logits, x[:, 1:].flatten())
                loss.backward()
                wait(device)
                middle = time.perf_counter()
                optimizer.step()
                wait(device)
                parts[0].append(middle - start)
                parts[1].append(time.perf_counter() - middle)
            passes, own = (1e3 * sum(t[1:]) / len(t[1:]) for t in parts)
            return {"passes": passes, "optimizer": own, "share": own / (passes + own)}

        yield {"optimizer": name}, run


def _network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 12))


def _distance(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p - q).detach().norm() / p.detach().norm())


def _fill_in_place(model: nn.Module, seed: int) -> None:
    """Write random gradients to where they are, as captured steps need it."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad.normal_(generator=generator)


def _syncs(workload: str, builds: Any, device: str, dtype: torch.dtype) -> int | None:
    """Return how often the host waits in an ordinary step of ours; None without a GPU."""
    if device != "cuda":
        return None
    model = (WORKLOADS | LARGE)[workload]().to(device, dtype)
    ours = Contestant("structprecond", next(iter(builds.values())), model)
    for seed in range(4):
        ours.step(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            ours.optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


# --- the file ------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """Return the finished pieces; an interrupted last line does not count."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def do(part: str, device: str, short: bool, minutes: float, out: Path, races: Races = RACES) -> int:
    """Do the missing pieces of a part; return how many are left when the time is up."""
    makers: dict[str, Callable[[str, bool], Iterator[Piece]]] = {
        "tests": tests,
        "parity": parity,
        "steps": partial(steps, races=races),
        "floor": floor,
        "captured": captured,
        "share": share,
    }
    versions = {"device": device_name(device), "torch": torch.__version__, "short": short}
    # what failed is tried again
    done = [{k: r[k] for k in ("part", "piece", *versions)} for r in read(out) if "result" in r]
    started, left = time.monotonic(), 0
    for piece, run in makers[part](device, short):
        key = {"part": part, "piece": piece, **versions}
        if key in done:
            continue
        if time.monotonic() - started > 60 * minutes:
            left += 1
            continue
        print(f"{part}: {piece}", flush=True)
        try:
            found: dict[str, Any] = {"result": run()}
        except Exception as error:  # the other pieces count too
            found = {"error": f"{type(error).__name__}: {error}"}
            print(f"  {found['error']}", file=sys.stderr)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**key, **found, "date": date.today().isoformat()}) + "\n")
    return left


NOTES = {
    "steps": (
        "`--peer-path NAME=DIR` adds packages from local checkouts:",
        "",
        *(f"- `{name}`: {peer.repository} on GitHub" for name, peer in PEERS.items()),
        "",
        "Those with Kronecker factors get the matrices without axes above 10,000, those of Muon",
        "the matrices of Muon; AdamW takes the rest. Ours also preconditions the short axis of",
        "longer matrices, such as the embedding of W5.",
        "",
    ),
    "floor": (
        "The floor of a step is the time of the operations of its matrix products, with its share",
        "of the refreshes, at the rate of a large product, plus the time to read gradients and to",
        "read and write parameters and state at the rate of a large copy. Decompositions count as",
        "products. The goals are at most",
        " and ".join(f"{most:g} floors on {workload}" for workload, most in GOALS.items()) + ".",
        "",
    ),
}
"""What the page says about a part, run or not."""


def report(records: Sequence[dict[str, Any]]) -> str:
    """Return the page about runs on GPUs."""
    lines = [
        "# On a GPU",
        "",
        "`make gpu` runs the tests that use a GPU, compares each strategy with its run on the CPU,",
        "times steps beside other packages, compares them with their floor, and times captured",
        "steps and the optimizer's share of a training step. This page is generated from",
        "`benchmarks/results/gpu.jsonl`.",
        "",
    ]
    own = [r for r in records if not r["short"] and r["device"] != "cpu"]
    for part in PARTS:
        lines += [f"## {part.capitalize()}", "", *NOTES.get(part, ())]
        found = [r for r in own if r["part"] == part]
        if not found:
            lines += ["Not yet run on a GPU.", ""]
            continue
        lines += ["| device | what | result |", "|---|---|---|"]
        # the last try of each piece counts
        last = {(r["device"], r["torch"], _text(r["piece"])): r for r in found}
        found = list(last.values())
        lines += [f"| {r['device']} | {_text(r['piece'])} | {_result(r)} |" for r in found]
        lines.append("")
    return "\n".join(lines)


def _text(piece: dict[str, Any]) -> str:
    return ", ".join(" ".join(v) if isinstance(v, list) else str(v) for v in piece.values())


def _result(record: dict[str, Any]) -> str:
    if "error" in record:
        return f"failed: {record['error'].splitlines()[0]}"
    result = record["result"]
    if isinstance(result, list):
        return "; ".join(
            f"{r['name']} {r['mean']:.2f} ms (slowest {r['worst']:.2f})" for r in result
        )
    if isinstance(result, dict):
        return ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()
        ) + _verdict(record)
    return f"{result:.1e}"


def _verdict(record: dict[str, Any]) -> str:
    most = GOALS.get(record["piece"].get("workload"))
    ratio = record["result"].get("step / floor")
    if most is None or ratio is None:
        return ""
    return f" (goal: at most {most:g}, {'met' if ratio <= most else 'missed'})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, or write the page; return the number of pieces that are left."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--part", choices=PARTS, help="one part only")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=9.0, help="the most minutes of a part")
    parser.add_argument("--short", action="store_true", help="tiny models and few steps")
    parser.add_argument("--out", type=Path, default=OUT, help="the finished pieces")
    parser.add_argument("--report", action="store_true", help="write docs/gpu.md")
    parser.add_argument(
        "--peer-path",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help=f"a local checkout to time steps of: {', '.join(PEERS)}",
    )
    args = parser.parse_args(argv)
    if args.report:
        (ROOT / "docs" / "gpu.md").write_text(report(read(args.out)), encoding="utf-8")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU. To look at the program itself, pass --device cpu --short.")
    try:
        races = with_peers(args.peer_path)
    except StructPrecondError as error:
        parser.error(str(error))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    left = 0
    for part in [args.part] if args.part else PARTS:
        missing = do(part, args.device, args.short, args.minutes, args.out, races)
        if missing:
            print(f"{part}: {missing} pieces are left. Run the same command again.")
        left += missing
    return left


if __name__ == "__main__":
    main()
