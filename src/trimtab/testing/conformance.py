"""The laws of a backend as tests: subclass `BackendConformance`, give a fixture, and let pytest run it.

    class TestMine(BackendConformance):
        @pytest.fixture(scope="class")
        @classmethod
        def backend(cls):
            return open_backend("mine", ...)

Everything is compared with the backend itself on another schedule; comparisons with an independent implementation are
the business of the backend's own tests.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.backends import Backend, Capture, Generation, Message, Request, Sampling, num_rows, perplexity
from trimtab.errors import (
    InputError,
    NonFiniteError,
    PositionError,
    SiteError,
    TrimtabError,
    UnfiredError,
    VectorError,
)
from trimtab.numerics import tolerances
from trimtab.sites import Site
from trimtab.steering import Ablate, Add, Cap, Op, Steering
from trimtab.testing.memory import MemoryWriter

__all__ = ["BackendConformance", "MemoryWriter", "direction", "rel_l2"]

RESID = "layers.{layer}.resid_post"


def direction(size: int, seed: int = 0) -> Tensor:
    """Return a seeded unit vector."""
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vector, dim=0)


def rel_l2(a: Tensor, b: Tensor) -> float:
    """Return the largest relative L2 difference of the rows of `a` from those of `b`."""
    a, b = a.double(), b.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)).max())


class BackendConformance:
    """What every backend must do. Give the fixture `backend`; override the attributes where an engine differs."""

    steers_logits = True
    """Whether ops may act at `logits`."""
    ulps_of_a_correction = 0
    """How far a corrected row may be from `round(h + c)`, in ulps of its largest element; an engine that corrects a
    branch of the stream rounds the branch, and then the sum: one."""
    names_positions = True
    """Whether an error about one row says its position."""
    first_id, last_id = 8, 100
    """Range of the token ids that prompts are made of; no special tokens among them."""

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        """Return the backend under test."""
        raise NotImplementedError("give a fixture `backend`")

    # -- helpers

    def ids(self, length: int, seed: int = 0) -> tuple[int, ...]:
        """Return a prompt of seeded token ids."""
        generator = torch.Generator().manual_seed(1000 * seed + length)
        return tuple(torch.randint(self.first_id, self.last_id, (length,), generator=generator).tolist())

    def last_layer(self, backend: Backend) -> str:
        """Return the site of the last block's output."""
        return RESID.format(layer=backend.info.num_layers - 1)

    def bound(self, backend: Backend) -> float:
        """Return how far a row may be from the same row on another schedule, as rel_l2."""
        if backend.info.dtype == "float32":
            return tolerances.decode_vs_forward().rel_l2
        return tolerances.row_rel_l2(backend.info.dtype, backend.info.num_layers)

    def add(
        self, backend: Backend, layer: int = 0, scale: float = 3.0, seed: int = 0, positions: str = "all"
    ) -> Steering:
        """Return a steering that adds a vector after a block."""
        vector = direction(backend.info.hidden_size, seed)
        return Steering({RESID.format(layer=layer): [Add(vector, scale=scale)]}, positions=positions)

    def run(
        self, backend: Backend, requests: Sequence[Request], sites: Sequence[str] = (), **options: Any
    ) -> tuple[list[Generation], MemoryWriter]:
        """Generate with a capture of `sites` into memory."""
        writer = MemoryWriter()
        capture = Capture(
            sites=tuple(sites) or ("layers.*.resid_post", "logits"),
            edit=options.pop("edit", ("after",)),
            positions=options.pop("positions", "all"),
            prompt_logits=options.pop("prompt_logits", False),
        )
        return backend.generate(requests, capture=capture, writer=writer, **options), writer

    # -- rows

    @pytest.mark.parametrize("count", [0, 1, 2, 33])
    def test_rows_law(self, backend: Backend, count: int) -> None:
        """A request has prompt + max(generated - 1, 0) rows, in order, and `logits` has one per generated token."""
        requests = [
            Request(
                prompt=self.ids(length), id=f"p{length}", prompt_index=length, max_new_tokens=count, ignore_eos=True
            )
            for length in (1, 2, 7)
        ]
        done, writer = self.run(backend, requests)
        for result, request in zip(done, requests, strict=True):
            length = len(request.prompt)
            rows = length + max(count - 1, 0)
            assert len(result.token_ids) == len(result.logprobs) == count
            assert result.rows == num_rows(length, count) == rows
            for layer in range(backend.info.num_layers):
                places, values = writer.rows(RESID.format(layer=layer), request.id)
                assert places == list(range(rows))
                assert values.shape == (rows, backend.info.hidden_size)
            if count:
                places, values = writer.rows("logits", request.id)
                assert places == list(range(length - 1, length - 1 + count))
                assert values.shape[0] == count
            else:
                assert not writer.edits("logits", request.id)
            tokens = [one for one in writer.tokens if one.request == request.id]
            assert [one.position for one in tokens] == list(range(length + count))
            assert [one.token_id for one in tokens] == [*request.prompt, *result.token_ids]
            assert [one.generated for one in tokens] == [False] * length + [True] * count
            assert [one.logprob for one in tokens][length:] == list(result.logprobs)
            assert {one.prompt for one in tokens} == {length}

    def test_tokens_without_log_probabilities(self, backend: Backend) -> None:
        """Asking for no log-probability changes no token, and nothing of them is made up."""
        requests = [
            Request(prompt=self.ids(5), id=f"r{count}", max_new_tokens=6, ignore_eos=True, logprobs=count)
            for count in (None, 0, 2)
        ]
        (without, chosen, several), writer = self.run(backend, requests)
        assert without.token_ids == chosen.token_ids == several.token_ids
        assert (without.logprobs, without.top, chosen.top) == ((), (), ())
        assert len(chosen.logprobs) == len(several.top) == 6
        assert chosen.logprobs == several.logprobs
        tokens = [one for one in writer.tokens if one.request == "rNone"]
        assert [one.logprob for one in tokens] == [None] * 11

    def test_each_row_equals_the_row_of_one_full_forward(self, backend: Backend) -> None:
        """Decoding with a cache, in a padded batch, gives the rows of one forward pass over the same tokens."""
        requests = [
            Request(prompt=self.ids(length), id=f"p{length}", max_new_tokens=9, ignore_eos=True)
            for length in (1, 4, 13)
        ]
        done, writer = self.run(backend, requests)
        for result in done:
            whole = Request(prompt=(*result.prompt_ids, *result.token_ids[:-1]), id="whole", max_new_tokens=1)
            _, full = self.run(backend, [whole], prompt_logits=True)
            for site in (RESID.format(layer=0), self.last_layer(backend), "logits"):
                places, rows = writer.rows(site, result.id)
                _, expected = full.rows(site, "whole")
                assert rel_l2(rows, expected[places]) <= self.bound(backend), site

    def test_batch_and_solo_agree_whatever_the_padding(self, backend: Backend) -> None:
        """A short prompt beside a long one gives the tokens and rows that it gives alone."""
        requests = [
            Request(prompt=self.ids(length), id=f"p{length}", max_new_tokens=6, ignore_eos=True)
            for length in (1, 3, 17)
        ]
        together, batch = self.run(backend, requests)
        for request, result in zip(requests, together, strict=True):
            (alone,), solo = self.run(backend, [request])
            assert alone.token_ids == result.token_ids
            site = self.last_layer(backend)
            (places, rows), (own, expected) = batch.rows(site, request.id), solo.rows(site, request.id)
            assert places == own
            assert rel_l2(rows, expected) <= self.bound(backend)

    def test_repeating_a_call_changes_no_bit(self, backend: Backend) -> None:
        """The same requests twice: equal tokens, equal bits."""
        requests = [Request(prompt=self.ids(5), max_new_tokens=4), Request(prompt=self.ids(3), max_new_tokens=4)]
        (first, one), (second, two) = self.run(backend, requests), self.run(backend, requests)
        assert first == second
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(one.records, two.records, strict=True))

    @pytest.mark.parametrize(
        ("positions", "expected"),
        [
            ("last_prompt", [4]),
            ("prompt", [0, 1, 2, 3, 4]),
            ("generated", [5, 6, 7]),
            ("response", [4, 5, 6, 7]),
            ("1:3,P+1:P+2", [1, 2, 6]),
            ("-2:", [3, 4, 5, 6, 7]),
            ("all,!0:1,!P:P+1", [1, 2, 3, 4, 6, 7]),
        ],
    )
    def test_captured_positions_are_absolute(self, backend: Backend, positions: str, expected: list[int]) -> None:
        """Positions select the same rows of a request in a padded batch as in its own sequence."""
        requests = [
            Request(prompt=self.ids(5), id="short", max_new_tokens=4, ignore_eos=True),
            Request(prompt=self.ids(11), id="long", max_new_tokens=4, ignore_eos=True),
        ]
        site = self.last_layer(backend)
        _, everything = self.run(backend, requests, [site])
        _, writer = self.run(backend, requests, [site], positions=positions)
        places, rows = writer.rows(site, "short")
        assert places == expected
        assert torch.equal(rows, everything.rows(site, "short")[1][places])

    def test_captured_tokens_are_selected_by_id(self, backend: Backend) -> None:
        """`tokens{...}` selects the rows whose input token is one of the ids."""
        prompt = self.ids(6)
        wanted = [place for place, one in enumerate(prompt) if one == prompt[2]]
        site = self.last_layer(backend)
        request = Request(prompt=prompt, id="r", max_new_tokens=0)
        _, writer = self.run(backend, [request], [site], positions=f"tokens{{{prompt[2]}}}")
        assert writer.rows(site, "r")[0] == wanted

    # -- steering

    def test_two_steerings_in_one_batch_each_equal_their_solo_run(self, backend: Backend) -> None:
        """Every prompt of a batch has its own steering."""
        site = RESID.format(layer=0)
        vector = direction(backend.info.hidden_size, 1)
        steerings = [self.add(backend), Steering({site: [Cap(vector, max=-0.5)]}, positions="generated"), None]
        requests = [
            Request(prompt=self.ids(3 + 2 * i), id=f"r{i}", steering=one, max_new_tokens=6, ignore_eos=True)
            for i, one in enumerate(steerings)
        ]
        together, batch = self.run(backend, requests)
        for request, result in zip(requests, together, strict=True):
            (alone,), solo = self.run(backend, [request])
            assert alone.token_ids == result.token_ids
            assert [(dose.op, dose.rows) for dose in alone.doses] == [(dose.op, dose.rows) for dose in result.doses]
            last = self.last_layer(backend)
            assert rel_l2(batch.rows(last, request.id)[1], solo.rows(last, request.id)[1]) <= self.bound(backend)

    def test_a_steering_that_nobody_holds_any_more_is_let_go_of(self, backend: Backend) -> None:
        """A backend that lives for long does not keep every steering that it was ever given."""
        steering = self.add(backend)
        backend.generate([Request(prompt=self.ids(3), steering=steering, max_new_tokens=2)])
        held = weakref.ref(steering)
        del steering
        gc.collect()
        assert held() is None

    def test_an_unsteered_row_of_a_mixed_batch_keeps_every_bit(self, backend: Backend) -> None:
        """On an equal schedule, another request's steering changes nothing of this one."""
        forced = self.ids(5, seed=9)

        def requests(steering: Steering | None) -> list[Request]:
            return [
                Request(prompt=self.ids(4), id="other", steering=steering, forced_tokens=forced),
                Request(prompt=self.ids(7), id="mine", forced_tokens=forced),
            ]

        plain, without = self.run(backend, requests(None))
        mixed, beside = self.run(backend, requests(self.add(backend)))
        assert mixed[1] == plain[1]
        assert mixed[0].logprobs != plain[0].logprobs
        for site in (RESID.format(layer=0), self.last_layer(backend), "logits"):
            assert torch.equal(beside.rows(site, "mine")[1], without.rows(site, "mine")[1])

    @pytest.mark.parametrize("name", ["add", "cap", "ablate"])
    def test_ops_without_effect_keep_every_bit(self, backend: Backend, name: str) -> None:
        """Adding zero, a cap that is never reached, an ablation that keeps all: bit-identical to no steering."""
        vector = direction(backend.info.hidden_size)
        ops: dict[str, Op] = {
            "add": Add(vector, scale=0.0),
            "cap": Cap(vector, min=-1e4, max=1e4),
            "ablate": Ablate(vector, keep=1.0),
        }
        steering = Steering({"layers.*.resid_post": [ops[name]]})
        forced = self.ids(4, seed=3)
        plain, without = self.run(backend, [Request(prompt=self.ids(5), id="r", forced_tokens=forced)])
        steered, beside = self.run(
            backend, [Request(prompt=self.ids(5), id="r", forced_tokens=forced, steering=steering)]
        )
        assert steered[0].logprobs == plain[0].logprobs
        for site in (self.last_layer(backend), "logits"):
            assert torch.equal(beside.rows(site, "r")[1], without.rows(site, "r")[1])

    def test_rows_before_and_after_differ_by_the_correction(self, backend: Backend) -> None:
        """`after - before` is what the op adds, at the rows it selects, and nothing elsewhere."""
        site = RESID.format(layer=0)
        vector = direction(backend.info.hidden_size)
        steering = Steering({site: [Add(vector, scale=2.0)]}, positions="generated")
        request = Request(prompt=self.ids(4), id="r", steering=steering, max_new_tokens=5, ignore_eos=True)
        plain = Request(prompt=self.ids(4), id="plain", max_new_tokens=5, ignore_eos=True)
        _, writer = self.run(backend, [request, plain], [site], edit=("before", "after"))
        assert writer.edits(site, "r") == {"before", "after"}
        assert writer.edits(site, "plain") == {"none"}
        (places, before), (same, after) = (writer.rows(site, "r", edit) for edit in ("before", "after"))
        assert places == same == list(range(8))
        assert torch.equal(after[:4], before[:4])
        expected = (before[4:].float() + 2.0 * vector).to(before.dtype)
        ulp = torch.finfo(before.dtype).eps * float(expected.abs().max())
        assert float((after[4:] - expected).abs().max()) <= self.ulps_of_a_correction * ulp

    def test_order_of_ops_matters(self, backend: Backend) -> None:
        """Ops of a site run in the order they were given, each on what the one before it left."""
        site = RESID.format(layer=0)
        vector = direction(backend.info.hidden_size)
        cap, push = Cap(vector, min=0.25, max=0.25), Add(vector, scale=2.0)
        found = []
        for ops in ([push, cap], [cap, push]):
            request = Request(prompt=self.ids(4), id="r", steering=Steering({site: ops}), max_new_tokens=2)
            _, writer = self.run(backend, [request], [site])
            found.append(float((writer.rows(site, "r")[1].float() @ vector).max()))
        assert found[0] == pytest.approx(0.25, abs=0.05)
        assert found[1] == pytest.approx(2.25, abs=0.05)

    def test_steering_begins_at_its_absolute_position(self, backend: Backend) -> None:
        """Rows before the first steered one keep every bit; that one and those after it change."""
        forced = self.ids(6, seed=5)
        steering = self.add(backend, positions="P+1:P+2")
        site = self.last_layer(backend)
        _, plain = self.run(backend, [Request(prompt=self.ids(4), id="r", forced_tokens=forced)], [site])
        request = Request(prompt=self.ids(4), id="r", forced_tokens=forced, steering=steering)
        (result,), steered = self.run(backend, [request], [site])
        changed = (plain.rows(site, "r")[1] != steered.rows(site, "r")[1]).any(dim=-1).tolist()
        assert changed == [False] * 5 + [True] * 4
        assert [dose.rows for dose in result.doses] == [1]

    def test_doses_count_the_rows_of_each_request(self, backend: Backend) -> None:
        """The dose table has one row per selected row and op, and the summary sums it up."""
        site = RESID.format(layer=0)
        vector = direction(backend.info.hidden_size)
        steering = Steering({site: [Add(vector, scale=1.0), Cap(vector, max=0.1)]}, positions="response")
        requests = [
            Request(prompt=self.ids(length), id=f"p{length}", steering=steering, max_new_tokens=5, ignore_eos=True)
            for length in (2, 6)
        ]
        done, writer = self.run(backend, requests, [site], edit=("before", "after"))
        for result, length in zip(done, (2, 6), strict=True):
            assert [(dose.site, dose.op, dose.rows) for dose in result.doses] == [
                (site, "0:Add", 5),
                (site, "1:Cap", 5),
            ]
            table = [one for one in writer.doses if one.request == result.id]
            assert sorted((one.op, one.position) for one in table) == [
                (op, place) for op in ("0:Add", "1:Cap") for place in range(length - 1, length + 4)
            ]
            places, before = writer.rows(site, result.id, "before")
            projection = {place: float(row.float() @ vector) for place, row in zip(places, before, strict=True)}
            for one in table:
                if one.op == "0:Add":
                    assert one.p_before == pytest.approx(projection[one.position], abs=0.05)
                    assert one.p_after == pytest.approx(one.p_before + 1.0, abs=0.05)
                else:
                    assert one.p_after <= 0.1 + 0.05
                    assert one.clamped == (one.cap_delta < 0)
            assert result.doses[1].clamped == sum(one.clamped for one in table if one.op == "1:Cap")

    # -- decoding

    def test_teacher_forcing_repeats_a_free_run_bit_by_bit(self, backend: Backend) -> None:
        """Decoding along the tokens of a free run gives its rows and log-probabilities, to the bit."""
        requests = [
            Request(prompt=self.ids(length), id=f"p{length}", max_new_tokens=7, ignore_eos=True) for length in (3, 6)
        ]
        free, one = self.run(backend, requests)
        forced, two = self.run(
            backend,
            [
                Request(prompt=request.prompt, id=request.id, forced_tokens=result.token_ids)
                for request, result in zip(requests, free, strict=True)
            ],
        )
        for a, b in zip(free, forced, strict=True):
            assert (a.token_ids, a.logprobs, b.stop) == (b.token_ids, b.logprobs, "forced")
            for site in (self.last_layer(backend), "logits"):
                assert torch.equal(one.rows(site, a.id)[1], two.rows(site, b.id)[1])

    def test_an_end_token_among_forced_tokens_does_not_end(self, backend: Backend) -> None:
        """Teacher forcing follows every token; the row of an end token is a row like any other."""
        end = min(backend.eos_ids)
        forced = (*self.ids(3), end, *self.ids(4))
        (result,), writer = self.run(backend, [Request(prompt=self.ids(2), id="r", forced_tokens=forced)])
        assert result.token_ids == forced
        assert result.stop == "forced"
        places, rows = writer.rows(self.last_layer(backend), "r")
        assert places == list(range(2 + 8 - 1))
        whole = Request(prompt=(*self.ids(2), *forced[:-1]), id="whole", max_new_tokens=0)
        _, full = self.run(backend, [whole])
        assert rel_l2(rows, full.rows(self.last_layer(backend), "whole")[1]) <= self.bound(backend)

    def test_a_request_ends_at_its_end_token_and_leaves_the_others_running(self, backend: Backend) -> None:
        """After its end token a request has no more rows, no doses and no captures; the others are not disturbed."""
        if not self.steers_logits:
            pytest.skip("this backend does not steer logits")
        size = backend.info.vocab_size
        push = torch.zeros(size)
        push[min(backend.eos_ids)] = 1.0
        ends = Steering({"logits": [Add(push, scale=1e4)]}, positions="P+1:")
        ends += self.add(backend, scale=0.5)
        requests = [
            Request(prompt=self.ids(5), id="ends", steering=ends, max_new_tokens=8),
            Request(prompt=self.ids(3), id="goes on", max_new_tokens=8, ignore_eos=True),
        ]
        (first, second), writer = self.run(backend, requests)
        assert first.stop == "eos"
        assert len(first.token_ids) == 3 and first.token_ids[-1] == min(backend.eos_ids)
        assert writer.rows(RESID.format(layer=0), "ends")[0] == list(range(7))
        assert writer.rows("logits", "ends")[0] == [4, 5, 6]
        assert {dose.site: dose.rows for dose in first.doses} == {"logits": 1, RESID.format(layer=0): 7}
        assert second.stop == "length"
        assert writer.rows(RESID.format(layer=0), "goes on")[0] == list(range(10))
        (alone,), _ = self.run(backend, [requests[1]])
        assert alone.token_ids == second.token_ids
        (longer,), _ = self.run(
            backend, [Request(prompt=self.ids(5), steering=ends, max_new_tokens=8, ignore_eos=True)]
        )
        assert (longer.stop, len(longer.token_ids)) == ("length", 8)

    def test_logits_rows_give_the_logprobs(self, backend: Backend) -> None:
        """Row P - 1 + k of `logits` predicts generated token k; with prompt logits every row is there."""
        request = Request(prompt=self.ids(6), id="r", max_new_tokens=4, ignore_eos=True, logprobs=5)
        (result,), writer = self.run(backend, [request])
        _, rows = writer.rows("logits", "r")
        expected = torch.log_softmax(rows.float(), dim=-1)
        got = expected[torch.arange(4), torch.tensor(result.token_ids)]
        torch.testing.assert_close(torch.tensor(result.logprobs), got, rtol=1e-5, atol=1e-5)
        assert list(result.token_ids) == expected.argmax(-1).tolist()
        for row, top in zip(expected, result.top, strict=True):
            values = [value for _, value in top]
            assert len(top) == 5 and values == sorted(values, reverse=True)
            torch.testing.assert_close(torch.tensor(values), row.topk(5).values, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(row[[one for one, _ in top]], row.topk(5).values, rtol=1e-5, atol=1e-5)
        _, full = self.run(backend, [request], prompt_logits=True)
        places, everything = full.rows("logits", "r")
        assert places == list(range(9))
        assert rel_l2(everything[5:], rows) <= self.bound(backend)

    def test_a_sampled_row_is_the_same_alone_and_in_a_batch(self, backend: Backend) -> None:
        """Every request draws from a generator of its own."""
        prompt, sampling = self.ids(4), Sampling(temperature=1.0, seed=7)
        request = Request(prompt=prompt, id="r", max_new_tokens=8, ignore_eos=True, sampling=sampling)
        other = Request(
            prompt=prompt, id="other", max_new_tokens=8, ignore_eos=True, sampling=Sampling(temperature=1.0)
        )
        longer = Request(prompt=self.ids(9), id="longer", max_new_tokens=8, ignore_eos=True)
        together = backend.generate([longer, request, other])
        (alone,) = backend.generate([request])
        assert together[1].token_ids == alone.token_ids
        assert together[2].token_ids != alone.token_ids

    def test_score_is_the_log_softmax_of_the_logits(self, backend: Backend) -> None:
        """The score of a text is the sum over its tokens after the first; perplexity is exp of its negative mean."""
        texts = [self.ids(9), self.ids(2), self.ids(5)]
        scores = backend.score(texts)
        for text, score in zip(texts, scores, strict=True):
            _, writer = self.run(backend, [Request(prompt=text, id="r", max_new_tokens=1)], prompt_logits=True)
            expected = torch.log_softmax(writer.rows("logits", "r")[1].float(), dim=-1)[:-1]
            got = expected[torch.arange(len(text) - 1), torch.tensor(text[1:])]
            assert score.ids == text
            torch.testing.assert_close(torch.tensor(score.logprobs), got, rtol=1e-4, atol=1e-4)
        count = sum(len(text) - 1 for text in texts)
        mean = sum(score.total for score in scores) / count
        assert perplexity(scores) == pytest.approx(torch.tensor(-mean).exp().item(), rel=1e-5)
        steered = backend.score(texts[:1], steering=self.add(backend))
        assert steered[0].logprobs != scores[0].logprobs

    def test_spans_of_messages_hold_their_content(self, backend: Backend) -> None:
        """The tokens of a span decode to the content of its message, and to nothing else."""
        messages = (
            Message(role="user", content="one two"),
            Message(role="assistant", content="three"),
            Message(role="user", content="one two"),
        )
        encoded = backend.encode(messages)
        assert [span.role for span in encoded.spans] == ["user", "assistant", "user"]
        assert encoded.unlocated == ()
        for span, message in zip(encoded.spans, messages, strict=True):
            assert encoded.text[span.char_start : span.char_end] == message.content
            text = backend.tokenizer.decode(list(encoded.ids[span.start : span.end]))
            assert text.strip() == message.content
        (result,) = backend.generate([Request(prompt=messages, max_new_tokens=1)])
        assert result.prompt_ids == encoded.ids

    # -- refusals

    @pytest.mark.parametrize(
        ("site", "message"),
        [
            ("layers.0.resid_pots", "resid_post"),
            ("layers.99.resid_post", "outside this model"),
            ("middle", "is not a site"),
        ],
    )
    def test_a_site_that_is_none_is_refused(self, backend: Backend, site: str, message: str) -> None:
        """The message names the nearest site, or the layers there are."""
        request = Request(prompt=self.ids(3), max_new_tokens=1)
        with pytest.raises(SiteError, match=message):
            self.run(backend, [request], [site])

    def test_a_vector_of_another_width_is_refused_with_both_widths(self, backend: Backend) -> None:
        """Before anything runs."""
        steering = Steering({RESID.format(layer=0): [Add(torch.ones(3), scale=1.0)]})
        with pytest.raises(VectorError, match=rf"3\b.*\b{backend.info.hidden_size}\b"):
            backend.generate([Request(prompt=self.ids(3), steering=steering)])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"prompt": ()}, "empty prompt"),
            ({"prompt": ""}, "empty prompt"),
            ({"prompt": (5, 10**9)}, "vocabulary"),
            ({"prompt": (5, -1)}, "token ids"),
            ({"forced_tokens": (10**9,)}, "vocabulary"),
            ({"max_new_tokens": -1}, "max_new_tokens is -1"),
            ({"logprobs": -1}, "logprobs is -1"),
            ({"max_new_tokens": 10**7}, "positions"),
        ],
    )
    def test_requests_that_cannot_run_are_refused(self, backend: Backend, change: dict[str, Any], message: str) -> None:
        """One clear line, before anything runs."""
        with pytest.raises(InputError, match=message):
            backend.generate([Request(**{"prompt": self.ids(3), **change})])

    def test_calls_that_make_no_sense_are_refused(self, backend: Backend) -> None:
        """No request, two requests of one name, a capture without a writer."""
        with pytest.raises(InputError, match="no request"):
            backend.generate([])
        twins = [Request(prompt=self.ids(3), id="twin"), Request(prompt=self.ids(4), id="twin")]
        with pytest.raises(InputError, match="two requests are named 'twin'"):
            backend.generate(twins)
        with pytest.raises(InputError, match="without a writer"):
            backend.generate([Request(prompt=self.ids(3))], capture=Capture(sites=("logits",)))

    def test_captured_positions_before_the_prompt_are_refused(self, backend: Backend) -> None:
        """A range that begins before the sequence cannot be met; both numbers are named."""
        with pytest.raises(PositionError, match=r"-9:P.*\b4 tokens"):
            self.run(backend, [Request(prompt=self.ids(4), max_new_tokens=1)], positions="-9:P")

    def test_an_op_that_selects_no_row_is_refused_with_its_reason(self, backend: Backend) -> None:
        """`no such row` and `never matched` raise, unless that is allowed; then the reason is in the dose."""
        prompt = self.ids(4)
        absent = next(one for one in range(self.first_id, self.last_id) if one not in prompt)
        for positions, reason in (("generated", "no such row"), (f"tokens{{{absent}}}", "never matched")):
            request = Request(prompt=prompt, id="r", steering=self.add(backend, positions=positions), max_new_tokens=1)
            with pytest.raises(UnfiredError, match=rf"'r'.*0:Add at layers\.0\.resid_post.*{reason}"):
                backend.generate([request])
            (result,) = backend.generate([request], allow_unfired=True)
            assert [(dose.rows, dose.reason) for dose in result.doses] == [(0, reason)]

    def test_a_correction_that_leaves_the_range_is_refused_and_named(self, backend: Backend) -> None:
        """The error names the request, the site, the op and the position."""
        if backend.info.device != "cpu":
            pytest.skip("the position is known on the CPU only")
        largest = torch.finfo(getattr(torch, backend.info.dtype)).max
        vector = direction(backend.info.hidden_size)
        doubled = [Add(vector, scale=min(largest, 3e38))] * 8
        steering = Steering({RESID.format(layer=0): doubled}, positions="P:P+1")
        requests = [
            Request(prompt=self.ids(5), id="fine", max_new_tokens=3, ignore_eos=True),
            Request(prompt=self.ids(3), id="loud", steering=steering, max_new_tokens=3, ignore_eos=True),
        ]
        where = "position 3" if self.names_positions else ""
        with pytest.raises(NonFiniteError, match=rf"'loud'.*layers\.0\.resid_post.*0:Add.*{where}"):
            backend.generate(requests)

    def test_nothing_stays_behind_after_an_error(self, backend: Backend) -> None:
        """An error in the middle of a steered, captured run surfaces, and the next run is as if it had not been."""
        request = Request(prompt=self.ids(5), id="r", max_new_tokens=4, ignore_eos=True)
        before, one = self.run(backend, [request])
        steered = Request(prompt=self.ids(5), id="r", steering=self.add(backend), max_new_tokens=4, ignore_eos=True)
        capture = Capture(sites=("layers.*.resid_post",))
        with pytest.raises((RuntimeError, TrimtabError), match="on purpose"):
            backend.generate([steered], capture=capture, writer=MemoryWriter(fail_at=1))
        after, two = self.run(backend, [request])
        assert after == before
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(one.records, two.records, strict=True))

    def test_a_writer_sees_where_every_record_comes_from(self, backend: Backend) -> None:
        """Site, layer, configuration, prompt and request are columns of the record."""
        request = Request(prompt=self.ids(3), id="r", prompt_index=5, max_new_tokens=2, ignore_eos=True)
        _, writer = self.run(backend, [request], [RESID.format(layer=1)], config="mine")
        record = writer.records[0]
        assert Site.parse(record.site).layer == record.layer == 1
        assert (record.config, record.prompt, record.request, record.edit) == ("mine", 5, "r", "none")
        assert all(one.config == "mine" and one.prompt == 5 for one in writer.tokens)

    def test_progress_counts_requests(self, backend: Backend) -> None:
        """The last call says that all are finished."""
        calls: list[tuple[int, int]] = []
        requests = [Request(prompt=self.ids(2), max_new_tokens=1) for _ in range(3)]
        backend.generate(requests, progress=lambda done, total: calls.append((done, total)))
        assert calls[-1] == (3, 3)
