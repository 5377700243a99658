"""What moectl.torch uses of a DTensor, for PyTorch before 2.5: on all ranks, one dimension of the mesh."""

import sys
import types

import torch
import torch.distributed as dist


class Placement:
    reduce_op = "sum"

    def __init__(self, kind):
        self.kind = kind

    def is_partial(self):
        return self.kind == "partial"

    def is_replicate(self):
        return self.kind == "replicate"


class Mesh:
    def get_coordinate(self):
        return [dist.get_rank()]

    def get_group(self, dim):
        assert dim == 0
        return dist.group.WORLD


class DTensor:
    """No torch.Tensor: whatever else is asked of it fails."""

    def __init__(self, local, kind):
        self.local, self.placements, self.device_mesh = local, (Placement(kind),), Mesh()
        self.dtype, self.device = local.dtype, local.device

    def numel(self):
        return self.local.numel() * (dist.get_world_size() if self.placements[0].kind == "shard" else 1)

    @property
    def shape(self):
        return torch.Size([self.numel()])

    def detach(self):
        return self

    def zero_(self):
        self.local.zero_()

    def to_local(self):
        return self.local

    def full_tensor(self):
        kind, ranks = self.placements[0].kind, dist.get_world_size()
        if kind == "replicate":
            return self.local
        parts = [torch.empty_like(self.local) for _ in range(ranks)]
        dist.all_gather(parts, self.local)
        return torch.cat(parts) if kind == "shard" else sum(parts)

    def copy_(self, other):
        self.local.copy_(other.local)


def distribute_tensor(whole, mesh, placements):
    kind = placements[0].kind
    return DTensor(whole.chunk(dist.get_world_size())[dist.get_rank()] if kind == "shard" else whole.clone(), kind)


def install():
    """As the module that PyTorch has from 2.5 on."""
    module = types.ModuleType("torch.distributed.tensor")
    module.distribute_tensor = distribute_tensor
    sys.modules[module.__name__] = module
