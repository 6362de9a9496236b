"""Sixteen `<seg>` tokens <-> a 64 x 64 mask: the VQ-VAE that PaliGemma's segmentation speaks.

The language model never sees a mask. A small convolutional encoder turns the mask inside an object's box into a 4 x 4
grid of vectors, each vector is replaced by the nearest of 128 learned ones, and the numbers of those are the sixteen
tokens. A decoder turns the vectors back into a mask, which is stretched over the box.

The method is that of "All in Tokens" (arXiv 2301.02229), the layers those of `vae-oid.npz`, the file that goes with
the official checkpoints (big_vision, `pp/proj/paligemma/segmentation.py` encodes and
`evaluators/proj/paligemma/transfers/segmentation.py` decodes). Parameter names here are the names in that file.

What is unusual: masks are mapped to [-1, 1] on the way in, and nothing squashes the output, so "inside" is `> 0`;
codebook vectors are looked up as they are, without normalisation; the layers' widths are read from the file.

Letters: N masks, E width of a codebook vector, K codebook vectors.
"""

from __future__ import annotations

import shutil
import sys
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from paligemma.arguments import check_path
from paligemma.devices import on_meta_device
from paligemma.files import written_whole

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels

MASK_SIZE = 64
GRID = 4  # four halvings of 64
NUM_TOKENS = GRID * GRID

CODEC_FILE = "mask_codec.npz"  # beside the weights of a checkpoint that brings its own
OFFICIAL_URL = "https://storage.googleapis.com/big_vision/paligemma/vae-oid.npz"
_MAX_BYTES = 512 * 2**20  # a codec has megabytes; more than this is not one, and is not unpacked


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.net(x)
        return x + residual


class Codebook(nn.Module):
    def __init__(self, num_codes: int, embedding_dim: int) -> None:
        super().__init__()
        self._embedding = nn.Parameter(torch.empty(num_codes, embedding_dim))
        nn.init.normal_(self._embedding, std=embedding_dim**-0.5)


