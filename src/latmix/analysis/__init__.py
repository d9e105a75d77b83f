"""Why it works: errors of maps, bounds and optima, plans and reports."""

from latmix.analysis.bound import Bounds, Resolution, bounds, resolution
from latmix.analysis.errors import block_errors, error
from latmix.analysis.optimum import Optimum, closed_form

__all__ = ["Bounds", "Optimum", "Resolution", "block_errors", "bounds", "closed_form", "error", "resolution"]
