"""A triage made by hand, with every part that a page can show, and a bare one."""

from __future__ import annotations

import math
from dataclasses import replace

from trimtab.results.comparison import Fingerprint, RecordKey
from trimtab.results.triage import (
    Blame,
    Divergence,
    Fix,
    Follower,
    HeatCell,
    Hunk,
    ManifestDifference,
    MicroBatches,
    ModuleCall,
    RowRange,
    RuledOut,
    SourceReference,
    Suspicion,
    TokenStrip,
    Transplanted,
    Triage,
)

HUNK = """@@ -12,3 +12,3 @@
         q, k = self.q(x), self.k(x)
-        scores = q @ k.mT * self.scale
+        scores = q @ k.mT
         return scores.softmax(-1)"""


def _call(layer: int, name: str, came_in: float, went_out: float, status: str) -> ModuleCall:
    return ModuleCall(
        module_path=f"layers.{layer}.{name}",
        module_class=name.title(),
        layer=layer,
        direction="forward",
        phase="fwd_bwd",
        step=3,
        micro_step=0,
        rank=0,
        call_index=0,
        order=10 * layer,
        input_error=came_in,
        output_error=went_out,
        expected=5e-7,
        amplification=went_out / max(came_in, 5e-7),
        status=status,
    )


def triage(hostile: str = "") -> Triage:
    """A triage of 6 layers; `hostile` stands in every text that comes from a run or a repository."""
    key = RecordKey(site=f"module:layers.2.attn{hostile}.output", phase="fwd_bwd", step=3, layer=2)
    sentence = (
        f"layers.2.attn{hostile} (Attention) makes the error (phase fwd_bwd, step 3): it is off by 0.21 of its norm"
    )
    suspicion = Suspicion(kind="scale", line=13, side="removed", code=f"q @ k.mT * self.scale{hostile}")
    hunk = Hunk(
        file=f"pkg/model{hostile}.py",
        old_start=12,
        old_lines=3,
        new_start=12,
        new_lines=3,
        text=HUNK + hostile,
        distance=0,
        suspicions=(suspicion,),
    )
    calls = [_call(layer, "attn", 1e-7, 2e-7, "agrees") for layer in range(2)]
    calls += [replace(_call(2, "attn", 1e-7, 0.21, "made"), module_path=f"layers.2.attn{hostile}")]
    calls += [_call(layer, "mlp", 0.2, 0.1, "carried") for layer in range(2, 6)]
    strips = [TokenStrip(tensor=key.site, errors=(0.0, *(0.2,) * 15), rows_per_cell=1, expected=5e-7)]
    strips += [
        TokenStrip(
            tensor="module:head.output", errors=(1e-7, 0.1, math.inf, *(1e-3,) * 13), rows_per_cell=1, expected=5e-7
        )
    ]
    heat = [
        HeatCell(direction=way, layer=str(layer), tensor=name, error=1e-7 if layer < 2 else 0.1, status="failed")
        for way in ("forward", "backward")
        for layer in range(6)
        for name in (f"attn{hostile}.output", "mlp.output")
    ]
    return Triage(
        passed=False,
        reason=sentence,
        reference=f"runs/a{hostile}",
        candidate="runs/b",
        verdict="calibrated",
        divergence=Divergence(
            key=key,
            direction="forward",
            origin="module",
            module_path=f"layers.2.attn{hostile}",
            module_class="Attention",
            layer=2,
            sentence=sentence,
            input_error=1e-7,
            output_error=0.21,
            expected=5e-7,
            amplification=4.2e5,
            after="module:layers.1.output",
            first_shown=key.text,
            ranks=(1,),
            ranks_agreeing=(0, 2),
            where=RowRange(rows=15, total=16, text="tokens 1-15 of sequence 0"),
            fingerprints=(Fingerprint(kind="attention", detail=f"the first token agrees{hostile}", explained=0.6),),
            reasons=("worst row",),
        ),
        severity="significant",
        likely_cause=f"scores changed{hostile}",
        next_check=f"apply the patch{hostile}",
        calls=tuple(calls),
        calls_left_out=3,
        ruled_out=(RuledOut(what="other inputs", why=f"ids agree{hostile}"),),
        manifest=(
            ManifestDifference(group="precision", key=f"dtype{hostile}", reference="float32", candidate="bfloat16"),
        ),
        micro_batches=MicroBatches(
            diverging=(f"micro-batch 1{hostile}",), agreeing=("micro-batch 0",), shared=("padding",)
        ),
        notes=(f"source: a note{hostile}",),
        source=SourceReference(
            file=f"pkg/model{hostile}.py",
            line=11,
            end=15,
            name="Attention",
            found_by="record",
            revision="abc..def",
            hunks=(hunk,),
            blame=(Blame(commit="a" * 40, date="0", summary=f"Drop it{hostile}", lines=2),),
        ),
        transplant=Transplanted(
            site=key.site,
            agrees=True,
            reason=f"all 9 agree{hostile}",
            followers=(Follower(tensor=f"head{hostile}", before=0.1, after=0.0, status="identical"),),
        ),
        fix=Fix(
            file="pkg/model.py",
            patch=f"--- a/pkg/model.py\n+++ b/pkg/model.py\n{HUNK}{hostile}\n",
            proved=True,
            why="it agrees",
        ),
        heat=tuple(heat),
        strips=tuple(strips),
        pairs=120,
        failing=40,
        warnings=(f"a warning{hostile}",),
    )


def bare() -> Triage:
    """Nothing diverges."""
    return Triage(
        passed=True, reason="nothing diverges: all 3 pairs pass", reference="a", candidate="b", verdict="calibrated"
    )
