"""Controller: the control loop from Python. What each call does in full: moectl/controller.h, the same in C++."""

import array
import ctypes
import json
import math
import os
import weakref
from ctypes import byref, c_double, c_int, c_int64, c_size_t, c_void_p
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

from ._arrays import view
from ._errors import ArgumentError, MoectlError
from ._library import ALL_LAYERS, Batch, Figures, Log, StepInfo, Sum, check, lib, taken


def _free(handle: c_void_p, keep: Dict[str, Any]) -> None:
    # The callbacks in `keep` outlive the controller, which may call them until it is freed.
    lib.moectl_free(handle)
    keep.clear()


def _no_callback(kind: Any) -> Any:
    return kind()  # NULL


def _living(controller: "weakref.ref[Controller]") -> "Controller":
    found = controller()
    assert found is not None  # its callbacks run in its own calls
    return found


def _plain(value: Any) -> Any:
    """For json: numbers of NumPy and PyTorch, and arrays of them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"config: {type(value).__name__}: must be a number, a word, a list or a dict")


class Report:
    """One step in figures: means over layers, None where not known.

    `step`, `tokens` (of a layer), `max_vio` with its floor `floor_max_vio`, `cv` with `floor_cv`, `drop_rate`,
    `dead_experts` (of all layers), `limit_hits` (proposals that a limit changed). `records()` and `notices` read more
    from the controller: before its next step."""

    __slots__ = ("_controller", "_notices", "step", "tokens", "max_vio", "floor_max_vio", "cv", "floor_cv", "drop_rate",
                 "dead_experts", "limit_hits")
    step: int
    tokens: int
    max_vio: Optional[float]
    floor_max_vio: Optional[float]
    cv: Optional[float]
    floor_cv: Optional[float]
    drop_rate: Optional[float]
    dead_experts: Optional[float]
    limit_hits: int

    def __init__(self, controller: "Controller", figures: Figures):
        self._controller = controller
        self._notices = figures.notices
        for name in self.__slots__[2:]:
            value = getattr(figures, name)
            setattr(self, name, None if isinstance(value, float) and math.isnan(value) else value)

    @property
    def over_floor(self) -> Optional[float]:
        """MaxVio over its floor: 1 is as even as chance allows."""
        return self.max_vio / self.floor_max_vio if self.max_vio is not None and self.floor_max_vio else None

    def records(self, arrays: bool = False) -> List[Dict[str, Any]]:
        """One dict a layer, as in a run log (docs/formats.md); with `arrays`, values for each expert too."""
        if self._controller.report().step != self.step:
            raise MoectlError(f"report: of step {self.step}: the controller has stepped on")
        return self._controller._records(arrays)

    @property
    def notices(self) -> List[Dict[str, Any]]:
        """What was found in this step: dicts of layer, kind, step and text."""
        if not self._notices:
            return []
        return [dict(notice, layer=record["layer"]) for record in self.records() for notice in record.get("notices", [])
                if notice["step"] == self.step]

    def __repr__(self) -> str:
        floors = "not known" if self.over_floor is None else f"{self.over_floor:.2f} floors"
        return f"<moectl.Report step {self.step}: MaxVio {floors}, {self.limit_hits} limit hits>"


class Controller:
    """Keeps the experts of a model evenly loaded.

    config: a dict; the text of a config in YAML or JSON, which has a line break or starts with `{`; or the path of a
    file. `name` stands for the file in messages. Raises ConfigError.

    L = layers, N = experts of a layer, T = tokens, k = choices a token. Arrays are NumPy arrays, PyTorch tensors, all
    else that has a buffer, or lists; those of the type that is named are read in place, others are converted first.
    `record` and `say` may run in several threads at once, every other call alone."""

    def __init__(self, config: Union[Dict[str, Any], str, "os.PathLike[str]"], *, name: Optional[str] = None):
        handle = c_void_p()
        if isinstance(config, dict):
            text = json.dumps(config, ensure_ascii=False, default=_plain)
        elif isinstance(config, str) and ("\n" in config or config.lstrip().startswith("{")):
            text = config
        else:
            text = ""
            check(lib.moectl_new_from_file(os.fsencode(config), byref(handle)))
        if not handle:  # not of a file
            if "\0" in text:
                raise ArgumentError("config: must not contain a zero byte")
            check(lib.moectl_new(text.encode("utf-8", "surrogatepass"), name.encode() if name else None, byref(handle)))
        self._handle = handle
        self._keep: Dict[str, Any] = {}
        self._raised: Optional[BaseException] = None
        # Not __del__: at the end of the interpreter it would come too late for callbacks.
        self._finalizer = weakref.finalize(self, _free, handle, self._keep)
        count = c_size_t()
        check(lib.moectl_layers(handle, None, 0, byref(count)))
        ids = (c_int * count.value)()
        check(lib.moectl_layers(handle, ids, count.value, None))
        self._layers = tuple(ids)
        self._shapes = {}
        for layer in self._layers:
            experts, top_k = c_size_t(), c_size_t()
            check(lib.moectl_shape(handle, layer, byref(experts), byref(top_k)))
            self._shapes[layer] = experts.value, top_k.value
        self._domains = len(self.config["model"].get("domains", []))

    def close(self) -> None:
        """Frees the controller, and closes its log. Otherwise that happens with the last reference to it."""
        self._finalizer()
        self._handle = c_void_p()  # every further call is an error

    def __enter__(self) -> "Controller":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ---- What it was made for ----

    @property
    def layers(self) -> Tuple[int, ...]:
        """The ids of the layers, [L]."""
        return self._layers

    def experts(self, layer: int) -> int:
        """N of one layer."""
        return self._shape(layer)[0]

    def top_k(self, layer: int) -> int:
        """k of one layer."""
        return self._shape(layer)[1]

    @property
    def config(self) -> Dict[str, Any]:
        """The whole config, every default filled in."""
        text = c_void_p()
        check(lib.moectl_config(self._handle, byref(text)))
        return json.loads(taken(text))

    @property
    def steps(self) -> int:
        """Steps so far."""
        steps = c_int64()
        check(lib.moectl_steps(self._handle, byref(steps)))
        return steps.value

    def _shape(self, layer: int) -> Tuple[int, int]:
        try:
            return self._shapes[layer]
        except KeyError:
            check(lib.moectl_shape(self._handle, layer, None, None))  # has the words
            raise

    # ---- Recording ----

    def record(self, layer: int, experts: Any, *, mask: Any = None, sequence_length: int = 0, sequence_ids: Any = None,
               top_values: Any = None, biased_scores: Any = None, probabilities: Any = None, domain_ids: Any = None,
               dropped: Optional[int] = None, balance_loss: Optional[float] = None, z_loss: Optional[float] = None,
               micro_batch: Optional[int] = None) -> None:
        """Adds one micro-batch of one layer's routing.

        experts        [T, k] int64 or int32: the experts chosen for each token, before any capacity limit; -1 = a slot
                       that is not routed
        mask           [T] bool or uint8: False = padding, not counted
        sequence_length  tokens a sequence, when the tokens are [B, S] row by row; or sequence_ids [T] int64
        top_values     [T, k+1] float32: the k+1 largest biased scores, largest first, in the order of `experts`
        biased_scores  [T, N] float32: the scores that selection compared; requires top_values
        probabilities  [T, N] float32
        domain_ids     [T] int64
        dropped        assignments dropped for lack of capacity
        balance_loss   the router's balance loss N Σ f_i P_i on these tokens, before its weight, from 0 to 2^24;
                       z_loss likewise. Anything else counts as not given
        micro_batch    from 0: a second record of the same (layer, micro_batch) before the next step is ignored

        Malformed data (an expert that does not exist) is no error: the layer holds, and a notice says why."""
        k = self._shape(layer)[1]
        chosen = view("experts", experts, "int64", "int32")
        tokens = chosen.size // k
        if tokens * k != chosen.size:
            raise ArgumentError(f"experts: {chosen.size} values: must be a multiple of top_k ({k})")
        batch = Batch(ctypes.sizeof(Batch), tokens)
        if chosen.type == "int64":
            batch.experts = chosen.address
        else:
            batch.experts32 = chosen.address
        batch.sequence_length = sequence_length
        keep = [chosen]
        n = self._shapes[layer][0]

        def attach(name: str, values: Any, size: int, kind: str) -> None:
            given = view(name, values, kind)
            if given.size != size:
                raise ArgumentError(f"{name}: {given.size} values: must be {size}")
            setattr(batch, name, given.address)
            keep.append(given)

        if mask is not None:
            attach("mask", mask, tokens, "uint8")
        if sequence_ids is not None:
            attach("sequence_ids", sequence_ids, tokens, "int64")
        if top_values is not None:
            attach("top_values", top_values, tokens * (k + 1), "float32")
        if biased_scores is not None:
            attach("biased_scores", biased_scores, tokens * n, "float32")
        if probabilities is not None:
            attach("probabilities", probabilities, tokens * n, "float32")
        if domain_ids is not None:
            attach("domain_ids", domain_ids, tokens, "int64")
        if dropped is not None:
            batch.dropped = ctypes.pointer(c_int64(dropped))
        if balance_loss is not None:
            batch.balance_loss = ctypes.pointer(c_double(balance_loss))
        if z_loss is not None:
            batch.z_loss = ctypes.pointer(c_double(z_loss))
        check(lib.moectl_record(self._handle, layer, byref(batch), -1 if micro_batch is None else micro_batch))

    def record_counts(self, counts: Any, *, layer: Optional[int] = None, tokens: Any = None) -> None:
        """Adds counts that were summed elsewhere: [N] int64 of one layer, or of all layers one after another in the order
        of `layers`, [L, N] where they are equal. tokens: of the layer, or [L]; None = as many as the counts need, their sum over k."""
        where = ALL_LAYERS if layer is None else layer
        given = view("counts", counts, "int64")
        length = view("tokens", [tokens] if isinstance(tokens, int) else tokens, "int64") if tokens is not None else None
        if length and length.size != (len(self._layers) if layer is None else 1):
            raise ArgumentError(f"tokens: {length.size} values: must be one a layer")
        check(lib.moectl_record_counts(self._handle, where, given.address, given.size, length and length.address))

    def record_values(self, layer: int, **values: float) -> None:
        """What the host computes itself, by name: router_similarity, router_condition, expert_output_norm, gradient_ratio;
        also balance_loss and z_loss. Metrics report the mean over calls; a negative value or NaN is left out."""
        for name, value in values.items():
            check(lib.moectl_record_value(self._handle, layer, name.encode(), value))

    def check_choices(self, layer: int, experts: Any, biased_scores: Any, scores: Any = None) -> None:
        """Whether the router chooses by its bias: a few tokens' experts [T, k] int64, biased scores [T, N] float32 and,
        where known, the same before the bias was added. What is wrong in three steps is a notice `wiring`."""
        n, k = self._shape(layer)
        chosen = view("experts", experts, "int64")
        tokens = chosen.size // k
        biased = view("biased_scores", biased_scores, "float32")
        before = view("scores", scores, "float32") if scores is not None else None
        if chosen.size != tokens * k or biased.size != tokens * n or (before and before.size != tokens * n):
            raise ArgumentError("check_choices: must be [T, k] experts and [T, N] scores")
        check(lib.moectl_check_choices(self._handle, layer, tokens, chosen.address, biased.address,
                                       before and before.address))

    def say(self, kind: str, layer: int, text: str) -> None:
        """Adds a notice of your own to the next step's report; kind: "wiring", "config", …; layer -1 = of none."""
        check(lib.moectl_say(self._handle, kind.encode(), layer, text.encode()))

    # ---- Deciding ----

    def step(self, *, loss: Optional[float] = None, gradient_norm: Optional[float] = None, skipped: bool = False,
             next_mixture: Any = None) -> Report:
        """Once an optimizer step: reduces, measures, decides, limits.

        loss: mean training loss of the step, nats a token. skipped: the optimizer skipped the step. next_mixture:
        [domains] int64, tokens of each domain in the next batch. Raises ReductionError with nothing changed. Not while
        another thread records."""
        info = StepInfo(ctypes.sizeof(StepInfo))
        if loss is not None:
            info.loss = ctypes.pointer(c_double(loss))
        if gradient_norm is not None:
            info.gradient_norm = ctypes.pointer(c_double(gradient_norm))
        info.skipped = 1 if skipped else 0
        if next_mixture is not None:
            mixture = view("next_mixture", next_mixture, "int64")
            if mixture.size != self._domains:
                raise ArgumentError(f"next_mixture: {mixture.size} values: must be {self._domains}")
            info.next_mixture = mixture.address
        self._raised = None
        code = lib.moectl_step(self._handle, byref(info))
        raised, self._raised = self._raised, None
        if raised is not None and not isinstance(raised, Exception):
            raise raised  # an interrupt
        if code:
            try:
                check(code)
            except MoectlError as error:
                raise error from raised
        return self.report()

    def report(self) -> Report:
        """The last step again."""
        figures = Figures(ctypes.sizeof(Figures))
        check(lib.moectl_figures_of(self._handle, byref(figures)))
        return Report(self, figures)

    def _records(self, arrays: bool) -> List[Dict[str, Any]]:
        text = c_void_p()
        check(lib.moectl_report_json(self._handle, 1 if arrays else 0, byref(text)))
        return json.loads(taken(text))

    # ---- The values in force, which the router reads ----

    def bias(self, layer: int) -> "array.array[float]":
        """The selection biases [N] float64 of one layer. numpy.asarray() and torch.frombuffer() take it as it is."""
        return self._biases(lib.moectl_biases, layer, self._shape(layer)[0])

    def deployment_bias(self, layer: int) -> "array.array[float]":
        """What to deploy or validate with: the biases [N] in force without what serves the next batch alone."""
        return self._biases(lib.moectl_deployment_biases, layer, self._shape(layer)[0])

    def biases(self) -> "array.array[float]":
        """The same of all layers, one after another in the order of `layers`: [L * N]."""
        return self._biases(lib.moectl_biases, ALL_LAYERS, sum(n for n, _ in self._shapes.values()))

    def _biases(self, read: Any, layer: int, size: int) -> "array.array[float]":
        values = array.array("d", bytes(8 * size))
        check(read(self._handle, layer, values.buffer_info()[0], size))
        return values

    def aux_loss_weight(self, layer: int) -> float:
        """The weight of the auxiliary loss of one layer."""
        value = c_double()
        check(lib.moectl_aux_loss_weight(self._handle, layer, byref(value)))
        return value.value

    def temperature(self, layer: int) -> float:
        """The temperature of one layer's router."""
        value = c_double()
        check(lib.moectl_temperature(self._handle, layer, byref(value)))
        return value.value

    # ---- Holding, ranks, logs ----

    def begin_at(self, step: int) -> None:
        """For a controller that is new in the middle of a training: `step` is the training's next one. Warm-ups, schedules,
        the timeline and the log go on from there. Before the first step(), on every rank alike."""
        check(lib.moectl_begin_at(self._handle, step))

    def hold(self, on: bool = True) -> None:
        """Holds every actuator where it is, and keeps measuring."""
        check(lib.moectl_hold(self._handle, 1 if on else 0))

    def freeze(self, layer: int, on: bool = True) -> None:
        """Holds one layer's actuators: a frozen router, replayed routes."""
        check(lib.moectl_freeze(self._handle, layer, 1 if on else 0))

    def set_reduction(self, reduce: Optional[Callable[[memoryview], Any]]) -> None:
        """`reduce` adds a memoryview of int64 in place over all ranks that share the layers. numpy.asarray() and
        torch.frombuffer(…, dtype=torch.int64) take it as it is. What it raises is the cause of step()'s
        ReductionError. None: this process is the only rank."""
        self_ = weakref.ref(self)
        callback = _no_callback(Sum)
        if reduce is not None:
            callable_ = reduce

            def call(_: Any, values: Any, size: int) -> int:
                whole = (c_int64 * size).from_address(ctypes.addressof(values.contents))
                return _living(self_)._guard(callable_, memoryview(whole).cast("B").cast("q"))

            callback = Sum(call)
        check(lib.moectl_set_reduction(self._handle, callback, None))
        self._keep["reduction"] = callback

    def set_log(self, log: Union[None, str, "os.PathLike[str]", Callable[[str], Any]], append: bool = False) -> None:
        """Where the run log goes, which `moectl report` and `moectl compare` read: the path of a file, gzip if it ends
        in .gz, with `append` continued by a resumed run; or a callable, which receives whole lines: the header now,
        those of a step at its end. What it raises is a notice. None: nowhere."""
        if log is None or callable(log):
            self_ = weakref.ref(self)
            callback = _no_callback(Log)
            if log is not None:
                callable_ = log

                def call(_: Any, text: Any, size: int) -> int:
                    return _living(self_)._guard(callable_, ctypes.string_at(text, size).decode())

                callback = Log(call)
            self._raised = None
            try:
                check(lib.moectl_set_log(self._handle, callback, None))
            except MoectlError as error:
                raise error from self._raised
            self._keep["log"] = callback
        else:
            check(lib.moectl_log_to_file(self._handle, os.fsencode(log), 1 if append else 0))
            self._keep.pop("log", None)

    def _guard(self, callback: Callable[[Any], Any], argument: Any) -> int:
        try:
            callback(argument)
            return 0
        except BaseException as error:  # pylint: disable=broad-except; nothing may pass through C
            self._raised = error
            lib.moectl_set_error(f"{type(error).__name__}: {error}".encode("utf-8", "replace"))
            return 1

    # ---- Values from elsewhere ----

    def adopt(self, layer: int, bias: Any) -> None:
        """Puts biases [N] of another trainer or an older run in force at once; the policy goes on from there. On every
        rank alike, between two steps. Raises ValueError if one lies outside the limits."""
        given = view("bias", bias, "float64")
        check(lib.moectl_adopt(self._handle, layer, given.address, given.size))

    def adopt_aux_loss_weight(self, layer: int, weight: float) -> None:
        """Likewise; with `scope: model` for all layers."""
        check(lib.moectl_adopt_aux_loss_weight(self._handle, layer, weight))

    def adopt_temperature(self, layer: int, temperature: float) -> None:
        """Likewise."""
        check(lib.moectl_adopt_temperature(self._handle, layer, temperature))

    # ---- State ----

    def save(self) -> bytes:
        """Everything that the next step depends on, to the bit."""
        state, size = c_void_p(), c_size_t()
        check(lib.moectl_save(self._handle, byref(state), byref(size)))
        return taken(state, size.value)

    def load(self, state: bytes, keep: str = "everything") -> List[Dict[str, Any]]:
        """keep: "everything", for a state of the same config; or "what_fits", for one of another config: values in force
        in any case, memories where they fit. Returns what became of each part: dicts of layer, key, fate ("kept",
        "adapted", "dropped") and why. Raises StateError; the running state is then untouched."""
        kept = c_void_p()
        check(lib.moectl_load(self._handle, bytes(state), len(state), _keep(keep), byref(kept)))
        return json.loads(taken(kept))

    def save_layer(self, layer: int) -> bytes:
        """The state of one layer, to be loaded under the same id, also into a controller of other layers."""
        state, size = c_void_p(), c_size_t()
        check(lib.moectl_save_layer(self._handle, layer, byref(state), byref(size)))
        return taken(state, size.value)

    def load_layer(self, layer: int, state: bytes, keep: str = "everything") -> List[Dict[str, Any]]:
        """As load(), of one layer. All layers of a checkpoint must be of one step."""
        kept = c_void_p()
        check(lib.moectl_load_layer(self._handle, layer, bytes(state), len(state), _keep(keep), byref(kept)))
        return json.loads(taken(kept))


def _keep(keep: str) -> int:
    if keep not in ("everything", "what_fits"):
        raise ArgumentError(f"keep: {keep}: must be everything or what_fits")
    return int(keep == "what_fits")
