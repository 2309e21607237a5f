"""Llama: sequential pre-norm blocks, the layout that most families share."""

from __future__ import annotations

from trimtab.architectures._family import DENSE, BlockPaths, Config, Disk, Family, Vllm, attention_biases, base_numerics


def _biased(config: Config) -> tuple[str, ...]:
    return (*attention_biases(config), *(("gate", "up", "down") if config.mlp_bias else ()))


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    block=lambda config: BlockPaths(),
    numerics=base_numerics,
    biased=_biased,
    disk=lambda config: Disk(layers=DENSE),
    vllm=Vllm(architectures=("LlamaForCausalLM",)),
)
