"""python3 -m moectl.convert DUMP.pt --top-k K -o TRACE.jsonl: traces of what serving engines dump with torch.save.

Reads SGLang's expert distribution in mode `stat`: a dict whose `logical_count` holds the tokens of each expert, [steps,
layers, experts] or [layers, experts] (python/sglang/srt/eplb/expert_distribution.py of sgl-project/sglang). What the dump
does not say, how many experts a token chooses, is asked for. The files are pickles: they are read without running code
in them where PyTorch can, which is from 1.13 on."""

import argparse
import json
import sys
from typing import Any, Iterator

from ._errors import MoectlError


def records(dump: Any, top_k: int) -> Iterator[dict]:
    """The lines of a trace, of a dump that was loaded: header first."""
    counts = dump.get("logical_count") if isinstance(dump, dict) else None
    if counts is None or counts.dim() not in (2, 3) or counts.is_floating_point():
        raise MoectlError("logical_count: missing: must be whole numbers [steps, layers, experts]")
    counts = counts if counts.dim() == 3 else counts[None]
    _, layers, experts = counts.shape
    yield {"format": "moectl-trace", "version": 1, "layers": layers, "experts": experts, "top_k": top_k}
    for step, of_step in enumerate(counts.tolist()):
        for layer, of_layer in enumerate(of_step):
            if sum(of_layer):  # the recorder's buffer may have room left
                yield {"step": step, "layer": layer, "tokens": -(-sum(of_layer) // top_k), "counts": of_layer}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m moectl.convert", description=__doc__.split("\n\n")[0])
    parser.add_argument("dump", help="file of torch.save with logical_count, as SGLang's expert distribution in mode stat")
    parser.add_argument("--top-k", type=int, required=True, help="experts that each token chooses")
    parser.add_argument("-o", "--output", default="-", help="trace to write; - is standard output")
    given = parser.parse_args()
    try:
        import torch
    except ImportError:
        sys.exit("moectl.convert: PyTorch is not installed (Debian: python3-torch)")
    try:
        lines = list(records(torch.load(given.dump, map_location="cpu", weights_only=True), given.top_k))
    except (MoectlError, OSError, RuntimeError) as error:
        sys.exit(f"moectl.convert: {given.dump}: {error}")
    with sys.stdout if given.output == "-" else open(given.output, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


if __name__ == "__main__":
    main()