class MaskCodec(nn.Module):
    """Encoder, codebook and decoder. The defaults are the sizes of the official decoder.

    encoder_widths: output channels of the four convolutions that halve the mask; the last is also the width of the
        encoder's residual blocks.
    decoder_widths: channels of the decoder's residual blocks, then of the four convolutions that double the mask.
    encoder_kernels: size of the halving convolutions and of the last one, which makes the codebook vectors.
    """

    def __init__(
        self,
        num_codes: int = 128,
        embedding_dim: int = 512,
        encoder_widths: Sequence[int] = (16, 32, 64, 128),
        decoder_widths: Sequence[int] = (128, 128, 64, 32, 16),
        encoder_kernels: tuple[int, int] = (4, 1),
    ) -> None:
        super().__init__()
        if len(encoder_widths) != 4 or len(decoder_widths) != 5:
            raise ValueError(
                f"a mask codec has 4 encoder widths and 5 decoder widths, got {encoder_widths} and {decoder_widths}"
            )
        e0, e1, e2, e3 = encoder_widths
        d0, d1, d2, d3, d4 = decoder_widths
        halve, last = encoder_kernels
        self._vq_vae = Codebook(num_codes, embedding_dim)
        # The convolutions of the encoder have no padding of their own: `latents` pads (see `_pad_same`).
        self.encoder = nn.Sequential(
            nn.Conv2d(1, e0, halve, stride=2),  # 64 -> 32
            nn.ReLU(),
            nn.Conv2d(e0, e1, halve, stride=2),  # 32 -> 16
            nn.ReLU(),
            nn.Conv2d(e1, e2, halve, stride=2),  # 16 -> 8
            nn.ReLU(),
            nn.Conv2d(e2, e3, halve, stride=2),  # 8 -> 4
            nn.ReLU(),
            ResidualBlock(e3),
            ResidualBlock(e3),
            nn.Conv2d(e3, embedding_dim, last),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(embedding_dim, d0, 1),
            nn.ReLU(),
            ResidualBlock(d0),
            ResidualBlock(d0),
            nn.ConvTranspose2d(d0, d1, 4, stride=2, padding=1),  # 4 -> 8
            nn.ReLU(),
            nn.ConvTranspose2d(d1, d2, 4, stride=2, padding=1),  # 8 -> 16
            nn.ReLU(),
            nn.ConvTranspose2d(d2, d3, 4, stride=2, padding=1),  # 16 -> 32
            nn.ReLU(),
            nn.ConvTranspose2d(d3, d4, 4, stride=2, padding=1),  # 32 -> 64
            nn.ReLU(),
            nn.Conv2d(d4, 1, 1),
        )
        # How often each code was chosen lately, for `revive_dead_codes`; not a part of the file.
        self.usage: Tensor
        self.register_buffer("usage", torch.zeros(num_codes), persistent=False)

    @property
    def num_codes(self) -> int:
        return len(self.code_vectors)

    @property
    def code_vectors(self) -> nn.Parameter:
        """The codebook [K, E]: a vector for each code."""
        return self._vq_vae._embedding

    # -- masks -> codes -> masks --

    def encode(self, masks: Tensor) -> Tensor:
        """masks float [N, 64, 64] in [0, 1] (bool is taken too) -> codes int64 [N, 16], row-major.

        ValueError for another shape and for values outside [0, 1].
        """
        return self.nearest(self.latents(masks))

    def decode(self, codes: Tensor) -> Tensor:
        """codes int64 [N, 16] -> float32 [N, 64, 64], about -1 outside and 1 inside; the mask is where it is > 0.

        ValueError for another shape, and for a code that the codebook does not have.
        """
        codes = torch.as_tensor(codes, device=self.code_vectors.device)
        if codes.ndim != 2 or codes.shape[1] != NUM_TOKENS or codes.is_floating_point():
            raise ValueError(
                f"codes must be integers of shape [N, {NUM_TOKENS}], got {codes.dtype} {list(codes.shape)}"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
            raise ValueError(f"codes must lie in 0..{self.num_codes - 1}, got {int(codes.min())}..{int(codes.max())}")
        embeddings = self.code_vectors[codes.long()]  # [N, 16, E]
        return self.reconstruct(_on_the_grid(embeddings))

    # -- the parts, which training uses one by one --

    def latents(self, masks: Tensor) -> Tensor:
        """masks [N, 64, 64] in [0, 1] -> what the encoder says of them, before the codebook: [N, E, 4, 4]."""
        weight = self.code_vectors
        x = torch.as_tensor(masks).to(weight.device, weight.dtype)
        if x.ndim != 3 or x.shape[1:] != (MASK_SIZE, MASK_SIZE):
            raise ValueError(f"masks must have shape [N, {MASK_SIZE}, {MASK_SIZE}], got {list(x.shape)}")
        if x.numel() and not (float(x.min()) >= 0 and float(x.max()) <= 1):  # written so that NaN fails too
            raise ValueError(f"masks must lie in [0, 1], got {float(x.min()):.4g}..{float(x.max()):.4g}")
        x = 2 * (x.unsqueeze(1) - 0.5)
        for layer in self.encoder:
            if isinstance(layer, nn.Conv2d):
                x = _pad_same(x, layer.kernel_size[0], layer.stride[0])
            x = layer(x)
        return x

    def nearest(self, latents: Tensor) -> Tensor:
        """latents [N, E, 4, 4] -> for each place the nearest code by squared distance: int64 [N, 16]."""
        x = latents.flatten(2).transpose(1, 2)  # [N, 16, E]
        embedding = self.code_vectors
        # |x - e|^2 without |x|^2, which is the same for every code
        return (embedding.square().sum(1) - 2 * x @ embedding.T).argmin(-1)

    def reconstruct(self, embeddings: Tensor) -> Tensor:
        """embeddings [N, E, 4, 4] -> [N, 64, 64]."""
        masks: Tensor = self.decoder(embeddings)
        return masks.squeeze(1)

    # -- training --

    def training_loss(self, masks: Tensor, commitment: float = 0.25) -> dict[str, Tensor]:
        """The VQ-VAE objective (arXiv 1711.00937, equation 3) for masks [N, 64, 64] in [0, 1].

        Returns scalars: `loss` = `reconstruction` (squared error against -1 outside and 1 inside) + `codebook` (pulls
        the chosen vectors to the encoder's output) + `commitment` times `commitment` (pulls the output to the
        vectors). Choosing the nearest vector has no gradient, so the decoder's is handed straight through to the
        encoder. In training mode it also keeps count of the codes used, for `revive_dead_codes`.
        """
        latents = self.latents(masks)
        codes = self.nearest(latents)
        chosen = _on_the_grid(self.code_vectors[codes])  # [N, E, 4, 4]
        if self.training:
            share = torch.bincount(codes.flatten(), minlength=self.num_codes) / max(codes.numel(), 1)
            self.usage.lerp_(share.to(self.usage), 0.01)
        straight_through = latents + (chosen - latents).detach()
        target = 2 * (torch.as_tensor(masks).to(latents) - 0.5)
        parts = {
            "reconstruction": F.mse_loss(self.reconstruct(straight_through), target),
            "codebook": F.mse_loss(chosen, latents.detach()),
            "commitment": F.mse_loss(latents, chosen.detach()),
        }
        return {"loss": parts["reconstruction"] + parts["codebook"] + commitment * parts["commitment"], **parts}

    @torch.no_grad()
    def revive_dead_codes(self, masks: Tensor, threshold: float = 0.1) -> int:
        """Move codes that are hardly ever chosen to where the encoder's outputs for `masks` are; returns how many.

        A vector that is never the nearest gets no gradient and would stay unused for good. `threshold` is relative to
        even use, 1 / K. Call it before the first step, which starts the whole codebook from data, and then every
        100 steps or so.
        """
        dead = (self.usage < threshold / self.num_codes).nonzero().squeeze(1)
        outputs = self.latents(masks).flatten(2).transpose(1, 2).flatten(0, 1)  # [N * 16, E]
        if len(dead) and len(outputs):
            picked = outputs[torch.randint(len(outputs), (len(dead),), device=outputs.device)]
            # a little noise, so that two codes moved to the same place can part
            self.code_vectors[dead] = picked + 0.01 * outputs.std(0) * torch.randn_like(picked)
            self.usage[dead] = 1 / self.num_codes
        return len(dead)

    # -- files --

    @classmethod
    def load(cls, path: str | Path | None = None) -> MaskCodec:
        """A codec from `vae-oid.npz`, or from a `.safetensors` with the same names.

        path None downloads the official file on first use (`OFFICIAL_URL`) and keeps it in the cache of
        huggingface_hub. Strict: one ValueError names every missing, unexpected and mis-shaped array. No pickle is read.
        """
        path = check_path("path", path, "the path of an .npz") if path is not None else _download()
        arrays = _read(path)

        def size(name: str, axis: int, default: int) -> int:
            shape = arrays[name].shape if name in arrays else ()
            return (shape[axis] if -len(shape) <= axis < len(shape) else 0) or default

        sizes: dict[str, Any] = {
            "num_codes": size("_vq_vae._embedding", 0, 128),
            "embedding_dim": size("_vq_vae._embedding", 1, 512),
            "encoder_widths": [size(f"encoder.{i}.weight", 0, 1) for i in (0, 2, 4, 6)],
            "decoder_widths": [size("decoder.0.weight", 0, 1)]
            + [size(f"decoder.{i}.weight", 1, 1) for i in (4, 6, 8, 10)],  # transposed: [in, out, 4, 4]
            "encoder_kernels": (size("encoder.0.weight", -1, 4), size("encoder.10.weight", -1, 1)),
        }
        with on_meta_device():  # shapes only: the values come from the file
            codec = cls(**sizes)
        _check_names_and_shapes(path, codec.state_dict(), arrays)
        state = {name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}
        codec.load_state_dict(state, assign=True)
        codec.usage = torch.zeros(codec.num_codes)  # not in the file, so still without storage
        return codec.eval()

    def save(self, path: str | Path) -> None:
        """Write the arrays under the official names: `.npz`, or `.safetensors` if the path ends so."""
        path = Path(path)
        arrays = {name: value.detach().float().cpu().numpy() for name, value in self.state_dict().items()}
        if path.suffix == ".safetensors":
            from safetensors.numpy import save

            with written_whole(path) as beside:
                beside.write_bytes(save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))
        elif path.suffix == ".npz":
            with written_whole(path) as beside:
                np.savez(beside, **arrays)
        else:
            raise ValueError(f"a mask codec is saved as .npz or .safetensors, got {path.name!r}")


