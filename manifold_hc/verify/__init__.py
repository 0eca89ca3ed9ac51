"""Checks of results: operators and peers on this device, and checkpoints against other code."""

from manifold_hc.verify.compare import Compared, Report, compare
from manifold_hc.verify.observation import Inputs, Observation, Source, Streams
from manifold_hc.verify.operators import Line, verify
from manifold_hc.verify.record import record
from manifold_hc.verify.recorded import Recording, load_recording
from manifold_hc.verify.widened import Widened

__all__ = [
    "Compared",
    "Inputs",
    "Line",
    "Observation",
    "Recording",
    "Report",
    "Source",
    "Streams",
    "Widened",
    "compare",
    "load_recording",
    "record",
    "verify",
]
