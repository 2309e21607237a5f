"""Talk to a steered server.

Start one first, on the embedded model:

    python examples/serve_client.py make steerings
    trimtab serve testbed --steering steerings --dtype float32 --engine enforce_eager=true

then run:

    python examples/serve_client.py ask
"""

from __future__ import annotations

import sys
from pathlib import Path

import trimtab as tt
from trimtab import testbed


def make(directory: Path) -> None:
    """Write two steerings: one adds a direction to the generated rows, one caps another."""
    directory.mkdir(exist_ok=True)
    files = testbed.path() / "directions"
    cheerful = tt.load_direction(files / "cheerful.safetensors")
    gloomy = tt.load_direction(files / "gloomy.safetensors")
    add = tt.Add(cheerful.vector, scale=0.5, unit="token_norm")
    tt.Steering({"layers.3.resid_post": [add]}, positions="generated").save(directory / "cheerful.safetensors")
    tt.Steering({"layers.3.resid_post": [tt.Cap(gloomy.vector, max=0.0)]}).save(directory / "not-gloomy.safetensors")


def ask(base_url: str = "http://127.0.0.1:8000/v1") -> None:
    """Print one answer per steering."""
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key="-")
    for steering in (None, "cheerful", "cheerful:-1", "not-gloomy", "cheerful:2,not-gloomy"):
        extra = {"vllm_xargs": {"trimtab": steering}} if steering else {}
        answer = client.completions.create(
            model="testbed", prompt="The cat was", max_tokens=16, temperature=0, extra_body=extra
        )
        report = (answer.model_extra or {}).get("trimtab", {})
        rows = {one["steering"]: one["rows"] for one in report.get("ops", [])}
        print(f"{steering!s:24} {answer.choices[0].text!r} {rows}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[2]))
    else:
        ask(*sys.argv[2:])
