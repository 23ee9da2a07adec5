"""How many replicas a load needs: ``python -m deploy.replicas --demand 1.5 --per_replica 0.9``.

`per_replica` is measured, with pictures of the size and the steps that callers ask for, by ``python -m clients.bench
--json FILE``, whose file may be given instead (`--bench FILE`). Nothing here knows a cluster.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Plan:
    """What a load asks for.

    Attributes:
        demand: images per second in the busiest minutes.
        per_replica: images per second that one replica was measured to paint.
        busy: share of its time that a replica may be busy; the rest keeps queues short where requests come at random.
        burst: images that may come at once.
        within: seconds within which the last image of a burst has to be done.
        spare: replicas that may be away without harm: one is, during a rollout or when a node is drained.
    """

    demand: float
    per_replica: float
    busy: float = 0.7
    burst: int = 0
    within: float = 60.0
    spare: int = 0

    @property
    def for_demand(self) -> int:
        return math.ceil(round(self.demand / (self.per_replica * self.busy), 6))

    @property
    def for_burst(self) -> int:
        return math.ceil(round(self.burst / (self.per_replica * self.within), 6))

    @property
    def replicas(self) -> int:
        return max(1, self.for_demand, self.for_burst) + self.spare

    @property
    def seconds_per_replica(self) -> float:
        """Of work ahead at which one more replica is wanted, for autoscaling: half of what callers wait for."""
        return self.within / 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.replicas", description=__doc__)
    add = parser.add_argument
    add("--demand", type=float, required=True, help="images per second in the busiest minutes")
    measured = parser.add_mutually_exclusive_group(required=True)
    measured.add_argument("--per_replica", type=float, help="images per second of one replica")
    measured.add_argument("--bench", type=Path, help="what clients.bench wrote with --json")
    add("--busy", type=float, default=0.7, help="share of its time that a replica may be busy (default: %(default)s)")
    add("--burst", type=int, default=0, help="images that may come at once (default: %(default)s)")
    add("--within", type=float, default=60.0, help="seconds for the last of a burst (default: %(default)s)")
    add("--spare", type=int, default=0, help="replicas that may be away (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        per_replica = measured_in(options.bench) if options.bench else options.per_replica
    except OSError as error:
        parser.error(f"--bench {options.bench} cannot be read: {error.strerror}")
    except (ValueError, LookupError, TypeError):
        parser.error(f"--bench {options.bench} is not what clients.bench writes with --json")
    if not all(map(math.isfinite, (options.demand, per_replica, options.busy, options.within))):
        parser.error("demand, images per second, seconds and busy must be finite")
    if min(options.demand, per_replica, options.busy, options.within) <= 0 or options.busy > 1:
        parser.error("demand, images per second and seconds must be more than 0, and busy at most 1")
    if min(options.burst, options.spare) < 0:
        parser.error("a burst and spare replicas must be 0 or more")
    plan = Plan(options.demand, per_replica, options.busy, options.burst, options.within, options.spare)
    print(f"{plan.for_demand} for {plan.demand:g} images per second, at {plan.per_replica:g} per replica")
    if plan.burst:
        print(f"{plan.for_burst} for {plan.burst} images at once within {plan.within:g} seconds")
    print(f"{plan.replicas} replicas; autoscaling: one for every {plan.seconds_per_replica:g} seconds of work ahead")
    return 0


def measured_in(path: Path) -> float:
    """The images per second in a file of clients.bench."""
    return float(json.loads(path.read_text(encoding="utf-8"))["summary"]["images_per_second"])


if __name__ == "__main__":
    raise SystemExit(main())