def _on_the_grid(embeddings: Tensor) -> Tensor:
    """[N, 16, E] -> [N, E, 4, 4]"""
    return embeddings.transpose(1, 2).reshape(len(embeddings), embeddings.shape[2], GRID, GRID)


def _pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zero padding after which a convolution gives ceil(size / stride), as "SAME" does in TensorFlow and JAX.

    Where the amount is odd the greater half goes to the right and bottom: a 4 x 4 kernel at stride 2 gets 1 and 1, but
    a 3 x 3 one 0 and 1, which `padding=1` would not give.
    """
    size = x.shape[-1]  # square
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    low, high = total // 2, total - total // 2
    return F.pad(x, (low, high, low, high))


# -- between the picture and the 64 x 64 mask --


def crop(mask: np.ndarray, box: Box) -> np.ndarray:
    """The mask inside a box, as `MaskCodec.encode` wants it: bool or [0, 1] [H, W] -> float32 [64, 64] in [0, 1].

    As big_vision makes its labels: the box is rounded to pixels, the cut-out resized bilinearly with antialiasing.
    A box thinner than a pixel takes the pixel it lies in. ValueError for a box that is not finite or lies outside.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or not mask.size:
        raise ValueError(f"a mask must have shape [H, W], got {list(mask.shape)}")
    height, width = mask.shape
    _check_box(box)
    x0, x1 = _at_least_one(round(box[0]), round(box[2]), width)
    y0, y1 = _at_least_one(round(box[1]), round(box[3]), height)
    image = Image.fromarray(mask[y0:y1, x0:x1].astype(np.float32))
    small = np.asarray(image.resize((MASK_SIZE, MASK_SIZE), Image.Resampling.BILINEAR))
    return small.clip(0, 1)  # weights sum to 1 only up to rounding


