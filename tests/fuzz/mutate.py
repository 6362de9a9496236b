"""Broken copies of valid inputs: bytes, JSON and text, changed at random but repeatably."""

import io
import json
import struct
import zipfile
from random import Random
from typing import Any

import numpy as np

# Values that programs stumble over, put in place of any value in a JSON document.
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.5, 1e-300, 1e308, float("nan"),
    float("inf"), "", " ", "0", "a", "a" * 5000,
    "../../etc/passwd", "/dev/zero", "\x00", "\x1b[31m", "\ud83d", "<image>",
    "<loc0000>", "<seg001>", "float16", [], [[]], {}, [None], [1, 2, 3, 4], [-1, 0, 1e9, 2], {"a": 1}, ["a"] * 1000,
]  # fmt: skip
TEXTS = [
    "", " ", "\n", "\t", "\x00", "\x1b[2J", "\r", "é", "猫", "👩‍🚀", "\u202e", "\ufeff",
    "detect ", "segment ", " ; ", ";", ",",
    "caption en", "answer en ", "<image>", "<bos>", "<eos>", "<pad>", "<loc0000>", "<loc1023>", "<loc9999>", "<seg000>",
    "<seg127>", "<seg999>", "<", ">", "▁", "dog", "a" * 300, "0", "-1", "%s", "{}", "$(x)", "../", "--", "-",
]  # fmt: skip


