"""The declarations of _library.py are those of moectl.h."""

import re
from pathlib import Path

import pytest

from moectl import _library

HEADER = re.sub(r"/\*.*?\*/", "", (Path(__file__).parents[2] / "include/moectl.h").read_text(), flags=re.S)


def test_every_function_is_declared_with_its_arguments():
    declared = dict(re.findall(r"^int (moectl_\w+)\((.*?)\);", HEADER, re.S | re.M))
    assert declared.keys() == _library._FUNCTIONS.keys()
    for name, arguments in declared.items():
        inner = re.sub(r"\(\*\w+\)\([^)]*\)", "callback", arguments)
        assert len(inner.split(",")) == len(_library._FUNCTIONS[name]), name


@pytest.mark.parametrize("name, struct", [("moectl_batch", _library.Batch), ("moectl_step_info", _library.StepInfo),
                                          ("moectl_figures", _library.Figures)])
def test_every_struct_has_its_members_in_order(name, struct):
    body = re.search(r"typedef struct " + name + r" \{(.*?)\} " + name, HEADER, re.S).group(1)
    members = [(kind.strip(), member) for kind, member in re.findall(r"([\w ]+?[ *]+)\s*(\w+);", body)]
    assert [member for _, member in members] == [field for field, _ in struct._fields_]
    for (kind, member), (_, ctype) in zip(members, struct._fields_):
        size = 8 if "*" in kind else {"size_t": 8, "int64_t": 8, "double": 8, "int": 4}[kind]
        assert _library.ctypes.sizeof(ctype) == size, member
