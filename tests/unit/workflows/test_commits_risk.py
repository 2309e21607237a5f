"""The rating of a commit, from the syntax trees of what it changed."""

from __future__ import annotations

import pytest

from trimtab.workflows.commits._git import Change
from trimtab.workflows.commits.risk import rate

MODEL = '''\
"""A model."""
import logging
import math
import torch
from kernels import softmax

logger = logging.getLogger(__name__)


class Attention(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.out = torch.nn.Linear(width, width)

    def forward(self, x, mask=None):
        """Attend."""
        logger.info("attending %s", x.shape)
        scores = x @ x.transpose(-1, -2)
        weights = scores * self.scale
        if mask is not None:
            weights = weights + mask
        return self.out(weights @ x)


def train(model, batch, optimizer):
    loss = model(batch).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.float()


def pick(items, count):
    if count < 0:
        raise ValueError("count is negative")
    return items[:count]
'''


def changed(old: str, new: str, path: str = "model.py") -> tuple[Change, ...]:
    assert old in MODEL
    return (Change(path=path, old_path=path, old=MODEL, new=MODEL.replace(old, new)),)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"""Attend."""', '"""Attend to everything, in bfloat16."""', "comments, formatting"),
        ("self.heads = heads", "self.heads = heads  # scale by sqrt(2), float16", "comments, formatting"),
        ('logger.info("attending %s", x.shape)', 'logger.info("scale %s", x.float())', "logging"),
        ('logger.info("attending %s", x.shape)', "pass", "logging"),
        ("def pick(items, count):", "def pick(items: list[float], count: int) -> list[float]:", "annotations"),
        ('"count is negative"', '"count is negative, loss scale"', "messages"),
        ("import math\n", "import math\nimport optax\n", "imports"),
        ("weights = scores", "weights = (scores)", "comments, formatting"),
        ("def pick(items, count):", "def pick(items, count):\n    print('loss', 2.0)", "comments, formatting"),
    ],
)
def test_low(old: str, new: str, what: str) -> None:
    risk, reasons = rate(changed(old, new))
    assert risk == "LOW", reasons
    assert what in reasons[0].what


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("return items[:count]", "return items[: count + 1]", "return changed in pick"),
        ("if count < 0:", "if count <= 0:", "condition changed in pick"),
        ("def pick(items, count):", "def pick(items, count=3):", "function changed"),
        ("weights = weights + mask", "weights = mask + weights", "assignment changed in Attention.forward"),
        (
            "        if mask is not None:\n            weights",
            "        if True:\n            weights",
            "condition changed",
        ),
    ],
)
def test_medium(old: str, new: str, what: str) -> None:
    risk, reasons = rate(changed(old, new))
    assert risk == "MEDIUM", reasons
    assert what in reasons[0].what


@pytest.mark.parametrize(
    ("old", "new", "what", "line"),
    [
        ("return loss.float()", "return loss.bfloat16()", "precision: bfloat16", 31),
        ("scores * self.scale", "scores", "scaling", 20),
        ("scores * self.scale", "scores * self.scale * 2", "scaling", 20),
        ("from kernels import softmax", "from torch.nn.functional import softmax", "scaling: softmax", 5),
        ("model.parameters(), 1.0", "model.parameters(), 2.0", "gradients: clip_grad_norm_", 29),
        ("    loss.backward()\n", "", "gradients", 28),
        ("loss.backward()", "(loss / 2).backward()", "gradients", 28),
        ("x @ x.transpose(-1, -2)", "x.transpose(-1, -2) @ x", "scaling: a product", 19),
        ("torch.nn.Linear(width, width)", "torch.nn.Linear(width, width, dtype=torch.half)", "precision", 14),
        ("optimizer.step()", "with torch.autocast('cpu'):\n        optimizer.step()", "precision: autocast", 30),
        ("loss = model(batch).mean()", "loss = model(batch).sum()", "gradients: loss", 27),
    ],
)
def test_high(old: str, new: str, what: str, line: int) -> None:
    risk, reasons = rate(changed(old, new))
    assert risk == "HIGH", reasons
    assert any(what in one.what and one.line == line and one.file == "model.py" for one in reasons), reasons


