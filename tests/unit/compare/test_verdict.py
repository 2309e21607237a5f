"""The rules, on pairs whose truth is known: rounding passes, planted faults do not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimtab.compare.align import Aligned
from trimtab.compare.match import Pair
from trimtab.compare.measure import measure
from trimtab.compare.rounding import blocks_upstream, expected_error
from trimtab.compare.rules import Rule
from trimtab.compare.verdict import Calibrated, Fixed, Judgement, Rules, judge, parse_verdict
from trimtab.errors import InputError
from trimtab.numerics.dtypes import coarser
from trimtab.results.comparison import RecordKey


class Memory:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def tensor(self, _record: int) -> Tensor:
        return self._tensor


def judged(
    reference: Tensor, candidate: Tensor, verdict="calibrated", *, key=None, rule: str | None = None
) -> Judgement:
    key = key or RecordKey(name="x")
    pair = Pair(key, 0, (0,), (0,), same_digest=False, stored=True)
    aligned = Aligned(pair, Memory(reference), Memory(candidate))
    measured = measure(aligned.fused(), aligned.shape, aligned.dtypes)
    dtype = coarser(*aligned.dtypes)
    dtype = dtype if dtype.is_floating_point else torch.float32
    expected = expected_error(dtype, blocks=blocks_upstream(key, 4), width=aligned.width)
    parsed = Rule.parse(rule) if rule else None
    return judge(parse_verdict(verdict), measured, expected, aligned, rule=parsed, layer=key.layer)


def normal(rows: int = 256, width: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


ROUNDED = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", ROUNDED)
def test_rounding_alone_passes(dtype: torch.dtype) -> None:
    reference = normal()
    found = judged(reference, reference.to(dtype))
    assert found.status == "passed"
    assert found.calibration is not None and 0.5 < found.calibration.median < 2
    assert not found.calibration.systematic


def near_zero_rows(x: Tensor) -> Tensor:
    x[::3] *= 1e-5
    return x


def massive_channel(x: Tensor) -> Tensor:
    x[:, 7] = 1000.3  # the same rounding error in every row
    return x


def massive_row(x: Tensor) -> Tensor:
    x[0] *= 3000
    return x


@pytest.mark.parametrize("shape", [near_zero_rows, massive_channel, massive_row])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_passes_on_hard_shapes(shape: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    reference = shape(normal())
    assert judged(reference, reference.to(dtype)).status == "passed"


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 1e-6), (torch.float8_e4m3fn, 0.005), (torch.float8_e5m2, 1e-5)]
)
@pytest.mark.parametrize("rows", [1, 256])
def test_underflow_passes(dtype: torch.dtype, size: float, rows: int) -> None:
    reference = normal(rows) * size
    assert judged(reference, reference.to(dtype)).status == "passed"
    assert judged(reference, (reference * 50).to(dtype)).status == "failed"


def test_two_summation_orders_pass() -> None:
    x, w = normal(128, 1024), normal(512, 1024, seed=1)
    split = sum((a @ b.T for a, b in zip(x.chunk(8, 1), w.chunk(8, 1), strict=True)), torch.zeros(128, 512))
    assert judged(x @ w.T, split).status == "passed"


def row(x: Tensor, value: Tensor | float) -> Tensor:
    x = x.clone()
    x[77] = value
    return x


def element(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[77, 5] = value
    return x


# The pairs that an energy ratio of 1e-3 passes.
BLIND_SPOTS: dict[str, Callable[[Tensor], Tensor]] = {
    "scale 1.001": lambda x: x * 1.001,
    "scale 1.01": lambda x: x * 1.01,
    "scale 1.03": lambda x: x * 1.03,
    "scale 1.045": lambda x: x * 1.045,
    "one row zero": lambda x: row(x, 0.0),
    "one row random": lambda x: row(x, normal(1, x.shape[1], seed=9)[0]),
    "one element 100": lambda x: element(x, 100.0),
    "one element's sign": lambda x: element(x, -float(x[77, 5]) - 1),
    "shift by one token": lambda x: torch.roll(x, 1, 0),
    "sign": lambda x: -x,
    "twice": lambda x: 2 * x,
    "small constant": lambda x: x + 0.01,
}


@pytest.mark.parametrize("name", BLIND_SPOTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_energy_ratio_misses_fails(name: str, dtype: torch.dtype) -> None:
    reference = normal()
    found = judged(reference, BLIND_SPOTS[name](reference).to(dtype))
    if (name, dtype) == ("scale 1.001", torch.bfloat16):  # smaller than one bfloat16 rounding: nobody can tell
        assert found.status == "passed"
        return
    assert found.status == "failed", found.calibration
    assert found.reasons


def test_the_field_default_passes_some_of_them() -> None:
    reference = normal()
    assert judged(reference, reference * 1.045, "sglang").status == "passed"
    assert judged(reference, reference * 1.046, "sglang").status == "failed"


def test_everything_random_behind_a_massive_channel_fails() -> None:
    reference, candidate = normal(), normal(seed=5)
    reference[:, 3] = candidate[:, 3] = 3000.0
    deep = RecordKey(site="layers.3.resid_post", layer=3)
    found = judged(reference, candidate.bfloat16(), key=deep)
    assert found.calibration is not None
    assert found.calibration.median < 8  # the rows alone would not say it
    assert found.calibration.channel > found.calibration.channel_limit
    assert found.status == "failed"


def test_one_element_fails_where_its_row_hides_it() -> None:
    reference = normal(64, 4096)
    reference[5, 9] = 1.0
    found = judged(reference, element_at(reference, 5, 9, -1.0).bfloat16())
    assert found.calibration is not None
    assert found.calibration.worst < 2 * found.calibration.worst_limit
    assert found.calibration.element > 2 * found.calibration.element_limit
    assert found.status == "failed"


def element_at(x: Tensor, row_index: int, channel: int, value: float) -> Tensor:
    x = x.clone()
    x[row_index, channel] = value
    return x


def test_a_column_of_large_values_excuses_the_element_in_it() -> None:
    reference = normal(256, 1024)
    reference[:, 3] *= 30
    reference[9, 3] = 0.001  # small by chance; its error is that of its column
    candidate = element_at(reference, 9, 3, 0.4)
    found = judged(reference, candidate.bfloat16())
    assert found.status == "passed" and found.calibration is not None
    assert found.calibration.element == pytest.approx(0.4 / (0.42 * 2**-8 * 30), rel=0.1)


def test_rows_that_almost_cancel_are_judged_by_the_others() -> None:
    reference = normal()
    reference[::3] *= 1e-4
    candidate = reference + 1e-5 * normal(seed=3)  # a tenth of those rows, a hundredth of a rounding of the others
    assert judged(reference, candidate.bfloat16()).status == "passed"


def test_an_error_of_what_all_rows_share_is_no_scale_error() -> None:
    common = normal(1, 512, seed=4)
    reference = common + 0.3 * normal()
    candidate = reference + 2 * 0.42 * 2**-8 * common
    found = judged(reference, candidate.bfloat16())
    assert found.calibration is not None
    assert found.calibration.slope_deviation > found.calibration.slope_limit
    assert not found.calibration.systematic and found.status == "passed"


def test_between_the_limits_is_inconclusive() -> None:
    reference = normal()
    noise = normal(seed=2) * 2**-8 * 0.42 * 6  # 6 times the expected bf16 rounding, no systematic part
    found = judged(reference, (reference + noise).bfloat16())
    assert found.status == "inconclusive"
    assert found.calibration is not None and 1 < found.calibration.excess < 2
    assert judged(reference, (reference + 2 * noise).bfloat16()).status == "failed"


def test_systematic_errors_fail_below_the_noise_limits() -> None:
    reference = normal(1000, 512)
    found = judged(reference, (reference * 1.004).bfloat16())
    assert found.calibration is not None and found.calibration.excess < 1
    assert found.calibration.systematic and found.status == "failed"
    assert found.calibration.slope_deviation == pytest.approx(0.004, abs=2e-4)


def test_the_expected_error_is_the_published_formula() -> None:
    blocks, width = 9, 128
    u, accumulator = 2.0**-8, 2.0**-24
    e = math.sqrt((0.42 * u) ** 2 * (1 + 2 * blocks) + (0.42 * accumulator) ** 2 * (width * (2 + blocks) // 2))
    assert expected_error(torch.bfloat16, blocks=blocks, width=width).error == pytest.approx(e)
    unknown = expected_error(torch.bfloat16, blocks=None, width=width)
    assert unknown.error == pytest.approx(0.42 * u, rel=1e-3)
    assert "depth unknown" in unknown.source


@pytest.mark.parametrize(
    ("key", "blocks"),
    [
        (RecordKey(site="embed"), 0),
        (RecordKey(site="layers.0.resid_pre", layer=0), 0),
        (RecordKey(site="layers.0.resid_post", layer=0), 9),
        (RecordKey(site="layers.3.resid_pre", layer=3), 11),
        (RecordKey(site="layers.3.mlp_out", layer=3), 27),
        (RecordKey(site="logits"), 14),
        (RecordKey(name="hidden", layer=2), 26),
        (RecordKey(name="hidden"), None),
        (RecordKey(site="layers.1.resid_post", layer=1, kind="grad"), 35),
    ],
)
def test_blocks_upstream(key: RecordKey, blocks: int | None) -> None:
    assert blocks_upstream(key, 6) == blocks


def test_resid_pre_and_post_of_neighbours_expect_the_same() -> None:
    pre, post = RecordKey(site="layers.4.resid_pre", layer=4), RecordKey(site="layers.3.resid_post", layer=3)
    assert blocks_upstream(pre, 6) == blocks_upstream(post, 6)


def test_integers_fail_whatever_the_rule() -> None:
    ids = torch.arange(100) + 2**24
    for verdict in ("calibrated", "sglang", Fixed(rel_l2=1.0), Rules([".*: rel_l2 < 1"])):
        found = judged(ids, ids + 1, verdict, rule=".*: rel_l2 < 1" if isinstance(verdict, Rules) else None)
        assert found.status == "failed" and "100 of 100 integers differ" in found.reasons[0]


def test_fixed_thresholds() -> None:
    reference = normal()
    assert judged(reference, reference * 1.01, Fixed(rel_l2=0.011, cosine_min=0.999)).status == "passed"
    found = judged(reference, reference * 1.01, Fixed(rel_l2=0.009, max_abs=1e-3, ulp=3))
    assert found.status == "failed" and len(found.reasons) == 3
    with pytest.raises(InputError, match="without a bound"):
        Fixed()
    with pytest.raises(InputError, match="must be a number >= 0"):
        Fixed(rel_l2=-1.0)


def test_rules_judge_and_explain() -> None:
    reference = normal()
    rule = "x: rel_l2 < 1e-3 and p99 < 1"
    found = judged(reference, reference * 1.01, rule=rule)
    assert found.status == "failed" and "rel_l2 = 0.00999" in found.reasons[0]
    assert judged(reference, reference * 1.0001, rule=rule).status == "passed"
    assert judged(reference, reference * 1.01, Rules(["y: rel_l2 < 1"])).reasons[0].startswith("no rule matches")


def test_bands_of_rel_diff() -> None:
    reference = normal().double()
    scales = {1e-4: "identical", 1e-3: "equivalent", 1e-2: "minor", 0.2: "significant", 2: "severe"}
    for scale, band in scales.items():
        found = judged(reference, reference * (1 + scale), "rel_diff_bands")
        assert found.severity == band
        assert found.status == ("failed" if band in ("significant", "severe") else "passed")


def test_msprobe_scale() -> None:
    reference = normal()
    assert judged(reference, reference + 5e-4, "msprobe").severity == "within"
    assert judged(reference, reference + 5e-3, "msprobe").status == "failed"


def test_an_unknown_verdict_lists_what_there_is() -> None:
    with pytest.raises(InputError, match="calibrated, sglang, rel_diff_bands, msprobe"):
        parse_verdict("strict")


def test_limits_are_arguments() -> None:
    reference = normal()
    noisy = (reference + normal(seed=2) * 2**-8 * 0.42 * 6).bfloat16()
    assert judged(reference, noisy, Calibrated(median=8.0)).status == "passed"
