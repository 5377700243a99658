"""moectl.torch: the controller on the modules of a PyTorch model.

    balancer = moectl.torch.Balancer(config, [block.moe.router for block in model.blocks])
    ...
    optimizer.step()
    balancer.step(loss=loss)      # counts of all ranks → decision → biases, in place

A site is a module and two names: of the attribute that counts its tokens, and of its bias. Both are looked up at every
step, so that trainers may swap or re-create the tensors behind them."""

import hashlib
import math
import os
import struct
import warnings
import zlib
from itertools import groupby
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Set, Tuple, Union, cast

import torch
import torch.distributed as dist

from ._arrays import whole
from ._controller import Controller, Report
from ._errors import ArgumentError, ReductionError, StateError
from ._library import DECIDED, EVER_MOVES, FROZEN

_EXACT = 1 << 24  # float32 holds every whole number below
_UNIT = 1 << 24  # of losses and recorded values in fixed point
_LARGEST = float(1 << 24)  # a recorded value; what is above counts as that
_LARGEST_MEAN = float(1 << 28)  # a loss or a norm; what is above is not known, so that sums over 2^11 ranks fit
_MOST = 1 << 40  # tokens of an expert in a step; what is above is no count, so that sums over 2^22 ranks fit
_VALUES = ("balance_loss", "z_loss", "router_similarity", "router_condition", "expert_output_norm", "gradient_ratio")

_Late = Tuple[torch.Tensor, Any]  # a payload on the host, and the event after which it is there, or None
_Name = Union[None, str, Callable[[torch.nn.Module], Optional[torch.Tensor]]]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a DTensor; a plain tensor as it is."""
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _write(target: torch.Tensor, values: torch.Tensor) -> None:
    if hasattr(target, "full_tensor"):  # every rank has the same values; each keeps its shard
        from torch.distributed.tensor import distribute_tensor

        sharded = cast(Any, target)
        values = distribute_tensor(values.to(target.dtype), sharded.device_mesh, sharded.placements)
    target.copy_(values)


def _zeros(*shape: int, device: Any) -> torch.Tensor:
    """int64. A tensor that is made under inference_mode could not be added to outside."""
    with torch.inference_mode(False):
        return torch.zeros(*shape, dtype=torch.int64, device=device)


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. From the host it waits for nothing, which takes pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor).to(device, non_blocking=True)
    return tensor.to(device)


def _number(name: str, value: Any, device: torch.device) -> torch.Tensor:
    """A number, or a tensor of one, as float64 []."""
    try:
        if isinstance(value, (int, float)):
            return torch.full((), float(value), dtype=torch.float64, device=device)
        found = torch.as_tensor(value, dtype=torch.float64).detach()
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ArgumentError(f"{name}: {type(value).__name__}: must be a number or a tensor of one") from None
    if found.numel() != 1:
        raise ArgumentError(f"{name}: {found.numel()} values: must be one")
    return _to(_whole(found).reshape(()), device)


def _same(ranks: int, total: int, squares: int) -> bool:
    """Whether all of `ranks` numbers are equal, by their sum and the sum of their squares."""
    return ranks * squares == total * total


def _ids_of(experts: torch.Tensor) -> torch.Tensor:
    if experts.is_floating_point() or experts.is_complex() or experts.dtype == torch.bool:
        raise ArgumentError(f"experts: {experts.dtype}: must be integers, the ids of the experts")
    return experts.detach().to(torch.int64)


def _members(group: Any) -> Set[int]:
    return set(dist.get_process_group_ranks(group))


def _own_part(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """What this rank adds to the sum over `group`, so that the sum has all of the tensor once: [N].

    A plain tensor is this rank's own. Of a DTensor, each rank of the mesh adds its part where it holds one (Partial). What
    several ranks hold (Replicate), or hold in pieces (Shard), is added by the first of them, and by the others as zeros.
    Along a dimension of the mesh that runs across the group, each group has the whole."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    sharded = cast(Any, tensor)
    mesh, placements = sharded.device_mesh, sharded.placements
    ranks = None if group is None else _members(group)
    inside = [True] * len(placements)
    if ranks is not None:
        for dim in range(len(placements)):
            others = _members(mesh.get_group(dim))
            inside[dim] = others <= ranks
            if not inside[dim] and len(others & ranks) > 1:
                raise ArgumentError(f"counts: a DTensor over the ranks {sorted(others)}: `group` must hold all of them or "
                                    f"one, and it holds {sorted(others & ranks)}")
    parts = [within and placement.is_partial() and getattr(placement, "reduce_op", "sum") == "sum"
             for within, placement in zip(inside, placements)]
    if all(part or placement.is_replicate() for part, placement in zip(parts, placements)):
        local = sharded.to_local()
    else:  # nothing can be made a part again
        parts = [False] * len(parts)
        local = sharded.full_tensor()
    at = mesh.get_coordinate()  # None on a rank that is not in the mesh
    if at is None or any(within and not part and place for within, part, place in zip(inside, parts, at)):
        local = torch.zeros(tensor.shape, dtype=local.dtype, device=local.device)
    return cast(torch.Tensor, local)


