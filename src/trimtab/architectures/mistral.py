"""Mistral: Llama's blocks with one attention window for all layers."""

from __future__ import annotations

from trimtab.architectures._family import DENSE, BlockPaths, Disk, Family, Vllm, base_numerics, no_biases

FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    text_paths=("model", "model.language_model", ""),
    block=lambda config: BlockPaths(),
    numerics=base_numerics,
    biased=no_biases,
    disk=lambda config: Disk(layers=DENSE),
    vllm=Vllm(architectures=("MistralForCausalLM",)),
)
