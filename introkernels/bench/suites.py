"""The suites and their cases, each named for the use that its shape comes from."""

from __future__ import annotations

from introkernels.bench.contenders import COMPILE, CPP, CUDA, EAGER, REFERENCE, TRITON
from introkernels.bench.model import Case, Operator, Suite
from introkernels.bench.operators.distillation import DISTILLATION, SIMILARITY
from introkernels.bench.operators.explanations import EXPLANATIONS
from introkernels.bench.operators.head import HEAD
from introkernels.bench.operators.introspective import INTROSPECTIVE, STATISTICS
from introkernels.bench.operators.linear_losses import HEAD_CROSS_ENTROPY, HEAD_DIVERGENCE
from introkernels.bench.operators.step import STEP_RESNET20, STEP_SMALL_CNN

IMAGE = 3 * 32 * 32
_FEATURES = 512

_CIFAR100 = ("cifar100", "CIFAR-100", (64, 100, IMAGE))
_IMAGENET_INPUT = ("imagenet-input", "ImageNet images, 10 classes explained", (32, 10, 150528))
_IMAGENET_16 = ("imagenet-16", "ImageNet images, 16 classes explained", (32, 16, 150528))
_IMAGENET_LOGITS = ("imagenet", "ImageNet, large batch", (4096, 1000))
_IMAGENET_HEAD = ("imagenet", "ResNet-50 on ImageNet", (256, 1000, 2048))
_SMALL_CNN = ("cifar10", "a small network on CIFAR-10", (32, 10, 32))

CPU = Suite(
    name="cpu",
    cases=(
        Case(INTROSPECTIVE, "cifar10", "CIFAR-10", (128, 10, IMAGE)),
        Case(INTROSPECTIVE, *_CIFAR100),
        Case(INTROSPECTIVE, *_CIFAR100, "bfloat16"),
        Case(INTROSPECTIVE, *_IMAGENET_INPUT),
        Case(INTROSPECTIVE, *_IMAGENET_INPUT, "bfloat16"),
        Case(INTROSPECTIVE, *_IMAGENET_16),
        Case(INTROSPECTIVE, "mnist", "MNIST", (128, 10, 784)),
        Case(STATISTICS, *_CIFAR100),
        Case(DISTILLATION, *_IMAGENET_LOGITS),
        Case(DISTILLATION, *_IMAGENET_LOGITS, "bfloat16"),
        Case(DISTILLATION, "imagenet21k", "ImageNet-21k", (256, 21841)),
        Case(DISTILLATION, "language-32k", "language model, 32,000 tokens", (256, 32000)),
        Case(DISTILLATION, "language-128k", "language model, 128,256 tokens", (64, 128256)),
        Case(DISTILLATION, "cifar100", "CIFAR-100", (64, 100)),
        Case(SIMILARITY, *_IMAGENET_LOGITS),
        Case(HEAD, "cifar100", "ResNet-20 on CIFAR-100", (128, 100, 64)),
        Case(HEAD, *_IMAGENET_HEAD),
        Case(HEAD, "imagenet21k", "ViT-B on ImageNet-21k", (256, 21841, 768)),
        Case(HEAD, "language-32k", "language model, 32,000 tokens", (512, 32000, 1024)),
        Case(HEAD, "language-128k", "language model, 128,256 tokens", (64, 128256, 512)),
        Case(HEAD_CROSS_ENTROPY, *_IMAGENET_HEAD),
        Case(HEAD_DIVERGENCE, *_IMAGENET_HEAD),
        Case(HEAD_DIVERGENCE, "language-32k", "language model, 32,000 tokens", (512, 32000, 1024)),
        Case(
            HEAD_DIVERGENCE,
            "language-32k-wide",
            "language model, 32,000 tokens",
            (512, 32000, 2048),
        ),
        Case(EXPLANATIONS, *_SMALL_CNN),
    ),
    contenders=(EAGER, COMPILE, REFERENCE, CPP),
)

_CIFAR100_LARGE = ("cifar100", "CIFAR-100, large batch", (256, 100, IMAGE))
_IMAGENET_LARGE = (
    "imagenet-input",
    "ImageNet images, 16 classes explained",
    (128, 16, 150528),
    "bfloat16",
)
_LANGUAGE_LOGITS = ("language-32k", "language model, 32,000 tokens", (8192, 32000), "bfloat16")
_LANGUAGE_HEAD = ("language-32k", "language model, 32,000 tokens", (4096, 32000, 2048))