@torch.no_grad()
def router_values(weight: torch.Tensor) -> Dict[str, float]:
    """How well a router's weight [N, d] tells its experts apart: router_similarity, the mean absolute cosine between the rows
    of two experts (N > 1), and router_condition, the largest over the smallest singular value. For
    `balancer.record_values(layer, **router_values(weight))`, every few hundred steps: it takes a singular value
    decomposition, and waits for the device. Of a weight that is not finite: nothing."""
    full = _whole(weight.detach()).double()
    if not torch.isfinite(full).all():
        return {}
    rows = torch.nn.functional.normalize(full, dim=1)
    n = len(rows)
    singular = torch.linalg.svdvals(full)
    values = {"router_condition": (singular[0] / singular[-1]).item()}
    if n > 1:
        values["router_similarity"] = ((rows @ rows.T).fill_diagonal_(0).abs().sum() / (n * (n - 1))).item()
    return values


def router_losses(logits: torch.Tensor, experts: torch.Tensor, mask: Optional[torch.Tensor] = None,
                  scores: str = "softmax") -> Dict[str, torch.Tensor]:
    """The losses of a router's logits [..., N] and choices `experts` [..., k], before their weights: balance_loss, N Σ f_i P_i,
    with f the shares of the assignments and P the mean probabilities (of `scores` "sigmoid": the sigmoids over their sum), and
    z_loss, mean (logsumexp z)². `mask` [...]: true = a real token. An expert of -1 is a slot that is not routed; one that does
    not exist makes balance_loss NaN. Differentiable, for a model without losses of its own; for
    the log alone, `balancer.record_values(layer, **router_losses(logits, experts))`."""
    if scores not in ("softmax", "sigmoid"):
        raise ArgumentError(f"scores: {scores}: must be softmax or sigmoid")
    n = logits.shape[-1]
    z = logits.reshape(math.prod(logits.shape[:-1]), n).float()
    choices = experts.numel() // max(len(z), 1)  # of each token
    if experts.numel() != len(z) * choices or (mask is not None and mask.numel() != len(z)):
        raise ArgumentError("router_losses: must be logits [..., N], experts [..., k] and a mask [...]")
    real = (torch.ones_like(z[:, 0]) if mask is None else mask.reshape(-1).to(z.dtype)).unsqueeze(1)
    tokens = real.sum().clamp_min(1)
    sigmoids = torch.nn.functional.logsigmoid(z)
    p = (z if scores == "softmax" else sigmoids).softmax(1)
    chosen = _ids_of(experts).reshape(len(z), choices)
    weights = torch.where((chosen < -1) | (chosen >= n), torch.full_like(z[:, :1], float("nan")), real * (chosen >= 0))
    counts = torch.zeros(n, dtype=z.dtype, device=z.device)
    counts.scatter_add_(0, chosen.clamp(0, n - 1).flatten(), weights.flatten())
    share = counts / counts.sum().clamp_min(1)
    return {"balance_loss": n * (share * (p * real).sum(0) / tokens).sum(),
            "z_loss": (z.logsumexp(1, keepdim=True).square() * real).sum() / tokens}


@torch.no_grad()
def expert_output_norm(outputs: torch.Tensor) -> Dict[str, torch.Tensor]:
    """The mean norm of the rows of `outputs` [..., d], what experts put out for one assignment each, before the gate:
    expert_output_norm. Without rows NaN, which record_values leaves out. Does not wait for the device."""
    return {"expert_output_norm": torch.linalg.vector_norm(_whole(outputs.detach()).float(), dim=-1).mean()}


def gradient_ratios(weights: Sequence[torch.Tensor], balance_loss: Any, task_loss: torch.Tensor) -> List[Dict[str, torch.Tensor]]:
    """What the balance loss weighs beside the task's in each router: [{"gradient_ratio": …}], one for each of `weights`, the norm
    of the gradient of `balance_loss` over that of `task_loss`. Both are scalars with their weights, over all layers, before
    the backward pass that follows. Makes two backward passes of its own, down to the first router, which accumulate no
    gradient: every few hundred steps. NaN, which record_values leaves out, for a weight that needs no gradient or that
    neither loss reaches. Of one rank: record_values takes the mean over ranks."""
    reached = [weight for weight in weights if weight.requires_grad]

    def norms(loss: Any) -> List[torch.Tensor]:
        if not reached or not getattr(loss, "requires_grad", False):
            return [torch.zeros(())] * len(reached)
        found = torch.autograd.grad(loss, reached, retain_graph=True, allow_unused=True)
        return [torch.zeros(()) if g is None else torch.linalg.vector_norm(_whole(g).double()).cpu() for g in found]

    ratios = iter([b / t for b, t in zip(norms(balance_loss), norms(task_loss))])
    return [{"gradient_ratio": next(ratios) if weight.requires_grad else torch.tensor(float("nan"))} for weight in weights]


