"""A language model as judge, through any OpenAI-compatible endpoint.

The judge reads question and answer, never the variant, in an order that does not follow the variants. Its answers are
kept on disk, so that a run which was cut off goes on where it stopped; what it does not answer is missing, not zero.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trimtab._base import jsonio
from trimtab._base.optional import require
from trimtab._base.progress import progress
from trimtab.errors import BackendError, InputError
from trimtab.evaluate.scorers.base import Mark, Output

RUBRIC = """Rate the answer to the question below on a scale from 0 to 100.

Question:
{question}

Answer:
{answer}

Reply with one whole number from 0 to 100 and nothing else. Reply REFUSAL if the answer declines to answer."""

_SLOT = re.compile(r"\{(question|answer)\}")
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?:\s*/\s*100\b|\s*%)?")
_OBJECT = re.compile(r"\{[^{}]*\}", re.DOTALL)
_GIVE_UP_AFTER = 5
"""Outputs in a row that got no answer at all, after which the others are not asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeConfig:
    """How a judge is asked."""

    model: str
    """Its name at the endpoint."""
    base_url: str | None = None
    """The endpoint, such as http://localhost:8000/v1; None: the environment's OPENAI_BASE_URL, else OpenAI's."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; endpoints of your own need none."""
    rubric: str = RUBRIC
    """What is asked; {question} and {answer} stand for the texts."""
    form: Literal["number", "json"] = "number"
    """"number": one from 0 to 100, or REFUSAL. "json": an object with `key`, or with "refusal": true."""
    key: str = "score"
    """Field of the JSON object that holds the number."""
    low: float = 0.0
    high: float = 100.0
    """Range of the number; anything outside is no answer."""
    repeats: int = 1
    """Times that each output is judged; its value is the mean."""
    temperature: float = 0.0
    max_tokens: int = 256
    requests_per_second: float = 10.0
    workers: int = 8
    """Requests under way at once."""
    attempts: int = 4
    """Times that a request is made when the answer is late, broken or not one."""
    timeout: float = 60.0
    """Seconds until an answer is late."""
    backoff: float = 0.5
    """Seconds before the second attempt; doubled, with jitter, before each further one."""
    cache: str | None = None
    """Directory of the answers; None keeps none."""
    seed: int = 0
    """Of the order in which outputs are judged."""

    def __post_init__(self) -> None:
        if "{answer}" not in self.rubric:
            raise InputError("the judge's rubric has no {answer}; write {question} and {answer} where the texts go")
        if min(self.repeats, self.workers, self.attempts, self.max_tokens) < 1 or self.requests_per_second <= 0:
            raise InputError("judge: repeats, workers, attempts, max_tokens and requests_per_second are all above 0")
        if self.repeats > 1 and self.temperature == 0:
            raise InputError(f"{self.repeats} judgements at temperature 0 are one; give the judge a temperature")
        if not self.low < self.high:
            raise InputError(f"judge: low {self.low:g} is not below high {self.high:g}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer of the judge, read."""

    value: float | None
    """None: a refusal."""


class Judge:
    """Scores outputs by asking a language model.

    Args:
        config: whom and how to ask.
        label: name of the score.

    Raises:
        PrerequisiteError: the extra `judge` is not installed.
    """

    def __init__(self, config: JudgeConfig, *, label: str = "judge") -> None:
        self.config, self.name = config, label
        openai: Any = require("openai", extra="judge", feature="an LLM judge")
        require("tenacity", extra="judge", feature="an LLM judge")
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=config.base_url,
            api_key=os.environ.get(config.api_key_env) or "none",
            timeout=config.timeout,
            max_retries=0,
        )
        self._gate = _Gate(config.requests_per_second)
        self._silent = 0
        self._lock = threading.Lock()

    def score(self, outputs: Sequence[Output]) -> list[Mark]:
        """Return one mark for each output, judged in an order of its own.

        Raises:
            BackendError: the endpoint refuses every request: the key, the model's name, or the request itself.
        """
        order = list(range(len(outputs)))
        random.Random(self.config.seed).shuffle(order)
        self._silent = 0
        marks: dict[int, Mark] = {}
        with (
            progress(f"ask {self.config.model}", len(outputs)) as bar,
            self._cache() as cache,
            ThreadPoolExecutor(self.config.workers) as pool,
        ):
            asked = {index: pool.submit(self._mark, outputs[index], cache) for index in order}
            try:
                for index, future in asked.items():
                    marks[index] = future.result()
                    bar.advance()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [marks[index] for index in range(len(outputs))]

    def _cache(self) -> AbstractContextManager[Any]:
        if self.config.cache is None:
            return nullcontext({})
        diskcache: Any = require("diskcache", extra="judge", feature="keeping a judge's answers")
        Path(self.config.cache).mkdir(parents=True, exist_ok=True)
        opened: AbstractContextManager[Any] = diskcache.Cache(self.config.cache, disk=diskcache.JSONDisk)
        return opened

    def _mark(self, output: Output, cache: Any) -> Mark:
        found: list[Verdict] = []
        lost = ""
        for repeat in range(self.config.repeats):
            try:
                found.append(self._verdict(output, repeat, cache))
            except _NoAnswer as error:
                lost = str(error)
        values = [one.value for one in found if one.value is not None]
        refusals = len(found) - len(values)
        if values and refusals <= len(values):
            return Mark(value=sum(values) / len(values))
        if refusals:
            return Mark(value=None, refusal=True, reason="the judge says that it is a refusal")
        return Mark(value=None, reason=lost, retry=True)

    def _verdict(self, output: Output, repeat: int, cache: Any) -> Verdict:
        config = self.config
        text = fill(config.rubric, output)
        key = jsonio.dumps(
            [config.model, config.base_url, text, config.temperature, config.max_tokens, repeat, config.seed]
        )
        kept = cache.get(key)
        if kept is not None:
            verdict = read_verdict(kept, config)
            if verdict is not None:
                return verdict
        with self._lock:
            if self._silent >= _GIVE_UP_AFTER:
                raise _NoAnswer(f"not asked: the judge did not answer {_GIVE_UP_AFTER} times in a row")
        reply, verdict = self._ask(text, repeat)
        cache[key] = reply
        return verdict

    def _ask(self, text: str, repeat: int) -> tuple[str, Verdict]:
        """Ask until there is an answer that can be read, as often as the configuration says."""
        import tenacity

        config = self.config
        wait = tenacity.wait_exponential(multiplier=config.backoff, max=30.0) + tenacity.wait_random(0, config.backoff)
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(config.attempts),
            wait=lambda state: max(wait(state), _asked_to_wait(state)),
            retry=tenacity.retry_if_exception_type(_NoAnswer),
            reraise=True,
        )
        try:
            found: tuple[str, Verdict] = retrying(self._once, text, repeat)
        except _Silence:
            with self._lock:
                self._silent += 1
            raise
        with self._lock:
            self._silent = 0
        return found

    def _once(self, text: str, repeat: int) -> tuple[str, Verdict]:
        config, errors = self.config, self._openai
        self._gate.wait()
        try:
            answer = self._client.chat.completions.create(
                model=config.model,
                messages=[{"role": "user", "content": text}],
                temperature=config.temperature,
                max_tokens=config.max_tokens,
                seed=config.seed + repeat,
            )
            reply = answer.choices[0].message.content
        except errors.APITimeoutError as error:
            raise _Silence(f"no answer within {config.timeout:g} s") from error
        except (errors.RateLimitError, errors.InternalServerError) as error:
            raise _Silence(f"the endpoint answered {error.status_code}", _retry_after(error)) from error
        except errors.APIConnectionError as error:
            raise _Silence("the endpoint cannot be reached, or hung up") from error
        except errors.APIStatusError as error:
            raise BackendError(
                f"the judge {config.model!r} refuses requests ({error.status_code}): "
                f"{' '.join(str(error.message).split())[:200]}; check its name, its key ({config.api_key_env}) and URL"
            ) from error
        except (errors.APIError, ValueError, AttributeError, IndexError, TypeError) as error:
            raise _NoAnswer("the endpoint's answer is not one of a chat completion") from error
        verdict = read_verdict(reply, config) if isinstance(reply, str) else None
        if verdict is None:
            shown = " ".join(str(reply).split())[:60]
            raise _NoAnswer(f"the judge's answer cannot be read: {shown!r}")
        return str(reply), verdict


