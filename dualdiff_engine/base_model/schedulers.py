"""The diffusers schedulers that a base model's noise schedule serves.

diffusers builds schedulers for step counts that they cannot take: timesteps beyond the schedule,
two equal noise levels, fewer steps than an integrator needs. So every count is tried on a tiny
latent, once, before a run is accepted.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dualdiff_engine.base_model.configs import check_scheduler
from dualdiff_engine.base_model.folder import blamed_on, first_line, read_json
from dualdiff_engine.errors import BaseModelError, SettingsError

# its timesteps are logarithms of noise levels, which these networks were not trained with
_OTHER_TIMESTEPS = {"EDMEulerScheduler"}

# our names of a scheduler's options -> diffusers', in its config
_OPTIONS = {
    "spacing": "timestep_spacing",
    "order": "solver_order",
    "karras": "use_karras_sigmas",
    "skip_prk": "skip_prk_steps",
}
# this one goes to `set_timesteps`
_CUSTOM = "timesteps"


class Schedulers:
    """Makes schedulers from `scheduler_config.json`. Raises BaseModelError for an unusable one."""

    def __init__(self, path: Path) -> None:
        import diffusers
        from diffusers import DDPMScheduler, SchedulerMixin

        self._path = path
        config = read_json(path)
        kind = getattr(diffusers, str(config.get("_class_name")), None)
        # other families (flow matching, consistency, …) take other predictions of a network
        fits = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
        if kind is None or not fits or "DDPMScheduler" not in kind._compatibles:
            raise BaseModelError(
                f"{path}: {str(config.get('_class_name'))[:80]!r} is not a scheduler of Stable "
                "Diffusion: use the scheduler_config.json that belongs to the model"
            )
        # `compatibles` also holds placeholders of those that need a package which is not there
        self._kinds = {k.__name__: k for k in (*kind._get_compatibles(), kind)}
        for name in _OTHER_TIMESTEPS:
            self._kinds.pop(name, None)
        known = self._defaults(kind)
        check_scheduler(path, config, known)
        used = {name: value for name, value in config.items() if name in known}
        with blamed_on(path, "use the scheduler_config.json that belongs to the model"):
            self.own: Any = kind.from_config(used)
            noiser = DDPMScheduler.from_config(self.own.config)
        self._check_noise(noiser)
        self._faults: dict[Any, str | None] = {}

    def _defaults(self, kind: Any) -> dict[str, Any]:
        """Every value that a scheduler on offer reads, with its default; the own one's counts."""
        found: dict[str, Any] = {}
        for other in (*self._kinds.values(), kind):
            parameters = inspect.signature(other.__init__).parameters.values()
            found |= {p.name: p.default for p in parameters if p.default is not p.empty}
        return found

    def _check_noise(self, noiser: Any) -> None:
        """The share of the picture falls from nearly 1 towards 0, as `add_noise` needs it."""
        kept = noiser.alphas_cumprod
        steps = noiser.config.num_train_timesteps
        sound = bool(torch.isfinite(kept).all()) and float(kept.min()) >= 0
        if kept.shape != (steps,) or not sound or bool((kept.diff() > 0).any()):
            raise BaseModelError(
                f"{self._path}: its betas give no noise schedule: use the scheduler_config.json "
                "that belongs to the model"
            )

    def make(self, name: str | None, options: Mapping[str, Any] | None = None) -> Any:
        """A fresh scheduler by class name, configured like the base's own.

        options: in place of the base's: spacing, order, karras, skip_prk, timesteps. Raises
        SettingsError for one that the scheduler does not have. `set_timesteps` raises it for a
        count that the scheduler cannot take; timesteps in `options` replace those of the count.
        """
        kind = self._kinds.get(name or type(self.own).__name__)
        if kind is None:
            raise SettingsError(
                f"no scheduler {name!r}: choose one of {', '.join(sorted(self._kinds))}"
            )
        options = dict(options or {})
        try:
            values = _config_values(kind, options)
            scheduler = _checked(kind).from_config(self.own.config, **values)
        except ImportError as error:
            raise SettingsError(
                f"scheduler {kind.__name__!r} needs another package: {first_line(error)}"
            ) from error
        scheduler.check_steps = functools.partial(self._check_steps, kind, options)
        scheduler.custom = options.get(_CUSTOM)
        return scheduler

    def noiser(self) -> Any:
        """DDPM on the base's noise schedule, for `add_noise`."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.own.config)

    def values(self) -> dict[str, Any]:
        """The class and the values that differ from its defaults."""
        defaults = self._defaults(type(self.own))
        own = {name: v for name, v in self.own.config.items() if name in defaults}
        changed = {name: v for name, v in own.items() if v != defaults[name]}
        return {"class": type(self.own).__name__, **changed}

    def _check_steps(self, kind: Any, options: Mapping[str, Any], steps: int) -> None:
        reason = self._fault(kind, options, steps)
        if reason is None:
            return
        custom = _CUSTOM in options
        near = () if custom else (steps + change for change in (-1, 1, -2, 2, 3))
        works = [n for n in near if 1 <= n <= 1000 and self._fault(kind, options, n) is None]
        remedy = f"use {works[0]} steps, or another scheduler" if works else "use another scheduler"
        if options and self._fault(kind, {}, steps) is None:
            remedy = f"leave out or change {', '.join(options)}"
        asked = "these timesteps" if custom else f"{steps} steps"
        raise SettingsError(
            f"{kind.__name__} cannot take {asked} on this base model ({reason}): {remedy}"
        )

    def _fault(self, kind: Any, options: Mapping[str, Any], steps: int) -> str | None:
        """What is wrong with a number of steps; None if a latent comes out finite."""
        key = kind.__name__, tuple(options.items()), steps
        if key not in self._faults:
            values = _config_values(kind, options)
            make = functools.partial(kind.from_config, self.own.config, **values)
            self._faults[key] = _tried(make, steps, options.get(_CUSTOM))
        return self._faults[key]


def _config_values(kind: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as diffusers names them. Raises SettingsError for one that a scheduler lacks."""
    if not options:
        return {}
    own = inspect.signature(kind.__init__).parameters
    taken = [name for name, theirs in _OPTIONS.items() if theirs in own]
    if _CUSTOM in inspect.signature(kind.set_timesteps).parameters:
        taken.append(_CUSTOM)
    for name in options:
        if name not in taken:
            raise SettingsError(
                f"{kind.__name__} does not take {name}: of these options it takes "
                f"{', '.join(taken) or 'none'}"
            )
    return {_OPTIONS[name]: value for name, value in options.items() if name != _CUSTOM}


