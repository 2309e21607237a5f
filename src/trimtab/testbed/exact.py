"""The exact probability of grammar text: a forward recursion over everything the text leaves open.

What a reader of a prefix does not know is the topic, the tone and, at times, which sentence pattern it is in. Given the
prefix the three are independent (a noun depends on the topic alone, a toned word on the tone alone), so three small
posteriors are the whole state, and the probability of the next token is exact. A model that has learned the grammar
cannot do better than these probabilities: their mean surprisal is the least loss there is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from trimtab.errors import InputError
from trimtab.testbed import lexicon, process
from trimtab.testbed.lexicon import BOS, CONCEPTS, EOS, PATTERNS, ROLE_MARKS, TONES, Mode

_State = str | tuple[int, int]
_MARK_MODES: Mapping[str, Mode] = {ROLE_MARKS["user"]: "user", ROLE_MARKS["assistant"]: "assistant"}


class Reader:
    """Reads a document token by token and knows the exact distribution of the next one."""

    def __init__(self) -> None:
        self.topic: dict[str, float] = dict.fromkeys(CONCEPTS, 1 / len(CONCEPTS))
        """P(topic | what was read)."""
        self.tone: dict[str, float] = dict.fromkeys(TONES, 1 / len(TONES))
        """P(tone | what was read)."""
        self._last: str | None = None
        self._previous: int | None = None
        self._mode: Mode = "prose"
        self._states: dict[_State, float] = {BOS: 1.0}

    def distribution(self) -> dict[str, float]:
        """P(next token | what was read), tokens that cannot come left out; empty after the end of prose."""
        found: dict[str, float] = {}
        for state, weight in self._states.items():
            for token, share in self._emissions(_symbol(state)).items():
                if share > 0:
                    found[token] = found.get(token, 0.0) + weight * share
        return found

    def read(self, token: str) -> float:
        """Take the next token and return the probability it had.

        Raises:
            InputError: the grammar cannot write this token here; the message lists some that it could.
        """
        weights = {
            state: weight * self._emissions(_symbol(state)).get(token, 0.0) for state, weight in self._states.items()
        }
        total = math.fsum(weights.values())
        if total <= 0:
            expected = ", ".join(sorted(self.distribution())[:6]) or "nothing: the document has ended"
            raise InputError(f"the grammar cannot write {token!r} here; it could write {expected}")
        self._learn(token)
        following: dict[_State, float] = {}
        for state, weight in weights.items():
            if weight > 0:
                for successor, share in self._successors(state, token).items():
                    following[successor] = following.get(successor, 0.0) + weight / total * share
        self._states = following
        return total

    def _emissions(self, symbol: str) -> Mapping[str, float]:
        if symbol not in lexicon.SLOTS:
            return {symbol: 1.0}
        if symbol == "<N>":
            kinds = self._mixture(symbol, self.topic)
        elif symbol in ("<A>", "<D>"):
            kinds = self._mixture(symbol, self.tone)
        elif symbol == "<V>":
            assert self._last is not None, "a pattern has a verb before its first noun"
            return process.word_shares(symbol, lexicon.NOUN_CONCEPT[self._last], self._last)
        else:
            return process.word_shares(symbol, "", self._last)
        return {
            word: mass * share
            for kind, mass in kinds.items()
            for word, share in process.word_shares(symbol, kind, self._last).items()
        }

    @staticmethod
    def _mixture(symbol: str, posterior: Mapping[str, float]) -> dict[str, float]:
        mixed = dict.fromkeys(posterior, 0.0)
        for latent, mass in posterior.items():
            for kind, share in process.kind_shares(symbol, latent).items():
                mixed[kind] += mass * share
        return mixed

    def _learn(self, token: str) -> None:
        if token in lexicon.OPEN_WORDS:
            self._last = token
        if token in lexicon.NOUN_CONCEPT:
            _update(self.topic, "<N>", lexicon.NOUN_CONCEPT[token])
        elif token in lexicon.WORD_TONE:
            _update(self.tone, "<A>", lexicon.WORD_TONE[token])
        elif token in lexicon.ENDS:
            moved = dict.fromkeys(self.topic, 0.0)
            for topic, mass in self.topic.items():
                for following, share in process.topic_moves(topic).items():
                    moved[following] += mass * share
            self.topic = moved

    def _successors(self, state: _State, token: str) -> dict[_State, float]:
        if isinstance(state, str):
            return self._after_mark(state)
        pattern, place = state
        if place + 1 < len(PATTERNS[pattern]):
            return {(pattern, place + 1): 1.0}
        self._previous = pattern
        end = process.END_SHARE[self._mode]
        return {EOS: end, **self._beginnings(1 - end)}

    def _after_mark(self, mark: str) -> dict[_State, float]:
        if mark == BOS:
            return {ROLE_MARKS["user"]: process.CHAT_SHARE, **self._beginnings(1 - process.CHAT_SHARE)}
        if mark == EOS:
            follower = {"user": ROLE_MARKS["assistant"], "assistant": ROLE_MARKS["user"]}.get(self._mode)
            return {follower: 1.0} if follower else {}
        self._mode = _MARK_MODES[mark]
        return dict(self._beginnings(1.0))

    def _beginnings(self, mass: float) -> dict[_State, float]:
        shares = process.pattern_shares(self._mode, self._previous)
        return {(pattern, 0): mass * share for pattern, share in shares.items()}


def surprisals(tokens: Sequence[str]) -> tuple[float, ...]:
    """Return -ln P(token | the tokens before it) in nats for every token of a document after its first.

    Args:
        tokens: a document as `grammar.document` makes it, from the beginning-of-text token on; it may be cut anywhere.

    Raises:
        InputError: the grammar cannot have written it.
    """
    reader = Reader()
    return tuple(-math.log(reader.read(token)) for token in tokens)[1:]


def conditional_entropies(tokens: Sequence[str]) -> tuple[float, ...]:
    """Return the exact entropy in nats of every next-token distribution, at the places that `surprisals` measures.

    Its mean over sampled documents estimates the same entropy rate with less noise than the surprisals do.

    Raises:
        InputError: the grammar cannot have written the tokens.
    """
    reader = Reader()
    found = []
    for token in tokens:
        found.append(entropy(reader.distribution().values()))
        reader.read(token)
    return tuple(found)[1:]


def entropy(probabilities: Iterable[float]) -> float:
    """Shannon entropy `-sum p ln p` in nats; 0 for a certain outcome."""
    return -math.fsum(p * math.log(p) for p in probabilities if p > 0)


def _symbol(state: _State) -> str:
    return state if isinstance(state, str) else PATTERNS[state[0]][state[1]]


def _update(posterior: dict[str, float], slot: str, kind: str) -> None:
    weighted = {latent: mass * process.kind_shares(slot, latent)[kind] for latent, mass in posterior.items()}
    total = math.fsum(weighted.values())
    posterior.update({latent: mass / total for latent, mass in weighted.items()})
