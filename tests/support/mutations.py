"""Files made wrong, in all ways that come to mind: bytes, JSON, safetensors, and what a file is at all.

Everything is drawn from a ``random.Random``, so that a seed gives the same file again.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

__all__ = ["NAMES", "change_bytes", "change_json", "change_kind", "change_safetensors", "change_text"]

# What a tensor, a file or a module may be called by someone who means no good.
NAMES = (
    *(
        "",
        ".",
        "..",
        "/",
        "../escape.weight",
        "../../escape.safetensors",
        "/tmp/escape.weight",
        "a/b/c.weight",
    ),
    *(
        "~/escape.weight",
        "con.weight",
        "__metadata__",
        "-rf.weight",
        "*.weight",
        "[a].weight",
        "%s{0}.weight",
    ),
    *(
        "a\nnmsolve: all is well.weight",
        "a\r\x1b[2K.weight",
        "\x00.weight",
        "\u202etxt.weight",
        "ä\ud800.weight",
    ),
    *("x" * 300 + ".weight", ".weight", "weight", "masks", "nmsolve_report.json", ".out.weight", "k" * 5000),
)

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**53, 2**63 - 1, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "0", "a", [], {}, [[]], [None], {"a": None}, [1] * 70, ["2:4"], *NAMES),
)


def change_bytes(random: Random, data: bytes) -> bytes:
    """Some bytes other, more or fewer."""
    some = bytearray(data)
    at = random.randrange(len(some) + 1)
    match random.randrange(8):
        case 0:
            for _ in range(random.choice((1, 1, 4, 64))):
                if some:
                    some[random.randrange(len(some))] = random.randrange(256)
        case 1:
            del some[at:]
        case 2:
            some += random.randbytes(random.choice((1, 7, 8, 1000)))
        case 3:
            some[at:at] = random.randbytes(random.choice((1, 4, 100)))
        case 4:
            del some[at : at + random.choice((1, 8, 100))]
        case 5:
            some[at : at + 8] = random.choice((b"\x00", b"\xff", b"\x80")) * 8
        case 6:
            some[at:at] = random.choice(
                (b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[2K\r\n")
            )
        case 7:
            some = bytearray()
    return bytes(some)


def change_json(random: Random, value: Any, times: int = 1) -> Any:
    """The value with something in it replaced, renamed, left out or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(times):
        places = list(_places(value))
        if not places or random.random() < 0.03:
            value = random.choice(_VALUES)
            continue
        inside, key = random.choice(places)
        match random.randrange(6):
            case 0 | 1 | 2:
                inside[key] = random.choice(_VALUES)
            case 3 if isinstance(inside, dict):
                inside[random.choice(NAMES)] = inside.pop(key)
            case 4:
                other, at = random.choice(places)
                inside[key] = (
                    json.loads(json.dumps(other[at])) if at in other or isinstance(other, list) else 0
                )
            case _:
                del inside[key]
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found.append((value, key))
            found += _places(inner)
    return found


def change_text(random: Random, text: bytes) -> bytes:
    """JSON that is spelled in a way that few expect, or is none."""
    match random.randrange(8):
        case 0:
            depth = random.choice((100, 900, 20_000))
            return b"[" * depth + (b"]" * depth if random.random() < 0.5 else b"")
        case 1:
            depth = random.choice((100, 300, 900))
            return b'{"a":' * depth + text + b"}" * depth
        case 2:
            return text.replace(b":", random.choice((b":" + b"9" * 5000 + b",", b"::", b"=", b":-")), 1)
        case 3:
            return text.decode("utf-8").encode(random.choice(("utf-16", "utf-32", "utf-8-sig")))
        case 4:
            return b" " * random.choice((7, 100_000)) + text
        case 5:
            middle = text.find(b",") + 1
            return text[:middle] + text[1:middle] + text[middle:]  # the first keys again
        case 6:
            return random.choice((b"NaN", b"null", b"[]", b"{}", b'""', b"-1", b"1e999", b"\x00", b"# no"))
        case _:
            return change_bytes(random, text)


def change_safetensors(random: Random, data: bytes) -> bytes:
    """A safetensors file with another length, header or contents."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry = header[name]
    match random.randrange(14):
        case 0:
            wrong = (
                0,
                1,
                length - 1,
                length + 8,
                len(data),
                99_000_000,
                101_000_000,
                2**31,
                2**63,
                2**64 - 1,
            )
            return struct.pack("<Q", random.choice(wrong)) + data[8:]
        case 1:
            return change_bytes(random, data)
        case 2:
            text = change_text(random, data[8 : 8 + length])
            return struct.pack("<Q", len(text)) + text + body
        case 3:
            header = change_json(random, header, random.choice((1, 1, 2, 5)))
        case 4:
            header = {(random.choice(NAMES) if key == name else key): value for key, value in header.items()}
        case 5:
            new = {key: f"{random.choice(NAMES)}{number}.weight" for number, key in enumerate(names)}
            header = {new.get(key, key): value for key, value in header.items()}
        case 6:
            entry["dtype"] = random.choice(
                ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", 32, None)
            )
        case 7:
            entry["shape"] = random.choice(
                (
                    [],
                    [0],
                    [0, 16],
                    [16, 0],
                    [-1, 16],
                    [2**32, 2**32],
                    [1] * 65,
                    [1.0, 2.0],
                    [2**63],
                    "16",
                    None,
                )
            )
        case 8:
            start, stop = entry["data_offsets"]
            entry["data_offsets"] = random.choice(
                (
                    *([start, stop + 4], [start + 4, stop], [stop, start], [-4, stop], [0, 2**63], [start]),
                    *([0, len(body)], [start, start], [2**64, 2**64 + 4], [0.0, 4.0], ["0", "4"], None),
                )
            )
        case 9:
            other = header[random.choice(names)]
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        case 10:
            header["__metadata__"] = random.choice(
                ({}, None, [], {"a": 1}, {"format": "tf"}, {"a": None}, {"": "x" * 10_000}, "pt")
            )
        case 11:
            worst = random.choice(
                (b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f", b"\x01\0\0\0")
            )
            at = random.randrange(0, max(4, len(body) - 4), 4)
            count = random.choice((1, 1, len(body) // 4))
            body = (body[: at if count == 1 else 0] + worst * count + body[at + 4 :])[: len(body)]
        case 12:
            shape = random.choice(([0], [0, 16], [16, 0, 4]))
            empty = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body)]}
            header |= {f"e{k}.weight": empty for k in range(random.choice((1, 3000)))}
        case 13:
            places = [entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"]
            header["hole"] = {"dtype": "U8", "shape": [3], "data_offsets": [len(body), len(body) + 3]}
            body += b"abc" * random.choice((1, 2)) if places else b""
    text = json.dumps(header, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def change_kind(random: Random, path: Path) -> None:
    """In place of the file something that has its name."""
    elsewhere: tuple[Callable[[], object], ...] = (
        path.mkdir,
        lambda: path.symlink_to(path.name),  # a link to itself
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to("/dev/null"),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/etc/hostname"),
        lambda: path.symlink_to("."),
        lambda: path.symlink_to(".."),
        lambda: path.write_bytes(b""),
        lambda: os.mkfifo(path),
        lambda: None,
    )
    path.unlink()
    random.choice(elsewhere)()
