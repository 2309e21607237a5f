"""An evaluation of autoencoders as a run would leave it: two families, four sizes, two latents, a precision report."""

from __future__ import annotations

from dataclasses import replace

from trimtab.results.sae_evaluation import (
    DecoderCosines,
    Densities,
    Example,
    LatentExamples,
    MatchedValue,
    Measured,
    PrecisionReport,
    SAEEvaluation,
    SAEScore,
    Splice,
    TensorRange,
)

HOSTILE = "</script><img src=x onerror=alert(1)><b>bold</b>"


def around(value: float, by: float = 0.05) -> Measured:
    return Measured(value=value, low=value * (1 - by), high=value * (1 + by))


def splice(loss: float) -> Splice:
    clean, zero, mean = 1.2, 8.2, 12.5
    return Splice(
        tokens=5995,
        ce_clean=clean,
        ce_sae=clean + loss,
        ce_zero=zero,
        ce_mean=mean,
        delta_ce=around(loss),
        recovered=around(1 - loss / (zero - clean), 0.001),
        recovered_mean=around(1 - loss / (mean - clean), 0.001),
        kl=around(loss * 0.7),
    )


def latents(text: str = "fox") -> tuple[LatentExamples, ...]:
    words = ("the", text, "rested", ".")
    shown = tuple(
        Example(activation=value, text=at, position=7, tokens=words, activations=(0.0, value, 1.0, 0.0), at=1)
        for at, value in enumerate((9.0, 8.5))
    )
    return (
        LatentExamples(latent=17, density=0.15, max=9.0, mean=4.0, examples=shown),
        LatentExamples(latent=300, density=0.0005, max=2.0, mean=2.0, examples=()),
    )


def score(name: str, family: str, l0: float, fvu: float, *, text: str = "fox", dead: int = 32) -> SAEScore:
    counts = tuple([0] * 12 + [dead // 8, 0, 4, 9, 20, 60, 98, 120, 80, 40, 20, 9, 4, 2, 1, 1])
    return SAEScore(
        name=name,
        path=f"runs/{name}",
        family=family,
        architecture=family,
        d_in=128,
        d_sae=512,
        d_out=128,
        fvu=around(fvu),
        l0=around(l0, 0.02),
        cosine=0.988,
        l2_ratio=0.985,
        bias=0.9987,
        densities=Densities(
            edges=tuple(-7 + 0.25 * step for step in range(29)),
            counts=counts,
            quantiles={"0.01": 0.0, "0.5": 0.01, "0.99": 0.3},
            dead=dead,
            dead_share=dead / 512,
            dead_below=5e-4,
            always=1,
        ),
        decoder=DecoderCosines(
            edges=tuple(round(0.05 * step, 2) for step in range(21)),
            counts=(0, 0, 0, 5, 60, 124, 125, 80, 40, 30, 20, 10, 9, 5, 2, 1, 1, 0, 0, 0),
            latents=512,
            median=0.37,
            p95=0.6,
            twins=0.002,
        ),
        splice=splice(fvu / 4),
        latents=latents(text),
    )


def precision(dtype: str = "float16") -> PrecisionReport:
    figures = {
        "x": ("input", 5e-6, 1.0, 5.0, 0.0, 0.0),
        "b_enc": ("weight", 0.0, 0.0, 0.0, 0.0, 0.0),
        "grad b_dec": ("gradient", 0.2, 10.0, 9e4, 0.0, 0.02),
        "v W_enc": ("moment", 3e-15, 2.6e-5, 1.7e-3, 0.146, 0.0),
    }
    return PrecisionReport(
        passed=False,
        reason="grad b_dec overflows",
        architecture="jumprelu",
        d_in=128,
        d_sae=4096,
        d_out=128,
        dtype=dtype,
        compute=dtype,
        batches=4,
        batch_size=4096,
        scales={"s": 8.0, "b_e": 64.0, "b_d": 64.0, "c": 2.0**-12, "g": 1024.0},
        recommended_g=64.0,
        tensors=tuple(
            TensorRange(
                name=name, role=role, dtype=dtype, count=1000, rms=rms, absmin=low, absmax=high,
                zeros=1.0 if high == 0 else 0.0, underflow=under, subnormal=0.1, overflow=over,
            )
            for name, (role, low, rms, high, under, over) in figures.items()
        ),
        warnings=("v W_enc: 14.6 % of it rounds to 0 in float16",),
    )  # fmt: skip


def evaluation(text: str = "fox") -> SAEEvaluation:
    """Everything that a page can show."""
    scores = (
        score("top-16", "topk", 16, 0.02, text=text),
        score("top-32", "topk", 32, 0.016, dead=0),
        score("jump-20", "jumprelu, fp32/bf16", 20.8, 0.0179),
        score("jump-40", text if text != "fox" else "jumprelu, fp32/bf16", 41.6, 0.0145),
    )
    return SAEEvaluation(
        model="testbed",
        model_digest="xxh3:full:f45739d5",
        model_dtype="float32",
        site="layers.4.resid_post",
        target_site="layers.4.resid_post",
        data="testbed, from text 4096 on",
        data_digest="xxh3:1085b21c",
        texts=55,
        tokens=6050,
        left_out={"first token of a text that begins every text": 55},
        seed=0,
        scores=scores,
        matched=(
            MatchedValue(family="topk", l0=20.8, fvu=0.0185, recovered=0.9991, kl=0.003),
            MatchedValue(family="jumprelu, fp32/bf16", l0=20.8, fvu=0.0179, recovered=0.9992, kl=0.0031),
        ),
        precision=(precision(),),
        path="runs/eval",
        warnings=("one thing to know",),
    )


def bare() -> SAEEvaluation:
    """One autoencoder on a tensor: no model, no tokens, no curve."""
    alone = replace(score("only", "jumprelu", 30, 0.05), splice=None, latents=())
    return replace(
        evaluation(), model="", model_digest="", model_dtype="", scores=(alone,), matched=(), precision=(), warnings=(),
        left_out={}, path="", data="a tensor of 300 rows",
    )  # fmt: skip
