"""The random matrices A and B of a layer: generated from a seed or imported, packed on use."""

from .basis import Basis
from .description import BasisDescription

__all__ = ["BasisDescription", "Basis"]
