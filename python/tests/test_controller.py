import array
import gc
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import threading
import weakref

import pytest
from conftest import Router, config

import moectl
from moectl import _controller


def after_60(controller, step, steps=120):
    """Mean MaxVio over its floor of the steps from 60 on."""
    ratios = [step(controller).over_floor for _ in range(steps)]
    return sum(ratios[60:]) / len(ratios[60:])


def test_the_counts_loop_balances():
    routers = [Router(seed=s) for s in (1, 2)]

    def step(controller):
        controller.record_counts([routers[layer].counts(controller.bias(layer), 512) for layer in controller.layers])
        return controller.step()

    assert after_60(moectl.Controller(config()), step) <= 1.15


def test_the_indices_loop_balances():
    routers = [Router(seed=s) for s in (3, 4)]

    def step(controller):
        for layer in controller.layers:
            rows = routers[layer].choose(controller.bias(layer), 512)
            controller.record(layer, [[i for _, i in row[:2]] for row in rows],
                              top_values=[[value for value, _ in row] for row in rows])
        return controller.step()

    assert after_60(moectl.Controller(config()), step) <= 1.15


def test_a_config_is_a_dict_or_text_or_a_file(tmp_path):
    text = "version: 1\nmodel: {layers: 1, experts: 4, top_k: 1}\n"
    path = tmp_path / "c.yaml"
    path.write_text(text)
    made = [moectl.Controller(c).config
            for c in (text, path, str(path), {"version": 1, "model": {"layers": 1, "experts": 4, "top_k": 1}},
                      json.dumps({"version": 1, "model": {"layers": 1, "experts": 4, "top_k": 1}}))]
    assert all(c == made[0] for c in made)
    assert made[0]["expert_bias"]["policy"] == "fixed"


