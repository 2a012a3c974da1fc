"""What a training step costs with each explanation method, next to a plain one.

A step is a forward pass, the explanations, `similarity_loss`, the backward pass and an update by
SGD; the plain one has cross entropy instead. The network is ResNet-20 (He et al. 2016) on random
images. Everything happens in one process on the CPU: for each number of classes all steps take
turns, and only steps of the same number are compared.

    python benchmarks/explain_cost.py --table docs/explaining.md --plot docs/explain_cost.svg
"""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import tyro
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor
from torch.nn import functional as F

import introkernels as ik
from introkernels import checkout
from introkernels.bench import environment, records, tables
from introkernels.bench.records import Record, ResultsError
from introkernels.bench.tables import TableError
from introkernels.bench.timing import Times
from introkernels.explain.stats import Method
from introkernels.plotting import COLOURS, styled
from introkernels.train.models.resnet import ResNet

SUITE = "explain-cost"
PLAIN = "plain"
DEPTH = 20
LEARNING_RATE = 0.01
# From this number of classes on one call of a slow method has to do.
MANY_CLASSES = 316
FEWEST_SAMPLES = 3
FEWEST_SAMPLES_OF_MANY = 1
# The first call of a step is for warming up, unless it lasts so long that this makes no difference.
LONG_SECONDS = 10.0

BEGIN = "<!-- explain cost -->"
END = "<!-- /explain cost -->"

Step = Callable[[], Tensor]
"""One training step; returns the loss."""


class UsageError(ValueError):
    """A wrong call; the message says what is allowed."""


