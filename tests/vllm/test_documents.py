"""What docs/vllm.md shows runs as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm")]

TEXT = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def test_the_program_runs(tmp_path: Path) -> None:
    (program,) = (text for kind, text in BLOCKS if kind == "python")
    (tmp_path / "steered.py").write_text(program)
    environment = ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_LOGGING_COLOR": "0"}
    done = subprocess.run([sys.executable, "steered.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout + done.stderr
    taken = re.search(r"steering: 6 sites, 64 slots of 2 ops, (\d+\.\d) MiB of buffers on cpu", said)
    assert taken is not None, said[:3000]
    assert taken.start() < said.index("KV cache size"), "buffers are there before vLLM looks how much memory is left"
    assert float(taken[1]) > 6 * 64 * 2 * 128 * 4 / 2**20, "the directions alone take as much"
    assert "('0:Add', 15)" in done.stdout
    assert "torch.Size([15, 128])" in done.stdout


@pytest.mark.full
def test_the_commands_run_in_their_order(tmp_path: Path) -> None:
    lines = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.startswith("trimtab")]
    assert len(lines) >= 2
    for line in lines:
        done = subprocess.run(shlex.split(line), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode in (0, 1), f"{line}\n{done.stdout}\n{done.stderr[-3000:]}"
        assert "vllm_bf16" in done.stdout
