"""The mask codec: the layers against plain loops, the file format, cropping and pasting, and that it can be trained."""

import io
import math
import zipfile

import numpy as np
import pytest
import torch

from paligemma.answers import mask_codec
from paligemma.answers.mask_codec import MaskCodec, crop, paste

# ---------------------------------------------- the layers once more, in loops over pixels, from the file alone


def conv(x, arrays, name, stride=1):
    """[C, H, W] -> "SAME" convolution of TensorFlow: output ceil(size / stride), odd padding to the right."""
    weight, bias = arrays[name + ".weight"], arrays[name + ".bias"]
    kernel, size = weight.shape[2], x.shape[1]
    out = math.ceil(size / stride)
    low = max((out - 1) * stride + kernel - size, 0) // 2
    y = np.zeros((weight.shape[0], out, out))
    for i in range(out):
        for j in range(out):
            for di in range(kernel):
                for dj in range(kernel):
                    row, column = i * stride + di - low, j * stride + dj - low
                    if 0 <= row < size and 0 <= column < size:
                        y[:, i, j] += weight[:, :, di, dj] @ x[:, row, column]
            y[:, i, j] += bias
    return y


def conv_transposed(x, arrays, name):
    """[C, H, W] -> [C', 2H, 2W]: every input pixel paints a 4 x 4 patch, of which one line hangs over on each side."""
    weight, bias = arrays[name + ".weight"], arrays[name + ".bias"]
    size = x.shape[1]
    y = np.zeros((weight.shape[1], 2 * size, 2 * size)) + bias[:, None, None]
    for i in range(size):
        for j in range(size):
            for di in range(4):
                for dj in range(4):
                    row, column = 2 * i + di - 1, 2 * j + dj - 1
                    if 0 <= row < 2 * size and 0 <= column < 2 * size:
                        y[:, row, column] += x[:, i, j] @ weight[:, :, di, dj]
    return y


def relu(x):
    return np.maximum(x, 0)


def residual(x, arrays, name):
    y = relu(conv(x, arrays, name + ".net.0"))
    y = relu(conv(y, arrays, name + ".net.2"))
    return x + conv(y, arrays, name + ".net.4")


def loops_decode(arrays, codes):
    x = np.stack([arrays["_vq_vae._embedding"][code] for code in codes])  # [16, E]
    x = x.reshape(4, 4, -1).transpose(2, 0, 1)  # row-major: code 1 is right of code 0
    x = relu(conv(x, arrays, "decoder.0"))
    x = residual(residual(x, arrays, "decoder.2"), arrays, "decoder.3")
    for i in (4, 6, 8, 10):
        x = relu(conv_transposed(x, arrays, f"decoder.{i}"))
    return conv(x, arrays, "decoder.12")[0]


def loops_encode(arrays, mask):
    x = 2 * (mask[None] - 0.5)
    for i in (0, 2, 4, 6):
        x = relu(conv(x, arrays, f"encoder.{i}", stride=2))
    x = residual(residual(x, arrays, "encoder.8"), arrays, "encoder.9")
    x = conv(x, arrays, "encoder.10").reshape(-1, 16)  # [E, 16]
    distances = ((x.T[:, None] - arrays["_vq_vae._embedding"][None]) ** 2).sum(-1)
    return distances.argmin(1)


def official_arrays(embedding=512, decoder=(128, 128, 64, 32, 16), encoder=(16, 32, 64, 128), kernel=4, last=1):
    """Random weights under the names of vae-oid.npz."""
    rng = np.random.default_rng(0)
    shapes = {"_vq_vae._embedding": (128, embedding)}

    def layer(name, out, in_, size, transposed=False):
        shapes[name + ".weight"] = (in_, out, size, size) if transposed else (out, in_, size, size)
        shapes[name + ".bias"] = (out,)

    def block(name, width):
        for i, size in ((0, 3), (2, 3), (4, 1)):
            layer(f"{name}.net.{i}", width, width, size)

    layer("decoder.0", decoder[0], embedding, 1)
    block("decoder.2", decoder[0])
    block("decoder.3", decoder[0])
    for i, k in enumerate((4, 6, 8, 10)):
        layer(f"decoder.{k}", decoder[i + 1], decoder[i], 4, transposed=True)
    layer("decoder.12", 1, decoder[4], 1)
    for i, k in enumerate((0, 2, 4, 6)):
        layer(f"encoder.{k}", encoder[i], (1, *encoder)[i], kernel)
    block("encoder.8", encoder[3])
    block("encoder.9", encoder[3])
    layer("encoder.10", embedding, encoder[3], last)

    def values(name, shape):
        fan_in = shape[1] * shape[2] * shape[3] if len(shape) == 4 else 1
        return (rng.standard_normal(shape) * (1.4 / fan_in**0.5 if len(shape) == 4 else 0.3)).astype(np.float32)

    return {name: values(name, shape) for name, shape in shapes.items()}


