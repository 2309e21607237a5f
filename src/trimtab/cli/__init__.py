"""The command line: one file per verb, each a reading of one public function."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from keyword import iskeyword

from trimtab._version import __version__

__all__ = ["build", "main"]

_COMMANDS = {
    "demo": "Sweep capped steering over precisions on the embedded model, and write the report.",
    "doctor": "Say what is installed, what works, what is untested here, and what mends the rest.",
    "capture": "Run a model, steered or not, and write its hidden states to a trace.",
    "generate": "Run a model, steered or not, and print the text.",
    "sweep": "Run backends x precisions x prompts under one steering; one directory, resumable.",
    "analyze": "Read a sweep, or two runs: token agreement, first divergence, drift, cap deltas.",
    "debug-decode": "Compare two precisions on one prompt, step by step.",
    "dump": "Record a training or inference program, without touching it.",
    "compare": "Compare two traces tensor by tensor, with a calibrated verdict.",
    "triage": "Find the module that made the first error of two runs, its source, what changed, and a patch.",
    "commits": "Test a numerical change commit by commit: red flags, risk, first bad commit.",
    "serve": "Serve a model over OpenAI's API with vLLM, each request with its own steering.",
    "rerun": "Repeat a run from its manifest.",
    "report": "Render a result again: text, JSON or one HTML file.",
}
_GROUPS = {
    "trace": (
        "Work with traces.",
        {
            "ls": "List what a trace holds.",
            "show": "Show one record.",
            "verify": "Re-hash every tensor.",
            "repair": "Rebuild the index of an interrupted trace from its shards.",
            "prune": "Delete stored values that are not needed.",
            "import": "Index a dump of sglang, of Miles, or of plain files.",
            "export": "Write a trace as files that other tools read.",
        },
    ),
    "testbed": ("The embedded model.", {"build": "Retrain the embedded model from its seed."}),
}
_PACKAGES = ("vectors", "evaluate", "sae", "weights")
"""Groups whose verbs have a file each: `trimtab.cli.<group>` has HELP and VERBS, a verb's file its function."""


def build() -> object:
    """Return the cyclopts app; verbs are imported when they are used."""
    from cyclopts import App

    app = App(
        name="trimtab",
        help="Steer, capture and compare the activations of large language models.",
        version=__version__,
        result_action="return_value",
        help_format="plaintext",
        suppress_keyboard_interrupt=False,  # else it exits with 130 before `guard` sees it
    )
    for verb, text in _COMMANDS.items():
        name = verb.replace("-", "_")
        app.command(f"trimtab.cli.{name}:{name}", name=verb, help=text)
    for group, (text, verbs) in _GROUPS.items():
        sub = App(name=group, help=text, result_action="return_value")
        for verb, line in verbs.items():
            sub.command(f"trimtab.cli.{group}:{verb}{'_' * iskeyword(verb)}", name=verb, help=line)
        app.command(sub)
    for group in _PACKAGES:
        package = importlib.import_module(f"trimtab.cli.{group}")
        sub = App(name=group, help=package.HELP, result_action="return_value")
        for verb, line in package.VERBS.items():
            name = verb.replace("-", "_")
            sub.command(f"trimtab.cli.{group}.{name}:{name}", name=verb, help=line)
        app.command(sub)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: arguments after the program's name; None takes the process's.

    Returns:
        0 passed, 1 compared and failed, 2 bad input, 3 not finished, 70 a bug of ours.
    """
    from cyclopts import App
    from cyclopts.exceptions import CycloptsError

    from trimtab.cli._call import guard

    app = build()
    assert isinstance(app, App)
    words = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        try:
            code = app(words, exit_on_error=False, print_error=False)
        except CycloptsError as error:
            sys.stderr.write(f"trimtab: {' '.join(str(error).split())}\n")
            return 2
        return code if isinstance(code, int) else 0

    code = guard(command)
    if argv is None:
        _flush()
        sys.exit(code)
    return code


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