def test_errors_have_the_words_of_the_library(tmp_path):
    with pytest.raises(moectl.ConfigError, match=r"^c.yaml:2:42: model.top: 1: unknown key; did you mean 'top_k'\?$"):
        moectl.Controller("version: 1\nmodel: {layers: 1, experts: 4, top_k: 1, top: 1}\n", name="c.yaml")
    with pytest.raises(moectl.ConfigError, match="model.experts: nan|NaN"):
        moectl.Controller(config(experts=math.nan))
    with pytest.raises(moectl.ConfigError, match="cannot be opened"):
        moectl.Controller(tmp_path / "none.yaml")
    controller = moectl.Controller(config())
    for wrong, words in [
        (lambda: controller.record(5, [[0, 1]]), "layer"),
        (lambda: controller.bias(-1), "layer"),
        (lambda: controller.record(0, [0, 1, 2]), r"experts: \[3\]: must be \[T, 2\]"),
        (lambda: controller.record(0, [[0.0, 1.0]]), "must be int64 or int32"),
        (lambda: controller.record(0, [[0, 1]], mask=b"\1\1"), r"mask: \[2\]: must be \[1\]"),
        (lambda: controller.record_counts([1] * 15), r"counts: \[15\]: must be \[2, 8\] or \[16\]"),
        (lambda: controller.record_counts([1.5] * 16), "must be int64"),
        (lambda: controller.step(next_mixture=[1]), r"next_mixture: \[1\]: must be \[0\]"),
        (lambda: controller.say("nonsense", 0, "x"), "must be one of invalid, "),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            wrong()
        assert isinstance(caught.value, moectl.MoectlError)
    with pytest.raises(moectl.StateError):
        controller.load(b"nothing")
    controller.close()
    with pytest.raises(moectl.MoectlError, match="controller: closed: must be open"):
        controller.step()


def test_threads_that_close_at_once_free_once(monkeypatch):
    """Also the end of the interpreter, beside a thread that closes: the second comes while the first frees."""
    controller, freed, free = moectl.Controller(config()), [], _controller.lib.moectl_free

    def slowly(pointer):
        freed.append(pointer.value)
        if len(freed) < 3:
            controller.close()
        if len(freed) == 1:
            free(pointer)

    monkeypatch.setattr(_controller.lib, "moectl_free", slowly)
    controller.close()
    assert len(freed) == 1 and freed[0]
    controller.close()
    assert len(freed) == 1


def test_bad_data_hold_and_are_named():
    controller = moectl.Controller(config())
    controller.record(0, [[0, 99]])
    report = controller.step()
    assert [n["kind"] for n in report.notices] == ["invalid"]
    assert "99" in report.notices[0]["text"] and report.notices[0]["layer"] == 0


def run(controller, trace):
    for step in trace:
        for layer, experts in enumerate(step):
            controller.record(layer, experts)
        controller.step(loss=2.5)
    return controller.save()


def rows_of(rows):
    """The same numbers as a buffer of int32 [T, k]."""
    numbers = array.array("i", [i for row in rows for i in row])
    return memoryview(numbers).cast("B").cast("i", (len(rows), len(rows[0])))


def test_every_way_to_the_same_sums_gives_the_same_bits(trace):
    wide = run(moectl.Controller(config(policy="sign_bias")), trace)
    narrow = [[rows_of(layer) for layer in step] for step in trace]
    assert run(moectl.Controller(config(policy="sign_bias")), narrow) == wide
    counted = moectl.Controller(config(policy="sign_bias"))
    for step in trace:
        for layer, rows in enumerate(step):
            chosen = [i for row in rows for i in row]
            counted.record_counts([chosen.count(i) for i in range(8)], layer=layer, tokens=len(rows))
        counted.step(loss=2.5)
    assert counted.save() == wide


def test_c_cpp_and_python_give_the_same_bits(trace, tmp_path):
    program = os.environ.get("MOECTL_SAME_BITS")
    if not program:
        pytest.skip("MOECTL_SAME_BITS names no program")
    file = tmp_path / "trace.txt"
    file.write_text("\n".join(" ".join(str(i) for row in layer for i in row) for step in trace for layer in step))
    controller = moectl.Controller(config(policy="adaptive_bias"))
    for step in trace:
        for layer, experts in enumerate(step):
            controller.record(layer, experts)
        controller.step(loss=2.5)
    (tmp_path / "config.json").write_text(json.dumps(config(policy="adaptive_bias")))
    subprocess.run([program, tmp_path / "config.json", file, tmp_path / "c", tmp_path / "cpp"], check=True)
    assert (tmp_path / "c").read_bytes() == controller.save()
    assert (tmp_path / "cpp").read_bytes() == controller.save()


def test_eight_threads_record_the_serial_bytes(trace):
    serial = run(moectl.Controller(config()), trace)
    controller = moectl.Controller(config())
    for step in trace:
        def part(at, step=step):
            for layer, experts in enumerate(step):
                controller.record(layer, experts[at::8])

        threads = [threading.Thread(target=part, args=(at,)) for at in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        controller.step(loss=2.5)
    assert controller.save() == serial


def test_a_saved_state_goes_on_to_the_bit(trace):
    whole = run(moectl.Controller(config()), trace)
    first = moectl.Controller(config())
    run(first, trace[:20])
    second = moectl.Controller(config())
    second.load(first.save())
    assert second.steps == 20
    assert run(second, trace[20:]) == whole


def test_biases_from_elsewhere_are_in_force_at_once(trace):
    controller = moectl.Controller(config())
    controller.adopt(1, [0.25, -0.25, 0.5, -0.5, 0, 0, 0, 0])
    assert list(controller.bias(1)) == [0.25, -0.25, 0.5, -0.5, 0, 0, 0, 0] and not any(controller.bias(0))
    with pytest.raises(ValueError):
        controller.adopt(1, [1e9] * 8)
    with pytest.raises(ValueError, match=r"bias: \[7\]: must be \[8\]"):
        controller.adopt(1, [0.0] * 7)


def test_what_to_deploy_has_no_feed_forward():
    settings = config(layers=1, model={"domains": ["text", "code"]})
    settings["expert_bias"]["options"] = {"feedforward": "tags"}
    settings["safety"] = {"responsiveness": False}
    controller, router = moectl.Controller(settings), Router()
    texts = [8 + 16 * (step % 4) for step in range(41)]
    for text, following in zip(texts, texts[1:]):
        # Tokens of code prefer the experts of high index: what the router prefers, in reverse.
        bias = list(controller.bias(0))
        rows = router.choose(bias, text)
        rows += [[(v, 7 - i) for v, i in row] for row in router.choose(bias[::-1], 64 - text)]
        controller.record(0, [[i for _, i in row[:2]] for row in rows], top_values=[[v for v, _ in row[:3]] for row in rows],
                          domain_ids=[0] * text + [1] * (64 - text))
        controller.step(next_mixture=[following, 64 - following])
    deployed, in_force = list(controller.deployment_bias(0)), list(controller.bias(0))
    assert len(deployed) == 8 and deployed != in_force and abs(sum(deployed)) < 1e-12
    assert list(moectl.Controller(config()).deployment_bias(1)) == [0.0] * 8


def test_layers_have_the_models_ids_and_their_own_sizes():
    settings = config(layers=2, experts=4, top_k=1, policy="sign_bias")
    settings["layers"] = [{"ids": [3]}, {"ids": [7], "experts": 2}]
    controller = moectl.Controller(settings)
    assert controller.layers == (3, 7) and controller.experts(7) == 2
    controller.record_counts([4, 2, 1, 1, 5, 3])
    assert [n["layer"] for n in controller.step().records()] == [3, 7]
    assert len(controller.biases()) == 6 and controller.bias(7)[0] < controller.bias(7)[1]


def test_a_layers_state_goes_to_another_split(trace):
    whole = moectl.Controller(config())
    run(whole, trace[:10])
    settings = config(layers=1)
    settings["layers"] = [{"ids": [1]}]
    part = moectl.Controller(settings)
    fates = part.load_layer(1, whole.save_layer(1))
    assert {f["fate"] for f in fates} <= {"kept"}
    assert part.bias(1) == whole.bias(1) and any(part.bias(1)) and part.steps == 10
    other = moectl.Controller(config(policy="sign_bias"))
    with pytest.raises(moectl.StateError):
        other.load(whole.save())
    fates = other.load(whole.save(), keep="what_fits")
    assert "dropped" in {f["fate"] for f in fates}
    assert other.biases() == whole.biases()
    with pytest.raises(ValueError, match="must be everything or what_fits"):
        other.load(whole.save(), keep="all")


def test_a_reduction_is_any_callable(trace):
    alone = moectl.Controller(config())
    alone.set_reduction(lambda values: None)
    twice = moectl.Controller(config())

    def double(values):
        for i, value in enumerate(values):
            values[i] = 2 * value

    twice.set_reduction(double)
    for controller in (alone, twice):
        controller.record(0, trace[0][0])
        controller.step()
    assert twice.report().tokens == 2 * alone.report().tokens


def test_a_reduction_that_raises_is_a_reduction_error(trace):
    controller = moectl.Controller(config())
    down = [True]

    def reduce(values):
        if down[0]:
            raise OSError("the network is down")

    controller.set_reduction(reduce)
    controller.record(0, trace[0][0])
    before = controller.save()
    with pytest.raises(moectl.ReductionError, match="OSError: the network is down") as caught:
        controller.step()
    assert isinstance(caught.value.__cause__, OSError)
    assert controller.save() == before
    down[0] = False
    assert controller.step().tokens > 0  # the same sums, again

    def interrupt(values):
        raise KeyboardInterrupt

    controller.set_reduction(interrupt)
    with pytest.raises(KeyboardInterrupt):
        controller.step()


def test_a_new_controller_begins_at_the_trainings_step(trace):
    controller = moectl.Controller(config())
    controller.begin_at(1000)
    for layer in controller.layers:
        controller.record(layer, trace[0][layer])
    assert controller.step().step == 1000 and controller.steps == 1001
    with pytest.raises(ValueError, match="before its first step"):
        controller.begin_at(2000)


def test_holding_and_freezing(trace):
    controller = moectl.Controller(config())
    run(controller, trace[:5])
    controller.freeze(0)
    before = controller.bias(0), controller.bias(1)
    run(controller, trace[5:6])
    assert controller.bias(0) == before[0] and controller.bias(1) != before[1]
    controller.hold()
    before = controller.biases()
    run(controller, trace[6:8])
    assert controller.biases() == before
    controller.hold(False)
    controller.freeze(0, False)
    run(controller, trace[8:9])
    assert controller.bias(0) != before[:8]


def test_a_report_reads_the_records_of_its_step(trace):
    controller = moectl.Controller(config())
    run(controller, trace[:2])
    report = controller.report()
    scalars, whole = report.records(), report.records(arrays=True)
    assert [r["layer"] for r in scalars] == [0, 1] and "counts" not in scalars[0]
    assert sum(whole[0]["counts"]) == 128 and len(whole[0]["actuators"]["expert_bias"]["applied"]) == 8
    assert math.isclose(report.max_vio, sum(r["metrics"]["max_vio"] for r in scalars) / 2)
    run(controller, trace[2:3])
    with pytest.raises(moectl.MoectlError, match="has stepped on"):
        report.records()


def test_a_log_by_a_callable_and_by_a_file(trace, tmp_path):
    lines = []
    controller = moectl.Controller(config())
    controller.set_log(lines.append)
    run(controller, trace[:3])
    controller.set_log(tmp_path / "run.jsonl")
    run(controller, trace[3:6])
    controller.set_log(None)
    run(controller, trace[6:7])
    text = "".join(lines)
    assert json.loads(text.splitlines()[0])["format"] == "moectl-run"
    assert [json.loads(line)["step"] for line in text.splitlines()[1:]] == [0, 0, 1, 1, 2, 2]
    written = (tmp_path / "run.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written[1:]] == [3, 3, 4, 4, 5, 5]


def test_a_log_that_raises_is_a_notice(trace):
    controller = moectl.Controller(config())
    lines = []

    def log(text):
        if lines:
            raise ValueError("no more room")
        lines.append(text)

    controller.set_log(log)
    notices = []
    for _ in range(3):
        controller.record(0, trace[0][0])
        controller.step()
        notices += [n["text"] for n in controller.report().notices if n["kind"] == "log"]
    assert len(notices) == 1 and "ValueError: no more room" in notices[0]


def test_the_tool_answers(trace, tmp_path):
    if not os.environ.get("MOECTL_TOOL"):
        pytest.skip("MOECTL_TOOL is not set")
    controller = moectl.Controller(config())
    controller.set_log(tmp_path / "run.jsonl")
    run(controller, trace)
    controller.close()
    records = moectl.metrics(tmp_path / "run.jsonl")
    assert len(records) == 80 and records[0]["layer"] == 0
    assert json.loads(json.dumps(records)) == records  # plain data
    assert isinstance(records[0]["metrics"]["max_vio"], float)
    assert moectl.compare(tmp_path / "run.jsonl")
    moectl.report(tmp_path / "run.jsonl", output=tmp_path / "report.html")
    assert "<html" in (tmp_path / "report.html").read_text()[:200].lower()
    with pytest.raises(moectl.MoectlError, match="none.jsonl"):
        moectl.metrics(tmp_path / "none.jsonl")


def test_metrics_are_a_table_where_pandas_is_installed():
    if not os.environ.get("MOECTL_TOOL"):
        pytest.skip("MOECTL_TOOL is not set")
    trace = os.path.join(os.path.dirname(moectl.__file__), "example_trace.jsonl")
    records = moectl.metrics(trace)
    assert len(records) == 200
    if importlib.util.find_spec("pandas") is None:
        with pytest.raises(ImportError, match="pandas"):
            moectl.metrics(trace, pandas=True)
        pytest.skip("python3-pandas is not installed: only its absence was seen")
    table = moectl.metrics(trace, pandas=True)
    assert len(table) == 200 and list(table["step"]) == [record["step"] for record in records]
    assert list(table["metrics.max_vio"]) == [record["metrics"]["max_vio"] for record in records]
    by_layer = table.groupby("layer")["metrics.max_vio"].mean()
    assert by_layer[1] > 3 * by_layer[0]  # one expert of layer 1 grows


def resident():
    """kB now, not at most."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() // 1024


def test_a_hundred_thousand_steps_leak_nothing():
    """11 bytes a step would be seen."""
    controller = moectl.Controller(config(layers=1, experts=4, policy="sign_bias"))
    counts, tokens = array.array("q", [5, 1, 1, 1]), array.array("q", [4])

    def many(steps):
        for _ in range(steps):
            controller.record_counts(counts, tokens=tokens)
            controller.step(loss=1.0)

    many(2000)
    gc.collect()
    before = resident()
    many(100_000)
    gc.collect()
    assert resident() - before < 1024
    assert controller.steps == 102_000


def test_the_interpreter_lock_is_free_in_calls(tmp_path):
    """A step that waits for the reader of its log, which is this thread: were the lock held, both would wait for ever."""
    os.mkfifo(tmp_path / "log")
    program = """
import json, sys, threading
import moectl
from conftest import config
controller = moectl.Controller(config(layers=8, experts=256))
def log():
    controller.set_log(sys.argv[1])     # waits in C until the other end is opened
    for _ in range(20):                 # more than a pipe holds
        controller.record_counts([2] * 2048)
        controller.step()
    controller.close()
thread = threading.Thread(target=log)
thread.start()
with open(sys.argv[1]) as reader:
    print(sum('"counts"' in line for line in reader))
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "log")], stdout=subprocess.PIPE, check=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert int(done.stdout) == 20 * 8


def test_many_steps_leak_nothing(trace):
    controller = moectl.Controller(config(layers=1))
    controller.set_reduction(lambda values: None)
    controller.set_log(lambda text: None)
    experts = rows_of(trace[0][0])

    def many(steps):
        for _ in range(steps):
            controller.record(0, experts)
            controller.step(loss=1.0).records(arrays=True)

    many(300)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many(3000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024  # kB
    gone = weakref.ref(controller)
    del controller
    gc.collect()
    assert gone() is None


def test_the_interpreter_ends_cleanly(tmp_path):
    program = """
import moectl
from conftest import config
controller = moectl.Controller(config())
controller.set_reduction(lambda values: None)
controller.set_log(print)
other = moectl.Controller(config())
other.set_log(%r)
for c in (controller, other):
    c.record(0, [[0, 1]])
    c.step()
""" % str(tmp_path / "run.jsonl.gz")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert (done.returncode, done.stderr) == (0, b"")
    import gzip

    assert len(gzip.open(tmp_path / "run.jsonl.gz").read().splitlines()) == 3


def test_numpy_arrays_are_read_in_place(trace):
    numpy = pytest.importorskip("numpy")
    arrays = [[numpy.array(layer) for layer in step] for step in trace]
    wanted = run(moectl.Controller(config()), trace)
    for kind in ("int64", "int32", "uint8"):
        assert run(moectl.Controller(config()), [[a.astype(kind) for a in step] for step in arrays]) == wanted
    assert run(moectl.Controller(config()), [[numpy.asfortranarray(a) for a in step] for step in arrays]) == wanted
    controller = moectl.Controller(config())
    for bad in (arrays[0][0].astype("float32"), arrays[0][0] > 0):
        with pytest.raises(ValueError, match="must be int64 or int32"):
            controller.record(0, bad)
    controller.record(0, arrays[0][0], mask=numpy.arange(64) < 10)
    assert controller.step().tokens in (5, 10)  # the mean over layers, one of which has none
    assert numpy.asarray(controller.bias(0)).shape == (8,)


def test_values_of_the_host_come_back_as_metrics():
    controller = moectl.Controller(config())
    for layer in controller.layers:
        controller.record_counts([4] * 8, layer=layer)
        controller.record_values(layer, router_condition=3.0, gradient_ratio=0.5)
        controller.record_values(layer, router_condition=5.0, gradient_ratio=math.nan)
    with pytest.raises(ValueError, match="router_conditon"):
        controller.record_values(0, router_conditon=1.0)
    metrics = controller.step().records()[0]["metrics"]
    assert metrics["router_condition"] == 4
    assert metrics["gradient_ratio"] == 0.5
    assert metrics["z_loss"] is None
