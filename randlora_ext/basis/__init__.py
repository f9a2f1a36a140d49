"""The random matrices A and B of a layer: generated from a seed or imported, packed on use."""

from .description import BasisDescription
from .ternary_basis import TernaryBasis

__all__ = ["BasisDescription", "TernaryBasis"]
