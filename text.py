"""Section 4.3: captions as frozen token embeddings (B, L, D); unet3d.py pools them by attention.

Paper: BERT-large. The default here needs no download: every word gets a fixed random vector, which tells
words apart as well as a pretrained model does on captions whose few words all occur in training, and means
nothing else.
"""
import hashlib
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import torch
from torch import Tensor


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
    encode = _words if config.encoder == "words" else _bert
    embedded = torch.zeros(len(captions), config.tokens, config.cond_dim)
    for tokens, caption in zip(embedded, captions):
        words, fps = SPEED.fullmatch(caption).groups()
        vectors = encode(words, config)[:config.tokens - 1]
        tokens[:len(vectors)] = vectors
        if fps is not None:
            tokens[-1] = _wave(float(fps), config.cond_dim)
    return embedded


SPEED = re.compile(r"(.*?)(?: at (\d{1,4}(?:\.\d*)?(?:e-\d+)?) fps)?", re.DOTALL)  # 1e-05: as :g writes it


def _wave(fps, dim):
    angles = fps * torch.logspace(0, -4, (dim + 1) // 2)
    return torch.cat([angles.sin(), angles.cos()])[:dim]


@lru_cache(maxsize=8192)
def _words(caption, config):
    words = re.findall(r"\w+|[^\w\s]", caption.lower())[:config.tokens]
    vectors = torch.empty(len(words), config.cond_dim)
    # Half of a token says which word it is, half which word at which place: pooling alone loses the order.
    half = config.cond_dim // 2
    for i, word in enumerate(words):
        vectors[i, :half] = _vector(word, half)
        vectors[i, half:] = _vector(f"{i} {word}", config.cond_dim - half)
    return vectors


@lru_cache(maxsize=100_000)
def _vector(word, dim):
    # Not hash(), which differs between runs.
    seed = int.from_bytes(hashlib.sha256(word.encode(errors="surrogatepass")).digest()[3:7], "big")
    return torch.randn(dim, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=4096)
def _bert(caption, config):
    if not caption.strip():
        return torch.zeros(0, config.cond_dim)
    tokenizer, model = _load_bert(config.bert)
    if model.config.hidden_size != config.cond_dim:
        raise ValueError(f"--cond_dim is {config.cond_dim}, and the BERT {model.config.hidden_size} wide")
    longest = min(config.tokens, model.config.max_position_embeddings)
    batch = tokenizer(caption, truncation=True, max_length=longest, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).last_hidden_state[0]


@cache
def _load_bert(name):
    try:
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(name).eval().requires_grad_(False)
        return AutoTokenizer.from_pretrained(name), model
    except Exception as error:  # transformers raises whatever its back end does
        reason = (str(error) or repr(error)).splitlines()[0]
        if isinstance(error, ImportError):
            reason = f"{reason}; pip install transformers"
        raise ValueError(f"--encoder bert: {name} could not be loaded: {reason}") from None


def condition(captions: list[list[str]], config: TextConfig, device: torch.device) -> Tensor | None:
    """Embeddings (B, 1 + num_images, tokens, cond_dim) of nested captions; None without a condition."""
    if not config.cond_dim:
        return None
    rows = [embed(clip, config) for clip in captions]
    return torch.stack(rows).to(device)
