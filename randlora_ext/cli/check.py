"""``randlora check``: the report for bugs, and the self-check."""

import traceback

from .. import diagnostics


def check() -> int:
    """Prints the report and the self-check; returns 1 if a check fails or cannot run."""
    print("\n".join(diagnostics.describe()))
    print("self-check, relative error against the float64 reference (limit):")
    try:
        checks = diagnostics.self_check()
    except Exception:
        traceback.print_exc()
        print("verdict: FAILED, the check could not run")
        return 1
    wrong = [what for what, error, limit in checks if not error <= limit]
    for what, error, limit in checks:
        print(f"  {what:28} {error:8.1e} ({limit:.0e}){'  WRONG' if what in wrong else ''}")
    print(f"verdict: {'FAILED: ' + ', '.join(wrong) if wrong else 'all is well'}")
    return 1 if wrong else 0
