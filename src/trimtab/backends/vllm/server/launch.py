"""vLLM's own OpenAI-compatible server, started in this process with steering."""

from __future__ import annotations

import contextlib
import difflib
import json
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab import testbed
from trimtab._base.optional import require
from trimtab.backends.vllm.asynchronous import Workers
from trimtab.backends.vllm.config import DEFAULT_SITES, KEY, PluginConfig, Policy, Storage
from trimtab.backends.vllm.liveness import dead
from trimtab.backends.vllm.plugin import check_version, log_as_vllm_does
from trimtab.backends.vllm.refused import listening
from trimtab.backends.vllm.server.admin import Admin
from trimtab.backends.vllm.server.desk import Desk
from trimtab.backends.vllm.server.engine import install
from trimtab.backends.vllm.server.metrics import Metrics
from trimtab.backends.vllm.server.middleware import SteeringMiddleware
from trimtab.backends.vllm.server.store import Store
from trimtab.backends.vllm.sizes import Sizes
from trimtab.errors import BackendError, InputError, TrimtabError

_OURS = {
    "model": "the model as the first argument",
    "host": "--host",
    "port": "--port",
    "dtype": "--dtype",
    "additional_config": "--sites, --max-steering, --ops-per-site, --directions-per-op, --keys-per-steering, "
    "--storage, --when-full and --max-payload-bytes",
}
_ELSEWHERE = ("api_server_count", "headless", "grpc", "uds", "config")
"""Options that start another kind of server."""
_TOGETHER = 2
"""Steerings of the directory that one request can name, whichever they are, where no sizes are given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """How a server runs."""

    steering: Path
    """Directory of steering files."""
    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 8000
    """Port to listen at."""
    dtype: str = "auto"
    """The model's dtype; "auto" takes that of its files."""
    admin_key: str | None = field(default=None, repr=False)
    """Who knows it may upload and remove steerings; None: nobody may."""
    sites: tuple[str, ...] = ()
    """Site patterns that can be steered; none: layers.*.resid_post, and those of the files."""
    max_steering: int = 64
    """Distinct steerings that can act in one step."""
    ops_per_site: int | None = None
    """Ops that one request can have at one site; None: room for any two of the files, and for two in any case."""
    directions_per_op: int | None = None
    """Directions that one op can have; None: what the files need."""
    keys_per_steering: int | None = None
    """Distinct pairs of positions and gain of one request; None: room for any two of the files, and for four anyway."""
    storage: Storage = "float32"
    """Dtype that the engine stores directions in."""
    when_full: Policy = "wait"
    """What a request meets when `max_steering` others are active: it waits, or it is refused."""
    max_payload_bytes: int = 1 << 30
    """Largest steering that the engine takes, all that one request names together."""
    max_strength: float = 100.0
    """Largest magnitude of a strength."""
    max_upload_bytes: int = 64 << 20
    """Largest steering file that an upload takes."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Other options of `vllm serve`, by their names with underscores."""

    def __post_init__(self) -> None:
        if self.admin_key is not None and (not self.admin_key or not self.admin_key.isascii()):
            raise InputError(
                "the admin key is empty or not ASCII; give some characters, or none at all to forbid changes"
            )
        if not 0 < self.max_strength < float("inf"):
            raise InputError(f"max_strength={self.max_strength:g}: a finite number above 0 was expected")
        if self.max_upload_bytes < 1:
            raise InputError(f"max_upload_bytes={self.max_upload_bytes}: at least 1 was expected")
        if not 0 <= self.port < 65536:
            raise InputError(f"port={self.port}: a number from 0 to 65535 was expected")
        for key in self.engine:
            if key in _OURS:
                raise InputError(f"--engine {key}=...: give {_OURS[key]} instead")
            if key in _ELSEWHERE:
                raise InputError(f"--engine {key}=...: steering is served by one process over HTTP; leave it out")

    def plugin(self, store: Store) -> dict[str, Any]:
        """Return the plugin's part of `additional_config`."""
        sites = self.sites or tuple(
            dict.fromkeys((*DEFAULT_SITES, *(site for one in store.listed() for site in one.steering.sites)))
        )
        least, needed = PluginConfig(), Sizes.of([one.steering for one in store.listed()], together=_TOGETHER)
        sizes = {
            name: max(size, getattr(least, name)) if getattr(self, name) is None else getattr(self, name)
            for name, size in needed._asdict().items()
        }
        same = ("max_steering", "storage", "when_full", "max_payload_bytes")
        given = {"sites": list(sites), **sizes, **{name: getattr(self, name) for name in same}}
        PluginConfig.of(given)
        return given


