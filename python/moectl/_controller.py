"""Controller: the control loop from Python. What each call does in full: moectl/controller.h, the same in C++."""

import array
import ctypes
import json
import math
import os
import threading
import time
import weakref
from collections.abc import Mapping
from ctypes import byref, c_double, c_int, c_int64, c_size_t, c_void_p
from threading import get_ident
from typing import Any, Callable, Dict, List, NoReturn, Optional, Tuple, Union

from ._arrays import Array, path, raw, real, shaped, shown, switch, view, whole, word
from ._errors import ArgumentError, ConfigError, MoectlError
from ._library import ALL_LAYERS, Batch, Figures, Log, StepInfo, Sum, check, lib, taken


_SIZE_OF_BATCH = ctypes.sizeof(Batch)


class _Handle:
    """The controller in C. It is freed when no call is running on it."""

    __slots__ = ("pointer", "owned", "running", "process", "closed", "ended")

    def __init__(self, pointer: c_void_p):
        self.pointer = pointer
        self.owned = [pointer]  # taken by the one thread that frees it; list.pop needs no lock
        self.running: List[int] = []  # the thread of each call; list.append and list.remove need no lock
        self.process = os.getpid()
        self.closed = self.ended = False

    def call(self, function: Any, *arguments: Any) -> int:
        me = get_ident()
        self.running.append(me)
        try:
            if not self.closed:  # read after `running` was written, as free() writes and reads in the other order
                return function(self.pointer, *arguments)
        finally:
            self.running.remove(me)
        if self.ended and threading.current_thread().daemon:
            threading.Event().wait()  # the interpreter ends, and this thread with it: no error to report
        raise ArgumentError("controller: closed: must be open")

    def free(self, patience: float = math.inf) -> None:
        """Waits for the calls of other threads, `patience` seconds at most, and frees the controller unless some still run."""
        if get_ident() in self.running:
            raise ArgumentError("close: called in a callback of the controller: must be called after its step")
        self.closed = True
        if os.getpid() != self.process and self.running:
            return  # the calls were the parent's, at the moment of the fork: here they never end
        last = time.monotonic() + patience
        while self.running:
            if time.monotonic() > last:
                return
            time.sleep(0.001)
        try:
            pointer = self.owned.pop()
        except IndexError:
            return  # another thread frees it
        self.pointer = c_void_p()
        lib.moectl_free(pointer)


def _end(handle: _Handle) -> None:
    """With the last reference to a controller, or at the end of the interpreter, where daemon threads still run. One that
    waits for ever, as for a lost rank, must not keep the program from its end."""
    handle.ended = True
    handle.free(patience=10)


def _no_callback(kind: Any) -> Any:
    return kind()  # NULL