@functools.cache
def _checked(kind: Any) -> Any:
    """The same scheduler class, whose `set_timesteps` asks `check_steps` first."""

    def set_timesteps(self: Any, num_inference_steps: int, *rest: Any, **named: Any) -> None:
        self.check_steps(num_inference_steps)
        if self.custom is None:
            kind.set_timesteps(self, num_inference_steps, *rest, **named)
        else:
            kind.set_timesteps(self, timesteps=list(self.custom), **named)

    # under the same name: diffusers records it, and looks compatible classes up by it
    own = {
        "__doc__": kind.__doc__,
        "set_timesteps": set_timesteps,
        # some schedulers set timesteps while they are built
        "check_steps": staticmethod(lambda steps: None),
        "custom": None,
    }
    return type(kind.__name__, (kind,), own)


def _tried(make: Callable[[], Any], steps: int, custom: Sequence[int] | None) -> str | None:
    """Step a latent of ones through every timestep with a network that predicts zeros."""
    # some schedulers draw from PyTorch's own generator
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        # a foreign program: whatever it raises, the count does not work
        try:
            scheduler = make()
            if custom is None:
                scheduler.set_timesteps(steps)
            else:
                scheduler.set_timesteps(timesteps=list(custom))
            times = scheduler.timesteps.double()
            last = scheduler.config.num_train_timesteps - 1
            nearest = times.round()
            if not bool(((nearest >= 0) & (nearest <= last)).all()):
                worst = float(times[(times - last / 2).abs().argmax()])
                return f"timestep {worst:g} is outside its noise schedule, 0 to {last}"
            if float(times[0]) < float(times[-1]):
                return "its timesteps go from clean to noisy"
            options: Mapping[str, Any] = {}
            if "generator" in inspect.signature(scheduler.step).parameters:
                options = {"generator": [torch.Generator().manual_seed(0)]}
            latents = torch.ones(1, 2, 4, 1, 1) * scheduler.init_noise_sigma
            for timestep in scheduler.timesteps:
                scheduler.scale_model_input(latents, timestep)
                noise = torch.zeros_like(latents)
                latents = scheduler.step(noise, timestep, latents, **options).prev_sample
        except Exception as error:
            return f"diffusers fails: {type(error).__name__} {first_line(error)}"
    return None if bool(torch.isfinite(latents).all()) else "the latents become NaN or infinite"
