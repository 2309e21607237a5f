"""Bad input, through the public API and the command line: one line that says what is wrong, and the right exit code."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab import testbed
from trimtab.cli import main
from trimtab.errors import BackendError, InputError, PrerequisiteError, SiteError, SteeringError, TraceLockedError
from trimtab.testing.models import tiny, tiny_tokenizer
from trimtab.trace._store import LocalStore

CAP = "--vector random:0 --layer 1 --cap 1"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything that can be given where something else was expected."""
    here = tmp_path_factory.mktemp("refusals")
    (here / "file").write_text("x")
    (here / "empty").write_text("")
    (here / "bin").write_bytes(bytes(range(256)))
    (here / "full").mkdir()
    (here / "full" / "x").write_text("1")
    (here / "void").mkdir()
    (here / "void.html").mkdir()
    (here / "any.json").write_text('{"a": 1}')
    (here / "bad.json").write_text("{")
    (here / "newer.json").write_text('{"kind": "analysis", "format_version": 99}')
    (here / "bad.yaml").write_text("a: [1,\n b: }")
    for name, text in {
        "list": "[]",
        "bare": '{"format_version": 1}',
        "newer": '{"format_version": 9}',
        "torn": "{",
    }.items():
        for kind, file in (("trace", "manifest.json"), ("sweep", "sweep.json")):
            (here / f"{kind}_{name}").mkdir()
            (here / f"{kind}_{name}" / file).write_text(text)
    for name, vector in {
        "wide": torch.ones(64),
        "zero": torch.zeros(128),
        "nan": torch.full((128,), torch.nan),
        "inf": torch.full((128,), torch.inf),
    }.items():
        torch.save(vector, here / f"{name}.pt")
    _steering(128, torch.ones(128), positions="generated").save(here / "generated.safetensors")
    _steering(64, torch.ones(64)).save(here / "narrow.safetensors")
    _steering(128, torch.ones(128) * 1e30).save(here / "strong.safetensors")
    for name, word in (("one", "keeper"), ("other", "lamp")):
        tt.capture("testbed", [f"The {word}"], sites="layers.*.resid_post", out=here / name, max_tokens=2)
    with tt.TraceWriter(here / "dump") as writer:
        writer.write("x", torch.ones(2))
    _spoil(here / "one", here / "cut", lambda data: data[:200])
    _spoil(here / "one", here / "changed", lambda data: data[:-1] + bytes([data[-1] ^ 255]))
    for name in ("one", "other"):
        tt.sweep("testbed", [f"The {name}"], configs=["float32"], max_tokens=1, out=here / "runs", run_id=name)
    return here


def _steering(width: int, vector: torch.Tensor, **options: Any) -> tt.Steering:
    assert len(vector) == width
    return tt.Steering({"layers.2.resid_post": [tt.Add(vector)]}, **options)


def _spoil(source: Path, target: Path, change: Any) -> None:
    shutil.copytree(source, target)
    (shard,) = target.rglob("tensors/part-*.safetensors")
    shard.write_bytes(change(shard.read_bytes()))