SMALL = {"embedding": 24, "decoder": (12, 10, 8, 6, 4), "encoder": (4, 6, 8, 10)}


@pytest.fixture
def write(tmp_path):
    """write(arrays) -> a path to vae-oid.npz with these arrays"""

    def write(arrays, name="vae-oid.npz"):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return write


def blob(center=(30, 34), radii=(20, 11)):
    y, x = np.mgrid[:64, :64]
    return ((((x - center[0]) / radii[0]) ** 2 + ((y - center[1]) / radii[1]) ** 2) < 1).astype(np.float32)


def test_decoder_of_official_sizes_equals_the_loops(write):
    arrays = official_arrays()
    codec = MaskCodec.load(write(arrays))
    codes = torch.randint(128, (2, 16))
    decoded = codec.decode(codes)
    assert decoded.shape == (2, 64, 64) and decoded.dtype == torch.float32
    expected = loops_decode(arrays, codes[1].tolist())
    assert expected.std() > 0.01  # not everything died in a ReLU
    np.testing.assert_allclose(decoded[1].detach(), expected, atol=1e-4)


# A 3 x 3 kernel at stride 2 is where "SAME" is not symmetric.
@pytest.mark.parametrize(("kernel", "last"), [(4, 1), (3, 1), (5, 3)])
def test_encoder_equals_the_loops(write, kernel, last):
    arrays = official_arrays(**SMALL, kernel=kernel, last=last)
    codec = MaskCodec.load(write(arrays))
    mask = blob() * np.linspace(0, 1, 64, dtype=np.float32)  # greys too
    codes = codec.encode(torch.from_numpy(mask)[None])
    assert codes.shape == (1, 16) and codes.dtype == torch.int64
    assert codes[0].tolist() == loops_encode(arrays, mask).tolist()
    assert len(codes.unique()) > 4


def test_codes_are_laid_out_row_by_row():
    codec = MaskCodec(embedding_dim=8, decoder_widths=(8, 8, 8, 8, 8))
    same = torch.zeros(1, 16, dtype=torch.int64)
    changed = same.clone()
    changed[0, 3] = 1  # the last of the first row
    difference = (codec.decode(changed) - codec.decode(same)).abs()[0]
    assert difference[:32, 32:].sum() > 0.5 * difference.sum() > 0


def test_what_is_not_a_mask_or_not_codes_is_refused():
    codec = MaskCodec(num_codes=100, embedding_dim=8)
    with pytest.raises(ValueError, match=r"\[N, 64, 64\], got \[1, 32, 32\]"):
        codec.encode(torch.zeros(1, 32, 32))
    with pytest.raises(ValueError, match=r"\[0, 1\], got 0\.\.255"):
        codec.encode(torch.eye(64)[None] * 255)
    with pytest.raises(ValueError, match="nan"):
        codec.encode(torch.full((1, 64, 64), math.nan))
    with pytest.raises(ValueError, match=r"\[N, 16\]"):
        codec.decode(torch.zeros(16, dtype=torch.int64))
    with pytest.raises(ValueError, match="integers"):
        codec.decode(torch.zeros(1, 16))
    with pytest.raises(ValueError, match=r"0\.\.99, got 0\.\.100"):
        codec.decode(torch.tensor([[100] + [0] * 15]))
    assert codec.encode(torch.eye(64, dtype=torch.bool)[None]).shape == (1, 16)
    assert codec.decode(torch.zeros(0, 16, dtype=torch.int64)).shape == (0, 64, 64)
    assert codec.encode(torch.zeros(0, 64, 64)).shape == (0, 16)


# -------------------------------------------------------------------------------------------------------------- files


def test_parameter_names_are_the_names_in_the_official_file():
    assert set(MaskCodec().state_dict()) == set(official_arrays())
    assert {k: tuple(v.shape) for k, v in MaskCodec().state_dict().items()} == {
        k: v.shape for k, v in official_arrays().items()
    }


