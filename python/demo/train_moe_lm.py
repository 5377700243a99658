"""./dev demo-python: a byte-level language model with three MoE layers of 16 experts, trained in PyTorch on real text,
without control and under moectl.torch. The model has the size of that of ./dev demo. Ends with 1 if control did not balance it.

    train_moe_lm.py [--steps N] [--seed N] [--log-dir DIR] [--text FILE...]"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import moectl  # noqa: E402
from moectl.torch import Balancer  # noqa: E402

LAYERS, EXPERTS, TOP_K = 3, 16, 2
WIDTH, HEADS, HIDDEN = 96, 4, 96
SEQUENCES, LENGTH = 16, 128


class Moe(torch.nn.Module):
    """Sigmoid scores; the bias moves the choice, the gates are of the scores without it. A shared expert beside them."""

    def __init__(self):
        super().__init__()
        self.record = None  # what is told of each forward pass in training
        self.shared = torch.nn.Sequential(torch.nn.Linear(WIDTH, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, WIDTH))
        self.router = torch.nn.Linear(WIDTH, EXPERTS, bias=False)
        self.w_in = torch.nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / WIDTH**0.5)
        self.w_out = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / HIDDEN**0.5)
        self.register_buffer("expert_bias", torch.zeros(EXPERTS))

    def forward(self, x):
        tokens = x.reshape(-1, WIDTH)
        scores = torch.sigmoid(self.router(tokens))
        top = (scores + self.expert_bias).detach().topk(TOP_K + 1)
        chosen = top.indices[:, :TOP_K]
        if self.training:  # on the CPU, so that the floor of correlated tokens and the gap are known, and not counts alone
            self.record(chosen, sequence_length=LENGTH, top_values=top.values)
        gates = scores.gather(1, chosen)
        gates = gates / gates.sum(1, keepdim=True)
        flat = chosen.flatten()
        counts = torch.bincount(flat, minlength=EXPERTS)
        order = flat.argsort(stable=True)
        rows = tokens[order // TOP_K].split(counts.tolist())
        out = torch.cat([F.gelu(r @ a) @ b for r, a, b in zip(rows, self.w_in, self.w_out)])
        out = torch.empty_like(out).index_copy(0, order, out).view(-1, TOP_K, WIDTH)
        return (gates.unsqueeze(1) @ out).view_as(x) + self.shared(x)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.merge = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.moe = Moe()
        self.register_buffer("future", torch.full((LENGTH, LENGTH), float("-inf")).triu(1), persistent=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).view(len(x), LENGTH, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + self.future).softmax(-1)
        x = x + self.merge((weights @ v).transpose(1, 2).reshape(x.shape))
        return x + self.moe(self.norms[1](x))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bytes, self.places = torch.nn.Embedding(256, WIDTH), torch.nn.Embedding(LENGTH, WIDTH)
        self.blocks = torch.nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, 256)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.bytes(x) + self.places.weight)))


def system_text():
    """C++ headers, Perl documentation, CMake modules and King James text, as they lie on a Debian, as far as they do."""
    places = [("/usr/include/c++", "*"), ("/usr/share/perl", "*.pod"), ("/usr/share", "cmake-*/Modules/*.cmake")]
    texts = [b"".join(p.read_bytes() for p in sorted(Path(at).rglob(wanted))[:200] if p.is_file())[:2_000_000]
             for at, wanted in places]
    try:
        texts.append(subprocess.run(["bible", "gen1:1-rev22:21"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                    stderr=subprocess.DEVNULL, check=True).stdout[:2_000_000])
    except (OSError, subprocess.CalledProcessError):
        pass
    return [text for text in texts if len(text) > 20_000]


def run(name, policy, texts, given):
    torch.manual_seed(given.seed)
    generator = torch.Generator().manual_seed(given.seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    balancer = Balancer({
        "version": 1,
        "model": {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "tokens_per_step": SEQUENCES * LENGTH},
        "expert_bias": {"policy": policy},
    }, [block.moe for block in model.blocks], counts=None)
    for layer, block in enumerate(model.blocks):
        block.moe.record = partial(balancer.controller.record, layer)
    log = Path(given.log_dir) / f"{name}-s{given.seed}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    balancer.set_log(log)
    data = [torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for text in texts]
    for step in range(given.steps):
        rows = []
        for domain in torch.randint(len(data), (SEQUENCES,), generator=generator).tolist():
            at = torch.randint(len(data[domain]) - LENGTH - 1, (), generator=generator)
            rows.append(data[domain][at:at + LENGTH + 1])
        batch = torch.stack(rows)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report = balancer.step(loss=loss.detach())
        if step % max(1, given.steps // 10) == 0:
            print(f"{name:12} step {step:4}  loss {loss.item():.3f}  MaxVio {report.over_floor:5.2f} floors", flush=True)
    balancer.set_log(None)
    return log


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-dir", default="runs/demo-python")
    parser.add_argument("--text", nargs="+", help="train on these files")
    given = parser.parse_args()
    texts = [Path(path).read_bytes() for path in given.text] if given.text else system_text()
    if not texts:
        sys.exit("no text found: name files with --text")
    logs = [run("uncontrolled", "fixed", texts, given), run("controlled", "adaptive_bias", texts, given)]
    page = Path(given.log_dir) / "report.html"
    moectl.report(*logs, output=page)
    runs = moectl.compare(*logs)
    for log, figures in zip(logs, runs):
        print(f"{log}: MaxVio {figures['max_vio_over_floor']:.2f} floors, settles at step {figures['settle']}")
    print(f"\nReport: {page}")
    sys.exit(0 if runs[1]["settle"] is not None and runs[1]["settle"] <= 60 and runs[1]["max_vio_over_floor"] <= 1.15 else 1)


if __name__ == "__main__":
    main()
