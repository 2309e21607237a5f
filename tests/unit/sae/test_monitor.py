"""The monitor on courses of figures that were written down by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from trimtab.errors import RecipeError
from trimtab.results.sae import SAEWarning
from trimtab.sae.monitor import Monitor, read_rules, rules_for

GOOD_L0 = {1: 0.5, 20: 0.9, 200: 0.4}


def course(step: int, start: float = 0.3, low: float = 0.02, end: float = 0.2) -> float:
    """The loss of a JumpReLU SAE that trains as it should: down quickly, then up to where it settles."""
    if step <= 20:
        return start + (low - start) * (step - 1) / 19
    return end + (low - end) * math.exp(-(step - 20) / 300)


def share(step: int) -> float:
    return max(0.002, 0.5 + 0.4 * step / 30 if step <= 30 else 0.9 * math.exp(-(step - 30) / 400))


def watch(
    architecture: str = "jumprelu", *, expansion: float = 24, site: str = "layers.8.mlp_out", total: int = 3000
) -> Monitor:
    return Monitor("a", rules_for(architecture), total_steps=total, expansion=expansion, site=site)


def run(monitor: Monitor, total: int = 3000, **changed: object) -> list[SAEWarning]:
    found = []
    for step in range(1, total + 1):
        values = {"recon": course(step), "l0_share": share(step), "grad_norm": 1e-4}
        for name, change in changed.items():
            values[name] = change(step, values[name])  # type: ignore[operator]
        found += monitor.see(step, values)
    return found + monitor.finish(total)


def names(found: list[SAEWarning]) -> list[tuple[str, str]]:
    return [(one.rule, one.level) for one in found]


def test_a_training_as_it_should_be_raises_nothing() -> None:
    assert run(watch()) == []


@pytest.mark.parametrize("architecture", ["jumprelu", "topk", "batchtopk", "gated", "standard", "matryoshka-jumprelu"])
def test_nan_is_a_flag_everywhere_and_told_once(architecture: str) -> None:
    monitor = watch(architecture, expansion=3, site="")
    found = [one for step in range(1, 9) for one in monitor.see(step, {"recon": math.nan if step > 3 else 0.3})]
    assert [(one.rule, one.level, one.step, one.metric) for one in found] == [("finite", "flag", 4, "recon")]


def test_a_loss_over_027_is_a_flag_only_after_it_was_under_025() -> None:
    monitor = watch()
    assert monitor.see(1, {"recon": 0.4}) == []
    assert monitor.see(2, {"recon": 0.28}) == []
    assert monitor.see(3, {"recon": 0.249}) == []
    assert monitor.see(4, {"recon": 0.27}) == []
    found = monitor.see(5, {"recon": 0.2701})
    assert names(found) == [("loss after it has fallen", "flag")]
    assert found[0].step == 5
    assert monitor.see(6, {"recon": 0.5}) == []  # told before


def test_a_loss_over_027_is_a_flag_from_step_1000_whatever_it_did_before() -> None:
    monitor = watch()
    assert monitor.see(1, {"recon": 0.3}) == []
    assert monitor.see(999, {"recon": 0.3}) == []
    assert names(monitor.see(1000, {"recon": 0.3})) == [("loss after it has fallen", "flag")]


def test_a_loss_under_001_is_suspicious() -> None:
    assert names(run(watch(), recon=lambda step, x: 0.0099 if step == 15 else x)) == [("loss too low", "warn")]
    assert run(watch(), recon=lambda step, x: 0.0101 if step == 15 else x) == []


@pytest.mark.parametrize(("late", "expected"), [(0.149, True), (0.151, False), (0.269, False)])
def test_the_late_mean_must_settle(late: float, expected: bool) -> None:
    found = names(run(watch(), recon=lambda step, x: late if step > 2000 else x))
    assert (found == [("loss not settled", "warn")]) is expected


def test_what_is_asked_at_the_end_is_not_asked_of_a_run_that_ended_early() -> None:
    monitor = watch()
    for step in range(1, 2500):
        monitor.see(step, {"recon": 0.1})
    assert monitor.finish(2499) == []


def test_l0_must_start_at_a_half_peak_within_tens_of_steps_and_decline() -> None:
    assert names(run(watch(), l0_share=lambda step, x: 0.1 if step == 1 else x)) == [("L0 at the start", "warn")]
    early = names(run(watch(), l0_share=lambda step, x: min(x, 0.8)))
    assert early == [("L0 peak", "warn")]
    assert run(watch(), l0_share=lambda step, x: 0.81 if step == 99 else min(x, 0.8)) == []
    flat = names(run(watch(), l0_share=lambda step, x: 0.5 if step == 1 else 0.9))
    assert flat == [("L0 decline", "warn")]


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (9.9e-9, ["gradient norm", "gradient norm, early sign"]),
        (1.1e-8, ["gradient norm, early sign"]),
        (9.9e-7, ["gradient norm, early sign"]),
        (1.1e-6, []),
        (0.99e-2, []),
        (1.1e-2, ["gradient norm, early sign"]),
        (99.0, ["gradient norm, early sign"]),
        (101.0, ["gradient norm", "gradient norm, early sign"]),
    ],
)
def test_gradient_norms(norm: float, expected: list[str]) -> None:
    found = run(watch(), grad_norm=lambda step, x: norm)
    assert [one.rule for one in found] == expected
    assert [one.level for one in found] == ["flag" if one == "gradient norm" else "warn" for one in expected]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka-batchtopk"])
def test_topk_kinds_have_no_course_of_l0(architecture: str) -> None:
    monitor = watch(architecture)
    assert run(monitor, l0_share=lambda step, x: 0.001) == []
    assert not any("L0" in name for name in monitor.rules)


def test_figures_of_the_preset_are_asked_only_where_they_fit_and_that_is_said() -> None:
    small = watch(expansion=4)
    assert run(small, recon=lambda step, x: 0.9) == []
    assert "24x SAEs of *mlp_out" in small.skipped[0]
    assert "loss after it has fallen" in small.skipped[0]
    assert names(run(watch(expansion=4), grad_norm=lambda step, x: 1e3)) == [("gradient norm", "flag")]
    assert watch(site="layers.8.resid_post").skipped
    forced = Monitor("a", rules_for("topk", "jumprelu"), total_steps=3000, expansion=4, forced=True)
    assert ("loss after it has fallen", "flag") in names(run(forced, recon=lambda step, x: 0.9))


def test_a_monitor_goes_on_where_it_was() -> None:
    whole, first, second = watch(), watch(), watch()
    losses = {step: 0.2 if step < 50 else 0.3 for step in range(1, 101)}
    expected = [one for step in losses for one in whole.see(step, {"recon": losses[step]})]
    found = [one for step in range(1, 50) for one in first.see(step, {"recon": losses[step]})]
    second.load_state(first.state())
    found += [one for step in range(50, 101) for one in second.see(step, {"recon": losses[step]})]
    assert found == expected
    assert len(found) == 1
    assert second.state() == whole.state()


def test_rule_files_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("rules:\n  - {name: a, metric: loss, maxx: 1, level: flag, text: t}\n")
    with pytest.raises(RecipeError, match=r"unknown field 'maxx'; did you mean 'max'"):
        read_rules(file)
    file.write_text("rules:\n  - {name: a, metric: loss, level: flag, text: t}\n")
    with pytest.raises(RecipeError, match="asks nothing"):
        read_rules(file)
    file.write_text("rules:\n  - {name: a, metric: loss, max: 1, level: loud, text: t}\n")
    with pytest.raises(RecipeError, match=r"rules\.0\.level"):
        read_rules(file)
    file.write_text("format_version: 9\n")
    with pytest.raises(RecipeError, match="format version 9"):
        read_rules(file)
    with pytest.raises(RecipeError, match="neither auto, off, one of"):
        rules_for("jumprelu", "nonsense")
    file.write_text("rules:\n  - {name: mine, metric: recon, max: 1, level: flag, text: t}\n")
    monitor = Monitor("a", rules_for("jumprelu", str(file)), total_steps=9)
    assert names(monitor.see(1, {"recon": 2.0})) == [("mine", "flag")]
    assert Monitor("a", rules_for("jumprelu", "off"), total_steps=9).rules == ("finite",)
