"""What a run counts, prints and writes."""

import json
import pathlib
from collections import Counter, defaultdict
from typing import Any

from .runner import ERRORS, Outcome

MOST_LINES = 40  # of failures that are printed


class Report:
    """Takes outcomes as they arrive and prints a line for each failure."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.calls: Counter[str] = Counter()
        self.by_seed: Counter[str] = Counter()
        self.features: Counter[str] = Counter()
        self.shapes: dict[str, set[str]] = defaultdict(set)
        self.requests = 0
        self.not_run = 0
        self.worst: dict[str, dict[str, float]] = {}

    def take(self, outcome: Outcome) -> None:
        if not outcome.ran:
            self.not_run += 1
            return
        case, (shape, data) = outcome.case, outcome.name.split("/")
        self.calls[case.label] += 1
        self.by_seed[data.split(".")[0]] += 1
        self.shapes[case.label].add(shape)
        self.features += outcome.features
        self.requests += case.batch
        if outcome.failures:
            self.failed.append(outcome.line())
            if len(self.failed) <= MOST_LINES:
                print(outcome.line(), flush=True)
            return
        worst = self.worst.setdefault(case.label, dict.fromkeys(ERRORS, 0.0))
        for error in ERRORS:
            worst[error] = max(worst[error], outcome.worst[error])

    @property
    def passed(self) -> bool:
        return not self.failed and not self.not_run

    def counts(self) -> dict[str, Any]:
        return {
            "calls": self.calls.total(),
            "failed": len(self.failed),
            "not run": self.not_run,
            "shapes": sum(map(len, self.shapes.values())),
            "requests": self.requests,
            "calls by data seed": dict(self.by_seed),
            "calls by kind": dict(sorted(self.calls.items())),
            "shapes by kind": {kind: len(found) for kind, found in sorted(self.shapes.items())},
            "features": dict(sorted(self.features.items())),
            "largest error over its bound": dict(sorted(self.worst.items())),
        }

    def print(self, seconds: dict[str, float]) -> None:
        counts = self.counts()
        print(
            f"{counts['calls']} calls ({counts['requests']} requests) over {counts['shapes']} "
            f"shapes, {counts['failed']} failed, {self.not_run} not run; "
            + ", ".join(f"{what} {took:.0f} s" for what, took in seconds.items())
        )
        for kind, calls in counts["calls by kind"].items():
            worst = self.worst.get(kind, {})
            errors = ", ".join(f"{name} {value:.2f}" for name, value in worst.items())
            print(f"  {kind}: {calls} calls, {len(self.shapes[kind])} shapes; of bounds: {errors}")
        for feature, count in counts["features"].items():
            print(f"  {count} {feature}")
        if len(self.failed) > MOST_LINES:
            print(f"{len(self.failed) - MOST_LINES} failures more were not printed")

    def write(self, path: str, seconds: dict[str, float]) -> None:
        written = {**self.counts(), "seconds": seconds, "failures": self.failed}
        pathlib.Path(path).write_text(json.dumps(written, indent=1) + "\n")
