"""The measuring end of `introkernels bench --against`: times our kernels of one revision.

It is run by its path, on the Python path of a revision's tree, and takes from there what that
revision has: cases, inputs, contenders. How to measure stands here, so that it is the same for
both. Requests and answers are lines of JSON, on standard input and output:

    {"ask": "prepare", "case": "head/imagenet/float32", "sets": null}
        {"shape": [256, 1000, 2048], "sets": 2, "contenders": {"cpp": null, "cuda": "why not"}}
    {"ask": "measure", "contender": "cpp", "seconds": 0.05}
        {"seconds": [0.0211, 0.0212]}

The first line of all is an answer that nobody asked for, with the package's folder. An answer
``{"failed": "why"}`` takes the place of any other.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A sample is as many calls as last so long.
SAMPLE_SECONDS = 1e-3


class Timed:
    """A contender in a case: its next call, the clock, and how many calls a sample takes."""

    def __init__(self, contender: Any, call: Callable[[], object], clock: Any) -> None:
        self._contender, self._call, self._clock = contender, call, clock
        seconds = min(self._sample(1) for _ in range(3))
        seconds = self._sample(math.ceil(SAMPLE_SECONDS / seconds))
        self._calls = math.ceil(SAMPLE_SECONDS / seconds)

    def measure(self, seconds: float) -> list[float]:
        """Seconds of a call, one for each sample, for about so many seconds and at least once."""
        # The other process has had the caches since the last turn.
        self._sample(self._calls)
        samples: list[float] = []
        end = time.perf_counter() + seconds
        while not samples or time.perf_counter() < end:
            samples.append(self._sample(self._calls))
        return samples

    def _sample(self, calls: int) -> float:
        with self._contender.context():
            return float(self._clock(self._call, calls))


class Session:
    """The suite of this revision, and the case that is being measured."""

    def __init__(self, suite: str, threads: int) -> None:
        import torch

        import introkernels
        from introkernels.bench import accuracy
        from introkernels.bench.devices import DEVICES
        from introkernels.bench.runner import number_of_sets
        from introkernels.bench.suites import SUITES

        torch.set_num_threads(threads)
        if suite not in SUITES:
            raise LookupError(f"no suite {suite}")
        self.package = str(Path(introkernels.__file__).resolve().parent)
        self._accuracy, self._number_of_sets = accuracy, number_of_sets
        self._suite = SUITES[suite]
        self._device: Any = DEVICES[self._suite.device](threads)
        self._timed: dict[str, Timed] = {}

    def prepare(self, name: str, sets: int | None) -> dict[str, Any]:
        """Draw the inputs of a case, and check and call each of our contenders.

        Args:
            sets: how many sets of inputs take turns; None: as many as `introkernels bench` takes
                where two processes share the memory.
        """
        self._timed = {}
        gc.collect()
        case = next((case for case in self._suite.cases if case.name == name), None)
        if case is None:
            raise LookupError(f"suite {self._suite.name} has no such case")
        inputs = [case.draw(0, self._device.name)]
        if sets is None:
            size = sum(tensor.nbytes for tensor in inputs[0].values())
            memory = self._device.memory // 2
            sets = int(self._number_of_sets(size, self._device.last_cache, memory))
        inputs += [case.draw(seed, self._device.name) for seed in range(1, sets)]
        # Training steps have no definition to compare with.
        is_defined = case.operator.definition is not None
        expected = self._accuracy.expected_outcome(case, inputs[0]) if is_defined else None
        ours = [one for one in self._suite.contenders_of(case) if one.role == "ours"]
        return {
            "shape": list(case.shape),
            "sets": sets,
            "contenders": {one.name: self._obstacle(case, one, inputs, expected) for one in ours},
        }

    def measure(self, contender: str, seconds: float) -> dict[str, Any]:
        return {"seconds": self._timed[contender].measure(seconds)}

    def _obstacle(self, case: Any, contender: Any, inputs: Any, expected: Any) -> str | None:
        """Why a contender isn't timed, or None: then it is ready."""
        missing = contender.missing()
        if missing is not None:
            return str(missing)
        run = case.operator.run
        try:
            function = contender.prepare(case.operator)
            with contender.context():
                result = run(function, inputs[0])
        except Exception as error:  # one contender's failure is its result
            return _in_words(error)
        outcome = case.operator.outcome(result, inputs[0])
        wrong = self._wrong(outcome, expected)
        if wrong is not None:
            return wrong
        turn = itertools.cycle(inputs)
        timed = Timed(contender, lambda: run(function, next(turn)), self._device.clock)
        self._timed[contender.name] = timed
        return None

    def _wrong(self, outcome: Any, expected: Any) -> str | None:
        if expected is None:
            finite = all(value.isfinite().all() for value in outcome.values())
            return None if finite else "wrong result, not finite"
        errors = self._accuracy.errors(outcome, expected)
        if self._accuracy.is_right(errors, self._accuracy.tolerances(outcome, expected)):
            return None
        return "wrong result, " + ", ".join(
            f"{name} off by {error:.1e}" for name, error in errors.items()
        )


def main(suite: str, threads: int) -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # Whatever a library prints must not get between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        session = Session(suite, threads)
    except Exception as error:  # older revisions lack anything
        answer({"failed": _in_words(error)})
        return
    answer({"package": session.package})
    gc.disable()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["ask"] == "prepare":
                answer(session.prepare(request["case"], request["sets"]))
            else:
                answer(session.measure(request["contender"], request["seconds"]))
        except Exception as error:  # told to whoever asked
            answer({"failed": _in_words(error)})


def _in_words(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return first if isinstance(error, LookupError) else f"{type(error).__name__}: {first}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
