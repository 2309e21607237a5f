"""What git knows of a file: its repository, how it changed between two commits, who changed it last."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import InputError
from trimtab.results.triage import Blame

_HEAD = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_COMMIT = re.compile(r"([0-9a-f]{40}) \d+ \d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class RawHunk:
    """One hunk with the file that it belongs to, as git printed it."""

    file: str
    old_start: int
    old_lines: int
    new_start: int
    new_lines: int
    text: str

    def widened(self, new: str, context: int = 3) -> RawHunk:
        """Return a hunk without context with lines of the new file around it.

        A hunk as git prints it may hold other changes that lie near; this one alone can be taken back.
        """
        lines = new.split("\n")
        count = len(lines) - (lines[-1] == "")
        first = self.new_start if self.new_lines else self.new_start + 1
        before = lines[max(0, first - 1 - context) : first - 1]
        start = first - 1 + self.new_lines
        after = lines[start : min(start + context, count)]
        old = (self.old_start if self.old_lines else self.old_start + 1) - len(before)
        sizes = [len(before) + size + len(after) for size in (self.old_lines, self.new_lines)]
        head = f"@@ -{old},{sizes[0]} +{first - len(before)},{sizes[1]} @@"
        text = [head, *(f" {line}" for line in before), *self.text.splitlines()[1:], *(f" {line}" for line in after)]
        if after and start + len(after) == count and lines[-1] != "":
            text.append("\\ No newline at end of file")
        return RawHunk(
            file=self.file, old_start=old, old_lines=sizes[0], new_start=first - len(before), new_lines=sizes[1],
            text="\n".join(text),
        )  # fmt: skip

    def changed(self) -> tuple[set[int], set[int]]:
        """Return the numbers of the removed lines in the old file and of the added ones in the new file."""
        old, new = self.old_start, self.new_start
        removed, added = set(), set()
        for line in self.text.splitlines()[1:]:
            if line.startswith("-"):
                removed.add(old)
            elif line.startswith("+"):
                added.add(new)
            old += line[:1] in ("-", " ", "")
            new += line[:1] in ("+", " ", "")
        return removed, added

    def reversed(self) -> str:
        """Return a patch that takes the hunk back from the newer file."""
        lines = [f"@@ -{self.new_start},{self.new_lines} +{self.old_start},{self.old_lines} @@"]
        gone: list[str] = []
        for line in [*self.text.splitlines()[1:], " "]:
            if line.startswith("-"):  # what was removed comes back, after what takes its place goes
                gone.append("+" + line[1:])
                continue
            if line.startswith("\\") and gone and lines[-1].startswith((" ", "@")):
                gone.append(line)
                continue
            if not line.startswith(("+", "\\")):
                lines, gone = lines + gone, []
            lines.append("-" + line[1:] if line.startswith("+") else line)
        return "\n".join([f"--- a/{self.file}", f"+++ b/{self.file}", *lines[:-1]]) + "\n"


class Repository:
    """A git repository; every method runs one git command.

    Raises:
        InputError: the folder does not lie in one, or git is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.root = Path(_git(folder, "rev-parse", "--show-toplevel").strip())
        except InputError:
            raise InputError(f"{str(folder)!r} lies in no git repository: no difference, no blame") from None

    def commit(self, revision: str) -> str:
        """Return the full hash of a revision.

        Raises:
            InputError: no such revision.
        """
        try:
            return _git(
                self.root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"
            ).strip()
        except InputError:
            raise InputError(f"{self.root} has no revision {revision!r}; give BASE..HEAD of this repository") from None

    def tracks(self, file: str) -> bool:
        """Whether a file belongs to the repository; those of an environment inside of its folder do not."""
        return bool(_git(self.root, "ls-files", "--", file).strip())

    def dirty(self, file: str) -> bool:
        """Whether a file has changes that are not committed."""
        return bool(_git(self.root, "status", "--porcelain", "--", file).strip())

    def diff(self, base: str, head: str, files: Iterable[str] = ()) -> list[RawHunk]:
        """Return the changes between two commits, without context; an empty `head` is the working tree."""
        ends = [base, head] if head else [base]
        options = ("--no-color", "--no-ext-diff", "--no-renames", "--unified=0", "--src-prefix=a/", "--dst-prefix=b/")
        return parse_diff(_git(self.root, "diff", *options, *ends, "--", *files))

    def text(self, revision: str, file: str) -> str | None:
        """Return a file at a commit, or in the working tree; None where it does not exist."""
        try:
            if revision:
                return _git(self.root, "show", f"{revision}:{file}")
            return (self.root / file).read_text(encoding="utf-8", errors="replace")
        except (InputError, OSError):
            return None

    def blame(self, revision: str, file: str, first: int, last: int) -> tuple[Blame, ...]:
        """Return the commits that wrote some lines, most lines first."""
        arguments = [revision] if revision else []
        text = _git(self.root, "blame", "--line-porcelain", "-L", f"{first},{last}", *arguments, "--", file)
        counts: Counter[str] = Counter()
        facts: dict[str, dict[str, str]] = {}
        commit = ""
        for line in text.splitlines():
            found = _COMMIT.match(line)
            if found is not None:
                commit = found[1]
                counts[commit] += 1
            elif line.startswith(("author-time ", "summary ")):
                key, _, value = line.partition(" ")
                facts.setdefault(commit, {})[key] = value
        return tuple(
            Blame(
                commit=name,
                date=facts.get(name, {}).get("author-time", ""),
                summary=facts.get(name, {}).get("summary", "") if name.strip("0") else "not committed yet",
                lines=number,
            )
            for name, number in counts.most_common(5)
        )


def parse_diff(text: str) -> list[RawHunk]:
    """Return the hunks of a unified diff."""
    found: list[RawHunk] = []
    old = new = ""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        line = lines[at]
        head = _HEAD.match(line)
        if line.startswith("--- "):
            old = line[4:]
        elif line.startswith("+++ "):
            new = line[4:]
        if head is None:
            at += 1
            continue
        counts = [int(head[group]) if head[group] is not None else 1 for group in (2, 4)]
        end, left = at + 1, list(counts)
        while end < len(lines) and (any(left) or lines[end].startswith("\\")):
            left[0] -= lines[end][:1] in ("-", " ", "")
            left[1] -= lines[end][:1] in ("+", " ", "")
            end += 1
        path = (new if new != "/dev/null" else old).partition("/")[2].rstrip("\t")
        found.append(
            RawHunk(
                file=path, old_start=int(head[1]), old_lines=counts[0], new_start=int(head[3]), new_lines=counts[1],
                text="\n".join(lines[at:end]),
            )
        )  # fmt: skip
        at = end
    return found


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ("git", "-C", str(folder), "-c", "core.quotePath=false", *arguments),
            capture_output=True, text=True, timeout=60, check=True, errors="replace",
        )  # fmt: skip
    except FileNotFoundError as error:
        raise InputError("git is not installed: no difference, no blame") from error
    except (subprocess.SubprocessError, OSError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()
        raise InputError(f"git {arguments[0]} failed: {said[-1] if said else error}") from error
    return done.stdout
