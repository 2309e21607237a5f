"""Tensors that a compiled graph does not store: their taps act beside it, and nothing else is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch._inductor import config as inductor

from trimtab.backends.vllm import fused, op
from trimtab.backends.vllm.step import Step
from trimtab.backends.vllm.taps import fuses
from trimtab.errors import BackendError, SiteError
from trimtab.testing import models

WIDTH, ROWS = 64, 5
CPU = torch.device("cpu")


class Doubling:
    """A tap that doubles the second row."""

    joins = False

    def __init__(self, step: Step) -> None:
        self.step, self.last = step, True
        self.beside: Callable[[Tensor | None], Tensor | None] = lambda _: None
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor, before: Tensor | None = None) -> None:
        self.seen.append(x.clone())
        x[1] *= 2

    @property
    def acts(self) -> bool:
        return self.step.active and self.last

    def enrolled(self, name: str) -> None:
        self.name = name

    def changes(self, x: Tensor | None) -> Tensor | None:
        return self.beside(x)


class Norm(nn.Module):
    """In float32, whatever the dtype of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(drawn(WIDTH, WIDTH, seed=1), requires_grad=False)
        self.norm, self.last = Norm(), Norm()

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.last(residual + self.norm(hidden_states @ self.weight)) @ self.weight


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 2


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def options() -> dict[str, Any]:
    made: dict[str, Any] = {}
    fused.read_one_more(made)
    return made


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    torch.compiler.reset()
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield


@pytest.fixture
def step() -> Iterator[Step]:
    made = Step(16, 8, 2, CPU)
    made.rows.n = ROWS - 1
    yield made
    made.busy = made.active = False


@pytest.fixture
def live(step: Step) -> Doubling:
    made: Any = Doubling(step)
    op.enroll("tests.fused", made)
    return made


def corrected(live: Any, step: Step) -> Block:
    block = Block()
    fused.correct_norm(block.norm, live.name, live, step)
    return block


def test_a_compiled_norm_keeps_what_it_is_fused_with_but_in_rows_that_its_tap_changes(
    live: Doubling, step: Step
) -> None:
    x, residual = drawn(ROWS, WIDTH, seed=2), drawn(ROWS, WIDTH, seed=3)
    stock = torch.compile(Block(), fullgraph=True)(x, residual)
    assert not torch.equal(stock, Block()(x, residual)), "nothing is rounded in between where it is fused"
    block = corrected(live, step)
    with inductor.patch(options()):
        compiled = torch.compile(block, fullgraph=True)
        assert torch.equal(compiled(x, residual), stock)
    assert live.seen == []
    step.active = True
    out = compiled(x, residual)
    others = [0, 2, 3, 4]
    assert torch.equal(out[others], stock[others])
    plain = Block()
    rows = x @ plain.weight
    assert torch.equal(live.seen[0], plain.norm(rows)[: ROWS - 1]), "padding is not a row"
    expected = plain.last(residual + 2 * plain.norm(rows)) @ plain.weight
    torch.testing.assert_close(out[1].float(), expected[1].float(), rtol=2**-6, atol=2**-3)
    assert (out[1] != stock[1]).float().mean() > 0.5


def test_rows_of_more_dimensions_are_corrected(live: Doubling, step: Step) -> None:
    block, x = corrected(live, step), drawn(1, ROWS, WIDTH, seed=2)
    step.active = True
    factors = torch.ones(1, ROWS, 1).index_fill(1, torch.tensor([1]), 2.0)
    assert torch.equal(block.norm(x).float(), Norm()(x).float() * factors)


def test_a_tap_that_leaves_what_it_is_given_changes_no_bit(live: Doubling, step: Step) -> None:
    x, residual = drawn(ROWS, WIDTH, seed=2), drawn(ROWS, WIDTH, seed=3)
    stock = torch.compile(Block(), fullgraph=True)(x, residual)
    block = corrected(live, step)
    step.active = True
    with inductor.patch(options()):
        compiled = torch.compile(block, fullgraph=True)
        x[1] = 0  # doubled, it is what it was
        stock = torch.compile(Block(), fullgraph=True)(x, residual)
        assert torch.equal(compiled(x, residual), stock)
    assert len(live.seen) == 1


@pytest.mark.parametrize("by_name", [True, False])
def test_what_enters_a_block_is_corrected_in_one_pass_and_no_other(by_name: bool, live: Any, step: Step) -> None:
    block, plain, entry = Block(), Block(), fused.Entry({"input": live.name}, None, step)
    fused.correct_entry(block, (0, "hidden_states"), live, entry, live.name)
    x, residual = drawn(ROWS, WIDTH, seed=2), drawn(ROWS, WIDTH, seed=3)
    entry(x[:3])
    assert torch.equal(block(x, residual), plain(x, residual)), "nothing is to be done in this pass"
    step.busy = True
    assert torch.equal(entry(x[:3]), x[:3] * torch.tensor([[1], [2], [1]]))
    again = x.clone()
    again[1] *= 2

    def run() -> Tensor:
        made: Tensor = block(hidden_states=x, residual=residual) if by_name else block(x, residual)
        return made

    assert torch.equal(run(), plain(again, residual))
    assert torch.equal(run(), plain(x, residual))


