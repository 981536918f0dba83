"""Assignment 3, flow: what each blank has to do.

    python -m pytest -q tests/test_assignments_3.py

# B batch, T prefix length, N image positions, P values of a patch, D width
"""

import math

import pytest
import torch
from torch import nn

from laws import assert_close, assert_learns, assert_shape

pytestmark = pytest.mark.usefixtures("one_thread")
B, T, N, P, D = 2, 7, 9, 48, 24


# -------------------------------------------------------- paradigms.interpolate


def test_interpolate_goes_from_noise_to_image():
    from paradigms import interpolate

    image, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert_close(interpolate(image, noise, torch.zeros(1)), noise, "t = 0 is noise")
    assert_close(interpolate(image, noise, torch.ones(1)), image, "t = 1 is the image")
    image, noise = torch.full((1, 2, 3), 8.0), torch.full((1, 2, 3), -4.0)
    for t, value in [(0.25, -1.0), (0.5, 2.0), (0.75, 5.0), (0.9, 6.8)]:
        x_t = interpolate(image, noise, torch.tensor(t))
        assert_close(x_t, torch.full((1, 2, 3), value), f"from -4 to 8 at t = {t}")
    x_t = interpolate(
        image.expand(2, 2, 3), noise.expand(2, 2, 3), torch.tensor([0.25, 0.5]).view(2, 1, 1)
    )
    assert_close(x_t[:, 0, 0], torch.tensor([-1.0, 2.0]), "each image has its own t (B, 1, 1)")


def test_the_velocity_of_the_path_is_constant():
    from paradigms import interpolate

    image, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    t = torch.rand(2, 3, 1)
    _, dx_dt = torch.func.jvp(lambda t: interpolate(image, noise, t), (t,), (torch.ones_like(t),))
    assert_close(dx_dt, image - noise, "the derivative by t is image - noise, at each t")


def test_interpolate_passes_gradients():
    from paradigms import interpolate

    image, noise = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    t = torch.full((2, 1), 0.25)
    interpolate(image, noise, t).sum().backward()
    assert_learns(image, "the image")
    assert_learns(noise, "the noise")
    assert_close(image.grad, torch.full((2, 3), 0.25), "the derivative by the image is t")
    assert_close(noise.grad, torch.full((2, 3), 0.75), "the derivative by the noise is 1 - t")


# -------------------------------------------------------- paradigms.velocity_squared_error


# t, x_pred - x, the squared error of the velocity (MIN_ONE_MINUS_T is 0.1)
ERRORS = [(0.0, 0.3, 0.09), (0.5, 0.3, 0.36), (0.75, -0.3, 1.44), (0.8, 0.1, 0.25)]
ERRORS += [(0.9, 0.2, 4.0), (0.97, 0.3, 9.0), (1.0, -0.3, 9.0), (0.5, 0.0, 0.0)]


@pytest.mark.parametrize("t, difference, expected", ERRORS)
def test_velocity_squared_error_by_hand(t, difference, expected):
    from paradigms import velocity_squared_error

    x = torch.full((1, 2, 3), 0.7)
    error = velocity_squared_error(x + difference, x, torch.full((1, 1, 1), t))
    law = f"{difference} at t = {t}, 1 - t being at least 0.1, element by element"
    assert_close(error, torch.full((1, 2, 3), expected), law, 1e-4)


def test_velocity_squared_error_has_a_time_for_each_image_or_patch():
    from paradigms import velocity_squared_error

    x, difference = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for shape in [(2, 1, 1), (2, 3, 1)]:
        t = torch.rand(shape) * 0.9
        root = difference / (1 - t)
        law = f"t of shape {shape}"
        assert_close(velocity_squared_error(x + difference, x, t), root * root, law, 1e-3)


