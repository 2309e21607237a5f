"""`trimtab evaluate stress`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import Dtype
from trimtab.cli.evaluate.score import setting
from trimtab.errors import InputError
from trimtab.results.stress import StressMethod


@Parameter(name="*", group="Test")
@dataclass(frozen=True, kw_only=True, slots=True)
class Test:
    """What is tried."""

    __test__ = False  # not a test, whatever pytest makes of the name

    sizes: Annotated[list[int], Parameter(negative="", alias="--size")] = field(default_factory=list)
    """Examples of each label; repeat for several. Default: 2 4 8 16 32 64."""
    methods: Annotated[list[StressMethod], Parameter(negative="", alias="--method")] = field(default_factory=list)
    """How vectors are made, side by side; repeat for several. Default: mean_difference, also called contrastive."""
    sites: Annotated[list[str], Parameter(negative="", alias="--site")] = field(default_factory=list)
    """Where vectors are made and added, all of these at once. Default: layers.*.resid_post."""
    prompts: Annotated[list[str], Parameter(negative="", alias="--prompt")] = field(default_factory=list)
    """Openings to continue; repeat for several. Default: openings that are no evidence of anything."""
    num_prompts: int = 10
    """How many of the openings."""
    seeds: int = 4
    """Outputs of each prompt and strength, to begin with."""
    max_seeds: int = 12
    """Outputs that may be drawn until the knee's intervals are narrow."""
    max_tokens: int = 50
    """Length of an output."""
    temperature: float = 0.25
    """Of the sampling."""
    unit: Literal["token_norm", "absolute", "vector_norm"] = "token_norm"
    """Of --scale: a part of each token's norm, hidden units, or multiples of the vector's own length."""
    scale: float = 0.1
    """What strength 1 is."""
    controls: int = 100
    """Random directions, steered and scored like the vectors."""
    label_noise: float = 0.0
    """Share of the training pairs whose labels are exchanged."""
    linear: Annotated[bool, Parameter(negative="")] = False
    """Find the knee by a plain scan of the estimates."""
    quick: Annotated[bool, Parameter(negative="")] = False
    """Two attributes, three sizes, few outputs: shows that it runs, proves nothing."""

    def kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments that differ from the defaults."""
        usual = Test()
        return {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if getattr(self, one.name) != getattr(usual, one.name)
        }


@Parameter(name="*", group="Other models")
@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """What vectors are made from and judged by, on a model other than the embedded one."""

    data: Annotated[list[str], Parameter(negative="")] = field(default_factory=list)
    """NAME=SOURCE: contrast data of an attribute, as for vectors extract; repeat for several."""
    delta: Annotated[list[str], Parameter(negative="")] = field(default_factory=list)
    """NAME=SCORER: what gives delta, as for evaluate score; one for every attribute."""
    judge: Annotated[list[str], Parameter(negative="")] = field(default_factory=list)
    """NAME=SCORER: what judges, on other evidence than delta's; one for every attribute."""
    judge_setting: Annotated[list[str], Parameter(negative="")] = field(default_factory=list)
    """KEY=VALUE of scorers that are "judge", such as model=NAME or rubric=@FILE; {attribute} in it is the name."""
    neutral: str | None = None
    """Texts about nothing in particular, for contamination and dual: a .txt file or contrast data."""

    def kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments that were given."""
        named = {name: _named(name, getattr(self, name)) for name in ("data", "delta", "judge")}
        named["judge_settings"] = dict(setting(text, "--judge-setting") for text in self.judge_setting)
        given: dict[str, Any] = {name: value for name, value in named.items() if value}
        return given | ({} if self.neutral is None else {"neutral": self.neutral})


def _named(option: str, texts: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value or name in found:
            raise InputError(f"--{option} {text!r}: NAME=VALUE, each name once, was expected")
        found[name] = value
    return found


def stress(
    attribute: Annotated[list[str] | None, Parameter(negative="")] = None,
    /,
    *,
    out: Path,
    test: Test = Test(),
    attributes: Attributes = Attributes(),
    model: Annotated[str, Parameter(alias="-m")] = "testbed",
    dtype: Dtype = "float32",
    device: str | None = None,
    batch_size: int = 240,
    seed: int = 0,
    html: Path | None = None,
    output: Output = Output(),
) -> int:
    """Make vectors from more and more data, steer with each, and find where more data adds nothing.

    Args:
        attribute: names of --data; on the embedded model its concepts and tones. None: all.
        out: directory of the run. The same command goes on where it stopped.
        test: what is tried.
        attributes: what vectors are made from and judged by, on other models.
        model: a directory, a hub id, or "testbed" for the embedded model.
        dtype: of the model.
        device: where it runs.
        batch_size: outputs that run together.
        seed: of texts, samplers, controls and intervals.
        html: also write the report there.
    """
    kwargs: dict[str, Any] = {"out": out, **test.kwargs(), **attributes.kwargs()}
    usual = (("dtype", dtype, "float32"), ("device", device, None), ("batch_size", batch_size, 240), ("seed", seed, 0))
    kwargs |= {name: value for name, value, default in usual if value != default}
    args = (model, attribute) if attribute else (model,)
    return run(Call(function="trimtab.stress", args=args, kwargs=kwargs), output, html=html)
