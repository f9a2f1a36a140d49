"""``python -m randlora_ext``: what a bug report needs, and whether the kernels compute right here.

Exit code 0: every check is within its limit; 1: one is not, or failed.
"""

import sys
import traceback

from .diagnostics import describe, self_check


def main() -> int:
    print("\n".join(describe()))
    print("self-check, relative error against the float64 reference (limit):")
    try:
        checks = self_check()
    except Exception:
        traceback.print_exc()
        print("verdict: FAILED, the check could not run")
        return 1
    wrong = [what for what, error, limit in checks if not error <= limit]
    for what, error, limit in checks:
        print(f"  {what:28} {error:8.1e} ({limit:.0e}){'  WRONG' if what in wrong else ''}")
    print(f"verdict: {'FAILED: ' + ', '.join(wrong) if wrong else 'all is well'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
