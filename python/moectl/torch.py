"""moectl.torch: the controller on the modules of a PyTorch model.

    balancer = moectl.torch.Balancer(config, [block.moe.router for block in model.blocks])
    ...
    optimizer.step()
    balancer.step(loss=loss)      # counts of all ranks → decision → biases, in place

A site is a module and two names: of the attribute that counts its tokens, and of its bias. Both are looked up at every
step, so that trainers may swap or re-create the tensors behind them."""

import hashlib
import warnings
from itertools import groupby
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Set, Tuple, Union, cast

import torch
import torch.distributed as dist

from ._controller import Controller, Report
from ._errors import ArgumentError, ReductionError, StateError

_EXACT = 1 << 24  # float32 holds every whole number below
_UNIT = 1 << 24  # of losses and recorded values in fixed point
_LARGEST = float(1 << 24)  # a recorded value; what is above counts as that
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
    z_loss, mean (logsumexp z)². `mask` [...]: true = a real token. Differentiable, for a model without losses of its own; for
    the log alone, `balancer.record_values(layer, **router_losses(logits, experts))`."""
    if scores not in ("softmax", "sigmoid"):
        raise ArgumentError(f"scores: {scores}: must be softmax or sigmoid")
    z = logits.reshape(-1, logits.shape[-1]).float()
    n = z.shape[1]
    if experts.numel() % max(len(z), 1) or (mask is not None and mask.numel() != len(z)):
        raise ArgumentError("router_losses: must be logits [..., N], experts [..., k] and a mask [...]")
    real = (torch.ones_like(z[:, 0]) if mask is None else mask.reshape(-1).to(z.dtype)).unsqueeze(1)
    tokens = real.sum().clamp_min(1)
    sigmoids = torch.nn.functional.logsigmoid(z)
    p = (z if scores == "softmax" else sigmoids).softmax(1)
    chosen = experts.detach().reshape(len(z), -1).to(torch.int64)
    counts = torch.zeros(n, dtype=z.dtype, device=z.device)
    counts.scatter_add_(0, chosen.flatten(), real.expand(chosen.shape).flatten())
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


class Balancer:
    """Reads what the routers counted, and gives them their biases.

    config     as for moectl.Controller. Unless it has layer groups, `model.layers` and `model.experts` are taken from the
               sites. Biases that the model comes with are adopted.
    sites      the L modules that hold the counts and the bias, in the order of their layers
    group      the process group whose ranks share these layers and have different tokens; None = all ranks where
               torch.distributed is initialised, else this process alone. With pipeline stages: the group of the stage.
    counts     the name of the attribute with the tokens of each expert [N] since it was last reset, or a callable that
               takes the module; None = what record_indices() counted. An attribute that is None counts nothing.
    bias       the name of the attribute with the bias [N], or None for a model without one
    reset      called with each module after its counts were read; by default they are set to zero in place
    layer_ids  the model's own ids of the L layers, by which the other calls and the state name them; by default 0 … L-1.
               With pipeline stages: those of the whole model
    top_k      instead of the config's `model.top_k`
    overlap    the copy to the host is read one step later, so that no step waits for the device; the controller is told
               of the delay

    N = experts of a layer. Counts in bfloat16 or float16 are refused: they stop counting at 256 and 2048."""

    def __init__(self, config: Any, sites: Iterable[torch.nn.Module], *, group: Any = None,
                 counts: _Name = "tokens_per_expert", bias: Optional[str] = "expert_bias",
                 reset: Optional[Callable[[torch.nn.Module], None]] = None, layer_ids: Optional[Sequence[int]] = None,
                 top_k: Optional[int] = None, overlap: bool = False):
        self._sites = list(sites)
        self._counts, self._bias, self._reset = counts, bias, reset
        self._group, self._overlap = group, overlap
        self._ids = list(range(len(self._sites)) if layer_ids is None else layer_ids)
        if not self._sites or len(self._ids) != len(self._sites) or len(set(self._ids)) != len(self._ids):
            raise ArgumentError("sites, layer_ids: must be one module and one id a layer")
        with Controller(config) as given:
            full = given.config
        model = full["model"]
        model["delay"] = model.get("delay", 0) + (1 if overlap else 0)
        model["top_k"] = top_k or model["top_k"]
        own = [self._experts_of(site) or model["experts"] for site in self._sites]
        if not full.get("layers"):  # else the config says itself which layers there are
            model.update(layers=len(own), experts=own[0])
            if self._ids != list(range(len(own))) or len(set(own)) > 1:
                full["layers"] = [{"ids": [layer for layer, _ in equal], "experts": n}
                                  for n, equal in groupby(zip(self._ids, own), key=lambda one: one[1])]
        self.controller = Controller(full)
        if self.controller.layers != tuple(self._ids):
            raise ArgumentError(f"layer_ids: {self._ids}: the config has the layers {list(self.controller.layers)}")
        self._sizes = [self.controller.experts(layer) for layer in self._ids]
        self._domains = len(full["model"].get("domains", []))
        self._moves_bias = bias is not None and full["expert_bias"]["policy"] != "fixed"
        # All layers one after another, int64 [ΣN]: of this rank since the last step, and what record_indices() counted.
        self._sums: Optional[torch.Tensor] = None
        self._indices: Optional[torch.Tensor] = None
        self._written: Dict[int, torch.Tensor] = {}  # by layer, what the bias should still be
        self._inexact: Optional[torch.Tensor] = None
        self._values: Optional[torch.Tensor] = None  # sums and numbers of recorded values [L, V, 2], int64
        self._late: Optional[_Late] = None  # of the step before
        self._warned = False
        self._ranks_checked = False
        self._adopt()
        self._publish()

    # ---- What the sites hold ----

    def _experts_of(self, site: torch.nn.Module) -> Optional[int]:
        for name in (self._bias, self._counts):
            found = getattr(site, name, None) if isinstance(name, str) else None
            if found is not None:
                return found.numel()
        return None

    def _index(self, layer: int) -> int:
        try:
            return self._ids.index(layer)
        except ValueError:
            raise ArgumentError(f"layer: {layer}: must be one of {self._ids}") from None

    def _device(self) -> torch.device:
        for site in self._sites:
            for name in (self._bias, self._counts):
                found = getattr(site, name, None) if isinstance(name, str) else None
                if found is not None:
                    return found.device
        if self._indices is not None:
            return self._indices.device
        for parameter in self._sites[0].parameters():
            return parameter.device
        return torch.device("cpu")

    def _counted(self, index: int) -> Optional[torch.Tensor]:
        site = self._sites[index]
        if self._counts is None:
            return None
        if callable(self._counts):
            found = self._counts(site)
        else:
            if not hasattr(site, self._counts):
                raise ArgumentError(f"layer {self._ids[index]}: {type(site).__name__} has no attribute {self._counts}")
            found = getattr(site, self._counts)
        if found is None:
            return None
        if found.dtype in (torch.bfloat16, torch.float16):
            raise ArgumentError(f"layer {self._ids[index]}: counts in {found.dtype} are not exact: keep them in int64 or "
                                "float32")
        if found.numel() != self._sizes[index]:
            raise ArgumentError(f"layer {self._ids[index]}: {found.numel()} counts: must be {self._sizes[index]}")
        own = _own_part(found.detach(), self._group)
        if own.dtype == torch.float32:
            inexact = (own.max() >= _EXACT).to(torch.int64)
            self._inexact = inexact if self._inexact is None else self._inexact + inexact
        return (own.round() if own.is_floating_point() else own).to(torch.int64).flatten()

    # ---- Once an optimizer step, or more often ----

    @torch.no_grad()
    def record(self) -> None:
        """Takes the counts of all sites and resets them. step() does it too: needed only where a trainer resets them
        before its step ends. Enqueues work on the device and does not wait."""
        device = self._device()
        if self._sums is None:
            self._sums = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        sums = self._sums.split(self._sizes)
        for index, site in enumerate(self._sites):
            counted = self._counted(index)
            if counted is None:
                continue
            sums[index].add_(counted.to(device))
            if self._reset is not None:
                self._reset(site)
            elif isinstance(self._counts, str):
                getattr(site, self._counts).zero_()
        if self._indices is not None:
            self._sums += self._indices
            self._indices.zero_()

    def record_indices(self, layer: int, experts: torch.Tensor) -> None:
        """For routers without counts of their own, with `counts=None`: the experts chosen for each token [T, k], any
        integer type. Adds to a buffer in place, which torch.compile keeps."""
        index = self._index(layer)
        if self._indices is None:
            self._indices = torch.zeros(sum(self._sizes), dtype=torch.int64, device=experts.device)
        chosen = experts.detach().flatten().to(torch.int64) + sum(self._sizes[:index])
        self._indices.scatter_add_(0, chosen, torch.ones_like(chosen))

    @torch.no_grad()
    def record_values(self, layer: int, **values: Any) -> None:
        """What the host computes itself, by name: balance_loss, z_loss, router_similarity, router_condition,
        expert_output_norm, gradient_ratio; numbers, or tensors of one, which are not waited for. Any number of times a step,
        on any ranks: metrics report the mean over all that was recorded, and are absent where nothing was. A negative value or
        NaN is left out; above 2^24 counts as 2^24."""
        index = self._index(layer)
        if self._values is None:
            self._values = torch.zeros(len(self._sites), len(_VALUES), 2, dtype=torch.int64, device=self._device())
        for name, value in values.items():
            if name not in _VALUES:
                raise ArgumentError(f"record_values: {name}: must be one of {', '.join(_VALUES)}")
            number = torch.as_tensor(value, dtype=torch.float64, device=self._values.device).detach().reshape(())
            known = number >= 0
            fixed = torch.where(known, number.clamp(max=_LARGEST), torch.zeros_like(number)) * _UNIT
            self._values[index, _VALUES.index(name)] += torch.stack([fixed.round().to(torch.int64), known.to(torch.int64)])

    @torch.no_grad()
    def step(self, *, loss: Any = None, gradient_norm: Optional[float] = None, skipped: bool = False,
             next_mixture: Any = None) -> Report:
        """Once after the optimizer's step, on every rank: sums the counts over the ranks, decides, and writes the biases
        in place. loss: of this rank, a number or a tensor of one; the mean over ranks counts. next_mixture: tokens of
        each domain of the config [D] in this rank's part of the next batch, for feed-forward: from every rank, else it
        counts as not given; not with `overlap`, where it would come too late. Raises moectl.ReductionError with the
        biases unchanged."""
        mixture = self._mixture(next_mixture)
        self.record()
        self._check_ranks()
        payload: Optional[torch.Tensor] = self._reduced(self._payload(loss, skipped, mixture))
        self._sums = self._inexact = self._values = None
        if self._overlap:
            payload, self._late = self._arrived(self._late), self._sent(cast(torch.Tensor, payload))
        if payload is None:  # the first step with overlap
            report = self.controller.step()
        else:
            report = self._decide(payload.cpu(), gradient_norm)
        self._publish()
        return report

    def _mixture(self, given: Any) -> torch.Tensor:
        if given is None:
            return torch.zeros(self._domains + 1, dtype=torch.int64)
        if self._overlap:
            raise ArgumentError("next_mixture: not with overlap: it would come one step late")
        mixture = torch.as_tensor(given, dtype=torch.int64).flatten()
        if mixture.numel() != self._domains:
            raise ArgumentError(f"next_mixture: {mixture.numel()} values: must be {self._domains}")
        known = bool((mixture >= 0).all())  # else as if not given
        return torch.cat([mixture if known else torch.zeros_like(mixture), torch.tensor([int(known)])])

    def _payload(self, loss: Any, skipped: bool, mixture: torch.Tensor) -> torch.Tensor:
        """int64: counts [ΣN], layers whose bias was changed [L], then ranks with inexact counts, with a loss, the sum
        of the losses in fixed point, ranks that skipped, ranks, the next mixture [D], ranks that gave one, and the recorded
        values [L, V, 2]."""
        sums = cast(torch.Tensor, self._sums)
        device = sums.device
        changed = [torch.ne(_whole(self._bias_of(i)), self._written[i].to(device)).any() if i in self._written
                   else torch.zeros((), dtype=torch.bool, device=device) for i in range(len(self._sites))]
        value = torch.as_tensor(float("nan") if loss is None else loss, dtype=torch.float64, device=device).reshape(())
        known = torch.isfinite(value)
        inexact = torch.zeros((), dtype=torch.int64, device=device) if self._inexact is None else self._inexact
        fixed = torch.where(known, value * _UNIT, torch.zeros_like(value)).round()
        rest = [inexact, known, fixed, torch.tensor(int(bool(skipped)), device=device), torch.ones((), device=device)]
        values = torch.zeros(len(self._sites) * len(_VALUES) * 2, dtype=torch.int64, device=device)
        if self._values is not None:
            values = self._values.flatten().to(device)
        return torch.cat([sums, torch.stack(changed).to(torch.int64),
                          torch.stack([x.to(torch.int64) for x in rest]), mixture.to(device), values])

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

    def _sent(self, payload: torch.Tensor) -> _Late:
        if payload.device.type != "cuda":
            return payload, None
        host = torch.empty(payload.shape, dtype=payload.dtype, pin_memory=True)
        host.copy_(payload, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def _arrived(self, late: Optional[_Late]) -> Optional[torch.Tensor]:
        if late is None:
            return None
        if late[1] is not None:
            late[1].synchronize()
        return late[0]

    def _decide(self, payload: torch.Tensor, gradient_norm: Optional[float]) -> Report:
        layers = len(self._sites)
        counts, changed, rest, mixture, mixtures, values = payload.split(
            [sum(self._sizes), layers, 5, self._domains, 1, layers * len(_VALUES) * 2])
        inexact, losses, loss, skipped, ranks = rest.tolist()
        if inexact and not self._warned:
            self._warned = True
            warnings.warn("moectl: counts in float32 have reached 2^24, from where on they lose tokens: reset them more "
                          "often, or keep them in int64", stacklevel=3)
        for index in changed.nonzero().flatten().tolist():
            self.controller.say("wiring", self._ids[index], f"the bias {self._bias} was changed by something else since the last "
                                "step: is the trainer's own update switched off? It has been written again")
        if counts.any():  # a single process may also record by the controller itself, more than counts
            self.controller.record_counts(counts)
        for layer, of_layer in zip(self._ids, values.view(layers, len(_VALUES), 2).tolist()):
            self.controller.record_values(layer, **{name: total / _UNIT / number
                                                    for name, (total, number) in zip(_VALUES, of_layer) if number})
        return self.controller.step(loss=loss / _UNIT / losses if losses else None, gradient_norm=gradient_norm,
                                    skipped=skipped > 0, next_mixture=mixture if mixtures.item() == ranks else None)

    # ---- What the routers read ----

    def _bias_of(self, index: int) -> torch.Tensor:
        found = getattr(self._sites[index], cast(str, self._bias), None)
        if found is None:
            raise ArgumentError(f"layer {self._ids[index]}: {type(self._sites[index]).__name__} has no bias {self._bias}")
        return found

    @torch.no_grad()
    def _adopt(self) -> None:
        """Goes on from the biases that the model came with."""
        if self._moves_bias:
            for index, layer in enumerate(self._ids):
                found = _whole(self._bias_of(index).detach()).double().flatten().cpu()
                if found.any():
                    self.controller.adopt(layer, found)

    @torch.no_grad()
    def _publish(self) -> None:
        """Writes the biases in force into the tensors that the sites hold now."""
        if not self._moves_bias:
            return
        values = torch.frombuffer(self.controller.biases(), dtype=torch.float64).to(torch.float32)
        for index, own in enumerate(values.to(self._bias_of(0).device).split(self._sizes)):
            target = self._bias_of(index)
            _write(target, own.view(target.shape))
            self._written[index] = _whole(target.detach()).clone()

    def aux_loss_weight(self, layer: int) -> float:
        """The weight of the auxiliary loss of one layer."""
        return self.controller.aux_loss_weight(layer)

    def temperature(self, layer: int) -> float:
        """The temperature of one layer's router."""
        return self.controller.temperature(layer)

    def freeze(self, layer: int, on: bool = True) -> None:
        """Holds one layer: a frozen router, or routes that are replayed and do not answer the bias."""
        self.controller.freeze(layer, on)

    def hold(self, on: bool = True) -> None:
        """Holds all layers, and keeps measuring."""
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
        """After the model's own state, of the same or another split of the layers, whose entries are passed over. A
        layer that is missing, or does not fit, goes on from the bias that the model holds, with a warning."""
        restored, problems = [], []
        for layer in self._ids:
            try:
                self.controller.load_layer(layer, state[f"layer.{layer}"], "what_fits")
                restored.append(layer)
            except KeyError:
                problems.append(f"layer {layer}: not in the state")
            except StateError as error:
                problems.append(f"layer {layer}: {error}")
        self._late = None
        if self._moves_bias:
            for index, layer in enumerate(self._ids):
                if layer not in restored:
                    self.controller.adopt(layer, _whole(self._bias_of(index).detach()).double().flatten().cpu())
        if problems:
            warnings.warn("moectl: these layers go on from the model's own bias: " + "; ".join(problems), stacklevel=2)
        self._publish()
