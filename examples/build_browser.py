"""Makes a folder that runs the embedded model in a browser: the page, transformers.js, onnxruntime-web and the model.

    python examples/build_browser.py web      # needs npm, and pip install 'paligemma[export]'
    python -m http.server -d web              # then open http://localhost:8000

Nothing is loaded from elsewhere: the two libraries come from npm and lie beside the page.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent / "browser"
PACKAGES = ["@huggingface/transformers@4.3.2"]  # brings onnxruntime-web
FILES = [
    "@huggingface/transformers/dist/transformers.web.min.js",
    "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",  # runs on the CPU; half the size of the one for WebGPU
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
]


def build(target: Path, modules: Path) -> None:
    """modules: node_modules with the packages."""
    vendor = target / "vendor"
    vendor.mkdir(parents=True)
    for name in FILES:
        shutil.copy(modules / name, vendor)
    for name in ("index.html", "page.js"):
        shutil.copy(HERE / name, target)
    shutil.copy(HERE.parent / "scene.png", target)
    subprocess.run(
        [sys.executable, "-m", "paligemma", "export", "tiny", str(target / "tiny"), "--weights", "q8"], check=True
    )
    (target / "tiny" / "mask_codec.npz").unlink()  # the page draws boxes, no masks


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("usage: python examples/build_browser.py FOLDER, with a folder that does not exist yet")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *PACKAGES], cwd=folder, check=True
        )
        build(Path(sys.argv[1]), Path(folder) / "node_modules")