def _config_text(value: Any, name: str) -> str:
    """A config as JSON, with numbers and arrays of NumPy and PyTorch as plain ones."""

    def plain(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            for inner in value:
                if not isinstance(inner, str):
                    raise ConfigError(f"{name}: {key + '.' if key else ''}{shown(inner)}: must be a word")
            return {inner: plain(given, f"{key}.{inner}" if key else inner) for inner, given in value.items()}
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, (list, tuple)):
            return [plain(one, f"{key}[{index}]") for index, one in enumerate(value)]
        if isinstance(value, os.PathLike):
            return os.fsdecode(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}: {key}: {value}: must be finite")
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ConfigError(f"{name}: {key}: {shown(value)}: must be a number, a word, a list or a dict")

    try:
        return json.dumps(plain(value, ""), ensure_ascii=False)
    except RecursionError:
        raise ConfigError(f"{name}: nests too deeply, or holds itself") from None


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
    else that has a buffer, or lists; those of the type that is named are read in place, others are converted first. Their
    shapes are those that are named; tokens may also be [B, S]. A wrong argument is an ArgumentError, which is a ValueError.
    `record` and `say` may run in several threads at once, every other call alone. A controller belongs to its process and
    cannot be copied or pickled; save() gives its state."""

    def __init__(self, config: Union[Mapping[str, Any], str, "os.PathLike[str]"], *, name: Optional[str] = None):
        handle = c_void_p()
        called = word("name", name) if name is not None else None
        if isinstance(config, Mapping):
            text = _config_text(config, name or "config")
        elif isinstance(config, str) and ("\n" in config or config.lstrip().startswith("{")):
            text = config
        elif isinstance(config, (str, bytes, os.PathLike)):
            text = ""
            check(lib.moectl_new_from_file(path("config", config), byref(handle)))
        else:
            raise ArgumentError(f"config: {shown(config)}: must be a dict, text or the path of a file")
        if not handle:  # not of a file
            check(lib.moectl_new(word("config", text), called, byref(handle)))
        self._handle = _Handle(handle)
        self._keep: Dict[str, Any] = {}  # callbacks, which live as long as this object
        self._raised: Optional[BaseException] = None
        # Not __del__: at the end of the interpreter it would come too late for callbacks. The finalizer holds nothing of the
        # caller's, else an object that gives its own method as a callback would never be collected.
        self._finalizer = weakref.finalize(self, _end, self._handle)
        count = c_size_t()
        self._call(lib.moectl_layers, None, 0, byref(count))
        ids = (c_int * count.value)()
        self._call(lib.moectl_layers, ids, count.value, None)
        self._layers = tuple(ids)
        self._shapes = {}
        for layer in self._layers:
            experts, top_k = c_size_t(), c_size_t()
            self._call(lib.moectl_shape, layer, byref(experts), byref(top_k))
            self._shapes[layer] = experts.value, top_k.value
        self._domains = len(self.config["model"].get("domains", []))

    def close(self) -> None:
        """Frees the controller, and closes its log, once no other thread is in a call. Otherwise that happens with the last
        reference to it, and at the end of the interpreter. Every further call is an ArgumentError."""
        if self._finalizer.alive:
            self._handle.free()
            self._finalizer.detach()

    def _call(self, function: Any, *arguments: Any) -> None:
        check(self._handle.call(function, *arguments))

    def __reduce__(self) -> NoReturn:
        raise TypeError("moectl.Controller: cannot be copied or pickled: keep its state instead (save() and load(), of a "
                        "moectl.torch.Balancer state_dict() and load_state_dict()), and leave it out of what is copied")

    def __copy__(self) -> NoReturn:
        self.__reduce__()

    def __deepcopy__(self, _: Any) -> NoReturn:
        self.__reduce__()

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
        self._call(lib.moectl_config, byref(text))
        return json.loads(taken(text))

    @property
    def steps(self) -> int:
        """Steps so far."""
        steps = c_int64()
        self._call(lib.moectl_steps, byref(steps))
        return steps.value

    def _layer(self, layer: Any) -> int:
        number = whole("layer", layer)
        if number not in self._shapes:
            raise ArgumentError(f"layer: {number}: must be one of {', '.join(map(str, self._layers))}")
        return number

    def _shape(self, layer: int) -> Tuple[int, int]:
        return self._shapes[self._layer(layer)]

    # ---- Recording ----

    def record(self, layer: int, experts: Any, *, mask: Any = None, sequence_length: int = 0, sequence_ids: Any = None,
               top_values: Any = None, biased_scores: Any = None, probabilities: Any = None, domain_ids: Any = None,
               dropped: Optional[int] = None, balance_loss: Optional[float] = None, z_loss: Optional[float] = None,
               micro_batch: Optional[int] = None) -> None:
        """Adds one micro-batch of one layer's routing.

        experts        [T, k] int64 or int32: the experts chosen for each token, before any capacity limit; -1 = a slot
                       that is not routed. [B, S, k] is the same with T = B S, and with k = 1 so is [T]
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
        n, k = self._shape(layer)
        chosen = view("experts", experts, "int64", "int32")
        rows = _choices(chosen, k)
        tokens = chosen.size // k
        wide, narrow = (chosen.address, None) if chosen.type == "int64" else (None, chosen.address)
        batch = Batch(_SIZE_OF_BATCH, tokens, wide, narrow, None, whole("sequence_length", sequence_length))
        keep = [chosen]

        def attach(name: str, values: Any, columns: Optional[int], kind: str) -> None:
            given = _of_tokens(name, view(name, values, kind), rows, columns)
            setattr(batch, name, given.address)
            keep.append(given)

        if mask is not None:
            attach("mask", mask, None, "uint8")
        if sequence_ids is not None:
            attach("sequence_ids", sequence_ids, None, "int64")
        if top_values is not None:
            attach("top_values", top_values, k + 1, "float32")
        if biased_scores is not None:
            attach("biased_scores", biased_scores, n, "float32")
        if probabilities is not None:
            attach("probabilities", probabilities, n, "float32")
        if domain_ids is not None:
            attach("domain_ids", domain_ids, None, "int64")
        if dropped is not None:
            batch.dropped = ctypes.pointer(c_int64(whole("dropped", dropped)))
        if balance_loss is not None:
            batch.balance_loss = ctypes.pointer(c_double(real("balance_loss", balance_loss)))
        if z_loss is not None:
            batch.z_loss = ctypes.pointer(c_double(real("z_loss", z_loss)))
        number = -1 if micro_batch is None else whole("micro_batch", micro_batch, -1)
        check(self._handle.call(lib.moectl_record, layer, byref(batch), number))

    def record_counts(self, counts: Any, *, layer: Optional[int] = None, tokens: Any = None) -> None:
        """Adds counts that were summed elsewhere: [N] int64 of one layer, or of all layers one after another in the order
        of `layers`, [L, N] where they are equal. tokens: of the layer, or [L]; None = as many as the counts need, their sum over k."""
        where = ALL_LAYERS if layer is None else self._layer(layer)
        sizes = [n for n, _ in self._shapes.values()] if layer is None else [self._shape(where)[0]]
        given, all_ = view("counts", counts, "int64"), sum(sizes)
        if layer is not None:
            shaped("counts", given, f"[{all_}], one for each expert of the layer", (all_,))
        elif len(set(sizes)) == 1:
            equal = len(sizes), sizes[0]
            shaped("counts", given, f"{list(equal)} or [{all_}], one for each expert of each layer", (all_,), equal)
        else:
            shaped("counts", given, f"[{all_}], one for each expert of each layer", (all_,))
        length = None
        if tokens is not None:
            one = layer is not None and not hasattr(tokens, "__len__") and not hasattr(tokens, "data_ptr")
            length = view("tokens", [whole("tokens", tokens)] if one else tokens, "int64")
            shaped("tokens", length, f"[{len(sizes)}], one a layer", (len(sizes),), *([()] if layer is not None else []))
        self._call(lib.moectl_record_counts, where, given.address, given.size, length and length.address)

    def record_values(self, layer: int, **values: float) -> None:
        """What the host computes itself, by name: router_similarity, router_condition, expert_output_norm, gradient_ratio;
        also balance_loss and z_loss. Metrics report the mean over calls; a negative value or NaN is left out."""
        for name, value in values.items():
            self._call(lib.moectl_record_value, self._layer(layer), word("name", name), real(name, value))

    def check_choices(self, layer: int, experts: Any, biased_scores: Any, scores: Any = None) -> None:
        """Whether the router chooses by its bias: a few tokens' experts [T, k] int64, biased scores [T, N] float32 and,
        where known, the same before the bias was added. What is wrong in three steps is a notice `wiring`."""
        n, k = self._shape(layer)
        chosen = view("experts", experts, "int64")
        rows = _choices(chosen, k)
        biased = _of_tokens("biased_scores", view("biased_scores", biased_scores, "float32"), rows, n)
        before = _of_tokens("scores", view("scores", scores, "float32"), rows, n) if scores is not None else None
        self._call(lib.moectl_check_choices, layer, chosen.size // k, chosen.address, biased.address,
                   before and before.address)

    def say(self, kind: str, layer: int, text: str) -> None:
        """Adds a notice of your own to the next step's report; kind: "wiring", "config", …; layer -1 = of none."""
        of_none = whole("layer", layer) == -1
        self._call(lib.moectl_say, word("kind", kind), -1 if of_none else self._layer(layer), word("text", text))

    # ---- Deciding ----

    def step(self, *, loss: Optional[float] = None, gradient_norm: Optional[float] = None, skipped: bool = False,
             next_mixture: Any = None) -> Report:
        """Once an optimizer step: reduces, measures, decides, limits.

        loss: mean training loss of the step, nats a token. skipped: the optimizer skipped the step. next_mixture:
        [domains] int64, tokens of each domain in the next batch. Raises ReductionError with nothing changed. Not while
        another thread records."""
        info = StepInfo(ctypes.sizeof(StepInfo))
        if loss is not None:
            info.loss = ctypes.pointer(c_double(real("loss", loss)))
        if gradient_norm is not None:
            info.gradient_norm = ctypes.pointer(c_double(real("gradient_norm", gradient_norm)))
        info.skipped = switch("skipped", skipped)
        if next_mixture is not None:
            mixture = shaped("next_mixture", view("next_mixture", next_mixture, "int64"),
                             f"[{self._domains}], one for each domain of the config", (self._domains,))
            info.next_mixture = mixture.address
        self._raised = None
        code = self._handle.call(lib.moectl_step, byref(info))
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
        self._call(lib.moectl_figures_of, byref(figures))
        return Report(self, figures)

    def _records(self, arrays: bool) -> List[Dict[str, Any]]:
        text = c_void_p()
        self._call(lib.moectl_report_json, 1 if arrays else 0, byref(text))
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
        self._call(read, layer, values.buffer_info()[0], size)
        return values

    def aux_loss_weight(self, layer: int) -> float:
        """The weight of the auxiliary loss of one layer."""
        value = c_double()
        self._call(lib.moectl_aux_loss_weight, self._layer(layer), byref(value))
        return value.value

    def temperature(self, layer: int) -> float:
        """The temperature of one layer's router."""
        value = c_double()
        self._call(lib.moectl_temperature, self._layer(layer), byref(value))
        return value.value

    # ---- Holding, ranks, logs ----

    def begin_at(self, step: int) -> None:
        """For a controller that is new in the middle of a training: `step` is the training's next one. Warm-ups, schedules,
        the timeline and the log go on from there. Before the first step(), on every rank alike."""
        self._call(lib.moectl_begin_at, whole("step", step))

    def hold(self, on: bool = True) -> None:
        """Holds every actuator where it is, and keeps measuring."""
        self._call(lib.moectl_hold, switch("on", on))

    def freeze(self, layer: int, on: bool = True) -> None:
        """Holds one layer's actuators: a frozen router, replayed routes."""
        self._call(lib.moectl_freeze, self._layer(layer), switch("on", on))

    def _plans(self) -> bytes:
        """What the step that comes does with the biases of each layer [L]: FROZEN, DECIDED, EVER_MOVES or their sum."""
        plans = array.array("B", bytes(len(self._shapes)))
        self._call(lib.moectl_plans, plans.buffer_info()[0], len(plans))
        return plans.tobytes()

    def set_reduction(self, reduce: Optional[Callable[[memoryview], Any]]) -> None:
        """`reduce` adds a memoryview of int64 in place over all ranks that share the layers. numpy.asarray() and
        torch.frombuffer(…, dtype=torch.int64) take it as it is; what is written after the call is lost. What it raises is the cause of step()'s
        ReductionError. None: this process is the only rank."""
        callback = _no_callback(Sum)
        if reduce is not None:
            callable_ = _callable("reduce", reduce)
            self_ = weakref.ref(self)

            def call(_: Any, values: Any, size: int) -> int:
                # A copy: what the caller keeps of it must not reach into the controller's memory.
                own = bytearray(ctypes.string_at(values, 8 * size))
                given = memoryview(own).cast("q")
                code = _guard(self_, callable_, given)
                ctypes.memmove(values, (ctypes.c_char * len(own)).from_buffer(own), len(own))
                try:
                    given.release()
                except BufferError:
                    pass  # an array of the caller's still reads it
                return code

            callback = Sum(call)
        self._call(lib.moectl_set_reduction, callback, None)
        self._keep["reduction"] = callback

    def set_log(self, log: Union[None, str, "os.PathLike[str]", Callable[[str], Any]], append: bool = False) -> None:
        """Where the run log goes, which `moectl report` and `moectl compare` read: the path of a file, gzip if it ends
        in .gz, with `append` continued by a resumed run; or a callable, which receives whole lines: the header now,
        those of a step at its end. What it raises is a notice. None: nowhere."""
        if callable(log) and append:
            raise ArgumentError("append: not with a callable: must be with the path of a file")
        if log is None or callable(log):
            callback = _no_callback(Log)
            if log is not None:
                callable_, self_ = log, weakref.ref(self)

                def call(_: Any, text: Any, size: int) -> int:
                    return _guard(self_, callable_, ctypes.string_at(text, size).decode())

                callback = Log(call)
            self._raised = None
            try:
                self._call(lib.moectl_set_log, callback, None)
            except MoectlError as error:
                raise error from self._raised
            self._keep["log"] = callback
        else:
            self._call(lib.moectl_log_to_file, path("log", log), switch("append", append))
            self._keep.pop("log", None)

    # ---- Values from elsewhere ----

    def adopt(self, layer: int, bias: Any) -> None:
        """Puts biases [N] of another trainer or an older run in force at once; the policy goes on from there. On every
        rank alike, between two steps. Raises ValueError if one lies outside the limits."""
        n = self._shape(layer)[0]
        given = shaped("bias", view("bias", bias, "float64"), f"[{n}], one for each expert of the layer", (n,))
        self._call(lib.moectl_adopt, self._layer(layer), given.address, given.size)

    def adopt_aux_loss_weight(self, layer: int, weight: float) -> None:
        """Likewise; with `scope: model` for all layers."""
        self._call(lib.moectl_adopt_aux_loss_weight, self._layer(layer), real("weight", weight))

    def adopt_temperature(self, layer: int, temperature: float) -> None:
        """Likewise."""
        self._call(lib.moectl_adopt_temperature, self._layer(layer), real("temperature", temperature))

    # ---- State ----

    def save(self) -> bytes:
        """Everything that the next step depends on, to the bit."""
        state, size = c_void_p(), c_size_t()
        self._call(lib.moectl_save, byref(state), byref(size))
        return taken(state, size.value)

    def load(self, state: bytes, keep: str = "everything") -> List[Dict[str, Any]]:
        """keep: "everything", for a state of the same config; or "what_fits", for one of another config: values in force
        in any case, memories where they fit. Returns what became of each part: dicts of layer, key, fate ("kept",
        "adapted", "dropped") and, if it was not kept, why. Raises StateError; the running state is then untouched."""
        kept = c_void_p()
        given = raw("state", state)
        self._call(lib.moectl_load, given, len(given), _keep(keep), byref(kept))
        return json.loads(taken(kept))

    def save_layer(self, layer: int) -> bytes:
        """The state of one layer, to be loaded under the same id, also into a controller of other layers."""
        state, size = c_void_p(), c_size_t()
        self._call(lib.moectl_save_layer, self._layer(layer), byref(state), byref(size))
        return taken(state, size.value)

    def load_layer(self, layer: int, state: bytes, keep: str = "everything") -> List[Dict[str, Any]]:
        """As load(), of one layer. All layers of a checkpoint must be of one step."""
        kept = c_void_p()
        given = raw("state", state)
        self._call(lib.moectl_load_layer, self._layer(layer), given, len(given), _keep(keep), byref(kept))
        return json.loads(taken(kept))


