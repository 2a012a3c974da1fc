"""The suites and their cases, each named for the use that its shape comes from."""

from __future__ import annotations

from introkernels.bench.contenders import COMPILE, CPP, CUDA, EAGER, REFERENCE, TRITON
from introkernels.bench.model import Case, Suite
from introkernels.bench.operators.distillation import DISTILLATION, SIMILARITY
from introkernels.bench.operators.head import HEAD
from introkernels.bench.operators.introspective import INTROSPECTIVE, STATISTICS

_CIFAR100 = ("cifar100", "CIFAR-100", (64, 100, 3072))
_IMAGENET_INPUT = ("imagenet-input", "ImageNet images, 10 classes explained", (32, 10, 150528))
_IMAGENET_LOGITS = ("imagenet", "ImageNet, large batch", (4096, 1000))

CPU = Suite(
    name="cpu",
    cases=(
        Case(INTROSPECTIVE, *_CIFAR100),
        Case(INTROSPECTIVE, *_CIFAR100, "bfloat16"),
        Case(INTROSPECTIVE, *_IMAGENET_INPUT),
        Case(INTROSPECTIVE, *_IMAGENET_INPUT, "bfloat16"),
        Case(INTROSPECTIVE, "mnist", "MNIST", (128, 10, 784)),
        Case(STATISTICS, *_CIFAR100),
        Case(DISTILLATION, *_IMAGENET_LOGITS),
        Case(DISTILLATION, *_IMAGENET_LOGITS, "bfloat16"),
        Case(DISTILLATION, "language-32k", "language model, 32,000 tokens", (256, 32000)),
        Case(DISTILLATION, "cifar100", "CIFAR-100", (64, 100)),
        Case(SIMILARITY, *_IMAGENET_LOGITS),
        Case(HEAD, "imagenet", "ResNet-50 on ImageNet", (256, 1000, 2048)),
        Case(HEAD, "language-32k", "language model, 32,000 tokens", (512, 32000, 1024)),
    ),
    contenders=(EAGER, COMPILE, REFERENCE, CPP),
)

_CIFAR100_LARGE = ("cifar100", "CIFAR-100, large batch", (256, 100, 3072))
_IMAGENET_LARGE = (
    "imagenet-input",
    "ImageNet images, 16 classes explained",
    (128, 16, 150528),
    "bfloat16",
)
_LANGUAGE_LOGITS = ("language-32k", "language model, 32,000 tokens", (8192, 32000), "bfloat16")
_LANGUAGE_HEAD = ("language-32k", "language model, 32,000 tokens", (4096, 32000, 2048), "bfloat16")

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
        Case(HEAD, "imagenet", "ResNet-50 on ImageNet", (256, 1000, 2048), "bfloat16"),
        Case(HEAD, *_LANGUAGE_HEAD),
    ),
    contenders=(EAGER, COMPILE, CUDA, TRITON),
    device="cuda",
)

SUITES = {suite.name: suite for suite in (CPU, GPU)}
