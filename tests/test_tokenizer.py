"""Token rows of real names under CLIP's own vocabulary, as Stable Diffusion's tokenizers have it."""

import gzip

import pytest
from transformers import CLIPTokenizer

from erasekit import tokens
from erasekit.concepts import content_ids, eot_position, slot_token, subject_span, token_ids
from erasekit.paths import DATA

NAMES = [
    "Van Gogh", "Vincent van Gogh", "Brad Pitt", "Kelly McKernan", "Thomas Kinkade", "parachute", "tench",
    "garbage truck", "English springer", "Jean-Luc Picard", "Conan O'Brien", "R2-D2", "e.e. cummings",
    "Zdzisław Beksiński", "rock 'n' roll", "Björk", "AC/DC",
]  # fmt: skip
START, END = 49406, 49407


def clip_tokenizer(**settings) -> CLIPTokenizer:
    """From the merges that OpenAI published: bytes, bytes that end a word, merges, start, end (Radford et al. 2021)."""
    text = gzip.decompress((DATA / "clip" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [tuple(line.split()) for line in text.split("\n")[1 : 49152 - 256 - 2 + 1]]
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printed] + [chr(256 + i) for i in range(256 - len(printed))]
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    vocab = {token: i for i, token in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, **settings)


@pytest.fixture(scope="module")
def clip_l():
    """Of Stable Diffusion 1 and 2, and of SDXL's first encoder: padded with the end token."""
    return clip_tokenizer()


@pytest.fixture(scope="module")
def clip_g():
    """Of SDXL's second encoder: padded with "!", which is token 0."""
    return clip_tokenizer(pad_token="!")


def test_ids_are_those_of_clip(clip_l):
    """Ids that anyone who has used CLIP has seen."""
    assert len(clip_l) == 49408
    assert content_ids(clip_l, "a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert content_ids(clip_l, "hello world") == [3306, 1002]
    ids = token_ids(clip_l, ["a photo of a cat"])[0].tolist()
    assert ids[0] == START and ids[6:] == [END] * 71


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("template", ["{}", "a photo of {}", "a painting by {}, 1890", "{}'s house at night"])
def test_the_slot_ends_at_the_last_token_of_the_name(clip_l, clip_g, name, template):
    squeezed = lambda text: "".join(text.lower().split())
    for tokenizer in (clip_l, clip_g):
        last = slot_token(tokenizer, template, name)
        ids = token_ids(tokenizer, [template.format(name)])[0].tolist()
        first = 1 + len(content_ids(tokenizer, template.partition("{}")[0]))
        assert squeezed(tokenizer.decode(ids[first : last + 1])) == squeezed(name)
        assert subject_span(tokenizer, template.format(name), name) == range(first, last + 1)


def test_long_names_are_several_tokens(clip_l):
    """Control of the test above: where every name one token, any rule would find its last."""
    counts = {name: len(content_ids(clip_l, name)) for name in NAMES}
    assert counts["parachute"] == 1 and counts["Van Gogh"] == 2 and max(counts.values()) >= 5


def test_a_name_that_merges_with_its_neighbors_is_refused(clip_l):
    with pytest.raises(ValueError, match="merge with their neighbors"):
        slot_token(clip_l, "a photo of {}ing", "paint")
    assert slot_token(clip_l, "a photo of {}-like art", "paint") == 4


def test_case_and_spaces_do_not_matter(clip_l):
    assert (
        content_ids(clip_l, "Van  Gogh")
        == content_ids(clip_l, " van gogh ")
        == content_ids(clip_l, "VAN GOGH")
    )
    assert content_ids(clip_l, "VanGogh") != content_ids(clip_l, "Van Gogh")


def test_nothing_is_cut_off(clip_l, clip_g):
    for tokenizer in (clip_l, clip_g):
        whole = token_ids(tokenizer, [" ".join(["cat"] * 75)])[0].tolist()
        assert whole == [START, *[2368] * 75, END]
        with pytest.raises(ValueError, match="prompt has 76 tokens, the limit is 75"):
            token_ids(tokenizer, [" ".join(["cat"] * 76)])


def test_padding_differs_and_the_end_token_does_not(clip_l, clip_g):
    first, second = (token_ids(one, ["a cat", "a cat!"]) for one in (clip_l, clip_g))
    assert first[0, 4:].tolist() == [END] * 73 and second[0, 4:].tolist() == [0] * 73
    assert eot_position(clip_l, first).tolist() == eot_position(clip_g, second).tolist() == [3, 4]
    # "!" in a prompt is the token that ends a word, or with the padding of SDXL's second encoder the padding itself
    assert first[1, 3] == 256 and second[1, 3] == 0


def test_a_word_takes_the_place_of_whole_words_alone(clip_l):
    read = lambda text: content_ids(clip_l, text)
    assert tokens.opened(clip_l, "a hotdog and a dog.", "dog", 2) == [
        *read("a hotdog and a"),
        None,
        None,
        *read("."),
    ]
    assert tokens.opened(clip_l, "A Van Gogh", "van gogh", 1) == [
        *read("a"),
        None,
    ]  # control: nothing stands in it
    with pytest.raises(ValueError, match="does not hold the phrase 'dog'"):
        tokens.opened(clip_l, "a hotdog", "dog", 1)
    with pytest.raises(ValueError, match="holds the phrase 'dog' 2 times: write it once"):
        tokens.opened(clip_l, "a dog and a Dog", "dog", 1)


@pytest.mark.slow
def test_a_search_may_use_most_of_the_vocabulary(clip_l, clip_g):
    """Every token that it may use reads as itself for both; "!" is none of them, as what SDXL pads with."""
    alone, both = tokens.vocabulary([clip_l]), tokens.vocabulary([clip_l, clip_g])
    assert 25_000 < len(both) < len(alone) < 49_406
    assert set(both.tolist()) < set(alone.tolist()) and 256 in alone and 256 not in both
    for token in both[::997].tolist():
        assert (
            content_ids(clip_l, clip_l.decode([token]))
            == content_ids(clip_g, clip_g.decode([token]))
            == [token]
        )
    assert len(tokens.vocabulary([clip_l], blocked=["cat"])) < len(alone)
