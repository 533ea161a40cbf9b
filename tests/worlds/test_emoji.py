"""The captioned pictures of `emoji`: what is trained on, what is held out, and what words say of them."""

from collections import Counter

import numpy as np
import pytest

from whence.worlds.emoji import pictures


def test_what_is_held_out_is_in_no_training_set_and_together_they_are_everything():
    known, held, all_of_it = pictures.training_set(), pictures.held_out(), pictures.everything()
    assert (len(known), len(held), len(all_of_it)) == (903, 48, 951)
    assert not {p.tobytes() for p in known.pictures} & {p.tobytes() for p in held.pictures}
    assert Counter(known.captions) + Counter(held.captions) == Counter(all_of_it.captions)


def test_each_word_of_a_held_out_caption_is_taught_by_a_training_picture():
    taught = {w for c in pictures.training_set().captions for w in c.split()}
    assert {w for c in pictures.held_out().captions for w in c.split()} <= taught


def test_another_key_holds_out_other_pictures_and_the_same_key_the_same():
    pictures._held_out.cache_clear()
    assert pictures.held_out().fingerprint() == pictures.held_out().fingerprint()
    assert set(pictures.held_out("another").captions) != set(pictures.held_out().captions)


def test_no_two_pictures_share_a_caption_and_none_is_blank():
    everything = pictures.everything()
    assert len(set(everything.captions)) == len(everything)
    assert (everything.pictures.reshape(951, -1).std(1) > 1).all()
    assert everything.pictures.shape == (951, 64, 64, 3)


def test_an_example_is_its_caption_and_its_picture_and_its_label_is_the_caption():
    known = pictures.training_set()
    i = known.captions.index("rice ball")
    caption, picture = known[i]
    assert caption == known.label(i) == "rice ball"
    assert (picture == pictures.everything().pictures[pictures.everything().captions.index("rice ball")]).all()


def test_the_fingerprint_changes_with_a_pixel_a_caption_and_the_order():
    known = pictures.training_set()
    pixels = known.pictures.copy()
    pixels[3, 30, 30, 0] ^= 1
    captions = ("another", *known.captions[1:])
    back = pictures.Emoji(known.captions[::-1], known.pictures[::-1])
    others = [pictures.Emoji(known.captions, pixels), pictures.Emoji(captions, known.pictures), back]
    assert len({known.fingerprint(), *(o.fingerprint() for o in others)}) == 4


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("smiling face with heart-shaped eyes", "smiling face with heart shaped eyes"),
        ("squared cjk unified ideograph-7121", "squared cjk unified ideograph seven one two one"),
    ],
)
def test_a_name_is_read_as_words_of_letters(name, caption):
    assert pictures.plain(name) == caption


def test_the_notice_of_the_pictures_is_kept_beside_them():
    notice = (pictures.Path(pictures.__file__).parent / "data" / "NOTICE").read_text()
    assert "Apache 2.0" in notice
    assert "noto-emoji" in notice


def test_distances_find_a_picture_among_all_even_when_it_is_noisy():
    from whence.worlds.emoji.recall import distances

    every = pictures.everything().pictures
    noise = np.random.default_rng(0).normal(0, 40, every[:20].shape)
    noisy = np.clip(every[:20] + noise, 0, 255).astype(np.uint8)
    assert (distances(noisy, every).argmin(1) == np.arange(20)).all()
    by_hand = np.sqrt(((noisy[3].astype(float) - every[7]) ** 2).mean())
    assert distances(noisy, every)[3, 7] == pytest.approx(by_hand, rel=1e-4)
