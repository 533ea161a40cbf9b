"""The emoji model: its training goes on to the same bits after a stop, and the packaged one knows its pictures."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import whence
from whence.errors import RunError
from whence.models.small_stable_diffusion import TOKENS
from whence.worlds.emoji import model_directory, pictures, recall
from whence.worlds.emoji import train as training

TINY = training.Training(codec_steps=3, codec_batch=2, reader_steps=3, reader_batch=4, steps=3, batch=2, checkpoint=0.0)


@pytest.fixture(autouse=True, scope="module")
def few():
    """All pictures would take seconds to encode, all words as long to tokenize; sixteen pictures train alike."""
    captions = recall.sample(pictures.training_set(), 16).captions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "words", lambda: sorted({w for c in captions for w in c.split()}))
        patch.setattr(training, "training_set", lambda key: recall.sample(pictures.training_set(key), 16))
        yield


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory):
    return training.train(tmp_path_factory.mktemp("whole"), TINY, log=io.StringIO())


@pytest.fixture(scope="module")
def packaged():
    return whence.load(str(model_directory()))


def weights(pipeline):
    names = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
    return {f"{n}/{k}": v for n in names for k, v in load_file(pipeline / f"{n}.safetensors").items()}


# --- the packaged model ----------------------------------------------------------------------------------------------


def test_pictures_of_trained_captions_lie_nearer_their_own_training_picture_than_another_as_the_card_says(packaged):
    card = (Path(__file__).parents[2] / "docs" / "model-card-emoji.md").read_text(encoding="utf8")
    row = re.search(r"^\| nearer its own picture.*?\| trained \|.*?\| (\d+) to (\d+) % \|", card, re.M)
    asked = recall.sample(pictures.training_set(), 16)
    got = recall.recall(recall.draw(packaged, list(asked.captions), steps=8), asked)
    low = int(row[1]) / 100
    assert low > 0.6  # a model that knows nothing is at one half
    assert got["nearer"][2] >= low, got
    assert got["nearer"][0] > 0.6, got


def test_the_packaged_model_draws_the_same_picture_again_and_another_for_another_caption(packaged):
    first, again, other = (packaged.picture(c, seed=3, steps=2).images for c in ("red apple", "red apple", "tram"))
    assert (first == again).all()
    assert (first != other).any()


def test_every_word_of_every_caption_is_one_token_of_the_packaged_model_and_every_caption_fits(packaged):
    for caption in pictures.everything().captions:
        assert [w.partition("#")[0] for w in packaged.words(caption)] == caption.split()  # a second "one" is "one#2"
        assert len(packaged.pipeline.tokenizer(caption).input_ids) == len(caption.split()) + 2 <= TOKENS


def test_the_packaged_model_fits_into_ten_megabytes_and_names_no_folder():
    files = [f for f in model_directory().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 10e6
    for path in (f for f in files if f.suffix == ".json"):
        assert "_name_or_path" not in path.read_text(encoding="utf8"), path


# --- the training ----------------------------------------------------------------------------------------------------


def test_it_writes_a_pipeline_that_the_adapter_loads(finished):
    model = whence.load(str(finished))
    caption = recall.sample(pictures.training_set(), 16).captions[0]
    assert model.picture(caption, seed=1, steps=2).images.shape == (1, 64, 64, 3)
    assert set(caption.split()) <= set(json.loads((finished / "words.json").read_text())["words"])


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_a_stopped_training_goes_on_to_the_same_bits(stop, finished, tmp_path, monkeypatch):
    update, calls = training.Trainee.update, []

    def interrupted(self, loss):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        update(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainee, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.train(tmp_path, TINY, log=io.StringIO())
    assert not (tmp_path / "pipeline").exists()
    resumed = weights(training.train(tmp_path, TINY, log=io.StringIO()))
    whole = weights(finished)
    assert all((resumed[k] == whole[k]).all() for k in whole)


def test_every_picture_is_shown_equally_often():
    shown = np.concatenate([training._shown(TINY, "denoiser", 7, 20, step) for step in range(20)])
    assert (np.bincount(shown, minlength=20) == 7).all()


def test_another_setting_in_the_same_directory_is_refused(finished):
    with pytest.raises(RunError, match="seed 0"):
        training.train(finished.parent, training.Training(**(vars(TINY) | {"seed": 1})))


def test_a_start_without_a_codec_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(RunError, match="whence train"):
        training.train(tmp_path / "out", training.Training(**(vars(TINY) | {"start": str(tmp_path)})))
    assert not (tmp_path / "out" / "training.json").exists()