def test_velocity_squared_error_passes_gradients():
    from paradigms import velocity_squared_error

    x_pred = torch.tensor([0.5, 0.5, -0.5]).view(1, 1, 3).requires_grad_()
    t = torch.tensor([0.5]).view(1, 1, 1)
    velocity_squared_error(x_pred, torch.zeros(1, 1, 3), t).sum().backward()
    assert_learns(x_pred, "the prediction")
    expected = torch.tensor([4.0, 4.0, -4.0]).view(1, 1, 3)
    assert_close(x_pred.grad, expected, "the derivative is 2 (x_pred - x) / (1 - t)^2")


# -------------------------------------------------------- paradigms.Flow.loss


class Recorder:
    """Stands in for model.predict_image: what it was shown; it answers x plus an error."""

    def __init__(self, images, error):
        from paradigms import patchify

        self.x = patchify(images, 4)
        self.error = error
        self.calls = []

    def __call__(self, prefix, x_t, t):
        self.calls.append((prefix, x_t, t))
        return self.x + self.error


def loss_and_call(images, error, noise_scale=3.0, prefix="prefix", seed=0):
    from small import small

    model = small(noise_scale=noise_scale)
    torch.manual_seed(seed)
    recorder = Recorder(images, error)
    model.predict_image = recorder
    loss = model.paradigm.loss(model, prefix, images)
    assert len(recorder.calls) == 1, "one pass through the model"
    return loss, recorder


def test_the_model_sees_noised_patches_and_their_times():
    torch.manual_seed(0)
    count = 2000
    images = torch.rand(count, 3, 12, 12)
    _, recorder = loss_and_call(images, 0.0)
    prefix, x_t, t = recorder.calls[0]
    assert prefix == "prefix", "the prefix is handed on as it is"
    assert_shape(x_t, (count, N, P), "the model is shown noised patches")
    assert_shape(t, (count,), "and one time for all patches of an image")
    assert t.min() > 0 and t.max() < 1, "times lie in (0, 1)"
    logit = torch.logit(t.double())
    law = "times are those of sample_times: the logit is normal, mean -1, std 1"
    assert abs(logit.mean() + 1) < 0.05 and abs(logit.std() - 1) < 0.05, law
    strata = (torch.special.ndtr(logit + 1) * count).floor().long()
    message = "drawn for the whole batch at once: one time in each of B equal strata"
    assert strata.unique().numel() > 0.95 * count, message
    assert not torch.equal(t.sort().values, t), "in a random order"
    noise = (x_t - t[:, None, None] * recorder.x) / (1 - t)[:, None, None]
    law = "x_t = t x + (1 - t) noise, noise of mean 0 and std noise_scale = 3"
    assert abs(noise.std() - 3) < 0.03, f"{law}, not {noise.std():.3f}"
    assert abs(noise.mean()) < 0.03, f"{law}, not of mean {noise.mean():.3f}"
    for axis, what in [(0, "image"), (1, "patch"), (2, "value")]:
        spread = noise.std(axis).mean().item()
        assert abs(spread - 3) < 0.35, f"each {what} has noise of its own: std {spread:.2f}"
    product = (noise * recorder.x).mean().item()
    assert abs(product) < 0.03, "the noise does not know the image"
    _, again = loss_and_call(images, 0.0, seed=1)
    assert not torch.equal(again.calls[0][1], x_t), "each call draws new noise"


def test_flow_loss_by_hand():
    torch.manual_seed(1)
    images = torch.rand(5, 3, 12, 12)
    loss, _ = loss_and_call(images, 0.0)
    assert_shape(loss, (), "the loss is a scalar")
    assert loss == 0, "the loss of the clean patches, in [-1, 1], is 0"
    error = torch.randn(5, N, P)
    loss, recorder = loss_and_call(images, error)
    total = 0.0
    for i, t in enumerate(recorder.calls[0][2].tolist()):
        total += error[i].square().mean().item() / max(1 - t, 0.1) ** 2 / 5
    law = "the mean over images, patches and values of the velocity's squared error"
    assert_close(loss, torch.tensor(total), law, 1e-4)


