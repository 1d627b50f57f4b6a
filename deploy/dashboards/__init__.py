"""The four dashboards, by the name of their file."""

from deploy.dashboards.hardware import HARDWARE
from deploy.dashboards.overview import OVERVIEW
from deploy.dashboards.training import TRAINING
from deploy.dashboards.truth import TRUTH

DASHBOARDS = {"overview": OVERVIEW, "hardware": HARDWARE, "training": TRAINING, "truth": TRUTH}
