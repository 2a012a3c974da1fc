"""Data parallel training in two processes gives the gradients of one process on the whole batch."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from helpers import backends
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import introkernels as ik

PROCESSES = 2
ROWS = 8


class Classifier(nn.Module):
    """A model that returns its loss: every one there is, summed so that shares add up."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.head = nn.Linear(16, 5)

    def forward(self, inputs: Tensor, target: Tensor, teacher: Tensor, gradients: Tensor) -> Tensor:
        features = self.body(inputs)
        logits = self.head(features)
        stats = ik.explanation_stats(gradients, inputs, target)
        return (
            ik.distillation_loss(logits, teacher, target, reduction="sum")
            + ik.similarity_loss(logits, target, stats, reduction="sum", label_mode="split")
            + ik.introspective_loss(logits, target, gradients, inputs, reduction="sum")
            + ik.linear_introspective_loss(
                features, self.head.weight, target, self.head.bias, reduction="sum"
            )
        )


def seeded_model() -> Classifier:
    torch.manual_seed(1)
    return Classifier()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([0, 1, 2, -100, 4, 3, 2, 1])
    return {
        "inputs": torch.randn(ROWS, 6, generator=generator),
        "target": target,
        "teacher": torch.randn(ROWS, 5, generator=generator),
        "gradients": torch.randn(ROWS, 5, 6, generator=generator),
    }


def train_in_parallel(rank: int, store: str, results: str) -> None:
    """What each process does: its share of the batch, through DDP and through FSDP."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    share = {name: tensor.tensor_split(PROCESSES)[rank] for name, tensor in batch().items()}
    found: dict[str, dict[str, Tensor]] = {}
    for backend in backends.under_test():
        ik.use_backend(backend)
        model = seeded_model()
        parallel = DistributedDataParallel(model)
        parallel(**share).backward()
        found[f"ddp-{backend}"] = {name: p.grad for name, p in model.named_parameters()}

        model = seeded_model()
        mesh = init_device_mesh("cpu", (PROCESSES,))
        fully_shard(model.body, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(**share).backward()
        found[f"fsdp-{backend}"] = {
            name: p.grad.full_tensor() for name, p in model.named_parameters()
        }
    if rank == 0:
        torch.save(found, results)
    # A process that ends while its group still works for another, or is still held by a model,
    # may abort.
    dist.barrier()
    del parallel, model
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def parallel_gradients(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Tensor]]:
    """Gradients of the parallel runs, by kind of parallelism and backend."""
    folder = tmp_path_factory.mktemp("distributed")
    results = folder / "gradients.pt"
    torch.multiprocessing.start_processes(
        train_in_parallel,
        (str(folder / "store"), str(results)),
        nprocs=PROCESSES,
        start_method="spawn",
    )
    return torch.load(results)


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_gradients_of_shares_add_up(
    backend: str, parallelism: str, parallel_gradients: dict[str, dict[str, Tensor]]
) -> None:
    model = seeded_model()
    model(**batch()).backward()
    gradients = parallel_gradients[f"{parallelism}-{backend}"]
    for name, parameter in model.named_parameters():
        # Both kinds of parallelism take the mean over processes, of losses that are sums.
        torch.testing.assert_close(
            PROCESSES * gradients[name], parameter.grad, rtol=1e-5, atol=1e-6
        )