class _Controller(Controller):
    """Holds at the next step, in which all ranks hold together; and says what that step may move."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.settings = self.config
        self.held = os.environ.get("MOECTL_HOLD", "") not in ("", "0")

    def hold(self, on: bool = True) -> None:
        """From the next step on, in which all ranks hold together."""
        self.held = bool(on)

    def hold_now(self, on: bool) -> None:
        super().hold(on)

    def frozen(self) -> List[bool]:
        """Whether the next step holds each layer [L]."""
        return [plan & FROZEN != 0 for plan in self._plans()]

    def moves(self) -> List[bool]:
        """Whether the next step may move the biases of each layer [L], unless the host holds it."""
        active = self.settings["mode"] == "active"
        return [active and plan & (FROZEN | DECIDED) == DECIDED for plan in self._plans()]

    def decides(self) -> List[bool]:
        """Whether something decides about the biases of each layer [L] at the next step, be it applied or not."""
        return [plan & DECIDED != 0 for plan in self._plans()]

    def ever_moves(self) -> List[bool]:
        """Whether some step of the config's may move the biases of each layer [L]."""
        return [plan & EVER_MOVES != 0 for plan in self._plans()]

    def digests(self) -> List[int]:
        """24 bits of what is in force in each layer [L], the same on ranks that have not diverged."""
        biases, at = memoryview(self.biases()).cast("B"), 0
        found = []
        for layer in self.layers:
            end = at + 8 * self.experts(layer)
            scalars = struct.pack("2d", self.aux_loss_weight(layer), self.temperature(layer))
            found.append(zlib.crc32(biases[at:end], zlib.crc32(scalars)) & 0xFFFFFF)
            at = end
        return found


