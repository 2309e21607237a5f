"""How often the calibrated verdict alarms on correct low-precision code, and how often it sees planted faults.

    python benchmarks/false_alarms.py [--pairs 3000] [--faults 1040] [--seed 300] [--quick] [--json]

A pair is one correct computation done twice: in float32 or float64, and in a coarser dtype, another summation order or
another batch. Everything is drawn at run time from `--seed`: kind, dtype, sizes, depth, massive channels, near-zero
rows. A false alarm is any verdict but "passed". The faults are those of the field's blind spots, planted in the same
pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _claims import bounds, machine
from scipy import stats
from torch import Tensor

from trimtab.compare.align import Aligned
from trimtab.compare.fingerprints import find_fingerprints
from trimtab.compare.match import Pair
from trimtab.compare.measure import measure
from trimtab.compare.rounding import blocks_upstream, expected_error
from trimtab.compare.verdict import Calibrated, Judgement, judge
from trimtab.numerics.dtypes import coarser
from trimtab.results.comparison import RecordKey

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


@dataclass
class Case:
    """One tensor of a correct computation and of its repeat."""

    kind: str
    dtype: str
    reference: Tensor
    candidate: Tensor
    key: RecordKey
    layers: int | None = None


class Memory:
    """Stands for a trace that holds one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def tensor(self, _record: int) -> Tensor:
        return self._tensor


def verdict(case: Case, limits: Calibrated) -> tuple[Judgement, float]:
    """Judge a pair as `compare` does; return the verdict and the expected error."""
    pair = Pair(case.key, 0, (0,), (0,), same_digest=False, stored=True)
    aligned = Aligned(pair, Memory(case.reference), Memory(case.candidate))
    measured = measure(aligned.fused(), aligned.shape, aligned.dtypes)
    dtype = coarser(*aligned.dtypes)
    if not dtype.is_floating_point:
        expected = expected_error(torch.float32, blocks=0, width=1)
    else:
        dtype = coarser(dtype, DTYPES.get(case.dtype, FP8.get(case.dtype, torch.float64)))
        blocks = blocks_upstream(case.key, case.layers)
        expected = expected_error(dtype, blocks=blocks, width=aligned.width, kind=case.key.kind)
    return judge(limits, measured, expected, aligned, rule=None, layer=case.key.layer), expected.error


# ---------------------------------------------------------------- correct computations


def inputs(rng: np.random.Generator, rows: int, width: int) -> Tensor:
    """Activations as models have them: normal, heavy-tailed, with massive channels, near-zero or huge rows."""
    x = torch.from_numpy(rng.standard_normal((rows, width)))
    shape = rng.integers(6)
    if shape == 1:
        x = torch.from_numpy(rng.standard_t(3, (rows, width)))
    elif shape == 2:  # one channel at the same huge value in every row
        x[:, rng.integers(width)] = float(rng.uniform(50, 3000))
    elif shape == 3:  # some rows almost cancel out
        x[rng.random(rows) < 0.3] *= 1e-6
    elif shape == 4:  # the first token is huge
        x[0] *= float(rng.uniform(100, 2000))
    elif shape == 5:
        x *= torch.from_numpy(np.exp(rng.normal(0, 2, (rows, 1))))
    return x


def storage(rng: np.random.Generator) -> Iterator[Case]:
    """The same values, stored coarser."""
    name = str(rng.choice([*DTYPES, *FP8]))
    x = inputs(rng, int(rng.choice([1, 8, 64, 512])), int(rng.choice([16, 64, 256, 1024])))
    if name in FP8:
        x = x / x.abs().max() * 200 if name == "float8_e4m3fn" else x
    candidate = x.float().to({**DTYPES, **FP8}[name])
    yield Case("storage", name, x if name == "float32" else x.float(), candidate, RecordKey(name="x"))