def fill(rubric: str, output: Output) -> str:
    """Return the rubric with question and answer in place; braces inside of them mean nothing."""
    texts = {"question": output.question, "answer": output.text}
    return _SLOT.sub(lambda found: texts[found[1]], rubric)


def read_verdict(reply: str, config: JudgeConfig) -> Verdict | None:
    """Read an answer: a number in range or REFUSAL, alone or with words around it; None for anything else.

    Two different numbers are no answer: which of them is meant would be a guess.
    """
    text = _THOUGHT.sub("", reply).strip()
    if config.form == "json":
        return _read_json(text, config)
    if re.match(r"\W*REFUSAL\b", text):
        return Verdict(None)
    numbers = {float(re.split(r"\s*[/%]", one)[0]) for one in _NUMBER.findall(text)}
    if len(numbers) != 1:
        return None
    return _in_range(numbers.pop(), config)


def _read_json(text: str, config: JudgeConfig) -> Verdict | None:
    for candidate in (text, *_OBJECT.findall(text)):
        try:
            found = jsonio.loads(candidate)
        except InputError:
            continue
        if not isinstance(found, dict):
            continue
        value = found.get(config.key)
        if found.get("refusal") is True or value == "REFUSAL":
            return Verdict(None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _in_range(float(value), config)
    return None


def _in_range(value: float, config: JudgeConfig) -> Verdict | None:
    return Verdict(value) if config.low <= value <= config.high else None


class _NoAnswer(Exception):
    """Nothing that can be read came back; another attempt may."""

    def __init__(self, text: str, wait: float = 0.0) -> None:
        super().__init__(text)
        self.wait = wait


class _Silence(_NoAnswer):
    """The endpoint itself did not answer."""


def _retry_after(error: Any) -> float:
    try:
        return min(max(float(error.response.headers.get("retry-after", 0)), 0.0), 60.0)
    except (TypeError, ValueError):
        return 0.0


def _asked_to_wait(state: Any) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    return float(getattr(error, "wait", 0.0))


@dataclass(slots=True)
class _Gate:
    """Lets requests pass at a rate, evenly spaced."""

    per_second: float
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self) -> None:
        """Return when it is this request's turn."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + 1 / self.per_second
        time.sleep(max(turn - time.monotonic(), 0.0))
