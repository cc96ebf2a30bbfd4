"""Training on several cards: what one process does for all, and what all must agree on.

    accelerate launch --num_processes 2 script/train/train_00_plain_text.py --model medgemma-4b

The launcher starts one process a card and tells each its number in the environment (RANK, WORLD_SIZE). Every process
lays out the same rows and takes its share of each batch; process 0 alone writes files, and decisions that depend on a
measurement or a signal are its. Alone, a process has nobody to wait for and everything here does nothing.

By default each process holds the whole base and gradients are averaged (DDP). With `--shard` the base is divided
between them (torch's FSDP2, `fully_shard`): every decoder layer is put together when it is its turn. We call it
ourselves rather than through accelerate's plugin, which refuses CPUs, so that it could not be tested there.

torch is imported inside functions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def start(device: str) -> None:
    """Find the other processes: over NCCL on CUDA, else over Gloo. Raises PipelineError when they do not answer."""
    if count() == 1:
        return
    import torch
    from accelerate import PartialState

    from medgemma_korean.cli import PipelineError  # which asks us who writes the log

    try:
        # Gloo for the CPU tensors of `agreed` on either; NCCL moves gradients between cards.
        backend = "gloo" if device == "cpu" else "cuda:nccl,cpu:gloo"
        PartialState(cpu=device == "cpu", backend=backend)
    except (RuntimeError, ValueError) as error:  # torch.distributed.DistStoreError is a RuntimeError
        raise PipelineError(
            f"process {rank()} of {count()} cannot reach the others: {str(error).splitlines()[0]}"
        ) from None
    assert torch.distributed.get_world_size() == count()


def own_device(device: str) -> str:
    """The card of this process: `cuda:0` becomes that of its number on the machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if count() > 1 and device.startswith("cuda") else device


def wait() -> None:
    """Until every process has come here."""
    agreed(None)


def agreed(value: T) -> T:
    """The value of process 0, in every process. Raises PipelineError when another process has ended."""
    if count() == 1:
        return value
    import torch.distributed

    from medgemma_korean.cli import PipelineError

    held: list[Any] = [value]
    try:
        torch.distributed.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    except RuntimeError as error:
        raise PipelineError(f"another process has ended, and says why ({str(error).splitlines()[0]})") from None
    return held[0]


def any_of(flag: bool) -> bool:
    """Whether any process says so."""
    if count() == 1:
        return flag
    import torch.distributed

    flags = torch.tensor([int(flag)])
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags.item())


# a base divided between processes -----------------------------------------------------------------------


def shard(model: Any, device: str) -> None:
    """Divide the parameters of a PeftModel between all processes, each decoder layer a group of its own."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.partition(":")[0], (count(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # matrix, token rows and final norm: needed at both ends, so kept together
    # The first forward pass decides what is the root, and `gathered` calls parts: so it is one of the whole.
    with torch.no_grad():
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device))


def is_sharded(model: Any) -> bool:
    return hasattr(model, "unshard")


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[None]:
    """While inside, parts of the model may be called by themselves: its root parameters are whole."""
    if not is_sharded(model):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def whole(parameter: Any) -> Any:
    """A parameter's values, all of them: a sharded one is put together from every process."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def put(parameter: Any, values: Any) -> None:
    """Set a parameter's values from the whole tensor; of a sharded one this process takes its part."""
    import torch

    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        values = values.to(device=parameter.device, dtype=parameter.dtype)
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    with torch.no_grad():
        parameter.copy_(values)


def own_shards(trainer: Any) -> None:
    """Make a Trainer take a sharded model as it is: no DDP around it, whole optimizer states, the norm of all parts."""
    import torch
    from torch.distributed.checkpoint import state_dict as states

    accelerator, prepare = trainer.accelerator, trainer.accelerator.prepare_model
    accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)

    def clip(parameters: Any, max_norm: float, norm_type: float = 2.0) -> Any:
        parameters = list(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients, norm_type))
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def save(folder: str) -> None:
        options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        found = states.get_optimizer_state_dict(trainer.model, trainer.optimizer, options=options)
        if is_main():
            torch.save(found, os.path.join(folder, "optimizer.pt"))
            torch.save(trainer.lr_scheduler.state_dict(), os.path.join(folder, "scheduler.pt"))

    def load(folder: str) -> None:
        options = states.StateDictOptions(full_state_dict=True)
        found = torch.load(os.path.join(folder, "optimizer.pt"), map_location="cpu", weights_only=True)
        states.set_optimizer_state_dict(trainer.model, trainer.optimizer, found, options=options)
        found = torch.load(os.path.join(folder, "scheduler.pt"), weights_only=True)
        trainer.lr_scheduler.load_state_dict(found)

    accelerator.clip_grad_norm_ = clip
    trainer._save_optimizer_and_scheduler = save
    trainer._load_optimizer_and_scheduler = lambda folder: load(folder) if folder else None
