"""`trimtab evaluate score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trimtab._base import jsonio
from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import given, read_prompts
from trimtab.errors import InputError


def score(
    path: Path,
    /,
    *,
    scorer: Annotated[list[str], Parameter(negative="", alias="-s")],
    effects: bool = True,
    retention_file: Path | None = None,
    budget: float = 1.5,
    judge: Annotated[list[str] | None, Parameter(negative="")] = None,
    seed: int = 0,
    device: str | None = None,
    batch_size: int | None = None,
    html: Path | None = None,
    output: Output = Output(),
) -> int:
    """Score the outputs of a rollout run: effect, side effects, dose-response, and the strength that holds up.

    Args:
        path: directory of the rollouts.
        scorer: testbed:ATTRIBUTE, vector:FILE, classifier:DATA.jsonl or judge; repeat for several.
        effects: measure side effects, which needs the unsteered model.
        retention_file: a file with one text a line, on which steering should change nothing.
        budget: most perplexity, as a ratio to the unsteered, at which a strength may be chosen.
        judge: a setting of the judge as KEY=VALUE, such as model=NAME, base_url=URL or rubric=@FILE; repeatable.
        seed: of intervals and splits.
        device: where the unsteered model runs.
        batch_size: texts that run together.
        html: also write the report there.
    """
    kwargs: dict[str, Any] = given(device=device, batch_size=batch_size)
    if not effects:
        kwargs["effects"] = False
    if retention_file is not None:
        kwargs["retention"] = read_prompts((), retention_file)
    kwargs |= {name: one for name, one, usual in (("budget", budget, 1.5), ("seed", seed, 0)) if one != usual}
    if judge:
        kwargs["judge"] = dict(setting(text) for text in judge)
    return run(Call(function="trimtab.evaluate.score", args=(path, scorer), kwargs=kwargs), output, html=html)


def setting(text: str, option: str = "--judge") -> tuple[str, Any]:
    """Return name and value of a judge's setting; `rubric=@FILE` is read.

    Raises:
        InputError: no KEY=VALUE, or a file that cannot be read.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"{option} {text!r}: write KEY=VALUE, such as {option} model=NAME")
    if name == "rubric" and value.startswith("@"):
        try:
            return name, Path(value[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{option} {text!r}: the file cannot be read: {error}") from error
    try:
        number = jsonio.loads(value)
    except InputError:
        return name, value
    return name, number if isinstance(number, (int, float)) and not isinstance(number, bool) else value
