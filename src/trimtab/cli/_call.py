"""One command stands for one call: print it, make it, show its result, return its exit code."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trimtab._base.progress import hidden
from trimtab.errors import InputError, TrimtabError, UnfinishedError

EXIT_FAILED, EXIT_UNFINISHED, EXIT_BUG = 1, 3, 70
_MODULE = re.compile(r"\b(trimtab\.\w+)\.\w+\(")


@Parameter(name="*", group="Output")
@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """How a command shows what it did."""

    json: Annotated[bool, Parameter(negative="")] = False
    """Print one JSON document on standard output; progress stays on standard error."""
    print_python: Annotated[bool, Parameter(negative="")] = False
    """Print the Python call that this command stands for, and do nothing."""
    quiet: Annotated[bool, Parameter(negative="")] = False
    """Show no progress on standard error; errors are still said there."""


@Parameter(name="*", group="Output")
@dataclass(frozen=True, kw_only=True, slots=True)
class LineOutput(Output):
    """How a command whose records stream shows what it did."""

    jsonl: Annotated[bool, Parameter(negative="")] = False
    """Print one JSON document per line on standard output, each as soon as it is made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of the public API."""

    function: str
    """Dotted public name, such as "trimtab.sweep"."""
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def python(self) -> str:
        """Return the call as a program."""
        expression = self.expression()
        modules = sorted({match for match in _MODULE.findall(expression)})
        head = ["import trimtab as tt"] if "tt." in expression else []
        return "\n".join([*head, *(f"import {module}" for module in modules), "", expression])

    def expression(self) -> str:
        """Return the call as one expression; `trimtab` is called `tt`."""
        module, _, name = self.function.rpartition(".")
        target = f"tt.{name}" if module == "trimtab" else self.function
        parts = [python_repr(value) for value in self.args]
        parts += [f"{key}={python_repr(value)}" for key, value in self.kwargs.items()]
        return f"{target}({', '.join(parts)})"

    def __call__(self, **more: Any) -> Any:
        module, _, name = self.function.rpartition(".")
        args = [value() if isinstance(value, Call) else value for value in self.args]
        return getattr(importlib.import_module(module), name)(*args, **self.kwargs, **more)


def python_repr(value: Any) -> str:
    """Return Python source of a plain value or of one of our public dataclasses, defaults left out."""
    if isinstance(value, Call):
        return value.expression()
    if is_dataclass(value) and not isinstance(value, type):
        given = [one for one in fields(value) if getattr(value, one.name) != one.default]
        inside = ", ".join(f"{one.name}={python_repr(getattr(value, one.name))}" for one in given)
        return f"tt.{type(value).__name__}({inside})"
    if isinstance(value, Path):
        return repr(str(value))
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(python_repr(item) for item in value) + "]"
    return repr(value)


def run(
    call: Call,
    output: Output,
    *,
    summarise: Callable[[Any], Any] | None = None,
    show: Callable[[Any], str] | None = None,
    html: Path | None = None,
    stream: str = "",
) -> int:
    """Make the call, print its result, return the exit code.

    Args:
        call: what the command stands for.
        output: how to show it.
        summarise: turns what the call returns into a result dataclass; None: it is one.
        show: turns the result into text; None uses the report's text renderer.
        html: also write the result's page there.
        stream: argument of the call that takes a function of one line; "": the lines are made of the result.

    Raises:
        InputError: both --json and --jsonl.
    """
    by_line = isinstance(output, LineOutput) and output.jsonl
    if by_line and output.json:
        raise InputError("--json prints one document and --jsonl one per line; give one of them")
    if output.print_python:
        whole = call if html is None else Call(function="trimtab.report", args=(call, html))
        sys.stdout.write(whole.python() + "\n")
        return 0
    with hidden() if output.quiet else nullcontext():
        returned = call(**{stream: _write_line} if by_line and stream else {})
    result = returned if summarise is None else summarise(returned)
    if html is not None:
        Call(function="trimtab.report", args=(result, html))()
    if not by_line:
        sys.stdout.write(_text(result, output, show).rstrip("\n") + "\n")
    elif not stream:
        _write_lines(result)
    if html is not None and not output.quiet:
        sys.stdout.flush()
        sys.stderr.write(f"\nreport: {html}\n")
    return exit_code(result)


def listing(returned: Any) -> Any:
    """Return the listing of a trace, and any other result as it is."""
    from trimtab.trace import Trace, ls

    return ls(returned.path) if isinstance(returned, Trace) else returned


def _write_line(line: Any) -> None:
    from trimtab.results import to_json

    sys.stdout.write(to_json(line, indent=None) + "\n")
    sys.stdout.flush()


def _write_lines(result: Any) -> None:
    from trimtab.results import lines

    for line in lines(result):
        _write_line(line)


def _text(result: Any, output: Output, show: Callable[[Any], str] | None) -> str:
    if output.json:
        from trimtab.results import to_json

        return to_json(result)
    if show is not None:
        return show(result)
    from trimtab.report import render_text

    return render_text(result)


def exit_code(result: Any) -> int:
    """Return 0 for passed, 1 for compared and failed, 3 for not finished."""
    if getattr(result, "finished", True) is False:
        return EXIT_UNFINISHED
    return 0 if getattr(result, "passed", True) else EXIT_FAILED


def guard(run_command: Callable[[], int]) -> int:
    """Run a command; turn what it raises into one line and an exit code."""
    try:
        return run_command()
    except UnfinishedError as error:
        sys.stderr.write(f"trimtab: not finished: {error}\n")
        return EXIT_UNFINISHED
    except TrimtabError as error:
        sys.stderr.write(f"trimtab: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("trimtab: interrupted; what was committed is kept\n")
        return EXIT_UNFINISHED
    except BrokenPipeError:
        return 0
    except Exception:
        traceback.print_exc()
        sys.stderr.write("trimtab: this is a bug in trimtab; the traceback above is what to report\n")
        return EXIT_BUG
