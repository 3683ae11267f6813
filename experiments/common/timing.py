"""Times of calls that take turns, so that a slow phase hits all of them."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax


def seconds(call: Callable[[], Any], calls: int, clock: Callable) -> float:
  """Returns the time of one of some calls."""
  start = clock()
  for _ in range(calls):
    call().block_until_ready()
  return (clock() - start) / calls


def ratios(
  calls: Mapping[str, Callable[[], Any]],
  rounds: int,
  turn: float,
  clock: Callable,
) -> dict[str, float]:
  """Returns the median time of the call "", and how many times faster others.

  Args:
    calls: by name; each returns an array. The one called "" is the base, which
      is timed before and after each of the others.
    rounds: in which each of them is timed.
    turn: seconds in which a call is repeated.
    clock: returns seconds.
  """
  many = {}
  for name, call in calls.items():
    call().block_until_ready()  # compiles
    many[name] = max(1, round(turn / seconds(call, 2, clock)))
  found: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds):
    for name in calls:
      if name:
        before = seconds(calls[""], many[""], clock)
        own = seconds(calls[name], many[name], clock)
        after = seconds(calls[""], many[""], clock)
        found[""].append((before + after) / 2)
        found[name].append((before + after) / 2 / own)
  return {name: statistics.median(times) for name, times in found.items()}


def medians(
  calls: Mapping[str, Callable[[], Any]],
  rounds: int,
  clock: Callable[[], float],
) -> dict[str, float]:
  """Returns the median time of each call.

  Args:
    calls: by name; each returns arrays.
    rounds: in which each of them is called once, after a first call that
      compiles.
    clock: returns seconds.
  """
  found: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds + 1):
    for name, call in calls.items():
      start = clock()
      jax.block_until_ready(call())
      found[name].append(clock() - start)
  return {name: statistics.median(times[1:]) for name, times in found.items()}
