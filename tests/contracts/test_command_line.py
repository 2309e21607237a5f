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
    (
        "sweep -p a --allow-fallback --allow-unfired --sites layers.1.resid_post --batch-size 2 --quick",
        "tt.sweep(None, ['a'], batch_size=2, allow_unfired=True, allow_fallback=True, sites='layers.1.resid_post', "
        "quick=True)",
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
    (
        "compare runs/a runs/b --dims '.*: b s h' --jobs 2",
        "tt.compare('runs/a', 'runs/b', dims=['.*: b s h'], jobs=2)",
    ),
    (
        "compare runs/a runs/b --ray auto",
        "tt.compare_on_ray('runs/a', 'runs/b', address='auto')",
    ),
    (
        "dump --out runs/d --level statistics -- python train.py --lr 3e-4",
        "trimtab.dump.run(['python', 'train.py', '--lr', '3e-4'], 'runs/d', level='statistics')",
    ),
    ("triage runs/a runs/b --revisions a..b", "tt.triage('runs/a', 'runs/b', revisions='a..b')"),
    ("commits a..b --plan p.yaml", "tt.commits('a..b', out='runs/commits', plan='p.yaml')"),
    (
        "commits a..b -- python train.py --steps {steps}",
        "tt.commits('a..b', ['python', 'train.py', '--steps', '{steps}'], out='runs/commits')",
    ),
    ("rerun runs/a --out runs/b", "tt.rerun('runs/a', out='runs/b')"),
    ("report result.json --out r.html", "tt.report('result.json', path='r.html')"),
    ("trace ls runs/a", "trimtab.trace.ls('runs/a')"),
    ("trace show runs/a 3", "trimtab.trace.show('runs/a', 3)"),
    ("trace verify runs/a", "trimtab.trace.verify('runs/a')"),
    ("trace repair runs/a", "trimtab.trace.repair('runs/a')"),
    ("trace prune runs/a --sites layers.0.resid_post --dry-run", None),
    (
        "trace import runs/d --out runs/i --pattern '{step}/{name}'",
        "trimtab.trace.import_dump('runs/d', 'runs/i', pattern='{step}/{name}')",
    ),
    (
        "trace export runs/a --out runs/e --layout npy",
        "trimtab.trace.export_dump('runs/a', 'runs/e', layout='npy')",
    ),
    (
        "vectors extract testbed:animal --out v --method pca",
        "trimtab.vectors.extract('testbed', 'testbed:animal', out='v', method='pca')",
    ),
    (
        "vectors train testbed:animal --out t --sites layers.3.resid_post",
        "trimtab.vectors.train('testbed', 'testbed:animal', out='t', sites=['layers.3.resid_post'])",
    ),
    (
        "vectors train --all sets --out t --sites layers.3.resid_post",
        "tt.train_all('sets', 'testbed', out='t', sites=['layers.3.resid_post'])",
    ),
    (
        "vectors sweep-lr testbed:animal --out t --sites layers.3.resid_post --rates 0.01 0.1",
        "trimtab.vectors.sweep_lr('testbed', 'testbed:animal', rates=[0.01, 0.1], out='t', "
        "sites=['layers.3.resid_post'])",
    ),
    (
        "vectors clean a.safetensors --out o --neutral n.txt",
        "trimtab.vectors.clean(['a.safetensors'], out='o', model='testbed', neutral='n.txt')",
    ),
    ("vectors compare a --against b --out o", "trimtab.vectors.compare(['a'], against=['b'], out='o')"),
    ("vectors random v --out c.npy --seed 3", "trimtab.vectors.random('v', out='c.npy', seed=3)"),
    ("vectors convert a b.npy --layer 2", "trimtab.vectors.convert('a', 'b.npy', layer=2)"),
    ("vectors show a --key PC1", "trimtab.vectors.show('a', key='PC1')"),
    (
        "evaluate rollouts 'a b' --out r --samples 2",
        "trimtab.evaluate.rollouts('testbed', ['a b'], out='r', samples=2)",
    ),
    ("evaluate score r --scorer testbed:animal", "trimtab.evaluate.score('r', ['testbed:animal'])"),
    ("evaluate stress animal --out s", "tt.stress('testbed', ['animal'], out='s')"),
    (
        "evaluate stress -m m --out s --data a=a.jsonl --delta a=testbed:animal --judge a=judge "
        "--judge-setting model=j --neutral n.txt --method dual --method trained",
        "tt.stress('m', out='s', methods=['dual', 'trained'], data={'a': 'a.jsonl'}, delta={'a': 'testbed:animal'}, "
        "judge={'a': 'judge'}, judge_settings={'model': 'j'}, neutral='n.txt')",
    ),
    ("vectors extract d.jsonl --choose auc", "trimtab.vectors.extract('testbed', 'd.jsonl', choose='auc')"),
    (
        "sae eval a b --data t.txt --tokens 500 --latent 3 4 --html s.html",
        "tt.report(trimtab.sae.evaluate(['a', 'b'], data='t.txt', tokens=500, latents=[3, 4]), 's.html')",
    ),
    (
        "sae train synthetic:256x64:8 --out r --d-sae 512 1024 --lower-dtype bf16 --target-l0 9 --early-exit 5 "
        "--max-norm 0",
        "trimtab.sae.train('synthetic:256x64:8', out='r', max_norm=None, d_sae=[512, 1024], target_l0=9.0, "
        "lower_dtype='bf16', early_exit=5)",
    ),
    (
        "sae precision synthetic:256x64 --d-sae 512 --dtype fp16 --adam-trick --batches 2",
        "trimtab.sae.check_precision('synthetic:256x64', batches=2, d_sae=[512], dtype='fp16', adam_trick=True)",
    ),
    ("sae export a --out o", "trimtab.sae.export('a', 'o')"),
    (
        "sae export a --out o --latent 0 --scale 0.5 --positions generated",
        "trimtab.sae.export('a', 'o', latent=0, scale=0.5, positions='generated')",
    ),
    (
        "weights susceptibility a b -d p --vector-layer 3 --rank 8",
        "trimtab.weights.measure_susceptibility('a', 'b', ['p'], vector_layer=3, rank=8)",
    ),
    (
        "weights mlp a b -d p q#1-3 --layers 0,4-8 --controls 32 --html r.html",
        "tt.report(trimtab.weights.measure_mlp('a', 'b', ['p', 'q#1-3'], layers='0,4-8', controls=32), 'r.html')",
    ),
    (
        "weights attention a b -d p --offset 2 --average-layers --pairs all",
        "trimtab.weights.measure_attention('a', 'b', ['p'], average_layers=True, pairs=None, offset=2)",
    ),
    (
        "weights mlp a b -d p --ray auto",
        "tt.weights_on_ray('mlp', 'a', 'b', ['p'], address='auto')",
    ),
    ("doctor", "tt.doctor()"),
    ("testbed build --out t --steps 3", "tt.testbed_build('t', seed=0, steps=3)"),
]


