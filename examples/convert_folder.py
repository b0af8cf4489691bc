"""Every adapter in a folder and its subfolders, in another format.

    python examples/convert_folder.py adapters/ out/ --format kohya
    python examples/convert_folder.py adapters/ out/ --format peft --base model/

writes each under its own name into out/ and tells what became of it; failures are listed with their reason and make the exit code 1.
What is there already is left alone, so that a run that was stopped goes on.
"""

import argparse
from pathlib import Path

import loratools

ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".ckpt", ".gguf", ".nemo", ".lora")


def adapters_in(folder: Path) -> list[Path]:
    """Folders with an adapter_config.json, and files of weights that lie in none of them, in the order of their names."""
    folders = {path.parent for path in folder.rglob("adapter_config.json")}
    files = [path for path in folder.rglob("*") if path.suffix in ENDINGS and path.is_file()]
    return sorted([*folders, *(path for path in files if path.parent not in folders)])


def places(found: list[Path], folder: Path, out: Path) -> dict[Path, Path]:
    """Where each goes: files without their ending, unless two would then be one."""
    bare = {path: path.with_suffix("") if path.is_file() else path for path in found}
    taken = list(bare.values())
    names = {path: bare[path] if taken.count(bare[path]) == 1 else path.with_name(path.name.replace(".", "-")) for path in found}
    return {path: out / name.relative_to(folder) for path, name in names.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for word in ("folder", "out"):
        parser.add_argument(word, type=Path)
    parser.add_argument("--format", required=True)
    parser.add_argument("--base", help="the model that all of them belong to, where names must be its own")
    given, failed = parser.parse_args(), 0
    if not given.folder.is_dir():
        parser.error(f"{given.folder} is not a folder")
    found = places(adapters_in(given.folder), given.folder, given.out)
    for path, out in found.items():
        name = path.relative_to(given.folder)
        if out.exists():
            print(f"there      {name}")
            continue
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            receipt = loratools.convert(path, out, format=given.format, base=given.base)
            print(f"converted  {name}: {receipt['applied']} of {receipt['expected']} tensors")
        except (loratools.LoratoolsError, OSError) as error:
            failed += 1
            print(f"failed     {name}: {str(error).splitlines()[0]}")
    print(f"{len(found) - failed} of {len(found)} adapters are in {given.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
