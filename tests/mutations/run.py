#!/usr/bin/env python3
"""Do the tests notice when the code is wrong? Draws mutations of it, and runs the tests on each.

    run.py --build FOLDER [--number N] [--table FILE] [--survivors] [--jobs N] [--list]

A mutation is one small change of one of the files in FILES: an operator, a constant, or a statement taken away
(`places`). N of them are drawn, the same number of each file, by the hash of their texts: the same sources give the same
mutations, and an edit of one line leaves those of the others. One that does not compile is replaced by the next one drawn;
--list shows the first ones, and builds nothing. The sources stay as they are: FOLDER holds a build of `core_tests` and
`golden_traces` (preset `mutations`), before whose library a changed copy is linked.

So that not each mutation needs a compiler, the copy of a file holds all of its mutations: a function has its body as it
is and once more for each of its mutations, and the environment variable MOECTL_MUTATION chooses. What stands outside of
functions is compiled for itself.

The tests run without a mutation first, and must pass. Then, for each mutation, those that are named for its file; for
those that are left, the golden traces; then all others, the slow ones last. The first failure ends them: what survives, all
tests have missed. --jobs mutations are tried at a time. `equivalent.txt` lists mutations without an effect, each with the
reason; those are tried with the tests of their file and the golden traces only. Results are kept in
FOLDER/mutants/results.json; --survivors tries only those again that were not caught, with the tests that FOLDER holds now.
The exit status is 1 if a mutation outside that list survives, or one of it is caught. --table writes all of it down, as in
`table.md`.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import itertools
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SLOW = 1.0  # seconds; tests that take longer run last
MEMORY = 8 << 30  # bytes; a mutation that takes more has failed

# The files, and the tests that should catch what goes wrong in each.
FILES = {
    "src/control/safety.cc": "Limiter*:CheckLimits*:Invariant*:Reasons*:HostileNumbers*:LooseEnds*:Controller*",
    "src/control/loop.cc": "Controller*:Lag*:LooseEnds*:StatePage*:Responsiveness*:LoopFaults*:Guard*:ScalarResponse*:"
                           "FieldCases*:Details*:Churn*",
    "src/measure/stats.cc": "*RoutingStats*:BatchCounts*:*Malformed*:Margin*:LoadSlope*:RequiredBins*:RouterLosses*:"
                            "HostileNumbers*:LooseEnds*:FieldCases*",
    "policies/adaptive_bias.cc": "AdaptiveBias*:Feedforward*:*Contract*:EveryPolicy/SavedState*:*GainMargin*",
    "policies/sign_bias.cc": "SignBias*:BiasPolicies*:*Contract*",
}

SWAPS = [
    (r"(?<= )<(?=[ \n])", "<="), (r"(?<= )<=(?=[ \n])", "<"), (r"(?<= )>(?=[ \n])", ">="), (r"(?<= )>=(?=[ \n])", ">"),
    (r"(?<= )==(?=[ \n])", "!="), (r"(?<= )!=(?=[ \n])", "=="), (r"(?<= )\+(?=[ \n])", "-"), (r"(?<= )-(?=[ \n])", "+"),
    (r"(?<= )\*(?=[ \n])", "/"), (r"(?<= )/(?=[ \n])", "*"), (r"(?<= )\+=(?=[ \n])", "-="), (r"(?<= )-=(?=[ \n])", "+="),
    (r"(?<= )&&(?=[ \n])", "||"), (r"(?<= )\|\|(?=[ \n])", "&&"), (r"\btrue\b", "false"), (r"\bfalse\b", "true"),
    (r"\bstd::min\b", "std::max"), (r"\bstd::max\b", "std::min"), (r"\bsmaller\b", "larger"), (r"\blarger\b", "smaller"),
    (r"(?<=[ (])!(?=[\w(])", ""), (r"\bcontinue;", ";"), (r"\bbreak;", ";"),
]
NUMBER = re.compile(r"(?<![\w.])\d+(\.\d+)?(e[+-]?\d+)?(?![\w.])")
# A statement of one line that is no declaration, and an early return.
STATEMENT = re.compile(r"^ +(?!return|const |auto |static |using |case |default|break|continue|else|for |while |if |"
                       r"struct |class |public|private|d\.)[\w(*+].*;$")
EARLY_RETURN = re.compile(r"^ +if \(.*\) return.*;$")

Mutation = collections.namedtuple("Mutation", "file line key before after start end text")


def code_of(source):
    """The source with comments, strings and lines of the preprocessor as blanks, at the same places."""
    blank = lambda found: re.sub(r"[^\n]", " ", found.group(0))
    return re.sub(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|^#[^\n]*', blank, source, flags=re.M)


def places(file):
    """All mutations of a file."""
    source = (ROOT / file).read_text()
    code = code_of(source)
    found = []
    seen = collections.Counter()

    def add(start, end, text):
        line_begin = source.rfind("\n", 0, start) + 1
        line_end = source.find("\n", start)
        line = source[line_begin:line_end]
        changed = source[line_begin:start] + text + source[end:line_end]
        found.append(Mutation(file, source.count("\n", 0, start) + 1, "", line.strip(), changed.strip(), start, end, text))

    for pattern, text in SWAPS:
        for place in re.finditer(pattern, code):
            add(place.start(), place.end(), text)
    for place in NUMBER.finditer(code):
        number = place.group(0)
        if number.isdigit():
            add(place.start(), place.end(), str(int(number) + 1))
            if number == "1":
                add(place.start(), place.end(), "0")
        else:
            add(place.start(), place.end(), repr(2 * float(number) or 1.0))
    at, before = 0, ""
    for line in code.splitlines(keepends=True):
        text = line.rstrip()
        if EARLY_RETURN.match(text) or (STATEMENT.match(text) and re.search(r"(^|[;{}:]|\))$", before)):
            add(at + len(text) - len(text.lstrip()), at + len(text), ";")
        at, before = at + len(line), text or before
    keyed = []
    for m in sorted(found, key=lambda m: (m.start, m.text)):
        key = f"{file}: {m.before} -> {m.after}"
        seen[key] += 1
        # Several lines of a file may read the same.
        keyed.append(m._replace(key=key if seen[key] == 1 else f"{key} (no. {seen[key]})"))
    return keyed


def drawn(file):
    """All mutations of a file in the order in which they are tried."""
    return sorted(places(file), key=lambda m: hashlib.sha256(m.key.encode()).digest())


# Chooses the mutation, in each copy.
CHOICE = """#include <cstdlib>
namespace { const int moectl_mutation = [] {
  const char* const chosen = std::getenv("MOECTL_MUTATION");
  return chosen == nullptr ? 0 : std::atoi(chosen); }(); }