@dataclass(frozen=True)
class Options:
    """What to measure, and where the results go."""

    classes: tuple[int, ...] = (10, 32, 100, 316, 1000)
    """Numbers of classes, at least 2."""
    methods: tuple[Method, ...] = ("head", "projection", "sketch", "exact")
    """Explanation methods."""
    batch_size: int = 32
    """Images in a step."""
    image_size: int = 32
    """Height and width of an image; it has three channels."""
    probes: int = 8
    """Random vectors of sketch."""
    budget: float = 15.0
    """Seconds for the samples of each step. A slow one gets 3 samples at least, from 316 classes
    on 1."""
    most: int = 20
    """The most samples of a step."""
    threads: int | None = None
    """Threads to compute with. None: as many as torch uses by itself."""
    seed: int = 0
    """Seed of weights, images, classes and probes."""
    out: Path | None = None
    """File of JSON lines for the results, which it will hold alone.
    None: benchmarks/results/explain-cost-<machine>.jsonl."""
    table: Path | None = None
    """A document whose table is made anew from the results, between its marker lines."""
    plot: Path | None = None
    """An SVG file for the figure of the results."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Use the results of this file for --table and --plot, instead of measuring."""

    def __post_init__(self) -> None:
        lowest = {"batch_size": 2, "image_size": 4, "probes": 1, "most": 1, "seed": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        for name in ("classes", "methods"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UsageError(
                    f"{name}: got {list(values)}, expected at least one, none of them twice"
                )
        if min(self.classes) < 2:
            raise UsageError(f"classes: got {min(self.classes)}, expected at least 2")
        if not 0 < self.budget < math.inf:
            raise UsageError(f"budget: got {self.budget}, expected a positive number of seconds")
        cores = environment.usable_cores()
        if self.threads is not None and not 1 <= self.threads <= cores:
            raise UsageError(
                f"threads: got {self.threads}, expected 1 to {cores}, the cores usable here"
            )


def main(arguments: Sequence[str]) -> int:
    """Measure, and make table and plot; returns the exit status.

    0: done; 2: the call was wrong; 130: interrupted.
    """
    options = tyro.cli(Options, prog="explain_cost.py", description=__doc__, args=list(arguments))
    try:
        # Better to fail now than after minutes.
        if options.table is not None:
            check_markers(options.table.read_text(encoding="utf-8"))
        source, found = _results(options)
        if options.table is not None:
            document = options.table.read_text(encoding="utf-8")
            link = tables.relative_link(source, options.table)
            records.write_text(options.table, put_into(document, found, link))
        if options.plot is not None:
            records.write_text(options.plot, plot(found))
    except (UsageError, ResultsError, TableError, OSError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted; what was measured so far is in the file of results", 130)
    print(markdown(found, str(source)))
    return 0


def _results(options: Options) -> tuple[Path, list[Record]]:
    """The file of the results and what it holds, after measuring unless it is to be read only."""
    if options.from_ is not None:
        return options.from_, records.read(options.from_)
    slug = environment.slug(environment.machine())
    out = options.out or Path("benchmarks/results") / f"{SUITE}-{slug}.jsonl"
    found: list[Record] = []
    for new in measured(options):
        found += new
        records.write(out, found)
        print(f"{len(found)} medians in {out}", flush=True)
    # As they are kept, so that the same table and plot can be made from the file.
    return out, records.read(out)


def measured(options: Options) -> Iterator[list[Record]]:
    """The records of each number of classes, as soon as it is measured."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads_before)
    try:
        settings = {
            **{name: getattr(options, name) for name in ("probes", "budget", "most", "seed")},
            "threads": torch.get_num_threads(),
            "depth": DEPTH,
            "learning_rate": LEARNING_RATE,
            "long_seconds": LONG_SECONDS,
            "environment": environment.thread_variables(),
        }
        common = {
            "format": records.FORMAT,
            "run": datetime.now(UTC).isoformat(timespec="seconds"),
            "suite": SUITE,
            "machine": environment.machine(),
            "versions": environment.versions(),
            "commit": checkout.commit(),
        }
        for classes in options.classes:
            fewest = FEWEST_SAMPLES if classes < MANY_CLASSES else FEWEST_SAMPLES_OF_MANY
            steps = {PLAIN: training_step(None, classes, options)}
            steps |= {name: training_step(name, classes, options) for name in options.methods}
            times = timed(steps, options.budget, fewest, options.most)
            yield [
                {
                    **common,
                    "settings": settings | {"fewest": fewest},
                    **_record(name, classes, options, times[name]),
                }
                for name in steps
            ]
    finally:
        torch.set_num_threads(threads_before)


def training_step(method: Method | None, classes: int, options: Options) -> Step:
    """A step of a network of its own, whose weights and images are those of every other step.

    Args:
        method: how it explains, or None for a plain step.
        classes: the number of logits.
        options: sizes and seed.
    """
    generator = torch.Generator().manual_seed(options.seed)
    shape = (3, options.image_size, options.image_size)
    images = torch.randn(options.batch_size, *shape, generator=generator)
    target = torch.randint(classes, (options.batch_size,), generator=generator)
    with torch.random.fork_rng([]):
        torch.manual_seed(options.seed)
        model = ResNet(shape, classes, DEPTH).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    introspective = ik.SimilarityLoss(
        similarity="projection" if method == "projection" else "cosine"
    )

    def loss() -> Tensor:
        if method is None:
            return F.cross_entropy(model(images), target)
        logits, stats = ik.explain.class_explanation_stats(
            model, images, target, method=method, probes=options.probes, generator=generator
        )
        value: Tensor = introspective(logits, target, stats)
        return value

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value

    return step


def timed(steps: dict[str, Step], budget: float, fewest: int, most: int) -> dict[str, Times]:
    """Times of all steps, which take turns; slow ones sit out some rounds, evenly spread."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    wanted: dict[str, int] = {}
    for name, step in steps.items():
        seconds = _seconds(name, step)
        if seconds >= LONG_SECONDS:
            samples[name].append(seconds)
        count = min(max(int(budget / seconds), fewest), most)
        wanted[name] = count - len(samples[name])
    rounds = max(wanted.values())
    names = list(steps)
    for number in range(rounds):
        # Another one goes first each time, so that nobody always follows the same neighbour.
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            if (number + 1) * wanted[name] // rounds > number * wanted[name] // rounds:
                samples[name].append(_seconds(name, steps[name]))
    return {name: _times(found) for name, found in samples.items()}


def _seconds(name: str, step: Step) -> float:
    started = time.perf_counter()
    value = step()
    seconds = time.perf_counter() - started
    if not torch.isfinite(value):
        raise RuntimeError(f"{name}: the loss is {value.item()}, so its time means nothing")
    return seconds


def _times(samples: Sequence[float]) -> Times:
    if len(samples) == 1:
        (only,) = samples
        return Times(only, only, only, only, samples=1, calls=1)
    return Times.of(samples, calls=1)


def _record(name: str, classes: int, options: Options, times: Times) -> Record:
    pixels = 3 * options.image_size**2
    return {
        "case": f"{SUITE}/{classes}",
        "about": f"ResNet-{DEPTH}",
        "operator": "training step",
        "sizes": {"B": options.batch_size, "C": classes, "D": pixels},
        "dtype": "float32",
        "backward": True,
        "input_sets": 1,
        "contender": name,
        "role": "other" if name == PLAIN else "ours",
        "status": "timed",
        "reason": None,
        "seconds": asdict(times),
        "error": None,
        "tolerance": None,
        # The images and their classes; what a network moves inside is not counted.
        "bytes": options.batch_size * (4 * pixels + 8),
        "flops": None,
        "gigabytes_per_second": None,
        **dict.fromkeys(f"percent_of_{what}" for what in ("sum", "read", "copy")),
        "memory": None,
    }


def relative_cost(case: Sequence[Record], method: str) -> float:
    """How many times a plain step of the same case a step of the method takes."""
    cost = tables.speedup(case, PLAIN, method)
    assert cost is not None, f"{method} and {PLAIN} are measured together"
    return cost


def markdown(found: Sequence[Record], source: str) -> str:
    """The table of costs, with what they were measured on.

    Args:
        source: link to the file of the records, relative to the document.
    """
    cases = tables.cases(found)
    methods = _methods(found)
    rivals = [name for name in ("projection", "sketch") if {name, "exact"} <= {*methods}]
    header = ["classes", "plain step", *methods, *(f"exact over {name}" for name in rivals)]
    lines = [_row(header), _row(["--:"] * len(header))]
    for case in cases:
        plain = next(record for record in case if record["contender"] == PLAIN)
        lines.append(
            _row(
                [
                    str(plain["sizes"]["C"]),
                    tables.time_cell(plain),
                    *(tables.factor(relative_cost(case, name)) for name in methods),
                    *(tables.factor(tables.speedup(case, name, "exact")) for name in rivals),
                ]
            )
        )
    return "\n\n".join(
        [
            _provenance(found),
            "\n".join(lines),
            _samples(found),
            f"Data: [{source}]({source}).",
        ]
    )


def check_markers(document: str) -> None:
    """Raise TableError unless ``document`` has one place for the table."""
    once = document.count(BEGIN) == 1 and document.count(END) == 1
    if not once or document.index(BEGIN) > document.index(END):
        raise TableError(f"needs these two lines once, around the table's place:\n{BEGIN}\n{END}")


def put_into(document: str, found: Sequence[Record], source: str) -> str:
    """``document`` with its table brought up to date."""
    check_markers(document)
    head, _, rest = document.partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n\n{markdown(found, source)}\n\n{END}{tail}"


def plot(found: Sequence[Record]) -> str:
    """The costs against the number of classes, as SVG; the same text for the same records."""
    cases = tables.cases(found)
    classes = [case[0]["sizes"]["C"] for case in cases]
    with styled(), rc_context({"svg.hashsalt": SUITE, "axes.grid.axis": "both"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axis = figure.subplots()
        axis.axhline(1, color="#9aa1ab", linewidth=1)
        for colour, method in zip(COLOURS[1:], _methods(found), strict=False):
            costs = [relative_cost(case, method) for case in cases]
            axis.plot(classes, costs, "o-", color=colour, linewidth=1.8, markersize=4.5)
            axis.annotate(
                method,
                (classes[-1], costs[-1]),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                color=colour,
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(classes, [str(number) for number in classes])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axis.set_xlabel("classes")
        axis.set_title("A training step, relative to one with cross entropy alone")
        axis.grid(visible=True)
        axis.set_axisbelow(True)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _methods(found: Sequence[Record]) -> list[str]:
    names = dict.fromkeys(record["contender"] for record in found)
    return [name for name in names if name != PLAIN]


def _provenance(found: Sequence[Record]) -> str:
    first = found[0]
    machine, versions, sizes = first["machine"], first["versions"], first["sizes"]
    threads, cores = first["settings"]["threads"], machine["cores"]
    busy = f", busy with other work (load {machine['load']:.1f})"
    commit = first["commit"]
    revision = f", commit {commit['revision'][:10]}" if commit else ""
    changed = " with changes" if commit and commit["changed"] else ""
    return (
        f"{first['about']} on {sizes['B']} images of {sizes['D']} numbers; {machine['cpu']}, "
        f"{threads} threads on {cores} cores{busy if environment.is_busy(machine) else ''}, "
        f"torch {versions['torch']}, introkernels {versions['introkernels']}{revision}{changed}."
    )


def _samples(found: Sequence[Record]) -> str:
    """Of how many steps each number is the median."""
    most = max(record["seconds"]["samples"] for record in found)
    fewer = [
        f"{record['contender']} at {record['sizes']['C']} classes {record['seconds']['samples']}"
        for record in found
        if record["seconds"]["samples"] < most
    ]
    return f"Medians of {most} steps" + (f"; {', '.join(fewer)}." if fewer else ".")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _fail(message: object, status: int) -> int:
    print(f"explain_cost.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
