"""Why it works: errors of maps, bounds and optima, plans and reports."""

from latmix.analysis.bound import Bounds, Resolution, bounds, resolution
from latmix.analysis.optimum import Optimum, closed_form
from latmix.eval.errors import block_errors, error

__all__ = ["Bounds", "Optimum", "Resolution", "block_errors", "bounds", "closed_form", "error", "resolution"]
