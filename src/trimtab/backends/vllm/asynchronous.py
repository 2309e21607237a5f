"""The client of an `AsyncLLM`: its workers are asked without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from trimtab import errors
from trimtab.backends.vllm import wire
from trimtab.backends.vllm.client import Client, Info, attach
from trimtab.backends.vllm.liveness import unanswered
from trimtab.backends.vllm.plugin import RPC
from trimtab.backends.vllm.reports import Report
from trimtab.steering import Steering


class Workers:
    """The workers of an `AsyncLLM`, asked from its event loop."""

    def __init__(self, engine: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self.vllm_config, self.engine_core = engine.vllm_config, engine.engine_core

    async def ask(self, verb: str, payload: bytes = b"") -> list[dict[str, Any]]:
        """Return what every worker answers.

        Raises:
            TrimtabError: as the worker refuses it.
            BackendError: the engine has died.
        """
        try:
            raw = await self._all(RPC, (verb, payload))
        except errors.TrimtabError:
            raise
        except Exception as error:
            raise unanswered(self, verb, error) from error
        answers: list[dict[str, Any]] = [wire.from_bytes(bytes(one)) for one in raw]
        for one in answers:
            if "error" in one:
                raise getattr(errors, one["error"], errors.BackendError)(one["message"])
        return answers

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> Any:
        """Ask, and wait; for the synchronous client, in a thread of its own."""
        return asyncio.run_coroutine_threadsafe(self._all(method, args), self._loop).result()

    async def _all(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        """Return what the workers of every engine answer; `AsyncLLM.collective_rpc` gives those of the first one."""
        engines = await self.engine_core.call_utility_all_async("collective_rpc", method, None, args, None)
        return [one for answers in engines for one in answers]

    async def attach(self) -> Client:
        """Return the client of these workers; its methods are to be called outside the event loop."""
        return await asyncio.to_thread(attach, self)


class AsyncClient:
    """What `Client` is for a `vllm.LLM`, for an `AsyncLLM`; see `attach_async`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def info(self) -> Info:
        """What the engine says of itself."""
        return self._client.info

    async def register(self, steering: Steering, name: str = "") -> str:
        """Have every worker know a steering, and return its digest; as `Client.register`."""
        return await asyncio.to_thread(self._client.register, steering, name)

    async def params(self, steering: Steering | str | None = None, **settings: Any) -> Any:
        """Return vLLM's `SamplingParams` for one request; as `Client.params`."""
        return await asyncio.to_thread(self._client.params, steering, **settings)

    async def collect(self, params: Iterable[Any]) -> list[list[Report]]:
        """Bring home what finished requests left; as `Client.collect`."""
        return await asyncio.to_thread(self._client.collect, list(params))

    async def discard(self, params: Iterable[Any]) -> None:
        """Let go of what requests left, or will leave; as `Client.discard`."""
        await asyncio.to_thread(self._client.discard, list(params))

    async def stats(self) -> list[dict[str, Any]]:
        """Return what each worker holds, in numbers."""
        return await asyncio.to_thread(self._client.stats)


async def attach_async(engine: Any) -> AsyncClient:
    """Bind to an `AsyncLLM` that was started with steering; call it inside the event loop that runs the engine.

    Raises:
        BackendError: the engine was started without it; the message says how to start it.
    """
    return AsyncClient(await Workers(engine).attach())
