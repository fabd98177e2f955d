"""What `pip install runstream` puts on disk: a fresh environment with the built wheel, without extras.

python bench/installed_size.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PIP_OWN = ("pip", "setuptools", "wheel", "_distutils_hack", "distutils-precedence")


def main() -> None:
    """Build, install, count, print."""
    with tempfile.TemporaryDirectory(prefix="runstream-bench-") as folder:
        place = Path(folder)
        environment = os.environ | {"RUNSTREAM_BUILD_UI": "0"}
        pip = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            folder,
            str(ROOT),
        ]
        subprocess.run(pip, check=True, env=environment)
        [wheel] = place.glob("*.whl")
        subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
        subprocess.run([place / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", str(wheel)], check=True)
        [site] = (place / "venv" / "lib").glob("python*/site-packages")
        sizes = {entry.name: _size(entry) for entry in site.iterdir() if not entry.name.lower().startswith(PIP_OWN)}
        print(f"wheel {wheel.stat().st_size / 1e6:.2f} MB")
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:8]:
            print(f"{name:<30} {size / 1e6:7.2f} MB")
        print(f"{'installed, without bytecode':<30} {sum(sizes.values()) / 1e6:7.2f} MB (limit 40)")


def _size(entry: Path) -> int:
    files = [entry] if entry.is_file() else [file for file in entry.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files if "__pycache__" not in file.parts)


if __name__ == "__main__":
    main()
