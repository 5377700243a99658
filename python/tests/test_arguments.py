"""Arguments that cannot be: each is a ValueError of moectl's own with place, value and constraint. And controllers that are
closed, copied, forked, or left behind by daemon threads."""

import array
import copy
import ctypes
import gc
import gzip
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import types
import weakref
from pathlib import Path

import pytest
from conftest import config

import moectl
from moectl import _library
from moectl._arrays import view

ROOT = Path(__file__).parents[2]


def program(text, *arguments, **options):
    return subprocess.run([sys.executable, "-c", text, *map(str, arguments)], capture_output=True, check=False, timeout=120,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, **options)


# ---- Closed and NULL ----

def test_no_function_of_the_header_follows_a_null_controller():
    functions = re.findall(r"^int (moectl_\w+)\((?:const )?moectl_controller\* c", (ROOT / "include/moectl.h").read_text(), re.M)
    assert len(functions) > 25
    done = program("""
import ctypes, sys
from moectl import _library
some = ctypes.create_string_buffer(4096)   # a struct with its size, or any other address
ctypes.c_size_t.from_buffer(some).value = 4096
for name in sys.argv[1:]:
    function = getattr(_library.lib, name)
    kinds = function.argtypes[1:]
    for filled in (False, True):
        arguments = []
        for kind in kinds:
            if kind in (_library.Sum, _library.Log):
                arguments.append(kind(lambda *_: 0) if filled else kind())
            elif isinstance(kind(), ctypes._SimpleCData) and kind not in (ctypes.c_void_p, ctypes.c_char_p):
                arguments.append(kind())
            else:
                arguments.append(ctypes.cast(some, kind) if filled else None)
        assert function(None, *arguments) == 1, name
        assert _library.lib.moectl_error() == b"controller: NULL: must be one that moectl_new() made", name
print("all")
""", *functions)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"all\n", b"")


CALLS = {
    "config": lambda c: c.config, "steps": lambda c: c.steps, "record": lambda c: c.record(0, [[0, 1]]),
    "record_counts": lambda c: c.record_counts([1] * 16), "record_values": lambda c: c.record_values(0, z_loss=1.0),
    "check_choices": lambda c: c.check_choices(0, [[0, 1]], [[0.0] * 8]), "say": lambda c: c.say("wiring", 0, "x"),
    "step": lambda c: c.step(), "report": lambda c: c.report(), "bias": lambda c: c.bias(0),
    "deployment_bias": lambda c: c.deployment_bias(0), "biases": lambda c: c.biases(),
    "aux_loss_weight": lambda c: c.aux_loss_weight(0), "temperature": lambda c: c.temperature(0),
    "begin_at": lambda c: c.begin_at(5), "hold": lambda c: c.hold(), "freeze": lambda c: c.freeze(0),
    "set_reduction": lambda c: c.set_reduction(lambda values: None), "set_log": lambda c: c.set_log(print),
    "adopt": lambda c: c.adopt(0, [0.0] * 8), "adopt_aux_loss_weight": lambda c: c.adopt_aux_loss_weight(0, 0.0),
    "adopt_temperature": lambda c: c.adopt_temperature(0, 1.0), "save": lambda c: c.save(), "load": lambda c: c.load(b"x"),
    "save_layer": lambda c: c.save_layer(0), "load_layer": lambda c: c.load_layer(0, b"x"),
}


def test_every_call_on_a_closed_controller_is_an_error(tmp_path):
    public = {name for name in vars(moectl.Controller) if not name.startswith("_")}
    assert public == CALLS.keys() | {"close", "layers", "experts", "top_k"}
    controller = moectl.Controller(config())
    controller.close()
    controller.close()
    for name, call in CALLS.items():
        with pytest.raises(moectl.ArgumentError, match="^controller: closed: must be open$"):
            call(controller)
    with pytest.raises(moectl.ArgumentError, match="^controller: closed: must be open$"):
        controller.set_log(tmp_path / "log")