@pytest.mark.parametrize("name", ["codec.npz", "codec.safetensors"])
def test_saved_and_loaded_is_the_same(tmp_path, name):
    codec = MaskCodec(64, 16, (4, 6, 8, 12), (10, 8, 6, 5, 4), encoder_kernels=(3, 3))
    codec.save(tmp_path / name)
    loaded = MaskCodec.load(tmp_path / name)
    assert loaded.num_codes == 64 and not loaded.training
    for key, value in codec.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    codes = torch.randint(64, (3, 16))
    assert torch.equal(loaded.decode(codes), codec.decode(codes))
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing half-written is left
    loaded.train().training_loss(torch.rand(2, 64, 64))["loss"].backward()  # can be trained further


def test_half_precision_files_are_read_as_float32(write):
    arrays = official_arrays(**SMALL)
    codec = MaskCodec.load(write({k: v.astype(np.float16) for k, v in arrays.items()}))
    assert codec._vq_vae._embedding.dtype == torch.float32


def test_loading_names_everything_that_is_wrong_at_once(write):
    arrays = official_arrays(**SMALL)
    del arrays["decoder.6.bias"]
    arrays["decoder.14.weight"] = np.zeros((1, 2), np.float32)
    arrays["encoder.8.net.2.weight"] = arrays["encoder.8.net.2.weight"][:, :, :2]
    arrays["encoder.0.bias"] = np.arange(4)
    arrays["decoder.0.bias"][3] = np.nan
    with pytest.raises(ValueError) as error:
        MaskCodec.load(write(arrays))
    for part in (
        "missing decoder.6.bias [8]",
        "unexpected decoder.14.weight [1, 2]",
        "encoder.8.net.2.weight is [10, 10, 2, 3], expected [10, 10, 3, 3]",
        "encoder.0.bias is int64, expected floating point",
        "decoder.0.bias has values that are not finite",
    ):
        assert part in str(error.value)


def test_an_unrelated_file_is_refused_with_a_reason(write, tmp_path):
    for arrays in ({}, {"x": np.zeros(3)}, {"_vq_vae._embedding": np.float32(1)}):
        with pytest.raises(ValueError, match="missing"):
            MaskCodec.load(write(arrays))
    with pytest.raises(FileNotFoundError, match="no mask codec at"):
        MaskCodec.load(tmp_path / "nowhere.npz")


