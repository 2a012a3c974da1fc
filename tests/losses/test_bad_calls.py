"""Every bad call raises before a kernel runs, with a message that says what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import introkernels as ik

B, C, K, D, S = 4, 5, 3, 6, (2, 3)
NAN, INF = float("nan"), float("inf")


def good_call(function: str) -> dict[str, Any]:
    """Arguments, optional tensors included, that ``function`` accepts; by name."""
    target = torch.tensor([0, 1, 2, 3])
    logits = torch.zeros(B, C)
    gradients, inputs = torch.ones(B, C, *S), torch.ones(B, *S)
    stats = ik.ExplanationStats(torch.ones(B, C), torch.ones(B, C))
    return {
        "introspective_loss": {
            "logits": logits,
            "target": target,
            "gradients": gradients,
            "inputs": inputs,
            "weight": torch.ones(C),
        },
        "linear_introspective_loss": {
            "features": torch.ones(B, D),
            "weight": torch.ones(C, D),
            "target": target,
            "bias": torch.ones(C),
            "class_weight": torch.ones(C),
        },
        "similarity_loss": {
            "logits": logits,
            "target": target,
            "stats": stats,
            "weight": torch.ones(C),
        },
        "distillation_loss": {
            "logits": logits,
            "teacher": torch.zeros(B, C),
            "target": target,
            "weight": torch.ones(C),
        },
        "linear_distillation_loss": {
            "features": torch.ones(B, D),
            "weight": torch.ones(C, D),
            "teacher": torch.zeros(B, C),
            "target": target,
            "bias": torch.ones(C),
            "class_weight": torch.ones(C),
        },
        "explanation_stats": {"gradients": gradients, "inputs": inputs, "target": target},
        "soft_labels": {"stats": stats, "target": target},
        "teacher_logits": {"stats": stats, "target": target},
    }[function]


LOSSES = (
    "introspective_loss",
    "linear_introspective_loss",
    "similarity_loss",
    "distillation_loss",
    "linear_distillation_loss",
)
FUNCTIONS = (*LOSSES, "explanation_stats", "soft_labels", "teacher_logits")


class BadCall(NamedTuple):
    """A good call with some arguments replaced, and what has to come of it."""

    function: str
    arguments: dict[str, Any]
    error: type[Exception]
    fragments: tuple[str, ...]
    """Parts of the message: the argument's name, what it got, what is allowed."""


def shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def nested(part: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype stage")
        return torch.nested.as_nested_tensor([part, part])


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def wrong_tensors(function: str) -> Iterator[Any]:
    """Each tensor argument as another type, layout or dtype, and on another device."""
    arguments = good_call(function)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    for name, good in tensors.items():
        integral = good.dtype == torch.int64
        allowed = "int64" if integral else "float64, float32, bfloat16 or float16"
        # A floating target holds class probabilities where a loss takes them.
        other_dtypes = (
            (torch.int32, torch.uint8, torch.bool)
            if integral
            else (torch.int64, torch.int32, torch.bool, torch.complex64)
        )
        for dtype in other_dtypes:
            bad = good.to(dtype)
            yield pytest.param(
                BadCall(function, {name: bad}, TypeError, (f"{name} must", shown(bad), allowed)),
                id=f"{function}-{name}-{str(dtype).removeprefix('torch.')}",
            )
        yield pytest.param(
            BadCall(
                function, {name: [1, 2]}, TypeError, (f"{name} must", "[1, 2] (list)", "Tensor")
            ),
            id=f"{function}-{name}-list",
        )
        yield pytest.param(
            BadCall(
                function, {name: good.to_sparse()}, TypeError,
                (f"{name} must", "torch.sparse_coo", "dense (strided)"),
            ),
            id=f"{function}-{name}-sparse",
        )  # fmt: skip
        yield pytest.param(
            BadCall(
                function, {name: nested(good)}, TypeError,
                (f"{name} must", "nested", ".values()"),
            ),
            id=f"{function}-{name}-nested",
        )  # fmt: skip
        yield pytest.param(
            BadCall(
                function, {name: nested(good.to(torch.int32))}, TypeError,
                (f"{name} must", "int32[nested]", allowed),
            ),
            id=f"{function}-{name}-nested-int32",
        )  # fmt: skip
        yield pytest.param(
            BadCall(
                function,
                {name: freed(good)},
                ValueError,
                (f"{name} must", shown(good), "resized to 0"),
            ),
            id=f"{function}-{name}-freed",
        )
        if len(tensors) == 1:
            continue
        # The first tensor's device is the one the others are held against.
        named, got = (name, "meta") if name != next(iter(tensors)) else ("", "meta")
        yield pytest.param(
            BadCall(function, {name: good.to("meta")}, ValueError, (named, got, "must be on")),
            id=f"{function}-{name}-device",
        )


def mixed_float64() -> Iterator[Any]:
    pairs = {
        "introspective_loss": ("logits", "gradients", "inputs"),
        "linear_introspective_loss": ("features", "weight", "bias"),
        "distillation_loss": ("logits", "teacher"),
        "linear_distillation_loss": ("features", "weight", "teacher", "bias"),
        "explanation_stats": ("gradients", "inputs"),
    }
    for function, names in pairs.items():
        for name in names:
            wide = good_call(function)[name].double()
            yield pytest.param(
                BadCall(
                    function, {name: wide}, TypeError,
                    (name, shown(wide), "float32", "can't mix float64"),
                ),
                id=f"{function}-{name}",
            )  # fmt: skip
            half = {other: good_call(function)[other].bfloat16() for other in names}
            half[name] = wide
            yield pytest.param(
                BadCall(function, half, TypeError, (name, shown(wide), "can't mix float64")),
                id=f"{function}-{name}-with-bfloat16",
            )


def wrong_shapes() -> Iterator[Any]:
    z = torch.zeros
    index = torch.zeros(B, K, dtype=torch.int64)
    few = torch.ones(B, K, *S)
    target = torch.zeros(B, dtype=torch.int64)
    table: list[tuple[str, str, dict[str, Any], str]] = []
    for function in ("introspective_loss", "similarity_loss", "distillation_loss"):
        table += [
            (function, "logits", {"logits": z(C)}, "[B, C"),
            (function, "logits", {"logits": z(())}, "[B, C"),
            (function, "logits", {"logits": z(B, 0)}, "at least one class"),
            (function, "target", {"target": z(B, C + 1)}, "class probabilities"),
            (function, "target", {"target": z(B)}, "class probabilities"),
            (function, "row_weight", {"row_weight": z(B + 1)}, f"[{B}]"),
            (function, "row_weight", {"row_weight": z(B, 1)}, f"[{B}]"),
        ]
    for function in ("introspective_loss", "similarity_loss"):
        table += [(function, "logits", {"logits": z(B, C, 2)}, "[B, C]")]
    for function in LOSSES:
        name = "class_weight" if function.startswith("linear") else "weight"
        table += [
            (function, name, {name: z(C - 1)}, f"[{C}]"),
            (function, name, {name: z(C, 1)}, f"[{C}]"),
            (function, name, {name: z(())}, f"[{C}]"),
        ]
    for function in FUNCTIONS:
        table += [
            (function, "target", {"target": target[:-1]}, f"[{B}]"),
            (function, "target", {"target": target[:, None]}, f"[{B}]"),
            (function, "target", {"target": target[0]}, f"[{B}]"),
            (function, "target", {"target": torch.cat([target, target])}, f"[{B}]"),
        ]
    for function in ("introspective_loss", "explanation_stats"):
        table += [
            (function, "gradients", {"gradients": z(B)}, "[B, C, *S]"),
            (function, "gradients", {"gradients": z(())}, "[B, C, *S]"),
            (function, "inputs", {"inputs": z(())}, "[B, *S]"),
            (function, "inputs", {"inputs": z(B, 2, 2)}, f"[{B}, 2, 3]"),
            (function, "inputs", {"inputs": z(B, 6)}, f"[{B}, 2, 3]"),
            (function, "inputs", {"inputs": z(B + 1, *S)}, f"[{B}, 2, 3]"),
            (function, "inputs", {"inputs": z(1, *S)}, f"[{B}, 2, 3]"),
            (function, "class_index", {"gradients": few, "class_index": index[:, 0]}, "[4, K]"),
            (function, "class_index", {"gradients": few, "class_index": index[:1]}, "[4, K]"),
            (function, "class_index", {"gradients": few, "class_index": index[:, :0]}, "K >= 1"),
            (function, "class_index", {"gradients": few, "class_index": index[:, :2]}, "[4, 3]"),
            (function, "class_index", {"class_index": index}, f"[{B}, {C}]"),
            (function, "gradients", {"gradients": z(B, 0, *S)}, "at least one class"),
        ]
    table += [
        ("introspective_loss", "gradients", {"gradients": few}, f"all {C} classes"),
        ("introspective_loss", "gradients", {"gradients": z(B, C + 1, *S)}, f"all {C} classes"),
        (
            "introspective_loss",
            "gradients",
            {"gradients": z(B + 1, C, *S), "inputs": z(B + 1, *S)},
            f"{B} rows",
        ),
        ("linear_introspective_loss", "features", {"features": z(())}, "[..., D]"),
        ("linear_introspective_loss", "weight", {"weight": z(C, D + 1)}, f"[C, {D}]"),
        ("linear_introspective_loss", "weight", {"weight": z(D)}, f"[C, {D}]"),
        ("linear_introspective_loss", "weight", {"weight": z(0, D)}, "C >= 1"),
        ("linear_introspective_loss", "weight", {"weight": z(1, C, D)}, f"[C, {D}]"),
        ("linear_introspective_loss", "bias", {"bias": z(C + 1)}, f"[{C}]"),
        ("linear_introspective_loss", "bias", {"bias": z(1)}, f"[{C}]"),
        ("linear_introspective_loss", "bias", {"bias": z(C, 1)}, f"[{C}]"),
        ("linear_introspective_loss", "target", {"features": z(2, B, D)}, f"[2, {B}]"),
        ("distillation_loss", "target", {"logits": z(B, C, 2), "teacher": z(B, C, 2)}, f"[{B}, 2]"),
        ("linear_distillation_loss", "row_weight", {"row_weight": z(B, 1)}, f"[{B}]"),
        *wrong_teachers(),
    ]
    for number, (function, name, arguments, allowed) in enumerate(table):
        # The tensor at fault is the replaced one of that name, or else the one left as it was.
        fault = arguments.get(name, good_call(function).get(name))
        if name.startswith("teacher."):
            fault = getattr(arguments["teacher"], name.removeprefix("teacher."))
        yield pytest.param(
            BadCall(function, arguments, ValueError, (name, "must", shown(fault), allowed)),
            id=f"{function}-{name}-{number}",
        )


def wrong_teachers() -> Iterator[tuple[str, str, dict[str, Any], str]]:
    z, index = torch.zeros, torch.zeros(B, K, dtype=torch.int64)
    Linear, TopK = ik.LinearTeacher, ik.TopKTeacher
    table: list[tuple[str, Any, str]] = [
        ("teacher", z(B, C + 1), f"the student's {C} classes, got {C + 1}"),
        ("teacher", z(1, C), f"[{B}, {C}]"),
        ("teacher", z(C), f"[{B}, {C}]"),
        ("teacher.features", Linear(z(B + 1, 3), z(C, 3)), f"[{B}, 'D']"),
        ("teacher.weight", Linear(z(B, 3), z(C, 4)), f"[{C}, 3]"),
        ("teacher.weight", Linear(z(B, 3), z(C + 1, 3)), f"the student's {C} classes, got {C + 1}"),
        ("teacher.bias", Linear(z(B, 3), z(C, 3), z(C + 1)), f"[{C}]"),
        ("teacher.indices", TopK(index[0], z(K)), f"1 <= K <= {C}"),
        ("teacher.indices", TopK(index[:1], z(1, K)), f"[{B}, 'K']"),
        ("teacher.indices", TopK(torch.cat([index, index], 1), z(B, 2 * K)), f"1 <= K <= {C}"),
        ("teacher.log_probs", TopK(index, z(B, K + 1)), f"[{B}, {K}]"),
    ]
    for function in ("distillation_loss", "linear_distillation_loss"):
        for name, teacher, allowed in table:
            yield function, name, {"teacher": teacher}, allowed


def wrong_stats() -> Iterator[Any]:
    dots, index = torch.ones(B, C), torch.zeros(B, K, dtype=torch.int64)
    few = torch.ones(B, K)
    Stats = ik.ExplanationStats
    table: list[tuple[str, Any, type[Exception], tuple[str, ...]]] = [
        ("tuple", (dots, dots, None), TypeError, ("stats must", "ExplanationStats", "got tuple")),
        ("tensor", dots, TypeError, ("stats must", "ExplanationStats", "got Tensor")),
        ("none", None, TypeError, ("stats must", "ExplanationStats", "got NoneType")),
        ("dots-list", Stats([1.0], dots), TypeError, ("stats.dots must", "[1.0] (list)")),
        ("dots-int", Stats(dots.long(), dots), TypeError, ("stats.dots must", "int64[4, 5]")),
        (
            "dots-sparse",
            Stats(dots.to_sparse(), dots),
            TypeError,
            ("stats.dots must", "torch.sparse_coo"),
        ),
        ("sq-norms-list", Stats(dots, [1.0]), TypeError, ("stats.sq_norms must", "(list)")),
        ("sq-norms-bool", Stats(dots, dots.bool()), TypeError, ("stats.sq_norms must", "bool[4")),
        ("dtypes", Stats(dots, dots.double()), TypeError, ("stats.dots", "float64", "one dtype")),
        ("dots-1d", Stats(dots[0], dots[0]), ValueError, ("stats.dots must", "float32[5]")),
        ("dots-0d", Stats(dots[0, 0], dots[0, 0]), ValueError, ("stats.dots must", "float32[]")),
        ("dots-3d", Stats(dots[..., None], dots), ValueError, ("stats.dots must", "[4, 5, 1]")),
        ("dots-empty", Stats(dots[:, :0], dots[:, :0]), ValueError, ("stats.dots must", "K >= 1")),
        (
            "sq-norms-shape",
            Stats(dots, few),
            ValueError,
            ("stats.sq_norms must", "float32[4, 3]", "[4, 5]"),
        ),
        (
            "class-index-int32",
            Stats(few, few, index.int()),
            TypeError,
            ("class_index must be int64", "int32[4, 3]"),
        ),
        ("class-index-list", Stats(few, few, [[0]]), TypeError, ("class_index must", "(list)")),
        (
            "class-index-shape",
            Stats(dots, dots, index),
            ValueError,
            ("class_index must", "int64[4, 3]", "[4, 5]"),
        ),
        (
            "class-index-rows",
            Stats(few, few, index[:1]),
            ValueError,
            ("class_index must", "int64[1, 3]", "[4, K]"),
        ),
        (
            "sq-norms-freed",
            Stats(dots, freed(dots)),
            ValueError,
            ("stats.sq_norms must have memory", "float32[4, 5]", "resized to 0"),
        ),
        (
            "sq-norms-device",
            Stats(dots, dots.to("meta")),
            ValueError,
            ("stats.sq_norms must be on", "meta"),
        ),
        (
            "class-index-device",
            Stats(few, few, index.to("meta")),
            ValueError,
            ("class_index must be on", "meta"),
        ),
    ]
    for function in ("similarity_loss", "soft_labels", "teacher_logits"):
        for name, stats, error, fragments in table:
            yield pytest.param(
                BadCall(function, {"stats": stats}, error, fragments), id=f"{function}-{name}"
            )
    only_with_logits = [
        ("classes", Stats(few, few), ("stats.dots must", "all 5 classes", "float32[4, 3]")),
        ("rows", Stats(dots[:1], dots[:1]), ("stats.dots must", "[4, K]", "float32[1, 5]")),
        ("device", Stats(dots.to("meta"), dots.to("meta")), ("stats.dots must be on", "meta")),
    ]
    for name, stats, fragments in only_with_logits:
        yield pytest.param(
            BadCall("similarity_loss", {"stats": stats}, ValueError, fragments),
            id=f"similarity_loss-{name}",
        )


KEYWORDS: dict[str, tuple[str, ...]] = {
    "temperature": (*LOSSES, "soft_labels", "teacher_logits"),
    "similarity_temperature": (*LOSSES[:3], "soft_labels", "teacher_logits"),
    "ce_weight": LOSSES,
    "kl_weight": LOSSES,
    "similarity": (*LOSSES[:3], "soft_labels", "teacher_logits"),
    "label_mode": (*LOSSES[:3], "soft_labels", "teacher_logits"),
    "non_target_mass": (*LOSSES[:3], "soft_labels", "teacher_logits"),
    "label_smoothing": LOSSES,
    "divergence": LOSSES,
    "beta": LOSSES,
    "center": (*LOSSES[:2], "explanation_stats"),
    "ignore_index": (*LOSSES, "explanation_stats"),
    "reduction": LOSSES,
    "return_parts": LOSSES,
}
NOT_A_NUMBER = (None, "1", True, torch.tensor(1.0), 1j, [1.0])
NOT_A_TEMPERATURE = (0, 0.049, -0.5, 100.1, NAN, INF, -INF, 10**400)
NOT_A_SIMILARITY_TEMPERATURE = (0, 0.0099, -0.5, 100.1, NAN, INF, -INF, 10**400)
NEGATIVE = (-1, -1e-9, NAN, INF, 10**400)
NOT_A_FRACTION = (-1e-9, 1.0000001, 2, NAN, INF, -INF)
NOT_A_FLAG = (None, 0, 1, "yes")

# keyword -> (values, error, what is allowed), by what the value gets wrong
WRONG_KEYWORDS: dict[str, list[tuple[tuple[Any, ...], type[Exception], str]]] = {
    "temperature": [
        (NOT_A_NUMBER, TypeError, "in [0.05, 100]"),
        (NOT_A_TEMPERATURE, ValueError, "in [0.05, 100]"),
    ],
    "similarity_temperature": [
        (NOT_A_NUMBER, TypeError, "in [0.01, 100]"),
        (NOT_A_SIMILARITY_TEMPERATURE, ValueError, "in [0.01, 100]"),
    ],
    "ce_weight": [(NOT_A_NUMBER, TypeError, ">= 0"), (NEGATIVE, ValueError, ">= 0")],
    "kl_weight": [(NOT_A_NUMBER, TypeError, ">= 0"), (NEGATIVE, ValueError, ">= 0")],
    "non_target_mass": [
        (NOT_A_NUMBER, TypeError, "in [0, 1]"),
        (NOT_A_FRACTION, ValueError, "in [0, 1]"),
    ],
    "label_smoothing": [
        (NOT_A_NUMBER, TypeError, "in [0, 1]"),
        (NOT_A_FRACTION, ValueError, "in [0, 1]"),
    ],
    "divergence": [(("kl", "JS", None, 0), ValueError, "'forward_kl', 'reverse_kl', 'js'")],
    "beta": [
        (NOT_A_NUMBER, TypeError, "in (0, 1)"),
        ((0, 1, *NOT_A_FRACTION), ValueError, "in (0, 1)"),
    ],
    "ignore_index": [
        ((None, 1.0, "-100", True, torch.tensor(1)), TypeError, "int"),
        ((2**63, -(2**63) - 1), ValueError, "int"),
    ],
    "center": [(NOT_A_FLAG, TypeError, "True or False")],
    "return_parts": [(NOT_A_FLAG, TypeError, "True or False")],
    "similarity": [(("dot", "Cosine", None, 0), ValueError, "'cosine', 'projection'")],
    "label_mode": [(("hard", "Split", None, 1), ValueError, "'softmax', 'split'")],
    "reduction": [(("avg", "batchmean", "Mean", None, 1), ValueError, "'none', 'mean', 'sum'")],
}


def wrong_keywords() -> Iterator[Any]:
    for keyword, functions in KEYWORDS.items():
        for values, error, allowed in WRONG_KEYWORDS[keyword]:
            for value in values:
                got = f"{str(value.dtype)[6:]}[]" if isinstance(value, Tensor) else repr(value)
                for function in functions:
                    short = got if len(got) < 30 else f"{got[:6]}...({len(got)} digits)"
                    yield pytest.param(
                        BadCall(
                            function,
                            {keyword: value},
                            error,
                            (f"{keyword} must", got[:30], allowed),
                        ),
                        id=f"{function}-{keyword}-{short}",
                    )


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """This process as a mesh of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_distributed_tensors_are_named(mesh: DeviceMesh) -> None:
    for function in FUNCTIONS:
        arguments = good_call(function)
        for name, good in arguments.items():
            if isinstance(good, Tensor):
                distributed = DTensor.from_local(good, mesh, run_check=False)
                with pytest.raises(TypeError, match=rf"^{name} must .*DTensor: .*\.to_local\(\)"):
                    getattr(ik, function)(**{**arguments, name: distributed})


class KernelLog(TorchDispatchMode):
    """Names of this package's operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("introkernels"):
            self.called.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_call_that_the_others_spoil_is_good(function: str) -> None:
    with KernelLog() as log:
        result = getattr(ik, function)(**good_call(function))
    assert torch.isfinite(result if isinstance(result, Tensor) else result[0]).all()
    assert log.called or function in ("soft_labels", "teacher_logits")


@pytest.mark.parametrize(
    "call",
    [
        *(case for function in FUNCTIONS for case in wrong_tensors(function)),
        *mixed_float64(),
        *wrong_shapes(),
        *wrong_stats(),
        *wrong_keywords(),
    ],
)
def test_bad_call_is_explained_before_any_kernel_runs(call: BadCall) -> None:
    arguments = good_call(call.function) | call.arguments
    with KernelLog() as log, pytest.raises(call.error) as caught:
        getattr(ik, call.function)(**arguments)
    message = str(caught.value)
    for fragment in call.fragments:
        assert fragment in message, f"{fragment!r} is not in: {message}"
    assert type(caught.value) is call.error
    assert log.called == []