def serve(model: str, config: ServeConfig) -> None:
    """Serve a model until the process is told to end.

    Args:
        model: a directory, a hub id, or "testbed" for the embedded model.
        config: how.

    Raises:
        PrerequisiteError: vLLM is missing, or of a release that is not tested.
        InputError: options or steering files that cannot be used.
        TrimtabError: what the plugin refuses in the processes of the engine.
        BackendError: the engine does not start, or dies.
    """
    store = Store(config.steering)
    plugin = config.plugin(store)
    _vllm("vllm")
    check_version()
    _vllm("vllm.entrypoints.serve.utils.api_utils").cli_env_setup()
    args = _arguments(model, config, plugin)
    with listening() as refusal:
        try:
            _vllm("uvloop").run(_run(args, config, store))
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, TrimtabError):
                raise
            raise refusal() or BackendError(f"the server of {model} did not start or ended: {error}") from error


def _arguments(model: str, config: ServeConfig, plugin: Mapping[str, Any]) -> Any:
    """Return vLLM's own arguments."""
    cli_args = _vllm("vllm.entrypoints.launchers.cli_args")
    stock: Any = _vllm("vllm.utils.argparse_utils").FlexibleArgumentParser

    class Parser(stock):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            raise InputError(f"vLLM does not take these options: {message}")

    path, engine = model, dict(config.engine)
    if model == "testbed":
        path = str(testbed.path())
        engine.setdefault("served_model_name", "testbed")
    parser = cli_args.make_arg_parser(Parser(prog="trimtab serve"))
    words = ["--host", config.host, "--port", str(config.port), "--dtype", config.dtype]
    words += ["--additional-config", json.dumps({KEY: plugin})]
    for key, value in engine.items():
        words += _words(parser, key, str(value))
    args = parser.parse_args([path, *words])
    args.model = args.model_tag
    try:
        cli_args.validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise InputError(f"vLLM does not take these options: {error}") from error
    return args


def _words(parser: Any, key: str, value: str) -> list[str]:
    """Return one option as `vllm serve` takes it; a switch is given as true or false."""
    known = {action.dest: action for action in parser._actions if action.option_strings}
    action = known.get(key)
    if action is None:
        near = ", ".join(difflib.get_close_matches(key, known, n=3)) or "see vllm serve --help=all"
        raise InputError(f"--engine {key}={value}: vLLM has no such option; nearest: {near}")
    if action.nargs != 0:
        return [action.option_strings[0], value]
    switches = {"true": "--", "1": "--", "false": "--no-", "0": "--no-"}
    switch = f"{switches.get(value.lower(), '')}{key.replace('_', '-')}"
    if switch not in action.option_strings:
        raise InputError(f"--engine {key}={value}: true or false was expected")
    return [switch]


async def _run(args: Any, config: ServeConfig, store: Store) -> None:
    entry = _vllm("vllm.entrypoints.launchers.api_server.entry")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until uvicorn runs, and sets its own
    address, sock = entry.setup_server(args, reuse_port=False)
    try:
        async with entry.build_async_engine_client(args) as engine:
            log_as_vllm_does()
            workers = Workers(engine)
            client = await workers.attach()
            desk = Desk(workers, client, store, Metrics(), max_strength=config.max_strength, when_full=config.when_full)
            await desk.check_stored()
            install(engine, desk)
            told = _told_to_end(engine)
            with _steered_app(entry, desk, config):
                ending = await entry.build_and_serve(engine, address, sock, args)
            died = engine.errored and not told
        await ending
    finally:
        sock.close()
    if died:
        raise dead()


def _told_to_end(engine: Any) -> list[bool]:
    """Return a list that has an entry as soon as the engine is shut down: a signal has vLLM's server do so."""
    told, stock = list[bool](), engine.shutdown

    def shutdown(*given: Any, **more: Any) -> Any:
        told.append(True)
        return stock(*given, **more)

    engine.shutdown = shutdown
    return told


@contextlib.contextmanager
def _steered_app(entry: Any, desk: Desk, config: ServeConfig) -> Iterator[None]:
    """Have vLLM build its app with our layer inside its own: what it authenticates is authenticated."""
    layer = _vllm("starlette.middleware").Middleware
    stock = entry.build_app

    def build_app(*given: Any, **more: Any) -> Any:
        app = stock(*given, **more)
        admin = Admin(desk, key=config.admin_key, max_bytes=config.max_upload_bytes)

        def models() -> list[str]:
            serving = app.state.openai_serving_models
            return [*(one.name for one in serving.base_model_paths), *serving.lora_requests]

        app.user_middleware.append(layer(SteeringMiddleware, desk=desk, admin=admin, models=models))
        app.middleware_stack = app.build_middleware_stack()  # vLLM has built it already
        return app

    entry.build_app = build_app
    try:
        yield
    finally:
        entry.build_app = stock


def _vllm(module: str) -> Any:
    """Return a module of vLLM, or of what it brings."""
    return require(module, extra="vllm", feature="trimtab serve")