def test_flow_loss_learns():
    from small import small

    offset = nn.Parameter(torch.tensor(0.2))
    images = torch.rand(4, 3, 12, 12)
    loss, recorder = loss_and_call(images, offset)
    loss.backward()
    assert_learns(offset, "what the model predicts")
    weight = (1 / (1 - recorder.calls[0][2]).clamp(min=0.1).square()).mean()
    assert_close(offset.grad, 0.4 * weight, "the derivative by an offset of 0.2", 1e-4)

    model, prefix = small(), torch.randn(4, T, D, requires_grad=True)
    model.paradigm.loss(model, prefix, images).backward()
    assert_learns(prefix, "the prefix")
    for name, p in [*model.blocks.named_parameters(), *model.paradigm.named_parameters()]:
        assert_learns(p, name)


def test_repeats_of_an_image_share_a_prefix():
    """Images (B R) behind prefixes (B): each has its own noise and time."""
    images = torch.rand(2, 3, 12, 12).repeat_interleave(3, 0)
    _, recorder = loss_and_call(images, 0.0, prefix=torch.zeros(2, T, D))
    prefix, x_t, t = recorder.calls[0]
    assert len(prefix) == 2 and len(x_t) == 6, "the prefix stays as it is, images are not cut"
    assert t.unique().numel() == 6, "each repeat has its own time"


# -------------------------------------------------------- recon_loss.drop_prefix


@pytest.fixture
def null(model):
    """<bos> <eos> <pad> ...: (T, D)."""
    return model.text_prefix(torch.tensor([1, 2, 0, 0, 0, 0, 0])).detach()


def which_are_null(dropped, prefix, null):
    """(B,) bool; each row is either as it was or the empty condition."""
    is_null = (dropped == null).all(-1)  # (B, T)
    is_kept = (dropped == prefix).all(-1)
    whole = is_null.all(1) | is_kept.all(1)
    message = "a condition is dropped whole, to <bos> <eos> <pad> ..., or kept whole"
    assert whole.all(), message
    return is_null.all(1)


def test_dropped_conditions_are_the_empty_caption(model, null):
    from recon_loss import drop_prefix

    prefix = torch.randn(50, T, D)
    before = prefix.clone()
    assert torch.equal(drop_prefix(model, prefix, 0.0), prefix), "p = 0 keeps all"
    law = "p = 1 drops all: <bos> <eos> <pad> ..."
    assert_close(drop_prefix(model, prefix, 1.0), null.expand(50, -1, -1), law)
    drop_prefix(model, prefix, 0.5)
    assert torch.equal(prefix, before), "the argument stays as it was"


@pytest.mark.parametrize("p", [0.1, 0.35, 0.8])
@torch.no_grad()
def test_each_condition_is_dropped_by_chance(model, null, p):
    from recon_loss import drop_prefix

    torch.manual_seed(0)
    prefix = torch.randn(20, T, D)
    rows = [which_are_null(drop_prefix(model, prefix, p), prefix, null) for _ in range(400)]
    dropped = torch.stack(rows).double()  # (400, 20)
    share = dropped.mean().item()
    assert abs(share - p) < 0.03, f"p = {p}: dropped are {share:.2f}"
    by_row = dropped.mean(0)
    spread = 4 * math.sqrt(p * (1 - p) / 400)
    message = f"each row of a batch is dropped as often as any other, with p = {p}"
    assert ((by_row - p).abs() < spread).all(), f"{message}: {by_row.tolist()}"
    deviation = dropped.sum(1).std().item()
    expected = math.sqrt(20 * p * (1 - p))
    message = "each row by a chance of its own: the number of dropped ones is binomial"
    assert abs(deviation / expected - 1) < 0.2, (
        f"{message}, std {deviation:.2f}, not {expected:.2f}"
    )


