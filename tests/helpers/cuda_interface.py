"""The number by which the binding knows a CUDA library built from the same headers."""

import hashlib
from pathlib import Path

CORE = Path(__file__).parents[2] / "csrc" / "core"


def interface() -> str:
    """As setup.py and CMakeLists.txt compute it."""
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(CORE.glob("*.h"))]
    return f"0x{hashlib.sha256(''.join(digests).encode()).hexdigest()[:16]}u"
