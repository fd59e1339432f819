"""Captions as frozen token embeddings: the words by hand, and a tiny BERT made on the spot."""
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import text
from text import TextConfig, embed

WORDS = TextConfig(cond_dim=12, tokens=6)


def one(caption: str, config: TextConfig = WORDS) -> Tensor:
    return embed([caption], config)[0]


def used(tokens: Tensor) -> int:
    """The number of tokens before the padding, which must be zero and at the end."""
    present = (tokens != 0).any(-1).tolist()
    assert present == sorted(present, reverse=True)
    return sum(present)


# ---- words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cond_dim", [0, 1, 7, 64])
def test_captions_become_tokens_of_the_asked_number_and_width(cond_dim):
    out = embed(["three moves left", "", "7"], TextConfig(cond_dim=cond_dim, tokens=5))
    assert out.shape == (3, 5, cond_dim) and out.dtype == torch.float32 and not out.requires_grad


def test_no_caption_is_zeros():
    for empty in ("", " ", "\t \n"):
        assert torch.equal(one(empty), torch.zeros(6, 12))


def test_every_word_and_every_punctuation_mark_is_a_token():
    assert used(one("three moves left")) == 3 and used(one("three, moves!")) == 4


def test_a_caption_does_not_depend_on_the_others_in_its_batch():
    assert torch.equal(embed(["three left", "a b c d"], WORDS)[0], one("three left"))


def test_case_and_spaces_do_not_matter():
    assert torch.equal(one("Three MOVES\tleft "), one("three moves left"))


def test_the_same_word_has_the_same_vector_wherever_it_stands():
    first, second = one("left three"), one("three left")
    half = WORDS.cond_dim // 2
    assert (torch.equal(first[1, :half], second[0, :half])
            and torch.equal(one("left left")[0, :half], first[0, :half]))
    assert torch.equal(one("left right")[0], one("left three")[0])


def test_different_words_have_different_vectors():
    words = "zero one two three four five six seven eight nine left right up down".split()
    vectors = torch.stack([one(word, TextConfig())[0] for word in words])
    similar = torch.nn.functional.normalize(vectors).mm(torch.nn.functional.normalize(vectors).T)
    assert (similar - torch.eye(len(words))).abs().max() < 0.6


def test_the_order_of_the_words_matters_also_to_what_pooling_leaves():
    assert not torch.allclose(one("three then four").sum(0), one("four then three").sum(0), atol=1e-3)


def test_a_long_caption_is_cut():
    # the last token is the speed's
    assert torch.equal(one("a b c d e f g h i"), one("a b c d e")) and used(one("a b c d e f g")) == 5


@pytest.mark.parametrize("caption", ["Ünïcodé 球が動く", "👋🏽 hello", "a\x00b", "é" * 5000, "\udcff"])
def test_any_caption_has_an_embedding(caption):
    out = one(caption)
    assert out.isfinite().all() and used(out) >= 1


@pytest.mark.slow
def test_another_process_with_another_hash_seed_makes_the_same_embedding():
    code = ("from text import TextConfig, embed\n"
            "print(embed(['Three moves, left \u00e9'], TextConfig(cond_dim=12, tokens=6)).double().tolist())")
    other = {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(text.__file__).parent, text=True, check=True,
                         capture_output=True, env=os.environ | other).stdout
    assert out == f"{one('Three moves, left é').double()[None].tolist()}\n"


def test_the_callers_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    one("a word nobody has asked for before")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_returned_embedding_may_be_overwritten():
    expected = one("three left").clone()
    one("three left").zero_()
    assert torch.equal(one("three left"), expected)


# ---- BERT --------------------------------------------------------------------------------------------------


def one_sentence(error: pytest.ExceptionInfo, *parts: str) -> bool:
    message = str(error.value)
    return "\n" not in message and all(part in message for part in parts)


def test_without_transformers_bert_is_one_sentence(monkeypatch):
    text._load_bert.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError) as error:
        one("a red ball", TextConfig(encoder="bert", cond_dim=1024))
    assert one_sentence(error, "--encoder bert", "pip install transformers")


def test_no_caption_needs_no_bert(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert torch.equal(one("", TextConfig(encoder="bert", cond_dim=3, tokens=2)), torch.zeros(2, 3))


def test_words_need_no_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert used(one("red ball")) == 2


@pytest.mark.parametrize("failure", [RuntimeError("no\nsuch model"), OSError("")])
def test_a_bert_that_cannot_be_loaded_is_one_sentence(failure, monkeypatch):
    class Broken:
        @staticmethod
        def from_pretrained(name):
            raise failure
    text._load_bert.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoModel=Broken, AutoTokenizer=Broken))
    with pytest.raises(ValueError) as error:
        one("a red ball", TextConfig(encoder="bert", bert="some-bert"))
    assert one_sentence(error, "some-bert could not be loaded")


VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] a the red blue ball moves left right , 3".split()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a BERT with random weights, 16 wide."""
    transformers, folder = pytest.importorskip("transformers"), tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    transformers.BertModel(
        transformers.BertConfig(vocab_size=len(VOCABULARY), **sizes)).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def bert_config(folder: str, **changes) -> TextConfig:
    return TextConfig(**dict(encoder="bert", bert=folder, cond_dim=16, tokens=8) | changes)


def test_a_bert_gives_its_last_hidden_states(bert):
    from transformers import BertModel
    out = embed(["the red ball", ""], bert_config(bert))
    ids = torch.tensor([[VOCABULARY.index(token) for token in "[CLS] the red ball [SEP]".split()]])
    expected = BertModel.from_pretrained(bert).eval()(ids).last_hidden_state[0]
    assert out.shape == (2, 8, 16) and used(out[0]) == 5 and not out.requires_grad
    assert torch.allclose(out[0, :5], expected, atol=1e-5) and torch.equal(out[1], torch.zeros(8, 16))


def test_a_bert_is_frozen_and_deterministic(bert):
    _, model = text._load_bert(bert)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    first = one("the red ball", bert_config(bert))
    text._bert.cache_clear()
    assert torch.equal(one("the red ball", bert_config(bert)), first)


@pytest.mark.parametrize("tokens", [2, 3, 512])
def test_a_bert_cuts_long_captions(bert, tokens):
    assert used(one("the red ball moves left " * 200, bert_config(bert, tokens=tokens))) == tokens - 1


def test_a_bert_of_another_width_is_one_sentence(bert):
    with pytest.raises(ValueError) as error:
        one("the red ball", bert_config(bert, cond_dim=12))
    assert one_sentence(error, "16", "--cond_dim", "12")


def test_a_folder_without_a_bert_is_one_sentence(bert, tmp_path):
    with pytest.raises(ValueError) as error:
        one("the red ball", bert_config(str(tmp_path)))
    assert one_sentence(error, str(tmp_path))
