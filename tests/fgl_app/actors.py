"""Actors that die, or tell what they do: ``python actors.py NAME PLAN STORE WORKERS``.

Beside the store, ``STORE.counts`` gets what each unit gave, and ``STORE.drawn`` what :class:`Noting` began to draw.
"""

import os
import sys
import time
from pathlib import Path

from fgl_app.errors import SynthesisError
from fgl_app.synthesis.cluster import SynthesisActor, draw_on_cluster
from fgl_app.synthesis.plan import Plan


class Noting(SynthesisActor):
    """Notes each unit and the time, ns, when it begins to draw it."""

    def __init__(self, plan, folder):
        from fgl_app.synthesis.engine import Engine

        super().__init__(plan, folder)
        draw = Engine.draw

        def noting(engine, unit):
            with Path(f"{folder}.drawn").open("a") as file:
                file.write(f"{unit.unit_id} {time.time_ns()}\n")
            return draw(engine, unit)

        Engine.draw = noting


class Speechless(Noting):
    """Dies when it has committed what it drew, before it can say so."""

    def run(self, unit):
        counts = super().run(unit)
        if counts[1]:
            os._exit(1)
        return counts


class Mortal(SynthesisActor):
    """Dies of class 1."""

    def run(self, unit):
        if unit.samples[0].label == 1:
            os._exit(1)
        return super().run(unit)


class Homeless(SynthesisActor):
    """Raises while it starts, as where the package is absent."""

    def __init__(self, plan, folder):
        raise ModuleNotFoundError("No module named 'fgl_app'")


class Stillborn(SynthesisActor):
    """Dies while it starts, and leaves a trace of it."""

    def __init__(self, plan, folder):
        Path(f"{folder}-{os.getpid()}").touch()
        os._exit(1)


if __name__ == "__main__":
    name, plan, store, num_workers = sys.argv[1:]
    plan = Plan.load(Path(plan))
    try:
        # Not the standard output: Ray writes there, too.
        with Path(f"{store}.counts").open("w") as file:
            for counts in draw_on_cluster(plan, Path(store), plan.units(), int(num_workers), "", globals()[name]):
                file.write(f"{counts}\n")
    except SynthesisError as error:
        sys.exit(str(error))