def test_hostile_files_are_refused_and_run_nothing(tmp_path, write, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_here"), "w"))

    def check(name, content, reason=""):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is not a mask codec.*" + reason):
            MaskCodec.load(tmp_path / name)

    arrays = official_arrays(**SMALL)
    pickled = io.BytesIO()
    np.savez(pickled, **{**arrays, "decoder.0.bias": np.array([Bomb()], dtype=object)})
    check("pickle.npz", pickled.getvalue())
    assert not (tmp_path / "was_here").exists()

    good = write(arrays).read_bytes()
    for name, content in (
        ("empty.npz", b""),
        ("text.npz", b"not an archive"),
        ("cut.npz", good[: len(good) // 2]),
        ("flipped.npz", good[:3000] + bytes([good[3000] ^ 255]) + good[3001:]),
        ("empty.safetensors", b""),
        ("long_header.safetensors", b"\xff" * 7 + b"\x00" + b"{}"),
    ):
        check(name, content)

    odd = io.BytesIO()
    with zipfile.ZipFile(odd, "w") as archive:
        archive.writestr("../../evil.txt", "hello")
    check("odd.npz", odd.getvalue())

    monkeypatch.setattr(mask_codec, "_MAX_BYTES", 2**20)
    huge = io.BytesIO()
    np.savez_compressed(huge, a=np.zeros(2**20, np.uint8))
    assert len(huge.getvalue()) < 2**12  # it only grows when it is unpacked
    check("huge.npz", huge.getvalue(), "would unpack to 1,048,")


def test_save_refuses_other_formats(tmp_path):
    with pytest.raises(ValueError, match=r"codec\.pt"):
        MaskCodec(embedding_dim=8).save(tmp_path / "codec.pt")


class Response(io.BytesIO):
    """What urlopen gives: a body, and how long the server says it is."""

    def __init__(self, body, length=None):
        super().__init__(body)
        self.headers = {"Content-Length": str(len(body) if length is None else length)}


def test_without_a_path_the_official_file_is_fetched_once(tmp_path, write, monkeypatch, capsys):
    body = write(official_arrays(**SMALL)).read_bytes()
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return Response(body)

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert MaskCodec.load().num_codes == 128
    assert MaskCodec.load().num_codes == 128
    assert asked == [mask_codec.OFFICIAL_URL]
    assert [path.name for path in (tmp_path / "cache" / "paligemma").iterdir()] == ["vae-oid.npz"]
    assert capsys.readouterr().out == ""  # progress belongs on stderr


def test_a_broken_download_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Response(b"half", length=8))
    ways = r"Download https.* yourself to that path, or as mask_codec.npz into the folder of the checkpoint"
    with pytest.raises(OSError, match=rf"ended after 4 of 8 bytes.*{ways}"):
        MaskCodec.load()
    assert list((tmp_path / "paligemma").iterdir()) == []

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=rf"HF_HUB_OFFLINE is set.*{ways}"):
        MaskCodec.load()


# ------------------------------------------------------------------------------------------------- cropping and pasting


def test_crop_of_the_whole_picture_is_the_mask_itself():
    assert np.array_equal(crop(blob() > 0, (0, 0, 64, 64)), blob())


def test_crop_rounds_the_box_to_pixels_and_averages():
    mask = np.zeros((200, 300), bool)
    mask[50:178, 100:164] = True  # the left half of the box below
    small = crop(mask, (99.6, 50.4, 228.4, 177.6))
    assert small.shape == (64, 64) and small.dtype == np.float32
    # Two pixels become one through a triangle four pixels wide: the edge is met half-way, all else is 0 or 1.
    assert np.array_equal(small[:, :31], np.ones((64, 31))) and np.array_equal(small[:, 33:], np.zeros((64, 31)))
    np.testing.assert_allclose(small[:, 31:33], [[0.875, 0.125]] * 64, atol=1e-6)


def test_crop_of_a_tiny_box_takes_at_least_a_pixel():
    mask = np.zeros((10, 10), bool)
    mask[9, 9] = True
    for box in ((9.6, 9.6, 9.9, 9.9), (10, 10, 10, 10), (8.9, 8.9, 9.1, 9.1)):
        assert crop(mask, box).min() == 1
    assert crop(np.ones((1, 1), bool), (0.2, 0.2, 0.3, 0.3)).min() == 1
    for box in ((-5, 0, -2, 3), (math.nan, 0, 1, 1), (5, 0, 2, 5)):
        with pytest.raises(ValueError, match="box"):
            crop(mask, box)


ALL = np.ones((64, 64), np.float32)


@pytest.mark.parametrize(
    ("rule", "columns"),
    [("big_vision", (10, 20)), ("space", (11, 20))],  # int() against round()
)
def test_the_two_rules_place_a_box_differently(rule, columns):
    full = paste(ALL, (10.6, 5.0, 20.4, 9.0), (30, 12), rule)
    assert full.shape == (12, 30) and full.dtype == bool
    expected = np.zeros((12, 30), bool)
    expected[5:9, columns[0] : columns[1]] = True
    assert np.array_equal(full, expected)


def test_the_default_rule_is_that_of_the_space():
    box = (10.6, 5.0, 20.4, 9.0)
    assert np.array_equal(paste(ALL, box, (30, 12)), paste(ALL, box, (30, 12), "space"))


def test_the_cut_is_at_zero():
    ramp = np.tile(np.linspace(-1, 1, 64, dtype=np.float32), (64, 1))
    for rule in ("big_vision", "space"):
        full = paste(ramp, (0, 0, 64, 64), (64, 64), rule)
        assert np.array_equal(full, ramp > 0), rule
    # Out of [-1, 1] the Space clips before it resizes: a strong pixel cannot reach as far.
    spike = np.full((64, 64), -1, np.float32)
    spike[32, 32] = 20
    assert paste(spike, (0, 0, 256, 256), (256, 256), "big_vision").sum() > 30
    assert 8 <= paste(spike, (0, 0, 256, 256), (256, 256), "space").sum() < 30


def test_paste_enlarges_bilinearly_with_half_pixel_centres():
    mask = np.full((64, 64), -1.0, np.float32)
    mask[:, 32:] = 3.0
    # Doubled, the columns around the edge are -1, (3 * -1 + 3) / 4 = 0, (-1 + 9) / 4 = 2: zero is outside.
    full = paste(mask, (0, 0, 128, 128), (128, 128), "big_vision")
    assert np.array_equal(full[0], np.arange(128) >= 64)
    mask[:, 32:] = 3.1
    assert np.array_equal(paste(mask, (0, 0, 128, 128), (128, 128), "big_vision")[0], np.arange(128) >= 63)


def test_paste_of_what_has_no_pixels_is_empty_and_of_what_sticks_out_is_cut():
    for rule in ("big_vision", "space"):
        assert not paste(ALL, (3.1, 3.1, 3.4, 8), (10, 10), rule).any()
        assert not paste(ALL, (20, 0, 30, 5), (10, 10), rule).any()
        left_out = paste(np.where(np.arange(64) < 32, -1, 1) * ALL, (-10, 0, 10, 10), (10, 10), rule)
        assert left_out.all()  # the left half, which is not in the mask, is not in the picture either
    with pytest.raises(ValueError, match="finite"):
        paste(ALL, (0, 0, math.inf, 5), (10, 10))
    with pytest.raises(ValueError, match="rules"):
        paste(ALL, (0, 0, 5, 5), (10, 10), "nearest")
    with pytest.raises(ValueError, match=r"\[64, 64\]"):
        paste(np.ones((2, 64, 64)), (0, 0, 5, 5), (10, 10))


def test_paste_undoes_crop():
    mask = np.zeros((120, 200), bool)
    y, x = np.mgrid[:120, :200]
    mask[((x - 90) / 60) ** 2 + ((y - 70) / 33) ** 2 < 1] = True
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    for rule in ("big_vision", "space"):
        back = paste(2 * crop(mask, box) - 1, box, (200, 120), rule)
        assert (back & mask).sum() / (back | mask).sum() > 0.985, rule


# ------------------------------------------------------------------------------------------------------------ training


def blobs(n, seed):
    generator = np.random.default_rng(seed)
    masks = [blob(generator.uniform(26, 38, 2), generator.uniform(12, 30, 2)) for _ in range(n)]
    return torch.from_numpy(np.stack(masks))


def test_gradients_go_where_the_objective_sends_them():
    codec = MaskCodec(16, 8, (4, 4, 4, 4), (4, 4, 4, 4, 4))
    encoder, codebook = codec.encoder[0].weight, codec._vq_vae._embedding

    def reached(part):
        codec.zero_grad()
        codec.training_loss(blobs(4, 0))[part].backward()
        return {
            name
            for name, w in (("encoder", encoder), ("codebook", codebook), ("decoder", codec.decoder[0].weight))
            if w.grad is not None and w.grad.abs().sum() > 0
        }

    assert reached("reconstruction") == {"encoder", "decoder"}  # straight through the codebook
    assert reached("codebook") == {"codebook"}
    assert reached("commitment") == {"encoder"}
    out = codec.training_loss(blobs(4, 0), commitment=0.5)
    assert out["loss"].item() == pytest.approx(
        (out["reconstruction"] + out["codebook"] + 0.5 * out["commitment"]).item()
    )


def test_dead_codes_are_revived_from_data():
    codec = MaskCodec(32, 8, (4, 4, 8, 8), (8, 8, 8, 4, 4)).train()
    masks = blobs(32, 0)
    assert codec.revive_dead_codes(masks) == 32  # all: the start from data
    assert codec.revive_dead_codes(masks) == 0
    for _ in range(400):
        codec.usage.lerp_(torch.eye(32)[5], 0.01)  # as if nothing but code 5 were ever chosen
    before = codec._vq_vae._embedding.detach().clone()
    assert codec.revive_dead_codes(masks) == 31
    assert torch.equal(codec._vq_vae._embedding[5], before[5])
    outputs = codec.latents(masks).flatten(2).transpose(1, 2).flatten(0, 1)
    nearest = torch.cdist(codec._vq_vae._embedding, outputs).min(1).values
    assert nearest[torch.arange(32) != 5].max() < 0.2 * torch.cdist(outputs, outputs).mean()


def test_a_small_codec_learns_blobs():
    codec = MaskCodec(64, 16, (8, 8, 16, 16), (16, 16, 16, 8, 8)).train()
    optimizer = torch.optim.Adam(codec.parameters(), 1e-2)
    for step in range(80):
        masks = blobs(16, step)
        if step % 20 == 0:
            codec.revive_dead_codes(masks)
        optimizer.zero_grad()
        codec.training_loss(masks)["loss"].backward()
        optimizer.step()

    unseen = blobs(64, 10_000) > 0
    with torch.no_grad():
        codes = codec.eval().encode(unseen)
        decoded = codec.decode(codes) > 0

    def iou(mask):
        return ((mask & unseen).sum() / (mask | unseen).sum()).item()

    assert iou(unseen.float().mean(0) > 0.5) < 0.65  # the best answer without looking
    assert iou(decoded) > 0.85
    assert len(codes.unique()) > 12  # without reviving it is 6