def linear(rng: np.random.Generator) -> Iterator[Case]:
    """One linear layer in a coarser dtype, weights rounded with it."""
    name = str(rng.choice(list(DTYPES)))
    rows, width, out = (int(rng.choice([16, 64, 256, 1024])) for _ in range(3))
    x = inputs(rng, rows, width).float()
    weight = torch.from_numpy(rng.standard_normal((out, width))).float() / math.sqrt(width)
    dtype = DTYPES[name]
    x, weight = (x, weight) if rng.random() < 0.3 else (x.to(dtype).float(), weight.to(dtype).float())
    reference = x.double() @ weight.double().T
    yield Case("linear", name, reference.float(), x.to(dtype) @ weight.to(dtype).T, RecordKey(name="y"))


def order(rng: np.random.Generator) -> Iterator[Case]:
    """One float32 product, summed in two orders."""
    rows, width, out = (int(rng.choice([16, 64, 256, 1024])) for _ in range(3))
    x = inputs(rng, rows, width).float()
    weight = torch.from_numpy(rng.standard_normal((out, width))).float()
    parts = int(rng.choice([2, 4, 8]))
    split = sum(a @ b.T for a, b in zip(x.chunk(parts, 1), weight.chunk(parts, 1), strict=True))
    yield Case("order", "float32", x @ weight.T, split, RecordKey(name="y"))


