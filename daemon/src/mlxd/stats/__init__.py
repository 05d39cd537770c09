"""What the daemon has counted and measured since it began. Pure: no clock, no IO; the time comes beside what happens.

moments     mean and variance, one value at a time
histogram   percentiles of values that are not kept
statistics  what happened, by model, and what it comes to
exposition  the same for Prometheus
"""

from .statistics import Finished, Gauges, Statistics

__all__ = ["Finished", "Gauges", "Statistics"]
