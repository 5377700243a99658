"""The package is typed, as py.typed promises, says of each call what it takes, and is written for Python 3.9."""

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import moectl

PACKAGE = Path(moectl.__file__).parent


def public():
    modules = [moectl]
    if importlib.util.find_spec("torch"):
        modules.append(importlib.import_module("moectl.torch"))
    for module in modules:
        for name in getattr(module, "__all__", ["Balancer", "router_values"]):
            found = getattr(module, name)
            yield name, found
            if inspect.isclass(found):
                yield from ((f"{name}.{own}", value) for own, value in vars(found).items() if not own.startswith("_"))


def test_every_public_call_has_words_and_types():
    names = []
    for name, found in public():
        function = found.fget if isinstance(found, property) else found
        if inspect.isclass(function) or inspect.isfunction(function):
            assert (function.__doc__ or "").strip(), name
            names.append(name)
        if inspect.isfunction(function):
            signature = inspect.signature(function)
            assert signature.return_annotation is not inspect.Signature.empty, name
            for parameter in signature.parameters.values():
                assert parameter.name == "self" or parameter.annotation is not inspect.Parameter.empty, (name, parameter)
    assert len(names) > 40 and "Controller.record" in names


@pytest.mark.parametrize("name", ["record", "record_counts", "check_choices", "step", "bias", "biases", "deployment_bias", "adopt"])
def test_a_call_with_arrays_gives_their_shapes(name):
    assert "[" in getattr(moectl.Controller, name).__doc__


@pytest.mark.parametrize("file", sorted(PACKAGE.parent.glob("**/*.py")), ids=lambda file: str(file.relative_to(PACKAGE.parent)))
def test_the_syntax_is_that_of_python_3_9(file):
    ast.parse(file.read_text(), feature_version=(3, 9))


def mypy(folder, *arguments):
    if not importlib.util.find_spec("mypy"):
        pytest.skip("python3-mypy is not installed")
    # Without the types of PyTorch and NumPy, whose reading takes minutes.
    (folder / "mypy.ini").write_text("[mypy]\nignore_missing_imports = True\n[mypy-torch.*,numpy.*,pandas.*]\n"
                                     "follow_imports = skip\n")
    done = subprocess.run([sys.executable, "-m", "mypy", "--config-file", str(folder / "mypy.ini"), "--cache-dir", str(folder),
                           *map(str, arguments)], cwd=PACKAGE.parent, stdout=subprocess.PIPE, check=False)
    return done.stdout.decode()


def test_the_package_passes_mypy(tmp_path):
    said = mypy(tmp_path, "--disallow-untyped-defs", "--disallow-incomplete-defs", "--check-untyped-defs",
                "--disallow-any-generics", PACKAGE)
    assert "Success" in said, said


def test_a_program_is_checked_against_the_package(tmp_path):
    assert (PACKAGE / "py.typed").exists()
    (tmp_path / "program.py").write_text("""
import moectl
controller = moectl.Controller({"version": 1})
report = controller.step(loss="high")
reveal_type(report.max_vio)
reveal_type(report.step)
reveal_type(controller.bias(0))
reveal_type(moectl.metrics("trace.jsonl"))
reveal_type(moectl.metrics("trace.jsonl", pandas=True))
controller.set_log(print)
""")
    said = mypy(tmp_path, tmp_path / "program.py")
    assert 'Argument "loss" to "step" of "Controller" has incompatible type "str"' in said
    types = [line.split("type is ")[1].strip('"') for line in said.splitlines() if "Revealed" in line]
    assert types == ["Union[builtins.float, None]", "builtins.int", "array.array[builtins.float]",
                     "builtins.list[builtins.dict[builtins.str, Any]]", "Any"]
    assert said.count("error:") == 1, said
