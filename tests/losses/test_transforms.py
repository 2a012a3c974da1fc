"""``torch.func`` over the losses: what autograd gives, for one call or for many at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.cases import BUILDERS, Case, introspective_case, linear_case, similarity_case
from helpers.oracle import evaluate
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

import introkernels as ik


def loss_of(case: Case, name: str) -> Callable[[Tensor], Tensor]:
    """The case's loss as a function of one of its tensors."""

    def loss(tensor: Tensor) -> Tensor:
        arguments = case.with_tensors(**{name: tensor}).arguments()
        return getattr(ik, case.function)(*arguments, **case.keywords)

    return loss


ROWS_OF = {
    "distillation_loss": ("logits", "teacher_logits", "target"),
    "similarity_loss": ("logits", "target", "dots", "sq_norms"),
    "introspective_loss": ("logits", "target", "gradients", "inputs"),
    "linear_introspective_loss": ("features", "target"),
    "linear_distillation_loss": ("features", "teacher_logits", "target"),
}


def loss_of_a_row(case: Case) -> Callable[..., Tensor]:
    """The loss of one row, as a function of that row of each tensor in :data:`ROWS_OF`."""

    def loss(*row: Tensor) -> Tensor:
        names = ROWS_OF[case.function]
        batch = {name: tensor.unsqueeze(0) for name, tensor in zip(names, row, strict=True)}
        arguments = case.with_tensors(**batch).arguments()
        return getattr(ik, case.function)(*arguments, **case.keywords)

    return loss


@pytest.mark.parametrize("function", BUILDERS)
def test_grad_is_what_autograd_gives(backend: str, function: str) -> None:
    case = BUILDERS[function](6, 5, ignored=1, label_smoothing=0.1)
    expected = evaluate(case).grads
    for name in case.differentiable:
        assert torch.equal(grad(loss_of(case, name))(case[name]), expected[name])