def argv(text: str, *options: str) -> list[str]:
    """Split a command line; options go before the `--` of a program that it runs."""
    import shlex

    words = shlex.split(text)
    end = words.index("--") if "--" in words else len(words)
    return [*words[:end], *options, *words[end:]]


@pytest.mark.parametrize(("command", "program"), CALLS, ids=[command for command, _ in CALLS])
def test_the_printed_program_is_the_call_that_is_made(
    command: str, program: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv(command, "--print-python")) == 0
    printed = capsys.readouterr().out
    if program is not None:
        assert printed.strip().splitlines()[-1] == program
    calls = _record_calls(monkeypatch)
    main(argv(command, "--json"))
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
        "stress",
        "sweep",
        "train_all",
        "weights_on_ray",
        "analyze",
        "debug_decode",
        "demo",
        "compare",
        "compare_on_ray",
        "triage",
        "commits",
        "rerun",
        "report",
        "doctor",
    ):
        monkeypatch.setitem(vars(trimtab), name, stand_in(name))
    monkeypatch.setitem(vars(trimtab), "testbed_build", stand_in("testbed_build"))
    trace = importlib.import_module("trimtab.trace")
    for name in ("ls", "show", "verify", "repair", "prune", "import_dump", "export_dump"):
        monkeypatch.setattr(trace, name, stand_in(f"trace.{name}"))
    monkeypatch.setattr(importlib.import_module("trimtab.dump"), "run", stand_in("dump.run"))
    vectors = importlib.import_module("trimtab.vectors")
    for name in ("extract", "train", "sweep_lr", "clean", "compare", "random", "convert", "show"):
        monkeypatch.setitem(vars(vectors), name, stand_in(f"vectors.{name}"))
    evaluate = importlib.import_module("trimtab.evaluate")
    for name in ("rollouts", "score"):
        monkeypatch.setattr(evaluate, name, stand_in(f"evaluate.{name}"))
    sae = importlib.import_module("trimtab.sae")
    for name in ("train", "evaluate", "check_precision", "export"):
        monkeypatch.setitem(vars(sae), name, stand_in(f"sae.{name}"))
    weights = importlib.import_module("trimtab.weights")
    for name in ("measure_susceptibility", "measure_mlp", "measure_attention"):
        monkeypatch.setattr(weights, name, stand_in(f"weights.{name}"))
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
        ("debug-decode -p a --batch-size 2", "--batch-size"),
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
