"""Checkpoints: one file each, whole or absent; the newest are kept, older ones go when a new one stands."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from trimtab._base import jsonio
from trimtab._base.files import fsync_directory
from trimtab.errors import InputError, UnfinishedError

FORMAT = "trimtab-sae-training"
VERSION = 1  # 1: first version
FOLDER = "checkpoints"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Checkpoint:
    """Everything that the next step depends on."""

    step: int
    """Steps taken."""
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    """Plain JSON: cursors, counters, what was told."""
    identity: Mapping[str, Any]
    """Plain JSON of the settings that a training must share to go on from here."""


class Checkpoints:
    """The checkpoints of one directory.

    Args:
        folder: of the run; they lie in `checkpoints/` below it.
        keep: how many are kept.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder / FOLDER, keep

    def files(self) -> list[Path]:
        """Return the checkpoints that stand, oldest first."""
        return sorted(self._folder.glob("step-*.safetensors"))

    def save(self, made: Checkpoint) -> Path:
        """Write a checkpoint beside the others, then remove those that are too old.

        Raises:
            UnfinishedError: it cannot be written (a full disk, say); the ones before stay as they are.
        """
        path = self._folder / f"step-{made.step:09d}.safetensors"
        # Not tempfile: its files are readable by their owner alone, whatever the umask says.
        draft = self._folder / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "step": str(made.step),
            "state": jsonio.dumps(made.state),
            "identity": jsonio.dumps(made.identity),
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(dict(made.tensors), draft, metadata)
            with draft.open("rb+") as stream:
                os.fsync(stream.fileno())
            draft.replace(path)
            fsync_directory(self._folder)
        except (OSError, safetensors.SafetensorError) as error:
            kept = self.files()
            stays = f"{kept[-1]} stays, and the same call goes on from there" if kept else "nothing was kept"
            raise UnfinishedError(
                f"the checkpoint of step {made.step} cannot be written to {self._folder}: {error}; {stays}"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        for old in self.files()[: -self._keep]:
            old.unlink()
        return path

    def load(self, identity: Mapping[str, Any]) -> Checkpoint | None:
        """Read the newest checkpoint; None when there is none.

        Raises:
            InputError: it is damaged, of another version, or of another configuration (named, with both values).
        """
        found = self.files()
        if not found:
            return None
        made = read(found[-1])
        check_identity(made.identity, identity, str(found[-1]))
        return made


def read(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        InputError: not one, damaged, or written by another version.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as stream:
            metadata = dict(stream.metadata() or {})
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is no checkpoint, or damaged: {error}; remove it to go on from the one before") from (
            error
        )
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        raise InputError(f"{path} is no checkpoint that this version reads; remove it to begin anew")
    return Checkpoint(
        step=int(metadata["step"]),
        tensors=tensors,
        state=jsonio.loads(metadata["state"]),
        identity=jsonio.loads(metadata["identity"]),
    )


def check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint of another configuration.

    Raises:
        InputError: names what differs, with both values.
    """
    wanted = jsonio.loads(jsonio.dumps(wanted))  # as it would be read back
    differs = list(_differences(found, wanted))
    if differs:
        listed = "; ".join(f"{name} is {there!r} there, {here!r} here" for name, there, here in differs[:5])
        more = f" (and {len(differs) - 5} more)" if len(differs) > 5 else ""
        raise InputError(
            f"{where} is the checkpoint of another configuration: {listed}{more}; give the same settings, another "
            "directory, or remove it to begin anew"
        )


def _differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in dict.fromkeys([*there, *here]):
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, (one, other) in enumerate(zip(there, here, strict=True)):
            yield from _differences(one, other, f"{name}[{number}]")
    elif there != here:
        yield name, there, here
