"""Does the suite have teeth? Faults planted in CUDA sources, each caught by a test named here.

The sources are compiled for the emulation with one line replaced, and the test runs in a process
whose backend is that library.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import emulated_backend, emulation, planting

pytestmark = pytest.mark.slow


class Fault(NamedTuple):
    """A fault, and who notices it.

    Attributes:
        what: what is wrong.
        file: of csrc.
        line: what the file has exactly once.
        replacement: what it has instead.
        test: the one that has to fail, by its id below tests/.
        report: what the emulation says of it, where it is not the test that tells.
        order: in which threads run.
    """

    what: str
    file: str
    line: str
    replacement: str
    test: str
    report: str | None = None
    order: str = "ascending"

    @property
    def path(self) -> Path:
        """The file."""
        return emulation.ROOT / "csrc" / self.file

    @property
    def slug(self) -> str:
        """The name of its library's folder."""
        return re.sub(r"\W+", "-", self.what)

    def places(self) -> int:
        """How often the file has the line."""
        return self.path.read_text().count(self.line)


ACCURACY = "losses/test_accuracy.py::"
COUNTS = "cuda/test_cuda_rows.py::test_class_counts[distillation_case-torch.float32]"
DETERMINISM = "losses/test_determinism.py::test_results_do_not_depend_on_uninitialised_memory"
EXTREMES = "losses/test_extremes.py::"
LAYOUTS = "losses/test_layouts.py::"
MASKED = "losses/test_masked.py::"
WITHOUT_MASKED = (
    f"{MASKED}TestMaskedClasses::test_row_without_its_masked_classes"
    "[cuda-none-torch.float32-distillation_loss]"
)
NEARLY_EQUAL = "cuda/test_cuda_rows.py::test_nearly_equal_distributions_whose_first_vectors_mislead"
ROWS = "cuda/test_cuda_rows.py::"
SURE = f"{ROWS}test_rows_sure_of_a_class_that_comes_late"
STATISTICS = "cuda/test_cuda_statistics.py::"