def paste(mask64: np.ndarray | Tensor, box: Box, image_size: tuple[int, int], rule: str = "space") -> np.ndarray:
    """A decoded mask at full picture size: [64, 64], > 0 inside -> bool [H, W], False outside the box.

    image_size is (W, H). Two rules are published:

    - "space": box corners rounded to pixels, mask clipped to [0, 1], stored as 8 bits, resized bicubically, >= 0.5. The
      rule of the official demo, which leaves the cut at a threshold to the caller.
    - "big_vision": box corners truncated to pixels, float mask resized bilinearly, > 0. The rule behind the published
      mIoU numbers.

    The default is the one that loses less. Truncation moves a corner that a token has put at 9.96 to pixel 9, so a mask
    that the codec keeps perfectly comes back with a mean IoU of .94 (`loc_scale=1023`; 1.0 with 1024) in a picture of
    128 pixels and .985 in one of 640 x 480; with rounding it is 1.0 and .997. To repeat published numbers take
    "big_vision" and `loc_scale=1023`.

    A box that has no whole pixel by its rule gives an empty mask; what lies outside the picture is cut off.
    """
    width, height = image_size
    mask = np.asarray(mask64.detach().float().cpu() if isinstance(mask64, Tensor) else mask64, dtype=np.float32)
    if mask.shape != (MASK_SIZE, MASK_SIZE):
        raise ValueError(f"a decoded mask has shape [{MASK_SIZE}, {MASK_SIZE}], got {list(mask.shape)}")
    _check_box(box)
    if rule == "big_vision":
        image, resample = Image.fromarray(mask), Image.Resampling.BILINEAR
        x0, y0, x1, y1 = (int(edge) for edge in box)
    elif rule == "space":
        grey = np.clip(mask / 2 + 0.5, 0, 1) * 255
        image, resample = Image.fromarray(grey.astype(np.uint8)), Image.Resampling.BICUBIC
        x0, y0, x1, y1 = (round(edge) for edge in box)
    else:
        raise ValueError(f'the pasting rules are "big_vision" and "space", got {rule!r}')

    full = np.zeros((height, width), dtype=bool)
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if left >= right or top >= bottom:
        return full
    sx, sy = MASK_SIZE / (x1 - x0), MASK_SIZE / (y1 - y0)
    source = ((left - x0) * sx, (top - y0) * sy, (right - x0) * sx, (bottom - y0) * sy)  # all of it, usually
    stretched = np.asarray(image.resize((right - left, bottom - top), resample, box=source))
    full[top:bottom, left:right] = stretched > 0 if rule == "big_vision" else stretched >= 127.5
    return full


