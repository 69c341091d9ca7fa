"""Weights, gradients, moments and averages spread over the ranks: FSDP2 (`fully_shard`), its optimiser, its files.

The whole loss is FSDP's root. What no block owns is gathered once a micro-batch, so a task may call any method of its
modules; a block is gathered while it is called. Gradients are summed, as everywhere in the trainer: FSDP2 would divide
by the ranks, in a reduction (`PREMUL_SUM`) that gloo lacks, where its plain sums are enough for all that is done here.

Files are those of torch.distributed.checkpoint in its safetensors form: each rank writes one with its shards, whose
header says where in the tensors they belong, so that any number of ranks, or one process without a group, reads what it
needs. DCP's own form keeps that in a pickle, which executes code when it is read.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, zeros

from varkit.errors import UserError
from varkit.files import atomic_folder
from varkit.nn.adaln import AdaLNBlock
from varkit.nn.attention import CrossAttention
from varkit.ranks import Ranks

if TYPE_CHECKING:
    from varkit.train.task import Task, TrainConfig

EARLY = ((AdaLNBlock, "modulation"), (CrossAttention, "kv"))
"""Layers called before their block is, with the condition: each is gathered by itself."""


def shard(loss: nn.Module, dtype: torch.dtype, ranks: Ranks) -> None:
    """Spread the parameters of `loss` over the ranks, in place; its `forward` and `validate` compute in `dtype`."""
    cast = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = _mesh(ranks)
    for block in _blocks(loss):
        for module in [*_early(block), block]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
        if isinstance(block, AdaLNBlock) and block.shared:
            register_fsdp_forward_method(block, "vectors")
    # A linear layer may return a view; nothing here is changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    fully_shard(loss, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(loss, "validate")
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def check_shardable(task: "Task", config: "TrainConfig") -> None:
    """Raise `UserError` if the task needs whole parameters between its losses, or several dtypes within them."""
    names = [name for name, _ in nn.ModuleDict(dict(task.modules)).named_parameters()]
    kept = [] if config.dtype == "float32" else [name for name in names if task.keeps_float32(name)]
    if len(task.phases) > 1:
        reason = f"has {len(task.phases)} optimisers"
    elif any(True for _ in task.moved()):
        reason = "changes parameters between steps"
    elif kept:
        reason = f"keeps {kept[0]} in float32 beside {config.dtype}"
    else:
        return
    raise UserError(f"the task {reason}, so it cannot be sharded; train it without --shard")


class GatheringMuon(torch.optim.Muon):
    """Muon on sharded matrices: each is gathered for its step and let go.

    `torch.optim.Muon` does take DTensors, but its bfloat16 products are then summed in another order, which displaced
    tall matrices by up to 2 % of their way in three steps, and it communicates in each of its iterations.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move the matrices along their gradients."""
        for group in self.param_groups:
            settings = {name: value for name, value in group.items() if name != "params"}
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    self._step_whole(p, momentum, settings)

    def _step_whole(self, p: DTensor, momentum: DTensor, settings: dict[str, Any]) -> None:
        assert isinstance(p.grad, DTensor)
        whole = nn.Parameter(p.full_tensor())
        whole.grad = p.grad.full_tensor()
        one = torch.optim.Muon([whole], **settings)
        one.state[whole]["momentum_buffer"] = momentum.full_tensor()
        one.step()
        for mine, value in ((p, whole.detach()), (momentum, one.state[whole]["momentum_buffer"])):
            mine.copy_(like(value, mine))


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor as this rank's shard, if `target` or, for a moment, its parameter is sharded."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor) and value.ndim:
        return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    return value


@contextmanager
def shared_folder(path: Path, ranks: Ranks) -> Iterator[Path]:
    """A temporary folder that all ranks write into; once they have, it replaces `path`."""
    if ranks.first:
        with atomic_folder(path, replace=True) as part:
            yield Path(ranks.told(str(part)))
    else:
        yield Path(ranks.told(None))
    ranks.wait()


def save_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write DTensors, and tensors that are whole on every rank, into `folder`; all ranks call it, and end together."""
    with _causes():
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save({name: value.detach() for name, value in tensors.items()}, storage_writer=writer)


def load_shards(folder: Path, ranks: Ranks) -> dict[str, Tensor]:
    """What `save_shards` wrote, by whatever number of ranks: sharded over `ranks` again, or whole for a single one."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    mesh = _mesh(ranks) if ranks.world > 1 else None
    tensors: dict[str, Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        size, dtype, was_sharded = stored.size, stored.properties.dtype, len(stored.chunks) > 1
        if mesh and was_sharded:
            tensors[name] = zeros(size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
        else:
            tensors[name] = torch.zeros(size, dtype=dtype)
    with _causes(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=mesh is None)
    return tensors


@contextmanager
def _causes() -> Iterator[None]:
    """Raise what went wrong on some rank, such as a full disk, rather than DCP's account of it."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def _mesh(ranks: Ranks) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks.world,))


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Members of the lists that are named `blocks`."""
    lists = [m for name, m in module.named_modules() if name.split(".")[-1] == "blocks"]
    return [block for blocks in lists for block in blocks.children()]


def _early(block: nn.Module) -> list[nn.Module]:
    """Its layers that `EARLY` names."""
    names = [(m, name) for m in block.modules() for kind, name in EARLY if isinstance(m, kind)]
    return [getattr(m, name) for m, name in names if hasattr(m, name)]
