"""Each variant changes what it says, and nothing else."""

import signal
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

import experiments
import recon_loss
import train
from model import ModelConfig
from recon_loss import total_loss
from sample import Checkpoint
from small import SIZES, B, T, TinyEncoder, V, random_images, small
from variants import RUNS, SharpenedWords, subclass
from words import BOS, PAD

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------- visual words


def with_weights_of(plain, model_class, **changes):
    """A model of another class with the same weights; what it adds is random."""
    model = model_class(ModelConfig(**(SIZES | changes))).eval()
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(key.startswith("raw_proj") for key in missing)
    return model


def visual_words(model_class):
    """Of a variant, and of the plain model."""
    plain = small()
    tokens = torch.randn(B, 4, SIZES["encoder_width"])
    model = with_weights_of(plain, model_class)
    return model.visual_words(tokens), plain.visual_words(tokens)


@torch.no_grad()
@pytest.mark.parametrize("name, count", [("first4", 4), ("first8", 8)])
def test_first_words_are_kept_and_others_are_pad(name, count):
    words, plain = visual_words(RUNS[name].model_class)
    assert torch.equal(words[:, :count], plain[:, :count])
    pad = F.one_hot(torch.tensor(PAD), V).float()
    assert (words[:, count:] == pad).all()


@torch.no_grad()
def test_words_can_be_blurred_and_sharpened():
    words, plain = visual_words(subclass(SharpenedWords, "sharpness", 0.0))
    torch.testing.assert_close(words, torch.full_like(plain, 1 / V))
    words, plain = visual_words(subclass(SharpenedWords, "sharpness", 1e4))
    torch.testing.assert_close(words, F.one_hot(plain.argmax(-1), V).float())
    words, plain = visual_words(SharpenedWords)
    assert torch.equal(words, plain)


