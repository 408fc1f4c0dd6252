from __future__ import annotations

import itertools

import numpy as np
import pytest

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError

SCHEDULES = [
    NoiseSchedule(prediction="eps"),
    NoiseSchedule(prediction="denoised", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    NoiseSchedule(prediction="v_prediction", beta_schedule="squaredcos_cap_v2"),
    NoiseSchedule(kind="flow", prediction="velocity"),
]


def network_output(schedule: NoiseSchedule, time: float, x0: float, eps: float) -> float:
    """What a perfect network says about x_t = alpha x_0 + sigma eps."""
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    return {"eps": eps, "denoised": x0, "v_prediction": alpha * eps - sigma * x0, "velocity": eps - x0}[schedule.prediction]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.prediction)
def test_output_map_recovers_data_and_noise(schedule):
    x0, eps = 0.7, -1.3
    for time in schedule.timesteps(5)[:-1]:
        x = schedule.alpha(time) * x0 + schedule.sigma(time) * eps
        p, q, r, s = schedule.output_map(time)
        output = network_output(schedule, time, x0, eps)
        assert p * x + q * output == pytest.approx(x0, rel=1e-9)
        assert r * x + s * output == pytest.approx(eps, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.prediction)
def test_a_jump_stays_on_the_line_between_data_and_noise(schedule):
    x0, eps = 0.7, -1.3
    times = schedule.timesteps(6)
    for time, later in itertools.pairwise(times):
        x = schedule.alpha(time) * x0 + schedule.sigma(time) * eps
        a, b = schedule.jump_coefficients(time, later)
        expected = schedule.alpha(later) * x0 + schedule.sigma(later) * eps
        assert a * x + b * network_output(schedule, time, x0, eps) == pytest.approx(expected, rel=1e-9)


def test_timesteps_are_dits_respacing():
    times = NoiseSchedule().timesteps(25)
    assert times[:3] == (999.0, 957.0, 916.0)
    assert times[-4:] == (83.0, 42.0, 0.0, -1.0)


def test_timesteps_of_other_spacings_are_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for spacing in ("leading", "trailing"):
        scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=0)
        scheduler.set_timesteps(7)
        assert NoiseSchedule(spacing=spacing).timesteps(7)[:-1] == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_are_diffusers(name, zero_snr):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_schedule=name, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_snr)
    ours = NoiseSchedule(beta_schedule=name, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_snr)
    # diffusers multiplies the 1000 factors in float32.
    np.testing.assert_allclose(ours.alphas_cumprod, scheduler.alphas_cumprod.double().numpy(), rtol=1e-3, atol=1e-6)


def test_flow_times_are_shifted():
    assert NoiseSchedule(kind="flow", prediction="velocity").timesteps(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    shifted = NoiseSchedule(kind="flow", prediction="velocity", shift=3.0).timesteps(2)
    assert shifted == pytest.approx((1.0, 0.75, 0.0))


def test_ends_of_the_schedules():
    ddpm, flow = NoiseSchedule(), NoiseSchedule(kind="flow", prediction="velocity")
    assert (ddpm.alpha(ddpm.clean_time), ddpm.sigma(ddpm.clean_time)) == (1.0, 0.0)
    assert (flow.alpha(flow.clean_time), flow.sigma(flow.noisiest_time)) == (1.0, 1.0)
    # The first jump of four multiplies the noise by about 9, a single one by 157 (alpha at t = 999 is 0.00635).
    assert ddpm.jump_coefficients(999, 749)[0] == pytest.approx(9.11, abs=0.01)
    assert ddpm.jump_coefficients(999, -1)[0] == pytest.approx(157.41, abs=0.01)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(kind="vp"), "kind is 'vp'"),
    (dict(prediction="noise"), "prediction is 'noise'"),
    (dict(spacing="karras"), "spacing is 'karras'"),
    (dict(num_train_timesteps=0), "expected 1 to"),
])  # fmt: skip
def test_settings_that_are_unknown_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        NoiseSchedule(**settings)


def test_times_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match="0 to 999"):
        NoiseSchedule().alpha(999.5)
    with pytest.raises(InputError, match="expected 1 to 1000"):
        NoiseSchedule().timesteps(1001)
    with pytest.raises(InputError, match="v_prediction"):
        NoiseSchedule(rescale_betas_zero_snr=True).output_map(999)
    with pytest.raises(InputError, match="beta_schedule is 'sigmoid'"):
        NoiseSchedule(beta_schedule="sigmoid").timesteps(5) and NoiseSchedule(beta_schedule="sigmoid").alpha(3)


@pytest.mark.parametrize("schedule", [*SCHEDULES, NoiseSchedule(trained_betas=(0.1, 0.2, 0.3))], ids=str)
def test_schedule_survives_json(schedule):
    assert NoiseSchedule.from_json(schedule.to_json()) == schedule
    with pytest.raises(InputError, match="unknown settings"):
        NoiseSchedule.from_json({**schedule.to_json(), "gamma": 1})


@pytest.mark.parametrize(("settings", "message"), [
    (dict(kind="flow", shift=float("nan")), "shift is nan"),
    (dict(kind="flow", shift=float("inf")), "shift is inf"),
    (dict(kind="flow", shift=0.0), "shift is 0"),
    (dict(kind="flow", shift="3"), "expected a number"),
    (dict(kind="flow", path="bezier"), "path is 'bezier'"),
    (dict(kind="flow", path="vp", shift=2.0), "path 'vp' has no shift"),
    (dict(path="gvp"), "belong to a 'flow'"),
    (dict(num_train_timesteps=10**9), "num_train_timesteps is 1000000000"),
    (dict(beta_end=float("nan")), "beta_end is nan"),
    (dict(beta_schedule="cosine"), "beta_schedule is 'cosine'"),
    (dict(trained_betas=(0.1, float("nan"))), "beta of trained_betas is nan"),
    (dict(trained_betas=()), "trained_betas is empty"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused_before_anything_is_computed(settings, message):
    with pytest.raises(InputError, match=message):
        NoiseSchedule(**settings)


def test_schedules_without_a_path_are_written_as_they_were_before_there_was_one():
    assert {"path", "start"}.isdisjoint(NoiseSchedule(kind="flow", prediction="velocity").to_json())
    curved = NoiseSchedule(kind="flow", prediction="eps", path="gvp", start=0.999)
    assert NoiseSchedule.from_json(curved.to_json()) == curved