@pytest.mark.parametrize("function", BUILDERS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fake_tensors_have_the_shapes_of_real_ones(
    backend: str, function: str, reduction: str
) -> None:
    case = BUILDERS[function](6, 5, reduction=reduction)
    real = evaluate(case)
    with FakeTensorMode() as mode:
        stand_ins = {
            name: None if tensor is None else mode.from_tensor(tensor)
            for name, tensor in case.tensors.items()
        }
        fake = evaluate(case.with_tensors(**stand_ins))
    pairs = [(getattr(fake, part), getattr(real, part)) for part in ("loss", "ce", "kl")]
    pairs += [(fake.grads[name], grad) for name, grad in real.grads.items()]
    for ours, expected in pairs:
        assert isinstance(ours, FakeTensor)
        assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("explained", [None, 3])
def test_statistics_and_soft_labels_of_fake_tensors(backend: str, explained: int | None) -> None:
    case = introspective_case(6, 5, explained=explained)
    _, target, gradients, inputs = case.arguments()
    index = case.keywords["class_index"]
    real = ik.soft_labels(
        ik.explanation_stats(gradients, inputs, target, class_index=index), target
    )
    with FakeTensorMode() as mode:
        target, gradients, inputs = map(mode.from_tensor, (target, gradients, inputs))
        index = None if index is None else mode.from_tensor(index)
        stats = ik.explanation_stats(gradients, inputs, target, class_index=index)
        fake = ik.soft_labels(stats, target)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_grad_by_several_arguments_with_parts(backend: str) -> None:
    case = linear_case(6, 5)
    expected = evaluate(case).grads

    def loss(features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        parts = ik.linear_introspective_loss(
            features, weight, case["target"], bias, return_parts=True
        )
        return parts.loss, (parts.ce, parts.kl)

    grads, (ce, kl) = grad(loss, argnums=(0, 1, 2), has_aux=True)(
        case["features"], case["weight"], case["bias"]
    )
    for actual, name in zip(grads, case.differentiable, strict=True):
        assert torch.equal(actual, expected[name])
    assert torch.isfinite(ce)
    assert torch.isfinite(kl)


@pytest.mark.parametrize("function", BUILDERS)
def test_jacobian_of_rows_is_diagonal(backend: str, function: str) -> None:
    case = BUILDERS[function](4, 5, ignored=1, reduction="none")
    name = case.differentiable[0]
    jacobian = jacrev(loss_of(case, name))(case[name])
    rows = evaluate(case, grad_loss=torch.ones(4)).grads[name]
    expected = torch.zeros_like(jacobian)
    expected[range(4), range(4)] = rows
    assert torch.equal(jacobian, expected)
    looped = jacrev(loss_of(case, name), chunk_size=1)(case[name])
    assert torch.equal(looped, expected)


@pytest.mark.parametrize("function", BUILDERS)
def test_vmap_over_rows_gives_the_loss_of_each_row(backend: str, function: str) -> None:
    case = BUILDERS[function](5, 4, ignored=1, reduction="sum")
    loss = loss_of_a_row(case)
    rows = [case[name] for name in ROWS_OF[function]]
    each = torch.stack([loss(*(row[b] for row in rows)) for b in range(5)])
    assert torch.equal(vmap(loss)(*rows), each)
    # The same with the batch in the last dimension.
    moved = [row.movedim(0, -1) for row in rows]
    assert torch.equal(vmap(loss, in_dims=-1)(*moved), each)


@pytest.mark.parametrize("function", BUILDERS)
def test_vmap_of_grad_gives_the_gradient_of_each_row(backend: str, function: str) -> None:
    case = BUILDERS[function](5, 4, ignored=1, reduction="sum")
    names = ROWS_OF[function]
    gradient = grad(loss_of_a_row(case), argnums=names.index(case.differentiable[0]))
    rows = [case[name] for name in names]
    each = torch.stack([gradient(*(row[b] for row in rows)) for b in range(5)])
    assert torch.equal(vmap(gradient)(*rows), each)


@pytest.mark.parametrize("batched", ["logits", "target", "gradients", "inputs", "weight"])
def test_vmap_over_a_single_argument(backend: str, batched: str) -> None:
    case = introspective_case(6, 5, ignored=1, class_weights=True)
    values = {**case.tensors, "weight": case["weight"]}
    values[batched] = torch.stack([case[batched], case[batched].flip(0), case[batched]], 1)

    def loss(logits: Tensor, target: Tensor, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return ik.introspective_loss(logits, target, g, x, weight=weight)

    in_dims = tuple(1 if name == batched else None for name in values)
    losses = vmap(loss, in_dims)(*values.values())
    for sample in range(3):
        one = [v.select(1, sample) if n == batched else v for n, v in values.items()]
        assert torch.equal(losses[sample], loss(*one))
    if batched == "logits":
        grads = vmap(grad(loss), in_dims)(*values.values())
        one = [v.select(1, 1) if n == batched else v for n, v in values.items()]
        assert torch.equal(grads[1], grad(loss)(*one))


def test_vmap_with_explained_classes_and_no_reduction(backend: str) -> None:
    case = similarity_case(6, 5, explained=3, reduction="none", label_mode="split")
    stacked = {name: torch.stack([tensor] * 2) for name, tensor in case.tensors.items()}
    stacked["logits"] = torch.stack([case["logits"], -case["logits"]])

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return ik.similarity_loss(*case.with_tensors(**tensors).arguments(), **case.keywords)

    losses = vmap(loss)(stacked)
    assert losses.shape == (2, 6)
    assert torch.equal(losses[0], loss(case.tensors))
    assert torch.equal(losses[1], loss(case.tensors | {"logits": -case["logits"]}))

    def gradient(logits: Tensor) -> Tensor:
        return grad(lambda z: loss({**case.tensors, "logits": z}).sum())(logits)

    gradients = vmap(gradient)(stacked["logits"])
    assert torch.equal(gradients[0], gradient(case["logits"]))
    assert torch.equal(gradients[1], gradient(-case["logits"]))


def test_nested_vmap(backend: str) -> None:
    case = BUILDERS["distillation_loss"](6, 5)
    logits = torch.randn(2, 3, 6, 5)

    def loss(z: Tensor) -> Tensor:
        return ik.distillation_loss(z, case["teacher_logits"], case["target"])

    losses = vmap(vmap(loss))(logits)
    assert torch.equal(losses[1, 2], loss(logits[1, 2]))
    grads = vmap(vmap(grad(loss)))(logits)
    assert torch.equal(grads[1, 2], grad(loss)(logits[1, 2]))


def test_vmap_of_statistics_and_soft_labels(backend: str) -> None:
    case = introspective_case(6, 5, ignored=1, shape=(2, 3))
    gradients = torch.stack([case["gradients"], case["gradients"].flip(1)])

    def labels(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stats = ik.explanation_stats(g, case["inputs"], case["target"])
        return stats.dots, stats.sq_norms, ik.soft_labels(stats, case["target"].clamp(min=0))

    for actual, sample in zip(zip(*vmap(labels)(gradients), strict=True), gradients, strict=True):
        for ours, one in zip(actual, labels(sample), strict=True):
            assert torch.equal(ours, one)


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 5))


def test_per_sample_gradients_of_a_model(backend: str) -> None:
    model = small_model()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    inputs, target = torch.randn(6, 7), torch.randint(5, (6,))
    gradients = torch.randn(6, 5, 7)

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor, g: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (x[None],))
        return ik.introspective_loss(logits, y[None], g[None], x[None])

    per_sample = vmap(grad(loss), (None, 0, 0, 0))(parameters, inputs, target, gradients)
    for b in range(6):
        model.zero_grad()
        logits = model(inputs[b : b + 1])
        ik.introspective_loss(
            logits, target[b : b + 1], gradients[b : b + 1], inputs[b : b + 1]
        ).backward()
        for name, parameter in model.named_parameters():
            # The matrix products of the model itself are rounded differently in a batch.
            torch.testing.assert_close(per_sample[name][b], parameter.grad, rtol=1e-5, atol=1e-7)


def test_ensemble_of_heads(backend: str) -> None:
    """Several models at once, each with its own weight of a linear head."""
    heads = [nn.Linear(7, 5) for _ in range(3)]
    parameters, _ = stack_module_state(heads)
    features, target = torch.randn(6, 7), torch.randint(5, (6,))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return ik.linear_introspective_loss(
            features, parameters["weight"], target, parameters["bias"], center=True
        )

    losses, grads = vmap(loss)(parameters), vmap(grad(loss))(parameters)
    for number, head in enumerate(heads):
        one = ik.linear_introspective_loss(features, head.weight, target, head.bias, center=True)
        one.backward()
        assert torch.equal(losses[number], one)
        assert torch.equal(grads["weight"][number], head.weight.grad)
        assert torch.equal(grads["bias"][number], head.bias.grad)


def test_functional_call_of_a_loss_module(backend: str) -> None:
    case = BUILDERS["distillation_loss"](6, 5)
    module = ik.DistillationLoss(weight=torch.ones(5))
    other = torch.rand(5)
    actual = functional_call(module, {"weight": other}, tuple(case.arguments()))
    assert torch.equal(actual, ik.distillation_loss(*case.arguments(), weight=other))


@pytest.mark.parametrize("function", BUILDERS)
def test_forward_mode_raises(backend: str, function: str) -> None:
    """No loss has a forward-mode rule; that has to show."""
    case = BUILDERS[function](4, 5)
    name = case.differentiable[0]
    with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
        torch.func.jvp(loss_of(case, name), (case[name],), (torch.ones_like(case[name]),))
