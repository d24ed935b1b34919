"""One training by several processes, each a rank in torch's words: they share each batch, and take the same step.

Each rank draws the same numbers, trains on its share of each batch, and then has the whole batch's loss and gradients.
Sums over a batch (of the losses, of batch norm) run over all ranks, so that the steps are those of one process, up to
rounding, and all ranks always have the same weights. Rank 0 alone writes files. With one process nothing here does
anything."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain, count, islice, repeat
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

_RESTARTS = 3  # of all ranks, after one has died or failed
_JOINED = count()  # how often this process has joined others
_WAIT = timedelta(minutes=10)  # for another rank; rank 0 judges a finished model alone


def is_launched() -> bool:
    """Whether this process is one of those that torchrun or `launch` has started."""
    return distributed.is_available() and distributed.is_torchelastic_launched()


def launch(ranks: int, function: Callable, *arguments: Any) -> Any:
    """Call a function of a module in `ranks` new processes of this machine, in which it can use `joining`; return what
    rank 0 returns. When one fails or dies, all are ended and begin again, three times at most; then torch's
    ChildFailedError tells of the first one's error. ValueError and FloatingPointError, which all of them must have, are
    raised at once: the next time would end the same way."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # slow to import

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # an offline machine may not know its own name
        max_restarts=_RESTARTS,
        monitor_interval=0.5,
    )
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        outcome = elastic_launch(config, _call)(function, *arguments)[0]
    finally:
        for number, handler in handlers.items():  # torch leaves its own behind
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _call(function: Callable, *arguments: Any) -> Any:
    """Call, and return an error that would come again as if it were a result: for it nothing is restarted."""
    try:
        return function(*arguments)
    except (ValueError, FloatingPointError) as error:
        return error


@contextmanager
def joining(devices: Sequence[str]) -> Iterator[str]:
    """Join the other ranks and yield this one's device, of those of this machine. After an error nothing is undone: the
    process must end, so that its launcher ends the others. Raises ValueError for fewer GPUs than ranks."""
    here, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = devices[here % len(devices)]
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and ranks > len(devices):
        raise ValueError(f"{ranks} processes cannot share {len(devices)} GPUs; start one for each GPU")
    if on_gpu:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    # Torch uses one store for all restarts: without names of its own, gloo may wait for processes that have died.
    store, rank, world = next(distributed.rendezvous("env://", timeout=_WAIT))
    store = distributed.PrefixStore(f"{os.environ['TORCHELASTIC_RESTART_COUNT']}.{next(_JOINED)}", store)
    backend = "nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_WAIT)
    yield device
    distributed.destroy_process_group()


def count_ranks() -> int:
    """The number of processes that share a training."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def find_rank() -> int:
    """This process's number among them, from 0."""
    return distributed.get_rank() if count_ranks() > 1 else 0


def tell(value: Any) -> Any:
    """Return rank 0's value."""
    values = [value]
    if count_ranks() > 1:
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def total(*sums: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return each sum, all of one shape, over all ranks. Gradients flow back to all of them."""
    return sums if count_ranks() == 1 else _Total.apply(torch.stack(sums)).unbind()


class _Total(torch.autograd.Function):
    """The sum over all ranks. Each one's loss depends on it, so its gradient is the sum of all of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _Total.apply(gradient)


def average_gradients(network: nn.Module) -> None:
    """Replace each gradient by the mean of all ranks'.

    All go in one piece, always in the same order: DistributedDataParallel's pieces change after its first step, so with
    three ranks or more a resumed training would round otherwise than an undisturbed one."""
    if count_ranks() == 1:
        return
    gradients = [parameter.grad for parameter in network.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    means = (flat / count_ranks()).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view(gradient.shape))


def share_norms(network: nn.Module) -> None:
    """Let batch norm use the statistics of the whole batch, of all ranks."""
    for layer in network.modules() if count_ranks() > 1 else ():
        if isinstance(layer, nn.BatchNorm3d):
            layer.__class__, layer.process_group = _SharedNorm, None


class _SharedNorm(nn.SyncBatchNorm):
    """Torch's, which cannot train on a CPU; there the same in plain operations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda or not self.training:
            return super().forward(x)
        axes, shape = (0, 2, 3, 4), (-1, 1, 1, 1)
        (sums, count) = total(x.sum(axes), x.new_full((x.shape[1],), x.numel() / x.shape[1]))
        mean = sums / count
        centred = x - mean.view(shape)
        variance = total(centred.square().sum(axes))[0] / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        return centred * scale.view(shape) + self.bias.view(shape)


def choose_share(count: int, size: int, mirrored: bool = False) -> list[int]:
    """Return which of `count` items, taken in batches of `size`, are in this rank's share of a batch. With `mirrored`
    each comes with the one that takes its place when the batch is flipped. Raises ValueError for a batch that cannot be
    shared evenly."""
    rank, ranks = find_rank(), count_ranks()
    if ranks == 1:
        return list(range(count))
    if size % (ranks * (1 + mirrored)):
        pairs = ", two volumes each for mixup" if mirrored else ""
        raise ValueError(
            f"batch_size is {size}, but {ranks} processes share each batch{pairs}; set a multiple of "
            f"{ranks * (1 + mirrored)}, or start fewer processes"
        )
    positions = ((place, place % size, min(size, count - place + place % size)) for place in range(count))
    return [p for p, at, length in positions if (min(at, length - 1 - at) if mirrored else at) % ranks == rank]


def share_batches(batches: Iterable[tuple], count: int, empty: tuple) -> Iterator[tuple]:
    """Yield this rank's shares of `count` batches: of the last one it may have nothing, and so gets an empty one."""
    return iter(batches) if count_ranks() == 1 else islice(chain(batches, repeat(empty)), count)


def deal(dataset: TensorDataset, order: Sequence[int], size: int, mirrored: bool = False, **options: Any) -> Iterator:
    """Yield this rank's share of each batch of a dataset's items, which come in the order given. `options` are those of
    the DataLoader."""
    chosen = Subset(dataset, [order[place] for place in choose_share(len(order), size, mirrored)])
    batches = DataLoader(chosen, size // count_ranks(), **options)
    return share_batches(batches, -(-len(order) // size), dataset[:0])
