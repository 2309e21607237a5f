"""Llama: sequential pre-norm blocks, the layout that most families share."""

from __future__ import annotations

from trimtab.architectures._family import DENSE, BlockPaths, Disk, Family, Vllm, base_numerics

FAMILY = Family(
    name="llama",
    model_types=("llama",),
    block=lambda config: BlockPaths(),
    numerics=base_numerics,
    disk=lambda config: Disk(layers=DENSE),
    vllm=Vllm(architectures=("LlamaForCausalLM",)),
)
