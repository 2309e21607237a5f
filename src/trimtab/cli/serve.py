"""`trimtab serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from trimtab.cli._options import Engine


def serve(
    model: str,
    *,
    steering: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    admin_key: str | None = None,
    sites: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    max_steering: int = 64,
    ops_per_site: int | None = None,
    directions_per_op: int | None = None,
    keys_per_steering: int | None = None,
    storage: Literal["float32", "bfloat16"] = "float32",
    when_full: Literal["wait", "refuse"] = "wait",
    max_payload_bytes: int = 1 << 30,
    max_strength: float = 100.0,
    max_upload_bytes: int = 64 << 20,
    engine: Engine = Engine(),
) -> int:
    """Serve a model over OpenAI's API, each request with its own steering.

    Args:
        model: a directory, a hub id, or "testbed" for the embedded model.
        steering: directory of steering files; a request names them without their suffix.
        host: address to listen at; the default is reached from this machine alone.
        port: port to listen at.
        dtype: the model's dtype; "auto" takes that of its files.
        admin_key: who sends it may upload and remove steerings; without one nobody may. The variable TRIMTAB_ADMIN_KEY
            keeps it out of the list of processes.
        sites: site patterns that can be steered (default: layers.*.resid_post, and those of the files).
        max_steering: distinct steerings that can act in one step.
        ops_per_site: ops that one request can have at one site, all of its steerings together (default: room for any
            two of the files, and for 2 ops anyway).
        directions_per_op: directions that one op can have (default: what the files need).
        keys_per_steering: distinct pairs of positions and gain that one request can have (default: room for any two
            of the files, and for 4 anyway).
        storage: dtype that directions are stored in; bfloat16 takes half the memory and rounds them.
        when_full: more steerings than max_steering: requests wait for their turn, or are refused.
        max_payload_bytes: largest steering that the engine takes, all that one request names together.
        max_strength: largest magnitude of a strength that a request can ask for.
        max_upload_bytes: largest steering file that an upload takes.
    """
    from trimtab.backends.vllm.server import ServeConfig
    from trimtab.backends.vllm.server import serve as run

    config = ServeConfig(
        steering=steering,
        host=host,
        port=port,
        dtype=dtype,
        admin_key=admin_key if admin_key is not None else os.environ.get("TRIMTAB_ADMIN_KEY"),
        sites=sites,
        max_steering=max_steering,
        ops_per_site=ops_per_site,
        directions_per_op=directions_per_op,
        keys_per_steering=keys_per_steering,
        storage=storage,
        when_full=when_full,
        max_payload_bytes=max_payload_bytes,
        max_strength=max_strength,
        max_upload_bytes=max_upload_bytes,
        engine=engine.kwargs().get("engine", {}),
    )
    run(model, config)
    return 0