def of_bytes(random: Random, data: bytes) -> bytes:
    """Bits turned, pieces lost, doubled, moved or overwritten; the end missing."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 4, 16])):
        at = random.randrange(len(changed) + 1)
        size = random.choice([1, 2, 4, 8, 64, 1000])
        match random.randrange(7):
            case 0 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 1:
                changed[at : at + size] = random.randbytes(size)
            case 2:
                del changed[at : at + size]
            case 3:
                changed[at:at] = changed[at : at + size]
            case 4:
                del changed[at:]
            case 5:
                number = random.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1])
                width = random.choice([w for w in (1, 2, 4, 8) if number < 256**w])
                changed[at : at + width] = number.to_bytes(width, random.choice(["little", "big"]))
            case _:
                other = random.randrange(len(changed) + 1)
                changed[at : at + size] = changed[other : other + size]
    return bytes(changed)


def of_value(random: Random, value: Any) -> Any:
    """The same JSON document with one to four values replaced, removed, renamed, doubled or nested."""
    for _ in range(random.choice([1, 1, 2, 4])):
        value = _once(random, value)
    return value


def _once(random: Random, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or random.random() < 0.1:
        match random.randrange(8):
            case 0 if isinstance(value, str):
                return of_text(random, value)
            case 1 if isinstance(value, int | float):
                return value * random.choice([-1, 0, 2, 0.5, 1000, 2**40])
            case 2:
                return [value] * random.choice([1, 2, 50])
            case 3:
                return json.loads("[" * 500 + "]" * 500)
            case _:
                return random.choice(HOSTILE)
    if isinstance(value, list):
        at = random.randrange(len(value))
        match random.randrange(6):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, value[at]]
            case _:
                return [*value[:at], _once(random, value[at]), *value[at + 1 :]]
    key = random.choice(list(value))
    rest = {name: inner for name, inner in value.items() if name != key}
    match random.randrange(6):
        case 0:
            return rest
        case 1:
            return {**rest, of_text(random, key): value[key]}
        case _:
            return {**value, key: _once(random, value[key])}


def of_text(random: Random, text: str) -> str:
    for _ in range(random.choice([1, 1, 2, 5])):
        at = random.randrange(len(text) + 1)
        match random.randrange(4):
            case 0:
                text = text[:at] + text[at + random.choice([1, 5, 50]) :]
            case 1:
                text = text[:at] + text[: random.choice([1, 10, 100])] + text[at:]
            case _:
                text = text[:at] + random.choice(TEXTS) + text[at:]
    return text


def of_json(random: Random, data: bytes) -> bytes:
    """A JSON document (or one on each line) that mostly still is one."""
    if random.random() < 0.25:
        return of_bytes(random, data)
    lines = data.splitlines() if data.count(b"\n{") else [data]
    at = random.randrange(len(lines))
    lines[at] = json.dumps(of_value(random, json.loads(lines[at]))).encode()
    return b"\n".join(lines)


def of_safetensors(random: Random, data: bytes) -> bytes:
    """Mostly the header is changed, and its length kept right."""
    if random.random() < 0.4:
        return of_bytes(random, data)
    (size,) = struct.unpack("<Q", data[:8])
    header = of_json(random, data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def of_array(random: Random, array: np.ndarray) -> np.ndarray:
    """An array that is written right and means something else: other values, another dtype, another shape."""
    match random.randrange(8):
        case 0:  # values that arithmetic stumbles over
            value = random.choice([np.nan, np.inf, -np.inf, 0.0, 1e38, -1e38, 1e-45])
            return np.full_like(array, value) if random.random() < 0.3 else np.where(array > 0, value, array)
        case 1:  # one of them
            array = np.array(array)
            array.reshape(-1)[random.randrange(array.size)] = random.choice([np.nan, np.inf, 3e38])
            return array
        case 2:  # the same bytes as other numbers, or the same numbers as other bytes
            kind = random.choice(
                ["<i4", ">f4", "<u4", "<f2", "<f8", "|u1", "<c8", "|b1", "<i8", "|S4", "<M8[s]", "<U1"]
            )
            return array.view(kind) if random.random() < 0.5 and array.ndim else array.astype("f4").astype(kind)
        case 3:  # the same size in another shape
            return array.T if random.random() < 0.5 else array.reshape(-1)
        case 4:  # one axis longer or shorter
            axis = random.randrange(max(array.ndim, 1))
            return np.repeat(array, 2, axis) if random.random() < 0.5 else array[(slice(None),) * axis + (slice(1),)]
        case 5:
            return array[None] if random.random() < 0.5 else array.reshape(*array.shape, 1, 1)
        case 6:
            return np.zeros(random.choice([(), (0,), (1,), (0, 3), (1,) * 30]), array.dtype)
        case _:  # the values in the other order of axes: a flag in the header
            return np.asfortranarray(array)


def of_zip(random: Random, data: bytes) -> bytes:
    """An .npz: mostly one member is changed, and the archive around it kept right."""
    if random.random() < 0.15:
        return of_bytes(random, data)
    archive = zipfile.ZipFile(io.BytesIO(data))
    members = {name: archive.read(name) for name in archive.namelist()}
    name, other = random.choice(list(members)), random.choice(list(members))
    content = members.pop(name)
    match random.randrange(8):
        case 0:  # its header
            members[name] = of_bytes(random, content[:128]) + content[128:]
        case 1:
            members[of_text(random, name) or "a"] = content
        case 2:  # two members have changed places
            members[name] = members.get(other, content)
            members[other] = content
        case 3 if random.random() < 0.3:
            pass  # it is missing
        case _:
            changed, array = io.BytesIO(), np.load(io.BytesIO(content))
            try:
                array = of_array(random, array)
            except (ValueError, TypeError, IndexError):  # these numbers are not to be had as those
                array = array.reshape(-1)
            np.save(changed, array)
            members[name] = changed.getvalue()
    out = io.BytesIO()
    packing = random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(out, "w", packing) as changed:
        for name, content in members.items():
            changed.writestr(name, content)
    return out.getvalue()


def of_file(random: Random, name: str, data: bytes) -> bytes:
    suffix = name.rpartition(".")[2]
    if suffix in ("json", "jsonl"):
        return of_json(random, data)
    if suffix == "safetensors":
        return of_safetensors(random, data)
    if suffix == "npz":
        return of_zip(random, data)
    if suffix in ("csv", "xml", "yaml", "txt") and random.random() < 0.5:
        return of_text(random, data.decode()).encode("utf-8", "surrogatepass")
    return of_bytes(random, data)