def test_a_callback_cannot_close_its_controller():
    controller, said = moectl.Controller(config()), []

    def reduce(values):
        try:
            controller.close()
        except moectl.ArgumentError as error:
            said.append(str(error))

    controller.set_reduction(reduce)
    controller.record(0, [[0, 1]])
    controller.step()
    assert said and all(words.startswith("close: called in a callback") for words in said)
    assert controller.steps == 1


def test_closing_waits_for_calls_of_other_threads():
    controller, inside, go = moectl.Controller(config()), threading.Event(), threading.Event()

    def reduce(values):
        inside.set()
        go.wait(60)

    controller.set_reduction(reduce)
    ended = []

    def step():
        try:
            controller.step()
        except moectl.ArgumentError as error:  # its report came too late
            ended.append(str(error))

    stepping = threading.Thread(target=step)
    stepping.start()
    assert inside.wait(60)
    closing = threading.Thread(target=controller.close)
    closing.start()
    time.sleep(0.05)
    assert closing.is_alive()
    go.set()
    stepping.join(60)
    closing.join(60)
    assert not closing.is_alive() and ended == ["controller: closed: must be open"]


@pytest.mark.parametrize("call", ["c.record(0, x)", "c.record(0, x); c.biases()"])
def test_the_interpreter_ends_cleanly_beside_daemon_threads(call):
    for _ in range(4):
        done = program("""
import array, random, sys, threading, time
import moectl
from conftest import config
c = moectl.Controller(config(experts=64, top_k=8))
numbers = array.array("i", [random.randrange(64) for _ in range(8 * 200_000)])
x = memoryview(numbers).cast("B").cast("i", (200_000, 8))
def work():
    while True:
        %s
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
""" % call)
        assert (done.returncode, done.stderr) == (0, b"")


# ---- Who holds what ----

@pytest.mark.parametrize("connect", [lambda c, f: c.set_log(f), lambda c, f: c.set_reduction(f)], ids=["log", "reduction"])
def test_an_owner_that_gives_its_own_method_is_collected(connect):
    class Owner:
        def __init__(self):
            self.controller = moectl.Controller(config())
            connect(self.controller, self.called)

        def called(self, argument):
            self.last = argument

    owner = Owner()
    owner.controller.step()
    gone = weakref.ref(owner), weakref.ref(owner.controller)
    del owner
    gc.collect()
    assert gone[0]() is None and gone[1]() is None


def test_a_controller_is_not_copied_or_pickled():
    controller = moectl.Controller(config())
    holder = types.SimpleNamespace(model=[1], controller=controller)
    for wrong in (lambda: copy.copy(controller), lambda: copy.deepcopy(holder), lambda: pickle.dumps(controller),
                  lambda: pickle.dumps(controller.report(), 2)):
        with pytest.raises(TypeError, match=r"moectl.Controller: cannot be copied or pickled: .*save\(\).*state_dict\(\)"):
            wrong()
    assert controller.step().step == 0


def test_what_a_reduction_keeps_reads_no_memory_of_the_controller(trace):
    controller, kept = moectl.Controller(config()), []

    def reduce(values):
        kept.append((values, memoryview(values), values.tolist()))
        for i in range(len(values)):
            values[i] += 0

    controller.set_reduction(reduce)
    controller.record(0, trace[0][0])
    controller.step()
    controller.close()
    assert any(any(numbers) for _, _, numbers in kept)
    for values, still_read, numbers in kept:
        assert still_read.tolist() == numbers
        still_read[0] = 12345  # its own memory
    plain = moectl.Controller(config())
    released = []
    plain.set_reduction(released.append)
    plain.step()
    plain.close()
    with pytest.raises(ValueError, match="released"):
        released[0][0] = 5


@pytest.mark.parametrize("name", ["run.jsonl", "run.jsonl.gz"])
def test_a_forked_child_leaves_the_log_to_its_parent(name, tmp_path):
    done = program("""
import os, sys
import moectl
from conftest import config
c = moectl.Controller(config())
c.set_log(sys.argv[1])
def some():
    for _ in range(3):
        c.record(0, [[0, 1]])
        c.step()
some()
if os.fork() == 0:
    sys.exit(0)
os.wait()
some()
c.close()
""", tmp_path / name)
    assert (done.returncode, done.stderr) == (0, b"")
    with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "rt") as log:
        assert len(log.read().splitlines()) == 1 + 6 * 2


