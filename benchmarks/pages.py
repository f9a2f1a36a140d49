"""Writes the tables of docs/evidence.md and docs/ablations.md again, from the stored runs.

    python benchmarks/pages.py

On a page a comment stands before each table, with the title under which forgetting.py or
ablations.py prints it: `<!-- table: own text mixed in -->`.
"""

import contextlib
import io
import re
from pathlib import Path
from types import ModuleType

import ablations
import forgetting

DOCS = Path(__file__).parents[1] / "docs"
PROGRAMS = {"evidence": forgetting, "ablations": ablations}
TABLE = r"(?:^\|.*\n)+"
PRINTED = re.compile(rf"^(\w.*)\n\n({TABLE})", re.MULTILINE)
ON_A_PAGE = re.compile(rf"^<!-- table: (.*) -->\n\n(?:{TABLE}\n?)?", re.MULTILINE)


def printed(program: ModuleType) -> dict[str, str]:
    """Tables by their titles."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        program.main([])
    found = PRINTED.findall(out.getvalue())
    tables = dict(found)
    if len(tables) < len(found):
        raise ValueError(f"{program.__name__} prints two tables with the same title")
    return tables


def filled(page: str, tables: dict[str, str]) -> str:
    return ON_A_PAGE.sub(lambda of: f"<!-- table: {of[1]} -->\n\n{tables[of[1]]}\n", page)


def main() -> None:
    for name, program in PROGRAMS.items():
        path = DOCS / f"{name}.md"
        path.write_text(filled(path.read_text(), printed(program)))


if __name__ == "__main__":
    main()