@torch.no_grad()
@pytest.mark.parametrize("name, sharpness", [("blurred", 0.3), ("hard", 10)])
def test_blurred_and_hard_words_are_powers_of_the_plain_ones(name, sharpness):
    words, plain = visual_words(RUNS[name].model_class)
    power = plain.double() ** sharpness
    expected = power / power.sum(-1, keepdim=True)
    torch.testing.assert_close(words.double(), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_reversed_words():
    words, plain = visual_words(RUNS["reversed"].model_class)
    assert torch.equal(words.flip(1), plain)


# ---------------------------------------------------------------- the prefix


def recon_gradients(model):
    """Names of parameters that RecA's loss trains, encoder included."""
    encoder = TinyEncoder()
    batch = {"main": {"image": random_images()}}
    total_loss(model.train(), encoder, batch, {"recon": 1.0})[0].backward()
    named = [*model.named_parameters(), *encoder.named_parameters(prefix="encoder")]
    return {name for name, p in named if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("paradigm", ["flow", "ar", "mask", "mar"])
def test_a_trained_connector_has_a_gradient_and_the_encoder_none(paradigm):
    plain = small(paradigm)
    model = with_weights_of(plain, RUNS["train_connector"].model_class, paradigm=paradigm)
    trained = recon_gradients(model)
    assert {name for name, _ in model.named_parameters() if "connector" in name} <= trained
    assert "wte.weight" in trained
    assert not any(name.startswith("encoder") for name in trained)
    assert not any(name.startswith("connector") for name in recon_gradients(plain))


@pytest.mark.parametrize("name, n", [("features", 4), ("pixels", 4)])
def test_a_raw_prefix_holds_projected_tokens_between_bos_and_pad(name, n):
    size = {"image_size": 12, "patch_size": 6}
    model = with_weights_of(small(**size), RUNS[name].model_class, **size)
    prefix = model.recon_prefix(TinyEncoder(), random_images())
    assert prefix.shape == (B, T, SIZES["width"])
    assert torch.equal(prefix[:, 0], model.wte.weight[BOS].expand(B, -1))
    assert (prefix[:, 1 + n :] == model.wte.weight[PAD]).all()
    assert not torch.equal(prefix[0, 1], prefix[1, 1]), "it depends on the image"


@pytest.mark.parametrize("name", ["features", "pixels"])
def test_a_raw_projection_is_trained_and_the_connector_is_not(name):
    size = {"image_size": 12, "patch_size": 6}
    model = with_weights_of(small(**size), RUNS[name].model_class, **size)
    trained = recon_gradients(model)
    assert {key for key, _ in model.named_parameters() if "raw_proj" in key} <= trained
    assert not any(key.startswith(("connector", "encoder")) for key in trained)


def test_known_features_are_used():
    size = {"image_size": 12, "patch_size": 6}
    model = with_weights_of(small(**size), RUNS["features"].model_class, **size)
    images = random_images()
    encoder = TinyEncoder()
    features = encoder(images).patch_tokens
    with_encoder = model.recon_prefix(encoder, images)
    assert torch.equal(model.recon_prefix(None, images, features), with_encoder)


def test_tokens_that_do_not_fit_the_prefix_get_a_sentence():
    model = with_weights_of(small(), RUNS["pixels"].model_class)  # 9 patches, T = 7
    with pytest.raises(ValueError, match="9 tokens.*room for 6.*larger patches"):
        model.recon_prefix(TinyEncoder(), random_images())


# ---------------------------------------------------------------- runs of train.py

TINY = (
    "--width 16 --depth 1 --heads 2 --image_size 24 --patch_size 8 --batch_size 4 --warmup 2 "
    "--encoder_steps 2 --pretrain_steps 2 --align_steps 2 --reca_steps 3 --device cpu"
)


def run(function, *argv, **hooks):
    """train.main, or the main of experiments.py, without the scores at the end."""
    try:
        with patch.object(train, "report"):
            function(list(map(str, argv)), **hooks)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base, hardly trained."""
    out = tmp_path_factory.mktemp("base")
    run(train.main, *TINY.split(), "--out_dir", out)
    return out / "pretrain.pt"


@pytest.fixture
def train_variant(base, tmp_path):
    """Trains a stage of a variant from the base; returns its weights and the base's."""

    def start(name, stage="reca", *options):
        options = [
            *TINY.split(),
            *options,
            "--stage",
            stage,
            "--init_from",
            base,
            "--out_dir",
            tmp_path,
        ]
        run(experiments.main, "train", "--variant", name, *options)
        saved = torch.load(tmp_path / f"{stage}.pt", weights_only=True)
        return saved["model"], torch.load(base, weights_only=True)["model"]

    return start


def changed(weights, before):
    return {
        name
        for name in weights
        if not torch.equal(weights[name], before.get(name, weights[name] + 1))
    }


@pytest.mark.parametrize("name", ["features", "pixels"])
def test_reca_with_a_raw_prefix_trains_its_projection(name, train_variant, tmp_path):
    names = changed(*train_variant(name))
    projection = {"features": {"0", "1", "3"}, "pixels": {""}}[name]
    expected = {f"raw_proj.{i}.weight".replace("..", ".") for i in projection}
    assert {key for key in names if key.startswith("raw_proj")} == expected
    assert not any(key.startswith("connector") for key in names)
    with pytest.raises(ValueError, match="experiments.py"):
        Checkpoint(tmp_path / "reca.pt")
    Checkpoint(tmp_path / "reca.pt", model_class=RUNS[name].model_class)


def test_reca_trains_the_connector_too(train_variant):
    names = changed(*train_variant("train_connector"))
    assert "connector.queries" in names
    assert not any(key.startswith("connector") for key in changed(*train_variant("hard")))


@pytest.mark.parametrize("name, p", [("no_drop", 0.0), ("drop_30", 0.3), ("hard", 0.1)])
def test_the_share_of_dropped_conditions(name, p, train_variant):
    drop_prefix = recon_loss.drop_prefix
    with patch.object(recon_loss, "drop_prefix", side_effect=drop_prefix) as dropped:
        train_variant(name)
    assert {call.args[2] for call in dropped.call_args_list} == {p}


@pytest.mark.parametrize("name", ["own_captions", "dense_captions"])
def test_captions_of_the_control(name, train_variant):
    seen = []

    def watch(model, encoder, batch, *args):
        seen.append(batch["main"])
        words = model.encode_visual_words(encoder, batch["main"]["image"])
        seen[-1]["words"] = words.argmax(-1)
        return total_loss(model, encoder, batch, *args)

    with patch.object(train, "total_loss", watch):
        train_variant(name, "sft")
    main = seen[-1]
    if name == "dense_captions":
        assert torch.equal(main["caption"], main["full_caption"])
    else:
        assert torch.equal(main["caption"][:, 1:], main["words"])
        assert (main["caption"][:, 0] == BOS).all()


def test_few_images(base, tmp_path):
    changes = {"max_images": 2}
    seen = set()

    class Watch(train.LossModule):
        def forward(self, batch):
            seen.update(batch["main"]["image"].sum((1, 2, 3)).tolist())
            return super().forward(batch)

    stages = train.STAGES | {"reca": train.replace(train.STAGES["reca"], **changes)}
    options = [*TINY.split(), "--stage", "reca", "--init_from", base, "--out_dir", tmp_path]
    run(train.main, *options, loss_class=Watch, stages=stages)
    assert len(seen) == 2
    assert RUNS["images_500"].stages["reca"].max_images == 500


def test_no_words_to_words(train_variant):
    with patch.object(train, "total_loss", side_effect=total_loss) as called:
        train_variant("no_t2t")
    assert all("t2t" not in call.args[3] for call in called.call_args_list)
    assert "t2t" in train.STAGES["reca"].losses


def refusal(capsys, *argv):
    """What experiments.py train says on standard error before it exits with code 2."""
    with pytest.raises(SystemExit) as end:
        run(experiments.main, "train", *argv)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_an_unknown_variant_is_refused(tmp_path, capsys):
    assert "pixels" in refusal(capsys, "--variant", "pixel", "--out_dir", tmp_path)


def test_tokens_that_do_not_fit_end_training(base, tmp_path, monkeypatch, capsys):
    def raw_tokens(self, encoder, images, features):
        return torch.zeros(len(images), 40, 192)

    monkeypatch.setattr(RUNS["pixels"].model_class, "raw_tokens", raw_tokens)
    options = [*TINY.split(), "--stage", "reca", "--init_from", base, "--out_dir", tmp_path]
    assert "40 tokens" in refusal(capsys, "--variant", "pixels", *options)
