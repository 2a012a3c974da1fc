"""What a study says of the claims of introspective learning: verdicts by rule, in words.

The claims are those in the abstract of Gu, Wu and Tresp, "Introspective Learning by Distilling
Knowledge from Online Self-explanation", ACCV 2020, arXiv:2009.09140, in our wording. A verdict
rests on paired differences of test accuracy over all cells, and is about this study alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from introkernels.train.findings import number, readable
from introkernels.train.study.analysis import Difference, Results

SUPPORTED = "supported here"
PARTLY = "partly supported here"
NOT_SUPPORTED = "not supported here"
NOT_STUDIED = "not part of this study"

COMPETITORS = ("kd", "born_again", "deep_mutual_learning")
RESPONSES = "responses in the other classes"
SIMILARITY = "class similarity"


@dataclass(frozen=True)
class Evidence:
    """One comparison.

    Attributes:
        question: what the comparison is to show.
        difference: the method that the claim speaks for, minus another.
        above: what the lower bound of the interval has to exceed; fraction.
        counts: whether the verdict depends on it.
    """

    question: str
    difference: Difference
    above: float = 0.0
    counts: bool = True

    @property
    def holds(self) -> bool:
        """Whether the lower bound exceeds `above`, and no run of the favoured method diverged.

        Were its diverged runs forgotten, a method could win by failing where it is hard.
        """
        low = self.difference.low
        return low is not None and low > self.above and not self.difference.unfinished


@dataclass(frozen=True)
class Judgement:
    """A verdict in one place: the comparisons, and what the study lacks for the whole claim."""

    verdict: str
    evidence: tuple[Evidence, ...]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A claim and what became of it.

    Attributes:
        key: `a`, `b` or `c`.
        statement: the claim.
        rule: when it counts as supported.
        verdict: `supported here`, `partly supported here`, `not supported here` or
            `not part of this study`.
        sentences: what the numbers say.
        evidence: the comparisons over all cells.
        by_cell: the same judgement in every cell, by its name; empty with one cell only.
    """

    key: str
    statement: str
    rule: str
    verdict: str
    sentences: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    by_cell: dict[str, Judgement]


def judge(results: Results) -> list[Claim]:
    """The three claims, judged."""
    return [teacher_outputs(results), beats_regularisation(results), competitive(results)]


def teacher_outputs(results: Results) -> Claim:
    """(a): what makes a teacher's outputs work."""

    def in_place(cell: int | None) -> Judgement:
        works = _evidence(results, "does distillation work at all?", "kd", "standard", cell)
        responses = _evidence(results, RESPONSES, "kd_permuted", "kd_ground_truth_only", cell)
        similarity = [
            *_evidence(results, SIMILARITY, "kd_class_average", "kd_ground_truth_only", cell),
            *_evidence(results, SIMILARITY, "kd", "kd_permuted", cell),
        ]
        lacks = {
            f"the effect of {RESPONSES}": not responses,
            f"the whole effect of {SIMILARITY}": len(similarity) < 2,
        }
        missing = tuple(name for name, lacking in lacks.items() if lacking)
        evidence = (*works, *responses, *similarity)
        if not works or not (responses or len(similarity) == 2):
            return Judgement(NOT_STUDIED, evidence, missing)
        effects = [
            bool(responses) and responses[0].holds,
            len(similarity) == 2 and all(one.holds for one in similarity),
        ]
        if not works[0].holds or not any(effects):
            return Judgement(NOT_SUPPORTED, evidence, missing)
        return Judgement(SUPPORTED if all(effects) else PARTLY, evidence, missing)

    return _claim(
        results,
        "a",
        "Responses in the classes other than the true one, and class similarity, in a teacher’s "
        "outputs both make distillation work.",
        "Supported if distillation (kd) beats standard training and both effects are above zero; "
        "partly supported if one is. Responses: the teacher’s other probabilities permuted, minus "
        "spread evenly. Class similarity shows twice, and both count: each class’s average outputs "
        "minus the others spread evenly, and the teacher’s own outputs minus permuted ones.",
        in_place,
        "needs kd, standard training and the component study of a teacher",
    )


def beats_regularisation(results: Results) -> Claim:
    """(b): better than standard training and regularisation."""
    own = results.study["representative"]

    def in_place(cell: int | None) -> Judgement:
        needed = {
            group: _each(results, group, own, results.of_group(group), cell)
            for group in ("standard", "regularisation")
        }
        beside = _each(
            results, "self-teaching", own, results.of_group("self-teaching"), cell, counts=False
        )
        missing = tuple(
            {"standard": "standard training", "regularisation": "regularisation methods"}[group]
            for group, evidence in needed.items()
            if not evidence
        )
        return _all_or_some([*needed["standard"], *needed["regularisation"]], missing, beside)

    claim = _claim(
        results,
        "b",
        "Introspective learning beats standard training and regularisation.",
        f"Judged of {readable(own)}, which the plan named before any result. Supported if its "
        "difference to standard training and to each regularisation method is above zero; partly "
        "supported if some are. Methods that teach themselves are compared too, but don’t count.",
        in_place,
        f"needs {readable(own)} and something to compare it with",
    )
    return replace(claim, sentences=(*claim.sentences, *_part_of_similarity(results, own)))


def _part_of_similarity(results: Results, own: str) -> list[str]:
    """Whether what a method gains is due to class similarity: its controls lack nothing else."""
    controls = _each(results, "control", own, results.of_group("control"), None)
    if not controls:
        return []
    as_good = [_reference(one) for one in controls if not one.holds]
    if as_good:
        conclusion = (
            "What it gains can’t be put down to class similarity here: it isn’t shown to be better "
            f"than {_listed(as_good)}, with soft labels of the same mass without it."
        )
    else:
        conclusion = "Class similarity has a part in what it gains: it is better than each control."
    return [*(_sentence(one) for one in controls), conclusion]


