#!/usr/bin/env python3
"""A byte-level Mixture-of-Experts language model in plain PyTorch, balanced by moectl.torch while it trains on real text.

    train_moe_lm.py --log run.jsonl [--policy CONFIG] [--steps 600] [--seed 1] [--text FILE...]

The model has the size of ./dev demo's: three layers of 16 experts, top-2, beside one shared expert; d 96. Every text file is
a domain; the last is switched on at 60 % of the run. Without --policy the router is left alone and measured all the same.
moectl has five lines in this file: they are marked.
"""
import argparse
import glob
import math
import os
import random
import subprocess

# Before PyTorch is loaded: threads that wait for each other spin, and matrices as small as these gain nothing from them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import moectl.torch  # moectl  # noqa: E402

LAYERS, EXPERTS, TOP_K, WIDTH, HIDDEN, HEADS = 3, 16, 2, 96, 96, 4
SHIFT = 0.6  # of the run: from there on the last domain is half of every batch


class MoE(nn.Module):
    """Each token goes to the k experts with the largest score + bias; the unbiased scores weigh what they return."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.register_buffer("expert_bias", torch.zeros(EXPERTS))
        self.into = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / WIDTH ** 0.5)
        self.out = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / HIDDEN ** 0.5)
        self.shared = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
        self.record = None  # called with the chosen experts [T, k] and the k + 1 largest biased scores

    def forward(self, x):
        tokens = x.reshape(-1, WIDTH)
        scores = self.router(tokens).sigmoid()
        values, ranked = (scores.detach() + self.expert_bias).topk(TOP_K + 1)
        chosen = ranked[:, :TOP_K]
        if self.training and self.record is not None:
            self.record(chosen.contiguous(), values)
        gates = scores.gather(1, chosen)
        gates = gates / gates.sum(1, keepdim=True)
        order = chosen.reshape(-1).argsort(stable=True)
        sizes = torch.bincount(chosen.reshape(-1), minlength=EXPERTS).tolist()
        parts = tokens[order // TOP_K].split(sizes)
        mixed = torch.cat([F.gelu(rows @ into) @ out for rows, into, out in zip(parts, self.into, self.out)])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        mixed = mixed[back].view(-1, TOP_K, WIDTH)
        return (gates.unsqueeze(1) @ mixed).view_as(x) + self.shared(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.moe_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.merge = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.moe = MoE()

    def attend(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return self.merge(mixed.transpose(1, 2).reshape(batch, length, WIDTH))

    def forward(self, x):
        x = x + self.attend(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x))


class Model(nn.Module):
    def __init__(self, length):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(length, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)
        with torch.no_grad():
            self.bytes.weight.mul_(0.3)
            self.places.weight.mul_(0.1)

    def forward(self, text):
        return self.head(self.norm(self.blocks(self.bytes(text) + self.places.weight)))


def domains(files):
    """name → (training bytes, held-out bytes). Without files: what Debian's packages hold."""
    if files:
        texts = {os.path.basename(name): open(name, "rb").read() for name in files}
    else:
        def joined(pattern):
            return b"".join(open(name, "rb").read() for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name))

        bible = subprocess.run(["bible", "gen1:1-rev22:21"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
        texts = {"cpp": joined("/usr/include/c++/*/**/*.h"), "perl": joined("/usr/share/perl/**/*.pod"),
                 "cmake": joined("/usr/share/cmake-*/**/*.cmake"), "scripture": bible.stdout}
    short = [name for name, text in texts.items() if len(text) < 20000]
    if short:
        raise SystemExit(f"{', '.join(short)}: under 20000 bytes of text: ./dev demo-python installs it")
    return {name: (text[:len(text) * 9 // 10][:4000000], text[len(text) * 9 // 10:]) for name, text in texts.items()}


def batch(texts, shares, length, source, size):
    """[size, length + 1] bytes, and the domain of each sequence."""
    rows, chosen = [], source.choices(range(len(texts)), shares, k=size)
    for domain in chosen:
        start = source.randrange(len(texts[domain]) - length)
        rows.append(torch.tensor(list(texts[domain][start:start + length + 1])))
    return torch.stack(rows), torch.tensor(chosen)


def loss_of(model, text):
    logits = model(text[:, :-1])
    return F.cross_entropy(logits.reshape(-1, 256), text[:, 1:].reshape(-1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", required=True, help="run log to write")
    parser.add_argument("--policy", help="a config; its model section is replaced by this model's sizes")
    parser.add_argument("--text", nargs="+", metavar="FILE")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="with another number, sums round otherwise")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    texts = domains(args.text)
    train, held_out = [t for t, _ in texts.values()], [t for _, t in texts.values()]
    model = Model(args.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    routers = [block.moe for block in model.blocks]

    measured = {"version": 1, "model": {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K}}
    with moectl.Controller(args.policy or measured) as given:
        config = given.config
    config["model"].update(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, tokens_per_step=args.batch * args.length,
                           domains=list(texts))
    config["collect"]["sequences"] = True
    balancer = moectl.torch.Balancer(config, routers, counts=None, bias="expert_bias")  # moectl
    balancer.set_log(args.log)  # moectl
    seen = {}
    for layer, moe in enumerate(routers):
        def record(chosen, values, layer=layer):
            balancer.controller.record(layer, chosen, top_values=values, sequence_length=args.length,
                                       domain_ids=seen["domains"])  # moectl
        moe.record = record

    def shares(step):
        last = 0.5 if step >= SHIFT * args.steps else 0.0
        return [(1 - last) / (len(train) - 1)] * (len(train) - 1) + [last] if len(train) > 1 else [1.0]

    def batch_of(step):
        return batch(train, shares(step), args.length, random.Random(f"{args.seed}/{step}"), args.batch)

    text, domain = batch_of(0)
    for step in range(args.steps):
        done = step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 30) * (0.55 + 0.45 * math.cos(done * math.pi))
        seen["domains"] = domain.repeat_interleave(args.length)
        loss = loss_of(model, text)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        text, domain = batch_of(step + 1)
        mixture = torch.bincount(domain, minlength=len(texts)) * args.length
        report = balancer.step(loss=loss, next_mixture=mixture)  # moectl
        if (step + 1) % max(1, args.steps // 20) == 0:
            print(f"step {step + 1}  loss {loss.item():.3f}  MaxVio {report.max_vio:.3f} (floor {report.floor_max_vio:.3f})",
                  flush=True)

    model.eval()
    source = random.Random(0)
    with torch.no_grad():
        losses = [loss_of(model, batch([held], [1], args.length, source, 64)[0]).item() for held in held_out]
    print(f"validation loss {sum(losses) / len(losses):.4f}")


if __name__ == "__main__":
    main()