# ---- Arrays ----

def test_shapes_are_exact():
    c = moectl.Controller(config())
    for experts in ([[0, 1, 2, 3]], [[0, 1], [2, 3], [4]], [0, 1, 2, 3], [[0, 1, 2], [1, 2, 3]], [[[0], [1]]], 5):
        with pytest.raises(moectl.ArgumentError, match=r"^experts"):
            c.record(0, experts)
    with pytest.raises(moectl.ArgumentError, match=r"^experts: \[2, 3\]: must be \[T, 2\], a row of top_k for each token$"):
        c.record(0, [[0, 1, 2], [1, 2, 3]])
    two = [[0, 1], [2, 3]]
    for name, wrong in {"mask": [[1], [1]], "sequence_ids": [[0, 0]], "top_values": [[1.0, 2.0], [1.0, 2.0]],
                        "biased_scores": [[0.0, 0.0]] * 8, "probabilities": [0.0] * 16, "domain_ids": [0]}.items():
        with pytest.raises(moectl.ArgumentError, match=f"^{name}: .*must be .*for each token of experts"):
            c.record(0, two, **{name: wrong})
    for wrong in ([[1, 2]] * 8, [[1] * 8], [1] * 8, [[1] * 8] * 3):
        with pytest.raises(moectl.ArgumentError, match=r"^counts: .*must be \[2, 8\] or \[16\]"):
            c.record_counts(wrong)
    with pytest.raises(moectl.ArgumentError, match=r"^counts: \[2, 8\]: must be \[8\]"):
        c.record_counts([[1] * 8] * 2, layer=1)
    with pytest.raises(moectl.ArgumentError, match=r"^tokens: \[2, 1\]: must be \[2\], one a layer"):
        c.record_counts([1] * 16, tokens=[[4], [4]])
    with pytest.raises(moectl.ArgumentError, match=r"^bias: \[2, 4\]: must be \[8\]"):
        c.adopt(0, [[0.0] * 4] * 2)
    with pytest.raises(moectl.ArgumentError, match="^biased_scores"):
        c.check_choices(0, two, [[0.0] * 2] * 8)
    with pytest.raises(moectl.ArgumentError, match="^experts"):
        c.check_choices(0, [0, 1, 2, 3], [[0.0] * 8] * 2)
    # None of them was counted.
    assert c.step().tokens == 0
    # [B, S, k] with [B, S] or [T], no tokens at all, and k = 1 without a column of its own.
    c.record(0, [two, two], mask=[[1, 1], [0, 1]])
    c.record(0, [two, two], mask=[1, 1, 0, 1], sequence_length=2)
    c.record(0, [], mask=[], top_values=[])
    assert c.step().records()[0]["metrics"]["max_vio"] is not None
    one = moectl.Controller(config(top_k=1, layers=1))
    one.record(0, [0, 1, 2])
    one.record(0, [[0], [1], [2]])
    assert one.step().tokens == 6


def test_bytes_in_the_other_order_are_turned():
    numpy = pytest.importorskip("numpy")
    other = ">" if sys.byteorder == "little" else "<"
    rows = numpy.array([[0, 1], [2, 3], [0, 5]])
    values = numpy.sort(numpy.random.default_rng(1).random((3, 3)))[:, ::-1]
    wanted = moectl.Controller(config())
    wanted.record(0, rows, top_values=values.astype("f4"))
    wanted.step()
    for ints in ("i8", "i4", "i2", "u4"):
        for given in (rows.astype(other + ints), memoryview(rows.astype(other + ints))):
            c = moectl.Controller(config())
            c.record(0, given, top_values=values.astype(other + "f4"))
            c.step()
            assert c.save() == wanted.save(), ints
    c.adopt(0, numpy.arange(8).astype(other + "f8") / 64)
    assert list(c.bias(0)) == [i / 64 for i in range(8)]


