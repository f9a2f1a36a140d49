"""What mkdocs needs to know of this repository: pages above docs/, and links to sources.

The pages are read on the repository's own pages as well, so their links are those that hold there:
`../csrc/core/packed.h`, `docs/math.md`. Here they are turned to those of the site, into which each
source that is linked is copied. A link that leads nowhere stays as it is, and mkdocs warns of it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
ABOVE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "programs.md",
}
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")


def on_files(files, config):
    """Adds the pages above docs/, and every file outside it that a page links to."""
    for source, name in ABOVE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    for page in list(files.documentation_pages()):
        folder = posixpath.dirname(_source(page.src_uri))
        for _, target, _ in _LINK.findall(page.content_string):
            path = posixpath.normpath(posixpath.join(folder, target))
            if "://" not in target and _is_source(path) and f"source/{path}" not in files.src_uris:
                copy = File.generated(config, f"source/{path}", abs_src_path=str(ROOT / path))
                files.append(copy)
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as the repository needs them become links of the site."""
    folder = posixpath.dirname(_source(page.file.src_uri))
    here = posixpath.dirname(page.file.src_uri)

    def turned(match: re.Match) -> str:
        target = match[2]
        path = posixpath.normpath(posixpath.join(folder, target))
        if "://" in target:
            return match[0]
        if path in ABOVE:
            place = ABOVE[path]
        elif path.startswith("docs/"):
            place = path.removeprefix("docs/")
        elif _is_source(path):
            place = f"source/{path}"
        else:
            return match[0]
        return match[1] + posixpath.relpath(place, here or ".") + match[3]

    return _LINK.sub(turned, markdown)


def _source(uri: str) -> str:
    """The path in the repository of a page of the site."""
    back = {name: source for source, name in ABOVE.items()}
    return back.get(uri, f"docs/{uri}")


def _is_source(path: str) -> bool:
    return path not in ABOVE and not path.startswith(("docs/", "..")) and (ROOT / path).is_file()
