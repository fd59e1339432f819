"""Section 4.3: captions as frozen token embeddings (B, L, D); unet3d.py pools them by attention.

Paper: BERT-large. The default here needs no download: every word gets a fixed random vector, which tells
words apart as well as a pretrained model does on captions whose few words all occur in training, and means
nothing else.
"""
import functools
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True)
class TextConfig:
    """How captions become numbers."""
    encoder: Literal["words", "bert"] = "words"  # fixed random word vectors, or a BERT through transformers
    cond_dim: int = 64  # [0, 8192] width of a token embedding; 0 makes an unconditional model
    tokens: int = 16  # [2, 512] longest caption in tokens and one for the speed; what follows is cut off
    bert: str = "bert-large-uncased"  # name or folder of the BERT (1024 wide for the paper's BERT-large)


def embed(captions: list[str], config: TextConfig) -> Tensor:
    """The captions' frozen token embeddings, float32 (B, config.tokens, config.cond_dim); padding is zero.

    "" gives all zeros, which is c = 0. The last token is the speed's (MagicVideo, Zhou et al. 2022): a
    sinusoid of N for a caption that ends in " at N fps", else zero. Raises ValueError if the BERT is missing
    or of another width.
    """
    encode, parts = _words if config.encoder == "words" else _bert, [SPEED.fullmatch(c) for c in captions]
    return torch.stack([torch.cat([encode(p[1], config)[:-1], _wave(p[2], config.cond_dim)]) for p in parts])


SPEED = re.compile(r"(.*?)(?: at (\d{1,4}(?:\.\d*)?(?:e-\d+)?) fps)?", re.DOTALL)


def _wave(fps: str | None, dim: int) -> Tensor:
    angles = float(fps or 0) * torch.logspace(0, -4, (dim + 1) // 2)
    return torch.cat([angles.sin(), angles.cos()])[None, :dim] * (fps is not None)


def _words(caption: str, config: TextConfig) -> Tensor:
    words = re.findall(r"\w+|[^\w\s]", caption.lower())[:config.tokens]
    # half of a token says which word it is, half which word at which place: pooling alone loses the order
    half, rest = config.cond_dim // 2, config.cond_dim - config.cond_dim // 2
    halves = [torch.cat([_vector(w, half), _vector(f"{i} {w}", rest)]) for i, w in enumerate(words)]
    padding = [torch.zeros(config.cond_dim)] * (config.tokens - len(words))
    return torch.stack(halves + padding)


@functools.lru_cache(maxsize=100_000)
def _vector(word: str, dim: int) -> Tensor:
    # not hash(), which differs between runs
    seed = int.from_bytes(hashlib.sha256(word.encode(errors="surrogatepass")).digest()[:7], "big")
    return torch.randn(dim, generator=torch.Generator().manual_seed(seed))


def read_ahead(captions: Iterable[str], config: TextConfig) -> None:
    """Has the BERT read each caption once, and keeps what it says in runs/ for this run and all others, so that
    no training step waits for a BERT. Raises ValueError as embed does.
    """
    kept, path = dict(_kept(config)), _file(config)
    new = sorted({SPEED.fullmatch(caption)[1] for caption in captions} - kept.keys() - {""})
    for caption in tqdm(new, "reading captions", disable=len(new) < 100):
        kept[caption] = _read(caption, config)
    if new:
        path.parent.mkdir(exist_ok=True)
        torch.save(kept, temporary := path.with_suffix(f".{os.getpid()}"))
        temporary.replace(path)
        _kept.cache_clear()


def _file(config: TextConfig) -> Path:
    stamps = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns)
              for file in sorted(Path(config.bert).glob("*"))]  # none: a name, whose weights do not change
    return Path("runs", f"captions-{hashlib.sha256(repr((config, stamps)).encode()).hexdigest()[:16]}.pt")


@functools.cache
def _kept(config: TextConfig) -> dict[str, Tensor]:
    try:
        return torch.load(_file(config), mmap=True, weights_only=True)
    except Exception:  # there is none, or it is damaged: it is made anew
        return {}


def _bert(caption: str, config: TextConfig) -> Tensor:
    if not caption.strip():
        return torch.zeros(config.tokens, config.cond_dim)
    hidden = _kept(config)[caption] if caption in _kept(config) else _read(caption, config)
    return torch.cat([hidden, hidden.new_zeros(config.tokens - len(hidden), config.cond_dim)])


@functools.lru_cache(maxsize=4096)
def _read(caption: str, config: TextConfig) -> Tensor:
    tokenizer, model = _load_bert(config.bert)
    if model.config.hidden_size != config.cond_dim:
        raise ValueError(f"--cond_dim is {config.cond_dim}, and the BERT {model.config.hidden_size} wide")
    longest = max(2, min(config.tokens, model.config.max_position_embeddings))  # 2: its own first and last
    batch = tokenizer(caption, truncation=True, max_length=longest, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).last_hidden_state[0, :config.tokens].clone()


@functools.cache
def _load_bert(name: str) -> tuple:
    try:
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(name).eval().requires_grad_(False)
        return AutoTokenizer.from_pretrained(name), model
    except Exception as error:  # transformers raises whatever its back end does
        remedy = "; pip install transformers" * isinstance(error, ImportError)
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"--encoder bert: {name} could not be loaded: {reason}{remedy}") from None
