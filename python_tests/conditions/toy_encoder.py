"""A text encoder without a network: numbers drawn from each text's hash; and a program that builds a table with it.

`python toy_encoder.py FOLDER COUNT DELAY LOG` begins when it is given a line.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyard.conditions import Encoded, PromptLine, PromptTable, read_prompts

WIDTH, POOLED_WIDTH = 6, 3
SIZES: dict = dict(batch_size=4, shard_size=8, progress=False)

LINES = read_prompts(["a b", "c", PromptLine("a b", "bad"), PromptLine("x y z", "c"), PromptLine("c", "")])
TEXTS = ["a b", "", "c", "bad", "x y z"]


class ToyEncoder:
    """One token a word and one that ends the text; longer texts than `limit` tokens are cut.

    Args:
        limit: tokens of a text.
        pooled: whether there is a pooled embedding.
        delay: seconds for each batch.
        log: a file that gets a line for each text that is encoded.
    """

    def __init__(
        self, limit: int = 8, *, pooled: bool = True, delay: float = 0.0, log: Path | None = None, name: str = "toy"
    ) -> None:
        self.limit, self.pooled, self.delay, self.log = limit, pooled, delay, log
        self.fingerprint = f"{name}-{limit}"
        self.encoded: list[str] = []
        self.freed = 0

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        time.sleep(self.delay)
        self.encoded += texts
        if self.log is not None:
            with self.log.open("a") as file:
                file.write("".join(f"{text}\n" for text in texts))
        return [self.one(text) for text in texts]

    def one(self, text: str) -> Encoded:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        generator = torch.Generator().manual_seed(seed)
        length = len(text.split()) + 1
        tensors = {"tokens": torch.randn(min(length, self.limit), WIDTH, generator=generator)}
        if self.pooled:
            tensors["pooled"] = torch.randn(POOLED_WIDTH, generator=generator)
        return Encoded(tensors, cut=length > self.limit)

    def free(self) -> None:
        self.freed += 1


def build(folder: Path, lines: list[PromptLine] = LINES, encoder: ToyEncoder | None = None, **settings: Any) -> PromptTable:
    """A table of small shards."""
    return PromptTable.build(encoder or ToyEncoder(), lines, folder, **{**SIZES, **settings})


def many_lines(count: int) -> list[PromptLine]:
    """Distinct prompts of 1 to 6 words, each third with a negative prompt, of which there are two."""
    return [PromptLine(f"scene {i}" + " red" * (i % 5), ("blurry", "dark", None)[i % 3]) for i in range(count)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a table by name, but for the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


if __name__ == "__main__":
    encoder = ToyEncoder(delay=float(sys.argv[3]), log=Path(sys.argv[4]))
    print("ready", flush=True)
    sys.stdin.readline()
    PromptTable.build(encoder, many_lines(int(sys.argv[2])), sys.argv[1], **SIZES)