def test_only_the_changed_part_and_what_is_around_it_count() -> None:
    old = "run(lr=0.1, name='first', dtype='half')\n"
    change = Change(path="a.py", old_path="a.py", old=old, new=old.replace("first", "second"))
    assert rate((change,))[0] == "MEDIUM"
    change = Change(path="a.py", old_path="a.py", old=old, new=old.replace("0.1", "0.2"))
    assert rate((change,))[0] == "HIGH"


@pytest.mark.parametrize(
    ("new", "risk"),
    [
        ("p.add_argument('--lr', default=1, help='speed')\n", "LOW"),
        ("p.add_argument('--lr', default=2)\n", "HIGH"),
        ("p.add_argument('--lr', default=1)\np.add_argument('--loud')\n", "LOW"),
    ],
    ids=["a help text", "a default", "an option"],
)
def test_options_of_a_program(new: str, risk: str) -> None:
    old = "p.add_argument('--lr', default=1)\n"
    assert rate((Change(path="a.py", old_path="a.py", old=old, new=new),))[0] == risk


def test_names_that_are_changed_everywhere_alike_are_low() -> None:
    user = "from model import train\n\n\ndef main(model):\n    return train(model, [], None)\n"
    both = (
        *changed("def train(", "def fit("),
        Change(path="main.py", old_path="main.py", old=user, new=user.replace("train", "fit")),
    )
    risk, reasons = rate(both)
    assert risk == "LOW", reasons
    assert reasons[0].what == "names: train -> fit"


def test_names_of_others_are_no_rename() -> None:
    """torch.float16 is defined elsewhere: another name is another thing."""
    old = "def cast(x):\n    return x.to(torch.float16)\n"
    change = Change(path="a.py", old_path="a.py", old=old, new=old.replace("float16", "float64"))
    assert rate((change,))[0] == "HIGH"
    swapped = "def f(a, b):\n    return a - b\n"
    change = Change(path="a.py", old_path="a.py", old=swapped, new=swapped.replace("a - b", "b - a"))
    assert rate((change,))[0] == "MEDIUM"
    text = "def f(a):\n    return g('a', a)\n"
    change = Change(path="a.py", old_path="a.py", old=text, new="def f(b):\n    return g('b', b)\n")
    assert rate((change,))[0] == "MEDIUM"


@pytest.mark.parametrize(
    ("path", "risk"),
    [
        ("README.md", "LOW"),
        ("LICENSE", "LOW"),
        ("tests/test_scale.py", "LOW"),
        ("src/pkg/test_loss.py", "LOW"),
        ("config/train.yaml", "MEDIUM"),
        ("csrc/softmax.cu", "HIGH"),
        ("broken.py", "HIGH"),
    ],
)
def test_by_kind_of_file(path: str, risk: str) -> None:
    change = Change(path=path, old_path=path, old="a (", new="b (")
    assert rate((change,))[0] == risk


def test_moves_new_files_and_nothing() -> None:
    assert rate(())[0] == "LOW"
    moved = Change(path="b.py", old_path="a.py", old=MODEL, new=MODEL)
    assert rate((moved,))[1][0].what == "moved"
    new = Change(path="b.py", old_path="b.py", old=None, new="def add(a, b):\n    return a + b\n")
    assert rate((new,))[0] == "MEDIUM"
    gone = Change(path="b.py", old_path="b.py", old="def cast(a):\n    return a.half()\n", new=None)
    assert rate((gone,))[0] == "HIGH"


def test_the_highest_reason_comes_first() -> None:
    docs = Change(path="a.md", old_path="a.md", old="a", new="b")
    risk, reasons = rate((docs, *changed("return loss.float()", "return loss.double()")))
    assert risk == "HIGH" and [one.risk for one in reasons] == ["HIGH", "LOW"]
