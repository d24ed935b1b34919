"""Weights for networks that nobody trained, and a count of what is in memory."""

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


def enliven(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights with which nothing fades from layer to layer, and norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            inputs = layer.weight[0].numel() if isinstance(layer, nn.Conv3d) else layer.in_channels
            layer.weight.data.normal_(0, (2 / inputs) ** 0.5, generator=generator)
            layer.bias.data.normal_(0.2, 0.1, generator=generator)
    return network.eval().requires_grad_(False)


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and that are still there; keeps the most."""

    def __init__(self):
        super().__init__()
        self.most, self._storages = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)}
        output = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        self.most = max(self.most, sum(count for _, count in self._storages.values()))
        return output