class Balancer:
    """Reads what the routers counted, and gives them their biases.

    config     as for moectl.Controller. Unless it has layer groups, `model.layers` and `model.experts` are taken from the
               sites. Biases that the model comes with are adopted.
    sites      the L modules that hold the counts and the bias, in the order of their layers
    group      the process group whose ranks share these layers and have different tokens; None = all ranks where
               torch.distributed is initialised, else this process alone. With pipeline stages: the group of the stage.
    counts     the name of the attribute with the tokens of each expert [N] since it was last reset, or a callable that
               takes the module; None = what record_indices() counted. An attribute that is None counts nothing.
    bias       the name of the attribute with the bias [N], or None for a model without one. A layer whose bias nothing
               moves (policy `fixed`, `frozen`) needs none
    reset      called with each module after its counts were read; by default the attribute is set to zero in place. A
               callable `counts` needs it
    layer_ids  the model's own ids of the L layers, by which the other calls and the state name them; by default 0 … L-1.
               With pipeline stages: those of the whole model
    top_k      instead of the config's `model.top_k`
    overlap    the copy to the host is read one step later, so that no step waits for the device; the controller is told
               of the delay

    N = experts of a layer. Counts in bfloat16 or float16 are refused: they stop counting at 256 and 2048. Under
    DistributedDataParallel give it broadcast_buffers=False: else each of its forward passes overwrites the counts of the
    micro-batches before, if they are buffers, by those of rank 0.

    A bias is written only where a step may move it: not in the modes `shadow` and `off`, while the host holds, or while the
    layer is frozen or its policy `fixed`. When it is written again, the controller goes on from what the model then has."""

    def __init__(self, config: Any, sites: Iterable[torch.nn.Module], *, group: Any = None,
                 counts: _Name = "tokens_per_expert", bias: Optional[str] = "expert_bias",
                 reset: Optional[Callable[[torch.nn.Module], None]] = None, layer_ids: Optional[Sequence[int]] = None,
                 top_k: Optional[int] = None, overlap: bool = False):
        self._sites = list(sites)
        self._counts, self._bias, self._reset = counts, bias, reset
        self._group, self._overlap = group, overlap
        self._ids = [whole("layer_ids", layer) for layer in (range(len(self._sites)) if layer_ids is None else layer_ids)]
        if not self._sites:
            raise ArgumentError("sites: none: must be a module for each layer")
        if len(self._ids) != len(self._sites):
            raise ArgumentError(f"layer_ids: {len(self._ids)} ids: must be one for each of the {len(self._sites)} sites")
        if len(set(self._ids)) != len(self._ids):
            raise ArgumentError(f"layer_ids: {self._ids}: must differ")
        if callable(counts) and reset is None:
            raise ArgumentError("reset: must be given with a callable `counts`, whose result may be a copy")
        with Controller(config) as given:
            full = given.config
        model = full["model"]
        model["delay"] = model.get("delay", 0) + (1 if overlap else 0)
        if top_k is not None:
            model["top_k"] = whole("top_k", top_k, 1)
        own = [self._experts_of(index) or model["experts"] for index in range(len(self._sites))]
        if not full.get("layers"):  # else the config says itself which layers there are
            model.update(layers=len(own), experts=own[0])
            if self._ids != list(range(len(own))) or len(set(own)) > 1:
                full["layers"] = [{"ids": [layer for layer, _ in equal], "experts": n}
                                  for n, equal in groupby(zip(self._ids, own), key=lambda one: one[1])]
        self.controller = _Controller(full)
        if self.controller.layers != tuple(self._ids):
            raise ArgumentError(f"layer_ids: {self._ids}: the config has the layers {list(self.controller.layers)}")
        self._sizes = [self.controller.experts(layer) for layer in self._ids]
        self._top_k = [self.controller.top_k(layer) for layer in self._ids]
        self._domains = len(full["model"].get("domains", []))
        # All layers one after another, int64 [ΣN], then what could not be counted of each layer [L]: of this rank since
        # the last step, and what record_indices() counted, which ends with the slots that were not routed.
        self._sums: Optional[torch.Tensor] = None
        self._indices: Optional[torch.Tensor] = None
        self._seen: Set[Tuple[int, int]] = set()  # the layer and micro-batch of what record_indices() counted
        self._written: Dict[int, torch.Tensor] = {}  # by index of the layer, what the bias should still be
        self._inexact: Optional[torch.Tensor] = None
        self._values: Optional[torch.Tensor] = None  # sums and numbers of recorded values [L, V, 2], int64
        self._late: Optional[_Late] = None  # of the step before
        self._warned = False
        self._ranks_checked = False
        self._some_held = False
        self._empty = [0] * len(self._ids)  # steps in a row without a count
        self._adopt()
        self._publish(self.controller.moves())

    # ---- What the sites hold ----

    def _tensor(self, index: int, name: Optional[str]) -> Any:
        """The tensor behind a site's attribute; None if there is none."""
        found = getattr(self._sites[index], name, None) if name else None
        if found is not None and not hasattr(found, "full_tensor") and not isinstance(found, torch.Tensor):
            raise ArgumentError(f"layer {self._ids[index]}: {name}: {type(found).__name__}: must be a tensor")
        return found

    def _found(self, index: int) -> Optional[torch.Tensor]:
        """A tensor of the site, which says how many experts there are and on which device."""
        bias = self._tensor(index, self._bias)
        return bias if bias is not None else self._tensor(index, self._counts if isinstance(self._counts, str) else None)

    def _experts_of(self, index: int) -> Optional[int]:
        found = self._found(index)
        return None if found is None else found.numel()

    def _index(self, layer: int) -> int:
        try:
            return self._ids.index(layer)
        except ValueError:
            raise ArgumentError(f"layer: {layer}: must be one of {self._ids}") from None

    def _device(self) -> torch.device:
        for index in range(len(self._sites)):
            found = self._found(index)
            if found is not None:
                return found.device
        if self._indices is not None:
            return self._indices.device
        for parameter in self._sites[0].parameters():
            return parameter.device
        return torch.device("cpu")

    def _counted(self, index: int) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
        """int64: counts [N], and how many of them are none []."""
        site, where = self._sites[index], f"layer {self._ids[index]}"
        if self._counts is None:
            return None
        if callable(self._counts):
            found = self._counts(site)
        else:
            if not hasattr(site, self._counts):
                raise ArgumentError(f"{where}: {type(site).__name__} has no attribute {self._counts}")
            found = self._tensor(index, self._counts)
        if found is None:
            return None
        if not hasattr(found, "full_tensor") and not isinstance(found, torch.Tensor):
            raise ArgumentError(f"{where}: counts: {type(found).__name__}: must be a tensor")
        if found.dtype in (torch.bfloat16, torch.float16):
            raise ArgumentError(f"{where}: counts in {found.dtype} are not exact: keep them in int64 or float32")
        if found.numel() != self._sizes[index]:
            raise ArgumentError(f"{where}: {found.numel()} counts: must be {self._sizes[index]}")
        own = _own_part(found.detach(), self._group)
        values = own.round() if own.is_floating_point() else own.to(torch.int64)
        good = (values >= 0) & (values <= _MOST)  # NaN is neither
        values = torch.where(good, values, torch.zeros_like(values))
        if own.dtype == torch.float32:
            inexact = (values.max() >= _EXACT).to(torch.int64)
            self._inexact = inexact if self._inexact is None else self._inexact + inexact
        return values.to(torch.int64).flatten(), (~good).sum()

    # ---- Once an optimizer step, or more often ----

    @torch.no_grad()
    def record(self) -> None:
        """Takes the counts of all sites and resets them. step() does it too: needed only where a trainer resets them
        before its step ends. Enqueues work on the device and does not wait."""
        device = self._device()
        if self._sums is None:
            self._sums = _zeros(sum(self._sizes) + len(self._sizes), device=device)
        *sums, wrong = self._sums.split([*self._sizes, len(self._sizes)])
        for index, site in enumerate(self._sites):
            counted = self._counted(index)
            if counted is None:
                continue
            sums[index].add_(counted[0].to(device))
            wrong[index].add_(counted[1].to(device))
            if self._reset is not None:
                self._reset(site)
            elif isinstance(self._counts, str):
                getattr(site, self._counts).zero_()
        if self._indices is not None:
            self._sums += self._indices[:-1].to(device)
            self._indices.zero_()

    def record_indices(self, layer: int, experts: torch.Tensor, micro_batch: Optional[int] = None) -> None:
        """For routers without counts of their own, with `counts=None`: the experts chosen for each token [..., k], any
        integer type; -1 = a slot that is not routed. With an expert that does not exist the layer holds, and a notice says
        so. A pass without gradients, as of validation, counts nothing. Of activation checkpointing, the recomputed pass counts
        again: `micro_batch`, from 0, tells them apart, as a second record of the same (layer, micro_batch) before the next
        step counts nothing. Adds to a buffer in place, which torch.compile keeps, and does not wait for the device."""
        index = self._index(layer)
        chosen, k = _ids_of(experts), self._top_k[index]
        if chosen.numel() % k or (chosen.dim() > 1 and chosen.shape[-1] != k):
            raise ArgumentError(f"experts: {list(chosen.shape)}: must be [..., {k}], the config's top_k")
        if not torch.is_grad_enabled():
            return
        if micro_batch is not None:
            if (index, micro_batch) in self._seen:
                return
            self._seen.add((index, micro_batch))
        before, n = sum(self._sizes[:index]), self._sizes[index]
        wrong = sum(self._sizes) + index
        if self._indices is None:
            self._indices = _zeros(sum(self._sizes) + len(self._sizes) + 1, device=chosen.device)
        chosen = chosen.flatten()
        at = torch.where((chosen >= 0) & (chosen < n), chosen + before, torch.full_like(chosen, wrong))
        at = torch.where(chosen == -1, torch.full_like(chosen, len(self._indices) - 1), at)
        self._indices.scatter_add_(0, at, torch.ones_like(at))

    @torch.no_grad()
    def record_values(self, layer: int, **values: Any) -> None:
        """What the host computes itself, by name: balance_loss, z_loss, router_similarity, router_condition,
        expert_output_norm, gradient_ratio; numbers, or tensors of one, which are not waited for. Any number of times a step,
        on any ranks: metrics report the mean over all that was recorded, and are absent where nothing was. A negative value or
        NaN is left out; above 2^24 counts as 2^24."""
        index = self._index(layer)
        if self._values is None:
            self._values = _zeros(len(self._sites), len(_VALUES), 2, device=self._device())
        for name, value in values.items():
            if name not in _VALUES:
                raise ArgumentError(f"record_values: {name}: must be one of {', '.join(_VALUES)}")
            number = _number(name, value, self._values.device)
            known = number >= 0
            fixed = torch.where(known, number.clamp(max=_LARGEST), torch.zeros_like(number)) * _UNIT
            self._values[index, _VALUES.index(name)] += torch.stack([fixed.round().to(torch.int64), known.to(torch.int64)])

    @torch.no_grad()
    def step(self, *, loss: Any = None, gradient_norm: Any = None, skipped: bool = False,
             next_mixture: Any = None) -> Report:
        """Once after the optimizer's step, on every rank: sums the counts over the ranks, decides, and writes the biases
        in place. loss, gradient_norm: of this rank, a number or a tensor of one; the mean over ranks counts. next_mixture:
        tokens of each domain of the config [D] in this rank's part of the next batch, for feed-forward: from every rank, else
        it counts as not given; not with `overlap`, where it would come too late. Where the host holds some ranks, all hold, and
        a notice says how many. Raises moectl.ReductionError with the biases unchanged, on all ranks, where ranks have other
        values in force, are at other steps or have frozen other layers. The counts stay for the next step(); with
        `overlap` those of this step and of the one before are lost."""
        mixture = self._mixture(next_mixture)
        self.record()
        self._check_ranks()
        payload: Optional[torch.Tensor] = self._reduced(self._payload(loss, gradient_norm, skipped, mixture))
        if self._overlap:
            payload, self._late = self._arrived(self._late), self._sent(cast(torch.Tensor, payload))
            self._forget()
        if payload is None:  # the first step with overlap
            self.controller.hold_now(self.controller.held and self._ranks() == 1)
            report = self.controller.step()
        else:
            sums = self._split(payload.cpu())
            try:
                self._check_same(sums)
            except ReductionError:
                self._late = None  # of the same ranks before they were mended
                raise
            self._forget()
            report = self._decide(sums)
        return report

    def _forget(self) -> None:
        """What was recorded has been sent."""
        self._sums = self._inexact = self._values = None
        self._seen.clear()

    def _mixture(self, given: Any) -> List[int]:
        """The mixture [D], and 1 if it is known."""
        if given is None:
            return [0] * (self._domains + 1)
        if self._overlap:
            raise ArgumentError("next_mixture: not with overlap: it would come one step late")
        try:
            mixture = torch.as_tensor(given, dtype=torch.int64).flatten().tolist()
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentError(f"next_mixture: {type(given).__name__}: must be tokens of each domain") from None
        if len(mixture) != self._domains:
            raise ArgumentError(f"next_mixture: {len(mixture)} values: must be {self._domains}")
        return [*mixture, 1] if min(mixture) >= 0 else [0] * (self._domains + 1)

    # The parts of what is summed over the ranks, and their lengths.
    def _parts(self) -> Dict[str, int]:
        layers = len(self._sites)
        return {"counts": sum(self._sizes), "wrong": layers, "changed": layers, "means": 4, "inexact": 1,
                "values": layers * len(_VALUES) * 2, "ranks": 1, "skipped": 1, "held": 1, "steps": 2, "frozen": layers,
                "digests": layers, "squares": layers, "mixture": self._domains + 1}

    def _payload(self, loss: Any, gradient_norm: Any, skipped: bool, mixture: List[int]) -> torch.Tensor:
        """int64, all of _parts(): counts [ΣN] and how many could not be counted [L], layers whose bias was changed [L], loss
        and gradient norm in fixed point with 1 each if it is known, 1 if counts are inexact, recorded values [L, V, 2]; then
        what the host knows: 1, 1 if the optimizer skipped, 1 if held, the step and its square, frozen layers [L], digests of
        what is in force [L] and their squares [L], the next mixture [D] and 1 if it is known."""
        sums = cast(torch.Tensor, self._sums)
        device = sums.device
        changed = [torch.ne(_whole(self._bias_of(i)), self._written[i].to(device)).any() if i in self._written
                   else torch.zeros((), dtype=torch.bool, device=device) for i in range(len(self._sites))]
        means = []
        for name, given in (("loss", loss), ("gradient_norm", gradient_norm)):
            value = _number(name, float("nan") if given is None else given, device)
            known = value.abs() <= _LARGEST_MEAN
            means += [(torch.where(known, value, torch.zeros_like(value)) * _UNIT).round(), known]
        inexact = torch.zeros((), dtype=torch.int64, device=device) if self._inexact is None else self._inexact
        means.append(inexact.to(device))
        values = torch.zeros(len(self._sites) * len(_VALUES) * 2, dtype=torch.int64, device=device)
        if self._values is not None:
            values = self._values.flatten().to(device)
        controller = self.controller
        step, digests = controller.steps % (1 << 24), controller.digests()
        host = [1, int(bool(skipped)), int(controller.held), step, step * step, *(int(on) for on in controller.frozen()),
                *digests, *(digest * digest for digest in digests), *mixture]
        return torch.cat([sums, torch.stack(changed).to(torch.int64), torch.stack([x.to(torch.int64) for x in means]), values,
                          _to(torch.tensor(host, dtype=torch.int64), device)])

    def _split(self, payload: torch.Tensor) -> Dict[str, torch.Tensor]:
        parts = self._parts()
        return dict(zip(parts, payload.split(list(parts.values()))))

    def _ranks(self) -> int:
        return dist.get_world_size(self._group) if dist.is_available() and dist.is_initialized() else 1

    def _reduced(self, payload: torch.Tensor) -> torch.Tensor:
        if self._ranks() > 1:
            try:
                dist.all_reduce(payload, group=self._group)
            except RuntimeError as error:
                raise ReductionError(str(error)) from error
        return payload

    def _check_ranks(self) -> None:
        """Once: ranks with other layers would add what does not belong together."""
        if self._ranks_checked or self._ranks() == 1:
            return
        same = hashlib.sha256(repr((self._ids, self.controller.config)).encode()).digest()
        mine = int.from_bytes(same[:7], "little")
        ends = torch.tensor([mine, -mine], dtype=torch.int64, device=self._device())
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._group)
        if ends[0].item() != mine or ends[1].item() != -mine:
            raise ReductionError("ranks of the group have other layers or another config: give `group` the ranks that "
                                 "share these layers")
        self._ranks_checked = True

    def _check_same(self, sums: Dict[str, torch.Tensor]) -> None:
        """Ranks that have diverged would move on apart: all of them stop, and say the same."""
        ranks = int(sums["ranks"])
        steps, squares = sums["steps"].tolist()
        wrong = [] if _same(ranks, steps, squares) else ["they are at other steps"]
        wrong += [f"layer {layer}: frozen on {frozen} of {ranks} ranks"
                  for layer, frozen in zip(self._ids, sums["frozen"].tolist()) if 0 < frozen < ranks]
        apart = [str(layer) for layer, total, square in zip(self._ids, sums["digests"].tolist(), sums["squares"].tolist())
                 if not _same(ranks, total, square)]
        if apart:
            wrong.append(f"layers {', '.join(apart)}: other biases, auxiliary weights or temperatures in force")
        if wrong:
            raise ReductionError(f"ranks differ: {'; '.join(wrong)}. All must begin with the same biases in the model, load the "
                                 "same state and freeze the same layers")

    def _sent(self, payload: torch.Tensor) -> _Late:
        if payload.device.type != "cuda":
            return payload, None
        host = torch.empty(payload.shape, dtype=payload.dtype, pin_memory=True)
        host.copy_(payload, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(payload.device))  # the payload's device need not be the current one
        return host, event

    def _arrived(self, late: Optional[_Late]) -> Optional[torch.Tensor]:
        if late is None:
            return None
        if late[1] is not None:
            late[1].synchronize()
        return late[0]

    def _decide(self, sums: Dict[str, torch.Tensor]) -> Report:
        controller, layers = self.controller, len(self._sites)
        ranks, held = int(sums["ranks"]), int(sums["held"])
        if sums["inexact"].item() and not self._warned:
            self._warned = True
            warnings.warn("moectl: counts in float32 have reached 2^24, from where on they lose tokens: reset them more "
                          "often, or keep them in int64", stacklevel=4)  # past step() and its no_grad
        if 0 < held < ranks and not self._some_held:
            controller.say("hold", -1, f"{held} of {ranks} ranks are held by hold() or by MOECTL_HOLD in their environment: all "
                           "ranks hold")
        self._some_held = held > 0
        holds = held > 0 or (ranks == 1 and controller.held)
        controller.hold_now(holds)
        moves = [moving and not holds for moving in controller.moves()]
        for index in sums["changed"].nonzero().flatten().tolist():
            if moves[index]:
                controller.say("wiring", self._ids[index], f"the bias {self._bias} was changed by something else since the last "
                               "step: is the trainer's own update switched off? It has been written again")
        if sums["counts"].any():  # a single process may also record by the controller itself, more than counts
            controller.record_counts(sums["counts"])
        for layer, wrong in zip(self._ids, sums["wrong"].tolist()):
            if wrong:
                controller.say("invalid", layer, f"{wrong} " + ("ids of experts that do not exist" if self._counts is None else
                                                                "counts that are negative, not finite or above 2^40"))
                controller.record_counts([-wrong] + [0] * (controller.experts(layer) - 1), layer=layer)  # so that it holds
        for layer, of_layer in zip(self._ids, sums["values"].view(layers, len(_VALUES), 2).tolist()):
            controller.record_values(layer, **{name: total / _UNIT / number
                                               for name, (total, number) in zip(_VALUES, of_layer) if number})
        loss, losses, norm, norms = sums["means"].tolist()
        mixture, mixtures = sums["mixture"].split([self._domains, 1])
        self._take_over(moves)
        report = controller.step(loss=loss / _UNIT / losses if losses else None,
                                 gradient_norm=norm / _UNIT / norms if norms else None, skipped=bool(sums["skipped"].item()),
                                 next_mixture=mixture if mixtures.item() == ranks else None)
        self._publish(moves)
        self._look_for_empty(sums)
        return report

    def _look_for_empty(self, sums: Dict[str, torch.Tensor]) -> None:
        """Says once where a layer has had no counts for as long as health waits."""
        dwell, found = self.controller.settings["health"]["dwell"], []
        for index, counts in enumerate(sums["counts"].split(self._sizes)):
            empty = not counts.any() and not sums["wrong"][index]
            self._empty[index] = self._empty[index] + 1 if empty else 0
            if self._empty[index] == dwell:
                found.append(self._ids[index])
        tokens = {layer: record.get("tokens") for layer, record in self.report().items()} if found else {}
        for layer in found:
            if tokens.get(layer) == 0:  # else recorded by the controller itself
                where = "record_indices() in a pass with gradients" if self._counts is None else \
                    self._counts if isinstance(self._counts, str) else "`counts`"
                self.controller.say("missing_input", layer, f"no token was counted in {dwell} steps: does the router count in "
                                    f"{where}, in whole numbers?")

    # ---- What the routers read ----

    def _bias_of(self, index: int) -> Any:
        where, found = f"layer {self._ids[index]}", self._tensor(index, self._bias)
        if found is None:
            raise ArgumentError(f"{where}: {type(self._sites[index]).__name__} has no bias {self._bias}")
        if found.numel() != self._sizes[index]:
            raise ArgumentError(f"{where}: {self._bias}: {found.numel()} values: must be {self._sizes[index]}")
        return found

    def _own_bias(self, index: int) -> torch.Tensor:
        """What the model has, float64 [N] on the host."""
        found = _whole(self._bias_of(index).detach())
        if found.device.type == "meta":
            raise ArgumentError(f"layer {self._ids[index]}: {self._bias}: on the device meta: must have values by now")
        return found.double().flatten().cpu()

    @torch.no_grad()
    def _adopt(self) -> None:
        """Goes on from the biases that the model came with."""
        if self._bias is None:
            return
        ever_moves, decides = self.controller.ever_moves(), self.controller.decides()
        for index, layer in enumerate(self._ids):
            if ever_moves[index]:
                found = self._own_bias(index)
            elif decides[index] and self._tensor(index, self._bias) is not None:
                found = self._own_bias(index)
            else:
                continue
            if found.any():
                self.controller.adopt(layer, found)

    @torch.no_grad()
    def _take_over(self, moves: List[bool]) -> None:
        """Layers whose bias was not written until now go on from what the model has."""
        for index, layer in enumerate(self._ids):
            if self._bias is None or not moves[index] or index in self._written:
                continue
            found = self._own_bias(index)
            mine = torch.frombuffer(self.controller.bias(layer), dtype=torch.float64)
            if torch.equal(found, mine.float().to(self._bias_of(index).dtype).double()):
                continue
            try:
                self.controller.adopt(layer, found)
                self.controller.say("wiring", layer, f"the bias {self._bias} was changed while moectl did not write it: goes on "
                                    "from there")
            except ArgumentError as error:
                self.controller.say("wiring", layer, f"the bias {self._bias} was changed while moectl did not write it, and has "
                                    f"been written again: {error}")

    @torch.no_grad()
    def _publish(self, moves: List[bool]) -> None:
        """Writes the biases in force into the tensors that the sites hold now, where they may move."""
        if self._bias is None or not any(moves):
            self._written.clear()
            return
        values = torch.frombuffer(self.controller.biases(), dtype=torch.float64).to(torch.float32)
        for index, own in enumerate(_to(values, self._device()).split(self._sizes)):
            if not moves[index]:
                self._written.pop(index, None)
                continue
            target = self._bias_of(index)
            _write(target, own.view(target.shape))
            self._written[index] = _whole(target.detach()).clone()

    def aux_loss_weight(self, layer: int) -> float:
        """The weight of the auxiliary loss of one layer."""
        return self.controller.aux_loss_weight(self._ids[self._index(layer)])

    def temperature(self, layer: int) -> float:
        """The temperature of one layer's router."""
        return self.controller.temperature(self._ids[self._index(layer)])

    def freeze(self, layer: int, on: bool = True) -> None:
        """Holds one layer: a frozen router, or routes that are replayed and do not answer the bias. On every rank alike. A
        layer that goes on needs its bias."""
        index, controller = self._index(layer), self.controller
        if not on and self._bias is not None and controller.decides()[index]:
            self._bias_of(index)
        controller.freeze(self._ids[index], on)

    def hold(self, on: bool = True) -> None:
        """Holds all layers from the next step on, on all ranks, and keeps measuring. With `overlap` and several ranks a step
        later."""
        self.controller.hold(on)

    def set_log(self, log: Any, append: bool = False) -> None:
        """As moectl.Controller.set_log; on one rank, since all would write the same."""
        self.controller.set_log(log, append)

    def report(self, arrays: bool = False) -> Dict[int, Dict[str, Any]]:
        """The last step's records by layer id, as in a run log; with `arrays`, values for each expert too."""
        return {record["layer"]: record for record in self.controller.report().records(arrays)
                if record["layer"] is not None}

    # ---- State ----

    def state_dict(self) -> Dict[str, bytes]:
        """All that the next step depends on, by layer: {"layer.17": bytes}, the same on every rank of the group. Pipeline
        stages join theirs into one dict. With `overlap`, counts on their way are not part of it."""
        return {f"layer.{layer}": self.controller.save_layer(layer) for layer in self._ids}

    def load_state_dict(self, state: Dict[str, bytes]) -> None:
        """After the model's own state, of the same or another split of the layers, whose entries are skipped. A
        layer that is missing, or does not fit, goes on from the bias that the model holds, with a warning. What was recorded
        before is forgotten. Raises, with nothing changed, StateError if layers are of different steps, and ArgumentError
        if a bias that the model holds lies outside the limits."""
        own = {layer: state.get(f"layer.{layer}") for layer in self._ids} if isinstance(state, dict) else None
        if own is None:
            raise ArgumentError(f"state: {type(state).__name__}: must be a dict, as state_dict() returns it")
        for layer, saved in own.items():
            if saved is not None and not isinstance(saved, (bytes, bytearray, memoryview)):
                raise ArgumentError(f"state: layer.{layer}: {type(saved).__name__}: must be bytes")
        controller = self.controller
        before = controller.save()
        try:
            problems = self._load_layers(own)
        except BaseException:
            controller.load(before)
            raise
        self._late = None
        self._forget()
        if self._indices is not None:
            self._indices.zero_()
        self._empty = [0] * len(self._ids)
        if problems:
            warnings.warn("moectl: these layers go on from the model's own bias: " + "; ".join(
                f"layer {layer}: {why}" for layer, why in problems.items()), stacklevel=2)
        self._publish(controller.moves())

    def _load_layers(self, own: Dict[int, Optional[bytes]]) -> Dict[int, str]:
        """The layers that go on from the bias that the model holds, and why."""
        controller = self.controller
        problems: Dict[int, str] = {}
        steps: Dict[int, int] = {}
        for layer, saved in own.items():
            if saved is None:
                problems[layer] = "not in the state"
                continue
            try:
                parts = controller.load_layer(layer, bytes(saved), "what_fits")
                steps[layer] = controller.steps
                problems.update({layer: part["why"] for part in parts
                                 if part["key"] == "expert_bias" and part["fate"] == "dropped"})
            except StateError as error:
                problems[layer] = str(error)
        if len(set(steps.values())) > 1:
            raise StateError("state: layers of different steps: " + ", ".join(f"layer.{i} of {n}" for i, n in steps.items()))
        if self._bias is not None:
            decides = controller.decides()
            for layer in problems:
                index = self._index(layer)
                if decides[index] and self._tensor(index, self._bias) is not None:
                    controller.adopt(layer, self._own_bias(index))
        return problems
