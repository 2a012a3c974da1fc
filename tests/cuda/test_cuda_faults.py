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


COUNTS = "cuda/test_cuda_rows.py::test_class_counts[torch.float32]"
DETERMINISM = "losses/test_determinism.py::test_results_do_not_depend_on_uninitialised_memory"
EXTREMES = "losses/test_extremes.py::"
LAYOUTS = "losses/test_layouts.py::"
MASKED = "losses/test_masked.py::"
WITHOUT_MASKED = (
    f"{MASKED}TestMaskedClasses::test_row_without_its_masked_classes"
    "[cuda-none-torch.float32-distillation_loss]"
)
ROWS = "cuda/test_cuda_rows.py::"
STATISTICS = "cuda/test_cuda_statistics.py::"
TEACHER = f"{STATISTICS}test_teacher_logits_of_the_fused_loss"
WHERE = f"{ROWS}test_where_the_largest_logits_come"

FAULTS = (
    Fault(
        "the largest logit is that of a thread",
        "cuda/row_loss.h",
        "group->reduce(largest, Largest{});",
        "",
        COUNTS,
    ),
    Fault(
        "the largest logit is not taken away",
        "cuda/row_loss.h",
        "const T z_from = -kUnit<T> * z_max,",
        "const T z_from = 0,",
        f"{WHERE}[last_class_is_sure_to_both-torch.float32]",
    ),
    Fault(
        "sums stay as they are where a larger logit comes",
        "cuda/row_loss.h",
        "move_to(z_top, t_top, exponents);",
        "{ z_max = z_top; t_max = t_top; }",
        f"{WHERE}[sorted_upwards-torch.float32]",
    ),
    Fault(
        "sums stay as they are where a larger teacher logit comes",
        "cuda/row_loss.h",
        "if (z_top > z_max || t_top > t_max)",
        "if (z_top > z_max)",
        f"{WHERE}[last_class_is_sure_to_the_teacher-torch.float32]",
    ),
    Fault(
        "the sum of distances keeps its references",
        "cuda/row_loss.h",
        "fma_of(teacher_sum, t_step - z_step, cross)",
        "cross",
        f"{WHERE}[sorted_upwards-torch.float32]",
    ),
    Fault(
        "the weighted logits keep their reference",
        "cuda/row_loss.h",
        "weighted_logits = fma_of(weight_sum, z_step, weighted_logits);",
        "",
        f"{ROWS}test_class_counts_of_mixed_dtypes[True-torch.float16]",
    ),
    Fault(
        "distances are beyond what their type holds",
        "cuda/row_loss.h",
        "constexpr T kUnit = T(0x1p-64);",
        "constexpr T kUnit = T(1);",
        f"{ROWS}test_a_divergence_near_the_largest_number[torch.float32]",
    ),
    Fault(
        "soft labels below the smallest number are none",
        "cuda/row_loss.h",
        "constexpr int kBias = 32;",
        "constexpr int kBias = 0;",
        f"{ROWS}test_soft_labels_below_the_smallest_number[same_vector]",
    ),
    Fault(
        "what is far below the largest teacher logit of a group is none",
        "cuda/row_loss.h",
        "const T root = exp2_of(T(0.5) * (t_step * exponents.of_t));",
        "T root = exp2_of(t_step * exponents.of_t);\n    root = sqrt(root);",
        f"{ROWS}test_soft_labels_below_the_smallest_number[another_thread]",
    ),
    Fault(
        "a class without a soft label has a distance from it",
        "cuda/row_loss.h",
        "of_cross = q > 0 ? fma_of(q, e - d, of_cross) : of_cross;",
        "of_cross = fma_of(q, e - d, of_cross);",
        f"{WHERE}[first_classes_have_no_label-torch.float32]",
    ),
    Fault(
        "a class that does not exist keeps its soft label",
        "cuda/row_loss.h",
        "t[i] = z[i] == kNever<T> ? kNever<T> : t[i];",
        "",
        WITHOUT_MASKED,
    ),
    Fault(
        "label smoothing counts classes that do not exist",
        "cuda/row_loss.h",
        "if (z[i] != kNever<T>) {",
        "{",
        WITHOUT_MASKED,
    ),
    Fault(
        "roundings of a long row add up",
        "cuda/row_loss.h",
        "of_1 = i == 0 ? p_1 : of_1 + p_1;",
        "of_1 = 0, sum += p_1;",
        f"{ROWS}test_many_classes_of_a_thread",
    ),
    Fault(
        "the last part of a row is taken for all of it",
        "cuda/row_loss.cu",
        "shared->sums[0].add(shared->sums[i]);",
        "shared->sums[0] = shared->sums[i];",
        f"{ROWS}test_parts_of_a_row[sorted_upwards-torch.float32]",
    ),
    Fault(
        "the sum of a part stays relative to its own largest logit",
        "common/row_loss.h",
        "moved.sum *= std::exp(z_step);",
        "",
        f"{ROWS}test_parts_of_a_row[sorted_upwards-torch.float32]",
    ),
    Fault(
        "the distances of a part stay relative to its own largest logits",
        "common/row_loss.h",
        "(cross + teacher_sum * ((t_step - z_step) * inverse))",
        "cross",
        f"{ROWS}test_parts_of_a_row[sorted_upwards-torch.float32]",
    ),
    Fault(
        "smoothing is shared out by class weights",
        "common/row_loss.h",
        "options.label_smoothing / row.num_existing * ce_of_all",
        "options.label_smoothing / row.weight_sum * ce_of_all",
        f"{ROWS}test_class_counts_of_mixed_dtypes[True-torch.float16]",
    ),
    Fault(
        "a term that is switched off spoils the loss",
        "common/row_loss.h",
        "options.kl_weight > 0 ? kl_factor * terms.kl : 0.0",
        "kl_factor * terms.kl",
        f"{ROWS}test_a_teacher_without_weight_spoils_nothing[torch.float32]",
    ),
    Fault(
        "a term that is switched off spoils the gradient",
        "cuda/row_loss.cu",
        "rows.options.kl_weight > 0 ? -kUnit<T> * T(call.state[row].t_max) : z_from",
        "-kUnit<T> * T(call.state[row].t_max)",
        f"{ROWS}test_a_teacher_without_weight_spoils_nothing[torch.float32]",
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
        "cuda/row_loss.cu",
        "if (!exists) grad[i] = T(0);",
        "",
        WITHOUT_MASKED,
    ),
    Fault(
        "the gradient of ignored rows is not written",
        "cuda/row_loss.cu",
        "output.store(int64_t(v) * N, rows.num_classes, nothing);",
        "",
        f"{DETERMINISM}[cuda-distillation]",
    ),
    Fault(
        "the gradient of the target is that of another class",
        "cuda/row_loss.cu",
        "if (i == place) grad[i] -= of_target;",
        "",
        COUNTS,
    ),
    Fault(
        "the gradient of a weighted mean is that of a mean",
        "cuda/row_loss.cu",
        "ce /= totals[0];",
        "ce /= totals[1];",
        f"{ROWS}test_rows_of_several_blocks[mean-65]",
    ),
    Fault(
        "the incoming gradient is taken to be contiguous",
        "cuda/operators.cpp",
        "grad.column_stride = grad_loss.stride(0);",
        "grad.column_stride = 1;",
        f"{LAYOUTS}test_incoming_gradient_of_any_layout[cuda-distillation_loss]",
    ),
    Fault(
        "the number of rows that count is not written",
        "cuda/reduction.h",
        "= {sums[2], sums[3], 0,",
        "= {sums[2], kNaN<double>, 0,",
        f"{ROWS}test_rows_of_several_blocks[mean-65]",
    ),
    Fault(
        "only as many rows are added up as a block has threads",
        "cuda/reduction.h",
        "row < rows.num_rows; row += kThreads",
        "row < rows.num_rows && row < kThreads; row += kThreads",
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
        "common/similarity.h",
        "kind == Similarity::kCosine ?",
        "true ?",
        f"{TEACHER}[None-1.0-1-torch.float32]",
    ),
    Fault(
        "the target's own teacher logit is computed",
        "cuda/introspective.cu",
        "k == of_row.position\n",
        "k < 0\n",
        f"{EXTREMES}TestDegenerateExplanations::"
        "test_no_explanation_is_like_the_target_and_the_target_is_like_itself"
        "[cuda-torch.float32-cosine-softmax]",
    ),
    Fault(
        "explanations of no length are like nothing",
        "common/similarity.h",
        "return scale == S(0) ? S(0) : clamped;",
        "return clamped;",
        f"{EXTREMES}TestDegenerateExplanations::"
        "test_no_explanation_is_like_the_target_and_the_target_is_like_itself"
        "[cuda-torch.float32-cosine-softmax]",
    ),
    Fault(
        "the place among the explained classes is taken for the class",
        "cuda/introspective.cu",
        "teacher[c] = (s - T(1))",
        "teacher[k] = (s - T(1))",
        f"{TEACHER}[30-1.0-0-torch.float32]",
    ),
    Fault(
        "classes that are not explained have a label",
        "cuda/introspective.cu",
        "teacher[c] = kNever<T>;",
        "teacher[c] = T(0);",
        f"{TEACHER}[30-1.0-0-torch.float32]",
    ),
    Fault(
        "teacher logits of ignored rows are not written",
        "cuda/introspective.cu",
        "teacher[c] = target.is_live ? kNaN<T> : T(0);",
        "",
        f"{TEACHER}[None-1.0-0-torch.float32]",
    ),
    Fault(
        "a place among the explained classes is taken for the target's",
        "cuda/statistics_row.h",
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