class Block(torch.nn.Module):
    """A decoder block: RMS or layer norm, causal attention, gated or plain MLP."""

    def __init__(self, width: int, gated: bool, rms: bool) -> None:
        super().__init__()
        self.heads, self.gated, self.rms = 4, gated, rms
        self.qkv = torch.nn.Linear(width, 3 * width, bias=not rms)
        self.out = torch.nn.Linear(width, width, bias=not rms)
        self.up = torch.nn.Linear(width, (6 if gated else 3) * width, bias=not rms)
        self.down = torch.nn.Linear(3 * width, width, bias=not rms)
        self.scale = torch.nn.ParameterList([torch.nn.Parameter(torch.rand(width) + 0.5) for _ in range(2)])

    def norm(self, x: Tensor, number: int) -> Tensor:
        y = x.float() if x.dtype != torch.float64 else x
        y = y if self.rms else y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return y.to(x.dtype) * self.scale[number]

    def attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        weights = scores.masked_fill(mask, -math.inf).softmax(-1, dtype=wide).to(x.dtype)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))

    def mlp(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if not self.gated:
            return self.down(torch.nn.functional.gelu(hidden))
        gate, up = hidden.chunk(2, -1)
        return self.down(torch.nn.functional.silu(gate) * up)


class Net(torch.nn.Module):
    """A small decoder that keeps what its sites would."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        torch.manual_seed(int(rng.integers(2**31)))
        self.width, self.depth = int(rng.choice([32, 64, 128])), int(rng.choice([1, 2, 4, 8, 24]))
        gated, rms = bool(rng.random() < 0.7), bool(rng.random() < 0.7)
        self.embed = torch.nn.Embedding(200, self.width)
        self.blocks = torch.nn.ModuleList([Block(self.width, gated, rms) for _ in range(self.depth)])
        self.head = torch.nn.Linear(self.width, 200, bias=False)
        gain = float(rng.choice([0.3, 1.0, 2.0]))
        for block in self.blocks:
            block.out.weight.data *= gain
            block.down.weight.data *= gain * 2
        if rng.random() < 0.3:  # a massive channel, as trained models have
            self.embed.weight.data[:, int(rng.integers(self.width))] = float(rng.uniform(20, 400))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        x = found["embed"] = self.embed(ids)
        for layer, block in enumerate(self.blocks):
            attention = found[f"layers.{layer}.attn_out"] = block.attention(block.norm(x, 0))
            x = x + attention
            mlp = found[f"layers.{layer}.mlp_out"] = block.mlp(block.norm(x, 1))
            x = found[f"layers.{layer}.resid_post"] = x + mlp
        found["logits"] = self.head(self.blocks[-1].norm(x, 0))
        return found


def _cast(net: Net, dtype: torch.dtype) -> Net:
    import copy

    return copy.deepcopy(net).to(dtype)


def network(rng: np.random.Generator) -> Iterator[Case]:
    """A decoder in float64 or float32 against float32, float16 or bfloat16."""
    net, name = Net(rng), str(rng.choice(list(DTYPES)))
    ids = torch.from_numpy(rng.integers(0, 200, (int(rng.choice([1, 4])), int(rng.choice([8, 32, 128])))))
    trusted = torch.float64 if name == "float32" or rng.random() < 0.5 else torch.float32
    with torch.no_grad():
        reference, candidate = (_cast(net, dtype)(ids) for dtype in (trusted, DTYPES[name]))
    yield from _cases("network", name, reference, candidate, net.depth, rng)


def batch(rng: np.random.Generator) -> Iterator[Case]:
    """A decoder over a batch, against one prompt at a time, in one dtype."""
    net, name = Net(rng), str(rng.choice(list(DTYPES)))
    model = _cast(net, DTYPES[name])
    ids = torch.from_numpy(rng.integers(0, 200, (4, int(rng.choice([8, 32, 64])))))
    with torch.no_grad():
        whole, single = model(ids), [model(row[None]) for row in ids]
    joined = {site: torch.cat([one[site] for one in single]) for site in whole}
    yield from _cases("batch", name, whole, joined, net.depth, rng)


def backward(rng: np.random.Generator) -> Iterator[Case]:
    """Gradients of the stream through a decoder in two dtypes."""
    net, name = Net(rng), str(rng.choice(["float32", "bfloat16"]))
    ids = torch.from_numpy(rng.integers(0, 200, (2, 32)))
    found = []
    for dtype in (torch.float64, DTYPES[name]):
        values = _cast(net, dtype)(ids)
        for value in values.values():
            value.retain_grad()
        torch.nn.functional.cross_entropy(values["logits"].flatten(0, 1).double(), ids.flatten()).backward()
        found.append({site: value.grad for site, value in values.items() if site.startswith("layers")})
    yield from _cases("backward", name, *found, net.depth, rng, record_kind="grad")


def _cases(
    kind: str,
    name: str,
    reference: dict[str, Tensor],
    candidate: dict[str, Tensor],
    depth: int,
    rng: np.random.Generator,
    record_kind: str = "value",
) -> Iterator[Case]:
    for site in rng.choice(list(reference), min(3, len(reference)), replace=False):
        layer = int(site.split(".")[1]) if site.startswith("layers") else None
        key = RecordKey(site=str(site), layer=layer, kind=record_kind)
        ours, theirs = reference[site], candidate[site]
        yield Case(kind, name, ours.flatten(0, -2).detach(), theirs.flatten(0, -2).detach(), key, depth)


KINDS: tuple[Callable[[np.random.Generator], Iterator[Case]], ...] = (
    storage,
    linear,
    order,
    network,
    network,
    batch,
    backward,
)


def correct_pairs(seed: int, count: int) -> Iterator[Case]:
    """Draw correct pairs."""
    rng = np.random.default_rng(seed)
    made = 0
    while made < count:
        for case in KINDS[int(rng.integers(len(KINDS)))](rng):
            finite = case.reference.double().isfinite().all() and case.candidate.double().isfinite().all()
            if finite and made < count:  # float16 overflows are no rounding
                made += 1
                yield case


# ---------------------------------------------------------------- planted faults


def _bad_row(x: Tensor, rng: np.random.Generator, value: Callable[[Tensor], Tensor]) -> Tensor:
    y = x.clone()
    row = int(rng.integers(len(y)))
    y[row] = value(y[row])
    return y


def _element(x: Tensor, rng: np.random.Generator) -> Tensor:
    y = x.clone()
    row, channel = int(rng.integers(y.shape[0])), int(rng.integers(y.shape[1]))
    y[row, channel] = (100 * x.double().square().mean().sqrt()).to(x.dtype)
    return y


def _block(x: Tensor, rng: np.random.Generator) -> Tensor:
    y = x.clone()
    width = y.shape[1] // 4
    start = int(rng.integers(4)) * width
    y[:, start : start + width] *= 0.5
    return y


FAULTS: dict[str, tuple[Callable[[Tensor, np.random.Generator], Tensor], tuple[str, ...]]] = {
    "scale by 1.01": (lambda x, rng: (x.double() * 1.01).to(x.dtype), ("scale",)),
    "scale by 1.045": (lambda x, rng: (x.double() * 1.045).to(x.dtype), ("scale",)),
    "scale by 2": (lambda x, rng: x * 2, ("double_reduction",)),
    "scale by 1/4": (lambda x, rng: x * 0.25, ("missing_reduction",)),
    "sign": (lambda x, rng: -x, ("sign",)),
    "one row zero": (lambda x, rng: _bad_row(x, rng, torch.zeros_like), ("zero_rows",)),
    "one row random": (
        lambda x, rng: _bad_row(x, rng, lambda r: (torch.randn(r.shape) * r.double().std()).to(r.dtype)),
        ("few_rows",),
    ),
    "one element 100 rms": (_element, ("few_rows",)),
    "shift by one token": (lambda x, rng: torch.roll(x, 1, 0), ("shift", "permutation")),
    "channels permuted": (lambda x, rng: x[:, torch.from_numpy(rng.permutation(x.shape[1]))], ("permutation",)),
    "bias missing": (
        lambda x, rng: (x.double() - torch.randn(x.shape[1]) * 0.3 * x.double().square().mean().sqrt()).to(x.dtype),
        ("missing_bias",),
    ),
    "a shard of four halved": (_block, ("bad_shard",)),
    "one row NaN": (lambda x, rng: _bad_row(x, rng, lambda r: r * math.nan), ("nan_rows",)),
}


def faulty_pairs(seed: int, count: int) -> Iterator[tuple[str, Case, Case]]:
    """Draw pairs that carry a fault, beside the correct ones; rows and channels enough for the fault to exist."""
    rng = np.random.default_rng(seed + 1)
    torch.manual_seed(seed)
    source = correct_pairs(seed + 2, 10**9)
    made = 0
    while made < count:
        case = next(source)
        if case.dtype in FP8 or min(case.reference.shape) < 32:
            continue
        fault = list(FAULTS)[made % len(FAULTS)]
        broken = FAULTS[fault][0](case.candidate, rng)
        if torch.equal(broken, case.candidate):
            continue
        made += 1
        yield fault, case, Case(case.kind, case.dtype, case.reference, broken, case.key, case.layers)


def kinds_found(case: Case, judged: Judgement, error: float) -> list[str]:
    """Kinds of the fingerprints that `compare` would report, best first."""
    difference = (case.candidate.double() - case.reference.double()).nan_to_num().norm()
    tolerance = 4 * error
    if judged.calibration is None or judged.calibration.systematic:
        tolerance = min(tolerance, 0.7 * float(difference / case.reference.double().norm()))
    return [one.kind for one in find_fingerprints(case.reference, case.candidate, tolerance=tolerance)]


@dataclass
class Tally:
    """What was said of every pair: one truth value per pair and claim, and counts for the tables."""

    samples: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    alarms: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    ratios: dict[str, list[tuple[float, ...]]] = field(default_factory=lambda: defaultdict(list))
    faults: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))


def tally(pairs: int, faults: int, seed: int, say: Callable[..., None]) -> Tally:
    """Judge correct pairs and planted faults; `say` prints the single cases that are wrong."""
    torch.set_num_threads(1)
    limits, found = Calibrated(), Tally()
    for case in correct_pairs(seed, pairs):
        judged, error = verdict(case, limits)
        kinds = find_fingerprints(case.reference, case.candidate, tolerance=4 * error)
        found.samples["false_alarm_rate"].append(judged.status != "passed")
        found.samples["false_failure_rate"].append(judged.status == "failed")
        found.samples["false_fingerprint_rate"].append(bool(kinds))
        found.alarms[f"{case.kind} {case.dtype}"][judged.status] += 1
        one = judged.calibration
        if one is not None:
            found.ratios[case.kind].append((one.median, one.worst / one.worst_limit, one.element / one.element_limit))
        if kinds:
            say("NAMED", *described(case), kinds)
        if judged.status != "passed":
            say("ALARM", *described(case), case.layers, judged.reasons)
    for fault, _, case in faulty_pairs(seed, faults):
        judged, error = verdict(case, limits)
        seen = judged.status != "passed"
        named = seen and bool(set(kinds_found(case, judged, error)[:1]) & set(FAULTS[fault][1]))
        found.samples["fault_detection_rate"].append(seen)
        if seen:
            found.samples["fault_named_rate"].append(named)
        found.faults[fault][judged.status] += 1
        found.faults[fault]["named"] += named
        if not named:
            size = float((case.candidate.double() - case.reference.double()).norm() / case.reference.double().norm())
            say("MISNAMED" if seen else "MISSED", fault, *described(case), f"{size:.3g} {error:.3g}")
    return found


def described(case: Case) -> tuple[object, ...]:
    return case.kind, case.dtype, case.key.text, tuple(case.reference.shape)


def share(samples: Sequence[bool]) -> tuple[float, float, float]:
    """A share and its 95 % interval by Clopper and Pearson (Biometrika 26, 1934), which never covers less."""
    count, total = sum(samples), len(samples)
    low = float(stats.beta.ppf(0.025, count, total - count + 1)) if count else 0.0
    high = float(stats.beta.ppf(0.975, count + 1, total - count)) if count < total else 1.0
    return count / max(total, 1), low, high


def evaluate(claim: dict[str, Any], samples: Sequence[bool]) -> dict[str, Any]:
    """Decide a claim about a share: the whole interval must be on the right side of the bound."""
    value, low, high = share(samples)
    at_most = claim["direction"] == "at_most"
    holds = high <= claim["bound"] if at_most else low >= claim["bound"]
    certain = low > claim["bound"] if at_most else high < claim["bound"]
    enough = len(samples) >= claim["repetitions"]
    state = "too few repetitions" if not enough else "yes" if holds else "no" if certain else "undecided"
    return {
        "name": claim["name"],
        "value": value,
        "interval": [low, high],
        "unit": claim["unit"],
        "direction": claim["direction"],
        "bound": claim["bound"],
        "holds": holds and enough,
        "state": state,
        "control_half_width": None,
        "samples": [int(one) for one in samples],
        "notes": {"count": sum(samples), "of": len(samples)},
    }


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--faults", type=int, default=1040)
    parser.add_argument("--seed", type=int, default=300, help="the default is one that no constant was chosen on")
    parser.add_argument("--quick", action="store_true", help="200 pairs, 130 faults; claims stay undecided")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    asked = parser.parse_args()
    if asked.quick:
        asked.pairs, asked.faults = 200, 130
    began = time.process_time()
    found = tally(asked.pairs, asked.faults, asked.seed, (lambda *_: None) if asked.json else print)
    claims = [evaluate(claim, found.samples[name]) for name, claim in bounds(Path(__file__).name).items()]
    if asked.json:
        run = {"seed": asked.seed, "cpu_seconds": time.process_time() - began}
        json.dump({"claims": claims, "machine": machine(), **run}, sys.stdout)
    else:
        report(found, claims)
    if not asked.quick and not all(one["holds"] for one in claims):
        sys.exit(1)


def report(found: Tally, claims: Sequence[dict[str, Any]]) -> None:
    print("\ncorrect pairs")
    for name, counts in sorted(found.alarms.items()):
        print(f"  {name:24s} {dict(counts)}")
    for kind, values in found.ratios.items():
        array = np.asarray(values)
        median, worst, element = (np.quantile(array[:, i], [0.5, 0.99, 1]) for i in range(3))
        worst_case = f"worst row / limit {worst.round(2)}  element / limit {element.round(2)}"
        print(f"  {kind:10s} nu median/p99/max {median.round(2)}  {worst_case}")
    print("\nplanted faults")
    for fault, counts in found.faults.items():
        print(f"  {fault:24s} {dict(counts)}")
    print()
    for one in claims:
        count, (low, high) = one["notes"], one["interval"]
        print(
            f"{one['name']:24} {one['value']:.5g} [{low:.5g}, {high:.5g}] ({count['count']} of {count['of']})"
            f"  {one['direction']} {one['bound']:g}: {one['state']}"
        )


if __name__ == "__main__":
    main()
