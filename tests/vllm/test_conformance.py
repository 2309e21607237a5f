"""The vLLM backend keeps the laws of a backend, in a real engine in a process of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm import _engine as engine
from trimtab.backends import Backend, Request, Sampling, open_backend
from trimtab.errors import VectorError
from trimtab.steering import Add, Steering
from trimtab.testing.conformance import BackendConformance
from trimtab.testing.models import tiny, tiny_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm"), pytest.mark.filterwarnings("ignore")]


class TestVLLMBackend(BackendConformance):
    ulps_of_a_correction = 1
    names_positions = False

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
        place = tmp_path_factory.mktemp("model")
        _save(place)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
            patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
            backend = open_backend(
                "vllm",
                place,
                dtype="float32",
                sites=["logits", "embed"],
                capture_sites=["layers.*.resid_pre", "layers.*.attn_out", "layers.*.mlp_out"],
                ops_per_site=8,
                engine={"enforce_eager": True, "max_model_len": 256},
            )
            yield backend
            backend.close()

    def test_reductions_in_the_worker_are_those_of_the_rows(self, backend: Any) -> None:
        client, llm = backend._client, backend._llm
        site, width = "layers.1.resid_post", backend.info.hidden_size
        directions = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
        wanted: list[Any] = ["", "mean", "statistics", directions]
        settings = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, "detokenize": False}
        params = [client.params(None, sites=[site], positions="!0:1,all", reduce=one, **settings) for one in wanted]
        llm.generate([{"prompt_token_ids": list(self.ids(6))}] * 4, params, use_tqdm=False)
        rows, mean, statistics, projected = (report[0].captured[0] for report in client.collect(params))
        assert rows.positions == mean.positions == statistics.positions == projected.positions == tuple(range(1, 10))
        wide = rows.rows.double()
        torch.testing.assert_close(mean.rows.double(), wide.mean(0, keepdim=True), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(statistics.rows[1].double(), wide.std(0, correction=0), rtol=1e-4, atol=1e-5)
        assert torch.equal(statistics.rows[2], rows.rows.abs().amax(0))
        torch.testing.assert_close(projected.rows.double(), wide @ directions.double().T, rtol=1e-4, atol=1e-4)
        with pytest.raises(VectorError, match=rf"\[3, 5\].*{width}"):
            client.params(None, sites=[site], reduce=torch.ones(3, 5))

    def test_a_chat_is_steered_as_the_tokens_of_its_template(self, backend: Any) -> None:
        client, llm, tokenizer = backend._client, backend._llm, backend.tokenizer
        drawn = torch.randn(2, backend.info.hidden_size, generator=torch.Generator().manual_seed(1))
        kinds = [None, *(Steering({"layers.1.resid_post": [Add(one, scale=2.0)]}) for one in drawn)]
        chats = [[{"role": "user", "content": text}] for text in ("Who is there?", "Who is there?", "Nobody.")]
        texts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in chats]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        settings = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}

        def params() -> list[Any]:
            return [client.params(one, sites=["layers.1.resid_post"], **settings) for one in kinds]

        chatted, given = params(), params()
        talks = llm.chat(chats, chatted, use_tqdm=False)
        plain = llm.generate([{"prompt_token_ids": one} for one in ids], given, use_tqdm=False)
        assert [list(one.prompt_token_ids) for one in talks] == ids
        made = [list(one.outputs[0].token_ids) for one in talks]
        assert made == [list(one.outputs[0].token_ids) for one in plain]
        assert made[0] != made[1]
        for reports in (client.collect(chatted), client.collect(given)):
            for (report,), steering, prompt in zip(reports, kinds, ids, strict=True):
                rows = len(prompt) + 7
                assert report.digest == (None if steering is None else steering.digest)
                assert [op.rows for op in report.ops] == ([] if steering is None else [rows])
                assert [held.positions for held in report.captured] == [tuple(range(rows))]
        # one conversation, with parameters that vLLM made
        extra = client.extra_args(kinds[1])
        (talk,) = llm.chat(chats[1], engine.sampling(extra_args=extra, **settings), use_tqdm=False)
        assert list(talk.outputs[0].token_ids) == made[1]
        ((report,),) = client.collect([extra])
        assert [op.rows for op in report.ops] == [len(ids[1]) + 7]

    def test_requests_of_a_call_run_together(self, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        calls, stock = [], backend._llm.generate
        monkeypatch.setattr(
            backend._llm,
            "generate",
            lambda listed, *more, **named: (calls.append(len(listed)), stock(listed, *more, **named))[1],
        )
        requests = [Request(prompt=self.ids(5, seed), id=str(seed), max_new_tokens=2) for seed in range(6)]
        assert len(list(backend.generate(requests))) == 6
        assert calls == [6]

    def test_many_seeded_prompts_do_not_end_the_engine(self, backend: Backend) -> None:
        """Together they are longer than one pass; vLLM on the CPU cannot draw after a prompt that was split."""
        sampling = Sampling(temperature=1.0, seed=3)
        requests = [
            Request(prompt=self.ids(200, seed), id=str(seed), max_new_tokens=2, ignore_eos=True, sampling=sampling)
            for seed in range(24)
        ]
        assert [len(one.token_ids) for one in backend.generate(requests)] == [2] * 24


def _save(place: Path) -> None:
    """Write a tiny model as a directory."""
    model: Any = tiny("qwen3")
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