FAULTS = (
    Fault(
        "the largest logit is that of a thread",
        "cuda/row_loss.h",
        "group->reduce(tops, Largest{});",
        "",
        COUNTS,
    ),
    Fault(
        "the largest logit is not taken away",
        "cuda/row_loss.h",
        "from.z = from.has_logits ? tops[0] : T(0);",
        "from.z = T(0);",
        f"{ROWS}test_first_vectors_mislead[last_class_is_sure_to_both-torch.float32]",
    ),
    Fault(
        "rows whose first vectors misled are not read again",
        "cuda/row_loss.h",
        "if (is_right && keeps_digits) return result;",
        "return result;",
        f"{ROWS}test_first_vectors_mislead[first_classes_are_unlikely-torch.float32]",
    ),
    Fault(
        "a divergence may be what is left of a far larger one",
        "cuda/row_loss.h",
        "2 * error <= divergence;",
        "error <= divergence;",
        f"{SURE}[0.15-5.0-250-torch.bfloat16]",
    ),
    Fault(
        "a gradient may be less than what its row's level lost in rounding",
        "cuda/row_loss.h",
        "if (is_right && keeps_digits) return result;",
        "if (is_right) return result;",
        f"{SURE}[0.15-5.0-60-torch.float32]",
    ),
    Fault(
        "a row is never taken to be sure of a class",
        "cuda/row_loss.h",
        "max_of(kl * (1 - largest_p),",
        "max_of(kl,",
        f"{SURE}[0.15-5.0-250-torch.float32]",
    ),
    Fault(
        "gradients of half types lose what rounding to them does not hide",
        "cuda/row_loss.h",
        "return level <= 2048 * kl;",
        "return true;",
        f"{SURE}[0.01-10.0-2500-torch.bfloat16]",
    ),
    Fault(
        "a thread looks for the likeliest class among its own",
        "cuda/row_loss.h",
        "group->reduce(seen, Largest{});",
        "",
        f"{SURE}[0.15-5.0-250-torch.float32]",
        report="deadlock",
    ),
    Fault(
        "the first shift is a quotient of sums that are almost equal",
        "cuda/row_loss.h",
        "abs_of(excess) < 0.5 ? log1p(excess)",
        "abs_of(excess) < 0.0 ? log1p(excess)",
        f"{ROWS}test_rows_sure_of_a_class_that_comes_first",
    ),
    Fault(
        "what differences of logits lose in rounding is lost",
        "cuda/row_loss.h",
        "const T rounded = lost(t, z, difference) - from.difference_lost;",
        "const T rounded = 0;",
        f"{EXTREMES}test_teacher_logits_over_the_whole_range[cuda-torch.float32]",
    ),
    Fault(
        "the divergence of a class cancels where p is almost q",
        "cuda/row_loss.h",
        "terms.is_near = abs_of(terms.d) < T(1);",
        "terms.is_near = false;",
        f"{EXTREMES}test_divergence_of_nearly_equal_distributions[cuda-0.0-4.0-0.001-torch.float32]",
    ),
    Fault(
        "a polynomial is asked beyond where it is good",
        "cuda/row_loss.h",
        "terms.is_near = abs_of(terms.d) < T(1);",
        "terms.is_near = abs_of(terms.d) < T(4);",
        COUNTS,
    ),
    Fault(
        "the excess of q over p has the other sign far from p",
        "cuda/row_loss.h",
        ": terms.q - terms.p;",
        ": terms.p - terms.q;",
        COUNTS,
    ),
    Fault(
        "a class that does not exist keeps its soft label",
        "cuda/row_loss.h",
        "const T teacher = exists ? t[i] : kNever<T>;",
        "const T teacher = t[i];",
        WITHOUT_MASKED,
    ),
    Fault(
        "label smoothing counts classes that do not exist",
        "cuda/row_loss.h",
        "if (exists) {",
        "{",
        WITHOUT_MASKED,
    ),
    Fault(
        "how the parts of a row share out q and p is left out",
        "cuda/row_loss.h",
        "terms.kl += is_near ? share_p * (d * (d + rest) - rest) : share_q * (d - 1) + share_p;",
        "static_cast<void>(rest);",
        f"{ROWS}test_parts_of_a_row[sorted_upwards-torch.float32]",
    ),
    Fault(
        "the level of a row comes from a part with hardly any of p",
        "cuda/row_loss.h",
        "if (norm_p > largest_norm_p) {",
        "if (largest_norm_p < 0) {",
        f"{NEARLY_EQUAL}[49157-15.0]",
    ),
    Fault(
        "a part of a row without a teacher has nothing of p",
        "cuda/row_loss.h",
        "terms.kl += share_p;",
        "",
        f"{ROWS}test_parts_of_a_row[first_classes_have_no_label-torch.float32]",
    ),
    Fault(
        "the logits of a part stay relative to its own largest one",
        "cuda/row_loss.h",
        "sums.others += part.sums.others * exp(4 * z_from);",
        "sums.others += part.sums.others;",
        f"{ROWS}test_parts_of_a_row[sorted_upwards-torch.float32]",
    ),
    Fault(
        "smoothing is shared out by class weights",
        "common/row_loss.h",
        "(sums.num_existing > 0 ? sums.num_existing : 1.0)",
        "(sums.weight_sum > 0 ? sums.weight_sum : 1.0)",
        f"{ROWS}test_class_counts_of_mixed_dtypes[True-torch.float16]",
    ),
    Fault(
        "a term that is switched off spoils the loss",
        "common/row_loss.h",
        "options.ce_weight > 0 ? options.ce_weight * terms.ce : 0.0",
        "options.ce_weight * terms.ce",
        f"{MASKED}TestMaskedTarget::test_costs_infinity_and_keeps_a_finite_gradient"
        "[cuda-softmax-torch.float32-distillation_loss]",
    ),
    Fault(
        "one class beyond the last one is read",
        "cuda/vectors.h",
        "c < num_classes ? row[c * column_stride_]",
        "c <= num_classes ? row[c * column_stride_]",
        COUNTS,
    ),
    Fault(
        "whole vectors are read beyond the last class",
        "cuda/vectors.h",
        "if (is_whole_ && first + N <= num_classes) {",
        "if (is_whole_) {",
        COUNTS,
    ),
    Fault(
        "columns are taken to be contiguous",
        "cuda/vectors.h",
        "is_whole_ = column_stride_ == 1 &&",
        "is_whole_ =",
        f"{ROWS}test_strides_of_every_tensor[torch.float32]",
    ),
    Fault(
        "the stride of rows is that of columns",
        "cuda/vectors.h",
        "row * matrix.row_stride * size",
        "row * matrix.column_stride * size",
        COUNTS,
    ),
    Fault(
        "offsets of rows in 32 bits",
        "cuda/vectors.h",
        "row * matrix.row_stride * size",
        "int(row * matrix.row_stride * size)",
        f"{ROWS}test_distillation_of_far_rows_and_classes[logits-0]",
    ),
    Fault(
        "offsets of columns in 32 bits",
        "cuda/vectors.h",
        "c < num_classes ? row[c * column_stride_]",
        "c < num_classes ? row[int(c * column_stride_)]",
        f"{ROWS}test_distillation_of_far_rows_and_classes[logits-1]",
    ),
    Fault(
        "half types between two words are put together the wrong way",
        "cuda/vectors.h",
        "pair >> 16 | next << 16",
        "pair << 16 | next >> 16",
        f"{ROWS}test_bits_do_not_depend_on_where_rows_begin[37-torch.bfloat16]",
    ),
    Fault(
        "vectors of gradients are written beyond the last class",
        "cuda/vectors.h",
        "if (c < num_classes) row[c] = both.values[i];",
        "if (c <= num_classes) row[c] = both.values[i];",
        COUNTS,
        order="descending",
    ),
    Fault(
        "a class that does not exist gets a gradient",
        "cuda/row_backward.cu",
        "grad[i] = exists ? sum : T(0);",
        "grad[i] = sum;",
        f"{MASKED}TestMaskedTarget::test_costs_infinity_and_keeps_a_finite_gradient"
        "[cuda-softmax-torch.float32-distillation_loss]",
    ),
    Fault(
        "the gradient of ignored rows is not written",
        "cuda/row_backward.cu",
        "output.store(int64_t(v) * N, rows.num_classes, nothing);",
        "",
        f"{DETERMINISM}[cuda-distillation]",
    ),
    Fault(
        "p - 1 of the target is a difference of two numbers almost equal",
        "cuda/row_backward.cu",
        "(i == place ? target_grad : p)",
        "(i == place ? p - T(1) + T(0) * target_grad : p)",
        f"{EXTREMES}test_cross_entropy_of_a_nearly_sure_row[cuda-1.0-1e-09-torch.float32]",
    ),
    Fault(
        "the gradient of a weighted mean is that of a mean",
        "cuda/row_backward.cu",
        "ce /= call.totals[0];",
        "ce /= call.totals[1];",
        f"{ROWS}test_rows_of_several_blocks[mean-65]",
    ),
    Fault(
        "the incoming gradient is taken to be contiguous",
        "cuda/row_operators.cpp",
        "grad.column_stride = grad_loss.stride(0);",
        "grad.column_stride = 1;",
        f"{LAYOUTS}test_incoming_gradient_of_any_layout[cuda-distillation_loss]",
    ),
    Fault(
        "the number of rows that count is not written",
        "cuda/reduction.h",
        "outputs.totals[1] = sums[3];",
        "",
        f"{DETERMINISM}[cuda-distillation]",
    ),
    Fault(
        "only as many rows are added up as a block has threads",
        "cuda/reduction.h",
        "row < terms.num_rows; row += kThreads",
        "row < terms.num_rows && row < kThreads; row += kThreads",
        f"{ROWS}test_rows_of_several_blocks[mean-300]",
    ),
    Fault(
        "the last block but one believes to be the last",
        "cuda/group.h",
        "atomicAdd(counter, 1) == blocks - 1",
        "atomicAdd(counter, 1) == blocks - 2",
        f"{ROWS}test_rows_of_several_blocks[sum-300]",
    ),
    Fault(
        "threads do not wait to hear who is the last block",
        "cuda/group.h",
        "*flag = atomicAdd(counter, 1) == blocks - 1;\n  __syncthreads();",
        "*flag = atomicAdd(counter, 1) == blocks - 1;",
        f"{ROWS}test_rows_of_several_blocks[sum-300]",
        report="divergent barrier",
        order="descending",
    ),
    Fault(
        "a warp does not wait for the sums of the others",
        "cuda/group.h",
        "__syncthreads();\n#pragma unroll\n",
        "#pragma unroll\n",
        COUNTS,
    ),
    Fault(
        "sums are overwritten by the next ones before all have read them",
        "cuda/group.h",
        "place_is_second_ = !place_is_second_;",
        "",
        COUNTS,
    ),
    Fault(
        "neighbours in a warp do not add up",
        "cuda/group.h",
        "distance > 0; distance /= 2",
        "distance > 1; distance /= 2",
        COUNTS,
    ),
    Fault(
        "the mask of a group is that of the first one of its warp",
        "cuda/group.h",
        "<< (lane & ~(size - 1))",
        "<< (lane & 0)",
        COUNTS,
        report="mask",
    ),
    Fault(
        "projections are taken for cosines",
        "cuda/teacher.h",
        "is_fast_ = kind_ == Similarity::kCosine && is_float(sq_norm_target);",
        "is_fast_ = is_float(sq_norm_target);",
        f"{ACCURACY}test_label_options[cuda-projection-softmax-torch.float32-similarity_loss]",
    ),
    Fault(
        "the target's own teacher logit is computed",
        "cuda/teacher.h",
        "t[i] = first + i == target_ ? T(0) : T(logits_(dots[i], sq_norms[i]));",
        "t[i] = T(logits_(dots[i], sq_norms[i]));",
        f"{EXTREMES}TestDegenerateExplanations::"
        "test_no_explanation_is_like_the_target_and_the_target_is_like_itself"
        "[cuda-torch.float32-cosine-softmax]",
    ),
    Fault(
        "explanations of no length are like nothing",
        "common/similarity.h",
        "return select(scale == zero, zero, select(above > one, one, above));",
        "return select(above > one, one, above);",
        f"{EXTREMES}TestDegenerateExplanations::test_statistics_of_no_length"
        "[cuda-torch.float32-cosine]",
    ),
    Fault(
        "split labels give masked classes a share",
        "cuda/teacher.h",
        "if (c == target || logits.value(c) == kNever<T>) return;",
        "if (c == target) return;",
        f"{MASKED}TestMaskedClasses::test_labels_live_on_the_other_classes"
        "[cuda-cosine-split-similarity_loss]",
    ),
    Fault(
        "the place among the explained classes is taken for the class",
        "cuda/teacher.h",
        "teacher[c] = T(c == target",
        "teacher[c % statistics.num_explained] = T(c == target",
        f"{ACCURACY}test_class_index[cuda-softmax-cosine-False-torch.float32]",
    ),
    Fault(
        "a place among the explained classes is taken for the target's",
        "cuda/teacher.h",
        "if (c == target) found[0] = double(k);",
        "if (k == target) found[0] = double(k);",
        f"{STATISTICS}test_class_index[False-torch.float32]",
    ),
    Fault(
        "copies of the last class count in the mean",
        "cuda/statistics_slice.h",
        "if (first + c >= share_.num_classes) continue;",
        "",
        f"{STATISTICS}test_class_counts[True]",
    ),
    Fault(
        "the mean is that of all other classes",
        "cuda/statistics_slice.h",
        "T(1) / T(share_.num_classes)",
        "T(1) / T(share_.num_classes - 1)",
        f"{STATISTICS}test_class_counts[True]",
    ),
    Fault(
        "a warp overwrites means that another one has not read",
        "cuda/statistics_slice.h",
        "    __syncthreads();\n#pragma unroll\n    for (int i = 0; i < kOfLane; ++i) means_",
        "#pragma unroll\n    for (int i = 0; i < kOfLane; ++i) means_",
        f"{STATISTICS}test_segments[0-True-torch.float32]",
    ),
    Fault(
        "a load beyond the last dimension is made",
        "cuda/statistics_slice.h",
        "is_inside_[load] = i < explanations_.num_dims;",
        "is_inside_[load] = i <= explanations_.num_dims;",
        f"{STATISTICS}test_sizes_around_slices[False-torch.float32]",
    ),
    Fault(
        "lanes exchange with the wrong ones",
        "cuda/statistics_slice.h",
        "__shfl_xor_sync(~0U, sent, 8)",
        "__shfl_xor_sync(~0U, sent, 4)",
        f"{STATISTICS}test_class_counts[False]",
    ),
    Fault(
        "each slice replaces the sums of those before",
        "cuda/statistics_slice.h",
        "+= double(sum);",
        "= double(sum);",
        f"{STATISTICS}test_segments[0-False-torch.float32]",
    ),
    Fault(
        "the stride of the outermost dimension of explanations is ignored",
        "cuda/statistics_slice.h",
        "return offset + i * dims.strides[0];",
        "return offset + i * dims.strides[dims.count - 1];",
        f"{STATISTICS}test_layouts[gaps between rows and columns-False-torch.float32]",
    ),
    Fault(
        "offsets of classes of gradients in 32 bits",
        "cuda/statistics_slice.h",
        "k * explanations_.class_stride",
        "int(k * explanations_.class_stride)",
        f"{STATISTICS}test_far_gradients[(3, 3, 3)-1]",
    ),
    Fault(
        "offsets of rows of inputs in 32 bits",
        "cuda/statistics_slice.h",
        "share_.row * explanations_.input_row_stride",
        "int(share_.row * explanations_.input_row_stride)",
        f"{STATISTICS}test_far_inputs[0]",
    ),
    Fault(
        "statistics of ignored rows are not written",
        "cuda/statistics_row.h",
        "store_statistics(call, result.row, k, 0, 0, 0);",
        "",
        f"{STATISTICS}test_ignored_rows_are_zero_whatever_they_hold[nan-False]",
    ),
)


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, planting.Run]:
    """The runs of all faults whose tests were asked for, and one without a fault in each order."""
    asked = {
        item.callspec.params["fault"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    faults = [fault for fault in FAULTS if (fault in asked or not asked) and fault.places() == 1]
    libraries = emulation.build_variants(
        "planted",
        emulated_backend.sources(),
        {
            fault.slug: (
                fault.path,
                fault.path.read_text().replace(fault.line, fault.replacement),
            )
            for fault in faults
        },
        torch_library=True,
    )
    work = []

    def add(tests: list[str], order: str, library: Path | None) -> None:
        work.append(
            planting.Work(
                tmp_path_factory.mktemp("planted"),
                emulation.ROOT,
                tests,
                {emulation.ORDER_VARIABLE: order}
                | ({emulated_backend.LIBRARY_VARIABLE: str(library)} if library else {}),
            )
        )

    orders = sorted({fault.order for fault in faults})
    for order in orders:
        add(sorted({fault.test for fault in faults if fault.order == order}), order, None)
    for fault in faults:
        add([fault.test], fault.order, libraries[fault.slug])
    names = [*orders, *(fault.what for fault in faults)]
    found = planting.run_all(
        work, {"INTROKERNELS_TEST_BACKENDS": "cuda"}, ["introkernels", "helpers.oracle"]
    )
    return dict(zip(names, found, strict=True))


def test_without_a_fault_all_of_these_tests_pass(runs: dict[str, planting.Run]) -> None:
    for order in {fault.order for fault in FAULTS if fault.what in runs}:
        run = runs[order]
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
    if fault.report is None:
        assert kind == "AssertionError", message
    else:
        assert kind == "call: RuntimeError", message
        assert fault.report in message
    # What fails here passed without the fault.
    assert f"tests/{fault.test}" in runs[fault.order].passed


def test_faults_are_told_apart_by_their_names() -> None:
    assert len({fault.slug for fault in FAULTS}) == len(FAULTS)