@pytest.fixture(autouse=True)
def _in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every command starts in that directory and must leave no more in it than there was."""
    monkeypatch.chdir(place)
    before = {path.name for path in place.iterdir()}
    yield
    made = {path.name for path in place.iterdir()} - before
    for name in made:
        shutil.rmtree(place / name)
    assert not made, f"a refused command left {made}"


# command -> what its one line holds
REFUSED = [
    # prompts
    ("generate", "no prompt was given; give at least one"),
    ("generate '  '", "a prompt is empty; give at least one word"),
    ("generate a ''", "a prompt is empty"),
    ("generate --prompt-file empty", "prompt file 'empty' holds no prompt; write one a line"),
    ("generate a --prompt-file bin", "prompt file 'bin' cannot be read"),
    ("sweep -p ' '", "a prompt is empty"),
    ("debug-decode --prompt ''", "a prompt is empty"),
    # models, backends, devices
    ("generate a -m /no/such", "model '/no/such': no such directory; give the directory of a saved model, a hub id"),
    ("generate a -m file", "model 'file' is a file; the directory of a saved model was expected"),
    ("generate a -m void", "model 'void' is a directory without a config.json"),
    ("generate a --backend onnx", "no backend 'onnx'; there are hf, mock, vllm"),
    ("sweep -p a -c onnx:float32 -c float32 --reference onnx_float32_model", "no backend 'onnx'; there are hf, mock"),
    ("generate a --device gpu", "device 'gpu': use cpu, cuda, cuda:N or mps"),
    ("generate a --device cuda:x", "device 'cuda:x': use cpu, cuda, cuda:N or mps"),
    ("generate a --device cuda:99", "device 'cuda:99': "),
    ("generate a --backend mock --device mps", "device"),
    ("generate a --max-model-len 5", "backend 'hf' has no option 'engine'; it has tokenizer, dtype, device"),
    # sites
    ("capture a --out new --sites layers.0.resid_pots", "no point 'resid_pots'; nearest: resid_post, resid_pre"),
    ("capture a --out new --sites layers.6.resid_post", "layer 6 is outside this model, which has layers 0 to 5"),
    ("capture a --out new --sites layers.-7.resid_post", "layer -7 is outside this model, which has layers 0 to 5"),
    ("capture a --out new --sites layers.3-1.resid_post", "the range 3-1 runs backwards; write 1-3"),
    ("capture a --out new --sites ''", "at least one site pattern was expected, such as layers.*.resid_post"),
    ("capture a --out new --sites module:model.layer.output", "no module 'model.layer'; nearest: model.layers"),
    ("capture a --out new --sites module:model.norm.grad_output", "no backward pass"),
    ("capture a --out new --backend mock --sites layers.0.q", "no layers.0.q; layer 0 has: resid_pre"),
    # vectors and ops
    (f"generate a {CAP} --point resid_pst", "nearest: resid_post"),
    (f"generate a {CAP.replace('1', '99')}", "layer 99 is outside this model, which has layers 0 to 5"),
    ("generate a --vector random:0 --cap 1", "does not say its layer; give one, 0 to 5"),
    ("generate a --vector wide.pt --layer 1 --cap 1", "the vector has width 64 and the model has hidden size 128"),
    ("generate a --vector zero.pt --layer 1 --cap 1", "zero.pt is not a direction: it is zero (width 128)"),
    ("generate a --vector nan.pt --layer 1 --cap 1", "nan.pt is not a direction: 128 of its 128 values are not finite"),
    ("generate a --vector inf.pt --layer 1 --add 1", "inf.pt is not a direction: 128 of its 128 values are not finite"),
    ("generate a --vector nowhere --layer 1 --cap 1", "nowhere: no such file; a vector is a .safetensors vector"),
    ("generate a --vector void --layer 1 --cap 1", "void needs steering_vector.pt and steering_config.json"),
    ("generate a --vector random:x --layer 1 --cap 1", "'random:x': expected random:SEED with a seed from 0"),
    ("generate a --vector random:0 --layer 1 --cap 1 --cap-min 2", "Cap min=2 is above max=1"),
    ("generate a --vector random:0 --layer 1 --cap nan", "Cap max: nan was given; a finite number was expected"),
    ("generate a --keep 0 --layer 1", "keep was given without a vector"),
    ("generate a --layer 1", "options of a steering vector were given without a vector"),
    (f"generate a {CAP} --where last", "there is no bare 'last'; write last_prompt or each_step_last"),
    (f"generate a {CAP} --where 9:3", "the range '9:3' is empty"),
    (f"generate a {CAP} --where 500:", "selected no row: no such row; positions 500:"),
    ("generate a --steering generated.safetensors --max-tokens 1", "choose other positions, or accept it with allow"),
    ("generate a --steering narrow.safetensors", "the vector of Add has width 64 and the states there have width 128"),
    (
        "generate a --steering strong.safetensors --dtype float16",
        "rows non-finite in torch.float16, the first",
    ),
    ("generate a --steering nowhere", "nowhere: no such file; give a .safetensors file"),
    ("generate a --steering void", "void: is a directory; give a .safetensors file"),
    ("generate a --steering file", "file is not a readable safetensors file"),
    # numbers
    ("generate a --max-tokens -1", "max_new_tokens is -1; 0 or a positive number was expected"),
    ("generate a --max-tokens 9999", "needs 10000 positions (2 of the prompt) and the model has 512"),
    ("generate a --batch-size 0", "batch_size is 0; at least 1 was expected"),
    ("generate a --backend mock --batch-size 0", "batch_size is 0; at least 1 was expected"),
    ("generate a --temperature nan", "temperature is nan; a finite number of at least 0 was expected"),
    ("generate a --seed 99999999999999999999", "seed is 99999999999999999999; an integer of 64 bits was expected"),
    ("generate a --logprobs 999", "logprobs is 999; the vocabulary has 188 tokens"),
    ("sweep -p a --max-tokens 0", "max_tokens is 0; at least 1 token must be generated"),
    ("sweep -p a --max-tokens 9999 --run-id n --out .", "needs 10000 positions"),
    ("sweep -p a --logprobs -1", "logprobs is -1; 0 or a positive number was expected"),
    (f"debug-decode --prompt a {CAP} --max-tokens 0", "max_tokens is 0; at least 1 token must be generated"),
    (f"debug-decode --prompt a {CAP} --logprobs -4", "logprobs is -4; 0 or a positive number was expected"),
    ("debug-decode --prompt a", "give a vector with a layer and a cap, or a steering file"),
    ("testbed build --out new --steps 0", "steps is 0; give at least 1"),
    ("testbed build --out new --seed 99999999999999999999", "an integer of 64 bits was expected"),
    # captures of nothing, and places that cannot be written
    (
        "capture a --out new --positions generated --max-tokens 1",
        "nothing was captured at layers.0.resid_post: ",
    ),
    ("capture a --out new --positions 9:3", "the range '9:3' is empty"),
    ("capture a --out new --max-bytes 10", "more than max_bytes=10; raise it, capture fewer sites"),
    ("capture a --out new --along one", "prompt 0 is not the one that the trace one followed; give the same prompts"),
    ("capture a --out one", "one already holds rank-00000 of a 'generation' run; choose another directory"),
    ("capture a --out full", "full exists and is no trace: it holds x; choose a new directory"),
    ("capture a --out file", "cannot write file: File exists; a file stands where a directory is needed"),
    ("generate a --out file/x", "cannot write file/x: Not a directory; a file stands where a directory is needed"),
    ("sweep -p a --out file", "cannot be made: Not a directory; give another directory or run id"),
    ("sweep -p a --out . --run-id file", "file cannot be made: File exists"),
    ("sweep -p a --out . --run-id full", "full exists and is not a sweep; use another run id"),
    ("sweep -p a --run-id a/b", "run id 'a/b': use 1 to 128 of A-Z a-z 0-9 . _ -"),
    ("demo --out file", "file cannot be made: File exists"),
    ("rerun runs/one --out file", "file cannot be made: File exists"),
    ("rerun one --out other", "other already holds rank-00000 of a 'generation' run"),
    ("testbed build --out full", "full is not empty; give a directory that does not exist yet"),
    # sweep files
    ("sweep nowhere.yaml", "sweep file nowhere.yaml cannot be read"),
    ("sweep bad.yaml", "sweep file bad.yaml is not YAML"),
    ("sweep any.json", "unknown option 'a'; options: model, prompts"),
    ("sweep -p a -c fp8", "configuration 'fp8': use one of bf16, bf16_cap_fp32"),
    # runs that are none, damaged, or of a newer version
    ("analyze one", "one is not the directory of a sweep: it has no readable sweep.json"),
    ("analyze sweep_torn", "sweep_torn/sweep.json is damaged"),
    ("analyze sweep_bare", "sweep_bare/sweep.json is damaged"),
    ("analyze sweep_newer", "has format version 9; this trimtab reads 1: update trimtab"),
    ("analyze runs/one --prompt-idx 9", "it has prompts 0 to 0"),
    ("analyze runs/one runs/other", "ran different prompts: prompt 0 is 'The one' and 'The other'"),
    ("compare one nowhere", "no trace at nowhere: it has no manifest.json; nothing is there"),
    ("compare one runs/one", "it has no manifest.json; there is: float32, sweep.json"),
    ("compare one trace_newer", "trace format version 9; this trimtab reads versions up to 1: upgrade trimtab"),
    ("compare one trace_torn", "trace_torn/manifest.json cannot be read"),
    ("compare one trace_bare", "trace_bare/manifest.json is damaged: it has no 'kind'; restore it from a copy"),
    ("compare one other", "prompt 0 (request prompt-0000) is not the same in the two runs"),
    ("compare one one --verdict strict", "no verdict 'strict'; there are calibrated, sglang"),
    ("compare one one --rule 'mlp: rel_l2 < 1'", "it matches no tensor; nearest of "),
    ("compare one one --expect bin", "the expectation file bin is not text"),
    ("compare one one --expect bad.json", "bad.json is not JSON"),
    ("compare one one --html void", "use .html, .json or .txt"),
    ("trace ls trace_bare", "trace_bare/manifest.json is damaged: it has no 'kind'"),
    ("trace ls trace_list", "trace_list/manifest.json cannot be read"),
    ("trace show one 99", "one has no record 99; trace ls lists what it has"),
    ("trace show cut 0", "part-00000.safetensors is truncated or corrupt: 200 bytes cannot hold its header"),
    ("trace prune one", "prune needs to know what goes"),
    ("trace prune one --sites layers.9.resid_post", "matches none of layers.0.resid_post"),
    ("rerun nowhere", "nowhere holds no run: it has neither sweep.json nor manifest.json"),
    ("rerun file", "holds no run: it has neither sweep.json nor manifest.json"),
    ("rerun dump", "dump cannot be repeated from its manifest: it does not say which call made it"),
    ("rerun trace_list", "trace_list/manifest.json cannot be read"),
    ("rerun trace_newer", "trace format version 9; this trimtab reads versions up to 1: upgrade trimtab"),
    ("report any.json", "'any.json' holds no result with a report: expected the JSON of an Analysis or a Comparison"),
    ("report bad.json", "bad.json is not JSON"),
    ("report newer.json", "format version 99; this trimtab reads versions up to 1: upgrade trimtab"),
    ("report one", "'one' is a directory: give the JSON file of a result"),
    ("report runs/one --out void.html", "report path 'void.html' cannot be written: Is a directory; give another"),
    ("report runs/one --out x.pdf", "use .html, .json or .txt"),
]


@pytest.mark.parametrize(("command", "message"), REFUSED, ids=[command for command, _ in REFUSED])
def test_a_refusal_is_one_line_and_exit_code_2(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(shlex.split(command))
    output, error = capsys.readouterr()
    assert code == 2, error
    assert message in error
    assert error.startswith("trimtab: ") and error.count("\n") == 1
    assert output == ""


# -- exit codes and JSON

DOCUMENTS = [
    ("generate a --max-tokens 1 --json", 0),
    ("trace ls one --json", 0),
    ("trace show one 0 --json", 0),
    ("trace verify one --json", 0),
    ("trace verify changed --json", 1),
    ("trace verify cut --json", 1),
    ("compare one one --json", 0),
    ("compare one dump --json", 1),
    ("compare one changed --verify --json", 1),
    ("compare one cut --json", 1),
    ("analyze runs/one --json", 1),
    (f"debug-decode --prompt a {CAP} --max-tokens 1 --json", 0),
]


@pytest.mark.parametrize(("command", "code"), DOCUMENTS, ids=[command for command, _ in DOCUMENTS])
def test_json_is_one_document_on_standard_output(
    command: str, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(shlex.split(command)) == code
    output, error = capsys.readouterr()
    document = json.loads(output)
    assert document["format_version"] >= 1
    assert document.get("passed", True) is (code == 0)
    if "--prompt" in command or command.startswith("generate"):
        assert error, "progress is shown on standard error"
    if command.startswith(("compare", "analyze")):
        assert document["ledger"] and (code == 0 or document["reason"])


def test_corrupt_bytes_are_not_called_different(capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", "one", "changed", "--verify"])
    assert "corrupt" in capsys.readouterr().out


def test_an_interruption_exits_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.workflows._open.open_backend", stop)
    assert main(["generate", "a"]) == 3
    assert "interrupted; what was committed is kept" in capsys.readouterr().err


def test_an_interrupted_sweep_exits_3_names_its_command_and_can_be_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trimtab.workflows.sweep._run_pass", stop)
        assert main(shlex.split(f"sweep -p a -c float32 --max-tokens 1 --out {tmp_path} --run-id cut")) == 3
    error = capsys.readouterr().err
    assert "was interrupted" in error
    command = error.strip().rpartition("trimtab ")[2]
    assert main(["analyze", str(tmp_path / "cut")]) == 3
    assert main(shlex.split(command)) == 0


def test_rerun_of_the_manifest_in_the_current_directory_knows_its_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "one", tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    assert main(["rerun", "manifest.json"]) == 0
    assert (tmp_path / "mine-rerun" / "manifest.json").is_file()


def test_the_mock_backend_takes_the_options_of_every_command(tmp_path: Path) -> None:
    assert tt.generate("any", ["a"], backend="mock", max_tokens=2).texts[0].token_ids
    made = tt.sweep("any", ["a"], backend="mock", reference="mock_float32", max_tokens=2, out=tmp_path, run_id="m")
    assert made.finished


def test_a_corrected_command_may_use_the_directory_of_the_refused_one(tmp_path: Path) -> None:
    out = tmp_path / "new"
    with pytest.raises(tt.TrimtabError, match="nothing was captured"):
        tt.capture("testbed", ["a"], sites="embed", positions="generated", out=out, max_tokens=1)
    assert tt.capture("testbed", ["a"], sites="embed", out=out, max_tokens=1).index.height


# -- the backend


def test_a_model_of_unknown_family_is_steered_by_consent_only() -> None:
    steering = tt.Steering({"layers.0.resid_post": [tt.Add(torch.ones(64))]})
    options: dict[str, Any] = {"steering": steering, "max_tokens": 1, "tokenizer": tiny_tokenizer()}
    assert tt.generate(tiny("falcon"), ["ab"], max_tokens=1, tokenizer=tiny_tokenizer()).texts
    with pytest.raises(BackendError, match=r"'falcon' is in no table .* allow_fallback=True") as found:
        tt.generate(tiny("falcon"), ["ab"], **options)
    assert "\n" not in str(found.value)
    assert tt.generate(tiny("falcon"), ["ab"], allow_fallback=True, **options).texts[0].doses[0].rows > 0


def test_a_module_that_never_ran_is_named_with_its_site(tmp_path: Path) -> None:
    model = tiny("qwen3")
    model.extra = nn.Linear(64, 64)
    with pytest.raises(BackendError, match=r"nothing was captured at module:extra\.output.*'extra' never ran"):
        tt.capture(
            model, ["ab"], sites="module:extra.output", out=tmp_path / "t", max_tokens=1, tokenizer=tiny_tokenizer()
        )
    assert not (tmp_path / "t").exists()


def test_an_engine_that_died_says_what_it_asked_for_what_is_free_and_what_to_lower() -> None:
    model = tiny("qwen3")
    first = model.model.layers[0]
    model.eval()
    forward = first.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        if armed:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has less")
        return forward(*args, **kwargs)

    armed: list[int] = []
    first.forward = fail
    backend = tt.open_backend("hf", model, tokenizer=tiny_tokenizer(), batch_size=7)
    armed.append(1)
    from trimtab.backends import Request

    with pytest.raises(BackendError, match=r"asked for 3\.50 GiB, \S+ \wiB free; lower batch_size \(7\)") as found:
        backend.generate([Request(id="r", prompt="ab", max_new_tokens=1)])
    assert "\n" not in str(found.value)


# -- steering, traces, extras


def test_python_code_is_not_serialised(tmp_path: Path) -> None:
    steering = tt.Steering({"layers.0.resid_post": [tt.Edit(lambda h: h)]})
    for use in (
        lambda: steering.digest,
        lambda: steering.save(tmp_path / "s.safetensors"),
        lambda: tt.sweep("testbed", ["a"], steering=steering, out=tmp_path, run_id="r"),
    ):
        with pytest.raises(SteeringError, match="is Python code: it has no digest and cannot be saved or sent"):
            use()
    assert not list(tmp_path.iterdir())


def test_ablate_has_no_default_for_what_it_keeps() -> None:
    with pytest.raises(TypeError, match="keep"):
        tt.Ablate(torch.ones(128))  # type: ignore[call-arg]
    with pytest.raises(InputError, match="keep was given without a vector"):
        tt.generate("testbed", ["a"], steering=tt.Steer(keep=0.0, layer=1))


def test_a_point_that_only_some_backends_have_names_what_is_there() -> None:
    steering = tt.Steering({"layers.0.mlp_act": [tt.Add(torch.ones(16))]})
    with pytest.raises(SiteError, match=r"no layers\.0\.mlp_act; layer 0 has: resid_pre.*resid_post"):
        tt.generate("any", ["a"], steering=steering, backend="mock", max_tokens=1)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with (
        tt.TraceWriter(tmp_path / "t") as first,
        pytest.raises(TraceLockedError, match=r"is being written by process \d+"),
    ):
        first.write("x", torch.ones(1))
        first.flush()
        tt.TraceWriter(tmp_path / "t", resume=True)


def test_a_full_disk_ends_a_capture_with_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = LocalStore.put

    def put(self: LocalStore, name: str, chunks: Any) -> int:
        if "tensors/" in name:
            monkeypatch.setattr(LocalStore, "_fill", full)
        return real(self, name, chunks)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalStore, "put", put)
    assert main(["capture", "a", "--out", str(tmp_path / "t"), "--max-tokens", "1"]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "bytes are free; free some" in error
    assert error.count("\n") == 1


def test_a_missing_extra_gives_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "v.gguf").write_bytes(b"GGUF")
    with pytest.raises(PrerequisiteError, match=r"which is not installed: pip install 'trimtab\[gguf\]'$"):
        tt.load_direction(tmp_path / "v.gguf", layer=1)
    assert main(["generate", "a", "--vector", str(tmp_path / "v.gguf"), "--layer", "1", "--cap", "1"]) == 2
    assert capsys.readouterr().err.count("pip install") == 1


def test_a_testbed_vector_does_not_fit_another_model() -> None:
    steer = tt.Steer(vector="testbed:animal", cap=1.0)
    width = len(testbed.direction("animal").vector)
    with pytest.raises(tt.TrimtabError, match=rf"width {width} and the model has hidden size 16"):
        tt.generate("any", ["a"], steering=steer, backend="mock", max_tokens=1)