def test_whatever_has_a_buffer_is_read():
    rows = [[0, 1], [2, 3]]
    wanted = moectl.Controller(config())
    wanted.record(0, rows)
    for given in (((ctypes.c_int64 * 2) * 2)(*[(ctypes.c_int64 * 2)(*row) for row in rows]),
                  ((ctypes.c_int32 * 2) * 2)(*[(ctypes.c_int32 * 2)(*row) for row in rows]),
                  memoryview(array.array("h", [0, 1, 2, 3])).cast("B").cast("h", (2, 2)),
                  memoryview(array.array("Q", [0, 1, 2, 3])).cast("B").cast("Q", (2, 2)),
                  memoryview(bytes(array.array("q", [0, 1, 2, 3]))).cast("q", (2, 2))):
        c = moectl.Controller(config())
        c.record(0, given)
        c.step()
        assert c.report().records(arrays=True)[0]["counts"] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert view("x", (ctypes.c_double * 2)(1, 2), "float64").shape == (2,)


def test_lists_may_hold_numbers_of_numpy():
    numpy = pytest.importorskip("numpy")
    c = moectl.Controller(config())
    c.record(0, [numpy.array([0, 1]), numpy.array([2, 3])])
    c.record(0, [[numpy.int32(0), numpy.int64(1)]], top_values=[[numpy.float32(3), numpy.float64(2), 1]])
    assert c.step().records(arrays=True)[0]["counts"] == [2, 2, 1, 1, 0, 0, 0, 0]


# ---- Everything else ----