def competitive(results: Results) -> Claim:
    """(c): not inferior to teachers and peers."""
    own, margin = results.study["representative"], results.study["margin"] / 100

    def in_place(cell: int | None) -> Judgement:
        evidence = [
            one
            for name in COMPETITORS
            for one in _each(results, results.group.get(name, ""), own, [name], cell, above=-margin)
        ]
        missing = tuple(readable(name) for name in COMPETITORS if name not in results.group)
        return _all_or_some(evidence, missing)

    return _claim(
        results,
        "c",
        "Introspective learning keeps up with teachers and with peers, and needs neither.",
        f"Judged of {readable(own)} by non-inferiority: supported if the interval of its "
        f"difference to each of {_listed(map(readable, COMPETITORS))} lies above "
        f"−{margin * 100:g} percentage points, the margin in the plan; partly supported if "
        "some do.",
        in_place,
        f"needs {readable(own)} and a method with teachers or peers",
    )


def _claim(
    results: Results,
    key: str,
    statement: str,
    rule: str,
    in_place: Callable[[int | None], Judgement],
    needs: str,
) -> Claim:
    whole = in_place(None)
    cells = range(len(results.cells)) if len(results.cells) > 1 else range(0)
    by_cell = {results.cells[cell]: in_place(cell) for cell in cells}
    if whole.verdict == NOT_STUDIED:
        sentences = [f"Not part of this study: it {needs}."]
    else:
        sentences = [_sentence(one) for one in whole.evidence]
        sentences += _summary(whole)
        if by_cell:
            sentences.append(_over_cells(by_cell))
        sentences += _diverged(whole)
    return Claim(key, statement, rule, whole.verdict, tuple(sentences), whole.evidence, by_cell)


def _evidence(
    results: Results, question: str, method: str, reference: str, cell: int | None
) -> list[Evidence]:
    return _each(results, question, method, [reference], cell)


def _each(
    results: Results,
    question: str,
    method: str,
    references: Iterable[str],
    cell: int | None,
    *,
    above: float = 0.0,
    counts: bool = True,
) -> list[Evidence]:
    """The comparisons with those references that are part of the study."""
    if method not in results.group:
        return []
    return [
        Evidence(question, results.difference(method, reference, cell), above, counts)
        for reference in references
        if reference in results.group
    ]


def _all_or_some(
    needed: list[Evidence], missing: tuple[str, ...], beside: Iterable[Evidence] = ()
) -> Judgement:
    """Supported if all hold and none is missing, partly if some hold."""
    evidence = (*needed, *beside)
    if not needed:
        return Judgement(NOT_STUDIED, evidence, missing)
    if not any(one.holds for one in needed):
        return Judgement(NOT_SUPPORTED, evidence, missing)
    whole = all(one.holds for one in needed) and not missing
    return Judgement(SUPPORTED if whole else PARTLY, evidence, missing)


def _sentence(evidence: Evidence) -> str:
    found = evidence.difference
    if found.low is None or found.high is None:
        told = found.outcome if found.mean is None else f"{found.points} points, {found.outcome}"
    else:
        mean, low, high = (
            number(100 * value, 2, sign=True)
            for value in (found.mean or 0.0, found.low, found.high)
        )
        told = f"{mean} points (95 % interval {low} to {high}, {len(found.by_seed)} seeds): "
        told += found.outcome
        if evidence.above:
            told += ", " + ("" if found.low > evidence.above else "not shown to be ")
            told += "within the margin" if found.low <= 0 else "and so within the margin"
    question = evidence.question[0].upper() + evidence.question[1:]
    return f"{question}{'' if question.endswith('?') else ':'} {_pair(evidence)} {told}."


def _summary(judgement: Judgement) -> list[str]:
    """Which comparisons hold, where only some do, and what the study lacks."""
    counted = [one for one in judgement.evidence if one.counts]
    sentences = []
    if judgement.verdict == PARTLY:
        one_method = len({one.difference.method for one in counted}) == 1
        name, word = (_reference, "against") if one_method else (_pair, "for")
        holds, fails = (
            _listed(name(one) for one in counted if one.holds is wanted) for wanted in (True, False)
        )
        sentences.append(f"Shown {word} {holds}" + (f"; not {word} {fails}." if fails else "."))
    if judgement.missing:
        sentences.append(f"Not part of this study: {_listed(judgement.missing)}.")
    return sentences


def _over_cells(by_cell: dict[str, Judgement]) -> str:
    parts = []
    for verdict in (SUPPORTED, PARTLY, NOT_SUPPORTED):
        names = [name for name, judgement in by_cell.items() if judgement.verdict == verdict]
        if names:
            parts.append(f"{verdict.removesuffix(' here')} in {len(names)}")
    return f"By the same rule in each of the {len(by_cell)} cells alone: {', '.join(parts)}."


def _diverged(judgement: Judgement) -> list[str]:
    """A sentence for every method that a comparison favours and that did not always finish."""
    unfinished = {
        one.difference.method: one.difference.unfinished
        for one in judgement.evidence
        if one.difference.unfinished
    }
    return [
        f"{readable(method)} did not finish with {count} of the seeds; what it leaves out can’t "
        "count in its favour, so none of its comparisons counts as shown."
        for method, count in unfinished.items()
    ]


def _pair(evidence: Evidence) -> str:
    return f"{readable(evidence.difference.method)} − {_reference(evidence)}"


def _reference(evidence: Evidence) -> str:
    return readable(evidence.difference.reference)


def _listed(words: Iterable[str]) -> str:
    first = list(words)
    last = first[-1:]
    return " and ".join([", ".join(first[:-1])] * bool(first[:-1]) + last)