def test_what_is_embedded_is_changed_before_positions_are_added_and_what_enters_after(live: Any, step: Step) -> None:
    step.busy = True
    embedded, positions = drawn(3, WIDTH, seed=2), drawn(ROWS, WIDTH, seed=3)
    added = positions[:3]
    plain = fused.Entry({}, lambda: positions, step)
    assert torch.equal(plain(embedded), embedded + added)
    assert plain.changes() is None
    for acting, expected in {
        ("output",): 2 * embedded[1] + added[1],
        ("input",): 2 * (embedded[1] + added[1]),
        ("output", "input"): 2 * (2 * embedded[1] + added[1]),
    }.items():
        entry = fused.Entry(dict.fromkeys(acting, live.name), lambda: positions, step)
        rows = entry(embedded)
        stock = embedded + added
        assert torch.equal(rows, torch.stack([stock[0], expected, stock[2]]))
        changes = entry.changes()
        assert changes is not None
        assert torch.equal(changes.isnan(), rows == stock)
        assert torch.equal(changes.nan_to_num(7.0), torch.where(rows == stock, 7.0, rows))
        assert entry.changes() is None


def test_a_forward_that_is_bound_to_the_module_is_the_one_that_is_followed(live: Doubling, step: Step) -> None:
    def halved(self: Norm, x: Tensor) -> Tensor:
        return Norm.forward(self, x) / 2

    norm, x = Norm(), drawn(ROWS, WIDTH, seed=2)
    norm.forward = MethodType(halved, norm)  # type: ignore[method-assign]
    fused.correct_norm(norm, live.name, live, step)
    assert torch.equal(norm(x), Norm()(x) / 2)
    step.active = True
    assert torch.equal(norm(x)[1], Norm()(x)[1])


def test_a_norm_without_a_tap_reads_changes_that_never_come(step: Step) -> None:
    norm, x = Norm(), drawn(ROWS, WIDTH, seed=2)
    fused.correct_norm(norm, "tests.untapped", None, step)
    step.active = True
    assert torch.equal(norm(x), Norm()(x))


def test_a_tap_behind_the_last_that_acts_is_not_computed(live: Doubling, step: Step) -> None:
    block, x = corrected(live, step), drawn(ROWS, WIDTH, seed=2)
    step.active, live.last = True, False
    assert torch.equal(block.norm(x), Norm()(x))
    assert live.seen == []


def test_the_threshold_is_raised_by_one_from_what_it_is() -> None:
    assert options() == {"realize_reads_threshold": inductor.realize_reads_threshold + 1}
    given = {"realize_reads_threshold": 8, "dce": True}
    fused.read_one_more(given)
    assert given == {"realize_reads_threshold": 9, "dce": True}


def test_a_forward_that_something_else_replaced_is_refused() -> None:
    norm, other = Norm(), Norm()
    for replaced in (lambda x: x, other.forward):
        norm.forward = replaced  # type: ignore[method-assign]
        with pytest.raises(BackendError, match="has replaced the forward of a Norm that is to be steered"):
            fused.taken_over(norm)
        assert norm.__dict__["forward"] is replaced


def test_only_what_is_a_table_is_looked_up() -> None:
    whole, part = nn.Embedding(7, WIDTH), nn.Embedding(7, WIDTH)
    part.tp_size = 2  # type: ignore[assignment]
    for embedding in (whole, part, Scaled(7, WIDTH)):
        assert fused.is_table(embedding) == (embedding is whole)
        before = type(embedding)
        fused.look_up(embedding)
        assert (type(embedding) is before) == (embedding is not whole)
    assert not fused.is_table(whole, lambda ids: 2 * nn.functional.embedding(ids, whole.weight))


@pytest.mark.parametrize(
    ("family", "pattern", "expected"),
    [
        ("gemma3", "layers.*.resid_post", True),
        ("gemma2", "layers.1.mlp_out", True),
        ("olmo2", "layers.-1.resid_pre", True),
        ("gemma3_multimodal", "layers.*.resid_mid", True),
        ("gemma3", "layers.0.resid_pre", False),
        ("gemma3", "layers.*.q", False),
        ("gemma3", "embed", False),
        ("gemma", "layers.*.resid_post", False),
        ("qwen3", "layers.*.resid_post", False),
        ("gpt_neox", "layers.*.resid_post", False),
    ],
)
def test_only_sites_behind_norms_that_follow_branches_need_another_threshold(
    family: str, pattern: str, expected: bool
) -> None:
    assert fuses(models.tiny(family, layers=2).config, ["final_norm", pattern]) == expected


def test_what_is_no_pattern_is_refused() -> None:
    with pytest.raises(SiteError, match="is not a site"):
        fuses(models.tiny("gemma3", layers=2).config, ["layers"])