def test_kept_and_dropped_conditions_learn(model):
    from recon_loss import drop_prefix

    torch.manual_seed(0)
    prefix = torch.randn(40, T, D, requires_grad=True)
    dropped = drop_prefix(model, prefix, 0.5)
    kept = (dropped == prefix).flatten(1).all(1)
    dropped.sum().backward()
    assert_learns(prefix, "the conditions that are kept")
    expected = kept.float().view(-1, 1, 1).expand(40, T, D)
    assert_close(prefix.grad, expected, "1 where a condition is kept, 0 where it is dropped")
    assert_learns(model.wte.weight, "the words of the empty condition")
    read = model.wte.weight.grad.abs().sum(1) > 0
    assert read.nonzero().flatten().tolist() == [0, 1, 2], "<pad>, <bos> and <eos> alone"


def test_a_dropped_condition_has_the_dtype_of_the_prefix(model):
    from recon_loss import drop_prefix

    for p in (0.0, 0.5, 1.0):
        dtype = drop_prefix(model, torch.randn(3, T, D).bfloat16(), p).dtype
        assert dtype == torch.bfloat16, f"p = {p}: the result is in the prefix's dtype, not {dtype}"


# -------------------------------------------------------- paradigms.cfg_predict


class TwoPredictions:
    """Answers with `cond` for the first half of a doubled batch, with `uncond` for the second."""

    def __init__(self, *shape):
        self.cond = torch.randn(B, *shape, requires_grad=True)
        self.uncond = torch.randn(B, *shape, requires_grad=True)
        self.calls = []

    def __call__(self, *inputs):
        self.calls.append(inputs)
        return torch.cat([self.cond, self.uncond]) if len(inputs[0]) == 2 * B else self.cond


@pytest.mark.parametrize("shape", [(5,), (N, P)])
@pytest.mark.parametrize("s", [0.0, 0.3, 0.75, 1.0, 1.5, 2.5, 4])
def test_guidance_goes_from_none_to_the_condition_and_beyond(shape, s):
    from paradigms import cfg_predict

    predict = TwoPredictions(*shape)
    guided = cfg_predict(predict, s, torch.randn(B, 3))
    expected = (1 - s) * predict.uncond + s * predict.cond
    law = f"s = {s} of s cond + (1 - s) uncond; the half with the condition comes first"
    assert_close(guided, expected, law)
    assert len(predict.calls) == 1, "one pass"


@pytest.mark.parametrize("s", [0.0, 1.0, 1, 2.0])
def test_guidance_doubles_every_input(s):
    from paradigms import cfg_predict

    predict = TwoPredictions(4)
    inputs = [torch.randn(B, 3, 5), torch.rand(B), torch.randint(9, (B, 2)), torch.rand(B, 2) < 0.5]
    cfg_predict(predict, s, *inputs)
    shown = predict.calls[0]
    assert len(shown) == len(inputs), f"predict takes all {len(inputs)} inputs, not {len(shown)}"
    for i, (x, seen) in enumerate(zip(inputs, shown, strict=True)):
        if s == 1:
            message = "s = 1 is no guidance: predict takes the inputs as they are, (B, ...)"
            assert seen.shape == x.shape and torch.equal(seen, x), message
        else:
            law = f"input {i} twice, first all with the condition, then all without: (2 B, ...)"
            assert_shape(seen, (2 * B, *x.shape[1:]), law)
            assert torch.equal(seen[:B], x) and torch.equal(seen[B:], x), law
            assert seen.dtype == x.dtype, f"input {i} keeps its dtype"


@pytest.mark.parametrize("s", [0.3, 1.0, 2.5])
def test_guidance_passes_gradients(s):
    from paradigms import cfg_predict

    predict = TwoPredictions(4)
    cfg_predict(predict, s, torch.randn(B, 3)).sum().backward()
    law = f"the derivative by the prediction with the condition is s = {s}"
    assert_learns(predict.cond, "the prediction with the condition")
    assert_close(predict.cond.grad, torch.full((B, 4), s), law)
    if s != 1:
        assert_learns(predict.uncond, "the prediction without the condition")
        law = f"the derivative by the prediction without is 1 - s = {1 - s}"
        assert_close(predict.uncond.grad, torch.full((B, 4), 1 - s), law)


