"""Whether a vector was made on the model that it is used on."""

from __future__ import annotations

from trimtab._base.log import get_logger
from trimtab.errors import SteeringError

_LOG = get_logger(__name__)


def check_origin(made_on: str, weights_digest: str, what: str) -> None:
    """Refuse a vector of other weights.

    A digest begins with its kind: that of a directory and that of a module in memory say nothing of each other, which
    is logged and not refused.

    Args:
        made_on: digest of the weights that the vector was made on; empty: unknown, nothing is checked.
        weights_digest: digest of the weights that it is used on; likewise.
        what: how an error calls the vector.

    Raises:
        SteeringError: digests of one kind that differ.
    """
    if not made_on or not weights_digest or made_on == weights_digest:
        return
    if made_on.rpartition(":")[0] == weights_digest.rpartition(":")[0]:
        raise SteeringError(
            f"{what} was made on a model of digest {made_on}, and this one has {weights_digest}; pass its bare tensor "
            "to use it here on purpose"
        )
    _LOG.warning(
        "%s: whether this is the model that it was made on cannot be told: digests %s and %s are of two kinds",
        what, made_on, weights_digest,
    )  # fmt: skip