WRONG = {
    "a large int in a list": (lambda c: c.record(0, [[0, 2**63]]), r"^experts: 9223372036854775808 \(number 1\): must be int64"),
    "a word in a list": (lambda c: c.record(0, [[0, "1"]]), r"^experts: '1' \(number 1\): must be int64"),
    "None in a list": (lambda c: c.record(0, [[0, None]]), r"^experts: None \(number 1\): must be int64"),
    "a float in a list": (lambda c: c.record_counts([1] * 15 + [1.5]), r"^counts: 1.5 \(number 15\): must be int64"),
    "a mask of 256": (lambda c: c.record(0, [[0, 1]], mask=[256]), r"^mask: 256 \(number 0\): must be uint8"),
    "no array": (lambda c: c.record(0, {0: 1}), "^experts: {0: 1}: must be an array, a tensor or a list"),
    "layer 2^32": (lambda c: c.freeze(2**32), "^layer: 4294967296: must be one of 0, 1$"),
    "layer 2^32 of values": (lambda c: c.aux_loss_weight(2**32), "^layer: 4294967296: must be one of 0, 1$"),
    "layer 2^32 of records": (lambda c: c.record(2**32, [[0, 1]]), "^layer: 4294967296: must be one of 0, 1$"),
    "layer 2^32 of a state": (lambda c: c.save_layer(2**32), "^layer: 4294967296: must be one of 0, 1$"),
    "layer -1": (lambda c: c.adopt_temperature(-1, 1.0), "^layer: -1: must be one of 0, 1$"),
    "layer -1 of counts": (lambda c: c.record_counts([1] * 16, layer=-1), "^layer: -1: must be one of 0, 1$"),
    "layer '0'": (lambda c: c.freeze("0"), "^layer: '0': must be a whole number"),
    "layer 0.0": (lambda c: c.bias(0.0), "^layer: 0.0: must be a whole number"),
    "layer None": (lambda c: c.experts(None), "^layer: None: must be a whole number"),
    "a notice of no layer there": (lambda c: c.say("wiring", 9, "x"), "^layer: 9: must be one of 0, 1$"),
    "a kind of notice": (lambda c: c.say("nonsense", 0, "x"), "^kind: nonsense: must be one of invalid, missing_input, .*hold$"),
    "no kind": (lambda c: c.say(None, 0, "x"), "^kind: None: must be text"),
    "a zero byte": (lambda c: c.say("wiring", 0, "x\0y"), "^text: 'x.x00y': must be text without a zero byte"),
    "a value's name": (lambda c: c.record_values(0, nothing=1.0),
                       "^value: nothing: must be one of balance_loss, z_loss, router_similarity, .*gradient_ratio$"),
    "a value": (lambda c: c.record_values(0, z_loss="1"), "^z_loss: '1': must be a number"),
    "sequence_length": (lambda c: c.record(0, [[0, 1]], sequence_length=2**63), "^sequence_length: 9223372036854775808: must be from"),
    "dropped": (lambda c: c.record(0, [[0, 1]], dropped=0.5), "^dropped: 0.5: must be a whole number"),
    "micro_batch": (lambda c: c.record(0, [[0, 1]], micro_batch=2**64), "^micro_batch: 18446744073709551616: must be from -1 to"),
    "balance_loss": (lambda c: c.record(0, [[0, 1]], balance_loss="low"), "^balance_loss: 'low': must be a number"),
    "loss": (lambda c: c.step(loss="2.5"), "^loss: '2.5': must be a number"),
    "gradient_norm": (lambda c: c.step(gradient_norm=[1.0]), r"^gradient_norm: \[1.0\]: must be a number"),
    "tokens": (lambda c: c.record_counts([1] * 8, layer=0, tokens="4"), r"^tokens: '4': must be"),
    "begin_at": (lambda c: c.begin_at(2**64), "^step: 18446744073709551616: must be from"),
    "begin_at a word": (lambda c: c.begin_at("5"), "^step: '5': must be a whole number"),
    "weight": (lambda c: c.adopt_aux_loss_weight(0, None), "^weight: None: must be a number"),
    "reduce": (lambda c: c.set_reduction(5), "^reduce: 5: must be a callable or None"),
    "log": (lambda c: c.set_log(5), "^log: 5: must be the path of a file"),
    "log with a zero byte": (lambda c: c.set_log("a\0b"), "^log: 'a.x00b': must be the path of a file"),
    "state": (lambda c: c.load("x"), "^state: 'x': must be bytes"),
    "state of a number": (lambda c: c.load(5), "^state: 5: must be bytes"),
    "state of a layer": (lambda c: c.load_layer(0, "x"), "^state: 'x': must be bytes"),
    "keep": (lambda c: c.load(b"", keep=["all"]), r"^keep: \['all'\]: must be everything or what_fits"),
    "a config of None": (lambda c: moectl.Controller(None), "^config: None: must be a dict, text or the path of a file"),
    "a config of a set": (lambda c: moectl.Controller({"version": {1}}), r"^config: version: \{1\}: must be a number, a word"),
    "a config's key": (lambda c: moectl.Controller({"model": {(1, 2): 3}}, name="c"), r"^c: model\.\(1, 2\): must be a word"),
    "a config's NaN": (lambda c: moectl.Controller(config(model={"tokens_per_step": math.inf})),
                       "^config: model.tokens_per_step: inf: must be finite"),
    "an initial NaN": (lambda c: moectl.Controller({**config(), "expert_bias": {"policy": "sign_bias", "initial": math.nan}}),
                       "^config: expert_bias.initial: nan: must be finite"),
    "an initial NaN in text": (lambda c: moectl.Controller(
        '{"version": 1, "model": {"layers": 1, "experts": 4, "top_k": 1}, "expert_bias": {"policy": "sign_bias", "initial": NaN}}'),
        r"^config:1:\d+: expert_bias.initial: NaN: must be finite"),
    "an initial file": (lambda c: moectl.Controller({**config(), "expert_bias": {"policy": "sign_bias", "initial": "nowhere"}}),
                        "expert_bias.initial: nowhere: cannot be opened"),
    "a config's name": (lambda c: moectl.Controller(config(), name=5), "^name: 5: must be text"),
    "a path with a zero byte": (lambda c: moectl.Controller("a\0b"), "^config: 'a.x00b': must be the path of a file"),
    "the tool's path": (lambda c: moectl.metrics(None), "^trace: None: must be the path of a file"),
    "append of a callable": (lambda c: c.set_log(print, append=True), "^append: not with a callable"),
    "the tool's option": (lambda c: moectl.simulate("c.yaml", steps=[1]), r"^steps: \[1\]: must be a number, a word or a path"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_is_named(what):
    call, words = WRONG[what]
    controller = moectl.Controller(config())
    with pytest.raises(moectl.MoectlError, match=words) as caught:
        call(controller)
    assert isinstance(caught.value, ValueError)
    assert controller.step().notices == []


def test_wrong_tensors_are_named():
    torch = pytest.importorskip("torch", reason="python3-torch is not installed")
    c = moectl.Controller(config())
    for wrong, words in ((torch.zeros(1, 2, dtype=torch.int64, device="meta"), "^experts: a tensor on meta, .*must be a dense tensor"),
                         (torch.zeros(1, 2, dtype=torch.int64).to_sparse(), "^experts: a tensor on cpu, .*must be a dense tensor")):
        with pytest.raises(moectl.ArgumentError, match=words):
            c.record(0, wrong)
    with pytest.raises(moectl.ArgumentError, match="^loss: .*must be a number"):
        c.step(loss=torch.zeros(2))
    c.record(0, [torch.tensor([0, 1]), torch.tensor([2, 3])])
    assert c.step(loss=torch.tensor(2.5)).records(arrays=True)[0]["counts"] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_config_is_any_mapping_and_its_switches_are_words():
    settings = types.MappingProxyType({**config(), "safety": types.MappingProxyType({"rollback": "on", "oscillation": "off"})})
    plain = {**config(), "safety": {"rollback": True, "oscillation": False}}
    assert moectl.Controller(settings).config == moectl.Controller(plain).config
    for words in ("on", "true", "Yes"):
        assert moectl.Controller({**config(), "safety": {"responsiveness": words}}).config["safety"]["responsiveness"] is True
    with pytest.raises(moectl.ConfigError, match='safety.rollback: "maybe": must be off, on, or a map'):
        moectl.Controller({**config(), "safety": {"rollback": "maybe"}})


def test_notices_of_the_host_are_in_the_report():
    c = moectl.Controller(config())
    c.say("wiring", 1, "of a layer")
    c.say("config", -1, "of none")
    notices = c.step().notices
    assert {(n["layer"], n["text"]) for n in notices} == {(1, "of a layer"), (None, "of none")}


def test_the_last_error_stays_after_a_call_that_succeeds():
    c = moectl.Controller(config())
    c.set_reduction(lambda values: None)
    c.set_log(lambda text: None)
    with pytest.raises(moectl.ArgumentError):
        c.adopt(0, [1e9] * 8)
    said = _library.lib.moectl_error()
    assert said
    c.step()
    assert _library.lib.moectl_error() == said


def test_numbers_of_numpy_are_options_of_the_tool(monkeypatch):
    numpy = pytest.importorskip("numpy", reason="python3-numpy is not installed")
    asked = []
    monkeypatch.setattr("moectl._tool._ask", lambda *arguments: asked.append(arguments) or "[]")
    for value, word in ((numpy.int64(3), "3"), (numpy.uint8(4), "4"), (numpy.float64(0.5), "0.5"), (numpy.array(5), "5"),
                        (7, "7"), (0.25, "0.25"), ("shift", "shift"), (Path("a"), "a")):
        moectl.simulate("c.yaml", set_to=value)
        assert f"--set-to={word}" in asked[-1]
    for wrong in ([1], None, numpy.zeros(2), "a\0b"):
        with pytest.raises(moectl.ArgumentError, match="^set_to: "):
            moectl.simulate("c.yaml", set_to=wrong)


def test_a_file_whose_name_is_like_an_option(tmp_path, monkeypatch):
    if not os.environ.get("MOECTL_TOOL"):
        pytest.skip("MOECTL_TOOL is not set")
    monkeypatch.chdir(tmp_path)
    c = moectl.Controller(config())
    c.set_log("-run.jsonl")
    c.record(0, [[0, 1]])
    c.step()
    c.close()
    records = moectl.metrics("-run.jsonl")
    assert [list(record) for record in records] == [["step", "layer", "metrics"]] * 2
    assert moectl.compare("-run.jsonl")
    moectl.report("-run.jsonl", output="-page.html")
    assert Path("-page.html").exists()
    with pytest.raises(moectl.MoectlError, match="--nothing"):
        moectl.simulate(ROOT / "policies/adaptive_bias.yaml", nothing=1)