# -------------------------------------------------------- paradigms.euler_sample


class Noises:
    """draw_noise, with all that it has drawn."""

    def __init__(self, *shape):
        self.shape = shape
        self.drawn = []

    def __call__(self):
        self.drawn.append(torch.randn(self.shape) * 2)
        return self.drawn[-1]


class Predicts:
    """predict(x_t, t): a function of both, with all calls."""

    def __init__(self, function):
        self.function = function
        self.calls = []

    def __call__(self, x_t, t):
        message = "t is a tensor without axes, one of the times"
        assert isinstance(t, torch.Tensor) and t.ndim == 0, message
        self.calls.append((x_t, float(t)))
        return self.function(x_t, t)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@torch.no_grad()
def test_an_exact_model_recovers_the_data_in_any_number_of_steps(steps, eta):
    from paradigms import euler_sample

    x = torch.randn(B, N, P)
    predict = Predicts(lambda x_t, t: x)
    sampled = euler_sample(predict, Noises(B, N, P), steps, eta)
    assert_close(sampled, x, f"{steps} steps, eta = {eta}: the last step ends at t = 1, the image")
    times = torch.tensor([t for _, t in predict.calls])
    law = "t_i = (i / steps)^1.5, i from 0 to steps - 1"
    assert_close(times, (torch.arange(steps) / steps) ** 1.5, law)


@pytest.mark.parametrize("steps", [1, 2, 5])
@torch.no_grad()
def test_without_resampling_the_steps_are_eulers(steps):
    from paradigms import euler_sample

    weight = torch.randn(P, P) / 7

    def answer(x_t, t):
        return (x_t @ weight).tanh() * (1 + t)

    predict, draw_noise = Predicts(answer), Noises(B, N, P)
    sampled = euler_sample(predict, draw_noise, steps, 0.0)
    assert len(draw_noise.drawn) == 1, "eta = 0: noise is drawn once, at the start"
    assert_close(predict.calls[0][0], draw_noise.drawn[0], "it starts from noise, at t = 0")
    path = [*predict.calls, (sampled, 1.0)]
    for (now, t), (then, t_next) in zip(path[:-1], path[1:], strict=True):
        velocity = (answer(now, t) - now) / (1 - t)
        law = f"from t = {t:.3f} to {t_next:.3f}: x_t + (t_next - t) (x_pred - x_t) / (1 - t)"
        assert_close(then, now + (t_next - t) * velocity, law, 1e-3)


@pytest.mark.parametrize("eta", [0.3, 0.6, 0.9, 1.0])
@torch.no_grad()
def test_the_share_of_resampled_noise(eta):
    """A model that predicts zeros leaves x_t = (1 - t) noise, which each step can measure."""
    from paradigms import euler_sample

    predict, draw_noise = Predicts(lambda x_t, t: torch.zeros_like(x_t)), Noises(40, N, P)
    euler_sample(predict, draw_noise, 4, eta)
    held = [x_t / (1 - t) for x_t, t in predict.calls]
    assert_close(held[0], draw_noise.drawn[0], "at t = 0 it is the first noise drawn")
    for i in range(1, 4):
        fresh = draw_noise.drawn[i]
        kept = math.sqrt(1 - eta**2)
        law = f"eta = {eta}, step {i}: sqrt(1 - eta^2) noise + eta fresh noise"
        assert_close(held[i], kept * held[i - 1] + eta * fresh, law, 1e-3)
        assert abs(held[i].std() / 2 - 1) < 0.02, "its variance stays as it was"


@torch.no_grad()
def test_images_of_a_batch_are_sampled_apart():
    from paradigms import euler_sample

    def answer(x_t, t):
        return x_t.cos()

    draw_noise = Noises(3, N, P)
    together = euler_sample(answer, draw_noise, 4, 0.0)
    one = euler_sample(answer, lambda: draw_noise.drawn[0][1:2], 4, 0.0)
    assert_close(together[1:2], one, "an image does not depend on the others of its batch")
