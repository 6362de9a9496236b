"""Fashion-MNIST as rows to train on: real pictures of clothes, 28 x 28 gray pixels, ten classes.

    sudo apt-get install dataset-fashion-mnist        # Debian, Ubuntu; or the four files of github.com/zalandoresearch
    python examples/fashion_mnist.py --out fashion
    paligemma train --model tiny --data fashion/train.jsonl --out runs/fashion --minutes 7 --batch 48 \\
        --optimizer muon --lr 2e-3
    paligemma evaluate --model runs/fashion --data fashion/test.jsonl --task exact

The data are by Zalando (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747), MIT licence.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGED = Path("/usr/share/datasets/fashion-mnist")
NAMES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PROMPT = "answer en what is this ?"


def read(file: Path) -> np.ndarray:
    """An array of bytes in the format of MNIST: two zeros, the type (8: bytes), the number of axes, their lengths as
    int32 with the highest byte first, the values."""
    content = gzip.decompress(file.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def write_split(folder: Path, files: Path, prefix: str, split: str, count: int) -> None:
    """The first `count` pictures as PNG, and `split`.jsonl with a row for each."""
    images, labels = (read(files / f"{prefix}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    (folder / split).mkdir(parents=True, exist_ok=True)
    with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as rows:
        for number, (image, label) in enumerate(zip(images[:count], labels)):
            name = f"{split}/{number:05d}.png"
            Image.fromarray(image).save(folder / name)
            rows.write(json.dumps({"image": name, "prefix": PROMPT, "suffix": NAMES[label]}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=Path, default=PACKAGED, help="folder of the four .gz files")
    parser.add_argument("--out", type=Path, default=Path("fashion"))
    parser.add_argument("--train", type=int, default=9000, help="how many pictures to train on")
    parser.add_argument("--test", type=int, default=2000, help="how many to measure on")
    options = parser.parse_args()
    if not options.files.is_dir():
        parser.error(f"{options.files} is no folder: install dataset-fashion-mnist, or name one with --files")
    write_split(options.out, options.files, "train", "train", options.train)
    write_split(options.out, options.files, "t10k", "test", options.test)
