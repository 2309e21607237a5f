"""A callback for the Trainer of transformers. It is a plain class: the Trainer asks for methods, not for a base."""

from __future__ import annotations

from typing import Any

from trimtab.dump.session import Dump


class DumpCallback:
    """Records a training by `transformers.Trainer`: `Trainer(..., callbacks=[DumpCallback(record("runs/a"))])`.

    The dump begins with the training and ends with it. Call `close` when the training ends in an exception that you
    catch; the trace of a process that just dies keeps what was committed.

    Args:
        session: what `record` returned, not yet on.
    """

    def __init__(self, session: Dump) -> None:
        self.session = session

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Watch what is trained."""
        self.session.start()
        self.session.watch(model)
        # accelerate wraps the optimizer; the state and the hooks are in the one inside
        self.session.watch_optimizer(getattr(optimizer, "optimizer", optimizer))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count a step of the optimizer."""
        self.session.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Commit."""
        self.session.close()

    def close(self) -> None:
        """Commit a training that ended early."""
        self.session.close(interrupted="the training ended early")

    def __getattr__(self, name: str) -> Any:
        """Every other event passes."""
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)
