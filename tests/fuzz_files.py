"""Feeds damaged and malicious files to the readers: `python tests/fuzz_files.py FILES [SEED]`.

A reader may refuse a file with InputError, and then leaves the network as it was, or take it; any
other exception is a finding and ends the run. Files are damaged as bytes (flips, cuts, splices),
and, with a checksum that fits, in their content: keys removed, values of other types and shapes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alq import quantize, restore
from alq.command.info import info_text, inspect
from alq.errors import InputError
from alq.files import checkpoint, packed, small

ODD = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 2**70, 0.5, float("nan"), float("inf"), "", "x",
    "subchannelwise", [], [1], [-1, 2], {}, {"x": 1}, torch.zeros(0), torch.zeros(3),
    torch.ones(2, 3, dtype=torch.bool), torch.zeros(4, 2, dtype=torch.uint8), torch.tensor(5),
    torch.full((2, 2), torch.nan),
]  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6)
    )


def seeds(folder: Path) -> tuple[dict, bytes, bytes]:
    """(content of a checkpoint, bytes of a packed file, of a coded one) of a small network."""
    model = network()
    weights = quantize(model, max_bit=3)
    packed.save_packed(folder / "seed.alq", model, weights)
    packed.save_packed(folder / "coded.alq", model, weights, coded=True)
    content = {
        "net": "small",
        "stage": "alq",
        "finished": True,
        "flags": {"seed": 0},
        "model": model.state_dict(),
        "weights": [weight.state_dict() for weight in weights],
    }
    header = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION}
    files = [(folder / name).read_bytes() for name in ("seed.alq", "coded.alq")]
    return {**header, **content}, *files


def damage(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut out, doubled or appended."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + chance.randrange(1, 64)]
        elif kind == 3:
            data[at:at] = chance.randbytes(chance.randrange(1, 64))
        elif at < len(data):
            data[at : at + 8] = chance.choice([b"\0" * 8, b"\xff" * 8, chance.randbytes(8)])
    return bytes(data)


def distort(value: object, chance: random.Random) -> object:
    """Nested dicts and lists with one entry gone, doubled or replaced, somewhere."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.9:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        what = chance.random()
        if what < 0.15:
            del value[key]
        elif what < 0.25 and isinstance(value, list):
            value.append(copy.deepcopy(value[key]))
        else:
            value[key] = distort(value[key], chance)
        return value
    if isinstance(value, torch.Tensor) and chance.random() < 0.6:
        change = chance.choice(["type", "shape", "values"])
        if change == "type":
            return value.to(chance.choice([torch.float64, torch.int64, torch.bool, torch.uint8]))
        if change == "shape":
            return value.flatten()[: chance.randrange(value.numel() + 1)]
        return torch.full_like(value, chance.choice([0, 1, 255, 2]))
    return copy.deepcopy(chance.choice(ODD))


def recontained(data: bytes, chance: random.Random) -> bytes:
    """A packed file with distorted content, sealed again."""
    tensors = dict(safetensors.torch.load(data))
    names = packed.inflate_json(tensors["names"])
    if chance.random() < 0.7:
        with contextlib.suppress(TypeError, ValueError):  # a tensor among the names is no JSON
            tensors["names"] = packed.deflate_json(distort(names, chance))
    else:
        name = chance.choice(list(tensors))
        changed = distort(tensors[name], chance)
        if isinstance(changed, torch.Tensor):
            tensors[name] = changed.contiguous().clone()
        else:
            del tensors[name]
    return packed.encode_container(tensors)


def reencoded(data: bytes, chance: random.Random) -> bytes:
    """A coded packed file with names distorted, or what is behind them damaged, sealed again."""
    header, body = small.open_small(data)
    names = small.deflate(header)
    if chance.random() < 0.6:
        with contextlib.suppress(TypeError, ValueError):  # a tensor among the names is no JSON
            names = small.deflate(distort(json.loads(json.dumps(header)), chance))
    else:
        body = damage(body, chance)
    return data[:4] + small.checksum(names + body) + names + body


def read(path: Path) -> str:
    """All readers on one file; "taken" or "refused"."""
    model, taken = network(), False

    def from_checkpoint() -> None:
        content = checkpoint.load_checkpoint(path, "small")
        weights = checkpoint.weights_in(content, str(path))
        checkpoint.load_model(model, content["model"], str(path))
        restore(model, weights)

    readers = (
        from_checkpoint,
        lambda: packed.load_packed(path, model),
        lambda: info_text(inspect(path)),
    )
    for reader in readers:
        before = copy.deepcopy(model.state_dict())
        try:
            reader()
            taken = True
        except InputError as error:
            assert "\n" not in str(error), error
            if reader is readers[1]:
                for key, value in model.state_dict().items():
                    assert torch.equal(value, before[key]), f"{key} was changed: {error}"
    return "taken" if taken else "refused"


def fuzz(files: int, seed: int, folder: Path) -> Counter:
    """So many files; the outcomes counted."""
    chance, found = random.Random(seed), Counter()
    content, plain, coded = seeds(folder)
    whole = checkpoint.encode_checkpoint(content)
    path = folder / "file"
    while sum(found.values()) < files:
        kind = chance.choice(["bytes", "bytes", "content", "packed content", "coded content"])
        if kind == "bytes":
            data = damage(original := chance.choice([whole, plain, coded]), chance)
            if data == original:
                continue
        elif kind == "content":
            data = checkpoint.encode_checkpoint(distort(copy.deepcopy(content), chance))
        elif kind == "packed content":
            data = recontained(plain, chance)
        else:
            data = reencoded(coded, chance)
        path.write_bytes(data)
        try:
            found[f"{kind}: {(outcome := read(path))}"] += 1
            assert outcome == "refused" or kind != "bytes", "damaged bytes were taken"
        except BaseException:
            kept = Path(tempfile.gettempdir()) / f"finding_{seed}_{sum(found.values())}"
            kept.write_bytes(data)
            print(f"finding: {kept} ({kind})", file=sys.stderr)
            raise
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
        print(dict(fuzz(int(sys.argv[1]), seed, Path(temporary))))
