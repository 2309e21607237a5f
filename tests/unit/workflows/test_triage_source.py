"""From the suspect to its code: git repositories made here, changes of every suspicious kind, patches that apply."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.errors import InputError
from trimtab.results.triage import Triage
from trimtab.trace import TraceWriter
from trimtab.workflows.triage import triage
from trimtab.workflows.triage._git import RawHunk, Repository, parse_diff
from trimtab.workflows.triage._suspicions import find_suspicions

MODEL = '''"""A model."""

import torch


class Norm(torch.nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Attention(torch.nn.Module):
    def __init__(self, dim):
        self.scale = dim**-0.5

    def forward(self, q, k, v):
        scores = q @ k.transpose(-1, -2) * self.scale
        return scores.softmax(-1) @ v


class Mlp(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x)
'''
X = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(5))


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main")
    done = subprocess.run(("git", "-C", str(folder), *identity, *arguments), capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    (folder / "pkg").mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "pkg" / "model.py").write_text(MODEL)
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "First model")
    return folder


def change(repo: Path, old: str, new: str, subject: str = "Change") -> None:
    file = repo / "pkg" / "model.py"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    git(repo, "commit", "-qam", subject)


def runs(folder: Path, file: Path, factor: float = 1.3, **provenance: Any) -> tuple[Path, Path]:
    """Two traces in which `attn` of class Attention is wrong."""
    for name, wrong in (("a", 1.0), ("b", factor)):
        with TraceWriter(folder / name, provenance=provenance if name == "b" else {}) as writer:
            for side, tensor in (("input", X), ("output", X * 2 * wrong)):
                writer.write(
                    "x", tensor, site=f"module:attn.{side}", module_path="attn", module_class="Attention",
                    source_file=str(file), source_line=12,
                )  # fmt: skip
    return folder / "a", folder / "b"


def diverge(tmp_path: Path, repo: Path, **options: Any) -> Triage:
    return triage(*runs(tmp_path, repo / "pkg" / "model.py"), **options)


def test_the_hunk_in_the_suspect_s_class_is_found_and_taken_back(tmp_path: Path, repo: Path) -> None:
    change(repo, "torch.relu(x)", "torch.nn.functional.gelu(x)", "Another activation")
    change(repo, " * self.scale", "", "Drop a factor")
    change(repo, "+ 1e-6)", "+ 1e-5)", "Another eps")
    result = diverge(tmp_path, repo, revisions="HEAD~3..HEAD")
    source = result.source
    assert source is not None
    assert (source.file, source.name, source.line, source.found_by) == ("pkg/model.py", "Attention", 11, "record")
    assert [one.distance == 0 for one in source.hunks] == [True, False, False]
    said = source.hunks[0].suspicions[0]
    assert (said.kind, said.side) == ("scale", "removed") and "self.scale" in said.code
    assert {one.summary for one in source.blame} == {"First model", "Drop a factor"}
    assert "scale at line" in result.likely_cause
    assert result.fix is not None and not result.fix.proved and "no transplant" in result.fix.why
    patch = tmp_path / "fix.patch"
    patch.write_text(result.fix.patch)
    git(repo, "apply", str(patch))
    text = (repo / "pkg" / "model.py").read_text()
    assert "k.transpose(-1, -2) * self.scale" in text  # the suspect is taken back
    assert "gelu" in text and "1e-5" in text  # nothing else


def test_a_folder_without_git_is_one_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "plain" / "model.py"
    file.parent.mkdir()
    file.write_text(MODEL)
    result = triage(*runs(tmp_path, file), revisions="a..b")
    assert [note for note in result.notes if "no git repository" in note] == list(result.notes)
    assert result.source is not None and (result.source.line, result.source.end) == (11, 17)
    assert result.divergence is not None and result.fix is None


def test_uncommitted_changes_are_said(tmp_path: Path, repo: Path) -> None:
    change(repo, " * self.scale", "")
    file = repo / "pkg" / "model.py"
    file.write_text(file.read_text() + "# more\n")
    notes = diverge(tmp_path, repo, revisions="HEAD~1..HEAD").notes
    assert len(notes) == 1 and "uncommitted changes" in notes[0]


def test_a_base_alone_is_compared_with_the_working_tree(tmp_path: Path, repo: Path) -> None:
    file = repo / "pkg" / "model.py"
    file.write_text(MODEL.replace(" * self.scale", ""))
    result = diverge(tmp_path, repo, revisions="HEAD")
    assert result.source is not None and result.source.revision.endswith("..working tree")
    assert [one.kind for one in result.source.hunks[0].suspicions] == ["scale"]
    patch = tmp_path / "fix.patch"
    assert result.fix is not None
    patch.write_text(result.fix.patch)
    git(repo, "apply", str(patch))
    assert file.read_text() == MODEL
    assert {one.summary for one in result.source.blame} == {"First model", "not committed yet"}


def test_commits_come_from_the_manifests(tmp_path: Path, repo: Path) -> None:
    first = git(repo, "rev-parse", "HEAD")
    change(repo, " * self.scale", "")
    ours, theirs = runs(tmp_path, repo / "pkg" / "model.py", git_commit=git(repo, "rev-parse", "HEAD"))
    text = (ours / "manifest.json").read_text()
    (ours / "manifest.json").write_text(text.replace('"provenance": {}', f'"provenance": {{"git_commit": "{first}"}}'))
    result = triage(ours, theirs)
    assert result.source is not None and result.source.revision.startswith(first[:12])
    assert result.fix is not None
    assert any(one.group == "code" for one in result.manifest)


def test_an_unknown_revision_is_one_line(tmp_path: Path, repo: Path) -> None:
    result = diverge(tmp_path, repo, revisions="nowhere..HEAD")
    assert any("no revision 'nowhere'" in note for note in result.notes)
    assert result.source is not None and result.source.hunks == () and result.source.blame


def test_a_change_elsewhere_is_found_when_the_file_did_not_change(tmp_path: Path, repo: Path) -> None:
    (repo / "pkg" / "ops.py").write_text("def merge(x):\n    return x.transpose(1, 2)\n")
    git(repo, "add", ".")
    git(repo, "commit", "-qm", "Operations")
    (repo / "pkg" / "ops.py").write_text("def merge(x):\n    return x.reshape(1, 2)\n")
    git(repo, "commit", "-qam", "Reshape")
    result = diverge(tmp_path, repo, revisions="HEAD~1..HEAD")
    assert any("did not change" in note for note in result.notes)
    assert result.source is not None and [one.file for one in result.source.elsewhere] == ["pkg/ops.py"]
    assert {one.kind for one in result.source.elsewhere[0].suspicions} == {"layout"}


def test_a_file_that_git_does_not_track_leaves_the_changes_elsewhere(tmp_path: Path, repo: Path) -> None:
    change(repo, " * self.scale", "")
    (repo / ".venv").mkdir()
    (repo / ".venv" / "library.py").write_text(MODEL)
    result = triage(*runs(tmp_path, repo / ".venv" / "library.py"), revisions="HEAD~1..HEAD")
    assert len(result.notes) == 1 and "git does not track .venv/library.py" in result.notes[0]
    source = result.source
    assert source is not None and (source.line, source.hunks, source.blame) == (11, (), ())
    assert [one.file for one in source.elsewhere] == ["pkg/model.py"] and result.fix is not None


def test_a_file_of_another_machine_is_found_by_the_end_of_its_path(tmp_path: Path, repo: Path) -> None:
    change(repo, " * self.scale", "")
    elsewhere = Path("/another/machine/site-packages/pkg/model.py")
    result = triage(*runs(tmp_path, elsewhere), revisions="HEAD~1..HEAD", repo=repo)
    assert result.source is not None and result.source.file == "pkg/model.py" and result.fix is not None


def test_a_source_map_names_the_file_of_imported_tensors(tmp_path: Path, repo: Path) -> None:
    for name, factor in (("a", 1.0), ("b", 1.3)):
        with TraceWriter(tmp_path / name, provenance={}) as writer:
            writer.write("hidden", X, phase="fwd_only", layer=3)
            writer.write("attn_out", X * factor, phase="fwd_only", layer=3)
    rules = tmp_path / "map.yaml"
    rules.write_text(
        f"- {{tensor: 'mlp_.*', file: nothing.py}}\n"
        f"- {{phase: fwd_only, tensor: 'attn_.*', file: '{repo}/pkg/model.py', name: Attention}}\n"
    )
    result = triage(tmp_path / "a", tmp_path / "b", source_map=rules)
    assert "transplant the" not in result.next_check, "a tensor of no module cannot take another's place"
    assert "record attn_out as the input or output of a module" in result.next_check
    source = result.source
    assert source is not None
    assert (source.file, source.line, source.found_by) == ("pkg/model.py", 11, "source map")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected a list"),
        ("- {file: a.py}", "expected a list"),
        ("- {tensor: '(', file: a.py}", "no regular expression"),
        ("[", "cannot be read"),
    ],
)
def test_source_maps_that_cannot_be_used(tmp_path: Path, repo: Path, text: str, message: str) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        diverge(tmp_path, repo, source_map=tmp_path / "map.yaml")


CHANGES = [
    ("dtype", "y = x.float() * w", "y = x * w", "removed", ".float()"),
    ("dtype", "y = x.to(torch.float32)", "y = x.to(torch.bfloat16)", "added", ".to(torch.bfloat16)"),
    ("dtype", "y = torch.zeros(3, dtype=torch.float32)", "y = torch.zeros(3, dtype=a.dtype)", "added", "dtype=a.dtype"),
    ("cast order", "y = (x * w).to(torch.bfloat16)", "y = x.to(torch.bfloat16) * w", "added", ".to(torch.bfloat16)"),
    ("layout", "y = x.transpose(1, 2).reshape(b, s)", "y = x.reshape(b, s)", "removed", ".transpose(1, 2)"),
    ("layout", "y = x @ w.T", "y = x @ w", "removed", ".T"),
    ("contiguity", "y = x.permute(0).contiguous()", "y = x.permute(0)", "removed", ".contiguous()"),
    ("scale", "y = q @ k / math.sqrt(head_dim)", "y = q @ k", "removed", "q @ k / math.sqrt(head_dim)"),
    ("scale", "y = q * self.scaling", "y = q", "removed", "q * self.scaling"),
    ("scale", "y = q * d**-0.5", "y = q * h**-0.5", "added", "h ** (-0.5)"),
    ("routing", "y = p.topk(4)", "y = p.topk(2)", "added", ".topk(2)"),
    ("norm", "y = norm(x, eps=1e-6)", "y = norm(x, eps=1e-5)", "added", "eps=1e-05"),
    ("rotary", "y = f(x, rope_theta=1e4)", "y = f(x, rope_theta=1e6)", "added", "rope_theta=1000000.0"),
    ("weight tying", "self.head.weight = self.embed.weight", "pass", "removed", "self.head.weight = self.embed.weight"),
    ("activation", "y = gelu(x)", "y = gelu(x, approximate='tanh')", "added", "approximate='tanh'"),
    ("mask", "y = m.triu(1)", "y = m.triu(2)", "added", ".triu(2)"),
    ("bias", "y = f(x, w, bias=b)", "y = f(x, w)", "removed", "bias=b"),
    ("residual", "y = x + f(x)", "y = f(x)", "removed", "x + f(x)"),
    ("reduction", "dist.all_reduce(y)", "pass", "removed", ".all_reduce(y)"),
    ("sign", "y = -x", "y = x", "removed", "-x"),
]


@pytest.mark.parametrize(
    ("kind", "old", "new", "side", "code"), CHANGES, ids=[f"{one[0]}: {one[2]}" for one in CHANGES]
)
def test_every_kind_of_suspicious_change(kind: str, old: str, new: str, side: str, code: str) -> None:
    before, after = (f"def f(x):\n    a = 1\n    {line}\n    return y\n" for line in (old, new))
    text = f"@@ -1,4 +1,4 @@\n def f(x):\n     a = 1\n-    {old}\n+    {new}\n     return y"
    hunk = RawHunk(file="f.py", old_start=1, old_lines=4, new_start=1, new_lines=4, text=text)
    found = find_suspicions(hunk, before, after)
    assert (kind, 3, side, code) in {(one.kind, one.line, one.side, one.code) for one in found}


@pytest.mark.parametrize(
    ("old", "new"), [("y = f(x)", "y = f(x)  # said"), ("y = a[0]", "y = a[1]"), ("y = f(x)", "y = g(x)")]
)
def test_other_changes_are_no_suspicion(old: str, new: str) -> None:
    text = f"@@ -1 +1 @@\n-{old}\n+{new}"
    hunk = RawHunk(file="f.py", old_start=1, old_lines=1, new_start=1, new_lines=1, text=text)
    assert find_suspicions(hunk, old, new) == ()


def test_source_that_is_no_python_is_no_error() -> None:
    hunk = RawHunk(file="f.py", old_start=1, old_lines=1, new_start=1, new_lines=1, text="@@ -1 +1 @@\n-x(\n+y(")
    assert find_suspicions(hunk, "x(", "y(") == ()


def test_reversed_hunks_give_back_the_old_file(repo: Path) -> None:
    """Every hunk of a long change, without a newline at the end too, applied alone and all together."""
    file = repo / "pkg" / "model.py"
    changed = MODEL.replace("class Norm", "class Norma").replace(
        "softmax(-1)", "softmax(-2)\n        # more\n        + 0"
    )
    file.write_text(changed.replace("        return torch.relu(x)\n", "        return torch.tanh(x)"))
    git(repo, "commit", "-qam", "Several")
    hunks = Repository(repo).diff("HEAD~1", "HEAD", ["pkg/model.py"])
    assert len(hunks) == 3
    for hunk in reversed(hunks):  # from the end, so that the lines of the others stay where they are
        (repo / "p").write_text(hunk.widened(file.read_text()).reversed())
        git(repo, "apply", str(repo / "p"))
    assert file.read_text() == MODEL


def test_a_diff_of_dashes_is_read_right() -> None:
    text = "diff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@\n--- x\n+++ y\n same\n@@ -9 +9 @@\n-a\n+b\n"
    assert [(one.file, one.old_start, one.text.count("\n")) for one in parse_diff(text)] == [("f", 1, 3), ("f", 9, 2)]
