"""A chart for tests of what happens to trajectories, not to charts."""

from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.env import Record

CHART = Chart("chart", b"", "", Record(), "Redraw this chart.", "nowhere", "CC0-1.0")
