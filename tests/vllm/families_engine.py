"""Run in a process of its own: each engine of a plan runs its requests; tokens and recorded rows go into files.

The plan is a JSON list of engines: `name`, `model`, `settings` (ours), `engine` (vLLM's), and `requests`: prompt,
steering file or null, sites, tokens to make, tokens to follow or null. What came of an engine is NAME.json and
NAME.safetensors beside the plan; an engine that failed leaves its traceback in NAME.json.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from vllm import LLM
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from trimtab.backends.vllm import attach
from trimtab.steering import Steering

MAX_LENGTH = 256


def run(one: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    llm = LLM(
        one["model"],
        max_model_len=MAX_LENGTH,
        max_num_seqs=16,
        seed=0,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        additional_config={"trimtab": one["settings"]},
        **one["engine"],
    )
    client = attach(llm)
    params = [
        client.params(
            Steering.load(asked["steering"]) if asked["steering"] else None,
            sites=asked["sites"],
            forced=asked["forced"],
            temperature=0,
            max_tokens=asked["tokens"],
            ignore_eos=True,
            detokenize=False,
        )
        for asked in one["requests"]
    ]
    prompts = [{"prompt_token_ids": asked["prompt"]} for asked in one["requests"]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    reports = [report for (report,) in client.collect(params)]
    rows = {
        f"{number}/{held.site}": held.rows.contiguous()
        for number, report in enumerate(reports)
        for held in report.captured
    }
    document = {
        "family": client.info.family,
        "sites": [str(site) for site in client.info.widths],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "positions": [{str(held.site): held.positions for held in report.captured} for report in reports],
        "ops": [[[op.site, op.op, op.rows, op.selected, op.clamped] for op in report.ops] for report in reports],
    }
    return document, rows


def main() -> None:
    plan = Path(sys.argv[1])
    for one in json.loads(plan.read_text()):
        rows: dict[str, torch.Tensor] = {}
        try:
            document, rows = run(one)
        except Exception:
            document = {"error": traceback.format_exc()}
        gc.collect()
        cleanup_dist_env_and_memory()
        safetensors.torch.save_file(rows, plan.with_name(f"{one['name']}.safetensors"))
        plan.with_name(f"{one['name']}.json").write_text(json.dumps(document))


main()
