"""The LLM judge against a real server: vLLM with a small random model whose vocabulary is the numbers from 0 to 100.

What it answers is no judgement; that every verdict is the server's own answer is what is tested, against the same model
run by Hugging Face.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.vllm import _engine as engine
from trimtab.evaluate import Judge, JudgeConfig
from trimtab.evaluate.scorers import Output
from trimtab.evaluate.scorers.judge import fill, read_verdict
from trimtab.steering import Add, Steering

pytestmark = [
    *engine.MARKS,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed: make test does it"),
]
START_SECONDS = 500
RUBRIC = "{question} 100 {answer}"
OUTPUTS = [Output(question=f"{number} {3 * number}", text=f"{7 * number % 100} {number} 50") for number in range(24)]


def numbers_tokenizer() -> Any:
    """One token for every number from 0 to 100, and one for a refusal."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *map(str, range(101)), "REFUSAL"]
    tokens += [f"<reserved_{index}>" for index in range(128 - len(tokens))]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    made.chat_template = "<bos> {% for message in messages %}{{ message['content'] }} {% endfor %}0"
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(engine.save("qwen3", tmp_path_factory.mktemp("model") / "numbers"))
    numbers_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    stored = folder / "steerings"
    stored.mkdir()
    Steering({"layers.1.resid_post": [Add(torch.ones(128), scale=1.0)]}).save(stored / "unused.safetensors")
    argv = [sys.executable, "-m", "trimtab", "serve", str(model), "--steering", str(stored), "--port", str(port)]
    argv += ["--dtype", "float32", "--max-model-len", "64", "--engine", "enforce_eager=true"]
    env = os.environ | engine.SETTINGS | {"VLLM_CACHE_ROOT": str(folder / "cache")}
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING")  # a server keeps its engine in a process of its own
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(argv, env=env, cwd=folder, stdout=stream, stderr=stream)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass  # it does not listen yet
        try:
            process.wait(timeout=0.25)
        except subprocess.TimeoutExpired:
            continue
    pytest.fail(f"the server did not come up:\n{log.read_text()[-3000:]}")


def expected(model: Path, config: JudgeConfig) -> list[float | str | None]:
    """What the same model says when Hugging Face runs it: one greedy token."""
    tokenizer = numbers_tokenizer()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found: list[float | str | None] = []
    for one in OUTPUTS:
        turns = [{"role": "user", "content": fill(config.rubric, one)}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            token = int(loaded(ids).logits[0, -1].argmax())
        verdict = read_verdict(tokenizer.decode([token], skip_special_tokens=True), config)
        found.append(None if verdict is None else "refusal" if verdict.value is None else verdict.value)
    return found


def test_every_verdict_is_the_servers_own_answer(url: str, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tenacity")
    pytest.importorskip("diskcache")
    config = JudgeConfig(
        model=str(model), base_url=url, rubric=RUBRIC, max_tokens=1, requests_per_second=1e4, attempts=1, workers=4,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    marks = Judge(config).score(OUTPUTS)
    found = ["refusal" if mark.refusal else mark.value for mark in marks]
    assert found == expected(model, config)
    assert len({value for value in found if isinstance(value, float)}) > 3  # it does read the texts
    assert all(mark.value is not None or mark.refusal or "cannot be read" in mark.reason for mark in marks)
    # a second judge finds the answers on disk, and asks nobody
    dead = JudgeConfig(**{**_fields(config), "timeout": 0.001})
    again = Judge(dead).score(OUTPUTS)
    assert [mark.value for mark in again if mark.value is not None] == [m.value for m in marks if m.value is not None]


def _fields(config: JudgeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_a_name_that_the_server_does_not_know_is_refused_in_one_line(url: str) -> None:
    from trimtab.errors import BackendError

    config = JudgeConfig(model="somebody", base_url=url, rubric=RUBRIC, max_tokens=1, attempts=1)
    with pytest.raises(BackendError, match=r"'somebody' refuses requests \(404\)"):
        Judge(config).score(OUTPUTS[:2])
