"""python3 -m moectl.convert DUMP.pt --top-k K -o TRACE.jsonl: traces of what serving engines dump with torch.save.

Reads SGLang's expert distribution in mode `stat`: a dict whose `logical_count` holds the tokens of each expert, [steps,
layers, experts] or [layers, experts] (python/sglang/srt/eplb/expert_distribution.py of sgl-project/sglang). What the dump
does not say, how many experts a token chooses, is asked for. The files are pickles, which could hold code: they are read
with `weights_only`, which runs none, by PyTorch from 1.13 on; an older one is refused."""

import argparse
import inspect
import json
import sys
from typing import Any, Dict, Iterator

from ._errors import MoectlError

try:
    import torch
except ImportError:
    sys.exit("moectl.convert: PyTorch is not installed (Debian: python3-torch)")


def records(dump: Any, top_k: int) -> Iterator[Dict[str, Any]]:
    """The lines of a trace, header first, of a dump that was loaded. Raises MoectlError, which says what was expected."""
    if not isinstance(dump, dict) or "logical_count" not in dump:
        found = f"a dict of {', '.join(map(str, dump)) or 'nothing'}" if isinstance(dump, dict) else type(dump).__name__
        raise MoectlError(f"{found}: must be a dict with logical_count, as SGLang's expert distribution in mode stat")
    counts = dump["logical_count"]
    if not hasattr(counts, "dim"):
        raise MoectlError(f"logical_count: {type(counts).__name__}: must be a tensor of whole numbers [steps, layers, experts]")
    shape = list(counts.shape)
    if len(shape) not in (2, 3) or 0 in shape[-2:]:
        raise MoectlError(f"logical_count: {shape}: must be [steps, layers, experts] or [layers, experts]")
    if counts.layout != torch.strided or counts.device.type == "meta":
        raise MoectlError(f"logical_count: {counts.layout} on {counts.device}: must be a dense tensor that has values")
    if counts.is_floating_point():
        if not (torch.isfinite(counts) & (counts == counts.floor())).all():
            raise MoectlError(f"logical_count: {counts.dtype}: must be whole numbers: there are others among them")
        counts = counts.to(torch.int64)
    if counts.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise MoectlError(f"logical_count: {counts.dtype}: must be whole numbers")
    layers, experts = shape[-2:]
    if not 1 <= top_k <= experts:
        raise MoectlError(f"--top-k: {top_k}: must be from 1 to the {experts} experts of the dump")
    if (counts < 0).any():
        raise MoectlError(f"logical_count: {int(counts.min())}: must not be negative")
    if not counts.any():
        raise MoectlError("logical_count: every count is 0: must hold the tokens of a recording")
    yield {"format": "moectl-trace", "version": 1, "layers": layers, "experts": experts, "top_k": top_k}
    for step, of_step in enumerate(counts.reshape(-1, layers, experts).tolist()):
        for layer, of_layer in enumerate(of_step):
            if sum(of_layer):  # the recorder's buffer may have room left
                yield {"step": step, "layer": layer, "tokens": -(-sum(of_layer) // top_k), "counts": of_layer}


def load(path: str) -> Any:
    """What torch.save wrote, without running any code that the file may hold. Raises MoectlError."""
    if "weights_only" not in inspect.signature(torch.load).parameters:
        raise MoectlError(f"PyTorch {torch.__version__} would run code that the file may hold: must be 1.13 or later")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise MoectlError(error.strerror or str(error)) from error
    except Exception as error:  # pylint: disable=broad-except; what a torn or foreign file makes of the unpickler is anything
        # Without PyTorch's own words, which advise to read the file in a way that runs code.
        raise MoectlError("must be a file of torch.save that holds tensors, numbers and words alone, and is whole") from error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m moectl.convert", description=__doc__.split("\n\n")[0])
    parser.add_argument("dump", help="file of torch.save with logical_count, as SGLang's expert distribution in mode stat")
    parser.add_argument("--top-k", type=int, required=True, help="experts that each token chooses")
    parser.add_argument("-o", "--output", default="-", help="trace to write; - is standard output")
    given = parser.parse_args()
    try:
        lines = list(records(load(given.dump), given.top_k))
    except MoectlError as error:
        sys.exit(f"moectl.convert: {given.dump}: {error}")
    try:
        with sys.stdout if given.output == "-" else open(given.output, "w", encoding="utf-8") as out:
            out.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    except OSError as error:
        sys.exit(f"moectl.convert: {given.output}: {error.strerror}: must be a file that can be written")


if __name__ == "__main__":
    main()
