"""Does the suite have teeth? Faults planted in the kernels, each caught by a test named here."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import planting

import introkernels

pytestmark = pytest.mark.slow

PACKAGE = Path(introkernels.__file__).resolve().parent


class Fault(NamedTuple):
    """A fault, and who notices it.

    Attributes:
        what: what is wrong.
        file: of the kernels.
        line: what the file has exactly once.
        replacement: what it has instead.
        test: the one that has to fail, by its id below tests/.
    """

    what: str
    file: str
    line: str
    replacement: str
    test: str

    def places(self) -> int:
        """How often the file has the line."""
        return (PACKAGE / planting.KERNELS / self.file).read_text().count(self.line)


ACCURACY = "losses/test_accuracy.py::"
DETERMINISM = "losses/test_determinism.py::test_results_do_not_depend_on_uninitialised_memory"
EXTREMES = "losses/test_extremes.py::"
LAYOUTS = "losses/test_layouts.py::"
LOSSES = "triton/test_triton_losses.py::"
MASKED = "losses/test_masked.py::"
STATISTICS = "triton/test_triton_statistics.py::"
UNCHECKED = "triton/test_triton_offsets.py::"

FAULTS = (
    Fault(
        "the largest logit is not taken away",
        "rows.py",
        "of_z = z * UNIT - z_max[:, None, :, None]",
        "of_z = z * UNIT",
        f"{EXTREMES}test_uniform_distributions[triton-distillation_loss-torch.float32]",
    ),
    Fault(
        "distances overflow",
        "rows.py",
        "UNIT = tl.constexpr(2.0**-20)",
        "UNIT = tl.constexpr(1.0)",
        f"{LOSSES}test_distances_beyond_the_range_of_float32[torch.float32]",
    ),
    Fault(
        "the sum of earlier tiles stays relative to their own largest logit",
        "rows.py",
        "sum_1 *= tl.exp2(z_step * base_2)",
        "sum_1 *= 1",
        f"{ACCURACY}test_one_large_row[triton-torch.float32]",
    ),
    Fault(
        "the teacher's sum of earlier tiles stays relative to their own largest logit",
        "rows.py",
        "    teacher_sum *= teacher_scale",
        "    teacher_sum *= 1",
        f"{LOSSES}test_maxima_of_later_tiles[1.0-torch.float32]",
    ),
    Fault(
        "the divergence of earlier tiles stays relative to their own largest logits",
        "rows.py",
        "(cross + teacher_sum * (t_step - z_step))",
        "cross",
        f"{ACCURACY}test_one_large_row[triton-torch.float32]",
    ),
    Fault(
        "weighted logits of earlier tiles stay relative to their own largest logit",
        "rows.py",
        "weighted_logits += weight_sum * z_step",
        "weighted_logits += 0",
        f"{LOSSES}test_tiles_without_classes_or_labels[torch.float32]",
    ),
    Fault(
        "a class that doesn't exist keeps its soft label",
        "rows.py",
        "t = tl.where(exists, t, NEVER)",
        "t = t",
        f"{MASKED}TestMaskedClasses::test_row_without_its_masked_classes"
        "[triton-none-torch.float32-distillation_loss]",
    ),
    Fault(
        "a class without a soft label makes the divergence NaN",
        "rows.py",
        "tl.maximum(of_t - of_z, 4 * lowest(z.dtype))",
        "(of_t - of_z)",
        f"{MASKED}TestTeacherWithoutLabels::test_minus_infinity_is_no_soft_label"
        "[triton-torch.float32]",
    ),
    Fault(
        "label smoothing counts classes that don't exist",
        "rows.py",
        "tl.where(exists, 1.0, 0.0)",
        "tl.where(exists, 1.0, 1.0)",
        f"{MASKED}TestMaskedClasses::test_row_without_its_masked_classes"
        "[triton-none-torch.float32-distillation_loss]",
    ),
    Fault(
        "the infinity of a target that doesn't exist meets a weight of zero",
        "rows.py",
        'ce = tl.where(has_target, ce, ce + float("inf"))',
        'ce = ce + weight_target * tl.where(has_target, 0, float("inf"))',
        f"{MASKED}TestMaskedTarget::test_costs_infinity_whatever_its_share_in_the_cross_entropy"
        "[triton-0.0-0.5-torch.float32]",
    ),
    Fault(
        "the stride of columns is ignored",
        "rows.py",
        "(wide * logits_stride, wide",
        "(wide, wide",
        f"{LAYOUTS}test_strides_of_all_tensors[triton-distillation-every_third]",
    ),
    Fault(
        "the stride of rows is that of columns",
        "rows.py",
        "logits + rows * logits_row_stride\n    of_teacher",
        "logits + rows * logits_stride\n    of_teacher",
        f"{LAYOUTS}test_strides_of_all_tensors[triton-distillation-offset_rows]",
    ),
    Fault(
        "offsets of columns in 32 bits",
        "rows.py",
        "(wide * logits_stride, wide",
        "(column * logits_stride, wide",
        f"{UNCHECKED}test_distillation_of_far_rows_and_classes[logits-1]",
    ),
    Fault(
        "class weights are taken to be contiguous",
        "rows.py",
        "weight + columns.to(tl.int64) * weight_stride",
        "weight + columns.to(tl.int64)",
        f"{LAYOUTS}test_strides_of_each_tensor[triton-distillation-every_third]",
    ),
    Fault(
        "a tile reads beyond the last class",
        "rows.py",
        "mask = rows[None, None, :, None] & inside",
        "mask = rows[None, None, :, None] & (vector >= 0)",
        f"{LAYOUTS}test_strides_of_all_tensors[triton-distillation-offset_rows]",
    ),
    Fault(
        "a number that the backward needs is not kept",
        "rows.py",
        "(lane < num_kept - first)",
        "(lane < num_kept - 1 - first)",
        f"{DETERMINISM}[triton-distillation]",
    ),
    Fault(
        "a target that is no class costs nothing",
        "rows.py",
        'ce = tl.where(unknown, float("nan"), tl.where(live, ce, 0))',
        "ce = tl.where(live & ~unknown, ce, 0)",
        f"{UNCHECKED}test_target_that_is_no_class_spoils_its_row_alone[False-distillation_loss]",
    ),
    Fault(
        "a class that doesn't exist gets a gradient",
        "losses.py",
        "grad = tl.where(z == NEVER, 0, grad)",
        "grad = tl.where(z == NEVER, grad, grad)",
        f"{MASKED}TestMaskedClasses::test_row_without_its_masked_classes"
        "[triton-none-torch.float32-distillation_loss]",
    ),
    Fault(
        "the gradient of ignored rows is not written",
        "losses.py",
        "grad, mask=exists_row & inside)",
        "grad, mask=known[None, None, :, None] & inside)",
        f"{DETERMINISM}[triton-distillation]",
    ),
    Fault(
        "the gradient of a mean is that of a sum",
        "losses.py",
        "ce_scale /= tl.load(totals).to(dtype)",
        "ce_scale /= 1",
        f"{ACCURACY}test_row_counts[triton-8-distillation_loss]",
    ),
    Fault(
        "the incoming gradient is taken to be contiguous",
        "losses.py",
        "grad_loss + rows * grad_loss_stride",
        "grad_loss + rows",
        f"{LAYOUTS}test_incoming_gradient_of_any_layout[triton-distillation_loss]",
    ),
    Fault(
        "the target's own teacher logit is computed",
        "introspective.py",
        "t = tl.where(c == y, 0, t).to(dtype)",
        "t = t.to(dtype)",
        f"{EXTREMES}TestDegenerateExplanations::"
        "test_no_explanation_is_like_the_target_and_the_target_is_like_itself"
        "[triton-torch.float32-cosine-softmax]",
    ),
    Fault(
        "the product of two squared norms underflows",
        "introspective.py",
        "norm = _root(sq_norms) * _root(sq_norm_target)",
        "norm = _root(sq_norms * sq_norm_target)",
        f"{EXTREMES}TestDegenerateExplanations::test_explanations_around_1e_18"
        "[triton-torch.float32-cosine-softmax]",
    ),
    Fault(
        "similarities are not clamped",
        "introspective.py",
        "s = tl.where(s > 1, 1, s)",
        "s = tl.where(s > 1, s, s)",
        f"{ACCURACY}test_label_options[triton-projection-softmax-torch.float32-introspective_loss]",
    ),
    Fault(
        "explanations of no length are like nothing",
        "introspective.py",
        "s = tl.where(norm == 0, 0, dots / norm)",
        "s = dots / norm",
        f"{EXTREMES}TestDegenerateExplanations::test_a_class_or_a_target_without_explanation"
        "[triton-torch.float32]",
    ),
    Fault(
        "a norm that overflowed passes for a right angle",
        "introspective.py",
        's = tl.where(norm == float("inf"), float("nan"), s)',
        's = tl.where(norm == float("inf"), 0, s)',
        f"{LOSSES}test_a_norm_that_overflowed_makes_its_row_nan",
    ),
    Fault(
        "the place among the explained classes is taken for the class",
        "introspective.py",
        "tl.store(teacher + c, t, mask=",
        "tl.store(teacher + k, t, mask=",
        f"{ACCURACY}test_class_index[triton-softmax-cosine-False-torch.float32]",
    ),
    Fault(
        "classes that nobody explained are not written",
        "introspective.py",
        "tl.store(teacher + c, unnamed, mask=c < num_classes)",
        "tl.store(teacher + c, unnamed, mask=c < 0)",
        f"{DETERMINISM}[triton-introspective-explained]",
    ),
    Fault(
        "explained classes need not exist",
        "introspective.py",
        'tl.where(tl.sum(outside, 0) == 0, NEVER, float("nan"))',
        "tl.where(tl.sum(outside, 0) == 0, NEVER, NEVER)",
        f"{UNCHECKED}test_explained_classes_that_do_not_fit_spoil_their_row_alone"
        "[class beyond-introspective_loss]",
    ),
    Fault(
        "the last program but one believes to be the last",
        "reduction.py",
        "== num_programs - 1",
        "== num_programs - 2",
        f"{ACCURACY}test_row_counts[triton-33-distillation_loss]",
    ),
    Fault(
        "the number of rows that count is not written",
        "reduction.py",
        "tl.store(totals + 1, num_live)",
        "tl.store(totals + 1, num_live, mask=num_live < 0)",
        f"{DETERMINISM}[triton-distillation]",
    ),
    Fault(
        "only the first block of programs is added up",
        "reduction.py",
        "for begin in range(0, num_programs, BLOCK):",
        "for begin in range(0, BLOCK, BLOCK):",
        f"{UNCHECKED}test_more_programs_than_the_last_one_adds_up_at_once[mean]",
    ),
    Fault(
        "a term that is switched off spoils the loss",
        "reduction.py",
        "of_ce = tl.where(ce_weight > 0, ce_weight * ce, 0)",
        "of_ce = ce_weight * ce",
        f"{MASKED}TestMaskedTarget::test_costs_infinity_and_keeps_a_finite_gradient"
        "[triton-softmax-torch.float32-distillation_loss]",
    ),
    Fault(
        "the last slice of a row is left out",
        "statistics.py",
        "mask=(number < num_slices)[:, None]",
        "mask=(number < num_slices - 1)[:, None]",
        f"{STATISTICS}test_small_slices_and_tiles[False-torch.float32]",
    ),
    Fault(
        "slices are collected before all groups of classes have arrived",
        "statistics.py",
        "is_last_to_arrive(counters + row, num_slices * num_groups)",
        "is_last_to_arrive(counters + row, num_slices)",
        f"{STATISTICS}test_classes_in_groups[False]",
    ),
    Fault(
        "statistics of ignored rows are not written",
        "statistics.py",
        "tl.store(sq_norms + classes, zeros, mask=classes < num_classes)",
        "tl.store(sq_norms + classes, zeros, mask=classes < 0)",
        f"{STATISTICS}test_ignored_rows_are_zero_whatever_they_hold[nan-False]",
    ),
    Fault(
        "the stride of rows of inputs counts elements, not vectors",
        "statistics.py",
        "inputs + row * inputs_row_stride * SHAPE.vector",
        "inputs + row * inputs_row_stride",
        f"{STATISTICS}test_numbers_of_classes_around_the_boundaries_of_tiles[False]",
    ),
    Fault(
        "the mean counts places of a tile beyond the last class",
        "statistics_slice.py",
        "inside = (tl.arange(0, BLOCK_K) < num_classes)[None, :, None]",
        "inside = (tl.arange(0, BLOCK_K) >= 0)[None, :, None]",
        f"{STATISTICS}test_numbers_of_classes_around_the_boundaries_of_tiles[True]",
    ),
    Fault(
        "the stride of the outermost dimension of explanations is ignored",
        "statistics_slice.py",
        "return offsets + index * strides[0]",
        "return offsets + index * strides[1]",
        f"{LAYOUTS}test_layouts_of_gradients[triton-gaps between rows and columns-False]",
    ),
    Fault(
        "the target need not be explained",
        "statistics_slice.py",
        'dot = tl.where(known, dot, float("nan"))',
        "dot = tl.where(known, dot, 0)",
        f"{UNCHECKED}test_explained_classes_that_do_not_fit_spoil_their_row_alone"
        "[target missing-introspective_loss]",
    ),
    Fault(
        "places beyond the last explained class name class 0",
        "statistics_slice.py",
        "tl.where(inside & (named == target), classes, -1)",
        "tl.where(named == target, classes, -1)",
        "losses/test_stats.py::test_class_0_among_explained_classes[triton]",
    ),
)


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, planting.Run]:
    """The runs of all faults whose tests were asked for, and one without a fault, by name."""
    asked = {
        item.callspec.params["fault"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    faults = [fault for fault in FAULTS if fault in asked and fault.places() == 1]
    work = []
    for fault in (None, *faults):
        folder = tmp_path_factory.mktemp("planted")
        if fault is None:
            planting.copy(PACKAGE, folder)
            tests = sorted({fault.test for fault in faults or FAULTS})
        else:
            planting.plant(PACKAGE, folder, fault.file, fault.line, fault.replacement)
            tests = [fault.test]
        work.append(planting.Work(folder, folder, tests, {}))
    names = ["", *(fault.what for fault in faults)]
    results = planting.run_all(
        work,
        {"TRITON_INTERPRET": "1", "INTROKERNELS_TEST_BACKENDS": "triton"},
        ["triton.runtime.interpreter"],
    )
    return dict(zip(names, results, strict=True))


def test_without_a_fault_all_of_these_tests_pass(runs: dict[str, planting.Run]) -> None:
    run = runs[""]
    assert run.status == pytest.ExitCode.OK, run.output
    assert not run.failed
    assert run.passed


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_is_caught(fault: Fault, runs: dict[str, planting.Run]) -> None:
    assert fault.places() == 1, "the kernel has changed, and its fault has to"
    run = runs[fault.what]
    assert run.status == pytest.ExitCode.TESTS_FAILED, run.output
    assert list(run.failed) == [f"tests/{fault.test}"], run.output
    ((kind, message),) = run.failed.values()
    assert kind == "AssertionError", message
    # What fails here passed without the fault.
    assert f"tests/{fault.test}" in runs[""].passed


def test_faults_are_told_apart_by_their_names() -> None:
    assert len({fault.what for fault in FAULTS}) == len(FAULTS)
