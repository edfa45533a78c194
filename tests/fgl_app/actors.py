"""Actors that die: ``python actors.py NAME PLAN STORE`` draws with one at a time, and says what each unit gave."""

import os
import sys
from pathlib import Path

from fgl_app.errors import SynthesisError
from fgl_app.synthesis.cluster import SynthesisActor, draw_on_cluster
from fgl_app.synthesis.plan import Plan


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
    name, plan, store = sys.argv[1:]
    plan = Plan.load(Path(plan))
    try:
        for counts in draw_on_cluster(plan, Path(store), plan.units(), 1, "", globals()[name]):
            sys.stdout.write(f"{counts}\n")
    except SynthesisError as error:
        sys.exit(str(error))
