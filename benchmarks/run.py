"""Run every benchmark, print its claims, and with --record add them to RESULTS.md with machine and date."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from _claims import beside, bounds

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"


def table(claims: list[dict[str, Any]]) -> list[str]:
    lines = ["| claim | median | 95 % interval | bound | holds |", "|---|---|---|---|---|"]
    for one in claims:
        if "value" not in one:
            lines.append(f"| {one['name']} | | | | {one['state']} |")
            continue
        low, high = one["interval"]
        sign = {"at_least": ">=", "at_most": "<=", "overhead": "<="}[one["direction"]]
        state = "yes" if one["holds"] else one["state"]
        value = f"{one['value']:.4g} {one['unit']} | {low:.4g} to {high:.4g}"
        lines.append(f"| {one['name']} | {value} | {sign} {one['bound']:g} | {state} |")
    noted = [one for one in claims if one.get("notes")]
    return [*lines, *([""] if noted else []), *(f"- {one['name']}: {beside(one['notes'])}" for one in noted)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--record", action="store_true", help="add the figures to benchmarks/RESULTS.md")
    parser.add_argument("files", nargs="*", help="benchmark files; default: all that have claims")
    options = parser.parse_args()
    files = options.files or sorted({one["file"] for one in bounds().values()})
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=FOLDER
    ).stdout.strip()
    held = True
    for file in files:
        command = [sys.executable, str(FOLDER / Path(file).name), "--json", *(["--quick"] if options.quick else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if not done.stdout.strip():
            sys.exit(f"{file} printed nothing (exit {done.returncode})")
        document = json.loads(done.stdout)
        lines = table(document["claims"])
        held &= all(one["holds"] for one in document["claims"])
        print(f"## {Path(file).name}\n" + "\n".join(lines) + "\n", flush=True)
        if options.record:
            machine = document["machine"]
            title = f"\n### {Path(file).name}, {datetime.date.today()}, commit {commit}\n"
            where = (
                f"{machine['processor']}, {machine['cores']} cores, {machine['platform']}, Python {machine['python']}\n"
            )
            with RESULTS.open("a") as stream:
                stream.write("\n".join([title, where, *lines, ""]))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