def _keep(keep: str) -> int:
    if not isinstance(keep, str) or keep not in ("everything", "what_fits"):
        raise ArgumentError(f"keep: {shown(keep)}: must be everything or what_fits")
    return int(keep == "what_fits")


def _callable(name: str, given: Any) -> Callable[[Any], Any]:
    if not callable(given):
        raise ArgumentError(f"{name}: {shown(given)}: must be a callable or None")
    return given


def _guard(controller: "weakref.ref[Controller]", callback: Callable[[Any], Any], argument: Any) -> int:
    """Calls back; what is raised is kept, as nothing may pass through C."""
    try:
        callback(argument)
        return 0
    except BaseException as error:  # pylint: disable=broad-except
        owner = controller()
        if owner is not None:
            owner._raised = error
        lib.moectl_set_error(f"{type(error).__name__}: {error}".encode("utf-8", "replace"))
        return 1


def _choices(given: Array, k: int) -> Tuple[int, ...]:
    """Checks experts [..., k]; their shape without k."""
    shape = given.shape
    if len(shape) >= 2 and shape[-1] == k:
        return shape[:-1]
    if shape == (0,) or (k == 1 and len(shape) == 1):
        return shape
    raise ArgumentError(f"experts: {list(shape)}: must be [T, {k}], a row of top_k for each token")


def _of_tokens(name: str, given: Array, rows: Tuple[int, ...], columns: Optional[int]) -> Array:
    """Checks an array of tokens in the given rows, or flat; with `columns` for each."""
    flat = (math.prod(rows),)
    last = () if columns is None else (columns,)
    words = f"{[*rows, *last]}" + (f" or {[*flat, *last]}" if rows != flat else "")
    if flat == (0,) and given.shape == (0,):
        return given
    return shaped(name, given, words + ", for each token of experts", rows + last, flat + last)