"""


def functions(code):
    """Where the bodies of functions begin and end in blanked code: from `{` to behind `}`."""
    found, scopes, header, i = [], 0, 0, 0
    while i < len(code):
        if code[i] == ";":
            header = i + 1
        elif code[i] == "}":
            scopes, header = scopes - 1, i + 1
        elif code[i] == "{":
            head = code[header:i].strip()
            if re.match(r"(template <.*> *)?(namespace|class|struct|enum)\b", head):
                scopes, header = scopes + 1, i + 1
            else:
                end, depth = i + 1, 1
                while depth > 0:
                    depth += {"{": 1, "}": -1}.get(code[end], 0)
                    end += 1
                if ")" in head and "=" not in re.sub(r"operator\S+?\(|[=!<>]=", "", head):
                    found.append((i, end))
                i, header = end - 1, end
        i += 1
    return found


def with_mutations(file, numbered):
    """The source of a file with a switch between its mutations, a map of number to Mutation."""
    source = (ROOT / file).read_text()
    parts, at = [CHOICE], 0
    for begin, end in functions(code_of(source)):
        own = {n: m for n, m in numbered.items() if begin < m.start < end}
        parts.append(source[at:begin])
        at = end
        if not own:
            parts.append(source[begin:end])
            continue
        parts.append("{")
        for n, m in own.items():
            # Errors of the compiler name the mutation.
            parts.append(f'\n#line 1 "mutation {n}"\nif (moectl_mutation == {n}) '
                         + source[begin:m.start] + m.text + source[m.end:end] + " else ")
        parts.append(f'\n#line 1 "{file}"\n' + source[begin:end] + "}")
    return "".join(parts) + source[at:]


class Builder:
    """Compiles mutations and links the two programs with them."""

    def __init__(self, build):
        self.build = build
        commands = json.loads((build / "compile_commands.json").read_text())
        # libstdc++'s assertions notice an index beyond the end, as the address sanitizer would.
        self.compile_command = {
            file: re.sub(r" -o \S+ -c \S+$", " -O1 -w -Wno-error -D_GLIBCXX_ASSERTIONS", next(
                c["command"] for c in commands if c["file"] == str(ROOT / file))) for file in FILES}
        self.link_command = {}
        for program in ("core_tests", "golden_traces"):
            last = subprocess.run(["ninja", "-C", build, "-t", "commands", program], check=True, capture_output=True,
                                  text=True).stdout.splitlines()[-1]
            self.link_command[program] = next(part for part in last.split(" && ") if f" -o tests/{program} " in part)

    def run(self, command):
        return subprocess.run(command, shell=True, cwd=self.build, capture_output=True, text=True, errors="replace")

    def compile(self, file, source, folder):
        """None, or what the compiler says; folder/NAME.o."""
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / pathlib.Path(file).name
        copy.write_text(source)
        done = self.run(f"{self.compile_command[file]} -c {copy} -o {copy.with_suffix('.o')}")
        return None if done.returncode == 0 else done.stderr

    def link(self, folder):
        """The two programs, with the objects of `folder` before the library, whose own are then not needed."""
        objects = " ".join(str(o) for o in sorted(folder.glob("*.o")))
        for program, command in self.link_command.items():
            done = self.run(command.replace(f" -o tests/{program} ", f" -s -o {folder}/{program} {objects} "))
            if done.returncode != 0:
                sys.exit(f"{program} does not link: {done.stderr}")

    def build_all(self, number):
        """Draws mutations and builds them: a list of (Mutation, number, folder of its programs)."""
        together = self.build / "mutants" / "together"
        shutil.rmtree(self.build / "mutants", ignore_errors=True)
        share, rest = divmod(number, len(FILES))
        chosen, numbers = [], itertools.count(1)
        for i, file in enumerate(FILES):
            candidates = drawn(file)
            bodies = functions(code_of((ROOT / file).read_text()))
            wanted, inside, alone = share + (i < rest), {}, []
            while len(inside) + len(alone) < wanted and candidates:
                n, mutation = next(numbers), candidates.pop(0)
                if any(begin < mutation.start < end for begin, end in bodies):
                    inside[n] = mutation
                else:
                    source = (ROOT / file).read_text()
                    folder = self.build / "mutants" / str(n)
                    changed = source[:mutation.start] + mutation.text + source[mutation.end:]
                    if self.compile(file, changed, folder) is None:
                        self.link(folder)
                        alone.append((mutation, n, folder))
                if len(inside) + len(alone) < wanted and candidates:
                    continue
                # Those that do not compile are left out, and others drawn, until the rest compiles.
                while (said := self.compile(file, with_mutations(file, inside), together)) is not None:
                    wrong = {int(n) for n in re.findall(r'^mutation (\d+):\d+:\d+: error', said, re.M)}
                    if not wrong:
                        sys.exit(said)
                    inside = {n: m for n, m in inside.items() if n not in wrong}
            chosen += alone + [(m, n, together) for n, m in inside.items()]
        self.link(together)
        return chosen


def limited():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def ends(command, number, limit):
    """(exit status or None when it did not end, output). Runs in its own group, which is ended with it."""
    with tempfile.TemporaryDirectory() as folder:  # of what ends early, files stay
        environment = dict(os.environ, MOECTL_MUTATION=str(number), TMPDIR=folder)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                              env=environment, start_new_session=True, preexec_fn=limited) as process:
            try:
                output, _ = process.communicate(timeout=limit)
                return process.returncode, output
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return None, process.communicate()[0]


class Tests:
    """All tests and the seconds that each takes without a mutation."""

    def __init__(self, folder):
        with tempfile.TemporaryDirectory() as scratch:
            times = pathlib.Path(scratch) / "times.json"
            status, output = ends([folder / "core_tests", f"--gtest_output=json:{times}"], 0, None)
            if status != 0:
                sys.exit(f"tests fail without any mutation:\n{output[-4000:]}")
            self.seconds = {}
            for suite in json.loads(times.read_text())["testsuites"]:
                for test in suite["testsuite"]:
                    self.seconds[f"{suite['name']}.{test['name']}"] = float(test["time"][:-1])
        if failing_trace(folder, 0, None):
            sys.exit("golden_traces fails without any mutation")

    def stages(self, named):
        """What to run one after the other, as filters that together are all tests: (filter, seconds)."""
        slow = [test for test, seconds in self.seconds.items() if seconds > SLOW]
        fits = lambda test, patterns: any(
            re.fullmatch(re.escape(p).replace(r"\*", ".*"), test) for p in patterns.split(":") if p)
        others = "-" + ":".join([named] + slow)
        last = ":".join(test for test in slow if not fits(test, named)) or "-*"
        taken = lambda chosen: sum(seconds for test, seconds in self.seconds.items() if chosen(test))
        return [(named, taken(lambda test: fits(test, named))),
                (others, taken(lambda test: not fits(test, named) and test not in slow)),
                (last, taken(lambda test: not fits(test, named) and test in slow))]


def failing_test(folder, number, filter_, seconds):
    """The first test of core_tests that fails, or None. Tests that take many times their seconds do not end."""
    status, output = ends([folder / "core_tests", f"--gtest_filter={filter_}", "--gtest_fail_fast"], number,
                          60 + 10 * seconds)
    if status == 0:
        return None
    failed = re.search(r"^\[  FAILED  \] ([\w./]+)", output, re.M)
    started = re.findall(r"^\[ RUN      \] ([\w./]+)", output, re.M)
    if status is None:
        return (started or ["?"])[-1] + " (does not end)"
    return failed.group(1) if failed else (started or ["?"])[-1] + " (aborts)"


def failing_trace(folder, number, limit=300):
    status, _ = ends([folder / "golden_traces", ROOT / "tests/golden"], number, limit)
    return None if status == 0 else "golden_traces"


def reasons():
    """What equivalent.txt lists: the mutation -> why it has no effect."""
    found, key = {}, None
    for line in (HERE / "equivalent.txt").read_text().splitlines():
        if line.startswith("  ") and key:
            found[key] = (found.get(key, "") + " " + line.strip()).strip()
        elif line and not line.startswith("#"):
            key = line
    return found


def table(results, why):
    cell = lambda text: "`" + text.replace("|", "\\|") + "`" if text else ""
    lines = ["# What `./dev mutations` drew, and the test that fails", "",
             "| place | before | after | caught by |", "|---|---|---|---|"]
    for m, caught in sorted((Mutation(**r["mutation"]), r["caught"]) for r in results):
        shown = caught or ("no effect: " + why[m.key] if m.key in why else "**survived**")
        lines.append(f"| {m.file}:{m.line} | {cell(m.before)} | {cell(m.after)} | {shown} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build/mutations")
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--table", type=pathlib.Path)
    parser.add_argument("--survivors", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        for file in FILES:
            for m in drawn(file)[:-(-options.number // len(FILES))]:
                print(f"{file}:{m.line}: {m.before} -> {m.after}")
        return 0
    build = options.build.resolve()
    kept = build / "mutants" / "results.json"
    why = reasons()
    if unknown := set(why) - {m.key for file in FILES for m in places(file)}:
        sys.exit("equivalent.txt: no such mutation: " + "; ".join(sorted(unknown)))
    builder = Builder(build)
    together = build / "mutants" / "together"
    if options.survivors:
        results = json.loads(kept.read_text())
        for folder in {r["folder"] for r in results if not r["caught"]} | {str(together)}:
            builder.link(pathlib.Path(folder))
    else:
        chosen = builder.build_all(options.number)
        results = [{"mutation": m._asdict(), "number": n, "folder": str(folder), "caught": None} for m, n, folder in chosen]
        kept.write_text(json.dumps(results, indent=1))
    left = [r for r in results if not r["caught"]]

    tests = Tests(together)
    print(f"All {len(tests.seconds)} tests pass without a mutation, in {sum(tests.seconds.values()):.0f} s", flush=True)
    stages = {file: tests.stages(named) for file, named in FILES.items()}

    def try_one(r, stage):
        folder, number = pathlib.Path(r["folder"]), r["number"]
        if stage == "traces":
            return failing_trace(folder, number)
        return failing_test(folder, number, *stages[r["mutation"]["file"]][stage])

    for stage in (0, "traces", 1, 2):
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            futures = {pool.submit(try_one, r, stage): r for r in left
                       if stage in (0, "traces") or r["mutation"]["key"] not in why}
            for future in concurrent.futures.as_completed(futures):
                r = futures[future]
                r["caught"] = future.result()
                kept.write_text(json.dumps(results, indent=1))
                if r["caught"]:
                    m = Mutation(**r["mutation"])
                    print(f"{m.file}:{m.line}: {m.before} -> {m.after}: {r['caught']}", flush=True)
        left = [r for r in left if not r["caught"]]
        print(f"Left after stage {stage}: {len(left)}", flush=True)
    for r in left:
        print(("no effect: " if r["mutation"]["key"] in why else "SURVIVED: ") + r["mutation"]["key"])
    if options.table:
        options.table.write_text(table(results, why))
    left = [r for r in results if not r["caught"] and r["mutation"]["key"] not in why]
    listed = sum(1 for r in results if not r["caught"]) - len(left)
    wrong = [r["mutation"]["key"] for r in results if r["caught"] and r["mutation"]["key"] in why]
    for key in wrong:
        print(f"listed as without an effect, but caught: {key}")
    print(f"{len(results)} mutations: {sum(1 for r in results if r['caught'])} caught, {listed} without an effect, "
          f"{len(left)} survived")
    return 1 if left or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
