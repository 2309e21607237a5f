"""Claim about training: a step costs little more than a forward pass and a backward pass to the steered layer.

The model is a random Qwen3 of 8 blocks, width 256, float32 on the CPU, one thread; the vector is at the output of
block 3. The baseline is the plainest loop for the same thing: a bare hook that adds a float32 parameter, a forward pass
through the whole model, cross-entropy, a backward pass to the parameter, Adam; on batches that are padded to equal
length and built beforehand. `train` runs its whole way on the same sequences, with everything that it does around the
steps: batching, the check of packing, curves, the unsteered loss it reports and the steering that it returns.

`training_cold` keeps no states, so it shows the cost of the loop itself; `training` is as users run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from _claims import Measured, main, overhead, summary

from trimtab.vectors.train import Engine, TokenSequence, TrainingConfig, TrainingData, train

LAYERS, WIDTH, VOCABULARY = 8, 256, 2048
BLOCK, LENGTH, BATCH, BATCHES, EPOCHS = 3, 64, 4, 4, 3


def make_model() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
    )
    return transformers.Qwen3ForCausalLM(config).eval().requires_grad_(False)


def make_ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (BATCH * BATCHES, LENGTH), generator=torch.Generator().manual_seed(1))


def plain(model: Any, ids: torch.Tensor) -> None:
    """Train the plainest way."""
    vector = torch.zeros(WIDTH, requires_grad=True)
    optimizer = torch.optim.Adam([vector], lr=0.1)
    hook = model.model.layers[BLOCK].register_forward_hook(lambda module, args, output: output + vector)
    try:
        for _ in range(EPOCHS):
            for batch in ids.split(BATCH):
                optimizer.zero_grad()
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                loss.backward()
                optimizer.step()
    finally:
        hook.remove()


def measure(quick: bool) -> Iterator[Measured]:
    torch.set_num_threads(1)
    model, ids = make_model(), make_ids()
    engine = Engine(model)
    rows = tuple(
        TokenSequence(ids=tuple(row), targets=(False, *(True for _ in row[1:])), question=str(number))
        for number, row in enumerate(ids.tolist())
    )
    data = TrainingData(name="random", train=rows)
    pairs = 5 if quick else 15

    def ours(cache_mib: int) -> Callable[[], object]:
        config = TrainingConfig(
            sites=(f"layers.{BLOCK}.resid_post",),
            epochs=EPOCHS,
            batch_size=BATCH,
            learning_rate=0.1,
            cache_mib=cache_mib,
        )
        return lambda: train(engine, data, config)

    for name, cache_mib in (("training", 1024), ("training_cold", 0)):
        found, control = overhead(ours(cache_mib), lambda: plain(model, ids), pairs=pairs)
        yield Measured(name=name, samples=found, control=control, notes=summary(found))


if __name__ == "__main__":
    main(__file__, measure)