GPU = Suite(
    name="gpu",
    cases=(
        Case(INTROSPECTIVE, *_CIFAR100_LARGE),
        Case(INTROSPECTIVE, *_CIFAR100_LARGE, "bfloat16"),
        Case(INTROSPECTIVE, *_IMAGENET_LARGE),
        Case(DISTILLATION, *_LANGUAGE_LOGITS),
        Case(DISTILLATION, *_IMAGENET_LOGITS),
        Case(DISTILLATION, *_IMAGENET_LOGITS, "bfloat16"),
        Case(DISTILLATION, "digits", "digits", (128, 10)),
        Case(SIMILARITY, *_IMAGENET_LOGITS),
        Case(STATISTICS, *_CIFAR100_LARGE),
        Case(STATISTICS, *_CIFAR100_LARGE, "bfloat16"),
        Case(STATISTICS, *_IMAGENET_LARGE),
        Case(HEAD, *_IMAGENET_HEAD, "bfloat16"),
        Case(HEAD, *_LANGUAGE_HEAD, "bfloat16"),
        Case(HEAD, "imagenet21k", "ViT-B on ImageNet-21k", (1024, 21841, 768), "bfloat16"),
        Case(
            HEAD,
            "language-128k",
            "language model, 128,256 tokens",
            (2048, 128256, 2048),
            "bfloat16",
        ),
        # In float32: other packages round logits to a half type, and would be refused for it.
        Case(HEAD_CROSS_ENTROPY, *_LANGUAGE_HEAD),
        Case(HEAD_DIVERGENCE, *_LANGUAGE_HEAD),
        Case(HEAD_DIVERGENCE, *_LANGUAGE_HEAD, "bfloat16"),
        Case(EXPLANATIONS, *_SMALL_CNN),
    ),
    contenders=(EAGER, COMPILE, CUDA, TRITON),
    device="cuda",
)


def _over_classes(operator: Operator, *shapes: tuple[int, ...]) -> tuple[Case, ...]:
    """One case for each number of classes."""
    return tuple(
        Case(operator, f"classes-{shape[1]}", f"{shape[1]:,} classes", shape) for shape in shapes
    )


def _over_dimensions(operator: Operator, *shapes: tuple[int, int, int]) -> tuple[Case, ...]:
    """One case for each number of dimensions."""
    return tuple(
        Case(operator, f"dims-{shape[2]}", f"{shape[2]:,} dimensions", shape) for shape in shapes
    )


# What one explains: rows are few enough for the explanations of a thousand classes.
_INTROSPECTIVE_CLASSES = _over_classes(
    INTROSPECTIVE, *((16, classes, IMAGE) for classes in (10, 32, 100, 316, 1000))
)
_HEAD_CLASSES = _over_classes(
    HEAD, *((128, classes, _FEATURES) for classes in (100, 1000, 10000, 32000, 128256))
)
_DIVERGENCE_CLASSES = _over_classes(
    HEAD_DIVERGENCE, *((512, classes, 1024) for classes in (1000, 10000, 32000))
)

SWEEP = Suite(
    name="sweep",
    cases=(
        *_INTROSPECTIVE_CLASSES,
        *_over_dimensions(
            INTROSPECTIVE, *((16, 100, dims) for dims in (192, 768, 3072, 12288, 49152))
        ),
        *_over_classes(
            DISTILLATION, *((128, classes) for classes in (10, 100, 1000, 10000, 32000, 128256))
        ),
        *_HEAD_CLASSES,
        *_over_dimensions(HEAD, *((128, 1000, dims) for dims in (64, 256, 1024, 4096))),
    ),
    contenders=(EAGER, COMPILE, CPP),
)

MEMORY = Suite(
    name="memory",
    cases=(*_HEAD_CLASSES, *_DIVERGENCE_CLASSES, *_INTROSPECTIVE_CLASSES),
    contenders=(EAGER, COMPILE, CPP),
)

STEP = Suite(
    name="step",
    cases=tuple(
        Case(operator, f"cifar{classes}", about, (64, classes))
        for operator, about in (
            (STEP_SMALL_CNN, "a small network on 32×32 images"),
            (STEP_RESNET20, "ResNet-20 on 32×32 images"),
        )
        for classes in (10, 100)
    ),
    contenders=(),
)

FIRST_CALL = Suite(
    name="first-call",
    cases=(
        Case(INTROSPECTIVE, *_CIFAR100),
        Case(DISTILLATION, "cifar100", "CIFAR-100", (64, 100)),
        Case(HEAD, "cifar100", "ResNet-20 on CIFAR-100", (128, 100, 64)),
    ),
    contenders=(EAGER, COMPILE, CPP),
    first_call=True,
)

SUITES = {suite.name: suite for suite in (CPU, GPU, SWEEP, MEMORY, STEP, FIRST_CALL)}
"""By name, as ``--suite`` takes it."""