def _check_box(box: Box) -> None:
    if len(box) != 4 or not all(np.isfinite(edge) for edge in box):
        raise ValueError(f"a box is four finite numbers x0, y0, x1, y1 in pixels, got {tuple(box)}")


def _at_least_one(low: int, high: int, size: int) -> tuple[int, int]:
    """A pixel range cut to 0..size that keeps at least one pixel; ValueError if it lies outside altogether."""
    if high < 0 or low > size or high < low:
        raise ValueError(f"the box runs from pixel {low} to {high}, which is not a part of the picture's 0..{size}")
    low = min(max(low, 0), size - 1)
    return low, max(min(high, size), low + 1)


# -- reading, writing, fetching --


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no mask codec at {path}; MaskCodec.load() without a path downloads the official vae-oid.npz"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _MAX_BYTES:
            raise ValueError(f"it would unpack to {unpacked:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            loaded = {name: arrays[name] for name in arrays.files}
        if any(not isinstance(array, np.ndarray) for array in loaded.values()):  # numpy hands other files out as bytes
            raise ValueError("it holds files that are not arrays")
        return loaded
    except Exception as error:  # zipfile, numpy, zlib and safetensors each have their own errors for a broken file
        raise ValueError(f"{path} is not a mask codec (.npz or .safetensors): {error}") from error


def _check_names_and_shapes(path: Path, expected: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray]) -> None:
    problems = [f"missing {name} {list(expected[name].shape)}" for name in expected if name not in arrays]
    problems += [f"unexpected {name} {list(arrays[name].shape)}" for name in arrays if name not in expected]
    for name in expected:
        if name in arrays and arrays[name].shape != tuple(expected[name].shape):
            problems.append(f"{name} is {list(arrays[name].shape)}, expected {list(expected[name].shape)}")
        elif name in arrays and not np.issubdtype(arrays[name].dtype, np.floating):
            problems.append(f"{name} is {arrays[name].dtype}, expected floating point")
        elif name in arrays and not np.isfinite(arrays[name]).all():
            problems.append(f"{name} has values that are not finite")
    if problems:
        raise ValueError(f"{path} is not a mask codec in the layout of vae-oid.npz: " + "; ".join(problems))


def _download() -> Path:
    """The official file, from the cache or from where big_vision publishes it."""
    from huggingface_hub import constants

    path = Path(constants.HF_HOME) / "paligemma" / "vae-oid.npz"
    if path.is_file():
        return path
    help_ = (
        f"Download {OFFICIAL_URL} yourself to that path, or as mask_codec.npz into the folder of the checkpoint "
        "(the model that ships, tiny, has its own); in Python, MaskCodec.load takes any path"
    )
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(f"the mask codec is not at {path} and HF_HUB_OFFLINE is set. {help_}")

    def fetch(file: Any) -> None:
        import rich.console
        import rich.progress

        with urllib.request.urlopen(OFFICIAL_URL, timeout=30) as response:
            total = int(response.headers.get("Content-Length") or 0)
            console = rich.console.Console(file=sys.stderr)
            with rich.progress.wrap_file(response, total, description=path.name, console=console) as reader:
                shutil.copyfileobj(reader, file)
        if total and file.tell() != total:
            raise OSError(f"the connection ended after {file.tell():,} of {total:,} bytes")

    try:
        with written_whole(path) as beside, beside.open("wb") as file:
            fetch(file)
    except OSError as error:  # URLError and timeouts are OSErrors
        raise OSError(f"cannot download the mask codec to {path}: {error}. {help_}") from error
    return path
