"""Cause by substitution, on the planted model: with the reference's tensor in place, what follows agrees or not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.workflows import planted
from tests.unit.workflows.planted import Transformer
from trimtab.errors import InputError
from trimtab.report import render_text
from trimtab.trace import TraceWriter
from trimtab.workflows.triage import transplant, triage

Run = tuple[Transformer, Callable[[], object]]


@pytest.fixture
def ids() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(0, planted.VOCABULARY, (planted.BATCH, planted.LENGTH))


def broken(*changes: Callable[[Transformer], None]) -> Transformer:
    model = planted.make_model(2)
    for change in changes:
        change(model)
    return model


def scale(model: Transformer) -> None:
    model.layers[1].attn.scale = 1.0


def activation(model: Transformer) -> None:
    model.layers[2].mlp.act.kind = "relu"


def gradient(model: Transformer) -> None:
    model.layers[1].gradient[1] = 0.5


def traces(folder: Path, ids: torch.Tensor, *changes: Callable[[Transformer], None]) -> tuple[Path, Path]:
    ours = planted.record(folder / "a", planted.make_model(2), [ids])
    return ours, planted.record(folder / "b", broken(*changes), [ids])


def again(ids: torch.Tensor, *changes: Callable[[Transformer], None]) -> Run:
    model = broken(*changes)

    def once() -> None:
        logits = model(ids)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    return model, once


def test_one_mistake_is_proved(tmp_path: Path, ids: torch.Tensor) -> None:
    result = triage(*traces(tmp_path, ids, scale), transplant=lambda: again(ids, scale))
    assert result.divergence is not None and result.divergence.module_path == "layers.1.attn"
    moved = result.transplant
    assert moved is not None and moved.agrees and moved.reproduced
    assert moved.site == "module:layers.1.attn.o_proj.input"
    logits = next(one for one in moved.followers if one.tensor == "module:head.output")
    assert logits.before > 1e-3 and logits.after == 0 and logits.status == "identical"
    assert "read the code of layers.1.attn" in result.next_check


def test_a_second_mistake_behind_the_first_is_seen(tmp_path: Path, ids: torch.Tensor) -> None:
    result = triage(*traces(tmp_path, ids, scale, activation), transplant=lambda: again(ids, scale, activation))
    moved = result.transplant
    assert moved is not None and not moved.agrees
    assert "first module:layers.2.mlp.act.output" in moved.reason
    assert "something behind" in result.next_check


def test_a_gradient_is_replaced(tmp_path: Path, ids: torch.Tensor) -> None:
    result = triage(*traces(tmp_path, ids, gradient), transplant=lambda: again(ids, gradient))
    assert result.divergence is not None and result.divergence.direction == "backward"
    assert result.divergence.module_path == "layers.1"
    moved = result.transplant
    assert moved is not None and moved.agrees and moved.site == "module:layers.1.mlp.grad_output"


def test_a_run_that_does_not_diverge_proves_nothing(tmp_path: Path, ids: torch.Tensor) -> None:
    result = triage(*traces(tmp_path, ids, scale), transplant=lambda: again(ids))
    assert result.transplant is not None and not result.transplant.reproduced
    assert "not the run that diverged" in result.transplant.reason
    assert result.next_check == "transplant into the code and the weights that diverged: this run agrees without one"
    assert "proved" not in render_text(result)


def test_a_run_that_updates_the_weights_starts_from_the_same_ones_twice(tmp_path: Path, ids: torch.Tensor) -> None:
    model, backward = again(ids, scale)
    model.register_buffer("seen", torch.zeros(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        with torch.no_grad():
            model.embed.weight.mul_(1 + model.seen)
            model.seen += 1
        backward()
        optimizer.step()

    moved = triage(*traces(tmp_path, ids, scale), transplant=lambda: (model, step)).transplant
    assert moved is not None and moved.reproduced and moved.agrees
    assert all(one.status == "identical" for one in moved.followers)


def test_a_function_is_found_in_the_working_directory(
    tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_here.py").write_text("def build():\n    return 3\n")
    ours, theirs = traces(tmp_path, ids, scale)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    with pytest.raises(InputError, match=r"'made_here:build' returned int; expected"):
        triage(ours, theirs, transplant="made_here:build")
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build(:", r"cannot be imported: SyntaxError: .*bad_one\.py, line 1"),
        ("raise OSError('no data')", "cannot be imported: OSError: no data"),
        ("def build():\n    return {}['lr']", "failed: KeyError: 'lr'"),
    ],
)
def test_code_of_the_candidate_that_fails_is_one_line(
    tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    (tmp_path / "bad_one.py").write_text(text)
    ours, theirs = traces(tmp_path, ids, scale)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_one", raising=False)
    with pytest.raises(InputError, match=message) as caught:
        triage(ours, theirs, transplant="bad_one:build")
    assert "\n" not in str(caught.value)


def test_a_run_that_fails_is_one_line(tmp_path: Path, ids: torch.Tensor) -> None:
    model = broken(scale)

    def once() -> None:
        model(ids)
        raise ValueError("no\nloss")

    found = triage(*traces(tmp_path, ids, scale), transplant=lambda: (model, once))
    assert found.divergence is not None and found.divergence.module_path == "layers.1.attn"
    moved = found.transplant
    assert moved is not None and not moved.agrees and not moved.reproduced
    assert moved.reason == "not made: the candidate's run failed: ValueError: no loss"
    assert found.fix is None or not found.fix.proved
    assert "ValueError: no loss" in render_text(found)


def test_what_the_run_does_not_pass_is_counted(tmp_path: Path, ids: torch.Tensor) -> None:
    """The run stops before the loss and its gradients; of the forward pass it leaves out the head."""
    model = broken(scale)

    def without_head() -> None:
        hidden = model.embed(ids)
        for layer in model.layers:
            hidden = layer(hidden)

    pair = traces(tmp_path, ids, scale)
    found = triage(*pair, transplant=lambda: (model, without_head)).transplant
    assert found is not None and found.left_out > 0
    assert f"{found.left_out} more that the reference recorded there were not looked at" in found.reason
    whole = triage(*pair, transplant=lambda: again(ids, scale)).transplant
    assert whole is not None and whole.left_out == 0
    assert len(whole.followers) == len(found.followers) + found.left_out


def test_weights_take_no_place_in_a_run(tmp_path: Path, ids: torch.Tensor) -> None:
    ours = planted.record(tmp_path / "a", planted.make_model(2), [ids])
    found = transplant(*again(ids), reference=ours, key="module:head.output")
    assert "nothing behind it" in found.reason and not found.agrees


def test_another_batch_is_refused(tmp_path: Path, ids: torch.Tensor) -> None:
    ours, _ = traces(tmp_path, ids, scale)
    model = broken(scale)
    with pytest.raises(InputError, match="run the same batch"):
        transplant(model, lambda: model(ids[:, :6]), reference=ours, key="module:layers.1.attn.output")


def test_a_tensor_that_was_not_recorded(tmp_path: Path, ids: torch.Tensor) -> None:
    ours, _ = traces(tmp_path, ids, scale)
    with pytest.raises(InputError, match=r"holds no tensor 'module:nowhere\.output'"):
        transplant(*again(ids), reference=ours, key="module:nowhere.output")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "write module:function"),
        ("nowhere:build", "cannot be imported"),
        ("math:nothing", "cannot be imported"),
        ("os:getcwd", "returned str"),
    ],
)
def test_functions_that_make_no_candidate(tmp_path: Path, ids: torch.Tensor, given: str, message: str) -> None:
    ours, theirs = traces(tmp_path, ids, scale)
    with pytest.raises(InputError, match=message):
        triage(ours, theirs, transplant=given)


def every_activation(model: Transformer) -> None:
    for layer in model.layers:
        layer.mlp.act.kind = "relu"


def test_code_that_all_layers_share_is_replaced_in_all_of_them(tmp_path: Path, ids: torch.Tensor) -> None:
    found = triage(*traces(tmp_path, ids, every_activation), transplant=lambda: again(ids, every_activation))
    moved = found.transplant
    assert moved is not None and moved.reproduced and moved.agrees
    assert moved.site == "module:layers.0.mlp.act.output"
    assert moved.alike == tuple(f"module:layers.{number}.mlp.act.output" for number in range(1, planted.LAYERS))
    assert not {one.tensor for one in moved.followers} & {moved.site, *moved.alike}
    assert f"it and those of {len(moved.alike)} more Activation modules" in moved.reason
    assert all(one.status == "identical" for one in moved.followers)


def test_another_mistake_beside_that_of_all_layers_is_seen(tmp_path: Path, ids: torch.Tensor) -> None:
    changes = (every_activation, scale)
    moved = triage(*traces(tmp_path, ids, *changes), transplant=lambda: again(ids, *changes)).transplant
    assert moved is not None and not moved.agrees and not moved.alike
    assert "still differ, first module:layers.1" in moved.reason


@pytest.mark.parametrize(("more", "proved"), [("", True), ("        keep = x\n", False)])
def test_a_fix_is_proved_by_a_transplant_and_only_as_the_one_change_there(
    tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, more: str, proved: bool
) -> None:
    """The planted model's own file in a repository, in which the scale was dropped, alone or beside something else."""
    repo = tmp_path / "repo"
    repo.mkdir()
    file, text = repo / "planted.py", Path(planted.__file__).read_text()
    old, new = "self.rotate(k).transpose(-1, -2) * self.scale", "self.rotate(k).transpose(-1, -2)"
    assert old in text
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    changed = text.replace(old, new).replace("        q, k, v", f"{more}        q, k, v")
    for subject, content in (("First", text), ("Second", changed)):
        file.write_text(content)
        for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", subject)):
            subprocess.run(("git", "-C", str(repo), *command), check=True, capture_output=True)
    write = TraceWriter.write

    def with_source(self: TraceWriter, name: str, tensor: torch.Tensor, **fields: Any) -> int:
        return write(self, name, tensor, **fields | ({"source_file": str(file)} if "module_path" in fields else {}))

    monkeypatch.setattr(TraceWriter, "write", with_source)
    result = triage(*traces(tmp_path, ids, scale), revisions="HEAD~1..HEAD", transplant=lambda: again(ids, scale))
    assert result.transplant is not None and result.transplant.agrees
    assert result.fix is not None and result.fix.proved is proved
    assert ("only change" in result.fix.why) is proved
    assert f"+        scores = self.rotate(q) @ {old}" in result.fix.patch
