"""Reinforcement learning with replayed routes (verl, slime, on Megatron-Core).

Where the trainer replays the routes of the rollout engine, the load does not answer the bias: the bias is held, and goes
on where routers choose for themselves. Balance as in balance_megatron.py.

    with replayed(balancer):
        actor.update_policy(batch)       # calls balancer.step() as ever
"""

from contextlib import contextmanager


@contextmanager
def replayed(balancer):
    balancer.hold()
    try:
        yield balancer
    finally:
        balancer.hold(False)
