"""Writes the table of outcomes: `PYTHONPATH=tests python -m hostile > docs/hostile.md`.

With `--show`, it prints the cases that end badly as well.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections import Counter

from hostile import KINDS
from hostile.judge import BAD, GOOD, judged

HEAD = """\
# Hostile inputs

FisherLab answers what people pass by mistake: {cases:,} cases, drawn from seeds. Right: the
result equals a dense reference. Refused by name: the message names the argument, says what was
passed, and what to pass. Torch's own error: the fault is in the user's network or loss. After each
case the network, its gradients, buffers and hooks, the random streams and torch's settings are as
before, and a refused step changes no parameter and no state.

| kind | {names} |
| --- | {rules} |
"""
TAIL = """
Each kind ran {each} seeds, from {seed} on, on commit {commit};
`PYTHONPATH=tests python -m hostile --cases {each} --seed {seed}` repeats it.
"""


def counted(kind: str, seeds: range, show: bool) -> Counter[str]:
    """How the cases of a kind end."""
    module = importlib.import_module(f"hostile.{kind}")
    counts: Counter[str] = Counter()
    shown: set[tuple[str, str]] = set()
    for seed in seeds:
        verdict = judged(module.case(seed))
        counts[verdict.outcome] += 1
        key = verdict.label.split(",")[0], verdict.detail[:60]
        if show and not verdict.good and key not in shown:
            shown.add(key)
            where = [line for line in verdict.trace.splitlines() if "fisherlab/" in line][-1:]
            print(
                seed,
                verdict.label,
                "|",
                verdict.outcome,
                "|",
                verdict.detail[:300],
                file=sys.stderr,
            )
            print("      ", *where, file=sys.stderr)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=834, help="of each kind")
    parser.add_argument("--seed", type=int, default=3_000_000)
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    parser.add_argument("--show", action="store_true")
    asked = parser.parse_args()
    names = (*GOOD, *BAD)
    table = {
        kind: counted(kind, range(asked.seed, asked.seed + asked.cases), asked.show)
        for kind in asked.kinds
    }
    total = sum(table.values(), Counter())
    rules = " | ".join(["---:"] * len(names))
    print(HEAD.format(cases=total.total(), names=" | ".join(names), rules=rules), end="")
    for kind, counts in {**table, "all": total}.items():
        print(f"| {kind} | {' | '.join(f'{counts[name]:,}' for name in names)} |")
    head = ["git", "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    print(TAIL.format(commit=commit, seed=asked.seed, each=asked.cases), end="")


if __name__ == "__main__":
    main()
