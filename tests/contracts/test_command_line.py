"""Each verb stands for one call of the public API: its argv makes exactly that call, and --print-python prints it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

import trimtab
from trimtab.cli import main

# argv -> the program that it stands for, without its imports
CALLS = [
    ("demo --out runs/d --quick", "tt.report(tt.demo('runs/d', quick=True), 'runs/d/report.html')"),
    (
        "generate 'a b' --vector random:0 --layer 2 --cap 5 --max-tokens 8 --dtype bfloat16",
        "tt.generate('testbed', ['a b'], steering=tt.Steer(vector='random:0', layer=2, cap=5.0), max_tokens=8, "
        "dtype='bfloat16')",
    ),
    ("generate a --steering s.safetensors --temperature 0.5 --seed 3", None),
    (
        "capture 'a b' --out runs/c --sites layers.*.mlp_out --positions generated --edit both -m gpt2",
        "tt.capture('gpt2', ['a b'], sites='layers.*.mlp_out', out='runs/c', positions='generated', edit='both')",
    ),
    (
        "capture a --out runs/c --backend vllm --max-model-len 512 --engine block_size=32",
        "tt.capture('testbed', ['a'], sites='layers.*.resid_post', out='runs/c', backend='vllm', "
        "engine={'max_model_len': 512, 'block_size': '32'})",
    ),
    (
        "sweep -p 'a b' -p c -m testbed --layer 2 --cap 5.0 --vector random:7 --max-tokens 16 --run-id first "
        "-c bf16 -c float32",
        "tt.sweep('testbed', ['a b', 'c'], steering=tt.Steer(vector='random:7', layer=2, cap=5.0), "
        "configs=['bf16', 'float32'], max_tokens=16, run_id='first')",
    ),
    ("sweep plan.yaml --no-resume", "tt.sweep(spec='plan.yaml', resume=False)"),
    ("analyze runs/a --prompt-idx 0", "tt.analyze('runs/a', prompt_idx=0)"),
    (
        "analyze runs/a runs/b --config bf16 --reference-config float32 --html r.html",
        "tt.report(tt.analyze('runs/a', run_b='runs/b', config='bf16', reference_config='float32'), 'r.html')",
    ),
    (
        "debug-decode --prompt hi --layer 2 --cap 5.0 --vector random:0 --max-tokens 32 --logprobs 5 "
        "--compare-precision float32",
        "tt.debug_decode('testbed', 'hi', steering=tt.Steer(vector='random:0', layer=2, cap=5.0), "
        "compare_precision='float32', max_tokens=32, logprobs=5, dtype='bfloat16')",
    ),
    (
        "compare runs/a runs/b --rule '.*: rel_l2 < 1e-3' --waive logits --verify",
        "tt.compare('runs/a', 'runs/b', rules=['.*: rel_l2 < 1e-3'], waive=['logits'], verify=True)",
    ),
    ("rerun runs/a --out runs/b", "tt.rerun('runs/a', out='runs/b')"),
    ("report result.json --out r.html", "tt.report('result.json', path='r.html')"),
    ("trace ls runs/a", "trimtab.trace.ls('runs/a')"),
    ("trace show runs/a 3", "trimtab.trace.show('runs/a', 3)"),
    ("trace verify runs/a", "trimtab.trace.verify('runs/a')"),
    ("trace repair runs/a", "trimtab.trace.repair('runs/a')"),
    ("trace prune runs/a --sites layers.0.resid_post --dry-run", None),
    ("doctor", "tt.doctor()"),
    ("testbed build --out t --steps 3", "tt.testbed_build('t', seed=0, steps=3)"),
]


def argv(text: str) -> list[str]:
    import shlex

    return shlex.split(text)


@pytest.mark.parametrize(("command", "program"), CALLS, ids=[command for command, _ in CALLS])
def test_the_printed_program_is_the_call_that_is_made(
    command: str, program: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv(command), "--print-python"]) == 0
    printed = capsys.readouterr().out
    if program is not None:
        assert printed.strip().splitlines()[-1] == program
    calls = _record_calls(monkeypatch)
    main([*argv(command), "--json"])
    made = list(calls)
    calls.clear()
    exec(compile(printed, "<printed>", "exec"), {})
    assert [_plain(call) for call in made] == [_plain(call) for call in calls]
    assert made


def _record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def stand_in(name: str) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args, kwargs))
            return trimtab.results.Finding(name=name, state="ok", detail="")

        return record

    importlib.import_module("trimtab.results")
    for name in (
        "generate",
        "capture",
        "sweep",
        "analyze",
        "debug_decode",
        "demo",
        "compare",
        "rerun",
        "report",
        "doctor",
    ):
        monkeypatch.setitem(vars(trimtab), name, stand_in(name))
    monkeypatch.setitem(vars(trimtab), "testbed_build", stand_in("testbed_build"))
    trace = importlib.import_module("trimtab.trace")
    for name in ("ls", "show", "verify", "repair", "prune"):
        monkeypatch.setattr(trace, name, stand_in(f"trace.{name}"))
    return calls


def _plain(value: Any) -> Any:
    """Compare calls by value: a path and its text, a list and a tuple are the same argument."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


@pytest.mark.parametrize("verb", sorted({command.split()[0] for command, _ in CALLS}))
def test_help_of_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert "Usage: trimtab" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("gnerate a", 'Did you mean "generate"'),
        ("generate a --dtype int3", 'Choose from: "float32"'),
        ("generate a --cap 5 --layer 1", "cap was given without a vector"),
        ("generate a --vector random:0 --layer 1", "a vector was given without cap, cap_min, add or keep"),
        ("generate a --vector random:0 --cap 1 --add 2", "one op at a time here, got cap and add"),
        ("generate a --engine x", "write key=value"),
        ("generate --prompt-file nowhere.txt", "cannot be read"),
        ("analyze nowhere", "is not the directory of a sweep"),
        ("capture a", "--out"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv(command)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("trimtab: ") and error.count("\n") == 1


def test_our_own_bugs_keep_their_traceback_and_exit_70(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AssertionError("inner detail")

    monkeypatch.setitem(vars(trimtab), "doctor", broken)
    assert main(["doctor"]) == 70
    error = capsys.readouterr().err
    assert "inner detail" in error and "Traceback" in error


def test_the_program_exits_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["trimtab", "gnerate"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
