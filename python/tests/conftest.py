"""Routers to balance, and what the tests share."""

import random

import pytest


def config(layers=2, experts=8, top_k=2, policy="adaptive_bias", **more):
    return {
        "version": 1,
        "model": {"layers": layers, "experts": experts, "top_k": top_k, **more.pop("model", {})},
        "expert_bias": {"policy": policy},
        **more,
    }


class Router:
    """Prefers low indices; chooses the k largest of sigmoid-like scores plus the bias. Pure Python."""

    def __init__(self, experts=8, top_k=2, seed=1):
        self.experts, self.top_k, self.random = experts, top_k, random.Random(seed)

    def choose(self, bias, tokens):
        uniform, k = self.random.random, self.top_k
        rows = []
        for _ in range(tokens):
            scores = [(uniform() - 0.1 * i + bias[i], i) for i in range(self.experts)]
            scores.sort(reverse=True)
            rows.append(scores[: k + 1])
        return rows

    def counts(self, bias, tokens):
        counts = [0] * self.experts
        for row in self.choose(bias, tokens):
            for _, i in row[: self.top_k]:
                counts[i] += 1
        return counts


@pytest.fixture(scope="session")
def trace():
    """The choices [T, k] of 40 steps of two layers, to be replayed anywhere."""
    router = Router(seed=7)
    return [[[[i for _, i in row[:2]] for row in router.choose([0.0] * 8, 64)] for _ in range(2)] for _ in range(40)]
